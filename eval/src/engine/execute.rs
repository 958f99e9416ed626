//! Runs a plan: ragged batches of a token budget, families side by side, logits of scored rows only.
//!
//! What a batch holds changes nothing but time: a row's result depends on its own tokens alone, so budgets, slots and
//! the order of families are free.

use std::collections::VecDeque;

use lowbit_kernels::KernelError;
use lowbit_kernels::backend::{Backend, Buffer, Segment, TokenScore};
use lowbit_model::{KvCache, Model, ModelError};
use rayon::prelude::*;

use super::codec::Piece;
use super::plan::{Family, Step, Target};
use crate::drift::row::{RowDrift, compare};
use crate::error::{EvalError, Result};
use crate::scorer::rows_per_chunk;

/// Bounds of a run; none changes a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of one call, all sequences together.
    pub batch_tokens: usize,
    /// Sequences in flight.
    pub slots: usize,
    /// Tokens of cache, all slots together, where the backend does not page its cache.
    pub cache_tokens: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { batch_tokens: 1024, slots: 256, cache_tokens: 1 << 18 }
    }
}

impl Limits {
    /// Slots of a cache whose longest sequence is `capacity`.
    pub(crate) fn slots_of(&self, capacity: usize) -> usize {
        self.slots.clamp(1, (self.cache_tokens / capacity.max(1)).max(1))
    }
}

/// What a run cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens sent through the (candidate) model.
    pub computed_tokens: u64,
    /// Tokens of all sequences: what it would have cost without sharing.
    pub asked_tokens: u64,
    /// Calls of the model.
    pub calls: u64,
    /// Slots forked; where a backend cannot fork, branches run one after the other in one slot.
    pub forks: u64,
}

/// The score of one target by each model.
#[derive(Clone, Copy, Debug)]
pub struct Scored {
    /// By the candidate.
    pub candidate: TokenScore,
    /// By the reference.
    pub reference: Option<TokenScore>,
    /// The two distributions compared.
    pub drift: Option<RowDrift>,
}

/// A slot's work.
struct Lane<'p> {
    family: usize,
    slot: usize,
    steps: VecDeque<&'p Step>,
    /// Tokens of the front step that are done.
    done: usize,
}

/// A family in flight.
struct Active<'p> {
    home: usize,
    home_busy: bool,
    trunk_done: bool,
    running: usize,
    trunk: usize,
    branches: VecDeque<&'p [Step]>,
}

/// Two models that run the same steps.
pub struct Executor<'m> {
    /// Candidate, and reference where there is one.
    models: Vec<&'m Model>,
    limits: Limits,
    /// So far.
    pub work: Work,
    can_fork: bool,
}

/// One lane's part of a batch.
struct Part<'p> {
    lane: usize,
    step: &'p Step,
    segment: Segment,
}

impl<'m> Executor<'m> {
    /// `reference` runs the same steps beside the candidate.
    pub fn new(candidate: &'m Model, reference: Option<&'m Model>, limits: Limits) -> Self {
        let models = std::iter::once(candidate).chain(reference).collect();
        Self { models, limits, work: Work::default(), can_fork: true }
    }

    /// Runs `families` of `pieces`; `on_score` hears of each target once, in no particular order.
    pub fn run(
        &mut self,
        pieces: &[Piece],
        families: &[Family],
        on_score: &mut dyn FnMut(&Target, Scored) -> Result<()>,
    ) -> Result<()> {
        self.work.asked_tokens += pieces.iter().map(|p| p.ids.len() as u64).sum::<u64>();
        let mut rest = families;
        while let Some(first) = rest.first() {
            // Families come longest first: those of half the length and less get a cache of their own.
            let capacity = first.longest.max(1);
            let fit = rest.iter().take_while(|f| 2 * f.longest > capacity).count().max(1);
            let (bucket, after) = rest.split_at(fit);
            self.bucket(pieces, bucket, capacity, on_score)?;
            rest = after;
        }
        Ok(())
    }

