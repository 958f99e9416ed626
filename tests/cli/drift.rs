//! Where drift comes from: blame, the per-token view, texts written freely.

use super::{demo, lowbit, ok, root, stderr};

#[test]
fn the_layer_that_was_broken_is_blamed() {
    let tmp = tempfile::tempdir().unwrap();
    let model = tmp.path().join("model");
    let mut q = lowbit(tmp.path());
    q.args(["--quiet", "quantize"]).arg(demo()).arg("-o").arg(&model);
    ok(q.args(["--method", "rtn", "--scheme", "w8a16", "--group-size", "64", "--ignore", "re:.*layers\\.[013]\\..*"]));
    let text = root().join("assets/demo-text/evaluation.txt");
    let eval = |unit: &str, more: &[&str]| -> serde_json::Value {
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--json", "--device", "cpu", "eval"])
            .arg(&model)
            .args(["--reference", "demo", "--kl"])
            .arg(&text);
        c.args(["--kl-window", "128", "--limit", "3", "--blame", unit]).args(more);
        serde_json::from_slice(&ok(&mut c).stdout).unwrap()
    };
    let blocks = eval("block", &["--worst-tokens", "5", "--free-running", "4", "--free-tokens", "16"]);
    let suspects = blocks["blame"]["suspects"].as_array().unwrap();
    // Only what is quantized is suspected; without it nothing is left.
    assert_eq!((suspects.len(), &suspects[0]["module"]), (1, &serde_json::json!("model.layers.2")));
    let (kl, left) = (blocks["blame"]["kl"].as_f64().unwrap(), suspects[0]["kl"].as_f64().unwrap());
    assert!(kl > 0.0 && left <= 1e-7, "{kl} {left}");
    assert!((suspects[0]["regained"]["value"].as_f64().unwrap() - (kl - left)).abs() < 1e-9);
    let worst = blocks["worst_tokens"].as_array().unwrap();
    let kls: Vec<f64> = worst.iter().map(|t| t["kl"].as_f64().unwrap()).collect();
    assert!(kls.len() == 5 && kls.is_sorted_by(|a, b| a >= b));
    assert_eq!(kls[0], blocks["kl"]["max"].as_f64().unwrap());
    // What the view shows is the text.
    let original = std::fs::read_to_string(&text).unwrap();
    let piece = format!("{}{}", worst[0]["context"].as_str().unwrap(), worst[0]["token"].as_str().unwrap());
    assert!(original.contains(piece.trim_start_matches("<s>").trim()), "{piece:?}");
    assert_eq!(worst[0]["reference_choices"].as_array().unwrap().len(), 5);
    let free = &blocks["free_running"];
    assert_eq!((free["prompts"].as_u64(), free["pairs"].as_array().map(Vec::len)), (Some(4), Some(4)));
    let linears = eval("linear", &[]);
    let suspects = linears["blame"]["suspects"].as_array().unwrap();
    assert_eq!(suspects.len(), 7);
    assert!(suspects.iter().all(|s| s["module"].as_str().unwrap().starts_with("model.layers.2.")));
    let rates: Vec<f64> = suspects.iter().map(|s| s["per_megabyte"].as_f64().unwrap()).collect();
    assert!(rates.is_sorted_by(|a, b| a >= b), "{rates:?}");
}

/// What keys and values in eight bits cost, against the same model with floats: little, and not nothing.
#[test]
fn a_cache_in_eight_bits_drifts_a_little() {
    let tmp = tempfile::tempdir().unwrap();
    let kl = |kv: &[&str]| {
        let mut c = lowbit(tmp.path());
        c.args([
            "--quiet",
            "--json",
            "--device",
            "cpu",
            "eval",
            "demo",
            "--reference",
            "demo",
            "--kl-window",
            "256",
            "--limit",
            "4",
        ]);
        c.arg("--kl").arg(root().join("assets/demo-text/evaluation.txt")).args(kv);
        let record: serde_json::Value = serde_json::from_slice(&ok(&mut c).stdout).unwrap();
        (record["kl"]["mean"].as_f64().unwrap(), record["provenance"]["options"]["kv_cache"].clone())
    };
    assert_eq!(kl(&[]), (0.0, serde_json::Value::Null));
    let (mean, said) = kl(&["--kv-cache", "int8"]);
    // Measured: 2.8e-5 nats a token over eight windows.
    assert!(mean > 0.0 && mean < 3e-4, "{mean:e}");
    assert_eq!(said, "int8");
    // Three bits of mantissa are coarser than int8 is for most numbers of a row. KL goes with the square of the error: some twenty times.
    let (eight, said) = kl(&["--kv-cache", "fp8"]);
    assert!(eight > mean && eight < 3e-3, "{eight:e} and {mean:e}");
    assert_eq!(said, "fp8");
    for kv in ["int8", "fp8"] {
        let gpu = lowbit(tmp.path())
            .args(["--device", "scalar", "serve", "demo", "--port", "0", "--kv-cache", kv])
            .output()
            .unwrap();
        let text = stderr(&gpu);
        assert_eq!(gpu.status.code(), Some(3), "{text}");
        assert!(
            text.contains(&format!("--kv-cache {kv} ")) && text.contains("--device cpu, or --kv-cache float"),
            "{text}"
        );
    }
}
