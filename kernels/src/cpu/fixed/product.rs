//! Panels times rows: strips of register tiles over exact integer sums.

use std::ops::Range;

use rayon::prelude::*;

use super::lanes::Pairs;
#[cfg(target_arch = "x86_64")]
use super::lanes::x86;
use super::{Left, PAIRS, Panel, PanelBuffer, Rows, WIDTH, blocks_of};
use crate::cpu::simd::{Lanes, Level, Portable, Simd};
use crate::error::{KernelError, Result};

/// Rows of a register tile, at most.
pub(super) const TILE: usize = 6;
/// Blocks between two visits of a result's tile: a panel's part (24 KiB) stays in the first-level cache.
const DEPTH: usize = 12;

/// A strip's result: rows `stride` apart, the first `columns` written; `keep` continues the chains that are there.
pub struct Out<'a> {
    pub keep: bool,
    pub columns: usize,
    pub stride: usize,
    pub data: &'a mut [f32],
}

fn span(a: usize, rows: usize, b: usize, cols: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * a + (cols - 1) * b + 1 }
}

fn check(what: &'static str, need: usize, have: usize) -> Result<()> {
    if need <= have { Ok(()) } else { Err(KernelError::Length { what, expected: need, found: have }) }
}

/// All of a panel's blocks times `rows` rows, on the calling thread.
pub fn strip(simd: Simd, left: Left<'_>, panel: Panel<'_>, rows: usize, out: Out<'_>) -> Result<()> {
    let blocks = panel.scales.len() / WIDTH;
    check("panel", blocks * PAIRS * WIDTH, panel.pairs.len())?;
    check("left factor", span(left.row, rows, left.step, blocks * PAIRS), left.pairs.len())?;
    check("left scales", span(left.scale_row, rows, left.scale_step, blocks), left.scales.len())?;
    check("columns", out.columns, WIDTH)?;
    check("product", span(out.stride, rows, 1, out.columns), out.data.len())?;
    let Out { keep, columns, stride, data } = out;
    Raw { left, panel, rows, blocks: 0..blocks, keep, columns, stride, out: data.as_mut_ptr() }.passes(simd);
    Ok(())
}

/// `y = x Wᵀ` for x's rows, y `[t, n]`; `fill(rows, panel)` writes at most 32 rows of W.
pub fn linear<F>(simd: Simd, y: &mut [f32], x: &Rows, n: usize, fill: F) -> Result<()>
where
    F: Fn(Range<usize>, &mut PanelBuffer) + Sync,
{
    check("y", x.rows.saturating_mul(n), y.len())?;
    let blocks = blocks_of(x.k);
    let stripes = Stripes(y.as_mut_ptr());
    let stripes = &stripes;
    (0..n.div_ceil(WIDTH)).into_par_iter().for_each_init(
        || PanelBuffer::new(x.k),
        |buffer, p| {
            let first = p * WIDTH;
            let columns = WIDTH.min(n - first);
            fill(first..first + columns, buffer);
            // Both factors have `blocks` blocks by their making; the strip's columns `first .. first + columns` of y are this
            // task's alone.
            let (left, panel, out) = (x.left(), buffer.panel(), stripes.0.wrapping_add(first));
            Raw { left, panel, rows: x.rows, blocks: 0..blocks, keep: false, columns, stride: n, out }.passes(simd);
        },
    );
    if blocks == 0 {
        y.fill(0.0);
    }
    Ok(())
}

/// Start of `y`, shared by tasks that each write their own columns.
struct Stripes(*mut f32);
// SAFETY: the pointer is only used inside `linear`, where tasks write disjoint columns of a live `&mut` slice.
unsafe impl Send for Stripes {}
// SAFETY: as above.
unsafe impl Sync for Stripes {}

/// A strip whose extents were checked.
pub(super) struct Raw<'a> {
    left: Left<'a>,
    panel: Panel<'a>,
    rows: usize,
    blocks: Range<usize>,
    keep: bool,
    columns: usize,
    stride: usize,
    out: *mut f32,
}

