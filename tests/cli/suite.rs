//! `lowbit suite` and `bench/gpu-suite`, as far as they run without a GPU.

use super::{json, lowbit, ok, stderr};

/// Timed rows of the suite: a change of `bench/src/suite/table.rs` changes it.
const ROWS: usize = 296;

/// stdout of a run that must succeed.
fn stdout(args: &[&str]) -> String {
    let tmp = tempfile::tempdir().unwrap();
    String::from_utf8(ok(lowbit(tmp.path()).arg("suite").args(args)).stdout).unwrap()
}

fn snapshot(name: &str, text: String) {
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn help() {
    snapshot("help-suite", stdout(&["--help"]));
}

#[test]
fn a_dry_run_lists_every_row_without_a_device() {
    // An ordinal no machine has: nothing may be opened.
    let text = stdout(&["--dry-run", "--only", "kernels", "--device", "cuda:99"]);
    snapshot("suite-dry-run", text.lines().take(24).map(|l| format!("{l}\n")).collect());
    assert_eq!(text.lines().count(), 3 + ROWS);
    let all: serde_json::Value = serde_json::from_str(&stdout(&["--dry-run", "--json"])).unwrap();
    assert_eq!(all["kernels"].as_array().unwrap().len(), ROWS);
    assert!(all["kernels"].as_array().unwrap().iter().all(|r| r["bytes"].as_u64() > Some(0)));
    assert!(all["correctness"].as_array().unwrap().len() > 50);
}

#[test]
fn the_kernels_agree_on_the_emulated_device_and_the_record_renders() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("suite.json");
    let run = |args: &[&str]| {
        lowbit(tmp.path()).args(["--device", "emulated", "suite"]).args(args).arg("-o").arg(&path).output().unwrap()
    };
    let out = run(&["--only", "correctness"]);
    assert!(out.status.success(), "{}{}", String::from_utf8_lossy(&out.stdout), stderr(&out));
    let record = json(&path);
    let rows = record["correctness"].as_array().unwrap();
    assert!(rows.len() > 50 && rows.iter().all(|r| r["passed"] == true));
    assert_eq!(record["provenance"]["device"], "emulated");
    // A second run keeps the record, and an emulator has no speed.
    assert_eq!(run(&["--only", "correctness"]).status.code(), Some(3));
    let out = run(&["--only", "kernels", "--force"]);
    assert_eq!(out.status.code(), Some(3));
    assert!(stderr(&out).contains("hint: --only correctness"), "{}", stderr(&out));
    let text = stdout(&["--render", path.to_str().unwrap()]);
    assert!(text.contains(&format!("{0} of {0} operations agree", rows.len())), "{text}");
}

#[test]
fn the_script_lists_its_stages_and_every_row() {
    let out = ok(super::script("bench/gpu-suite").args(["--dry-run", env!("CARGO_BIN_EXE_lowbit")]));
    let text = String::from_utf8(out.stdout).unwrap();
    for wanted in ["memcheck", "racecheck", "rtn_parity", "linear w4a16-g128 4096x4096, 16 tokens", "hessian_update"] {
        assert!(text.contains(wanted), "no `{wanted}` in:\n{text}");
    }
}
