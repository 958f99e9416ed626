//! GPTQ (arXiv 2210.17323): rounds column by column and moves each column's error into the columns not yet rounded.
//!
//! Names follow the paper's algorithm 1: `W` the weights, `H` the Hessian, `U` the upper Cholesky factor of its
//! inverse, `E` the errors of a block. Groups are static: scales come from the original weights.
#![expect(non_snake_case, reason = "the paper's letters")]

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use lowbit_kernels::QuantizedMatrix;
use lowbit_kernels::error::check_len;
use lowbit_kernels::minifloat::{e2m1, e4m3, to_e2m1, to_e4m3};
use lowbit_kernels::qdq::{dequantize, quantize};
use rayon::prelude::*;

use crate::factor::{Factor, SolveError};
use crate::loss::{Loss, proxy_loss};
use crate::scale_search::{Scales, SolverOptions, multiversion, search_scales};

/// Rows solved together: the innermost, contiguous index of a task's copy of `W`. Fixed, so that results do not
/// depend on the thread count.
const ROWS: usize = 32;

/// Quantizes `w` `[out, n]` under the Hessian `h`, whose factor is `factor`.
///
/// `h` (upper triangle) is only read for the loss. Columns the factor lists as dead become 0. Codes come back in
/// original column order.
pub fn quantize_gptq(
    w: &[f32],
    out: usize,
    n: usize,
    h: &[f32],
    factor: &Factor,
    opts: &SolverOptions,
) -> Result<(QuantizedMatrix, Loss), SolveError> {
    check_len("Hessian", n * n, h.len())?;
    let matrix = gptq_codes(w, out, n, factor, opts)?;
    let loss = proxy_loss(w, &matrix.dequantize()?, h, out, n);
    if !(loss.proxy.is_finite() && loss.reference.is_finite()) {
        return Err(SolveError::NonFinite { what: "proxy loss", index: 0 });
    }
    Ok((matrix, loss))
}

/// [`quantize_gptq`] without the loss.
pub fn gptq_codes(
    w: &[f32],
    out: usize,
    n: usize,
    factor: &Factor,
    opts: &SolverOptions,
) -> Result<QuantizedMatrix, SolveError> {
    codes_on(w, out, n, factor, search_scales(w, out, n, Some(&factor.diag), opts)?, opts)
}

/// [`gptq_codes`] with scales that were chosen before.
pub fn codes_on(
    w: &[f32],
    out: usize,
    n: usize,
    factor: &Factor,
    scales: Scales,
    opts: &SolverOptions,
) -> Result<QuantizedMatrix, SolveError> {
    let Scales { scales, zeros, .. } = scales;
    let on = GridScales {
        grid: Grid::Int { max: opts.scheme.max_code() },
        scales: &scales,
        shifts: zeros.as_deref().map_or(Shifts::Middle(opts.scheme.mid_code()), Shifts::Zeros),
        cols: opts.scheme.group_cols(n),
    };
    let codes = grid_codes(w, out, n, factor, &on, opts.block)?;
    Ok(QuantizedMatrix {
        scheme: opts.scheme,
        out_features: out,
        in_features: n,
        codes,
        scales,
        zeros,
        group_index: None,
    })
}

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grid {
    /// `scale · (code − zero)`.
    Int {
        /// Largest code.
        max: u8,
    },
    /// `scale · code − offset`.
    Steps {
        /// Largest code.
        max: u8,
    },
    /// [`e4m3`] times the scale.
    E4m3,
    /// [`e2m1`] times the scale.
    E2m1,
}

/// What stands beside the scales, `[out, groups]`.
#[derive(Clone, Copy)]
pub(crate) enum Shifts<'a> {
    /// Nothing.
    None,
    /// The same code is zero everywhere.
    Middle(u8),
    /// The code that is zero.
    Zeros(&'a [u8]),
    /// What is subtracted.
    Offsets(&'a [f32]),
}

impl Shifts<'_> {
    /// Without the first `n` groups.
    fn skip(self, n: usize) -> Self {
        match self {
            Shifts::Zeros(z) => Shifts::Zeros(z.get(n..).unwrap_or_default()),
            Shifts::Offsets(o) => Shifts::Offsets(o.get(n..).unwrap_or_default()),
            same => same,
        }
    }
}

