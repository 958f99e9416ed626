//! Cache slots and what they hold: prompts of finished requests stay until their slot or their pages are needed.

/// What a slot is used for.
enum State {
    Free,
    Running,
    /// A finished prompt, with the tick of its last use.
    Kept {
        tokens: Vec<u32>,
        used: u64,
    },
}

/// All slots of a cache.
pub struct Slots {
    states: Vec<State>,
    clock: u64,
}

/// Tokens both begin with.
pub fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Slots {
    /// `n` free ones.
    pub fn new(n: usize) -> Self {
        Self { states: (0..n).map(|_| State::Free).collect(), clock: 0 }
    }

    /// A free slot, marked as running.
    pub fn take(&mut self) -> Option<usize> {
        let at = self.states.iter().position(|s| matches!(s, State::Free))?;
        self.states[at] = State::Running;
        Some(at)
    }

    /// The kept slot that shares the longest beginning with `prompt`, and how long it is.
    pub fn longest(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        let kept = self.states.iter().enumerate().filter_map(|(i, s)| match s {
            State::Kept { tokens, .. } => Some((i, common(tokens, prompt))),
            _ => None,
        });
        kept.max_by_key(|(i, n)| (*n, std::cmp::Reverse(*i)))
    }

    /// Marks a kept slot as just used.
    pub fn touch(&mut self, slot: usize) {
        self.clock += 1;
        if let State::Kept { used, .. } = &mut self.states[slot] {
            *used = self.clock;
        }
    }

    /// Keeps a running slot's `tokens`. Returns the slots that became free: ones with a beginning of it, or the slot
    /// itself where another has all of it.
    pub fn keep(&mut self, slot: usize, tokens: Vec<u32>) -> Vec<usize> {
        let covered = self.longest(&tokens).filter(|(_, n)| *n == tokens.len());
        if let Some((other, _)) = covered {
            self.touch(other);
            self.states[slot] = State::Free;
            return vec![slot];
        }
        let mut freed = Vec::new();
        for (i, state) in self.states.iter_mut().enumerate() {
            if matches!(state, State::Kept { tokens: t, .. } if tokens.starts_with(t)) {
                *state = State::Free;
                freed.push(i);
            }
        }
        self.clock += 1;
        self.states[slot] = State::Kept { tokens, used: self.clock };
        freed
    }

    /// Frees a running slot.
    pub fn free(&mut self, slot: usize) {
        self.states[slot] = State::Free;
    }

    /// Frees the kept slot that was used longest ago, except `spared`.
    pub fn evict(&mut self, spared: Option<usize>) -> Option<usize> {
        let kept = self.states.iter().enumerate().filter_map(|(i, s)| match s {
            State::Kept { used, .. } if Some(i) != spared => Some((*used, i)),
            _ => None,
        });
        let (_, at) = kept.min()?;
        self.states[at] = State::Free;
        Some(at)
    }

    /// Prompts kept.
    pub fn kept(&self) -> usize {
        self.states.iter().filter(|s| matches!(s, State::Kept { .. })).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_beginning_wins_and_the_oldest_goes() {
        let mut s = Slots::new(3);
        let [a, b, c] = [(); 3].map(|()| s.take().unwrap());
        assert_eq!(s.take(), None);
        assert!(s.keep(a, vec![1, 2, 3]).is_empty() && s.keep(b, vec![1, 2, 9, 9]).is_empty());
        assert_eq!(s.longest(&[1, 2, 9, 1]), Some((b, 3)));
        assert_eq!(s.keep(c, vec![1, 2, 3]), [c], "held already");
        let c = s.take().unwrap();
        assert_eq!(s.keep(c, vec![1, 2, 3, 4]), [a], "a beginning of the new one");
        s.touch(b);
        assert_eq!(s.evict(None), Some(c));
        assert_eq!((s.evict(Some(b)), s.kept()), (None, 1));
    }
}
