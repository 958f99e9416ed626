//! `eval.json`.

use std::collections::BTreeMap;

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use crate::drift::blame::Blame;
use crate::drift::free_running::FreeRunning;
use crate::drift::summary::{DriftStatistics, TaskDrift};
use crate::drift::tokens::TokenView;
use crate::engine::Shard;
use crate::judge::JudgeRecord;
use crate::tasks::TaskRecord;
use crate::verdict::{Look, Sizes};

/// A value with a 95 % confidence interval, clustered by window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Point estimate.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A perplexity with everything that makes it comparable.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PerplexityRecord {
    /// `gptq-2048`, `llama.cpp-512`, `lm-eval-word`, `stride:N`.
    pub protocol: String,
    /// File the text came from.
    pub source: String,
    /// SHA-256 of the text.
    pub source_sha256: String,
    /// Tokens per window.
    pub window: usize,
    /// Windows scored.
    pub windows: usize,
    /// Positions scored.
    pub scored_tokens: u64,
    /// `stream start` / `every window` / `none`.
    pub bos: String,
    /// The candidate's perplexity.
    pub perplexity: Interval,
    /// The reference's, where there is one.
    pub reference: Option<Interval>,
    /// Ratio candidate / reference with a paired interval.
    pub ratio: Option<Interval>,
    /// Mean NLL of each window, nats (raw samples).
    pub window_nll: Vec<f64>,
    /// The reference's window NLLs.
    pub reference_window_nll: Vec<f64>,
}

/// KL(reference ‖ candidate) over the full vocabulary, nats a token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KlRecord {
    /// File the text came from.
    pub source: String,
    /// SHA-256 of the text.
    pub source_sha256: String,
    /// Tokens per window.
    pub window: usize,
    /// Windows.
    pub windows: usize,
    /// Positions compared.
    pub tokens: u64,
    /// Mean over tokens.
    pub mean: f64,
    /// Clustered 95 % interval of the mean.
    pub mean_interval: Interval,
    /// Median.
    pub median: f64,
    /// Percentiles by linear interpolation: label → value, for 0.1 1 5 10 25 50 75 90 95 99 99.9.
    pub percentiles: Vec<(String, f64)>,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// Smallest.
    pub min: f64,
    /// Share of positions where both models' first choice agrees.
    pub top1_agreement: Interval,
    /// Candidate minus reference probability of the true token: mean.
    pub delta_p_mean: f64,
    /// Root mean square of the same.
    pub delta_p_rms: f64,
    /// Percentiles of the same.
    pub delta_p_percentiles: Vec<(String, f64)>,
    /// Correlation of the per-token NLLs.
    pub nll_correlation: f64,
    /// Perplexity of the candidate on these positions.
    pub perplexity: f64,
    /// Perplexity of the reference on these positions.
    pub reference_perplexity: f64,
    /// Reverse KL, Jensen–Shannon, top-k agreement, KL by confidence, change of the margin. Absent before schema 2.
    #[serde(default)]
    pub statistics: DriftStatistics,
    /// Mean KL per window (raw samples).
    pub window_means: Vec<f64>,
}

/// A file of [`crate::tasks::Item`]s, one a line, beside the record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ItemFile {
    /// Name, relative to the record's folder.
    pub file: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Lines.
    pub items: u64,
}

/// Files of raw results beside the record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ItemFiles {
    /// The candidate's items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<ItemFile>,
    /// The reference's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<ItemFile>,
    /// Votes of judges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<ItemFile>,
    /// Of a shard: the answers that `lowbit eval merge` puts together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<ItemFile>,
}

/// Format of `eval.json`.
pub const SCHEMA: u32 = 3;

/// `eval.json`. Everything but `provenance` and seconds is the same for the same models and options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// Headline perplexity (the first of `perplexities`).
    pub perplexity: Option<f64>,
    /// All protocols run.
    pub perplexities: Vec<PerplexityRecord>,
    /// Drift.
    pub kl: Option<KlRecord>,
    /// Metrics of tasks and groups by name. Absent before schema 3, as all that follows but the seconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, TaskRecord>,
    /// Drift on the tasks' prompts, by the task's label.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub task_drift: BTreeMap<String, TaskDrift>,
    /// What both models write on from the same prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_running: Option<FreeRunning>,
    /// Where the two models part most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub worst_tokens: Vec<TokenView>,
    /// Which layers the drift comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blame: Option<Blame>,
    /// What judges said, by `task/metric`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub judges: BTreeMap<String, JudgeRecord>,
    /// Name asked for → labels of its tasks (`mmlu` → its 57 subjects).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub families: BTreeMap<String, Vec<String>>,
    /// Raw results.
    #[serde(default)]
    pub items: ItemFiles,
    /// Which part of a run this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<Shard>,
    /// Of a run that was to end once its verdict was clear: which look it ended at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub look: Option<Look>,
    /// What the run could find, as said before it; absent without a reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detectable: Option<Sizes>,
    /// Fewest bits of the candidate's quantized weights; none where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u32>,
    /// Wall seconds of rendering the tasks and answering their requests: without reading data and weights. Absent without tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scoring_seconds: Option<f64>,
    /// Wall seconds.
    pub seconds: f64,
}