/// The grids of a matrix's groups.
pub(crate) struct GridScales<'a> {
    pub grid: Grid,
    /// `[out, groups]`; zero only on [`Grid::Steps`].
    pub scales: &'a [f32],
    /// Zero points of [`Grid::Int`], offsets of [`Grid::Steps`].
    pub shifts: Shifts<'a>,
    /// Columns of a group; the last group of a row may have fewer.
    pub cols: usize,
}

/// Codes `[out, n]`, one a byte, of `w` on given grids.
pub(crate) fn grid_codes(
    w: &[f32],
    out: usize,
    n: usize,
    factor: &Factor,
    on: &GridScales,
    block: usize,
) -> Result<Vec<u8>, SolveError> {
    check_len("factor", n, factor.n)?;
    check_len("factor's diagonal", n, factor.diag.len())?;
    check_len("factor's permutation", n, factor.perm.len())?;
    check_len("factor's matrix", n * n, factor.u.len())?;
    check_len("weight", out * n, w.len())?;
    let mut codes = vec![0u8; out * n];
    if n == 0 || on.cols == 0 {
        return Ok(codes);
    }
    let groups = n.div_ceil(on.cols);
    check_len("scales", out * groups, on.scales.len())?;
    match on.shifts {
        Shifts::Zeros(z) => check_len("zero points", out * groups, z.len())?,
        Shifts::Offsets(o) => check_len("offsets", out * groups, o.len())?,
        _ => {}
    }
    let task = Task {
        n,
        cols: on.cols,
        groups,
        block: block.min(n),
        grid: on.grid,
        perm: &factor.perm,
        diag: &factor.diag,
        U: &factor.u,
    };
    codes.par_chunks_mut(ROWS * n).zip(w.par_chunks(ROWS * n)).enumerate().for_each_init(
        || Rows::new(&task),
        |rows, (chunk, (codes, w))| {
            let from = chunk * ROWS * task.groups;
            solve_rows(&task, rows, w, &on.scales[from..], on.shifts.skip(from), codes);
        },
    );
    Ok(codes)
}

/// What is the same for every row.
struct Task<'a> {
    n: usize,
    cols: usize,
    groups: usize,
    block: usize,
    grid: Grid,
    perm: &'a [usize],
    diag: &'a [f32],
    U: &'a [f32],
}

/// A few rows in solving order, transposed: rows are the contiguous index.
struct Rows {
    /// `[n]` columns.
    W: Vec<[f32; ROWS]>,
    /// `[block]` columns.
    E: Vec<[f32; ROWS]>,
    /// `[n]` columns.
    codes: Vec<[u8; ROWS]>,
    /// `[groups]`.
    scales: Vec<[f32; ROWS]>,
    /// `[groups]`.
    zeros: Vec<[u8; ROWS]>,
    /// `[groups]`.
    offsets: Vec<[f32; ROWS]>,
}

impl Rows {
    fn new(task: &Task) -> Self {
        Self {
            W: vec![[0.0; ROWS]; task.n],
            E: vec![[0.0; ROWS]; task.block],
            codes: vec![[0; ROWS]; task.n],
            scales: vec![[1.0; ROWS]; task.groups],
            zeros: vec![[0; ROWS]; task.groups],
            offsets: vec![[0.0; ROWS]; task.groups],
        }
    }
}

