//! A block as a whole: what goes in on the quantized stream and what should come out, for a solver that looks at the block's output and
//! not at one linear's.

use std::ops::Range;

use lowbit_model::block::Block;

use super::{SequentialPass, advance};
use crate::error::CalibrationError;
use crate::lanes::{Chunk, nothing};

/// What a caller makes of a block, and the linears it may replace, once a device.
pub type OnWholeBlock<'a, E> = dyn FnMut(WholeBlock, &mut [Block]) -> std::result::Result<(), E> + 'a;

/// Inputs and wanted outputs of a block, on the host: tokens · hidden · 8 bytes.
#[derive(Clone, Debug, Default)]
pub struct WholeBlock {
    /// `[tokens, width]`: the residual stream of the quantized model before the block.
    pub inputs: Vec<f32>,
    /// `[tokens, width]`: that of the original model after it.
    pub targets: Vec<f32>,
    /// Width of the residual stream.
    pub width: usize,
    /// Rows of each window.
    pub windows: Vec<Range<usize>>,
}

impl SequentialPass<'_> {
    /// Runs one block with both streams, which needs [`super::PassOptions::float_stream`]; the block is there once a device. `on_block` gets
    /// what goes in and what should come out, and may replace the block's linears, on every device; the quantized stream goes on
    /// through what it leaves. `tick` is called twice a chunk.
    pub fn run_whole_block<E: From<CalibrationError>>(
        &mut self,
        blocks: &mut [Block],
        originals: Option<&[Block]>,
        on_block: &mut OnWholeBlock<'_, E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let index = blocks.first().map_or(0, |b| b.index);
        let none = || CalibrationError::NoOriginal { block: index };
        let originals = originals.filter(|_| self.options.float_stream).ok_or_else(none)?;
        let window = self.window_tokens;
        let parts = self.each(
            blocks,
            Some(originals),
            &mut nothing,
            &|Chunk { lane, i, original, .. }, _| {
                let b = lane.backend;
                let x = lane.x.load(i)?;
                let inputs = b.download(&x)?;
                lane.x.restore(i, x)?;
                let xf = advance(b, original.ok_or_else(none)?, lane.float.load(i)?, &lane.segments[i], window)?;
                let targets = b.download(&xf)?;
                lane.float.store(i, xf)?;
                Ok((inputs, targets, lane.segments[i].clone()))
            },
            tick,
        )?;
        let width = blocks.first().map_or(0, Block::hidden_size);
        let mut data = WholeBlock { width, ..WholeBlock::default() };
        for (inputs, targets, segments) in parts {
            let before = data.inputs.len() / width.max(1);
            data.inputs.extend(inputs);
            data.targets.extend(targets);
            data.windows.extend(segments.iter().map(|s| before + s.row..before + s.row + s.tokens));
        }
        on_block(data, blocks)?;
        self.each(
            blocks,
            None,
            &mut nothing,
            &|Chunk { lane, i, block, .. }, _| {
                let x = advance(lane.backend, block, lane.x.load(i)?, &lane.segments[i], window)?;
                lane.x.store(i, x)
            },
            tick,
        )?;
        Ok(())
    }
}
