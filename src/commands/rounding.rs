//! What rounding activations changes on the CPU, in decode and in prompts: the same tokens with and without `--exact`.

use anyhow::{Context as _, Result};
use lowbit_bench::RoundingDrift;
use lowbit_eval::drift::row;
use lowbit_kernels::backend::Segment;
use lowbit_model::Model;

/// Tokens compared.
const TOKENS: usize = 64;

/// The model's own greedy text from token 1 on.
pub struct Text {
    ids: Vec<u32>,
    vocab: usize,
    /// Logits `[TOKENS, vocab]` of decode, and of the text as a prompt.
    rounded: [Vec<f32>; 2],
}

/// Writes the text; `None` where nothing is rounded.
pub fn text(model: &Model, exact: bool) -> Result<Option<Text>> {
    if exact || model.backend().name() != "cpu" {
        return Ok(None);
    }
    let vocab = model.config().vocab_size;
    let mut cache = model.new_cache(1, TOKENS)?;
    let mut ids = vec![1 % vocab.max(1) as u32];
    let mut decoded = Vec::with_capacity(TOKENS * vocab);
    for past in 0..TOKENS {
        let last = ids.get(past).copied().context("no token came out")?;
        let logits = model.decode_step(&[last], &[Segment { slot: 0, row: 0, tokens: 1, past }], &mut cache)?;
        ids.extend(model.backend().argmax(&logits, vocab)?);
        decoded.extend(model.backend().download(&logits)?);
    }
    ids.truncate(TOKENS);
    let prompt = model.logits_of(&ids)?;
    Ok(Some(Text { ids, vocab, rounded: [decoded, prompt] }))
}

impl Text {
    /// KL(exact ‖ rounded), nats, over both phases; `exact` is the same model with `--exact`.
    pub fn compare(&self, exact: &Model) -> Result<RoundingDrift> {
        let exact = exact.logits_of(&self.ids)?;
        let mut drift: Vec<row::RowDrift> = Vec::new();
        for rounded in &self.rounded {
            let rows = exact.chunks_exact(self.vocab).zip(rounded.chunks_exact(self.vocab));
            drift.extend(rows.map(|(e, r)| row::compare(e, r, 0)));
        }
        Ok(RoundingDrift {
            tokens: drift.len(),
            kl_mean: drift.iter().map(|d| d.kl).sum::<f64>() / drift.len().max(1) as f64,
            kl_max: drift.iter().map(|d| d.kl).fold(0.0, f64::max),
            same_top: drift.iter().filter(|d| d.same_order > 0).count(),
        })
    }
}
