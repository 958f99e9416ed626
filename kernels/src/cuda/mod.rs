//! The GPU backend: one set of kernels and launchers over a [`Device`] that is a CUDA GPU or its emulation.
//!
//! The kernels under `src/` are compiled by NVRTC for the GPU and by the host's C++ compiler for the emulator.
//! Activations, caches and weights stay on the device; the host sends token ids, targets and, once a forward pass,
//! the slot and position of each row. The device finishes what it was given only when something is copied back.
//!
//! Results do not depend on the rest of the batch, with limits: a product of more than eight tokens, one of more than 32, and
//! attention in a call of more than single tokens, may round differently from smaller ones; so may products of different
//! numbers of tokens from 33 on in [`Arithmetic::Half`].
//!
//! One file, because it is one implementation of a trait, a method an operation; launchers are in `ops_*`.

pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
#[cfg(feature = "emulated")]
mod emulated;
#[cfg(feature = "cuda")]
mod graph;
mod kv_fork;
#[cfg(feature = "cuda")]
mod module;
#[cfg(feature = "cuda")]
pub mod nvrtc;
mod ops_attention;
mod ops_elementwise;
mod ops_embed;
mod ops_factor;
mod ops_gptq;
mod ops_hessian;
mod ops_input;
mod ops_linear;
mod ops_narrow;
mod ops_norm;
mod ops_random;
mod ops_reproducible;
mod ops_rope;
mod ops_score;
mod ops_wide;
#[cfg(feature = "cuda")]
pub mod ptx;
mod rows;
mod steps;
mod weights;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

pub use device::{Arg, Device, Launch, Memory};
#[cfg(feature = "emulated")]
pub use emulated::EmulatorOptions;
#[cfg(feature = "cuda")]
pub use nvrtc::{Compiled, DeviceOptions, compile};

use self::ops_attention::DecodeScratch;
use self::ops_embed::{Ids, PackedTable};
use self::ops_reproducible::Turns;
use self::ops_rope::CacheView;
use self::rows::{RowTable, bytes_of, floats_of};
use self::steps::{GpuSteps, StepInputs};
use self::weights::{DeviceWeight, Layout};
use crate::activation::InputRule;
use crate::backend::{
    Activation, AttentionShape, Backend, Buffer, FloatType, HostWeight, KvBuffer, Segment, Steps, TokenScore,
    WeightHandle,
};
use crate::cpu::checks;
use crate::draw::{Draw, draw};
use crate::error::{KernelError, Result, check_len};
use crate::random::RandomWeight;
use crate::solver::Solver;

/// f32 elements on the device.
pub struct GpuBuffer {
    /// `len` f32.
    pub memory: Memory,
}

/// Keys and values, `[slots, kv_heads, capacity, head_dim]` each.
struct Cache {
    keys: Memory,
    values: Memory,
    dtype: FloatType,
    kv_heads: usize,
    head_dim: usize,
}

/// How the products of the graph are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// As [`Arithmetic::Fast`], but a tensor core reads activations rounded to bf16 (half to even), as 16-bit engines
    /// do; sums are f32. For speed, where 8 bits of an activation are enough. Hessians stay accurate to f32.
    Half,
    /// Tensor cores and sums in parts: the fast kernels, equal to the CPU to f32 rounding.
    Fast,
    /// The CPU backend's order of f32 operations (`reproducible.cu`): the same bits in products, norms, rotations,
    /// attention, SiLU and Hessians, so that calibration gives the same codes. On the ordinary cores, so slower.
    Reproducible,
}

impl Arithmetic {
    /// As written on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::Half => "half",
            Arithmetic::Fast => "fast",
            Arithmetic::Reproducible => "reproducible",
        }
    }

    /// bf16 terms that a tensor core reads an activation as: 1 is a rounding, 3 hold every bit of an f32.
    pub fn terms(self) -> u32 {
        if self == Arithmetic::Half { 1 } else { 3 }
    }
}

