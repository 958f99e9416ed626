//! What the page shows of serving load and capacity.

use lowbit_bench::capacity::plan::CapacityRecord;
use lowbit_bench::load::record::{LoadRecord, StageRecord};
use lowbit_bench::slo::Measure;
use lowbit_bench::slo::verdict::Verdict;
use serde_json::{Value, json};

use crate::chart_lines::{Frame, Line, Place, lines};
use crate::format::{self as f, NONE, count, sig};
use crate::svg::colour;
use crate::table::Table;
use crate::{Records, Variant};

/// A latency with a panel of its own: name in records, heading, the measure whose limits stand in it.
const PANELS: [(&str, &str, Measure); 2] = [
    ("ttft_ms", "Time to first token", Measure::Ttft),
    ("itl_request_mean_ms", "Inter-token latency, mean of a request", Measure::Itl),
];

/// Requests a second that were offered: asked for, or what a closed loop came to.
fn offered(s: &StageRecord) -> f64 {
    s.rate.unwrap_or(s.metrics.rates.requests_per_second)
}

/// Name of a series: the variant's, the file's, both.
fn series_name(variant: &str, file: &str) -> String {
    match (variant, file) {
        ("", "") => String::new(),
        (v, "") => v.to_owned(),
        ("", f) => f.to_owned(),
        (v, f) => format!("{v}, {f}"),
    }
}

/// Every load record with the name of its series.
fn all(variants: &[Variant]) -> Vec<(String, &LoadRecord)> {
    variants.iter().flat_map(|v| v.records.loads.iter().map(|(file, r)| (series_name(&v.name, file), r))).collect()
}

/// Stages that say something about the server, by offered rate.
fn stages(r: &LoadRecord) -> Vec<&StageRecord> {
    let mut out: Vec<&StageRecord> = r.valid().filter(|s| s.metrics.ok() > 0).collect();
    out.sort_by(|a, b| offered(a).total_cmp(&offered(b)));
    out
}

fn places(r: &LoadRecord, name: &str, q: f64) -> Vec<Place> {
    let of = |s: &&StageRecord| {
        let summary = s.metrics.latency.get(name)?;
        let p = summary.percentiles.iter().find(|p| (p.q - q).abs() < 1e-9)?;
        Some((offered(s), p.value?, p.low.zip(p.high)))
    };
    stages(r).iter().filter_map(of).collect()
}

/// Percentiles over the offered rate. One record: three percentiles; several: p95 of each (p50 where no stage supports p95).
fn curve(loads: &[(String, &LoadRecord)], (name, title, measure): (&str, &str, Measure)) -> Option<Value> {
    let drawn: Vec<Line> = match loads {
        [(_, only)] => [0.5, 0.95, 0.99]
            .iter()
            .enumerate()
            .map(|(i, q)| Line {
                name: format!("p{}", 100.0 * q),
                colour: colour(i),
                shape: i,
                places: places(only, name, *q),
            })
            .collect(),
        several => {
            let q = if several.iter().all(|l| !places(l.1, name, 0.95).is_empty()) { 0.95 } else { 0.5 };
            let line = |(i, (series, r)): (usize, &(String, &LoadRecord))| Line {
                name: format!("{series}, p{}", 100.0 * q),
                colour: colour(i),
                shape: i,
                places: places(r, name, q),
            };
            several.iter().enumerate().map(line).collect()
        }
    };
    let drawn: Vec<Line> = drawn.into_iter().filter(|l| !l.places.is_empty()).collect();
    let mut limits: Vec<(f64, String)> = Vec::new();
    for c in loads.iter().flat_map(|l| slo(l.1)).flat_map(|s| s.clauses.iter()).filter(|c| c.measure == measure) {
        let limit = (c.limit, format!("limit: {c}"));
        if !limits.contains(&limit) {
            limits.push(limit);
        }
    }
    let chart = lines(
        &drawn,
        &Frame {
            title: &format!("{title} over the offered load"),
            x: "requests offered a second",
            y: "ms (log scale)",
            limits: &limits,
            roof: None,
            log_x: false,
        },
    )?;
    Some(json!({ "title": title, "chart": chart }))
}

fn slo(r: &LoadRecord) -> Option<&lowbit_bench::slo::Slo> {
    r.find_max.as_ref().map(|f| &f.slo).or_else(|| r.stages.iter().find_map(|s| s.slo.as_ref().map(|v| &v.slo)))
}

fn told(v: Verdict) -> &'static str {
    match v {
        Verdict::Met => "✓ met",
        Verdict::Broken => "✗ broken",
        Verdict::Inconclusive => "? inconclusive",
    }
}

