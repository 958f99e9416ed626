//! Launchers of the attention kernels: tiles of queries for prefill (`attention.cu`, `attention_half.cu`), split-K for
//! calls of single tokens (`attention_decode.cu`, `attention_decode_half.cu`).

use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{floats, product};
use super::ops_rope::CacheView;
use super::rows::{RowTable, size};
use crate::backend::{AttentionShape, FloatType, Segment};
use crate::error::{KernelError, Result, check_len};

/// Threads of a block of every kernel.
const THREADS: u32 = 128;

/// Keys of a part of a row of up to [`SHORT`] keys; `AD_KEYS` of the kernel. Longer rows have parts of at least two times
/// as many.
const PART_KEYS: usize = 64;

/// `AD_SHORT` of the kernel.
const SHORT: usize = 1024;

/// Parts of a row, at most; `AD_PARTS` of the kernel.
const MOST_PARTS: usize = 64;

/// Floats that the parts of a launch may take; more rows take several launches.
const PART_FLOATS: usize = 32 << 20;

/// The largest head the kernels hold in registers.
const HEAD_DIM_LIMIT: usize = 256;

/// Whether the 16-bit kernels take heads of this width; caches of others stay f32.
pub fn has_half(head_dim: usize) -> bool {
    matches!(head_dim, 64 | 128)
}

/// Query rows of a tile and bytes of shared memory, as `attention_tile` lays them out.
fn prefill_tile(head_dim: usize) -> (usize, usize) {
    let (rows, keys, values_width) = match head_dim {
        ..=64 => (64, 32, 64),
        65..=128 => (64, 32, 128),
        _ => (32, 16, 256),
    };
    let padded = head_dim + if (head_dim / 4).is_multiple_of(2) { 4 } else { 0 };
    (rows, 4 * ((rows + keys) * padded + keys * values_width + rows * (keys + 4) + 2 * rows))
}

/// The same of `attention_half`: queries, two stages of keys and values, slots and positions, sums of weights.
fn half_tile(head_dim: usize) -> (usize, usize) {
    let (rows, keys) = if head_dim == 64 { (64, 64) } else { (128, 32) };
    (rows, (rows + 4 * keys) * head_dim * 2 + rows * 8 + rows / 32 * 4 * THREADS as usize)
}

/// The decode kernel for `group` query heads a key head, the query heads of its block, and its bytes of shared memory.
fn decode_block(half: bool, group: usize, head_dim: usize) -> (&'static str, usize, usize) {
    if half {
        let kernel = if head_dim == 64 { "attention_decode_half_64" } else { "attention_decode_half_128" };
        return (kernel, 8, 160 * head_dim + 272);
    }
    let heads = if group > 4 && head_dim <= 128 { 8 } else { 4 };
    let kernel = if group > 4 || head_dim > 128 { "attention_decode_wide" } else { "attention_decode" };
    (kernel, heads, 256 * head_dim + 4 * (4 * 64 + 4 * heads * 2 + 1))
}

/// Parts that a row that looks at `keys` keys is cut into.
fn parts(keys: usize) -> usize {
    let mut size = if keys <= SHORT { PART_KEYS } else { 2 * PART_KEYS };
    while size * MOST_PARTS < keys {
        size *= 2;
    }
    keys.div_ceil(size)
}

/// Parts of a grid that serves every row up to `keys` keys long: a power of two, at most 64, so that a recorded launch
/// stays good while its rows grow.
fn grid_parts(keys: usize, window: Option<usize>) -> usize {
    let keys = window.map_or(keys, |w| w.min(keys)).max(1);
    let most = match keys {
        ..=SHORT => parts(keys),
        _ => parts(SHORT).max(keys.min(2 * PART_KEYS * MOST_PARTS).div_ceil(2 * PART_KEYS)),
    };
    most.next_power_of_two()
}

/// What the parts of decode launches leave for the block that merges them.
pub struct Parts {
    /// Floats of `out`.
    floats: usize,
    /// Rows times blocks a row, of `arrived`.
    blocks: usize,
    /// Weighted sums, f32 `[rows, heads, parts, head_dim]`.
    out: Memory,
    /// Largest scores, f32 `[rows, heads, parts]`.
    top: Memory,
    /// Sums of weights, likewise.
    sum: Memory,
    /// u32 `[rows, blocks]`; zero between launches.
    arrived: Memory,
}

/// The memory of [`Parts`], made when a launch first needs more. What was made stays at its place for as long as the
/// backend lives, so that captured launches stay good; sizes are powers of two, so all that is left behind is smaller
/// than the last.
#[derive(Default)]
pub struct DecodeScratch {
    made: Mutex<Vec<Arc<Parts>>>,
}

