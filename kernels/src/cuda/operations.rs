//! The vocabulary of operations on a device: a method checks its operands and launches its kernel.

use std::ops::Range;

use super::ops_embed::{Ids, PackedTable};
use super::rows::{bytes_of, floats_of};
use super::steps::GpuSteps;
use super::weights::{DeviceWeight, Layout};
use super::{
    Cache, GpuBackend, buffer, kv_fork, ops_attention, ops_elementwise, ops_embed, ops_hessian, ops_input, ops_norm,
    ops_random, ops_reproducible, ops_rope, ops_score,
};
use crate::activation::InputRule;
use crate::backend::{
    Activation, AttentionShape, Backend, Buffer, FloatType, HostWeight, KvBuffer, Segment, Steps, TokenScore,
    WeightHandle,
};
use crate::cpu::checks;
use crate::draw::{Draw, draw_rows};
use crate::error::{KernelError, Result, check_len};
use crate::random::RandomWeight;
use crate::solver::Solver;

impl Backend for GpuBackend {
    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn solver(&self) -> Option<&dyn Solver> {
        Some(self)
    }

    fn steps(&self) -> Result<Option<Box<dyn Steps>>> {
        if self.is_reproducible() || !self.records {
            return Ok(None);
        }
        Ok(Some(Box::new(GpuSteps::new(self)?)))
    }

    fn upload(&self, data: &[f32]) -> Result<Buffer> {
        Ok(buffer(data.len(), self.device.upload(&bytes_of(data))?))
    }

    fn zeros(&self, len: usize) -> Result<Buffer> {
        Ok(buffer(len, self.device.alloc_zeroed(checks::product("buffer", len, 4)?)?))
    }

    fn download(&self, x: &Buffer) -> Result<Vec<f32>> {
        self.download_range(x, 0..x.len)
    }

    fn download_range(&self, x: &Buffer, range: Range<usize>) -> Result<Vec<f32>> {
        let memory = self.mem(x)?;
        if range.start > range.end || range.end > x.len {
            return Err(KernelError::Length { what: "download range", expected: x.len, found: range.end });
        }
        Ok(floats_of(&self.device.read(memory, range.start * 4..range.end * 4)?))
    }

    fn upload_weight(&self, w: &HostWeight) -> Result<WeightHandle> {
        let (out_features, in_features) = w.dims();
        let memory = Box::new(DeviceWeight::upload(&self.device, w)?);
        Ok(WeightHandle { out_features, in_features, stored_bytes: w.stored_bytes(), memory })
    }

    fn random_weight(&self, w: &RandomWeight) -> Result<WeightHandle> {
        let (out_features, in_features, stored_bytes) = (w.out_features, w.in_features, w.stored_bytes()?);
        let memory = Box::new(ops_random::weight(&self.device, w)?);
        Ok(WeightHandle { out_features, in_features, stored_bytes, memory })
    }

    fn embed(&self, table: &WeightHandle, ids: &[u32], scale: f32) -> Result<Buffer> {
        let (w, d) = (self.weight(table)?, &self.device);
        let (vocab, hidden) = (w.out_features, w.in_features);
        let y = self.new_buffer(checks::product("embeddings", ids.len(), hidden)?)?;
        let step = self.step().filter(|s| s.ids == ids);
        if let Some(step) = &step {
            step.limit(vocab, usize::MAX, usize::MAX);
        }
        let ids = Ids { host: ids, device: step.as_ref().map(|s| &s.ids_memory) };
        match &w.layout {
            Layout::Dense { raw, dtype } => {
                ops_embed::embed_dense(d, raw, *dtype, vocab, hidden, ids, scale, self.mem(&y)?)?;
            }
            Layout::Packed { words, scales, zeros, bits, group_cols } => {
                let table = PackedTable { words, scales, zeros, vocab, hidden, group_cols: *group_cols, bits: *bits };
                ops_embed::embed_packed(d, &table, ids, scale, self.mem(&y)?)?;
            }
        }
        Ok(y)
    }

