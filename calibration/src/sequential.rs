//! The block-by-block pass: the inputs of the next block come from the quantized block, and within a block the groups
//! q/k/v → o → gate/up → down see the quantized outputs of the groups before them.
//!
//! Every operation of the forward pass runs once: the pass that produces the quantized outputs feeds the next block.
//! Resident: one block, its Hessians, the carried activations (tokens · hidden · 4 bytes) and, while down is
//! calibrated, the MLP's activations (tokens · intermediate · 4 bytes).

use lowbit_kernels::backend::{Backend, Buffer, Segment};
use lowbit_model::block::{Block, LinearGroup};
use lowbit_model::{Embedding, ModelError};

use crate::error::Result;
use crate::stats::{HessianAccumulator, InputStats};

/// Tokens per call: enough rows for the matrix products, few enough for the cache.
const CHUNK_TOKENS: usize = 2048;

struct Chunk {
    x: Buffer,
    segments: Vec<Segment>,
}

/// Activations carried from block to block.
pub struct SequentialPass<'a> {
    backend: &'a dyn Backend,
    chunks: Vec<Chunk>,
    window_tokens: usize,
}

impl<'a> SequentialPass<'a> {
    /// Embeds the windows.
    pub fn start(backend: &'a dyn Backend, embedding: &Embedding, windows: &[Vec<u32>]) -> Result<Self> {
        let window_tokens = windows.iter().map(Vec::len).max().unwrap_or(0);
        let per_chunk = (CHUNK_TOKENS / window_tokens.max(1)).max(1);
        let mut chunks = Vec::new();
        for group in windows.chunks(per_chunk) {
            let mut segments = Vec::with_capacity(group.len());
            let mut row = 0;
            for (slot, w) in group.iter().enumerate() {
                segments.push(Segment { slot, row, tokens: w.len(), past: 0 });
                row += w.len();
            }
            chunks.push(Chunk { x: embedding.apply(backend, &group.concat())?, segments });
        }
        Ok(Self { backend, chunks, window_tokens })
    }

    /// Runs one block. `on_group` gets each group's statistics and may replace the linears it names; `tick` is called
    /// once per chunk and stage (for progress and interruption).
    pub fn run_block<E: From<crate::CalibrationError>>(
        &mut self,
        block: &mut Block,
        on_group: &mut dyn FnMut(LinearGroup, InputStats, &mut Block) -> std::result::Result<(), E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let b = self.backend;
        let width =
            |block: &Block, group| block.shapes().iter().find(|s| s.group == group).map_or(0, |s| s.in_features);

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Attention))?;
        for c in &self.chunks {
            h.update(&block.attention_input(b, &c.x).map_err(wrap)?)?;
            tick()?;
        }
        on_group(LinearGroup::Attention, h.finish()?, block)?;

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Output))?;
        let mut attended = Vec::with_capacity(self.chunks.len());
        for c in &self.chunks {
            let mut cache =
                b.kv_cache(c.segments.len(), self.window_tokens, block.kv_heads(), block.head_dim()).map_err(kernel)?;
            let input = block.attention_input(b, &c.x).map_err(wrap)?;
            let y = block.attend(b, &input, &c.segments, &mut cache).map_err(wrap)?;
            h.update(&y)?;
            attended.push(y);
            tick()?;
        }
        on_group(LinearGroup::Output, h.finish()?, block)?;

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Mlp))?;
        for (c, y) in self.chunks.iter_mut().zip(attended) {
            block.attention_residual(b, &mut c.x, &y).map_err(wrap)?;
            h.update(&block.mlp_input(b, &c.x).map_err(wrap)?)?;
            tick()?;
        }
        on_group(LinearGroup::Mlp, h.finish()?, block)?;

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Down))?;
        let mut activated = Vec::with_capacity(self.chunks.len());
        for c in &self.chunks {
            let input = block.mlp_input(b, &c.x).map_err(wrap)?;
            let y = block.mlp_activation(b, &input).map_err(wrap)?;
            h.update(&y)?;
            activated.push(y);
            tick()?;
        }
        on_group(LinearGroup::Down, h.finish()?, block)?;

        for (c, y) in self.chunks.iter_mut().zip(activated) {
            block.mlp_residual(b, &mut c.x, &y).map_err(wrap)?;
        }
        Ok(())
    }

    /// Calls of `tick` one block makes.
    pub fn ticks_per_block(&self) -> u64 {
        4 * self.chunks.len() as u64
    }
}

fn wrap(e: ModelError) -> crate::CalibrationError {
    e.into()
}

fn kernel(e: lowbit_kernels::KernelError) -> crate::CalibrationError {
    e.into()
}
