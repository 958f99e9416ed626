//! The f32 matrix product of this backend: every element of the result is one chain of fused multiply-adds over the inner
//! index in ascending order.
//!
//! That order is the contract (docs/architecture.md, "Canonical arithmetic"): a row of the result depends on its own row of the
//! left factor alone, so it is the same in any batch, on any number of threads, on any instruction set with a fused multiply-add, and
//! on a GPU that keeps the same order. Speed comes from the other two indices: a tile of up to [`TILE`] rows by [`WIDTH`] columns stays
//! in registers (AVX2: twelve accumulators; AVX-512: twelve of twice the width).

use rayon::prelude::*;

use super::aligned::Aligned;
use super::simd::{Kernel, Lanes, Simd};
use crate::error::{KernelError, Result};

/// Columns of a panel.
pub const WIDTH: usize = 16;
/// Rows of a register tile.
const TILE: usize = 6;
/// Inner steps between two visits of a result's tile: one panel block (16 KiB) stays in the first-level cache.
const DEPTH: usize = 256;

/// The left factor: element `(r, i)` is `data[r · row + i · step]`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub step: usize,
}

/// One panel of the right factor: element `(i, c)` is `data[i · stride + c]`, `c < WIDTH` (all sixteen readable).
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// Sixteen columns of a product, for all rows: `out[r · stride + c] = (keep ? out : 0) ⊕ chain_i fma(left[r, i], panel[i, c])`, the
/// chain starting from what is kept. Only the first `columns` are written.
pub struct Strip<'a> {
    pub left: Left<'a>,
    pub panel: Panel<'a>,
    pub rows: usize,
    pub inner: usize,
    pub columns: usize,
    pub keep: bool,
    pub stride: usize,
    /// From the strip's first element.
    pub out: &'a mut [f32],
}

fn span(a: usize, rows: usize, b: usize, cols: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * a + (cols - 1) * b + 1 }
}

fn check(what: &'static str, need: usize, have: usize) -> Result<()> {
    if need <= have { Ok(()) } else { Err(KernelError::Length { what, expected: need, found: have }) }
}

/// Computes a strip on the calling thread.
pub fn strip(simd: Simd, s: Strip<'_>) -> Result<()> {
    check("left factor", span(s.left.row, s.rows, s.left.step, s.inner), s.left.data.len())?;
    check("panel", span(s.panel.stride, s.inner, 1, WIDTH), s.panel.data.len())?;
    check("columns", s.columns, WIDTH)?;
    check("product", span(s.stride, s.rows, 1, s.columns), s.out.len())?;
    let raw = Raw {
        left: s.left.data.as_ptr(),
        row: s.left.row,
        step: s.left.step,
        panel: s.panel.data.as_ptr(),
        panel_stride: s.panel.stride,
        rows: s.rows,
        inner: s.inner,
        columns: s.columns,
        keep: s.keep,
        stride: s.stride,
        out: s.out.as_mut_ptr(),
    };
    simd.run(raw);
    Ok(())
}

/// A strip whose extents were checked.
struct Raw {
    left: *const f32,
    row: usize,
    step: usize,
    panel: *const f32,
    panel_stride: usize,
    rows: usize,
    inner: usize,
    columns: usize,
    keep: bool,
    stride: usize,
    out: *mut f32,
}

impl Kernel for Raw {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // Twice as many rows where a register holds the whole width.
        let most = if L::N == WIDTH { 2 * TILE } else { TILE };
        let mut r = 0;
        while r < self.rows {
            let m = match (self.rows - r).min(most) {
                12.. => 12,
                8..12 => 8,
                6..8 => 6,
                4..6 => 4,
                2..4 => 2,
                _ => 1,
            };
            // SAFETY: `r + m ≤ rows`, and whoever made this `Raw` checked the extents of all rows; a narrow strip goes through
            // `part`, which holds `m · 16`. The caller vouches for the instruction set.
            unsafe {
                let out = self.out.add(r * self.stride);
                if self.columns == WIDTH {
                    self.tile::<L>(m, r, out, self.stride);
                } else {
                    let mut part = [0f32; 2 * TILE * WIDTH];
                    for (row, c) in (0..m).flat_map(|row| (0..self.columns).map(move |c| (row, c))) {
                        if self.keep {
                            part[row * WIDTH + c] = *out.add(row * self.stride + c);
                        }
                    }
                    self.tile::<L>(m, r, part.as_mut_ptr(), WIDTH);
                    for (row, c) in (0..m).flat_map(|row| (0..self.columns).map(move |c| (row, c))) {
                        *out.add(row * self.stride + c) = part[row * WIDTH + c];
                    }
                }
            }
            r += m;
        }
    }
}

