//! How fast a checkpoint decodes and how large it is, measured against a reference in the same process.
//! [`suite`] checks and times single operations.
//!
//! Rates follow llama-bench: `pp{N}` processes N random tokens of one sequence from an empty cache and computes the
//! logits of the last; `tg{N}` feeds N random tokens one at a time, logits every step, `batch` sequences at once;
//! `tg{N} @ d{D}` starts from D tokens in each cache, random keys and values that no prompt was computed for.
//! Tokenization and sampling are excluded, one warm-up comes first, each repetition is timed on its own. With a
//! reference, the two alternate repetition by repetition, and who goes first alternates too.

pub mod capacity;
pub mod error;
pub mod latency;
pub mod load;
pub mod memory;
pub mod rates;
pub mod record;
pub mod slo;
pub mod speculation;
pub mod stats;
pub mod suite;
pub mod synthetic;

use lowbit_model::Model;

pub use error::{BenchError, Result};
pub use record::{BenchRecord, BenchRow, LatencyRow, MemoryRow, RoundingDrift, SpeedUp};

/// Version of the format of `bench.json`.
pub const SCHEMA: u32 = 1;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchOptions {
    /// Tokens of the prefill test; 0 leaves it out.
    pub prompt: usize,
    /// Tokens of the decode test; 0 leaves it out.
    pub generate: usize,
    /// Random tokens in each sequence's cache before a decode test.
    pub depth: usize,
    /// Sequences decoded at once, one decode test each; prefill is always of one sequence.
    pub batches: Vec<usize>,
    /// Timed repetitions of every test; a comparison needs two.
    pub repetitions: usize,
    /// Threads the models were opened with and the bandwidth was measured with. Recorded, not set.
    pub threads: usize,
    /// Prompt tokens of the latency test.
    pub latency_prompt: usize,
    /// Output tokens of the latency test, at least 2; 0 leaves it out.
    pub latency_output: usize,
    /// Seed of token ids and of the bootstrap.
    pub seed: u64,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            prompt: 512,
            generate: 128,
            depth: 0,
            batches: vec![1],
            repetitions: 5,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            latency_prompt: 32,
            latency_output: 128,
            seed: 0,
        }
    }
}

impl BenchOptions {
    /// Tokens the recorded memory of a cache is for.
    fn kv_tokens(&self) -> usize {
        self.prompt.saturating_add(self.depth).saturating_add(self.generate)
    }

    /// Fails where a count is zero or nothing would be measured, and where a comparison (`compared`) has fewer than two repetitions.
    pub fn check(&self, compared: bool) -> Result<()> {
        let positive = |what, n: usize| if n == 0 { Err(BenchError::Zero(what)) } else { Ok(()) };
        positive("the number of repetitions", self.repetitions)?;
        for &batch in &self.batches {
            positive("a batch size", batch)?;
        }
        if self.latency_output > 0 {
            positive("the prompt of the latency test", self.latency_prompt)?;
            if self.latency_output == 1 {
                return Err(BenchError::OneToken);
            }
        }
        if self.prompt == 0 && self.latency_output == 0 && (self.generate == 0 || self.batches.is_empty()) {
            return Err(BenchError::NothingToMeasure);
        }
        if compared && self.repetitions < 2 {
            return Err(BenchError::OnePair);
        }
        Ok(())
    }
}

/// A model in its role.
#[derive(Clone, Copy)]
pub struct Contender<'a> {
    /// `candidate` or `reference`.
    pub role: &'static str,
    /// Name for the record.
    pub name: &'a str,
    /// The model.
    pub model: &'a Model,
}

/// What the machine can do at best, measured in the same run.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bandwidth the roofline shares refer to.
    pub bytes_per_second: f64,
    /// Flops a second of a large bf16 linear, where they were measured.
    pub flops_per_second: Option<f64>,
}

impl Limits {
    fn check(&self) -> Result<()> {
        let positive = |v: f64| if v.is_finite() && v > 0.0 { Ok(()) } else { Err(BenchError::Bandwidth(v)) };
        positive(self.bytes_per_second)?;
        self.flops_per_second.map_or(Ok(()), positive)
    }
}

/// Everything measured.
#[derive(Clone, Debug)]
pub struct BenchOutput {
    /// Rates.
    pub rows: Vec<BenchRow>,
    /// Candidate over reference; empty without a reference.
    pub speed_ups: Vec<SpeedUp>,
    /// Latency of a single stream.
    pub latency: Vec<LatencyRow>,
    /// Memory.
    pub memory: Vec<MemoryRow>,
    /// What could not run.
    pub left: Vec<suite::Left>,
}

/// Measures `candidate`, against `reference` when there is one. `limits` were measured on the same device with the same
/// threads; `progress` hears what is being measured.
pub fn run(
    candidate: (&str, &Model),
    reference: Option<(&str, &Model)>,
    options: &BenchOptions,
    limits: &Limits,
    progress: &dyn Fn(&str),
) -> Result<BenchOutput> {
    options.check(reference.is_some())?;
    limits.check()?;
    let mut contenders = vec![Contender { role: "candidate", name: candidate.0, model: candidate.1 }];
    if let Some((name, model)) = reference {
        contenders.push(Contender { role: "reference", name, model });
    }
    let (rows, speed_ups) = rates::measure(&contenders, options, limits, progress)?;
    let latency = latency::measure(&contenders, options, progress)?;
    let kv_tokens = options.kv_tokens();
    let memory = memory::rows(&contenders, kv_tokens)?;
    Ok(BenchOutput { rows, speed_ups, latency, memory, left: Vec::new() })
}

/// Which contender goes at `turn` of repetition `repetition`: the order turns round every repetition, so that drift
/// of the machine falls on both alike.
fn turn_of(repetition: usize, turn: usize, contenders: usize) -> usize {
    (turn + repetition) % contenders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_measure_nothing_or_cannot_compare_are_refused() {
        assert!(BenchOptions::default().check(true).is_ok());
        let once = BenchOptions { repetitions: 1, ..BenchOptions::default() };
        assert!(once.check(false).is_ok());
        assert!(matches!(once.check(true), Err(BenchError::OnePair)));
        let nothing = BenchOptions { prompt: 0, generate: 0, latency_output: 0, ..BenchOptions::default() };
        assert!(matches!(nothing.check(false), Err(BenchError::NothingToMeasure)));
        let no_gap = BenchOptions { latency_output: 1, ..BenchOptions::default() };
        assert!(matches!(no_gap.check(false), Err(BenchError::OneToken)));
        let empty = BenchOptions { batches: vec![1, 0], ..BenchOptions::default() };
        assert!(matches!(empty.check(false), Err(BenchError::Zero(_))));
    }

    #[test]
    fn order_alternates() {
        assert_eq!([turn_of(0, 0, 2), turn_of(0, 1, 2), turn_of(1, 0, 2), turn_of(1, 1, 2)], [0, 1, 1, 0]);
    }
}
