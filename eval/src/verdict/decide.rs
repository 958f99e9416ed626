//! From evidence to a verdict.

use std::collections::HashMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::evidence::Evidence;
use super::record::{Endpoint, GateRecord, Threshold};
use super::{holm, pairing, power, sequential::Look};

/// Share of the error that goes to the pool where there are several tasks; the rest is Holm's, across the tasks.
pub const POOL_SHARE: f64 = 0.8;

/// Level of the test of all items, where there are so many tasks: a single one has all of `alpha`.
pub fn pool_level(tasks: usize, alpha: f64) -> f64 {
    if tasks <= 1 { alpha } else { POOL_SHARE * alpha }
}

/// Level at which a task is found whatever the others show: Holm's first step.
pub fn task_level(tasks: usize, alpha: f64) -> f64 {
    if tasks <= 1 { alpha } else { (1.0 - POOL_SHARE) * alpha / tasks as f64 }
}

/// The three answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The loss is shown to be smaller than the margin.
    Pass,
    /// The loss is shown to be larger.
    Regression,
    /// Neither.
    Inconclusive,
}

impl Verdict {
    /// As in records.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Regression => "regression",
            Verdict::Inconclusive => "inconclusive",
        }
    }

    /// 0, 1, 2.
    pub fn exit_code(self) -> u8 {
        match self {
            Verdict::Pass => 0,
            Verdict::Regression => 1,
            Verdict::Inconclusive => 2,
        }
    }
}

/// What counts as a regression, and how sure one wants to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Largest loss that is accepted, as a share of items.
    pub margin: f64,
    /// Probability of calling a loss up to the margin a regression, all tests together; and of passing one beyond it.
    pub alpha: f64,
    /// Probability of a decision that sizes are stated for.
    pub power: f64,
    /// Largest mean KL(reference ‖ candidate), nats a token.
    pub max_kl: Option<f64>,
    /// Largest ratio of perplexities, candidate over reference.
    pub max_ppl_ratio: Option<f64>,
    /// Draws of a permutation test.
    pub draws: usize,
    /// Seed of those.
    pub seed: u64,
    /// Which look of how many.
    pub look: Look,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            margin: 0.01,
            alpha: 0.05,
            power: 0.8,
            max_kl: None,
            max_ppl_ratio: None,
            draws: 100_000,
            seed: 0,
            look: Look::single(),
        }
    }
}

/// Levels of the tests at one look; the recursion behind each is run once.
#[derive(Debug)]
pub struct Levels {
    look: Look,
    known: Mutex<HashMap<u64, f64>>,
}

impl Levels {
    /// At a look.
    pub fn at(look: Look) -> Self {
        Self { look, known: Mutex::default() }
    }

    /// Level of a test whose error over all looks is `alpha`.
    pub fn level(&self, alpha: f64) -> f64 {
        let found = self.known.lock().ok().and_then(|k| k.get(&alpha.to_bits()).copied());
        found.unwrap_or_else(|| {
            let level = self.look.level(alpha);
            if let Ok(mut known) = self.known.lock() {
                known.insert(alpha.to_bits(), level);
            }
            level
        })
    }
}

/// What decides, without what only informs.
#[derive(Clone, Debug, PartialEq)]
pub struct Core {
    /// Over pool and tasks.
    pub verdict: Verdict,
    /// The pool's own.
    pub pool: Verdict,
    /// P-value of "the pool's loss is at most the margin".
    pub pool_p: f64,
    /// P-values of "the task's loss is at most the margin"; empty for a single task, which the pool is.
    pub task_p: Vec<f64>,
    /// Tasks whose own loss is a regression.
    pub rejected: Vec<bool>,
}

/// Applies a policy.
///
/// Regression: the pool's loss exceeds the margin at 0.8·alpha, or a task's at 0.2·alpha by Holm; a single task has all of
/// alpha. So a loss up to the margin in every task is called a regression with probability alpha at most. Pass: no
/// regression, and the pool's upper bound at level alpha is below the margin.
pub fn decide(tasks: &[Evidence], policy: &Policy, levels: &Levels) -> Core {
    let pool = Evidence::pool(tasks);
    let single = tasks.len() <= 1;
    let p = |e: &Evidence| e.p_above(policy.margin, policy.draws, policy.seed);
    let pool_p = p(&pool);
    let task_p: Vec<f64> = if single { Vec::new() } else { tasks.iter().map(p).collect() };
    let rejected = holm::rejected(&task_p, (1.0 - POOL_SHARE) * policy.alpha, &|a| levels.level(a));
    let below = |e: &Evidence| e.bounds(levels.level(policy.alpha)).1 < policy.margin;
    let of_pool = match pool_p <= levels.level(pool_level(tasks.len(), policy.alpha)) {
        true => Verdict::Regression,
        false if below(&pool) => Verdict::Pass,
        false => Verdict::Inconclusive,
    };
    let verdict = if rejected.contains(&true) { Verdict::Regression } else { of_pool };
    Core { verdict, pool: of_pool, pool_p, task_p, rejected }
}

