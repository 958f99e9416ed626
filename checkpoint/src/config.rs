//! `config.json` of the Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text) and Phi-3 families, of Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2,
//! DeepSeek-V3 and gpt-oss as one description.
//!
//! An unknown architecture is an error that names it, and so is a key that changes the maths and that the graph does not use.

mod experts;
mod latent;

use std::path::Path;

pub use experts::{ExpertGroups, ExpertNames, ExpertsConfig, GateClamp, GroupScore, Scoring};
pub use latent::LatentConfig;
use lowbit_kernels::backend::Activation;
use serde_json::Value;

use crate::error::{CheckpointError, Result};

/// How positions become rotations.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the context.
    pub scaling: RopeScaling,
}

/// Context extension (Hugging Face `rope_scaling` / `rope_parameters`).
#[expect(missing_docs, reason = "the fields are Hugging Face's, by their names there")]
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1's frequency bands.
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
    /// YaRN (arXiv 2309.00071), with the attention factor applied to cos and sin.
    Yarn {
        factor: f64,
        original: f64,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        truncate: bool,
    },
}

/// Everything the decoder graph needs.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`.
    pub family: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the dense MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head; with latent attention that of the cache, in which keys and values are padded to one width.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Context length.
    pub max_position_embeddings: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Added to norm weights (Gemma: 1).
    pub norm_offset: f32,
    /// Head and embedding share one matrix.
    pub tie_word_embeddings: bool,
    /// q and k are normed per head before the rotation.
    pub qk_norm: bool,
    /// Norms after attention and MLP as well (Gemma).
    pub post_norms: bool,
    /// q/k/v and gate/up are stored as one matrix each (Phi-3).
    pub fused_projections: bool,
    /// Gate activation.
    pub activation: Activation,
    /// Rotation of full-attention layers.
    pub rope: RopeConfig,
    /// Rotation of sliding layers where it differs (Gemma 3).
    pub rope_local: Option<RopeConfig>,
    /// Share of a head that is rotated.
    pub partial_rotary_factor: f64,
    /// Window of sliding layers.
    pub sliding_window: Option<usize>,
    /// Which layers slide.
    pub layer_slides: Vec<bool>,
    /// Cap of attention scores.
    pub attention_soft_cap: Option<f32>,
    /// Cap of final logits.
    pub final_soft_cap: Option<f32>,
    /// Multiplies embeddings (Gemma: √hidden).
    pub embed_scale: f32,
    /// Multiplies q·k.
    pub attention_scale: f32,
    /// Mixture of experts, where some layers have one.
    pub experts: Option<ExpertsConfig>,
    /// Latent attention (DeepSeek), in place of q, k and v from the residual stream.
    pub latent: Option<LatentConfig>,
    /// `self_attn.sinks`: each query head has a score that takes a share of the softmax and has no value (gpt-oss).
    pub sinks: bool,
}

impl ModelConfig {
    /// The experts of a layer; `None` where its MLP is dense.
    pub fn experts_of(&self, layer: usize) -> Option<&ExpertsConfig> {
        self.experts.as_ref().filter(|e| e.sparse.get(layer) == Some(&true))
    }

    /// Whether engines find the experts of a layer in a few tensors as long as they are floats, and in no other way (gpt-oss).
    pub fn gathers_experts(&self) -> bool {
        self.family == GPT_OSS
    }
}

/// The family of gpt-oss, whose experts are stored in a way of their own.
pub(crate) const GPT_OSS: &str = "gpt_oss";

/// Families the graph computes.
const FAMILIES: &[&str] = &[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    GPT_OSS,
];

/// Keys that change the maths in some family and that this graph does not use: any value but null, false, 0 or 1.0 is refused, unless the
/// family is one that [`read_by`] names.
const REFUSED: &[&str] = &[
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "logit_scale",
    "clip_qkv",
    "use_parallel_residual",
    "parallel_attn",
    "alibi",
    "attention_chunk_size",
    "use_mla",
    "kv_lora_rank",
    "q_lora_rank",
    "mamba_d_state",
    "no_rope_layers",
    "attention_sinks",
    "attn_output_gate",
    "use_bidirectional_attention",
];

