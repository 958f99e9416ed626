//! Activations of the decode phase, rounded to fifteen bits so that their products with integer codes are exact integers.
//!
//! x ≈ scale · (128 · high + low), one scale a block of 32 or 64 columns: `high` in −127 ..= 127, `low` in −64 ..= 63. An int8
//! product per term then does what two int16 products would, on instructions that multiply and add four bytes (AVX-512 VNNI); where
//! there are none, the same integers lie in pairs of words. The error of a value is at most 1/32638 of the block's largest; in
//! Kullback–Leibler divergence of a model's output `lowbit bench` measures it against `--exact`.

use super::fixed::pair;
use super::simd::{Kernel, Lanes, Simd};
use super::tiles::{QUAD, SLAB};

/// Largest rounded magnitude, `127 · 128 + 63`.
const MOST: f32 = 16319.0;

/// Rows of activations, rounded.
pub struct Rounded {
    /// The integers `128 · high + low`.
    pub values: Values,
    /// `[k / block, t]`.
    pub scales: Vec<f32>,
    /// `[k / block, t]`: the sum of a block's integers.
    pub sums: Vec<i32>,
    /// Rows.
    pub t: usize,
    /// Columns.
    pub k: usize,
    /// Columns of a block.
    pub block: usize,
}

/// Integers of fifteen bits, in the form an instruction set multiplies.
pub enum Values {
    /// Both `[t, k]`.
    Bytes { high: Vec<i8>, low: Vec<i8> },
    /// `[k / 2, t]` pairs, the first in the low half: of every quad the columns 0 and 2, then 1 and 3.
    Pairs(Vec<u32>),
}

impl Values {
    /// How many integers.
    pub fn len(&self) -> usize {
        match self {
            Values::Bytes { high, low } => high.len().min(low.len()),
            Values::Pairs(pairs) => 2 * pairs.len(),
        }
    }

    /// Columns `4 quad ..` of row `row` of values `[t, k]`.
    #[inline]
    pub fn quad(&self, (t, k): (usize, usize), row: usize, quad: usize) -> [i32; QUAD] {
        match self {
            Values::Bytes { high, low } => std::array::from_fn(|j| {
                let at = row * k + quad * QUAD + j;
                i32::from(high[at]) * 128 + i32::from(low[at])
            }),
            Values::Pairs(pairs) => {
                let half = |v: u32, odd: usize| i32::from((v >> (16 * odd)) as i16);
                let pair = |i: usize| pairs[(2 * quad + i) * t + row];
                [half(pair(0), 0), half(pair(1), 0), half(pair(0), 1), half(pair(1), 1)]
            }
        }
    }
}

/// The block for weight groups of this many columns (a multiple of [`SLAB`]): the largest that divides it.
pub fn block_of(group_cols: usize) -> usize {
    if group_cols.is_multiple_of(2 * SLAB) { 2 * SLAB } else { SLAB }
}

impl Rounded {
    /// Rounds x `[t, k]`, `k` a multiple of `block`, to [`Values::Pairs`] or bytes. A NaN or infinity makes its block's scale NaN or infinite, so that it
    /// still reaches the result.
    pub fn new(simd: Simd, x: &[f32], k: usize, block: usize, pairs: bool) -> Self {
        let n = x.len();
        let values =
            if pairs { Values::Pairs(vec![0; n / 2]) } else { Values::Bytes { high: vec![0; n], low: vec![0; n] } };
        let t = n / k.max(1);
        let mut r = Self { values, scales: vec![0.0; n / block], sums: vec![0; n / block], t, k, block };
        if block == SLAB {
            simd.run(Round::<SLAB> { x, to: &mut r });
        } else {
            simd.run(Round::<{ 2 * SLAB }> { x, to: &mut r });
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
        let (blocks, t) = (to.k / B, to.t);
        for (i, x) in x.as_chunks::<B>().0.iter().enumerate() {
            let (row, block) = (i / blocks, i % blocks);
            // The bits of a magnitude order as the magnitude does, NaN above infinity.
            let top = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
            let scale = f32::from_bits(top) / MOST;
            let inverse = if scale > 0.0 && scale.is_finite() { 1.0 / scale } else { 0.0 };
            let mut values = [0i32; B];
            for j in 0..B {
                // In range up to a rounding of the quotient; NaN, whose block has no finite scale, becomes the lower bound.
                let v = (x[j] * inverse).round_ties_even().max(-MOST).min(MOST);
                // SAFETY: −16319 ≤ v ≤ 16319, and it is not NaN.
                values[j] = unsafe { v.to_int_unchecked::<i32>() };
            }
            to.scales[block * t + row] = scale;
            to.sums[block * t + row] = values.iter().sum();
            match &mut to.values {
                Values::Bytes { high, low } => {
                    let (high, low) = (&mut high[i * B..(i + 1) * B], &mut low[i * B..(i + 1) * B]);
                    for j in 0..B {
                        let h = (values[j] + 64) >> 7;
                        high[j] = h as i8;
                        low[j] = (values[j] - (h << 7)) as i8;
                    }
                }
                Values::Pairs(pairs) => {
                    let to = pairs[block * (B / 2) * t + row..].iter_mut().step_by(t);
                    let quads = values.as_chunks::<QUAD>().0.iter();
                    let words = quads.flat_map(|v| [pair(v[0], v[2]), pair(v[1], v[3])]);
                    to.zip(words).for_each(|(to, word)| *to = word);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Level;
    use super::*;

    #[test]
    fn values_are_within_half_a_step_and_equal_in_every_form() {
        let (t, k) = (3, 192);
        let x: Vec<f32> = (0..t * k).map(|i| ((i * 7919 % 1000) as f32 - 500.0) * 0.013).collect();
        for block in [32, 64] {
            let forms = [Level::Portable, Level::Avx2, Level::Vnni].into_iter().flat_map(|l| [(l, false), (l, true)]);
            let all: Vec<Rounded> = forms.map(|(l, pairs)| Rounded::new(Simd::up_to(l), &x, k, block, pairs)).collect();
            for r in &all {
                assert_eq!((r.values.len(), r.t, r.scales.len()), (t * k, t, t * k / block));
                let integers: Vec<i32> =
                    (0..t * k / 4).flat_map(|i| r.values.quad((t, k), i / (k / 4), i % (k / 4))).collect();
                for (i, (v, q)) in x.iter().zip(&integers).enumerate() {
                    let scale = r.scales[i % k / block * t + i / k];
                    assert!((*q as f32 * scale - v).abs() <= scale * 0.505, "{v} {q} {scale}");
                }
                if let Values::Bytes { low, .. } = &r.values {
                    assert!(low.iter().all(|low| (-64..64).contains(low)));
                }
                for (b, values) in integers.chunks_exact(block).enumerate() {
                    let (row, block) = (b / (k / block), b % (k / block));
                    assert_eq!(r.sums[block * t + row], values.iter().sum::<i32>());
                }
                assert_eq!(r.scales, all[0].scales);
                let first: Vec<i32> =
                    (0..t * k / 4).flat_map(|i| all[0].values.quad((t, k), i / (k / 4), i % (k / 4))).collect();
                assert_eq!(integers, first);
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
