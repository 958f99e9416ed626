//! The factor of the inverse Hessian, shared by every linear that reads the same input.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::traits::RealField;
use faer::{MatMut, MatRef, Par};
use lowbit_kernels::KernelError;
use lowbit_kernels::error::check_len;
use rayon::prelude::*;

use crate::scale_search::SolverOptions;

/// What can go wrong in a solver. Knows the place inside a matrix, never the layer's name; callers add that.
#[derive(Debug, thiserror::Error)]
pub enum SolveError {
    /// The Hessian is not positive definite, in f64 and with the strongest damping tried.
    #[error(
        "Hessian of {dim} columns is not positive definite: pivot failed at column {index} (damped diagonal {value})"
    )]
    NonPositivePivot {
        /// Column, in original order.
        index: usize,
        /// Columns of the Hessian.
        dim: usize,
        /// Diagonal element there, damping included.
        value: f64,
    },
    /// NaN or infinity in an input or a result.
    #[error("{what} is NaN or infinite at element {index}")]
    NonFinite {
        /// Which matrix.
        what: &'static str,
        /// Index into its row-major elements.
        index: usize,
    },
    /// Every diagonal element of the Hessian is zero: the input was never active, so nothing is known about it.
    #[error("Hessian of {dim} columns is all zero: no calibration token reached this input")]
    EmptyHessian {
        /// Columns of the Hessian.
        dim: usize,
    },
    /// A scale does not fit in its dtype.
    #[error("scale of row {row}, group {group} overflows its dtype ({value})")]
    ScaleOverflow {
        /// Row.
        row: usize,
        /// Group.
        group: usize,
        /// The rounded scale.
        value: f32,
    },
    /// A setting no solver can work with.
    #[error("solver option out of range: {what} = {value}")]
    BadOption {
        /// Which setting.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// A shape or scheme error.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// A factorized Hessian: `H_damped⁻¹ = Uᵀ U` in solving order.
#[derive(Clone, Debug)]
pub struct Factor {
    /// Columns.
    pub n: usize,
    /// Position in solving order → original column.
    pub perm: Vec<usize>,
    /// Row-major `[n, n]` upper triangular factor in solving order; zero below the diagonal.
    pub u: Vec<f32>,
    /// Original columns whose diagonal is zero.
    pub dead: Vec<usize>,
    /// The Hessian's undamped diagonal in original order; zero at dead columns.
    pub diag: Vec<f32>,
    /// The damping that worked, as a fraction of the mean diagonal.
    pub damp_frac: f64,
    /// What had to be done beyond the plain f32 factorization, for the run's record.
    pub events: Vec<String>,
}

impl Factor {
    /// The matrix this factor inverts, `[n, n]` in original column order: `h` (upper triangle read) with dead columns
    /// isolated and the damping that worked.
    pub fn damped(&self, h: &[f32]) -> Result<Vec<f32>, SolveError> {
        let n = self.n;
        check_len("Hessian", n * n, h.len())?;
        let mean = self.diag.iter().map(|d| f64::from(*d)).sum::<f64>() / n.max(1) as f64;
        let mut full = vec![0f32; n * n];
        full.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            for (j, v) in row.iter_mut().enumerate() {
                *v = if i == j {
                    let d = f64::from(self.diag[i]);
                    ((if d == 0.0 { mean } else { d }) + self.damp_frac * mean) as f32
                } else if self.diag[i] == 0.0 || self.diag[j] == 0.0 {
                    0.0
                } else {
                    h[i.min(j) * n + i.max(j)]
                };
            }
        });
        Ok(full)
    }
}

impl Factor {
    /// `1 / U_jj²` in original column order, zero at dead columns: what an error of column j costs once GPTQ has moved it into the columns
    /// solved after j as well as it can. The loss of GPTQ is exactly `Σ_j (w_j − q_j)² / U_jj²` with w_j as column j is reached
    /// (arXiv 2210.17323, section 3.1), where the diagonal of the Hessian is what the error costs while nothing else moves.
    pub fn pivots(&self) -> Vec<f32> {
        let mut weights = vec![0f32; self.n];
        for (j, col) in self.perm.iter().enumerate() {
            let u = self.u[j * self.n + j];
            if self.diag[*col] != 0.0 {
                weights[*col] = 1.0 / (u * u);
            }
        }
        weights
    }
}

/// Factorizes the Hessian `h`, symmetric `[n, n]` (only its upper triangle is read).
///
/// Dead columns (zero diagonal) are isolated, with the mean of the diagonal in place of the zero. Tries f32, then
/// f64, then f64 with damping raised tenfold up to three times; every step beyond the first is an event.
pub fn factorize(h: &[f32], n: usize, opts: &SolverOptions) -> Result<Factor, SolveError> {
    factorize_with(h, n, opts, |_| Ok(None))
}

/// What a first attempt is given.
pub(crate) struct First<'a> {
    /// Position in solving order → column.
    pub perm: &'a [usize],
    /// The undamped diagonal in the order of columns; 0 at dead ones.
    pub diag: &'a [f32],
    /// What stands on the diagonal instead.
    pub damped: Vec<f32>,
}