impl DecodeScratch {
    fn parts(&self, d: &Device, floats: usize, blocks: usize) -> Result<Arc<Parts>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(p) = made.last().filter(|p| p.floats >= floats && p.blocks >= blocks) {
            return Ok(p.clone());
        }
        let before = made.last().map_or((0, 0), |p| (p.floats, p.blocks));
        let (floats, blocks) = (floats.max(before.0).next_power_of_two(), blocks.max(before.1).next_power_of_two());
        // A part has head_dim >= 4 floats.
        let [out, top, sum] = [floats, floats / 4, floats / 4].map(|n| d.alloc(n * 4));
        let arrived = d.alloc_zeroed(blocks * 4)?;
        let parts = Arc::new(Parts { floats, blocks, out: out?, top: top?, sum: sum?, arrived });
        made.push(parts.clone());
        Ok(parts)
    }
}

/// What the kernels are launched with.
struct Call<'a> {
    q: &'a Memory,
    y: &'a Memory,
    cache: CacheView<'a>,
    rows: &'a RowTable,
    tokens: usize,
    shape: &'a AttentionShape,
}

impl<'a> Call<'a> {
    fn operands(&self) -> Vec<Arg<'a>> {
        let mut args = vec![Arg::In(self.q), Arg::In(self.cache.keys), Arg::In(self.cache.values), Arg::Out(self.y)];
        args.extend([Arg::In(&self.rows.slots), Arg::In(&self.rows.positions)]);
        args
    }

    /// heads, kv_heads, head_dim, capacity, scale, window, soft_cap.
    fn sizes(&self) -> Result<[Arg<'static>; 7]> {
        // A window wider than any position is none.
        let window = self.shape.window.and_then(|w| i32::try_from(w).ok()).unwrap_or(0);
        Ok([
            Arg::I32(size("heads", self.shape.heads)?),
            Arg::I32(size("key heads", self.shape.kv_heads)?),
            Arg::I32(size("head width", self.shape.head_dim)?),
            Arg::I32(size("cache capacity", self.cache.capacity)?),
            Arg::F32(self.shape.scale),
            Arg::I32(window),
            Arg::F32(self.shape.soft_cap.unwrap_or(0.0)),
        ])
    }

    fn prefill(&self, d: &Device) -> Result<()> {
        let half = self.cache.dtype == FloatType::Bf16;
        let tile = if half { half_tile } else { prefill_tile };
        let (tile, shared) = tile(self.shape.head_dim);
        let tiles = u32::try_from(self.tokens.div_ceil(tile)).map_err(|_| KernelError::Overflow("tiles"))?;
        let heads = u32::try_from(self.shape.heads).map_err(|_| KernelError::Overflow("heads"))?;
        let launch = Launch { grid: [tiles, heads, 1], block: [THREADS, 1, 1], shared_bytes: shared as u32 };
        let mut args = self.operands();
        args.push(Arg::I32(size("tokens", self.tokens)?));
        let [heads, kv_heads, head_dim, rest @ ..] = self.sizes()?;
        args.extend([heads, kv_heads]);
        let kernel = match (half, self.shape.head_dim) {
            (true, 64) => "attention_half_64",
            (true, _) => "attention_half_128",
            (false, _) => {
                args.push(head_dim);
                "attention_prefill"
            }
        };
        args.extend(rest);
        d.launch(kernel, launch, &args)
    }

    /// `splits`: parts of the grid, at least as many as any row has.
    fn decode(&self, d: &Device, scratch: &DecodeScratch, splits: usize) -> Result<()> {
        let (heads, kv_heads, head_dim) = (self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let half = self.cache.dtype == FloatType::Bf16;
        let (kernel, batch, shared) = decode_block(half, heads / kv_heads, head_dim);
        let blocks = product("blocks", kv_heads, (heads / kv_heads).div_ceil(batch))?;
        let row = product("parts", product("parts", heads, splits)?, head_dim)?;
        let most = (PART_FLOATS / row.max(1)).clamp(1, self.tokens);
        let parts = match splits {
            1 => None, // straight to y
            _ => Some(scratch.parts(d, product("parts", most, row)?, product("blocks", most, blocks)?)?),
        };
        let rows_a_launch = if parts.is_some() { most } else { self.tokens };
        for row0 in (0..self.tokens).step_by(rows_a_launch) {
            let rows = rows_a_launch.min(self.tokens - row0);
            let grid = [product("grid", rows, splits)?, blocks];
            let [x, y] = grid.map(|n| u32::try_from(n).map_err(|_| KernelError::Overflow("grid")));
            let launch = Launch { grid: [x?, y?, 1], block: [THREADS, 1, 1], shared_bytes: shared as u32 };
            let mut args = self.operands();
            args.extend(match &parts {
                None => [Arg::Null; 4],
                Some(p) => [&p.out, &p.top, &p.sum, &p.arrived].map(Arg::Out),
            });
            args.push(Arg::I32(size("rows", row0)?));
            let [heads, kv_heads, head_dim, rest @ ..] = self.sizes()?;
            args.extend([heads, kv_heads]);
            args.extend((!half).then_some(head_dim));
            args.extend(rest);
            args.push(Arg::I32(size("parts", splits)?));
            d.launch(kernel, launch, &args)?;
        }
        Ok(())
    }
}

