//! Float codes, quantized inputs, scales of keys and values, and mixes: written, verified, read back and scored on the demo model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowbit_checkpoint::{Checkpoint, Dtype};
use lowbit_kernels::activation::InputCode;
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};
use lowbit_kernels::cuda::{Device, GpuBackend};
use lowbit_model::Model;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::{demo, json, lowbit, ok, stderr};

fn quantize(tmp: &Path, name: &str, args: &[&str]) -> PathBuf {
    let out = tmp.join(name);
    let few = ["--samples", "8", "--seq-len", "64"];
    let data = if args.contains(&"--samples") { &[][..] } else { &few };
    ok(lowbit(tmp)
        .args(["--quiet", "--device", "cpu", "quantize"])
        .arg(demo())
        .arg("-o")
        .arg(&out)
        .args(["--calib", "self"])
        .args(data)
        .args(args));
    ok(lowbit(tmp).args(["--quiet", "verify"]).arg(&out).arg("--original").arg(demo()));
    out
}

/// What `plan` says comes out.
fn planned(tmp: &Path, args: &[&str]) -> u64 {
    let out = ok(lowbit(tmp).args(["--quiet", "--json", "plan"]).arg(demo()).args(args));
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    v["after_bytes"].as_u64().unwrap()
}

fn logits(dir: &Path, backend: Arc<dyn Backend>) -> Vec<f32> {
    let ids: Vec<u32> = (0..24).map(|i| 5 + i * 37 % 2000).collect();
    Model::load(&Checkpoint::open(dir).unwrap(), backend).unwrap().logits_of(&ids).unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let sum = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    sum(&mut a.iter().zip(b).map(|(x, y)| x - y)) / sum(&mut b.iter().copied())
}

#[test]
fn every_scheme_is_written_as_planned_and_reads_back() {
    let tmp = tempfile::tempdir().unwrap();
    let float = logits(&demo(), Arc::new(CpuBackend::new()));
    // The largest relative distance of logits that each may have: four bits of mantissa, two of E2M1.
    for (name, args, format, most) in [
        ("w8a8", &["--scheme", "w8a8"][..], "int-quantized", 0.1),
        ("w8a8-static", &["--scheme", "w8a8-static"], "int-quantized", 0.15),
        ("fp8a16", &["--scheme", "fp8a16"], "naive-quantized", 0.1),
        ("fp8-dynamic", &["--scheme", "fp8-dynamic"], "float-quantized", 0.15),
        ("fp8-static", &["--scheme", "fp8-static"], "float-quantized", 0.15),
        ("fp8-block", &["--scheme", "fp8-block", "--method", "rtn"], "float-quantized", 0.15),
        ("nvfp4a16", &["--scheme", "nvfp4a16"], "nvfp4-pack-quantized", 0.4),
        ("nvfp4", &["--scheme", "nvfp4"], "nvfp4-pack-quantized", 0.5),
        ("mxfp4a16", &["--scheme", "mxfp4a16"], "mxfp4-pack-quantized", 0.5),
    ] {
        let dir = quantize(tmp.path(), name, args);
        assert_eq!(json(&dir.join("config.json"))["quantization_config"]["format"], format, "{name}");
        let ckpt = Checkpoint::open(&dir).unwrap();
        let bytes: u64 = ckpt.store.iter().map(|(_, t)| t.data.as_slice().len() as u64).sum();
        assert_eq!(planned(tmp.path(), args), bytes, "{name}");
        let record = json(&dir.join("quantize.json"));
        let layer = &record["layers"][0];
        assert_eq!(layer["scheme"], record["scheme"], "{name}");
        let stored = name.ends_with("static") || name == "nvfp4";
        assert_eq!(layer["input_scale"].is_number(), stored, "{name}");
        let fast = logits(&dir, Arc::new(CpuBackend::new()));
        let d = distance(&fast, &float);
        assert!(d > 1e-4 && d < most, "{name}: {d}");
        // In f32 on both. Where inputs are rounded, the reference's own last bits may fall on the other side of a tie.
        let exact = logits(&dir, Arc::new(CpuBackend::new().exact(true)));
        let d = distance(&exact, &logits(&dir, Arc::new(ScalarBackend::new())));
        assert!(d < if layer["scheme"].as_str().unwrap().ends_with("a16") { 1e-5 } else { 3e-2 }, "{name}: {d}");
        // A device multiplies these as codes; rounding on the way decides ties there too.
        if ["w8a8", "w8a8-static", "fp8-dynamic", "fp8-static"].contains(&name) {
            let gpu = GpuBackend::new(Arc::new(Device::emulated(2).unwrap()));
            let d = distance(&logits(&dir, Arc::new(gpu)), &exact);
            assert!(d < 3e-2, "{name}: {d} on the emulated device");
        }
    }
}

