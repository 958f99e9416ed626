//! From many token sequences to few steps: every shared prefix is computed once.
//!
//! Sequences in lexicographic order are the depth-first walk of their trie, and the longest prefix a sequence shares
//! with any earlier one it shares with its neighbour. So "the trie" is one number a sequence: how many of its tokens the
//! cache already holds when its turn comes.
//!
//! The walk is cut into *families*, which share less than [`MIN_SHARED`] tokens with each other and run in slots of
//! their own. A family has a trunk (what all of it shares: the shots of a few-shot task) and branches (a document
//! each); branches may run side by side in slots that share the trunk, or one after the other in the same slot.

use std::ops::Range;

use super::codec::Piece;

/// Below this many shared tokens, computing them again in another slot is cheaper than waiting for a slot.
pub const MIN_SHARED: usize = 16;

/// One scored row: where its answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row (token position) whose distribution is asked.
    pub row: usize,
    /// Token asked for.
    pub token: u32,
    /// Index of the piece.
    pub piece: usize,
    /// Index within the piece's targets.
    pub at: usize,
}

/// Tokens `range` of piece `piece` through the model, after those before `range` that the slot holds already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The piece whose tokens they are.
    pub piece: usize,
    /// Which of them.
    pub range: Range<usize>,
    /// Rows of `range` that are scored, by row.
    pub targets: Vec<Target>,
}

/// Sequences that share a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    /// The shared prefix; `None` for a family of one branch.
    pub trunk: Option<Step>,
    /// Each a run of steps in one slot that holds the trunk.
    pub branches: Vec<Vec<Step>>,
    /// Longest sequence, tokens.
    pub longest: usize,
}

impl Family {
    /// Tokens to compute.
    pub fn tokens(&self) -> usize {
        self.trunk.iter().chain(self.branches.iter().flatten()).map(|s| s.range.len()).sum()
    }
}

fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// Plans `pieces`; families come longest first, so that slots of one size serve neighbours.
pub fn plan(pieces: &[Piece]) -> Vec<Family> {
    let mut order: Vec<usize> = (0..pieces.len()).filter(|&i| !pieces[i].ids.is_empty()).collect();
    order.sort_by(|&a, &b| pieces[a].ids.cmp(&pieces[b].ids).then(a.cmp(&b)));
    let past: Vec<usize> = order
        .iter()
        .enumerate()
        .map(|(i, &p)| if i == 0 { 0 } else { shared(&pieces[order[i - 1]].ids, &pieces[p].ids) })
        .collect();
    let mut families = Vec::new();
    let mut start = 0;
    for end in 1..=order.len() {
        if end == order.len() || past[end] < MIN_SHARED {
            families.push(family(pieces, &order[start..end], &past[start..end]));
            start = end;
        }
    }
    families.sort_by_key(|f| std::cmp::Reverse(f.longest));
    families
}

