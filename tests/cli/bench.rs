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
    assert_eq!(rounding["tokens"], 64);
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
