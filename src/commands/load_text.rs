//! Load records as text: our table, other tools' tables from the same traces, and CSV.

use lowbit_bench::load::percentile::Summary;
use lowbit_bench::load::record::{LoadRecord, StageRecord};
use lowbit_bench::load::trace::RequestTrace;
use serde_json::Value;

use crate::args::ToolArg;
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
        out.push(table(&["", "n", "mean", "p50", "p90", "p95", "p99 [95 % CI]", "p99.9"], &lines));
        if let Some(why) = &s.metrics.itl_token_missing {
            out.push(format!("no itl_token_ms: {why}"));
        }
        let bad: Vec<String> =
            s.metrics.outcomes.iter().filter(|o| o.0 != "ok").map(|o| format!("{} {}", o.1, o.0)).collect();
        if !bad.is_empty() {
            out.push(format!("not ok: {}", bad.join(", ")));
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
    let p99 = s.percentiles.iter().find(|p| (p.q - 0.99).abs() < 1e-9);
    let interval = p99.and_then(|p| Some(format!("{:.2} [{:.2}, {:.2}]", p.value?, p.low?, p.high?)));
    vec![
        name.to_string(),
        s.n.to_string(),
        format!("{:.2}", s.mean),
        get(0.5),
        get(0.9),
        get(0.95),
        interval.unwrap_or_else(|| "–".into()),
        get(0.999),
    ]
}

/// A row a stage and latency.
pub fn csv(r: &LoadRecord) -> String {
    let mut out = String::from(
        "profile,rate,streams,requests_per_second,output_tokens_per_second,metric,n,mean,sd,min,max,p50,p90,p95,p99,p99_low,p99_high,p999\n",
    );
    let number = |v: Option<f64>| v.map_or(String::new(), |v| v.to_string());
    for s in &r.stages {
        for (name, v) in &s.metrics.latency {
            let p99 = v.percentiles.iter().find(|p| (p.q - 0.99).abs() < 1e-9);
            let cells = [
                s.profile.clone(),
                number(s.rate),
                s.streams.map_or(String::new(), |n| n.to_string()),
                s.metrics.rates.requests_per_second.to_string(),
                s.metrics.rates.output_tokens_per_second.to_string(),
                name.clone(),
                v.n.to_string(),
                v.mean.to_string(),
                v.sd.to_string(),
                v.min.to_string(),
                v.max.to_string(),
                number(v.at(0.5)),
                number(v.at(0.9)),
                number(v.at(0.95)),
                number(v.at(0.99)),
                number(p99.and_then(|p| p.low)),
                number(p99.and_then(|p| p.high)),
                number(v.at(0.999)),
            ];
            out.push_str(&cells.join(","));
            out.push('\n');
        }
    }
    out
}

/// Another tool's definitions and layout, from the same traces. Percentiles follow the tool's rule: linear between
/// neighbours (vLLM, aiperf), or the inverse distribution (GuideLLM), small samples or not.
pub fn as_tool(r: &LoadRecord, tool: ToolArg) -> String {
    r.stages.iter().map(|s| one(s, tool)).collect::<Vec<_>>().join("\n\n")
}

fn one(s: &StageRecord, tool: ToolArg) -> String {
    let ms = |to: u64, from: u64| to.saturating_sub(from) as f64 * 1e-6;
    let window = s.metrics.window;
    let ok: Vec<_> =
        s.requests.iter().filter(|t| t.ok() && (window.from_ns..window.to_ns).contains(&t.scheduled_ns)).collect();
    let first = |f: &dyn Fn(&RequestTrace) -> Option<f64>| ok.iter().filter_map(|t| f(t)).collect::<Vec<f64>>();
    let ttft = first(&|t| Some(ms(t.first_ns()?, t.sent_ns)));
    let e2e = first(&|t| Some(ms(t.last_ns().unwrap_or(t.end_ns), t.sent_ns)));
    let gaps = |t: &RequestTrace| f64::from(t.output_tokens.saturating_sub(1));
    let per_token =
        first(&|t| (gaps(t) > 0.0).then(|| ms(t.last_ns().unwrap_or(0), t.first_ns().unwrap_or(0)) / gaps(t)));
    let chunks: Vec<f64> = ok.iter().flat_map(|t| t.chunks_ns.windows(2).map(|w| ms(w[1], w[0]))).collect();
    let incl = first(&|t| Some(ms(t.last_ns()?, t.sent_ns) / f64::from(t.output_tokens.max(1))));
    let rates = &s.metrics.rates;
    let title = match tool {
        ToolArg::Vllm => "",
        ToolArg::Guidellm => {
            "GuideLLM's definitions: from the start of sending; ITL weighted by tokens − 1; TPOT with the first token"
        }
        ToolArg::Aiperf => "aiperf's definitions: from the start of sending; ITL = (latency − TTFT) / (tokens − 1)",
    };
    let mut rows = vec![
        vec!["Successful requests".to_string(), ok.len().to_string()],
        vec!["Benchmark duration (s)".into(), format!("{:.2}", window.seconds())],
        vec![
            "Total input tokens".into(),
            ok.iter().map(|t| u64::from(t.input_tokens.unwrap_or(0))).sum::<u64>().to_string(),
        ],
        vec!["Total generated tokens".into(), ok.iter().map(|t| u64::from(t.output_tokens)).sum::<u64>().to_string()],
        vec!["Request throughput (req/s)".into(), format!("{:.2}", rates.requests_per_second)],
        vec!["Output token throughput (tok/s)".into(), format!("{:.2}", rates.output_tokens_per_second)],
        vec!["Peak concurrent requests".into(), rates.peak_concurrency.to_string()],
        vec![
            "Total token throughput (tok/s)".into(),
            format!("{:.2}", rates.output_tokens_per_second + rates.input_tokens_per_second),
        ],
    ];
    if tool == ToolArg::Vllm {
        return vllm_block(s, [&ttft, &per_token, &chunks, &e2e]);
    }
    let mut put = |name: &str, plain: &[f64], weights: Option<&[f64]>| {
        if plain.is_empty() {
            return;
        }
        let total: f64 = weights.map_or(plain.len() as f64, |w| w.iter().sum());
        let mean = plain.iter().enumerate().map(|(i, v)| v * weights.map_or(1.0, |w| w[i])).sum::<f64>() / total;
        let q = |q: f64| quantile(plain, weights, q, tool == ToolArg::Guidellm);
        for (what, v) in [("Mean", mean), ("Median", q(0.5)), ("P99", q(0.99))] {
            rows.push(vec![format!("{what} {name} (ms)"), format!("{v:.2}")]);
        }
    };
    let weights: Vec<f64> = ok.iter().map(|t| gaps(t)).filter(|g| *g > 0.0).collect();
    put("TTFT", &ttft, None);
    match tool {
        ToolArg::Vllm => {}
        ToolArg::Guidellm => {
            put("ITL", &per_token, Some(&weights));
            put("TPOT", &incl, None);
            put("latency", &e2e, None);
        }
        ToolArg::Aiperf => {
            put("ITL", &per_token, None);
            put("ICL", &chunks, None);
            put("latency", &e2e, None);
        }
    }
    format!("{title}\n{}\n{}", load_of(s), table(&["", ""], &rows))
}

