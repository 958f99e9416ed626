//! `lowbit bench ORIGINAL --draft QUANTIZED`: what a cheap model that proposes tokens is worth.

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::stats::{median, ratio_of_medians};

/// Version of the format.
pub const SCHEMA: u32 = 1;

/// One answer, both ways.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Prompt's place among the prompts.
    pub prompt: usize,
    /// Tokens of the answer after its first, a second, without the draft.
    pub plain_tokens_per_second: f64,
    /// With it.
    pub tokens_per_second: f64,
    /// Tokens the draft proposed.
    pub drafted: u64,
    /// Of these, what the model itself said.
    pub accepted: u64,
    /// The same text both ways.
    pub identical: bool,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeculationRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// Where it came from; the reference is the draft.
    pub provenance: Provenance,
    /// Tokens proposed at a time.
    pub draft_tokens: usize,
    /// Tokens of an answer.
    pub output_tokens: usize,
    /// Every answer; repetitions of a prompt follow each other.
    pub answers: Vec<Answer>,
    /// Accepted over proposed tokens, of all answers.
    pub acceptance_rate: f64,
    /// Tokens a pass of the model gave: 1 without a draft, `draft_tokens` + 1 at best.
    pub tokens_per_pass: f64,
    /// Median without the draft.
    pub plain_tokens_per_second: f64,
    /// Median with it.
    pub tokens_per_second: f64,
    /// Ratio of the medians.
    pub ratio: f64,
    /// 95 % bootstrap interval over pairs.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Every answer is the same both ways, as it must be.
    pub identical: bool,
}

/// Sums the answers up; two at least.
pub fn summarize(
    provenance: Provenance,
    draft_tokens: usize,
    output_tokens: usize,
    answers: Vec<Answer>,
    seed: u64,
) -> Result<SpeculationRecord> {
    let plain: Vec<f64> = answers.iter().map(|a| a.plain_tokens_per_second).collect();
    let drafted: Vec<f64> = answers.iter().map(|a| a.tokens_per_second).collect();
    let interval = ratio_of_medians(&drafted, &plain, seed)?;
    let (proposed, accepted) = answers.iter().fold((0, 0), |(p, a), x| (p + x.drafted, a + x.accepted));
    // The first token of an answer comes from its prompt.
    let decoded = (answers.len() * output_tokens.saturating_sub(1)) as f64;
    Ok(SpeculationRecord {
        schema: SCHEMA,
        provenance,
        draft_tokens,
        output_tokens,
        acceptance_rate: if proposed > 0 { accepted as f64 / proposed as f64 } else { 0.0 },
        tokens_per_pass: decoded / (decoded - accepted as f64).max(1.0),
        plain_tokens_per_second: median(&plain)?,
        tokens_per_second: median(&drafted)?,
        ratio: interval.value,
        low: interval.low,
        high: interval.high,
        identical: answers.iter().all(|a| a.identical),
        answers,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_ratios_by_hand() {
        let answer = |plain: f64, fast: f64, accepted: u64, identical: bool| Answer {
            prompt: 0,
            plain_tokens_per_second: plain,
            tokens_per_second: fast,
            drafted: 10,
            accepted,
            identical,
        };
        let both = vec![answer(10.0, 20.0, 4, true), answer(10.0, 20.0, 6, true)];
        let r = summarize(Provenance::default(), 4, 21, both, 0).unwrap();
        assert_eq!((r.acceptance_rate, r.ratio, r.low, r.high, r.identical), (0.5, 2.0, 2.0, 2.0, true));
        // 40 decoded tokens, of which 10 needed no pass of their own.
        assert!((r.tokens_per_pass - 40.0 / 30.0).abs() < 1e-12);
        let other =
            summarize(Provenance::default(), 4, 21, vec![answer(1.0, 1.0, 0, true), answer(1.0, 1.0, 0, false)], 0);
        assert!(!other.unwrap().identical);
        assert!(summarize(Provenance::default(), 4, 21, vec![answer(1.0, 1.0, 0, true)], 0).is_err());
    }
}
