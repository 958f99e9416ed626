//! Launchers of `score.cu` and `sample.cu`.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{floats, per_row, product};
use super::rows::{bytes_of, floats_of, size, words_of};
use crate::backend::TokenScore;
use crate::draw::Draw;
use crate::error::{KernelError, Result};

/// Log-probability of each row's target and the argmax; logits `[targets.len(), vocab]`. Waits for the device.
pub fn score(d: &Device, logits: &Memory, vocab: usize, targets: &[u32]) -> Result<Vec<TokenScore>> {
    let rows = targets.len();
    floats("logits", logits, product("logits", rows, vocab)?)?;
    if let Some(t) = targets.iter().find(|t| **t as usize >= vocab) {
        let why = format!("target {t} is not below {vocab}");
        return Err(KernelError::Unsupported { backend: d.name(), op: "score", why });
    }
    if rows == 0 {
        return Ok(Vec::new());
    }
    let targets = d.upload(&bytes_of(targets))?;
    let (log_prob, top1) = (d.alloc(rows * 4)?, d.alloc(rows * 4)?);
    let args = [
        Arg::In(logits),
        Arg::In(&targets),
        Arg::Out(&log_prob),
        Arg::Out(&top1),
        Arg::I32(size("rows", rows)?),
        Arg::I32(size("vocabulary", vocab)?),
    ];
    d.launch("score", per_row(rows, vocab, 0)?, &args)?;
    let log_prob = floats_of(&d.read(&log_prob, 0..rows * 4)?);
    let top1 = words_of(&d.read(&top1, 0..rows * 4)?);
    Ok(log_prob.into_iter().zip(top1).map(|(log_prob, top1)| TokenScore { log_prob, top1 }).collect())
}

/// First index of the largest value of each row of logits `[rows, vocab]`. Waits for the device.
pub fn argmax(d: &Device, logits: &Memory, rows: usize, vocab: usize) -> Result<Vec<u32>> {
    floats("logits", logits, product("logits", rows, vocab)?)?;
    if rows == 0 || vocab == 0 {
        return Ok(Vec::new());
    }
    let top1 = d.alloc(rows * 4)?;
    let sizes = [Arg::I32(size("rows", rows)?), Arg::I32(size("vocabulary", vocab)?)];
    d.launch("argmax", per_row(rows, vocab, 0)?, &[Arg::In(logits), Arg::Out(&top1), sizes[0], sizes[1]])?;
    Ok(words_of(&d.read(&top1, 0..rows * 4)?))
}

/// A token of each row of logits `[draws.len(), vocab]`. Waits for the device.
pub fn draw(d: &Device, logits: &Memory, vocab: usize, draws: &[Draw]) -> Result<Vec<u32>> {
    let rows = draws.len();
    floats("logits", logits, product("logits", rows, vocab)?)?;
    if rows == 0 || vocab == 0 {
        return Ok(Vec::new());
    }
    let words = |s: &Draw| {
        // More tokens than there are keep all, as 0 does.
        let top_k = u32::try_from(s.top_k).unwrap_or(0);
        [s.temperature.to_bits(), top_k, s.top_p.to_bits(), s.min_p.to_bits(), s.key as u32, (s.key >> 32) as u32]
    };
    let settings = d.upload(&bytes_of(&draws.iter().flat_map(words).collect::<Vec<u32>>()))?;
    let chosen = d.alloc(rows * 4)?;
    let args = [Arg::In(logits), Arg::In(&settings), Arg::Out(&chosen), Arg::I32(size("vocabulary", vocab)?)];
    let grid = u32::try_from(rows).map_err(|_| KernelError::Overflow("rows"))?;
    d.launch("draw_tokens", Launch { grid: [grid, 1, 1], block: [256, 1, 1], shared_bytes: 0 }, &args)?;
    Ok(words_of(&d.read(&chosen, 0..rows * 4)?))
}
