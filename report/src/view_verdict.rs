//! The verdict, and the tasks it rests on.

use lowbit_eval::record::EvalRecord;
use lowbit_eval::verdict::decide::Verdict;
use lowbit_eval::verdict::pairing::Flip;
use lowbit_eval::verdict::record::{Endpoint, GateRecord};
use serde_json::{Value, json};

use crate::chart_tasks::{Frame, Row, intervals};
use crate::format::{self as f, NONE, count, sig};
use crate::table::{Cell, Table};
use crate::{Records, Variant};

/// Items listed in each direction.
const FLIPS: usize = 10;

/// As a word with a mark, so that colour is not all that tells.
fn word(v: Verdict) -> (&'static str, &'static str) {
    match v {
        Verdict::Pass => ("Pass", "✓"),
        Verdict::Regression => ("Regression", "✗"),
        Verdict::Inconclusive => ("Inconclusive", "?"),
    }
}

/// The verdict in short; `not gated` without one.
pub(crate) fn name(r: &Records) -> &'static str {
    r.gate.as_ref().map_or("not gated", |g| g.verdict.name())
}

/// What would bring a verdict: why there is none, and the command.
fn not_gated(r: &Records) -> (&'static str, &'static str) {
    let compared = r.eval.as_ref().is_some_and(|e| e.provenance.reference.is_some());
    match &r.eval {
        Some(e) if compared && e.items.candidate.is_some() => {
            ("Tasks were scored with both models, and no verdict was asked for.", "lowbit gate eval.json -o gate.json")
        }
        Some(e) if e.kl.is_some() => (
            "No task was scored, so only a limit on drift can be judged.",
            "lowbit gate eval.json --max-kl NATS -o gate.json",
        ),
        Some(e) if e.perplexities.iter().any(|p| p.ratio.is_some()) => (
            "No task was scored, so only a limit on perplexity can be judged.",
            "lowbit gate eval.json --max-ppl-ratio RATIO -o gate.json",
        ),
        _ => (
            "Accuracy was not compared with the original's.",
            "lowbit eval MODEL --reference ORIGINAL --tasks arc_easy,hellaswag -o eval.json && lowbit gate eval.json -o gate.json",
        ),
    }
}

/// Margin, error and what else the verdict was asked with.
fn terms(g: &GateRecord) -> String {
    let p = &g.policy;
    let mut out = Vec::new();
    if g.pool.is_some() {
        out.push(format!("margin {} percentage points, error {}", sig(100.0 * p.margin, 3), f::percent(p.alpha, 2)));
    }
    out.extend(p.max_kl.map(|m| format!("mean KL at most {} nats/token", sig(m, 3))));
    out.extend(p.max_ppl_ratio.map(|m| format!("perplexity ratio at most {}", sig(m, 4))));
    if p.look.fractions.len() > 1 {
        out.push(format!("look {} of {}", p.look.index + 1, p.look.fractions.len()));
    }
    if let Some(reference) = g.provenance.reference.as_deref().filter(|n| !n.is_empty()) {
        out.push(format!("against {}", f::short_name(reference)));
    }
    out.join(", ")
}

/// With a capital and a full stop.
fn sentence(text: &str) -> String {
    let mut chars = text.trim_end_matches('.').chars();
    let first: String = chars.next().map(|c| c.to_uppercase().collect()).unwrap_or_default();
    format!("{first}{}{}", chars.as_str(), if text.is_empty() { "" } else { "." })
}

/// The banner.
pub(crate) fn banner(v: &Variant) -> Value {
    match &v.records.gate {
        Some(g) => {
            let (word, mark) = word(g.verdict);
            json!({
                "name": v.name, "kind": g.verdict.name(), "word": word, "mark": mark, "reason": sentence(&g.reason),
                "terms": terms(g), "command": "",
            })
        }
        None => {
            let (reason, command) = not_gated(&v.records);
            json!({
                "name": v.name, "kind": "none", "word": "Not gated", "mark": "–", "reason": reason, "terms": "",
                "command": command,
            })
        }
    }
}

