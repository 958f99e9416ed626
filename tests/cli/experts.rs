//! A mixture of experts through the commands.

#[path = "../../model/tests/experts/released.rs"]
mod released;
#[path = "../../model/tests/experts/weights.rs"]
mod weights;

use std::path::{Path, PathBuf};

use super::{demo, json, lowbit, ok, root, stderr};

/// A tiny random model with the demo's tokenizer; hardly a token goes to expert 3.
pub(super) fn model(tmp: &Path, family: &str) -> PathBuf {
    model_as(tmp, family, family, &|dir, config, tensors| weights::write(dir, &config, &tensors))
}

/// gpt-oss with its experts in MXFP4, as it is released.
pub(super) fn released_model(tmp: &Path) -> PathBuf {
    model_as(tmp, "gpt_oss", "released", &released::write)
}

/// Writes a model's folder.
type WriteModel = dyn Fn(&Path, serde_json::Value, Vec<(String, weights::Tensor)>);

/// The same under a name, written in some way.
fn model_as(tmp: &Path, family: &str, name: &str, write: &WriteModel) -> PathBuf {
    let dir = tmp.join(name);
    let mut config = weights::config_of(family);
    config["vocab_size"] = 2048.into();
    let mut tensors = weights::tensors(&config);
    for (name, t) in &mut tensors {
        // A shared expert's gate has one row.
        if (name.ends_with("gate.weight") || name.ends_with("router.weight")) && t.shape[0] > 3 {
            let n = t.shape[1];
            t.values[3 * n..4 * n].fill(0.0);
        } else if name.ends_with("router.bias") {
            t.values[3] = -3.0;
        }
    }
    write(&dir, config, tensors);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo().join(file), dir.join(file)).unwrap();
    }
    dir
}

#[test]
fn coverage_is_told_recorded_and_strict() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, out) = (model(tmp.path(), "qwen3_moe"), tmp.path().join("out"));
    let command = |name: &str| {
        let mut c = lowbit(tmp.path());
        c.args(["--device", "cpu", name]).arg(&dir).args(["--samples", "12", "--seq-len", "32", "--group-size", "8"]);
        c.arg("--calib").arg(root().join("assets/demo-text/evaluation.txt"));
        c
    };
    let plan = ok(&mut command("plan"));
    let text = String::from_utf8(plan.stdout).unwrap();
    assert!(text.contains("16 experts a block, 4 a token") && text.contains("an expert needs 32 tokens"), "{text}");

    let refused = command("plan").args(["--bits", "4.5"]).output().unwrap();
    let said = stderr(&refused);
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains("the experts of a `qwen3_moe` model") && said.contains("hint: give all linears"), "{said}");

    let done = ok(command("quantize").arg("-o").arg(&out));
    let text = String::from_utf8(done.stdout.clone()).unwrap();
    assert!(text.contains("fewest tokens") && text.contains("starved"), "{text}");
    let said = stderr(&done);
    assert!(said.contains("experts are starved of calibration tokens"), "{said}");
    let of_three =
        |l: &str| l.contains("layers.1.mlp.experts.3.gate_proj: ") && l.contains("of the 32 tokens it needs");
    assert!(said.lines().any(of_three), "{said}");
    let record = json(&out.join("quantize.json"));
    let experts = record["experts"].as_array().unwrap();
    assert_eq!(experts.iter().map(|e| e["block"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3]);
    for e in experts {
        let tokens: Vec<u64> = serde_json::from_value(e["tokens"].clone()).unwrap();
        assert_eq!((tokens.len(), tokens.iter().sum::<u64>()), (16, 12 * 32 * 4));
        assert!(tokens[3] < 32 && e["starved"].as_u64().unwrap() > 0, "{tokens:?}");
    }
    ok(lowbit(tmp.path()).args(["--quiet", "verify"]).arg(&out).arg("--original").arg(&dir));
    let inspected = ok(lowbit(tmp.path()).args(["--quiet", "inspect"]).arg(&out));
    let text = String::from_utf8(inspected.stdout).unwrap();
    assert!(text.contains("16 experts of 16, 4 a token, in 2 layers"), "{text}");

    let strict = command("quantize").arg("--strict").arg("-o").arg(tmp.path().join("strict")).output().unwrap();
    assert_eq!(strict.status.code(), Some(3), "{}", stderr(&strict));
    assert!(stderr(&strict).contains("of the 32 tokens it needs"), "{}", stderr(&strict));
    assert!(!tmp.path().join("strict").exists());
}

/// Routed rows are summed in the same units whatever goes through a block together; latent vectors, too.
#[test]
fn batch_size_changes_no_byte() {
    let tmp = tempfile::tempdir().unwrap();
    for (family, method) in [("mixtral", "gptq"), ("qwen3_moe", "best"), ("deepseek_v3", "best")] {
        let dir = model(tmp.path(), family);
        // 2048 tokens are 64 of these windows: a unit and a part of one.
        let quantized = |batch: &[&str], name: &str| {
            let out = tmp.path().join(format!("{family}-{name}"));
            let mut c = lowbit(tmp.path());
            c.args(["--device", "cpu", "quantize"]).arg(&dir).args(["--samples", "70", "--seq-len", "32"]);
            c.args(["--group-size", "8", "--method", method, "--calib"])
                .arg(root().join("assets/demo-text/evaluation.txt"));
            ok(c.args(batch).arg("-o").arg(&out));
            let record = json(&out.join("quantize.json"));
            (std::fs::read(out.join("model.safetensors")).unwrap(), record["experts"].clone())
        };
        let usual = quantized(&[], "usual");
        for n in ["1", "16", "70"] {
            let found = quantized(&["--batch-size", n], n);
            assert!(found == usual, "{family}, {method}: --batch-size {n} differs");
        }
    }
}

