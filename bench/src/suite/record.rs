//! What a suite leaves behind.

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use super::cost::Format;

/// One operation against the scalar reference.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CorrectnessRow {
    /// Operation.
    pub op: String,
    /// Shapes and format.
    pub case: String,
    /// Largest absolute difference; `None` where an element is not a number, or the operation failed.
    pub error: Option<f64>,
    /// What it may be.
    pub tolerance: f64,
    /// `error <= tolerance`.
    pub passed: bool,
    /// Why there is no error to compare.
    pub problem: Option<String>,
}

/// What the device can do at best, measured in the same run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bytes a second of a large copy: one read, one write.
    pub copy_bytes_per_second: f64,
    /// Bytes a second of a large `x += y`: two reads, one write.
    pub add_bytes_per_second: f64,
    /// The larger of the two: what rows are compared with. Operations that mostly read may exceed it by a little.
    pub bytes_per_second: f64,
    /// Flops a second of a large bf16 linear of our own: how well a shape uses our kernel, not the hardware.
    pub flops_per_second: f64,
    /// Its shape: `[tokens, out, in]`.
    pub linear_shape: [usize; 3],
}

/// One timed row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelRow {
    /// Model the shape is of.
    pub model: String,
    /// Which layers.
    pub layers: String,
    /// Operation.
    pub op: String,
    /// Weight format of a linear.
    pub format: Option<Format>,
    /// Shape without the tokens.
    pub shape: String,
    /// Tokens of the call (sequences, for attention).
    pub tokens: usize,
    /// Bytes it must move.
    pub bytes: u64,
    /// Flops of the maths.
    pub flops: u64,
    /// Copies of the operands the calls take turns on.
    pub copies: usize,
    /// Calls of a sample.
    pub calls: usize,
    /// Nanoseconds a call, of every sample.
    pub samples_ns: Vec<f64>,
    /// Their median.
    pub median_ns: f64,
    /// `bytes` over the median.
    pub bytes_per_second: f64,
    /// `flops` over the median.
    pub flops_per_second: f64,
    /// Share of the bandwidth ceiling.
    pub bandwidth_frac: f64,
    /// Share of the flops ceiling.
    pub flops_frac: f64,
    /// The larger of the two: least possible time by the ceilings, over the time taken.
    pub ceiling_frac: f64,
}

/// A row without a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The row in words.
    pub row: String,
    /// Why.
    pub reason: String,
    /// Whether it was tried and failed; otherwise the time was up.
    pub failed: bool,
}

/// The record of one call of `lowbit suite`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SuiteRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, { super::SCHEMA }>")]
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// The op table.
    pub correctness: Vec<CorrectnessRow>,
    /// Measured when kernels were timed.
    pub ceilings: Option<Ceilings>,
    /// Timed rows.
    pub kernels: Vec<KernelRow>,
    /// Rows that were not timed.
    pub left: Vec<Left>,
    /// How long all of it took.
    pub seconds: f64,
}

impl SuiteRecord {
    /// Rows of the op table that did not pass.
    pub fn wrong(&self) -> impl Iterator<Item = &CorrectnessRow> {
        self.correctness.iter().filter(|r| !r.passed)
    }
}