fn label(e: &Endpoint) -> &str {
    if e.name == "pool" { "all items" } else { &e.name }
}

fn endpoints(g: &GateRecord) -> impl Iterator<Item = &Endpoint> {
    g.pool.iter().filter(|_| g.tasks.len() > 1).chain(&g.tasks)
}

/// Tasks as the gate saw them; `None` where it saw none.
pub(crate) fn gate_table(g: &GateRecord) -> Option<Table> {
    endpoints(g).next()?;
    let mut t = Table::new(
        "Tasks and their verdicts",
        &[
            "Task",
            "Metric",
            "#Items",
            "#Float",
            "#Quantized",
            "#Loss, pp [95 % CI]",
            "#Right → wrong",
            "#Wrong → right",
            "#p, any loss",
            "#Detectable, pp",
            "Verdict",
        ],
    );
    for e in endpoints(g) {
        let (_, mark) = word(e.verdict);
        let points = |share: f64| sig(100.0 * share, 3);
        t.row(vec![
            label(e).into(),
            if e.name == "pool" { NONE.into() } else { e.metric.as_str().into() },
            count(e.n).into(),
            sig(e.reference, 4).into(),
            sig(e.candidate, 4).into(),
            loss(e).into(),
            count(e.losses).into(),
            count(e.gains).into(),
            sig(e.p_loss, 2).into(),
            points(e.detectable).into(),
            format!("{mark} {}", e.verdict.name()).into(),
        ]);
    }
    Some(t)
}

/// Limits on drift; `None` where none was set.
pub(crate) fn limits_table(g: &GateRecord) -> Option<Table> {
    let limited: Vec<_> = g.thresholds.iter().filter(|t| t.limit.is_some()).collect();
    limited.first()?;
    let mut t = Table::new("Limits on drift", &["Figure", "#Value [95 % CI]", "#Limit", "Verdict"]);
    for l in limited {
        let verdict = l.verdict.map_or(NONE.to_owned(), |v| format!("{} {}", word(v).1, v.name()));
        t.row(vec![
            l.name.as_str().into(),
            format!("{} [{}]", sig(l.value, 4), f::range(l.interval.0, l.interval.1, 4)).into(),
            l.limit.map_or(NONE.into(), |v| sig(v, 4).into()),
            verdict.into(),
        ]);
    }
    Some(t)
}

/// Losses with their intervals against the margin.
fn chart(v: &Variant, g: &GateRecord) -> Option<String> {
    let rows: Vec<Row> = endpoints(g)
        .map(|e| {
            let (class, shape) = match e.verdict {
                Verdict::Pass => ("c4", 0),
                Verdict::Regression => ("c6", 1),
                Verdict::Inconclusive => ("c3", 2),
            };
            Row {
                label: label(e).to_owned(),
                value: (100.0 * e.loss, 100.0 * e.interval.0, 100.0 * e.interval.1),
                class,
                shape,
                note: e.verdict.name().to_owned(),
            }
        })
        .collect();
    let title = if v.name.is_empty() { "Loss by task".to_owned() } else { format!("Loss by task, {}", v.name) };
    let margin = 100.0 * g.policy.margin;
    let name = format!("margin {}", sig(margin, 3));
    intervals(
        &rows,
        &Frame {
            title: &title,
            axis: "loss of accuracy with its 95 % interval, percentage points",
            limit: (g.policy.margin > 0.0).then_some((margin, name.as_str())),
            wide: false,
        },
    )
}

fn flips_table(flips: &[&Flip], caption: &str) -> Option<Table> {
    flips.first()?;
    let choices = flips.iter().any(|f| f.reference_choice.is_some());
    let heads: &[&str] = if choices {
        &["Task", "#Document", "#Right choice", "#Float chose", "#Quantized chose", "#Moved, nats"]
    } else {
        &["Task", "#Document", "#Float scored", "#Quantized scored", "#Moved, nats"]
    };
    let mut t = Table::new(caption, heads);
    for flip in flips.iter().take(FLIPS) {
        let mut row: Vec<Cell> = vec![flip.task.as_str().into(), flip.doc.to_string().into()];
        if choices {
            let gold: Vec<String> = flip.gold.iter().map(usize::to_string).collect();
            let choice = |c: Option<usize>| c.map_or(NONE.to_owned(), |c| c.to_string());
            row.push(if gold.is_empty() { NONE.into() } else { gold.join(" ").into() });
            row.push(choice(flip.reference_choice).into());
            row.push(choice(flip.candidate_choice).into());
        } else {
            row.extend([sig(flip.reference, 3).into(), sig(flip.candidate, 3).into()]);
        }
        row.push(sig(flip.moved, 3).into());
        t.row(row);
    }
    Some(t)
}

