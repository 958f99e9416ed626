//! One row, set up on a device and timed.

use std::time::{Duration, Instant};

use lowbit_kernels::activation::InputRule;
use lowbit_kernels::backend::{AttentionShape, Backend, Buffer, KvBuffer, Segment, WeightHandle};
use lowbit_kernels::solver::{DampedHessian, GptqTask, Solver};
use lowbit_kernels::{GroupSize, KernelError, ScaleType, Scheme};

use super::SuiteOptions;
use super::cost::{GROUP, Kernel};
use super::data;
use crate::error::{BenchError, Result};

/// Copies of operands at most.
const COPIES: u64 = 256;

/// Operands on the device; calls take turns on their copies.
enum Operands {
    Linear { x: Buffer, input: Option<InputRule> },
    RmsNorm { x: Vec<Buffer>, gain: Buffer, width: usize },
    Attention { q: Buffer, caches: Vec<KvBuffer>, shape: AttentionShape, segments: Vec<Segment> },
    Hessian { h: Buffer, x: Buffer, n: usize },
    Factor(Triangle),
    Gptq { w: Vec<f32>, u: Buffer, of: Triangle },
    Add { x: Buffer, y: Buffer },
    Copy { x: Buffer, n: usize },
}

/// A Hessian without anything off its diagonal: a solver's time does not depend on the values.
struct Triangle {
    h: Buffer,
    n: usize,
    perm: Vec<usize>,
    diag: Vec<f32>,
}

impl Triangle {
    fn new(backend: &dyn Backend, n: usize) -> Result<Self> {
        Ok(Self { h: backend.zeros(n * n)?, n, perm: (0..n).collect(), diag: vec![1.0; n] })
    }

    fn factor(&self, backend: &dyn Backend) -> Result<Buffer> {
        let Self { h, n, perm, diag } = self;
        let made = solver(backend)?.factor(&DampedHessian { h, n: *n, perm, diag, damped: diag })?;
        match made {
            Some(Ok(u)) => Ok(u),
            _ => Err(unsupported(backend, "factor", "it is the host's in this arithmetic").into()),
        }
    }

    fn solve(&self, backend: &dyn Backend, w: &[f32], u: &Buffer) -> Result<()> {
        let (scheme, n) = (Scheme { bits: 4, symmetric: true, group: GroupSize::Cols(GROUP) }, self.n);
        solver(backend)?.gptq(&GptqTask {
            w,
            out_features: w.len() / n.max(1),
            n,
            u,
            perm: &self.perm,
            diag: &self.diag,
            scheme,
            scale_type: ScaleType::Bf16,
            first_percent: Some(50),
            signed_scales: true,
            min_zero: 0,
            block: 128,
        })?;
        Ok(())
    }
}

fn solver(backend: &dyn Backend) -> Result<&dyn Solver> {
    Ok(backend.solver().ok_or_else(|| unsupported(backend, "gptq", "it has no solver of its own"))?)
}

fn unsupported(backend: &dyn Backend, op: &'static str, why: &str) -> KernelError {
    KernelError::Unsupported { backend: backend.name(), op, why: why.into() }
}

/// Weights of the current linear: rows of the same weight share them.
#[derive(Default)]
pub struct Weights {
    key: Option<(super::Format, usize, usize)>,
    handles: Vec<WeightHandle>,
}

impl Weights {
    /// Uploads the weight of `kernel` unless it is there; the one before it is dropped first.
    fn prepare(&mut self, backend: &dyn Backend, kernel: &Kernel, options: &SuiteOptions) -> Result<()> {
        let Kernel::Linear { format, out, cols, .. } = *kernel else {
            *self = Self::default();
            return Ok(());
        };
        if self.key == Some((format, out, cols)) {
            return Ok(());
        }
        *self = Self::default();
        let host = data::weight(format, out, cols);
        let copies = copies(options.cold_bytes, format.weight_bytes(out, cols));
        self.handles = (0..copies).map(|_| backend.upload_weight(&host)).collect::<std::result::Result<_, _>>()?;
        self.key = Some((format, out, cols));
        Ok(())
    }
}