/// Whether a family computes with a key that others may not have.
fn read_by(family: &str, key: &str) -> bool {
    match family {
        "mixtral" | "qwen2_moe" | "qwen3_moe" | GPT_OSS => matches!(key, "num_local_experts" | "num_experts"),
        "deepseek_v2" | "deepseek_v3" => {
            matches!(key, "num_local_experts" | "num_experts" | "n_routed_experts" | "kv_lora_rank" | "q_lora_rank")
        }
        _ => false,
    }
}

/// A whole number of `c`; `None` where the key is absent or null.
fn whole(path: &Path, c: &Value, key: &str) -> Result<Option<usize>> {
    match c.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => match v.as_u64() {
            Some(n) if n < 1 << 32 => Ok(Some(n as usize)),
            _ => Err(CheckpointError::invalid(path, format!("`{key}`: expected a whole number, found {v}"))),
        },
    }
}

/// A whole number from 1 to `most` that must be there.
fn needed(path: &Path, c: &Value, key: &str, most: usize) -> Result<usize> {
    match whole(path, c, key)? {
        Some(0) => Err(CheckpointError::invalid(path, format!("`{key}` is 0"))),
        Some(n) if n > most => Err(CheckpointError::invalid(path, too_many(key, n, most))),
        Some(n) => Ok(n),
        None => Err(CheckpointError::invalid(path, format!("`{key}` is missing"))),
    }
}

fn too_many(key: &str, n: usize, most: usize) -> String {
    format!("`{key}` is {n}, more than the {most} that a model may have")
}

fn unsupported(path: &Path, what: String) -> CheckpointError {
    CheckpointError::Unsupported { what: format!("{}: {what}", path.display()), hint: None }
}