/// A row for each stage, those the client spoilt marked.
pub(crate) fn load_table(loads: &[(String, &LoadRecord)]) -> Table {
    let mut t = Table::new(
        "Stages",
        &[
            "Series",
            "Load",
            "#Requests",
            "#Failed",
            "#Requests/s",
            "#Output tokens/s",
            "#TTFT p50",
            "#TTFT p95",
            "#TTFT p99",
            "#ITL p50",
            "#ITL p95",
            "#ITL p99",
            "#Goodput/s",
            "Objective",
        ],
    );
    for (name, r) in loads {
        for s in &r.stages {
            let m = &s.metrics;
            let failed: u64 = m.outcomes.iter().filter(|o| o.0 != "ok" && o.0 != "cancelled").map(|o| o.1).sum();
            let load = match (s.rate, s.streams) {
                (Some(rate), _) => format!("{} {}/s", s.profile, sig(rate, 3)),
                (None, Some(n)) => format!("{} {n}", s.profile),
                (None, None) => s.profile.clone(),
            };
            let at = |name: &str, q: f64| m.percentile(name, q).map_or(NONE.to_owned(), |v| sig(v, 3)).into();
            let verdict = match (&s.slo, s.client.invalid.is_empty(), &s.saturation) {
                (_, false, _) => "invalid: the client was the limit".to_owned(),
                (Some(v), true, None) => told(v.verdict).to_owned(),
                (Some(_), true, Some(_)) => "✗ broken, saturated".to_owned(),
                (None, true, Some(_)) => "saturated".to_owned(),
                (None, true, None) => NONE.to_owned(),
            };
            t.row(vec![
                name.as_str().into(),
                load.into(),
                count(m.ok()).into(),
                count(failed).into(),
                sig(m.rates.requests_per_second, 3).into(),
                sig(m.rates.output_tokens_per_second, 3).into(),
                at("ttft_ms", 0.5),
                at("ttft_ms", 0.95),
                at("ttft_ms", 0.99),
                at("itl_request_mean_ms", 0.5),
                at("itl_request_mean_ms", 0.95),
                at("itl_request_mean_ms", 0.99),
                s.slo.as_ref().map_or(NONE.to_owned(), |v| sig(v.goodput_per_second, 3)).into(),
                verdict.into(),
            ]);
        }
    }
    t.without_empty_columns()
}

/// What `--find-max` came to.
fn found(name: &str, r: &LoadRecord) -> Option<String> {
    let f = r.find_max.as_ref()?;
    let who = if name.is_empty() { String::new() } else { format!("{name}: ") };
    let (what, unit) = (f.unit.what(), f.unit.name());
    let high = if f.bounded { format!("and {}", sig(f.high, 3)) } else { format!("and no {what} that failed") };
    Some(format!("{who}the highest {what} that meets {} lies between {} {high} {unit}.", f.slo.name, sig(f.low, 3)))
}

/// The section on serving; null without a load record.
pub(crate) fn serving(variants: &[Variant]) -> Value {
    let loads = all(variants);
    let Some((_, first)) = loads.first() else { return Value::Null };
    let panels: Vec<Value> = PANELS.iter().filter_map(|p| curve(&loads, *p)).collect();
    let found: Vec<String> = loads.iter().filter_map(|(name, r)| found(name, r)).collect();
    let objective = slo(first).map(|s| {
        let clauses: Vec<String> = s.clauses.iter().map(ToString::to_string).collect();
        let clauses = clauses.join(", ");
        if clauses == s.name { clauses } else { format!("{} ({clauses})", s.name) }
    });
    json!({
        "data": first.data,
        "server": f::short_name(&first.target.model),
        "several": loads.len() > 1,
        "objective": objective,
        "panels": panels,
        "found": found,
        "table": load_table(&loads),
    })
}

/// Servers and prices.
pub(crate) fn capacity_table(c: &CapacityRecord) -> Table {
    let mut t = Table::new(
        "Capacity",
        &[
            "Variant",
            "#Requests/s a server bears",
            "#Servers",
            "#$ an hour",
            "#$ per million output tokens",
            "#TTFT p50, ms",
            "Accuracy",
            "Usable",
        ],
    );
    for r in &c.variants {
        let number = |v: Option<f64>, digits| v.map_or(NONE.to_owned(), |v| sig(v, digits)).into();
        let usable = match (r.infeasible.is_empty(), c.best.as_ref() == Some(&r.name)) {
            (true, true) => "✓ cheapest".to_owned(),
            (true, false) => "✓".to_owned(),
            (false, _) => format!("✗ {}", r.infeasible.join("; ")),
        };
        t.row(vec![
            r.name.as_str().into(),
            number(r.rate, 3),
            r.servers.map_or(NONE.to_owned(), count).into(),
            number(r.dollars_per_hour, 3),
            number(r.dollars_per_million_output, 3),
            number(r.ttft_p50_ms, 3),
            r.accuracy.clone().unwrap_or_else(|| "not given".to_owned()).into(),
            usable.into(),
        ]);
    }
    t
}

/// What a plan was made for.
pub(crate) fn capacity_terms(c: &CapacityRecord) -> String {
    let o = &c.options;
    let slo = o.slo.as_ref().map_or("the records' objective".to_owned(), |s| s.name.clone());
    format!(
        "For a peak of {} requests/s, bursts {}×, servers loaded to {}, {} spare, {} GPU a server at {} $ an hour, objective {slo}.",
        sig(o.peak_rps, 3),
        sig(o.burst, 3),
        f::percent(o.headroom, 2),
        o.spare,
        o.gpus,
        sig(o.gpu_hour, 3)
    )
}

/// The section on capacity: one entry for each plan.
pub(crate) fn capacity(variants: &[Variant]) -> Vec<Value> {
    let plans = variants.iter().filter_map(|v| v.records.capacity.as_ref());
    plans.map(|c| json!({ "terms": capacity_terms(c), "table": capacity_table(c) })).collect()
}

/// The same for the short form.
pub(crate) fn loads_of(r: &Records) -> Vec<(String, &LoadRecord)> {
    r.loads.iter().map(|(file, l)| (series_name("", file), l)).collect()
}
