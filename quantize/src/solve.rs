//! One linear from its statistics to its codes: the composition of the pure pieces.

use std::ops::Range;
use std::sync::Arc;

use lowbit_calibration::InputStats;
use lowbit_checkpoint::linear;
use lowbit_kernels::backend::{Backend, Bytes, FloatType, HostWeight};
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{QuantizedMatrix, QuantizedWeight, WeightFormat};

use crate::block_search::search_scales_by_blocks;
use crate::blocks::{BlockMatrix, blocks_gptq, blocks_rtn};
use crate::descent::descend;
use crate::factor::{Factor, SolveError, factorize};
use crate::floats::quantize_float;
use crate::gptq::codes_on;
use crate::hqq::quantize_hqq;
use crate::loss::{Loss, proxy_loss};
use crate::on_device::OnDevice;
use crate::rtn::quantize_rtn;
use crate::scale_search::{DataFree, ScaleSearch, SolverOptions, search_scales};
use crate::target::corrected_target;

/// What linears that read the same input share.
pub struct Shared<'a> {
    /// Their input's statistics.
    pub stats: &'a InputStats,
    /// Factor of the damped Hessian.
    pub factor: Arc<Factor>,
    /// The damped Hessian, where a sweep or a search needs it.
    damped: Option<Arc<Vec<f32>>>,
    /// Where a device solves.
    device: Option<OnDevice<'a>>,
}

impl<'a> Shared<'a> {
    /// Factorizes; everything on the host.
    pub fn new(stats: &'a InputStats, opts: &SolverOptions) -> Result<Self, SolveError> {
        Self::of(stats, factorize(&stats.hessian, stats.n, opts)?, None, opts)
    }

    /// [`Self::new`] with the solvers of `backend`, where it has any.
    pub fn on(backend: &'a dyn Backend, stats: &'a InputStats, opts: &SolverOptions) -> Result<Self, SolveError> {
        let Some(solver) = backend.solver() else { return Self::new(stats, opts) };
        let (factor, device) = OnDevice::new(backend, solver, stats, opts)?;
        Self::of(stats, factor, Some(device), opts)
    }

    /// The same on another device of the same kind, without factorizing again: the bits of what is solved there are those of here.
    pub fn beside(&self, backend: &'a dyn Backend) -> Result<Self, SolveError> {
        let (stats, factor, damped) = (self.stats, self.factor.clone(), self.damped.clone());
        let device =
            backend.solver().map(|solver| OnDevice::from_factor(backend, solver, stats, &factor)).transpose()?;
        Ok(Self { stats, factor, damped, device })
    }

    fn of(
        stats: &'a InputStats,
        factor: Factor,
        device: Option<OnDevice<'a>>,
        opts: &SolverOptions,
    ) -> Result<Self, SolveError> {
        let whole = opts.sweeps > 0 || opts.scale_search == ScaleSearch::Blocks;
        let damped = whole.then(|| factor.damped(&stats.hessian)).transpose()?;
        Ok(Self { stats, factor: Arc::new(factor), damped: damped.map(Arc::new), device })
    }

    /// GPTQ of `target` `[out, n]` onto integers.
    fn codes(&self, target: &[f32], out: usize, n: usize, opts: &SolverOptions) -> Result<QuantizedMatrix, SolveError> {
        let factor: &Factor = &self.factor;
        // A device searches by the diagonal alone.
        if let Some(d) = self.device.as_ref().filter(|_| !opts.scale_search.integers_only()) {
            return d.codes(target, out, n, factor, opts);
        }
        let scales = match (opts.scale_search, &self.damped) {
            (ScaleSearch::Blocks, Some(h)) => search_scales_by_blocks(target, out, n, h, &factor.diag, opts)?,
            (ScaleSearch::Pivots, _) => search_scales(target, out, n, Some(&factor.pivots()), opts)?,
            _ => search_scales(target, out, n, Some(&factor.diag), opts)?,
        };
        codes_on(target, out, n, factor, scales, opts)
    }

    /// Loss of `q` against `w`, both `[out, n]`.
    fn loss(&self, w: &[f32], q: &[f32], out: usize, n: usize) -> Result<Loss, SolveError> {
        let on_device = self.device.as_ref().map(|d| d.loss(w, q, out, n)).transpose()?.flatten();
        let loss = on_device.unwrap_or_else(|| proxy_loss(w, q, &self.stats.hessian, out, n));
        if !(loss.proxy.is_finite() && loss.reference.is_finite()) {
            return Err(SolveError::NonFinite { what: "proxy loss", index: 0 });
        }
        Ok(loss)
    }
}

