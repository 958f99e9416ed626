//! Transforms through plan, calibration, writing and reading: tiny random models of every family that they know.

mod dense;

// `dense` writes its checkpoints with it.
use safetensors as _;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use dense::weights::{self, Tensor};
use dense::{FAMILIES, distance, logits, write};
use lowbit_calibration::Windows;
use lowbit_checkpoint::Checkpoint;
use lowbit_kernels::cpu::CpuBackend;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, LinearScheme};
use lowbit_quantize::gguf::GgufChoice;
use lowbit_quantize::transform::TransformRecord;
use lowbit_quantize::verify::verify;
use lowbit_quantize::{
    Method, Progress, QuantizeError, QuantizeOptions, Resume, Silent, Transform, budget, plan, quantize,
};

const SMOOTH: Transform = Transform::SmoothQuant { alpha: 0.5 };

/// A scale a row.
fn options(scheme: &str, method: Method, transforms: &[Transform]) -> QuantizeOptions {
    let scheme = LinearScheme::parse(scheme, GroupSize::PerChannel, true).unwrap();
    QuantizeOptions { method, transforms: transforms.to_vec(), ..QuantizeOptions::new(scheme) }
}

fn windows() -> Windows {
    Windows::new((0..12u32).map(|w| (0..20).map(|i| (w * 31 + i * i * 7 + i) % 64).collect()).collect(), "made", 0)
}

