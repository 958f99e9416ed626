//! Load records as text, by our own definitions, and as CSV.

use lowbit_bench::load::percentile::{Percentile, QUANTILES, Summary};
use lowbit_bench::load::record::{LoadRecord, StageRecord};
use serde_json::Value;

use crate::commands::table::table;

fn at(s: &StageRecord, name: &str, q: f64) -> String {
    s.metrics.percentile(name, q).map_or("–".into(), |v| format!("{v:.1}"))
}

fn load_of(s: &StageRecord) -> String {
    match (s.rate, s.streams) {
        (Some(r), _) => format!("{} {r:.2}/s", s.profile),
        (_, Some(n)) => format!("{} {n}", s.profile),
        _ => s.profile.clone(),
    }
}

/// Everything but the raw samples.
pub fn without_samples(r: &LoadRecord) -> Value {
    let mut v = serde_json::to_value(r).unwrap_or(Value::Null);
    for stage in v.get_mut("stages").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(map) = stage.as_object_mut() {
            map.remove("requests");
        }
    }
    v
}

/// The result as text.
pub fn summary(r: &LoadRecord) -> String {
    let rates: Vec<Vec<String>> = r
        .stages
        .iter()
        .map(|s| {
            let m = &s.metrics;
            let failed: u64 = m.outcomes.iter().filter(|o| o.0 != "ok" && o.0 != "cancelled").map(|o| o.1).sum();
            vec![
                load_of(s),
                m.ok().to_string(),
                failed.to_string(),
                format!("{:.2}", m.rates.requests_per_second),
                format!("{:.1}", m.rates.output_tokens_per_second),
                format!("{:.1}", m.rates.mean_concurrency),
            ]
        })
        .collect();
    let latencies: Vec<Vec<String>> = r
        .stages
        .iter()
        .map(|s| {
            let names = ["ttft_ms", "itl_request_mean_ms", "e2e_ms"];
            let both = names.iter().flat_map(|name| [at(s, name, 0.5), at(s, name, 0.99)]);
            std::iter::once(load_of(s)).chain(both).collect()
        })
        .collect();
    let mut out = vec![
        table(&["load", "ok", "failed", "req/s", "out tok/s", "in flight"], &rates),
        String::new(),
        table(&["load", "TTFT p50", "p99", "ITL p50", "p99", "E2E p50", "p99"], &latencies),
    ];
    out.push(
        "ms; TTFT and E2E from the scheduled start, ITL the mean of a request; – where the sample is too small".into(),
    );
    for s in &r.stages {
        out.push(format!(
            "\n{} ({:.1} s, ended by {}; tokens counted by {})",
            load_of(s),
            s.seconds,
            s.stopped_by,
            s.metrics.counted_by
        ));
        let lines: Vec<Vec<String>> = s.metrics.latency.iter().map(|(name, v)| line(name, v)).collect();
        out.push(table(&["", "n", "mean", "p50 [95 % CI]", "p90", "p95", "p99 [95 % CI]", "p99.9"], &lines));
        if let Some(why) = &s.metrics.itl_token_missing {
            out.push(format!("no itl_token_ms: {why}"));
        }
        let bad: Vec<String> =
            s.metrics.outcomes.iter().filter(|o| o.0 != "ok").map(|o| format!("{} {}", o.1, o.0)).collect();
        if !bad.is_empty() {
            out.push(format!("not ok: {}", bad.join(", ")));
        }
        if s.rejected > 0 {
            out.push(format!("{} refusals waited out and sent again, their wait counted", s.rejected));
        }
        if let Some(a) = &s.saturation {
            out.push(format!(
                "saturated: the backlog grows by {:.2} requests/s since {:.1} s",
                a.growth_per_second,
                a.since_ns as f64 * 1e-9
            ));
        }
        let cpu = s.client.cpu_frac.map_or(String::new(), |c| format!(", thread busy {:.0} %", 100.0 * c));
        out.push(format!("client: schedule delay p99 {:.3} ms{cpu}", s.client.schedule_delay_p99_ms));
        out.extend(s.client.invalid.iter().map(|i| format!("INVALID, {i}")));
        if let Some(v) = &s.slo {
            for c in &v.clauses {
                out.push(
                    format!(
                        "{}: {:.4} [{:.4}, {:.4}] of {}: {:?}",
                        c.clause, c.attained, c.low, c.high, c.n, c.verdict
                    )
                    .to_lowercase(),
                );
            }
            out.push(format!("goodput {:.2} requests/s ({:.2} % good)", v.goodput_per_second, 100.0 * v.good_frac));
        }
    }
    if let Some(i) = &r.imported {
        out.push(format!("\nmeasured by {}, computed by lowbit's definitions", i.tool));
    }
    if let Some(f) = &r.find_max {
        let (what, unit) = (f.unit.what(), f.unit.name());
        let open = if f.bounded { String::new() } else { format!(" (no {what} failed)") };
        out.push(format!(
            "\nhighest {what} that meets {}: between {:.3} and {:.3} {unit}{open}; {}",
            f.slo.name, f.low, f.high, f.stopped_by
        ));
    }
    out.join("\n")
}

fn line(name: &str, s: &Summary) -> Vec<String> {
    let get = |q: f64| s.at(q).map_or("–".into(), |v| format!("{v:.2}"));
    let interval = |q: f64| {
        let shown = |p: &Percentile| Some(format!("{:.2} [{:.2}, {:.2}]", p.value?, p.low?, p.high?));
        s.percentiles.iter().find(|p| (p.q - q).abs() < 1e-9).and_then(shown).unwrap_or_else(|| "–".into())
    };
    vec![
        name.to_string(),
        s.n.to_string(),
        format!("{:.2}", s.mean),
        interval(0.5),
        get(0.9),
        get(0.95),
        interval(0.99),
        get(0.999),
    ]
}

/// A row a stage and latency; every percentile with the two ends of its interval.
pub fn csv(r: &LoadRecord) -> String {
    let mut out = String::from(
        "profile,rate,streams,requests_per_second,output_tokens_per_second,rejected,metric,n,mean,sd,min,max",
    );
    for q in QUANTILES {
        let name = format!("p{}", 100.0 * q).replace('.', "");
        out.push_str(&format!(",{name},{name}_low,{name}_high"));
    }
    out.push('\n');
    let number = |v: Option<f64>| v.map_or(String::new(), |v| v.to_string());
    for s in &r.stages {
        for (name, v) in &s.metrics.latency {
            let mut cells = vec![
                s.profile.clone(),
                number(s.rate),
                s.streams.map_or(String::new(), |n| n.to_string()),
                s.metrics.rates.requests_per_second.to_string(),
                s.metrics.rates.output_tokens_per_second.to_string(),
                s.rejected.to_string(),
                name.clone(),
                v.n.to_string(),
                v.mean.to_string(),
                v.sd.to_string(),
                v.min.to_string(),
                v.max.to_string(),
            ];
            for q in QUANTILES {
                let p = v.percentiles.iter().find(|p| (p.q - q).abs() < 1e-9);
                cells.extend([p.and_then(|p| p.value), p.and_then(|p| p.low), p.and_then(|p| p.high)].map(number));
            }
            out.push_str(&cells.join(","));
            out.push('\n');
        }
    }
    out
}
