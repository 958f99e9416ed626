//! One linear from its statistics to its codes: the composition of the pure pieces.

use lowbit_calibration::InputStats;
use lowbit_kernels::{QuantizedMatrix, QuantizedWeight, WeightFormat};

use crate::descent::descend;
use crate::factor::{Factor, SolveError, factorize};
use crate::floats::quantize_float;
use crate::gptq::gptq_codes;
use crate::loss::{Loss, proxy_loss};
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
}

impl<'a> Shared<'a> {
    /// Factorizes.
    pub fn new(stats: &'a InputStats, opts: &SolverOptions) -> Result<Self, SolveError> {
        let factor = factorize(&stats.hessian, stats.n, opts)?;
        let damped = (opts.sweeps > 0).then(|| factor.damped(&stats.hessian)).transpose()?;
        Ok(Self { stats, factor, damped })
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
    let mut matrix = gptq_codes(target, out, n, factor, opts)?;
    if let Some(h) = &shared.damped {
        if corrected.is_none() && !factor.dead.is_empty() {
            let mut live = w.to_vec();
            live.chunks_mut(n).for_each(|row| factor.dead.iter().for_each(|c| row[*c] = 0.0));
            descend(&mut matrix, &live, h, opts.sweeps, opts)?;
        } else {
            descend(&mut matrix, target, h, opts.sweeps, opts)?;
        }
    }
    let loss = proxy_loss(w, &matrix.dequantize()?, &stats.hessian, out, n);
    if !(loss.proxy.is_finite() && loss.reference.is_finite()) {
        return Err(SolveError::NonFinite { what: "proxy loss", index: 0 });
    }
    Ok((matrix, loss))
}

/// [`solve_linear`] for integers, GPTQ onto the grid of float codes for the others; `set_max` as in [`quantize_float`].
pub fn solve_any(
    w: &[f32],
    out: usize,
    n: usize,
    format: WeightFormat,
    set_max: f32,
    shared: &Shared,
    opts: &SolverOptions,
) -> Result<(QuantizedWeight, Loss), SolveError> {
    if let WeightFormat::Int(_) = format {
        return solve_linear(w, out, n, shared, opts).map(|(m, loss)| (QuantizedWeight::Int(m), loss));
    }
    let q = quantize_float(w, out, n, format, set_max, Some(&shared.factor), opts)?;
    let loss = proxy_loss(w, &q.dequantize()?, &shared.stats.hessian, out, n);
    if !(loss.proxy.is_finite() && loss.reference.is_finite()) {
        return Err(SolveError::NonFinite { what: "proxy loss", index: 0 });
    }
    Ok((QuantizedWeight::Float(q), loss))
}

/// Every weight on its own, in any format.
pub fn round_any(
    w: &[f32],
    out: usize,
    n: usize,
    format: WeightFormat,
    set_max: f32,
    opts: &SolverOptions,
) -> Result<QuantizedWeight, SolveError> {
    Ok(match format {
        WeightFormat::Int(_) => QuantizedWeight::Int(quantize_rtn(w, out, n, None, opts)?),
        _ => QuantizedWeight::Float(quantize_float(w, out, n, format, set_max, None, opts)?),
    })
}
