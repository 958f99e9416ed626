//! A look at a block before anything of it is quantized: how large the channels of each input are.
//!
//! What folds scales into a block (AWQ, SmoothQuant) must know them before the first linear of the block is solved, and the pass that
//! solves sees the input of o only when q, k and v are done. So the block runs once more, with its float weights, on the
//! same inputs. Nothing is carried: each chunk goes through the whole block, and the residual stream stays what it was.
//!
//! Channels are summed on the host, chunk by chunk in order: results depend neither on threads nor on the device's reductions.

use lowbit_kernels::backend::{Backend, Buffer};
use lowbit_model::block::{Block, LinearGroup};

use crate::error::{CalibrationError, Result};
use crate::sequential::{SequentialPass, attend, wrap};
use crate::stats::Accumulator;

/// What the data said about the channels (columns) of one input.
#[derive(Clone, Debug, Default)]
pub struct Channels {
    /// Mean of |x| over tokens, `[n]`.
    pub mean_abs: Vec<f32>,
    /// Largest |x|, `[n]`.
    pub max_abs: Vec<f32>,
    /// `[n, n]`: `Σ x xᵀ / N`, where it was asked for.
    pub hessian: Option<Vec<f32>>,
}

/// Running sums of one input.
struct Sums<'a> {
    group: LinearGroup,
    total: Vec<f64>,
    max: Vec<f32>,
    rows: usize,
    hessian: Option<Accumulator<'a>>,
}

impl<'a> Sums<'a> {
    fn new(b: &'a dyn Backend, block: &Block, group: LinearGroup, hessian: bool) -> Result<Self> {
        let shape = block.shapes().iter().find(|s| s.group == group);
        let n = shape.map_or(block.hidden_size(), |s| s.in_features);
        let hessian = hessian.then(|| Accumulator::new(b, n)).transpose()?;
        Ok(Self { group, total: vec![0.0; n], max: vec![0.0; n], rows: 0, hessian })
    }

    /// Takes in the rows of x `[T, n]`.
    fn update(&mut self, b: &dyn Backend, x: &Buffer) -> Result<()> {
        let n = self.total.len();
        for row in b.download(x)?.chunks_exact(n.max(1)) {
            for ((total, max), v) in self.total.iter_mut().zip(&mut self.max).zip(row) {
                *total += f64::from(v.abs());
                *max = max.max(v.abs());
            }
            self.rows += 1;
        }
        self.hessian.as_mut().map_or(Ok(()), |h| h.update(x, None, None))
    }

    fn finish(self) -> Result<(LinearGroup, Channels)> {
        let rows = self.rows.max(1) as f64;
        let mean_abs = self.total.iter().map(|t| (t / rows) as f32).collect();
        let hessian = self.hessian.map(|h| h.finish().map(|s| s.hessian)).transpose()?;
        Ok((self.group, Channels { mean_abs, max_abs: self.max, hessian }))
    }
}

impl SequentialPass<'_> {
    /// Runs a dense `block` on the carried activations and leaves them as they were. `on_group` gets the channels of q/k/v's, o's,
    /// gate/up's and down's input in this order, with its Hessian where `hessians` asks for it; `tick` is called once a chunk.
    pub fn survey<E: From<CalibrationError>>(
        &mut self,
        block: &Block,
        hessians: bool,
        on_group: &mut dyn FnMut(LinearGroup, Channels) -> std::result::Result<(), E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let b = self.backend;
        let mut attention = Sums::new(b, block, LinearGroup::Attention, hessians)?;
        let mut output = Sums::new(b, block, LinearGroup::Output, hessians)?;
        let mut mlp = Sums::new(b, block, LinearGroup::Mlp, hessians)?;
        let mut down = Sums::new(b, block, LinearGroup::Down, hessians)?;
        for i in 0..self.chunks() {
            let x = self.x.load(i)?;
            attention.update(b, &block.attention_input(b, &x).map_err(wrap)?)?;
            let attended = attend(b, block, &x, &self.segments[i], self.window_tokens, None)?;
            output.update(b, &attended)?;
            let rows: Vec<usize> = (0..x.len / block.hidden_size().max(1)).collect();
            let copied = b.gather_rows(&x, block.hidden_size(), &rows);
            let mut after = copied.map_err(CalibrationError::from)?;
            self.x.restore(i, x)?;
            block.attention_residual(b, &mut after, &attended).map_err(wrap)?;
            let input = block.mlp_input(b, &after).map_err(wrap)?;
            mlp.update(b, &input)?;
            down.update(b, &block.mlp_activation(b, &input).map_err(wrap)?)?;
            tick()?;
        }
        for sums in [attention, output, mlp, down] {
            let (group, channels) = sums.finish()?;
            on_group(group, channels)?;
        }
        Ok(())
    }
}
