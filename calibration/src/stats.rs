//! Streaming statistics of a linear's input.

use lowbit_kernels::KernelError;
use lowbit_kernels::backend::{Backend, Buffer};

use crate::error::Result;
use crate::units::Pending;

/// What the data said about one input.
#[derive(Clone, Debug)]
pub struct InputStats {
    /// Columns.
    pub n: usize,
    /// `[n, n]` symmetric: `Σ t² x xᵀ / N` over tokens with weights t (1 unless token weights are on), accumulated in f32.
    pub hessian: Vec<f32>,
    /// Where a float stream ran beside the quantized one.
    pub drift: Option<Drift>,
    /// Tokens seen.
    pub tokens: u64,
    /// Largest |x|, unweighted.
    pub abs_max: f32,
    /// What was mixed in, where the input saw too few tokens of its own.
    pub blend: Option<Blend>,
}

/// Statistics of a starved expert's input, filled up with those of the whole layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blend {
    /// Tokens the expert should have seen.
    pub needed: u64,
    /// Tokens of the whole layer.
    pub layer: u64,
}

impl InputStats {
    /// An expert's own statistics where it saw `needed` tokens or more. With n fewer,
    /// `H = (n · H_own + (needed − n) · H_all) / needed`: as if the missing tokens had been ordinary tokens of the layer. So a
    /// direction that its few tokens happened not to use is not free to be rounded away, what they did use keeps its weight, nothing
    /// jumps at the threshold, and an expert without a token is calibrated on the layer's. Drift is mixed alike.
    #[must_use]
    pub fn blended(mut self, all: &InputStats, needed: u64) -> Self {
        if self.tokens >= needed {
            return self;
        }
        let own = self.tokens as f32 / needed.max(1) as f32;
        let mix = |a: &mut [f32], b: &[f32]| a.iter_mut().zip(b).for_each(|(a, b)| *a = own * *a + (1.0 - own) * b);
        mix(&mut self.hessian, &all.hessian);
        if let (Some(a), Some(b)) = (&mut self.drift, &all.drift) {
            mix(&mut a.input, &b.input);
        }
        self.abs_max = self.abs_max.max(all.abs_max);
        self.blend = Some(Blend { needed, layer: all.tokens });
        self
    }
}

/// How far the quantized model has moved from the float one at an input, seen through the quantized input x_q.
#[derive(Clone, Debug)]
pub struct Drift {
    /// `[n, n]`: `Σ t² (x_f − x_q) x_qᵀ / N`. Summed as a difference, so that it is exactly zero where the streams agree.
    pub input: Vec<f32>,
    /// `[hidden, n]`: `Σ t² (r_f − r_q) x_qᵀ / N`, r the residual stream the linear's output is added to. `None` where
    /// the output is not added as it is.
    pub residual: Option<Vec<f32>>,
}

/// The float stream's side of a chunk.
pub struct FloatSide<'a> {
    /// x_f, like x_q.
    pub input: &'a Buffer,
    /// r_f and r_q `[T, hidden]`.
    pub residuals: Option<(&'a Buffer, &'a Buffer)>,
}

/// Accumulates [`InputStats`] unit by unit on the device; a unit is a fixed number of windows, whatever goes through a block together.
pub struct Accumulator<'a> {
    pub(crate) backend: &'a dyn Backend,
    h: Buffer,
    input_drift: Option<Buffer>,
    residual_drift: Option<(Buffer, usize)>,
    pub(crate) n: usize,
    tokens: u64,
    abs_max: f32,
    /// Rows that wait for the rest of their unit.
    pub(crate) pending: Option<Pending>,
}

impl<'a> Accumulator<'a> {
    /// Starts with zeros for an input of `n` columns.
    pub fn new(backend: &'a dyn Backend, n: usize) -> Result<Self> {
        let h = backend.zeros(square(n, n)?)?;
        Ok(Self { backend, h, input_drift: None, residual_drift: None, n, tokens: 0, abs_max: 0.0, pending: None })
    }

    /// Starts with zeros for two streams; `residual` is the width of the residual stream where that counts.
    pub fn with_float(backend: &'a dyn Backend, n: usize, residual: Option<usize>) -> Result<Self> {
        let input_drift = Some(backend.zeros(square(n, n)?)?);
        let residual_drift = residual
            .map(|w| Ok::<_, crate::error::CalibrationError>((backend.zeros(square(w, n)?)?, w)))
            .transpose()?;
        Ok(Self { input_drift, residual_drift, ..Self::new(backend, n)? })
    }

