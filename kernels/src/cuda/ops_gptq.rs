//! Launchers of `solve_gptq.cu`, and the solvers of a GPU as the host's driver asks for them.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{floats, product};
use super::ops_factor::{self, TILE_SHARED, indices, tiles};
use super::rows::{bytes_of, floats_of, size};
use super::{GpuBackend, buffer};
use crate::backend::Buffer;
use crate::error::{KernelError, Result, check_len};
use crate::qdq::ScaleType;
use crate::solver::{DampedHessian, GptqResult, GptqTask, Solver};

/// Side of a tile of the updates and the loss.
const TILE: usize = 64;
/// Rows of a block of `gptq_block`, a warp each.
const WARPS: usize = 4;
/// Largest hundredth of a range that is tried.
const LAST_PERCENT: u16 = 107;
/// Candidates of a scale, a thread each.
const MAX_CANDIDATES: usize = 128;
/// Flags of `gptq_scales`.
const SYMMETRIC: i32 = 1;
const SIGNED: i32 = 2;
/// Blocks along the second side of a grid.
const MAX_GRID_Y: usize = 65_535;

/// Scales, and zero points where the scheme has them: f32 and u8 `[out_features, groups]`.
fn scales(d: &Device, task: &GptqTask<'_>, w: &Memory, diag: &Memory) -> Result<(Memory, Option<Memory>)> {
    let (groups, cols) = (task.scheme.groups(task.n)?, task.scheme.group_cols(task.n));
    let all = product("scales", task.out_features, groups)?;
    let scales = d.alloc(product("scales", all, 4)?)?;
    let zeros = if task.scheme.symmetric { None } else { Some(d.alloc(all)?) };
    let symmetric = task.scheme.symmetric;
    let steps = task.first_percent.map_or(0, |p| usize::from(LAST_PERCENT.saturating_sub(p)) / 2 + 1);
    let candidates = 1 + steps * if symmetric && task.signed_scales { 2 } else { 1 };
    if candidates > MAX_CANDIDATES {
        return Err(KernelError::Length { what: "scale candidates", expected: MAX_CANDIDATES, found: candidates });
    }
    let flags = if symmetric { SYMMETRIC } else { 0 } | if task.signed_scales { SIGNED } else { 0 };
    let kind = match task.scale_type {
        ScaleType::Bf16 => 0,
        ScaleType::F16 => 1,
        ScaleType::F32 => 2,
    };
    let threads = candidates.next_multiple_of(32) as u32;
    let args = [
        Arg::In(w),
        Arg::In(diag),
        Arg::Out(&scales),
        zeros.as_ref().map_or(Arg::Null, Arg::Out),
        Arg::I32(size("columns", task.n)?),
        Arg::I32(size("group", cols)?),
        Arg::I32(i32::from(task.scheme.max_code())),
        Arg::I32(kind),
        Arg::I32(flags),
        Arg::I32(i32::from(task.min_zero)),
        Arg::I32(i32::from(task.first_percent.unwrap_or(LAST_PERCENT))),
        Arg::I32(size("candidates", candidates)?),
    ];
    d.launch("gptq_scales", Launch { block: [threads, 1, 1], ..tiles(all, 1, 1, 0)? }, &args)?;
    Ok((scales, zeros))
}