#[test]
fn gptq_onto_float_codes_is_better_than_rounding() {
    let tmp = tempfile::tempdir().unwrap();
    let loss = |scheme: &str, method: &str| {
        // A Hessian of fewer tokens than columns says little.
        let data = ["--samples", "32", "--seq-len", "128"];
        let args = [&["--scheme", scheme, "--method", method][..], &data].concat();
        let dir = quantize(tmp.path(), &format!("{scheme}-{method}"), &args);
        let mut c = lowbit(tmp.path());
        c.args(["--quiet", "--json", "--device", "cpu", "eval"]).arg(&dir).arg("--reference").arg(demo());
        c.arg("--kl").arg(super::root().join("assets/demo-text/evaluation.txt")).args(["--kl-window", "128"]);
        let out = ok(c.args(["--limit", "6"]));
        serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap()["kl"]["mean"].as_f64().unwrap()
    };
    for scheme in ["nvfp4a16", "mxfp4a16"] {
        let (rtn, gptq) = (loss(scheme, "rtn"), loss(scheme, "gptq"));
        assert!(gptq < 0.9 * rtn, "{scheme}: gptq {gptq}, rtn {rtn}");
    }
}

#[test]
fn fused_sets_share_their_global_scale() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = quantize(tmp.path(), "nvfp4", &["--scheme", "nvfp4", "--method", "rtn"]);
    let ckpt = Checkpoint::open(&dir).unwrap();
    let one = |module: &str, name: &str| ckpt.store.vector(&format!("model.layers.1.{module}.{name}"), 1).unwrap()[0];
    for set in [&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"][..], &["mlp.gate_proj", "mlp.up_proj"]] {
        for name in ["weight_global_scale", "input_global_scale"] {
            let values: Vec<f32> = set.iter().map(|m| one(m, name)).collect();
            assert!(values.iter().all(|v| *v == values[0] && *v > 0.0), "{set:?} {name}: {values:?}");
        }
    }
    assert_ne!(one("mlp.gate_proj", "weight_global_scale"), one("mlp.down_proj", "weight_global_scale"));
}

#[test]
fn keys_and_values_have_stored_scales() {
    let tmp = tempfile::tempdir().unwrap();
    let base = ["--scheme", "w8a16", "--group-size", "64", "--method", "rtn"];
    let plain = logits(&quantize(tmp.path(), "plain", &base), Arc::new(CpuBackend::new()));
    for (kv, shape) in [("fp8", vec![1]), ("int8-head", vec![2, 1, 1])] {
        let args = [&base[..], &["--kv-scheme", kv]].concat();
        let dir = quantize(tmp.path(), kv, &args);
        let ckpt = Checkpoint::open(&dir).unwrap();
        let t = ckpt.store.get("model.layers.0.self_attn.v_scale").unwrap();
        assert_eq!((t.dtype, t.shape.len()), (Dtype::BF16, shape.len()));
        let bytes: u64 = ckpt.store.iter().map(|(_, t)| t.data.as_slice().len() as u64).sum();
        assert_eq!(planned(tmp.path(), &args), bytes);
        let d = distance(&logits(&dir, Arc::new(CpuBackend::new())), &plain);
        assert!(d > 1e-4 && d < 0.1, "{kv}: {d}");
    }
}

#[test]
fn modules_may_have_schemes_of_their_own() {
    let tmp = tempfile::tempdir().unwrap();
    let rules = ["--module", "re:.*down_proj=w8a16:32", "--module", "model.layers.0.self_attn.o_proj=fp8-dynamic"];
    let args = [&["--group-size", "64"], &rules[..]].concat();
    let dir = quantize(tmp.path(), "mixed", &args);
    let q = &json(&dir.join("config.json"))["quantization_config"];
    assert_eq!((q["format"].as_str(), q["config_groups"].as_object().unwrap().len()), (Some("mixed-precision"), 3));
    let ckpt = Checkpoint::open(&dir).unwrap();
    let of = |m: &str| ckpt.quantization.as_ref().unwrap().scheme_of(m).unwrap().full_name();
    assert_eq!(of("model.layers.3.mlp.down_proj"), "w8a16-g32");
    assert_eq!(
        (of("model.layers.0.self_attn.o_proj").as_str(), of("model.layers.1.self_attn.o_proj").as_str()),
        ("fp8-dynamic", "w4a16-g64")
    );
    let d = distance(&logits(&dir, Arc::new(CpuBackend::new())), &logits(&demo(), Arc::new(CpuBackend::new())));
    assert!(d < 0.3, "{d}");

    // To bf16 and back to the same logits but for that rounding.
    let dense = tmp.path().join("dense");
    ok(lowbit(tmp.path()).args(["--quiet", "convert"]).arg(&dir).arg("-o").arg(&dense).args(["--format", "bf16"]));
    assert!(Checkpoint::open(&dense).unwrap().quantization.is_none());
    let refused = |args: &[&str]| {
        let out = lowbit(tmp.path()).args(["--quiet", "plan"]).arg(demo()).args(args).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{args:?}");
        stderr(&out)
    };
    for (args, said) in [
        (&["--module", "re:.*q_proj=fp8-dynamic"][..], "a set must have one scheme"),
        (&["--module", "re:.*nothing=w8a16"], "--module re:.*nothing matches no linear"),
        (&["--module", "down_proj"], "expected PATTERN=SCHEME"),
        (&["--scheme", "nvfp4a16", "--method", "best"], "works on integer codes"),
        (&["--scheme", "fp8-dynamic", "--method", "hqq"], "works on integer codes"),
        (&["--scheme", "fp8-dynamic", "--scale-search", "pivots"], "--scale-search pivots works on integer codes"),
        (&["--method", "rtn", "--scale-search", "blocks"], "weighs errors by a Hessian"),
        (&["--method", "round", "--learn-steps", "0"], "at least 1"),
        (&["--scheme", "nvfp4a16", "--format", "gptq"], "GPTQ format"),
        (&["--scheme", "fp8-dynamic", "--group-size", "64"], "fixes its groups"),
        (&["--scheme", "w8a8", "--asymmetric"], "is symmetric"),
    ] {
        let text = refused(args);
        assert!(text.contains(said), "{args:?}: {text}");
    }
    let out = lowbit(tmp.path())
        .args(["--quiet", "quantize"])
        .arg(demo())
        .arg("-o")
        .arg(tmp.path().join("no"))
        .args(["--scheme", "fp8-static", "--method", "rtn"])
        .output()
        .unwrap();
    assert!(stderr(&out).contains("needs calibration data"), "{}", stderr(&out));
}

