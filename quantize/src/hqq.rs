//! Half-quadratic quantization (HQQ; Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", November 2023,
//! mobiusml.github.io/hqq_blog): scales and zero points from the weights alone, for an error norm that lets outliers go.
//!
//! Lowers `Σ |w − q|^p` of each group with p < 1, which a few large errors do not govern as they do a sum of squares. In steps of the
//! grid, with a = w / s and codes c, the half-quadratic splitting asks for `Σ |e|^p + β/2 Σ (e − (a − (c − z)))²` over e, c, z and s. It is
//! lowered in turn (the article's sub-problems 1 and 2):
//!
//! 1. e by the generalized soft threshold (Chartrand and Yin, 2016): `sign(x) max(|x| − |x|^(p−1) / β, 0)` of x = a − (c − z);
//! 2. the zero point in closed form, `z = mean(c − (a − e))`. The article stores it as a float; the zero points of every format written
//!    here are codes, so it is rounded and kept within them;
//! 3. the scale in closed form given codes and zero point, `s ← s Σ (c − z)(a − e) / Σ (c − z)²`: the article keeps the first scale. For a
//!    symmetric scheme this is the only one of the two there is.
//!
//! β grows by κ each round, and the rounds end where the norm no longer falls, as in the published code (β = 10, κ = 1.01, at most
//! 20). So no group ends above where it began: at the scale that rounding to nearest takes. p is 3/4 (published: 0.7), which takes square
//! roots alone and so gives the same bits on every machine.

use lowbit_kernels::{QuantizedMatrix, ScaleType};
use rayon::prelude::*;

use crate::factor::SolveError;
use crate::rtn::nearest;
use crate::scale_search::{LANES, Scales, SolverOptions, multiversion, search_scales, usable};

/// Rounds at most.
const ROUNDS: usize = 20;
/// Weight of the quadratic part in the first round, and its growth.
const BETA: f32 = 10.0;
const KAPPA: f32 = 1.01;

/// What is the same for every row.
struct Task {
    /// Columns of a group.
    cols: usize,
    scale_type: ScaleType,
    /// Largest code.
    top: f32,
    /// Smallest zero point; a symmetric scheme has one alone.
    lowest: f32,
    /// The zero point of a symmetric scheme.
    middle: Option<f32>,
}

/// Quantizes `w` `[out, n]`, every weight on its own.
pub fn quantize_hqq(w: &[f32], out: usize, n: usize, opts: &SolverOptions) -> Result<QuantizedMatrix, SolveError> {
    let mut chosen = search_scales(w, out, n, None, opts)?;
    let (groups, cols) = (opts.scheme.groups(n)?, opts.scheme.group_cols(n));
    let task = Task {
        cols,
        scale_type: opts.scale_type,
        top: f32::from(opts.scheme.max_code()),
        lowest: f32::from(opts.min_zero),
        middle: opts.scheme.symmetric.then(|| f32::from(opts.scheme.mid_code())),
    };
    if n > 0 {
        let Scales { scales, zeros, .. } = &mut chosen;
        let zeros: Vec<&mut [u8]> = match zeros {
            Some(z) => z.chunks_mut(groups).collect(),
            None => (0..out).map(|_| Default::default()).collect(),
        };
        let rows = w.par_chunks(n).zip(scales.par_chunks_mut(groups)).zip(zeros);
        rows.for_each_init(
            || vec![0f32; cols.next_multiple_of(LANES)],
            |buf, ((row, scales), zeros)| refine_row(&task, row, buf, scales, zeros),
        );
    }
    nearest(w, out, n, chosen, None, opts)
}

multiversion! {
    /// Refines the scale and the zero point of every group of a row; `zeros` is empty for a symmetric scheme.
    fn refine_row(task: &Task, row: &[f32], buf: &mut [f32], scales: &mut [f32], zeros: &mut [u8]) {
        for (group, (values, scale)) in row.chunks_exact(task.cols).zip(scales).enumerate() {
            // Zeros in the padding are on every grid: they add nothing to any sum.
            buf[..task.cols].copy_from_slice(values);
            let zero = task.middle.unwrap_or_else(|| f32::from(zeros[group]));
            let (found, zero) = refine(task, buf, *scale, zero);
            *scale = found;
            if let Some(z) = zeros.get_mut(group) {
                *z = zero as u8;
            }
        }
    }
}