/// Parses `config.json`.
pub fn parse(path: &Path, root: &Value) -> Result<ModelConfig> {
    // Gemma 3 checkpoints with vision keep the decoder under `text_config`.
    let c = match root.get("text_config") {
        Some(t) if root.get("hidden_size").is_none() => t,
        _ => root,
    };
    let bad = |problem: String| CheckpointError::invalid(path, problem);
    let family =
        c.get("model_type").or_else(|| root.get("model_type")).and_then(Value::as_str).unwrap_or_default().to_string();
    if !FAMILIES.contains(&family.as_str()) {
        let arch = root.get("architectures").map(Value::to_string).unwrap_or_default();
        return Err(CheckpointError::Unsupported {
            what: format!("{}: architecture `{family}` {arch} is not supported", path.display()),
            hint: Some(format!("supported: {}", FAMILIES.join(", "))),
        });
    }
    for key in REFUSED.iter().filter(|k| !read_by(&family, k)) {
        let neutral = match c.get(*key) {
            None | Some(Value::Null) | Some(Value::Bool(false)) => true,
            Some(Value::Number(n)) => n.as_f64() == Some(0.0) || n.as_f64() == Some(1.0),
            Some(Value::Array(a)) => a.is_empty(),
            Some(_) => false,
        };
        if !neutral {
            return Err(unsupported(path, format!("`{key}` = {} changes the maths and is not supported", c[*key])));
        }
    }
    let int = |key: &str| whole(path, c, key);
    let need = |key: &str| needed(path, c, key, usize::MAX);
    let float = |key: &str| c.get(key).and_then(Value::as_f64);
    let gemma = family == "gemma3_text";
    let hidden_size = need("hidden_size")?;
    let num_heads = need("num_attention_heads")?;
    let latent = latent::parse(path, c, &family)?;
    // Every head has keys and values of its own once they are out of the latent space.
    let num_kv_heads = if latent.is_some() { num_heads } else { int("num_key_value_heads")?.unwrap_or(num_heads) };
    let head_dim = match (&latent, int("head_dim")?) {
        (Some(l), _) => l.cache_width(),
        (None, Some(d)) => d,
        (None, None) if gemma => 256,
        (None, None) if family == GPT_OSS => 64,
        (None, None) => hidden_size / num_heads,
    };
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return Err(bad(format!("{num_heads} attention heads are not a multiple of {num_kv_heads} key/value heads")));
    }
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(bad(format!("`head_dim` {head_dim} is not an even positive number")));
    }
    let num_layers = need("num_hidden_layers")?;
    // A thousand times what models have: products of two stay exact, and lists by layer stay small.
    for (key, n, most) in [
        ("num_hidden_layers", num_layers, 1 << 16),
        ("hidden_size", hidden_size, 1 << 24),
        ("num_attention_heads", num_heads, 1 << 16),
        ("head_dim", head_dim, 1 << 16),
        ("intermediate_size", need("intermediate_size")?, 1 << 24),
        ("vocab_size", need("vocab_size")?, 1 << 28),
    ] {
        if n > most {
            return Err(bad(too_many(key, n, most)));
        }
    }
    let act_name = c
        .get("hidden_activation")
        .or_else(|| c.get("hidden_act"))
        .and_then(Value::as_str)
        .unwrap_or(if gemma { "gelu_pytorch_tanh" } else { "silu" });
    let activation = match act_name {
        "silu" | "swish" => Activation::Silu,
        "gelu_pytorch_tanh" | "gelu_new" => Activation::GeluTanh,
        "gelu" => Activation::Gelu,
        other => return Err(bad(format!("activation `{other}` is not supported"))),
    };
    let default_theta = match family.as_str() {
        GPT_OSS => 150_000.0,
        "mixtral" | "gemma3_text" => 1_000_000.0,
        _ => 10_000.0,
    };
    let rope = parse_rope(path, c, default_theta)?;
    // transformers puts a YaRN of its own there.
    let scaled = ["rope_scaling", "rope_parameters"].iter().any(|k| c.get(*k).is_some_and(Value::is_object));
    if family == GPT_OSS && !scaled {
        return Err(bad("`rope_scaling` is missing".into()));
    }
    let rope_local = if gemma { Some(parse_local_rope(path, c)?) } else { None };
    let partial_rotary_factor = float("partial_rotary_factor")
        .or_else(|| c.get("rope_parameters").and_then(|r| r.get("partial_rotary_factor")).and_then(Value::as_f64))
        .unwrap_or(1.0);
    let sliding_window = match (family.as_str(), c.get("use_sliding_window").and_then(Value::as_bool)) {
        ("qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe", None | Some(false)) => None,
        ("qwen2_moe" | "qwen3_moe", Some(true)) => {
            return Err(unsupported(path, format!("`use_sliding_window` of `{family}` is not supported")));
        }
        ("deepseek_v2" | "deepseek_v3", _) => None,
        (GPT_OSS, _) if c.get("sliding_window").is_none() => Some(128),
        _ => int("sliding_window")?.filter(|w| *w > 0),
    };
    let layer_slides = layer_slides(
        path,
        c,
        &family,
        num_layers,
        sliding_window,
        int("max_window_layers")?,
        int("sliding_window_pattern")?,
    )?;
    let scalar = float("query_pre_attn_scalar").unwrap_or(if gemma { 256.0 } else { head_dim as f64 });
    let attention_scale = match &latent {
        Some(l) => l.attention_scale(&rope.scaling),
        None => (1.0 / scalar.sqrt()) as f32,
    };
    let default_eps = if matches!(family.as_str(), "mixtral" | GPT_OSS) { 1e-5 } else { 1e-6 };
    Ok(ModelConfig {
        qk_norm: matches!(family.as_str(), "qwen3" | "qwen3_moe" | "gemma3_text"),
        post_norms: gemma,
        fused_projections: family == "phi3",
        norm_offset: if gemma { 1.0 } else { 0.0 },
        // Gemma multiplies by √hidden rounded to the checkpoint's bf16.
        embed_scale: if gemma { half::bf16::from_f64((hidden_size as f64).sqrt()).to_f32() } else { 1.0 },
        attention_scale,
        experts: experts::parse(path, c, &family, num_layers)?,
        latent,
        sinks: family == GPT_OSS,
        hidden_size,
        intermediate_size: need("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size: need("vocab_size")?,
        max_position_embeddings: int("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: float("rms_norm_eps").unwrap_or(default_eps) as f32,
        tie_word_embeddings: c
            .get("tie_word_embeddings")
            .or_else(|| root.get("tie_word_embeddings"))
            .and_then(Value::as_bool)
            .unwrap_or(gemma),
        activation,
        rope,
        rope_local,
        partial_rotary_factor,
        sliding_window,
        layer_slides,
        attention_soft_cap: float("attn_logit_softcapping").map(|v| v as f32),
        final_soft_cap: float("final_logit_softcapping").map(|v| v as f32),
        family,
    })
}

fn layer_slides(
    path: &Path,
    c: &Value,
    family: &str,
    layers: usize,
    window: Option<usize>,
    max_window_layers: Option<usize>,
    pattern: Option<usize>,
) -> Result<Vec<bool>> {
    if window.is_none() {
        return Ok(vec![false; layers]);
    }
    if let Some(types) = c.get("layer_types").and_then(Value::as_array) {
        if types.len() != layers {
            return Err(CheckpointError::invalid(
                path,
                format!("`layer_types` has {} entries for {layers} layers", types.len()),
            ));
        }
        return types
            .iter()
            .map(|t| match t.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                other => Err(CheckpointError::invalid(path, format!("layer type {other:?} is not supported"))),
            })
            .collect();
    }
    Ok(match family {
        "gemma3_text" => (0..layers).map(|i| !(i + 1).is_multiple_of(pattern.unwrap_or(6))).collect(),
        GPT_OSS => (0..layers).map(|i| i.is_multiple_of(2)).collect(),
        "qwen2" | "qwen3" => (0..layers).map(|i| i >= max_window_layers.unwrap_or(28)).collect(),
        _ => vec![true; layers],
    })
}