/// The whole record of paired items; thresholds on KL and perplexity come with `thresholds`.
pub fn judge(paired: &pairing::Paired, policy: &Policy, thresholds: Vec<Threshold>) -> GateRecord {
    let levels = Levels::at(policy.look.clone());
    let evidence: Vec<Evidence> = paired.series.iter().map(pairing::Series::evidence).collect();
    let core = decide(&evidence, policy, &levels);
    let single = evidence.len() <= 1;
    let adjusted = holm::adjusted(&core.task_p);
    // `tested` is the level at which a loss of it would count.
    let endpoint = |name: &str, metric: &str, e: &Evidence, means: (f64, f64), unjudged: usize, tested: f64| {
        let (low, high) = e.bounds(0.025);
        let alpha = levels.level(policy.alpha);
        let bounds = e.bounds(alpha);
        Endpoint {
            name: name.into(),
            metric: metric.into(),
            n: e.n,
            unjudged: unjudged as u64,
            clusters: e.clusters(),
            reference: means.0,
            candidate: means.1,
            loss: e.loss(),
            interval: (low, high),
            lower: bounds.0,
            upper: bounds.1,
            losses: e.losses,
            gains: e.gains,
            flips: e.flips(),
            test: e.test().into(),
            p_loss: e.p_loss(policy.draws, policy.seed),
            p_margin: e.p_above(policy.margin, policy.draws, policy.seed),
            p_adjusted: None,
            detectable: {
                let variance = e.variance().max(1.0 / e.n.max(1) as f64);
                power::detectable(e.n, variance, levels.level(tested), policy.power)
            },
            needed: power::needed(e.loss(), policy.margin, e.variance(), policy.alpha, policy.power),
            verdict: if bounds.1 < policy.margin { Verdict::Pass } else { Verdict::Inconclusive },
        }
    };
    let mut tasks: Vec<Endpoint> = Vec::new();
    for (i, (series, e)) in paired.series.iter().zip(&evidence).enumerate() {
        let tested = task_level(evidence.len(), policy.alpha);
        let mut own = endpoint(&series.name, &series.metric, e, series.means(), series.unjudged, tested);
        own.p_adjusted = adjusted.get(i).copied();
        if core.rejected.get(i) == Some(&true) || (single && core.pool == Verdict::Regression) {
            own.verdict = Verdict::Regression;
        }
        tasks.push(own);
    }
    let pool = (!evidence.is_empty()).then(|| {
        let all = Evidence::pool(&evidence);
        let metric = if single { tasks[0].metric.clone() } else { "all items".into() };
        let unjudged = paired.series.iter().map(|s| s.unjudged).sum();
        let tested = pool_level(evidence.len(), policy.alpha);
        let mut pool = endpoint("pool", &metric, &all, paired.means(), unjudged, tested);
        pool.verdict = core.pool;
        pool
    });
    let parts: Vec<Verdict> =
        pool.iter().map(|_| core.verdict).chain(thresholds.iter().filter_map(|t| t.verdict)).collect();
    let verdict = if parts.contains(&Verdict::Regression) {
        Verdict::Regression
    } else if parts.is_empty() || parts.contains(&Verdict::Inconclusive) {
        Verdict::Inconclusive
    } else {
        Verdict::Pass
    };
    let mut out = GateRecord {
        schema: super::record::SCHEMA,
        verdict,
        policy: policy.clone(),
        pool,
        tasks,
        thresholds,
        flips: paired.flips.clone(),
        ..GateRecord::default()
    };
    out.reason = out.explain();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(tables: &[(u64, u64, u64)], margin: f64) -> Core {
        let tasks: Vec<Evidence> = tables.iter().map(|&(n, b, c)| Evidence::table(n, b, c)).collect();
        decide(&tasks, &Policy { margin, ..Policy::default() }, &Levels::at(Look::single()))
    }

    #[test]
    fn three_answers() {
        assert_eq!(verdict(&[(4000, 20, 18)], 0.01).verdict, Verdict::Pass);
        assert_eq!(verdict(&[(4000, 200, 20)], 0.01).verdict, Verdict::Regression);
        assert_eq!(verdict(&[(200, 4, 3)], 0.01).verdict, Verdict::Inconclusive);
        assert_eq!(verdict(&[], 0.01).verdict, Verdict::Inconclusive);
    }

    #[test]
    fn errors_add_up_to_alpha() {
        assert_eq!((pool_level(1, 0.05), task_level(1, 0.05)), (0.05, 0.05));
        for tasks in [2, 5, 57] {
            let sum = pool_level(tasks, 0.05) + tasks as f64 * task_level(tasks, 0.05);
            assert!((sum - 0.05).abs() < 1e-12, "{tasks}: {sum}");
        }
    }

    #[test]
    fn one_broken_task_is_not_hidden_by_the_others() {
        // 58 of 1,319 lost in one task, nothing elsewhere: the pool's mean is 0.4 pp.
        let core = verdict(&[(1319, 70, 12), (12_000, 60, 60)], 0.01);
        assert_eq!((core.pool, core.verdict, core.rejected), (Verdict::Pass, Verdict::Regression, vec![true, false]));
    }

    #[test]
    fn a_significant_loss_within_the_margin_passes() {
        let core = verdict(&[(56_227, 958, 824)], 0.005);
        assert_eq!(core.verdict, Verdict::Pass);
        assert_eq!(verdict(&[(56_227, 958, 824)], 0.0).verdict, Verdict::Regression);
    }
}
