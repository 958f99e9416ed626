//! The block-by-block pass: the inputs of the next block come from the quantized block, and within a block the groups
//! q/k/v → o → gate/up → down see the quantized outputs of the groups before them. Sparse blocks: see [`crate::experts`].
//!
//! Every operation of the forward pass of a dense block runs once: the pass that produces the quantized outputs feeds the next block.
//! With [`PassOptions::float_stream`] the same windows also run through the original blocks, stage by stage beside the
//! quantized ones, so that a solver can aim at the float model's outputs: twice the forward pass and two more sums.
//!
//! Resident: one block, its Hessians, the carried activations (tokens · hidden · 4 bytes) and, while down is
//! calibrated, the MLP's activations (tokens · intermediate · 4 bytes), all of it once per stream; with an offload
//! folder the activations are on disk and one chunk of them is resident. Several devices share the windows: see [`crate::lanes`].

mod whole;

use std::path::{Path, PathBuf};

use lowbit_kernels::backend::{Backend, Buffer, Segment};
use lowbit_model::Embedding;
use lowbit_model::block::{Block, LinearGroup};

pub use self::whole::WholeBlock;
use crate::error::{CalibrationError, Result};
use crate::experts::HESSIAN_BYTES;
use crate::lanes::{Chunk, Lane, Seen, Take, nothing};
use crate::stats::{Accumulator, FloatSide, InputStats};
use crate::units::{Piece, UNIT_TOKENS, pieces};

/// Tokens that go through a block together by default: those of a unit of the sums, which are then added as they are.
pub const CHUNK_TOKENS: usize = UNIT_TOKENS;

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
    /// Most tokens that go through a block together, in whole windows, and at least one window; does not change the result.
    pub chunk_tokens: usize,
}

impl Default for PassOptions {
    fn default() -> Self {
        Self {
            float_stream: false,
            kv_ranges: None,
            token_weights: false,
            expert_bytes: HESSIAN_BYTES,
            chunk_tokens: CHUNK_TOKENS,
        }
    }
}

/// Activations carried from block to block.
pub struct SequentialPass<'a> {
    pub(crate) options: PassOptions,
    /// One a device; the first makes the sums.
    pub(crate) lanes: Vec<Lane<'a>>,
    chunks: usize,
    /// By chunk: the units of its rows.
    pub(crate) pieces: Vec<Vec<Piece>>,
    pub(crate) window_tokens: usize,
    offload: Option<PathBuf>,
    kv_range: KvRange,
}

/// Gets the statistics of some groups, and the block on each device, whose linears it may replace on all of them.
pub type OnGroups<'f, E> = dyn FnMut(Vec<(LinearGroup, InputStats)>, &mut [Block]) -> std::result::Result<(), E> + 'f;

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
            enlarge(seen, &found);
        }
        Ok(())
    }

    /// Takes in what another device saw; the order does not count.
    fn join(&mut self, other: &KvRange) {
        enlarge(&mut self.keys, &other.keys);
        enlarge(&mut self.values, &other.values);
    }
}

fn enlarge(seen: &mut Vec<f32>, found: &[f32]) {
    seen.resize(seen.len().max(found.len()), 0.0);
    seen.iter_mut().zip(found).for_each(|(m, f)| *m = m.max(*f));
}

