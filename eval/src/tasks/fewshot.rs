//! Which examples a document gets.

use serde_json::{Map, Value as Json};

use super::config::SamplerKind;
use super::random::Random;

/// Seed of the examples, as lm-eval's default.
pub const SEED: u64 = 1234;

/// Draws examples for one document after another; the state carries over, so the order of documents matters.
pub struct Sampler {
    kind: SamplerKind,
    random: Random,
}

impl Sampler {
    /// A sampler at its start.
    pub fn new(kind: SamplerKind) -> Self {
        Self { kind, random: Random::new(SEED) }
    }

    /// Positions in `pool` of `n` examples; `own` is the document itself where it must not be among them. `None` where
    /// the pool is too small.
    pub fn sample(
        &mut self,
        pool: &[&Map<String, Json>],
        n: usize,
        own: Option<&Map<String, Json>>,
    ) -> Option<Vec<usize>> {
        let differs = |i: &usize| own.is_none_or(|own| pool.get(*i).is_some_and(|row| *row != own));
        if n == 0 {
            return Some(Vec::new());
        }
        let drawn: Vec<usize> = match self.kind {
            SamplerKind::FirstN => (0..pool.len()).filter(differs).take(n).collect(),
            SamplerKind::Seeded => {
                // One more than needed, in case the document itself is drawn.
                let extra = usize::from(own.is_some());
                let drawn = self.random.sample(pool.len(), n + extra)?;
                drawn.into_iter().filter(differs).take(n).collect()
            }
        };
        if drawn.len() == n {
            return Some(drawn);
        }
        if self.kind == SamplerKind::FirstN {
            return None;
        }
        // Copies of the document took the room: draw again among the others.
        let others: Vec<usize> = (0..pool.len()).filter(differs).collect();
        let again = self.random.sample(others.len(), n)?;
        Some(again.into_iter().filter_map(|i| others.get(i).copied()).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rows(n: usize) -> Vec<Map<String, Json>> {
        (0..n).map(|i| json!({ "i": i }).as_object().unwrap().clone()).collect()
    }

    #[test]
    fn seeded_draws_go_on_and_leave_out_the_document() {
        let rows = rows(30);
        let pool: Vec<_> = rows.iter().collect();
        let mut s = Sampler::new(SamplerKind::Seeded);
        // random.Random(1234): sample(range(30), 3) twice.
        assert_eq!(s.sample(&pool, 3, None).unwrap(), [24, 14, 3]);
        assert_eq!(s.sample(&pool, 3, None).unwrap(), [0, 2, 29]);
        let mut s = Sampler::new(SamplerKind::Seeded);
        // sample(range(30), 4) starts with the same three; the first of them is the document.
        let four = Random::new(SEED).sample(30, 4).unwrap();
        assert_eq!(s.sample(&pool, 3, Some(&rows[four[0]])).unwrap(), four[1..]);
        assert!(s.sample(&pool, 31, None).is_none());
    }

    #[test]
    fn first_ones() {
        let rows = rows(4);
        let pool: Vec<_> = rows.iter().collect();
        let mut s = Sampler::new(SamplerKind::FirstN);
        assert_eq!(s.sample(&pool, 2, Some(&rows[0])).unwrap(), [1, 2]);
        assert_eq!(s.sample(&pool, 4, None).unwrap(), [0, 1, 2, 3]);
        assert!(s.sample(&pool, 4, Some(&rows[0])).is_none());
    }

    #[test]
    fn copies_of_the_document_are_drawn_again() {
        let mut rows = rows(5);
        for row in rows.iter_mut().take(3) {
            row.insert("i".into(), 7.into());
        }
        let pool: Vec<_> = rows.iter().collect();
        for _ in 0..50 {
            let mut got = Sampler::new(SamplerKind::Seeded).sample(&pool, 2, Some(&rows[0])).unwrap();
            got.sort_unstable();
            assert_eq!(got, [3, 4]);
        }
    }
}