/// A tensor's new name and bytes.
type Change<'a> = &'a dyn Fn(&str, &[u8]) -> (String, Vec<u8>);

/// A copy of a checkpoint with other tensors and another `quantization_config`: `change` gives each tensor's new name and bytes.
fn rewritten(
    from: &Path,
    to: &Path,
    config: serde_json::Value,
    change: impl Fn(&str, &[u8]) -> (String, Vec<u8>),
) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let old = SafeTensors::deserialize(&bytes).unwrap();
    let new: Vec<_> = old.iter().map(|(n, t)| (change(n, t.data()), t.dtype(), t.shape().to_vec())).collect();
    let views = new.iter().map(|((n, b), d, s)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &to.join("model.safetensors")).unwrap();
    let mut c = json(&from.join("config.json"));
    c["quantization_config"] = config;
    std::fs::write(to.join("config.json"), c.to_string()).unwrap();
    to.to_path_buf()
}

#[test]
fn other_makers_names_hold_the_same_weights() {
    let tmp = tempfile::tempdir().unwrap();
    let cpu = || -> Arc<dyn Backend> { Arc::new(CpuBackend::new()) };
    let block = quantize(tmp.path(), "block", &["--scheme", "fp8-block", "--method", "rtn"]);
    let config = serde_json::json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    });
    let deepseek = rewritten(&block, &tmp.path().join("deepseek"), config, |name, bytes| {
        (name.replace(".weight_scale", ".weight_scale_inv"), bytes.to_vec())
    });
    assert_eq!(logits(&deepseek, cpu()), logits(&block, cpu()));

    let nvfp4 = quantize(tmp.path(), "nvfp4", &["--scheme", "nvfp4", "--method", "rtn"]);
    let config = serde_json::json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]});
    let optimizer = rewritten(&nvfp4, &tmp.path().join("modelopt"), config, |name, bytes| {
        let inverse = || 1f32 / f32::from_le_bytes(bytes.try_into().unwrap());
        match name.rsplit_once('.') {
            Some((m, "weight_packed")) => (format!("{m}.weight"), bytes.to_vec()),
            Some((m, "weight_global_scale")) => (format!("{m}.weight_scale_2"), inverse().to_le_bytes().to_vec()),
            Some((m, "input_global_scale")) => (format!("{m}.input_scale"), inverse().to_le_bytes().to_vec()),
            _ => (name.to_string(), bytes.to_vec()),
        }
    });
    // The reciprocal of a reciprocal: a last bit, and with it some ties.
    let d = distance(&logits(&optimizer, cpu()), &logits(&nvfp4, cpu()));
    assert!(d < 3e-2, "{d}");
    let e = Checkpoint::open(&optimizer).unwrap();
    let rule = e.input_rule("model.layers.0.mlp.up_proj").unwrap().unwrap();
    assert_eq!(rule.code, InputCode::Fp4);

    // A scale that is not there, and one that is not a number.
    let config = json(&nvfp4.join("config.json"))["quantization_config"].clone();
    let refused = |folder: &str, change: Change<'_>| {
        let dir = rewritten(&nvfp4, &tmp.path().join(folder), config.clone(), change);
        stderr(&lowbit(tmp.path()).args(["--quiet", "verify"]).arg(dir).output().unwrap())
    };
    let text = refused("absent", &|name, bytes| {
        (name.replace("0.mlp.up_proj.weight_global", "x.weight_global"), bytes.to_vec())
    });
    assert!(text.contains("`model.layers.0.mlp.up_proj.weight_global_scale` is missing"), "{text}");
    let text = refused("nan", &|name, bytes| {
        let nan = name == "model.layers.0.mlp.up_proj.input_global_scale";
        (name.to_string(), if nan { f32::NAN.to_le_bytes().to_vec() } else { bytes.to_vec() })
    });
    assert!(text.contains("input_global_scale") && text.contains("finite"), "{text}");
}
