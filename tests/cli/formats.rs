//! Checkpoint formats from the command line: what is written is read back, and codes move between formats unchanged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{demo, json, lowbit, ok, root, stderr};

const CALIB: &[&str] = &["--calib", "self", "--samples", "8", "--seq-len", "64"];

fn quantize(tmp: &Path, name: &str, args: &[&str]) -> PathBuf {
    let out = tmp.join(name);
    ok(lowbit(tmp).args(["--quiet", "quantize"]).arg(demo()).arg("-o").arg(&out).args(CALIB).args(args));
    out
}

fn convert(tmp: &Path, from: &Path, format: &str) -> PathBuf {
    let out = tmp.join(format!("{}-{format}", from.file_name().unwrap().to_string_lossy()));
    ok(lowbit(tmp).args(["--quiet", "convert", "--format", format]).arg(from).arg("-o").arg(&out));
    out
}

/// Data of every tensor of a folder with one safetensors file.
fn tensors(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    all.iter().map(|(n, t)| (n.to_string(), t.data().to_vec())).collect()
}

fn verify(tmp: &Path, dir: &Path) {
    ok(lowbit(tmp).args(["--quiet", "verify"]).arg(dir).arg("--original").arg(demo()));
}

#[test]
fn codes_move_between_gptq_awq_and_compressed_tensors() {
    let tmp = tempfile::tempdir().unwrap();
    let t = tmp.path();
    for (name, more) in [("sym", &[][..]), ("asym", &["--asymmetric"])] {
        let with = |format: &str| {
            let args = [&["--group-size", "64", "--format", format][..], more].concat();
            quantize(t, &format!("{name}-{format}"), &args)
        };
        let (v2, awq) = (with("gptq-v2"), with("awq"));
        verify(t, &v2);
        verify(t, &awq);
        assert_eq!(json(&v2.join("config.json"))["quantization_config"]["checkpoint_format"], "gptq_v2");
        let q = json(&awq.join("config.json"))["quantization_config"].clone();
        assert_eq!(
            (&q["quant_method"], &q["version"], &q["zero_point"]),
            (&"awq".into(), &"gemm".into(), &true.into())
        );
        assert!(!awq.join("quantize_config.json").exists());
        // One solver, f16 scales in both: the same codes, whichever way they go.
        assert!(tensors(&convert(t, &v2, "awq")) == tensors(&awq), "{name}: v2 to AWQ");
        assert!(tensors(&convert(t, &awq, "gptq-v2")) == tensors(&v2), "{name}: AWQ to v2");
        let bf16 = [&v2, &awq].map(|d| tensors(&convert(t, d, "bf16")));
        assert!(bf16[0] == bf16[1], "{name}: values");
        // Scales of f16 and a model of bf16.
        let out =
            lowbit(t).arg("convert").arg(&awq).args(["--format", "compressed-tensors", "-o", "no"]).output().unwrap();
        assert!(stderr(&out).contains("which Bf16 does not hold exactly"), "{}", stderr(&out));
    }
    // v1 and v2 differ in the zero points alone, by one.
    let v1 = convert(t, &t.join("sym-gptq-v2"), "gptq");
    let (a, b) = (tensors(&v1), tensors(&t.join("sym-gptq-v2")));
    for (name, data) in &a {
        match name.ends_with("qzeros") {
            true => assert!(data.iter().all(|x| *x == 0x77) && b[name].iter().all(|x| *x == 0x88)),
            false => assert!(*data == b[name], "{name}"),
        }
    }
    // What v1 is quantized into has no zero point of 0, which it could not store.
    let v1 = quantize(t, "asym-v1", &["--group-size", "64", "--format", "gptq", "--asymmetric"]);
    verify(t, &v1);
    assert!(tensors(&convert(t, &convert(t, &v1, "gptq-v2"), "gptq")) == tensors(&v1));

    let out = lowbit(t)
        .args(["plan"])
        .arg(demo())
        .args(["--format", "awq", "--scheme", "w3a16", "--group-size", "64"])
        .output()
        .unwrap();
    assert!(out.status.code() == Some(3) && stderr(&out).contains("the AWQ format holds 4 bits"), "{}", stderr(&out));
}

#[test]
fn gguf_files_hold_the_solvers_codes() {
    let tmp = tempfile::tempdir().unwrap();
    let t = tmp.path();
    for (kind, scheme, method) in
        [("q4_0", "w4a16", "gptq"), ("q8_0", "w8a16", "rtn"), ("q4_0", "w4a16", "best"), ("q4_0", "w4a16", "hqq")]
    {
        let name = format!("{kind}-{method}");
        let gguf = quantize(t, &name, &["--format", "gguf", "--scheme", kind, "--method", method]);
        verify(t, &gguf);
        let direct = ["--format", "gptq-v2", "--scheme", scheme, "--group-size", "32", "--method", method];
        let direct = tensors(&quantize(t, &format!("{name}-direct"), &direct));
        let folder = convert(t, &gguf, "gptq-v2");
        // By way of the import in the cache; dense weights would not show it.
        let bits = json(&folder.join("convert.json"))["bits"].clone();
        assert_eq!(bits, if scheme == "w4a16" { 4 } else { 8 }, "{kind} {method}");
        let back = tensors(&folder);
        let layers = |n: &&String| n.starts_with("model.layers.") && !n.contains("norm");
        assert_eq!(direct.keys().filter(layers).count(), 4 * 7 * 4);
        for name in direct.keys().filter(layers) {
            assert!(back[name] == direct[name], "{kind} {method}: {name}");
        }
        // Dense tensors are the original's: the file has bf16 for what was bf16.
        let original = tensors(&demo());
        for name in ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"] {
            assert!(back[name] == original[name], "{name}");
        }
    }
}

