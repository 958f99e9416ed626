//! Mixtures of experts and latent attention against transformers, on tiny random models (`experts/logits.py`).

#[path = "experts/released.rs"]
mod released;
#[path = "experts/weights.rs"]
mod weights;

use std::path::Path;
use std::sync::Arc;

use lowbit_checkpoint::Checkpoint;
use lowbit_kernels::backend::{Backend, Segment};
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};
use lowbit_kernels::cuda::{Device, GpuBackend};
use lowbit_model::Model;
use serde_json::{Value, json};
use weights::Tensor;

const FAMILIES: [&str; 6] = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"];

/// Sums of 32 to 64 products in f32, through at most four layers, against torch's order of additions.
const TOLERANCE: f32 = 1e-4;

fn expected() -> Value {
    serde_json::from_str(include_str!("experts/logits.json")).unwrap()
}

fn ids() -> Vec<u32> {
    serde_json::from_value(expected()["ids"].clone()).unwrap()
}

fn load(dir: &Path, backend: Arc<dyn Backend>) -> Model {
    Model::load(&Checkpoint::open(dir).unwrap(), backend).unwrap()
}

fn model(family: &str, backend: Arc<dyn Backend>) -> Model {
    let (dir, json) = (tempfile::tempdir().unwrap(), weights::config_of(family));
    weights::write(dir.path(), &json, &weights::tensors(&json));
    load(dir.path(), backend)
}

/// Largest difference from transformers' logits, at every third column.
fn difference(family: &str, logits: &[f32]) -> f32 {
    let want: Vec<Vec<f32>> = serde_json::from_value(expected()["logits"][family].clone()).unwrap();
    let mut worst = 0f32;
    for (row, want) in logits.chunks_exact(64).zip(&want) {
        for (got, want) in row.iter().step_by(3).zip(want) {
            let d = (got - want).abs();
            worst = if d.is_nan() { f32::INFINITY } else { worst.max(d) };
        }
    }
    worst
}

/// Logits of a prompt in one call, and token by token in the decode phase.
fn both_phases(model: &Model, ids: &[u32]) -> [Vec<f32>; 2] {
    let prompt = model.logits_of(ids).unwrap();
    let mut cache = model.new_cache(1, ids.len()).unwrap();
    let mut steps = Vec::new();
    for (past, id) in ids.iter().enumerate() {
        let y = model.decode_step(&[*id], &[Segment { slot: 0, row: 0, tokens: 1, past }], &mut cache).unwrap();
        steps.extend(model.backend().download(&y).unwrap());
    }
    [prompt, steps]
}

#[test]
fn logits_are_those_of_transformers() {
    let ids = ids();
    for family in FAMILIES {
        let backends: [Arc<dyn Backend>; 2] = [Arc::new(ScalarBackend::new()), Arc::new(CpuBackend::new().exact(true))];
        for backend in backends {
            let name = backend.name();
            for (phase, logits) in ["prefill", "decode"].iter().zip(both_phases(&model(family, backend), &ids)) {
                let d = difference(family, &logits);
                assert!(logits.len() == 64 * ids.len() && d <= TOLERANCE, "{family}, {name}, {phase}: {d}");
            }
        }
    }
}

