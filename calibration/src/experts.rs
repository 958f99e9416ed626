//! Statistics of a sparse block's experts: each expert its own, from the tokens that are routed to it.
//!
//! An expert that few tokens reach gets the statistics of the whole layer mixed in ([`InputStats::blended`]). For gate and up those
//! are the layer's input over all tokens; for down they are the expert's own activations over all tokens, which are computed
//! for such experts alone.
//!
//! Hessians of all experts at once may be larger than the model: experts are taken in batches of at most [`HESSIAN_BYTES`] ([`crate::PassOptions`]),
//! with one more pass over the carried activations (a norm, a gather, no linear outside the batch) for each. The result does
//! not depend on the batches.

use std::ops::Range;

use lowbit_kernels::backend::{Backend, Buffer};
use lowbit_model::block::{Block, LinearGroup};
use lowbit_model::experts::{Routed, Routing};

use crate::error::{CalibrationError, Result};
use crate::sequential::{SequentialPass, wrap};
use crate::stats::{Accumulator, FloatSide, InputStats};

/// Most bytes of experts' sums that are held at once by default, unless one expert alone needs more.
pub const HESSIAN_BYTES: u64 = 2 << 30;

/// Experts taken together within `bytes`, for inputs of `hidden` and `intermediate` columns; each sum is kept once, or twice with the drift of a
/// float stream, and once more over all tokens for a starved expert's down.
pub fn experts_at_once(count: usize, hidden: usize, intermediate: usize, float_stream: bool, bytes: u64) -> usize {
    let streams = 1 + u64::from(float_stream);
    let square = |n: usize| (n as u64).saturating_mul(n as u64);
    let each = square(hidden).max(square(intermediate).saturating_mul(2)).saturating_mul(4 * streams);
    ((bytes / each.max(1)) as usize).clamp(1, count.max(1))
}

/// Routed tokens below which an expert is starved: as many as the wider of its inputs has columns. With fewer, a Hessian cannot have
/// full rank, and what GPTQ makes of the missing directions is noise.
pub fn tokens_needed(hidden: usize, intermediate: usize) -> u64 {
    hidden.max(intermediate) as u64
}

/// A chunk at the MLP: its input, that of the float stream, and token weights.
struct Chunk {
    input: Buffer,
    float: Option<Buffer>,
    weights: Option<Vec<f32>>,
}

impl<'a> SequentialPass<'a> {
    /// The MLP of a sparse block; `all` are the statistics of its input over all tokens. On return the residual stream has the
    /// outputs of the quantized experts, and the float stream those of the original ones, each routed by its own router.
    pub(crate) fn run_experts<E: From<CalibrationError>>(
        &mut self,
        block: &mut Block,
        original: Option<&Block>,
        all: InputStats,
        on_group: &mut dyn FnMut(LinearGroup, InputStats, &mut Block) -> std::result::Result<(), E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let b = self.backend;
        if block.has_mlp() {
            on_group(LinearGroup::Mlp, all.clone(), block)?;
            let mut sums = self.sums(block, LinearGroup::Down)?;
            for i in 0..self.chunks() {
                let c = self.chunk(i, block, original)?;
                let y = block.mlp_activation(b, &c.input).map_err(wrap)?;
                let yf = float_side(original, &c, |o, x| Ok(o.mlp_activation(b, x)?))?;
                let side = yf.as_ref().map(|input| FloatSide { input, residuals: None });
                sums.update(&y, side.as_ref(), c.weights.as_deref())?;
            }
            on_group(LinearGroup::Down, sums.finish()?, block)?;
        }
        let routing = self.routing(block)?;
        let Some(config) = block.experts().map(|e| e.config().clone()) else { return Ok(()) };
        let mut tokens = vec![0u64; config.count];
        for r in &routing {
            tokens.iter_mut().zip(&r.experts).for_each(|(sum, e)| *sum += e.rows.len() as u64);
        }
        let needed = tokens_needed(block.hidden_size(), config.intermediate_size);
        let (float, bytes) = (self.options.float_stream, self.options.expert_bytes);
        let size = experts_at_once(config.count, block.hidden_size(), config.intermediate_size, float, bytes);
        for start in (0..config.count).step_by(size) {
            let batch = start..(start + size).min(config.count);
            let sums = self.gate_and_up(block, original, &routing, batch.clone())?;
            for (e, s) in batch.clone().zip(sums) {
                on_group(LinearGroup::Expert(e), s.finish()?.blended(&all, needed), block)?;
            }
            let starved: Vec<bool> = batch.clone().map(|e| tokens[e] < needed).collect();
            let sums = self.down(block, original, &routing, batch.clone(), &starved)?;
            for (e, (own, wide)) in batch.zip(sums) {
                let stats = match wide {
                    Some(wide) => own.finish()?.blended(&wide.finish()?, needed),
                    None => own.finish()?,
                };
                on_group(LinearGroup::ExpertDown(e), stats, block)?;
            }
        }
        for (i, routing) in routing.iter().enumerate() {
            let mut x = self.x.load(i)?;
            let input = block.mlp_input(b, &x).map_err(wrap)?;
            add(b, &mut x, &block.experts_output(b, &input, routing).map_err(wrap)?)?;
            self.x.store(i, x)?;
            if let Some(o) = original {
                let mut xf = self.float.load(i)?;
                let input = o.mlp_input(b, &xf).map_err(wrap)?;
                let own = route(b, o, &input)?;
                add(b, &mut xf, &o.experts_output(b, &input, &own).map_err(wrap)?)?;
                self.float.store(i, xf)?;
            }
            tick()?;
        }
        Ok(())
    }

