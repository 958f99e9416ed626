//! Latency of a single stream: time to first token and gaps between tokens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lowbit_kernels::backend::Segment;
use lowbit_model::Model;

use crate::error::{BenchError, Result};
use crate::record::LatencyRow;
use crate::{BenchOptions, Contender, rates, stats, turn_of};

/// One request: prompt in to first token out, then the gap before every further token.
struct Request {
    first: Duration,
    gaps: Vec<Duration>,
}

/// Measures `options.repetitions` requests of every contender, interleaved, after one warm-up each. TTFT percentiles
/// are over requests; the gaps of all requests are pooled. Decoding is greedy, on the device.
pub fn measure(contenders: &[Contender], options: &BenchOptions, progress: &dyn Fn(&str)) -> Result<Vec<LatencyRow>> {
    if options.latency_output == 0 {
        return Ok(Vec::new());
    }
    let mut requests = contenders.iter().map(|_| Vec::with_capacity(options.repetitions)).collect::<Vec<_>>();
    for c in contenders {
        progress(&format!("latency: warm-up of {}", c.name));
        let ids = rates::random_ids(c, options.latency_prompt, options.seed)?;
        request(c.model, &ids, options.latency_output.min(2))?;
    }
    for repetition in 0..options.repetitions {
        for turn in 0..contenders.len() {
            let index = turn_of(repetition, turn, contenders.len());
            let c = &contenders[index];
            progress(&format!("latency: {}/{} of {}", repetition + 1, options.repetitions, c.name));
            let seed = options.seed.wrapping_add(1 + repetition as u64);
            let ids = rates::random_ids(c, options.latency_prompt, seed)?;
            requests[index].push(request(c.model, &ids, options.latency_output)?);
        }
    }
    contenders.iter().zip(&requests).map(|(c, requests)| row(c.role, requests, options)).collect()
}

fn request(model: &Model, prompt: &[u32], output: usize) -> Result<Request> {
    let vocab = model.config().vocab_size;
    let capacity = prompt.len().checked_add(output).ok_or(BenchError::Overflow("a request"))?;
    let mut cache = model.new_cache(1, capacity)?;
    let next = |ids: &[u32], past: usize, cache: &mut _| -> Result<u32> {
        let segment = Segment { slot: 0, row: 0, tokens: ids.len(), past };
        let segments = std::slice::from_ref(&segment);
        let logits = match past {
            0 => {
                let hidden = model.forward(ids, segments, cache)?;
                Arc::new(model.next_logits(&model.gather_hidden(&hidden, &[ids.len().saturating_sub(1)])?)?)
            }
            _ => model.decode_step(ids, segments, cache)?,
        };
        let top = model.backend().argmax(&logits, vocab)?;
        top.first().copied().ok_or(BenchError::Samples("no token came out"))
    };
    let mut last = Instant::now();
    let mut token = next(prompt, 0, &mut cache)?;
    let mut now = Instant::now();
    let first = now - last;
    let mut gaps = Vec::with_capacity(output.saturating_sub(1));
    for i in 1..output {
        last = now;
        token = next(&[token], prompt.len() + i - 1, &mut cache)?;
        now = Instant::now();
        gaps.push(now - last);
    }
    Ok(Request { first, gaps })
}

fn row(role: &'static str, requests: &[Request], options: &BenchOptions) -> Result<LatencyRow> {
    let firsts = requests.iter().map(|r| r.first);
    let gaps = requests.iter().flat_map(|r| r.gaps.iter().copied());
    Ok(LatencyRow {
        role: role.to_string(),
        prompt_tokens: options.latency_prompt,
        output_tokens: options.latency_output,
        ttft_ms: percentiles_ms("time to first token", role, firsts)?,
        itl_token_ms: percentiles_ms("inter-token latency", role, gaps)?,
    })
}

fn percentiles_ms(test: &str, role: &'static str, times: impl Iterator<Item = Duration>) -> Result<[f64; 3]> {
    let ms = times.map(|t| t.as_secs_f64() * 1e3).collect::<Vec<_>>();
    if ms.contains(&0.0) {
        return Err(BenchError::ZeroTime { test: test.to_string(), role });
    }
    stats::p50_p95_p99(&ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_pooled_over_requests() {
        let ms = Duration::from_millis;
        let requests =
            [Request { first: ms(10), gaps: vec![ms(1), ms(2)] }, Request { first: ms(30), gaps: vec![ms(3), ms(4)] }];
        let row = row("candidate", &requests, &BenchOptions::default()).unwrap();
        assert!((row.ttft_ms[0] - 20.0).abs() < 1e-9);
        assert!((row.itl_token_ms[0] - 2.5).abs() < 1e-9);
        assert!((row.itl_token_ms[1] - 3.85).abs() < 1e-9);
        let stopped = [Request { first: Duration::ZERO, gaps: vec![] }];
        assert!(super::row("candidate", &stopped, &BenchOptions::default()).is_err());
    }
}
