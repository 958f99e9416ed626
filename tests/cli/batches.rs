//! What is computed together, and by how many threads, changes no byte of a quantization.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::resume::contents;
use super::{demo, json, lowbit, ok, stderr};

/// All files but the recipe, which has the option; of the record what was made, and of what.
fn made(dir: &Path) -> (BTreeMap<String, Vec<u8>>, [Value; 3]) {
    let mut files = contents(dir);
    let record: Value = serde_json::from_slice(&files["quantize.json"]).unwrap();
    files.retain(|name, _| !matches!(name.as_str(), "quantize.json" | "recipe.toml"));
    (files, ["layers", "calibration", "transforms"].map(|part| record[part].clone()))
}

#[test]
fn threads_and_batch_size_change_no_byte() {
    let tmp = tempfile::tempdir().unwrap();
    let text = super::root().join("assets/demo-text/evaluation.txt");
    // 2048 tokens are eight of these windows: batches below, across and above what is summed together, and a part of it at the end.
    let quantized = |method: &[&str], more: &[&str], name: &str| {
        let out = tmp.path().join(name);
        let mut c = lowbit(tmp.path());
        c.args(["--device", "cpu", "quantize"]).arg(demo()).arg("-o").arg(&out).arg("--calib").arg(&text);
        ok(c.args(["--samples", "11", "--seq-len", "256", "--group-size", "64"]).args(method).args(more));
        let found = made(&out);
        std::fs::remove_dir_all(out).unwrap();
        found
    };
    for method in [&["--method", "rtn"][..], &["--method", "gptq", "--transform", "awq"], &["--method", "best"]] {
        let usual = quantized(method, &["--threads", "2"], "usual");
        for (batch, threads) in [("1", "2"), ("4", "1"), ("16", "2")] {
            let found = quantized(method, &["--batch-size", batch, "--threads", threads], batch);
            assert!(found == usual, "{method:?}: --batch-size {batch} --threads {threads} differs");
        }
    }
}

#[test]
fn batch_size_is_planned_and_recorded() {
    let tmp = tempfile::tempdir().unwrap();
    let text = super::root().join("assets/demo-text/evaluation.txt");
    let planned = |more: &[&str]| -> Value {
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--json", "--device", "cpu", "plan"]).arg(demo()).arg("--calib").arg(&text);
        c.args(["--samples", "64", "--seq-len", "128", "--group-size", "64"]).args(more);
        serde_json::from_slice(&ok(&mut c).stdout).unwrap()
    };
    let memory = |plan: &Value| plan["peak_memory_bytes"].as_u64().unwrap();
    let usual = planned(&[]);
    assert!(usual["provenance"]["options"].get("batch_size").is_none());
    assert_eq!(memory(&planned(&["--batch-size", "16"])), memory(&usual));
    let large = planned(&["--batch-size", "64"]);
    assert_eq!(large["provenance"]["options"]["batch_size"], 64);
    // A chunk needs the norm's output, gate and up, of 256 and 768 columns; of what many chunks need, the allocator keeps five quarters.
    assert_eq!(memory(&large) - memory(&usual), 4 * (256 + 2 * 768) * (64 * 128 - 2048 * 5 / 4));

    let out = tmp.path().join("out");
    let mut c = lowbit(tmp.path());
    c.args(["--quiet", "quantize"]).arg(demo()).args([
        "--method",
        "rtn",
        "--group-size",
        "64",
        "--batch-size",
        "4",
        "-o",
    ]);
    ok(c.arg(&out));
    assert_eq!(json(&out.join("quantize.json"))["options"]["batch_size"], 4);
    assert!(std::fs::read_to_string(out.join("recipe.toml")).unwrap().contains("\nbatch-size = \"4\"\n"));

    let mut c = lowbit(tmp.path());
    let none = c.arg("plan").arg(demo()).args(["--batch-size", "0"]).output().unwrap();
    assert_eq!(none.status.code(), Some(3), "{}", stderr(&none));
    assert!(stderr(&none).contains("--batch-size must be at least 1"), "{}", stderr(&none));
}
