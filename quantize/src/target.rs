//! What the quantized weights should approximate when their input has drifted away from the float model's.
//!
//! With x_f the float model's input and x_q the quantized model's, least squares over `‖W x_f − Q x_q‖²` asks Q to
//! approximate `W C H⁻¹`, `C = Σ x_f x_qᵀ`, `H = Σ x_q x_qᵀ` (Qronos, arXiv 2505.11695, section 3; GPTAQ,
//! arXiv 2504.02692, section 3). Where the output is added to a residual stream that has drifted too,
//! `‖(r_f + W x_f) − (r_q + Q x_q)‖²` adds `R H⁻¹`, `R = Σ (r_f − r_q) x_qᵀ`: the linear also repairs what earlier
//! blocks have done to the stream. Both are written as increments of W, so that damping does not shrink W itself, and
//! taken in part: on a few thousand tokens the whole correction fits noise.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use lowbit_kernels::error::check_len;
use rayon::prelude::*;

use crate::factor::{Factor, SolveError};
use crate::scale_search::check_finite;

/// Rows of a task; fixed, so that results do not depend on the thread count.
const ROWS: usize = 64;

/// How much of each correction is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Correction {
    /// α: share of the input's drift.
    pub input: f32,
    /// β: share of the residual's drift.
    pub residual: f32,
}

