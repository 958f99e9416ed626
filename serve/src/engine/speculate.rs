//! Speculative decoding: a cheap model proposes tokens, the model itself checks them all in one pass.
//!
//! The model computes the logits after each proposed token by the arithmetic of a plain decode step, and draws from
//! them with the noise of that step (see [`lowbit_model::sampling`]). A proposal stands when it is the token drawn;
//! the first that is not is replaced by it, and what follows is dropped. So the text is, token for token, the one the
//! model gives without a draft, greedy or sampled; a draft changes only how many passes it takes.

use std::sync::atomic::Ordering;

use super::TokenLog;
use super::scheduler::Scheduler;
use crate::error::Result;
use lowbit_model::sampling::sample;

impl Scheduler {
    /// A round for the sequences `ready`.
    pub(super) fn speculate(&mut self, ready: &[usize]) -> Result<()> {
        let proposals = self.propose(ready)?;
        let mut rows = Vec::new();
        for (i, proposed) in ready.iter().zip(&proposals) {
            let s = &self.running[*i];
            rows.push((s.slot, s.computed, s.tokens[s.computed]));
            rows.extend(proposed.iter().enumerate().map(|(j, id)| (s.slot, s.computed + 1 + j, *id)));
        }
        let logits = self.runner.decode(&rows)?;
        let plain = ready.iter().all(|i| self.running[*i].is_plain());
        let best = if plain { self.runner.argmax(&logits)? } else { Vec::new() };
        let mut host = if plain { Vec::new() } else { self.runner.download(&logits)? };
        let vocab = self.runner.model.config().vocab_size;
        let mut row = 0;
        for (i, proposed) in ready.iter().zip(&proposals) {
            let first = row;
            row += proposed.len() + 1;
            let mut accepted = 0;
            for j in 0..=proposed.len() {
                let at = first + j;
                let chosen = if plain {
                    Ok((best[at], TokenLog { id: best[at], logprob: None, top: Vec::new() }))
                } else {
                    self.running[*i].choose(&mut host[at * vocab..(at + 1) * vocab])
                };
                let (id, log) = match chosen {
                    Ok(c) => c,
                    Err(e) => {
                        self.running[*i].fail(&e.to_string());
                        break;
                    }
                };
                let stands = proposed.get(j) == Some(&id);
                accepted += usize::from(stands);
                // Counted before the token that may end the text is reported.
                let s = &mut self.running[*i];
                s.usage.drafted += usize::from(j < proposed.len());
                s.usage.accepted += usize::from(stands);
                self.take(*i, id, log);
                if !stands || self.running[*i].over {
                    break;
                }
            }
            // The draft has computed all its proposals but the last.
            if !proposed.is_empty() {
                let s = &mut self.running[*i];
                s.drafted = (s.drafted + accepted.min(proposed.len() - 1)).min(s.computed);
            }
            let [rounds, tried, stood] = &self.metrics.drafts;
            if !proposed.is_empty() {
                rounds.fetch_add(1, Ordering::Relaxed);
                tried.fetch_add(proposed.len() as u64, Ordering::Relaxed);
                stood.fetch_add(accepted as u64, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The draft model's next tokens for each of `ready`; none for those whose logits are reshaped on the way.
    fn propose(&mut self, ready: &[usize]) -> Result<Vec<Vec<u32>>> {
        let mut proposals: Vec<Vec<u32>> = vec![Vec::new(); ready.len()];
        let Some(draft) = &mut self.draft else { return Ok(proposals) };
        let most = self.options.draft_tokens;
        let limit = |s: &super::sequence::Sequence| {
            if s.reshapes() || s.job.params.without_draft { 0 } else { most.min(s.left().saturating_sub(1)) }
        };
        for j in 0..most {
            let mut rows = Vec::new();
            let mut asked = Vec::new();
            for (k, i) in ready.iter().enumerate() {
                let s = &mut self.running[*i];
                if limit(s) <= j {
                    continue;
                }
                // First what the draft has not seen of the text, then its own last proposal.
                let seen = s.drafted..s.tokens.len();
                rows.extend(seen.clone().map(|p| (s.slot, p, s.tokens[p])));
                if seen.is_empty() {
                    let at = s.tokens.len() + j - 1;
                    rows.extend(proposals[k].last().map(|id| (s.slot, at, *id)));
                }
                s.drafted = s.tokens.len();
                asked.push((k, rows.len() - 1));
            }
            if rows.is_empty() {
                break;
            }
            let logits = draft.decode(&rows)?;
            let vocab = draft.model.config().vocab_size;
            let greedy = asked.iter().all(|(k, _)| self.running[ready[*k]].job.params.sampling.temperature <= 0.0);
            let best = if greedy { draft.argmax(&logits)? } else { Vec::new() };
            let host = if greedy { Vec::new() } else { draft.download(&logits)? };
            for (k, row) in asked {
                let s = &self.running[ready[k]];
                let id = if greedy {
                    best[row]
                } else {
                    let step = (s.usage.completion + j) as u64;
                    sample(&host[row * vocab..(row + 1) * vocab], &s.job.params.sampling, step)
                };
                proposals[k].push(id);
            }
        }
        // The draft's cache now also holds proposals: those after the text are written over next time.
        Ok(proposals)
    }
}
