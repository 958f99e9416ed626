//! The per-token view: where in a text the two models part, and what each would have written there.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::row::{compare, top};
use crate::engine::codec::Codec;
use crate::error::Result;
use crate::kl::{KlOptions, checked_logits};
use crate::scorer::{Scorer, check_window, chunks, rows_per_chunk};
use crate::stats::log_sum_exp;

/// Tokens of text shown before a position.
const CONTEXT: usize = 24;
/// Choices shown of each model.
const CHOICES: usize = 5;

/// A token a model might have written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Its text.
    pub token: String,
    /// Its probability.
    pub probability: f64,
}

/// One position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenView {
    /// Window, from 0.
    pub window: usize,
    /// Position of the token in it.
    pub position: usize,
    /// Text before it, its last tokens.
    pub context: String,
    /// The token that follows in the text.
    pub token: String,
    /// KL(reference ‖ candidate), nats.
    pub kl: f64,
    /// −log probability of the token by the reference.
    pub reference_nll: f64,
    /// The same by the candidate.
    pub candidate_nll: f64,
    /// The reference's most likely tokens.
    pub reference_choices: Vec<Choice>,
    /// The candidate's.
    pub candidate_choices: Vec<Choice>,
}

/// A position before it is put into words.
struct Place {
    kl: f64,
    window: usize,
    row: usize,
    nll: (f64, f64),
    choices: [Vec<(u32, f64)>; 2],
}

/// The `count` positions of largest KL over the windows [`crate::evaluate_kl`] compares, largest first.
pub fn worst_tokens(
    candidate: &dyn Scorer,
    reference: &dyn Scorer,
    codec: &dyn Codec,
    ids: &[u32],
    options: &KlOptions,
    count: usize,
) -> Result<Vec<TokenView>> {
    let vocab = candidate.vocab_size();
    let positions = candidate.max_positions().min(reference.max_positions());
    let mut worst: Vec<Place> = Vec::new();
    let windows = ids.chunks_exact(options.window.max(2)).take(options.limit.unwrap_or(usize::MAX));
    for (window, tokens) in windows.enumerate() {
        check_window(vocab, positions, tokens, &(1..tokens.len()))?;
        let inputs = tokens.len() - 1;
        let (theirs, ours) = (reference.run(&tokens[..inputs])?, candidate.run(&tokens[..inputs])?);
        for rows in chunks(&(0..inputs), rows_per_chunk(vocab)) {
            let a = checked_logits(&*theirs, rows.clone(), vocab)?;
            let b = checked_logits(&*ours, rows.clone(), vocab)?;
            let targets = &tokens[rows.start + 1..rows.end + 1];
            let found: Vec<Place> = a
                .par_chunks_exact(vocab)
                .zip(b.par_chunks_exact(vocab))
                .zip(targets.par_iter())
                .enumerate()
                .map(|(i, ((a, b), &target))| {
                    let d = compare(a, b, target as usize);
                    let nll = (d.reference_nll, d.candidate_nll);
                    Place { kl: d.kl, window, row: rows.start + i, nll, choices: [choices(a), choices(b)] }
                })
                .collect();
            worst.extend(found);
            worst.sort_by(|x, y| y.kl.total_cmp(&x.kl).then((x.window, x.row).cmp(&(y.window, y.row))));
            worst.truncate(count);
        }
    }
    let text = |ids: &[u32]| codec.decode(ids, false);
    worst
        .into_iter()
        .map(|p| {
            let start = p.window * options.window.max(2);
            let at = start + p.row + 1;
            let named = |list: &[(u32, f64)]| -> Result<Vec<Choice>> {
                list.iter().map(|&(id, probability)| Ok(Choice { token: text(&[id])?, probability })).collect()
            };
            Ok(TokenView {
                window: p.window,
                position: p.row + 1,
                context: text(&ids[at.saturating_sub(CONTEXT).max(start)..at])?,
                token: text(&ids[at..=at])?,
                kl: p.kl,
                reference_nll: p.nll.0,
                candidate_nll: p.nll.1,
                reference_choices: named(&p.choices[0])?,
                candidate_choices: named(&p.choices[1])?,
            })
        })
        .collect()
}

fn choices(row: &[f32]) -> Vec<(u32, f64)> {
    let (z, _) = log_sum_exp(row);
    top(row, CHOICES).into_iter().map(|(x, id)| (id, (f64::from(x) - z).exp())).collect()
}
