//! `pp{N}` and `tg{N}` as llama-bench measures them.

use std::hint::black_box;
use std::time::{Duration, Instant};

use lowbit_kernels::backend::{Buffer, Segment};
use lowbit_model::Model;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::error::{BenchError, Result};
use crate::record::{BenchRow, SpeedUp};
use crate::{BenchOptions, Contender, memory, stats, turn_of};

/// One test; its batch is the number of sequences.
#[derive(Clone, Copy)]
enum Test {
    Prefill { tokens: usize },
    Decode { tokens: usize, batch: usize },
}

impl Test {
    fn name(self) -> String {
        match self {
            Test::Prefill { tokens } => format!("pp{tokens}"),
            Test::Decode { tokens, .. } => format!("tg{tokens}"),
        }
    }

    fn batch(self) -> usize {
        match self {
            Test::Prefill { .. } => 1,
            Test::Decode { batch, .. } => batch,
        }
    }

    /// Tokens of all sequences.
    fn tokens(self) -> Result<usize> {
        match self {
            Test::Prefill { tokens } => Ok(tokens),
            Test::Decode { tokens, batch } => tokens.checked_mul(batch).ok_or(BenchError::Overflow("a decode test")),
        }
    }

    fn time(self, model: &Model, ids: &[u32]) -> Result<Duration> {
        match self {
            Test::Prefill { .. } => time_prefill(model, ids),
            Test::Decode { batch, .. } => time_decode(model, ids, batch),
        }
    }

    /// llama-bench warms up with the whole prompt, or one decode step.
    fn warm_up(self, model: &Model, ids: &[u32]) -> Result<()> {
        match self {
            Test::Prefill { .. } => time_prefill(model, ids)?,
            Test::Decode { batch, .. } => time_decode(model, &ids[..batch.min(ids.len())], batch)?,
        };
        Ok(())
    }
}

/// Runs every test of `options` on every contender, interleaved.
pub fn measure(
    contenders: &[Contender],
    options: &BenchOptions,
    bandwidth: f64,
    progress: &dyn Fn(&str),
) -> Result<(Vec<BenchRow>, Vec<SpeedUp>)> {
    let mut tests = Vec::new();
    if options.prompt > 0 {
        tests.push(Test::Prefill { tokens: options.prompt });
    }
    if options.generate > 0 {
        tests.extend(options.batches.iter().map(|&batch| Test::Decode { tokens: options.generate, batch }));
    }
    let (mut rows, mut speed_ups) = (Vec::new(), Vec::new());
    for test in tests {
        let times = time_test(contenders, test, options, progress)?;
        let test_rows = contenders
            .iter()
            .zip(&times)
            .map(|(c, times)| row(c, test, times, bandwidth))
            .collect::<Result<Vec<_>>>()?;
        if let [candidate, reference] = test_rows.as_slice() {
            let ratio = stats::ratio_of_medians(&candidate.samples, &reference.samples, options.seed)?;
            let stats::Interval { value, low, high } = ratio;
            speed_ups.push(SpeedUp { test: test.name(), batch: test.batch(), ratio: value, low, high });
        }
        rows.extend(test_rows);
    }
    Ok((rows, speed_ups))
}

/// Times of every contender, repetition by repetition. Both see the same ids where their vocabularies are one size.
fn time_test(
    contenders: &[Contender],
    test: Test,
    options: &BenchOptions,
    progress: &dyn Fn(&str),
) -> Result<Vec<Vec<Duration>>> {
    let name = test.name();
    for c in contenders {
        progress(&format!("{name} batch {}: warm-up of {}", test.batch(), c.name));
        test.warm_up(c.model, &random_ids(c, test.tokens()?, options.seed)?)?;
    }
    let mut times = vec![Vec::with_capacity(options.repetitions); contenders.len()];
    for repetition in 0..options.repetitions {
        for turn in 0..contenders.len() {
            let index = turn_of(repetition, turn, contenders.len());
            let c = &contenders[index];
            progress(&format!(
                "{name} batch {}: {}/{} of {}",
                test.batch(),
                repetition + 1,
                options.repetitions,
                c.name
            ));
            let ids = random_ids(c, test.tokens()?, options.seed.wrapping_add(1 + repetition as u64))?;
            let time = test.time(c.model, &ids)?;
            if time.is_zero() {
                return Err(BenchError::ZeroTime { test: name, role: c.role });
            }
            times[index].push(time);
        }
    }
    Ok(times)
}