fn watched(
    from: &Checkpoint,
    to: &Path,
    options: &QuantizeOptions,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<Option<TransformRecord>, QuantizeError> {
    let windows = windows();
    let made = plan::make(from, options, None, windows.token_count())?;
    let data = options.needs_data().then_some(&windows);
    let resume = Resume { identity: "test".into(), fresh: false };
    let (outcome, writer) = quantize(from, &[&CpuBackend::new()], &made, data, to, false, &resume, progress, stop)?;
    writer.finish()?;
    let written = Checkpoint::open(to)?;
    let bytes: u64 = written.store.iter().map(|(_, t)| t.data.as_slice().len() as u64).sum();
    assert_eq!(bytes, made.record.after_bytes);
    verify(&written, None, None)?;
    Ok(outcome.transforms)
}

fn run(from: &Checkpoint, to: &Path, options: &QuantizeOptions) -> Result<Option<TransformRecord>, QuantizeError> {
    watched(from, to, options, &Silent, &AtomicBool::new(false))
}

/// The logits of what is written, and how far they are from the original's.
fn error_of(from: &Checkpoint, options: &QuantizeOptions) -> f64 {
    let tmp = tempfile::tempdir().unwrap();
    let to = tmp.path().join("out");
    run(from, &to, options).unwrap();
    distance(&logits(&Checkpoint::open(&to).unwrap()), &logits(from))
}

#[test]
fn a_rotated_model_is_the_same_model_in_an_ordinary_checkpoint() {
    for family in FAMILIES.into_iter().filter(|f| *f != "gemma3_text") {
        let tmp = tempfile::tempdir().unwrap();
        let from = write(&tmp.path().join("in"), family, |_| {});
        let to = tmp.path().join("out");
        // Nothing is quantized: what is left is the rotation.
        let ignore = vec!["re:.*_proj".into()];
        let options = QuantizeOptions { ignore, ..options("w8a16", Method::Rtn, &[Transform::Rotate]) };
        let record = run(&from, &to, &options).unwrap().unwrap();
        assert_eq!((record.applied, record.folds.len()), (vec!["rotate".to_string()], 0));
        let out = Checkpoint::open(&to).unwrap();
        // Every matrix is another, and rounded to f32 once or twice.
        let d = distance(&logits(&out), &logits(&from));
        assert!(d <= 2e-5, "{family}: {d}");
        assert!(!out.config.tie_word_embeddings && out.store.find("lm_head.weight").is_some(), "{family}");
        for (name, t) in out.store.iter() {
            let values = t.to_f32().unwrap();
            if name.ends_with("layernorm.weight") || name == "model.norm.weight" {
                assert!(values.iter().all(|v| *v == 1.0), "{family}: {name}");
            }
            let same = from.store.find(name).is_some_and(|o| o.data.as_slice() == t.data.as_slice());
            assert_eq!(same, !record.rewritten.iter().any(|n| n == name), "{family}: {name}");
        }
    }
}

#[test]
fn every_combination_is_quantized_as_well_as_without() {
    let awq = &[Transform::Awq][..];
    for (scheme, method, transforms) in [
        ("w8a16", Method::Rtn, awq),
        ("w8a16", Method::Gptq, awq),
        ("w8a16", Method::Best, awq),
        ("w8a8", Method::Gptq, &[SMOOTH]),
        ("w8a16", Method::Rtn, &[Transform::Rotate]),
        ("w8a16", Method::Best, &[Transform::Rotate]),
        ("w8a16", Method::Gptq, &[Transform::Awq, Transform::Rotate]),
        ("w8a8", Method::Rtn, &[Transform::Rotate, SMOOTH]),
    ] {
        for family in FAMILIES {
            if family == "gemma3_text" && transforms.contains(&Transform::Rotate) {
                continue;
            }
            let tmp = tempfile::tempdir().unwrap();
            let from = write(tmp.path(), family, |_| {});
            let plain = error_of(&from, &options(scheme, method, &[]));
            let with = error_of(&from, &options(scheme, method, transforms));
            // Random weights have no outliers to gain from; eight bits are close with and without.
            let most = 3.0 * plain + 0.01;
            assert!(with > 1e-5 && with < most, "{scheme} {method:?} {transforms:?} {family}: {with} {plain}");
        }
    }
}

/// Two channels of every norm's result are 30 times the others', and the columns that read them as much smaller: the model is the same,
/// and has the outliers that trained ones have.
fn outliers(tensors: &mut [(String, Tensor)]) {
    for (name, t) in tensors {
        let module = name.trim_end_matches(".weight");
        let ends = |names: &[&str]| names.iter().any(|n| module.ends_with(n));
        let factor = if ends(&["input_layernorm", "post_attention_layernorm"]) {
            30.0
        } else if ends(&["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]) {
            1.0 / 30.0
        } else {
            continue;
        };
        for row in t.values.chunks_mut(t.shape.last().copied().unwrap_or(1)) {
            row[3] *= factor;
            row[11] *= factor;
        }
    }
}

#[test]
fn outliers_cost_less() {
    let tmp = tempfile::tempdir().unwrap();
    let from = write(tmp.path(), "llama", |tensors| outliers(tensors));
    for (scheme, transform) in [("w4a16", Transform::Awq), ("w4a16", Transform::Rotate), ("w8a8", SMOOTH)] {
        let plain = error_of(&from, &options(scheme, Method::Rtn, &[]));
        let with = error_of(&from, &options(scheme, Method::Rtn, &[transform]));
        assert!(with < 0.75 * plain, "{scheme} {transform:?}: {with} {plain}");
    }
}

#[test]
fn awq_says_what_it_chose() {
    let tmp = tempfile::tempdir().unwrap();
    let from = write(&tmp.path().join("in"), "llama", |tensors| outliers(tensors));
    let w4 = options("w4a16", Method::Rtn, &[Transform::Awq]);
    let folds = run(&from, &tmp.path().join("out"), &w4).unwrap().unwrap().folds;
    let inputs: Vec<(usize, &str)> = folds.iter().map(|f| (f.block, f.inputs.as_str())).collect();
    let names = ["q/k/v", "o", "gate/up", "down"];
    assert_eq!(inputs, [0, 1].map(|b| names.map(|n| (b, n))).concat());
    for f in &folds {
        assert!(f.loss_after <= f.loss_before && f.loss_before.is_some(), "{f:?}");
        assert!(f.min_scale > 0.0 && f.min_scale <= f.max_scale && (0.0..1.0).contains(&f.alpha), "{f:?}");
        if ["q/k/v", "gate/up"].contains(&f.inputs.as_str()) {
            assert!(f.alpha >= 0.4 && f.max_scale / f.min_scale > 3.0, "{f:?}");
        }
    }
    // What is left alone is not scaled, and what is scaled at o is v.
    let ignore = vec!["re:.*self_attn.[qkv]_proj".into()];
    let some = QuantizeOptions { ignore, ..w4 };
    let record = run(&from, &tmp.path().join("some"), &some).unwrap().unwrap();
    let inputs: Vec<&str> = record.folds.iter().map(|f| f.inputs.as_str()).collect();
    assert_eq!(inputs, ["gate/up", "down", "gate/up", "down"]);
    assert!(record.rewritten.iter().all(|n| n.ends_with("post_attention_layernorm.weight")), "{record:?}");
}

/// Asks to stop when the second block begins; keeps what is said.
struct Watch<'a> {
    stop: Option<&'a AtomicBool>,
    said: Mutex<String>,
}

impl Progress for Watch<'_> {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn detail(&self, text: &str) {
        if let Some(stop) = self.stop.filter(|_| text.starts_with("block 2/")) {
            stop.store(true, Ordering::Relaxed);
        }
    }
    fn say(&self, text: &str) {
        self.said.lock().unwrap().push_str(text);
    }
}