/// Quantizes `w` `[out, n]`: corrected target → scales → GPTQ → sweeps, each where the options ask for it. The loss is
/// that of the result against `w` itself.
pub fn solve_linear(
    w: &[f32],
    out: usize,
    n: usize,
    shared: &Shared,
    opts: &SolverOptions,
) -> Result<(QuantizedMatrix, Loss), SolveError> {
    let stats = shared.stats;
    let factor: &Factor = &shared.factor;
    let corrected = match &stats.drift {
        Some(d) => Some(corrected_target(w, out, n, &d.input, d.residual.as_deref(), factor, opts.correction)?),
        None => None,
    };
    let target = corrected.as_deref().unwrap_or(w);
    let mut matrix = shared.codes(target, out, n, opts)?;
    if let Some(h) = shared.damped.as_ref().filter(|_| opts.sweeps > 0) {
        if corrected.is_none() && !factor.dead.is_empty() {
            let mut live = w.to_vec();
            live.chunks_mut(n).for_each(|row| factor.dead.iter().for_each(|c| row[*c] = 0.0));
            descend(&mut matrix, &live, h, opts.sweeps, opts)?;
        } else {
            descend(&mut matrix, target, h, opts.sweeps, opts)?;
        }
    }
    let loss = shared.loss(w, &matrix.dequantize()?, out, n)?;
    Ok((matrix, loss))
}

/// What a matrix is to become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// Codes of a number format.
    Codes(WeightFormat),
    /// Super-blocks of GGUF.
    Blocks(GgmlType),
}

/// What it became.
pub enum Solved {
    /// Codes of a number format.
    Codes(QuantizedWeight),
    /// Super-blocks of GGUF.
    Blocks(BlockMatrix),
}

impl Solved {
    /// As f32 `[out, n]`.
    pub fn dequantize(&self) -> lowbit_kernels::Result<Vec<f32>> {
        match self {
            Solved::Codes(q) => q.dequantize(),
            Solved::Blocks(b) => Ok(b.values()),
        }
    }

    /// Rows as f32; within the matrix.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Solved::Codes(q) => q.widen(rows, out),
            Solved::Blocks(b) => b.widen(rows, out),
        }
    }

    /// For upload, as the model that is read back will have it.
    pub fn host_weight(&self) -> lowbit_kernels::Result<HostWeight> {
        let b = match self {
            Solved::Codes(q) => return linear::host_weight(q),
            Solved::Blocks(b) => b,
        };
        let values = b.values();
        let (dtype, n) = (FloatType::F32, b.cols);
        let data = Bytes::from_vec(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        Ok(HostWeight::Dense { dtype, out_features: values.len() / n.max(1), in_features: n, data })
    }
}

/// [`solve_linear`] for integers, GPTQ onto the grids of the others; `set_max` as in [`quantize_float`].
pub fn solve_any(
    w: &[f32],
    out: usize,
    n: usize,
    wanted: Wanted,
    set_max: f32,
    shared: &Shared,
    opts: &SolverOptions,
) -> Result<(Solved, Loss), SolveError> {
    let solved = match wanted {
        Wanted::Codes(WeightFormat::Int(_)) => {
            return solve_linear(w, out, n, shared, opts)
                .map(|(m, loss)| (Solved::Codes(QuantizedWeight::Int(m)), loss));
        }
        Wanted::Codes(format) => {
            let q = quantize_float(w, out, n, format, set_max, Some(&*shared.factor), opts)?;
            Solved::Codes(QuantizedWeight::Float(q))
        }
        Wanted::Blocks(kind) => Solved::Blocks(blocks_gptq(kind, w, n, &shared.factor, opts)?),
    };
    let loss = shared.loss(w, &solved.dequantize()?, out, n)?;
    Ok((solved, loss))
}

/// Integer codes of `w` `[out, n]` without data, as [`SolverOptions::data_free`] says.
pub fn round_linear(w: &[f32], out: usize, n: usize, opts: &SolverOptions) -> Result<QuantizedMatrix, SolveError> {
    match opts.data_free {
        DataFree::Nearest => quantize_rtn(w, out, n, None, opts),
        DataFree::HalfQuadratic => quantize_hqq(w, out, n, opts),
    }
}

