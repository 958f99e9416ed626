//! `bench.json`.

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use crate::suite::{Ceilings, Left};

/// One row: a model, a test, a batch size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BenchRow {
    /// `candidate` or `reference`.
    pub role: String,
    /// Model name.
    pub model: String,
    /// `pp512`, `tg128`, as llama-bench names them.
    pub test: String,
    /// Sequences at once.
    pub batch: usize,
    /// Median of `samples`.
    pub tokens_per_second: f64,
    /// Tokens per second of every repetition.
    pub samples: Vec<f64>,
    /// Nanoseconds of every repetition.
    pub samples_ns: Vec<u64>,
    /// Bytes of weights and KV read for one decode step (0 for prefill).
    pub bytes_per_step: u64,
    /// Share of the measured memory bandwidth this reaches (decode only).
    pub roofline_frac: Option<f64>,
    /// Flops of the maths of one repetition (prefill only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops: Option<u64>,
    /// Share of the measured flops of a large bf16 linear this reaches, where those were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops_frac: Option<f64>,
}

/// Candidate over reference for one test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpeedUp {
    /// The candidate's name.
    #[serde(default)]
    pub model: String,
    /// Test.
    pub test: String,
    /// Batch.
    pub batch: usize,
    /// Ratio of medians.
    pub ratio: f64,
    /// 95 % bootstrap interval over interleaved pairs.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Latency of a single stream, milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LatencyRow {
    /// `candidate` or `reference`.
    pub role: String,
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Output tokens.
    pub output_tokens: usize,
    /// Prompt in → first token out, tokenization excluded: p50, p95, p99.
    pub ttft_ms: [f64; 3],
    /// Gap between neighbouring tokens, all gaps pooled: p50, p95, p99.
    pub itl_token_ms: [f64; 3],
}

/// Memory in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemoryRow {
    /// `candidate` or `reference`.
    pub role: String,
    /// Model name.
    #[serde(default)]
    pub model: String,
    /// Weights as stored.
    pub weight_bytes: u64,
    /// Elements of its matrices.
    #[serde(default)]
    pub parameters: u64,
    /// Bytes of one number in the KV cache.
    #[serde(default)]
    pub kv_element_bytes: usize,
    /// KV cache of one sequence at `kv_tokens`.
    pub kv_bytes: u64,
    /// Tokens that is for.
    pub kv_tokens: usize,
    /// Peak resident memory of the process (shared by both roles).
    pub peak_rss_bytes: Option<u64>,
}

/// What rounding activations changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RoundingDrift {
    /// Positions compared: of a text in decode, then of the same text as a prompt.
    pub tokens: usize,
    /// Mean KL(exact ‖ rounded), nats.
    pub kl_mean: f64,
    /// Largest, nats.
    pub kl_max: f64,
    /// Positions where the most likely token is the same.
    pub same_top: usize,
}

/// `bench.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BenchRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, { crate::SCHEMA }>")]
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// Measured bandwidth, bytes a second: of reads with the same threads; on a GPU the larger of `ceilings`.
    pub bandwidth_bytes_per_second: f64,
    /// Copy, addition and a large linear on the GPU, in the same run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceilings: Option<Ceilings>,
    /// Rates.
    pub rows: Vec<BenchRow>,
    /// Comparisons.
    pub speed_ups: Vec<SpeedUp>,
    /// Single-stream latency.
    pub latency: Vec<LatencyRow>,
    /// Memory.
    pub memory: Vec<MemoryRow>,
    /// The candidate beside its own exact arithmetic (CPU only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounding: Option<RoundingDrift>,
    /// Tests that could not run, a model that did not fit above all (synthetic models only).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<Left>,
}