    fn rms_norm(&self, x: &Buffer, weight: &Buffer, width: usize, eps: f32, offset: f32) -> Result<Buffer> {
        let rows = checks::rows("norm input", x.len, width)?;
        check_len("norm weight", width, weight.len)?;
        let y = self.new_buffer(x.len)?;
        let (x, weight, to) = (self.mem(x)?, self.mem(weight)?, self.mem(&y)?);
        let norm = if self.is_reproducible() { ops_reproducible::rms_norm } else { ops_norm::rms_norm };
        norm(&self.device, x, weight, to, rows, width, eps, offset)?;
        Ok(y)
    }

    fn linear(&self, x: &Buffer, w: &WeightHandle, bias: Option<&Buffer>) -> Result<Buffer> {
        self.product(x, &[(w, bias)])?.pop().ok_or(KernelError::Overflow("products"))
    }

    fn linears(&self, x: &Buffer, weights: &[(&WeightHandle, Option<&Buffer>)]) -> Result<Vec<Buffer>> {
        if self.in_one_launch(x, weights)? {
            return self.product(x, weights);
        }
        weights.iter().map(|(w, bias)| self.linear(x, w, *bias)).collect()
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
        let total = checks::rotary(self.name(), x.len, heads, head_dim, inv_freq.len())?;
        checks::segments(self.name(), "rope", segments, total)?;
        let (x, rows) = (self.mem(x)?, self.rows(segments, total)?);
        if self.is_reproducible() {
            let made = self.turns(&rows, segments, inv_freq, mscale)?;
            return ops_reproducible::rope(&self.device, x, &made.turns, &rows, total, heads, head_dim);
        }
        let f = self.frequencies(inv_freq)?;
        ops_rope::rope(&self.device, x, &f.memory, &rows, total, heads, head_dim, inv_freq.len(), mscale)
    }

    fn kv_cache(&self, slots: usize, capacity: usize, kv_heads: usize, head_dim: usize) -> Result<KvBuffer> {
        let width = checks::product("cache", kv_heads, head_dim)?;
        let len = checks::product("cache", checks::product("cache", slots, capacity)?, width)?;
        let dtype = self.cache_dtype(head_dim);
        let zeros = || self.device.alloc_zeroed(checks::product("cache", len, dtype.size())?);
        let memory = Cache { keys: zeros()?, values: zeros()?, dtype, kv_heads, head_dim };
        Ok(KvBuffer { slots, capacity, width, memory: Box::new(memory) })
    }

    fn kv_element_bytes(&self, head_dim: usize) -> usize {
        self.cache_dtype(head_dim).size()
    }