/// Every weight on its own: [`round_linear`] for integers, to nearest for the others.
pub fn round_any(
    w: &[f32],
    out: usize,
    n: usize,
    wanted: Wanted,
    set_max: f32,
    opts: &SolverOptions,
) -> Result<Solved, SolveError> {
    Ok(match wanted {
        Wanted::Codes(WeightFormat::Int(_)) => Solved::Codes(QuantizedWeight::Int(round_linear(w, out, n, opts)?)),
        Wanted::Codes(format) => {
            Solved::Codes(QuantizedWeight::Float(quantize_float(w, out, n, format, set_max, None, opts)?))
        }
        Wanted::Blocks(kind) => Solved::Blocks(blocks_rtn(kind, w, n)?),
    })
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn stats(n: usize, hessian: Vec<f32>) -> InputStats {
        InputStats { n, hessian, drift: None, tokens: 1, abs_max: 1.0, blend: None }
    }

    #[test]
    fn an_identity_hessian_gives_round_to_nearest_whatever_the_search() {
        let (out, n) = (9, 96);
        let mut rng = StdRng::seed_from_u64(1);
        let w: Vec<f32> = (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect();
        let stats = stats(n, (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect());
        for symmetric in [true, false] {
            let scheme = Scheme { bits: 4, symmetric, group: GroupSize::Cols(32) };
            for scale_search in [ScaleSearch::Hessian, ScaleSearch::Pivots, ScaleSearch::Blocks] {
                let opts =
                    SolverOptions { scale_search, damp_frac: 0.0, ..SolverOptions::new(scheme, ScaleType::Bf16) };
                let shared = Shared::new(&stats, &opts).unwrap();
                let (q, _) = solve_linear(&w, out, n, &shared, &opts).unwrap();
                assert_eq!(q, quantize_rtn(&w, out, n, None, &opts).unwrap(), "{scale_search:?} {symmetric}");
            }
        }
    }

    #[test]
    fn every_search_and_sweep_is_well_below_rounding_to_nearest() {
        let (out, n) = (32, 96);
        let (mut rounded, mut solved) = (0.0, [0.0; 6]);
        for seed in 0..8 {
            let mut rng = StdRng::seed_from_u64(seed);
            let w: Vec<f32> = (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect();
            let norms: Vec<f32> = (0..n).map(|_| rng.random_range(0.2f32..3.0)).collect();
            let mut h = vec![0f32; n * n];
            for _ in 0..2 * n {
                let shared: f32 = rng.random_range(-1.0..1.0);
                let x: Vec<f32> = norms.iter().map(|s| s * (shared + rng.random_range(-1f32..1.0))).collect();
                (0..n * n).for_each(|i| h[i] += x[i / n] * x[i % n]);
            }
            let stats = stats(n, h);
            let scheme = Scheme { bits: 3, symmetric: true, group: GroupSize::Cols(32) };
            let plain = SolverOptions::new(scheme, ScaleType::Bf16);
            let diag: Vec<f32> = (0..n).map(|i| stats.hessian[i * n + i]).collect();
            let q = quantize_rtn(&w, out, n, Some(&diag), &plain).unwrap().dequantize().unwrap();
            rounded += proxy_loss(&w, &q, &stats.hessian, out, n).proxy;
            let searches = [ScaleSearch::Hessian, ScaleSearch::Pivots, ScaleSearch::Blocks];
            let all = searches.into_iter().flat_map(|search| [(search, 0), (search, 2)]);
            for ((scale_search, sweeps), sum) in all.zip(&mut solved) {
                let opts = SolverOptions { scale_search, sweeps, ..plain.clone() };
                let shared = Shared::new(&stats, &opts).unwrap();
                *sum += solve_linear(&w, out, n, &shared, &opts).unwrap().1.proxy;
            }
        }
        assert!(solved.iter().all(|s| *s < 0.8 * rounded), "{solved:?} {rounded}");
        // The sweeps lower the damped objective, which is that of the loss but for a hundredth of its mean diagonal.
        assert!(solved.chunks(2).all(|s| s[1] < s[0]), "{solved:?}");
    }
}
