//! Result files of other tools.

use std::path::{Path, PathBuf};

use lowbit_bench::load::import::{read, restage};
use lowbit_bench::load::metrics::Trim;
use lowbit_bench::slo::Slo;
use lowbit_bench::slo::verdict::Verdict;
use serde_json::{Value, json};

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import").join(name)
}

fn changed(name: &str, change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, PathBuf) {
    let mut v: Value = serde_json::from_slice(&std::fs::read(sample(name)).unwrap()).unwrap();
    change(&mut v);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, v.to_string()).unwrap();
    (dir, path)
}

fn near(got: f64, want: f64, what: &str) {
    // Their stamps are seconds since the epoch in doubles: a quarter of a microsecond.
    assert!((got - want).abs() <= 2e-3, "{what}: {got} not {want}");
}

/// The sample: two runs of GuideLLM 0.8.1 against its own mock server, without the texts: two streams, and Poisson at 20/s, whose last
/// three requests the server refused. Our numbers from its requests are those it reports itself, where definitions agree.
#[test]
fn guidellm_reports() {
    let path = sample("guidellm-0.8.1.json");
    let theirs: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut r = read(&path).unwrap();
    assert_eq!((r.target.model.as_str(), r.target.exact_output), ("llama-3.1-8b-instruct", true));
    let [closed, open] = &r.stages[..] else { panic!("{} stages", r.stages.len()) };
    assert_eq!((closed.profile.as_str(), closed.streams, closed.rate), ("concurrent", Some(2), None));
    assert_eq!((open.profile.as_str(), open.streams, open.rate), ("poisson", None, Some(20.0)));
    assert_eq!((closed.metrics.ok(), open.metrics.ok(), open.metrics.outcomes["failed"]), (6, 9, 3));
    for (stage, b) in r.stages.iter().zip(theirs["benchmarks"].as_array().unwrap()) {
        let mean = |name: &str| b["metrics"][name]["successful"]["mean"].as_f64().unwrap();
        let ours = |name: &str| stage.metrics.latency[name].mean;
        near(ours("ttft_from_send_ms"), mean("time_to_first_token_ms"), "TTFT");
        near(ours("e2e_from_send_ms"), 1e3 * mean("request_latency"), "latency");
        // Theirs is weighted by tokens − 1; all answers of the sample have eight.
        near(ours("itl_request_mean_ms"), mean("inter_token_latency_ms"), "ITL");
        // An answer's end is some microseconds after its last token.
        assert!((ours("tpot_incl_ms") - mean("time_per_output_token_ms")).abs() < 0.5);
        assert!(!stage.metrics.latency.contains_key("icl_chunk_ms") && stage.metrics.itl_token_missing.is_some());
    }
    // From the schedule, waiting counts.
    assert!(open.metrics.latency["ttft_ms"].mean > open.metrics.latency["ttft_from_send_ms"].mean);
    restage(&mut r, None, Some(&Slo::parse("ttft_p50<=1").unwrap())).unwrap();
    assert_eq!(r.stages[0].slo.as_ref().unwrap().verdict, Verdict::Broken);
    let refused = restage(&mut r, None, Some(&Slo::parse("stall_p50<=1").unwrap())).unwrap_err();
    assert!(refused.to_string().contains("stall"), "{refused}");
    restage(&mut r, Some(Trim { warmup: 0.5, cooldown: 0.0 }), None).unwrap();
    assert!(r.stages[0].metrics.trimmed > 0 && !r.stages[0].metrics.latency.contains_key("icl_chunk_ms"));

    let (_dir, warm) = changed("guidellm-0.8.1.json", |v| {
        let b = &mut v["benchmarks"][1];
        b["warmup_duration"] = json!(0.2);
        b["start_time"] = json!(b["start_time"].as_f64().unwrap() + 0.2);
    });
    assert!(read(&warm).unwrap().stages[1].metrics.trimmed > 0);
    let (_dir, part) = changed("guidellm-0.8.1.json", |v| {
        v["benchmarks"][0]["requests"]["successful"].as_array_mut().unwrap().pop();
    });
    assert!(read(&part).unwrap().stages[0].client.invalid.iter().any(|w| w.contains("5 of 6 requests")));
    // One stream is called the same, however it was asked for, so that it is compared with ours.
    for kind in ["concurrent", "synchronous"] {
        let (_dir, one) = changed("guidellm-0.8.1.json", |v| {
            v["benchmarks"][0]["config"]["strategy"] = json!({"type_": kind, "streams": 1, "max_concurrency": 1});
        });
        let stage = &read(&one).unwrap().stages[0];
        assert_eq!((stage.profile.as_str(), stage.streams), ("synchronous", Some(1)));
    }
    let (_dir, other) = changed("guidellm-0.8.1.json", |v| v["benchmarks"][1]["config"] = json!({}));
    let error = read(&other).unwrap_err().to_string();
    assert!(error.contains("benchmarks[1]") && error.contains("0.8.1"), "{error}");
}