/// Every operation as a kernel launch on one [`Device`].
pub struct GpuBackend {
    device: Arc<Device>,
    arithmetic: Arithmetic,
    /// Slots and positions of the last call: every layer of a forward pass asks for the same.
    rows: Mutex<Option<Arc<RowTable>>>,
    /// Rotary frequencies seen: one or two a model. Recorded steps read them, so they are kept.
    frequencies: Mutex<Vec<Arc<Frequencies>>>,
    /// Rotations of the last call, likewise; reproducible arithmetic only.
    turns: Mutex<Option<Arc<RowTurns>>>,
    /// The step under way, whose ids, slots and positions are on the device.
    step: Mutex<Option<Arc<StepInputs>>>,
    records: bool,
    /// Of narrow products with splits.
    counters: ops_narrow::Counters,
    /// Parts of decode attention.
    scratch: DecodeScratch,
}

/// What [`Turns`] were made of.
struct RowTurns {
    rows: Arc<RowTable>,
    inv_freq: Vec<f32>,
    mscale: f32,
    turns: Turns,
}

struct Frequencies {
    host: Vec<f32>,
    memory: Memory,
}

impl GpuBackend {
    /// On a device, which other backends may share, with fast arithmetic.
    pub fn new(device: Arc<Device>) -> Self {
        let (rows, turns, step) = (Mutex::new(None), Mutex::new(None), Mutex::new(None));
        let (arithmetic, frequencies) = (Arithmetic::Fast, Mutex::default());
        let (counters, scratch) = Default::default();
        Self { device, arithmetic, rows, frequencies, turns, step, records: true, counters, scratch }
    }

