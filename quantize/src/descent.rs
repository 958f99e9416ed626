//! Coordinate descent on the codes, scales and zero points, after a solver has given a first answer.
//!
//! Lowers `tr((T − Q) H (T − Q)ᵀ)` for a target T under the damped Hessian H, group by group: first the group's scale
//! (and zero point) in closed form given its codes, then its codes one column after another given everything else.
//! Every step is the exact minimum along its coordinate, so the objective never rises beyond rounding. The sweep over
//! codes is QuantEase's (arXiv 2309.01885, section 3, algorithm 1); the refit is the least-squares scale of a group in
//! the norm of the whole Hessian, re-rounded to the stored dtype and kept only where it still lowers the objective.
#![expect(non_snake_case, reason = "the paper's letters")]

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use lowbit_kernels::QuantizedMatrix;
use lowbit_kernels::error::check_len;
use rayon::prelude::*;

use crate::factor::SolveError;
use crate::scale_search::{SolverOptions, multiversion, usable};

/// Rows of a task: the innermost, contiguous index of its matrices. Fixed, so that results do not depend on the thread
/// count.
const ROWS: usize = 32;
/// Columns swept before the rest of the gradient is brought up to date.
const BLOCK: usize = 128;

type Column = [f32; ROWS];

/// Sweeps `sweeps` times over every group of `q`, then refits the scales once more.
///
/// `target` `[out, n]` is what q approximates, `h` `[n, n]` the symmetric damped Hessian with a positive diagonal, both
/// in original column order. A scale changes its sign only with [`SolverOptions::signed_scales`]. Zero points of
/// asymmetric schemes move in whole steps within the code range.
pub fn descend(
    q: &mut QuantizedMatrix,
    target: &[f32],
    h: &[f32],
    sweeps: usize,
    opts: &SolverOptions,
) -> Result<(), SolveError> {
    let (out, n) = (q.out_features, q.in_features);
    check_len("target", out * n, target.len())?;
    check_len("Hessian", n * n, h.len())?;
    if let Some(i) = (0..n).find(|i| h[i * n + i].is_nan() || h[i * n + i] <= 0.0) {
        return Err(SolveError::NonPositivePivot { index: i, dim: n, value: f64::from(h[i * n + i]) });
    }
    let groups = opts.scheme.groups(n)?;
    check_len("scales", out * groups, q.scales.len())?;
    check_len("codes", out * n, q.codes.len())?;
    if out == 0 || n == 0 {
        return Ok(());
    }
    let cols = opts.scheme.group_cols(n);
    let ones = (!opts.scheme.symmetric).then(|| column_sums(h, n, cols));
    let task = Task { n, cols, groups, h, ones: ones.as_deref(), opts };
    let zeros: Vec<&mut [u8]> = match &mut q.zeros {
        Some(z) => z.chunks_mut(ROWS * groups).collect(),
        None => (0..out.div_ceil(ROWS)).map(|_| Default::default()).collect(),
    };
    q.codes
        .par_chunks_mut(ROWS * n)
        .zip(target.par_chunks(ROWS * n))
        .zip(q.scales.par_chunks_mut(ROWS * groups))
        .zip(zeros)
        .for_each_init(
            || State::new(&task),
            |state, (((codes, target), scales), zeros)| {
                state.load(&task, target, codes, scales, zeros);
                for _ in 0..sweeps {
                    for group in 0..groups {
                        state.improve(&task, group, true);
                    }
                }
                for group in 0..groups {
                    state.improve(&task, group, false);
                }
                state.store(&task, codes, scales, zeros);
            },
        );
    Ok(())
}

/// `[n]`: sums of each column of the diagonal blocks of `cols` columns.
fn column_sums(h: &[f32], n: usize, cols: usize) -> Vec<f32> {
    (0..n).map(|j| (j / cols * cols..(j / cols + 1) * cols).map(|i| h[i * n + j]).sum()).collect()
}