    /// Adds the rows of x `[T, n]` as one unit, each times its weight (1 without `weights`). `float` is needed by an accumulator
    /// made [`Self::with_float`].
    pub fn update(&mut self, x: &Buffer, float: Option<&FloatSide>, weights: Option<&[f32]>) -> Result<()> {
        let b = self.backend;
        self.abs_max = self.abs_max.max(b.abs_max(x)?);
        let tokens = x.len / self.n.max(1);
        self.tokens += tokens as u64;
        let weighted = match weights {
            Some(t) => {
                let mut copy = b.gather_rows(x, self.n, &(0..tokens).collect::<Vec<_>>())?;
                b.scale_rows(&mut copy, self.n, t)?;
                Some(copy)
            }
            None => None,
        };
        let xq = weighted.as_ref().unwrap_or(x);
        b.hessian_update(&mut self.h, xq, self.n)?;
        let drift = |left: &Buffer, right: &Buffer, width: usize| {
            let mut d = b.subtract(left, right)?;
            if let Some(t) = weights {
                b.scale_rows(&mut d, width, t)?;
            }
            Ok::<_, KernelError>(d)
        };
        if let (Some(sum), Some(f)) = (&mut self.input_drift, float) {
            b.cross_update(sum, &drift(f.input, x, self.n)?, xq, self.n, self.n)?;
        }
        if let (Some((sum, width)), Some((rf, rq))) = (&mut self.residual_drift, float.and_then(|f| f.residuals)) {
            b.cross_update(sum, &drift(rf, rq, *width)?, xq, *width, self.n)?;
        }
        Ok(())
    }

    /// Mirrors the upper triangle, divides by the tokens, and brings the result to the host.
    pub fn finish(mut self) -> Result<InputStats> {
        self.flush()?;
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
        let mean = |sum: &Buffer| -> Result<Vec<f32>> {
            let mut v = self.backend.download(sum)?;
            v.iter_mut().for_each(|v| *v *= scale);
            Ok(v)
        };
        let drift = match &self.input_drift {
            Some(d) => Some(Drift {
                input: mean(d)?,
                residual: self.residual_drift.as_ref().map(|(r, _)| mean(r)).transpose()?,
            }),
            None => None,
        };
        Ok(InputStats { n, hessian: h, drift, tokens: self.tokens, abs_max: self.abs_max, blend: None })
    }
}

fn square(rows: usize, n: usize) -> Result<usize> {
    Ok(rows.checked_mul(n).ok_or(KernelError::Overflow("Hessian"))?)
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::cpu::ScalarBackend;

    use super::*;

    #[test]
    fn a_starved_input_is_filled_up_to_the_tokens_it_needs() {
        let stats = |h: f32, tokens| InputStats {
            n: 1,
            hessian: vec![h],
            drift: Some(Drift { input: vec![-h], residual: None }),
            tokens,
            abs_max: h,
            blend: None,
        };
        let all = stats(8.0, 100);
        let mixed = stats(4.0, 6).blended(&all, 24);
        // Six tokens of 4 and eighteen of 8.
        assert_eq!((mixed.hessian[0], mixed.tokens, mixed.abs_max), (7.0, 6, 8.0));
        assert_eq!((mixed.drift.unwrap().input[0], mixed.blend), (-7.0, Some(Blend { needed: 24, layer: 100 })));
        assert_eq!(stats(0.0, 0).blended(&all, 24).hessian, [8.0]);
        let enough = stats(4.0, 24).blended(&all, 24);
        assert_eq!((enough.hessian[0], enough.blend), (4.0, None));
    }

    #[test]
    fn equals_the_definition_with_weights() {
        let b = ScalarBackend::new();
        let up = |v: &[f32]| b.upload(v).unwrap();
        // Two tokens of two columns; residuals one wide.
        let (xq, xf) = ([1.0, 2.0, 3.0, -1.0], [1.0, 3.0, 3.0, -1.0]);
        let (rq, rf, t) = ([5.0, 1.0], [4.0, 1.0], [2.0, 0.5]);
        let mut a = Accumulator::with_float(&b, 2, Some(1)).unwrap();
        let (xf, rf, rq) = (up(&xf), up(&rf), up(&rq));
        let side = FloatSide { input: &xf, residuals: Some((&rf, &rq)) };
        a.update(&up(&xq), Some(&side), Some(&t)).unwrap();
        let s = a.finish().unwrap();
        // t² x xᵀ: 4·[1 2; 2 4] + 0.25·[9 −3; −3 1], over two tokens.
        assert_eq!(s.hessian, [3.125, 3.625, 3.625, 8.125]);
        let d = s.drift.unwrap();
        // Only token 0 drifts, by (0, 1): 4·(0, 1)ᵀ(1, 2) / 2; its residual by −1.
        assert_eq!(d.input, [0.0, 0.0, 2.0, 4.0]);
        assert_eq!(d.residual.unwrap(), [-2.0, -4.0]);
        assert_eq!((s.tokens, s.abs_max), (2, 3.0));
    }
}