fn copies(cold_bytes: u64, bytes: u64) -> usize {
    cold_bytes.div_ceil(bytes.max(1)).clamp(1, COPIES) as usize
}

/// A row ready to run.
pub struct Work<'a> {
    backend: &'a dyn Backend,
    weights: &'a Weights,
    operands: Operands,
    next: usize,
}

/// Times of a row.
pub struct Times {
    /// Copies the calls took turns on.
    pub copies: usize,
    /// Calls of a sample.
    pub calls: usize,
    /// Nanoseconds a call.
    pub samples_ns: Vec<f64>,
}

impl<'a> Work<'a> {
    /// Makes and uploads the operands.
    pub fn new(
        backend: &'a dyn Backend,
        weights: &'a mut Weights,
        kernel: &Kernel,
        options: &SuiteOptions,
    ) -> Result<Self> {
        weights.prepare(backend, kernel, options)?;
        let up = |n: usize| backend.upload(&data::floats(n));
        let operands = match *kernel {
            Kernel::Linear { format, cols, tokens, .. } => {
                Operands::Linear { x: up(tokens * cols)?, input: format.input() }
            }
            Kernel::RmsNorm { tokens, width } => {
                let one = data::floats(tokens * width);
                let x = (0..copies(options.cold_bytes, 4 * one.len() as u64)).map(|_| backend.upload(&one));
                Operands::RmsNorm { x: x.collect::<std::result::Result<_, _>>()?, gain: up(width)?, width }
            }
            Kernel::AttentionDecode { batch, context, heads, kv_heads, head_dim, .. } => {
                let scale = 1.0 / (head_dim as f32).sqrt();
                let shape = AttentionShape { heads, kv_heads, head_dim, scale, window: None, soft_cap: None };
                let segments =
                    (0..batch).map(|slot| Segment { slot, row: slot, tokens: 1, past: context - 1 }).collect();
                let caches = caches(backend, kernel.bytes(), options, batch, context, kv_heads, head_dim)?;
                Operands::Attention { q: up(batch * heads * head_dim)?, caches, shape, segments }
            }
            Kernel::AttentionPrefill { tokens, heads, kv_heads, head_dim, .. } => {
                let scale = 1.0 / (head_dim as f32).sqrt();
                let shape = AttentionShape { heads, kv_heads, head_dim, scale, window: None, soft_cap: None };
                let segments = vec![Segment { slot: 0, row: 0, tokens, past: 0 }];
                let caches = caches(backend, kernel.bytes(), options, 1, tokens, kv_heads, head_dim)?;
                Operands::Attention { q: up(tokens * heads * head_dim)?, caches, shape, segments }
            }
            Kernel::Hessian { tokens, n } => Operands::Hessian { h: backend.zeros(n * n)?, x: up(tokens * n)?, n },
            Kernel::Factor { n } => Operands::Factor(Triangle::new(backend, n)?),
            Kernel::Gptq { out, n } => {
                let of = Triangle::new(backend, n)?;
                Operands::Gptq { w: data::floats(out * n), u: of.factor(backend)?, of }
            }
            Kernel::Add { n } => Operands::Add { x: up(n)?, y: up(n)? },
            Kernel::Copy { n } => Operands::Copy { x: up(n)?, n },
        };
        Ok(Self { backend, weights, operands, next: 0 })
    }

    /// Sets of operands.
    fn copies(&self) -> usize {
        match &self.operands {
            Operands::Linear { .. } => self.weights.handles.len(),
            Operands::RmsNorm { x, .. } => x.len(),
            Operands::Attention { caches, .. } => caches.len(),
            Operands::Hessian { .. } | Operands::Factor(_) | Operands::Gptq { .. } => 1,
            Operands::Add { .. } | Operands::Copy { .. } => 1,
        }
    }