/// What is the same for every row.
struct Task<'a> {
    n: usize,
    cols: usize,
    groups: usize,
    h: &'a [f32],
    /// See [`column_sums`]; for asymmetric schemes.
    ones: Option<&'a [f32]>,
    opts: &'a SolverOptions,
}

/// Up to [`ROWS`] rows, transposed.
struct State {
    /// `[n]`: the gradient `(T − Q) H`.
    G: Vec<Column>,
    /// `[n]`: code − zero point.
    Z: Vec<Column>,
    /// `[n]`: what was added to Q since G outside the group was last brought up to date.
    D: Vec<Column>,
    /// `[cols]`: `Z_g H_gg`.
    V: Vec<Column>,
    /// `[groups]`.
    scales: Vec<Column>,
    /// `[groups]`.
    zeros: Vec<Column>,
}

impl State {
    fn new(task: &Task) -> Self {
        let columns = |len| vec![[0f32; ROWS]; len];
        Self {
            G: columns(task.n),
            Z: columns(task.n),
            D: columns(task.n),
            V: columns(task.cols),
            scales: columns(task.groups),
            zeros: columns(task.groups),
        }
    }

    fn load(&mut self, task: &Task, target: &[f32], codes: &[u8], scales: &[f32], zeros: &[u8]) {
        let n = task.n;
        let mid = f32::from(task.opts.scheme.mid_code());
        // Spare rows of the last task: all zero, with scale 1.
        self.scales.fill([1.0; ROWS]);
        self.zeros.fill([mid; ROWS]);
        self.Z.fill([0.0; ROWS]);
        self.D.fill([0.0; ROWS]);
        for r in 0..codes.len() / n {
            for group in 0..task.groups {
                let at = r * task.groups + group;
                self.scales[group][r] = scales[at];
                self.zeros[group][r] = zeros.get(at).map_or(mid, |z| f32::from(*z));
            }
            for col in 0..n {
                let group = col / task.cols;
                let z = f32::from(codes[r * n + col]) - self.zeros[group][r];
                self.Z[col][r] = z;
                // T − Q, for the product below.
                self.D[col][r] = target[r * n + col] - self.scales[group][r] * z;
            }
        }
        let H = MatRef::from_row_major_slice(task.h, n, n);
        let E = MatRef::from_column_major_slice(self.D.as_flattened(), ROWS, n);
        let G = MatMut::from_column_major_slice_mut(self.G.as_flattened_mut(), ROWS, n);
        matmul(G, Accum::Replace, E, H, 1.0, Par::Seq);
        self.D.fill([0.0; ROWS]);
    }

    fn store(&self, task: &Task, codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8]) {
        let n = task.n;
        for r in 0..codes.len() / n {
            for col in 0..n {
                codes[r * n + col] = (self.Z[col][r] + self.zeros[col / task.cols][r]) as u8;
            }
            for group in 0..task.groups {
                let at = r * task.groups + group;
                scales[at] = self.scales[group][r];
                if let Some(z) = zeros.get_mut(at) {
                    *z = self.zeros[group][r] as u8;
                }
            }
        }
    }

    /// One visit of a group: its scale, and with `sweep` its zero point and codes.
    fn improve(&mut self, task: &Task, group: usize, sweep: bool) {
        let (from, to) = (group * task.cols, (group + 1) * task.cols);
        self.products(task, from, to);
        let mut changed = refit(task, self, group, from, to, sweep);
        if sweep {
            for start in (from..to).step_by(BLOCK) {
                let end = to.min(start + BLOCK);
                if changed && (start > from || end < to) {
                    // A group of several blocks: what the refit changed has reached the gradient inside the group only.
                    self.flush(task, from, to);
                    changed = false;
                }
                changed |= sweep_block(task, self, group, start, end);
                if changed {
                    self.flush(task, start, end);
                    changed = false;
                }
            }
        } else if changed {
            self.flush(task, from, to);
        }
    }

    /// `V = Z_g H_gg`.
    fn products(&mut self, task: &Task, from: usize, to: usize) {
        let H = MatRef::from_row_major_slice(task.h, task.n, task.n);
        matmul(
            MatMut::from_column_major_slice_mut(self.V.as_flattened_mut(), ROWS, task.cols),
            Accum::Replace,
            MatRef::from_column_major_slice(self.Z[from..to].as_flattened(), ROWS, task.cols),
            H.submatrix(from, from, task.cols, task.cols),
            1.0,
            Par::Seq,
        );
    }

    /// Brings the gradient outside `from..to` up to date with D inside it.
    fn flush(&mut self, task: &Task, from: usize, to: usize) {
        let n = task.n;
        let H = MatRef::from_row_major_slice(task.h, n, n);
        let D = MatRef::from_column_major_slice(self.D[from..to].as_flattened(), ROWS, to - from);
        for outside in [0..from, to..n] {
            if !outside.is_empty() {
                let (first, count) = (outside.start, outside.len());
                matmul(
                    MatMut::from_column_major_slice_mut(self.G[outside].as_flattened_mut(), ROWS, count),
                    Accum::Add,
                    D,
                    H.submatrix(from, first, to - from, count),
                    -1.0,
                    Par::Seq,
                );
            }
        }
        self.D[from..to].fill([0.0; ROWS]);
    }
}

