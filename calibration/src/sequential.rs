//! The block-by-block pass: the inputs of the next block come from the quantized block, and within a block the groups
//! q/k/v → o → gate/up → down see the quantized outputs of the groups before them. Sparse blocks: see [`crate::experts`].
//!
//! Every operation of the forward pass of a dense block runs once: the pass that produces the quantized outputs feeds the next block.
//! With [`PassOptions::float_stream`] the same windows also run through the original blocks, stage by stage beside the
//! quantized ones, so that a solver can aim at the float model's outputs: twice the forward pass and two more sums.
//!
//! Resident: one block, its Hessians, the carried activations (tokens · hidden · 4 bytes) and, while down is
//! calibrated, the MLP's activations (tokens · intermediate · 4 bytes), all of it once per stream; with an offload
//! folder the activations are on disk and one chunk of them is resident.

mod whole;

use std::path::{Path, PathBuf};

use lowbit_kernels::backend::{Backend, Buffer, Segment};
use lowbit_model::block::{Block, LinearGroup};
use lowbit_model::{Embedding, ModelError};

pub use self::whole::WholeBlock;
use crate::carried::Carried;
use crate::error::{CalibrationError, Result};
use crate::experts::HESSIAN_BYTES;
use crate::stats::{Accumulator, FloatSide, InputStats};

/// Tokens per call: enough rows for the matrix products, few enough for the cache.
const CHUNK_TOKENS: usize = 2048;

/// What a pass gathers beside the Hessians.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassOptions {
    /// Run the float model beside the quantized one and gather [`crate::Drift`].
    pub float_stream: bool,
    /// Note the largest magnitudes of keys (after their rotation) and values; of each head by itself where this holds true.
    pub kv_ranges: Option<bool>,
    /// Weight tokens of o and down by 1 / rms of the residual their output is added to: the next norm divides by it,
    /// so an error on a token with a large residual hurts less.
    pub token_weights: bool,
    /// Most bytes of experts' Hessians at once; does not change the result.
    pub expert_bytes: u64,
}

impl Default for PassOptions {
    fn default() -> Self {
        Self { float_stream: false, kv_ranges: None, token_weights: false, expert_bytes: HESSIAN_BYTES }
    }
}

/// Activations carried from block to block.
pub struct SequentialPass<'a> {
    pub(crate) backend: &'a dyn Backend,
    pub(crate) options: PassOptions,
    pub(crate) x: Carried<'a>,
    /// The float stream; unused without it.
    pub(crate) float: Carried<'a>,
    /// Rows of each chunk's windows.
    pub(crate) segments: Vec<Vec<Segment>>,
    pub(crate) window_tokens: usize,
    offload: Option<PathBuf>,
    kv_range: KvRange,
}

/// Largest magnitudes of a block's keys and values: one each, or one a head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KvRange {
    /// Keys, after their rotation.
    pub keys: Vec<f32>,
    /// Values.
    pub values: Vec<f32>,
}

impl KvRange {
    /// Takes in k and v `[T, width]` of `heads` heads.
    fn widen(&mut self, b: &dyn Backend, k: &Buffer, v: &Buffer, heads: Option<(usize, usize)>) -> Result<()> {
        for (seen, x) in [(&mut self.keys, k), (&mut self.values, v)] {
            let found = match heads {
                None => vec![b.abs_max(x)?],
                Some((heads, width)) => (0..heads)
                    .map(|h| {
                        let d = width / heads.max(1);
                        b.abs_max(&b.slice_columns(x, width, h * d..(h + 1) * d)?)
                    })
                    .collect::<lowbit_kernels::Result<Vec<_>>>()?,
            };
            seen.resize(found.len(), 0.0);
            seen.iter_mut().zip(found).for_each(|(m, f)| *m = m.max(f));
        }
        Ok(())
    }
}