/// Metrics of the evaluation itself; groups of many tasks by their group. `None` without tasks.
pub(crate) fn scores_table(e: &EvalRecord) -> Option<Table> {
    let hidden = |label: &str| e.families.values().any(|m| m.len() > 5 && m.iter().any(|l| l == label));
    let mut t = Table::new(
        "Every metric of the tasks",
        &["Task", "#Items", "#Shots", "Metric", "#Float", "#Quantized ± standard error", "#Quantized − float"],
    );
    for (name, task) in e.tasks.iter().filter(|(_, t)| !hidden(&t.label)) {
        for (metric, value) in task.metrics.iter().filter(|m| task.higher_is_better.contains_key(m.0)) {
            let (own, filter) = match metric.split_once(',') {
                Some((own, filter)) => (own, format!(",{filter}")),
                None => (metric.as_str(), String::new()),
            };
            let error = task.metrics.get(&format!("{own}_stderr{filter}"));
            let error = error.map_or(String::new(), |s| format!(" ± {}", sig(*s, 2)));
            t.row(vec![
                f::short_name(name).into(),
                count(task.n as u64).into(),
                task.num_fewshot.map_or(NONE.into(), |n| n.to_string().into()),
                metric.as_str().into(),
                task.reference.get(metric).map_or(NONE.into(), |v| sig(*v, 4).into()),
                format!("{}{error}", sig(*value, 4)).into(),
                task.delta.get(metric).map_or(NONE.into(), |d| sig(*d, 3).into()),
            ]);
        }
    }
    (!t.is_empty()).then_some(t)
}

/// The section on tasks: one entry for each variant that has any.
pub(crate) fn tasks(variants: &[Variant]) -> Vec<Value> {
    let mut out = Vec::new();
    for v in variants {
        let g = v.records.gate.as_ref();
        let scores = v.records.eval.as_ref().and_then(scores_table);
        let judged = g.and_then(gate_table);
        let limits = g.and_then(limits_table);
        if judged.is_none() && scores.is_none() && limits.is_none() {
            continue;
        }
        let (mut lost, mut gained) = (Vec::new(), Vec::new());
        for flip in g.iter().flat_map(|g| &g.flips) {
            if flip.candidate < flip.reference { lost.push(flip) } else { gained.push(flip) }
        }
        let drift =
            v.records.eval.as_ref().and_then(|e| e.task_drift.values().max_by(|a, b| a.mean.total_cmp(&b.mean)));
        out.push(json!({
            "name": v.name,
            "chart": g.filter(|_| judged.is_some()).and_then(|g| chart(v, g)),
            "judged": judged,
            "limits": limits,
            "scores": scores,
            "lost": flips_table(&lost, "Items lost, furthest moved first"),
            "gained": flips_table(&gained, "Items gained"),
            "lost_count": count(lost.len() as u64),
            "gained_count": count(gained.len() as u64),
            "drift": drift.map(|d| format!("{} nats/token on {}", sig(d.mean, 3), f::short_name(&d.task))),
        }));
    }
    out
}

/// A loss with its interval, percentage points.
fn loss(e: &Endpoint) -> String {
    let points = |share: f64| sig(100.0 * share, 3);
    format!("{} [{}, {}]", points(e.loss), points(e.interval.0), points(e.interval.1))
}

/// The loss over all items.
pub(crate) fn pooled(r: &Records) -> Option<String> {
    r.gate.as_ref()?.pool.as_ref().map(loss)
}
