//! The matrix product in fixed point: both factors rounded to sixteen bits, the products of 32 inner steps summed as exact integers.
//!
//! For every element, over the blocks of [`BLOCK`] inner steps in ascending order, in f32:
//! `y ← fma(Σ x·w, s_x · s_w, y)`, where Σ is an exact i32 and each factor has a scale a row and block, as large as the sum's
//! range needs ([`step`]). So the result is the same on every instruction set, for any number of threads and any batch, and the only
//! approximation is the rounding of the factors: a step is 1/32767 of a block's largest value or 1/46330 of its Euclidean norm. An
//! instruction that multiplies pairs of i16 does twice the work of an f32 one (AVX-512 VNNI, AVX2).
//!
//! Rows of the left factor are activations ([`Rows`]); the right factor comes in panels of [`WIDTH`] columns ([`Panel`]).

mod lanes;
mod product;

use rayon::prelude::*;

pub use self::product::{Out, linear, register_products, strip};
use super::aligned::Aligned;
use super::simd::{Kernel, Lanes, Simd};

/// Columns of a panel.
pub const WIDTH: usize = 32;
/// Inner steps that share a scale.
pub const BLOCK: usize = 32;
/// Pairs of a block: what one instruction multiplies and adds in a lane.
const PAIRS: usize = BLOCK / 2;
/// Largest rounded magnitude: an i16, and two products fit in an i32.
const MOST: f32 = 32767.0;
/// Largest Euclidean norm of a block before rounding, which adds at most √32 / 2: no sum of products of two blocks, whole or in parts,
/// reaches 46340² < 2³¹ (Cauchy and Schwarz).
const NORM: f32 = 46330.0;
/// Rows of a weight that are rounded side by side.
const ROWS: usize = 16;
/// Rows that one task rounds.
const ROUNDED_ROWS: usize = 16;

/// Blocks of `k` inner steps; the last is filled up with zeros.
pub fn blocks_of(k: usize) -> usize {
    k.div_ceil(BLOCK)
}

/// Two rounded values, the first in the low half.
#[inline(always)]
pub fn pair(a: i32, b: i32) -> u32 {
    (a as u32 & 0xffff) | (b as u32) << 16
}

