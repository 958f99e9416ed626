//! Streaming statistics of a linear's input.

use lowbit_kernels::backend::{Backend, Buffer};

use lowbit_kernels::KernelError;

use crate::error::Result;

/// What the data said about one input.
#[derive(Clone, Debug)]
pub struct InputStats {
    /// Columns.
    pub n: usize,
    /// `[n, n]` symmetric: `Σ x xᵀ / N` over tokens, accumulated in f32.
    pub hessian: Vec<f32>,
    /// Tokens seen.
    pub tokens: u64,
    /// Largest |x|.
    pub abs_max: f32,
}

/// Accumulates [`InputStats`] chunk by chunk on the device.
pub struct HessianAccumulator<'a> {
    backend: &'a dyn Backend,
    h: Buffer,
    n: usize,
    tokens: u64,
    abs_max: f32,
}

impl<'a> HessianAccumulator<'a> {
    /// Starts with zeros for an input of `n` columns.
    pub fn new(backend: &'a dyn Backend, n: usize) -> Result<Self> {
        let len = n.checked_mul(n).ok_or(KernelError::Overflow("Hessian"))?;
        Ok(Self { backend, h: backend.zeros(len)?, n, tokens: 0, abs_max: 0.0 })
    }

    /// Adds the rows of x `[T, n]`.
    pub fn update(&mut self, x: &Buffer) -> Result<()> {
        self.backend.hessian_update(&mut self.h, x, self.n)?;
        self.abs_max = self.abs_max.max(self.backend.abs_max(x)?);
        self.tokens += (x.len / self.n.max(1)) as u64;
        Ok(())
    }

    /// Mirrors the upper triangle, divides by the tokens, and brings the result to the host.
    pub fn finish(self) -> Result<InputStats> {
        let mut h = self.backend.download(&self.h)?;
        let n = self.n;
        let scale = 1.0 / self.tokens.max(1) as f32;
        for i in 0..n {
            for j in i..n {
                let v = h[i * n + j] * scale;
                h[i * n + j] = v;
                h[j * n + i] = v;
            }
        }
        Ok(InputStats { n, hessian: h, tokens: self.tokens, abs_max: self.abs_max })
    }
}