/// Scales and codes of a matrix; u `[n, n]` f32. Waits for the device.
pub fn gptq(d: &Device, task: &GptqTask<'_>, u: &Memory) -> Result<GptqResult> {
    let (out, n) = (task.out_features, task.n);
    let cells = product("weight", out, n)?;
    check_len("weight", cells, task.w.len())?;
    check_len("solving order", n, task.perm.len())?;
    check_len("diagonal", n, task.diag.len())?;
    floats("factor", u, product("factor", n, n)?)?;
    if cells == 0 {
        return Ok(GptqResult { codes: Vec::new(), scales: Vec::new(), zeros: None });
    }
    let (perm, diag) = (d.upload(&bytes_of(&indices(task.perm, n)?))?, d.upload(&bytes_of(task.diag))?);
    let w = d.upload(&bytes_of(task.w))?;
    let (scales, zeros) = scales(d, task, &w, &diag)?;
    let (n_arg, out_arg) = (Arg::I32(size("columns", n)?), Arg::I32(size("rows", out)?));
    let p = d.alloc(product("weight", cells, 4)?)?;
    let gather = Launch { block: [256, 1, 1], ..tiles(n.div_ceil(256), out.min(MAX_GRID_Y), 1, 0)? };
    let args = [Arg::In(&w), Arg::In(&perm), Arg::In(&diag), Arg::Out(&p), out_arg, n_arg];
    d.launch("gptq_gather", gather, &args)?;
    drop(w);
    let block = task.block.clamp(1, n);
    let (codes, errors) = (d.alloc(cells)?, d.alloc(product("errors", product("errors", out, block)?, 4)?)?);
    let shared = u32::try_from(WARPS * block * 4).map_err(|_| KernelError::Overflow("block of columns"))?;
    let (block_arg, cols) = (Arg::I32(size("block", block)?), task.scheme.group_cols(n));
    for start in (0..n).step_by(block) {
        let count = block.min(n - start);
        let (start_arg, count_arg) = (Arg::I32(size("columns", start)?), Arg::I32(size("block", count)?));
        let args = [
            Arg::In(&p),
            Arg::In(u),
            Arg::In(&perm),
            Arg::In(&scales),
            zeros.as_ref().map_or(Arg::Null, Arg::In),
            Arg::Out(&codes),
            Arg::Out(&errors),
            out_arg,
            n_arg,
            Arg::I32(size("group", cols)?),
            Arg::I32(i32::from(task.scheme.max_code())),
            start_arg,
            count_arg,
            block_arg,
        ];
        let rows = Launch { block: [32 * WARPS as u32, 1, 1], ..tiles(out.div_ceil(WARPS), 1, 1, shared)? };
        d.launch("gptq_block", rows, &args)?;
        let rest = n - start - count;
        if rest > 0 {
            let grid = tiles(rest.div_ceil(TILE), out.div_ceil(TILE), 1, TILE_SHARED)?;
            let args = [Arg::Out(&p), Arg::In(&errors), Arg::In(u), out_arg, n_arg, start_arg, count_arg, block_arg];
            d.launch("gptq_update", grid, &args)?;
        }
    }
    let zeros = zeros.map(|z| d.read(&z, 0..z.bytes())).transpose()?;
    Ok(GptqResult { codes: d.read(&codes, 0..cells)?, scales: floats_of(&d.read(&scales, 0..scales.bytes())?), zeros })
}

/// `tr((W − Q) H (W − Q)ᵀ)` and `tr(W H Wᵀ)`: w, q `[out, n]`, h `[n, n]` f32, upper triangle. Waits for the device.
pub fn loss(d: &Device, w: &[f32], q: &[f32], h: &Memory, out: usize, n: usize) -> Result<(f64, f64)> {
    let cells = product("weight", out, n)?;
    check_len("weight", cells, w.len())?;
    check_len("dequantized weight", cells, q.len())?;
    floats("Hessian", h, product("Hessian", n, n)?)?;
    if cells == 0 {
        return Ok((0.0, 0.0));
    }
    let (w, q) = (d.upload(&bytes_of(w))?, d.upload(&bytes_of(q))?);
    let (across, down) = (n.div_ceil(TILE), out.div_ceil(TILE));
    let half = product("loss", product("loss", across, down)?, 8)?;
    let partial = d.alloc(product("loss", half, 2)?)?;
    let sizes = [Arg::I32(size("rows", out)?), Arg::I32(size("columns", n)?)];
    let args = [Arg::In(&w), Arg::In(&q), Arg::In(h), Arg::Out(&partial), sizes[0], sizes[1]];
    d.launch("gptq_loss", tiles(across, down, 2, TILE_SHARED)?, &args)?;
    let sum = |bytes: &[u8]| -> f64 { bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).sum() };
    Ok((sum(&d.read(&partial, 0..half)?), sum(&d.read(&partial, half..2 * half)?)))
}

impl Solver for GpuBackend {
    fn factor(&self, hessian: &DampedHessian<'_>) -> Result<Option<std::result::Result<Buffer, usize>>> {
        // The host's factorization has an order of sums of its own.
        if self.is_reproducible() {
            return Ok(None);
        }
        let DampedHessian { h, n, perm, diag, damped } = *hessian;
        let made = ops_factor::factor(&self.device, self.mem(h)?, n, perm, diag, damped)?;
        Ok(Some(made.map(|u| buffer(n * n, u))))
    }

    fn gptq(&self, task: &GptqTask<'_>) -> Result<GptqResult> {
        gptq(&self.device, task, self.mem(task.u)?)
    }

    fn loss(&self, w: &[f32], q: &[f32], h: &Buffer, out_features: usize, n: usize) -> Result<Option<(f64, f64)>> {
        if self.is_reproducible() {
            return Ok(None);
        }
        loss(&self.device, w, q, self.mem(h)?, out_features, n).map(Some)
    }
}
