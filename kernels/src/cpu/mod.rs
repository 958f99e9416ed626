//! The host backends: [`CpuBackend`] (threads and run-time SIMD) and [`ScalarBackend`] (the reference it is compared
//! with).
//!
//! Results never depend on the number of threads or on the rest of the batch. What they do depend on is the phase: prefill
//! keeps one order of additions for any number of tokens, in fixed point of sixteen bits (`fixed.rs`) or in f32 (`product.rs`); decode
//! ([`Backend::decode_phase`]) has loops that read each weight once from memory, and there packed weights meet activations rounded to
//! fifteen bits (`rounded.rs`). [`CpuBackend::exact`] keeps f32 in both.

mod aligned;
mod attention;
mod bandwidth;
pub(crate) mod checks;
mod cross;
mod dense;
mod elementwise;
mod fixed;
mod floats;
mod gemv;
mod hessian;
mod integer;
mod kv;
mod memory;
mod packed;
mod peak;
mod pool;
mod product;
mod reference;
mod rounded;
pub(crate) mod rows;
mod scalar;
mod simd;
mod tiles;

use std::cell::OnceCell;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

pub use bandwidth::read_bandwidth;
use checks::{buffer, host, host_mut};
pub use memory::keep_freed_memory;
pub use peak::{Peak, peak_products};
use pool::Pool;
pub use reference::ScalarBackend;
pub(crate) use scalar::clamped_swiglu;
pub use simd::Level;
use simd::Simd;

use self::dense::DenseWeight;
use self::elementwise::Turns;
use self::floats::FloatMatrix;
use self::kv::Cache;
use self::packed::PackedMatrix;
use crate::activation::InputRule;
use crate::backend::{
    Activation, AttentionShape, Backend, Buffer, Column, HostWeight, KvBuffer, KvFormat, KvUsage, Segment, TokenScore,
    WeightHandle, WeightedRows,
};
use crate::draw::{Draw, draw_rows};
use crate::error::{KernelError, Result, check_len};

const NAME: &str = "cpu";

/// Tokens of a prompt that decode's loops take. Making panels of all weights takes prefill as long as decode takes for a few dozen.
const SHORT_PROMPT: usize = 16;

/// Threads and SIMD: AVX-512, AVX2 or portable inner loops.
pub struct CpuBackend {
    simd: Simd,
    pool: Arc<Pool>,
    exact: bool,
    kv: KvFormat,
    turns: Mutex<Option<Arc<Turns>>>,
    /// The same backend in its decode phase; `None` inside that one.
    decode: Option<Box<CpuBackend>>,
}

enum Weight {
    Dense(DenseWeight),
    Packed(PackedMatrix),
    Float(FloatMatrix),
}

impl Weight {
    fn widen(&self, simd: Simd, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Weight::Dense(w) => w.widen(simd, rows, out),
            Weight::Packed(w) => w.widen(rows, out),
            Weight::Float(w) => w.widen(rows, out),
        }
    }
}

impl CpuBackend {
    /// With the best instruction set of this machine.
    pub fn new() -> Self {
        Self::with_level(Level::Vnni)
    }

    /// With no more than `most` (and no more than the machine has).
    pub fn with_level(most: Level) -> Self {
        let (simd, pool) = (Simd::up_to(most), Arc::new(Pool::new(rayon::current_num_threads())));
        let kv = KvFormat::Float;
        let phase = |decode| Self { simd, pool: pool.clone(), exact: false, kv, turns: Mutex::new(None), decode };
        phase(Some(Box::new(phase(None))))
    }

