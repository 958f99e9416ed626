//! Text written by a model: batched, one token a sequence and step, prompts of a common beginning prefilled once.

use std::sync::Arc;

use lowbit_kernels::KernelError;
use lowbit_kernels::backend::{Buffer, Segment};
use lowbit_model::{KvCache, Model, ModelError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::codec::{Codec, Prompt};
use super::execute::{Limits, Work};
use super::plan::MIN_SHARED;
use crate::error::Result;

/// How one prompt is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Texts that end it.
    pub until: Vec<String>,
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// 0 takes the most likely token, the first among equals.
    pub temperature: f64,
    /// Seed of the sampler, of this prompt alone: what else runs in the batch does not matter.
    pub seed: u64,
    /// Whether an end-of-text token ends it.
    pub stop_at_eos: bool,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// New tokens, an end-of-text token not included.
    pub tokens: Vec<u32>,
    /// Their text, cut before the first stop text.
    pub text: String,
}

struct Lane {
    prompt: usize,
    slot: usize,
    past: usize,
    next: u32,
    tokens: Vec<u32>,
    rng: StdRng,
}

/// Continues every prompt by its rules; `on_done` hears of each once, in no particular order.
pub fn write(
    model: &Model,
    codec: &dyn Codec,
    prompts: &[(Prompt, Rules)],
    limits: &Limits,
    work: &mut Work,
    on_done: &mut dyn FnMut(usize, Written) -> Result<()>,
) -> Result<()> {
    let need = |i: usize| prompts[i].0.ids.len() + prompts[i].1.max_new_tokens;
    let capacity = (0..prompts.len()).map(need).max().unwrap_or(0).max(1);
    let slots = limits.slots_of(capacity).min(prompts.len().max(1));
    let mut cache = model.new_cache(slots, capacity)?;
    // Neighbours share most, so that a prompt forks the one before it while that one still runs.
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by(|&a, &b| prompts[a].0.ids.cmp(&prompts[b].0.ids).then(a.cmp(&b)));
    let mut queue = order.into_iter().peekable();
    let mut free: Vec<usize> = (0..slots).rev().collect();
    let mut lanes: Vec<Lane> = Vec::new();
    let mut before: Option<(usize, usize)> = None;
    work.asked_tokens += prompts.iter().map(|p| p.0.ids.len() as u64).sum::<u64>();
    loop {
        while let Some(&prompt) = queue.peek() {
            let Some(slot) = free.pop() else { break };
            queue.next();
            let ids = &prompts[prompt].0.ids;
            let held = match before {
                Some((other, from)) if lanes.iter().any(|l| l.prompt == other) => {
                    let theirs = &prompts[other].0.ids;
                    let common = ids.iter().zip(theirs).take_while(|(a, b)| a == b).count().min(ids.len() - 1);
                    if common >= MIN_SHARED { fork(model, &mut cache, from, common, slot, work)? } else { 0 }
                }
                _ => 0,
            };
            let last = prefill(model, ids, held, slot, &mut cache, limits, work)?;
            let mut rng = StdRng::seed_from_u64(prompts[prompt].1.seed);
            let logits = model.logits(&last)?;
            let next = choose(model, &logits, &[&prompts[prompt].1], &mut [&mut rng])?.first().copied().unwrap_or(0);
            before = Some((prompt, slot));
            let lane = Lane { prompt, slot, past: ids.len(), next, tokens: Vec::new(), rng };
            if let Some(lane) = advance(lane, codec, prompts, &mut |l, w| on_done(prompts[l].0.request, w))? {
                lanes.push(lane);
            } else {
                cache.release(model.backend(), slot)?;
                free.push(slot);
                before = None;
            }
        }
        if lanes.is_empty() {
            return Ok(());
        }
        let ids: Vec<u32> = lanes.iter().map(|l| l.next).collect();
        let segments: Vec<Segment> =
            lanes.iter().enumerate().map(|(row, l)| Segment { slot: l.slot, row, tokens: 1, past: l.past }).collect();
        let logits = step(model, &ids, &segments, &mut cache)?;
        work.computed_tokens += ids.len() as u64;
        work.calls += 1;
        let rules: Vec<&Rules> = lanes.iter().map(|l| &prompts[l.prompt].1).collect();
        let mut rngs: Vec<&mut StdRng> = lanes.iter_mut().map(|l| &mut l.rng).collect();
        let chosen = choose(model, &logits, &rules, &mut rngs)?;
        let mut left = Vec::with_capacity(lanes.len());
        for (mut lane, next) in lanes.into_iter().zip(chosen) {
            lane.next = next;
            lane.past += 1;
            let slot = lane.slot;
            match advance(lane, codec, prompts, &mut |l, w| on_done(prompts[l].0.request, w))? {
                Some(lane) => left.push(lane),
                None => {
                    cache.release(model.backend(), slot)?;
                    free.push(slot);
                }
            }
        }
        lanes = left;
    }
}

