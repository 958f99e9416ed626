//! The op vocabulary: every operation of the decoder graph, on device buffers.
//!
//! `model` is written once against [`Backend`]. Activations are f32 in device [`Buffer`]s; weights are
//! [`WeightHandle`]s in their stored format. Shapes are row-major; T is the number of tokens in the call (all
//! sequences of a batch concatenated, "ragged"), and [`Segment`]s say which rows belong to which sequence.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use crate::activation::InputRule;
use crate::cpu::{checks, clamped_swiglu, rows};
use crate::draw::{Draw, draw_rows};
use crate::error::{KernelError, Result, check_len};
use crate::random::RandomWeight;
use crate::solver::Solver;

mod stored;

pub use stored::{Bytes, FloatType, HostWeight, PackedWeight};

/// f32 memory on the backend's device.
pub struct Buffer {
    /// f32 elements.
    pub len: usize,
    /// The backend's own storage; only the backend that made it may look inside.
    pub memory: Box<dyn Any + Send + Sync>,
}

/// A weight on the device.
pub struct WeightHandle {
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// Bytes one pass reads.
    pub stored_bytes: usize,
    /// The backend's own layout.
    pub memory: Box<dyn Any + Send + Sync>,
}

/// One sequence's rows in a ragged batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Which KV cache slot it continues.
    pub slot: usize,
    /// First row of this call's activations.
    pub row: usize,
    /// Rows (new tokens).
    pub tokens: usize,
    /// Tokens already in the cache: the position of the first new token.
    pub past: usize,
}

/// How a cache keeps keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvFormat {
    /// As the backend does by itself.
    #[default]
    Float,
    /// Eight bits, symmetric, a scale for each token and head: `x ≈ scale · code`, scale = largest magnitude / 127.
    Int8,
    /// The same with codes that are e4m3 floats (four bits of exponent, three of mantissa, 448 at most): scale = largest magnitude / 448.
    Fp8,
}

/// Attention shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads` (grouped-query attention).
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies `q·k`.
    pub scale: f32,
    /// Keys at distance `>= window` are masked (sliding window).
    pub window: Option<usize>,
    /// Scores become `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// Gate activation of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU through erf.
    Gelu,
}

/// Where a column of a new row comes from: column `column` of buffer `part`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Which buffer.
    pub part: usize,
    /// Which of its columns.
    pub column: usize,
}

/// Rows of `x` that are added, weighted, to rows of another buffer ([`Backend::add_weighted_rows`]).
pub struct WeightedRows<'a> {
    /// `[rows.len(), width]`.
    pub x: &'a Buffer,
    /// The row each is added to.
    pub rows: &'a [u32],
    /// What each is multiplied by.
    pub factors: &'a [f32],
}

/// Result of scoring one position against a target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenScore {
    /// `log softmax(logits)[target]`, nats.
    pub log_prob: f32,
    /// First index of the largest logit.
    pub top1: u32,
}

/// The operations. All accumulate in f32 unless stated; results do not depend on thread count or batch size.
pub trait Backend: Send + Sync {
    /// `cpu`, `scalar`, ...
    fn name(&self) -> &'static str;
    /// The same backend with the arithmetic of decode steps (one new token a sequence), where that differs; buffers, weights and
    /// caches are good for both. Without it, a backend has one arithmetic for both phases.
    fn decode_phase(&self) -> Option<&dyn Backend> {
        None
    }
    /// Most tokens of a prompt that the decode phase gets through sooner than prefill does; 0 where there are none.
    fn short_prompt(&self) -> usize {
        0
    }
    /// Whether weights are sooner there when several threads upload them: where that is work of the host's processors.
    fn uploads_in_parallel(&self) -> bool {
        false
    }
    /// Decode steps that are recorded once and repeated, where the device gains by that: for `model`, which see.
    fn steps(&self) -> Result<Option<Box<dyn Steps>>> {
        Ok(None)
    }
    /// The device's own solvers; without, matrices are solved on the host.
    fn solver(&self) -> Option<&dyn Solver> {
        None
    }
    /// Copies floats to the device.
    fn upload(&self, data: &[f32]) -> Result<Buffer>;
    /// Zeros.
    fn zeros(&self, len: usize) -> Result<Buffer>;
    /// Copies back.
    fn download(&self, x: &Buffer) -> Result<Vec<f32>>;
    /// Copies `range` back.
    fn download_range(&self, x: &Buffer, range: Range<usize>) -> Result<Vec<f32>>;
    /// Prepares a weight in the layout this backend reads fastest.
    fn upload_weight(&self, w: &HostWeight) -> Result<WeightHandle>;
    /// Makes a random weight, bit for bit that of [`RandomWeight::host`]. Default: on the host, then uploaded.
    fn random_weight(&self, w: &RandomWeight) -> Result<WeightHandle> {
        self.upload_weight(&w.host()?)
    }

