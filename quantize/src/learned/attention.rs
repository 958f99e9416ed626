//! Causal attention with grouped queries over windows stacked in rows, and its gradient. Probabilities are computed anew for the gradient:
//! one head of one window is held at a time by each thread.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use lowbit_kernels::backend::AttentionShape;
use rayon::prelude::*;

/// One head's columns of some rows of `x` `[tokens, heads · d]`.
fn head(x: &[f32], rows: &Range<usize>, heads: usize, h: usize, d: usize) -> Vec<f32> {
    let width = heads * d;
    x[rows.start * width..rows.end * width]
        .chunks_exact(width)
        .flat_map(|row| &row[h * d..(h + 1) * d])
        .copied()
        .collect()
}

/// Puts what [`head`] takes.
fn put(x: &mut [f32], rows: &Range<usize>, heads: usize, h: usize, d: usize, part: &[f32]) {
    let width = heads * d;
    let into = x[rows.start * width..rows.end * width].chunks_exact_mut(width);
    into.zip(part.chunks_exact(d)).for_each(|(row, part)| row[h * d..(h + 1) * d].copy_from_slice(part));
}

/// `y += factor · a · b`, row-major `y`.
fn add_product(y: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>, factor: f32) {
    matmul(MatMut::from_row_major_slice_mut(y, a.nrows(), b.ncols()), Accum::Add, a, b, factor, Par::Seq);
}

fn matrix(x: &[f32], rows: usize, cols: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(x, rows, cols)
}

/// `[t, t]`: softmax of the scaled scores of each query over the keys it sees, zero elsewhere.
fn probabilities(q: &[f32], k: &[f32], t: usize, shape: &AttentionShape) -> Vec<f32> {
    let d = shape.head_dim;
    let mut p = vec![0f32; t * t];
    add_product(&mut p, matrix(q, t, d), matrix(k, t, d).transpose(), shape.scale);
    for (i, row) in p.chunks_exact_mut(t.max(1)).enumerate() {
        let first = shape.window.map_or(0, |w| (i + 1).saturating_sub(w));
        let (before, rest) = row.split_at_mut(first);
        let (seen, after) = rest.split_at_mut(i + 1 - first);
        let most = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        seen.iter_mut().for_each(|s| *s = (*s - most).exp());
        let sum: f32 = seen.iter().sum();
        seen.iter_mut().for_each(|s| *s /= sum);
        before.fill(0.0);
        after.fill(0.0);
    }
    p
}

/// The rows of each window.
fn ranges(windows: &[usize]) -> Vec<Range<usize>> {
    let mut row = 0;
    windows
        .iter()
        .map(|tokens| {
            row += tokens;
            row - tokens..row
        })
        .collect()
}

/// `[tokens, heads · d]` of q like it and k, v `[tokens, kv_heads · d]`, queries and keys rotated.
pub(super) fn forward(q: &[f32], k: &[f32], v: &[f32], shape: &AttentionShape, windows: &[usize]) -> Vec<f32> {
    let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.head_dim);
    let tasks: Vec<(Range<usize>, usize)> =
        ranges(windows).into_iter().flat_map(|rows| (0..heads).map(move |h| (rows.clone(), h))).collect();
    let parts: Vec<Vec<f32>> = tasks
        .par_iter()
        .map(|(rows, h)| {
            let (t, g) = (rows.len(), h / (heads / kv_heads.max(1)).max(1));
            let (k, v) = (head(k, rows, kv_heads, g, d), head(v, rows, kv_heads, g, d));
            let p = probabilities(&head(q, rows, heads, *h, d), &k, t, shape);
            let mut y = vec![0f32; t * d];
            add_product(&mut y, matrix(&p, t, t), matrix(&v, t, d), 1.0);
            y
        })
        .collect();
    let mut y = vec![0f32; q.len()];
    tasks.iter().zip(&parts).for_each(|((rows, h), part)| put(&mut y, rows, heads, *h, d, part));
    y
}

/// Gradients of the queries, one head after another, of the keys and of the values of one key head in one window.
struct Gradients {
    dqs: Vec<Vec<f32>>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// The gradients of q, k and v from that of the output.
pub(super) fn backward(qkv: [&[f32]; 3], dy: &[f32], shape: &AttentionShape, windows: &[usize]) -> [Vec<f32>; 3] {
    let [q, k, v] = qkv;
    let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.head_dim);
    let share = (heads / kv_heads.max(1)).max(1);
    // Those queries that share a key head add to one gradient: a task is a key head.
    let tasks: Vec<(Range<usize>, usize)> =
        ranges(windows).into_iter().flat_map(|rows| (0..kv_heads).map(move |g| (rows.clone(), g))).collect();
    let parts: Vec<Gradients> = tasks
        .par_iter()
        .map(|(rows, g)| {
            let t = rows.len();
            let (k, v) = (head(k, rows, kv_heads, *g, d), head(v, rows, kv_heads, *g, d));
            let (mut dk, mut dv) = (vec![0f32; t * d], vec![0f32; t * d]);
            let dqs = (g * share..(g + 1) * share).map(|h| {
                let (q, dy) = (head(q, rows, heads, h, d), head(dy, rows, heads, h, d));
                let p = probabilities(&q, &k, t, shape);
                add_product(&mut dv, matrix(&p, t, t).transpose(), matrix(&dy, t, d), 1.0);
                // dS = P ∘ (dP − Σ P ∘ dP), dP = dY Vᵀ.
                let mut ds = vec![0f32; t * t];
                add_product(&mut ds, matrix(&dy, t, d), matrix(&v, t, d).transpose(), 1.0);
                for (ds, p) in ds.chunks_exact_mut(t.max(1)).zip(p.chunks_exact(t.max(1))) {
                    let mean: f32 = ds.iter().zip(p).map(|(s, p)| s * p).sum();
                    ds.iter_mut().zip(p).for_each(|(s, p)| *s = p * (*s - mean));
                }
                let mut dq = vec![0f32; t * d];
                add_product(&mut dq, matrix(&ds, t, t), matrix(&k, t, d), shape.scale);
                add_product(&mut dk, matrix(&ds, t, t).transpose(), matrix(&q, t, d), shape.scale);
                dq
            });
            let dqs = dqs.collect();
            Gradients { dqs, dk, dv }
        })
        .collect();
    let (mut dq, mut dk, mut dv) = (vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]);
    for ((rows, g), found) in tasks.iter().zip(&parts) {
        for (i, part) in found.dqs.iter().enumerate() {
            put(&mut dq, rows, heads, g * share + i, d, part);
        }
        put(&mut dk, rows, kv_heads, *g, d, &found.dk);
        put(&mut dv, rows, kv_heads, *g, d, &found.dv);
    }
    [dq, dk, dv]
}