impl<'a> SequentialPass<'a> {
    /// Embeds the windows. `offload` is a folder for the activations; it is made when it is absent.
    pub fn start(
        backend: &'a dyn Backend,
        embedding: &Embedding,
        windows: &[Vec<u32>],
        options: PassOptions,
        offload: Option<&Path>,
    ) -> Result<Self> {
        if let Some(dir) = offload {
            std::fs::create_dir_all(dir).map_err(|source| CalibrationError::Io { path: dir.to_path_buf(), source })?;
        }
        let window_tokens = windows.iter().map(Vec::len).max().unwrap_or(0);
        let per_chunk = (CHUNK_TOKENS / window_tokens.max(1)).max(1);
        let groups: Vec<&[Vec<u32>]> = windows.chunks(per_chunk).collect();
        let mut x = Carried::new(backend, groups.len(), "residual", offload);
        let mut float = Carried::new(backend, groups.len(), "float-residual", offload);
        let mut segments = Vec::with_capacity(groups.len());
        for (i, group) in groups.iter().enumerate() {
            let mut rows = Vec::with_capacity(group.len());
            let mut row = 0;
            for (slot, w) in group.iter().enumerate() {
                rows.push(Segment { slot, row, tokens: w.len(), past: 0 });
                row += w.len();
            }
            x.store(i, embedding.apply(backend, &group.concat())?)?;
            if options.float_stream {
                float.store(i, embedding.apply(backend, &group.concat())?)?;
            }
            segments.push(rows);
        }
        let offload = offload.map(Path::to_path_buf);
        let kv_range = KvRange::default();
        Ok(Self { backend, options, x, float, segments, window_tokens, offload, kv_range })
    }

    /// Runs one block. `on_group` gets each group's statistics and may replace the linears it names; `tick` is called
    /// once per chunk and stage (for progress and interruption). `original` is the block with its float weights; a
    /// float stream needs it, without one it is not looked at.
    pub fn run_block<E: From<CalibrationError>>(
        &mut self,
        block: &mut Block,
        original: Option<&Block>,
        on_group: &mut dyn FnMut(LinearGroup, InputStats, &mut Block) -> std::result::Result<(), E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let b = self.backend;
        let original = match (self.options.float_stream, original) {
            (true, None) => return Err(CalibrationError::NoOriginal { block: block.index }.into()),
            (true, some) => some,
            (false, _) => None,
        };
        let chunks = self.segments.len();
        let offload = self.offload.clone();
        let carry = |name| Carried::new(b, chunks, name, offload.as_deref());
        let (mut attended, mut float_attended) = (carry("attended"), carry("float-attended"));

        let mut sums = self.sums(block, LinearGroup::Attention)?;
        for i in 0..chunks {
            let x = self.x.load(i)?;
            let y = block.attention_input(b, &x).map_err(wrap)?;
            self.x.restore(i, x)?;
            match original {
                Some(o) => {
                    let xf = self.float.load(i)?;
                    let input = &o.attention_input(b, &xf).map_err(wrap)?;
                    sums.update(&y, Some(&FloatSide { input, residuals: None }), None)?;
                    self.float.restore(i, xf)?;
                }
                None => sums.update(&y, None, None)?,
            }
            tick()?;
        }
        on_group(LinearGroup::Attention, sums.finish()?, block)?;
        self.run_latents(block, original, on_group)?;

        let mut sums = self.sums(block, LinearGroup::Output)?;
        let mut range = KvRange::default();
        for i in 0..chunks {
            let (x, segments) = (self.x.load(i)?, &self.segments[i]);
            let noted = self.options.kv_ranges.map(|by_head| (&mut range, by_head));
            let y = attend(b, block, &x, segments, self.window_tokens, noted)?;
            let weights = self.weights(block, &x)?;
            match original {
                Some(o) => {
                    let xf = self.float.load(i)?;
                    let yf = attend(b, o, &xf, segments, self.window_tokens, None)?;
                    let residuals = block.adds_output_directly().then_some((&xf, &x));
                    sums.update(&y, Some(&FloatSide { input: &yf, residuals }), weights.as_deref())?;
                    self.float.restore(i, xf)?;
                    float_attended.store(i, yf)?;
                }
                None => sums.update(&y, None, weights.as_deref())?,
            }
            self.x.restore(i, x)?;
            attended.store(i, y)?;
            tick()?;
        }
        on_group(LinearGroup::Output, sums.finish()?, block)?;
        self.kv_range = range;

        let mut sums = self.sums(block, LinearGroup::Mlp)?;
        for i in 0..chunks {
            let mut x = self.x.load(i)?;
            block.attention_residual(b, &mut x, &attended.load(i)?).map_err(wrap)?;
            let y = block.mlp_input(b, &x).map_err(wrap)?;
            self.x.store(i, x)?;
            match original {
                Some(o) => {
                    let mut xf = self.float.load(i)?;
                    o.attention_residual(b, &mut xf, &float_attended.load(i)?).map_err(wrap)?;
                    let input = &o.mlp_input(b, &xf).map_err(wrap)?;
                    sums.update(&y, Some(&FloatSide { input, residuals: None }), None)?;
                    self.float.store(i, xf)?;
                }
                None => sums.update(&y, None, None)?,
            }
            tick()?;
        }
        drop((attended, float_attended));
        if block.experts().is_some() {
            return self.run_experts(block, original, sums.finish()?, on_group, tick);
        }
        on_group(LinearGroup::Mlp, sums.finish()?, block)?;

        let mut sums = self.sums(block, LinearGroup::Down)?;
        let (mut activated, mut float_activated) = (carry("activated"), carry("float-activated"));
        for i in 0..chunks {
            let x = self.x.load(i)?;
            let y = activate(b, block, &x)?;
            let weights = self.weights(block, &x)?;
            match original {
                Some(o) => {
                    let xf = self.float.load(i)?;
                    let yf = activate(b, o, &xf)?;
                    let residuals = block.adds_output_directly().then_some((&xf, &x));
                    sums.update(&y, Some(&FloatSide { input: &yf, residuals }), weights.as_deref())?;
                    self.float.restore(i, xf)?;
                    float_activated.store(i, yf)?;
                }
                None => sums.update(&y, None, weights.as_deref())?,
            }
            self.x.restore(i, x)?;
            activated.store(i, y)?;
            tick()?;
        }
        on_group(LinearGroup::Down, sums.finish()?, block)?;

        for i in 0..chunks {
            let mut x = self.x.load(i)?;
            block.mlp_residual(b, &mut x, &activated.load(i)?).map_err(wrap)?;
            self.x.store(i, x)?;
            if let Some(o) = original {
                let mut xf = self.float.load(i)?;
                o.mlp_residual(b, &mut xf, &float_activated.load(i)?).map_err(wrap)?;
                self.float.store(i, xf)?;
            }
        }
        Ok(())
    }

