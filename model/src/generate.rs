//! Greedy and sampled generation with a time stamp for each token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lowbit_kernels::backend::Segment;

use crate::decoder::Model;
use crate::error::{At, ModelError, Result};
use crate::sampling::{Sampling, sample};

/// How the next token is chosen.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most tokens to produce.
    pub max_new_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 128, sampling: Sampling::default(), stop: Vec::new() }
    }
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// New tokens (a stop token is not included).
    pub tokens: Vec<u32>,
    /// Time since the call for each token.
    pub times: Vec<Duration>,
}

/// Continues `prompt`; `on_token` sees each token as it comes and ends the text by returning false.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> Result<Generation> {
    if prompt.is_empty() {
        return Err(ModelError::Argument("the prompt has no tokens".into()));
    }
    let start = Instant::now();
    let mut cache = model.new_cache(1, prompt.len() + options.max_new_tokens)?;
    let mut out = Generation::default();
    let mut step = prompt.to_vec();
    let mut past = 0;
    while out.tokens.len() < options.max_new_tokens {
        let segments = [Segment { slot: 0, row: 0, tokens: step.len(), past }];
        let logits = if past == 0 {
            let hidden = model.forward_prompt(&step, &segments, &mut cache)?;
            Arc::new(model.next_logits(&model.gather_hidden(&hidden, &[step.len() - 1])?)?)
        } else {
            model.decode_step(&step, &segments, &mut cache)?
        };
        past += step.len();
        let next = if options.sampling.temperature <= 0.0 {
            let best = model.backend().argmax(&logits, model.config().vocab_size).at("argmax")?;
            best.first().copied().unwrap_or_default()
        } else {
            let draw = options.sampling.draw(out.tokens.len() as u64);
            let drawn = model.backend().draw(&logits, model.config().vocab_size, &[draw]).at("draw")?;
            drawn.first().copied().unwrap_or_default()
        };
        if options.stop.contains(&next) {
            break;
        }
        out.tokens.push(next);
        out.times.push(start.elapsed());
        if !on_token(next) {
            break;
        }
        step = vec![next];
    }
    Ok(out)
}

/// As many texts as `seeds`, each sampled at temperature 1 from `first` and `tokens` long with it; no token ends one.
///
/// The texts advance together, and every step is computed as a prompt is, never as a decode step: what comes out depends
/// neither on how many there are nor, where prompts are computed alike, on the backend.
pub fn write_texts(model: &Model, first: u32, tokens: usize, seeds: &[u64]) -> Result<Vec<Vec<u32>>> {
    let mut texts = vec![vec![first]; seeds.len()];
    let mut cache = model.new_cache(seeds.len(), tokens)?;
    let vocab = model.config().vocab_size;
    for past in 0..tokens.saturating_sub(1) {
        let step: Vec<u32> = texts.iter().filter_map(|t| t.last().copied()).collect();
        let segments: Vec<Segment> = (0..step.len()).map(|slot| Segment { slot, row: slot, tokens: 1, past }).collect();
        let hidden = model.forward(&step, &segments, &mut cache)?;
        let logits = model.backend().download(&model.logits(&hidden)?).at("logits")?;
        for ((text, seed), row) in texts.iter_mut().zip(seeds).zip(logits.chunks_exact(vocab)) {
            let sampling = Sampling { temperature: 1.0, seed: *seed, ..Sampling::default() };
            text.push(sample(row, &sampling, past as u64));
        }
    }
    Ok(texts)
}