impl Raw {
    /// # Safety
    /// The instruction set of `L`; rows `r .. r + m` lie within the checked extents and `out` holds m rows of sixteen, `stride` apart.
    #[inline(always)]
    unsafe fn tile<L: Lanes>(&self, m: usize, r: usize, out: *mut f32, stride: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            match (m, L::N == WIDTH) {
                (12, true) => self.chains::<L, 12, 1>(r, out, stride),
                (8, true) => self.chains::<L, 8, 1>(r, out, stride),
                (6, true) => self.chains::<L, 6, 1>(r, out, stride),
                (4, true) => self.chains::<L, 4, 1>(r, out, stride),
                (2, true) => self.chains::<L, 2, 1>(r, out, stride),
                (_, true) => self.chains::<L, 1, 1>(r, out, stride),
                (6, false) => self.chains::<L, 6, 2>(r, out, stride),
                (4, false) => self.chains::<L, 4, 2>(r, out, stride),
                (2, false) => self.chains::<L, 2, 2>(r, out, stride),
                (_, false) => self.chains::<L, 1, 2>(r, out, stride),
            }
        }
    }

    /// M rows, V registers wide.
    ///
    /// # Safety
    /// As [`Self::tile`] with m = M, and V · N is sixteen.
    #[inline(always)]
    unsafe fn chains<L: Lanes, const M: usize, const V: usize>(&self, r: usize, out: *mut f32, stride: usize) {
        // SAFETY: the offsets are those of elements `(r + m, i)` of the left factor, `(i, c)` of the panel and `(m, c)` of `out`.
        unsafe {
            let mut acc = [[L::splat(0.0); V]; M];
            if self.keep {
                for m in 0..M {
                    for v in 0..V {
                        acc[m][v] = L::load(out.add(m * stride + v * L::N));
                    }
                }
            }
            let (step, panel_stride) = (self.step, self.panel_stride);
            // A pointer a row: an address is then a base and a shared index, not a running sum.
            let mut a = [self.left; M];
            for m in 0..M {
                a[m] = self.left.wrapping_add((r + m) * self.row);
            }
            let mut b = self.panel;
            let mut i = self.inner;
            if step == 1 {
                while i >= 4 {
                    for u in 0..4 {
                        let mut columns = [L::splat(0.0); V];
                        for v in 0..V {
                            columns[v] = L::load(b.add(u * panel_stride + v * L::N));
                        }
                        for m in 0..M {
                            let x = L::splat(*a[m].add(u));
                            for v in 0..V {
                                acc[m][v] = L::fmadd(x, columns[v], acc[m][v]);
                            }
                        }
                    }
                    for m in 0..M {
                        a[m] = a[m].wrapping_add(4);
                    }
                    b = b.wrapping_add(4 * panel_stride);
                    i -= 4;
                }
            }
            while i > 0 {
                let mut columns = [L::splat(0.0); V];
                for v in 0..V {
                    columns[v] = L::load(b.add(v * L::N));
                }
                for m in 0..M {
                    let x = L::splat(*a[m]);
                    for v in 0..V {
                        acc[m][v] = L::fmadd(x, columns[v], acc[m][v]);
                    }
                    a[m] = a[m].wrapping_add(step);
                }
                b = b.wrapping_add(panel_stride);
                i -= 1;
            }
            for m in 0..M {
                for v in 0..V {
                    L::store(out.add(m * stride + v * L::N), acc[m][v]);
                }
            }
        }
    }
}

/// Start of `y`, shared by tasks that each write their own columns.
struct Stripes(*mut f32);
// SAFETY: the pointer is only used inside `linear`, where tasks write disjoint columns of a live `&mut` slice.
unsafe impl Send for Stripes {}
// SAFETY: as above.
unsafe impl Sync for Stripes {}

/// Transposes `rows ≤ 16` rows of `k` into a panel `[k, 16]`; missing rows are zero.
pub fn interleave(simd: Simd, rows: &[f32], k: usize, panel: &mut [f32]) {
    simd.run(Interleave { rows, k, panel });
}

struct Interleave<'a> {
    rows: &'a [f32],
    k: usize,
    panel: &'a mut [f32],
}

