//! `config.json` and `generation_config.json` from GGUF metadata.

use candle_core::quantized::gguf_file::Content;
use serde_json::{Map, Value, json};

use super::{Family, Metadata, invalid};
use crate::error::{CheckpointError, Result};

/// The sizes of a model.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) layers: usize,
    pub(super) vocab: usize,
    pub(super) context: usize,
    /// Whether a Llama's attention projections have biases.
    pub(super) bias: bool,
}

impl Shape {
    pub(super) fn read(meta: &Metadata, family: Family, content: &Content) -> Result<Self> {
        let key = |name: &str| format!("{}.{name}", family.gguf_name());
        // Bounded so that no product of two sizes overflows.
        let size = |name: &str, value: u64| match usize::try_from(value) {
            Ok(n) if n > 0 && n < 1 << 28 => Ok(n),
            _ => Err(invalid(&meta.file, format!("metadata '{}' is {value}", key(name)))),
        };
        let field = |name: &str| size(name, meta.uint(&key(name))?);
        let optional = |name: &str| meta.opt_uint(&key(name))?.map(|v| size(name, v)).transpose();

        if meta.opt_uint(&key("expert_count"))?.unwrap_or(0) > 0 {
            return unsupported("mixture-of-experts GGUF");
        }
        let hidden = field("embedding_length")?;
        let heads = field("attention.head_count")?;
        let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
        let rotary = optional("rope.dimension_count")?;
        let head_dim = optional("attention.key_length")?.or(rotary).unwrap_or(hidden / heads);
        if !heads.is_multiple_of(kv_heads) || head_dim == 0 || !head_dim.is_multiple_of(2) {
            let problem = format!("{heads} heads of {head_dim} with {kv_heads} key-value heads");
            return Err(invalid(&meta.file, problem));
        }
        if rotary.is_some_and(|r| r != head_dim) {
            return unsupported("a GGUF with partial rotary embedding");
        }
        if optional("attention.value_length")?.is_some_and(|v| v != head_dim) {
            return unsupported("a GGUF whose value heads differ in size from its key heads");
        }
        let embedding = content.tensor_infos.get("token_embd.weight");
        let vocab = embedding.and_then(|t| t.shape.dims().first().copied());
        let vocab = vocab.ok_or_else(|| invalid(&meta.file, "tensor 'token_embd.weight' is missing"))?;
        Ok(Self {
            hidden,
            ffn: field("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            layers: field("block_count")?,
            vocab,
            context: field("context_length")?,
            bias: family == Family::Llama && content.tensor_infos.contains_key("blk.0.attn_q.bias"),
        })
    }
}

fn unsupported<T>(what: impl Into<String>) -> Result<T> {
    Err(CheckpointError::Unsupported { what: what.into(), hint: None })
}

/// Id of a special token, checked against the vocabulary.
pub(super) fn token_id(meta: &Metadata, name: &str) -> Result<Option<u64>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    // Some converters write -1 or 2^32-1 for "none".
    let count = meta.opt_strings("tokenizer.ggml.tokens")?.map_or(0, |t| t.len() as u64);
    Ok(meta.opt_uint(&key).ok().flatten().filter(|&id| id < count))
}