fn parse_local_rope(path: &Path, c: &Value) -> Result<RopeConfig> {
    if let Some(p) = c.get("rope_parameters").and_then(|r| r.get("sliding_attention")) {
        let theta = p.get("rope_theta").and_then(Value::as_f64).unwrap_or(10_000.0);
        return Ok(RopeConfig { theta, scaling: parse_scaling(path, p, c)? });
    }
    Ok(RopeConfig {
        theta: c.get("rope_local_base_freq").and_then(Value::as_f64).unwrap_or(10_000.0),
        scaling: RopeScaling::Default,
    })
}

fn parse_rope(path: &Path, c: &Value, default_theta: f64) -> Result<RopeConfig> {
    let new = c.get("rope_parameters").filter(|v| v.is_object());
    let new = new.map(|r| r.get("full_attention").unwrap_or(r));
    let theta = new
        .and_then(|r| r.get("rope_theta"))
        .or_else(|| c.get("rope_theta"))
        .and_then(Value::as_f64)
        .unwrap_or(default_theta);
    let scaling = match new.or_else(|| c.get("rope_scaling").filter(|v| v.is_object())) {
        Some(r) => parse_scaling(path, r, c)?,
        None => RopeScaling::Default,
    };
    Ok(RopeConfig { theta, scaling })
}

fn parse_scaling(path: &Path, r: &Value, c: &Value) -> Result<RopeScaling> {
    let kind = r.get("rope_type").or_else(|| r.get("type")).and_then(Value::as_str).unwrap_or("default");
    let f = |key: &str| r.get(key).and_then(Value::as_f64);
    let must = |key: &str| {
        f(key)
            .filter(|v| v.is_finite() && *v > 0.0)
            .ok_or_else(|| CheckpointError::invalid(path, format!("rope `{kind}` needs a positive `{key}`")))
    };
    let original = || {
        f("original_max_position_embeddings")
            .or_else(|| c.get("original_max_position_embeddings").and_then(Value::as_f64))
    };
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: must("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: must("factor")?,
            low: must("low_freq_factor")?,
            high: must("high_freq_factor")?,
            original: must("original_max_position_embeddings")?,
        }),
        "yarn" => Ok(RopeScaling::Yarn {
            factor: must("factor")?,
            original: original().or_else(|| c.get("max_position_embeddings").and_then(Value::as_f64)).ok_or_else(
                || CheckpointError::invalid(path, "rope `yarn` needs `original_max_position_embeddings`"),
            )?,
            beta_fast: f("beta_fast").unwrap_or(32.0),
            beta_slow: f("beta_slow").unwrap_or(1.0),
            attention_factor: f("attention_factor"),
            mscale: f("mscale"),
            mscale_all_dim: f("mscale_all_dim"),
            truncate: r.get("truncate").and_then(Value::as_bool).unwrap_or(true),
        }),
        other => Err(CheckpointError::Unsupported {
            what: format!("{}: rope scaling `{other}` is not supported", path.display()),
            hint: Some("supported: default, linear, llama3, yarn".into()),
        }),
    }
}
