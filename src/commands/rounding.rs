//! What decode's rounding of activations changes on the CPU: the same tokens through prefill, whose arithmetic `--exact` decodes
//! with, and one at a time through decode.

use anyhow::{Context as _, Result};
use lowbit_bench::RoundingDrift;
use lowbit_eval::drift::row;
use lowbit_kernels::backend::Segment;
use lowbit_model::Model;

/// Tokens compared.
const TOKENS: usize = 64;

/// KL(exact ‖ rounded) along the model's own greedy text from token 1 on, nats; `None` where decode does not round.
pub fn measure(model: &Model, exact: bool) -> Result<Option<RoundingDrift>> {
    if exact || model.backend().name() != "cpu" {
        return Ok(None);
    }
    let vocab = model.config().vocab_size;
    let mut cache = model.new_cache(1, TOKENS)?;
    let mut ids = vec![1 % vocab.max(1) as u32];
    let mut rounded = Vec::with_capacity(TOKENS * vocab);
    for past in 0..TOKENS {
        let last = ids.get(past).copied().context("no token came out")?;
        let logits = model.decode_step(&[last], &[Segment { slot: 0, row: 0, tokens: 1, past }], &mut cache)?;
        ids.extend(model.backend().argmax(&logits, vocab)?);
        rounded.extend(model.backend().download(&logits)?);
    }
    ids.truncate(TOKENS);
    let exact = model.logits_of(&ids)?;
    let rows = exact.chunks_exact(vocab).zip(rounded.chunks_exact(vocab));
    let drift: Vec<row::RowDrift> = rows.map(|(e, r)| row::compare(e, r, 0)).collect();
    Ok(Some(RoundingDrift {
        tokens: drift.len(),
        kl_mean: drift.iter().map(|d| d.kl).sum::<f64>() / drift.len().max(1) as f64,
        kl_max: drift.iter().map(|d| d.kl).fold(0.0, f64::max),
        same_top: drift.iter().filter(|d| d.same_order > 0).count(),
    }))
}