/// `past[0]` is not looked at: the first sequence finds an empty slot.
fn family(pieces: &[Piece], order: &[usize], past: &[usize]) -> Family {
    let longest = order.iter().map(|&p| pieces[p].ids.len()).max().unwrap_or(0);
    let trunk_length = past.iter().skip(1).copied().min().unwrap_or(0);
    let Some(&first) = order.first() else {
        return Family { trunk: None, branches: Vec::new(), longest };
    };
    let mut trunk = Step { piece: first, range: 0..trunk_length, targets: Vec::new() };
    let mut branches: Vec<Vec<Step>> = Vec::new();
    for (i, &piece) in order.iter().enumerate() {
        let length = pieces[piece].ids.len();
        let held = if i == 0 { trunk_length } else { past[i] };
        if i == 0 || held == trunk_length {
            branches.push(Vec::new());
        }
        let Some(branch) = branches.last_mut() else { continue };
        // A sequence that an earlier one contains needs no step, only its rows.
        if held < length {
            branch.push(Step { piece, range: held..length, targets: Vec::new() });
        }
        for (at, &token) in pieces[piece].targets.iter().enumerate() {
            let row = pieces[piece].first + at;
            let target = Target { row, token, piece, at };
            // The step that computed the row, for this sequence or one that shares it: the last to start at or before it.
            match branch.iter_mut().rev().find(|s| s.range.start <= row) {
                Some(step) if row >= trunk_length => step.targets.push(target),
                _ => trunk.targets.push(target),
            }
        }
    }
    branches.retain(|b| !b.is_empty());
    for step in branches.iter_mut().flatten().chain([&mut trunk]) {
        step.targets.sort_by_key(|t| (t.row, t.piece, t.at));
    }
    let trunk = (trunk_length > 0).then_some(trunk);
    Family { trunk, branches, longest }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(ids: Vec<u32>, first: usize) -> Piece {
        let targets = (first..ids.len()).map(|r| 1000 + r as u32).collect();
        Piece { request: 0, ids, first, targets }
    }

    fn steps(f: &Family) -> Vec<(usize, Range<usize>)> {
        f.trunk.iter().chain(f.branches.iter().flatten()).map(|s| (s.piece, s.range.clone())).collect()
    }

    #[test]
    fn single_token_choices_cost_one_forward() {
        let ids: Vec<u32> = (0..40).collect();
        let pieces: Vec<Piece> = (0..4).map(|_| piece(ids.clone(), 39)).collect();
        let families = plan(&pieces);
        assert_eq!(families.len(), 1);
        assert_eq!(families[0].tokens(), 40);
        let trunk = families[0].trunk.as_ref().unwrap();
        assert_eq!(trunk.targets.len(), 4);
        assert!(families[0].branches.is_empty());
    }

    #[test]
    fn shots_once_then_documents_then_choices() {
        let shots: Vec<u32> = (0..100).collect();
        let mut pieces = Vec::new();
        for doc in 0..3u32 {
            for choice in 0..2u32 {
                let mut ids = shots.clone();
                ids.extend([200 + doc; 20]);
                ids.extend([300, 310 + choice]);
                pieces.push(piece(ids, 120));
            }
        }
        let families = plan(&pieces);
        assert_eq!(families.len(), 1);
        assert_eq!(
            steps(&families[0]),
            [(0, 0..100), (0, 100..122), (1, 121..122), (2, 100..122), (3, 121..122), (4, 100..122), (5, 121..122)]
        );
        assert_eq!(families[0].branches.len(), 3);
        // The second choice's first row is the first choice's.
        assert_eq!(families[0].branches[1][0].targets.iter().map(|t| t.piece).collect::<Vec<_>>(), [2, 3, 2]);
    }

    proptest! {
        #[test]
        fn every_target_is_scored_in_the_step_that_computes_its_row(
            heads in proptest::collection::vec((0u32..3, 0usize..30, 0u32..2, 1usize..12, 0usize..8), 1..40),
        ) {
            let pieces: Vec<Piece> = heads.iter().map(|&(a, n, b, m, back)| {
                let ids: Vec<u32> = std::iter::repeat_n(a, n + 5).chain(std::iter::repeat_n(b, m)).collect();
                let first = ids.len() - 1 - back.min(ids.len() - 1);
                piece(ids, first)
            }).collect();
            let families = plan(&pieces);
            let mut seen = vec![0; pieces.len()];
            let mut check = |slot: &mut Vec<u32>, step: &Step| {
                let ids = &pieces[step.piece].ids;
                // The slot holds what the step builds on.
                assert_eq!(&slot[..step.range.start], &ids[..step.range.start]);
                slot.truncate(step.range.start);
                slot.extend_from_slice(&ids[step.range.clone()]);
                for t in &step.targets {
                    assert!(step.range.contains(&t.row));
                    assert_eq!(&slot[..=t.row], &pieces[t.piece].ids[..=t.row]);
                    assert_eq!(pieces[t.piece].targets[t.at], t.token);
                    seen[t.piece] += 1;
                }
            };
            for f in &families {
                let mut trunk = Vec::new();
                if let Some(step) = &f.trunk {
                    check(&mut trunk, step);
                }
                for branch in &f.branches {
                    let mut slot = trunk.clone();
                    for step in branch {
                        check(&mut slot, step);
                    }
                }
            }
            for (piece, seen) in pieces.iter().zip(seen) {
                prop_assert_eq!(piece.targets.len(), seen);
            }
            // Sharing saves: never more tokens than without.
            let all: usize = pieces.iter().map(|p| p.ids.len()).sum();
            prop_assert!(families.iter().map(Family::tokens).sum::<usize>() <= all);
        }
    }
}