/// `U`, or the position of the pivot that failed; `None` where the host is to make the attempt.
pub(crate) type Attempt = Option<Result<Vec<f32>, usize>>;

/// [`factorize`] whose attempt in f32 may be made by `first`, on a device. All later ones are the host's.
pub(crate) fn factorize_with(
    h: &[f32],
    n: usize,
    opts: &SolverOptions,
    first: impl FnOnce(&First<'_>) -> Result<Attempt, SolveError>,
) -> Result<Factor, SolveError> {
    opts.check()?;
    check_len("Hessian", n.checked_mul(n).ok_or(KernelError::Overflow("Hessian"))?, h.len())?;
    for row in 0..n {
        if let Some(col) = h[row * n + row..(row + 1) * n].iter().position(|v| !v.is_finite()) {
            return Err(SolveError::NonFinite { what: "Hessian", index: row * n + row + col });
        }
    }
    let diag: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
    if let Some(index) = diag.iter().position(|d| *d < 0.0) {
        return Err(SolveError::NonPositivePivot { index, dim: n, value: f64::from(diag[index]) });
    }
    let dead: Vec<usize> = (0..n).filter(|i| diag[*i] == 0.0).collect();
    if dead.len() == n {
        return Err(SolveError::EmptyHessian { dim: n });
    }
    let mean = diag.iter().map(|d| f64::from(*d)).sum::<f64>() / n as f64;

    let mut perm: Vec<usize> = (0..n).collect();
    if opts.act_order {
        perm.sort_by(|a, b| diag[*b].total_cmp(&diag[*a]));
    }
    let entry = |i: usize, j: usize, damp: f64| -> f64 {
        let (a, b) = (i.min(j), i.max(j));
        if a == b {
            let d = f64::from(diag[a]);
            (if d == 0.0 { mean } else { d }) + damp * mean
        } else if diag[a] == 0.0 || diag[b] == 0.0 {
            0.0
        } else {
            f64::from(h[a * n + b])
        }
    };

    let mut events = Vec::new();
    let mut damp = opts.damp_frac;
    let damped = (0..n).map(|i| entry(i, i, damp) as f32).collect();
    let attempt = first(&First { perm: &perm, diag: &diag, damped })?;
    let mut failed =
        match attempt.unwrap_or_else(|| inverse_factor::<f32>(n, |r, c| entry(perm[r], perm[c], damp) as f32)) {
            Ok(u) => {
                return Ok(Factor { n, perm, u, dead, diag, damp_frac: damp, events });
            }
            Err(position) => position,
        };
    for attempt in 0..4 {
        if attempt > 0 {
            damp = if damp == 0.0 { 0.01 } else { damp * 10.0 };
        }
        events.push(format!("Cholesky failed at column {} of {n}; retrying in f64 with damping {damp}", perm[failed]));
        match inverse_factor::<f64>(n, |r, c| entry(perm[r], perm[c], damp)) {
            Ok(u) => {
                // A pivot that f64 holds may still leave f32's range.
                let u: Vec<f32> = u.into_par_iter().map(|v| v as f32).collect();
                match first_bad_pivot(&u, n) {
                    None => {
                        return Ok(Factor { n, perm, u, dead, diag, damp_frac: damp, events });
                    }
                    Some(position) => failed = position,
                }
            }
            Err(position) => failed = position,
        }
    }
    let index = perm[failed];
    Err(SolveError::NonPositivePivot { index, dim: n, value: entry(index, index, damp) })
}

/// Position of the first diagonal element that is not a finite positive number, or whose row is not finite.
fn first_bad_pivot<T: Into<f64> + Copy>(u: &[T], n: usize) -> Option<usize> {
    (0..n).find(|i| {
        let pivot: f64 = u[i * n + i].into();
        pivot <= 0.0 || u[i * n + i..(i + 1) * n].iter().any(|v| !(*v).into().is_finite())
    })
}

/// `U` with `A⁻¹ = Uᵀ U` for the symmetric matrix with the given entries; or the position of a failed pivot.
///
/// With `J` the reversal, `J A J = L Lᵀ` gives `A = R Rᵀ`, `R = J L J` upper triangular, hence `U = R⁻¹ = J L⁻¹ J`:
/// one factorization and one triangular inverse, and the inverse of `A` is never formed. Reversing rows and columns
/// is reversing the elements.
///
/// Sequential on purpose: the split of a parallel factorization, and so its rounding, depends on the thread count.
fn inverse_factor<T>(n: usize, entry: impl Fn(usize, usize) -> T + Sync) -> Result<Vec<T>, usize>
where
    T: RealField + Copy + Default + Into<f64> + Send + Sync,
{
    let mut lower = vec![T::default(); n * n];
    lower.par_chunks_mut(n).enumerate().for_each(|(col, out)| {
        for (row, out) in out.iter_mut().enumerate().skip(col) {
            *out = entry(n - 1 - row, n - 1 - col);
        }
    });
    let mut buffer = MemBuffer::new(cholesky_in_place_scratch::<T>(n, Par::Seq, Default::default()));
    cholesky_in_place(
        MatMut::from_column_major_slice_mut(&mut lower, n, n),
        Default::default(),
        Par::Seq,
        MemStack::new(&mut buffer),
        Default::default(),
    )
    .map_err(|LltError::NonPositivePivot { index }| n - 1 - index.min(n - 1))?;

    let mut u = vec![T::default(); n * n];
    invert_lower_triangular(
        MatMut::from_row_major_slice_mut(&mut u, n, n),
        MatRef::from_column_major_slice(&lower, n, n),
        Par::Seq,
    );
    u.reverse();
    match first_bad_pivot(&u, n) {
        Some(position) => Err(position),
        None => Ok(u),
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn options() -> SolverOptions {
        SolverOptions::new(Scheme { bits: 4, symmetric: true, group: GroupSize::PerChannel }, ScaleType::F32)
    }

    fn gram(n: usize, tokens: usize) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(7);
        let x: Vec<f32> = (0..n * tokens).map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut h = vec![0f32; n * n];
        for (i, v) in h.iter_mut().enumerate() {
            *v = (0..tokens).map(|t| x[t * n + i / n] * x[t * n + i % n]).sum();
        }
        h
    }

    #[test]
    fn the_factor_inverts_the_damped_permuted_hessian() {
        let n = 37;
        let h = gram(n, 100);
        // Only the upper triangle is read.
        let mut upper = h.clone();
        for i in 0..n {
            upper[i * n..i * n + i].fill(f32::NAN);
        }
        let f = factorize(&upper, n, &options()).unwrap();
        assert!(f.events.is_empty());
        assert!(f.perm.windows(2).all(|p| f.diag[p[0]] >= f.diag[p[1]]));
        let mean = f.diag.iter().sum::<f32>() / n as f32;
        // Uᵀ U H = I.
        for i in 0..n {
            for j in 0..n {
                let found: f64 = (0..n)
                    .map(|k| {
                        let inv: f64 = (0..=i.min(k)).map(|m| f64::from(f.u[m * n + i] * f.u[m * n + k])).sum();
                        let damp = if k == j { 0.01 * mean } else { 0.0 };
                        inv * f64::from(h[f.perm[k] * n + f.perm[j]] + damp)
                    })
                    .sum();
                assert!((found - f64::from(u8::from(i == j))).abs() < 1e-3, "{i} {j} {found}");
            }
            assert!(f.u[i * n..i * n + i].iter().all(|v| *v == 0.0));
        }
    }

    #[test]
    fn pivots_are_what_a_column_costs_once_later_ones_make_up_for_it() {
        // Of the last column solved nothing can take an error: its diagonal. Of the first all others can: 1 / (H⁻¹)_jj.
        let h = [4.0, 1.0, 0.0, 1.0, 2.0, 0.5, 0.0, 0.5, 1.0];
        let f = factorize(&h, 3, &SolverOptions { damp_frac: 0.0, ..options() }).unwrap();
        assert_eq!(f.perm, [0, 1, 2]);
        let p = f.pivots();
        // det H = 6; the cofactor of the first column is 2 · 1 − 0.25.
        assert!(
            (p[0] - 6.0 / 1.75).abs() <= 1e-5 && (p[1] - 1.75).abs() <= 1e-5 && (p[2] - 1.0).abs() <= 1e-5,
            "{p:?}"
        );
        let identity = [1.0, 0.0, 0.0, 0.0];
        let f = factorize(&identity, 2, &SolverOptions { damp_frac: 0.0, ..options() }).unwrap();
        assert_eq!((f.pivots(), f.dead), (vec![1.0, 0.0], vec![1]));
    }

    #[test]
    fn an_indefinite_hessian_recovers_with_events() {
        let h = [1.0, 1.05, 1.05, 1.0];
        let f = factorize(&h, 2, &options()).unwrap();
        assert_eq!(f.events.len(), 2, "{:?}", f.events);
        assert!((f.damp_frac - 0.1).abs() < 1e-12);
        assert!(f.events[1].contains("damping 0.1"));
    }

    #[test]
    fn a_hopeless_hessian_is_an_error_with_its_place() {
        let e = factorize(&[1.0, 50.0, 50.0, 1.0], 2, &options()).unwrap_err();
        assert!(matches!(e, SolveError::NonPositivePivot { dim: 2, .. }), "{e}");
        let e = factorize(&[1.0, 0.0, 0.0, -1.0], 2, &options()).unwrap_err();
        assert!(matches!(e, SolveError::NonPositivePivot { index: 1, .. }), "{e}");
        let e = factorize(&[1.0, f32::NAN, 0.0, 1.0], 2, &options()).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "Hessian", index: 1 }), "{e}");
        assert!(matches!(factorize(&[0.0; 4], 2, &options()), Err(SolveError::EmptyHessian { dim: 2 })));
    }
}