/// The sample is written by hand with the keys of `vllm/benchmarks/serve.py`; its summary is worked out by their formulas.
#[test]
fn vllm_results() {
    let r = read(&sample("vllm-bench.json")).unwrap();
    let s = &r.stages[0];
    assert_eq!(
        (s.profile.as_str(), s.rate, s.metrics.ok(), s.metrics.outcomes["failed"]),
        ("poisson", Some(2.0), 3, 1)
    );
    let mean = |name: &str| s.metrics.latency[name].mean;
    near(mean("ttft_from_send_ms"), 400.0 / 3.0, "TTFT");
    near(mean("tpot_excl_ms"), (25.5 + 30.5 + 11.0) / 3.0, "TPOT");
    near(mean("icl_chunk_ms"), 24.0, "ITL");
    // The third waited 200 ms for a place.
    near(mean("ttft_ms"), 600.0 / 3.0, "TTFT from the schedule");
    near(mean("schedule_delay_ms"), 200.0 / 3.0, "delay");
    assert_eq!(s.requests.iter().filter_map(|t| t.tokens_by_chunk()).count(), 4, "a chunk a token");
    assert!(s.client.invalid.iter().any(|w| w.contains("cap on concurrency")), "{:?}", s.client.invalid);

    let name = "vllm-bench.json";
    let (_dir, plain) = changed(name, |v| v.as_object_mut().unwrap().retain(|k, _| k != "ttfts"));
    assert!(read(&plain).unwrap_err().to_string().contains("--save-detailed"));
    let (_dir, old) = changed(name, |v| v.as_object_mut().unwrap().retain(|k, _| k != "start_times"));
    assert!(read(&old).unwrap_err().to_string().contains("newer vLLM"));
    let (_dir, short) = changed(name, |v| v["itls"] = json!([[]]));
    assert!(read(&short).unwrap_err().to_string().contains("`itls` 1"));
    let (_dir, wrong) = changed(name, |v| v["completed"] = json!(4));
    assert!(read(&wrong).unwrap_err().to_string().contains("3 requests have no error"));
    // --append-result: a result a line.
    let text = std::fs::read_to_string(sample(name)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let both = dir.path().join("both.json");
    std::fs::write(&both, format!("{text}{}", text.replace("\"request_rate\": 2.0", "\"request_rate\": \"inf\"")))
        .unwrap();
    let stages = read(&both).unwrap().stages;
    assert_eq!((stages.len(), stages[1].profile.as_str(), stages[1].streams), (2, "concurrent", Some(2)));
    std::fs::write(&both, "[]").unwrap();
    assert!(read(&both).unwrap_err().to_string().contains("neither a load record"));
    std::fs::write(&both, "").unwrap();
    assert!(read(&both).unwrap_err().to_string().contains("empty"));
}
