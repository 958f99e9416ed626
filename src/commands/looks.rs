//! `lowbit eval --until-decided`: the verdict looked at while the run goes on.

use std::collections::HashMap;

use anyhow::{Result, bail};
use lowbit_checkpoint::hash::sha256_hex;
use lowbit_eval::engine::Answer;
use lowbit_eval::tasks::{Plan, Suite};
use lowbit_eval::verdict::decide::{Levels, Policy, Verdict, decide};
use lowbit_eval::verdict::pairing::Series;
use lowbit_eval::verdict::record::{count, pp};
use lowbit_eval::verdict::{Evidence, Look, PairingOptions, pair};

use crate::commands::gate::default_margin;
use crate::commands::scores::{Answered, score};
use crate::context::Context;

/// How often, and for what margin.
pub struct Looks {
    /// Looks at most.
    pub count: usize,
    margin: Option<f64>,
}

impl Looks {
    /// `margin` in percentage points.
    pub fn new(count: usize, margin: Option<f64>) -> Result<Self> {
        if !(2..=50).contains(&count) {
            bail!("--looks is between 2 and 50, found {count}");
        }
        if let Some(m) = margin.filter(|m| !(0.0..=100.0).contains(m)) {
            bail!("--margin is in percentage points between 0 and 100, found {m}");
        }
        Ok(Self { count, margin })
    }

    /// Answers parts of the plan, each with those before, until the gate's decision is clear or all is answered.
    pub fn run(
        &self,
        ctx: &Context,
        suite: &Suite,
        plan: &Plan,
        bits: Option<u32>,
        answer: &mut dyn FnMut(&Plan) -> Result<Vec<Answer>>,
    ) -> Result<Answered> {
        let stages = stages(suite, plan, self.count);
        let parts: Vec<Plan> =
            (0..self.count).map(|k| plan.part(|d| stages.get(&(d.task, d.doc)).is_some_and(|s| *s <= k))).collect();
        let fractions: Vec<f64> = parts.iter().map(|p| p.len() as f64 / plan.len().max(1) as f64).collect();
        let margin = self.margin.unwrap_or_else(|| default_margin(bits));
        let last = self.count - 1;
        for (index, part) in parts.into_iter().enumerate() {
            let answers = answer(&part)?;
            let look = Look { fractions: fractions.clone(), index };
            let scored = score(suite, &part, &answers, None)?;
            let Some(reference) = &scored.reference else { bail!("--until-decided compares with a reference") };
            let options = PairingOptions { families: scored.families.clone(), ..PairingOptions::default() };
            let paired = pair(&scored.candidate.items, &reference.items, &options)?;
            let evidence: Vec<Evidence> = paired.series.iter().map(Series::evidence).collect();
            let policy = Policy { margin: margin / 100.0, look: look.clone(), ..Policy::default() };
            let core = decide(&evidence, &policy, &Levels::at(look.clone()));
            let loss = Evidence::pool(&evidence).loss();
            ctx.say(format!(
                "look {} of {}: {} items, loss {}: {}",
                index + 1,
                self.count,
                count(part.len() as u64),
                pp(loss),
                core.verdict.name()
            ));
            if core.verdict != Verdict::Inconclusive || index == last {
                return Ok(Answered { answers, plan: part, look: Some(look), seconds: 0.0 });
            }
        }
        bail!("no look was taken")
    }
}

/// The look at which each document is first there. Documents of a task come in the order of a hash, so that every look sees a random part
/// of each task, the same in every run.
fn stages(suite: &Suite, plan: &Plan, looks: usize) -> HashMap<(usize, usize), usize> {
    let mut by_task: HashMap<usize, Vec<(String, usize)>> = HashMap::new();
    for span in plan.spans() {
        let label = suite.tasks.get(span.task).map_or("", |t| t.label.as_str());
        let hash = sha256_hex(format!("{label}\n{}", span.doc).as_bytes());
        by_task.entry(span.task).or_default().push((hash, span.doc));
    }
    let mut out = HashMap::new();
    for (task, mut docs) in by_task {
        docs.sort();
        let n = docs.len();
        for (rank, (_, doc)) in docs.into_iter().enumerate() {
            let stage = rank * looks / n;
            out.insert((task, doc), stage);
        }
    }
    out
}
