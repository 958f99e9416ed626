//! `pp{N}` and `tg{N}` as llama-bench measures them.

use std::hint::black_box;
use std::time::{Duration, Instant};

use lowbit_kernels::backend::{Buffer, Segment};
use lowbit_model::{KvCache, Model};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::error::{BenchError, Result};
use crate::record::{BenchRow, SpeedUp};
use crate::{BenchOptions, Contender, Limits, memory, stats, turn_of};

/// Decode steps before the first timed one.
const WARM_STEPS: usize = 3;

/// One test; its batch is the number of sequences.
#[derive(Clone, Copy)]
pub(crate) enum Test {
    Prefill { tokens: usize },
    Decode { tokens: usize, batch: usize, depth: usize },
}

impl Test {
    /// All of `options`, in order.
    pub fn all(options: &BenchOptions) -> Vec<Test> {
        let (tokens, depth) = (options.generate, options.depth);
        let decode = options.batches.iter().filter(|_| tokens > 0);
        let prefill = (options.prompt > 0).then_some(Test::Prefill { tokens: options.prompt });
        prefill.into_iter().chain(decode.map(|&batch| Test::Decode { tokens, batch, depth })).collect()
    }

    /// As llama-bench names it: `pp512`, `tg128`, `tg128 @ d512`.
    pub fn name(self) -> String {
        match self {
            Test::Prefill { tokens } => format!("pp{tokens}"),
            Test::Decode { tokens, depth: 0, .. } => format!("tg{tokens}"),
            Test::Decode { tokens, depth, .. } => format!("tg{tokens} @ d{depth}"),
        }
    }

    /// Sequences at a time.
    pub fn batch(self) -> usize {
        match self {
            Test::Prefill { .. } => 1,
            Test::Decode { batch, .. } => batch,
        }
    }

    /// Tokens of all sequences.
    fn tokens(self) -> Result<usize> {
        match self {
            Test::Prefill { tokens } => Ok(tokens),
            Test::Decode { tokens, batch, .. } => {
                tokens.checked_mul(batch).ok_or(BenchError::Overflow("a decode test"))
            }
        }
    }

    /// A cache that holds what the test starts from.
    fn cache(self, model: &Model, seed: u64) -> Result<KvCache> {
        match self {
            Test::Prefill { tokens } => Ok(model.new_cache(1, tokens)?),
            Test::Decode { tokens, batch, depth } => {
                let capacity = tokens.checked_add(depth).ok_or(BenchError::Overflow("a decode test"))?;
                let mut cache = model.new_cache(batch, capacity)?;
                let slots = (0..batch).collect::<Vec<_>>();
                cache.fill_random(model.backend(), &slots, depth, seed as u32)?;
                Ok(cache)
            }
        }
    }

    fn time(self, model: &Model, ids: &[u32], cache: &mut KvCache) -> Result<Duration> {
        match self {
            Test::Prefill { .. } => time_prefill(model, ids, cache),
            Test::Decode { batch, depth, .. } => time_decode(model, ids, batch, depth, cache),
        }
    }

    /// llama-bench warms up with the whole prompt, or one decode step; here three, so that a step that is recorded and
    /// repeated has been.
    fn warm_up(self, model: &Model, ids: &[u32], cache: &mut KvCache) -> Result<()> {
        let steps = WARM_STEPS.saturating_mul(self.batch()).min(ids.len());
        match self {
            Test::Prefill { .. } => self.time(model, ids, cache)?,
            Test::Decode { .. } => self.time(model, &ids[..steps], cache)?,
        };
        Ok(())
    }
}

/// Runs every test of `options` on every contender, interleaved.
pub fn measure(
    contenders: &[Contender],
    options: &BenchOptions,
    limits: &Limits,
    progress: &dyn Fn(&str),
) -> Result<(Vec<BenchRow>, Vec<SpeedUp>)> {
    let (mut rows, mut speed_ups) = (Vec::new(), Vec::new());
    for test in Test::all(options) {
        let test_rows = measure_test(contenders, test, options, limits, progress)?;
        if let [candidate, reference] = test_rows.as_slice() {
            speed_ups.push(speed_up(candidate, reference, options.seed)?);
        }
        rows.extend(test_rows);
    }
    Ok((rows, speed_ups))
}

/// One test on every contender, interleaved: a row each.
pub(crate) fn measure_test(
    contenders: &[Contender],
    test: Test,
    options: &BenchOptions,
    limits: &Limits,
    progress: &dyn Fn(&str),
) -> Result<Vec<BenchRow>> {
    let times = time_test(contenders, test, options, progress)?;
    contenders.iter().zip(&times).map(|(c, times)| row(c, test, times, limits)).collect()
}

