//! The layer-wise loss a solver lowers.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::scale_search::multiversion;

/// Loss of a quantized matrix against the original, both under the undamped Hessian.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// `tr((W − Q) H (W − Q)ᵀ)`.
    pub proxy: f64,
    /// `tr(W H Wᵀ)`, the loss of dropping the matrix.
    pub reference: f64,
}

impl Loss {
    /// `proxy / reference`; 0 where both are 0.
    pub fn relative(&self) -> f64 {
        if self.proxy == 0.0 { 0.0 } else { self.proxy / self.reference }
    }
}

/// Rows of one task. Fixed, so that sums do not depend on the thread count.
const ROWS: usize = 32;
/// Columns of one product.
const BLOCK: usize = 128;

/// Loss of `q` (dequantized) against `w`, both `[out, n]`, under the symmetric `h` `[n, n]`, of which only the upper
/// triangle is read. NaN when the lengths do not fit together.
pub fn proxy_loss(w: &[f32], q: &[f32], h: &[f32], out: usize, n: usize) -> Loss {
    if Some(w.len()) != out.checked_mul(n) || q.len() != w.len() || Some(h.len()) != n.checked_mul(n) {
        return Loss { proxy: f64::NAN, reference: f64::NAN };
    }
    if w.is_empty() {
        return Loss { proxy: 0.0, reference: 0.0 };
    }
    let folded = fold_diagonal_blocks(h, n);
    let sums: Vec<(f64, f64)> = w
        .par_chunks(ROWS * n)
        .zip(q.par_chunks(ROWS * n))
        .map_init(
            || (vec![0f32; 2 * ROWS * n], vec![0f32; 2 * ROWS * BLOCK]),
            |(rows, product), (w, q)| chunk_loss(w, q, h, &folded, n, rows, product),
        )
        .collect();
    sums.iter()
        .fold(Loss { proxy: 0.0, reference: 0.0 }, |a, b| Loss { proxy: a.proxy + b.0, reference: a.reference + b.1 })
}

/// `Σ (w − q)²` and `Σ w²` of `w` `[out, n]`, without a copy of q: `widen` writes some of its rows. Rows are summed in f64 on their own,
/// so threads change nothing.
pub fn squared_error(w: &[f32], n: usize, widen: impl Fn(Range<usize>, &mut [f32]) + Sync) -> (f64, f64) {
    let n = n.max(1);
    let row = |back: &mut Vec<f32>, (r, w): (usize, &[f32])| {
        widen(r..r + 1, back);
        w.iter().zip(back.iter()).fold((0f64, 0f64), |(error, norm), (w, b)| {
            (error + f64::from(w - b).powi(2), norm + f64::from(*w).powi(2))
        })
    };
    let rows: Vec<(f64, f64)> = w.par_chunks_exact(n).enumerate().map_init(|| vec![0f32; n], row).collect();
    rows.into_iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1))
}

/// The diagonal blocks of `h`, upper triangles with doubled off-diagonal elements, one after another.
fn fold_diagonal_blocks(h: &[f32], n: usize) -> Vec<f32> {
    let mut folded = vec![0f32; n.div_ceil(BLOCK) * BLOCK * BLOCK];
    for i in 0..n {
        let start = i / BLOCK * BLOCK;
        for j in i..n.min(start + BLOCK) {
            let v = h[i * n + j];
            folded[i * BLOCK + j - start] = if i == j { v } else { 2.0 * v };
        }
    }
    folded
}

/// Proxy and reference of a few rows: `x H xᵀ = Σ_J (2 x_{<J} H_{<J,J} + x_J T_J) x_Jᵀ` over column blocks `J`, half
/// the work of the full product.
fn chunk_loss(
    w: &[f32],
    q: &[f32],
    h: &[f32],
    folded: &[f32],
    n: usize,
    rows: &mut [f32],
    product: &mut [f32],
) -> (f64, f64) {
    let len = w.len();
    let count = len / n;
    for ((x, w), q) in rows.iter_mut().zip(w).zip(q) {
        *x = w - q;
    }
    rows[len..2 * len].copy_from_slice(w);
    let rows = &rows[..2 * len];
    let x = MatRef::from_row_major_slice(rows, 2 * count, n);
    let h = MatRef::from_row_major_slice(h, n, n);
    let mut sums = (0.0, 0.0);
    for start in (0..n).step_by(BLOCK) {
        let cols = BLOCK.min(n - start);
        let product = &mut product[..2 * count * cols];
        let mut y = MatMut::from_row_major_slice_mut(&mut *product, 2 * count, cols);
        let t = MatRef::from_row_major_slice(&folded[start * BLOCK..][..BLOCK * BLOCK], BLOCK, BLOCK);
        let here = x.submatrix(0, start, 2 * count, cols);
        matmul(y.as_mut(), Accum::Replace, here, t.submatrix(0, 0, cols, cols), 1.0, Par::Seq);
        if start > 0 {
            let (left, above) = (x.submatrix(0, 0, 2 * count, start), h.submatrix(0, start, start, cols));
            matmul(y.as_mut(), Accum::Add, left, above, 2.0, Par::Seq);
        }
        for row in 0..2 * count {
            let value = dot(&product[row * cols..][..cols], &rows[row * n + start..][..cols]);
            if row < count {
                sums.0 += value;
            } else {
                sums.1 += value;
            }
        }
    }
    sums
}

multiversion! {
    fn dot(a: &[f32], b: &[f32]) -> f64 {
        let mut sums = [0f32; 16];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
        for (a, b) in a.iter().zip(b) {
            for l in 0..16 {
                sums[l] += a[l] * b[l];
            }
        }
        let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| f64::from(a * b)).sum();
        rest + sums.iter().map(|s| f64::from(*s)).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn equals_the_definition_and_reads_the_upper_triangle_only() {
        let (out, n) = (37, 301);
        let mut rng = StdRng::seed_from_u64(3);
        let mut sample = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let (w, q, mut h) = (sample(out * n), sample(out * n), sample(n * n));
        let at = |i: usize, j: usize| f64::from(h[i.min(j) * n + i.max(j)]);
        let (mut proxy, mut reference) = (0.0, 0.0);
        for r in 0..out {
            for i in 0..n {
                for j in 0..n {
                    let (a, b) = (r * n + i, r * n + j);
                    proxy += f64::from(w[a] - q[a]) * at(i, j) * f64::from(w[b] - q[b]);
                    reference += f64::from(w[a]) * at(i, j) * f64::from(w[b]);
                }
            }
        }
        for i in 0..n {
            h[i * n..i * n + i].fill(f32::NAN);
        }
        let found = proxy_loss(&w, &q, &h, out, n);
        assert!((found.proxy - proxy).abs() < 1e-2, "{found:?} {proxy}");
        assert!((found.reference - reference).abs() < 1e-2, "{found:?} {reference}");
        assert!(proxy_loss(&w, &q[1..], &h, out, n).proxy.is_nan());
        assert_eq!(proxy_loss(&w, &w, &h, out, n).relative(), 0.0);
    }
}