/// `v` rounded half to even, for |v| < 2²²: adding 1.5 · 2²³ leaves no place for a fraction. One addition on every instruction set.
#[inline(always)]
fn rounded(v: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (v + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// A power of two that brings a largest magnitude, given by its bits, near one: squares then neither overflow nor vanish.
#[inline(always)]
fn unit(top: u32) -> f32 {
    f32::from_bits(((254 << 23) - (top & 0x7f80_0000).min(253 << 23)).min(253 << 23))
}

/// `1 / v`, exact, of a power of two from 2⁻¹²⁶ to 2¹²⁶.
#[inline(always)]
fn reciprocal(v: f32) -> f32 {
    f32::from_bits((254 << 23) - v.to_bits())
}

/// The step that keeps values of a block within [`MOST`] and their Euclidean norm within [`NORM`], from the largest magnitude's bits
/// and the sum of squares of the values times [`unit`]. Not finite where `top` is not, so that it reaches the result.
#[inline(always)]
fn step(top: u32, squares: f32) -> f32 {
    let (magnitude, unit) = (f32::from_bits(top), unit(top));
    // Where the top is infinite or NaN its unit is 2⁻¹²⁶, and the first product is not finite.
    let by_norm = squares.sqrt() * (1.0 / NORM) * reciprocal(unit);
    let by_top = magnitude * (1.0 / MOST);
    if by_norm > by_top { by_norm } else { by_top }
}

/// What values are multiplied with to be in steps; zero where that is no number.
#[inline(always)]
fn inverse(step: f32) -> f32 {
    if (f32::MIN_POSITIVE..=f32::MAX).contains(&step) { 1.0 / step } else { 0.0 }
}

/// The power of two at or above a step: a bf16 value within a factor of 64 (f16: 8) of the block's largest is then mostly kept exactly.
#[inline(always)]
fn binary(step: f32) -> f32 {
    // Neither it nor its inverse leaves the normal numbers; infinity and NaN become infinity.
    let up = (step.to_bits() + 0x7f_ffff) & 0xff80_0000;
    f32::from_bits(up.clamp(1 << 23, 0x7f80_0000))
}

/// Sum of the squares of values times `unit`, in one order on every instruction set.
///
/// # Safety
/// The instruction set of `L` is available.
#[inline(always)]
unsafe fn squares<L: Lanes>(x: &[f32; BLOCK], unit: f32) -> f32 {
    // SAFETY: `i + N ≤ 32` for all loads; the caller vouches for the instruction set.
    unsafe {
        let (zero, unit) = (L::splat(0.0), L::splat(unit));
        let square = |i: usize| {
            let v = L::fmadd(L::load(x.as_ptr().add(i)), unit, zero);
            L::fmadd(v, v, zero)
        };
        // Sixteen lanes, in one register or two.
        let lanes = |i: usize| L::add(square(i), square(i + BLOCK / 2));
        L::sum(if L::N == 16 { lanes(0) } else { L::add(lanes(0), lanes(8)) })
    }
}

/// `v · inverse`, rounded and within range.
#[expect(clippy::manual_clamp, reason = "`clamp` keeps NaN, which has no integer")]
#[inline(always)]
fn word(v: f32, inverse: f32) -> i32 {
    rounded((v * inverse).max(-MOST).min(MOST))
}

/// Rounds up to sixteen blocks side by side to pairs; `up` makes steps of the smallest ones ([`binary`] or none).
///
/// # Safety
/// The instruction set of `L` is available.
#[inline(always)]
unsafe fn round_blocks<L: Lanes>(
    blocks: &[[f32; BLOCK]],
    up: impl Fn(f32) -> f32,
    steps: &mut [f32; ROWS],
    pairs: &mut [[u32; PAIRS]],
) {
    let (mut tops, mut sums, mut inverses) = ([0u32; ROWS], [0f32; ROWS], [0f32; ROWS]);
    for ((x, top), sum) in blocks.iter().zip(&mut tops).zip(&mut sums) {
        // SAFETY: the caller's contract.
        unsafe {
            *top = L::top(x);
            *sum = squares::<L>(x, unit(*top));
        }
    }
    // Not one at a time: a root and a quotient take as long for all as for one.
    for r in 0..ROWS {
        steps[r] = up(step(tops[r], sums[r]));
        inverses[r] = inverse(steps[r]);
    }
    for ((x, to), inverse) in blocks.iter().zip(pairs).zip(inverses) {
        // SAFETY: as above.
        unsafe { L::round(x, inverse, MOST, to) };
    }
}

/// Rows of the left factor, rounded.
pub struct Rows {
    /// `[rows, blocks · 16]`.
    pairs: Vec<u32>,
    /// `[rows, blocks]`.
    scales: Vec<f32>,
    rows: usize,
    k: usize,
}

impl Rows {
    /// Rounds x `[t, k]`.
    pub fn new(simd: Simd, x: &[f32], k: usize) -> Self {
        let (t, blocks) = (x.len().checked_div(k).unwrap_or(0), blocks_of(k));
        let mut r = Self { pairs: vec![0; t * blocks * PAIRS], scales: vec![0.0; t * blocks], rows: t, k };
        let to = r.pairs.par_chunks_mut((ROUNDED_ROWS * blocks * PAIRS).max(1));
        let scales = r.scales.par_chunks_mut((ROUNDED_ROWS * blocks).max(1));
        to.zip(scales).zip(x.par_chunks((ROUNDED_ROWS * k).max(1))).for_each(|((pairs, scales), x)| {
            simd.run(Round { x, k, pairs, scales });
        });
        r
    }

    fn left(&self) -> Left<'_> {
        let blocks = blocks_of(self.k);
        Left {
            pairs: &self.pairs,
            row: blocks * PAIRS,
            step: 1,
            scales: &self.scales,
            scale_row: blocks,
            scale_step: 1,
        }
    }
}

/// Columns of x `[t, n]`, rounded along the tokens: both factors of `xᵀ x`.
pub struct Columns {
    /// `[panels, blocks · 16, 32]`.
    pairs: Aligned<u32>,
    /// `[panels, blocks, 32]`.
    scales: Aligned<f32>,
    blocks: usize,
}

impl Columns {
    /// Rounds x `[t, n]`.
    pub fn new(simd: Simd, x: &[f32], n: usize) -> Self {
        let (blocks, panels) = (blocks_of(x.len().checked_div(n).unwrap_or(0)), n.div_ceil(WIDTH));
        let mut c = Self {
            pairs: Aligned::zeros(panels * blocks * PAIRS * WIDTH),
            scales: Aligned::zeros(panels * blocks * WIDTH),
            blocks,
        };
        let pairs = c.pairs.par_chunks_mut((blocks * PAIRS * WIDTH).max(1));
        pairs.zip(c.scales.par_chunks_mut((blocks * WIDTH).max(1))).enumerate().for_each(|(p, (pairs, scales))| {
            simd.run(RoundColumns { x, n, first: p * WIDTH, pairs, scales });
        });
        c
    }

    fn part(&self, p: usize) -> Panel<'_> {
        let (pairs, scales) = (self.blocks * PAIRS * WIDTH, self.blocks * WIDTH);
        Panel { pairs: &self.pairs[p * pairs..(p + 1) * pairs], scales: &self.scales[p * scales..(p + 1) * scales] }
    }

    /// Columns `32 p ..` as rows of the left factor.
    pub fn left(&self, p: usize) -> Left<'_> {
        let Panel { pairs, scales } = self.part(p);
        Left { pairs, row: 1, step: WIDTH, scales, scale_row: 1, scale_step: WIDTH }
    }

    /// Columns `32 p ..` as a panel.
    pub fn panel(&self, p: usize) -> Panel<'_> {
        self.part(p)
    }
}

