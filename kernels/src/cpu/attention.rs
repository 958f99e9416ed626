//! Causal attention over the cache, one task a (segment, head, block of queries).
//!
//! A block is cut by position inside its own segment, so a token's result does not depend on what else is in the
//! batch; feeding a prompt in other pieces regroups blocks and agrees to rounding.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::elementwise::{Max, exp};
use super::kv::Cache;
use super::matmul::{View, matmul};
use super::pool::Pool;
use super::scalar;
use super::simd::{Kernel, Lanes, Simd};
use crate::backend::{AttentionShape, Segment};
use crate::error::Result;

/// Queries of one task.
const BLOCK: usize = 64;
/// Up to this many queries, plain loops beat packing panels for a product.
const FEW: usize = 4;

/// One task: queries `first .. first + count` of a segment, for one head.
struct Task<'a> {
    segment: &'a Segment,
    head: usize,
    first: usize,
    count: usize,
}

/// q `[T, heads · head_dim]`; segments checked to lie within q and the cache.
pub fn attention(
    simd: Simd,
    pool: &Pool,
    q: &[f32],
    cache: &Cache,
    shape: &AttentionShape,
    segments: &[Segment],
) -> Result<Vec<f32>> {
    let mut tasks = Vec::new();
    for segment in segments {
        for head in 0..shape.heads {
            let starts = (0..segment.tokens).step_by(BLOCK);
            tasks.extend(starts.map(|first| Task { segment, head, first, count: BLOCK.min(segment.tokens - first) }));
        }
    }
    let blocks: Vec<Vec<f32>> = if segments.iter().all(|s| s.tokens <= FEW) {
        // Decode: too little work to wake a sleeping thread for.
        let slots: Vec<Mutex<Option<Result<Vec<f32>>>>> = tasks.iter().map(|_| Mutex::new(None)).collect();
        pool.run(tasks.len(), &|i| {
            let y = task(simd, q, cache, shape, &tasks[i]);
            *slots[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(y);
        });
        let taken = slots.into_iter().map(|s| s.into_inner().unwrap_or_else(PoisonError::into_inner));
        taken.map(|y| y.unwrap_or_else(|| Ok(Vec::new()))).collect::<Result<_>>()?
    } else {
        tasks.par_iter().map(|t| task(simd, q, cache, shape, t)).collect::<Result<_>>()?
    };
    let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
    let mut out = vec![0f32; q.len()];
    for (t, block) in tasks.iter().zip(&blocks) {
        for (i, row) in block.chunks_exact(d).enumerate() {
            let at = (t.segment.row + t.first + i) * width + t.head * d;
            out[at..at + d].copy_from_slice(row);
        }
    }
    Ok(out)
}

/// Result `[count, head_dim]`.
fn task(simd: Simd, q: &[f32], cache: &Cache, shape: &AttentionShape, t: &Task) -> Result<Vec<f32>> {
    let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
    let group = t.head / (shape.heads / shape.kv_heads);
    let position = t.segment.past + t.first;
    let begin = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let end = position + t.count;
    let n = end - begin;
    let runs = || cache.runs(t.segment.slot, group, begin..end);
    let mut scores = vec![0f32; t.count * n];
    let mut out = vec![0f32; t.count * d];
    let q = &q[(t.segment.row + t.first) * width + t.head * d..];
    let few = t.count <= FEW;
    if few {
        for (i, scores) in scores.chunks_exact_mut(n).enumerate() {
            let mut rest = scores;
            for (keys, _) in runs() {
                let (scores, after) = rest.split_at_mut(keys.len() / d);
                simd.run(Dots { q: &q[i * width..i * width + d], keys, scale: shape.scale, scores });
                rest = after;
            }
        }
    } else {
        let keys = runs().map(|r| r.0).collect::<Vec<_>>().concat();
        let (a, b) = (View { data: q, row: width, col: 1 }, View { data: &keys, row: 1, col: d });
        matmul(&mut scores, (n, 1), false, (t.count, n, d), a, b, shape.scale)?;
    }
    for (i, row) in scores.chunks_exact_mut(n).enumerate() {
        let visible =
            shape.window.map_or(0, |w| (position + i + 1).saturating_sub(w)) - begin..position + i + 1 - begin;
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
        let row = &mut row[visible];
        if let Some(cap) = shape.soft_cap {
            row.iter_mut().for_each(|s| *s = scalar::soft_cap(*s, cap));
        }
        softmax(simd, row);
    }
    if few {
        for (weights, out) in scores.chunks_exact(n).zip(out.chunks_exact_mut(d)) {
            let mut rest = weights;
            for (_, values) in runs() {
                let (weights, after) = rest.split_at(values.len() / d);
                simd.run(Mix { weights, values, out: &mut *out });
                rest = after;
            }
        }
    } else {
        let values = runs().map(|r| r.1).collect::<Vec<_>>().concat();
        let (a, b) = (View { data: &scores, row: n, col: 1 }, View { data: &values, row: d, col: 1 });
        matmul(&mut out, (d, 1), false, (t.count, d, n), a, b, 1.0)?;
    }
    Ok(out)
}

fn softmax(simd: Simd, row: &mut [f32]) {
    let max = simd.run(Max(row));
    let sum = simd.run(ExpSum(row, max));
    let inv = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= inv);
}

/// Replaces values by `exp(v − max)` and returns their sum.
struct ExpSum<'a>(&'a mut [f32], f32);

impl Kernel for ExpSum<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        let (chunks, tail) = self.0.as_chunks_mut::<16>();
        let mut acc = [0f32; 16];
        for c in chunks {
            for i in 0..16 {
                c[i] = exp(c[i] - self.1);
                acc[i] += c[i];
            }
        }
        let mut sum = acc.iter().sum::<f32>();
        for v in tail {
            *v = exp(*v - self.1);
            sum += *v;
        }
        sum
    }
}

/// `scores[j] = scale · q · keys[j]`.
struct Dots<'a> {
    q: &'a [f32],
    keys: &'a [f32],
    scale: f32,
    scores: &'a mut [f32],
}

impl Kernel for Dots<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let d = self.q.len();
        let (q, q_tail) = self.q.as_chunks::<16>();
        for (s, key) in self.scores.iter_mut().zip(self.keys.chunks_exact(d)) {
            let (k, k_tail) = key.as_chunks::<16>();
            let mut acc = [0f32; 16];
            for (q, k) in q.iter().zip(k) {
                for i in 0..16 {
                    acc[i] += q[i] * k[i];
                }
            }
            let mut width = 8;
            while width > 0 {
                for i in 0..width {
                    acc[i] += acc[i + width];
                }
                width /= 2;
            }
            let tail: f32 = q_tail.iter().zip(k_tail).map(|(a, b)| a * b).sum();
            *s = (acc[0] + tail) * self.scale;
        }
    }
}

/// `out = Σ weights[j] · values[j]`.
struct Mix<'a> {
    weights: &'a [f32],
    values: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Mix<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let d = self.out.len();
        for (w, value) in self.weights.iter().zip(self.values.chunks_exact(d)) {
            for (o, v) in self.out.iter_mut().zip(value) {
                *o += w * v;
            }
        }
    }
}