/// The ratio of two rows of one test.
pub(crate) fn speed_up(candidate: &BenchRow, reference: &BenchRow, seed: u64) -> Result<SpeedUp> {
    let ratio = stats::ratio_of_medians(&candidate.samples, &reference.samples, seed)?;
    let stats::Interval { value, low, high } = ratio;
    let (test, model) = (candidate.test.clone(), candidate.model.clone());
    Ok(SpeedUp { model, test, batch: candidate.batch, ratio: value, low, high })
}

/// Times of every contender, repetition by repetition. Both see the same ids where their vocabularies are one size.
fn time_test(
    contenders: &[Contender],
    test: Test,
    options: &BenchOptions,
    progress: &dyn Fn(&str),
) -> Result<Vec<Vec<Duration>>> {
    let name = test.name();
    let mut caches = Vec::with_capacity(contenders.len());
    for c in contenders {
        progress(&format!("{name} batch {}: warm-up of {}", test.batch(), c.name));
        let mut cache = test.cache(c.model, options.seed)?;
        test.warm_up(c.model, &random_ids(c, test.tokens()?, options.seed)?, &mut cache)?;
        caches.push(cache);
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
            let time = test.time(c.model, &ids, &mut caches[index])?;
            if time.is_zero() {
                return Err(BenchError::ZeroTime { test: name, role: c.role });
            }
            times[index].push(time);
        }
    }
    Ok(times)
}

fn row(c: &Contender, test: Test, times: &[Duration], limits: &Limits) -> Result<BenchRow> {
    let tokens = test.tokens()? as f64;
    let samples = times.iter().map(|t| tokens / t.as_secs_f64()).collect::<Vec<_>>();
    let tokens_per_second = stats::median(&samples)?;
    let (bytes_per_step, roofline_frac, flops) = match test {
        Test::Prefill { tokens } => (0, None, Some(memory::flops_of_prefill(c.model, tokens)?)),
        Test::Decode { tokens, batch, depth } => {
            let bytes = memory::bytes_per_decode_step(c.model, batch, depth, tokens)?;
            (bytes, Some(roofline(bytes, tokens_per_second / batch as f64, limits.bytes_per_second)), None)
        }
    };
    let of_flops = |flops: u64, most: f64| flops as f64 * tokens_per_second / tokens / most;
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
        flops,
        flops_frac: flops.zip(limits.flops_per_second).map(|(flops, most)| of_flops(flops, most)),
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

/// One sequence from an empty cache, the logits of its last token.
fn time_prefill(model: &Model, ids: &[u32], cache: &mut KvCache) -> Result<Duration> {
    cache.fork(model.backend(), 0, 0, 0)?;
    let segment = Segment { slot: 0, row: 0, tokens: ids.len(), past: 0 };
    let start = Instant::now();
    let hidden = model.forward(ids, std::slice::from_ref(&segment), cache)?;
    let last = model.gather_hidden(&hidden, &[ids.len().saturating_sub(1)])?;
    wait_for(model, &model.next_logits(&last)?)?;
    Ok(start.elapsed())
}

/// `batch` sequences of `depth` tokens, a token each a step, logits every step. `ids` are step by step.
fn time_decode(model: &Model, ids: &[u32], batch: usize, depth: usize, cache: &mut KvCache) -> Result<Duration> {
    (0..batch).try_for_each(|slot| cache.fork(model.backend(), slot, depth, slot))?;
    let start = Instant::now();
    for (i, step) in ids.chunks_exact(batch).enumerate() {
        let past = depth + i;
        let segments = (0..batch).map(|slot| Segment { slot, row: slot, tokens: 1, past }).collect::<Vec<_>>();
        let logits = model.decode_step(step, &segments, cache)?;
        wait_for(model, &logits)?;
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
        let decode = Test::Decode { tokens: 128, batch: 4, depth: 0 };
        assert_eq!(Test::Decode { tokens: 32, batch: 1, depth: 1024 }.name(), "tg32 @ d1024");
        assert_eq!((decode.name().as_str(), decode.batch(), decode.tokens().unwrap()), ("tg128", 4, 512));
        assert!(Test::Decode { tokens: usize::MAX, batch: 2, depth: 0 }.tokens().is_err());
    }

    #[test]
    fn roofline_is_bytes_a_second_over_bandwidth() {
        assert_eq!(roofline(1_000_000, 10.0, 20_000_000.0), 0.5);
    }
}
