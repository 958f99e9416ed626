//! Bad input: exit code 3, one line that names the culprit, nothing left behind.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{copy, demo, json, lowbit, names, ok, stderr};

/// A damaged copy of the demo in `tmp/in`.
fn damaged(tmp: &Path, edit: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let dir = tmp.join("in");
    copy(&demo(), &dir);
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    edit(&mut bytes);
    std::fs::write(&file, bytes).unwrap();
    dir
}

/// `quantize INPUT ARGS` into an empty folder must be refused, naming all of `wanted`, and leave the folder empty.
fn refused(tmp: &Path, input: &Path, args: &[&str], wanted: &[&str], hint: bool) -> String {
    let work = tmp.join("work");
    std::fs::create_dir_all(&work).unwrap();
    let out = lowbit(tmp)
        .args(["--quiet", "quantize", "--group-size", "64"])
        .arg(input)
        .arg("-o")
        .arg(work.join("out"))
        .args(args)
        .output()
        .unwrap();
    let text = stderr(&out);
    check(out.status.code(), &text, wanted, hint);
    assert!(out.stdout.is_empty());
    assert_eq!(names(&work), Vec::<String>::new(), "left behind");
    text
}

fn check(code: Option<i32>, text: &str, wanted: &[&str], hint: bool) {
    assert_eq!(code, Some(3), "{text}");
    assert!(text.starts_with("error: "), "{text}");
    assert_eq!(text.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for w in wanted {
        assert!(text.contains(w), "no `{w}` in: {text}");
    }
    let hints = text.lines().filter(|l| l.starts_with("hint: ")).count();
    assert!(!hint || hints == 1, "no hint: {text}");
    assert!(text.lines().count() <= 1 + hints, "more than an error and a hint: {text}");
}

const RTN: &[&str] = &["--method", "rtn"];

#[test]
fn truncated_file() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = damaged(tmp.path(), |b| b.truncate(b.len() / 2));
    refused(tmp.path(), &dir, RTN, &["model.safetensors"], true);
}

#[test]
fn index_names_the_wrong_shard() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("in");
    ok(lowbit(tmp.path()).args(["--quiet", "quantize"]).arg(demo()).arg("-o").arg(&dir).args([
        "--method",
        "rtn",
        "--group-size",
        "64",
        "--shard-mb",
        "1",
    ]));
    let path = dir.join("model.safetensors.index.json");
    let mut index = json(&path);
    let map = index["weight_map"].as_object_mut().unwrap();
    let other = map["model.norm.weight"].clone();
    let wrong = map["lm_head.weight"].clone();
    assert_ne!(other, wrong, "the model must have shards");
    map.insert("model.norm.weight".into(), wrong);
    std::fs::write(&path, index.to_string()).unwrap();
    let out = lowbit(tmp.path()).args(["--quiet", "verify"]).arg(&dir).output().unwrap();
    check(out.status.code(), &stderr(&out), &["model.safetensors.index.json", "model.norm.weight"], true);
    refused(tmp.path(), &dir, RTN, &["model.safetensors.index.json", "model.norm.weight"], true);
}

#[test]
fn nan_weight() {
    let tmp = tempfile::tempdir().unwrap();
    let name = "model.layers.2.mlp.up_proj.weight";
    let dir = damaged(tmp.path(), |b| {
        let len = u64::from_le_bytes(b[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&b[8..8 + len]).unwrap();
        let at = 8 + len + header[name]["data_offsets"][0].as_u64().unwrap() as usize + 2 * 1000;
        b[at..at + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    });
    refused(tmp.path(), &dir, RTN, &[name, "1000"], false);
    let gptq: &[&str] = &["--calib", "self", "--samples", "2", "--seq-len", "16"];
    refused(tmp.path(), &dir, gptq, &[name], false);
}

#[test]
fn hostile_headers() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = damaged(tmp.path(), |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    refused(tmp.path(), &dir, RTN, &["model.safetensors"], true);

    let tmp = tempfile::tempdir().unwrap();
    let dir = damaged(tmp.path(), |b| {
        let header = r#"{"lm_head.weight":{"dtype":"BF16","shape":[4294967296,4294967296,2],"data_offsets":[0,16]}}"#;
        *b = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
    });
    refused(tmp.path(), &dir, RTN, &["model.safetensors"], false);
}

#[test]
fn missing_tensor() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = damaged(tmp.path(), |b| {
        let old = b"model.layers.0.self_attn.q_proj.weight";
        let at = b.windows(old.len()).position(|w| w == old).unwrap();
        b[at..at + old.len()].copy_from_slice(b"model.layers.0.self_attn.x_proj.weight");
    });
    refused(tmp.path(), &dir, RTN, &["model.layers.0.self_attn.q_proj.weight"], true);
}

#[test]
fn group_size_that_does_not_divide() {
    let tmp = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let out = lowbit(tmp.path())
        .args(["--quiet", "quantize"])
        .arg(demo())
        .arg("-o")
        .arg(tmp.path().join("out"))
        .args(["--calib", "self", "--group-size", "100"])
        .output()
        .unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let text = stderr(&out);
    assert_eq!(out.status.code(), Some(3), "{text}");
    for w in ["error: ", "100", "q_proj", "down_proj", "256", "768", "hint: ", "--group-size 64"] {
        assert!(text.contains(w), "no `{w}` in: {text}");
    }
    assert_eq!(names(tmp.path()), Vec::<String>::new());
}

#[test]
fn existing_output_is_kept() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("mine"), "precious").unwrap();
    for command in ["quantize", "run"] {
        let out = lowbit(tmp.path())
            .args(["--quiet", command])
            .arg(demo())
            .arg("-o")
            .arg(&target)
            .args(["--method", "rtn", "--group-size", "64"])
            .output()
            .unwrap();
        check(out.status.code(), &stderr(&out), &["out", "--force"], true);
        assert_eq!(names(tmp.path()), ["out"]);
        assert_eq!(names(&target), ["mine"]);
    }
}

