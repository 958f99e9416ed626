//! `--transform` on the demo model: planned to the byte, verified against the original, run again from its recipe.

use std::path::{Path, PathBuf};

use super::{demo, json, lowbit, ok, stderr};

fn quantize(tmp: &Path, name: &str, args: &[&str]) -> PathBuf {
    let out = tmp.join(name);
    let text = super::root().join("assets/demo-text/evaluation.txt");
    let mut c = lowbit(tmp);
    c.args(["--quiet", "--device", "cpu", "quantize"]).arg(demo()).arg("-o").arg(&out).arg("--calib").arg(text);
    ok(c.args(["--samples", "8", "--seq-len", "64", "--threads", "2"]).args(args));
    out
}

#[test]
fn transforms_are_recorded_verified_and_run_again() {
    let tmp = tempfile::tempdir().unwrap();
    for (name, args) in [
        ("awq", &["--transform", "awq", "--method", "rtn", "--group-size", "64"][..]),
        ("smooth", &["--transform", "smoothquant=0.8", "--scheme", "w8a8"]),
        ("rotated", &["--transform", "rotate", "--transform", "awq", "--group-size", "64"]),
    ] {
        let dir = quantize(tmp.path(), name, args);
        let record = json(&dir.join("quantize.json"));
        let applied: Vec<&str> =
            record["transforms"]["applied"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        let wanted = match name {
            "awq" => vec!["awq"],
            "smooth" => vec!["smoothquant=0.8"],
            _ => vec!["rotate", "awq"],
        };
        assert_eq!(applied, wanted);
        assert!(!record["transforms"]["folds"].as_array().unwrap().is_empty(), "{name}");
        ok(lowbit(tmp.path()).args(["--quiet", "verify"]).arg(&dir).arg("--original").arg(demo()));
        // The recipe holds the transforms, and says all; the number of threads changes nothing.
        let again = tmp.path().join(format!("{name}-again"));
        let recipe = dir.join("recipe.toml");
        ok(lowbit(tmp.path())
            .args(["--quiet", "--device", "cpu", "quantize", "--threads", "1"])
            .arg(demo())
            .arg("-o")
            .arg(&again)
            .arg("--recipe")
            .arg(&recipe));
        let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        assert!(weights(&dir) == weights(&again), "{name}");
    }
}

#[test]
fn a_mistake_in_a_transform_ends_with_a_way_out() {
    let tmp = tempfile::tempdir().unwrap();
    for (args, why) in [
        (&["--transform", "quarot"][..], "--transform quarot: expected awq"),
        (&["--transform", "smoothquant"], "hint: use a scheme with quantized inputs"),
        (&["--transform", "awq", "--method", "rtn"], "--transform awq needs calibration data"),
        (&["--transform", "awq", "--bits", "4.25", "--calib", "self"], "leave --transform out"),
    ] {
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--device", "cpu", "quantize"]).arg(demo()).arg("-o").arg(tmp.path().join("out"));
        let out = c.args(["--group-size", "64"]).args(args).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{}", stderr(&out));
        assert!(stderr(&out).contains(why), "{}", stderr(&out));
    }
}