/// Scale and zero point of one group after the rounds.
#[inline(always)]
fn refine(task: &Task, w: &[f32], scale: f32, zero: f32) -> (f32, f32) {
    let mut best = (scale, zero);
    let mut least = norm(task, w, scale, zero);
    let mut beta = BETA;
    for _ in 0..ROUNDS {
        let (scale, zero) = best;
        let s = sums(task, w, scale, zero, beta);
        // z = mean(c − (a − e)), with c − z = q.
        let moved = match task.middle {
            Some(_) => 0.0,
            None => {
                let by = ((s.q - s.rest) / task.cols as f32).round_ties_even();
                (zero + by).clamp(task.lowest, task.top) - zero
            }
        };
        // The codes stand, so q falls by what z rises.
        let num = s.q_rest - moved * s.rest;
        let den = s.q_q - moved * (2.0 * s.q - moved * task.cols as f32);
        let next = task.scale_type.round(scale * (num / den));
        if !usable(next) || (next < 0.0) != (scale < 0.0) {
            break;
        }
        let found = norm(task, w, next, zero + moved);
        if found.is_nan() || found >= least {
            break;
        }
        (best, least) = ((next, zero + moved), found);
        beta *= KAPPA;
    }
    best
}

/// Sums over a group, with q = c − z and `rest` = a − e.
struct Sums {
    q: f32,
    rest: f32,
    q_q: f32,
    q_rest: f32,
}

#[inline(always)]
fn sums(task: &Task, w: &[f32], scale: f32, zero: f32, beta: f32) -> Sums {
    let (inverse, lo, hi) = (1.0 / scale, -zero, task.top - zero);
    let weight = 1.0 / beta;
    let zeros = [0f32; LANES];
    let (mut q_sum, mut rest_sum, mut q_q, mut q_rest) = (zeros, zeros, zeros, zeros);
    for w in w.as_chunks::<LANES>().0 {
        for l in 0..LANES {
            let a = w[l] * inverse;
            let q = a.round_ties_even();
            let q = if q < lo { lo } else { q };
            let q = if q > hi { hi } else { q };
            let x = a - q;
            let size = x.abs();
            // |x|^(p − 1) of p = 3/4; infinite at 0, where nothing is left anyway.
            let left = size - weight / size.sqrt().sqrt();
            let left = if left > 0.0 { left } else { 0.0 };
            let rest = a - left.copysign(x);
            q_sum[l] += q;
            rest_sum[l] += rest;
            q_q[l] += q * q;
            q_rest[l] += q * rest;
        }
    }
    let sum = |v: [f32; LANES]| v.iter().sum::<f32>();
    Sums { q: sum(q_sum), rest: sum(rest_sum), q_q: sum(q_q), q_rest: sum(q_rest) }
}

