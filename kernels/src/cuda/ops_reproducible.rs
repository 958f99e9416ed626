//! Launches of `reproducible.cu` and `reproducible_attention.cu`: the operations of calibration and scoring in the
//! CPU backend's order of f32 operations, bit for bit.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{flat, floats, product};
use super::ops_norm::norm_args;
use super::ops_rope::CacheView;
use super::rows::{RowTable, size};
use super::weights::{DeviceWeight, Layout, dtype_code};
use crate::backend::{AttentionShape, Segment};
use crate::error::{KernelError, Result, check_len};

/// Threads of a tile's block.
const TILE_THREADS: u32 = 64;
/// Columns of a tile, and rows of one unless a call has few.
const TILE: usize = 64;
/// Rows of a tile in calls of no more.
const FEW: usize = 16;
/// Two operands of 32 steps, `RP_LD` floats each.
const TILE_SHARED: u32 = 2 * 32 * 68 * 4;
/// Rows of a block of the row kernels, 16 lanes each.
const ROWS: usize = 8;
/// Floats of scratch that attention keeps scores in.
const SCRATCH: usize = 32 << 20;

fn blocks(n: usize, by: usize) -> Result<u32> {
    u32::try_from(n.div_ceil(by)).map_err(|_| KernelError::Overflow("grid"))
}

fn tiles(rows: usize, tile_rows: usize, cols: usize, z: usize) -> Result<Launch> {
    let grid = [blocks(cols, TILE)?, blocks(rows, tile_rows)?, blocks(z, 1)?];
    Ok(Launch { grid, block: [TILE_THREADS, 1, 1], shared_bytes: TILE_SHARED })
}

/// `y = x · Wᵀ (+ bias)`: x `[tokens, in]`, y `[tokens, out]`, bias `[out]`, f32; one fma chain a result.
pub fn linear(
    d: &Device,
    x: &Memory,
    w: &DeviceWeight,
    bias: Option<&Memory>,
    y: &Memory,
    tokens: usize,
) -> Result<()> {
    floats("linear input", x, product("linear input", tokens, w.in_features)?)?;
    floats("linear output", y, product("linear output", tokens, w.out_features)?)?;
    bias.map_or(Ok(()), |b| floats("bias", b, w.out_features))?;
    if tokens == 0 || w.out_features == 0 {
        return Ok(());
    }
    let (raw, scales, zeros, group, source) = match &w.layout {
        Layout::Dense { raw, dtype } => (raw, Arg::Null, Arg::Null, 1, dtype_code(*dtype)),
        Layout::Packed { words, scales, zeros, bits, group_cols } => {
            (words, Arg::In(scales), Arg::In(zeros), *group_cols, i32::from(*bits))
        }
    };
    let rows = if tokens <= FEW { FEW } else { TILE };
    let mut args = vec![Arg::In(raw), scales, zeros, Arg::In(x), bias.map_or(Arg::Null, Arg::In), Arg::Out(y)];
    for (what, n) in [("tokens", tokens), ("weight rows", w.out_features), ("weight columns", w.in_features)] {
        args.push(Arg::I32(size(what, n)?));
    }
    args.extend([Arg::I32(size("group", group)?), Arg::I32(source), Arg::I32(size("tile", rows)?)]);
    d.launch("linear_reproducible", tiles(tokens, rows, w.out_features, 1)?, &args)
}

/// `h += xᵀ x`, upper triangle and diagonal: h `[n, n]`, x `[tokens, n]`, f32; one fma chain over the call's tokens.
pub fn hessian_update(d: &Device, h: &Memory, x: &Memory, tokens: usize, n: usize) -> Result<()> {
    floats("hessian", h, product("hessian", n, n)?)?;
    floats("hessian input", x, product("hessian input", tokens, n)?)?;
    if tokens == 0 || n == 0 {
        return Ok(());
    }
    let args = [Arg::Out(h), Arg::In(x), Arg::I32(size("tokens", tokens)?), Arg::I32(size("columns", n)?)];
    d.launch("hessian_reproducible", tiles(n, TILE, n, 1)?, &args)
}

fn rows_launch(rows: usize, z: usize) -> Result<Launch> {
    Ok(Launch { grid: [blocks(rows, ROWS)?, blocks(z, 1)?, 1], block: [128, 1, 1], shared_bytes: 0 })
}

/// Root-mean-square norm of each row of x `[rows, width]` into y, scaled by `offset + weight`.
pub fn rms_norm(
    d: &Device,
    x: &Memory,
    weight: &Memory,
    y: &Memory,
    rows: usize,
    width: usize,
    eps: f32,
    offset: f32,
) -> Result<()> {
    match norm_args(x, weight, y, rows, width, eps, offset)? {
        Some(args) => d.launch("rms_norm_reproducible", rows_launch(rows, 1)?, &args),
        None => Ok(()),
    }
}

/// Cosines and sines `[tokens, half]` of a call's rows, made on the host as the CPU backend makes them.
pub struct Turns {
    /// f32 `[tokens, half]`.
    pub cosines: Memory,
    /// f32 `[tokens, half]`.
    pub sines: Memory,
    /// Pairs of a head.
    pub half: usize,
}

