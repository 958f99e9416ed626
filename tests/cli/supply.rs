//! What the program is made of: licences, dependencies that nothing uses, the bill of materials. `cargo metadata` alone, no network;
//! `cargo deny` in `.ci/run`, where it is installed, adds advisories.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::{ok, root};

/// All packages of a build for Linux and the graph between them.
fn metadata() -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut c = Command::new(cargo);
    c.args(["metadata", "--format-version", "1", "--offline", "--locked"]);
    c.args(["--filter-platform", "x86_64-unknown-linux-gnu"]).current_dir(root());
    serde_json::from_slice(&ok(&mut c).stdout).unwrap()
}

fn text<'a>(v: &'a Value, key: &str) -> &'a str {
    v[key].as_str().unwrap_or_default()
}

fn list<'a>(v: &'a Value, key: &str) -> &'a [Value] {
    v[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Whether an SPDX expression can be met with these licences. `/` is how old packages write OR.
fn met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let (met, rest) = any(&words, allowed);
    met && rest.is_empty()
}

fn any<'a, 'w>(words: &'a [&'w str], allowed: &BTreeSet<String>) -> (bool, &'a [&'w str]) {
    let (mut met, mut rest) = every(words, allowed);
    while let ["OR", tail @ ..] = rest {
        let (other, left) = every(tail, allowed);
        (met, rest) = (met | other, left);
    }
    (met, rest)
}

fn every<'a, 'w>(words: &'a [&'w str], allowed: &BTreeSet<String>) -> (bool, &'a [&'w str]) {
    let (mut met, mut rest) = one(words, allowed);
    while let ["AND", tail @ ..] = rest {
        let (other, left) = one(tail, allowed);
        (met, rest) = (met & other, left);
    }
    (met, rest)
}

fn one<'a, 'w>(words: &'a [&'w str], allowed: &BTreeSet<String>) -> (bool, &'a [&'w str]) {
    match words {
        ["(", tail @ ..] => {
            let (met, rest) = any(tail, allowed);
            match rest {
                [")", rest @ ..] => (met, rest),
                _ => (false, rest),
            }
        }
        [licence, "WITH", exception, rest @ ..] => (allowed.contains(&format!("{licence} WITH {exception}")), rest),
        [licence, rest @ ..] => (allowed.contains(*licence), rest),
        [] => (false, words),
    }
}

/// The list of `deny.toml`, so that there is one.
fn allowed() -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let list = text.split("allow = [").nth(1).unwrap().split(']').next().unwrap();
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_licence_is_one_of_the_list() {
    let allowed = allowed();
    assert!(allowed.len() > 5 && allowed.contains("MIT"));
    for (expression, wanted) in [
        ("MIT OR GPL-3.0", true),
        ("MIT AND GPL-3.0", false),
        ("(GPL-3.0 OR MIT) AND ISC", true),
        ("GPL-3.0/Apache-2.0", true),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("(MIT", false),
        ("", false),
    ] {
        assert_eq!(met(expression, &allowed), wanted, "{expression}");
    }
    let meta = metadata();
    let packages = list(&meta, "packages");
    assert!(packages.len() > 100);
    let bad: Vec<String> = packages
        .iter()
        .filter(|p| !met(text(p, "license"), &allowed))
        .map(|p| format!("{} {}: {}", text(p, "name"), text(p, "version"), p["license"]))
        .collect();
    assert!(bad.is_empty(), "not in the list of deny.toml:\n{}", bad.join("\n"));
    let foreign: Vec<&str> = packages
        .iter()
        .map(|p| text(p, "source"))
        .filter(|s| !s.is_empty() && !s.contains("crates.io-index"))
        .collect();
    assert!(foreign.is_empty(), "sources other than crates.io: {foreign:?}");
}

