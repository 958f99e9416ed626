//! Reference values made by transformers and llm-compressor, where `../shared` is at hand.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::backend::HostWeight;
use lowbit_kernels::cpu::CpuBackend;
use lowbit_model::{GenerateOptions, Model, generate};
use safetensors::SafeTensors;

use super::{demo, root};

fn shared() -> Option<PathBuf> {
    let dir = root().join("../shared");
    if !dir.join("golden").is_dir() {
        eprintln!("skipped: ../shared is absent");
        return None;
    }
    Some(dir)
}

fn floats(g: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    g.tensor(name).unwrap().data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn ints(g: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let data = g.tensor(name).unwrap();
    data.data().as_chunks::<8>().0.iter().map(|b| u32::try_from(i64::from_le_bytes(*b)).unwrap()).collect()
}

/// ‖a − b‖ / ‖b‖.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(x, y)| f64::from(*x) - f64::from(*y))) / norm(&mut b.iter().map(|x| f64::from(*x)))
}

fn load(dir: &Path) -> Model {
    Model::load(&Checkpoint::open(dir).unwrap(), Arc::new(CpuBackend::new())).unwrap()
}

/// Weights as the reference has them, value for value; after a rounding to bf16 where it computed in that.
fn same_weights(name: &str, ckpt: &Checkpoint, golden: &SafeTensors<'_>, bf16: bool) {
    for (key, module, out, n) in [
        ("layer0.q_proj", "model.layers.0.self_attn.q_proj", 256, 256),
        ("layer2.down_proj", "model.layers.2.mlp.down_proj", 256, 768),
    ] {
        let mut ours = match ckpt.linear(module, out, n).unwrap() {
            HostWeight::Packed(p) => linear::unpack(&p).unwrap().dequantize().unwrap(),
            HostWeight::Float(f) => f.dequantize().unwrap(),
            HostWeight::Dense { .. } => panic!("{name}: {key} is dense"),
        };
        if bf16 {
            ours.iter_mut().for_each(|w| *w = half::bf16::from_f32(*w).to_f32());
        }
        let theirs = floats(golden, key);
        let differ = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        assert_eq!((ours.len(), differ), (theirs.len(), 0), "{name}: {key}");
    }
}

/// How far the model's logits are from the reference's.
fn logits_differ(dir: &Path, golden: &SafeTensors<'_>) -> f64 {
    let logits = load(dir).logits_of(&ints(golden, "ids")).unwrap();
    distance(&logits, &floats(golden, "logits"))
}

#[test]
fn weight_only_checkpoints() {
    let Some(shared) = shared() else { return };
    let mut seen = 0;
    for e in std::fs::read_dir(shared.join("golden/checkpoints")).unwrap() {
        let dir = e.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        if !dir.is_dir() || !["w3a16-", "w4a16-", "w8a16-"].iter().any(|p| name.starts_with(p)) {
            continue;
        }
        seen += 1;
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let ckpt = Checkpoint::open(&dir).unwrap_or_else(|e| panic!("{name}: {e}"));
        same_weights(&name, &ckpt, &golden, false);
        let d = logits_differ(&dir, &golden);
        assert!(d < 1e-3, "{name}: logits differ by {d}");
    }
    assert_eq!(seen, 5);
}

/// Float codes, int8 matrices and quantized inputs. The fp4 folders were computed in bf16: their weights are compared after that rounding,
/// their logits within it. Where inputs are rounded, last bits decide on which side of a tie a value falls: a change of 1e-6 in the
/// embedding moves transformers' own logits by 0.7 to 1.2e-2.
#[test]
fn float_and_activation_quantized_checkpoints() {
    let Some(shared) = shared() else { return };
    for (name, scheme, bf16, most) in [
        ("w8a8", "w8a8-channel", false, 2e-2),
        ("fp8-dynamic", "fp8-dynamic", false, 2e-2),
        ("fp8-static", "fp8-static", false, 2e-2),
        ("fp8-block", "fp8-block", false, 2e-2),
        ("nvfp4a16", "nvfp4a16", true, 3e-2),
        ("mxfp4a16", "mxfp4a16", true, 3e-2),
    ] {
        let dir = shared.join("golden/checkpoints").join(name);
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let ckpt = Checkpoint::open(&dir).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(ckpt.quantization.as_ref().unwrap().groups[0].scheme.full_name(), scheme);
        same_weights(name, &ckpt, &golden, bf16);
        let d = logits_differ(&dir, &golden);
        eprintln!("{name}: logits differ by {d:.2e}");
        assert!(d < most, "{name}: logits differ by {d}");
    }
}

