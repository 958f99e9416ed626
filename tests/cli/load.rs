//! `lowbit load` and `lowbit capacity` from outside.

use std::io::{Read, Write};
use std::net::TcpListener;

use super::{json, lowbit, ok, stderr};

/// A server that answers every chat with two chunks, at once.
pub fn server() -> String {
    server_after(std::time::Duration::ZERO)
}

/// The same after a while: a client that never waits is busy, and so its own limit.
fn server_after(wait: std::time::Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut pending, mut buffer) = (Vec::new(), [0u8; 4096]);
                loop {
                    let text = String::from_utf8_lossy(&pending).into_owned();
                    let head = text.find("\r\n\r\n").map(|h| h + 4);
                    let length =
                        text.lines().find_map(|l| l.strip_prefix("Content-Length: ")).map_or(0, |l| l.parse().unwrap());
                    if let Some(head) = head.filter(|h| pending.len() >= h + length) {
                        pending.drain(..head + length);
                        let (kind, body) = if text.starts_with("GET") {
                            ("application/json", r#"{"data":[{"id":"m"}]}"#.to_string())
                        } else {
                            std::thread::sleep(wait);
                            let chunk = r#"data: {"choices":[{"delta":{"content":"a"}}]}"#;
                            let usage = r#"data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}"#;
                            ("text/event-stream", format!("{chunk}\n\n{chunk}\n\n{usage}\n\ndata: [DONE]\n\n"))
                        };
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        if stream.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                        continue;
                    }
                    match stream.read(&mut buffer) {
                        Ok(0) | Err(_) => return,
                        Ok(n) => pending.extend_from_slice(&buffer[..n]),
                    }
                }
            });
        }
    });
    url
}