multiversion! {
    /// The least-squares scale of a group and, with `shift`, its zero point; whether anything changed. V is up to date.
    fn refit(task: &Task, state: &mut State, group: usize, from: usize, to: usize, shift: bool) -> bool {
        let (mut num, mut den) = ([0f32; ROWS], [0f32; ROWS]);
        for ((Z, G), V) in state.Z[from..to].iter().zip(&state.G[from..to]).zip(&state.V) {
            for r in 0..ROWS {
                num[r] += Z[r] * G[r];
                den[r] += Z[r] * V[r];
            }
        }
        let (mut step, mut any) = ([0f32; ROWS], false);
        for r in 0..ROWS {
            let old = state.scales[group][r];
            if den[r].is_nan() || den[r] <= 0.0 {
                continue;
            }
            let new = task.opts.scale_type.round(old + num[r] / den[r]);
            let ds = new - old;
            let turns = (new < 0.0) != (old < 0.0);
            // The objective changes by ds² den − 2 ds num; rounding may have made that a rise.
            if usable(new) && (task.opts.signed_scales || !turns) && ds * (ds * den[r] - 2.0 * num[r]) < 0.0 {
                state.scales[group][r] = new;
                step[r] = ds;
                any = true;
            }
        }
        if any {
            for ((Z, G), (V, D)) in state.Z[from..to]
                .iter()
                .zip(&mut state.G[from..to])
                .zip(state.V.iter().zip(&mut state.D[from..to]))
            {
                for r in 0..ROWS {
                    G[r] -= step[r] * V[r];
                    D[r] += step[r] * Z[r];
                }
            }
        }
        let (Some(ones), true) = (task.ones, shift) else { return any };
        let ones = &ones[from..to];
        let total: f32 = ones.iter().sum();
        let mut num = [0f32; ROWS];
        for G in &state.G[from..to] {
            for r in 0..ROWS {
                num[r] += G[r];
            }
        }
        let (mut shifts, mut shifted) = ([0f32; ROWS], false);
        let top = f32::from(task.opts.scheme.max_code());
        for r in 0..ROWS {
            let (s, zero) = (state.scales[group][r], state.zeros[group][r]);
            // Q moves by −s δ: the objective changes by 2 s δ Σ G + s² δ² Σ H_gg.
            let by = (-num[r] / (s * total)).round_ties_even();
            let by = (zero + by).clamp(f32::from(task.opts.min_zero), top) - zero;
            if s * by * (2.0 * num[r] + s * by * total) < 0.0 {
                state.zeros[group][r] = zero + by;
                shifts[r] = by;
                shifted = true;
            }
        }
        if shifted {
            let s = state.scales[group];
            for ((Z, G), (D, one)) in state.Z[from..to]
                .iter_mut()
                .zip(&mut state.G[from..to])
                .zip(state.D[from..to].iter_mut().zip(ones))
            {
                for r in 0..ROWS {
                    Z[r] -= shifts[r];
                    D[r] -= s[r] * shifts[r];
                    G[r] += s[r] * shifts[r] * one;
                }
            }
        }
        any || shifted
    }
}