/// Checkpoints of ours with the logits that transformers gave for them, made by `checkpoint/judges/narrow_formats.py`.
#[test]
fn judged_by_transformers() {
    let Some(folder) = std::env::var_os("LOWBIT_JUDGED") else {
        eprintln!("skipped: LOWBIT_JUDGED names no folder");
        return;
    };
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.retain(|d| d.join("golden.safetensors").is_file());
    dirs.sort();
    assert!(!dirs.is_empty());
    for dir in dirs {
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let dtype = header.metadata().as_ref().and_then(|m| m.get("dtype")).cloned().unwrap_or_default();
        let d = logits_differ(&dir, &golden);
        eprintln!("{}: {d:.1e} ({dtype})", dir.file_name().unwrap().to_string_lossy());
        // What transformers' own logits move by when the last bits of the embedding change, where inputs are rounded; else rounding
        // of its dtype.
        let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let most = match (dtype == "torch.bfloat16", config.contains("\"input_activations\": {")) {
            (false, false) => 1e-4,
            (false, true) => 2e-2,
            (true, false) => 3e-2,
            (true, true) => 1.5e-1,
        };
        assert!(d < most, "{}: logits differ by {d}", dir.display());
    }
}

fn logits_agree(shared: &Path, folder: &Path, file: &str) {
    let bytes = std::fs::read(shared.join("golden/logits").join(file)).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let model = load(folder);
    let vocab = model.config().vocab_size;
    let text = std::fs::read_to_string(shared.join("data/wikitext2/wiki.test.raw")).unwrap();
    let start: String = text.chars().take(20000).collect();
    let tokens = Tokenizer::load(folder).unwrap().encode(&start, true).unwrap();
    let mut at = 0;
    for w in ["w0", "w1", "w2", "w3"] {
        let ids = ints(&golden, &format!("{w}.ids"));
        assert_eq!(ids, tokens[at..at + ids.len()], "{file} {w}: token ids");
        at += ids.len();
        let logits = model.logits_of(&ids).unwrap();
        let cols = ints(&golden, &format!("{w}.cols"));
        let rows: Vec<&[f32]> = logits.chunks_exact(vocab).collect();
        let at_cols: Vec<f32> = rows.iter().flat_map(|r| cols.iter().map(|c| r[*c as usize])).collect();
        let lse: Vec<f32> = rows.iter().map(|r| lowbit_eval::stats::log_sum_exp(r).0 as f32).collect();
        for (key, ours) in [("at_cols", &at_cols[..]), ("lse", &lse[..]), ("last", rows[rows.len() - 1])] {
            let d = distance(ours, &floats(&golden, &format!("{w}.{key}")));
            assert!(d < 2e-3, "{file} {w}.{key}: differs by {d}");
        }
    }
    let want = ints(&golden, "greedy.out");
    let options = GenerateOptions { max_new_tokens: want.len(), ..GenerateOptions::default() };
    let got = generate(&model, &ints(&golden, "greedy.prompt"), &options, &mut |_| true).unwrap();
    assert_eq!(got.tokens, want, "{file}: greedy tokens");
}

#[test]
fn demo_logits() {
    let Some(shared) = shared() else { return };
    logits_agree(&shared, &demo(), "demo.safetensors");
}

#[test]
fn smollm2_logits() {
    let Some(shared) = shared() else { return };
    match std::env::var_os("LOWBIT_SMOLLM2") {
        Some(folder) => logits_agree(&shared, Path::new(&folder), "smollm2.safetensors"),
        None => eprintln!("skipped: LOWBIT_SMOLLM2 names no folder"),
    }
}
