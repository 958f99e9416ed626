//! The reference backend: checks shapes as the fast one does, computes with [`super::scalar`].

use std::ops::Range;

use half::{bf16, f16};

use super::checks::{self, buffer, host, host_mut};
use super::scalar;
use crate::activation::InputRule;
use crate::backend::{
    Activation, AttentionShape, Backend, Buffer, FloatType, HostWeight, KvBuffer, Segment, TokenScore, WeightHandle,
};
use crate::error::{KernelError, Result, check_len};
use crate::w8a8::{self, RowCodes};

const NAME: &str = "scalar";

/// One thread, plain loops, every weight widened to f32 at upload.
#[derive(Default)]
pub struct ScalarBackend;

impl ScalarBackend {
    /// The only one there is.
    pub fn new() -> Self {
        Self
    }
}

/// `[out, in]` f32, and the codes where they are of eight bits with a scale a row.
struct Weight {
    values: Vec<f32>,
    codes: Option<RowCodes>,
}

/// `[slots, capacity, kv_heads · head_dim]` each.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

fn held(w: &WeightHandle) -> Result<&Weight> {
    w.memory.downcast_ref().ok_or(KernelError::ForeignHandle { backend: NAME, what: "weight" })
}

fn weight(w: &WeightHandle) -> Result<&[f32]> {
    Ok(&held(w)?.values)
}

fn widen(dtype: FloatType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        FloatType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        FloatType::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        FloatType::Bf16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}