#[test]
fn what_was_stopped_goes_on_and_ends_with_the_same_bytes() {
    for (family, scheme, method, transforms) in [
        ("llama", "w4a16", Method::Best, &[Transform::Awq][..]),
        ("qwen2", "w4a16", Method::Rtn, &[Transform::Rotate, Transform::Awq]),
        ("qwen3", "w8a8", Method::Gptq, &[SMOOTH]),
        ("phi3", "w4a16", Method::Best, &[Transform::Rotate]),
    ] {
        let tmp = tempfile::tempdir().unwrap();
        let from = write(&tmp.path().join("in"), family, |_| {});
        let (calm, out) = (tmp.path().join("calm"), tmp.path().join("out"));
        let options = options(scheme, method, transforms);
        let wanted = run(&from, &calm, &options).unwrap();
        let stop = AtomicBool::new(false);
        let watch = Watch { stop: Some(&stop), said: Mutex::default() };
        let stopped = watched(&from, &out, &options, &watch, &stop);
        assert!(matches!(stopped, Err(QuantizeError::Interrupted)) && !out.exists(), "{family}");
        let watch = Watch { stop: None, said: Mutex::default() };
        let found = watched(&from, &out, &options, &watch, &AtomicBool::new(false)).unwrap();
        let said = watch.said.into_inner().unwrap();
        assert!(said.contains("1 of 2 blocks were solved before"), "{family}: {said}");
        assert_eq!(found, wanted, "{family}");
        let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        assert!(weights(&calm) == weights(&out), "{family}: other bytes");
    }
}

#[test]
fn where_a_transform_does_not_apply_it_says_why() {
    let tmp = tempfile::tempdir().unwrap();
    let refused = |from: &Checkpoint, options: &QuantizeOptions| match plan::make(from, options, None, 240) {
        Err(QuantizeError::Plan { summary, offenders, hint: Some(hint) }) => format!("{summary} {offenders:?} {hint}"),
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("{:?} is planned", options.transforms),
    };
    let sparse = |family: &str| {
        let (dir, json) = (tmp.path().join(family), weights::config_of(family));
        weights::write(&dir, &json, &weights::tensors(&json));
        Checkpoint::open(&dir).unwrap()
    };
    for (family, part) in [("mixtral", "router"), ("deepseek_v2", "latent")] {
        let from = sparse(family);
        for transform in [Transform::Awq, Transform::Rotate] {
            let said = refused(&from, &options("w4a16", Method::Rtn, &[transform]));
            assert!(said.contains(part) && said.contains(family), "{said}");
        }
    }
    let gemma = write(&tmp.path().join("gemma"), "gemma3_text", |_| {});
    let said = refused(&gemma, &options("w4a16", Method::Rtn, &[Transform::Rotate]));
    assert!(said.contains("norms between") && said.contains("--transform awq"), "{said}");
    let unknown = write(&tmp.path().join("more"), "qwen3", |tensors| {
        let t = Tensor { shape: vec![24, 24], values: vec![0.0; 576] };
        tensors.push(("model.layers.2.eh_proj.weight".into(), t));
    });
    let said = refused(&unknown, &options("w4a16", Method::Rtn, &[Transform::Rotate]));
    assert!(said.contains("model.layers.2.eh_proj.weight"), "{said}");

    let llama = write(&tmp.path().join("llama"), "llama", |_| {});
    let said = refused(&llama, &options("w4a16", Method::Rtn, &[SMOOTH]));
    assert!(said.contains("leaves them alone") && said.contains("w8a8"), "{said}");
    let said = refused(&llama, &options("w8a8", Method::Rtn, &[SMOOTH, Transform::Awq]));
    assert!(said.contains("scale the same channels"), "{said}");
    let awq = options("w4a16", Method::Rtn, &[Transform::Awq]);
    let gguf = Some(GgufChoice { kind: GgmlType::Q4_0, embedding: None, head: None });
    let said = refused(&llama, &QuantizeOptions { gguf, ..awq.clone() });
    assert!(said.contains("GGUF"), "{said}");
    let error = budget::check(&llama, &awq).unwrap_err().to_string();
    assert!(error.contains("--transform awq: a budget"), "{error}");
    let error = awq.no_data().to_string();
    assert!(awq.needs_data() && error.contains("--transform awq needs calibration data"), "{error}");
    // What a plan says about a rotation of a tied model.
    let made = plan::make(&llama, &options("w4a16", Method::Rtn, &[Transform::Rotate]), None, 0).unwrap();
    assert!(made.record.notes.iter().any(|n| n.contains("unties the head")), "{:?}", made.record.notes);
    let row = |name: &str| made.record.tensors.iter().find(|t| t.name == name).map(|t| t.action.as_str());
    assert_eq!(row("lm_head.weight"), Some("add"));
    assert_eq!(row("model.norm.weight"), Some("rewrite"));
}
