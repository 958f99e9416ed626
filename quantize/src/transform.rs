//! Changes of the float model before it is quantized: it computes the same, and its weights or inputs are easier to round.
//!
//! All of them fold into tensors that the model has anyway, so the output is an ordinary checkpoint. They work block by block, before
//! anything of the block is solved; what is solved, and the float stream of `best`, both see the changed block.
//!
//! | transform | moves | data |
//! |---|---|---|
//! | `rotate` | the residual stream and every head's values into a rotated basis ([`rotation`]) | none |
//! | `awq` | scales into norm → q/k/v, v → o, norm → gate/up, up → down ([`awq`]) | calibration |
//! | `smoothquant` | scales into norm → q/k/v, norm → gate/up ([`smooth`]) | calibration |

pub mod awq;
pub(crate) mod block;
pub mod fold;
mod folding;
mod plan;
pub mod rotation;
pub mod smooth;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub(crate) use self::folding::{BlockFold, Folding};
pub(crate) use self::plan::{refuse_transforms, rewritten, transform_bytes, untied_head};
use self::smooth::STRENGTH;

/// One transform.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Transform {
    /// R1 and R2 (arXiv 2404.00456, 2405.16406).
    Rotate,
    /// AWQ's channel scales (arXiv 2306.00978).
    Awq,
    /// SmoothQuant (arXiv 2211.10438).
    SmoothQuant {
        /// Share of the difficulty that goes to the weights, 0 to 1.
        alpha: f32,
    },
}

impl Transform {
    /// `rotate`, `awq`, `smoothquant` or `smoothquant=0.8`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once('=') {
            None if text == "rotate" => Some(Transform::Rotate),
            None if text == "awq" => Some(Transform::Awq),
            None if text == "smoothquant" => Some(Transform::SmoothQuant { alpha: STRENGTH }),
            Some(("smoothquant", alpha)) => {
                let alpha = alpha.parse::<f32>().ok().filter(|a| (0.0..=1.0).contains(a))?;
                Some(Transform::SmoothQuant { alpha })
            }
            _ => None,
        }
    }

    /// As [`Self::parse`] reads it.
    pub fn name(self) -> String {
        match self {
            Transform::Rotate => "rotate".into(),
            Transform::Awq => "awq".into(),
            Transform::SmoothQuant { alpha } => format!("smoothquant={alpha}"),
        }
    }

    /// Whether it needs calibration data.
    pub fn calibrated(self) -> bool {
        self != Transform::Rotate
    }
}

/// What the transforms of a run did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TransformRecord {
    /// Their names, in the order they are applied.
    pub applied: Vec<String>,
    /// Tensors that are not quantized and not the original's bits.
    pub rewritten: Vec<String>,
    /// Scales, input by input; empty where nothing was scaled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub folds: Vec<FoldRecord>,
}

/// The scales of one input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FoldRecord {
    /// Block.
    pub block: usize,
    /// Linears whose columns were multiplied: `q/k/v`, `o`, `gate/up` or `down`.
    pub inputs: String,
    /// The exponent: searched (awq) or given (smoothquant).
    pub alpha: f32,
    /// Smallest scale.
    pub min_scale: f32,
    /// Largest.
    pub max_scale: f32,
    /// awq: `tr(E H Eᵀ)` of rounding these linears as they are, per calibration token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_before: Option<f64>,
    /// awq: the same with the scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_after: Option<f64>,
}

/// The rotation of the residual stream comes first, whatever the order they were named in: scales are searched in the basis that
/// is quantized.
fn ordered(transforms: &[Transform]) -> Vec<Transform> {
    let (mut first, rest): (Vec<_>, Vec<_>) = transforms.iter().copied().partition(|t| *t == Transform::Rotate);
    first.extend(rest);
    first
}

/// The one that searches scales.
pub(crate) fn scaling(transforms: &[Transform]) -> Option<Transform> {
    transforms.iter().copied().find(|t| t.calibrated())
}
