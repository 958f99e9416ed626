//! Which crate may use which, how long a file may be, and that public items are documented.

use std::collections::HashMap;
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

/// Every Rust source of the repository with its text, by its path from the root.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, out: &mut Vec<(String, String)>) {
        for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                walk(&path, out);
            } else if name.ends_with(".rs") {
                let shown = path.strip_prefix(root()).unwrap().display().to_string();
                out.push((shown, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut out = Vec::new();
    walk(&root(), &mut out);
    out.sort();
    out
}

/// Clippy reports a public item without a comment, and `.ci/run` takes no report: as long as every crate takes the workspace's lints
/// and says so where it does not.
#[test]
fn every_public_item_is_documented() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let manifests = ALLOWED.iter().map(|(name, _)| format!("{}/Cargo.toml", name.trim_start_matches("lowbit-")));
    for manifest in manifests.chain(["Cargo.toml".to_owned()]) {
        assert!(read(&manifest).contains("\n[lints]\nworkspace = true\n"), "{manifest}: not the workspace's lints");
    }
    assert!(read("Cargo.toml").contains("\n[workspace.lints.rust]\nmissing_docs = \"warn\"\n"));
    assert!(read(".ci/run").contains("\ncargo clippy --release --workspace --all-targets -- -D warnings\n"));
    // Fields that a message or a format explains are the exception, with a reason; a whole file never is.
    let lint = ["missing", "docs"].join("_");
    for (path, text) in sources() {
        for line in text.lines().filter(|l| l.contains(&lint)) {
            let excused = line.trim_start().starts_with(&format!("#[expect({lint}, reason = "));
            assert!(excused || path == "tests/cli/architecture.rs", "{path}: {line}");
        }
    }
}

/// Never above 1,000 lines; above 600 the module's comment says why it is one file.
#[test]
fn files_stay_short() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= 1000, "{path}: {lines} lines");
        let head: String = text.lines().take_while(|l| l.starts_with("//!") || l.starts_with("//")).collect();
        assert!(
            lines <= 600 || head.to_lowercase().contains("one file"),
            "{path}: {lines} lines, and no word on why it is one file"
        );
    }
}

/// Lines that say something: no comments, no imports, no attributes, no parameter lists, which implementations of a trait share.
fn saying(text: &str) -> Vec<(usize, &str)> {
    let parameter = |l: &str| {
        let name = l.split(':').next().unwrap_or_default();
        l.ends_with(',') && l.contains(": ") && name.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    let of_fn = |l: &str| l.contains("fn ") || l.starts_with(") ->") || l == "&self," || l == "&mut self,";
    let numbered = text.lines().map(str::trim).enumerate().map(|(i, l)| (i + 1, l));
    numbered
        .filter(|(_, l)| {
            l.len() > 4 && !["//", "use ", "#["].iter().any(|p| l.starts_with(p)) && !parameter(l) && !of_fn(l)
        })
        .collect()
}

/// Runs of as many lines that are the same, at two places.
fn copies(files: &[(String, String)], most: usize) -> Vec<String> {
    let mut seen: HashMap<Vec<&str>, String> = HashMap::new();
    let mut out = Vec::new();
    for (path, text) in files {
        let lines = saying(text);
        let mut at = 0;
        while at + most <= lines.len() {
            let run: Vec<&str> = lines[at..at + most].iter().map(|l| l.1).collect();
            let here = format!("{path}:{}", lines[at].0);
            match seen.get(&run) {
                Some(there) => {
                    out.push(format!("{here} is {there}"));
                    at += most;
                }
                None => {
                    seen.insert(run, here);
                    at += 1;
                }
            }
        }
    }
    out
}

/// What is said twice drifts apart.
#[test]
fn nothing_is_copied() {
    let of = |n: usize| (0..12).map(|i| format!("    let value_{i} = compute({n} + {i});\n")).collect::<String>();
    let planted =
        [("a.rs".to_owned(), of(1)), ("b.rs".to_owned(), format!("// other\n{}", of(1))), ("c.rs".to_owned(), of(2))];
    assert_eq!(copies(&planted, 10), ["b.rs:2 is a.rs:1"]);
    let found = copies(&sources(), 10);
    assert!(found.is_empty(), "copied code:\n{}", found.join("\n"));
}
