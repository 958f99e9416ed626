//! Records of every schema there ever was are read; those of a newer program are refused by name.

use std::path::{Path, PathBuf};

use super::{json, lowbit, names, ok, root, stderr};

/// Kind, schema and path of every kept record.
fn kept() -> Vec<(String, u64, PathBuf)> {
    let dir = root().join("tests/records");
    let mut all: Vec<_> = names(&dir)
        .into_iter()
        .filter_map(|name| {
            let (kind, schema) = name.strip_suffix(".json")?.rsplit_once('-')?;
            Some((kind.to_owned(), schema.parse().unwrap(), dir.join(&name)))
        })
        .collect();
    all.sort();
    all
}

/// A folder with the newest record of every kind, but with this one for its kind.
fn folder(dir: &Path, kind: &str, record: &[u8]) {
    for (other, _, path) in kept() {
        // Later ones come later.
        std::fs::copy(path, dir.join(format!("{other}.json"))).unwrap();
    }
    std::fs::write(dir.join(format!("{kind}.json")), record).unwrap();
}

#[test]
fn every_schema_is_read() {
    let kinds: Vec<String> = kept().into_iter().map(|k| k.0).collect();
    for kind in ["plan", "quantize", "eval", "gate", "bench", "load", "speculation", "capacity"] {
        assert!(kinds.contains(&kind.to_owned()), "no {kind} in tests/records");
    }
    for (kind, schema, path) in kept() {
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(json(&path)["schema"], schema, "{}", path.display());
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("run");
        std::fs::create_dir(&dir).unwrap();
        folder(&dir, &kind, &bytes);
        ok(lowbit(tmp.path()).arg("report").arg(&dir));
        let page = std::fs::read_to_string(dir.join("report.html")).unwrap();
        assert!(page.contains("2.22× smaller") && page.contains("nats/token"), "{kind} {schema}");
    }
}

#[test]
fn what_reads_one_kind_reads_its_old_schemas() {
    let tmp = tempfile::tempdir().unwrap();
    let record = |name: &str| root().join("tests/records").join(name);
    for schema in 1..=3 {
        let mut kept = json(&record(&format!("eval-{schema}.json")));
        // The items of tasks are files of their own, and long.
        kept.as_object_mut().unwrap().retain(|key, _| key != "items" && key != "tasks");
        let file = tmp.path().join("eval.json");
        std::fs::write(&file, kept.to_string()).unwrap();
        ok(lowbit(tmp.path()).arg("gate").arg(&file).args(["--max-kl", "9", "--max-ppl-ratio", "9"]));
    }
    let load = record("load-1.json");
    let again = lowbit(tmp.path()).args(["load", "-q", "--import"]).arg(&load).output().unwrap();
    // The code is that of the verdict on the objective.
    assert!(matches!(again.status.code(), Some(0..=2)), "{}", stderr(&again));
    let plan =
        lowbit(tmp.path()).arg("capacity").arg(&load).args(["--peak-rps", "9", "--gpu-hour", "1"]).output().unwrap();
    assert!(matches!(plan.status.code(), Some(0..=2)), "{}", stderr(&plan));
}

#[test]
fn a_newer_schema_is_refused_by_name() {
    for (kind, schema, path) in kept() {
        let mut record = json(&path);
        record["schema"] = 99.into();
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("run");
        std::fs::create_dir(&dir).unwrap();
        folder(&dir, &kind, record.to_string().as_bytes());
        let out = lowbit(tmp.path()).arg("report").arg(&dir).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{kind} {schema}");
        let said = stderr(&out);
        assert!(said.contains(&format!("{kind}.json")) && said.contains("newer lowbit: schema 99"), "{said}");
    }
    // The record that the program writes is the newest that is kept.
    let newest = |kind: &str| kept().into_iter().filter(|k| k.0 == kind).map(|k| k.1).max().unwrap();
    let now = [
        ("eval", lowbit_eval::record::SCHEMA),
        ("plan", lowbit_quantize::record::PLAN_SCHEMA),
        ("quantize", lowbit_quantize::record::SCHEMA),
        ("gate", lowbit_eval::verdict::record::SCHEMA),
        ("bench", lowbit_bench::SCHEMA),
        ("load", lowbit_bench::load::record::SCHEMA),
        ("speculation", lowbit_bench::speculation::SCHEMA),
        ("capacity", lowbit_bench::capacity::plan::SCHEMA),
    ];
    for (kind, schema) in now {
        assert_eq!(u64::from(schema), newest(kind), "tests/records: keep a {kind} record of the new schema");
    }
}

/// Records that no report of a run reads: of a conversion, beside the weights, and of a GPU.
#[test]
fn records_beside_the_reports_have_schemas_too() {
    use lowbit_checkpoint::converted::{self, ConvertRecord};
    let tmp = tempfile::tempdir().unwrap();
    let first = r#"{"schema": 1, "tool": "lowbit 0.1.0", "source": "m.Q4_0.gguf", "bits": 4}"#;
    std::fs::write(tmp.path().join(converted::FILE), first).unwrap();
    let read = ConvertRecord::read(tmp.path()).unwrap().unwrap();
    assert_eq!((read.schema, read.source.as_str(), read.bits), (1, "m.Q4_0.gguf", Some(4)));
    assert_eq!(converted::SCHEMA, 1, "a record of the new schema is to be read here, too");

    let render = |path: &Path| lowbit(tmp.path()).args(["suite", "--render"]).arg(path).output().unwrap();
    let path = root().join("bench/results/2026-11-24-nvidia-h100-80gb-hbm3.json");
    let kept = json(&path);
    let newest = [lowbit_report::gpu::SCHEMA, lowbit_bench::suite::SCHEMA].map(u64::from);
    assert_eq!([&kept["schema"], &kept["kernels"]["schema"]].map(|s| s.as_u64().unwrap()), newest);
    assert!(render(&path).status.success());
    for part in ["/schema", "/kernels/schema"] {
        let mut record = kept.clone();
        *record.pointer_mut(part).unwrap() = 99.into();
        let file = tmp.path().join("gpu.json");
        std::fs::write(&file, record.to_string()).unwrap();
        let out = render(&file);
        let said = stderr(&out);
        assert_eq!(out.status.code(), Some(3), "{part}: {said}");
        assert!(said.contains("gpu.json") && said.contains("newer lowbit: schema 99"), "{part}: {said}");
    }
}