    /// The same with another order of sums.
    #[must_use]
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.arithmetic = arithmetic;
        self
    }

    /// Whether decode steps are recorded and repeated (fast arithmetic only; on by default).
    #[must_use]
    pub fn with_recorded_steps(mut self, on: bool) -> Self {
        self.records = on;
        self
    }

    /// Keys and values are bf16 in half arithmetic, where attention has the kernels.
    fn cache_dtype(&self, head_dim: usize) -> FloatType {
        let half = self.arithmetic == Arithmetic::Half && ops_attention::has_half(head_dim);
        if half { FloatType::Bf16 } else { FloatType::F32 }
    }

    /// The order of sums.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    fn is_reproducible(&self) -> bool {
        self.arithmetic == Arithmetic::Reproducible
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// `len` elements with undefined contents.
    fn new_buffer(&self, len: usize) -> Result<Buffer> {
        Ok(buffer(len, self.device.alloc(checks::product("buffer", len, 4)?)?))
    }

    fn foreign(&self, what: &'static str) -> KernelError {
        KernelError::ForeignHandle { backend: self.device.name(), what }
    }

    fn mem<'a>(&self, x: &'a Buffer) -> Result<&'a Memory> {
        Ok(&x.memory.downcast_ref::<GpuBuffer>().ok_or_else(|| self.foreign("buffer"))?.memory)
    }

    fn weight<'a>(&self, w: &'a WeightHandle) -> Result<&'a DeviceWeight> {
        w.memory.downcast_ref().ok_or_else(|| self.foreign("weight"))
    }

    fn cache<'a>(&self, kv: &'a KvBuffer) -> Result<CacheView<'a>> {
        let c: &Cache = kv.memory.downcast_ref().ok_or_else(|| self.foreign("cache"))?;
        Ok(CacheView {
            keys: &c.keys,
            values: &c.values,
            dtype: c.dtype,
            kv_heads: c.kv_heads,
            capacity: kv.capacity,
            head_dim: c.head_dim,
        })
    }

    /// Takes ids, slots and positions from `step` from now on; the one before.
    fn set_step(&self, step: Option<Arc<StepInputs>>) -> Option<Arc<StepInputs>> {
        std::mem::replace(&mut *self.step.lock().unwrap_or_else(PoisonError::into_inner), step)
    }

    fn step(&self) -> Option<Arc<StepInputs>> {
        self.step.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the kernels for few tokens take these weights in one launch.
    fn in_one_launch(&self, x: &Buffer, weights: &[(&WeightHandle, Option<&Buffer>)]) -> Result<bool> {
        let Some((first, _)) = weights.first().filter(|_| !self.is_reproducible()) else { return Ok(false) };
        let tokens = checks::rows("linear input", x.len, first.in_features)?;
        let weights = weights.iter().map(|(w, _)| self.weight(w)).collect::<Result<Vec<_>>>()?;
        Ok(ops_narrow::takes(&weights, tokens, self.arithmetic.terms()))
    }

    /// The product of x with one weight, or with several that go in one launch.
    fn product(&self, x: &Buffer, weights: &[(&WeightHandle, Option<&Buffer>)]) -> Result<Vec<Buffer>> {
        let Some((first, _)) = weights.first() else { return Ok(Vec::new()) };
        let tokens = checks::rows("linear input", x.len, first.in_features)?;
        let y = |(w, _): &(&WeightHandle, Option<&Buffer>)| {
            self.new_buffer(checks::product("linear output", tokens, w.out_features)?)
        };
        let made = weights.iter().map(y).collect::<Result<Vec<_>>>()?;
        let (d, terms, narrow) = (&self.device, self.arithmetic.terms(), self.in_one_launch(x, weights)?);
        let mut outputs = Vec::with_capacity(weights.len());
        for ((w, bias), y) in weights.iter().zip(&made) {
            let bias = bias.map(|b| self.mem(b)).transpose()?;
            outputs.push(ops_narrow::Output { weight: self.weight(w)?, bias, y: self.mem(y)? });
        }
        let x = self.mem(x)?;
        if narrow {
            ops_narrow::linears(d, &self.counters, x, &outputs, tokens, terms)?;
            return Ok(made);
        }
        for o in &outputs {
            if self.is_reproducible() {
                ops_reproducible::linear(d, x, o.weight, o.bias, o.y, tokens)?;
            } else {
                ops_linear::linear(d, x, o.weight, o.bias, o.y, tokens, terms)?;
            }
        }
        Ok(made)
    }

    /// Slots and positions of a call's rows, on the device.
    fn rows(&self, segments: &[Segment], total: usize) -> Result<Arc<RowTable>> {
        if let Some(step) = self.step().filter(|s| s.table.is_of(segments, total)) {
            return Ok(step.table.clone());
        }
        let mut last = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = last.as_ref().filter(|t| t.is_of(segments, total)) {
            return Ok(table.clone());
        }
        let table = Arc::new(RowTable::new(&self.device, segments, total)?);
        *last = Some(table.clone());
        Ok(table)
    }

    /// Cosines and sines of a call's rows, computed on the host as the CPU backend does.
    fn turns(
        &self,
        rows: &Arc<RowTable>,
        segments: &[Segment],
        inv_freq: &[f32],
        mscale: f32,
    ) -> Result<Arc<RowTurns>> {
        let mut last = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |t: &&Arc<RowTurns>| {
            Arc::ptr_eq(&t.rows, rows) && t.inv_freq == inv_freq && t.mscale.to_bits() == mscale.to_bits()
        };
        if let Some(turns) = last.as_ref().filter(same) {
            return Ok(turns.clone());
        }
        let half = inv_freq.len();
        let len = checks::product("rotations", rows.total(), half)?;
        let (mut cosines, mut sines) = (vec![0f32; len], vec![0f32; len]);
        for (row, position) in segments.iter().flat_map(|s| (0..s.tokens).map(move |i| (s.row + i, s.past + i))) {
            for (i, f) in inv_freq.iter().enumerate() {
                let angle = position as f32 * f;
                (cosines[row * half + i], sines[row * half + i]) = (angle.cos() * mscale, angle.sin() * mscale);
            }
        }
        let (cosines, sines) = (self.device.upload(&bytes_of(&cosines))?, self.device.upload(&bytes_of(&sines))?);
        let turns = Turns { cosines, sines, half };
        let made = Arc::new(RowTurns { rows: rows.clone(), inv_freq: inv_freq.to_vec(), mscale, turns });
        *last = Some(made.clone());
        Ok(made)
    }

    fn frequencies(&self, inv_freq: &[f32]) -> Result<Arc<Frequencies>> {
        let mut seen = self.frequencies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(f) = seen.iter().find(|f| f.host == inv_freq) {
            return Ok(f.clone());
        }
        let memory = self.device.upload(&bytes_of(inv_freq))?;
        let f = Arc::new(Frequencies { host: inv_freq.to_vec(), memory });
        seen.push(f.clone());
        Ok(f)
    }
}

/// Wraps device storage.
fn buffer(len: usize, memory: Memory) -> Buffer {
    Buffer { len, memory: Box::new(GpuBuffer { memory }) }
}

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
            let host = self.download(logits)?;
            return Ok(host.chunks_exact(vocab).zip(draws).map(|(row, d)| draw(row, d)).collect());
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

    fn abs_max(&self, x: &Buffer) -> Result<f32> {
        ops_elementwise::abs_max(&self.device, self.mem(x)?, x.len)
    }
}
