//! The gate on made-up pairs: how often it says what, when the truth is known.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Binomial, Distribution};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::decide::{Levels, Policy, Verdict, decide};
use super::evidence::Evidence;
use super::mcnemar;
use super::sequential::Look;

/// What is true.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// Pairs of each task.
    pub tasks: Vec<u64>,
    /// Share of pairs that change.
    pub discordant: f64,
    /// True loss, as a share of items; at most `discordant`.
    pub loss: f64,
    /// Looks at equal steps, a stop at the first verdict; 1 for a single test at the end.
    pub looks: usize,
    /// Simulated evaluations.
    pub runs: u64,
    /// Seed.
    pub seed: u64,
}

/// How often.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Runs called a regression.
    pub regression: f64,
    /// Runs passed.
    pub pass: f64,
    /// Runs without a verdict.
    pub inconclusive: f64,
    /// Runs whose pooled loss is shown at the policy's alpha by McNemar's test at the end of the run.
    pub loss_shown: f64,
    /// Mean share of the pairs that were looked at.
    pub pairs_used: f64,
}

/// Shares of `looks` equal steps.
pub fn equal_steps(looks: usize) -> Vec<f64> {
    let looks = looks.max(1);
    (1..=looks).map(|k| k as f64 / looks as f64).collect()
}

/// Runs the gate's own decision on simulated tables; the same seed gives the same rates on any number of threads.
pub fn simulate(scenario: &Scenario, policy: &Policy) -> Rates {
    let fractions = equal_steps(scenario.looks);
    let levels: Vec<Levels> =
        (0..fractions.len()).map(|index| Levels::at(Look { fractions: fractions.clone(), index })).collect();
    let lost = (0.5 * (scenario.discordant + scenario.loss)).clamp(0.0, 1.0);
    let gained = (0.5 * (scenario.discordant - scenario.loss)).clamp(0.0, 1.0 - lost);
    let one = |run: u64| -> (Verdict, bool, f64) {
        let mut random = StdRng::seed_from_u64(scenario.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(run));
        let mut draw = |n: u64, p: f64| Binomial::new(n, p).map_or(0, |b| b.sample(&mut random));
        let mut tables = vec![(0u64, 0u64, 0u64); scenario.tasks.len()];
        let mut last = (Verdict::Inconclusive, false, 1.0);
        for (fraction, levels) in fractions.iter().zip(&levels) {
            for (table, &n) in tables.iter_mut().zip(&scenario.tasks) {
                let upto = (n as f64 * fraction).round() as u64;
                let fresh = upto - table.0;
                let b = draw(fresh, lost);
                let c = draw(fresh - b, if lost < 1.0 { (gained / (1.0 - lost)).min(1.0) } else { 0.0 });
                *table = (upto, table.1 + b, table.2 + c);
            }
            let evidence: Vec<Evidence> = tables.iter().map(|&(n, b, c)| Evidence::table(n, b, c)).collect();
            let (b, c) = tables.iter().fold((0, 0), |s, t| (s.0 + t.1, s.1 + t.2));
            let verdict = decide(&evidence, policy, levels).verdict;
            last = (verdict, mcnemar::loss(b, c) <= policy.alpha, *fraction);
            if verdict != Verdict::Inconclusive {
                break;
            }
        }
        last
    };
    let ends: Vec<(Verdict, bool, f64)> = (0..scenario.runs).into_par_iter().map(one).collect();
    let runs = scenario.runs.max(1) as f64;
    let share = |f: &dyn Fn(&(Verdict, bool, f64)) -> bool| ends.iter().filter(|e| f(e)).count() as f64 / runs;
    Rates {
        regression: share(&|e| e.0 == Verdict::Regression),
        pass: share(&|e| e.0 == Verdict::Pass),
        inconclusive: share(&|e| e.0 == Verdict::Inconclusive),
        loss_shown: share(&|e| e.1),
        pairs_used: ends.iter().map(|e| e.2).sum::<f64>() / runs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(tasks: &[u64], loss: f64, margin: f64, looks: usize) -> Rates {
        let scenario = Scenario { tasks: tasks.to_vec(), discordant: 0.05, loss, looks, runs: 10_000, seed: 11 };
        simulate(&scenario, &Policy { margin, ..Policy::default() })
    }

    /// Three standard errors of a share of 10,000 runs.
    const SLACK: f64 = 0.0066;

    #[test]
    fn three_tenths_of_a_point_are_found_in_forty_thousand_pairs() {
        for (tasks, looks) in [(&[40_000][..], 1), (&[40_000], 4), (&[10_000, 14_000, 5_000, 11_000], 1)] {
            let found = rates(tasks, 0.003, 0.0, looks);
            assert!(found.regression >= 0.80, "{tasks:?} {looks} looks: {found:?}");
            let alarms = rates(tasks, 0.0, 0.0, looks);
            assert!(alarms.regression <= 0.05 + SLACK, "{tasks:?} {looks} looks: {alarms:?}");
            // Neither is it far below: the error is there to be spent.
            assert!(alarms.regression >= 0.025, "{tasks:?} {looks} looks: {alarms:?}");
        }
    }

    #[test]
    fn a_loss_on_the_margin_is_neither_passed_nor_flagged_too_often() {
        for (tasks, looks) in [(&[4_000][..], 1), (&[4_000], 4), (&[2_000, 500, 1_500], 1), (&[2_000, 500, 1_500], 3)] {
            let on = rates(tasks, 0.01, 0.01, looks);
            assert!(on.regression <= 0.05 + SLACK && on.pass <= 0.05 + SLACK, "{tasks:?} {looks} looks: {on:?}");
        }
    }

    #[test]
    fn looks_save_pairs() {
        let one = rates(&[20_000], 0.0, 0.01, 1);
        let five = rates(&[20_000], 0.0, 0.01, 5);
        assert!(five.pass > 0.99 * one.pass && five.pairs_used < 0.6, "{one:?} {five:?}");
        assert_eq!(rates(&[20_000], 0.0, 0.01, 5), five);
    }
}
