//! `h += xᵀ x`, upper triangle: block pairs on and above the diagonal, so about half the work of the full product.

use rayon::prelude::*;

use super::matmul::{View, matmul};
use crate::error::Result;

/// Side of a block: about two dozen block rows, so that many threads share the triangle evenly, within what a product
/// handles efficiently.
fn side(n: usize) -> usize {
    (n / 24).next_multiple_of(32).clamp(64, 256)
}

/// h `[n, n]`, x `[t, n]`. Each block is one product over all t, so the split over threads changes nothing.
pub fn update(h: &mut [f32], x: &[f32], n: usize) -> Result<()> {
    let (t, side) = (x.len() / n, side(n));
    // One task a block row: it owns whole rows of h, and its tail of columns is one wide product.
    h.par_chunks_mut(side * n).enumerate().try_for_each(|(b, rows)| {
        let first = b * side;
        let m = rows.len() / n;
        let a = View { data: &x[first.min(x.len())..], row: 1, col: n };
        let mut square = vec![0f32; m * m];
        matmul(&mut square, (m, 1), false, (m, m, t), a, View { row: n, col: 1, ..a }, 1.0)?;
        for i in 0..m {
            let at = i * n + first;
            rows[at + i..at + m].iter_mut().zip(&square[i * m + i..(i + 1) * m]).for_each(|(h, s)| *h += s);
        }
        let (rest, col) = (n - first - m, first + m);
        if rest == 0 {
            return Ok(());
        }
        let b = View { data: &x[col.min(x.len())..], row: n, col: 1 };
        matmul(&mut rows[col..], (n, 1), true, (m, rest, t), a, b, 1.0)
    })
}
