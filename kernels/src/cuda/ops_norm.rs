//! Launcher of `norm.cu`.

use super::device::{Arg, Device, Memory};
use super::ops_elementwise::{floats, per_row, product};
use super::rows::size;
use crate::error::Result;

/// What the kernels of a norm of x `[rows, width]` into y are given, its buffers checked; none where there is nothing to do.
pub(super) fn norm_args<'a>(
    x: &'a Memory,
    weight: &'a Memory,
    y: &'a Memory,
    rows: usize,
    width: usize,
    eps: f32,
    offset: f32,
) -> Result<Option<[Arg<'a>; 7]>> {
    let n = product("norm", rows, width)?;
    floats("norm input", x, n)?;
    floats("norm weight", weight, width)?;
    floats("norm", y, n)?;
    let sizes = [Arg::I32(size("rows", rows)?), Arg::I32(size("width", width)?)];
    let args = [Arg::In(x), Arg::In(weight), Arg::Out(y), sizes[0], sizes[1], Arg::F32(eps), Arg::F32(offset)];
    Ok((n > 0).then_some(args))
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
        Some(args) => d.launch("rms_norm", per_row(rows, width.div_ceil(4), 0)?, &args),
        None => Ok(()),
    }
}

/// `x += a`, then [`rms_norm`] of x `[rows, width]` into y.
pub fn add_rms_norm(
    d: &Device,
    x: &Memory,
    a: &Memory,
    weight: &Memory,
    y: &Memory,
    rows: usize,
    width: usize,
    eps: f32,
    offset: f32,
) -> Result<()> {
    let n = product("norm", rows, width)?;
    floats("norm input", x, n)?;
    floats("addend", a, n)?;
    floats("norm weight", weight, width)?;
    floats("norm", y, n)?;
    if n == 0 {
        return Ok(());
    }
    let sizes = [Arg::I32(size("rows", rows)?), Arg::I32(size("width", width)?)];
    let args =
        [Arg::Out(x), Arg::In(a), Arg::In(weight), Arg::Out(y), sizes[0], sizes[1], Arg::F32(eps), Arg::F32(offset)];
    d.launch("add_rms_norm", per_row(rows, width.div_ceil(4), 0)?, &args)
}
