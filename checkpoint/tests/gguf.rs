//! GGUF import: exactness on a synthetic file, golden token ids, and hostile files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::bf16;
use lowbit_checkpoint::gguf::GgufModel;
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

const HIDDEN: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const FFN: usize = 96;

fn strings(items: &[&str]) -> Value {
    Value::Array(items.iter().map(|s| Value::String(s.to_string())).collect())
}

fn metadata(arch: &str) -> HashMap<String, Value> {
    let mut m: HashMap<String, Value> = HashMap::new();
    let sizes = [
        ("block_count", 1),
        ("context_length", 128),
        ("embedding_length", HIDDEN as u32),
        ("feed_forward_length", FFN as u32),
        ("attention.head_count", HEADS as u32),
        ("attention.head_count_kv", KV_HEADS as u32),
    ];
    for (key, value) in sizes {
        m.insert(format!("{arch}.{key}"), Value::U32(value));
    }
    m.insert("general.architecture".into(), Value::String(arch.into()));
    m.insert(format!("{arch}.attention.layer_norm_rms_epsilon"), Value::F32(1e-5));
    m.insert(format!("{arch}.rope.freq_base"), Value::F32(500_000.0));
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab", "<0x0A>", "c"];
    m.insert("tokenizer.ggml.model".into(), Value::String("llama".into()));
    m.insert("tokenizer.ggml.tokens".into(), strings(&tokens));
    let kinds = [2, 3, 3, 1, 1, 1, 1, 1, 6, 1];
    m.insert("tokenizer.ggml.token_type".into(), Value::Array(kinds.map(Value::I32).to_vec()));
    let scores = [0.0, 0.0, 0.0, -5.0, -4.0, -4.5, -1.0, -2.0, 0.0, -6.0];
    m.insert("tokenizer.ggml.scores".into(), Value::Array(scores.map(Value::F32).to_vec()));
    m.insert("tokenizer.ggml.bos_token_id".into(), Value::U32(1));
    m.insert("tokenizer.ggml.eos_token_id".into(), Value::U32(2));
    m.insert("tokenizer.ggml.unknown_token_id".into(), Value::U32(0));
    m.insert("tokenizer.chat_template".into(), Value::String("{{ messages }}".into()));
    m
}

/// Values that bf16 and Q8_0 do not hold exactly.
fn ramp(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn tensors(tied: bool) -> Vec<(String, QTensor)> {
    let kv = HIDDEN / HEADS * KV_HEADS;
    let mut shapes: Vec<(&str, Vec<usize>, GgmlDType)> = vec![
        ("token_embd.weight", vec![10, HIDDEN], GgmlDType::Q8_0),
        ("output_norm.weight", vec![HIDDEN], GgmlDType::F32),
        ("blk.0.attn_norm.weight", vec![HIDDEN], GgmlDType::F32),
        ("blk.0.ffn_norm.weight", vec![HIDDEN], GgmlDType::F32),
        ("blk.0.attn_q.weight", vec![HIDDEN, HIDDEN], GgmlDType::F32),
        ("blk.0.attn_k.weight", vec![kv, HIDDEN], GgmlDType::F16),
        ("blk.0.attn_v.weight", vec![kv, HIDDEN], GgmlDType::Q4_0),
        ("blk.0.attn_output.weight", vec![HIDDEN, HIDDEN], GgmlDType::Q5_1),
        ("blk.0.ffn_gate.weight", vec![FFN, HIDDEN], GgmlDType::Q4_1),
        ("blk.0.ffn_up.weight", vec![FFN, HIDDEN], GgmlDType::BF16),
        ("blk.0.ffn_down.weight", vec![HIDDEN, FFN], GgmlDType::Q5_0),
    ];
    if !tied {
        shapes.push(("output.weight", vec![10, HIDDEN], GgmlDType::F32));
    }
    let quantize = |shape: &[usize], kind| QTensor::quantize(&ramp(shape), kind).unwrap();
    shapes.into_iter().map(|(name, shape, kind)| (name.to_string(), quantize(&shape, kind))).collect()
}

fn write(path: &Path, metadata: &HashMap<String, Value>, tensors: &[(String, QTensor)]) {
    let mut keys: Vec<&String> = metadata.keys().collect();
    keys.sort();
    let pairs: Vec<(&str, &Value)> = keys.into_iter().map(|k| (k.as_str(), &metadata[k])).collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &pairs, &named).unwrap();
}

