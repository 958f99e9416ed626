//! What the page shows of speed, memory and where the records came from.

use std::collections::BTreeMap;

use lowbit_bench::record::{BenchRecord, BenchRow};
use lowbit_checkpoint::provenance::Provenance;
use serde_json::{Value, json};

use crate::Records;
use crate::chart_speed;
use crate::format::{self as f, NONE, bytes, count, sig};
use crate::table::Table;

fn rate(row: Option<&&BenchRow>) -> String {
    let Some(row) = row else {
        return NONE.to_owned();
    };
    match chart_speed::spread(&row.samples) {
        Some((low, high)) => format!("{} ({})", sig(row.tokens_per_second, 3), f::range(low, high, 3)),
        None => sig(row.tokens_per_second, 3),
    }
}

fn roofline(row: Option<&&BenchRow>) -> String {
    row.and_then(|r| r.roofline_frac).map_or(NONE.to_owned(), |v| f::percent(v, 3))
}

/// Rates of both roles for each test and batch.
pub(crate) fn rate_table(b: &BenchRecord) -> Table {
    let mut t = Table::new(&[
        "Test",
        "#Batch",
        "#Candidate, tokens/s (range)",
        "#Reference, tokens/s (range)",
        "#Speed-up [95 % CI]",
        "#Roofline, candidate",
        "#Roofline, reference",
    ]);
    for (test, rows) in chart_speed::by_test(&b.rows) {
        let mut batches: Vec<usize> = rows.iter().map(|r| r.batch).collect();
        batches.dedup();
        for batch in batches {
            let of = |candidate: bool| rows.iter().find(|r| r.batch == batch && (r.role == "candidate") == candidate);
            let speed_up = b.speed_ups.iter().find(|s| s.test == test && s.batch == batch);
            t.row(vec![
                test.into(),
                batch.to_string().into(),
                rate(of(true)).into(),
                rate(of(false)).into(),
                speed_up
                    .map_or(NONE.to_owned(), |s| format!("{} [{}]", f::factor(s.ratio), f::range(s.low, s.high, 3)))
                    .into(),
                roofline(of(true)).into(),
                roofline(of(false)).into(),
            ]);
        }
    }
    t
}

fn latency_table(b: &BenchRecord) -> Option<Table> {
    if b.latency.is_empty() {
        return None;
    }
    let mut t = Table::new(&[
        "Model",
        "#Prompt",
        "#Output",
        "#TTFT p50",
        "#TTFT p95",
        "#TTFT p99",
        "#ITL p50",
        "#ITL p95",
        "#ITL p99",
    ]);
    for l in &b.latency {
        let mut row =
            vec![l.role.as_str().into(), count(l.prompt_tokens as u64).into(), count(l.output_tokens as u64).into()];
        row.extend(l.ttft_ms.iter().chain(&l.itl_token_ms).map(|v| sig(*v, 3).into()));
        t.row(row);
    }
    Some(t)
}

/// Weights, cache and process.
pub(crate) fn memory_table(b: &BenchRecord) -> Option<Table> {
    if b.memory.is_empty() {
        return None;
    }
    let mut t = Table::new(&["Model", "#Weights", "#KV cache, one sequence", "#of tokens", "#Peak resident, process"]);
    for m in &b.memory {
        t.row(vec![
            m.role.as_str().into(),
            bytes(m.weight_bytes).into(),
            bytes(m.kv_bytes).into(),
            count(m.kv_tokens as u64).into(),
            m.peak_rss_bytes.map_or(NONE.to_owned(), bytes).into(),
        ]);
    }
    Some(t)
}

/// Bandwidth as GB/s.
pub(crate) fn bandwidth(b: &BenchRecord) -> String {
    if b.bandwidth_bytes_per_second.is_finite() && b.bandwidth_bytes_per_second > 0.0 {
        format!("{} GB/s", sig(b.bandwidth_bytes_per_second / 1e9, 3))
    } else {
        NONE.to_owned()
    }
}

