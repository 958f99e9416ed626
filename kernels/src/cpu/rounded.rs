//! Activations of the decode phase, rounded to fifteen bits so that their products with integer codes are exact integers.
//!
//! x ≈ scale · (128 · high + low), one scale a block of 32 or 64 columns: `high` in −127 ..= 127, `low` in −64 ..= 63. An int8
//! product per term then does what two int16 products would, on instructions that multiply bytes. The error of a value is
//! at most 1/32638 of the block's largest; in Kullback–Leibler divergence of a model's output `lowbit bench` measures
//! it against `--exact`.

use super::simd::{Kernel, Lanes, Simd};
use super::tiles::{QUAD, SLAB};

/// Largest rounded magnitude, `127 · 128 + 63`.
const MOST: f32 = 16319.0;

/// Rows of activations, rounded.
pub struct Rounded {
    /// `[t, k]`.
    pub high: Vec<i8>,
    /// `[t, k]`.
    pub low: Vec<i8>,
    /// `[t, k]`, `128 · high + low`; of every quad the columns 0, 2, 1, 3. Empty unless asked for.
    pub words: Vec<i16>,
    /// `[t, k / block]`.
    pub scales: Vec<f32>,
    /// `[t, k / block]`: Σ (128 · high + low).
    pub sums: Vec<i32>,
    /// Columns.
    pub k: usize,
    /// Columns of a block.
    pub block: usize,
}

/// The block for weight groups of this many columns (a multiple of [`SLAB`]): the largest that divides it.
pub fn block_of(group_cols: usize) -> usize {
    if group_cols.is_multiple_of(2 * SLAB) { 2 * SLAB } else { SLAB }
}

impl Rounded {
    /// Rounds x `[t, k]`, `k` a multiple of `block`. A NaN or infinity makes its block's scale NaN or infinite, so that it
    /// still reaches the result.
    pub fn new(simd: Simd, x: &[f32], k: usize, block: usize, words: bool) -> Self {
        let n = x.len();
        let mut r = Self {
            high: vec![0; n],
            low: vec![0; n],
            words: vec![0; if words { n } else { 0 }],
            scales: vec![0.0; n / block],
            sums: vec![0; n / block],
            k,
            block,
        };
        if block == SLAB {
            simd.run(Round::<SLAB> { x, to: &mut r });
        } else {
            simd.run(Round::<{ 2 * SLAB }> { x, to: &mut r });
        }
        for (w, (h, l)) in r.words.chunks_exact_mut(QUAD).zip(r.high.chunks_exact(QUAD).zip(r.low.chunks_exact(QUAD))) {
            let value = |i: usize| i16::from(h[i]) * 128 + i16::from(l[i]);
            w.copy_from_slice(&[value(0), value(2), value(1), value(3)]);
        }
        r
    }
}

struct Round<'a, const B: usize> {
    x: &'a [f32],
    to: &'a mut Rounded,
}

impl<const B: usize> Kernel for Round<'_, B> {
    type Output = ();
    #[expect(clippy::manual_clamp, reason = "`clamp` keeps NaN, which has no integer")]
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { x, to } = self;
        let blocks = x.as_chunks::<B>().0.iter().zip(to.high.as_chunks_mut::<B>().0).zip(to.low.as_chunks_mut::<B>().0);
        for (((x, high), low), (scale, sum)) in blocks.zip(to.scales.iter_mut().zip(&mut to.sums)) {
            // The bits of a magnitude order as the magnitude does, NaN above infinity.
            let top = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
            *scale = f32::from_bits(top) / MOST;
            let inverse = if *scale > 0.0 && scale.is_finite() { 1.0 / *scale } else { 0.0 };
            let mut total = 0i32;
            for i in 0..B {
                // In range up to a rounding of the quotient; NaN, whose block has no finite scale, becomes the lower bound.
                let v = (x[i] * inverse).round_ties_even().max(-MOST).min(MOST);
                // SAFETY: −16319 ≤ v ≤ 16319, and it is not NaN.
                let q = unsafe { v.to_int_unchecked::<i32>() };
                let h = (q + 64) >> 7;
                total += q;
                high[i] = h as i8;
                low[i] = (q - (h << 7)) as i8;
            }
            *sum = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Level;
    use super::*;

    #[test]
    fn values_are_within_half_a_step_and_equal_on_every_instruction_set() {
        let x: Vec<f32> = (0..192).map(|i| ((i * 7919 % 1000) as f32 - 500.0) * 0.013).collect();
        for block in [32, 64] {
            let all =
                [Level::Portable, Level::Avx2, Level::Vnni].map(|l| Rounded::new(Simd::up_to(l), &x, 96, block, true));
            for r in &all {
                for (i, v) in x.iter().enumerate() {
                    let q = i32::from(r.high[i]) * 128 + i32::from(r.low[i]);
                    let scale = r.scales[i / block];
                    assert!((q as f32 * scale - v).abs() <= scale * 0.505, "{v} {q} {scale}");
                    assert!((-64..64).contains(&r.low[i]));
                    let at = i / 4 * 4 + [0, 2, 1, 3][i % 4];
                    assert_eq!(i32::from(r.words[at]), q);
                }
                for (b, sum) in r.sums.iter().enumerate() {
                    let range = b * block..(b + 1) * block;
                    let want: i32 = range.map(|i| i32::from(r.high[i]) * 128 + i32::from(r.low[i])).sum();
                    assert_eq!(*sum, want);
                }
                assert_eq!((&r.high, &r.low, &r.scales), (&all[0].high, &all[0].low, &all[0].scales));
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1f32; 64];
            x[5] = bad;
            let r = Rounded::new(Simd::up_to(Level::Vnni), &x, 64, 64, false);
            assert!(!r.scales[0].is_finite());
        }
    }
}
