//! Token windows of equal length out of texts.

use std::borrow::Cow;

use lowbit_checkpoint::error::CheckpointError;
use lowbit_checkpoint::hash::sha256_hex;
use lowbit_checkpoint::tokenizer::Tokenizer;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use crate::error::{CalibrationError, Result};

/// What stands between two texts.
const SEPARATOR: &str = "\n\n";
/// First guess of how many bytes a token covers; on the high side, so one encoding usually does.
const BYTES_PER_TOKEN: usize = 6;
/// Tokens encoded past the last one used: where a cut text ends, its last tokens may differ from the whole text's.
const MARGIN: usize = 1024;

/// Which windows are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WindowOrder {
    /// The first ones, back to back.
    #[default]
    Packed,
    /// Distinct back-to-back windows of the whole corpus, drawn and ordered by this seed.
    Random(u64),
}

/// Calibration input: every window has the same length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Token ids, window by window.
    pub tokens: Vec<Vec<u32>>,
    /// SHA-256 over all ids as little-endian u32.
    pub sha256: String,
    /// What the texts came from, as the user named it; [`build_windows`] leaves it empty.
    pub source: String,
    /// Seed the windows were drawn with, 0 when packed.
    pub seed: u64,
}

impl Windows {
    /// Wraps windows made elsewhere (self-generated text).
    pub fn new(tokens: Vec<Vec<u32>>, source: impl Into<String>, seed: u64) -> Self {
        let bytes = tokens.iter().flatten().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>();
        Self { sha256: sha256_hex(&bytes), tokens, source: source.into(), seed }
    }

    /// Names what the texts came from.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<String>) -> Self {
        self.source = source.into();
        self
    }

    /// Tokens in all windows.
    pub fn token_count(&self) -> usize {
        self.tokens.iter().map(Vec::len).sum()
    }
}

/// `samples` windows of `seq_len` tokens: the texts are joined by a blank line and tokenized once, with the
/// tokenizer's special tokens.
pub fn build_windows(
    texts: &[String],
    tokenizer: &Tokenizer,
    samples: usize,
    seq_len: usize,
    order: WindowOrder,
) -> Result<Windows> {
    windows_with(&|text: &str| tokenizer.encode(text, true), texts, samples, seq_len, order)
}

type Encode<'a> = &'a dyn Fn(&str) -> std::result::Result<Vec<u32>, CheckpointError>;

fn windows_with(
    encode: Encode,
    texts: &[String],
    samples: usize,
    seq_len: usize,
    order: WindowOrder,
) -> Result<Windows> {
    if samples == 0 {
        return Err(CalibrationError::Zero("the number of calibration windows"));
    }
    if seq_len == 0 {
        return Err(CalibrationError::Zero("the calibration window length"));
    }
    let needed = samples.checked_mul(seq_len).ok_or(CalibrationError::TooLarge { samples, seq_len })?;
    let ids = match order {
        WindowOrder::Packed => encode_first(encode, texts, needed)?,
        WindowOrder::Random(_) => encode(&joined(texts, usize::MAX).0)?,
    };
    let available = ids.len() / seq_len;
    if available < samples {
        let tokens = ids.len();
        return Err(CalibrationError::TooFewWindows { available, wanted: samples, seq_len, tokens });
    }
    let (chosen, seed) = match order {
        WindowOrder::Packed => ((0..samples).collect::<Vec<_>>(), 0),
        WindowOrder::Random(seed) => {
            let mut rng = StdRng::seed_from_u64(seed);
            (rand::seq::index::sample(&mut rng, available, samples).into_vec(), seed)
        }
    };
    let tokens = chosen.into_iter().map(|w| ids[w * seq_len..(w + 1) * seq_len].to_vec()).collect();
    Ok(Windows::new(tokens, "", seed))
}

