//! `eval.json`.

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use crate::drift::summary::DriftStatistics;

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

/// `eval.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Format of this record.
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// Headline perplexity (the first of `perplexities`).
    pub perplexity: Option<f64>,
    /// All protocols run.
    pub perplexities: Vec<PerplexityRecord>,
    /// Drift.
    pub kl: Option<KlRecord>,
    /// Wall seconds.
    pub seconds: f64,
}
