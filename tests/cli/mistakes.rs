//! The commonest mistakes: each ends with code 3 and says the way out.

use super::{lowbit, stderr};

const MISTAKES: &[(&str, &[&str])] = &[
    ("a model's name misspelt", &["inspect", "smolm2"]),
    ("a file that is not there", &["convert", "none.gguf", "-o", "never-written"]),
    ("weights in another format", &["inspect", "TMP/pickled"]),
    ("a group size that does not divide", &["plan", "demo", "--group-size", "100"]),
    ("no calibration data", &["quantize", "demo", "-o", "never-written", "--group-size", "64"]),
    (
        "a calibration file misspelt",
        &["quantize", "demo", "-o", "never-written", "--group-size", "64", "--calib", "c5.jsonl"],
    ),
    ("another tool's name for a scheme", &["plan", "demo", "--scheme", "int4"]),
    ("an option misspelt", &["plan", "demo", "--group-sze", "64"]),
    ("an output that is there", &["quantize", "demo", "-o", "TMP/pickled", "--method", "rtn", "--group-size", "64"]),
    (
        "--force over something else",
        &["quantize", "demo", "-o", "TMP/home", "--method", "rtn", "--group-size", "64", "--force"],
    ),
    ("a task's name misspelt", &["eval", "demo", "--tasks", "arc_esy"]),
    ("drift without a reference", &["eval", "demo", "--kl", "assets/demo-text/evaluation.txt"]),
    ("a server where a model is meant", &["eval", "http://localhost:8000", "--tasks", "arc_easy"]),
    ("a record that is not there", &["gate", "eval.json"]),
    ("a folder without records", &["report", "TMP/pickled"]),
    ("no server there", &["load", "http://127.0.0.1:1"]),
];

#[test]
fn each_says_the_way_out() {
    let tmp = tempfile::tempdir().unwrap();
    for file in ["pickled/pytorch_model.bin", "home/thesis.txt"] {
        let path = tmp.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    std::fs::copy(super::demo().join("config.json"), tmp.path().join("pickled/config.json")).unwrap();
    let place = tmp.path().to_str().unwrap();
    let mut all = String::new();
    for (what, args) in MISTAKES {
        let args: Vec<String> = args.iter().map(|a| a.replace("TMP", place)).collect();
        let out = lowbit(tmp.path()).args(["--device", "cpu", "--quiet"]).args(&args).output().unwrap();
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(3), "{what}: {said}");
        assert!(out.stdout.is_empty() && said.contains("error: "), "{what}: {said}");
        assert!(said.contains("\nhint: ") || said.contains("tip: "), "{what}: no way out: {said}");
        all += &format!("{what}\n$ lowbit {}\n{said}\n", args.join(" "));
    }
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("mistakes", all.replace(place, "TMP"));
    });
    assert!(!super::root().join("never-written").exists());
}
