//! What a run can find, stated before it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::decide::{Policy, pool_level, task_level};
use super::power::detectable;

/// Share of items that is taken to change between two models, before any is asked.
pub const DISCORDANT: f64 = 0.05;

/// A number of items, and the smallest loss they show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// Items.
    pub n: u64,
    /// As a share of them.
    pub loss: f64,
}

/// The smallest losses that a run finds with probability `power`, where a share `discordant` of the items changes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sizes {
    /// Share of items.
    pub discordant: f64,
    /// Probability of a false alarm, all tests together.
    pub alpha: f64,
    /// Probability of finding them.
    pub power: f64,
    /// Of all items, at the level they are tested at.
    pub pool: Size,
    /// Of each task, at the level at which it is found whatever the others show.
    pub tasks: BTreeMap<String, Size>,
}

impl Sizes {
    /// Of items by task.
    pub fn planned(items: &BTreeMap<String, u64>, policy: &Policy) -> Self {
        let size = |n: u64, level: f64| Size { n, loss: detectable(n, DISCORDANT, level, policy.power) };
        let tasks = items.iter().map(|(name, n)| (name.clone(), size(*n, task_level(items.len(), policy.alpha))));
        Self {
            discordant: DISCORDANT,
            alpha: policy.alpha,
            power: policy.power,
            pool: size(items.values().sum(), pool_level(items.len(), policy.alpha)),
            tasks: tasks.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_the_gate() {
        let items = |list: &[(&str, u64)]| -> BTreeMap<String, u64> {
            list.iter().map(|(t, n)| ((*t).to_owned(), *n)).collect()
        };
        let one = Sizes::planned(&items(&[("a", 10_000)]), &Policy::default());
        // (1.6449 + 0.8416) · √(0.05 / 10,000).
        assert!((one.pool.loss - 0.00556).abs() < 1e-5 && one.tasks["a"] == one.pool, "{one:?}");
        let two = Sizes::planned(&items(&[("a", 40), ("b", 40)]), &Policy::default());
        // (1.7507 + 0.8416) · √(0.05 / 80), and (2.5758 + 0.8416) · √(0.05 / 40).
        assert!((two.pool.loss - 0.06481).abs() < 1e-5 && (two.tasks["b"].loss - 0.12083).abs() < 1e-5, "{two:?}");
        assert_eq!(two.pool.n, 80);
    }
}