impl<'a> SequentialPass<'a> {
    /// Embeds the windows, which `backends` share; `embedding` is on the first. `offload` is a folder for the activations; it is made when
    /// it is absent.
    pub fn start(
        backends: &[&'a dyn Backend],
        embedding: &Embedding,
        windows: &[Vec<u32>],
        options: PassOptions,
        offload: Option<&Path>,
    ) -> Result<Self> {
        let home = *backends.first().ok_or(CalibrationError::Zero("devices"))?;
        if let Some(dir) = offload {
            std::fs::create_dir_all(dir).map_err(|source| CalibrationError::Io { path: dir.to_path_buf(), source })?;
        }
        let window_tokens = windows.iter().map(Vec::len).max().unwrap_or(0);
        let windows_in = |tokens: usize| (tokens / window_tokens.max(1)).max(1);
        let per_chunk = windows_in(options.chunk_tokens);
        let groups: Vec<&[Vec<u32>]> = windows.chunks(per_chunk).collect();
        let lengths: Vec<usize> = windows.iter().map(Vec::len).collect();
        let pieces = pieces(&lengths, per_chunk, windows_in(UNIT_TOKENS));
        let (chunks, count) = (groups.len(), backends.len());
        let mut lanes: Vec<Lane<'a>> =
            backends.iter().enumerate().map(|(d, b)| Lane::new(*b, d, count, chunks, offload)).collect();
        for (d, lane) in lanes.iter_mut().enumerate() {
            for (i, group) in groups.iter().skip(d).step_by(count).enumerate() {
                let mut rows = Vec::with_capacity(group.len());
                let mut row = 0;
                for (slot, w) in group.iter().enumerate() {
                    rows.push(Segment { slot, row, tokens: w.len(), past: 0 });
                    row += w.len();
                }
                let ids = group.concat();
                let embedded = || -> Result<Buffer> {
                    let x = embedding.apply(home, &ids)?;
                    if d == 0 { Ok(x) } else { Ok(lane.backend.upload(&home.download(&x)?)?) }
                };
                let (x, float) = (embedded()?, options.float_stream.then(embedded).transpose()?);
                lane.x.store(i, x)?;
                if let Some(float) = float {
                    lane.float.store(i, float)?;
                }
                lane.segments.push(rows);
            }
        }
        let offload = offload.map(Path::to_path_buf);
        let kv_range = KvRange::default();
        Ok(Self { options, lanes, chunks, pieces, window_tokens, offload, kv_range })
    }

    /// Runs one block, which is there once a device. `on_groups` gets the statistics of groups, one group at a time but for experts and
    /// latent attention, and may replace the linears they name, on every device; `tick` is called once per chunk and stage (for
    /// progress and interruption). `originals` are the block with its float weights; a float stream needs them, without one they
    /// are not looked at.
    pub fn run_block<E: From<CalibrationError>>(
        &mut self,
        blocks: &mut [Block],
        originals: Option<&[Block]>,
        on_groups: &mut OnGroups<'_, E>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let originals = self.needed(blocks, originals)?;
        let (window, noted, weighted) = (self.window_tokens, self.options.kv_ranges, self.options.token_weights);

        let mut sum = self.sums(blocks, LinearGroup::Attention)?;
        self.each(
            blocks,
            originals,
            &mut |s| sum.add(&s),
            &|Chunk { lane, i, block, original, .. }, put| {
                let b = lane.backend;
                let x = lane.x.load(i)?;
                let y = block.attention_input(b, &x)?;
                lane.x.restore(i, x)?;
                match original {
                    Some(o) => {
                        let xf = lane.float.load(i)?;
                        let input = &o.attention_input(b, &xf)?;
                        put(Seen::new(&y, Some(FloatSide { input, residuals: None })))?;
                        lane.float.restore(i, xf)
                    }
                    None => put(Seen::new(&y, None)),
                }
            },
            tick,
        )?;
        on_groups(vec![(LinearGroup::Attention, sum.finish()?)], blocks)?;
        self.run_latents(blocks, originals, on_groups)?;

        self.hold(["attended", "float-attended"]);
        self.lanes.iter_mut().for_each(|l| l.range = KvRange::default());
        let mut sum = self.sums(blocks, LinearGroup::Output)?;
        self.each(
            blocks,
            originals,
            &mut |s| sum.add(&s),
            &|chunk, put| {
                add_and_hold(chunk, put, weighted, &|b, block, x, segments, range| {
                    attend(b, block, x, segments, window, range.zip(noted))
                })
            },
            tick,
        )?;
        on_groups(vec![(LinearGroup::Output, sum.finish()?)], blocks)?;
        self.kv_range = KvRange::default();
        self.lanes.iter().for_each(|l| self.kv_range.join(&l.range));

        let mut sum = self.sums(blocks, LinearGroup::Mlp)?;
        self.each(
            blocks,
            originals,
            &mut |s| sum.add(&s),
            &|Chunk { lane, i, block, original, .. }, put| {
                let b = lane.backend;
                let mut x = lane.x.load(i)?;
                block.attention_residual(b, &mut x, &lane.held.load(i)?)?;
                let y = block.mlp_input(b, &x)?;
                lane.x.store(i, x)?;
                match original {
                    Some(o) => {
                        let mut xf = lane.float.load(i)?;
                        o.attention_residual(b, &mut xf, &lane.float_held.load(i)?)?;
                        let input = &o.mlp_input(b, &xf)?;
                        put(Seen::new(&y, Some(FloatSide { input, residuals: None })))?;
                        lane.float.store(i, xf)
                    }
                    None => put(Seen::new(&y, None)),
                }
            },
            tick,
        )?;
        self.lanes.iter_mut().for_each(Lane::let_go);
        if blocks.first().is_some_and(|b| b.experts().is_some()) {
            return self.run_experts(blocks, originals, sum.finish()?, on_groups, tick);
        }
        on_groups(vec![(LinearGroup::Mlp, sum.finish()?)], blocks)?;

        self.hold(["activated", "float-activated"]);
        let mut sum = self.sums(blocks, LinearGroup::Down)?;
        self.each(
            blocks,
            originals,
            &mut |s| sum.add(&s),
            &|chunk, put| add_and_hold(chunk, put, weighted, &|b, block, x, _, _| activate(b, block, x)),
            tick,
        )?;
        on_groups(vec![(LinearGroup::Down, sum.finish()?)], blocks)?;

        self.each(
            blocks,
            originals,
            &mut nothing,
            &|Chunk { lane, i, block, original, .. }, _| {
                let b = lane.backend;
                let mut x = lane.x.load(i)?;
                block.mlp_residual(b, &mut x, &lane.held.load(i)?)?;
                lane.x.store(i, x)?;
                if let Some(o) = original {
                    let mut xf = lane.float.load(i)?;
                    o.mlp_residual(b, &mut xf, &lane.float_held.load(i)?)?;
                    lane.float.store(i, xf)?;
                }
                Ok(())
            },
            &mut || Ok::<(), E>(()),
        )?;
        self.lanes.iter_mut().for_each(Lane::let_go);
        Ok(())
    }

    /// The originals where a float stream runs through them.
    fn needed<'o>(&self, blocks: &[Block], originals: Option<&'o [Block]>) -> Result<Option<&'o [Block]>> {
        match (self.options.float_stream, originals) {
            (true, None) => Err(CalibrationError::NoOriginal { block: blocks.first().map_or(0, |b| b.index) }),
            (true, some) => Ok(some),
            (false, _) => Ok(None),
        }
    }

    fn hold(&mut self, names: [&'static str; 2]) {
        for lane in &mut self.lanes {
            lane.hold(names, self.offload.as_deref());
        }
    }

    /// What expands the latent vectors of queries, and of keys and values, where attention is latent.
    fn run_latents<E: From<CalibrationError>>(
        &mut self,
        blocks: &mut [Block],
        originals: Option<&[Block]>,
        on_groups: &mut OnGroups<'_, E>,
    ) -> std::result::Result<(), E> {
        let mut sums: Vec<(LinearGroup, Accumulator<'a>)> = Vec::new();
        for group in [LinearGroup::Query, LinearGroup::KeyValue] {
            if blocks.iter().take(1).flat_map(Block::shapes).any(|s| s.group == group) {
                sums.push((group, self.sums(blocks, group)?));
            }
        }
        if sums.is_empty() {
            return Ok(());
        }
        // In the order of the groups: queries have a latent vector or not, keys with values always.
        let latents = |b: &dyn Backend, block: &Block, x: &Buffer| -> Result<Vec<Buffer>> {
            let found = block.latents(b, &block.attention_input(b, x)?)?;
            Ok(found.map_or_else(Vec::new, |(q, kv)| q.into_iter().chain([kv]).collect()))
        };
        self.each(
            blocks,
            originals,
            &mut |s| sums.get_mut(s.sum).map_or(Ok(()), |(_, sum)| sum.add(&s)),
            &|Chunk { lane, i, block, original, .. }, put| {
                let b = lane.backend;
                let x = lane.x.load(i)?;
                let ys = latents(b, block, &x)?;
                lane.x.restore(i, x)?;
                let yfs = match original {
                    Some(o) => {
                        let xf = lane.float.load(i)?;
                        let found = latents(b, o, &xf)?;
                        lane.float.restore(i, xf)?;
                        found
                    }
                    None => Vec::new(),
                };
                for (sum, y) in ys.iter().enumerate() {
                    let side = yfs.get(sum).map(|input| FloatSide { input, residuals: None });
                    put(Seen { sum, ..Seen::new(y, side) })?;
                }
                Ok(())
            },
            &mut || Ok::<(), E>(()),
        )?;
        let finished = sums.into_iter().map(|(group, sum)| Ok((group, sum.finish()?))).collect::<Result<Vec<_>>>()?;
        on_groups(finished, blocks)
    }

    pub(crate) fn chunks(&self) -> usize {
        self.chunks
    }

    /// Runs one block whose linears are quantized already: what [`Self::run_block`] leaves for the next block, bit for bit, without
    /// the statistics. Calls `tick` once per chunk.
    pub fn replay_block<E: From<CalibrationError>>(
        &mut self,
        blocks: &[Block],
        originals: Option<&[Block]>,
        tick: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (originals, window) = (self.needed(blocks, originals)?, self.window_tokens);
        self.each(
            blocks,
            originals,
            &mut nothing,
            &|Chunk { lane, i, block, original, .. }, _| {
                let b = lane.backend;
                let x = advance(b, block, lane.x.load(i)?, &lane.segments[i], window)?;
                lane.x.store(i, x)?;
                if let Some(o) = original {
                    let xf = advance(b, o, lane.float.load(i)?, &lane.segments[i], window)?;
                    lane.float.store(i, xf)?;
                }
                Ok(())
            },
            tick,
        )?;
        Ok(())
    }

    /// What [`PassOptions::kv_ranges`] noted in the last block.
    pub fn kv_range(&self) -> &KvRange {
        &self.kv_range
    }

    /// Calls of `tick` one block makes.
    pub fn ticks_per_block(&self) -> u64 {
        4 * self.chunks as u64
    }

    /// Zeros on the first device.
    pub(crate) fn sums(&self, blocks: &[Block], group: LinearGroup) -> Result<Accumulator<'a>> {
        let (Some(home), Some(block)) = (self.lanes.first().map(|l| l.backend), blocks.first()) else {
            return Err(CalibrationError::Replicas { found: blocks.len(), expected: self.lanes.len() });
        };
        let shape = block.shapes().iter().find(|s| s.group == group);
        // Without a shared expert no linear reads a sparse MLP's input, but starved experts need its sums.
        let (n, out) = shape.map_or((block.hidden_size(), 0), |s| (s.in_features, s.out_features));
        if !self.options.float_stream {
            return Accumulator::new(home, n);
        }
        // Beside experts, a shared expert's output is only a part of what is added.
        let added = match group {
            LinearGroup::Output => block.adds_output_directly(),
            LinearGroup::Down => block.adds_output_directly() && block.experts().is_none(),
            _ => false,
        };
        Accumulator::with_float(home, n, added.then_some(out))
    }
}

