//! Metadata of a model for llama.cpp, from `config.json`: the other direction of [`super::config`].

use std::path::Path;

use lowbit_kernels::backend::Activation;
use lowbit_kernels::ggml::GgmlType;

use super::Family;
use crate::config::{ModelConfig, RopeScaling};
use crate::error::{CheckpointError, Result};

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
}

/// The architecture a model is written as. What its graph in llama.cpp would not compute is refused by name.
pub(super) fn family(c: &ModelConfig, file: &Path) -> Result<Family> {
    let refuse = |what: String| {
        Err(CheckpointError::Unsupported {
            what: format!("{}: {what} cannot be written as GGUF", file.display()),
            hint: Some("use --format compressed-tensors".into()),
        })
    };
    let family = match c.family.as_str() {
        // llama.cpp has no graph of its own for Mistral.
        "llama" | "mistral" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        "gemma3_text" => Family::Gemma3,
        "phi3" => Family::Phi3,
        other => return refuse(format!("architecture `{other}`")),
    };
    let gemma = family == Family::Gemma3;
    if c.activation != if gemma { Activation::GeluTanh } else { Activation::Silu } {
        return refuse(format!("activation {:?} in `{}`", c.activation, c.family));
    }
    if c.partial_rotary_factor != 1.0 {
        return refuse(format!("a rotation of {} of each head", c.partial_rotary_factor));
    }
    if c.attention_soft_cap.is_some() || c.final_soft_cap.is_some() {
        return refuse("a soft cap".into());
    }
    let slides = c.layer_slides.iter().any(|s| *s);
    if gemma {
        if !c.layer_slides.iter().enumerate().all(|(i, s)| *s != (i + 1).is_multiple_of(6)) {
            return refuse("a pattern of sliding layers other than five of six".into());
        }
        let local = c.rope_local.as_ref();
        if local.is_some_and(|l| l.theta != 10_000.0 || l.scaling != RopeScaling::Default) {
            return refuse("a rotation of sliding layers with a base other than 10000".into());
        }
        let scalar = if c.num_layers == 62 { c.hidden_size / c.num_heads } else { c.head_dim };
        if c.attention_scale != (1.0 / (scalar as f64).sqrt()) as f32 {
            return refuse(format!("an attention scale of {}", c.attention_scale));
        }
    } else if slides && family != Family::Phi3 && c.sliding_window.is_some_and(|w| w < c.max_position_embeddings) {
        // Phi-3 carries its window; llama.cpp reads and does not use it.
        return refuse(format!("a sliding window in `{}`", c.family));
    }
    match c.rope.scaling {
        RopeScaling::Llama3 { low, high, original, .. } if (low, high, original) != (1.0, 4.0, 8192.0) => {
            refuse("a llama3 rotation with bands other than 1, 4 and 8192".into())
        }
        RopeScaling::Llama3 { .. } if family != Family::Llama => refuse(format!("llama3 rotation in `{}`", c.family)),
        RopeScaling::Yarn { beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate, .. }
            if (beta_fast, beta_slow, truncate) != (32.0, 1.0, true)
                || attention_factor.or(mscale).or(mscale_all_dim).is_some() =>
        {
            refuse("a YaRN rotation with its own constants".into())
        }
        _ => Ok(family),
    }
}

/// Divisors of the rotary frequencies, which llama.cpp reads as a tensor.
pub(super) fn rope_factors(c: &ModelConfig) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low, high, original } = c.rope.scaling else { return None };
    Some(
        super::config::llama3_divisors(c.head_dim, c.rope.theta, factor, low, high, original)
            .map(|d| d as f32)
            .collect(),
    )
}

/// ggml's number of "mostly" this type.
fn file_type(most: GgmlType) -> u32 {
    match most {
        GgmlType::F32 => 0,
        GgmlType::F16 => 1,
        GgmlType::Q4_0 => 2,
        GgmlType::Q8_0 => 7,
        GgmlType::Q5_0 => 8,
        GgmlType::Q4K => 14,
        GgmlType::Q6K => 18,
        GgmlType::Bf16 => 32,
    }
}

/// Everything but the tokenizer.
pub(super) fn model(c: &ModelConfig, dir: &Path, family: Family, most: GgmlType) -> Result<Vec<(String, Meta)>> {
    let arch = family.gguf_name();
    let name = dir.file_name().map_or_else(|| arch.to_string(), |n| n.to_string_lossy().into_owned());
    let mut meta = vec![
        ("general.architecture".to_string(), Meta::String(arch.into())),
        ("general.name".to_string(), Meta::String(name)),
        ("general.type".to_string(), Meta::String("model".into())),
        ("general.file_type".to_string(), Meta::U32(file_type(most))),
        ("general.quantization_version".to_string(), Meta::U32(2)),
    ];
    let mut put = |key: &str, value: Meta| meta.push((format!("{arch}.{key}"), value));
    for (key, n) in [
        ("block_count", c.num_layers),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_heads),
        ("attention.head_count_kv", c.num_kv_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
        ("vocab_size", c.vocab_size),
    ] {
        let n = u32::try_from(n).map_err(|_| CheckpointError::invalid(dir, format!("`{key}` is {n}")))?;
        put(key, Meta::U32(n));
    }
    put("attention.layer_norm_rms_epsilon", Meta::F32(c.rms_norm_eps));
    put("rope.freq_base", Meta::F32(c.rope.theta as f32));
    if matches!(family, Family::Gemma3 | Family::Phi3)
        && let Some(window) = c.sliding_window.and_then(|w| u32::try_from(w).ok())
    {
        put("attention.sliding_window", Meta::U32(window));
    }
    let mut scaling = |kind: &str, factor: f64, original: Option<f64>| {
        put("rope.scaling.type", Meta::String(kind.into()));
        put("rope.scaling.factor", Meta::F32(factor as f32));
        if let Some(n) = original {
            put("rope.scaling.original_context_length", Meta::U32(n as u32));
        }
    };
    match c.rope.scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => scaling("linear", factor, None),
        RopeScaling::Yarn { factor, original, .. } => scaling("yarn", factor, Some(original)),
    }
    Ok(meta)
}
