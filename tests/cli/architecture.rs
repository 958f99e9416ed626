//! Which crate may use which, and how long a file may be.

use std::path::Path;
use std::process::Command;

use super::{ok, root};

const ALLOWED: &[(&str, &[&str])] = &[
    ("lowbit-kernels", &[]),
    ("lowbit-checkpoint", &["kernels"]),
    ("lowbit-model", &["kernels", "checkpoint"]),
    ("lowbit-calibration", &["kernels", "checkpoint", "model"]),
    ("lowbit-quantize", &["kernels", "checkpoint", "model", "calibration"]),
    ("lowbit-eval", &["kernels", "checkpoint", "model"]),
    ("lowbit-bench", &["kernels", "checkpoint", "model"]),
    ("lowbit-serve", &["kernels", "checkpoint", "model"]),
    ("lowbit-report", &["checkpoint", "quantize", "eval", "bench"]),
];

#[test]
fn dependencies_point_one_way() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let out = ok(Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root()));
    let meta: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages = meta["packages"].as_array().unwrap();
    for p in packages {
        let name = p["name"].as_str().unwrap();
        if name == "lowbit" {
            continue;
        }
        let allowed = ALLOWED.iter().find(|a| a.0 == name).unwrap_or_else(|| panic!("no rule for {name}")).1;
        for d in p["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"] != "dev") {
            if let Some(ours) = d["name"].as_str().unwrap().strip_prefix("lowbit-") {
                assert!(allowed.contains(&ours), "{name} must not use lowbit-{ours}");
            }
        }
    }
    assert_eq!(packages.len(), ALLOWED.len() + 1);
}

#[test]
fn files_stay_short() {
    fn walk(dir: &Path) {
        for e in std::fs::read_dir(dir).unwrap() {
            let path = e.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                walk(&path);
            } else if name.ends_with(".rs") {
                let lines = std::fs::read_to_string(&path).unwrap().lines().count();
                assert!(lines <= 1000, "{}: {lines} lines", path.display());
            }
        }
    }
    walk(&root());
}
