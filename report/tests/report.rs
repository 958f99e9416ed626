//! The report as a whole, from synthetic records.

mod records;

use std::fs;
use std::path::Path;

use lowbit_report::{Records, ReportError, html, json, load, markdown, write};
use records::{all, bench, eval, plan, quantize};
use serde_json::json as value;

fn put(dir: &Path, name: &str, text: impl AsRef<[u8]>) {
    fs::write(dir.join(name), text).unwrap();
}

#[test]
fn page_has_the_key_figures() {
    let page = html(&all()).unwrap();
    // To look at the page: LOWBIT_REPORT_OUT=/tmp/r.html cargo test -p lowbit-report
    if let Some(path) = std::env::var_os("LOWBIT_REPORT_OUT") {
        fs::write(path, &page).unwrap();
    }
    // The template engine escapes slashes too.
    let page = page.replace("&#x2f;", "/");
    for figure in [
        "Qwen/Qwen2.5-0.5B",
        "w4a16-g128-asym",
        "2.13× smaller",
        "993 MB → 466 MB",
        "0.0234 nats/token",
        "13.07 → 13.71",
        "2.13×",
        "95 % CI 2.09 – 2.18, tg128, batch 1",
        "93.12 [92.71 – 93.53]",
        "gptq-2048",
        "damping raised",
        "69.3 %",
        "21.3 GB/s",
        "1,642",
        "c4-validation.txt",
        "act_order = true",
        "2025-12-31 23:59:59 UTC",
    ] {
        assert!(page.contains(figure), "{figure}");
    }
    assert!(!page.contains("NaN") && !page.contains("Missing here"));
}

#[test]
fn page_fetches_nothing() {
    let page = html(&all()).unwrap().replace("&#x2f;", "/");
    for fetch in ["http://", "https://", "<script", "<img", "@import", "url(", " src="] {
        assert!(!page.contains(fetch), "{fetch}");
    }
}

#[test]
fn names_are_escaped() {
    let mut r = all();
    let evil = "x\"'><script>alert(1)</script>";
    if let Some(q) = &mut r.quantize {
        q.provenance.model = evil.into();
        q.scheme = evil.into();
        q.sizes[0].component = evil.into();
        q.layers[0].name = format!("{evil}q_proj");
        q.layers[0].events.push(evil.into());
        q.options.insert(evil.into(), value!(evil));
    }
    if let Some(e) = &mut r.eval {
        e.perplexities[0].source_sha256 = evil.into();
        if let Some(k) = &mut e.kl {
            k.percentiles[0].0 = evil.into();
        }
    }
    if let Some(b) = &mut r.bench {
        b.rows[0].test = evil.into();
        b.rows[0].model = evil.into();
    }
    let page = html(&r).unwrap();
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
    assert!(!page.contains("x\"'>"));
    assert!(!markdown(&r).contains("<script"));
}

#[test]
fn missing_records_are_named() {
    let page = html(&Records::default()).unwrap();
    assert!(page.contains("Missing here: plan.json, quantize.json, eval.json, bench.json."));
    assert!(page.contains("eval.json is missing"));
    assert!(markdown(&Records::default()).contains("Missing here"));
    for r in [
        Records { plan: Some(plan()), ..Default::default() },
        Records { quantize: Some(quantize()), ..Default::default() },
        Records { eval: Some(eval()), ..Default::default() },
        Records { bench: Some(bench()), ..Default::default() },
    ] {
        let page = html(&r).unwrap();
        assert!(page.contains("Missing here") && !page.contains("NaN"));
        assert_eq!(json(&r)["missing"].as_array().map(Vec::len), Some(3));
    }
    let planned = Records { plan: Some(plan()), ..Default::default() };
    assert!(html(&planned).unwrap().contains("Size (planned)"));
}

#[test]
fn empty_series_and_odd_numbers_pass() {
    let mut r = all();
    if let (Some(q), Some(e), Some(b)) = (&mut r.quantize, &mut r.eval, &mut r.bench) {
        q.layers.clear();
        q.sizes.clear();
        q.after_bytes = 0;
        e.perplexities.clear();
        if let Some(k) = &mut e.kl {
            k.percentiles.clear();
            k.mean = f64::NAN;
        }
        b.rows.clear();
        b.speed_ups.clear();
        b.latency.clear();
        b.memory.clear();
        b.bandwidth_bytes_per_second = f64::NAN;
    }
    let page = html(&r).unwrap();
    assert!(!page.contains("NaN") && !page.contains(">inf"));
    assert!(page.contains("No events"));
    assert!(!markdown(&r).contains("NaN"));
}

#[test]
fn other_reference_is_a_notice() {
    let mut r = all();
    if let Some(e) = &mut r.eval {
        e.provenance.reference_sha256 = Some("f".repeat(64));
    }
    assert!(html(&r).unwrap().contains("eval.json compares with another reference"));
}

#[test]
fn directory_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    assert!(matches!(load(at), Err(ReportError::NoRecords { .. })));
    put(at, "quantize.json", serde_json::to_vec(&quantize()).unwrap());
    put(at, "eval.json", serde_json::to_vec(&eval()).unwrap());
    put(at, "bench.json", serde_json::to_vec(&bench()).unwrap());
    let written = write(at).unwrap();
    assert_eq!(written, ["report.html", "report.md", "report.json"].map(|n| at.join(n)));
    assert_eq!(fs::read_dir(at).unwrap().count(), 6);
    let data: serde_json::Value = serde_json::from_slice(&fs::read(at.join("report.json")).unwrap()).unwrap();
    assert_eq!(data["missing"], value!(["plan.json"]));
    assert_eq!(data["headline"]["decode_speed_up"]["batch"], 1);
    assert!(fs::read_to_string(at.join("report.md")).unwrap().contains("| total | 993 MB | 466 MB | 2.13× |"));

    let mut other = bench();
    other.provenance.model_sha256 = "e".repeat(64);
    put(at, "bench.json", serde_json::to_vec(&other).unwrap());
    let text = load(at).unwrap_err().to_string();
    assert!(text.contains(&"b".repeat(64)) && text.contains(&"e".repeat(64)), "{text}");

    put(at, "bench.json", "{\n  \"schema\": 1,\n  oops\n}");
    let text = load(at).unwrap_err().to_string();
    assert!(text.contains("bench.json:3:3: "), "{text}");
}