    /// Starts one call; its result, unless that is an operand.
    fn call(&mut self) -> Result<Option<Buffer>> {
        let (b, turn) = (self.backend, self.next % self.copies().max(1));
        self.next += 1;
        Ok(match &mut self.operands {
            Operands::Linear { x, input: None } => Some(b.linear(x, &self.weights.handles[turn], None)?),
            Operands::Linear { x, input: Some(rule) } => {
                b.rounded_linears(x, rule, &[(&self.weights.handles[turn], None)])?.pop()
            }
            Operands::RmsNorm { x, gain, width } => Some(b.rms_norm(&x[turn], gain, *width, 1e-5, 0.0)?),
            Operands::Attention { q, caches, shape, segments } => {
                Some(b.attention(q, &caches[turn], shape, segments)?)
            }
            Operands::Hessian { h, x, n } => {
                b.hessian_update(h, x, *n)?;
                None
            }
            Operands::Factor(of) => Some(of.factor(b)?),
            Operands::Gptq { w, u, of } => {
                of.solve(b, w, u)?;
                None
            }
            Operands::Add { x, y } => {
                b.add_assign(x, y)?;
                None
            }
            Operands::Copy { x, n } => Some(b.slice_columns(x, *n, 0..*n)?),
        })
    }

    /// `calls` calls, and the wait for the last.
    fn sample(&mut self, calls: usize) -> Result<Duration> {
        let start = Instant::now();
        let mut last = None;
        for _ in 0..calls {
            last = self.call()?;
        }
        let result = match (&last, &self.operands) {
            (Some(made), _) => made,
            (None, Operands::Hessian { h: x, .. } | Operands::Gptq { u: x, .. } | Operands::Add { x, .. }) => x,
            (None, _) => return Err(BenchError::Zero("the number of calls")),
        };
        std::hint::black_box(self.backend.download_range(result, 0..1)?);
        Ok(start.elapsed())
    }

    /// Warms up, finds how many calls make a sample, and takes the samples.
    pub fn time(&mut self, name: &str, options: &SuiteOptions) -> Result<Times> {
        self.sample(1)?;
        // The wait costs as much as several short calls: it is taken off, and the second guess has most of it spread.
        let mut calls = 1;
        for _ in 0..2 {
            let per_call = self.sample(calls)?.as_secs_f64() / calls as f64;
            let wanted = options.sample.as_secs_f64() / per_call.max(1e-9);
            calls = (wanted.ceil() as usize).clamp(1, options.calls.max(1));
        }
        let mut samples_ns = Vec::with_capacity(options.repetitions);
        for _ in 0..options.repetitions {
            let time = self.sample(calls)?;
            if time.is_zero() {
                return Err(BenchError::ZeroTime { test: name.to_string(), role: "device" });
            }
            samples_ns.push(time.as_secs_f64() * 1e9 / calls as f64);
        }
        Ok(Times { copies: self.copies(), calls, samples_ns })
    }
}

/// Full caches, as many as it takes; like the layers of a model they share slots and positions.
fn caches(
    backend: &dyn Backend,
    bytes: u64,
    options: &SuiteOptions,
    slots: usize,
    context: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<Vec<KvBuffer>> {
    let (k, v) = {
        let one = data::floats(context * kv_heads * head_dim);
        (backend.upload(&one)?, backend.upload(&one)?)
    };
    (0..copies(options.cold_bytes, bytes))
        .map(|_| {
            let mut cache = backend.kv_cache(slots, context, kv_heads, head_dim)?;
            for slot in 0..slots {
                backend.kv_append(&mut cache, &k, &v, &[Segment { slot, row: 0, tokens: context, past: 0 }])?;
            }
            Ok(cache)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_fill_the_cold_bytes() {
        assert_eq!(copies(512 << 20, 2_000_000_000), 1);
        assert_eq!(copies(512 << 20, 8_650_752), 63);
        assert_eq!(copies(512 << 20, 1), 256);
        assert_eq!(copies(0, 7), 1);
    }
}