multiversion! {
    /// Each code of columns `start..end` in turn to its best value given all others; whether any changed.
    fn sweep_block(task: &Task, state: &mut State, group: usize, start: usize, end: usize) -> bool {
        let scales = state.scales[group];
        let (mut inverse, mut low, mut high) = ([0f32; ROWS], [0f32; ROWS], [0f32; ROWS]);
        for r in 0..ROWS {
            inverse[r] = 1.0 / scales[r];
            low[r] = -state.zeros[group][r];
            high[r] = f32::from(task.opts.scheme.max_code()) - state.zeros[group][r];
        }
        let mut any = false;
        for i in start..end {
            let H = &task.h[i * task.n..(i + 1) * task.n];
            let pivot = 1.0 / H[i];
            let (mut step, mut moves) = ([0f32; ROWS], 0f32);
            let (G, Z, D) = (&state.G[i], &mut state.Z[i], &mut state.D[i]);
            for r in 0..ROWS {
                let z = (Z[r] + G[r] * pivot * inverse[r]).round_ties_even();
                let z = if z < low[r] { low[r] } else { z };
                let z = if z > high[r] { high[r] } else { z };
                let dz = z - Z[r];
                Z[r] = z;
                step[r] = dz * scales[r];
                D[r] += step[r];
                moves += dz.abs();
            }
            if moves > 0.0 {
                any = true;
                for (G, h) in state.G[start..end].iter_mut().zip(&H[start..end]) {
                    for r in 0..ROWS {
                        G[r] -= step[r] * h;
                    }
                }
            }
        }
        any
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::factor::factorize;
    use crate::gptq::gptq_codes;
    use crate::rtn::quantize_rtn;

    fn options(bits: u8, symmetric: bool, group: GroupSize) -> SolverOptions {
        SolverOptions::new(Scheme { bits, symmetric, group }, ScaleType::Bf16)
    }

    /// Weights, and the Gram matrix of correlated inputs.
    pub(crate) fn problem(seed: u64, out: usize, n: usize) -> (Vec<f32>, Vec<f32>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let w = (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect();
        let norms: Vec<f32> = (0..n).map(|_| rng.random_range(0.2f32..3.0)).collect();
        let mut h = vec![0f32; n * n];
        for _ in 0..2 * n {
            let shared: f32 = rng.random_range(-1.0..1.0);
            let x: Vec<f32> = norms.iter().map(|s| s * (shared + rng.random_range(-1f32..1.0))).collect();
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += x[i] * x[j];
                }
            }
        }
        (w, h)
    }

    fn objective(w: &[f32], q: &QuantizedMatrix, h: &[f32]) -> f64 {
        let n = q.in_features;
        let e: Vec<f32> = w.iter().zip(q.dequantize().unwrap()).map(|(w, q)| w - q).collect();
        e.chunks(n)
            .map(|e| (0..n * n).map(|i| f64::from(e[i / n]) * f64::from(h[i]) * f64::from(e[i % n])).sum::<f64>())
            .sum()
    }

    #[test]
    fn every_sweep_lowers_the_objective() {
        let (out, n) = (37, 320);
        let groups = [GroupSize::Cols(32), GroupSize::Cols(64), GroupSize::Cols(160), GroupSize::PerChannel];
        let mut ratios = Vec::new();
        for (seed, group) in groups.into_iter().enumerate() {
            for (bits, symmetric) in [(4, true), (3, false), (2, true), (2, false)] {
                let opts = options(bits, symmetric, group);
                let (w, h) = problem(seed as u64, out, n);
                let factor = factorize(&h, n, &opts).unwrap();
                let h = factor.damped(&h).unwrap();
                let mut q = gptq_codes(&w, out, n, &factor, &opts).unwrap();
                let first = objective(&w, &q, &h);
                let mut last = first;
                for sweep in 0..4 {
                    descend(&mut q, &w, &h, 1, &opts).unwrap();
                    q.validate().unwrap();
                    let now = objective(&w, &q, &h);
                    assert!(now <= last * (1.0 + 1e-6), "{group:?} {bits} {symmetric} sweep {sweep}: {last} -> {now}");
                    last = now;
                }
                assert!(last < first, "{group:?} {bits} {symmetric}: {first} -> {last}");
                ratios.push(last / first);
                assert!(q.scales.iter().all(|s| *s == ScaleType::Bf16.round(*s)));
            }
        }
        // Wide groups leave a scale little to gain; on the whole the sweeps must be worth their time.
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        assert!(mean < 0.985, "{mean} {ratios:?}");
    }

    #[test]
    fn signs_of_scales_stay_where_they_must() {
        let (out, n) = (40, 128);
        let opts = SolverOptions { signed_scales: false, ..options(2, true, GroupSize::Cols(32)) };
        let (w, h) = problem(8, out, n);
        let factor = factorize(&h, n, &opts).unwrap();
        let mut q = gptq_codes(&w, out, n, &factor, &opts).unwrap();
        descend(&mut q, &w, &factor.damped(&h).unwrap(), 5, &opts).unwrap();
        assert!(q.scales.iter().all(|s| *s > 0.0));
    }

    #[test]
    fn an_answer_that_is_exact_stays() {
        // Weights on the grid: nothing can be lower than zero.
        let (out, n) = (3, 64);
        let opts = options(4, true, GroupSize::Cols(32));
        let (w, h) = problem(4, out, n);
        let q = quantize_rtn(&w, out, n, None, &opts).unwrap();
        let mut after = q.clone();
        descend(&mut after, &q.dequantize().unwrap(), &h, 3, &opts).unwrap();
        assert_eq!(after, q);
    }

    #[test]
    fn the_identity_keeps_nearest_codes() {
        let (out, n) = (5, 96);
        let (w, _) = problem(5, out, n);
        let h: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
        let opts = options(4, true, GroupSize::Cols(32));
        let mut q = quantize_rtn(&w, out, n, None, &opts).unwrap();
        descend(&mut q, &w, &h, 6, &opts).unwrap();
        for r in 0..out {
            for c in 0..n {
                let s = q.scales[r * 3 + c / 32];
                let error = (w[r * n + c] - s * (f32::from(q.codes[r * n + c]) - 8.0)).abs();
                let clipped = matches!(q.codes[r * n + c], 0 | 15);
                assert!(clipped || error <= 0.501 * s.abs(), "{r} {c}: {error} {s}");
            }
        }
    }

    #[test]
    fn the_thread_count_changes_nothing_and_dead_columns_stay_zero() {
        let (out, n, dead) = (100, 96, 40);
        for symmetric in [true, false] {
            let opts = options(3, symmetric, GroupSize::Cols(32));
            let (mut w, mut h) = problem(6, out, n);
            for i in 0..n {
                h[i * n + dead] = 0.0;
                h[dead * n + i] = 0.0;
            }
            (0..out).for_each(|r| w[r * n + dead] = 0.0);
            let factor = factorize(&h, n, &opts).unwrap();
            let damped = factor.damped(&h).unwrap();
            let start = gptq_codes(&w, out, n, &factor, &opts).unwrap();
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut q = start.clone();
                pool.install(|| descend(&mut q, &w, &damped, 3, &opts)).unwrap();
                q
            };
            let q = on(1);
            assert_eq!(q, on(3));
            let values = q.dequantize().unwrap();
            assert!((0..out).all(|r| values[r * n + dead] == 0.0));
        }
    }
}