struct RoundColumns<'a> {
    x: &'a [f32],
    n: usize,
    first: usize,
    pairs: &'a mut [u32],
    scales: &'a mut [f32],
}

impl Kernel for RoundColumns<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { x, n, first, pairs, scales } = self;
        let columns = first..n.min(first + WIDTH);
        let blocks =
            x.chunks(BLOCK * n).zip(pairs.chunks_exact_mut(PAIRS * WIDTH)).zip(scales.as_chunks_mut::<WIDTH>().0);
        for ((x, pairs), scales) in blocks {
            let mut values = [[0f32; WIDTH]; BLOCK];
            for (to, row) in values.iter_mut().zip(x.chunks_exact(n)) {
                to[..columns.len()].copy_from_slice(&row[columns.clone()]);
            }
            let mut tops = [0u32; WIDTH];
            for row in &values {
                for c in 0..WIDTH {
                    tops[c] = tops[c].max(row[c].to_bits() & 0x7fff_ffff);
                }
            }
            let (mut inverses, mut squares) = (tops.map(unit), [0f32; WIDTH]);
            for row in &values {
                for c in 0..WIDTH {
                    squares[c] += (row[c] * inverses[c]) * (row[c] * inverses[c]);
                }
            }
            for c in 0..WIDTH {
                scales[c] = step(tops[c], squares[c]);
                inverses[c] = inverse(scales[c]);
            }
            for (to, rows) in pairs.as_chunks_mut::<WIDTH>().0.iter_mut().zip(values.as_chunks::<2>().0) {
                for c in 0..WIDTH {
                    to[c] = pair(word(rows[0][c], inverses[c]), word(rows[1][c], inverses[c]));
                }
            }
        }
    }
}

struct Round<'a> {
    x: &'a [f32],
    k: usize,
    pairs: &'a mut [u32],
    scales: &'a mut [f32],
}

impl Kernel for Round<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let blocks = blocks_of(self.k);
        let rows = self.x.chunks_exact(self.k).zip(self.pairs.chunks_exact_mut(blocks * PAIRS));
        for ((x, pairs), scales) in rows.zip(self.scales.chunks_exact_mut(blocks)) {
            let (whole, rest) = x.as_chunks::<BLOCK>();
            let (to, _) = pairs.as_chunks_mut::<PAIRS>();
            let mut steps = [0f32; ROWS];
            for ((x, to), scales) in whole.chunks(ROWS).zip(to.chunks_mut(ROWS)).zip(scales.chunks_mut(ROWS)) {
                // SAFETY: the caller vouches for the instruction set.
                unsafe { round_blocks::<L>(x, |s| s, &mut steps, to) };
                scales.copy_from_slice(&steps[..scales.len()]);
            }
            if let (false, Some(to), Some(scale)) = (rest.is_empty(), to.last_mut(), scales.last_mut()) {
                let mut block = [0f32; BLOCK];
                block[..rest.len()].copy_from_slice(rest);
                // SAFETY: as above.
                unsafe { round_blocks::<L>(&[block], |s| s, &mut steps, std::slice::from_mut(to)) };
                *scale = steps[0];
            }
        }
    }
}

/// Sixteen-bit pairs of a left factor: `(row, pair)` is `pairs[row · row + pair · step]`, the scale of `(row, block)` likewise.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub pairs: &'a [u32],
    pub row: usize,
    pub step: usize,
    pub scales: &'a [f32],
    pub scale_row: usize,
    pub scale_step: usize,
}