/// The Rust sources below a folder, without those of crates inside it.
fn sources(dir: &Path, out: &mut String) {
    for path in std::fs::read_dir(dir).into_iter().flatten().map(|e| e.unwrap().path()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !path.join("Cargo.toml").exists() {
            sources(&path, out);
        } else if name.ends_with(".rs") {
            out.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

/// Whether a source names a crate: as a path, in a `use`, an attribute or a macro.
fn names(source: &str, name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    source.match_indices(name).any(|(at, _)| {
        let (before, after) = (&source[..at], &source[at + name.len()..]);
        let alone = !before.ends_with(word) && !after.starts_with(word);
        alone && (after.starts_with("::") || before.ends_with("use ") || before.ends_with("extern crate "))
    })
}

#[test]
fn every_dependency_is_named_by_a_source() {
    assert!(names("use half::bf16;", "half") && names("let x = (rand::random)();", "rand"));
    assert!(!names("// half of it; strand::x; rand_distr::y", "rand") && !names("half of it", "half"));
    let meta = metadata();
    let (mut unused, mut used) = (Vec::new(), BTreeSet::new());
    let members: BTreeSet<&str> = list(&meta, "workspace_members").iter().filter_map(Value::as_str).collect();
    for p in list(&meta, "packages").iter().filter(|p| members.contains(text(p, "id"))) {
        let dir = PathBuf::from(text(p, "manifest_path")).parent().unwrap().to_path_buf();
        let read = |folders: &[&str]| {
            let mut out = String::new();
            folders.iter().for_each(|f| sources(&dir.join(f), &mut out));
            out
        };
        let (product, tests) = (read(&["src"]), read(&["src", "tests", "examples", "benches"]));
        let build = std::fs::read_to_string(dir.join("build.rs")).unwrap_or_default();
        for d in list(p, "dependencies") {
            let name = d["rename"].as_str().unwrap_or(text(d, "name")).replace('-', "_");
            used.insert(text(d, "name").to_owned());
            let source = match d["kind"].as_str() {
                None => &product,
                Some("build") => &build,
                Some(_) => &tests,
            };
            if !names(source, &name) {
                unused.push(format!("{}: {} ({})", text(p, "name"), text(d, "name"), d["kind"]));
            }
        }
    }
    assert!(unused.is_empty(), "no source names these dependencies:\n{}", unused.join("\n"));
    // And the workspace's own list holds nothing that no crate takes.
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let table = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let idle: Vec<&str> =
        table.lines().filter_map(|l| l.split_once(" = ")).map(|(n, _)| n).filter(|n| !used.contains(*n)).collect();
    assert!(idle.is_empty(), "in [workspace.dependencies], used by no crate: {idle:?}");
}

/// Checksums of `Cargo.lock`, by name and version.
fn checksums() -> BTreeMap<(String, String), String> {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let field = |block: &str, key: &str| {
        let line = block.lines().find_map(|l| l.strip_prefix(&format!("{key} = \"")))?;
        Some(line.trim_end_matches('"').to_owned())
    };
    let blocks = lock.split("[[package]]").skip(1);
    blocks.filter_map(|b| Some(((field(b, "name")?, field(b, "version")?), field(b, "checksum")?))).collect()
}

/// CycloneDX: the crates in the program and those that build it, with licences, checksums and who takes whom. It holds no time and no
/// machine, so the same sources give the same file.
fn bill(meta: &Value) -> Value {
    let packages: BTreeMap<&str, &Value> = list(meta, "packages").iter().map(|p| (text(p, "id"), p)).collect();
    let nodes: BTreeMap<&str, &Value> = list(&meta["resolve"], "nodes").iter().map(|n| (text(n, "id"), n)).collect();
    let reference = |id: &str| {
        let p = packages[id];
        format!("pkg:cargo/{}@{}", text(p, "name"), text(p, "version"))
    };
    // Tests' own dependencies are in no program.
    let taken = |id: &str| -> Vec<&str> {
        let shipped = |d: &&Value| list(d, "dep_kinds").iter().any(|k| k["kind"] != "dev");
        list(nodes[id], "deps").iter().filter(shipped).map(|d| text(d, "pkg")).collect()
    };
    let first = packages.iter().find(|(_, p)| text(p, "name") == "lowbit").unwrap().0;
    let (mut seen, mut open) = (BTreeSet::from([*first]), vec![*first]);
    while let Some(id) = open.pop() {
        open.extend(taken(id).into_iter().filter(|d| seen.insert(d)));
    }
    let sums = checksums();
    let component = |id: &str, kind: &str| {
        let p = packages[id];
        let (name, version) = (text(p, "name"), text(p, "version"));
        let mut c = json!({"type": kind, "bom-ref": reference(id), "name": name, "version": version,
            "licenses": [{"expression": text(p, "license").replace(" / ", " OR ").replace('/', " OR ")}], "purl": reference(id)});
        if let Some(sum) = sums.get(&(name.to_owned(), version.to_owned())) {
            c["hashes"] = json!([{"alg": "SHA-256", "content": sum}]);
        }
        c
    };
    let by_name: BTreeMap<String, &str> = seen.iter().map(|id| (reference(id), *id)).collect();
    let parts: Vec<Value> = by_name.values().filter(|id| *id != first).map(|id| component(id, "library")).collect();
    let graph: Vec<Value> = by_name
        .iter()
        .map(|(name, id)| {
            let on: BTreeSet<String> = taken(id).into_iter().map(reference).collect();
            json!({"ref": name, "dependsOn": on})
        })
        .collect();
    json!({"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": component(first, "application")}, "components": parts, "dependencies": graph})
}

#[test]
fn the_bill_of_materials_is_that_of_the_lock_file() {
    let made = serde_json::to_string_pretty(&bill(&metadata())).unwrap() + "\n";
    assert!(
        made.contains("pkg:cargo/serde@") && !made.contains("pkg:cargo/insta@"),
        "tests' crates are not in the program"
    );
    let path = root().join("sbom.cdx.json");
    if std::env::var_os("INSTA_UPDATE").is_some_and(|v| v == "always") {
        std::fs::write(&path, &made).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let how = "INSTA_UPDATE=always cargo test --release --workspace --test integration supply";
    assert!(found == made, "sbom.cdx.json is stale: {how}");
}
