//! `gate.json`.

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use super::decide::{Policy, Verdict};
use super::pairing::Flip;
use crate::record::Interval;

/// Format of the record.
pub const SCHEMA: u32 = 1;

/// One task, or all of them. Losses are shares of items, reference less candidate: positive where the candidate is worse.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Task or group; `pool` for all items together.
    pub name: String,
    /// Metric.
    pub metric: String,
    /// Pairs.
    pub n: u64,
    /// Pairs left out, because a judge's verdict on them is missing.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unjudged: u64,
    /// Independent units among them.
    pub clusters: u64,
    /// The reference's mean.
    pub reference: f64,
    /// The candidate's.
    pub candidate: f64,
    /// Mean loss.
    pub loss: f64,
    /// Its 95 % confidence interval, this task by itself.
    pub interval: (f64, f64),
    /// One-sided lower bound of the loss at level alpha.
    pub lower: f64,
    /// One-sided upper bound at level alpha: a pass is when it is below the margin.
    pub upper: f64,
    /// Pairs that got worse.
    pub losses: u64,
    /// Pairs that got better.
    pub gains: u64,
    /// Share of pairs that changed.
    pub flips: f64,
    /// Test of "no loss".
    pub test: String,
    /// Its p-value, one-sided.
    pub p_loss: f64,
    /// P-value of "the loss is at most the margin".
    pub p_margin: f64,
    /// The same, adjusted by Holm across tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p_adjusted: Option<f64>,
    /// Smallest loss this many pairs show with the policy's power, at the level this row is tested at.
    pub detectable: f64,
    /// Pairs that would decide, were the true loss the one seen; none where it is all but the margin.
    pub needed: Option<u64>,
    /// Of a task, `inconclusive` holds nothing up.
    pub verdict: Verdict,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A figure with a clustered 95 % interval beside a limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Threshold {
    /// `KL`, `perplexity gptq-2048`, `perplexity wikitext`.
    pub name: String,
    /// Value.
    pub value: f64,
    /// Its interval.
    pub interval: (f64, f64),
    /// Largest value accepted; without one it only informs.
    pub limit: Option<f64>,
    /// Where there is a limit.
    pub verdict: Option<Verdict>,
}

impl Threshold {
    /// The interval as text; see [`Interval::range`].
    pub fn range(&self, digits: usize) -> String {
        Interval { value: self.value, low: self.interval.0, high: self.interval.1 }.range(digits)
    }

    /// Pass where the interval ends below the limit, regression where it begins above it.
    pub fn new(name: String, value: f64, interval: (f64, f64), limit: Option<f64>) -> Self {
        let verdict = limit.map(|limit| match interval {
            (_, high) if high <= limit => Verdict::Pass,
            (low, _) if low > limit => Verdict::Regression,
            _ => Verdict::Inconclusive,
        });
        Self { name, value, interval, limit, verdict }
    }
}

/// What `lowbit gate` writes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GateRecord {
    /// Format.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// `pass`, `regression`, `inconclusive`.
    pub verdict: Verdict,
    /// In words.
    pub reason: String,
    /// Where it came from; model and reference are those of the eval records.
    pub provenance: Provenance,
    /// What was asked.
    pub policy: Policy,
    /// All items together.
    pub pool: Option<Endpoint>,
    /// Each task.
    pub tasks: Vec<Endpoint>,
    /// KL and perplexity.
    pub thresholds: Vec<Threshold>,
    /// Items that changed, worst first.
    pub flips: Vec<Flip>,
}

impl Default for GateRecord {
    fn default() -> Self {
        Self {
            schema: SCHEMA,
            verdict: Verdict::Inconclusive,
            reason: String::new(),
            provenance: Provenance::default(),
            policy: Policy::default(),
            pool: None,
            tasks: Vec::new(),
            thresholds: Vec::new(),
            flips: Vec::new(),
        }
    }
}

/// Percentage points.
pub fn pp(share: f64) -> String {
    format!("{:+.2} pp", 100.0 * share)
}

/// A count in groups of three digits.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

impl GateRecord {
    /// One sentence that says why.
    pub fn explain(&self) -> String {
        let margin = format!("{:.2} pp", 100.0 * self.policy.margin);
        let mut parts = Vec::new();
        let broken: Vec<&Endpoint> = self.tasks.iter().filter(|t| t.verdict == Verdict::Regression).collect();
        if let Some(p) = &self.pool {
            let seen = format!("loss {} over {} items", pp(p.loss), count(p.n));
            match p.verdict {
                Verdict::Pass => {
                    let shown = if p.p_loss <= self.policy.alpha {
                        format!("; that something is lost is shown (p = {:.2e})", p.p_loss)
                    } else {
                        String::new()
                    };
                    parts.push(format!("{seen}, at most {} and below the margin of {margin}{shown}", pp(p.upper)));
                }
                Verdict::Regression => {
                    parts.push(format!("{seen}, beyond the margin of {margin}, p = {:.2e}", p.p_margin))
                }
                Verdict::Inconclusive => parts.push(format!(
                    "{seen}, between {} and {}: the margin of {margin} lies inside; {}",
                    pp(p.lower),
                    pp(p.upper),
                    match p.needed {
                        Some(n) =>
                            format!("about {} items would decide, were this the true loss", count(n.max(p.n + 1))),
                        None => "the loss seen is all but the margin, and no number of items decides".into(),
                    }
                )),
            }
        }
        if self.tasks.len() > 1 {
            for t in broken {
                let p = t.p_adjusted.unwrap_or(t.p_margin);
                parts.push(format!("{}: loss {} in {} items, adjusted p = {p:.2e}", t.name, pp(t.loss), count(t.n)));
            }
        }
        let unjudged: u64 = self.tasks.iter().map(|t| t.unjudged).sum();
        if unjudged > 0 {
            parts.push(format!("{} items without a judge's verdict are left out", count(unjudged)));
        }
        for t in self.thresholds.iter().filter(|t| !matches!(t.verdict, None | Some(Verdict::Pass))) {
            let limit = t.limit.unwrap_or(f64::NAN);
            parts.push(format!("{} {:.4} {}, limit {limit}", t.name, t.value, t.range(4)));
        }
        parts.join("; ")
    }
}