impl Raw<'_> {
    /// A part of the panel at a time for all rows.
    fn passes(mut self, simd: Simd) {
        let all = self.blocks.clone();
        for from in all.clone().step_by(DEPTH) {
            self.blocks = from..all.end.min(from + DEPTH);
            self.dispatch(simd);
            self.keep = true;
        }
    }

    fn dispatch(&self, simd: Simd) {
        // SAFETY: a `Simd` holds only levels that this machine has; whoever made this `Raw` checked its extents.
        unsafe {
            match simd.level() {
                #[cfg(target_arch = "x86_64")]
                Level::Vnni => x86::run_vnni(self),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 | Level::Avx512 => x86::run_avx2(self),
                _ => self.run::<Portable, 4>(2),
            }
        }
    }

    /// Tiles of up to `most` rows, V registers wide.
    ///
    /// # Safety
    /// The instruction set of `P`; the extents were checked; V · N is [`WIDTH`].
    #[inline(always)]
    pub(super) unsafe fn run<P: Pairs, const V: usize>(&self, most: usize) {
        let mut r = 0;
        while r < self.rows {
            let m = match (self.rows - r).min(most) {
                6.. => 6,
                4..6 => 4,
                3 => 3,
                2 => 2,
                _ => 1,
            };
            // SAFETY: `r + m ≤ rows`; a narrow strip goes through `part`, which holds `m · 32`.
            unsafe {
                let out = self.out.add(r * self.stride);
                if self.columns == WIDTH {
                    self.tile::<P, V>(m, r, out, self.stride);
                } else {
                    let mut part = [0f32; TILE * WIDTH];
                    for (row, c) in (0..m).flat_map(|row| (0..self.columns).map(move |c| (row, c))) {
                        if self.keep {
                            part[row * WIDTH + c] = *out.add(row * self.stride + c);
                        }
                    }
                    self.tile::<P, V>(m, r, part.as_mut_ptr(), WIDTH);
                    for (row, c) in (0..m).flat_map(|row| (0..self.columns).map(move |c| (row, c))) {
                        *out.add(row * self.stride + c) = part[row * WIDTH + c];
                    }
                }
            }
            r += m;
        }
    }

    /// # Safety
    /// As [`Self::run`]; rows `r .. r + m` exist and `out` holds m rows of 32, `stride` apart.
    #[inline(always)]
    unsafe fn tile<P: Pairs, const V: usize>(&self, m: usize, r: usize, out: *mut f32, stride: usize) {
        // SAFETY: the caller's contract.
        unsafe {
            match m {
                6 => self.chains::<P, 6, V>(r, out, stride),
                4 => self.chains::<P, 4, V>(r, out, stride),
                3 => self.chains::<P, 3, V>(r, out, stride),
                2 => self.chains::<P, 2, V>(r, out, stride),
                _ => self.chains::<P, 1, V>(r, out, stride),
            }
        }
    }

    /// # Safety
    /// As [`Self::tile`] with m = M.
    #[inline(always)]
    unsafe fn chains<P: Pairs, const M: usize, const V: usize>(&self, r: usize, out: *mut f32, stride: usize) {
        // SAFETY: the offsets are those of pairs and scales of rows `r .. r + M` and of the panel's blocks, and of M rows of `out`.
        unsafe {
            let n = P::L::N;
            let mut acc = [[P::L::splat(0.0); V]; M];
            if self.keep {
                for m in 0..M {
                    for v in 0..V {
                        acc[m][v] = P::L::load(out.add(m * stride + v * n));
                    }
                }
            }
            let l = &self.left;
            for b in self.blocks.clone() {
                let w = self.panel.pairs.as_ptr().add(b * PAIRS * WIDTH);
                let mut a = [l.pairs.as_ptr(); M];
                for m in 0..M {
                    a[m] = a[m].add((r + m) * l.row + b * PAIRS * l.step);
                }
                let mut sums = [[P::zero(); V]; M];
                for p in 0..PAIRS {
                    let mut columns = [P::zero(); V];
                    for v in 0..V {
                        columns[v] = P::load(w.add(p * WIDTH + v * n));
                    }
                    for m in 0..M {
                        let x = P::splat(a[m].add(p * l.step));
                        for v in 0..V {
                            sums[m][v] = P::accumulate(sums[m][v], x, columns[v]);
                        }
                    }
                }
                let mut scales = [P::L::splat(0.0); V];
                for v in 0..V {
                    scales[v] = P::L::load(self.panel.scales.as_ptr().add(b * WIDTH + v * n));
                }
                for m in 0..M {
                    let s = P::L::splat(*l.scales.as_ptr().add((r + m) * l.scale_row + b * l.scale_step));
                    for v in 0..V {
                        acc[m][v] = P::fused(P::float(sums[m][v]), P::times(scales[v], s), acc[m][v]);
                    }
                }
            }
            for m in 0..M {
                for v in 0..V {
                    P::L::store(out.add(m * stride + v * n), acc[m][v]);
                }
            }
        }
    }
}

/// Steps of independent chains of `accumulate` in registers: the ceiling of [`linear`]. Returns the products made.
pub fn register_products(simd: Simd, steps: usize) -> usize {
    // SAFETY: a `Simd` holds only levels that this machine has.
    unsafe {
        match simd.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Vnni => x86::chains_vnni(steps),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => x86::chains_avx2(steps),
            _ => chains::<Portable>(steps),
        }
    }
}

/// # Safety
/// The instruction set of `P`.
#[inline(always)]
pub(super) unsafe fn chains<P: Pairs>(steps: usize) -> usize {
    /// Rows and registers of a tile: eight sums, more than the latencies of a product and a sum.
    const M: usize = 2;
    const V: usize = 4;
    // Read anew each step, so that no product can be made once for all steps.
    let x: [u32; 64] = std::hint::black_box(std::array::from_fn(|i| super::pair(i as i32, 1)));
    // SAFETY: the caller's contract; `x` holds the pairs that are read.
    unsafe {
        let mut w = [P::zero(); V];
        for (v, w) in w.iter_mut().enumerate() {
            *w = P::splat(&x[v]);
        }
        let mut sums = [[P::zero(); V]; M];
        for s in 0..steps {
            for m in 0..M {
                let x = P::splat(&x[(s * M + m) % x.len()]);
                for v in 0..V {
                    sums[m][v] = P::accumulate(sums[m][v], x, w[v]);
                }
            }
        }
        std::hint::black_box(sums.map(|s| s.map(|s| P::L::sum(P::float(s)))));
    }
    2 * steps * M * V * P::L::N
}
