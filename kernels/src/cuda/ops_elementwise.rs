//! Launchers of `elementwise.cu`, and what every launcher of this folder needs: sizes checked against memory before
//! a kernel may touch it.

use super::device::{Arg, Device, Launch, Memory};
use super::rows::{bytes_of, floats_of, size};
use crate::backend::Activation;
use crate::error::{KernelError, Result};

/// Threads of a block of the kernels without shared work.
const THREADS: usize = 256;

/// Blocks of [`abs_max`]: enough to fill a large GPU.
const MAX_BLOCKS: usize = 1024;

/// `a · b`, or an error.
pub(super) fn product(what: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or(KernelError::Overflow(what))
}

/// Fails unless `m` has room for `count` elements of `width` bytes.
pub(super) fn holds(what: &'static str, m: &Memory, count: usize, width: usize) -> Result<()> {
    let bytes = product(what, count, width)?;
    if m.bytes() >= bytes {
        return Ok(());
    }
    Err(KernelError::Length { what, expected: count, found: m.bytes() / width.max(1) })
}

/// As [`holds`], for f32.
pub(super) fn floats(what: &'static str, m: &Memory, count: usize) -> Result<()> {
    holds(what, m, count, 4)
}

/// One dimension: enough threads for `n` elements, `each` to a thread.
pub(super) fn flat(n: usize, each: usize) -> Result<Launch> {
    let blocks = u32::try_from(n.div_ceil(THREADS * each)).map_err(|_| KernelError::Overflow("grid"))?;
    Ok(Launch { grid: [blocks, 1, 1], block: [THREADS as u32, 1, 1], shared_bytes: 0 })
}

/// A block a row, with as many threads (whole warps, at most 256) as `work` has use for.
pub(super) fn per_row(rows: usize, work: usize, shared_bytes: usize) -> Result<Launch> {
    let rows = u32::try_from(size("rows", rows)?).map_err(|_| KernelError::Overflow("rows"))?;
    let threads = work.next_multiple_of(32).clamp(32, THREADS) as u32;
    let shared_bytes = u32::try_from(shared_bytes).map_err(|_| KernelError::Overflow("shared memory"))?;
    Ok(Launch { grid: [rows, 1, 1], block: [threads, 1, 1], shared_bytes })
}

/// `y = act(gate) · up`, `n` elements.
pub fn activation_mul(d: &Device, gate: &Memory, up: &Memory, y: &Memory, n: usize, act: Activation) -> Result<()> {
    floats("gate", gate, n)?;
    floats("up", up, n)?;
    floats("activation", y, n)?;
    if n == 0 {
        return Ok(());
    }
    let kind = match act {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    };
    let args = [Arg::In(gate), Arg::In(up), Arg::Out(y), Arg::I32(size("activation", n)?), Arg::I32(kind)];
    d.launch("activation_mul", flat(n, 4)?, &args)
}

/// `x += y`, `n` elements.
pub fn add_assign(d: &Device, x: &Memory, y: &Memory, n: usize) -> Result<()> {
    floats("sum", x, n)?;
    floats("addend", y, n)?;
    if n == 0 {
        return Ok(());
    }
    d.launch("add_assign", flat(n, 4)?, &[Arg::Out(x), Arg::In(y), Arg::I32(size("sum", n)?)])
}

/// `x ← cap · tanh(x / cap)`, `n` elements.
pub fn soft_cap(d: &Device, x: &Memory, n: usize, cap: f32) -> Result<()> {
    floats("capped values", x, n)?;
    if n == 0 {
        return Ok(());
    }
    d.launch("soft_cap", flat(n, 4)?, &[Arg::Out(x), Arg::I32(size("capped values", n)?), Arg::F32(cap)])
}

/// Rows `which` of x `[total, width]` into y `[which.len(), width]`.
pub fn gather_rows(d: &Device, x: &Memory, total: usize, width: usize, which: &[usize], y: &Memory) -> Result<()> {
    floats("gather input", x, product("gather input", total, width)?)?;
    let n = product("gathered rows", which.len(), width)?;
    floats("gathered rows", y, n)?;
    if let Some(row) = which.iter().find(|r| **r >= total) {
        let why = format!("row {row} is not below {total}");
        return Err(KernelError::Unsupported { backend: d.name(), op: "gather_rows", why });
    }
    if n == 0 {
        return Ok(());
    }
    size("gathered rows", n)?;
    let index = which.iter().map(|r| size("row", *r)).collect::<Result<Vec<i32>>>()?;
    let index = d.upload(&bytes_of(&index))?;
    let (count, width) = (size("gathered rows", which.len())?, size("width", width)?);
    let args = [Arg::In(x), Arg::In(&index), Arg::Out(y), Arg::I32(count), Arg::I32(width)];
    d.launch("gather_rows", flat(n, 1)?, &args)
}

/// Columns `[first, first + count)` of x `[rows, width]` into y `[rows, count]`.
pub fn slice_columns(
    d: &Device,
    x: &Memory,
    y: &Memory,
    rows: usize,
    width: usize,
    first: usize,
    count: usize,
) -> Result<()> {
    floats("slice input", x, product("slice input", rows, width)?)?;
    let n = product("slice", rows, count)?;
    floats("slice", y, n)?;
    let end = first.checked_add(count).ok_or(KernelError::Overflow("column range"))?;
    if end > width {
        return Err(KernelError::Length { what: "column range", expected: width, found: end });
    }
    if n == 0 {
        return Ok(());
    }
    size("slice", n)?;
    let sizes = [("rows", rows), ("width", width), ("first column", first), ("columns", count)];
    let mut args = vec![Arg::In(x), Arg::Out(y)];
    for (what, n) in sizes {
        args.push(Arg::I32(size(what, n)?));
    }
    d.launch("slice_columns", flat(n, 1)?, &args)
}

/// Largest |x| of `n` elements; a NaN counts as infinity. Waits for the device.
pub fn abs_max(d: &Device, x: &Memory, n: usize) -> Result<f32> {
    floats("values", x, n)?;
    if n == 0 {
        return Ok(0.0);
    }
    let out = d.alloc_zeroed(4)?;
    let mut launch = flat(n, 16)?;
    launch.grid[0] = launch.grid[0].min(MAX_BLOCKS as u32);
    d.launch("abs_max", launch, &[Arg::In(x), Arg::Out(&out), Arg::I32(size("values", n)?)])?;
    floats_of(&d.read(&out, 0..4)?).first().copied().ok_or(KernelError::Overflow("maximum"))
}
