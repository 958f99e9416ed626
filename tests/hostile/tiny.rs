//! A model so small that loading it and a step cost microseconds, with the tensors of every family under one roof.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use super::seeds;

const HIDDEN: usize = 64;
const FFN: usize = 64;
const HEAD: usize = 64;
const VOCAB: usize = 264;
const BOS: usize = 256;

/// `config.json` of a Llama of one block, two query heads and one of keys and values.
pub fn config() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": HEAD, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "bos_token_id": BOS, "eos_token_id": BOS + 1})
}

/// Names and shapes of what a Llama has, and of what the other families have beside it.
fn tensors(all_families: bool) -> Vec<(String, Vec<usize>)> {
    let (h, f, d, v) = (HIDDEN, FFN, HEAD, VOCAB);
    let mut out: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![v, h]),
        ("lm_head.weight".into(), vec![v, h]),
        ("model.norm.weight".into(), vec![h]),
    ];
    let mut block = |name: &str, shape: &[usize]| out.push((format!("model.layers.0.{name}"), shape.to_vec()));
    for (name, rows, columns) in [
        ("self_attn.q_proj", 2 * d, h),
        ("self_attn.k_proj", d, h),
        ("self_attn.v_proj", d, h),
        ("self_attn.o_proj", h, 2 * d),
        ("mlp.gate_proj", f, h),
        ("mlp.up_proj", f, h),
        ("mlp.down_proj", h, f),
    ] {
        block(&format!("{name}.weight"), &[rows, columns]);
    }
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        block(&format!("{norm}.weight"), &[h]);
    }
    if all_families {
        for (bias, n) in [("q", 2 * d), ("k", d), ("v", d)] {
            block(&format!("self_attn.{bias}_proj.bias"), &[n]);
        }
        block("self_attn.qkv_proj.weight", &[4 * d, h]);
        block("mlp.gate_up_proj.weight", &[2 * f, h]);
        for norm in ["pre_feedforward_layernorm", "post_feedforward_layernorm"] {
            block(&format!("{norm}.weight"), &[h]);
        }
        for norm in ["self_attn.q_norm", "self_attn.k_norm"] {
            block(&format!("{norm}.weight"), &[d]);
        }
    }
    out
}

/// The weights, in bf16, small and of both signs.
fn weights(all_families: bool) -> Vec<u8> {
    let list = tensors(all_families);
    let named: Vec<(&str, &str, &[usize])> = list.iter().map(|(n, s)| (n.as_str(), "BF16", s.as_slice())).collect();
    let mut file = seeds::safetensors_of(&named);
    let data: usize = list.iter().map(|(_, s)| s.iter().product::<usize>() * 2).sum();
    let (start, mut random) = (file.len() - data, super::mutate::Random::new(1));
    for pair in file[start..].chunks_exact_mut(2) {
        let sign = if random.below(2) == 0 { 0x80 } else { 0 };
        // An exponent of 2^-4 to 2^-3.
        pair.copy_from_slice(&[random.next() as u8, 0x3d | sign]);
    }
    file
}

/// Byte-level BPE over all 256 bytes and a merge, as Hugging Face writes it.
fn tokenizer() -> Value {
    // GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut vocab = Map::new();
    let mut next = 256;
    for b in 0..256u32 {
        let c = if printable(b) { b } else { next };
        next += u32::from(!printable(b));
        vocab.insert(char::from_u32(c).unwrap().to_string(), b.into());
    }
    let special = |id: usize, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    vocab.insert("ab".into(), (BOS + 2).into());
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(BOS, "<s>"), special(BOS + 1, "</s>")], "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"]]}})
}

/// Writes the checkpoint into a folder.
pub fn write(dir: &Path, all_families: bool) {
    std::fs::create_dir_all(dir).unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    put("config.json", config().to_string().as_bytes());
    put("tokenizer.json", tokenizer().to_string().as_bytes());
    put("tokenizer_config.json", br#"{"bos_token": "<s>", "eos_token": "</s>"}"#);
    put("chat_template.jinja", b"{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}");
    put("model.safetensors", &weights(all_families));
}

/// Names and contents of files.
type Files = Vec<(String, Vec<u8>)>;

/// The files of the checkpoint at 4 bits as compressed-tensors, made by the program once a process.
pub fn packed() -> &'static [(String, Vec<u8>)] {
    static MADE: OnceLock<Files> = OnceLock::new();
    MADE.get_or_init(|| quantized("compressed-tensors"))
}

/// The same as GPTQ v1.
pub fn packed_gptq() -> &'static [(String, Vec<u8>)] {
    static MADE: OnceLock<Files> = OnceLock::new();
    MADE.get_or_init(|| quantized("gptq"))
}

fn quantized(format: &str) -> Files {
    let tmp = tempfile::tempdir().unwrap();
    let (from, to) = (tmp.path().join("in"), tmp.path().join("out"));
    write(&from, false);
    let mut c = Command::new(option_env!("CARGO_BIN_EXE_lowbit").unwrap_or("lowbit"));
    c.args(["--quiet", "--device", "cpu", "quantize", "--method", "rtn", "--group-size", "32", "--format", format]);
    let done = c.arg(&from).arg("-o").arg(&to).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let files = std::fs::read_dir(&to).unwrap().map(|e| e.unwrap());
    files.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}
