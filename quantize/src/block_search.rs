//! Scales by the error `eᵀ H_gg e` of a group under its diagonal block of the Hessian, instead of the squared error weighted by the
//! Hessian's diagonal: what the columns of a group do to one another counts too.
//!
//! The objective is the layer-wise one of GPTQ (arXiv 2210.17323, section 3.1) restricted to a group. Of all candidates of
//! [`crate::scale_search`] it is computed without a product of its own. With z the codes less the zero point,
//! `eᵀ H e = Σ (w − s z) ∘ (H w − s H z)`: H w is summed once a group, and H z is carried from candidate to candidate, which share most
//! of their codes, by adding a row of H for each code that changed. Nothing of the size of the error is taken as a difference of
//! squares, so f32 holds it.

use lowbit_kernels::error::check_len;

use crate::factor::SolveError;
use crate::scale_search::{
    Choice, LANES, Measure, Scales, Search, SolverOptions, check_finite, multiversion, search_scales,
};

/// Wider groups are searched by the diagonal: a row's block would cost what solving the row does, and a scale for more than this
/// many columns follows their sum.
pub const MAX_COLS: usize = 256;
/// More bits are searched by the diagonal: nearly every code changes from one candidate to the next, and there is little to gain.
pub const MAX_BITS: u8 = 6;

/// [`search_scales`] under the blocks of `h` `[n, n]`, symmetric and in original column order, where columns with a zero in `diag` (the
/// undamped diagonal) are dead. Groups wider than [`MAX_COLS`] and codes of more than [`MAX_BITS`] are searched by `diag`.
pub fn search_scales_by_blocks(
    w: &[f32],
    out: usize,
    n: usize,
    h: &[f32],
    diag: &[f32],
    opts: &SolverOptions,
) -> Result<Scales, SolveError> {
    check_len("Hessian", n * n, h.len())?;
    if opts.scheme.group_cols(n) > MAX_COLS || opts.scheme.bits > MAX_BITS {
        return search_scales(w, out, n, Some(diag), opts);
    }
    let search = Search::new(w, out, n, Some(diag), opts)?;
    let (cols, padded) = (search.cols, search.padded);
    let mut blocks = vec![0f32; n * padded];
    for (i, (block, row)) in blocks.chunks_exact_mut(padded).zip(h.chunks_exact(n.max(1))).enumerate() {
        let from = i / cols * cols;
        block[..cols].copy_from_slice(&row[from..from + cols]);
    }
    check_finite("Hessian", &blocks)?;
    search.rows(
        w,
        out,
        n,
        || Scratch::new(padded),
        |row, scratch, choices| search_row(&search, &blocks, row, scratch, choices),
    )
}

/// What a thread works in, `[padded]` each.
struct Scratch {
    /// The group's live weights.
    w: Vec<f32>,
    /// `H w`.
    hw: Vec<f32>,
    /// By the sign of the scale: codes less the zero point, and H times them.
    signs: [Carried; 2],
    /// By how much each code changed.
    steps: Vec<f32>,
}

/// What one candidate leaves to the next.
struct Carried {
    z: Vec<f32>,
    hz: Vec<f32>,
}

impl Scratch {
    fn new(padded: usize) -> Self {
        let zeros = || vec![0f32; padded];
        let carried = || Carried { z: zeros(), hz: zeros() };
        Self { w: zeros(), hw: zeros(), signs: [carried(), carried()], steps: zeros() }
    }
}

multiversion! {
    /// Chooses the scale of every group of a row; `blocks` `[n, padded]` are the rows of each group's block.
    fn search_row(search: &Search, blocks: &[f32], row: &[f32], scratch: &mut Scratch, choices: &mut [Choice]) {
        let Scratch { w, hw, signs, steps } = scratch;
        let block_len = search.cols * search.padded;
        for (group, (choice, h)) in choices.iter_mut().zip(blocks.chunks_exact(block_len)).enumerate() {
            search.live(row, group, w);
            hw.fill(0.0);
            for (h, w) in h.chunks_exact(search.padded).zip(w.iter()) {
                add(hw, *w, h);
            }
            for carried in signs.iter_mut() {
                carried.z.fill(0.0);
                carried.hz.fill(0.0);
            }
            *choice = search.best(w, &mut Block { h, hw, signs: &mut *signs, steps });
        }
    }
}