    /// Who goes where, chunk by chunk. The router is never quantized, so this holds for the whole block.
    fn routing(&mut self, block: &Block) -> Result<Vec<Routing>> {
        let b = self.backend;
        (0..self.chunks())
            .map(|i| {
                let x = self.x.load(i)?;
                let routing = route(b, block, &block.mlp_input(b, &x)?)?;
                self.x.restore(i, x)?;
                Ok(routing)
            })
            .collect()
    }

    fn chunk(&mut self, i: usize, block: &Block, original: Option<&Block>) -> Result<Chunk> {
        let b = self.backend;
        let x = self.x.load(i)?;
        let input = block.mlp_input(b, &x)?;
        let weights = self.weights(block, &x)?;
        self.x.restore(i, x)?;
        let float = match original {
            Some(o) => {
                let xf = self.float.load(i)?;
                let input = o.mlp_input(b, &xf)?;
                self.float.restore(i, xf)?;
                Some(input)
            }
            None => None,
        };
        Ok(Chunk { input, float, weights })
    }

    /// Sums over the inputs of gate and up of some experts. The float stream's side are the same tokens.
    fn gate_and_up(
        &mut self,
        block: &Block,
        original: Option<&Block>,
        routing: &[Routing],
        batch: Range<usize>,
    ) -> Result<Vec<Accumulator<'a>>> {
        let (b, h) = (self.backend, block.hidden_size());
        let mut sums = batch.clone().map(|e| self.sums(block, LinearGroup::Expert(e))).collect::<Result<Vec<_>>>()?;
        for (i, routing) in routing.iter().enumerate() {
            let c = self.chunk(i, block, original)?;
            for (sum, routed) in sums.iter_mut().zip(&routing.experts[batch.clone()]) {
                if routed.rows.is_empty() {
                    continue;
                }
                let rows = routed.indices();
                let x = b.gather_rows(&c.input, h, &rows)?;
                let xf = c.float.as_ref().map(|f| b.gather_rows(f, h, &rows)).transpose()?;
                let side = xf.as_ref().map(|input| FloatSide { input, residuals: None });
                sum.update(&x, side.as_ref(), None)?;
            }
        }
        Ok(sums)
    }

    /// Sums over the inputs of down of some experts, and over all tokens for those that are starved.
    fn down(
        &mut self,
        block: &Block,
        original: Option<&Block>,
        routing: &[Routing],
        batch: Range<usize>,
        starved: &[bool],
    ) -> Result<Vec<(Accumulator<'a>, Option<Accumulator<'a>>)>> {
        let (b, h) = (self.backend, block.hidden_size());
        let mut sums = batch
            .clone()
            .zip(starved)
            .map(|(e, starved)| {
                let new = || self.sums(block, LinearGroup::ExpertDown(e));
                Ok((new()?, starved.then(new).transpose()?))
            })
            .collect::<Result<Vec<_>>>()?;
        for (i, routing) in routing.iter().enumerate() {
            let c = self.chunk(i, block, original)?;
            for (e, (own, wide)) in batch.clone().zip(&mut sums) {
                let routed = &routing.experts[e];
                if let Some(wide) = wide {
                    let y = block.expert_activation(b, e, &c.input)?;
                    let yf = float_side(original, &c, |o, x| Ok(o.expert_activation(b, e, x)?))?;
                    let side = yf.as_ref().map(|input| FloatSide { input, residuals: None });
                    wide.update(&y, side.as_ref(), c.weights.as_deref())?;
                }
                if routed.rows.is_empty() {
                    continue;
                }
                let rows = routed.indices();
                let y = block.expert_activation(b, e, &b.gather_rows(&c.input, h, &rows)?)?;
                let yf =
                    float_side(original, &c, |o, x| Ok(o.expert_activation(b, e, &b.gather_rows(x, h, &rows)?)?))?;
                let side = yf.as_ref().map(|input| FloatSide { input, residuals: None });
                own.update(&y, side.as_ref(), chosen(&c.weights, routed).as_deref())?;
            }
        }
        Ok(sums)
    }
}

fn route(b: &dyn Backend, block: &Block, input: &Buffer) -> Result<Routing> {
    match block.experts() {
        Some(experts) => Ok(experts.route(b, input)?),
        None => Ok(Routing { experts: Vec::new() }),
    }
}

/// The float stream's side of a chunk, where there is one.
fn float_side(
    original: Option<&Block>,
    chunk: &Chunk,
    of: impl FnOnce(&Block, &Buffer) -> Result<Buffer>,
) -> Result<Option<Buffer>> {
    original.zip(chunk.float.as_ref()).map(|(o, x)| of(o, x)).transpose()
}

fn chosen(weights: &Option<Vec<f32>>, routed: &Routed) -> Option<Vec<f32>> {
    let weights = weights.as_ref()?;
    Some(routed.rows.iter().filter_map(|r| weights.get(*r as usize).copied()).collect())
}

fn add(b: &dyn Backend, x: &mut Buffer, y: &Buffer) -> Result<()> {
    Ok(b.add_assign(x, y)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_stay_within_the_budget() {
        // Qwen3-30B-A3B: 128 experts of 2048 × 768; DeepSeek-V3: 256 of 7168 × 2048; Mixtral 8x7B: 8 of 4096 × 14336.
        assert_eq!(experts_at_once(128, 2048, 768, false, HESSIAN_BYTES), 128);
        assert_eq!(experts_at_once(128, 2048, 768, true, HESSIAN_BYTES), 64);
        assert_eq!(experts_at_once(256, 7168, 2048, false, HESSIAN_BYTES), 10);
        assert_eq!(experts_at_once(8, 4096, 14336, false, HESSIAN_BYTES), 1);
        assert_eq!((tokens_needed(2048, 768), tokens_needed(4096, 14336)), (2048, 14336));
    }
}
