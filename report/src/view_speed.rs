//! What the page shows of speed and memory.

use lowbit_bench::record::{BenchRecord, BenchRow};
use lowbit_checkpoint::provenance::Provenance;
use serde_json::{Value, json};

use crate::Variant;
use crate::chart_lines::{Frame, Line, lines};
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
    let mut t = Table::new(
        "Rates",
        &[
            "Test",
            "#Batch",
            "#Candidate, tokens/s (range)",
            "#Reference, tokens/s (range)",
            "#Speed-up [95 % CI]",
            "#Roofline, candidate",
            "#Roofline, reference",
        ],
    );
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
    let mut t = Table::new(
        "Latency of a single stream, ms",
        &["Model", "#Prompt", "#Output", "#TTFT p50", "#TTFT p95", "#TTFT p99", "#ITL p50", "#ITL p95", "#ITL p99"],
    );
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
    let mut t = Table::new(
        "Memory",
        &["Model", "#Weights", "#KV cache, one sequence", "#of tokens", "#Peak resident, process"],
    );
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

/// Decode rates against what the bandwidth allows for the bytes a token needs.
fn roofline_chart(name: &str, b: &BenchRecord) -> Option<String> {
    let roof = Some(b.bandwidth_bytes_per_second).filter(|v| v.is_finite() && *v > 0.0)?;
    let line = |role: &str, colour: &str, shape: usize| {
        let rows = b.rows.iter().filter(|r| r.role == role && r.bytes_per_step > 0 && r.test.starts_with("tg"));
        let places = rows.map(|r| {
            let bytes = r.bytes_per_step as f64 / r.batch.max(1) as f64;
            (bytes / 1e6, r.tokens_per_second, chart_speed::spread(&r.samples))
        });
        Line { name: role.to_owned(), colour: colour.to_owned(), shape, places: places.collect() }
    };
    let both: Vec<Line> =
        [line("candidate", "1", 0), line("reference", "x", 1)].into_iter().filter(|l| !l.places.is_empty()).collect();
    let title = if name.is_empty() {
        "Decoding against the roofline".to_owned()
    } else {
        format!("Decoding against the roofline, {name}")
    };
    lines(
        &both,
        &Frame {
            title: &title,
            x: "MB read for a token: weights and cache over the batch (log scale)",
            y: "tokens/s (log scale)",
            limits: &[],
            roof: Some((roof / 1e6, format!("roofline, {}", bandwidth(b)))),
            log_x: true,
        },
    )
}

/// The section on speed: one entry for each variant that was timed.
pub(crate) fn throughput(variants: &[Variant]) -> Vec<Value> {
    let timed = variants.iter().filter_map(|v| Some((v.name.as_str(), v.records.bench.as_ref()?)));
    timed
        .map(|(name, b)| {
            json!({
                "name": name,
                "machine": machine(&b.provenance),
                "bandwidth": bandwidth(b),
                "chart": chart_speed::throughput(&b.rows),
                "roofline": roofline_chart(name, b),
                "table": rate_table(b).without_empty_columns(),
                "latency": latency_table(b),
                "memory": memory_table(b).map(Table::without_empty_columns),
            })
        })
        .collect()
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