/// `y += a x`.
#[inline(always)]
fn add(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(x.as_chunks::<LANES>().0) {
        for l in 0..LANES {
            y[l] += a * x[l];
        }
    }
}

/// `eᵀ H_gg e` of one group.
struct Block<'a> {
    /// `[cols, padded]`.
    h: &'a [f32],
    hw: &'a [f32],
    signs: &'a mut [Carried; 2],
    steps: &'a mut [f32],
}

impl Measure for Block<'_> {
    #[inline(always)]
    fn loss(&mut self, search: &Search, w: &[f32], scale: f32, zero: u8) -> f32 {
        let inverse = 1.0 / scale;
        let (lo, hi) = search.range(zero);
        let Carried { z, hz } = &mut self.signs[usize::from(scale < 0.0)];
        let lanes = z.as_chunks_mut::<LANES>().0.iter_mut().zip(w.as_chunks::<LANES>().0);
        for (chunk, ((z, w), steps)) in lanes.zip(self.steps.as_chunks_mut::<LANES>().0).enumerate() {
            let mut moved = 0f32;
            for l in 0..LANES {
                let code = (w[l] * inverse).round_ties_even();
                let code = if code < lo { lo } else { code };
                let code = if code > hi { hi } else { code };
                steps[l] = code - z[l];
                z[l] = code;
                moved += steps[l].abs();
            }
            if moved > 0.0 {
                let rows = self.h.chunks_exact(search.padded).skip(chunk * LANES);
                for (step, row) in steps.iter().zip(rows) {
                    if *step != 0.0 {
                        add(hz, *step, row);
                    }
                }
            }
        }
        let mut sums = [0f32; LANES];
        let errors = w.as_chunks::<LANES>().0.iter().zip(z.as_chunks::<LANES>().0);
        for ((w, z), (hw, hz)) in errors.zip(self.hw.as_chunks::<LANES>().0.iter().zip(hz.as_chunks::<LANES>().0)) {
            for l in 0..LANES {
                sums[l] += (w[l] - scale * z[l]) * (hw[l] - scale * hz[l]);
            }
        }
        // H is positive; where the error is nothing, rounding may leave less than that.
        sums.iter().sum::<f32>().max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descent::tests::problem;
    use crate::factor::factorize;
    use crate::scale_search::ScaleSearch;
    use lowbit_kernels::{GroupSize, ScaleType, Scheme, qdq};

    fn options(bits: u8, symmetric: bool, cols: usize) -> SolverOptions {
        let scheme = Scheme { bits, symmetric, group: GroupSize::Cols(cols) };
        SolverOptions { scale_search: ScaleSearch::Blocks, ..SolverOptions::new(scheme, ScaleType::Bf16) }
    }

    fn diagonal(h: &[f32], n: usize) -> Vec<f32> {
        (0..n).map(|i| h[i * n + i]).collect()
    }

    /// `eᵀ H_gg e` of rounding group `g` of a row, by its definition.
    fn by_definition(w: &[f32], h: &[f32], n: usize, g: usize, cols: usize, scale: f32, zero: u8, max: u8) -> f64 {
        let e: Vec<f64> = (g * cols..(g + 1) * cols)
            .map(|c| f64::from(w[c] - qdq::dequantize(qdq::quantize(w[c], scale, zero, max), scale, zero)))
            .collect();
        let at = |i: usize, j: usize| f64::from(h[(g * cols + i) * n + g * cols + j]);
        (0..cols * cols).map(|k| e[k / cols] * at(k / cols, k % cols) * e[k % cols]).sum()
    }

    #[test]
    fn the_carried_error_is_that_of_the_definition() {
        // 40 columns: padding; two groups a row; both signs of scales; the codes of all candidates are carried through.
        let (out, n, cols) = (6, 80, 40);
        for (bits, symmetric) in [(2, true), (3, false), (4, true), (4, false), (6, true)] {
            let (w, h) = problem(u64::from(bits), out, n);
            let s = search_scales_by_blocks(&w, out, n, &h, &diagonal(&h, n), &options(bits, symmetric, cols)).unwrap();
            for (i, loss) in s.losses.iter().enumerate() {
                let (row, g) = (i / 2, i % 2);
                let zero = s.zeros.as_ref().map_or(1 << (bits - 1), |z| z[i]);
                let max = ((1u16 << bits) - 1) as u8;
                let found = by_definition(&w[row * n..][..n], &h, n, g, cols, s.scales[i], zero, max);
                let loss = f64::from(*loss);
                assert!((found - loss).abs() <= 2e-3 * found, "{bits} {symmetric} {i}: {found} {loss}");
            }
        }
    }

    #[test]
    fn no_candidate_is_better_than_the_chosen_one() {
        let (out, n, cols) = (8, 64, 32);
        let (w, h) = problem(3, out, n);
        let d = diagonal(&h, n);
        for symmetric in [true, false] {
            let opts = options(4, symmetric, cols);
            let blocks = search_scales_by_blocks(&w, out, n, &h, &d, &opts).unwrap();
            let other = search_scales(&w, out, n, Some(&d), &opts).unwrap();
            let (mut sum, mut sum_other) = (0.0, 0.0);
            for i in 0..blocks.scales.len() {
                let of = |s: &Scales| {
                    let zero = s.zeros.as_ref().map_or(8, |z| z[i]);
                    by_definition(&w[i / 2 * n..][..n], &h, n, i % 2, cols, s.scales[i], zero, 15)
                };
                // The diagonal chose among the same candidates.
                assert!(of(&blocks) <= of(&other) * 1.002, "{i}: {} {}", of(&blocks), of(&other));
                (sum, sum_other) = (sum + of(&blocks), sum_other + of(&other));
            }
            assert!(sum < 0.97 * sum_other, "{sum} {sum_other}");
        }
    }

    #[test]
    fn a_diagonal_hessian_gives_the_diagonals_choice() {
        let (out, n) = (12, 96);
        let (w, _) = problem(4, out, n);
        // Powers of two: the weighted errors are the same numbers either way, up to the order of two products.
        let d: Vec<f32> = (0..n).map(|i| [0.5, 1.0, 4.0][i % 3]).collect();
        let h: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { d[i % n] } else { 0.0 }).collect();
        for symmetric in [true, false] {
            let opts = options(4, symmetric, 32);
            let blocks = search_scales_by_blocks(&w, out, n, &h, &d, &opts).unwrap();
            let plain = search_scales(&w, out, n, Some(&d), &opts).unwrap();
            for (a, b) in blocks.losses.iter().zip(&plain.losses) {
                assert!((a - b).abs() <= 1e-4 * b, "{a} {b}");
            }
        }
    }

    #[test]
    fn dead_columns_do_not_count_and_wide_groups_go_by_the_diagonal() {
        let (out, n, dead) = (5, 64, 11);
        let (mut w, mut h) = problem(9, out, n);
        for i in 0..n {
            h[i * n + dead] = 0.0;
            h[dead * n + i] = 0.0;
        }
        let opts = options(4, true, 32);
        let diag = diagonal(&h, n);
        let factor = factorize(&h, n, &opts).unwrap();
        let damped = factor.damped(&h).unwrap();
        let a = search_scales_by_blocks(&w, out, n, &damped, &diag, &opts).unwrap();
        (0..out).for_each(|r| w[r * n + dead] = 1e6);
        assert_eq!(a, search_scales_by_blocks(&w, out, n, &damped, &diag, &opts).unwrap());

        let (w, h) = problem(10, 2, 512);
        let d = diagonal(&h, 512);
        let wide = SolverOptions {
            scheme: Scheme { bits: 4, symmetric: true, group: GroupSize::PerChannel },
            ..options(4, true, 32)
        };
        let eight = options(8, true, 32);
        for opts in [wide, eight] {
            let found = search_scales_by_blocks(&w, 2, 512, &h, &d, &opts).unwrap();
            assert_eq!(found, search_scales(&w, 2, 512, Some(&d), &opts).unwrap());
        }
    }
}
