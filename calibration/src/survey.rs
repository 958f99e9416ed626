//! A look at a block before anything of it is quantized: how large the channels of each input are.
//!
//! What folds scales into a block (AWQ, SmoothQuant) must know them before the first linear of the block is solved, and the pass that
//! solves sees the input of o only when q, k and v are done. So the block runs once more, with its float weights, on the
//! same inputs. Nothing is carried: each chunk goes through the whole block, and the residual stream stays what it was.
//!
//! Channels are summed on the host, row by row in order: results depend neither on threads, nor on batches, nor on the device's reductions.

use lowbit_kernels::backend::Backend;
use lowbit_model::block::{Block, LinearGroup};

use crate::error::{CalibrationError, Result};
use crate::lanes::{Chunk, Seen};
use crate::sequential::{SequentialPass, attend};
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

    /// Takes in the rows of a chunk.
    fn update(&mut self, b: &dyn Backend, seen: &Seen<'_>) -> Result<()> {
        let n = self.total.len();
        for row in b.download(seen.input)?.chunks_exact(n.max(1)) {
            for ((total, max), v) in self.total.iter_mut().zip(&mut self.max).zip(row) {
                *total += f64::from(v.abs());
                *max = max.max(v.abs());
            }
            self.rows += 1;
        }
        self.hessian.as_mut().map_or(Ok(()), |h| h.add(seen))
    }

    fn finish(self) -> Result<(LinearGroup, Channels)> {
        let rows = self.rows.max(1) as f64;
        let mean_abs = self.total.iter().map(|t| (t / rows) as f32).collect();
        let hessian = self.hessian.map(|h| h.finish().map(|s| s.hessian)).transpose()?;
        Ok((self.group, Channels { mean_abs, max_abs: self.max, hessian }))
    }
}

impl SequentialPass<'_> {
    /// Runs a dense block, which is there once a device, on the carried activations and leaves them as they were. `on_group` gets the
    /// channels of q/k/v's, o's, gate/up's and down's input in this order, with its Hessian where `hessians` asks for it; `tick` is called
    /// once a chunk.
    pub fn survey<E: From<CalibrationError>>(
        &mut self,
        blocks: &[Block],
        hessians: bool,
        on_group: &mut dyn FnMut(LinearGroup, Channels) -> std::result::Result<(), E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (Some(home), Some(first)) = (self.lanes.first().map(|l| l.backend), blocks.first()) else {
            return Err(CalibrationError::Replicas { found: blocks.len(), expected: self.lanes.len() }.into());
        };
        let groups = [LinearGroup::Attention, LinearGroup::Output, LinearGroup::Mlp, LinearGroup::Down];
        let sums = groups.into_iter().map(|group| Sums::new(home, first, group, hessians));
        let mut sums = sums.collect::<Result<Vec<_>>>()?;
        let window = self.window_tokens;
        self.each(
            blocks,
            None,
            &mut |s| sums.get_mut(s.sum).map_or(Ok(()), |sum| sum.update(home, &s)),
            &|Chunk { lane, i, block, .. }, put| {
                let b = lane.backend;
                let x = lane.x.load(i)?;
                put(Seen { sum: 0, ..Seen::new(&block.attention_input(b, &x)?, None) })?;
                let attended = attend(b, block, &x, &lane.segments[i], window, None)?;
                put(Seen { sum: 1, ..Seen::new(&attended, None) })?;
                let rows: Vec<usize> = (0..x.len / block.hidden_size().max(1)).collect();
                let mut after = b.gather_rows(&x, block.hidden_size(), &rows)?;
                lane.x.restore(i, x)?;
                block.attention_residual(b, &mut after, &attended)?;
                let input = block.mlp_input(b, &after)?;
                put(Seen { sum: 2, ..Seen::new(&input, None) })?;
                put(Seen { sum: 3, ..Seen::new(&block.mlp_activation(b, &input)?, None) })
            },
            tick,
        )?;
        for sums in sums {
            let (group, channels) = sums.finish()?;
            on_group(group, channels)?;
        }
        Ok(())
    }
}
