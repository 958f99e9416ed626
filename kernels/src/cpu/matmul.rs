//! Bounds-checked f32 matrix product on strided slices, and the panel-wise product of a stored weight.

use gemm::Parallelism;
use rayon::prelude::*;

use crate::error::{KernelError, Result};

/// A strided matrix: element `(r, c)` is `data[r · row + c · col]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub col: usize,
}

/// Elements a `rows × cols` view with these strides spans.
fn span(rows: usize, cols: usize, row: usize, col: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row + (cols - 1) * col + 1 }
}

fn check_span(what: &'static str, need: usize, have: usize) -> Result<()> {
    if need <= have { Ok(()) } else { Err(KernelError::Length { what, expected: need, found: have }) }
}

/// `dst = (keep ? dst : 0) + factor · a b`, `[m, n] = [m, k] [k, n]`, on the calling thread.
pub fn matmul(
    dst: &mut [f32],
    (row, col): (usize, usize),
    keep: bool,
    (m, n, k): (usize, usize, usize),
    a: View,
    b: View,
    factor: f32,
) -> Result<()> {
    check_span("product", span(m, n, row, col), dst.len())?;
    // SAFETY: the span check above is the contract on `dst`, and `&mut` makes it exclusive.
    unsafe { matmul_raw(dst.as_mut_ptr(), (row, col), keep, (m, n, k), a, b, factor) }
}

/// # Safety
/// `dst` is valid for writes (and reads) at `r · row + c · col` for all `r < m`, `c < n`, and nobody else touches
/// those elements during the call.
unsafe fn matmul_raw(
    dst: *mut f32,
    (row, col): (usize, usize),
    keep: bool,
    (m, n, k): (usize, usize, usize),
    a: View,
    b: View,
    factor: f32,
) -> Result<()> {
    check_span("left factor", span(m, k, a.row, a.col), a.data.len())?;
    check_span("right factor", span(k, n, b.row, b.col), b.data.len())?;
    let (dst_cs, dst_rs) = (col as isize, row as isize);
    let (a_cs, a_rs) = (a.col as isize, a.row as isize);
    let (b_cs, b_rs) = (b.col as isize, b.row as isize);
    let (pa, pb) = (a.data.as_ptr(), b.data.as_ptr());
    let none = Parallelism::None;
    // SAFETY: both factors were checked to span no more than their slices; the caller vouches for `dst`.
    unsafe {
        gemm::gemm(
            m, n, k, dst, dst_cs, dst_rs, keep, pa, a_cs, a_rs, pb, b_cs, b_rs, 1.0, factor, false, false, false, none,
        );
    }
    Ok(())
}

/// Start of `y`, shared by tasks that each write their own columns.
struct Stripes(*mut f32);
// SAFETY: the pointer is only used inside `by_panels`, where tasks write disjoint columns of a live `&mut` slice.
unsafe impl Send for Stripes {}
// SAFETY: as above.
unsafe impl Sync for Stripes {}

/// Rows of a panel: about a mebibyte of f32, so it stays in the second-level cache. A function of `k` alone, so the
/// split, and with it the result, is the same for any number of threads.
fn panel_rows(k: usize) -> usize {
    ((1usize << 18) / k.max(1)).clamp(32, 128) / 16 * 16
}

/// `y = x Wᵀ` for x `[t, k]`, y `[t, n]`; `widen(rows, panel)` writes rows of W as f32 `[rows, k]`.
pub fn by_panels<F>(y: &mut [f32], x: &[f32], (t, n, k): (usize, usize, usize), widen: F) -> Result<()>
where
    F: Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
{
    check_span("y", t * n, y.len())?;
    let rows = panel_rows(k);
    let stripes = Stripes(y.as_mut_ptr());
    let stripes = &stripes;
    (0..n.div_ceil(rows)).into_par_iter().try_for_each_init(
        || vec![0f32; rows * k],
        |panel, p| {
            let first = p * rows;
            let m = rows.min(n - first);
            let panel = &mut panel[..m * k];
            widen(first..first + m, panel);
            let a = View { data: panel, row: k, col: 1 };
            let b = View { data: x, row: 1, col: k };
            // SAFETY: elements `j · n + first + i`, `j < t`, `i < m`, lie in `y` (t · n checked above), and the ranges
            // `first .. first + m` of different tasks are disjoint; `y` is borrowed mutably for the whole call.
            unsafe { matmul_raw(stripes.0.add(first), (1, n), false, (m, t, k), a, b, 1.0) }
        },
    )
}
