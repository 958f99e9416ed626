//! Launchers of `attention.cu`: tiles of queries for prefill, split-K for calls of single tokens.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{floats, per_row, product};
use super::ops_rope::CacheView;
use super::rows::{RowTable, size};
use crate::backend::{AttentionShape, Segment};
use crate::error::{KernelError, Result, check_len};

/// Threads of a block of both kernels.
const THREADS: u32 = 128;

/// Keys of a decode block.
const PART: usize = 128;

/// Shared memory every GPU from sm_80 on grants a block: 99 KiB (sm_86, sm_89).
const SHARED_LIMIT: usize = 99 << 10;

/// The largest head the prefill kernel holds in registers.
const HEAD_DIM_LIMIT: usize = 256;

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

/// Bytes of shared memory of `attention_decode`, for `group` query heads a key head.
fn decode_shared(group: usize, head_dim: usize) -> usize {
    4 * (group * (head_dim + PART + 1) + 4096)
}

/// Parts of [`PART`] keys that the row at `position` looks at.
fn parts(position: usize, window: Option<usize>) -> usize {
    let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
    position / PART - first / PART + 1
}

/// The most [`parts`] of any position below `horizon`.
fn most_parts(horizon: usize, window: Option<usize>) -> usize {
    let all = horizon.div_ceil(PART).max(1);
    window.map_or(all, |w| all.min(w.saturating_sub(1).div_ceil(PART) + 1))
}

/// What both kernels are launched with.
struct Call<'a> {
    q: &'a Memory,
    y: &'a Memory,
    cache: CacheView<'a>,
    rows: &'a RowTable,
    tokens: usize,
    shape: &'a AttentionShape,
}

impl Call<'_> {
    /// tokens, heads, kv_heads, head_dim, capacity, scale, window, soft_cap.
    fn sizes(&self) -> Result<[Arg<'static>; 8]> {
        // A window wider than any position is none.
        let window = self.shape.window.and_then(|w| i32::try_from(w).ok()).unwrap_or(0);
        Ok([
            Arg::I32(size("tokens", self.tokens)?),
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
        let (tile, shared) = prefill_tile(self.shape.head_dim);
        let tiles = u32::try_from(self.tokens.div_ceil(tile)).map_err(|_| KernelError::Overflow("tiles"))?;
        let heads = u32::try_from(self.shape.heads).map_err(|_| KernelError::Overflow("heads"))?;
        let launch = Launch { grid: [tiles, heads, 1], block: [THREADS, 1, 1], shared_bytes: shared as u32 };
        let mut args = vec![Arg::In(self.q), Arg::In(self.cache.keys), Arg::In(self.cache.values), Arg::Out(self.y)];
        args.extend([Arg::In(&self.rows.slots), Arg::In(&self.rows.positions)]);
        args.extend(self.sizes()?);
        d.launch("attention_prefill", launch, &args)
    }

    /// `splits`: the most parts any row looks at.
    fn decode(&self, d: &Device, splits: usize) -> Result<()> {
        let (heads, head_dim) = (self.shape.heads, self.shape.head_dim);
        let shared = decode_shared(heads / self.shape.kv_heads, head_dim);
        let grid = [self.tokens, self.shape.kv_heads, splits];
        let [x, y, z] = grid.map(|n| u32::try_from(n).map_err(|_| KernelError::Overflow("grid")));
        let launch = Launch { grid: [x?, y?, z?], block: [THREADS, 1, 1], shared_bytes: shared as u32 };
        let count = product("parts", product("parts", self.tokens, heads)?, splits)?;
        let bytes = product("parts", count, head_dim * 4)?;
        // One part goes straight to y.
        let parts = match splits {
            1 => None,
            _ => Some([d.alloc(bytes)?, d.alloc(count * 4)?, d.alloc(count * 4)?]),
        };
        let mut args = vec![Arg::In(self.q), Arg::In(self.cache.keys), Arg::In(self.cache.values), Arg::Out(self.y)];
        args.extend([Arg::In(&self.rows.slots), Arg::In(&self.rows.positions)]);
        args.extend(parts.as_ref().map_or([Arg::Null; 3], |p| p.each_ref().map(Arg::Out)));
        args.extend(self.sizes()?);
        args.push(Arg::I32(size("parts", splits)?));
        d.launch("attention_decode", launch, &args)?;
        let Some([part_out, part_max, part_sum]) = &parts else { return Ok(()) };
        let args = [
            Arg::In(part_out),
            Arg::In(part_max),
            Arg::In(part_sum),
            Arg::Out(self.y),
            Arg::I32(size("tokens", self.tokens)?),
            Arg::I32(size("heads", heads)?),
            Arg::I32(size("head width", head_dim)?),
            Arg::I32(size("parts", splits)?),
        ];
        d.launch("attention_decode_merge", per_row(self.tokens * heads, head_dim, 0)?, &args)
    }
}

/// Causal attention of q `[tokens, heads · head_dim]` over the cache into y; rows of no segment become zero.
///
/// A call of single tokens takes the decode kernels, any other the prefill kernel: the two round differently, so a
/// token alone and the same token in a longer segment agree to rounding only. Within each, a row's result does not
/// depend on the other rows. `segments` are those `rows` was made of.
pub fn attention(
    d: &Device,
    q: &Memory,
    cache: CacheView<'_>,
    y: &Memory,
    rows: &RowTable,
    segments: &[Segment],
    tokens: usize,
    shape: &AttentionShape,
) -> Result<()> {
    let refuse = |why: String| Err(KernelError::Unsupported { backend: d.name(), op: "attention", why });
    if !shape.head_dim.is_multiple_of(4) || !(4..=HEAD_DIM_LIMIT).contains(&shape.head_dim) {
        return refuse(format!("a head of {} is not a multiple of 4 up to {HEAD_DIM_LIMIT}", shape.head_dim));
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
    let single = segments.iter().all(|s| s.tokens <= 1);
    if single && decode_shared(shape.heads / shape.kv_heads, shape.head_dim) <= SHARED_LIMIT {
        let used = segments.iter().filter(|s| s.tokens == 1);
        let longest = || used.map(|s| parts(s.past, shape.window)).max().unwrap_or(1);
        return call.decode(d, rows.horizon().map_or_else(longest, |h| most_parts(h, shape.window)));
    }
    call.prefill(d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_horizon_is_enough_for_every_position_below_it() {
        for window in [None, Some(1), Some(100), Some(128), Some(129), Some(130), Some(1000)] {
            for horizon in [1, 128, 129, 256, 700] {
                let most = (0..horizon).map(|p| parts(p, window)).max().unwrap();
                let launched = most_parts(horizon, window);
                assert!((most..=most + 1).contains(&launched), "{horizon} {window:?}: {launched} for {most}");
            }
        }
    }
}