#[test]
fn a_load_its_record_and_a_plan_from_it() {
    let (tmp, url) = (tempfile::tempdir().unwrap(), server());
    let out = tmp.path().join("load.json");
    let file = out.to_str().unwrap();
    let some = |n: &str, more: &[&str]| {
        let mut c = lowbit(tmp.path());
        c.args(["load", &url, "--profile", "concurrent:2", "--max-requests", n, "--quiet"]).args(more);
        c.output().unwrap()
    };
    let run = |more: &[&str]| some("600", more);
    let first = run(&["-o", file, "--json", "--api-key", "sesame"]);
    assert_eq!(first.status.code(), Some(0), "{}", stderr(&first));
    let record = json(&out);
    assert_eq!(
        (record["stages"][0]["metrics"]["outcomes"]["ok"].as_u64(), record["target"]["model"].as_str()),
        (Some(600), Some("m"))
    );
    assert_eq!(record["stages"][0]["requests"].as_array().unwrap().len(), 600);
    assert!(!record.to_string().contains("sesame"), "a record holds no key");
    let shown: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    assert!(shown["stages"][0].get("requests").is_none());
    assert_eq!(run(&["-o", file]).status.code(), Some(3), "an existing record is kept");
    // A run against itself differs by nothing.
    let same = ok(lowbit(tmp.path()).args(["compare", file, file]));
    let text = String::from_utf8_lossy(&same.stdout).into_owned();
    assert!(text.contains("concurrent 2 e2e p50") && text.contains("1.000 ["), "{text}");
    assert_eq!(run(&["--slo", "e2e_p95<=60000"]).status.code(), Some(0));
    let broken = run(&["--slo", "rps>=1000000"]);
    assert_eq!(broken.status.code(), Some(1), "{}", stderr(&broken));
    // 30 requests cannot show a p99.
    assert_eq!(some("30", &["--slo", "e2e_p99<=60000"]).status.code(), Some(2));
    assert!(String::from_utf8(run(&["--as", "vllm"]).stdout).unwrap().contains("Mean TTFT (ms):"));
    let text = String::from_utf8(run(&["--as", "guidellm"]).stdout).unwrap();
    for title in ["Run Summary Info", "Request Token Statistics", "Request Latency Statistics", "Server Throughput"] {
        assert!(text.contains(&format!("ℹ {title}")), "{title}: {text}");
    }
    let text = String::from_utf8(run(&["--as", "aiperf"]).stdout).unwrap();
    let row = |name: &str| -> Vec<String> {
        let line = text.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("{name}: {text}"));
        line.split(['│', '┃']).map(|c| c.trim().to_string()).filter(|c| !c.is_empty()).collect()
    };
    assert_eq!(row("std"), ["Metric", "avg", "min", "max", "p99", "p90", "p50", "std"]);
    assert_eq!(row("Input Sequence Length")[1..], ["9.00", "9.00", "9.00", "9.00", "9.00", "9.00", "0.00"]);
    assert_eq!(row("Request Count")[1..4], ["600.00", "N/A", "N/A"]);
    assert!(row("Time to First Token (ms)").len() == 8 && text.contains("NVIDIA AIPerf | LLM Metrics"), "{text}");

    // The record again, by another tool's definitions, and against an objective it was not run for.
    let again = |more: &[&str]| lowbit(tmp.path()).args(["load", "--import", file, "-q"]).args(more).output().unwrap();
    assert!(String::from_utf8_lossy(&again(&["--as", "vllm"]).stdout).contains("Successful requests:"));
    assert_eq!(again(&["--slo", "e2e_p95<=60000"]).status.code(), Some(0));
    assert_eq!(again(&["--slo", "e2e_p50<=0.000001"]).status.code(), Some(1));

    // The same as a table for other programs: a row a latency, every percentile between the ends of its interval.
    let table = tmp.path().join("load.csv");
    assert_eq!(again(&["--csv", table.to_str().unwrap()]).status.code(), Some(0));
    assert_eq!(again(&["--csv", table.to_str().unwrap()]).status.code(), Some(3), "an existing table is kept");
    let text = std::fs::read_to_string(&table).unwrap();
    let mut rows = text.lines().map(|l| l.split(',').collect::<Vec<&str>>());
    let head = rows.next().unwrap();
    let column = |name: &str| head.iter().position(|h| *h == name).unwrap_or_else(|| panic!("{name}: {head:?}"));
    let rows: Vec<Vec<&str>> = rows.collect();
    assert!(rows.iter().all(|r| r.len() == head.len() && r[column("profile")] == "concurrent"), "{text}");
    let e2e = rows.iter().find(|r| r[column("metric")] == "e2e_ms").unwrap();
    for p in ["p50", "p90"] {
        let at = |end: &str| e2e[column(&format!("{p}{end}"))].parse::<f64>().unwrap();
        assert!(at("_low") <= at("") && at("") <= at("_high"), "{p}: {text}");
    }
    assert_eq!(
        (e2e[column("n")], e2e[column("rejected")], e2e[column("p999")]),
        ("600", "0", ""),
        "too few for a p99.9"
    );

    let open = tmp.path().join("open.json");
    let mut c = lowbit(tmp.path());
    c.args(["load", &url, "--profile", "poisson:100", "--max-requests", "300", "--slo", "e2e_p90<=60000", "-q", "-o"])
        .arg(&open);
    // On a busy machine the client may have been the limit, and says so.
    assert!(matches!(c.output().unwrap().status.code(), Some(0 | 2)));
    let plan = |invalid: serde_json::Value| -> serde_json::Value {
        let mut record = json(&open);
        record["stages"][0]["client"]["invalid"] = invalid;
        std::fs::write(&open, record.to_string()).unwrap();
        let args = ["capacity", open.to_str().unwrap(), "--peak-rps", "1000", "--gpu-hour", "2", "--json", "-q"];
        serde_json::from_slice(&lowbit(tmp.path()).args(args).output().unwrap().stdout).unwrap()
    };
    let limited = plan(serde_json::json!(["the client could not keep its schedule"]));
    assert!(limited["best"].is_null() && limited["variants"][0]["servers"].is_null(), "{limited}");
    let plan = plan(serde_json::json!([]));
    // 1000 · 1.2 / (100 · 0.8) = 15, and a spare.
    assert_eq!(plan["variants"][0]["servers"].as_u64(), Some(16), "{plan}");
    assert!(plan["variants"][0].get("room").is_none(), "nothing is known of its memory");
    std::fs::copy(super::root().join("tests/records/bench-1.json"), tmp.path().join("bench.json")).unwrap();
    let args = ["capacity", open.to_str().unwrap(), "--peak-rps", "10", "--gpu-hour", "2", "--gpu", "l4"];
    let roomy = ok(lowbit(tmp.path()).args(args).arg("--json"));
    let room = &serde_json::from_slice::<serde_json::Value>(&roomy.stdout).unwrap()["variants"][0]["room"];
    assert!(room["kv_room_bytes"].as_f64().unwrap() > 1e9 && room["concurrency"].as_u64().unwrap() > 1, "{room}");
    let text = String::from_utf8(ok(lowbit(tmp.path()).args(args)).stdout).unwrap();
    assert!(text.contains("KV room GB") && text.contains("at once"), "{text}");
    std::fs::write(tmp.path().join("gate.json"), r#"{"verdict":"regression"}"#).unwrap();
    let gated = format!("{}={}", open.display(), tmp.path().join("gate.json").display());
    let out = lowbit(tmp.path()).args(["capacity", &gated, "--peak-rps", "10", "--gpu-hour", "2"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stdout).contains("accuracy: regression"));
}

