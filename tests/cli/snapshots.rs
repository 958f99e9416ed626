//! The command line contract: exit status, stdout and stderr of every command's help, of a success and of a failure.
//!
//! After a change that is meant: `INSTA_UPDATE=always cargo test --release --test integration snapshots`, then read the diff.

use super::{lowbit, stderr};

/// Runs and snapshots status, stdout and stderr.
fn check(name: &str, args: &[&str]) {
    let tmp = tempfile::tempdir().unwrap();
    let out = lowbit(tmp.path()).args(["--device", "cpu"]).args(args).output().unwrap();
    let text = format!(
        "$ lowbit {}\nstatus: {}\n--- stdout\n{}--- stderr\n{}",
        args.join(" "),
        out.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&out.stdout),
        stderr(&out)
    );
    let text = text.replace(env!("CARGO_PKG_VERSION"), "VERSION");
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn help() {
    check("help", &["--help"]);
    for command in [
        "run",
        "inspect",
        "plan",
        "quantize",
        "verify",
        "convert",
        "eval",
        "bench",
        "generate",
        "report",
        "load",
        "capacity",
        "compare",
        "gate",
        "serve",
        "completions",
        "man",
    ] {
        check(&format!("help-{command}"), &[command, "--help"]);
    }
}

#[test]
fn success() {
    check("inspect", &["inspect", "assets/demo"]);
    check("plan", &["plan", "assets/demo", "--group-size", "64"]);
    check("plan-tables", &["plan", "assets/demo", "--group-size", "64", "--head", "w8", "--embedding", "w8"]);
    check("verify", &["verify", "assets/demo"]);
}

#[test]
fn failure() {
    check("no-command", &[]);
    check("unknown-model", &["inspect", "no-such-model"]);
    check("group-size", &["plan", "assets/demo", "--group-size", "100"]);
    check("pattern", &["plan", "assets/demo", "--group-size", "64", "--ignore", "nothing"]);
    check("fused", &["plan", "assets/demo", "--group-size", "64", "--ignore", "model.layers.0.self_attn.k_proj"]);
    check("scheme", &["plan", "assets/demo", "--scheme", "w5a16"]);
    check("no-calib", &["quantize", "assets/demo", "-o", "never-written", "--group-size", "64"]);
    check("no-report", &["report", "docs"]);
    check("kl-alone", &["eval", "assets/demo", "--kl", "assets/demo-text/evaluation.txt"]);
    check("gate-nothing", &["gate", "no-such-record.json"]);
    check("convert-dense", &["convert", "assets/demo", "-o", "never-written"]);
}
