//! One linear from its statistics to its codes: the composition of the pure pieces.

use std::ops::Range;

use lowbit_calibration::InputStats;
use lowbit_checkpoint::linear;
use lowbit_kernels::backend::{Backend, Bytes, FloatType, HostWeight};
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{QuantizedMatrix, QuantizedWeight, WeightFormat};

use crate::blocks::{BlockMatrix, blocks_gptq, blocks_rtn};
use crate::descent::descend;
use crate::factor::{Factor, SolveError, factorize};
use crate::floats::quantize_float;
use crate::gptq::gptq_codes;
use crate::loss::{Loss, proxy_loss};
use crate::on_device::OnDevice;
use crate::rtn::quantize_rtn;
use crate::scale_search::SolverOptions;
use crate::target::corrected_target;

/// What linears that read the same input share.
pub struct Shared<'a> {
    /// Their input's statistics.
    pub stats: &'a InputStats,
    /// Factor of the damped Hessian.
    pub factor: Factor,
    /// The damped Hessian, where a sweep needs it.
    damped: Option<Vec<f32>>,
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

    fn of(
        stats: &'a InputStats,
        factor: Factor,
        device: Option<OnDevice<'a>>,
        opts: &SolverOptions,
    ) -> Result<Self, SolveError> {
        let damped = (opts.sweeps > 0).then(|| factor.damped(&stats.hessian)).transpose()?;
        Ok(Self { stats, factor, damped, device })
    }

    /// GPTQ of `target` `[out, n]` onto integers.
    fn codes(&self, target: &[f32], out: usize, n: usize, opts: &SolverOptions) -> Result<QuantizedMatrix, SolveError> {
        match &self.device {
            Some(d) => d.codes(target, out, n, &self.factor, opts),
            None => gptq_codes(target, out, n, &self.factor, opts),
        }
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
    let (stats, factor) = (shared.stats, &shared.factor);
    let corrected = match &stats.drift {
        Some(d) => Some(corrected_target(w, out, n, &d.input, d.residual.as_deref(), factor, opts.correction)?),
        None => None,
    };
    let target = corrected.as_deref().unwrap_or(w);
    let mut matrix = shared.codes(target, out, n, opts)?;
    if let Some(h) = &shared.damped {
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
            let q = quantize_float(w, out, n, format, set_max, Some(&shared.factor), opts)?;
            Solved::Codes(QuantizedWeight::Float(q))
        }
        Wanted::Blocks(kind) => Solved::Blocks(blocks_gptq(kind, w, n, &shared.factor, opts)?),
    };
    let loss = shared.loss(w, &solved.dequantize()?, out, n)?;
    Ok((solved, loss))
}

/// Every weight on its own.
pub fn round_any(
    w: &[f32],
    out: usize,
    n: usize,
    wanted: Wanted,
    set_max: f32,
    opts: &SolverOptions,
) -> Result<Solved, SolveError> {
    Ok(match wanted {
        Wanted::Codes(WeightFormat::Int(_)) => {
            Solved::Codes(QuantizedWeight::Int(quantize_rtn(w, out, n, None, opts)?))
        }
        Wanted::Codes(format) => {
            Solved::Codes(QuantizedWeight::Float(quantize_float(w, out, n, format, set_max, None, opts)?))
        }
        Wanted::Blocks(kind) => Solved::Blocks(blocks_rtn(kind, w, n)?),
    })
}