/// Solves up to [`ROWS`] rows.
fn solve_rows(task: &Task, rows: &mut Rows, w: &[f32], scales: &[f32], shifts: Shifts<'_>, codes: &mut [u8]) {
    let n = task.n;
    let count = w.len() / n;
    for (column, &col) in rows.W.iter_mut().zip(task.perm) {
        // Spare rows of the last task, and dead columns.
        *column = [0.0; ROWS];
        if task.diag[col] != 0.0 {
            for r in 0..count {
                column[r] = w[r * n + col];
            }
        }
    }
    for group in 0..task.groups {
        for r in 0..count {
            rows.scales[group][r] = scales[r * task.groups + group];
            match shifts {
                Shifts::None => {}
                Shifts::Middle(code) => rows.zeros[group][r] = code,
                Shifts::Zeros(z) => rows.zeros[group][r] = z[r * task.groups + group],
                Shifts::Offsets(o) => rows.offsets[group][r] = o[r * task.groups + group],
            }
        }
    }

    for start in (0..n).step_by(task.block) {
        let end = n.min(start + task.block);
        solve_block(task, rows, start, end);
        if end < n {
            // W[:, end..] -= E · U[start..end, end..]
            let E = MatRef::from_column_major_slice(rows.E.as_flattened(), ROWS, task.block);
            let U = MatRef::from_row_major_slice(task.U, n, n);
            matmul(
                MatMut::from_column_major_slice_mut(rows.W[end..].as_flattened_mut(), ROWS, n - end),
                Accum::Add,
                E.submatrix(0, 0, ROWS, end - start),
                U.submatrix(start, end, end - start, n - end),
                -1.0,
                Par::Seq,
            );
        }
    }

    for (column, &col) in rows.codes.iter().zip(task.perm) {
        for r in 0..count {
            codes[r * n + col] = column[r];
        }
    }
}