#[test]
fn a_probed_plan_has_seconds_and_leaves_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let scratch = tmp.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let probed = |args: &[&str]| {
        let mut command = lowbit(tmp.path());
        command.env("TMPDIR", &scratch).args(["--device", "cpu", "--quiet", "--json", "plan", "--probe"]);
        let out = ok(command.arg(demo()).args(["--group-size", "64"]).args(args));
        let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        ["seconds", "probe_seconds"].map(|key| plan[key].as_f64().unwrap())
    };
    let few = probed(&["--samples", "16", "--seq-len", "64"]);
    let many = probed(&["--samples", "100000", "--seq-len", "64"]);
    let free = probed(&["--method", "rtn"]);
    assert!([few, many, free].iter().flatten().all(|s| s.is_finite() && *s > 0.0), "{few:?} {many:?} {free:?}");
    // Six thousand times the tokens, measured on no more than 6144 of them.
    assert!(many[0] > few[0], "{few:?} {many:?}");
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "something is left in the temporary folder");
    let mut command = lowbit(tmp.path());
    let refused = command.args(["--device", "cpu", "plan", "--probe", "--method", "round"]).arg(demo());
    let refused = refused.args(["--group-size", "64"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(3));
    assert!(stderr(&refused).contains("--probe cannot estimate the time of method round"));
}

#[test]
fn the_plan_of_a_gguf_is_exact_and_says_what_falls_back() {
    let tmp = tempfile::tempdir().unwrap();
    let t = tmp.path();
    for (kind, more) in
        [("q4_k", &["--head", "q6_k"][..]), ("q6_k", &["--embedding", "w8"]), ("q5_0", &["--head", "w8"])]
    {
        let args = [&["--format", "gguf", "--scheme", kind, "--method", "rtn"][..], more].concat();
        let out = ok(lowbit(t).args(["--quiet", "--json", "plan"]).arg(demo()).args(&args));
        let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let dir = quantize(t, kind, &args);
        assert_eq!(plan["after_bytes"], std::fs::metadata(dir.join("model.gguf")).unwrap().len(), "{kind}");
        let sum: u64 = plan["tensors"].as_array().unwrap().iter().map(|t| t["after_bytes"].as_u64().unwrap()).sum();
        assert_eq!(plan["after_bytes"], sum, "{kind}");
        verify(t, &dir);
        let record = json(&dir.join("quantize.json"));
        assert_eq!((&record["scheme"], &record["format"]), (&kind.into(), &"gguf".into()));
        let layers = record["layers"].as_array().unwrap();
        assert_eq!((layers.len(), &layers[0]["scheme"]), (29, &kind.into()));
    }
    // The demo's widths are whole super-blocks; a file changed behind the record's back is found.
    let dir = t.join("q4_k");
    let mut file = std::fs::read(dir.join("model.gguf")).unwrap();
    let end = file.len();
    let record = std::fs::read(dir.join("quantize.json")).unwrap();
    std::fs::write(dir.join("quantize.json"), String::from_utf8(record).unwrap().replace("\"q6_k\"", "\"q8_0\""))
        .unwrap();
    let out = lowbit(t).arg("verify").arg(&dir).output().unwrap();
    assert!(stderr(&out).contains("quantize.json says q8_0, the file Q6_K"), "{}", stderr(&out));
    file.truncate(end - 5000);
    std::fs::write(dir.join("model.gguf"), file).unwrap();
    let out = lowbit(t).arg("verify").arg(&dir).output().unwrap();
    assert!(stderr(&out).contains("cut short"), "{}", stderr(&out));

    for (args, text) in [
        (&["--scheme", "q4_0"][..], "--format gguf"),
        (&["--format", "gguf"], "--scheme q4_0"),
        (&["--format", "gguf", "--scheme", "q4_k", "--method", "best"], "--method gptq"),
        (&["--format", "gguf", "--scheme", "q6_k", "--method", "hqq"], "--method gptq"),
        (&["--format", "gguf", "--scheme", "q4_0", "--group-size", "64"], "its own groups"),
        (&["--head", "q6_k"], "--format gguf"),
    ] {
        let out = lowbit(t).arg("plan").arg(demo()).args(args).output().unwrap();
        assert!(out.status.code() == Some(3) && stderr(&out).contains(text), "{args:?}: {}", stderr(&out));
    }
}

#[test]
fn a_gguf_keeps_tokenizer_and_config() {
    let tmp = tempfile::tempdir().unwrap();
    let t = tmp.path();
    let dir = quantize(t, "file", &["--format", "gguf", "--scheme", "q8_0", "--method", "rtn", "--head", "w8"]);
    let back = convert(t, &dir, "bf16");
    let ids = |model: &Path| {
        let tokenizer = lowbit_checkpoint::tokenizer::Tokenizer::load(model).unwrap();
        let text = std::fs::read_to_string(root().join("assets/demo-text/evaluation.txt")).unwrap();
        tokenizer.encode(&text, true).unwrap()
    };
    assert_eq!(ids(&back), ids(&demo()));
    let config = |model: &Path| lowbit_checkpoint::config::parse(model, &json(&model.join("config.json"))).unwrap();
    assert_eq!(config(&back), config(&demo()));
    // 8 bits are close enough to be told from a wrong order of rows, which would be far off.
    let text = root().join("assets/demo-text/evaluation.txt");
    let mut eval = lowbit(t);
    eval.args(["--quiet", "--json", "eval"]).arg(&dir).arg("--reference").arg(demo()).arg("--kl").arg(&text);
    let found = ok(eval.args(["--kl-window", "128", "--limit", "2"]));
    let record: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
    let kl = record["kl"]["mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 1e-3, "{kl}");
}