fn sample(dir: &Path, arch: &str, tied: bool) -> PathBuf {
    let path = dir.join("model.gguf");
    write(&path, &metadata(arch), &tensors(tied));
    path
}

fn read(model: &mut GgufModel, name: &str) -> Vec<f32> {
    let bytes = model.read_bf16(name).unwrap();
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

fn json_file(files: &[(String, Vec<u8>)], name: &str) -> Json {
    let bytes = &files.iter().find(|(n, _)| n == name).unwrap().1;
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn tensors_are_decoded_and_unpermuted() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = GgufModel::open(&sample(dir.path(), "llama", true)).unwrap();
    assert_eq!((model.architecture(), model.bits()), ("llama", Some(4)));
    let names = model.tensor_names();
    assert_eq!(names.len(), 11);
    assert_eq!(names[0], ("model.embed_tokens.weight".to_string(), vec![10, HIDDEN]));
    for (gguf, hf) in [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ] {
        let packed = tensors(true).into_iter().find(|(n, _)| n == gguf).unwrap().1;
        let values = packed.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(read(&mut model, hf), rounded(&values), "{hf}");
    }
    // As transformers: reshape [heads, half, 2, in], swap axes 1 and 2, reshape back.
    for (name, heads) in [("q", HEADS), ("k", KV_HEADS)] {
        let rows = HIDDEN / HEADS * heads;
        let mut source = ramp(&[rows, HIDDEN]);
        if name == "k" {
            let half = source.to_dtype(candle_core::DType::F16).unwrap();
            source = half.to_dtype(candle_core::DType::F32).unwrap();
        }
        let split = source.reshape((heads, rows / heads / 2, 2, HIDDEN)).unwrap();
        let wanted = split.transpose(1, 2).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let found = read(&mut model, &format!("model.layers.0.self_attn.{name}_proj.weight"));
        assert_eq!(found, rounded(&wanted), "{name}");
    }
    assert!(model.read_bf16("lm_head.weight").is_err());
}

#[test]
fn config_follows_the_metadata() {
    let dir = tempfile::tempdir().unwrap();
    let config = GgufModel::open(&sample(dir.path(), "llama", true)).unwrap().config_json().unwrap();
    assert_eq!(config["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!(config["tie_word_embeddings"], json!(true));
    assert_eq!(config["rms_norm_eps"], json!(1e-5));
    assert_eq!(config["rope_parameters"], json!({"rope_theta": 500_000.0, "rope_type": "default"}));
    assert_eq!((&config["head_dim"], &config["vocab_size"]), (&json!(16), &json!(10)));
    assert_eq!((&config["bos_token_id"], &config["pad_token_id"]), (&json!(1), &Json::Null));
    let untied = GgufModel::open(&sample(dir.path(), "llama", false)).unwrap();
    assert_eq!(untied.config_json().unwrap()["tie_word_embeddings"], json!(false));
    assert_eq!(untied.tensor_names().last().unwrap().0, "lm_head.weight");
}

#[test]
fn sentence_piece_tokenizer_is_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let files = GgufModel::open(&sample(dir.path(), "llama", true)).unwrap().tokenizer_files().unwrap();
    let names: Vec<&str> = files.iter().map(|(n, _)| n.as_str()).collect();
    let wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
    assert_eq!(names, wanted);
    assert_eq!(files[2].1, b"{{ messages }}");
    let config = json_file(&files, "tokenizer_config.json");
    assert_eq!((&config["eos_token"], &config["model_max_length"]), (&json!("</s>"), &json!(128)));
    assert_eq!(json_file(&files, "generation_config.json")["eos_token_id"], json!(2));
    let tokenizer = Tokenizer::from_bytes(&files[0].1).unwrap();
    let ids = tokenizer.encode("ab\nab c</s>", true).unwrap().get_ids().to_vec();
    assert_eq!(ids, [1, 7, 8, 6, 3, 9, 2]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab\nab c");
}

#[test]
fn other_architectures_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = GgufModel::open(&sample(dir.path(), "rwkv7", true)).unwrap_err();
    assert!(error.to_string().contains("rwkv7"), "{error}");
    // A family that needs tensors the file lacks, and a tensor that nobody knows.
    let error = GgufModel::open(&sample(dir.path(), "qwen3", true)).unwrap_err();
    assert!(error.to_string().contains("blk.0.attn_q_norm.weight"), "{error}");
    let path = dir.path().join("extra.gguf");
    let mut extra = tensors(true);
    extra.push(("blk.0.mystery".to_string(), QTensor::quantize(&ramp(&[32]), GgmlDType::F32).unwrap()));
    write(&path, &metadata("llama"), &extra);
    assert!(GgufModel::open(&path).unwrap_err().to_string().contains("blk.0.mystery"));
}

#[test]
fn damaged_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(sample(dir.path(), "llama", true)).unwrap();
    let path = dir.path().join("bad.gguf");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        GgufModel::open(&path)
    };
    assert!(open(&whole).is_ok());
    for length in (0..whole.len() - 64).step_by(61) {
        assert!(open(&whole[..length]).is_err(), "cut to {length}");
    }
    // Every third position of the header in turn overwritten: an error or a valid file.
    let header = 2600.min(whole.len() - 8);
    for fill in [0xff, 0x7f, 0x00, 0x10] {
        for at in (0..header).step_by(3) {
            let mut bytes = whole.clone();
            bytes[at..at + 8].fill(fill);
            if let Ok(mut model) = open(&bytes) {
                let _ = model.config_json();
                let _ = model.tokenizer_files();
                let first = model.tensor_names().swap_remove(4).0;
                let _ = model.read_bf16(&first);
            }
        }
    }
}

