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
use crate::lanes::{Chunk, Seen, nothing};
use crate::sequential::{OnGroups, SequentialPass, token_weights};
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
struct AtMlp {
    input: Buffer,
    float: Option<Buffer>,
    weights: Option<Vec<f32>>,
}

impl AtMlp {
    fn of(chunk: &mut Chunk<'_, '_>, weighted: bool) -> Result<Self> {
        let Chunk { lane, i, block, original, .. } = chunk;
        let (b, i) = (lane.backend, *i);
        let x = lane.x.load(i)?;
        let input = block.mlp_input(b, &x)?;
        let weights = token_weights(b, block, &x, weighted)?;
        lane.x.restore(i, x)?;
        let float = match original {
            Some(o) => {
                let xf = lane.float.load(i)?;
                let input = o.mlp_input(b, &xf)?;
                lane.float.restore(i, xf)?;
                Some(input)
            }
            None => None,
        };
        Ok(Self { input, float, weights })
    }
}

impl<'a> SequentialPass<'a> {
    /// The MLP of a sparse block; `all` are the statistics of its input over all tokens. On return the residual stream has the
    /// outputs of the quantized experts, and the float stream those of the original ones, each routed by its own router. `on_groups` gets
    /// as many experts at once as there are devices.
    pub(crate) fn run_experts<E: From<CalibrationError>>(
        &mut self,
        blocks: &mut [Block],
        originals: Option<&[Block]>,
        all: InputStats,
        on_groups: &mut OnGroups<'_, E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let weighted = self.options.token_weights;
        if blocks.first().is_some_and(Block::has_mlp) {
            on_groups(vec![(LinearGroup::Mlp, all.clone())], blocks)?;
            let mut sum = self.sums(blocks, LinearGroup::Down)?;
            self.each(
                blocks,
                originals,
                &mut |s| sum.add(&s),
                &|mut chunk, put| {
                    let c = AtMlp::of(&mut chunk, weighted)?;
                    let b = chunk.lane.backend;
                    let y = chunk.block.mlp_activation(b, &c.input)?;
                    let yf = float_side(chunk.original, &c, |o, x| Ok(o.mlp_activation(b, x)?))?;
                    put(Seen::new(&y, side(yf.as_ref())).weighted(c.weights.as_deref()))
                },
                &mut || Ok::<(), E>(()),
            )?;
            on_groups(vec![(LinearGroup::Down, sum.finish()?)], blocks)?;
        }
        let routing = self.routing(blocks)?;
        let Some(config) = blocks.first().and_then(Block::experts).map(|e| e.config().clone()) else { return Ok(()) };
        let mut tokens = vec![0u64; config.count];
        for r in &routing {
            tokens.iter_mut().zip(&r.experts).for_each(|(sum, e)| *sum += e.rows.len() as u64);
        }
        let hidden = blocks.first().map_or(0, Block::hidden_size);
        let needed = tokens_needed(hidden, config.intermediate_size);
        let (float, bytes) = (self.options.float_stream, self.options.expert_bytes);
        let size = experts_at_once(config.count, hidden, config.intermediate_size, float, bytes);
        let together = self.lanes.len().max(1);
        for start in (0..config.count).step_by(size) {
            let batch = start..(start + size).min(config.count);
            let mut ready = Vec::with_capacity(together);
            for (e, s) in batch.clone().zip(self.gate_and_up(blocks, originals, &routing, batch.clone())?) {
                ready.push((LinearGroup::Expert(e), s.finish()?.blended(&all, needed)));
                if ready.len() == together || e + 1 == batch.end {
                    on_groups(std::mem::take(&mut ready), blocks)?;
                }
            }
            let starved: Vec<bool> = batch.clone().map(|e| tokens[e] < needed).collect();
            for (e, (own, wide)) in
                batch.clone().zip(self.down(blocks, originals, &routing, batch.clone(), &starved)?)
            {
                let stats = match wide {
                    Some(wide) => own.finish()?.blended(&wide.finish()?, needed),
                    None => own.finish()?,
                };
                ready.push((LinearGroup::ExpertDown(e), stats));
                if ready.len() == together || e + 1 == batch.end {
                    on_groups(std::mem::take(&mut ready), blocks)?;
                }
            }
        }
        self.each(
            blocks,
            originals,
            &mut nothing,
            &|Chunk { lane, i, number, block, original }, _| {
                let b = lane.backend;
                let mut x = lane.x.load(i)?;
                let input = block.mlp_input(b, &x)?;
                b.add_assign(&mut x, &block.experts_output(b, &input, &routing[number])?)?;
                lane.x.store(i, x)?;
                if let Some(o) = original {
                    let mut xf = lane.float.load(i)?;
                    let input = o.mlp_input(b, &xf)?;
                    let own = route(b, o, &input)?;
                    b.add_assign(&mut xf, &o.experts_output(b, &input, &own)?)?;
                    lane.float.store(i, xf)?;
                }
                Ok(())
            },
            tick,
        )?;
        Ok(())
    }

    /// Who goes where, chunk by chunk. The router is never quantized, so this holds for the whole block.
    fn routing(&mut self, blocks: &[Block]) -> Result<Vec<Routing>> {
        self.each(
            blocks,
            None,
            &mut nothing,
            &|Chunk { lane, i, block, .. }, _| {
                let b = lane.backend;
                let x = lane.x.load(i)?;
                let routing = route(b, block, &block.mlp_input(b, &x)?)?;
                lane.x.restore(i, x)?;
                Ok(routing)
            },
            &mut || Ok(()),
        )
    }