/// One new token of each sequence, in the arithmetic of decoding; the logits after it.
fn step(model: &Model, ids: &[u32], segments: &[Segment], cache: &mut KvCache) -> Result<Arc<Buffer>> {
    Ok(model.decode_step(ids, segments, cache)?)
}

/// Tokens of `from` that `to` now holds: none where the backend cannot fork.
fn fork(model: &Model, cache: &mut KvCache, from: usize, tokens: usize, to: usize, work: &mut Work) -> Result<usize> {
    match cache.fork(model.backend(), from, tokens, to) {
        Ok(()) => {
            work.forks += 1;
            Ok(tokens)
        }
        Err(ModelError::Kernel { source: KernelError::Unsupported { .. }, .. }) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

/// Runs the prompt after its first `held` tokens; the last row of hidden states.
fn prefill(
    model: &Model,
    ids: &[u32],
    held: usize,
    slot: usize,
    cache: &mut KvCache,
    limits: &Limits,
    work: &mut Work,
) -> Result<Buffer> {
    let mut past = held;
    loop {
        let tokens = (ids.len() - past).min(limits.batch_tokens.max(1));
        let segment = Segment { slot, row: 0, tokens, past };
        let hidden = model.forward(&ids[past..past + tokens], &[segment], cache)?;
        work.computed_tokens += tokens as u64;
        work.calls += 1;
        past += tokens;
        if past == ids.len() {
            return Ok(model.gather_hidden(&hidden, &[tokens - 1])?);
        }
    }
}

/// The next token of each row.
fn choose(model: &Model, logits: &Buffer, rules: &[&Rules], rngs: &mut [&mut StdRng]) -> Result<Vec<u32>> {
    let vocab = model.config().vocab_size;
    let mut best = model.backend().argmax(logits, vocab)?;
    for (row, ((rule, rng), best)) in rules.iter().zip(rngs).zip(&mut best).enumerate() {
        if rule.temperature > 0.0 {
            let logits = model.backend().download_range(logits, row * vocab..(row + 1) * vocab)?;
            *best = sample(&logits, rule.temperature, rng);
        }
    }
    Ok(best)
}

/// A draw from softmax(logits / temperature).
fn sample(logits: &[f32], temperature: f64, rng: &mut StdRng) -> u32 {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, &l| m.max(f64::from(l)));
    let weights: Vec<f64> = logits.iter().map(|&l| ((f64::from(l) - max) / temperature).exp()).collect();
    let mut draw = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (i, w) in weights.iter().enumerate() {
        draw -= w;
        if draw <= 0.0 {
            return i as u32;
        }
    }
    weights.len().saturating_sub(1) as u32
}

/// Takes the lane's next token in; `None` when that ended the text.
fn advance(
    mut lane: Lane,
    codec: &dyn Codec,
    prompts: &[(Prompt, Rules)],
    on_done: &mut dyn FnMut(usize, Written) -> Result<()>,
) -> Result<Option<Lane>> {
    let rules = &prompts[lane.prompt].1;
    let mut ended = rules.max_new_tokens == 0 || (rules.stop_at_eos && codec.eos_ids().contains(&lane.next));
    let mut text = None;
    if !ended {
        lane.tokens.push(lane.next);
        ended = lane.tokens.len() >= rules.max_new_tokens;
        if !rules.until.is_empty() {
            let written = codec.decode(&lane.tokens, true)?;
            if let Some(at) = first_stop(&written, &rules.until) {
                text = written.get(..at).map(str::to_owned);
                ended = true;
            }
        }
    }
    if !ended {
        return Ok(Some(lane));
    }
    let text = match text {
        Some(text) => text,
        None => codec.decode(&lane.tokens, true)?,
    };
    on_done(lane.prompt, Written { tokens: lane.tokens, text })?;
    Ok(None)
}

/// Where the first of the stop texts begins; empty ones stop nothing.
fn first_stop(text: &str, until: &[String]) -> Option<usize> {
    until.iter().filter(|u| !u.is_empty()).filter_map(|u| text.find(u.as_str())).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_stop_text_wins() {
        let until = ["".to_owned(), "Q:".to_owned(), "\n\n".to_owned()];
        assert_eq!(first_stop("a\n\nQ: b", &until), Some(1));
        assert_eq!(first_stop("a", &until), None);
    }

    #[test]
    fn a_cold_sampler_takes_the_best_and_a_warm_one_does_not_always() {
        let mut rng = StdRng::seed_from_u64(1);
        let logits = [1.0, 3.0, 2.9];
        assert!((0..50).all(|_| sample(&logits, 1e-3, &mut rng) == 1));
        assert!((0..50).any(|_| sample(&logits, 1.0, &mut rng) != 1));
    }
}