/// Rotates x `[tokens, heads · head_dim]` in place.
pub fn rope(
    d: &Device,
    x: &Memory,
    turns: &Turns,
    rows: &RowTable,
    tokens: usize,
    heads: usize,
    head_dim: usize,
) -> Result<()> {
    let half = turns.half;
    floats("rope input", x, product("rope input", tokens, product("rope input", heads, head_dim)?)?)?;
    let table = product("rotations", tokens, half)?;
    floats("cosines", &turns.cosines, table)?;
    floats("sines", &turns.sines, table)?;
    floats("row positions", &rows.positions, tokens)?;
    if product("rotated width", half, 2)? > head_dim {
        return Err(KernelError::Length { what: "rotated width", expected: head_dim, found: half * 2 });
    }
    let pairs = product("rotations", table, heads)?;
    if pairs == 0 {
        return Ok(());
    }
    size("rotations", pairs)?;
    let mut args = vec![Arg::Out(x), Arg::In(&turns.cosines), Arg::In(&turns.sines), Arg::In(&rows.positions)];
    for (what, n) in [("tokens", tokens), ("heads", heads), ("head width", head_dim), ("rotated width", half)] {
        args.push(Arg::I32(size(what, n)?));
    }
    d.launch("rope_reproducible", flat(pairs, 1)?, &args)
}

/// `y = silu(gate) · up`, `n` elements.
pub fn silu_mul(d: &Device, gate: &Memory, up: &Memory, y: &Memory, n: usize) -> Result<()> {
    floats("gate", gate, n)?;
    floats("up", up, n)?;
    floats("activation", y, n)?;
    if n == 0 {
        return Ok(());
    }
    let args = [Arg::In(gate), Arg::In(up), Arg::Out(y), Arg::I32(size("activation", n)?)];
    d.launch("activation_reproducible", flat(n, 4)?, &args)
}

/// Causal attention of q `[tokens, heads · head_dim]` over the cache into y, which must be zero where no segment has a
/// row. One sequence at a time; its scores are kept for as many heads and rows as [`SCRATCH`] holds.
pub fn attention(
    d: &Device,
    q: &Memory,
    cache: CacheView<'_>,
    y: &Memory,
    segments: &[Segment],
    tokens: usize,
    shape: &AttentionShape,
) -> Result<()> {
    let (heads, kv_heads, head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let why = format!("{heads} query heads for {kv_heads} key heads");
        return Err(KernelError::Unsupported { backend: d.name(), op: "attention", why });
    }
    check_len("key heads", kv_heads, cache.kv_heads)?;
    check_len("head width", head_dim, cache.head_dim)?;
    let width = product("queries", heads, head_dim)?;
    let n = product("queries", tokens, width)?;
    floats("queries", q, n)?;
    floats("attention", y, n)?;
    cache.check(d, "attention", segments)?;
    if let Some(s) = segments.iter().find(|s| s.row.saturating_add(s.tokens) > tokens) {
        return Err(KernelError::Length { what: "rows of a segment", expected: tokens, found: s.row + s.tokens });
    }
    let slot = kv_heads * cache.capacity * head_dim * 4;
    // A window wider than any position is none.
    let window = Arg::I32(shape.window.and_then(|w| i32::try_from(w).ok()).unwrap_or(0));
    for s in segments.iter().filter(|_| head_dim > 0) {
        let keys = [Arg::InAt(cache.keys, s.slot * slot), Arg::InAt(cache.values, s.slot * slot)];
        let mut done = 0;
        while done < s.tokens {
            // Rows of a piece see the keys up to its end.
            let room = SCRATCH / (s.past + s.tokens);
            let piece = (room.max(TILE) / TILE * TILE).min(s.tokens - done);
            let (past, first) = (s.past + done, (s.row + done) * width * 4);
            let span = past + piece;
            let rows = if piece <= FEW { FEW } else { TILE };
            let at_once = (SCRATCH / (piece * span)).clamp(1, heads);
            let scores = d.alloc(product("scores", at_once * piece, span * 4)?)?;
            let totals = d.alloc(product("totals", at_once, piece * 4)?)?;
            let sizes = |head: usize| -> Result<[Arg<'static>; 7]> {
                let list = [piece, past, head, heads, kv_heads, head_dim, cache.capacity];
                let mut args = [Arg::Null; 7];
                for (to, n) in args.iter_mut().zip(list) {
                    *to = Arg::I32(size("attention", n)?);
                }
                Ok(args)
            };
            for head in (0..heads).step_by(at_once) {
                let z = at_once.min(heads - head);
                let mut args = vec![Arg::InAt(q, first), keys[0], Arg::Out(&scores)];
                args.extend(sizes(head)?);
                let cap = Arg::F32(shape.soft_cap.unwrap_or(0.0));
                args.extend([window, Arg::F32(shape.scale), cap, Arg::I32(rows as i32)]);
                d.launch("scores_reproducible", tiles(piece, rows, span, z)?, &args)?;
                let [piece_arg, past_arg, ..] = sizes(head)?;
                let args = [Arg::Out(&scores), Arg::Out(&totals), piece_arg, past_arg, window];
                d.launch("weights_reproducible", rows_launch(piece, z)?, &args)?;
                let mut args = vec![Arg::In(&scores), Arg::In(&totals), keys[1], Arg::InAt(y, first)];
                args.extend(sizes(head)?);
                args.extend([window, Arg::I32(rows as i32)]);
                d.launch("mix_reproducible", tiles(piece, rows, head_dim, z)?, &args)?;
            }
            done += piece;
        }
    }
    Ok(())
}
