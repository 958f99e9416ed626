//! Latent attention of DeepSeek-V2 and V3 (MLA, arXiv 2405.04434): queries, and keys with values, each come out of a narrow latent vector.

use std::path::Path;

use serde_json::Value;

use super::{RopeScaling, needed, unsupported, whole};
use crate::error::{CheckpointError, Result};

/// Most that a rank or a width of a head may be.
const MOST: usize = 1 << 16;

/// Widths of latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentConfig {
    /// Width of the queries' latent vector; `None` where queries come from the residual stream at once.
    pub q_rank: Option<usize>,
    /// Width of the latent vector of keys and values.
    pub kv_rank: usize,
    /// Part of a key and query head without position.
    pub nope: usize,
    /// Part that is rotated; of a key it is the same for all heads.
    pub rope: usize,
    /// Width of a value head.
    pub value: usize,
    /// Neighbours are rotated as pairs, not halves.
    pub interleaved: bool,
}

impl LatentConfig {
    /// Width of a query and key head.
    pub fn key(&self) -> usize {
        self.nope + self.rope
    }

    /// Keys and values are cached as heads of one width: the wider of the two, rounded up to 4 for the kernels.
    pub fn cache_width(&self) -> usize {
        self.key().max(self.value).next_multiple_of(4)
    }

    /// `1 / √key`, times YaRN's `mscale_all_dim` factor squared (as q and k would each carry it).
    pub(super) fn attention_scale(&self, scaling: &RopeScaling) -> f32 {
        let mscale = match scaling {
            RopeScaling::Yarn { factor, mscale_all_dim: Some(m), .. } if *m != 0.0 && *factor > 1.0 => {
                0.1 * m * factor.ln() + 1.0
            }
            _ => 1.0,
        };
        ((self.key() as f64).powf(-0.5) * mscale * mscale) as f32
    }
}

/// Of `deepseek_v2` and `deepseek_v3`; `None` for every other family.
pub(super) fn parse(path: &Path, c: &Value, family: &str) -> Result<Option<LatentConfig>> {
    if !matches!(family, "deepseek_v2" | "deepseek_v3") {
        return Ok(None);
    }
    let q_rank = match whole(path, c, "q_lora_rank")? {
        None => None,
        Some(_) => Some(needed(path, c, "q_lora_rank", MOST)?),
    };
    let rope = needed(path, c, "qk_rope_head_dim", MOST)?;
    if !rope.is_multiple_of(2) {
        return Err(CheckpointError::invalid(path, format!("`qk_rope_head_dim` {rope} is odd")));
    }
    let interleaved = match c.get("rope_interleave") {
        None | Some(Value::Null) => true,
        Some(Value::Bool(b)) => *b,
        Some(v) => return Err(unsupported(path, format!("`rope_interleave` = {v} is not supported"))),
    };
    if family == "deepseek_v2" && !interleaved {
        return Err(unsupported(path, "`rope_interleave` = false of `deepseek_v2` is not supported".into()));
    }
    Ok(Some(LatentConfig {
        q_rank,
        kv_rank: needed(path, c, "kv_lora_rank", MOST)?,
        nope: needed(path, c, "qk_nope_head_dim", MOST)?,
        rope,
        value: needed(path, c, "v_head_dim", MOST)?,
        interleaved,
    }))
}
