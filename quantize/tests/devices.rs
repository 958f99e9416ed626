//! Devices that share a quantization write what one of them writes: tiny random models, and windows of which each is a chunk.

#[path = "../../model/tests/experts/weights.rs"]
mod weights;

// `weights` writes its checkpoints with it.
use safetensors as _;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lowbit_calibration::Windows;
use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::quant_config::KvScheme;
use lowbit_kernels::activation::InputCode;
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};
use lowbit_kernels::cuda::{Arithmetic, Device, GpuBackend};
use lowbit_kernels::{GroupSize, Scheme};
use lowbit_quantize::{Method, QuantizeOptions, Resume, Silent, Transform, plan, quantize};
use serde_json::{Value, json};

/// Tokens of a window: two are more than a chunk has.
const TOKENS: u32 = 1030;

fn dense() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": false,
    })
}

fn windows(count: u32) -> Windows {
    let window = |w: u32| (0..TOKENS).map(|i| (w * 31 + i * i * 7 + i) % 64).collect();
    Windows::new((0..count).map(window).collect(), "made", 0)
}

fn options(method: Method) -> QuantizeOptions {
    QuantizeOptions { method, ..QuantizeOptions::new(Scheme::parse("w4a16", GroupSize::Cols(8), true).unwrap()) }
}

/// Files by name, and what was recorded but for times.
#[derive(PartialEq)]
struct Written {
    files: BTreeMap<String, Vec<u8>>,
    record: Value,
}

fn run(from: &Path, to: &Path, backends: &[&dyn Backend], options: &QuantizeOptions, windows: &Windows) -> Written {
    let ckpt = Checkpoint::open(from).unwrap();
    let made = plan::make(&ckpt, options, None, windows.token_count()).unwrap();
    let resume = Resume { identity: "test".into(), fresh: false };
    let stop = AtomicBool::new(false);
    let (mut outcome, writer) =
        quantize(&ckpt, backends, &made, Some(windows), to, false, &resume, &Silent, &stop).unwrap();
    writer.finish().unwrap();
    outcome.layers.iter_mut().for_each(|l| l.seconds = 0.0);
    let file = |e: std::io::Result<std::fs::DirEntry>| {
        let e = e.unwrap();
        (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).unwrap())
    };
    let files = std::fs::read_dir(to).unwrap().map(file).collect();
    Written { files, record: json!([outcome.layers, outcome.experts, outcome.transforms]) }
}

/// Quantizes a random model on each of `sets`.
fn on_each(json: &Value, options: &QuantizeOptions, windows: &Windows, sets: &[&[&dyn Backend]]) -> Vec<Written> {
    let tmp = tempfile::tempdir().unwrap();
    let from = tmp.path().join("from");
    weights::write(&from, json, &weights::tensors(json));
    let to = |i: usize| tmp.path().join(format!("to{i}"));
    sets.iter().enumerate().map(|(i, backends)| run(&from, &to(i), backends, options, windows)).collect()
}

fn assert_same(found: &[Written], what: &str) {
    for (i, other) in found.iter().enumerate().skip(1) {
        assert!(other.files.keys().eq(found[0].files.keys()), "{what}, {i}");
        for (name, bytes) in &other.files {
            assert!(*bytes == found[0].files[name], "{what}, {i}: {name} differs");
        }
        assert_eq!(other.record, found[0].record, "{what}, {i}");
    }
    assert!(found[0].files["model.safetensors"].len() > 1000, "{what}");
}

#[test]
fn any_number_of_devices_writes_the_same_bytes() {
    let (a, b, c) = (CpuBackend::new(), CpuBackend::new(), CpuBackend::new());
    // Five chunks: devices with more and with fewer of them; eight devices: some without any.
    let eight: [&dyn Backend; 8] = [&a, &b, &c, &a, &b, &c, &a, &b];
    let sets: [&[&dyn Backend]; 4] = [&[&a], &[&a, &b], &[&a, &b, &c], &eight];
    let disk = tempfile::tempdir().unwrap();
    let kv = Some(KvScheme { code: InputCode::Fp8, per_head: true });
    for (what, options) in [
        ("gptq", QuantizeOptions { kv, ..options(Method::Gptq) }),
        ("best", options(Method::Best)),
        ("best on disk", QuantizeOptions { offload: Some(disk.path().join("x")), ..options(Method::Best) }),
        ("awq", QuantizeOptions { transforms: vec![Transform::Awq], ..options(Method::Fast) }),
    ] {
        assert_same(&on_each(&dense(), &options, &windows(5), &sets), what);
    }
    let learned = QuantizeOptions { learn_steps: 1, ..options(Method::Round) };
    assert_same(&on_each(&dense(), &learned, &windows(2), &sets[..2]), "round");
}

#[test]
fn experts_and_latent_attention_are_shared_too() {
    let (a, b, c) = (CpuBackend::new(), CpuBackend::new(), CpuBackend::new());
    let sets: [&[&dyn Backend]; 3] = [&[&a], &[&a, &b], &[&a, &b, &c]];
    for (family, method) in [("deepseek_v3", Method::Best), ("qwen2_moe", Method::Gptq)] {
        assert_same(&on_each(&weights::config_of(family), &options(method), &windows(3), &sets), family);
    }
}

#[test]
fn the_second_device_computes_its_part() {
    let (a, b, scalar) = (CpuBackend::new(), CpuBackend::new(), ScalarBackend::new());
    // Of another kind, which rounds otherwise: what it computed is seen in the result.
    let sets: [&[&dyn Backend]; 2] = [&[&a, &b], &[&a, &scalar]];
    let found = on_each(&dense(), &options(Method::Gptq), &windows(2), &sets);
    assert!(found[0].record != found[1].record);
}

#[test]
fn emulated_gpus_write_what_one_writes() {
    for arithmetic in [Arithmetic::Reproducible, Arithmetic::Fast] {
        let gpu = || GpuBackend::new(Arc::new(Device::emulated(1).unwrap())).with_arithmetic(arithmetic);
        let (a, b) = (gpu(), gpu());
        let found = on_each(&dense(), &options(Method::Gptq), &windows(2), &[&[&a], &[&a, &b]]);
        assert_same(&found, arithmetic.name());
    }
}

#[test]
fn no_device_is_an_error() {
    let tmp = tempfile::tempdir().unwrap();
    weights::write(&tmp.path().join("from"), &dense(), &weights::tensors(&dense()));
    let ckpt = Checkpoint::open(&tmp.path().join("from")).unwrap();
    let (windows, resume) = (windows(1), Resume { identity: "test".into(), fresh: false });
    let made = plan::make(&ckpt, &options(Method::Gptq), None, windows.token_count()).unwrap();
    let (to, stop) = (tmp.path().join("to"), AtomicBool::new(false));
    match quantize(&ckpt, &[], &made, Some(&windows), &to, false, &resume, &Silent, &stop) {
        Ok(_) => panic!("nothing computed it"),
        Err(e) => assert!(e.to_string().contains("devices must be at least 1"), "{e}"),
    }
}