/// Causal attention of q `[tokens, heads · head_dim]` over the cache into y; rows of no segment become zero.
///
/// A call of single tokens takes the decode kernel, any other the prefill kernel: the two round differently, so a token
/// alone and the same token in a longer segment agree to rounding only (over a bf16 cache, to bf16's, since prefill
/// rounds queries and weights too). Within each, a row's result does not depend on the other rows. `segments` are those
/// `rows` was made of.
pub fn attention(
    d: &Device,
    q: &Memory,
    cache: CacheView<'_>,
    y: &Memory,
    rows: &RowTable,
    segments: &[Segment],
    tokens: usize,
    shape: &AttentionShape,
    scratch: &DecodeScratch,
) -> Result<()> {
    let refuse = |why: String| Err(KernelError::Unsupported { backend: d.name(), op: "attention", why });
    if !shape.head_dim.is_multiple_of(4) || !(4..=HEAD_DIM_LIMIT).contains(&shape.head_dim) {
        return refuse(format!("a head of {} is not a multiple of 4 up to {HEAD_DIM_LIMIT}", shape.head_dim));
    }
    if cache.dtype != FloatType::F32 && !(cache.dtype == FloatType::Bf16 && has_half(shape.head_dim)) {
        return refuse(format!("a cache of {:?} with heads of {}", cache.dtype, shape.head_dim));
    }
    if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
        return refuse(format!("{} query heads for {} key heads", shape.heads, shape.kv_heads));
    }
    check_len("key heads", shape.kv_heads, cache.kv_heads)?;
    check_len("head width", shape.head_dim, cache.head_dim)?;
    let n = product("queries", tokens, product("queries", shape.heads, shape.head_dim)?)?;
    floats("queries", q, n)?;
    floats("attention", y, n)?;
    floats("row positions", &rows.positions, tokens)?;
    floats("row slots", &rows.slots, tokens)?;
    cache.check(d, "attention", segments)?;
    if n == 0 {
        return Ok(());
    }
    let call = Call { q, y, cache, rows, tokens, shape };
    if segments.iter().all(|s| s.tokens <= 1) {
        let longest = || segments.iter().filter(|s| s.tokens == 1).map(|s| s.past + 1).max().unwrap_or(1);
        return call.decode(d, scratch, grid_parts(rows.horizon().unwrap_or_else(longest), shape.window));
    }
    call.prefill(d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_by_their_own_length() {
        assert_eq!([1, 64, 65, 1024, 4096].map(parts), [1, 1, 2, 16, 32]);
        // 1025 keys take parts of 128, 8193 parts of 256.
        assert_eq!([1025, 8192, 8193, (1 << 20) + 1].map(parts), [9, 64, 33, 33]);
    }

    #[test]
    fn a_grid_serves_every_length_up_to_its_own() {
        for window in [None, Some(1), Some(100), Some(1025), Some(9000)] {
            let mut most = 1;
            for keys in 1..20_000 {
                most = most.max(parts(window.map_or(keys, |w: usize| w.min(keys))));
                let grid = grid_parts(keys, window);
                assert!(grid >= most && grid < 2 * most, "{keys} {window:?}: {grid} for {most}");
            }
        }
    }

    #[test]
    fn shared_memory_suits_the_smallest_gpus() {
        // 99 KiB a block on sm_86 and sm_89.
        for head_dim in (4..=HEAD_DIM_LIMIT).step_by(4) {
            let decode = [(false, 1), (false, 8), (true, 8)].map(|(half, group)| decode_block(half, group, head_dim).2);
            assert!(decode.iter().all(|bytes| *bytes <= 99 << 10), "{head_dim}");
            assert!(!has_half(head_dim) || half_tile(head_dim).1 <= 99 << 10, "{head_dim}");
        }
    }
}