    /// Sums over the inputs of gate and up of some experts. The float stream's side are the same tokens.
    fn gate_and_up(
        &mut self,
        blocks: &[Block],
        originals: Option<&[Block]>,
        routing: &[Routing],
        batch: Range<usize>,
    ) -> Result<Vec<Accumulator<'a>>> {
        let mut sums = batch.clone().map(|e| self.sums(blocks, LinearGroup::Expert(e))).collect::<Result<Vec<_>>>()?;
        self.each(
            blocks,
            originals,
            &mut |s| sums.get_mut(s.sum).map_or(Ok(()), |sum| sum.add(&s)),
            &|mut chunk, put| {
                let c = AtMlp::of(&mut chunk, false)?;
                let (b, h) = (chunk.lane.backend, chunk.block.hidden_size());
                for (sum, routed) in routing[chunk.number].experts[batch.clone()].iter().enumerate() {
                    if routed.rows.is_empty() {
                        continue;
                    }
                    let rows = routed.indices();
                    let x = b.gather_rows(&c.input, h, &rows)?;
                    let xf = c.float.as_ref().map(|f| b.gather_rows(f, h, &rows)).transpose()?;
                    put(Seen { sum, rows: Some(routed.rows.as_slice()), ..Seen::new(&x, side(xf.as_ref())) })?;
                }
                Ok(())
            },
            &mut || Ok::<(), CalibrationError>(()),
        )?;
        Ok(sums)
    }

    /// Sums over the inputs of down of some experts, and over all tokens for those that are starved.
    fn down(
        &mut self,
        blocks: &[Block],
        originals: Option<&[Block]>,
        routing: &[Routing],
        batch: Range<usize>,
        starved: &[bool],
    ) -> Result<Vec<(Accumulator<'a>, Option<Accumulator<'a>>)>> {
        let weighted = self.options.token_weights;
        let mut sums = batch
            .clone()
            .zip(starved)
            .map(|(e, starved)| {
                let new = || self.sums(blocks, LinearGroup::ExpertDown(e));
                Ok((new()?, starved.then(new).transpose()?))
            })
            .collect::<Result<Vec<_>>>()?;
        // An expert's own sum, then the one over all tokens.
        let mut take = |s: Seen<'_>| match sums.get_mut(s.sum / 2) {
            Some((own, _)) if s.sum.is_multiple_of(2) => own.add(&s),
            Some((_, wide)) => wide.as_mut().map_or(Ok(()), |wide| wide.add(&s)),
            None => Ok(()),
        };
        self.each(
            blocks,
            originals,
            &mut take,
            &|mut chunk, put| {
                let c = AtMlp::of(&mut chunk, weighted)?;
                let (b, block, original) = (chunk.lane.backend, chunk.block, chunk.original);
                let h = block.hidden_size();
                for ((at, e), starved) in batch.clone().enumerate().zip(starved) {
                    let routed = &routing[chunk.number].experts[e];
                    if *starved {
                        let y = block.expert_activation(b, e, &c.input)?;
                        let yf = float_side(original, &c, |o, x| Ok(o.expert_activation(b, e, x)?))?;
                        let seen = Seen { sum: 2 * at + 1, ..Seen::new(&y, side(yf.as_ref())) };
                        put(seen.weighted(c.weights.as_deref()))?;
                    }
                    if routed.rows.is_empty() {
                        continue;
                    }
                    let rows = routed.indices();
                    let y = block.expert_activation(b, e, &b.gather_rows(&c.input, h, &rows)?)?;
                    let yf = float_side(original, &c, |o, x| {
                        Ok(o.expert_activation(b, e, &b.gather_rows(x, h, &rows)?)?)
                    })?;
                    let weights = chosen(&c.weights, routed);
                    let rows = Some(routed.rows.as_slice());
                    let seen = Seen { sum: 2 * at, rows, ..Seen::new(&y, side(yf.as_ref())) };
                    put(seen.weighted(weights.as_deref()))?;
                }
                Ok(())
            },
            &mut || Ok::<(), CalibrationError>(()),
        )?;
        Ok(sums)
    }
}

fn route(b: &dyn Backend, block: &Block, input: &Buffer) -> Result<Routing> {
    match block.experts() {
        Some(experts) => Ok(experts.route(b, input)?),
        None => Ok(Routing { experts: Vec::new() }),
    }
}

/// A float stream's side without residuals.
fn side(input: Option<&Buffer>) -> Option<FloatSide<'_>> {
    input.map(|input| FloatSide { input, residuals: None })
}

/// The float stream's side of a chunk, where there is one.
fn float_side(
    original: Option<&Block>,
    chunk: &AtMlp,
    of: impl FnOnce(&Block, &Buffer) -> Result<Buffer>,
) -> Result<Option<Buffer>> {
    original.zip(chunk.float.as_ref()).map(|(o, x)| of(o, x)).transpose()
}

fn chosen(weights: &Option<Vec<f32>>, routed: &Routed) -> Option<Vec<f32>> {
    let weights = weights.as_ref()?;
    Some(routed.rows.iter().filter_map(|r| weights.get(*r as usize).copied()).collect())
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