#[test]
fn smollm2_tokenizer_reproduces_the_golden_ids() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let peers = PathBuf::from(std::env::var_os("LOWBIT_PEERS").unwrap_or_default());
    let (golden, text) = (root.join("golden/logits/smollm2.safetensors"), root.join("data/wikitext2/wiki.test.raw"));
    let gguf = peers.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if ![&golden, &text, &gguf].iter().all(|p| p.exists()) {
        return;
    }
    let model = GgufModel::open(&gguf).unwrap();
    let config = model.config_json().unwrap();
    assert_eq!(config["num_hidden_layers"], json!(30));
    assert_eq!(config["rope_theta"], json!(100_000.0));
    let files = model.tokenizer_files().unwrap();
    let tokenizer = Tokenizer::from_bytes(&files[0].1).unwrap();
    let text: String = std::fs::read_to_string(text).unwrap().chars().take(20_000).collect();
    let found = tokenizer.encode(text.as_str(), true).unwrap().get_ids().to_vec();
    let golden = candle_core::safetensors::load(golden, &Device::Cpu).unwrap();
    let mut at = 0;
    for window in 0..4 {
        let wanted = golden[&format!("w{window}.ids")].to_vec1::<i64>().unwrap();
        let ids: Vec<i64> = found[at..at + wanted.len()].iter().map(|&id| i64::from(id)).collect();
        assert_eq!(ids, wanted, "window {window}");
        at += wanted.len();
    }
    assert_eq!(tokenizer.decode(&found, false).unwrap(), text);
}