    fn bucket<'p>(
        &mut self,
        pieces: &[Piece],
        families: &'p [Family],
        capacity: usize,
        on_score: &mut dyn FnMut(&Target, Scored) -> Result<()>,
    ) -> Result<()> {
        let slots = self.limits.slots_of(capacity);
        let mut caches: Vec<KvCache> =
            self.models.iter().map(|m| m.new_cache(slots, capacity)).collect::<std::result::Result<_, _>>()?;
        let mut free: Vec<usize> = (0..slots).rev().collect();
        let mut queue = families.iter();
        let mut active: Vec<Option<Active<'p>>> = Vec::new();
        let mut lanes: Vec<Lane<'p>> = Vec::new();
        loop {
            let mut waiting: usize = lanes.iter().map(|l| l.steps.front().map_or(0, |s| s.range.len() - l.done)).sum();
            // Branches of families in flight come before new families: their trunk holds memory.
            for (index, family) in active.iter_mut().enumerate() {
                let Some(family) = family else { continue };
                while waiting < self.limits.batch_tokens && !family.branches.is_empty() {
                    let Some(slot) = self.branch_slot(family, &mut caches, &mut free)? else { break };
                    let Some(branch) = family.branches.pop_front() else { break };
                    waiting += branch.first().map_or(0, |s| s.range.len());
                    family.running += 1;
                    lanes.push(Lane { family: index, slot, steps: branch.iter().collect(), done: 0 });
                }
            }
            while waiting < self.limits.batch_tokens && !free.is_empty() {
                let Some(family) = queue.next() else { break };
                let Some(home) = free.pop() else { break };
                let mut branches: VecDeque<&[Step]> = family.branches.iter().map(Vec::as_slice).collect();
                let steps: VecDeque<&Step> = match &family.trunk {
                    Some(trunk) => [trunk].into(),
                    None => branches.pop_front().unwrap_or_default().iter().collect(),
                };
                waiting += steps.front().map_or(0, |s| s.range.len());
                let trunk = family.trunk.as_ref().map_or(0, |t| t.range.end);
                let index = active.len();
                let trunk_done = family.trunk.is_none();
                active.push(Some(Active { home, home_busy: true, trunk_done, running: 1, trunk, branches }));
                lanes.push(Lane { family: index, slot: home, steps, done: 0 });
            }
            if lanes.is_empty() {
                return Ok(());
            }
            self.call(pieces, &mut lanes, &mut caches, on_score)?;
            for lane in lanes.extract_if(.., |l| l.steps.is_empty()) {
                let Some(entry) = active.get_mut(lane.family) else { continue };
                let Some(family) = entry else { continue };
                family.running -= 1;
                if lane.slot == family.home {
                    family.home_busy = false;
                    family.trunk_done = true;
                } else {
                    self.free(&mut caches, lane.slot, &mut free)?;
                }
                if family.running == 0 && family.branches.is_empty() {
                    self.free(&mut caches, family.home, &mut free)?;
                    *entry = None;
                }
            }
        }
    }

    /// A slot that holds the family's trunk and nothing in use: its home, or a fork of it.
    fn branch_slot(
        &mut self,
        family: &mut Active<'_>,
        caches: &mut [KvCache],
        free: &mut Vec<usize>,
    ) -> Result<Option<usize>> {
        // While the trunk itself is computed there is nothing to share.
        if !family.trunk_done {
            return Ok(None);
        }
        if !family.home_busy {
            family.home_busy = true;
            return Ok(Some(family.home));
        }
        if !self.can_fork {
            return Ok(None);
        }
        let Some(&slot) = free.last() else { return Ok(None) };
        for (model, cache) in self.models.iter().zip(caches) {
            match cache.fork(model.backend(), family.home, family.trunk, slot) {
                Ok(()) => {}
                Err(ModelError::Kernel { source: KernelError::Unsupported { .. }, .. }) => {
                    self.can_fork = false;
                    return Ok(None);
                }
                Err(e) => return Err(e.into()),
            }
        }
        free.pop();
        self.work.forks += 1;
        Ok(Some(slot))
    }

    fn free(&self, caches: &mut [KvCache], slot: usize, free: &mut Vec<usize>) -> Result<()> {
        for (model, cache) in self.models.iter().zip(caches) {
            cache.release(model.backend(), slot)?;
        }
        free.push(slot);
        Ok(())
    }

    /// One call of each model over the next tokens of as many lanes as the budget takes.
    fn call<'p>(
        &mut self,
        pieces: &[Piece],
        lanes: &mut [Lane<'p>],
        caches: &mut [KvCache],
        on_score: &mut dyn FnMut(&Target, Scored) -> Result<()>,
    ) -> Result<()> {
        let mut ids: Vec<u32> = Vec::new();
        let mut parts: Vec<Part<'p>> = Vec::new();
        for (index, lane) in lanes.iter().enumerate() {
            let Some(step) = lane.steps.front() else { continue };
            let room = self.limits.batch_tokens.max(1).saturating_sub(ids.len());
            let past = step.range.start + lane.done;
            let tokens = (step.range.end - past).min(room);
            if tokens == 0 {
                break;
            }
            let Some(piece) = pieces.get(step.piece) else { continue };
            parts.push(Part { lane: index, step, segment: Segment { slot: lane.slot, row: ids.len(), tokens, past } });
            ids.extend_from_slice(&piece.ids[past..past + tokens]);
        }
        let segments: Vec<Segment> = parts.iter().map(|p| p.segment.clone()).collect();
        let hidden: Vec<Buffer> = self
            .models
            .iter()
            .zip(caches)
            .map(|(m, cache)| m.forward(&ids, &segments, cache))
            .collect::<std::result::Result<_, _>>()?;
        self.work.computed_tokens += ids.len() as u64;
        self.work.calls += 1;
        let wanted: Vec<(usize, &Target)> = parts
            .iter()
            .flat_map(|p| {
                let rows = p.segment.past..p.segment.past + p.segment.tokens;
                let inside = p.step.targets.iter().filter(move |t| rows.contains(&t.row));
                inside.map(|t| (p.segment.row + t.row - p.segment.past, t))
            })
            .collect();
        let chunk = self.models.first().map_or(1, |m| rows_per_chunk(m.config().vocab_size));
        for wanted in wanted.chunks(chunk) {
            let scores = self.score(&hidden, wanted)?;
            for ((_, target), scored) in wanted.iter().zip(scores) {
                on_score(target, scored)?;
            }
        }
        for part in &parts {
            let Some(lane) = lanes.get_mut(part.lane) else { continue };
            lane.done += part.segment.tokens;
            if lane.done == part.step.range.len() {
                lane.done = 0;
                lane.steps.pop_front();
            }
        }
        Ok(())
    }

    /// Scores of some rows; a row asked for several tokens has its logits made once.
    fn score(&self, hidden: &[Buffer], wanted: &[(usize, &Target)]) -> Result<Vec<Scored>> {
        let mut rows: Vec<usize> = wanted.iter().map(|w| w.0).collect();
        rows.dedup();
        let mut place = 0;
        let places: Vec<usize> = wanted
            .iter()
            .map(|w| {
                place += usize::from(rows.get(place) != Some(&w.0));
                place
            })
            .collect();
        let targets: Vec<u32> = wanted.iter().map(|w| w.1.token).collect();
        let mut scores = Vec::with_capacity(self.models.len());
        let mut on_host = Vec::new();
        let vocab = self.models.first().map_or(0, |m| m.config().vocab_size);
        if let Some(&id) = targets.iter().find(|&&t| t as usize >= vocab) {
            return Err(EvalError::BadToken { id, vocab });
        }
        for (model, hidden) in self.models.iter().zip(hidden) {
            let logits = model.logits(&model.gather_hidden(hidden, &rows)?)?;
            scores.push(score_rows(model.backend(), &logits, vocab, &places, &targets)?);
            if self.models.len() > 1 {
                on_host.push(model.backend().download(&logits)?);
            }
        }
        let drifts: Vec<Option<RowDrift>> = match on_host.as_slice() {
            [candidate, reference] => places
                .par_iter()
                .zip(&targets)
                .map(|(&p, &t)| {
                    let row = p * vocab..(p + 1) * vocab;
                    Some(compare(&reference[row.clone()], &candidate[row], t as usize))
                })
                .collect(),
            _ => vec![None; targets.len()],
        };
        let mut scores = scores.into_iter();
        let candidate = scores.next().unwrap_or_default();
        let reference: Vec<Option<TokenScore>> =
            scores.next().map_or_else(|| vec![None; targets.len()], |s| s.into_iter().map(Some).collect());
        Ok(candidate
            .into_iter()
            .zip(reference)
            .zip(drifts)
            .map(|((candidate, reference), drift)| Scored { candidate, reference, drift })
            .collect())
    }
}