impl Kernel for Interleave<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { rows, k, panel } = self;
        let count = rows.len().checked_div(k).unwrap_or(0);
        if count == WIDTH {
            // Eight columns at a time: each cache line of a row is read once while the panel's lines are written whole.
            let mut i = 0;
            while i + 8 <= k {
                let mut block = [[0f32; 8]; WIDTH];
                for r in 0..WIDTH {
                    block[r].copy_from_slice(&rows[r * k + i..r * k + i + 8]);
                }
                for (c, out) in panel[i * WIDTH..(i + 8) * WIDTH].as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
                    for r in 0..WIDTH {
                        out[r] = block[r][c];
                    }
                }
                i += 8;
            }
            for i in i..k {
                for r in 0..WIDTH {
                    panel[i * WIDTH + r] = rows[r * k + i];
                }
            }
        } else {
            for (i, out) in panel.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate().take(k) {
                *out = [0.0; WIDTH];
                for r in 0..count {
                    out[r] = rows[r * k + i];
                }
            }
        }
    }
}

/// `y = x Wᵀ` for x `[t, k]`, y `[t, n]`; `fill(rows, panel)` writes at most sixteen rows of W as a panel `[k, 16]`, zero where rows
/// are missing.
pub fn linear<F>(simd: Simd, y: &mut [f32], x: &[f32], (t, n, k): (usize, usize, usize), fill: F) -> Result<()>
where
    F: Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
{
    check("y", t.saturating_mul(n), y.len())?;
    check("x", t.saturating_mul(k), x.len())?;
    let stripes = Stripes(y.as_mut_ptr());
    let stripes = &stripes;
    (0..n.div_ceil(WIDTH)).into_par_iter().for_each_init(
        || Aligned::<f32>::zeros(WIDTH * k),
        |panel, p| {
            let first = p * WIDTH;
            let columns = WIDTH.min(n - first);
            fill(first..first + columns, panel);
            let mut done = 0;
            loop {
                let inner = DEPTH.min(k - done);
                // The left factor has `t · k` elements and the panel `k · 16`; the strip's columns `first .. first + columns` of y
                // are this task's alone.
                let raw = Raw {
                    left: x[done.min(x.len())..].as_ptr(),
                    row: k,
                    step: 1,
                    panel: panel[done * WIDTH..].as_ptr(),
                    panel_stride: WIDTH,
                    rows: t,
                    inner,
                    columns,
                    keep: done > 0,
                    stride: n,
                    out: stripes.0.wrapping_add(first),
                };
                simd.run(raw);
                done += inner;
                if done >= k {
                    break;
                }
            }
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::simd::Level;
    use super::*;

    fn noise(len: usize, mut seed: u64) -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// The scalar twin, and the definition.
    fn twin(x: &[f32], w: &[f32], (t, n, k): (usize, usize, usize)) -> Vec<f32> {
        let cell = |i: usize| {
            let (r, c) = (i / n, i % n);
            (0..k).fold(0f32, |acc, j| x[r * k + j].mul_add(w[c * k + j], acc))
        };
        (0..t * n).map(cell).collect()
    }

    #[test]
    fn every_element_is_one_chain_of_fused_products() {
        for level in [Level::Avx2, Level::Avx512] {
            let simd = Simd::up_to(level);
            if simd.level() == Level::Portable {
                continue; // no fused multiply-add: another rounding
            }
            for (t, n, k) in
                [(1, 1, 1), (5, 16, 7), (6, 17, 256), (7, 15, 257), (13, 33, 600), (64, 48, 31), (12, 16, 0)]
            {
                let (x, w) = (noise(t * k, 1), noise(n * k, 2));
                let mut y = vec![f32::NAN; t * n];
                linear(simd, &mut y, &x, (t, n, k), |rows, panel| {
                    interleave(simd, &w[rows.start * k..rows.end * k], k, panel);
                })
                .unwrap();
                assert_eq!(y, twin(&x, &w, (t, n, k)), "{level:?} {t} {n} {k}");
            }
        }
    }

    #[test]
    fn extents_are_checked() {
        let simd = Simd::up_to(Level::Vnni);
        let left = Left { data: &[0.0; 7], row: 4, step: 1 };
        let panel = Panel { data: &[0.0; 64], stride: 16 };
        let mut out = [0f32; 32];
        let s = Strip { left, panel, rows: 2, inner: 4, columns: 16, keep: false, stride: 16, out: &mut out };
        assert!(matches!(strip(simd, s), Err(KernelError::Length { what: "left factor", expected: 8, found: 7 })));
    }
}
