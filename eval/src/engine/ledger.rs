//! Which questions of a run are answered: equal ones are asked once, and those a store knows not at all.

use std::collections::HashMap;

use super::{Answer, Store};
use crate::error::{EvalError, Result};

/// The questions of a run by key, in order.
pub(crate) struct Ledger<'k> {
    keys: &'k [String],
    known: HashMap<&'k str, Answer>,
    /// Places of questions to ask: the first of equal ones.
    pub(crate) todo: Vec<usize>,
    /// Questions that differ.
    pub(crate) total: usize,
    /// Questions, equal ones each counted, whose answer was there.
    pub(crate) restored: usize,
}

impl<'k> Ledger<'k> {
    /// Looks every key up in `store`.
    pub(crate) fn open(keys: &'k [String], store: &dyn Store) -> Self {
        let (mut known, mut todo, mut seen) = (HashMap::new(), Vec::new(), HashMap::new());
        for (i, key) in keys.iter().enumerate() {
            if seen.insert(key.as_str(), ()).is_some() {
                continue;
            }
            match store.get(key) {
                Some(answer) => _ = known.insert(key.as_str(), answer),
                None => todo.push(i),
            }
        }
        let restored = keys.iter().filter(|k| known.contains_key(k.as_str())).count();
        Self { keys, known, todo, total: seen.len(), restored }
    }

    /// Questions answered so far, of those that differ.
    pub(crate) fn done(&self) -> usize {
        self.known.len()
    }

    /// Keeps the answer to question `i`, in the store first.
    pub(crate) fn keep(&mut self, i: usize, answer: Answer, store: &mut dyn Store) -> Result<()> {
        let Some(key) = self.keys.get(i) else { return Ok(()) };
        store.put(key, &answer)?;
        self.known.insert(key, answer);
        Ok(())
    }

    /// All answers, one a key.
    pub(crate) fn answers(self) -> Result<Vec<Answer>> {
        let all = self.keys.iter().map(|k| self.known.get(k.as_str()).cloned()).collect::<Option<Vec<_>>>();
        all.ok_or(EvalError::Scores { expected: self.total, found: self.known.len() })
    }
}