/// [`WIDTH`] columns of the right factor: pairs `[blocks · 16, 32]`, scales `[blocks, 32]`.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    pub pairs: &'a [u32],
    pub scales: &'a [f32],
}

/// A panel in the making; missing columns are zero.
pub struct PanelBuffer {
    /// `[blocks · 16, 32]`.
    pub pairs: Aligned<u32>,
    /// `[blocks, 32]`.
    pub scales: Aligned<f32>,
}

impl PanelBuffer {
    /// For `k` inner steps.
    pub fn new(k: usize) -> Self {
        let blocks = blocks_of(k);
        Self { pairs: Aligned::zeros(blocks * PAIRS * WIDTH), scales: Aligned::zeros(blocks * WIDTH) }
    }

    /// Fills it with `rows` rows of a weight: `block(r, b)` has row `r`'s block `b`, zero beyond `k`, whose scale will be a power of two.
    ///
    /// # Safety
    /// The instruction set of `L` is available.
    #[inline(always)]
    pub unsafe fn fill_by_rows<L: Lanes>(&mut self, rows: usize, block: impl Fn(usize, usize, &mut [f32; BLOCK])) {
        for half in 0..WIDTH / ROWS {
            // Rows beyond the weight's stay zero.
            let mut values = [[0f32; BLOCK]; ROWS];
            let blocks = self.pairs.chunks_exact_mut(PAIRS * WIDTH).zip(self.scales.as_chunks_mut::<WIDTH>().0);
            for (b, (pairs, scales)) in blocks.enumerate() {
                for r in 0..ROWS.min(rows.saturating_sub(half * ROWS)) {
                    block(half * ROWS + r, b, &mut values[r]);
                }
                let (mut steps, mut turned) = ([0f32; ROWS], [[0u32; PAIRS]; ROWS]);
                // SAFETY: the caller's contract.
                unsafe {
                    round_blocks::<L>(&values, binary, &mut steps, &mut turned);
                    L::transpose(&mut turned);
                }
                let columns = half * ROWS..(half + 1) * ROWS;
                for (to, pairs) in pairs.as_chunks_mut::<WIDTH>().0.iter_mut().zip(&turned) {
                    to[columns.clone()].copy_from_slice(pairs);
                }
                scales[columns].copy_from_slice(&steps);
            }
        }
    }