/// Scores `targets[i]` in row `places[i]` of `logits` `[rows, vocab]`, every row being asked for one token at least and rows rising.
/// The further tokens of a row (a question's choices begin after the same context) are scored in copies of these rows alone: logits
/// are wide, and copying all of them took longer than scoring them.
fn score_rows(
    backend: &dyn Backend,
    logits: &Buffer,
    vocab: usize,
    places: &[usize],
    targets: &[u32],
) -> Result<Vec<TokenScore>> {
    let further: Vec<usize> = places.windows(2).zip(1..).filter(|(p, _)| p[0] == p[1]).map(|(_, i)| i).collect();
    let firsts = (0..targets.len()).filter(|i| further.binary_search(i).is_err());
    let mut first = backend.score(logits, vocab, &firsts.map(|i| targets[i]).collect::<Vec<u32>>())?.into_iter();
    let mut again = Vec::new().into_iter();
    if !further.is_empty() {
        let rows: Vec<usize> = further.iter().map(|i| places[*i]).collect();
        let copies = backend.gather_rows(logits, vocab, &rows)?;
        again = backend.score(&copies, vocab, &further.iter().map(|i| targets[*i]).collect::<Vec<u32>>())?.into_iter();
    }
    let mut due = further.iter().peekable();
    let in_order = (0..targets.len()).filter_map(|i| match due.next_if_eq(&&i) {
        Some(_) => again.next(),
        None => first.next(),
    });
    let found: Vec<TokenScore> = in_order.collect();
    match found.len() == targets.len() {
        true => Ok(found),
        false => Err(EvalError::Scores { expected: targets.len(), found: found.len() }),
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::cpu::CpuBackend;

    use super::*;

    #[test]
    fn rows_asked_for_several_tokens_are_scored_as_rows_of_their_own() {
        let (backend, vocab) = (CpuBackend::new(), 5);
        let rows: Vec<f32> = (0..3 * vocab).map(|i| ((i * 7) % 11) as f32).collect();
        let logits = backend.upload(&rows).unwrap();
        for (places, targets) in [
            (vec![0, 1, 2], vec![4, 0, 1]),
            (vec![0, 0, 0, 1, 2, 2], vec![0, 3, 4, 1, 2, 2]),
            (vec![0, 1, 1, 2], vec![0, 1, 2, 3]),
        ] {
            let found = score_rows(&backend, &logits, vocab, &places, &targets).unwrap();
            let alone = |(p, t): (&usize, &u32)| {
                let row = backend.upload(&rows[p * vocab..(p + 1) * vocab]).unwrap();
                backend.score(&row, vocab, &[*t]).unwrap()[0]
            };
            assert_eq!(found, places.iter().zip(&targets).map(alone).collect::<Vec<_>>());
        }
    }
}
