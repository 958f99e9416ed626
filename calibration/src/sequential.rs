//! The block-by-block pass: the inputs of the next block come from the quantized block, and within a block the groups
//! q/k/v → o → gate/up → down see the quantized outputs of the groups before them.
//!
//! Every operation of the forward pass runs once: the pass that produces the quantized outputs feeds the next block.
//! Resident: one block, its Hessians, the carried activations (tokens · hidden · 4 bytes) and, while down is
//! calibrated, the MLP's activations (tokens · intermediate · 4 bytes); with an offload folder the activations are on
//! disk and one chunk of them is resident.

use std::path::{Path, PathBuf};

use lowbit_kernels::backend::{Backend, Buffer, Segment};
use lowbit_model::block::{Block, LinearGroup};
use lowbit_model::{Embedding, ModelError};

use crate::carried::Carried;
use crate::error::{CalibrationError, Result};
use crate::stats::{HessianAccumulator, InputStats};

/// Tokens per call: enough rows for the matrix products, few enough for the cache.
const CHUNK_TOKENS: usize = 2048;

/// Activations carried from block to block.
pub struct SequentialPass<'a> {
    backend: &'a dyn Backend,
    x: Carried<'a>,
    /// Rows of each chunk's windows.
    segments: Vec<Vec<Segment>>,
    window_tokens: usize,
    offload: Option<PathBuf>,
}

impl<'a> SequentialPass<'a> {
    /// Embeds the windows. `offload` is a folder for the activations; it is made when it is absent.
    pub fn start(
        backend: &'a dyn Backend,
        embedding: &Embedding,
        windows: &[Vec<u32>],
        offload: Option<&Path>,
    ) -> Result<Self> {
        if let Some(dir) = offload {
            std::fs::create_dir_all(dir).map_err(|source| CalibrationError::Io { path: dir.to_path_buf(), source })?;
        }
        let window_tokens = windows.iter().map(Vec::len).max().unwrap_or(0);
        let per_chunk = (CHUNK_TOKENS / window_tokens.max(1)).max(1);
        let groups: Vec<&[Vec<u32>]> = windows.chunks(per_chunk).collect();
        let mut x = Carried::new(backend, groups.len(), "residual", offload);
        let mut segments = Vec::with_capacity(groups.len());
        for (i, group) in groups.iter().enumerate() {
            let mut rows = Vec::with_capacity(group.len());
            let mut row = 0;
            for (slot, w) in group.iter().enumerate() {
                rows.push(Segment { slot, row, tokens: w.len(), past: 0 });
                row += w.len();
            }
            x.store(i, embedding.apply(backend, &group.concat())?)?;
            segments.push(rows);
        }
        Ok(Self { backend, x, segments, window_tokens, offload: offload.map(Path::to_path_buf) })
    }

    /// Runs one block. `on_group` gets each group's statistics and may replace the linears it names; `tick` is called
    /// once per chunk and stage (for progress and interruption).
    pub fn run_block<E: From<CalibrationError>>(
        &mut self,
        block: &mut Block,
        on_group: &mut dyn FnMut(LinearGroup, InputStats, &mut Block) -> std::result::Result<(), E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let b = self.backend;
        let width =
            |block: &Block, group| block.shapes().iter().find(|s| s.group == group).map_or(0, |s| s.in_features);
        let chunks = self.segments.len();
        let carry = |name| Carried::new(b, chunks, name, self.offload.as_deref());

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Attention))?;
        for i in 0..chunks {
            let x = self.x.load(i)?;
            h.update(&block.attention_input(b, &x).map_err(wrap)?)?;
            self.x.restore(i, x)?;
            tick()?;
        }
        on_group(LinearGroup::Attention, h.finish()?, block)?;

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Output))?;
        let mut attended = carry("attended");
        for i in 0..chunks {
            let x = self.x.load(i)?;
            let y = attend(b, block, &x, &self.segments[i], self.window_tokens)?;
            self.x.restore(i, x)?;
            h.update(&y)?;
            attended.store(i, y)?;
            tick()?;
        }
        on_group(LinearGroup::Output, h.finish()?, block)?;

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Mlp))?;
        for i in 0..chunks {
            let mut x = self.x.load(i)?;
            block.attention_residual(b, &mut x, &attended.load(i)?).map_err(wrap)?;
            h.update(&block.mlp_input(b, &x).map_err(wrap)?)?;
            self.x.store(i, x)?;
            tick()?;
        }
        drop(attended);
        on_group(LinearGroup::Mlp, h.finish()?, block)?;

        let mut h = HessianAccumulator::new(b, width(block, LinearGroup::Down))?;
        let mut activated = carry("activated");
        for i in 0..chunks {
            let x = self.x.load(i)?;
            let input = block.mlp_input(b, &x).map_err(wrap)?;
            self.x.restore(i, x)?;
            let y = block.mlp_activation(b, &input).map_err(wrap)?;
            h.update(&y)?;
            activated.store(i, y)?;
            tick()?;
        }
        on_group(LinearGroup::Down, h.finish()?, block)?;

        for i in 0..chunks {
            let mut x = self.x.load(i)?;
            block.mlp_residual(b, &mut x, &activated.load(i)?).map_err(wrap)?;
            self.x.store(i, x)?;
        }
        Ok(())
    }

    /// Calls of `tick` one block makes.
    pub fn ticks_per_block(&self) -> u64 {
        4 * self.segments.len() as u64
    }
}

fn attend(b: &dyn Backend, block: &Block, x: &Buffer, segments: &[Segment], window: usize) -> Result<Buffer> {
    let mut cache = b.kv_cache(segments.len(), window, block.kv_heads(), block.head_dim())?;
    let input = block.attention_input(b, x)?;
    Ok(block.attend(b, &input, segments, &mut cache)?)
}

fn wrap(e: ModelError) -> CalibrationError {
    e.into()
}