impl Backend for ScalarBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn upload(&self, data: &[f32]) -> Result<Buffer> {
        Ok(buffer(data.to_vec()))
    }

    fn zeros(&self, len: usize) -> Result<Buffer> {
        Ok(buffer(vec![0.0; len]))
    }

    fn download(&self, x: &Buffer) -> Result<Vec<f32>> {
        Ok(host(NAME, x)?.to_vec())
    }

    fn download_range(&self, x: &Buffer, range: Range<usize>) -> Result<Vec<f32>> {
        checks::part(host(NAME, x)?, range)
    }

    fn upload_weight(&self, w: &HostWeight) -> Result<WeightHandle> {
        let (out_features, in_features) = w.dims();
        let values = match w {
            HostWeight::Dense { dtype, data, .. } => widen(*dtype, data.as_slice()),
            HostWeight::Packed(p) => scalar::dequantize(p)?,
            HostWeight::Float(f) => f.dequantize()?,
        };
        check_len("weight", checks::product("weight", out_features, in_features)?, values.len())?;
        let memory = Box::new(Weight { values, codes: RowCodes::of(w)? });
        Ok(WeightHandle { out_features, in_features, stored_bytes: w.stored_bytes(), memory })
    }

    fn embed(&self, table: &WeightHandle, ids: &[u32], scale: f32) -> Result<Buffer> {
        let (w, width) = (weight(table)?, table.in_features);
        let mut y = Vec::with_capacity(ids.len() * width);
        for id in ids {
            let id = *id as usize;
            checks::below(NAME, "embed", "token id", id, table.out_features)?;
            y.extend(w[id * width..(id + 1) * width].iter().map(|v| v * scale));
        }
        Ok(buffer(y))
    }

    fn rms_norm(&self, x: &Buffer, weight: &Buffer, width: usize, eps: f32, offset: f32) -> Result<Buffer> {
        let (x, weight) = (host(NAME, x)?, host(NAME, weight)?);
        checks::rows("norm input", x.len(), width)?;
        check_len("norm weight", width, weight.len())?;
        Ok(buffer(scalar::rms_norm(x, weight, width, eps, offset)))
    }

    fn linear(&self, x: &Buffer, w: &WeightHandle, bias: Option<&Buffer>) -> Result<Buffer> {
        let x = host(NAME, x)?;
        checks::rows("linear input", x.len(), w.in_features)?;
        let bias = bias.map(|b| host(NAME, b)).transpose()?;
        if let Some(b) = bias {
            check_len("bias", w.out_features, b.len())?;
        }
        Ok(buffer(scalar::linear(x, weight(w)?, w.in_features, w.out_features, bias)))
    }

    fn rounded_linears(
        &self,
        x: &Buffer,
        rule: &InputRule,
        weights: &[(&WeightHandle, Option<&Buffer>)],
    ) -> Result<Vec<Buffer>> {
        let product = |(w, bias): &(&WeightHandle, Option<&Buffer>)| {
            let codes = held(w)?.codes.as_ref().filter(|c| w8a8::input_code(rule) == Some(c.code()));
            let Some(codes) = codes else {
                return self.linear(&self.quantize_input(x, w.in_features, rule)?, w, *bias);
            };
            let x = host(NAME, x)?;
            checks::rows("linear input", x.len(), w.in_features)?;
            let bias = bias.map(|b| host(NAME, b)).transpose()?;
            bias.map_or(Ok(()), |b| check_len("bias", w.out_features, b.len()))?;
            Ok(buffer(codes.linear(x, rule, bias)?))
        };
        weights.iter().map(product).collect()
    }

    fn rope(
        &self,
        x: &mut Buffer,
        heads: usize,
        head_dim: usize,
        inv_freq: &[f32],
        mscale: f32,
        segments: &[Segment],
    ) -> Result<()> {
        let x = host_mut(NAME, x)?;
        let total = checks::rotary(NAME, x.len(), heads, head_dim, inv_freq.len())?;
        checks::segments(NAME, "rope", segments, total)?;
        let width = heads * head_dim;
        for s in segments {
            for i in 0..s.tokens {
                let at = (s.row + i) * width;
                scalar::rope_row(&mut x[at..at + width], head_dim, inv_freq, mscale, s.past + i);
            }
        }
        Ok(())
    }

    fn kv_cache(&self, slots: usize, capacity: usize, kv_heads: usize, head_dim: usize) -> Result<KvBuffer> {
        let width = checks::product("cache", kv_heads, head_dim)?;
        let len = checks::product("cache", checks::product("cache", slots, capacity)?, width)?;
        let memory = Cache { keys: vec![0.0; len], values: vec![0.0; len] };
        Ok(KvBuffer { slots, capacity, width, memory: Box::new(memory) })
    }

    fn kv_append(&self, cache: &mut KvBuffer, k: &Buffer, v: &Buffer, segments: &[Segment]) -> Result<()> {
        let (k, v) = (host(NAME, k)?, host(NAME, v)?);
        check_len("values", k.len(), v.len())?;
        let (width, capacity) = (cache.width, cache.capacity);
        checks::segments(NAME, "kv_append", segments, checks::rows("keys", k.len(), width)?)?;
        checks::cached(NAME, "kv_append", segments, cache)?;
        let memory = cache.memory.downcast_mut::<Cache>();
        let memory = memory.ok_or(KernelError::ForeignHandle { backend: NAME, what: "cache" })?;
        for s in segments {
            let (from, to, len) = (s.row * width, (s.slot * capacity + s.past) * width, s.tokens * width);
            memory.keys[to..to + len].copy_from_slice(&k[from..from + len]);
            memory.values[to..to + len].copy_from_slice(&v[from..from + len]);
        }
        Ok(())
    }

    fn kv_fork(&self, cache: &mut KvBuffer, from: usize, tokens: usize, to: usize) -> Result<()> {
        checks::fork(NAME, cache, from, tokens, to)?;
        let (stride, len) = (cache.capacity * cache.width, tokens * cache.width);
        let memory = cache.memory.downcast_mut::<Cache>();
        let memory = memory.ok_or(KernelError::ForeignHandle { backend: NAME, what: "cache" })?;
        memory.keys.copy_within(from * stride..from * stride + len, to * stride);
        memory.values.copy_within(from * stride..from * stride + len, to * stride);
        Ok(())
    }

    fn attention(&self, q: &Buffer, kv: &KvBuffer, shape: &AttentionShape, segments: &[Segment]) -> Result<Buffer> {
        attention(q, kv, shape, None, segments)
    }

    fn has_sinks(&self) -> bool {
        true
    }

    fn attention_with_sinks(
        &self,
        q: &Buffer,
        kv: &KvBuffer,
        shape: &AttentionShape,
        sinks: &[f32],
        segments: &[Segment],
    ) -> Result<Buffer> {
        check_len("sinks", shape.heads, sinks.len())?;
        attention(q, kv, shape, Some(sinks), segments)
    }

    fn activation_mul(&self, gate: &Buffer, up: &Buffer, act: Activation) -> Result<Buffer> {
        let (gate, up) = (host(NAME, gate)?, host(NAME, up)?);
        check_len("up", gate.len(), up.len())?;
        Ok(buffer(gate.iter().zip(up).map(|(g, u)| scalar::activation(*g, act) * u).collect()))
    }

    fn add_assign(&self, x: &mut Buffer, y: &Buffer) -> Result<()> {
        let (x, y) = (host_mut(NAME, x)?, host(NAME, y)?);
        check_len("addend", x.len(), y.len())?;
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        Ok(())
    }

    fn gather_rows(&self, x: &Buffer, width: usize, rows: &[usize]) -> Result<Buffer> {
        Ok(buffer(checks::gather(NAME, host(NAME, x)?, width, rows)?))
    }

    fn slice_columns(&self, x: &Buffer, width: usize, range: Range<usize>) -> Result<Buffer> {
        Ok(buffer(checks::columns(host(NAME, x)?, width, range)?))
    }

    fn soft_cap(&self, x: &mut Buffer, cap: f32) -> Result<()> {
        host_mut(NAME, x)?.iter_mut().for_each(|v| *v = scalar::soft_cap(*v, cap));
        Ok(())
    }

    fn score(&self, logits: &Buffer, vocab: usize, targets: &[u32]) -> Result<Vec<TokenScore>> {
        let logits = host(NAME, logits)?;
        checks::targets(NAME, logits.len(), vocab, targets)?;
        Ok(logits.chunks_exact(vocab).zip(targets).map(|(row, t)| scalar::score(row, *t as usize)).collect())
    }

    fn argmax(&self, logits: &Buffer, vocab: usize) -> Result<Vec<u32>> {
        let logits = host(NAME, logits)?;
        checks::rows("logits", logits.len(), vocab)?;
        Ok(logits.chunks_exact(vocab).map(|row| scalar::argmax(row) as u32).collect())
    }

    fn hessian_update(&self, h: &mut Buffer, x: &Buffer, n: usize) -> Result<()> {
        let (h, x) = (host_mut(NAME, h)?, host(NAME, x)?);
        checks::rows("hessian input", x.len(), n)?;
        check_len("hessian", checks::product("hessian", n, n)?, h.len())?;
        scalar::hessian_update(h, x, n);
        Ok(())
    }
    fn cross_update(&self, h: &mut Buffer, x: &Buffer, y: &Buffer, m: usize, n: usize) -> Result<()> {
        let (h, x, y) = (host_mut(NAME, h)?, host(NAME, x)?, host(NAME, y)?);
        let t = checks::rows("cross input", x.len(), m)?;
        check_len("cross input", checks::product("cross input", t, n)?, y.len())?;
        check_len("cross product", checks::product("cross product", m, n)?, h.len())?;
        for (at, h) in h.iter_mut().enumerate() {
            let (i, j) = (at / n, at % n);
            *h += (0..t).map(|t| x[t * m + i] * y[t * n + j]).sum::<f32>();
        }
        Ok(())
    }
}

fn attention(
    q: &Buffer,
    kv: &KvBuffer,
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    segments: &[Segment],
) -> Result<Buffer> {
    let q = host(NAME, q)?;
    let memory = kv.memory.downcast_ref::<Cache>();
    let memory = memory.ok_or(KernelError::ForeignHandle { backend: NAME, what: "cache" })?;
    checks::shape(NAME, shape, kv.width)?;
    let width = checks::product("query width", shape.heads, shape.head_dim)?;
    checks::segments(NAME, "attention", segments, checks::rows("queries", q.len(), width)?)?;
    checks::cached(NAME, "attention", segments, kv)?;
    let mut out = vec![0f32; q.len()];
    for s in segments {
        let slot = s.slot * kv.capacity * kv.width..(s.slot + 1) * kv.capacity * kv.width;
        let held = (&memory.keys[slot.clone()], &memory.values[slot]);
        scalar::attention(q, held, shape, sinks, s, &mut out);
    }
    Ok(buffer(out))
}