    fn kv_append(&self, cache: &mut KvBuffer, k: &Buffer, v: &Buffer, segments: &[Segment]) -> Result<()> {
        check_len("values", k.len, v.len)?;
        let total = checks::rows("keys", k.len, cache.width)?;
        checks::segments(self.name(), "kv_append", segments, total)?;
        checks::cached(self.name(), "kv_append", segments, cache)?;
        if let Some(step) = self.step() {
            step.limit(usize::MAX, cache.slots, cache.capacity);
        }
        let (view, rows) = (self.cache(cache)?, self.rows(segments, total)?);
        ops_rope::kv_append(&self.device, view, self.mem(k)?, self.mem(v)?, &rows, segments, total)
    }

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
        let half = inv_freq.len();
        let total = checks::rotary(self.name(), q.len, heads, head_dim, half)?;
        if self.is_reproducible() || self.cache(cache)?.head_dim != head_dim {
            self.rope(q, heads, head_dim, inv_freq, mscale, segments)?;
            self.rope(k, cache.width / head_dim, head_dim, inv_freq, mscale, segments)?;
            return self.kv_append(cache, k, v, segments);
        }
        check_len("keys", checks::product("keys", total, cache.width)?, k.len)?;
        check_len("values", k.len, v.len)?;
        checks::segments(self.name(), "rope_append", segments, total)?;
        checks::cached(self.name(), "rope_append", segments, cache)?;
        if let Some(step) = self.step() {
            step.limit(usize::MAX, cache.slots, cache.capacity);
        }
        let (view, rows, f) = (self.cache(cache)?, self.rows(segments, total)?, self.frequencies(inv_freq)?);
        let (d, q, k, v) = (&self.device, self.mem(q)?, self.mem(k)?, self.mem(v)?);
        ops_rope::rope_append(d, view, cache.slots, q, k, v, &f.memory, &rows, total, heads, half, mscale)
    }

    fn kv_fork(&self, cache: &mut KvBuffer, from: usize, tokens: usize, to: usize) -> Result<()> {
        checks::fork(self.name(), cache, from, tokens, to)?;
        let capacity = cache.capacity;
        let memory = cache.memory.downcast_mut::<Cache>().ok_or_else(|| self.foreign("cache"))?;
        let element = memory.dtype.size();
        let shape = kv_fork::Shape { kv_heads: memory.kv_heads, head_dim: memory.head_dim, capacity, element };
        for half in [&mut memory.keys, &mut memory.values] {
            kv_fork::copy_rows(&self.device, half, shape, from, tokens, to)?;
        }
        Ok(())
    }

    fn attention(&self, q: &Buffer, kv: &KvBuffer, shape: &AttentionShape, segments: &[Segment]) -> Result<Buffer> {
        let view = self.cache(kv)?;
        checks::shape(self.name(), shape, kv.width)?;
        check_len("cache heads", view.kv_heads, shape.kv_heads)?;
        let width = checks::product("query width", shape.heads, shape.head_dim)?;
        let total = checks::rows("queries", q.len, width)?;
        checks::segments(self.name(), "attention", segments, total)?;
        checks::cached(self.name(), "attention", segments, kv)?;
        if let Some(step) = self.step() {
            step.limit(usize::MAX, kv.slots, kv.capacity);
        }
        if self.is_reproducible() {
            let y = self.zeros(q.len)?;
            if view.dtype != FloatType::F32 {
                let why = format!("reproducible arithmetic over a cache of {:?}", view.dtype);
                return Err(KernelError::Unsupported { backend: self.name(), op: "attention", why });
            }
            ops_reproducible::attention(&self.device, self.mem(q)?, view, self.mem(&y)?, segments, total, shape)?;
            return Ok(y);
        }
        let (y, rows) = (self.new_buffer(q.len)?, self.rows(segments, total)?);
        let (d, scratch) = (&self.device, &self.scratch);
        ops_attention::attention(d, self.mem(q)?, view, self.mem(&y)?, &rows, segments, total, shape, scratch)?;
        Ok(y)
    }

    fn activation_mul(&self, gate: &Buffer, up: &Buffer, act: Activation) -> Result<Buffer> {
        check_len("up", gate.len, up.len)?;
        let y = self.new_buffer(gate.len)?;
        let (gate, up, to) = (self.mem(gate)?, self.mem(up)?, self.mem(&y)?);
        if self.is_reproducible() && act == Activation::Silu {
            ops_reproducible::silu_mul(&self.device, gate, up, to, y.len)?;
        } else {
            ops_elementwise::activation_mul(&self.device, gate, up, to, y.len, act)?;
        }
        Ok(y)
    }

    fn add_assign(&self, x: &mut Buffer, y: &Buffer) -> Result<()> {
        check_len("addend", x.len, y.len)?;
        ops_elementwise::add_assign(&self.device, self.mem(x)?, self.mem(y)?, y.len)
    }

    fn add_rms_norm(
        &self,
        x: &mut Buffer,
        y: &Buffer,
        weight: &Buffer,
        width: usize,
        eps: f32,
        offset: f32,
    ) -> Result<Buffer> {
        if self.is_reproducible() {
            self.add_assign(x, y)?;
            return self.rms_norm(x, weight, width, eps, offset);
        }
        let rows = checks::rows("norm input", x.len, width)?;
        check_len("addend", x.len, y.len)?;
        check_len("norm weight", width, weight.len)?;
        let out = self.new_buffer(x.len)?;
        let (x, y, weight, to) = (self.mem(x)?, self.mem(y)?, self.mem(weight)?, self.mem(&out)?);
        ops_norm::add_rms_norm(&self.device, x, y, weight, to, rows, width, eps, offset)?;
        Ok(out)
    }

    fn gather_rows(&self, x: &Buffer, width: usize, rows: &[usize]) -> Result<Buffer> {
        let total = checks::rows("gather input", x.len, width)?;
        let y = self.new_buffer(checks::product("gathered rows", rows.len(), width)?)?;
        ops_elementwise::gather_rows(&self.device, self.mem(x)?, total, width, rows, self.mem(&y)?)?;
        Ok(y)
    }

    fn slice_columns(&self, x: &Buffer, width: usize, range: Range<usize>) -> Result<Buffer> {
        let rows = checks::rows("slice input", x.len, width)?;
        if range.start > range.end || range.end > width {
            return Err(KernelError::Length { what: "column range", expected: width, found: range.end });
        }
        let y = self.new_buffer(rows * range.len())?;
        let (from, to) = (self.mem(x)?, self.mem(&y)?);
        ops_elementwise::slice_columns(&self.device, from, to, rows, width, range.start, range.len())?;
        Ok(y)
    }

    fn soft_cap(&self, x: &mut Buffer, cap: f32) -> Result<()> {
        ops_elementwise::soft_cap(&self.device, self.mem(x)?, x.len, cap)
    }

    fn score(&self, logits: &Buffer, vocab: usize, targets: &[u32]) -> Result<Vec<TokenScore>> {
        checks::targets(self.name(), logits.len, vocab, targets)?;
        ops_score::score(&self.device, self.mem(logits)?, vocab, targets)
    }

    fn argmax(&self, logits: &Buffer, vocab: usize) -> Result<Vec<u32>> {
        let rows = checks::rows("logits", logits.len, vocab)?;
        ops_score::argmax(&self.device, self.mem(logits)?, rows, vocab)
    }

    fn draw(&self, logits: &Buffer, vocab: usize, draws: &[Draw]) -> Result<Vec<u32>> {
        check_len("draws", checks::rows("logits", logits.len, vocab)?, draws.len())?;
        if self.is_reproducible() {
            // The host's exponentials and logarithms decide between arrivals.
            return Ok(draw_rows(&self.download(logits)?, vocab, draws));
        }
        ops_score::draw(&self.device, self.mem(logits)?, vocab, draws)
    }

    fn hessian_update(&self, h: &mut Buffer, x: &Buffer, n: usize) -> Result<()> {
        let tokens = checks::rows("hessian input", x.len, n)?;
        check_len("hessian", checks::product("hessian", n, n)?, h.len)?;
        let fast = ops_hessian::hessian_update;
        let update = if self.is_reproducible() { ops_reproducible::hessian_update } else { fast };
        update(&self.device, self.mem(h)?, self.mem(x)?, tokens, n)
    }

    fn quantize_input(&self, x: &Buffer, width: usize, rule: &InputRule) -> Result<Buffer> {
        let rows = checks::rows("quantized input", x.len, width)?;
        let y = self.new_buffer(x.len)?;
        ops_input::round_input(&self.device, self.mem(x)?, self.mem(&y)?, rows, width, rule)?;
        Ok(y)
    }

    fn rounded_linears(
        &self,
        x: &Buffer,
        rule: &InputRule,
        weights: &[(&WeightHandle, Option<&Buffer>)],
    ) -> Result<Vec<Buffer>> {
        let Some((first, _)) = weights.first() else { return Ok(Vec::new()) };
        match self.code_product(x, rule, weights)? {
            Some(made) => Ok(made),
            None => self.linears(&self.quantize_input(x, first.in_features, rule)?, weights),
        }
    }

    fn abs_max(&self, x: &Buffer) -> Result<f32> {
        ops_elementwise::abs_max(&self.device, self.mem(x)?, x.len)
    }
}