    /// To read.
    pub fn panel(&self) -> Panel<'_> {
        Panel { pairs: &self.pairs, scales: &self.scales }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Level, Portable};
    use crate::error::KernelError;

    fn noise(len: usize, mut seed: u64) -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    struct Fill<'a> {
        w: &'a [f32],
        k: usize,
        panel: &'a mut PanelBuffer,
    }

    impl Kernel for Fill<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) {
            let block = |r: usize, b: usize, to: &mut [f32; BLOCK]| {
                let row = &self.w[r * self.k..(r + 1) * self.k];
                let part = &row[b * BLOCK..self.k.min((b + 1) * BLOCK)];
                to[..part.len()].copy_from_slice(part);
            };
            // SAFETY: the caller vouches for the instruction set.
            unsafe { self.panel.fill_by_rows::<L>(self.w.len() / self.k, block) };
        }
    }

    fn product(simd: Simd, x: &[f32], w: &[f32], (t, n, k): (usize, usize, usize)) -> Vec<f32> {
        let mut y = vec![f32::NAN; t * n];
        linear(simd, &mut y, &Rows::new(simd, x, k), n, |rows, panel| {
            simd.run(Fill { w: &w[rows.start * k..rows.end * k], k, panel });
        })
        .unwrap();
        y
    }

    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (5, 16, 7), (6, 33, 256), (7, 31, 257), (13, 65, 600), (64, 96, 32), (3, 32, 992)];

    #[test]
    fn every_instruction_set_gives_the_same_bits_within_the_bound() {
        for (t, n, k) in SHAPES {
            let (x, w) = (noise(t * k, 1), noise(n * k, 2));
            let want = product(Simd::up_to(Level::Portable), &x, &w, (t, n, k));
            for level in [Level::Avx2, Level::Avx512, Level::Vnni] {
                assert_eq!(product(Simd::up_to(level), &x, &w, (t, n, k)), want, "{level:?} {t} {n} {k}");
            }
            for (i, y) in want.iter().enumerate() {
                let (r, c) = (i / n, i % n);
                let exact: f64 = (0..k).map(|j| f64::from(x[r * k + j]) * f64::from(w[c * k + j])).sum();
                // Each of k products is off by at most half a step of either factor (of norm ≤ √32, the weight's up to twice that), times at
                // most one of the other.
                let bound = k as f64 * 1.5 * 32f64.sqrt() / 46330.0 + 1e-6 * k as f64;
                assert!((f64::from(*y) - exact).abs() <= bound, "{t} {n} {k}: {y} against {exact}");
            }
        }
    }

    #[test]
    fn the_largest_sums_do_not_overflow() {
        // Equal values have the largest sum for their norm; one or two large ones the largest products.
        let few = |n: usize| [vec![1.0; n], vec![0.0; 64 - n]].concat();
        for x in [few(64), few(1), few(2), few(3), few(5), few(33)] {
            let exact: f32 = x.iter().sum();
            for w in [1.0, 255.0 / 128.0, 1.4140625, -1.5] {
                let w: Vec<f32> = x.iter().map(|v| v * w).collect();
                for level in [Level::Portable, Level::Avx2, Level::Vnni] {
                    let y = product(Simd::up_to(level), &x, &w, (1, 1, 64));
                    assert!((y[0] / (exact * w[0]) - 1.0).abs() < 1e-4, "{level:?} {y:?} {exact} {}", w[0]);
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let (t, n, k) = (13, 40, 100);
        let (x, w) = (noise(t * k, 3), noise(n * k, 4));
        let simd = Simd::up_to(Level::Vnni);
        let all = product(simd, &x, &w, (t, n, k));
        for r in 0..t {
            assert_eq!(product(simd, &x[r * k..(r + 1) * k], &w, (1, n, k)), all[r * n..(r + 1) * n]);
        }
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for in_x in [true, false] {
                let (mut x, mut w) = (vec![1f32; 64], vec![1f32; 64]);
                if in_x {
                    x[40] = bad
                } else {
                    w[40] = bad
                }
                let y = product(Simd::up_to(Level::Vnni), &x, &w, (1, 1, 64));
                assert!(!y[0].is_finite(), "{bad} {in_x} {y:?}");
            }
        }
        // Zeros and the smallest numbers are no trouble.
        let y = product(Simd::up_to(Level::Vnni), &[0.0, 1e-45, 1e-38, 0.0], &[1e-45, 0.0, 1.0, 1e38], (1, 1, 4));
        assert!(y[0].is_finite());
    }

    #[test]
    fn steps_keep_values_and_norms_in_range() {
        let odd = noise(BLOCK, 9);
        for scale in [0.0, 1e-45, 1e-39, 1.2e-38, 0.3, 1.0, 1e30, 3e38] {
            for x in [vec![1.0; BLOCK], odd.clone(), [vec![1.0], vec![0.0; BLOCK - 1]].concat()] {
                let x: [f32; BLOCK] = std::array::from_fn(|i| x[i] * scale);
                // SAFETY: portable code.
                let top = unsafe { Portable::top(&x) };
                // SAFETY: portable code.
                let exact = step(top, unsafe { squares::<Portable>(&x, unit(top)) });
                for s in [exact, binary(exact)] {
                    let words: Vec<f64> = x.iter().map(|v| word(*v, inverse(s)).into()).collect();
                    assert!(words.iter().all(|w| w.abs() <= 32767.0));
                    assert!(words.iter().map(|w| w * w).sum::<f64>() < 46340.0 * 46340.0, "{scale} {words:?}");
                    for (w, v) in words.iter().zip(&x) {
                        assert!((w * f64::from(s) - f64::from(*v)).abs() <= f64::from(s) * 0.51 + 2e-38, "{scale} {v}");
                    }
                }
                assert_eq!(binary(exact).to_bits() & 0x7f_ffff, 0);
            }
        }
        assert!([f32::INFINITY, f32::NAN].iter().all(|v| !binary(*v).is_finite() && inverse(binary(*v)) == 0.0));
    }

    #[test]
    fn extents_are_checked() {
        let simd = Simd::up_to(Level::Vnni);
        let (pairs, scales) = (vec![0; 16 * 32], vec![0.0; 32]);
        let left = Left { pairs: &[0; 31], row: 16, step: 1, scales: &[0.0; 2], scale_row: 1, scale_step: 1 };
        let panel = Panel { pairs: &pairs, scales: &scales };
        let out = Out { keep: false, columns: 32, stride: 32, data: &mut [0.0; 64] };
        let e = strip(simd, left, panel, 2, out);
        assert!(matches!(e, Err(KernelError::Length { what: "left factor", expected: 32, found: 31 })));
    }
}