/// At least `needed` ids that equal the first ids of the whole corpus, or all ids when there are fewer. Encodes a
/// prefix and never uses its last [`MARGIN`] tokens.
fn encode_first(encode: Encode, texts: &[String], needed: usize) -> Result<Vec<u32>> {
    let wanted = needed.saturating_add(MARGIN);
    let mut limit = wanted.saturating_mul(BYTES_PER_TOKEN);
    loop {
        let (text, whole) = joined(texts, limit);
        let ids = encode(&text)?;
        if whole || ids.len() >= wanted {
            return Ok(ids);
        }
        let by_rate = (limit as f64 * wanted as f64 / ids.len().max(1) as f64 * 1.1) as usize;
        limit = by_rate.clamp(limit.saturating_add(limit / 4), limit.saturating_mul(8)).saturating_add(1);
    }
}

/// The texts joined, cut at a character boundary at or just below `limit` bytes; whether that is all of them.
fn joined(texts: &[String], limit: usize) -> (Cow<'_, str>, bool) {
    if let [text] = texts {
        let end = text.floor_char_boundary(limit);
        return (Cow::Borrowed(&text[..end]), end == text.len());
    }
    let mut out = String::new();
    for (i, text) in texts.iter().enumerate() {
        for part in [if i == 0 { "" } else { SEPARATOR }, text] {
            let end = part.floor_char_boundary(limit - out.len());
            out.push_str(&part[..end]);
            if end < part.len() {
                return (Cow::Owned(out), false);
            }
        }
    }
    (Cow::Owned(out), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token a byte, a begin token first.
    fn bytes(text: &str) -> std::result::Result<Vec<u32>, CheckpointError> {
        Ok(std::iter::once(1).chain(text.bytes().map(u32::from)).collect())
    }

    /// One token per 40 bytes: the first guess of the prefix is too short.
    fn sparse(text: &str) -> std::result::Result<Vec<u32>, CheckpointError> {
        Ok(text.as_bytes().chunks(40).map(|c| c.iter().map(|&b| u32::from(b)).sum()).collect())
    }

    fn corpus(texts: usize) -> Vec<String> {
        (0..texts).map(|i| format!("text number {i}, é, {}", "x".repeat(i % 97))).collect()
    }

    #[test]
    fn packed_equals_the_whole_text_tokenized_once() {
        let texts = corpus(5000);
        for encode in [bytes as fn(&str) -> _, sparse] {
            let all: Vec<u32> = encode(&texts.join(SEPARATOR)).unwrap();
            let windows = windows_with(&encode, &texts, 20, 128, WindowOrder::Packed).unwrap();
            let expected = all.chunks(128).take(20).map(<[u32]>::to_vec).collect::<Vec<_>>();
            assert_eq!(windows.tokens, expected);
        }
    }

    #[test]
    fn too_little_text_says_how_many_windows_there_are() {
        let texts = vec!["0123456789".to_string()];
        let error = windows_with(&bytes, &texts, 4, 5, WindowOrder::Packed).unwrap_err();
        assert!(error.to_string().contains("holds 2 windows of 5 tokens (11 tokens), 4 were asked for"), "{error}");
        assert!(error.hint().unwrap().contains("--samples 2 fits"));
        assert!(windows_with(&bytes, &texts, 0, 5, WindowOrder::Packed).is_err());
        assert!(windows_with(&bytes, &texts, usize::MAX, 2, WindowOrder::Packed).is_err());
    }

    #[test]
    fn random_windows_follow_the_seed_and_differ() {
        let texts = corpus(300);
        let draw = |seed| windows_with(&bytes, &texts, 8, 64, WindowOrder::Random(seed)).unwrap();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1).sha256, draw(2).sha256);
    }

    #[test]
    fn hash_is_over_little_endian_ids() {
        let windows = Windows::new(vec![vec![1], vec![0x0203]], "s", 0);
        assert_eq!(windows.sha256, sha256_hex(&[1, 0, 0, 0, 3, 2, 0, 0]));
        assert_eq!((windows.token_count(), windows.source.as_str()), (2, "s"));
    }
}
