//! Answers of earlier runs, kept in a folder (`--cache DIR`).
//!
//! `DIR/<identity>/` holds journals of runs with that identity: weights' content, tokenizer, kernels and precision,
//! protocol. Each process appends to a file of its own, so shards on a shared file system need no lock between them;
//! all files are read. One changed byte of a weight is another identity, hence a miss.

use std::collections::HashMap;
use std::path::Path;

use crate::engine::Answer;
use crate::engine::journal::{self, Journal, Store};
use crate::error::{EvalError, Result};

/// An open cache.
pub struct Cache {
    known: HashMap<String, Answer>,
    own: Journal,
}

impl Cache {
    /// Opens the folder for one identity (see [`crate::engine::Engine::identity`]).
    pub fn open(dir: &Path, identity: &str) -> Result<Self> {
        let folder = dir.join(identity);
        let io = |e: std::io::Error| EvalError::Journal { path: folder.clone(), problem: e.to_string() };
        std::fs::create_dir_all(&folder).map_err(io)?;
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(io)? {
            files.push(entry.map_err(io)?.path());
        }
        files.retain(|f| f.extension().is_some_and(|e| e == "journal"));
        files.sort();
        let mut known = HashMap::new();
        for file in &files {
            known.extend(journal::read_answers(file, identity)?.unwrap_or_default());
        }
        // The first file that nobody writes.
        let mut number = 0;
        let own = loop {
            match Journal::open(&folder.join(format!("{number}.journal")), identity) {
                Ok(own) => break own,
                Err(e) if number > 4096 => return Err(e),
                Err(_) => number += 1,
            }
        };
        Ok(Self { known, own })
    }

    /// Answers known when it was opened.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there were none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

impl Store for Cache {
    fn get(&self, key: &str) -> Option<Answer> {
        self.known.get(key).cloned().or_else(|| self.own.get(key))
    }

    fn put(&mut self, key: &str, answer: &Answer) -> Result<()> {
        if self.known.contains_key(key) { Ok(()) } else { self.own.put(key, answer) }
    }

    fn finish(&mut self) -> Result<()> {
        self.own.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Response;

    #[test]
    fn two_writers_at_once_and_both_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let answer = |x| Answer { response: Response::Rolling { log_prob: x }, reference: None, drift: vec![] };
        let (mut a, mut b) = (Cache::open(dir.path(), "id").unwrap(), Cache::open(dir.path(), "id").unwrap());
        a.put("x", &answer(1.0)).unwrap();
        b.put("y", &answer(2.0)).unwrap();
        drop((a, b));
        let c = Cache::open(dir.path(), "id").unwrap();
        assert_eq!((c.len(), c.get("y")), (2, Some(answer(2.0))));
        assert!(Cache::open(dir.path(), "other").unwrap().is_empty());
    }
}