multiversion! {
    /// Rounds columns `start..end` one after another, and updates the later columns among them.
    fn solve_block(task: &Task, rows: &mut Rows, start: usize, end: usize) {
        for j in start..end {
            let group = task.perm[j] / task.cols;
            let (scales, zeros, offsets) = (&rows.scales[group], &rows.zeros[group], &rows.offsets[group]);
            let U = &task.U[j * task.n..(j + 1) * task.n];
            let (done, later) = rows.W.split_at_mut(j + 1);
            let column = &done[j];
            let codes = &mut rows.codes[j];
            let mut E = [0f32; ROWS];
            match task.grid {
                Grid::Int { max } => {
                    for r in 0..ROWS {
                        codes[r] = quantize(column[r], scales[r], zeros[r], max);
                        E[r] = (column[r] - dequantize(codes[r], scales[r], zeros[r])) / U[j];
                    }
                }
                Grid::Steps { max } => {
                    let top = f32::from(max);
                    for r in 0..ROWS {
                        // A scale of zero leaves one value.
                        let q = ((column[r] + offsets[r]) / scales[r]).round_ties_even();
                        let code = if q.is_nan() { 0.0 } else { q.clamp(0.0, top) };
                        codes[r] = code as u8;
                        E[r] = (column[r] - (scales[r] * code - offsets[r])) / U[j];
                    }
                }
                Grid::E4m3 => {
                    for r in 0..ROWS {
                        codes[r] = to_e4m3(column[r] / scales[r]);
                        E[r] = (column[r] - e4m3(codes[r]) * scales[r]) / U[j];
                    }
                }
                Grid::E2m1 => {
                    for r in 0..ROWS {
                        codes[r] = to_e2m1(column[r] / scales[r]);
                        E[r] = (column[r] - e2m1(codes[r]) * scales[r]) / U[j];
                    }
                }
            }
            for (column, &u) in later.iter_mut().zip(&U[j + 1..end]) {
                for r in 0..ROWS {
                    column[r] -= E[r] * u;
                }
            }
            rows.E[j - start] = E;
        }
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::factor::factorize;
    use crate::rtn::quantize_rtn;
    use crate::scale_search::ScaleSearch;

    fn options(bits: u8, symmetric: bool) -> SolverOptions {
        SolverOptions::new(Scheme { bits, symmetric, group: GroupSize::Cols(32) }, ScaleType::Bf16)
    }

    fn weights(rng: &mut StdRng, out: usize, n: usize) -> Vec<f32> {
        (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect()
    }

    /// Gram matrix of correlated inputs with uneven column norms.
    fn gram(rng: &mut StdRng, n: usize) -> Vec<f32> {
        let tokens = 2 * n;
        let norms: Vec<f32> = (0..n).map(|_| rng.random_range(0.2f32..3.0)).collect();
        let mut x = vec![0f32; tokens * n];
        for row in x.chunks_mut(n) {
            let shared: f32 = rng.random_range(-1.0..1.0);
            for (v, norm) in row.iter_mut().zip(&norms) {
                *v = norm * (shared + rng.random_range(-1f32..1.0));
            }
        }
        let mut h = vec![0f32; n * n];
        for row in x.chunks(n) {
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += row[i] * row[j];
                }
            }
        }
        h
    }

    fn identity(n: usize) -> Vec<f32> {
        (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect()
    }

    fn solve(w: &[f32], out: usize, n: usize, h: &[f32], opts: &SolverOptions) -> (QuantizedMatrix, Loss) {
        let factor = factorize(h, n, opts).unwrap();
        quantize_gptq(w, out, n, h, &factor, opts).unwrap()
    }

    #[test]
    fn an_identity_hessian_gives_round_to_nearest() {
        let (out, n) = (37, 160);
        let mut rng = StdRng::seed_from_u64(1);
        let w = weights(&mut rng, out, n);
        for symmetric in [true, false] {
            for search in [ScaleSearch::MinMax, ScaleSearch::Hessian] {
                let opts = SolverOptions { act_order: false, scale_search: search, block: 48, ..options(4, symmetric) };
                let (q, _) = solve(&w, out, n, &identity(n), &opts);
                assert_eq!(q, quantize_rtn(&w, out, n, None, &opts).unwrap());
                q.validate().unwrap();
            }
        }
    }

    #[test]
    fn loss_is_well_below_round_to_nearest() {
        let (out, n) = (40, 96);
        for (bits, symmetric) in [(3, true), (4, true), (4, false)] {
            for act_order in [false, true] {
                let (mut gptq, mut rtn) = (0.0, 0.0);
                for seed in 0..16 {
                    let mut rng = StdRng::seed_from_u64(seed);
                    let (w, h) = (weights(&mut rng, out, n), gram(&mut rng, n));
                    let opts = SolverOptions { act_order, block: 32, ..options(bits, symmetric) };
                    gptq += solve(&w, out, n, &h, &opts).1.proxy;
                    let diag: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
                    let q = quantize_rtn(&w, out, n, Some(&diag), &opts).unwrap().dequantize().unwrap();
                    rtn += proxy_loss(&w, &q, &h, out, n).proxy;
                }
                assert!(gptq < 0.8 * rtn, "{bits} bits: {gptq} {rtn}");
            }
        }
    }

    #[test]
    fn equals_the_unblocked_textbook_loop() {
        let (out, n) = (5, 96);
        let mut rng = StdRng::seed_from_u64(9);
        let (w, h) = (weights(&mut rng, out, n), gram(&mut rng, n));
        let opts = SolverOptions { block: 20, ..options(4, true) };
        let factor = factorize(&h, n, &opts).unwrap();
        let (q, _) = quantize_gptq(&w, out, n, &h, &factor, &opts).unwrap();
        let mut wrong = 0;
        for r in 0..out {
            let mut row: Vec<f64> = factor.perm.iter().map(|c| f64::from(w[r * n + c])).collect();
            for j in 0..n {
                let col = factor.perm[j];
                let s = q.scales[r * 3 + col / 32];
                let code = quantize(row[j] as f32, s, 8, 15);
                wrong += usize::from(code != q.codes[r * n + col]);
                let e = (row[j] - f64::from(dequantize(code, s, 8))) / f64::from(factor.u[j * n + j]);
                for k in j + 1..n {
                    row[k] -= e * f64::from(factor.u[j * n + k]);
                }
            }
        }
        assert!(wrong <= 2, "{wrong} codes differ");
    }

    #[test]
    fn scaling_the_hessian_changes_no_code() {
        let (out, n) = (20, 96);
        let mut rng = StdRng::seed_from_u64(2);
        let (w, h) = (weights(&mut rng, out, n), gram(&mut rng, n));
        let scaled: Vec<f32> = h.iter().map(|v| 4.0 * v).collect();
        let opts = options(4, true);
        let ((a, la), (b, lb)) = (solve(&w, out, n, &h, &opts), solve(&w, out, n, &scaled, &opts));
        assert_eq!(a, b);
        assert!((4.0 * la.proxy - lb.proxy).abs() <= 1e-9 * lb.proxy);
    }

    #[test]
    fn act_order_is_undone() {
        // A diagonal Hessian moves no error, so any order gives round-to-nearest, in original order.
        let (out, n) = (7, 64);
        let mut rng = StdRng::seed_from_u64(4);
        let w = weights(&mut rng, out, n);
        let diag: Vec<f32> = (0..n).map(|_| rng.random_range(0.1f32..9.0)).collect();
        let h: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { diag[i % n] } else { 0.0 }).collect();
        let opts = options(4, true);
        assert_ne!(factorize(&h, n, &opts).unwrap().perm, (0..n).collect::<Vec<_>>());
        assert_eq!(solve(&w, out, n, &h, &opts).0, quantize_rtn(&w, out, n, Some(&diag), &opts).unwrap());
    }

    #[test]
    fn dead_columns_become_zero() {
        let (out, n, dead) = (9, 64, 10);
        for symmetric in [true, false] {
            let mut rng = StdRng::seed_from_u64(6);
            let mut w = weights(&mut rng, out, n);
            let mut h = gram(&mut rng, n);
            for i in 0..n {
                h[i * n + dead] = 0.0;
                h[dead * n + i] = 0.0;
            }
            let opts = options(4, symmetric);
            let (a, _) = solve(&w, out, n, &h, &opts);
            assert_eq!(factorize(&h, n, &opts).unwrap().dead, [dead]);
            let values = a.dequantize().unwrap();
            for r in 0..out {
                assert_eq!(values[r * n + dead], 0.0);
                w[r * n + dead] = 1e6;
            }
            assert_eq!(a, solve(&w, out, n, &h, &opts).0);
        }
    }

    #[test]
    fn bad_input_is_refused_with_its_place() {
        let (out, n) = (2, 32);
        let opts = options(4, true);
        let mut w = vec![0.5; out * n];
        w[40] = f32::INFINITY;
        let factor = factorize(&identity(n), n, &opts).unwrap();
        let e = quantize_gptq(&w, out, n, &identity(n), &factor, &opts).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "weight", index: 40 }), "{e}");
        assert!(quantize_gptq(&w[..n], out, n, &identity(n), &factor, &opts).is_err());
    }

    #[test]
    fn an_indefinite_hessian_is_solved_with_more_damping() {
        let (out, n) = (3, 32);
        let mut h = identity(n);
        h[1] = 1.05;
        h[n] = 1.05;
        let opts = options(4, true);
        let factor = factorize(&h, n, &opts).unwrap();
        assert!(!factor.events.is_empty() && factor.damp_frac > opts.damp_frac);
        let w = weights(&mut StdRng::seed_from_u64(8), out, n);
        quantize_gptq(&w, out, n, &h, &factor, &opts).unwrap().0.validate().unwrap();
    }

    #[test]
    fn the_thread_count_changes_nothing() {
        let (out, n) = (100, 96);
        let mut rng = StdRng::seed_from_u64(12);
        let (w, h) = (weights(&mut rng, out, n), gram(&mut rng, n));
        let opts = options(4, true);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| solve(&w, out, n, &h, &opts))
        };
        assert_eq!(on(1), on(3));
    }
}
