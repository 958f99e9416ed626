//! `lowbit bench`: depth, and models made of random weights.

use super::{json, lowbit, ok, stderr};

#[test]
fn synthetic_models_are_measured_on_every_device() {
    let tmp = tempfile::tempdir().unwrap();
    for device in ["cpu", "emulated"] {
        let file = tmp.path().join(format!("{device}.json"));
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--device", device, "bench", "--synthetic", "tiny", "-p", "5", "-n", "2", "-d", "9"]);
        c.args(["-b", "1,2", "-r", "2", "--head", "w8a16", "--formats", "bf16,w4a16-g32"]);
        let text = String::from_utf8(ok(c.arg("-o").arg(&file)).stdout).unwrap();
        assert!(text.contains("tiny w4a16-g32, head w8a16-channel, tg2 @ d9 batch 2"), "{text}");
        let record = json(&file);
        assert_eq!(record["provenance"]["model"], "synthetic tiny");
        let rows = record["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 6);
        assert!(rows.iter().all(|r| r["tokens_per_second"].as_f64().unwrap() > 0.0));
        assert_eq!(record["speed_ups"].as_array().unwrap().len(), 3);
        assert_eq!(record["memory"].as_array().unwrap().len(), 2);
    }
}

#[test]
fn a_model_is_measured_at_a_depth() {
    let tmp = tempfile::tempdir().unwrap();
    let mut c = lowbit(tmp.path());
    let args = ["--quiet", "--json", "--device", "cpu", "bench", "demo", "-p", "0", "-n", "2", "-d", "20", "-r", "1"];
    let record: serde_json::Value = serde_json::from_slice(&ok(c.args(args)).stdout).unwrap();
    let row = &record["rows"][0];
    assert_eq!(row["test"], "tg2 @ d20");
    assert!(row["bytes_per_step"].as_u64().unwrap() > 0);
}

/// The formats of llama-bench, from the same rows.
#[test]
fn rows_are_printed_as_llama_bench_prints_them() {
    let tmp = tempfile::tempdir().unwrap();
    let run = |format: &str, batch: &str| {
        let mut c = lowbit(tmp.path());
        c.args([
            "--quiet", "--device", "cpu", "bench", "demo", "-p", "8", "-n", "2", "-d", "4", "-r", "2", "-b", batch,
            "--format", format,
        ]);
        String::from_utf8(ok(&mut c).stdout).unwrap()
    };
    let rows: serde_json::Value = serde_json::from_str(&run("json", "1")).unwrap();
    let tg = &rows[1];
    assert_eq!((tg["n_prompt"].as_u64(), tg["n_gen"].as_u64(), tg["n_depth"].as_u64()), (Some(0), Some(2), Some(4)));
    assert_eq!(rows[0]["n_prompt"], 8);
    let samples: Vec<f64> = tg["samples_ts"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let mean = (samples[0] + samples[1]) / 2.0;
    assert!((tg["avg_ts"].as_f64().unwrap() - mean).abs() < 1e-9 * mean);
    // Of two samples the standard deviation is the difference over √2.
    assert!((tg["stddev_ts"].as_f64().unwrap() - (samples[0] - samples[1]).abs() / 2f64.sqrt()).abs() < 1e-6 * mean);
    let time = tg["test_time"].as_str().unwrap();
    assert!(time.len() == 20 && time.as_bytes()[10] == b'T' && time.ends_with('Z'), "{time}");
    let mut c = lowbit(tmp.path());
    c.args([
        "--quiet",
        "--device",
        "cpu",
        "bench",
        "demo",
        "-p",
        "0",
        "-n",
        "2",
        "-d",
        "70",
        "-r",
        "1",
        "--kv-cache",
        "int8",
        "--format",
        "jsonl",
    ]);
    let int8: serde_json::Value = serde_json::from_slice(&ok(&mut c).stdout).unwrap();
    assert_eq!((int8["type_k"].as_str(), int8["n_depth"].as_u64()), (Some("q8_0"), Some(70)));
    // As `lowbit inspect` counts the demo's tensors, norms aside.
    let inspected: serde_json::Value =
        serde_json::from_slice(&ok(lowbit(tmp.path()).args(["--json", "inspect", "demo"])).stdout).unwrap();
    let shapes = inspected["tensors"].as_array().unwrap().iter().map(|t| t["shape"].as_array().unwrap());
    let all: f64 = shapes.map(|s| s.iter().map(|n| n.as_f64().unwrap()).product::<f64>()).sum();
    let ours = tg["model_n_params"].as_f64().unwrap();
    assert!(ours <= all && ours > 0.99 * all, "{ours} of {all}");
    assert!(tg["backends"] == "CPU" && tg["type_k"] == "f32" && tg.get("n_seqs").is_none());

    let md = run("md", "1,2");
    let lines: Vec<&str> = md.lines().collect();
    let columns = |l: &str| l.split('|').map(|c| c.trim().to_string()).filter(|c| !c.is_empty()).collect::<Vec<_>>();
    assert_eq!(columns(lines[0]), ["model", "size", "params", "backend", "threads", "n_seqs", "test", "t/s"]);
    assert!(lines[1].starts_with("| ------------------------------ | ---------: |"), "{md}");
    assert_eq!(columns(lines[4])[5..7], ["2", "tg2 @ d4"], "{md}");
    assert!(columns(lines[2])[7].contains(" ± ") && md.contains("\nbuild: "), "{md}");

    let csv = run("csv", "1");
    let heads: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    assert_eq!((heads[0], heads[heads.len() - 1], heads.len()), ("build_commit", "stddev_ts", 42));
    assert_eq!(csv.lines().nth(1).unwrap().matches("\",\"").count(), 41);
    assert_eq!(run("jsonl", "1").lines().count(), 2);
    let sql = run("sql", "1");
    assert!(sql.starts_with("CREATE TABLE IF NOT EXISTS llama_bench (\n  build_commit TEXT,"), "{sql}");
    assert!(
        sql.contains("  avg_ts REAL,") && sql.matches("INSERT INTO llama_bench (build_commit,").count() == 2,
        "{sql}"
    );
}

#[test]
fn a_draft_is_measured_and_changes_no_text() {
    let tmp = tempfile::tempdir().unwrap();
    let draft = tmp.path().join("w4");
    let mut c = lowbit(tmp.path());
    c.args(["--quiet", "--device", "cpu", "quantize", "demo", "--method", "rtn", "--group-size", "64", "-o"]);
    ok(c.arg(&draft));
    let file = tmp.path().join("draft.json");
    let mut c = lowbit(tmp.path());
    c.args(["--quiet", "--device", "cpu", "bench", "demo", "-n", "24", "-r", "1", "--draft"]).arg(&draft);
    let text = String::from_utf8(ok(c.arg("-o").arg(&file)).stdout).unwrap();
    assert!(text.contains("texts identical"), "{text}");
    let r = json(&file);
    assert_eq!((r["identical"].as_bool(), r["answers"].as_array().unwrap().len()), (Some(true), 4));
    let rate = r["acceptance_rate"].as_f64().unwrap();
    assert!(rate > 0.0 && rate <= 1.0 && r["tokens_per_pass"].as_f64().unwrap() > 1.0, "{r}");
    let alone = lowbit(tmp.path()).args(["bench", "demo", "--draft-tokens", "3"]).output().unwrap();
    assert_eq!(alone.status.code(), Some(3));
}

#[test]
fn rounding_of_decode_is_measured_and_small() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("w4");
    let mut c = lowbit(tmp.path());
    c.args(["--quiet", "--device", "cpu", "quantize", "demo", "--method", "rtn", "--group-size", "64", "-o"]);
    ok(c.arg(&dir));
    let bench = |exact: &[&str]| -> serde_json::Value {
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--json", "--device", "cpu", "bench"]).arg(&dir).args(["-p", "0", "-n", "2", "-r", "1"]);
        serde_json::from_slice(&ok(c.args(exact)).stdout).unwrap()
    };
    let rounding = &bench(&[])["rounding"];
    let kl = rounding["kl_mean"].as_f64().unwrap();
    // Not nothing, or it would not have been measured; the bound is the one `--exact` is promised to be within.
    assert!(kl > 0.0 && kl <= 1e-4 && rounding["kl_max"].as_f64().unwrap() <= 1e-4, "{rounding}");
    assert_eq!(rounding["tokens"], 128);
    assert!(bench(&["--exact"])["rounding"].is_null());
}

#[test]
fn what_cannot_be_made_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    for (args, said) in [
        (&["bench", "--synthetic", "llama"][..], "llama-3.1-8b"),
        (&["bench", "--synthetic", "tiny", "--formats", "fp8"], "w4a16-g128"),
        (&["bench", "--synthetic", "tiny", "demo"], "--synthetic"),
        (&["bench"], "MODEL"),
        (&["bench", "demo", "--head", "w8a16"], "--head"),
    ] {
        let out = lowbit(tmp.path()).args(["--device", "cpu"]).args(args).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).contains(said), "{args:?}: {}", stderr(&out));
    }
}
