//! `h += xᵀ x`, upper triangle: panels of columns against those on and right of the diagonal, about half the work of the full
//! product. Each element is one chain over the tokens of the call, added to `h` at its end: in fixed point ([`super::fixed`]) or in f32
//! ([`super::product`]).

use rayon::prelude::*;

use super::aligned::Aligned;
use super::fixed::{self, Columns};
use super::product::{Left, Panel, Strip, WIDTH, strip};
use super::simd::Simd;
use crate::error::Result;

/// The columns of x `[t, n]` in panels, as left and right factor.
enum Sides {
    Fixed(Columns),
    F32 { panels: Aligned<f32>, t: usize },
}

impl Sides {
    fn new(simd: Simd, x: &[f32], n: usize, exact: bool) -> Self {
        let t = x.len() / n.max(1);
        if exact { Sides::F32 { panels: side_by_side(x, n, t), t } } else { Sides::Fixed(Columns::new(simd, x, n)) }
    }

    /// Columns of a panel.
    fn width(&self) -> usize {
        match self {
            Sides::Fixed(_) => fixed::WIDTH,
            Sides::F32 { .. } => WIDTH,
        }
    }

    /// `tile [rows, width] = (panel left)ᵀ · (panel right of other)`; both sides are of one kind.
    fn product(
        &self,
        simd: Simd,
        left: usize,
        other: &Self,
        right: usize,
        rows: usize,
        tile: &mut [f32],
    ) -> Result<()> {
        match (self, other) {
            (Sides::F32 { panels, t }, Sides::F32 { panels: others, .. }) => {
                let left = Left { data: &panels[left * t * WIDTH..(left + 1) * t * WIDTH], row: 1, step: WIDTH };
                let panel = Panel { data: &others[right * t * WIDTH..(right + 1) * t * WIDTH], stride: WIDTH };
                let (columns, stride) = (WIDTH, WIDTH);
                strip(simd, Strip { left, panel, rows, inner: *t, columns, keep: false, stride, out: tile })
            }
            (Sides::Fixed(a), Sides::Fixed(b)) => {
                let out = fixed::Out { keep: false, columns: fixed::WIDTH, stride: fixed::WIDTH, data: tile };
                fixed::strip(simd, a.left(left), b.panel(right), rows, out)
            }
            _ => Ok(()),
        }
    }
}

/// Sixteen columns of x `[t, n]` side by side, `[panel][t, 16]`: both factors then read memory in order. Missing columns are zero.
fn side_by_side(x: &[f32], n: usize, t: usize) -> Aligned<f32> {
    let mut panels = Aligned::zeros(n.div_ceil(WIDTH) * t * WIDTH);
    panels.par_chunks_mut((t * WIDTH).max(1)).enumerate().for_each(|(p, panel)| {
        let columns = p * WIDTH..n.min((p + 1) * WIDTH);
        for (out, row) in panel.as_chunks_mut::<WIDTH>().0.iter_mut().zip(x.chunks_exact(n)) {
            out[..columns.len()].copy_from_slice(&row[columns.clone()]);
        }
    });
    panels
}

/// h `[n, n]`, x `[t, n]`.
pub fn update(simd: Simd, h: &mut [f32], x: &[f32], n: usize, exact: bool) -> Result<()> {
    if h.is_empty() || x.is_empty() {
        return Ok(());
    }
    let sides = Sides::new(simd, x, n, exact);
    let width = sides.width();
    h.par_chunks_mut(width * n).enumerate().try_for_each_init(
        || vec![0f32; width * width],
        |tile, (top, rows)| {
            let count = rows.len() / n;
            for right in top..n.div_ceil(width) {
                sides.product(simd, top, &sides, right, count, &mut tile[..count * width])?;
                for (i, (row, sums)) in rows.chunks_exact_mut(n).zip(tile.chunks_exact(width)).enumerate() {
                    // On the diagonal's block, from the diagonal on.
                    let skip = if right == top { i } else { 0 };
                    let columns = right * width + skip..n.min((right + 1) * width);
                    row[columns].iter_mut().zip(&sums[skip..]).for_each(|(h, s)| *h += s);
                }
            }
            Ok(())
        },
    )
}

/// `h += xᵀ y`, the whole matrix: h `[m, n]`, x `[t, m]`, y `[t, n]`; the order of additions is [`update`]'s.
pub fn cross(simd: Simd, h: &mut [f32], x: &[f32], y: &[f32], (m, n): (usize, usize), exact: bool) -> Result<()> {
    if h.is_empty() || x.is_empty() {
        return Ok(());
    }
    let (left, right) = (Sides::new(simd, x, m, exact), Sides::new(simd, y, n, exact));
    let width = left.width();
    h.par_chunks_mut(width * n).enumerate().try_for_each_init(
        || vec![0f32; width * width],
        |tile, (top, rows)| {
            let count = rows.len() / n;
            for p in 0..n.div_ceil(width) {
                left.product(simd, top, &right, p, count, &mut tile[..count * width])?;
                let columns = p * width..n.min((p + 1) * width);
                for (row, sums) in rows.chunks_exact_mut(n).zip(tile.chunks_exact(width)) {
                    row[columns.clone()].iter_mut().zip(sums).for_each(|(h, s)| *h += s);
                }
            }
            Ok(())
        },
    )
}