fn row(c: &Contender, test: Test, times: &[Duration], bandwidth: f64) -> Result<BenchRow> {
    let tokens = test.tokens()? as f64;
    let samples = times.iter().map(|t| tokens / t.as_secs_f64()).collect::<Vec<_>>();
    let tokens_per_second = stats::median(&samples)?;
    let (bytes_per_step, roofline_frac) = match test {
        Test::Prefill { .. } => (0, None),
        Test::Decode { tokens, batch } => {
            let bytes = memory::bytes_per_decode_step(c.model, batch, tokens)?;
            (bytes, Some(roofline(bytes, tokens_per_second / batch as f64, bandwidth)))
        }
    };
    Ok(BenchRow {
        role: c.role.to_string(),
        model: c.name.to_string(),
        test: test.name(),
        batch: test.batch(),
        tokens_per_second,
        samples,
        samples_ns: times.iter().map(|t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX)).collect(),
        bytes_per_step,
        roofline_frac,
    })
}

fn roofline(bytes_per_step: u64, steps_per_second: f64, bandwidth: f64) -> f64 {
    bytes_per_step as f64 * steps_per_second / bandwidth
}

/// Uniform ids, as llama-bench draws them.
pub(crate) fn random_ids(c: &Contender, count: usize, seed: u64) -> Result<Vec<u32>> {
    let vocab = u32::try_from(c.model.config().vocab_size).ok().filter(|&v| v > 0);
    let vocab = vocab.ok_or_else(|| BenchError::Vocabulary(c.name.to_string()))?;
    let mut rng = StdRng::seed_from_u64(seed);
    Ok((0..count).map(|_| rng.random_range(0..vocab)).collect())
}

/// One sequence from an empty cache, the logits of its last token; the cache is made outside the time.
fn time_prefill(model: &Model, ids: &[u32]) -> Result<Duration> {
    let mut cache = model.new_cache(1, ids.len())?;
    let segment = Segment { slot: 0, row: 0, tokens: ids.len(), past: 0 };
    let start = Instant::now();
    let hidden = model.forward(ids, std::slice::from_ref(&segment), &mut cache)?;
    let last = model.gather_hidden(&hidden, &[ids.len().saturating_sub(1)])?;
    wait_for(model, &model.next_logits(&last)?)?;
    Ok(start.elapsed())
}

/// `batch` sequences from an empty cache, a token each a step, logits every step. `ids` are step by step.
fn time_decode(model: &Model, ids: &[u32], batch: usize) -> Result<Duration> {
    let mut cache = model.new_cache(batch, ids.len().div_ceil(batch))?;
    let start = Instant::now();
    for (past, step) in ids.chunks_exact(batch).enumerate() {
        let segments = (0..batch).map(|slot| Segment { slot, row: slot, tokens: 1, past }).collect::<Vec<_>>();
        let hidden = model.forward_decode(step, &segments, &mut cache)?;
        wait_for(model, &model.next_logits(&hidden)?)?;
    }
    Ok(start.elapsed())
}

/// Device work is done once a value of its result is here.
fn wait_for(model: &Model, logits: &Buffer) -> Result<()> {
    black_box(model.backend().download_range(logits, 0..1)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_llama_bench() {
        assert_eq!(Test::Prefill { tokens: 512 }.name(), "pp512");
        let decode = Test::Decode { tokens: 128, batch: 4 };
        assert_eq!((decode.name().as_str(), decode.batch(), decode.tokens().unwrap()), ("tg128", 4, 512));
        assert!(Test::Decode { tokens: usize::MAX, batch: 2 }.tokens().is_err());
    }

    #[test]
    fn roofline_is_bytes_a_second_over_bandwidth() {
        assert_eq!(roofline(1_000_000, 10.0, 20_000_000.0), 0.5);
    }
}
