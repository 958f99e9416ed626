//! Both models write on from the same prompts: where their texts part, how long they are, whether they loop.

use lowbit_model::Model;
use serde::{Deserialize, Serialize};

use crate::engine::codec::{Codec, Prompt};
use crate::engine::decode::{Rules, write};
use crate::engine::execute::{Limits, Work};
use crate::error::{EvalError, Result};
use crate::stats::{mean, percentile};

/// A text loops when its end repeats one run of at most this many tokens,
const LOOP_PERIOD: usize = 32;
/// at least this often in a row,
const LOOP_TIMES: usize = 4;
/// over at least this many tokens.
const LOOP_TOKENS: usize = 16;

/// One prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Tokens both wrote alike before they parted: the index of the first that differs. The length where none does.
    pub common: usize,
    /// Tokens the reference wrote.
    pub reference_tokens: usize,
    /// Tokens the candidate wrote.
    pub candidate_tokens: usize,
    /// Places whose tokens differ, over the longer text.
    pub differing: f64,
    /// Whether the reference's text ends in a loop.
    pub reference_loops: bool,
    /// Whether the candidate's does.
    pub candidate_loops: bool,
}

/// Free-running divergence over all prompts. Greedy decoding, no stop texts, an end-of-text token ends a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FreeRunning {
    /// Prompts.
    pub prompts: usize,
    /// Most tokens a model may write.
    pub max_new_tokens: usize,
    /// Mean index of the first differing token.
    pub first_divergent_mean: f64,
    /// Its median.
    pub first_divergent_median: f64,
    /// Share of prompts whose texts are the same to the end.
    pub identical: f64,
    /// Mean share of places whose tokens differ.
    pub differing_mean: f64,
    /// Tokens the candidate wrote over tokens the reference wrote, all prompts together.
    pub length_ratio: f64,
    /// Share of the reference's texts that end in a loop.
    pub reference_loop_rate: f64,
    /// Share of the candidate's.
    pub candidate_loop_rate: f64,
    /// Each prompt (raw samples).
    pub pairs: Vec<Pair>,
}

/// Lets both models continue `prompts` (tokens, none empty) by at most `max_new_tokens`.
pub fn free_running(
    candidate: &Model,
    reference: &Model,
    codec: &dyn Codec,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    limits: &Limits,
) -> Result<FreeRunning> {
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) || max_new_tokens == 0 {
        return Err(EvalError::BadSetting {
            what: "the number of prompts or of new tokens",
            found: prompts.len().min(max_new_tokens),
            expected: "at least one prompt, none without tokens, and one new token".into(),
        });
    }
    let asked: Vec<(Prompt, Rules)> = prompts
        .iter()
        .enumerate()
        .map(|(request, ids)| {
            let rules = Rules { until: vec![], max_new_tokens, temperature: 0.0, seed: 0, stop_at_eos: true };
            (Prompt { request, ids: ids.clone() }, rules)
        })
        .collect();
    let texts = |model: &Model| -> Result<Vec<Vec<u32>>> {
        let mut texts = vec![Vec::new(); prompts.len()];
        write(model, codec, &asked, limits, &mut Work::default(), &mut |i, w| {
            if let Some(place) = texts.get_mut(i) {
                *place = w.tokens;
            }
            Ok(())
        })?;
        Ok(texts)
    };
    let (theirs, ours) = (texts(reference)?, texts(candidate)?);
    let pairs = theirs.iter().zip(&ours).map(|(r, c)| pair(r, c)).collect();
    Ok(summarize(pairs, max_new_tokens))
}

fn pair(reference: &[u32], candidate: &[u32]) -> Pair {
    let longer = reference.len().max(candidate.len());
    let same = reference.iter().zip(candidate).filter(|(a, b)| a == b).count();
    Pair {
        common: reference.iter().zip(candidate).take_while(|(a, b)| a == b).count(),
        reference_tokens: reference.len(),
        candidate_tokens: candidate.len(),
        differing: (longer - same) as f64 / longer.max(1) as f64,
        reference_loops: loops(reference),
        candidate_loops: loops(candidate),
    }
}

/// Whether the end of a text is one short run over and over.
pub fn loops(tokens: &[u32]) -> bool {
    (1..=LOOP_PERIOD).any(|period| {
        let length = (period * LOOP_TIMES).max(LOOP_TOKENS);
        let Some(tail) = tokens.len().checked_sub(length).and_then(|start| tokens.get(start..)) else { return false };
        tail.iter().zip(tail.iter().skip(period)).all(|(a, b)| a == b)
    })
}

fn summarize(pairs: Vec<Pair>, max_new_tokens: usize) -> FreeRunning {
    let column = |f: &dyn Fn(&Pair) -> f64| pairs.iter().map(f).collect::<Vec<f64>>();
    let share = |f: &dyn Fn(&Pair) -> bool| mean(&column(&|p| f64::from(u8::from(f(p)))));
    let mut common = column(&|p| p.common as f64);
    common.sort_by(f64::total_cmp);
    let total = |f: &dyn Fn(&Pair) -> usize| pairs.iter().map(f).sum::<usize>();
    let (reference, candidate) = (total(&|p| p.reference_tokens), total(&|p| p.candidate_tokens));
    FreeRunning {
        prompts: pairs.len(),
        max_new_tokens,
        first_divergent_mean: mean(&common),
        first_divergent_median: percentile(&common, 50.0),
        identical: share(&|p| p.common == p.reference_tokens && p.common == p.candidate_tokens),
        differing_mean: mean(&column(&|p| p.differing)),
        // Both wrote nothing: equally long.
        length_ratio: if reference == candidate { 1.0 } else { candidate as f64 / reference.max(1) as f64 },
        reference_loop_rate: share(&|p| p.reference_loops),
        candidate_loop_rate: share(&|p| p.candidate_loops),
        pairs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_by_hand() {
        let p = pair(&[1, 2, 3, 4], &[1, 2, 9, 4, 5]);
        assert_eq!((p.common, p.reference_tokens, p.candidate_tokens, p.differing), (2, 4, 5, 0.4));
        let s = summarize(vec![p, pair(&[7, 7], &[7, 7])], 8);
        assert_eq!((s.first_divergent_mean, s.identical, s.differing_mean), (2.0, 0.5, 0.2));
        assert!((s.length_ratio - 7.0 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn loops_are_repetition_at_the_end() {
        assert!(loops(&[5; 16]) && !loops(&[5; 15]));
        let phrase: Vec<u32> = (0..7).collect();
        assert!(loops(&[vec![50, 51], phrase.repeat(4)].concat()));
        assert!(!loops(&[phrase.repeat(4), vec![50, 51]].concat()));
        assert!(!loops(&(0..64).collect::<Vec<_>>()));
    }
}
