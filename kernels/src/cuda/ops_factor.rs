//! Launchers of `solve_factor.cu`.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{floats, product};
use super::rows::{bytes_of, size, words_of};
use crate::error::{KernelError, Result, check_len};

/// Side of a tile.
const TILE: usize = 64;
/// Two operands of 32 steps, `RP_LD` floats each.
pub(super) const TILE_SHARED: u32 = 2 * 32 * 68 * 4;

/// A launch of 64 threads a block.
pub(super) fn tiles(x: usize, y: usize, z: u32, shared_bytes: u32) -> Result<Launch> {
    let blocks = |n: usize| u32::try_from(n).map_err(|_| KernelError::Overflow("grid"));
    Ok(Launch { grid: [blocks(x)?, blocks(y)?, z], block: [TILE as u32, 1, 1], shared_bytes })
}

/// Indices as the kernels take them.
pub(super) fn indices(perm: &[usize], below: usize) -> Result<Vec<u32>> {
    let index = |i: &usize| match u32::try_from(*i) {
        Ok(at) if *i < below => Ok(at),
        _ => Err(KernelError::Length { what: "solving order", expected: below, found: *i }),
    };
    perm.iter().map(index).collect()
}

/// `U` `[n, n]` f32 with `H⁻¹ = Uᵀ U` in solving order, or the position of the first pivot that fails. h `[n, n]` f32, upper
/// triangle; perm, diag and damped `[n]` as in [`crate::solver::DampedHessian`]. Waits for the device.
pub fn factor(
    d: &Device,
    h: &Memory,
    n: usize,
    perm: &[usize],
    diag: &[f32],
    damped: &[f32],
) -> Result<std::result::Result<Memory, usize>> {
    let cells = product("Hessian", n, n)?;
    floats("Hessian", h, cells)?;
    for (what, len) in [("solving order", perm.len()), ("diagonal", diag.len()), ("damped diagonal", damped.len())] {
        check_len(what, n, len)?;
    }
    let u = d.alloc_zeroed(product("factor", cells, 4)?)?;
    if n == 0 {
        return Ok(Ok(u));
    }
    let (n_arg, count) = (Arg::I32(size("columns", n)?), n.div_ceil(TILE));
    let a = d.alloc(product("factor", cells, 4)?)?;
    let inverses = d.alloc(product("factor", count * TILE * TILE, 4)?)?;
    let status = d.upload(&bytes_of(&[u32::MAX, u32::MAX]))?;
    let (perm, diag, damped) =
        (d.upload(&bytes_of(&indices(perm, n)?))?, d.upload(&bytes_of(diag))?, d.upload(&bytes_of(damped))?);
    let flat = Launch { block: [256, 1, 1], ..tiles(n.div_ceil(256), n, 1, 0)? };
    let args = [Arg::Out(&a), Arg::In(h), Arg::In(&perm), Arg::In(&diag), Arg::In(&damped), n_arg];
    d.launch("factor_prepare", flat, &args)?;
    for tile in 0..count {
        let at = Arg::I32(size("columns", tile * TILE)?);
        let args = [Arg::In(&a), Arg::Out(&inverses), Arg::Out(&status), n_arg, at];
        d.launch("factor_diagonal", tiles(1, 1, 1, 0)?, &args)?;
        let left = count - tile - 1;
        if left > 0 {
            let args = [Arg::Out(&a), Arg::In(&inverses), n_arg, at];
            d.launch("factor_panel", tiles(left, 1, 1, TILE_SHARED)?, &args)?;
            d.launch("factor_update", tiles(left, left, 1, TILE_SHARED)?, &[Arg::Out(&a), n_arg, at])?;
        }
    }
    for tile in 0..count {
        let args = [Arg::Out(&u), Arg::In(&a), Arg::In(&inverses), n_arg, Arg::I32(size("tiles", tile)?)];
        d.launch("factor_inverse", tiles(tile + 1, 1, 1, 2 * TILE_SHARED)?, &args)?;
    }
    let check = Launch { block: [128, 1, 1], ..tiles(n, 1, 1, 0)? };
    d.launch("factor_check", check, &[Arg::In(&u), Arg::Out(&status), n_arg])?;
    let failed = words_of(&d.read(&status, 0..8)?);
    Ok(match failed.as_slice() {
        [u32::MAX, u32::MAX] => Ok(u),
        // The factorization runs from the last position to the first.
        [pivot, _] if *pivot != u32::MAX => Err((n - 1).saturating_sub(*pivot as usize)),
        [_, row] => Err((*row as usize).min(n - 1)),
        _ => Err(n - 1),
    })
}