/// The section on speed.
pub(crate) fn throughput(r: &Records) -> Value {
    let Some(b) = &r.bench else {
        return Value::Null;
    };
    let p = &b.provenance;
    json!({
        "machine": machine(p),
        "bandwidth": bandwidth(b),
        "chart": chart_speed::throughput(&b.rows),
        "table": rate_table(b),
        "latency": latency_table(b),
        "memory": memory_table(b),
    })
}

/// Device, processor, threads and type on one line.
pub(crate) fn machine(p: &Provenance) -> String {
    let mut parts = vec![p.device.clone(), p.cpu.clone()];
    parts.extend(p.gpu.clone());
    parts.push(format!("{} thread{}", p.threads, if p.threads == 1 { "" } else { "s" }));
    parts.push(p.dtype.clone());
    parts.retain(|s| !s.is_empty());
    parts.join(", ")
}

fn options(map: &BTreeMap<String, Value>) -> Vec<Value> {
    map.iter()
        .map(|(k, v)| {
            let text = v.as_str().map_or_else(|| v.to_string(), str::to_owned);
            json!([k, text])
        })
        .collect()
}

fn item(name: &str, text: impl Into<String>, code: bool) -> Value {
    json!({ "name": name, "text": text.into(), "code": code })
}

fn entries(p: &Provenance) -> Vec<Value> {
    let mut out = vec![
        item("Written", f::utc(p.unix_time), false),
        item("Tool", p.tool.as_str(), false),
        item("Commit", p.commit.as_deref().unwrap_or("not recorded"), true),
        item("Command", p.command.as_str(), true),
        item("Model", p.model.as_str(), false),
        item("Model SHA-256", p.model_sha256.as_str(), true),
    ];
    if let Some(reference) = &p.reference {
        out.push(item("Reference", reference.as_str(), false));
    }
    if let Some(hash) = &p.reference_sha256 {
        out.push(item("Reference SHA-256", hash.as_str(), true));
    }
    out.extend([
        item("Device", p.device.as_str(), false),
        item("CPU", p.cpu.as_str(), false),
        item("GPU", p.gpu.as_deref().unwrap_or("none"), false),
        item("Threads", p.threads.to_string(), false),
        item("Activations", p.dtype.as_str(), false),
        item("Seed", p.seed.to_string(), false),
    ]);
    out
}

/// The section on provenance: one block for each record.
pub(crate) fn provenance(r: &Records) -> Vec<Value> {
    let mut out = Vec::new();
    for (file, p) in r.provenance() {
        let mut entries = entries(p);
        let mut settings = options(&p.options);
        if let (Some(q), "quantize.json") = (&r.quantize, file) {
            settings.extend(options(&q.options).into_iter().filter(|o| !options(&p.options).contains(o)));
            match &q.calibration {
                Some(c) => entries.extend([
                    item("Calibration", c.source.as_str(), false),
                    item(
                        "Calibration windows",
                        format!(
                            "{} of {} tokens, {} in all, seed {}",
                            c.windows,
                            c.window_tokens,
                            count(c.tokens),
                            c.seed
                        ),
                        false,
                    ),
                    item("Calibration SHA-256", c.windows_sha256.as_str(), true),
                ]),
                None => entries.push(item("Calibration", "none", false)),
            }
            let stages: Vec<String> = q.stage_seconds.iter().map(|(k, v)| format!("{k} {}", f::seconds(*v))).collect();
            let stages = if stages.is_empty() { String::new() } else { format!(" ({})", stages.join(", ")) };
            entries.push(item("Wall time", format!("{}{stages}", f::seconds(q.seconds)), false));
            entries.push(item("Peak resident", q.peak_rss_bytes.map_or("not recorded".to_owned(), bytes), false));
        }
        if let (Some(plan), "plan.json") = (&r.plan, file) {
            entries.push(item("Peak memory, estimate", bytes(plan.peak_memory_bytes), false));
        }
        out.push(json!({ "file": file, "entries": entries, "options": settings }));
    }
    out
}