    /// What expands the latent vectors of queries, and of keys and values, where attention is latent.
    fn run_latents<E: From<CalibrationError>>(
        &mut self,
        block: &mut Block,
        original: Option<&Block>,
        on_group: &mut dyn FnMut(LinearGroup, InputStats, &mut Block) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let b = self.backend;
        let mut sums: Vec<(LinearGroup, Accumulator<'a>)> = Vec::new();
        for group in [LinearGroup::Query, LinearGroup::KeyValue] {
            if block.shapes().iter().any(|s| s.group == group) {
                sums.push((group, self.sums(block, group)?));
            }
        }
        if sums.is_empty() {
            return Ok(());
        }
        // In the order of the groups: queries have a latent vector or not, keys with values always.
        let latents = |block: &Block, x: &Buffer| -> Result<Vec<Buffer>> {
            let found = block.latents(b, &block.attention_input(b, x)?)?;
            Ok(found.map_or_else(Vec::new, |(q, kv)| q.into_iter().chain([kv]).collect()))
        };
        for i in 0..self.chunks() {
            let x = self.x.load(i)?;
            let ys = latents(block, &x)?;
            self.x.restore(i, x)?;
            let yfs = match original {
                Some(o) => {
                    let xf = self.float.load(i)?;
                    let found = latents(o, &xf)?;
                    self.float.restore(i, xf)?;
                    found
                }
                None => Vec::new(),
            };
            for (at, ((_, sum), y)) in sums.iter_mut().zip(&ys).enumerate() {
                let side = yfs.get(at).map(|input| FloatSide { input, residuals: None });
                sum.update(y, side.as_ref(), None)?;
            }
        }
        sums.into_iter().try_for_each(|(group, sum)| on_group(group, sum.finish()?, block))
    }

    pub(crate) fn chunks(&self) -> usize {
        self.segments.len()
    }

    /// Runs one block whose linears are quantized already: what [`Self::run_block`] leaves for the next block, bit for bit, without
    /// the statistics. Calls `tick` once per chunk.
    pub fn replay_block<E: From<CalibrationError>>(
        &mut self,
        block: &Block,
        original: Option<&Block>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let original = match (self.options.float_stream, original) {
            (true, None) => return Err(CalibrationError::NoOriginal { block: block.index }.into()),
            (true, some) => some,
            (false, _) => None,
        };
        for i in 0..self.segments.len() {
            let x = advance(self.backend, block, self.x.load(i)?, &self.segments[i], self.window_tokens)?;
            self.x.store(i, x)?;
            if let Some(o) = original {
                let xf = advance(self.backend, o, self.float.load(i)?, &self.segments[i], self.window_tokens)?;
                self.float.store(i, xf)?;
            }
            tick()?;
        }
        Ok(())
    }

    /// What [`PassOptions::kv_ranges`] noted in the last block.
    pub fn kv_range(&self) -> &KvRange {
        &self.kv_range
    }

    /// Calls of `tick` one block makes.
    pub fn ticks_per_block(&self) -> u64 {
        4 * self.segments.len() as u64
    }

    pub(crate) fn sums(&self, block: &Block, group: LinearGroup) -> Result<Accumulator<'a>> {
        let shape = block.shapes().iter().find(|s| s.group == group);
        // Without a shared expert no linear reads a sparse MLP's input, but starved experts need its sums.
        let (n, out) = shape.map_or((block.hidden_size(), 0), |s| (s.in_features, s.out_features));
        if !self.options.float_stream {
            return Accumulator::new(self.backend, n);
        }
        // Beside experts, a shared expert's output is only a part of what is added.
        let added = match group {
            LinearGroup::Output => block.adds_output_directly(),
            LinearGroup::Down => block.adds_output_directly() && block.experts().is_none(),
            _ => false,
        };
        Accumulator::with_float(self.backend, n, added.then_some(out))
    }