    /// `out[t] = scale · table[ids[t]]`; `table` `[vocab, hidden]`, result `[T, hidden]`. An id outside the table is an error.
    fn embed(&self, table: &WeightHandle, ids: &[u32], scale: f32) -> Result<Buffer>;
    /// Per row of `width`: `x / sqrt(mean(x²) + eps) · (offset + weight)`; mean in f64 on the scalar twin, f32 elsewhere.
    fn rms_norm(&self, x: &Buffer, weight: &Buffer, width: usize, eps: f32, offset: f32) -> Result<Buffer>;
    /// `y = x · Wᵀ (+ bias)`: x `[T, in]`, y `[T, out]`.
    fn linear(&self, x: &Buffer, w: &WeightHandle, bias: Option<&Buffer>) -> Result<Buffer>;
    /// [`Self::linear`] for weights that read the same x (q/k/v, gate/up), in one pass where the backend has one.
    fn linears(&self, x: &Buffer, weights: &[(&WeightHandle, Option<&Buffer>)]) -> Result<Vec<Buffer>> {
        weights.iter().map(|(w, bias)| self.linear(x, w, *bias)).collect()
    }
    /// Rotates q `[T, heads·head_dim]` in place, half-split pairing (`x[i], x[i+d/2]`); `inv_freq` `[rot/2]`, angle = position · inv_freq, cos and sin multiplied by `mscale`.
    fn rope(
        &self,
        x: &mut Buffer,
        heads: usize,
        head_dim: usize,
        inv_freq: &[f32],
        mscale: f32,
        segments: &[Segment],
    ) -> Result<()>;
    /// Makes an empty cache for `slots` sequences of up to `capacity` tokens.
    fn kv_cache(&self, slots: usize, capacity: usize, kv_heads: usize, head_dim: usize) -> Result<KvBuffer>;
    /// Bytes a cached element of a head of this width takes.
    fn kv_element_bytes(&self, _head_dim: usize) -> usize {
        4
    }
    /// Appends k and v `[T, kv_heads·head_dim]` at each segment's `past`.
    fn kv_append(&self, cache: &mut KvBuffer, k: &Buffer, v: &Buffer, segments: &[Segment]) -> Result<()>;
    /// Slot `to` becomes a continuation of the first `tokens` tokens of slot `from`; what `to` held is forgotten. With
    /// `from == to` the slot is cut to `tokens`. Backends that page their cache share whole pages and copy a partial last
    /// one; either way neither slot sees what the other appends afterwards.
    fn kv_fork(&self, cache: &mut KvBuffer, from: usize, tokens: usize, to: usize) -> Result<()> {
        let _ = (cache, from, tokens, to);
        let why = "this backend cannot copy a slot".to_string();
        Err(KernelError::Unsupported { backend: self.name(), op: "kv_fork", why })
    }
    /// Forgets a slot's tokens, so that a paged cache gets their memory back.
    fn kv_release(&self, cache: &mut KvBuffer, slot: usize) -> Result<()> {
        checks::below(self.name(), "kv_release", "slot", slot, cache.slots)
    }
    /// Memory the cache holds now. A cache without pages counts each slot as one page, always held.
    fn kv_usage(&self, cache: &KvBuffer) -> KvUsage {
        KvUsage { page_tokens: cache.capacity, pages: cache.slots }
    }
    /// [`Self::rope`] of q `[T, heads·head_dim]` and k `[T, kv_heads·head_dim]`, then [`Self::kv_append`], in one pass where the backend has
    /// one: the same bits in q and the cache. What is left in k is not stated.
    fn rope_append(
        &self,
        cache: &mut KvBuffer,
        q: &mut Buffer,
        k: &mut Buffer,
        v: &Buffer,
        heads: usize,
        head_dim: usize,
        inv_freq: &[f32],
        mscale: f32,
        segments: &[Segment],
    ) -> Result<()> {
        self.rope(q, heads, head_dim, inv_freq, mscale, segments)?;
        self.rope(k, cache.width / head_dim.max(1), head_dim, inv_freq, mscale, segments)?;
        self.kv_append(cache, k, v, segments)
    }
    /// Causal attention of q `[T, heads·head_dim]` over the cache (which already holds the new keys); result like q.
    fn attention(&self, q: &Buffer, cache: &KvBuffer, shape: &AttentionShape, segments: &[Segment]) -> Result<Buffer>;
    /// Whether there is [`Self::attention_with_sinks`].
    fn has_sinks(&self) -> bool {
        false
    }
    /// [`Self::attention`] where each query head has a score beside those of its keys, its *sink*, that takes a share of the softmax and has
    /// no value: the weight of key i is `exp(sᵢ) / (Σⱼ exp(sⱼ) + exp(sink))`. `sinks` `[heads]`; no scale and no cap is applied to them.
    fn attention_with_sinks(
        &self,
        q: &Buffer,
        cache: &KvBuffer,
        shape: &AttentionShape,
        sinks: &[f32],
        segments: &[Segment],
    ) -> Result<Buffer> {
        let _ = (q, cache, shape, sinks, segments);
        let why = "attention with sinks is computed on the CPU only".to_string();
        Err(KernelError::Unsupported { backend: self.name(), op: "attention_with_sinks", why })
    }
    /// `g · sigmoid(alpha · g) · (u + 1)`, element by element, with g the gate, at most `limit`, and u the up, within ±`limit`: the
    /// activation of gpt-oss. Default: on the host.
    fn clamped_swiglu(&self, gate: &Buffer, up: &Buffer, alpha: f32, limit: f32) -> Result<Buffer> {
        let (gate, up) = (self.download(gate)?, self.download(up)?);
        check_len("up", gate.len(), up.len())?;
        let y: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| clamped_swiglu(*g, *u, alpha, limit)).collect();
        self.upload(&y)
    }
    /// `act(gate) · up`, element by element.
    fn activation_mul(&self, gate: &Buffer, up: &Buffer, act: Activation) -> Result<Buffer>;
    /// `x += y`.
    fn add_assign(&self, x: &mut Buffer, y: &Buffer) -> Result<()>;
    /// `x += y`, then [`Self::rms_norm`] of x, in one pass where the backend has one: the same bits.
    fn add_rms_norm(
        &self,
        x: &mut Buffer,
        y: &Buffer,
        weight: &Buffer,
        width: usize,
        eps: f32,
        offset: f32,
    ) -> Result<Buffer> {
        self.add_assign(x, y)?;
        self.rms_norm(x, weight, width, eps, offset)
    }
    /// Rows `rows` of x `[T, width]`, gathered.
    fn gather_rows(&self, x: &Buffer, width: usize, rows: &[usize]) -> Result<Buffer>;
    /// Columns `range` of every row of x `[T, width]` (splits fused projections).
    fn slice_columns(&self, x: &Buffer, width: usize, range: Range<usize>) -> Result<Buffer>;
    /// `x ← cap · tanh(x / cap)`.
    fn soft_cap(&self, x: &mut Buffer, cap: f32) -> Result<()>;
    /// For each row of logits `[T, vocab]`: log-probability of its target and the argmax. No logits travel to the host.
    fn score(&self, logits: &Buffer, vocab: usize, targets: &[u32]) -> Result<Vec<TokenScore>>;
    /// First index of the largest value of each row.
    fn argmax(&self, logits: &Buffer, vocab: usize) -> Result<Vec<u32>>;
    /// A token of each row of logits `[T, vocab]`, as [`crate::draw::draw`] draws it (but for what is equal to rounding, where a device
    /// computes the weights). Default: on the host.
    fn draw(&self, logits: &Buffer, vocab: usize, draws: &[Draw]) -> Result<Vec<u32>> {
        check_len("draws", checks::rows("logits", logits.len, vocab)?, draws.len())?;
        Ok(draw_rows(&self.download(logits)?, vocab, draws))
    }
    /// `h += xᵀ x` for x `[T, n]`, upper triangle and diagonal only (the lower is left as it was); h `[n, n]`.
    fn hessian_update(&self, h: &mut Buffer, x: &Buffer, n: usize) -> Result<()>;
    /// `h += xᵀ y` for x `[T, m]`, y `[T, n]`; h `[m, n]`.
    ///
    /// Default: one [`Self::linear`] of xᵀ with yᵀ as a dense f32 weight. x and y travel through the host, h does not.
    fn cross_update(&self, h: &mut Buffer, x: &Buffer, y: &Buffer, m: usize, n: usize) -> Result<()> {
        let t = checks::rows("cross input", x.len, m)?;
        check_len("cross input", checks::product("cross input", t, n)?, y.len)?;
        check_len("cross product", checks::product("cross product", m, n)?, h.len)?;
        if h.len == 0 || t == 0 {
            return Ok(());
        }
        let left = self.upload(&transposed(&self.download(x)?, t, m))?;
        let right = transposed(&self.download(y)?, t, n).iter().flat_map(|v| v.to_le_bytes()).collect();
        let right =
            HostWeight::Dense { dtype: FloatType::F32, out_features: n, in_features: t, data: Bytes::from_vec(right) };
        let product = self.linear(&left, &self.upload_weight(&right)?, None)?;
        self.add_assign(h, &product)
    }
    /// Rows of x `[T, width]` rounded as [`InputRule::apply`] does it: the same bits. Default: through the host.
    fn quantize_input(&self, x: &Buffer, width: usize, rule: &InputRule) -> Result<Buffer> {
        checks::rows("quantized input", x.len, width)?;
        let mut values = self.download(x)?;
        rule.apply(&mut values, width)?;
        self.upload(&values)
    }
    /// [`Self::linears`] of x rounded as `rule` says. Default: [`Self::quantize_input`], then the products. A device may multiply codes
    /// of eight bits as they are ([`crate::w8a8`]): equal to rounding, and for integers nothing but scales is rounded.
    fn rounded_linears(
        &self,
        x: &Buffer,
        rule: &InputRule,
        weights: &[(&WeightHandle, Option<&Buffer>)],
    ) -> Result<Vec<Buffer>> {
        let Some((first, _)) = weights.first() else { return Ok(Vec::new()) };
        self.linears(&self.quantize_input(x, first.in_features, rule)?, weights)
    }
    /// `x − y`. Default: through the host.
    fn subtract(&self, x: &Buffer, y: &Buffer) -> Result<Buffer> {
        check_len("subtrahend", x.len, y.len)?;
        let mut values = self.download(x)?;
        values.iter_mut().zip(self.download(y)?).for_each(|(x, y)| *x -= y);
        self.upload(&values)
    }
    /// Row t of x `[T, width]` times `factors[t]`. Default: through the host.
    fn scale_rows(&self, x: &mut Buffer, width: usize, factors: &[f32]) -> Result<()> {
        check_len("row factors", checks::rows("rows to scale", x.len, width)?, factors.len())?;
        let mut values = self.download(x)?;
        for (row, f) in values.chunks_exact_mut(width).zip(factors) {
            row.iter_mut().for_each(|v| *v *= f);
        }
        *x = self.upload(&values)?;
        Ok(())
    }
    /// Part by part in their order: row `rows[i]` of y `[T, width]` gains `factors[i]` times row i of the part, the product rounded
    /// before it is added. Default: through the host.
    fn add_weighted_rows(&self, y: &mut Buffer, width: usize, parts: &[WeightedRows<'_>]) -> Result<()> {
        let mut sum = self.download(y)?;
        for p in parts {
            rows::add_weighted(self.name(), &mut sum, width, &self.download(p.x)?, p.rows, p.factors)?;
        }
        *y = self.upload(&sum)?;
        Ok(())
    }
    /// Rows put together from columns of the same row of each part `(x [T, width], width)`; `None` is 0. Result
    /// `[T, columns.len()]`. Default: through the host.
    fn assemble_columns(&self, parts: &[(&Buffer, usize)], columns: &[Option<Column>]) -> Result<Buffer> {
        let held = parts.iter().map(|(x, w)| Ok((self.download(x)?, *w))).collect::<Result<Vec<_>>>()?;
        let views: Vec<(&[f32], usize)> = held.iter().map(|(x, w)| (x.as_slice(), *w)).collect();
        self.upload(&rows::assemble(self.name(), &views, columns)?)
    }
    /// Mean of the squares of each row of x `[T, width]`, summed in f64. Default: on the host.
    fn mean_squares(&self, x: &Buffer, width: usize) -> Result<Vec<f32>> {
        checks::rows("rows to square", x.len, width)?;
        let mean = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
        Ok(self.download(x)?.chunks_exact(width).map(|row| mean(row) as f32).collect())
    }
    /// Largest |x|; NaN counts as infinity so that it cannot hide.
    fn abs_max(&self, x: &Buffer) -> Result<f32> {
        Ok(self.download(x)?.iter().fold(0f32, |m, v| if v.is_nan() { f32::INFINITY } else { m.max(v.abs()) }))
    }
}