/// The contents of `config.json`.
pub(super) fn config_json(
    meta: &Metadata,
    family: Family,
    shape: &Shape,
    tied: bool,
    factors: Option<&[f32]>,
) -> Result<Value> {
    let key = |name: &str| format!("{}.{name}", family.gguf_name());
    let float = |name: &str| meta.opt_float(&key(name));
    let (class, model_type) = match family {
        Family::Llama => ("LlamaForCausalLM", "llama"),
        Family::Mistral => ("MistralForCausalLM", "mistral"),
        Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        Family::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
        Family::Phi3 => ("Phi3ForCausalLM", "phi3"),
    };
    let eps = float("attention.layer_norm_rms_epsilon")?;
    let eps = eps.ok_or_else(|| invalid(&meta.file, format!("no '{}'", key("attention.layer_norm_rms_epsilon"))))?;
    let default_theta = if family == Family::Gemma3 { 1e6 } else { 1e4 };
    let theta = float("rope.freq_base")?.unwrap_or(default_theta);
    let rope = rope_parameters(meta, family, shape, theta, factors)?;

    let mut c = Map::new();
    let mut put = |name: &str, value: Value| c.insert(name.to_string(), value);
    put("architectures", json!([class]));
    put("attention_bias", json!(shape.bias));
    put("attention_dropout", json!(0.0));
    put("bos_token_id", json!(token_id(meta, "bos")?));
    put("dtype", json!("bfloat16"));
    put("eos_token_id", json!(token_id(meta, "eos")?));
    put("head_dim", json!(shape.head_dim));
    put("hidden_act", json!("silu"));
    put("hidden_size", json!(shape.hidden));
    put("initializer_range", json!(0.02));
    put("intermediate_size", json!(shape.ffn));
    put("max_position_embeddings", json!(shape.context));
    put("model_type", json!(model_type));
    put("num_attention_heads", json!(shape.heads));
    put("num_hidden_layers", json!(shape.layers));
    put("num_key_value_heads", json!(shape.kv_heads));
    put("pad_token_id", json!(token_id(meta, "padding")?));
    put("rms_norm_eps", json!(eps));
    match family {
        Family::Gemma3 => {
            let window = meta.opt_uint(&key("attention.sliding_window"))?.unwrap_or(4096);
            let scalar = if shape.layers == 62 { shape.hidden / shape.heads } else { shape.head_dim };
            let layers = (1..=shape.layers).map(|n| match n % 6 {
                0 => "full_attention",
                _ => "sliding_attention",
            });
            put("layer_types", json!(layers.collect::<Vec<_>>()));
            put("sliding_window", json!(window));
            put("sliding_window_pattern", json!(6));
            put("query_pre_attn_scalar", json!(scalar));
            put("hidden_activation", json!("gelu_pytorch_tanh"));
            put("hidden_act", json!("gelu_pytorch_tanh"));
            put("attn_logit_softcapping", Value::Null);
            put("final_logit_softcapping", Value::Null);
            put("rope_local_base_freq", json!(10000.0));
            let local = json!({"rope_theta": 10000.0, "rope_type": "default"});
            put("rope_parameters", json!({"full_attention": rope, "sliding_attention": local}));
        }
        _ => {
            put("rope_parameters", rope.clone());
            if rope.get("rope_type").and_then(Value::as_str) != Some("default") {
                put("rope_scaling", rope);
            }
        }
    }
    put("rope_theta", json!(theta));
    if matches!(family, Family::Llama) {
        put("mlp_bias", json!(false));
        put("pretraining_tp", json!(1));
    }
    if matches!(family, Family::Mistral | Family::Phi3) {
        let window = meta.opt_uint(&key("attention.sliding_window"))?;
        put("sliding_window", json!(window.filter(|&w| w > 0)));
    }
    if family == Family::Qwen2 {
        put("use_sliding_window", json!(false));
    }
    put("tie_word_embeddings", json!(tied));
    put("use_cache", json!(true));
    put("vocab_size", json!(shape.vocab));
    Ok(Value::Object(c))
}

fn rope_parameters(
    meta: &Metadata,
    family: Family,
    shape: &Shape,
    theta: f64,
    factors: Option<&[f32]>,
) -> Result<Value> {
    let key = |name: &str| format!("{}.rope.scaling.{name}", family.gguf_name());
    let factor = meta.opt_float(&key("factor"))?;
    let original = meta.opt_uint(&key("original_context_length"))?;
    if let Some(found) = factors {
        return llama3_rope(found, shape, theta);
    }
    match (meta.opt_str(&key("type"))?, factor) {
        (Some("linear"), Some(f)) => Ok(json!({"rope_theta": theta, "rope_type": "linear", "factor": f})),
        (Some("yarn"), Some(f)) => Ok(json!({
            "rope_theta": theta,
            "rope_type": "yarn",
            "factor": f,
            "original_max_position_embeddings": original.unwrap_or(shape.context as u64),
        })),
        (None | Some("none"), None) | (Some("none"), _) => Ok(json!({"rope_theta": theta, "rope_type": "default"})),
        (kind, _) => unsupported(format!("rotary scaling '{}' in a GGUF", kind.unwrap_or("without a type"))),
    }
}

/// What Llama 3.1's scaling divides each rotary frequency by.
pub(super) fn llama3_divisors(
    head_dim: usize,
    theta: f64,
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
) -> impl Iterator<Item = f64> {
    (0..head_dim / 2).map(move |i| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    })
}

/// Finds the `llama3` scaling whose divisors are those in the file.
fn llama3_rope(found: &[f32], shape: &Shape, theta: f64) -> Result<Value> {
    let (low, high, original) = (1.0f64, 4.0f64, 8192.0f64);
    let factor = f64::from(found.iter().copied().fold(1.0f32, f32::max)).round();
    let expected = llama3_divisors(shape.head_dim, theta, factor, low, high, original);
    let same =
        found.len() == shape.head_dim / 2 && expected.zip(found).all(|(e, &f)| ((e - f64::from(f)) / e).abs() < 1e-3);
    if !same {
        return unsupported("the rotary frequency factors of this GGUF");
    }
    Ok(json!({
        "rope_theta": theta,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }))
}

/// The contents of `generation_config.json`.
pub(super) fn generation_json(meta: &Metadata) -> Result<Value> {
    let mut ends: Vec<u64> = Vec::new();
    for name in ["eos", "eot"] {
        if let Some(id) = token_id(meta, name)?.filter(|id| !ends.contains(id)) {
            ends.push(id);
        }
    }
    let mut map = Map::new();
    let mut put = |name: &str, value: Option<Value>| value.and_then(|v| map.insert(name.to_string(), v));
    put("_from_model_config", Some(json!(true)));
    put("bos_token_id", token_id(meta, "bos")?.map(|id| json!(id)));
    put(
        "eos_token_id",
        match ends.as_slice() {
            [] => None,
            [one] => Some(json!(one)),
            many => Some(json!(many)),
        },
    );
    put("pad_token_id", token_id(meta, "padding")?.map(|id| json!(id)));
    Ok(Value::Object(map))
}