/// The block `vllm bench serve` prints, line for line: scripts read it. Milliseconds: TTFT, TPOT, ITL, E2EL.
fn vllm_block(s: &StageRecord, latencies: [&[f64]; 4]) -> String {
    let window = s.metrics.window;
    let inside = |t: &&RequestTrace| (window.from_ns..window.to_ns).contains(&t.scheduled_ns);
    let ok: Vec<&RequestTrace> = s.requests.iter().filter(inside).filter(|t| t.ok()).collect();
    let failed = s.requests.iter().filter(inside).filter(|t| t.outcome.failed()).count();
    let rates = &s.metrics.rates;
    let mut out = vec![format!("{:=^50}", " Serving Benchmark Result ")];
    let mut line = |name: &str, value: String| out.push(format!("{name:<40} {value:<10}").trim_end().to_string());
    line("Successful requests:", ok.len().to_string());
    line("Failed requests:", failed.to_string());
    if let Some(streams) = s.streams {
        line("Maximum request concurrency:", streams.to_string());
    }
    if let Some(rate) = s.rate {
        line("Request rate configured (RPS):", format!("{rate:.2}"));
    }
    line("Benchmark duration (s):", format!("{:.2}", window.seconds()));
    line("Total input tokens:", ok.iter().map(|t| u64::from(t.input_tokens.unwrap_or(0))).sum::<u64>().to_string());
    line("Total generated tokens:", ok.iter().map(|t| u64::from(t.output_tokens)).sum::<u64>().to_string());
    line("Request throughput (req/s):", format!("{:.2}", rates.requests_per_second));
    if let Some(slo) = &s.slo {
        line("Request goodput (req/s):", format!("{:.2}", slo.goodput_per_second));
    }
    line("Output token throughput (tok/s):", format!("{:.2}", rates.output_tokens_per_second));
    line("Peak concurrent requests:", format!("{:.2}", rates.peak_concurrency as f64));
    line(
        "Total token throughput (tok/s):",
        format!("{:.2}", rates.output_tokens_per_second + rates.input_tokens_per_second),
    );
    let heads = [
        ("TTFT", "Time to First Token"),
        ("TPOT", "Time per Output Token (excl. 1st token)"),
        ("ITL", "Inter-token Latency"),
        ("E2EL", "End-to-end Latency"),
    ];
    for ((name, head), values) in heads.iter().zip(latencies).filter(|(_, v)| !v.is_empty()) {
        out.push(format!("{head:-^50}"));
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        for (what, v) in [
            ("Mean", mean),
            ("Median", quantile(values, None, 0.5, false)),
            ("P99", quantile(values, None, 0.99, false)),
        ] {
            out.push(format!("{:<40} {v:<10.2}", format!("{what} {name} (ms):")).trim_end().to_string());
        }
    }
    out.push("=".repeat(50));
    out.join("\n")
}

fn quantile(values: &[f64], weights: Option<&[f64]>, q: f64, inverse: bool) -> f64 {
    let mut pairs: Vec<(f64, f64)> =
        values.iter().enumerate().map(|(i, v)| (*v, weights.map_or(1.0, |w| w[i]))).collect();
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
    if !inverse {
        let place = q * (pairs.len() - 1) as f64;
        let (low, part) = (place.floor() as usize, place.fract());
        let high = (low + 1).min(pairs.len() - 1);
        return pairs[low].0 + (pairs[high].0 - pairs[low].0) * part;
    }
    let total: f64 = pairs.iter().map(|p| p.1).sum();
    let mut sum = 0.0;
    for (v, w) in &pairs {
        sum += w;
        if sum >= q * total - 1e-9 {
            return *v;
        }
    }
    pairs.last().map_or(0.0, |p| p.0)
}
