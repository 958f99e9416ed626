//! Solvers that a device has itself: the Hessian's factor, GPTQ's codes, and the loss of what came out.
//!
//! A backend without them leaves the work to the host ([`crate::backend::Backend::solver`] is `None`).

use crate::backend::Buffer;
use crate::error::Result;
use crate::qdq::ScaleType;
use crate::scheme::Scheme;

/// A damped Hessian in solving order, as [`Solver::factor`] takes it apart.
pub struct DampedHessian<'a> {
    /// `[n, n]` in the order of columns; the upper triangle is read.
    pub h: &'a Buffer,
    /// Columns.
    pub n: usize,
    /// `[n]` position in solving order → column.
    pub perm: &'a [usize],
    /// `[n]` undamped diagonal; a column of 0 is dead and stands alone.
    pub diag: &'a [f32],
    /// `[n]` what stands on the diagonal instead.
    pub damped: &'a [f32],
}

/// GPTQ of one matrix onto integer grids, groups in the order of columns.
pub struct GptqTask<'a> {
    /// `[out_features, n]`, finite.
    pub w: &'a [f32],
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub n: usize,
    /// `[n, n]` upper triangular factor in solving order.
    pub u: &'a Buffer,
    /// `[n]` position in solving order → column.
    pub perm: &'a [usize],
    /// `[n]` weights of the scale search; a column of 0 is dead and becomes 0.
    pub diag: &'a [f32],
    /// Number format.
    pub scheme: Scheme,
    /// What scales are rounded to.
    pub scale_type: ScaleType,
    /// Hundredths of the range that the scale search tries: this one and every second up to 107. `None`: the range itself only.
    pub first_percent: Option<u16>,
    /// Whether it also tries negative scales (symmetric schemes).
    pub signed_scales: bool,
    /// Smallest zero point of an asymmetric scheme.
    pub min_zero: u8,
    /// Columns solved between two updates of those after them.
    pub block: usize,
}

/// What GPTQ made of a matrix.
pub struct GptqResult {
    /// `[out_features, n]` in the order of columns.
    pub codes: Vec<u8>,
    /// `[out_features, groups]`, rounded; one that is not finite overflowed its dtype.
    pub scales: Vec<f32>,
    /// `[out_features, groups]`; `None` when symmetric.
    pub zeros: Option<Vec<u8>>,
}

/// The solvers of a device.
pub trait Solver: Send + Sync {
    /// `U`, upper triangular `[n, n]` in solving order with `H⁻¹ = Uᵀ U`, in f32; or the position at which H is found not
    /// to be positive definite. The outer `None`: this is to be done on the host, for bits that only the host has.
    fn factor(&self, hessian: &DampedHessian<'_>) -> Result<Option<std::result::Result<Buffer, usize>>>;
    /// Scales and codes: for one factor the host's, operation by operation.
    fn gptq(&self, task: &GptqTask<'_>) -> Result<GptqResult>;
    /// `tr((W − Q) H (W − Q)ᵀ)` and `tr(W H Wᵀ)` of w and q `[out_features, n]`, h `[n, n]` with its upper triangle read:
    /// products in f32, sums over rows and columns in f64. `None` as in [`Self::factor`].
    fn loss(&self, w: &[f32], q: &[f32], h: &Buffer, out_features: usize, n: usize) -> Result<Option<(f64, f64)>>;
}
