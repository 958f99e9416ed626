//! `bench/load-check`, as far as it runs with nothing installed but Python: a busy machine may miss what it asks of a quiet one, so its
//! verdict is not judged here.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use super::{json, ok, stderr};

fn check() -> Command {
    let mut c = super::script("bench/load-check");
    c.args(["--lowbit", env!("CARGO_BIN_EXE_lowbit")]);
    c
}

#[test]
fn a_load_is_checked_into_a_record_with_tables() {
    let here = Command::new("python3").arg("--version").output().is_ok_and(|o| o.status.success());
    // `cargo test` of the workspace builds the examples, one test target alone does not.
    let stand_in = Path::new(env!("CARGO_BIN_EXE_lowbit")).with_file_name("examples").join("stand_in");
    if !here || !stand_in.exists() {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    // A Python without packages.
    let python = tmp.path().join("python");
    std::fs::write(&python, "#!/bin/sh\nexit 1\n").unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let out = tmp.path().join("check.json");
    let mut c = check();
    c.env("LOWBIT_CACHE", tmp.path())
        .args(["--requests", "35", "--seconds", "1", "--tries", "1", "--python"])
        .arg(&python);
    let done = c.arg("--out").arg(&out).output().unwrap();
    assert!(matches!(done.status.code(), Some(1 | 2)), "{}", stderr(&done));
    let r = json(&out);
    let checks = &r["checks"];
    assert_eq!((checks["peers"]["pass"].is_null(), checks["peers"]["absent"].as_str()), (true, Some("guidellm")));
    let rows = |name: &str| checks[name]["rows"].as_array().unwrap().len();
    // Of the schedule two, and those that are made again where a host takes the machine's time.
    assert!((2..=12).contains(&rows("schedule")));
    assert_eq!([rows("known_delays"), rows("stall")], [34, 8]);
    // 35 requests bound a median, and no p99.
    let known = &checks["known_delays"]["rows"];
    assert_eq!((known[0]["known_ms"].as_f64(), known[0]["q"].as_f64()), (Some(60.0), Some(0.5)));
    assert!(known[0]["measured_ms"].as_f64().unwrap() >= 60.0 && known[3]["measured_ms"].is_null(), "{known}");
    assert!(checks["schedule"]["rows"][0]["requests"].as_u64().unwrap() > 500);
    let tables = String::from_utf8(ok(super::script("bench/load-check").arg("--render").arg(&out)).stdout).unwrap();
    assert_eq!(tables.lines().filter(|l| l.starts_with("|---|")).count(), 3, "{tables}");
    assert!(tables.contains("GuideLLM was not there.") && !tables.contains("None"), "{tables}");
}

#[test]
fn wrong_calls_of_the_check_are_told() {
    let here = Command::new("python3").arg("--version").output().is_ok_and(|o| o.status.success());
    if !here {
        return;
    }
    for args in [&["--tea"][..], &["--requests", "3"], &["--stand-in", "/nowhere"], &["--render", "/nowhere"]] {
        let out = check().args(args).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).starts_with("error: "), "{args:?}: {}", stderr(&out));
    }
}
