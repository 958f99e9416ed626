//! `h += xᵀ x`, upper triangle: panels of sixteen columns against those on and right of the diagonal, about half the work of the full
//! product. Each element is one chain over the tokens of the call, added to `h` at its end (see [`super::product`]).

use rayon::prelude::*;

use super::product::{Left, Panel, Strip, WIDTH, strip};
use super::simd::Simd;
use crate::error::Result;

/// Block rows of one task.
const ROWS: usize = 3 * WIDTH;

/// Sixteen columns of x `[t, n]` side by side, `[panel][t, 16]`: both factors then read memory in order. Missing columns are zero.
fn side_by_side(x: &[f32], n: usize, t: usize) -> Vec<f32> {
    let mut panels = vec![0f32; n.div_ceil(WIDTH) * t * WIDTH];
    panels.par_chunks_mut((t * WIDTH).max(1)).enumerate().for_each(|(p, panel)| {
        let columns = p * WIDTH..n.min((p + 1) * WIDTH);
        for (out, row) in panel.as_chunks_mut::<WIDTH>().0.iter_mut().zip(x.chunks_exact(n)) {
            out[..columns.len()].copy_from_slice(&row[columns.clone()]);
        }
    });
    panels
}

/// h `[n, n]`, x `[t, n]`.
pub fn update(simd: Simd, h: &mut [f32], x: &[f32], n: usize) -> Result<()> {
    let t = x.len() / n.max(1);
    let panels = side_by_side(x, n, t);
    h.par_chunks_mut(ROWS * n).enumerate().try_for_each_init(
        || vec![0f32; ROWS * WIDTH],
        |tile, (task, rows)| {
            for (sub, rows) in rows.chunks_mut(WIDTH * n).enumerate() {
                let top = task * (ROWS / WIDTH) + sub;
                let left = Left { data: &panels[top * t * WIDTH..(top + 1) * t * WIDTH], row: 1, step: WIDTH };
                let count = rows.len() / n;
                for right in top..n.div_ceil(WIDTH) {
                    let data = &panels[right * t * WIDTH..(right + 1) * t * WIDTH];
                    let panel = Panel { data, stride: WIDTH };
                    let tile = &mut tile[..count * WIDTH];
                    let (columns, stride) = (WIDTH, WIDTH);
                    let out = &mut *tile;
                    strip(simd, Strip { left, panel, rows: count, inner: t, columns, keep: false, stride, out })?;
                    for (i, (row, sums)) in rows.chunks_exact_mut(n).zip(tile.as_chunks::<WIDTH>().0).enumerate() {
                        // On the diagonal's block, from the diagonal on.
                        let skip = if right == top { i } else { 0 };
                        let end = n.min((right + 1) * WIDTH);
                        let from = right * WIDTH + skip;
                        row[from..end].iter_mut().zip(&sums[skip..]).for_each(|(h, s)| *h += s);
                    }
                }
            }
            Ok(())
        },
    )
}

/// `h += xᵀ y`, the whole matrix: h `[m, n]`, x `[t, m]`, y `[t, n]`; the order of additions is [`update`]'s.
pub fn cross(simd: Simd, h: &mut [f32], x: &[f32], y: &[f32], m: usize, n: usize) -> Result<()> {
    let t = x.len() / m.max(1);
    let (left, right) = (side_by_side(x, m, t), side_by_side(y, n, t));
    h.par_chunks_mut((WIDTH * n).max(1)).enumerate().try_for_each(|(top, rows)| {
        let a = Left { data: &left[top * t * WIDTH..(top + 1) * t * WIDTH], row: 1, step: WIDTH };
        let count = rows.len() / n;
        let mut tile = vec![0f32; count * WIDTH];
        for p in 0..n.div_ceil(WIDTH) {
            let panel = Panel { data: &right[p * t * WIDTH..(p + 1) * t * WIDTH], stride: WIDTH };
            let (columns, stride, out) = (WIDTH, WIDTH, &mut tile[..]);
            strip(simd, Strip { left: a, panel, rows: count, inner: t, columns, keep: false, stride, out })?;
            let columns = p * WIDTH..n.min((p + 1) * WIDTH);
            for (row, sums) in rows.chunks_exact_mut(n).zip(tile.as_chunks::<WIDTH>().0) {
                row[columns.clone()].iter_mut().zip(sums).for_each(|(h, s)| *h += s);
            }
        }
        Ok(())
    })
}
