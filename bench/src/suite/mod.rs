//! The suite: what `bench/gpu-suite` proves and measures on a device, one operation at a time.
//!
//! [`correctness`] compares every operation with the scalar reference; [`kernels`] times the rows of [`table`], layer
//! shapes of real models, against ceilings measured in the same run. Everything goes through
//! [`Backend`](lowbit_kernels::backend::Backend), so the same code checks a GPU, its emulation and the CPU.
//!
//! A timed row repeats one operation over copies of its operands that together exceed any cache, and waits for the
//! device once per sample, by copying one element back. The time of a call therefore includes its launch and, where an
//! operation makes its result, the allocation: an operation shorter than that shows the launch, not the kernel.

pub mod correctness;
pub mod cost;
mod data;
pub mod kernels;
pub mod record;
pub mod table;
mod work;

use std::time::Duration;

pub use cost::{Format, Kernel};
pub use record::{Ceilings, CorrectnessRow, KernelRow, Left, SuiteRecord};
pub use table::Row;

/// Version of the format of a suite's record.
pub const SCHEMA: u32 = 1;

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SuiteOptions {
    /// Timed samples of every row, after a warm-up.
    pub repetitions: usize,
    /// What a sample should last: calls are repeated until it does.
    pub sample: Duration,
    /// Calls of a sample at most.
    pub calls: usize,
    /// Operands are copied until they are this large together, and the calls take turns, so that none is in a cache:
    /// several times the largest L2 (50 MB on H100, 126 MB on B200).
    pub cold_bytes: u64,
    /// No row starts after this.
    pub limit: Option<Duration>,
}

impl Default for SuiteOptions {
    fn default() -> Self {
        Self { repetitions: 7, sample: Duration::from_millis(10), calls: 2000, cold_bytes: 512 << 20, limit: None }
    }
}
