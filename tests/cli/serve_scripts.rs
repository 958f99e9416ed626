//! `serve/measure` and `serve/clients-check`, as far as they run with nothing installed but jq and Python.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::{json, ok, stderr};

fn here(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success())
}

fn script(name: &str) -> Command {
    let mut c = super::script(&format!("serve/{name}"));
    c.args(["--lowbit", env!("CARGO_BIN_EXE_lowbit")]);
    c
}

#[test]
fn serving_is_measured_into_a_record_with_tables() {
    if !here("jq") || !here("curl") {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("measure.json");
    let mut c = script("measure");
    c.env("LOWBIT_CACHE", tmp.path()).args(["--device", "cpu", "--seconds", "1", "--prefix", "150", "--out"]).arg(&out);
    let run = c.output().unwrap();
    let r = json(&out);
    // Two seconds on a busy machine prove no speed; the code is what the record says.
    assert_eq!(run.status.code(), Some(i32::from(r["pass"] != true)), "{}", stderr(&run));
    let rows = |part: &str| r[part].as_array().unwrap().clone();
    let verdicts = ["batching", "identity", "prefix"].into_iter().flat_map(&rows).chain([r["speculation"].clone()]);
    let verdicts: Vec<bool> = verdicts.filter_map(|row| row["pass"].as_bool()).collect();
    assert_eq!((verdicts.len(), verdicts.iter().all(|v| *v)), (7, r["pass"] == true), "{r}");
    for row in rows("batching") {
        let ratio = row["against_one"].as_f64().unwrap();
        assert!(row["pass"] != true || ratio >= 3.0, "{row}");
    }
    for row in rows("prefix") {
        let ratio = row["ratio"].as_f64().unwrap();
        assert!(ratio > 0.0 && (row["pass"] != true || ratio <= 0.5), "{row}");
    }
    // What does not depend on the machine holds.
    assert!(rows("identity").iter().all(|row| row["identical"] == 16 && row["pass"] == true), "{r}");
    assert_eq!(r["speculation"]["identical"], true);
    assert_eq!(r["batching"].as_array().unwrap().len(), 4);
    // A record of one model must not stand for both.
    let kv = rows("kv_cache");
    let speed = |model: &str| kv.iter().find(|row| row["model"] == model).unwrap()["float_tokens_per_second"].as_f64();
    assert_ne!(speed("float"), speed("w4a16"));
    assert!(kv.iter().all(|row| row["kl_mean"].as_f64().unwrap() > 0.0), "{r}");
    let tables = String::from_utf8(ok(super::script("serve/measure").arg("--render").arg(&out)).stdout).unwrap();
    assert_eq!(tables.lines().filter(|l| l.starts_with("|---|")).count(), 5, "{tables}");
    assert!(tables.contains("| w4a16 | 16 |") && !tables.contains("null"), "{tables}");
    assert_eq!(script("measure").arg("--tea").output().unwrap().status.code(), Some(3));
}

#[test]
fn clients_that_are_not_here_are_told() {
    if !here("jq") || !here("python3") {
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    // A Python without packages.
    let python = tmp.path().join("python");
    std::fs::write(&python, "#!/bin/sh\n[ \"$1\" = -c ] && exit 1\nexec python3 \"$@\"\n").unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let record = tmp.path().join("clients.json");
    let mut c = script("clients-check");
    c.env("LOWBIT_CACHE", tmp.path()).arg("--python").arg(&python).arg("--out").arg(&record);
    let out = c.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(out.status.code(), Some(2), "{text}{}", stderr(&out));
    assert_eq!(text.matches("absent").count(), 6, "{text}");
    assert!(stderr(&out).contains("lacks a client"));
    let r = json(&record);
    assert_eq!((r["checks"].as_array().unwrap().len(), &r["pass"]), (6, &false.into()), "{r}");
    let table =
        String::from_utf8(ok(super::script("serve/clients-check").arg("--render").arg(&record)).stdout).unwrap();
    assert_eq!(table.lines().filter(|l| l.ends_with("| absent |")).count(), 6, "{table}");
    assert_eq!(script("clients-check").arg("--tea").output().unwrap().status.code(), Some(3));
}