/// One fixed sequence of operations on one token each of some sequences, run again and again for other tokens.
///
/// The sequence may depend on the number of rows and on nothing else: the same operations on the same weights and caches
/// (all of which must stay alive) and buffers of the same sizes every time, none of them copied to or from the host.
pub trait Steps: Send + Sync {
    /// Where the operations of a step between [`Self::begin`] and [`Self::finish`] are to be called; its buffers may be given
    /// to the backend it came from.
    fn backend(&self) -> &dyn Backend;
    /// Starts a step of one token a segment. With a result, the whole step has been submitted: the buffer holds what
    /// [`Self::finish`] was once given, for these tokens. Without, the caller calls the operations, then `finish`.
    fn begin(&mut self, ids: &[u32], segments: &[Segment]) -> Result<Option<Arc<Buffer>>>;
    /// Ends a step; the buffer is good until the next one begins.
    fn finish(&mut self, result: Buffer) -> Result<Arc<Buffer>>;
    /// Ends a step that failed.
    fn abandon(&mut self);
}

/// `[cols, rows]` of a row-major `[rows, cols]`.
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
}

/// What a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvUsage {
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Pages held; one that several slots share counts once.
    pub pages: usize,
}

/// Keys and values of one layer for every slot.
pub struct KvBuffer {
    /// Sequences.
    pub slots: usize,
    /// Tokens a slot can hold.
    pub capacity: usize,
    /// `kv_heads · head_dim`.
    pub width: usize,
    /// The backend's own storage.
    pub memory: Box<dyn Any + Send + Sync>,
}