#[test]
fn run_refuses_what_it_cannot_measure_before_the_work() {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let text = super::root().join("assets/demo-text/evaluation.txt");
    let text = text.to_str().unwrap();
    let cases: [(&[&str], &str); 8] = [
        (&["--repetitions", "1"], "at least 2 repetitions"),
        (&["--margin", "1"], "hint: give --tasks"),
        (&["--margin", "101", "--tasks", "arc_easy"], "between 0 and 100"),
        (&["--max-kl", "0.1"], "hint: give --eval-text"),
        (&["--max-ppl-ratio", "1.1"], "hint: give --eval-text"),
        (&["--eval-text", "none.txt"], "none.txt"),
        (&["--eval-text", text, "--protocol", "gptq"], "gptq"),
        (&["--tasks", "none.yaml"], "none.yaml"),
    ];
    for (args, says) in cases {
        let mut c = lowbit(tmp.path());
        c.args(["--device", "cpu", "run"]).arg(demo()).arg("-o").arg(&target);
        let out = c.args(["--method", "rtn", "--group-size", "64"]).args(args).output().unwrap();
        let said = stderr(&out);
        assert!(out.status.code() == Some(3) && said.contains(says), "{args:?}: {said}");
        assert!(!target.exists(), "{args:?}: {said}");
    }
}

#[test]
fn unknown_architecture() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = damaged(tmp.path(), |_| ());
    let path = dir.join("config.json");
    let mut config = json(&path);
    config["model_type"] = "mamba".into();
    config["architectures"] = serde_json::json!(["MambaForCausalLM"]);
    std::fs::write(&path, config.to_string()).unwrap();
    let text = refused(tmp.path(), &dir, RTN, &[], false);
    assert!(text.to_lowercase().contains("mamba"), "{text}");
}

#[test]
fn output_is_the_input() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = damaged(tmp.path(), |_| ());
    let before = std::fs::read(dir.join("model.safetensors")).unwrap();
    for same in [dir.clone(), dir.join("../in")] {
        let out = lowbit(tmp.path())
            .args(["--quiet", "quantize", "--force", "--method", "rtn", "--group-size", "64"])
            .arg(&dir)
            .arg("-o")
            .arg(same)
            .output()
            .unwrap();
        check(out.status.code(), &stderr(&out), &["the output is the input"], true);
    }
    assert_eq!(names(tmp.path()), ["in"]);
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), before);
}

/// Starts `run` with `args`, interrupts it after `wait`, and expects 130 and no model.
#[cfg(unix)]
fn interrupt(args: &[&str], wait: Duration) {
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("out");
    let mut child = lowbit(tmp.path())
        .args(["--quiet", "run"])
        .arg(demo())
        .arg("-o")
        .arg(&target)
        .args(["--calib", "self", "--group-size", "64", "--no-bench"])
        .args(args)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(wait);
    assert!(child.try_wait().unwrap().is_none(), "ended before the signal");
    ok(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]));
    let sent = Instant::now();
    while child.try_wait().unwrap().is_none() && sent.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let stopped = child.try_wait().unwrap().is_some();
    if !stopped {
        child.kill().unwrap();
    }
    let out = child.wait_with_output().unwrap();
    assert!(stopped, "still running a minute after Ctrl-C");
    assert_eq!(out.status.code(), Some(130), "{}", stderr(&out));
    let said = stderr(&out);
    assert!(said.starts_with("error: interrupted\nhint: the same command goes on where it stopped"), "{said}");
    let left = names(&target);
    assert!(!left.iter().any(|n| n == "model" || n.contains("partial")), "{left:?}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_while_the_model_writes_text() {
    interrupt(&["--samples", "8000", "--seq-len", "64"], Duration::from_millis(1500));
}

#[test]
#[cfg(target_os = "linux")]
fn full_disk() {
    let tmp = tempfile::tempdir().unwrap();
    let mount = tmp.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(&mount)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !mounted {
        eprintln!("skipped: no right to mount a small disk");
        return;
    }
    let out = lowbit(tmp.path())
        .args(["--quiet", "quantize", "--method", "rtn", "--group-size", "64"])
        .arg(demo())
        .arg("-o")
        .arg(mount.join("out"))
        .output();
    let left = names(&mount);
    ok(std::process::Command::new("umount").arg(&mount));
    let out = out.unwrap();
    check(out.status.code(), &stderr(&out), &["small"], true);
    assert_eq!(left, Vec::<String>::new(), "left behind");
}

#[test]
fn several_devices_where_they_are_of_no_use() {
    let tmp = tempfile::tempdir().unwrap();
    let said = |devices: &str| {
        let out = lowbit(tmp.path()).args(["--device", devices, "inspect", "demo"]).output().unwrap();
        (out.status.code(), stderr(&out))
    };
    let (code, text) = said("emulated,emulated");
    check(code, &text, &["2 devices", "computes on one", "hint: --device emulated; quantize, plan and run"], true);
    for (devices, wanted) in [
        ("cpu,cpu", "several devices are GPUs"),
        ("cuda:0,cpu", "several devices are GPUs"),
        ("auto,cuda:1", "several devices are GPUs"),
        ("cuda,cuda:1,cuda:0", "cuda:0 is named twice"),
        ("cuda:1,cuda:2,cuda:2", "cuda:2 is named twice"),
        ("cuda:0,", "expected auto, cpu"),
    ] {
        let (code, text) = said(devices);
        assert!(code == Some(3) && text.contains(wanted), "{devices}: {text}");
    }
}
