//! `quantize/large-check` on a model that is not large: what it measures and judges, not what a large one takes.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use super::{json, names, stderr};

fn python() -> bool {
    Command::new("python3").arg("--version").output().is_ok_and(|o| o.status.success())
}

fn check(tmp: &Path, args: &[&str]) -> Output {
    let work = tmp.join("work");
    std::fs::create_dir_all(&work).unwrap();
    let mut c = super::script("quantize/large-check");
    c.env("LOWBIT_CACHE", tmp.join("cache")).args(["--lowbit", env!("CARGO_BIN_EXE_lowbit")]).arg("--work").arg(&work);
    c.args(["--blocks", "3", "--hidden", "256", "--intermediate", "384"]);
    c.args(["--samples", "4", "--seq-len", "64", "--threads", "2"]);
    let out = c.arg("--out").arg(tmp.join("check.json")).args(args).output().unwrap();
    assert!(names(&work).is_empty(), "{:?}", names(&work));
    out
}

#[test]
fn memory_is_measured_into_a_record_with_a_table() {
    if !python() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    // A debug build of the program is itself larger than the model.
    let out = check(tmp.path(), &["--limit-mib", "1024"]);
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    let r = json(&tmp.path().join("check.json"));
    assert_eq!((&r["pass"], r["limit_bytes"].as_u64()), (&true.into(), Some(1 << 30)));
    // Two tables of 2048 tokens; a block's four square matrices, three of the MLP and two norms; the last norm.
    let bytes = 2 * (2 * 2048 * 256 + 3 * (4 * 256 * 256 + 3 * 256 * 384 + 2 * 256) + 256);
    assert_eq!((r["model"]["bytes"].as_u64(), r["model"]["blocks"].as_u64()), (Some(bytes), Some(3)));
    let runs = r["runs"].as_array().unwrap();
    let which: Vec<_> = runs.iter().map(|r| (r["method"].as_str().unwrap(), r["command"].as_str().unwrap())).collect();
    assert_eq!(which, [("gptq", "plan"), ("gptq", "quantize"), ("rtn", "plan"), ("rtn", "quantize")]);
    for run in runs {
        let number = |key: &str| run[key].as_u64().unwrap_or_else(|| panic!("{key}: {run}"));
        assert!(number("peak_rss_bytes") > 1 << 20 && run["seconds"].as_f64().unwrap() > 0.0, "{run}");
        assert!(number("planned_peak_bytes") > 0 && run["pass"] == true, "{run}");
        if run["command"] == "quantize" {
            assert_eq!(number("output_bytes"), number("planned_bytes"));
            let both = number("ru_maxrss_bytes").max(number("sampled_vm_hwm_bytes"));
            assert_eq!(number("peak_rss_bytes"), both, "{run}");
            assert!(number("sampled_rss_anon_bytes") > 0 && number("sampled_rss_file_bytes") > 0, "{run}");
        }
    }
    let render =
        || super::script("quantize/large-check").arg("--render").arg(tmp.path().join("check.json")).output().unwrap();
    let table = render();
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.status.success() && text.contains("| gptq | quantize |") && text.contains("below 1,024 MiB"),
        "{text}"
    );
    assert_eq!(text.lines().filter(|l| l.ends_with("| yes |")).count(), 4, "{text}");

    // What does not hold is a verdict with a record.
    let out = check(tmp.path(), &["--limit-mib", "1", "--methods", "rtn"]);
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    assert!(
        stderr(&out).contains("rtn, quantize: ") && stderr(&out).contains("MiB resident where 1 are the limit"),
        "{}",
        stderr(&out)
    );
    let r = json(&tmp.path().join("check.json"));
    assert_eq!((&r["pass"], r["runs"].as_array().unwrap().len()), (&false.into(), 2));
    assert_eq!(String::from_utf8(render().stdout).unwrap().matches("**no**").count(), 2);
}

#[test]
fn wrong_calls_of_it_are_told() {
    if !python() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    for args in [
        &["--tea"][..],
        &["--blocks", "0"],
        &["--hidden", "300"],
        &["--methods", "gptq,tea"],
        &["--lowbit", "/nowhere"],
        &["--calib", "/nowhere"],
        &["--work", "/nowhere"],
        &["--render", "/nowhere"],
    ] {
        let out = check(tmp.path(), args);
        assert_eq!(out.status.code(), Some(3), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).starts_with("error: "), "{args:?}: {}", stderr(&out));
    }
    // A command that fails is no verdict.
    let broken = tmp.path().join("broken");
    std::fs::write(&broken, "#!/bin/sh\nexit 1\n").unwrap();
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755)).unwrap();
    let out = check(tmp.path(), &["--lowbit", broken.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    assert!(stderr(&out).contains("plan") && stderr(&out).contains("exit 1"), "{}", stderr(&out));
    assert!(!tmp.path().join("check.json").exists());
}
