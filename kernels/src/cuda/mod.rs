//! The GPU backend: one set of kernels and launchers over a [`Device`] that is a CUDA GPU or its emulation.
//!
//! The kernels under `src/` are compiled by NVRTC for the GPU and by the host's C++ compiler for the emulator.
//! Activations, caches and weights stay on the device; the host sends token ids, targets and, once a forward pass,
//! the slot and position of each row. The device finishes what it was given only when something is copied back.
//!
//! Results do not depend on the rest of the batch, with limits: a product of more than eight tokens, one of more than 32 (but where both
//! sides are int8 codes: there sums are exact), and
//! attention in a call of more than single tokens, may round differently from smaller ones; so may products of different
//! numbers of tokens from 33 on in [`Arithmetic::Half`].
//!
//! Here is what a backend holds; `operations.rs` is its implementation of the trait, a method an operation; launchers are in `ops_*`.

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
mod operations;
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
mod ops_w8a8;
mod ops_wide;
#[cfg(feature = "cuda")]
pub mod ptx;
mod rows;
mod steps;
mod weights;

use std::sync::{Arc, Mutex, PoisonError};

pub use device::{Arg, Device, Launch, Memory};
#[cfg(feature = "emulated")]
pub use emulated::EmulatorOptions;
#[cfg(feature = "cuda")]
pub use nvrtc::{Compiled, DeviceOptions, compile};

use self::ops_attention::DecodeScratch;
use self::ops_reproducible::Turns;
use self::ops_rope::CacheView;
use self::rows::{RowTable, bytes_of};
use self::steps::StepInputs;
use self::weights::DeviceWeight;
use crate::activation::InputRule;
use crate::backend::{Buffer, FloatType, KvBuffer, Segment, WeightHandle};
use crate::cpu::checks;
use crate::error::{KernelError, Result};

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
        let made = self.new_outputs(tokens, weights)?;
        let (d, terms, narrow) = (&self.device, self.arithmetic.terms(), self.in_one_launch(x, weights)?);
        let (x, outputs) = (self.mem(x)?, self.outputs(weights, &made)?);
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

    /// The product of x, rounded to codes, with weights of codes, where [`ops_w8a8`] has the kernels; in reproducible arithmetic it is
    /// the CPU's.
    fn code_product(
        &self,
        x: &Buffer,
        rule: &InputRule,
        weights: &[(&WeightHandle, Option<&Buffer>)],
    ) -> Result<Option<Vec<Buffer>>> {
        let Some((first, _)) = weights.first().filter(|_| !self.is_reproducible()) else { return Ok(None) };
        let held = weights.iter().map(|(w, _)| self.weight(w)).collect::<Result<Vec<_>>>()?;
        if !ops_w8a8::takes(&held, rule) {
            return Ok(None);
        }
        let tokens = checks::rows("linear input", x.len, first.in_features)?;
        let made = self.new_outputs(tokens, weights)?;
        ops_w8a8::linears(&self.device, self.mem(x)?, rule, &self.outputs(weights, &made)?, tokens)?;
        Ok(Some(made))
    }

    /// A result for each weight.
    fn new_outputs(&self, tokens: usize, weights: &[(&WeightHandle, Option<&Buffer>)]) -> Result<Vec<Buffer>> {
        let y = |(w, _): &(&WeightHandle, Option<&Buffer>)| {
            self.new_buffer(checks::product("linear output", tokens, w.out_features)?)
        };
        weights.iter().map(y).collect()
    }

    /// Weights with their biases and results, as launchers take them.
    fn outputs<'a>(
        &self,
        weights: &[(&'a WeightHandle, Option<&'a Buffer>)],
        made: &'a [Buffer],
    ) -> Result<Vec<ops_narrow::Output<'a>>> {
        let output = |(&(w, bias), y): (&(&'a WeightHandle, Option<&'a Buffer>), &'a Buffer)| {
            let bias = bias.map(|b| self.mem(b)).transpose()?;
            Ok::<_, KernelError>(ops_narrow::Output { weight: self.weight(w)?, bias, y: self.mem(y)? })
        };
        weights.iter().zip(made).map(output).collect()
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