/// 1 / rms of each row of the residual x; a row of zeros weighs 1. `None` unless tokens are `weighted`.
pub(crate) fn token_weights(b: &dyn Backend, block: &Block, x: &Buffer, weighted: bool) -> Result<Option<Vec<f32>>> {
    if !weighted || !block.adds_output_directly() {
        return Ok(None);
    }
    let squares = b.mean_squares(x, block.hidden_size())?;
    let weight = |s: f32| if s > 0.0 && s.is_finite() { 1.0 / s.sqrt() } else { 1.0 };
    Ok(Some(squares.into_iter().map(weight).collect()))
}

/// The input of a linear of the block, from the residual stream before its half of the block and the rows of the windows; the range takes
/// in keys and values where the stage has them.
type StageInput<'f> = dyn Fn(&dyn Backend, &Block, &Buffer, &[Segment], Option<&mut KvRange>) -> Result<Buffer> + 'f;

/// The stage of o or down for one chunk: adds the linear's `input` with both streams' residuals, which its output joins, and with the
/// tokens' weights, and holds it for the step onto the residual stream.
fn add_and_hold(
    Chunk { lane, i, block, original, .. }: Chunk<'_, '_>,
    put: &mut Take<'_>,
    weighted: bool,
    input: &StageInput<'_>,
) -> Result<()> {
    let b = lane.backend;
    let x = lane.x.load(i)?;
    let y = input(b, block, &x, &lane.segments[i], Some(&mut lane.range))?;
    let weights = token_weights(b, block, &x, weighted)?;
    match original {
        Some(o) => {
            let xf = lane.float.load(i)?;
            let yf = input(b, o, &xf, &lane.segments[i], None)?;
            let residuals = block.adds_output_directly().then_some((&xf, &x));
            let float = FloatSide { input: &yf, residuals };
            put(Seen::new(&y, Some(float)).weighted(weights.as_deref()))?;
            lane.float.restore(i, xf)?;
            lane.float_held.store(i, yf)?;
        }
        None => put(Seen::new(&y, None).weighted(weights.as_deref()))?,
    }
    lane.x.restore(i, x)?;
    lane.held.store(i, y)
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
