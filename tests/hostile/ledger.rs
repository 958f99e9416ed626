//! What was executed, added up over runs and days: `fuzz/ledger.jsonl`, written by the runs themselves. A seed of a target counts
//! once; a line holds neighbouring seeds of one day and commit.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// Executions of one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub target: String,
    /// First and last seed.
    pub seeds: [u64; 2],
    /// Changed inputs that were given to the target, over all seeds of the line.
    pub executions: u64,
    /// Of these, how many were what they claim to be.
    pub accepted: u64,
    /// Inputs that did harm: panicked, took too much memory, had no end.
    pub found: u64,
    /// Most memory held for an input.
    pub most_bytes: usize,
    pub seconds: u64,
    /// UTC.
    pub date: String,
    /// Of the code that ran, with `+` when files were changed since.
    pub commit: String,
}

fn said(command: &str, args: &[&str]) -> String {
    let out = Command::new(command).args(args).current_dir(super::root()).output();
    out.map_or(String::new(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
}

/// Today, and the commit that is checked out.
pub fn now() -> (String, String) {
    let changed =
        !said("git", &["status", "--porcelain", "--untracked-files=no", "--", ".", ":!fuzz/ledger.jsonl"]).is_empty();
    let commit = said("git", &["rev-parse", "--short=12", "HEAD"]) + if changed { "+" } else { "" };
    (said("date", &["-u", "+%F"]), commit)
}

/// All lines of a ledger; none when there is no file. Waits for whoever adds to it.
pub fn read(path: &Path) -> Vec<Entry> {
    let Ok(mut file) = File::open(path) else { return Vec::new() };
    file.lock_shared().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    parse(&text)
}

fn parse(text: &str) -> Vec<Entry> {
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// Adds a run; several processes may do so at a time.
pub fn add(path: &Path, new: Entry) {
    let mut file: File = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    file.lock().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let mut entries = parse(&text);
    let same = |e: &Entry| (&e.target, &e.date, &e.commit) == (&new.target, &new.date, &new.commit);
    match entries.iter_mut().find(|e| same(e) && e.seeds[1] + 1 == new.seeds[0]) {
        Some(e) => {
            e.seeds[1] = new.seeds[1];
            e.executions += new.executions;
            e.accepted += new.accepted;
            e.found += new.found;
            e.seconds += new.seconds;
            e.most_bytes = e.most_bytes.max(new.most_bytes);
        }
        None => entries.push(new),
    }
    let text: String = entries.iter().map(|e| serde_json::to_string(e).unwrap() + "\n").collect();
    // Over what was there, in one write: whoever is killed here leaves a whole ledger, for sums only grow.
    file.rewind().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.set_len(text.len() as u64).unwrap();
}

/// Sums of one target's lines; none when it never ran.
pub fn total(entries: &[Entry], target: &str) -> Option<Entry> {
    let mut of = entries.iter().filter(|e| e.target == target).cloned();
    let first = of.next()?;
    Some(of.fold(first, |a, e| Entry {
        seeds: [a.seeds[0].min(e.seeds[0]), a.seeds[1].max(e.seeds[1])],
        executions: a.executions + e.executions,
        accepted: a.accepted + e.accepted,
        found: a.found + e.found,
        most_bytes: a.most_bytes.max(e.most_bytes),
        seconds: a.seconds + e.seconds,
        date: a.date.max(e.date),
        ..a
    }))
}

#[test]
fn runs_add_up() {
    let _one = crate::watched();
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("l");
    let entry = |target: &str, seed: u64, commit: &str| Entry {
        target: target.into(),
        seeds: [seed, seed],
        executions: 10,
        accepted: 1,
        found: 0,
        most_bytes: seed as usize,
        seconds: 1,
        date: "2026-01-01".into(),
        commit: commit.into(),
    };
    for (t, s, c) in [("a", 1, "x"), ("b", 1, "x"), ("a", 2, "x"), ("a", 3, "y"), ("a", 5, "y")] {
        add(&path, entry(t, s, c));
    }
    let all = read(&path);
    assert_eq!(
        all.iter().map(|e| (e.target.as_str(), e.seeds)).collect::<Vec<_>>(),
        [("a", [1, 2]), ("b", [1, 1]), ("a", [3, 3]), ("a", [5, 5])]
    );
    let sum = total(&all, "a").unwrap();
    assert_eq!((sum.executions, sum.accepted, sum.seeds, sum.most_bytes), (40, 4, [1, 5], 5));
    assert!(total(&all, "c").is_none());
}