    /// 1 / rms of each row of the residual x; a row of zeros weighs 1.
    pub(crate) fn weights(&self, block: &Block, x: &Buffer) -> Result<Option<Vec<f32>>> {
        if !self.options.token_weights || !block.adds_output_directly() {
            return Ok(None);
        }
        let squares = self.backend.mean_squares(x, block.hidden_size())?;
        let weight = |s: f32| if s > 0.0 && s.is_finite() { 1.0 / s.sqrt() } else { 1.0 };
        Ok(Some(squares.into_iter().map(weight).collect()))
    }
}

/// The input of o; `noted` takes in the keys' and values' range, by head if it says so.
pub(crate) fn attend(
    b: &dyn Backend,
    block: &Block,
    x: &Buffer,
    segments: &[Segment],
    window: usize,
    noted: Option<(&mut KvRange, bool)>,
) -> Result<Buffer> {
    let mut cache = b.kv_cache(segments.len(), window, block.kv_heads(), block.head_dim())?;
    let input = block.attention_input(b, x)?;
    let Some((range, by_head)) = noted else { return Ok(block.attend(b, &input, segments, &mut cache, None)?) };
    let heads = by_head.then(|| (block.kv_heads(), block.kv_heads() * block.head_dim()));
    let mut failed = None;
    let mut watch = |k: &Buffer, v: &Buffer| {
        if let Err(e) = range.widen(b, k, v, heads) {
            failed.get_or_insert(e);
        }
    };
    let y = block.attend(b, &input, segments, &mut cache, Some(&mut watch))?;
    failed.map_or(Ok(y), Err)
}

fn activate(b: &dyn Backend, block: &Block, x: &Buffer) -> Result<Buffer> {
    Ok(block.mlp_activation(b, &block.mlp_input(b, x)?)?)
}

/// The residual stream after `block`, from that before it; `window` is the longest segment's tokens.
pub fn advance(b: &dyn Backend, block: &Block, mut x: Buffer, segments: &[Segment], window: usize) -> Result<Buffer> {
    let y = attend(b, block, &x, segments, window, None)?;
    block.attention_residual(b, &mut x, &y)?;
    if let Some(experts) = block.experts() {
        let input = block.mlp_input(b, &x)?;
        let routing = experts.route(b, &input)?;
        b.add_assign(&mut x, &block.experts_output(b, &input, &routing)?)?;
        return Ok(x);
    }
    let y = activate(b, block, &x)?;
    block.mlp_residual(b, &mut x, &y)?;
    Ok(x)
}

pub(crate) fn wrap(e: ModelError) -> CalibrationError {
    e.into()
}