#[test]
fn an_interrupted_load_keeps_what_it_measured() {
    let (tmp, url) = (tempfile::tempdir().unwrap(), server_after(std::time::Duration::from_millis(5)));
    let out = tmp.path().join("load.json");
    let mut c = lowbit(tmp.path());
    c.args(["load", &url, "--profile", "concurrent:2", "--duration", "600", "-o"]).arg(&out);
    let child = c.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    ok(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]));
    let done = child.wait_with_output().unwrap();
    let said = stderr(&done);
    assert_eq!(done.status.code(), Some(130), "{said}");
    assert!(said.contains("hint: the record holds what was measured until then"), "{said}");
    let stage = &json(&out)["stages"][0];
    assert_eq!(stage["stopped_by"], "interrupted");
    assert!(stage["metrics"]["outcomes"]["ok"].as_u64().unwrap() > 0, "{stage}");
    assert_eq!(super::names(tmp.path()).iter().filter(|n| *n != "cache").collect::<Vec<_>>(), ["load.json"]);
}

#[test]
fn other_tools_files_are_taken_as_they_are() {
    let tmp = tempfile::tempdir().unwrap();
    let sample = |name: &str| super::root().join("bench/tests/import").join(name);
    let (guidellm, out) = (sample("guidellm-0.8.1.json"), tmp.path().join("load.json"));
    let import = |file: &std::path::Path, more: &[&str]| {
        lowbit(tmp.path()).args(["load", "-q", "--import"]).arg(file).args(more).output().unwrap()
    };
    let shown = import(&guidellm, &["--as", "guidellm", "-o", out.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    // Heads and figures as GuideLLM printed them of this run.
    for line in [
        "ℹ Request Latency Statistics (Completed Requests)",
        "|            | Mdn     | p95    | Mdn  | p95  | Mdn | p95 | Mdn | p95  |",
        "| concurrent | 0.1     | 0.1    | 44.1 | 75.4 | 4.6 | 5.5 | 9.8 | 14.2 |",
        "| poisson    | 0.1     | 0.1    | 43.2 | 72.5 | 5.0 | 5.9 | 9.9 | 12.8 |",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}{}", stderr(&shown));
    }
    let record = json(&out);
    assert_eq!(record["provenance"]["options"]["tool"], "guidellm 0.8.1");
    assert_eq!(record["stages"][1]["requests"].as_array().unwrap().len(), 12);
    let vllm = String::from_utf8(import(&sample("vllm-bench.json"), &["--as", "vllm"]).stdout).unwrap();
    // Line for line as vllm bench serve prints it.
    for line in [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3",
        "Failed requests:                         1",
        "Total generated tokens:                  8",
        "Peak output token throughput (tok/s):    6.00",
        "Peak concurrent requests:                2.00",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          133.33",
        "P99 TTFT (ms):                           198.00",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          22.33",
        "---------------Inter-token Latency----------------",
        "Mean ITL (ms):                           24.00",
        "P99 ITL (ms):                            39.60",
        "==================================================",
    ] {
        assert!(vllm.lines().any(|l| l == line), "{line}: {vllm}");
    }
    // capacity reads it; stalls are not in it.
    let plan = |slo: &str| {
        let args = ["--peak-rps", "10", "--gpu-hour", "1", "--slo", slo, "-q"];
        let done = lowbit(tmp.path()).arg("capacity").arg(&guidellm).args(args).output().unwrap();
        assert_eq!(done.status.code(), Some(1));
        String::from_utf8(done.stdout).unwrap()
    };
    assert!(plan("stall_p50<=100").contains("a stall cannot be seen"));
    assert!(plan("e2e_p50<=100").contains("infeasible"));
    let none = import(std::path::Path::new("Cargo.toml"), &[]);
    assert!(none.status.code() == Some(3) && stderr(&none).contains("Cargo.toml"), "{}", stderr(&none));
}

#[test]
fn the_search_takes_its_profile_and_data_come_from_folders_and_the_hub() {
    let (tmp, url) = (tempfile::tempdir().unwrap(), server_after(std::time::Duration::from_millis(20)));
    let record = |name: &str, args: &[&str], env: Option<&std::path::Path>| {
        let out = tmp.path().join(name);
        let mut c = lowbit(tmp.path());
        c.args(["load", &url, "-q", "-o"]).arg(&out).args(args);
        if let Some(hub) = env {
            c.env("HF_HUB_CACHE", hub).env("HF_HUB_OFFLINE", "1");
        }
        let done = c.output().unwrap();
        assert!(out.exists(), "{}", stderr(&done));
        json(&out)
    };
    let find = ["--find-max", "--max-requests", "20", "--slo", "e2e_p50<=60000", "--max-rate", "4", "--profile"];
    let closed = record("closed.json", &[&find[..], &["concurrent"]].concat(), None);
    let found = &closed["find_max"];
    let streams: Vec<u64> = closed["stages"].as_array().unwrap().iter().filter_map(|s| s["streams"].as_u64()).collect();
    assert_eq!(found["unit"], "streams");
    // On a busy machine the client may have been the limit; the search then ends there and says so.
    match found["stopped_by"].as_str().unwrap() {
        "ceiling" => assert_eq!((found["low"].as_f64(), &streams[..]), (Some(4.0), &[1, 2, 4][..])),
        "client limited" => assert!([1, 2, 4].starts_with(&streams) && !streams.is_empty(), "{streams:?}"),
        other => panic!("{other}"),
    }
    for (profile, name) in [("gamma:0.5", "gamma"), ("constant", "constant")] {
        let fast = ["--start-rate", "200", "--max-rate", "200"];
        let open = record(&format!("{name}.json"), &[&find[..5], &fast, &["--profile", profile]].concat(), None);
        assert_eq!(
            (open["stages"][0]["profile"].as_str(), open["stages"][0]["rate"].as_f64()),
            (Some(name), Some(200.0))
        );
    }
    // The cache of a hub, as its own tools leave it.
    let snapshot = tmp.path().join("hub/datasets--org--data/snapshots/0123456789012345678901234567890123456789");
    std::fs::create_dir_all(snapshot.join("a")).unwrap();
    std::fs::create_dir_all(snapshot.join("../../refs")).unwrap();
    std::fs::write(snapshot.join("../../refs/main"), "0123456789012345678901234567890123456789").unwrap();
    std::fs::write(snapshot.join("a/train.jsonl"), "{\"prompt\": \"one\"}\n{\"prompt\": \"two\"}\n").unwrap();
    let hub = tmp.path().join("hub");
    let one = ["--max-requests", "2", "--data", "datasets/org/data/a"];
    let asked = record("hub.json", &one, Some(&hub));
    assert_eq!(asked["data"], "datasets/org/data/a");
    assert_eq!(asked["stages"][0]["metrics"]["outcomes"]["ok"], 2);
}

/// A trace from a file; that no time ends it before its end is a test of the command's own.
#[test]
fn a_trace_is_replayed_to_its_end() {
    let (tmp, url) = (tempfile::tempdir().unwrap(), server());
    let trace = tmp.path().join("trace.jsonl");
    let row =
        |ms: u64| format!(r#"{{"timestamp": {ms}, "input_length": 700, "output_length": 2, "hash_ids": [1, {ms}]}}"#);
    std::fs::write(&trace, [0, 500, 1500].map(row).join("\n")).unwrap();
    let out = tmp.path().join("load.json");
    let mut c = lowbit(tmp.path());
    c.args(["load", &url, "-q", "--profile", "replay", "--tokenizer", "assets/demo", "--data"])
        .arg(&trace)
        .arg("-o")
        .arg(&out);
    // Of three requests the busiest is the p99: the client may call itself the limit.
    assert!(matches!(c.output().unwrap().status.code(), Some(0 | 2)));
    let stage = &json(&out)["stages"][0];
    assert_eq!((stage["profile"].as_str(), stage["stopped_by"].as_str()), (Some("replay"), Some("schedule ended")));
    let at: Vec<u64> =
        stage["requests"].as_array().unwrap().iter().map(|r| r["scheduled_ns"].as_u64().unwrap()).collect();
    assert_eq!(at, [0, 500_000_000, 1_500_000_000]);
}

#[test]
fn refusals() {
    let tmp = tempfile::tempdir().unwrap();
    let fails = |args: &[&str], code: i32, words: &str| {
        let out = lowbit(tmp.path()).args(args).output().unwrap();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).contains(words), "{args:?}: {}", stderr(&out));
    };
    fails(&["load", "http://127.0.0.1:9", "--profile", "tea"], 3, "unknown profile");
    fails(&["load", "https://127.0.0.1:9"], 3, "TLS");
    fails(&["load", "http://127.0.0.1:9", "--data", "tea"], 3, "unknown workload");
    fails(&["load", "http://127.0.0.1:9", "--slo", "ttft<200"], 3, "not a clause");
    fails(&["load", "http://127.0.0.1:9", "--find-max"], 3, "--slo");
    fails(&["load", "http://127.0.0.1:9", "--profile", "replay:2", "--shuffle"], 3, "out of its order");
    fails(&["load", "http://127.0.0.1:9", "--find-max", "--profile", "sweep"], 3, "cannot be searched");
    fails(&["load", "http://127.0.0.1:9", "--body", "[]"], 3, "JSON object");
    fails(&["capacity"], 3, "no load records");
    fails(&["capacity", "--estimate", "--model", "8b", "--gpu", "abacus"], 3, "h200");
    fails(&["capacity", "--estimate", "--model", "70b", "--gpu", "l4"], 1, "infeasible");
    let fleet = |spare: &str| -> serde_json::Value {
        let args = ["capacity", "--estimate", "--model", "8b", "--peak-rps", "50", "--json", "--spare", spare];
        serde_json::from_slice(&ok(lowbit(tmp.path()).args(args)).stdout).unwrap()
    };
    let servers = |v: serde_json::Value| v["models"][0]["servers"][0].as_u64().unwrap();
    assert_eq!(servers(fleet("3")), servers(fleet("0")) + 3);
    let out = ok(lowbit(tmp.path()).args(["capacity", "--estimate", "--model", "8b,70b,assets/demo"]));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(text.contains("llama3.1-70b bf16") && text.contains("does not fit"), "{text}");
}
