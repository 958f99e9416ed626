//! A block as a whole: what goes in on the quantized stream and what should come out, for a solver that looks at the block's output and
//! not at one linear's.

use std::ops::Range;

use lowbit_model::block::Block;

use super::{SequentialPass, advance};
use crate::error::{CalibrationError, Result};

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
    /// Runs one block with both streams, which needs [`super::PassOptions::float_stream`]. `on_block` gets what goes in and what should
    /// come out, and may replace the block's linears; the quantized stream goes on through what it leaves. `tick` is called twice a
    /// chunk.
    pub fn run_whole_block<E: From<CalibrationError>>(
        &mut self,
        block: &mut Block,
        original: Option<&Block>,
        on_block: &mut dyn FnMut(WholeBlock, &mut Block) -> std::result::Result<(), E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let Some(original) = original.filter(|_| self.options.float_stream) else {
            return Err(CalibrationError::NoOriginal { block: block.index }.into());
        };
        let mut data = WholeBlock { width: block.hidden_size(), ..WholeBlock::default() };
        for i in 0..self.segments.len() {
            self.gather(i, original, &mut data)?;
            tick()?;
        }
        on_block(data, block)?;
        for i in 0..self.segments.len() {
            let x = advance(self.backend, block, self.x.load(i)?, &self.segments[i], self.window_tokens)?;
            self.x.store(i, x)?;
            tick()?;
        }
        Ok(())
    }

    /// Takes chunk `i` in, and the float stream through `original`.
    fn gather(&mut self, i: usize, original: &Block, data: &mut WholeBlock) -> Result<()> {
        let before = data.inputs.len() / data.width.max(1);
        let x = self.x.load(i)?;
        data.inputs.extend(self.backend.download(&x)?);
        self.x.restore(i, x)?;
        let xf = advance(self.backend, original, self.float.load(i)?, &self.segments[i], self.window_tokens)?;
        data.targets.extend(self.backend.download(&xf)?);
        self.float.store(i, xf)?;
        data.windows.extend(self.segments[i].iter().map(|s| before + s.row..before + s.row + s.tokens));
        Ok(())
    }
}