    /// Keeps f32, slower, where products would round: to fixed point in prefill and calibration, activations to fifteen bits in decode
    /// of packed weights.
    #[must_use]
    pub fn exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        if let Some(decode) = &mut self.decode {
            decode.exact = exact;
        }
        self
    }

    /// Keeps keys and values of caches made from now on in a format.
    #[must_use]
    pub fn with_kv(mut self, kv: KvFormat) -> Self {
        self.kv = kv;
        if let Some(decode) = &mut self.decode {
            decode.kv = kv;
        }
        self
    }

    fn decodes(&self) -> bool {
        self.decode.is_none()
    }

    /// The threads of the decode phase, in it.
    fn decode_pool(&self) -> Option<&Pool> {
        self.decodes().then_some(&*self.pool)
    }

    /// Whether products with these weights read each weight once ([`gemv`]) instead of making panels.
    fn reads_once(&self, weights: &[&Weight]) -> bool {
        self.decodes() && gemv::takes(self.exact, weights)
    }

    /// Prefill's product: `ys[i] = x Wᵢᵀ` for x `[t, k]`, by panels. Activations are rounded once for all of the weights.
    fn panels(&self, weights: &[&Weight], x: &[f32], t: usize, ys: &mut [Vec<f32>]) -> Result<()> {
        let rounded = OnceCell::new();
        let rounded = || rounded.get_or_init(|| fixed::Rows::new(self.simd, x, x.len() / t.max(1)));
        for (w, y) in weights.iter().zip(ys) {
            match w {
                Weight::Dense(w) if !self.exact && w.has_fixed() => w.fixed(self.simd, rounded(), y)?,
                Weight::Packed(w) if !self.exact && w.has_fixed() => w.fixed(self.simd, rounded(), y)?,
                Weight::Dense(w) => w.panels(self.simd, x, t, y)?,
                Weight::Packed(w) => w.panels(self.simd, x, t, y)?,
                Weight::Float(w) => w.panels(self.simd, x, t, y)?,
            }
        }
        Ok(())
    }

    fn attend(
        &self,
        q: &Buffer,
        kv: &KvBuffer,
        shape: &AttentionShape,
        sinks: Option<&[f32]>,
        segments: &[Segment],
    ) -> Result<Buffer> {
        let (q, memory) = (host(NAME, q)?, Cache::of(NAME, kv)?);
        checks::shape(NAME, shape, kv.width)?;
        check_len("cache heads", memory.kv_heads, shape.kv_heads)?;
        let width = checks::product("query width", shape.heads, shape.head_dim)?;
        checks::segments(NAME, "attention", segments, checks::rows("queries", q.len(), width)?)?;
        checks::cached(NAME, "attention", segments, kv)?;
        memory.check_held(NAME, segments)?;
        Ok(buffer(attention::attention(self.simd, self.decode_pool(), q, memory, shape, sinks, segments)?))
    }

    /// Cosines and sines of these positions: those of the last call where it asked for the same, as all layers of a step do.
    fn turns(&self, inv_freq: &[f32], mscale: f32, positions: Vec<Option<usize>>) -> Arc<Turns> {
        let last = || self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turns) = last().as_ref().filter(|t| t.are(inv_freq, mscale, &positions)) {
            return turns.clone();
        }
        // Not under the lock: the threads that share the work may come here with other work of theirs.
        let turns = Arc::new(Turns::new(inv_freq, mscale, positions));
        *last() = Some(turns.clone());
        turns
    }

    /// The instruction set in use.
    pub fn level(&self) -> Level {
        self.simd.level()
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

fn weight(w: &WeightHandle) -> Result<&Weight> {
    w.memory.downcast_ref().ok_or(KernelError::ForeignHandle { backend: NAME, what: "weight" })
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn decode_phase(&self) -> Option<&dyn Backend> {
        self.decode.as_deref().map(|b| b as &dyn Backend)
    }

    fn short_prompt(&self) -> usize {
        SHORT_PROMPT
    }

    fn uploads_in_parallel(&self) -> bool {
        true
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
        let memory = match w {
            HostWeight::Dense { dtype, out_features, in_features, data } => {
                Weight::Dense(DenseWeight::new(*dtype, *out_features, *in_features, data.clone())?)
            }
            HostWeight::Packed(p) => Weight::Packed(PackedMatrix::new(p)?),
            HostWeight::Float(f) => Weight::Float(FloatMatrix::new(f)?),
        };
        Ok(WeightHandle { out_features, in_features, stored_bytes: w.stored_bytes(), memory: Box::new(memory) })
    }

    fn embed(&self, table: &WeightHandle, ids: &[u32], scale: f32) -> Result<Buffer> {
        let w = weight(table)?;
        let width = table.in_features;
        let mut y = vec![0f32; checks::product("embeddings", ids.len(), width)?];
        for (id, row) in ids.iter().zip(y.chunks_exact_mut(width.max(1))) {
            let id = *id as usize;
            checks::below(NAME, "embed", "token id", id, table.out_features)?;
            w.widen(self.simd, id..id + 1, row);
            row.iter_mut().for_each(|v| *v *= scale);
        }
        Ok(buffer(y))
    }

    fn rms_norm(&self, x: &Buffer, weight: &Buffer, width: usize, eps: f32, offset: f32) -> Result<Buffer> {
        let (x, weight) = (host(NAME, x)?, host(NAME, weight)?);
        checks::rows("norm input", x.len(), width)?;
        check_len("norm weight", width, weight.len())?;
        Ok(buffer(elementwise::rms_norm(self.simd, x, weight, width, eps, offset)))
    }

    fn linear(&self, x: &Buffer, w: &WeightHandle, bias: Option<&Buffer>) -> Result<Buffer> {
        let (x, n) = (host(NAME, x)?, w.out_features);
        let t = checks::rows("linear input", x.len(), w.in_features)?;
        let mut y = vec![0f32; checks::product("linear output", t, n)?];
        if y.is_empty() {
            return Ok(buffer(y));
        }
        let inner = weight(w)?;
        if self.reads_once(&[inner]) {
            let mut ys = [y];
            gemv::gemv(self.simd, &self.pool, x, t, &[inner], &mut ys);
            [y] = ys;
        } else {
            self.panels(&[inner], x, t, std::slice::from_mut(&mut y))?;
        }
        if let Some(bias) = bias {
            let bias = host(NAME, bias)?;
            check_len("bias", n, bias.len())?;
            y.chunks_exact_mut(n).for_each(|row| elementwise::add_assign(row, bias));
        }
        Ok(buffer(y))
    }

    fn linears(&self, x: &Buffer, weights: &[(&WeightHandle, Option<&Buffer>)]) -> Result<Vec<Buffer>> {
        let Some((first, _)) = weights.first() else { return Ok(Vec::new()) };
        let t = checks::rows("linear input", x.len, first.in_features)?;
        let inner = weights.iter().map(|(w, _)| weight(w)).collect::<Result<Vec<_>>>()?;
        let alike = weights.iter().all(|(w, bias)| bias.is_none() && w.in_features == first.in_features);
        if t == 0 || !alike {
            return weights.iter().map(|(w, bias)| self.linear(x, w, *bias)).collect();
        }
        let lengths = weights.iter().map(|(w, _)| checks::product("linear output", t, w.out_features));
        let mut ys = lengths.map(|n| n.map(|n| vec![0f32; n])).collect::<Result<Vec<_>>>()?;
        if self.reads_once(&inner) {
            gemv::gemv(self.simd, &self.pool, host(NAME, x)?, t, &inner, &mut ys);
        } else {
            self.panels(&inner, host(NAME, x)?, t, &mut ys)?;
        }
        Ok(ys.into_iter().map(buffer).collect())
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
        let positions = checks::positions(segments, total);
        elementwise::rope(self.simd, x, heads * head_dim, head_dim, &self.turns(inv_freq, mscale, positions));
        Ok(())
    }

    fn kv_cache(&self, slots: usize, capacity: usize, kv_heads: usize, head_dim: usize) -> Result<KvBuffer> {
        Cache::buffer(self.kv, slots, capacity, kv_heads, head_dim)
    }

    fn kv_element_bytes(&self, _head_dim: usize) -> usize {
        // The scale of a token and head aside.
        if self.kv == KvFormat::Float { 4 } else { 1 }
    }

    fn kv_append(&self, cache: &mut KvBuffer, k: &Buffer, v: &Buffer, segments: &[Segment]) -> Result<()> {
        let (k, v) = (host(NAME, k)?, host(NAME, v)?);
        check_len("values", k.len(), v.len())?;
        checks::segments(NAME, "kv_append", segments, checks::rows("keys", k.len(), cache.width)?)?;
        checks::cached(NAME, "kv_append", segments, cache)?;
        Cache::of_mut(NAME, cache)?.append(k, v, segments);
        Ok(())
    }

    fn kv_fork(&self, cache: &mut KvBuffer, from: usize, tokens: usize, to: usize) -> Result<()> {
        checks::fork(NAME, cache, from, tokens, to)?;
        let memory = Cache::of_mut(NAME, cache)?;
        if !memory.holds(from, tokens) {
            let why = format!("slot {from} does not hold {tokens} tokens");
            return Err(KernelError::Unsupported { backend: NAME, op: "kv_fork", why });
        }
        memory.fork(from, tokens, to);
        Ok(())
    }

    fn kv_release(&self, cache: &mut KvBuffer, slot: usize) -> Result<()> {
        checks::below(NAME, "kv_release", "slot", slot, cache.slots)?;
        Cache::of_mut(NAME, cache)?.release(slot);
        Ok(())
    }

    fn kv_usage(&self, cache: &KvBuffer) -> KvUsage {
        Cache::of(NAME, cache).map_or(KvUsage { page_tokens: cache.capacity, pages: cache.slots }, Cache::usage)
    }

    fn attention(&self, q: &Buffer, kv: &KvBuffer, shape: &AttentionShape, segments: &[Segment]) -> Result<Buffer> {
        self.attend(q, kv, shape, None, segments)
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
        self.attend(q, kv, shape, Some(sinks), segments)
    }

    fn clamped_swiglu(&self, gate: &Buffer, up: &Buffer, alpha: f32, limit: f32) -> Result<Buffer> {
        let (gate, up) = (host(NAME, gate)?, host(NAME, up)?);
        check_len("up", gate.len(), up.len())?;
        Ok(buffer(elementwise::clamped_swiglu(self.simd, gate, up, alpha, limit)))
    }

    fn activation_mul(&self, gate: &Buffer, up: &Buffer, act: Activation) -> Result<Buffer> {
        let (gate, up) = (host(NAME, gate)?, host(NAME, up)?);
        check_len("up", gate.len(), up.len())?;
        Ok(buffer(elementwise::activation_mul(self.simd, self.decode_pool(), gate, up, act)))
    }

    fn add_assign(&self, x: &mut Buffer, y: &Buffer) -> Result<()> {
        let (x, y) = (host_mut(NAME, x)?, host(NAME, y)?);
        check_len("addend", x.len(), y.len())?;
        elementwise::add_assign(x, y);
        Ok(())
    }

    fn gather_rows(&self, x: &Buffer, width: usize, rows: &[usize]) -> Result<Buffer> {
        Ok(buffer(checks::gather(NAME, host(NAME, x)?, width, rows)?))
    }

    fn slice_columns(&self, x: &Buffer, width: usize, range: Range<usize>) -> Result<Buffer> {
        Ok(buffer(checks::columns(host(NAME, x)?, width, range)?))
    }

    fn soft_cap(&self, x: &mut Buffer, cap: f32) -> Result<()> {
        elementwise::soft_cap(host_mut(NAME, x)?, cap);
        Ok(())
    }

    fn score(&self, logits: &Buffer, vocab: usize, targets: &[u32]) -> Result<Vec<TokenScore>> {
        let logits = host(NAME, logits)?;
        checks::targets(NAME, logits.len(), vocab, targets)?;
        Ok(elementwise::score(self.simd, logits, vocab, targets))
    }

    fn argmax(&self, logits: &Buffer, vocab: usize) -> Result<Vec<u32>> {
        let logits = host(NAME, logits)?;
        checks::rows("logits", logits.len(), vocab)?;
        Ok(elementwise::argmax(self.simd, logits, vocab))
    }

    fn draw(&self, logits: &Buffer, vocab: usize, draws: &[Draw]) -> Result<Vec<u32>> {
        let logits = host(NAME, logits)?;
        check_len("draws", checks::rows("logits", logits.len(), vocab)?, draws.len())?;
        Ok(draw_rows(logits, vocab, draws))
    }

    fn hessian_update(&self, h: &mut Buffer, x: &Buffer, n: usize) -> Result<()> {
        let (h, x) = (host_mut(NAME, h)?, host(NAME, x)?);
        checks::rows("hessian input", x.len(), n)?;
        check_len("hessian", checks::product("hessian", n, n)?, h.len())?;
        hessian::update(self.simd, h, x, n, self.exact)
    }

    fn cross_update(&self, h: &mut Buffer, x: &Buffer, y: &Buffer, m: usize, n: usize) -> Result<()> {
        let (h, x, y) = (host_mut(NAME, h)?, host(NAME, x)?, host(NAME, y)?);
        let t = checks::rows("cross input", x.len(), m)?;
        check_len("cross input", checks::product("cross input", t, n)?, y.len())?;
        check_len("cross product", checks::product("cross product", m, n)?, h.len())?;
        hessian::cross(self.simd, h, x, y, (m, n), self.exact)
    }

    fn quantize_input(&self, x: &Buffer, width: usize, rule: &InputRule) -> Result<Buffer> {
        floats::quantize_input(host(NAME, x)?, width, rule).map(buffer)
    }

    fn subtract(&self, x: &Buffer, y: &Buffer) -> Result<Buffer> {
        cross::subtract(host(NAME, x)?, host(NAME, y)?).map(buffer)
    }

    fn scale_rows(&self, x: &mut Buffer, width: usize, factors: &[f32]) -> Result<()> {
        cross::scale_rows(host_mut(NAME, x)?, width, factors)
    }

    fn mean_squares(&self, x: &Buffer, width: usize) -> Result<Vec<f32>> {
        cross::mean_squares(host(NAME, x)?, width)
    }

    fn add_weighted_rows(&self, y: &mut Buffer, width: usize, parts: &[WeightedRows<'_>]) -> Result<()> {
        let y = host_mut(NAME, y)?;
        parts.iter().try_for_each(|p| rows::add_weighted(NAME, y, width, host(NAME, p.x)?, p.rows, p.factors))
    }

    fn assemble_columns(&self, parts: &[(&Buffer, usize)], columns: &[Option<Column>]) -> Result<Buffer> {
        let views = parts.iter().map(|(x, w)| Ok((host(NAME, x)?, *w))).collect::<Result<Vec<_>>>()?;
        rows::assemble(NAME, &views, columns).map(buffer)
    }
}
