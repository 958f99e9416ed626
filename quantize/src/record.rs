//! `plan.json` and `quantize.json`: what was decided and what happened, linear by linear.

use std::collections::BTreeMap;

use lowbit_calibration::Windows;
use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use crate::budget::BudgetRecord;
use crate::transform::TransformRecord;

/// Bytes of one part of the model before and after.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ComponentSize {
    /// `embedding`, `attention`, `experts`, `mlp`, `norms`, `lm_head`, `other`.
    pub component: String,
    /// Bytes in the original checkpoint.
    pub before_bytes: u64,
    /// Bytes in the quantized checkpoint.
    pub after_bytes: u64,
}

/// The fate of one tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlannedTensor {
    /// Name in the original checkpoint.
    pub name: String,
    /// `[out, in]` or as stored.
    pub shape: Vec<usize>,
    /// `quantize`, `keep`, `copy`, `rewrite`, `drop` or `add`.
    pub action: String,
    /// Full scheme name when quantized.
    pub scheme: Option<String>,
    /// Why.
    pub reason: String,
    /// Component it counts towards.
    pub component: String,
    /// Bytes before.
    pub before_bytes: u64,
    /// Bytes after, exact.
    pub after_bytes: u64,
}

/// Format of `plan.json`.
pub const PLAN_SCHEMA: u32 = 1;
/// Format of `quantize.json`.
pub const SCHEMA: u32 = 1;

/// `plan.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlanRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, PLAN_SCHEMA>")]
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// Every tensor of the checkpoint.
    pub tensors: Vec<PlannedTensor>,
    /// Sizes by component.
    pub sizes: Vec<ComponentSize>,
    /// Sum before.
    pub before_bytes: u64,
    /// Sum after, exact (tensor data).
    pub after_bytes: u64,
    /// Estimate of the peak resident memory of quantizing.
    pub peak_memory_bytes: u64,
    /// Estimate of the seconds of quantizing, where it was probed; reading the calibration text comes on top.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Seconds that the probe took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_seconds: Option<f64>,
    /// Linears to quantize.
    pub quantized_linears: usize,
    /// Linears left as they are.
    pub kept_linears: usize,
    /// What calibrating experts takes, in a mixture of experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertPlan>,
    /// Where a budget was given: what it was spent on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetRecord>,
    /// What a reader should know: linears that do not get the type asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What calibrating the experts of a block takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertPlan {
    /// Experts of a sparse block.
    pub experts: usize,
    /// Experts of a token.
    pub per_token: usize,
    /// Experts whose Hessians are held at once.
    pub at_once: usize,
    /// Passes over the activations of a block that this makes.
    pub passes: usize,
    /// Bytes of all experts' Hessians of a block.
    pub hessian_bytes: u64,
    /// Bytes held at once.
    pub hessian_bytes_at_once: u64,
    /// Routed tokens below which an expert is starved.
    pub tokens_needed: u64,
}

/// How many calibration tokens reached the experts of a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertCoverage {
    /// Block.
    pub block: usize,
    /// Tokens of each expert.
    pub tokens: Vec<u64>,
    /// Fewest.
    pub min: u64,
    /// Median: the lower of the middle two where they are even.
    pub median: u64,
    /// Tokens below which an expert is starved: its Hessian then has the whole layer's mixed in.
    pub needed: u64,
    /// Starved experts, dead ones among them.
    pub starved: usize,
    /// Experts no token reached.
    pub dead: usize,
}

impl ExpertCoverage {
    /// Of a block whose experts saw `tokens`.
    pub fn new(block: usize, tokens: Vec<u64>, needed: u64) -> Self {
        let mut sorted = tokens.clone();
        sorted.sort_unstable();
        let median = sorted.len().checked_sub(1).and_then(|last| sorted.get(last / 2)).copied().unwrap_or(0);
        let below = |limit: u64| sorted.partition_point(|n| *n < limit);
        Self {
            block,
            min: sorted.first().copied().unwrap_or(0),
            median,
            needed,
            starved: below(needed),
            dead: below(1),
            tokens,
        }
    }
}

/// What happened to one linear.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Name without `.weight`.
    pub name: String,
    /// Block index; `None` for embedding and head.
    pub block: Option<usize>,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Full scheme name.
    pub scheme: String,
    /// `best`, `fast`, `gptq`, `round`, `hqq` or `rtn`.
    pub method: String,
    /// `tr((W−Q) H (W−Q)ᵀ)` per calibration token (H = Σ t² x xᵀ / N, t the token weights where the method has them). A
    /// method that corrects drift aims elsewhere than W, so its loss here is not to be compared with GPTQ's. Without data, and of `round`,
    /// which has no Hessian, `‖W−Q‖²`.
    pub proxy_loss: f64,
    /// Proxy loss over `tr(W H Wᵀ)`.
    pub relative_error: f64,
    /// Seconds in the solver.
    pub seconds: f64,
    /// Calibration tokens seen.
    pub tokens: u64,
    /// Largest |input|.
    pub input_abs_max: f32,
    /// The stored scale of its input (NVFP4: the global one), where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_scale: Option<f32>,
    /// Input columns never activated.
    pub dead_columns: usize,
    /// Damping used, as a fraction of mean(diag H).
    pub damp_frac: f64,
    /// Retries, fallbacks: anything a reader must know.
    pub events: Vec<String>,
}

/// `quantize.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuantizeRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// Full scheme name.
    pub scheme: String,
    /// `best`, `fast`, `gptq`, `round`, `hqq` or `rtn`.
    pub method: String,
    /// `compressed-tensors`, `gptq`, `gptq_v2`, `awq` or `gguf`.
    pub format: String,
    /// Options in full.
    pub options: BTreeMap<String, serde_json::Value>,
    /// Calibration source, windows, tokens and hash.
    pub calibration: Option<CalibrationRecord>,
    /// What changed the float model before it was quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transforms: Option<TransformRecord>,
    /// One per quantized linear.
    pub layers: Vec<LayerRecord>,
    /// One per block with experts, where they were calibrated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertCoverage>,
    /// Sizes by component.
    pub sizes: Vec<ComponentSize>,
    /// Sum before.
    pub before_bytes: u64,
    /// Sum after.
    pub after_bytes: u64,
    /// Wall seconds.
    pub seconds: f64,
    /// Seconds by stage.
    pub stage_seconds: BTreeMap<String, f64>,
    /// Peak resident memory of the process.
    pub peak_rss_bytes: Option<u64>,
    /// Where a budget was given: what it was spent on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetRecord>,
}

impl CalibrationRecord {
    /// Of these windows.
    pub fn of(w: &Windows) -> Self {
        Self {
            source: w.source.clone(),
            windows_sha256: w.sha256.clone(),
            windows: w.tokens.len(),
            window_tokens: w.tokens.iter().map(Vec::len).max().unwrap_or(0),
            tokens: w.token_count() as u64,
            seed: w.seed,
        }
    }
}

/// Which data was used.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// File name, data set id or `self`.
    pub source: String,
    /// SHA-256 of the token windows.
    pub windows_sha256: String,
    /// Windows.
    pub windows: usize,
    /// Tokens per window.
    pub window_tokens: usize,
    /// All tokens.
    pub tokens: u64,
    /// Seed.
    pub seed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage_counts_starved_and_dead() {
        let c = ExpertCoverage::new(3, vec![9, 0, 20, 10], 10);
        assert_eq!((c.min, c.median, c.starved, c.dead), (0, 9, 2, 1));
        let none = ExpertCoverage::new(0, vec![], 10);
        assert_eq!((none.min, none.median, none.starved, none.dead), (0, 0, 0, 0));
    }
}
