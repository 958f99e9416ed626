//! Latent attention: the latent vectors, and heads laid out as the ordinary attention takes them.
//!
//! Keys and values are brought out of their latent vector for every token and cached head by head, both padded to one width with
//! zeros, which change neither scores nor sums. That is the same attention as everywhere else, at a cost: the cache holds
//! `2 · heads · width` numbers a token where the latent vector has `kv_rank + rope` (DeepSeek-V3: 49,152 against 576).
//!
//! A head is laid out as rotated part, part without position, zeros. Where neighbours are rotated as pairs, the rotated part takes
//! its even elements first: the rotation of halves is then that of pairs, and a scalar product does not care about the order.

use lowbit_checkpoint::config::LatentConfig;
use lowbit_kernels::backend::{Backend, Buffer, Column};

use crate::error::{At, Result};
use crate::source::Source;

/// ε of the norms of latent vectors, whatever the config's is: transformers builds them with the default.
const EPS: f32 = 1e-6;

/// Norms and column orders.
pub struct Latent {
    /// Widths.
    pub config: LatentConfig,
    query_norm: Option<Buffer>,
    key_value_norm: Buffer,
    query: Vec<Option<Column>>,
    key: Vec<Option<Column>>,
    value: Vec<Option<Column>>,
    attended: Vec<Option<Column>>,
}

impl Latent {
    /// Loads the norms; `prefix` is `model.layers.N`.
    pub fn load(from: &dyn Source, backend: &dyn Backend, prefix: &str, config: &LatentConfig) -> Result<Self> {
        let norm = |name: &str, len: usize| -> Result<Buffer> {
            let full = format!("{prefix}.self_attn.{name}.weight");
            backend.upload(&from.vector(&full, len)?).at(&full)
        };
        let c = config;
        let (heads, width) = (from.config().num_heads, c.cache_width());
        let (nope, rope, half) = (c.nope, c.rope, c.rope / 2);
        let at = |part, column| Some(Column { part, column });
        // Element i of the rotated part is element `rotated(i)` of what the linear gives.
        let rotated = |i: usize| match (c.interleaved, i < half) {
            (false, _) => i,
            (true, true) => 2 * i,
            (true, false) => 2 * (i - half) + 1,
        };
        let head = |h: usize, i: usize| h * c.key() + if i < rope { nope + rotated(i) } else { i - rope };
        let expanded = nope + c.value;
        let every = |of: &dyn Fn(usize, usize) -> Option<Column>| -> Vec<Option<Column>> {
            (0..heads).flat_map(|h| (0..width).map(move |i| (h, i))).map(|(h, i)| of(h, i)).collect()
        };
        Ok(Self {
            query_norm: c.q_rank.map(|r| norm("q_a_layernorm", r)).transpose()?,
            key_value_norm: norm("kv_a_layernorm", c.kv_rank)?,
            query: every(&|h, i| if i < c.key() { at(0, head(h, i)) } else { None }),
            // Part 0 is the linear with the rotated key of all heads, part 1 the expanded latent vector.
            key: every(&|h, i| match i {
                i if i < rope => at(0, c.kv_rank + rotated(i)),
                i if i < c.key() => at(1, h * expanded + i - rope),
                _ => None,
            }),
            value: every(&|h, i| if i < c.value { at(0, h * expanded + nope + i) } else { None }),
            attended: (0..heads).flat_map(|h| (0..c.value).map(move |i| at(0, h * width + i))).collect(),
            config: c.clone(),
        })
    }

    /// The queries' latent vector, normed; `None` where queries have none.
    pub fn query_latent(&self, b: &dyn Backend, q: &Buffer) -> Result<Option<Buffer>> {
        let Some((weight, rank)) = self.query_norm.as_ref().zip(self.config.q_rank) else { return Ok(None) };
        b.rms_norm(q, weight, rank, EPS, 0.0).at("q_a_layernorm").map(Some)
    }

    /// The latent vector of keys and values, normed, from the linear that also gives the rotated key.
    pub fn key_value_latent(&self, b: &dyn Backend, compressed: &Buffer) -> Result<Buffer> {
        let c = &self.config;
        let vector = b.slice_columns(compressed, c.kv_rank + c.rope, 0..c.kv_rank).at("kv_a_proj_with_mqa")?;
        b.rms_norm(&vector, &self.key_value_norm, c.kv_rank, EPS, 0.0).at("kv_a_layernorm")
    }

    /// q, k and v `[T, heads · width]` from queries `[T, heads · key]`, the compressed linear's output and the expanded latent vector.
    pub fn heads(
        &self,
        b: &dyn Backend,
        heads: usize,
        q: &Buffer,
        compressed: &Buffer,
        expanded: &Buffer,
    ) -> Result<[Buffer; 3]> {
        let c = &self.config;
        let kv = (expanded, heads * (c.nope + c.value));
        Ok([
            b.assemble_columns(&[(q, heads * c.key())], &self.query).at("queries")?,
            b.assemble_columns(&[(compressed, c.kv_rank + c.rope), kv], &self.key).at("keys")?,
            b.assemble_columns(&[kv], &self.value).at("values")?,
        ])
    }

    /// `[T, heads · value]` of what attention gave.
    pub fn output(&self, b: &dyn Backend, attended: &Buffer) -> Result<Buffer> {
        let heads = self.attended.len() / self.config.value.max(1);
        b.assemble_columns(&[(attended, heads * self.config.cache_width())], &self.attended).at("attention")
    }
}
