//! One run split over machines: `--shard i/n`.
//!
//! Documents are dealt round-robin within each task, so that shards are about equally long. Few-shot examples are drawn
//! before the split, hence a document's prompt does not depend on the number of shards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Part `index` (from 1) of `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// From 1.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Shard {
    /// Whether document `doc` (from 0) of a task is in this part.
    pub fn holds(&self, doc: usize) -> bool {
        doc % self.count.max(1) + 1 == self.index
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not a shard: expected i/n with i from 1 to n, as in 3/8");
        let (index, count) = text.split_once('/').ok_or_else(bad)?;
        let shard = Self { index: index.parse().map_err(|_| bad())?, count: count.parse().map_err(|_| bad())? };
        if shard.index == 0 || shard.index > shard.count { Err(bad()) } else { Ok(shard) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_every_document_once() {
        let shards: Vec<Shard> = ["1/3", "2/3", "3/3"].iter().map(|s| s.parse().unwrap()).collect();
        for doc in 0..20 {
            assert_eq!(shards.iter().filter(|s| s.holds(doc)).count(), 1);
        }
        for bad in ["0/3", "4/3", "3", "a/b", "1/0", "-1/2"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
        assert_eq!(shards[1].to_string(), "2/3");
    }
}
