//! `config.json` of the Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text) and Phi-3 families as one description.
//!
//! An unknown architecture is an error that names it, and so is a key that changes the maths and that the graph does not use.

use std::path::Path;

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
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
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
}

/// Keys that change the maths in some family and that this graph does not use: any value but null, false, 0 or 1.0 is refused.
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
    if !matches!(family.as_str(), "llama" | "mistral" | "qwen2" | "qwen3" | "gemma3_text" | "phi3") {
        let arch = root.get("architectures").map(Value::to_string).unwrap_or_default();
        return Err(CheckpointError::Unsupported {
            what: format!("{}: architecture `{family}` {arch} is not supported", path.display()),
            hint: Some("supported: llama, mistral, qwen2, qwen3, gemma3_text, phi3".into()),
        });
    }
    for key in REFUSED {
        let neutral = match c.get(*key) {
            None | Some(Value::Null) | Some(Value::Bool(false)) => true,
            Some(Value::Number(n)) => n.as_f64() == Some(0.0) || n.as_f64() == Some(1.0),
            Some(Value::Array(a)) => a.is_empty(),
            Some(_) => false,
        };
        if !neutral {
            return Err(CheckpointError::Unsupported {
                what: format!("{}: `{key}` = {} changes the maths and is not supported", path.display(), c[*key]),
                hint: None,
            });
        }
    }
    let int = |key: &str| -> Result<Option<usize>> {
        match c.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if n < 1 << 32 => Ok(Some(n as usize)),
                _ => Err(bad(format!("`{key}`: expected a whole number, found {v}"))),
            },
        }
    };
    let need = |key: &str| -> Result<usize> {
        match int(key)? {
            Some(n) if n > 0 => Ok(n),
            Some(_) => Err(bad(format!("`{key}` is 0"))),
            None => Err(bad(format!("`{key}` is missing"))),
        }
    };
    let float = |key: &str| c.get(key).and_then(Value::as_f64);
    let gemma = family == "gemma3_text";
    let hidden_size = need("hidden_size")?;
    let num_heads = need("num_attention_heads")?;
    let num_kv_heads = int("num_key_value_heads")?.unwrap_or(num_heads);
    let head_dim = match int("head_dim")? {
        Some(d) => d,
        None if gemma => 256,
        None => hidden_size / num_heads,
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
            return Err(bad(format!("`{key}` is {n}, more than the {most} that a model may have")));
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
    let rope = parse_rope(path, c, "rope_theta", gemma)?;
    let rope_local = if gemma { Some(parse_local_rope(path, c)?) } else { None };
    let partial_rotary_factor = float("partial_rotary_factor")
        .or_else(|| c.get("rope_parameters").and_then(|r| r.get("partial_rotary_factor")).and_then(Value::as_f64))
        .unwrap_or(1.0);
    let sliding_window = match (family.as_str(), c.get("use_sliding_window").and_then(Value::as_bool)) {
        ("qwen2" | "qwen3", None | Some(false)) => None,
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
    Ok(ModelConfig {
        qk_norm: matches!(family.as_str(), "qwen3" | "gemma3_text"),
        post_norms: gemma,
        fused_projections: family == "phi3",
        norm_offset: if gemma { 1.0 } else { 0.0 },
        // Gemma multiplies by √hidden rounded to the checkpoint's bf16.
        embed_scale: if gemma { half::bf16::from_f64((hidden_size as f64).sqrt()).to_f32() } else { 1.0 },
        attention_scale: (1.0 / scalar.sqrt()) as f32,
        hidden_size,
        intermediate_size: need("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size: need("vocab_size")?,
        max_position_embeddings: int("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: float("rms_norm_eps").unwrap_or(1e-6) as f32,
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

fn parse_rope(path: &Path, c: &Value, theta_key: &str, gemma: bool) -> Result<RopeConfig> {
    let default_theta = if gemma { 1_000_000.0 } else { 10_000.0 };
    let new = c.get("rope_parameters").filter(|v| v.is_object());
    let new = new.map(|r| r.get("full_attention").unwrap_or(r));
    let theta = new
        .and_then(|r| r.get("rope_theta"))
        .or_else(|| c.get(theta_key))
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