/// `W + (α W D + β R) H⁻¹` `[out, n]` with D `[n, n]` = `Σ (x_f − x_q) x_qᵀ` and R `[out, n]`, both in the units of the
/// Hessian whose factor is `factor` (damping included). Dead columns become 0.
pub fn corrected_target(
    w: &[f32],
    out: usize,
    n: usize,
    input_drift: &[f32],
    residual_drift: Option<&[f32]>,
    factor: &Factor,
    share: Correction,
) -> Result<Vec<f32>, SolveError> {
    check_len("weight", out * n, w.len())?;
    check_len("input drift", n * n, input_drift.len())?;
    check_len("factor", n, factor.n)?;
    check_finite("weight", w)?;
    check_finite("input drift", input_drift)?;
    let residual = residual_drift.filter(|_| share.residual != 0.0);
    if let Some(r) = residual {
        check_len("residual drift", out * n, r.len())?;
        check_finite("residual drift", r)?;
    }
    let mut target = w.to_vec();
    if n == 0 {
        return Ok(target);
    }
    let drift = MatRef::from_row_major_slice(input_drift, n, n);
    let u = MatRef::from_row_major_slice(&factor.u, n, n);
    target.par_chunks_mut(ROWS * n).enumerate().for_each_init(
        || (vec![0f32; ROWS * n], vec![0f32; ROWS * n]),
        |(a, b), (task, rows)| {
            let (len, count) = (rows.len(), rows.len() / n);
            let (a, b) = (&mut a[..len], &mut b[..len]);
            let w = MatRef::from_row_major_slice(&*rows, count, n);
            matmul(MatMut::from_row_major_slice_mut(a, count, n), Accum::Replace, w, drift, share.input, Par::Seq);
            if let Some(r) = residual {
                a.iter_mut().zip(&r[task * ROWS * n..]).for_each(|(a, r)| *a += share.residual * r);
            }
            // H⁻¹ = Uᵀ U in solving order.
            for (a, b) in a.chunks(n).zip(b.chunks_mut(n)) {
                b.iter_mut().zip(&factor.perm).for_each(|(b, col)| *b = a[*col]);
            }
            let x = MatRef::from_row_major_slice(&*b, count, n);
            matmul(MatMut::from_row_major_slice_mut(a, count, n), Accum::Replace, x, u.transpose(), 1.0, Par::Seq);
            let x = MatRef::from_row_major_slice(&*a, count, n);
            matmul(MatMut::from_row_major_slice_mut(b, count, n), Accum::Replace, x, u, 1.0, Par::Seq);
            for (row, b) in rows.chunks_mut(n).zip(b.chunks(n)) {
                factor.perm.iter().zip(b).for_each(|(col, b)| row[*col] += b);
                factor.dead.iter().for_each(|col| row[*col] = 0.0);
            }
        },
    );
    check_finite("corrected target", &target)?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::factor::factorize;
    use crate::scale_search::SolverOptions;

    fn options() -> SolverOptions {
        let scheme = Scheme { bits: 4, symmetric: true, group: GroupSize::PerChannel };
        SolverOptions { damp_frac: 1e-6, ..SolverOptions::new(scheme, ScaleType::F32) }
    }

    /// `Σ a bᵀ` of rows.
    fn cross(a: &[f32], b: &[f32], m: usize, n: usize) -> Vec<f32> {
        let mut h = vec![0f32; m * n];
        for (a, b) in a.chunks(m).zip(b.chunks(n)) {
            for i in 0..m {
                for j in 0..n {
                    h[i * n + j] += a[i] * b[j];
                }
            }
        }
        h
    }

    #[test]
    fn the_whole_correction_is_the_least_squares_solution() {
        let (out, n, tokens) = (70, 24, 200);
        let mut rng = StdRng::seed_from_u64(3);
        let mut sample = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1f32..1.0)).collect() };
        let (w, xq, noise, dr) = (sample(out * n), sample(tokens * n), sample(tokens * n), sample(tokens * out));
        let xf: Vec<f32> = xq.iter().zip(&noise).map(|(x, e)| x + 0.2 * e).collect();
        let delta: Vec<f32> = xf.iter().zip(&xq).map(|(a, b)| a - b).collect();
        let h = cross(&xq, &xq, n, n);
        let factor = factorize(&h, n, &options()).unwrap();
        let (d, r) = (cross(&delta, &xq, n, n), cross(&dr, &xq, out, n));
        let whole = Correction { input: 1.0, residual: 1.0 };
        let t = corrected_target(&w, out, n, &d, Some(&r), &factor, whole).unwrap();
        // The gradient Σ (r_f + W x_f − r_q − T x_q) x_qᵀ vanishes at the solution, and not at W.
        let gradient = |t: &[f32]| -> f32 {
            let mut g = r.clone();
            for row in 0..out {
                for col in 0..n {
                    let at = row * n + col;
                    g[at] += (0..n).map(|k| w[row * n + k] * (d[k * n + col] + h[k * n + col])).sum::<f32>();
                    g[at] -= (0..n).map(|k| t[row * n + k] * h[k * n + col]).sum::<f32>();
                }
            }
            g.iter().fold(0f32, |m, v| m.max(v.abs()))
        };
        assert!(gradient(&t) < 1e-3 * gradient(&w), "{} {}", gradient(&t), gradient(&w));
        let half = Correction { input: 0.5, residual: 0.5 };
        let t2 = corrected_target(&w, out, n, &d, Some(&r), &factor, half).unwrap();
        for ((w, t), t2) in w.iter().zip(&t).zip(&t2) {
            assert!((t2 - 0.5 * (w + t)).abs() < 1e-4, "{w} {t} {t2}");
        }
    }

    #[test]
    fn without_drift_the_target_is_the_weight_and_dead_columns_are_zero() {
        let (out, n) = (3, 8);
        let mut h: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.1 }).collect();
        for i in 0..n {
            h[5 * n + i] = 0.0;
            h[i * n + 5] = 0.0;
        }
        let factor = factorize(&h, n, &SolverOptions { damp_frac: 0.01, ..options() }).unwrap();
        let w: Vec<f32> = (0..out * n).map(|i| i as f32).collect();
        let share = Correction { input: 0.5, residual: 0.5 };
        let t = corrected_target(&w, out, n, &vec![0.0; n * n], None, &factor, share).unwrap();
        for (i, (t, w)) in t.iter().zip(&w).enumerate() {
            assert_eq!(*t, if i % n == 5 { 0.0 } else { *w });
        }
        let e = corrected_target(&w, out, n, &vec![f32::NAN; n * n], None, &factor, share).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "input drift", .. }), "{e}");
    }
}