/// `Σ |w − q|^p` of rounding to nearest.
#[inline(always)]
fn norm(task: &Task, w: &[f32], scale: f32, zero: f32) -> f32 {
    let (inverse, lo, hi) = (1.0 / scale, -zero, task.top - zero);
    let mut sums = [0f32; LANES];
    for w in w.as_chunks::<LANES>().0 {
        for l in 0..LANES {
            let q = (w[l] * inverse).round_ties_even();
            let q = if q < lo { lo } else { q };
            let q = if q > hi { hi } else { q };
            let root = (w[l] - scale * q).abs().sqrt();
            sums[l] += root * root.sqrt();
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::rtn::quantize_rtn;
    use crate::scale_search::ScaleSearch;

    fn options(bits: u8, symmetric: bool, search: ScaleSearch) -> SolverOptions {
        let scheme = Scheme { bits, symmetric, group: GroupSize::Cols(40) };
        SolverOptions { scale_search: search, ..SolverOptions::new(scheme, ScaleType::Bf16) }
    }

    /// Heavy tails: a few weights far out.
    fn weights(seed: u64, len: usize) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..len).map(|_| rng.random_range(-1f32..1.0).powi(7) + rng.random_range(-0.1f32..0.12)).collect()
    }

    /// `Σ |w − q|^(3/4)` of each group of 40.
    fn norms(w: &[f32], q: &QuantizedMatrix) -> Vec<f64> {
        let errors: Vec<f64> =
            w.iter().zip(q.dequantize().unwrap()).map(|(w, q)| f64::from(w - q).abs().powf(0.75)).collect();
        errors.chunks(40).map(|e| e.iter().sum()).collect()
    }

    #[test]
    fn no_group_ends_above_rounding_to_nearest_and_the_sum_is_below() {
        let (out, n) = (24, 120);
        for search in [ScaleSearch::MinMax, ScaleSearch::Hessian] {
            for (bits, symmetric) in [(2, true), (2, false), (3, true), (4, false), (4, true), (8, true), (8, false)] {
                let w = weights(u64::from(bits), out * n);
                let opts = options(bits, symmetric, search);
                let q = quantize_hqq(&w, out, n, &opts).unwrap();
                q.validate().unwrap();
                assert!(q.scales.iter().all(|s| *s == ScaleType::Bf16.round(*s)));
                let rounded = quantize_rtn(&w, out, n, None, &opts).unwrap();
                let (found, start) = (norms(&w, &q), norms(&w, &rounded));
                for (i, (found, start)) in found.iter().zip(&start).enumerate() {
                    // Rounding by a reciprocal may take the other neighbour of a near tie.
                    assert!(*found <= start * 1.0001, "{search:?} {bits} {symmetric} group {i}: {start} -> {found}");
                }
                let (found, start) = (found.iter().sum::<f64>(), start.iter().sum::<f64>());
                // A step of a bf16 scale is too wide to better eight bits.
                let most = if bits == 8 { 1.0 } else { 0.995 };
                assert!(found <= most * start, "{search:?} {bits} {symmetric}: {start} -> {found}");
            }
        }
    }

    #[test]
    fn weights_on_the_grid_stay() {
        // Multiples of ¼ that use the whole range: from −5 to 10 with a zero point of 5, and from −7 to 8 with a negative scale.
        for (symmetric, lowest) in [(false, -5), (true, -7)] {
            let w: Vec<f32> = (0..40).map(|i| 0.25 * (lowest + i % 16) as f32).collect();
            let opts = options(4, symmetric, ScaleSearch::Hessian);
            let q = quantize_hqq(&w, 1, 40, &opts).unwrap();
            assert_eq!(q, quantize_rtn(&w, 1, 40, None, &opts).unwrap());
            assert_eq!(q.dequantize().unwrap(), w, "{symmetric}");
        }
    }

    #[test]
    fn scaling_the_weights_changes_no_code() {
        let (out, n) = (12, 80);
        let w = weights(2, out * n);
        let larger: Vec<f32> = w.iter().map(|v| 4.0 * v).collect();
        for symmetric in [true, false] {
            let opts = options(4, symmetric, ScaleSearch::Hessian);
            let (a, b) = (quantize_hqq(&w, out, n, &opts).unwrap(), quantize_hqq(&larger, out, n, &opts).unwrap());
            assert_eq!((&a.codes, &a.zeros), (&b.codes, &b.zeros));
            assert!(a.scales.iter().zip(&b.scales).all(|(a, b)| 4.0 * a == *b));
        }
    }

    #[test]
    fn signs_and_zero_points_stay_where_a_format_needs_them() {
        let (out, n) = (16, 120);
        // All positive: the zero point wants to be 0.
        let w: Vec<f32> = weights(3, out * n).iter().map(|v| v.abs() + 0.3).collect();
        let opts = SolverOptions { min_zero: 1, ..options(3, false, ScaleSearch::Hessian) };
        assert!(quantize_hqq(&w, out, n, &opts).unwrap().zeros.unwrap().iter().all(|z| *z >= 1));
        let opts = SolverOptions { signed_scales: false, ..options(2, true, ScaleSearch::Hessian) };
        assert!(quantize_hqq(&weights(4, out * n), out, n, &opts).unwrap().scales.iter().all(|s| *s > 0.0));
        // Nothing to fit.
        assert_eq!(quantize_hqq(&[0.0; 40], 1, 40, &opts).unwrap().scales, [1.0]);
        let e = quantize_hqq(&[f32::NAN; 40], 1, 40, &opts).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "weight", index: 0 }), "{e}");
    }

    #[test]
    fn the_thread_count_changes_nothing() {
        let (out, n) = (50, 80);
        let w = weights(5, out * n);
        let opts = options(3, false, ScaleSearch::Hessian);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize_hqq(&w, out, n, &opts)).unwrap()
        };
        assert_eq!(on(1), on(3));
    }
}