#[test]
fn the_emulated_gpu_computes_them_too() {
    let ids = &ids()[..5];
    for family in ["qwen2_moe", "deepseek_v3"] {
        let backend: Arc<dyn Backend> = Arc::new(GpuBackend::new(Arc::new(Device::emulated(2).unwrap())));
        for (phase, logits) in ["prefill", "decode"].iter().zip(both_phases(&model(family, backend), ids)) {
            let d = difference(family, &logits);
            assert!(d <= TOLERANCE, "{family}, {phase}: {d}");
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_the_batch_or_the_threads() {
    let ids = ids();
    for family in ["mixtral", "deepseek_v3", "gpt_oss"] {
        let model = model(family, Arc::new(CpuBackend::new()));
        let alone = model.logits_of(&ids).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| model.logits_of(&ids)).unwrap(), alone, "{family}: threads");
        let both: Vec<u32> = ids.iter().rev().chain(&ids).copied().collect();
        let n = ids.len();
        let mut cache = model.new_cache(2, n).unwrap();
        let segments = [0, 1].map(|slot| Segment { slot, row: slot * n, tokens: n, past: 0 });
        let hidden = model.forward(&both, &segments, &mut cache).unwrap();
        let logits = model.backend().download(&model.logits(&hidden).unwrap()).unwrap();
        assert_eq!(logits[64 * n..], alone, "{family}: batch");
    }
}

#[test]
fn experts_in_one_tensor_are_the_same_experts() {
    for family in ["mixtral", "qwen3_moe"] {
        let (dir, mut json) = (tempfile::tempdir().unwrap(), weights::config_of(family));
        // As transformers 5 writes the number of experts.
        if let Some(n) = json.as_object_mut().unwrap().remove("num_experts") {
            json["num_local_experts"] = n;
        }
        let (mut fused, mut rest) = (std::collections::BTreeMap::<String, Vec<Tensor>>::new(), Vec::new());
        for (name, t) in weights::tensors(&json) {
            let name = name.replace(".block_sparse_moe.", ".mlp.");
            let Some((block, part)) = name.split_once(".mlp.experts.") else {
                rest.push((name, t));
                continue;
            };
            let down = part.ends_with("down_proj.weight") || part.ends_with("w2.weight");
            let key = format!("{block}.mlp.experts.{}", if down { "down_proj" } else { "gate_up_proj" });
            fused.entry(key).or_default().push(t);
        }
        let experts = if family == "mixtral" { 8 } else { 16 };
        for (name, parts) in fused {
            // Gate, then up, of each expert in turn: the order they come in.
            let [rows, n] = parts[0].shape[..] else { panic!() };
            let shape = vec![experts, rows * parts.len() / experts, n];
            rest.push((name, Tensor { shape, values: parts.into_iter().flat_map(|t| t.values).collect() }));
        }
        weights::write(dir.path(), &json, &rest);
        let backend = || Arc::new(CpuBackend::new());
        let logits = load(dir.path(), backend()).logits_of(&ids()).unwrap();
        assert_eq!(logits, model(family, backend()).logits_of(&ids()).unwrap(), "{family}");
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let refused = |family: &str, key: &str, value: Value| {
        let mut c = weights::config_of(family);
        c[key] = value;
        let error = lowbit_checkpoint::config::parse(Path::new("config.json"), &c);
        error.expect_err(&format!("{family} {key}")).to_string()
    };
    for (family, key, value) in [
        ("qwen3_moe", "use_sliding_window", json!(true)),
        ("deepseek_v2", "norm_topk_prob", json!(true)),
        ("deepseek_v2", "topk_method", json!("noaux_tc")),
        ("deepseek_v3", "scoring_func", json!("softmax")),
        ("deepseek_v3", "moe_layer_freq", json!(2)),
        ("deepseek_v3", "topk_group", json!(5)),
        ("mixtral", "num_experts_per_tok", json!(9)),
        ("mixtral", "num_local_experts", json!(0)),
        ("qwen2_moe", "shared_expert_intermediate_size", Value::Null),
        ("mixtral", "kv_lora_rank", json!(16)),
        ("gpt_oss", "swiglu_limit", json!("seven")),
        ("gpt_oss", "rope_scaling", Value::Null),
    ] {
        let error = refused(family, key, value);
        assert!(error.contains(key), "{family} {key}: {error}");
    }
    let error = refused("mixtral", "model_type", json!("jamba"));
    assert!(error.contains("architecture `jamba`"), "{error}");
    // Groups that cannot hold the experts a token needs.
    let error = refused("deepseek_v3", "num_experts_per_tok", json!(9));
    assert!(error.contains("9 experts a token out of 2 groups of 4"), "{error}");
}

#[test]
fn released_gpt_oss_keeps_its_codes_and_gives_transformers_logits() {
    let (dir, json) = (tempfile::tempdir().unwrap(), weights::config_of("gpt_oss"));
    released::write(dir.path(), json.clone(), weights::tensors(&json));
    let ids = ids();
    for backend in [Arc::new(ScalarBackend::new()) as Arc<dyn Backend>, Arc::new(CpuBackend::new().exact(true))] {
        let name = backend.name();
        let model = load(dir.path(), backend);
        for (phase, logits) in ["prefill", "decode"].iter().zip(both_phases(&model, &ids)) {
            let d = difference("gpt_oss_mxfp4", &logits);
            assert!(d <= TOLERANCE, "{name}, {phase}: {d}");
        }
        // Three layers of eight experts, each three matrices of 64 × 32: a byte for two codes, and one for 32.
        let codes = 3 * 8 * 3 * 64 * 32 * 17 / 32;
        let floats = 4 * (3 * (2 * 64 * 64 + 2 * 32 * 64 + 8 * 64) + 2 * 64 * 64);
        assert_eq!(model.weight_bytes(), (codes + floats) as u64, "{name}");
    }
}

#[test]
fn gpt_oss_is_refused_where_it_is_not_computed() {
    let (dir, json) = (tempfile::tempdir().unwrap(), weights::config_of("gpt_oss"));
    let tensors = weights::tensors(&json);
    weights::write(dir.path(), &json, &tensors);
    let gpu: Arc<dyn Backend> = Arc::new(GpuBackend::new(Arc::new(Device::emulated(1).unwrap())));
    let error = Model::load(&Checkpoint::open(dir.path()).unwrap(), gpu).err().map(|e| e.to_string());
    assert!(error.as_ref().is_some_and(|e| e.contains("attention sinks") && e.contains("--device cpu")), "{error:?}");
    // A tensor of experts that is not the config's, by name and with both shapes.
    let part = "model.layers.1.mlp.experts.down_proj";
    let cut = tensors.into_iter().map(|(name, t)| match name == part {
        true => (name, Tensor { shape: vec![7, 32, 64], values: t.values[..7 * 32 * 64].to_vec() }),
        false => (name, t),
    });
    weights::write(dir.path(), &json, &cut.collect::<Vec<_>>());
    let error = Checkpoint::open(dir.path()).err().map(|e| e.to_string()).unwrap_or_default();
    assert!([part, "[8, 32, 64]", "[7, 32, 64]"].iter().all(|t| error.contains(t)), "{error}");
}
