//! What perplexity and drift ask of a model, and [`Model`]'s answer.
//!
//! Logits of a whole window never exist at once: a 2048-token window over a 152k vocabulary would be 1.2 GB. Hidden
//! states are kept (a thousandth of that) and turned into logits [`rows_per_chunk`] rows at a time.

use std::ops::Range;

use lowbit_kernels::backend::{Buffer, Segment, TokenScore};
use lowbit_model::Model;

use crate::error::{EvalError, Result};
use crate::stats::log_sum_exp;

/// Most rows of logits made at once.
pub const CHUNK_ROWS: usize = 128;

/// Rows of logits to make at once: [`CHUNK_ROWS`], fewer when they would exceed 128 MiB of f32.
pub fn rows_per_chunk(vocab: usize) -> usize {
    ((32 << 20) / vocab.max(1)).clamp(1, CHUNK_ROWS)
}

/// A language model as a function from tokens to next-token distributions.
pub trait Scorer {
    /// Entries of the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Longest input the model accepts.
    fn max_positions(&self) -> usize;

    /// Runs `ids` once; row `r` of the result predicts the token after `ids[r]`.
    fn run<'a>(&'a self, ids: &[u32]) -> Result<Box<dyn LogitRows + 'a>>;

    /// Log-probability, and the model's first choice, at the target positions `scored`: `ids[t]` given `ids[..t]`.
    ///
    /// `scored` starts at 1 or later. Tokens after `scored` are not fed to the model.
    fn score(&self, ids: &[u32], scored: Range<usize>) -> Result<Vec<TokenScore>> {
        check_window(self.vocab_size(), self.max_positions(), ids, &scored)?;
        if scored.is_empty() {
            return Ok(Vec::new());
        }
        let window = self.run(&ids[..scored.end - 1])?;
        let mut scores = Vec::with_capacity(scored.len());
        for chunk in chunks(&scored, rows_per_chunk(self.vocab_size())) {
            scores.extend(window.score(chunk.start - 1..chunk.end - 1, &ids[chunk])?);
        }
        Ok(scores)
    }
}

/// One window after the model ran over it.
pub trait LogitRows {
    /// Entries of the vocabulary.
    fn vocab_size(&self) -> usize;

    /// Logits of rows `rows`, row-major `[rows, vocab]`.
    fn logits(&self, rows: Range<usize>) -> Result<Vec<f32>>;

    /// Scores the rows against one target each; a device does this without moving logits to the host.
    fn score(&self, rows: Range<usize>, targets: &[u32]) -> Result<Vec<TokenScore>> {
        let logits = self.logits(rows)?;
        Ok(logits
            .chunks_exact(self.vocab_size())
            .zip(targets)
            .map(|(row, &target)| {
                let (log_z, top1) = log_sum_exp(row);
                TokenScore { log_prob: (f64::from(row[target as usize]) - log_z) as f32, top1 }
            })
            .collect())
    }
}

/// `range` in pieces of at most `rows`.
pub(crate) fn chunks(range: &Range<usize>, rows: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.clone().step_by(rows.max(1)).map(move |start| start..(start + rows.max(1)).min(end))
}

/// Fails when the target positions are not inside the window, the window does not fit, or a token is foreign.
pub(crate) fn check_window(vocab: usize, positions: usize, ids: &[u32], scored: &Range<usize>) -> Result<()> {
    if scored.start == 0 || scored.start > scored.end || scored.end > ids.len() {
        return Err(EvalError::BadSetting {
            what: "the first scored position",
            found: scored.start,
            expected: format!("a window of {} tokens scores positions 1 to {}", ids.len(), ids.len().saturating_sub(1)),
        });
    }
    if scored.end - 1 > positions {
        return Err(EvalError::WindowTooLong { tokens: scored.end - 1, positions });
    }
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(EvalError::BadToken { id, vocab }),
        None => Ok(()),
    }
}

/// Hidden states of one window on the device.
struct ModelWindow<'a> {
    model: &'a Model,
    hidden: Buffer,
}

impl ModelWindow<'_> {
    fn device_logits(&self, rows: Range<usize>) -> Result<Buffer> {
        let rows: Vec<usize> = rows.collect();
        let hidden = self.model.gather_hidden(&self.hidden, &rows)?;
        Ok(self.model.logits(&hidden)?)
    }
}

impl LogitRows for ModelWindow<'_> {
    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn logits(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let expected = rows.len() * self.vocab_size();
        let logits = self.model.backend().download(&self.device_logits(rows)?)?;
        if logits.len() != expected {
            return Err(EvalError::Scores { expected, found: logits.len() });
        }
        Ok(logits)
    }

    fn score(&self, rows: Range<usize>, targets: &[u32]) -> Result<Vec<TokenScore>> {
        let logits = self.device_logits(rows)?;
        Ok(self.model.backend().score(&logits, self.vocab_size(), targets)?)
    }
}

impl Scorer for Model {
    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    fn max_positions(&self) -> usize {
        self.config().max_position_embeddings
    }

    fn run<'a>(&'a self, ids: &[u32]) -> Result<Box<dyn LogitRows + 'a>> {
        let mut cache = self.new_cache(1, ids.len())?;
        let segment = Segment { slot: 0, row: 0, tokens: ids.len(), past: 0 };
        let hidden = self.forward(ids, &[segment], &mut cache)?;
        Ok(Box::new(ModelWindow { model: self, hidden }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    #[test]
    fn chunks_cover_the_range_once() {
        let pieces: Vec<_> = chunks(&(1..301), 128).collect();
        assert_eq!(pieces, [1..129, 129..257, 257..301]);
        assert_eq!(rows_per_chunk(32_000), 128);
        assert_eq!(rows_per_chunk(1 << 20), 32);
    }

    #[test]
    fn scores_are_shifted_by_one() {
        // This model always gives 3/4 to the token it just saw and 1/4 to the other.
        let model = Fake::new(2, |ids| {
            let last = ids[ids.len() - 1];
            (0..2).map(|v| if v == last { 3f32.ln() } else { 0.0 }).collect()
        });
        let scores = model.score(&[0, 0, 1, 1], 1..4).unwrap();
        let p: Vec<f32> = scores.iter().map(|s| s.log_prob.exp()).collect();
        for (found, expected) in p.iter().zip([0.75, 0.25, 0.75]) {
            assert!((found - expected).abs() < 1e-6, "{p:?}");
        }
        assert_eq!(scores.iter().map(|s| s.top1).collect::<Vec<_>>(), [0, 0, 1]);
    }

    #[test]
    fn bad_windows_are_refused() {
        let model = Fake::uniform(4).with_positions(3);
        assert!(matches!(model.score(&[0; 5], 1..5), Err(EvalError::WindowTooLong { tokens: 4, positions: 3 })));
        assert!(matches!(model.score(&[0; 4], 0..4), Err(EvalError::BadSetting { .. })));
        assert!(matches!(model.score(&[0, 4], 1..2), Err(EvalError::BadToken { id: 4, vocab: 4 })));
    }
}
