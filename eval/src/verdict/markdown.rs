//! The verdict as a Markdown comment, for a pull request.

use super::decide::Verdict;
use super::record::{Endpoint, GateRecord, count, pp};

/// Items listed.
const FLIPS: usize = 10;

/// The record as Markdown.
pub fn markdown(r: &GateRecord) -> String {
    let mark = match r.verdict {
        Verdict::Pass => "✅",
        Verdict::Regression => "❌",
        Verdict::Inconclusive => "❔",
    };
    let mut out = format!("### {mark} Accuracy gate: {}\n\n{}.\n", r.verdict.name(), escape(&r.reason));
    if !r.provenance.model.is_empty() {
        let reference = r.provenance.reference.as_deref().unwrap_or("?");
        out.push_str(&format!("\n`{}` against `{}`.\n", r.provenance.model, reference));
    }
    if r.pool.is_some() {
        out.push_str("\n| | metric | items | reference | candidate | loss [95 %] | lost / gained | p (any loss) | finds | verdict |\n|---|---|--:|--:|--:|--:|--:|--:|--:|---|\n");
        let several = r.tasks.len() > 1;
        for e in r.pool.iter().filter(|_| several).chain(&r.tasks) {
            out.push_str(&row(e));
        }
    }
    if !r.thresholds.is_empty() {
        out.push_str("\n| | value [95 %] | limit | verdict |\n|---|--:|--:|---|\n");
        for t in &r.thresholds {
            out.push_str(&format!(
                "| {} | {:.5} {} | {} | {} |\n",
                escape(&t.name),
                t.value,
                t.range(5),
                t.limit.map_or("–".into(), |l| l.to_string()),
                t.verdict.map_or("–", Verdict::name)
            ));
        }
    }
    let lost: Vec<_> = r.flips.iter().filter(|f| f.candidate < f.reference).take(FLIPS).collect();
    if !lost.is_empty() {
        out.push_str("\n<details><summary>Items lost, furthest moved first</summary>\n\n| task | document | right | reference | candidate | nats moved |\n|---|--:|--:|--:|--:|--:|\n");
        let choice = |c: Option<usize>| c.map_or("–".into(), |c| c.to_string());
        for f in lost {
            let gold: Vec<String> = f.gold.iter().map(usize::to_string).collect();
            out.push_str(&format!(
                "| {} | {} | {} | {} | {} | {:.2} |\n",
                escape(&f.task),
                f.doc,
                gold.join(" "),
                choice(f.reference_choice),
                choice(f.candidate_choice),
                f.moved
            ));
        }
        out.push_str("\n</details>\n");
    }
    let p = &r.policy;
    out.push_str(&format!(
        "\nMargin {:.2} pp, error {:.0} %, power {:.0} %{}.\n",
        100.0 * p.margin,
        100.0 * p.alpha,
        100.0 * p.power,
        match p.look.fractions.len() {
            0 | 1 => String::new(),
            n => format!(", look {} of {n}", p.look.index + 1),
        }
    ));
    out
}

fn row(e: &Endpoint) -> String {
    let name = if e.name == "pool" { "**all**".into() } else { escape(&e.name) };
    format!(
        "| {name} | {} | {} | {:.4} | {:.4} | {} [{}, {}] | {} / {} | {:.2e} | {:.2} pp | {} |\n",
        escape(&e.metric),
        count(e.n),
        e.reference,
        e.candidate,
        pp(e.loss),
        pp(e.interval.0),
        pp(e.interval.1),
        count(e.losses),
        count(e.gains),
        e.p_loss,
        100.0 * e.detectable,
        e.verdict.name()
    )
}

fn escape(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace('\n', " ")
}