#[test]
fn other_formats_carry_experts() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, out) = (model(tmp.path(), "mixtral"), tmp.path().join("out"));
    ok(lowbit(tmp.path())
        .args(["--quiet", "quantize", "--method", "rtn", "--group-size", "16", "-o"])
        .arg(&out)
        .arg(&dir));
    let ignore = &json(&out.join("config.json"))["quantization_config"]["ignore"];
    assert!(ignore.as_array().unwrap().contains(&"model.layers.1.block_sparse_moe.gate".into()), "{ignore}");
    for format in ["gptq", "bf16"] {
        let to = tmp.path().join(format);
        ok(lowbit(tmp.path()).args(["--quiet", "convert", "--format", format, "-o"]).arg(&to).arg(&out));
        ok(lowbit(tmp.path()).args(["--quiet", "verify"]).arg(&to));
    }
    let config = json(&tmp.path().join("gptq/config.json"));
    let rules = config["quantization_config"]["dynamic"].as_object().unwrap();
    assert!(rules.contains_key(r"-:^model\.layers\.0\.block_sparse_moe\.gate$"), "{rules:?}");

    let estimate = lowbit(tmp.path()).args(["capacity", "--estimate", "--model"]).arg(&dir).output().unwrap();
    assert!(stderr(&estimate).contains("not `mixtral`"), "{}", stderr(&estimate));
}

/// gpt-oss from floats and as it is released: coverage, verification against the original, and logits near it.
#[test]
fn gpt_oss_is_quantized_and_read_back() {
    let tmp = tempfile::tempdir().unwrap();
    let text = root().join("assets/demo-text/evaluation.txt");
    let models = [model(tmp.path(), "gpt_oss"), released_model(tmp.path())];
    for dir in models {
        let out = dir.with_extension("quantized");
        let command = |name: &str| {
            let mut c = lowbit(tmp.path());
            c.args(["--device", "cpu", name]).arg(&dir).args(["--samples", "12", "--seq-len", "32"]);
            c.args(["--scheme", "w8a16", "--group-size", "8", "--calib"]).arg(&text);
            c
        };
        let plan = String::from_utf8(ok(&mut command("plan")).stdout).unwrap();
        assert!(plan.contains("8 experts a block, 3 a token") && plan.contains("an expert needs 64 tokens"), "{plan}");
        let done = ok(command("quantize").arg("-o").arg(&out));
        let table = String::from_utf8(done.stdout.clone()).unwrap();
        assert!(table.contains("fewest tokens") && table.contains("starved"), "{table}");
        let said = stderr(&done);
        let of_three =
            |l: &str| l.contains("layers.0.mlp.experts.3.gate_proj: ") && l.contains("of the 64 tokens it needs");
        assert!(said.lines().any(of_three), "{said}");
        let record = json(&out.join("quantize.json"));
        let experts = record["experts"].as_array().unwrap();
        assert_eq!(experts.iter().map(|e| e["block"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
        for e in experts {
            let tokens: Vec<u64> = serde_json::from_value(e["tokens"].clone()).unwrap();
            assert_eq!((tokens.len(), tokens.iter().sum::<u64>()), (8, 12 * 32 * 3));
            assert!(tokens[3] < 64 && e["starved"].as_u64().unwrap() > 0, "{tokens:?}");
        }
        let quantization = &json(&out.join("config.json"))["quantization_config"];
        assert_eq!(quantization["quant_method"], "compressed-tensors");
        assert!(quantization["ignore"].as_array().unwrap().contains(&"model.layers.2.mlp.router".into()));
        ok(lowbit(tmp.path()).args(["--quiet", "verify"]).arg(&out).arg("--original").arg(&dir));
        let inspected =
            String::from_utf8(ok(lowbit(tmp.path()).args(["--quiet", "inspect"]).arg(&out)).stdout).unwrap();
        assert!(inspected.contains("8 experts of 32, 3 a token, in 3 layers"), "{inspected}");
        let mut eval = lowbit(tmp.path());
        eval.args(["--quiet", "--json", "--device", "cpu", "eval"]).arg(&out).arg("--reference").arg(&dir);
        eval.arg("--kl").arg(&text).args(["--kl-window", "64", "--limit", "4"]);
        let scores: serde_json::Value = serde_json::from_slice(&ok(&mut eval).stdout).unwrap();
        // Eight bits change logits, which are some 1.2, by a few hundredths of that, but where a token goes to another expert.
        let kl = scores["kl"]["mean"].as_f64().unwrap();
        assert!(kl > 0.0 && kl < 0.1, "{kl}");
    }
}
