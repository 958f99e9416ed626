//! Causal attention over the cache, one task a (segment, head, block of queries).
//!
//! Prefill keeps the canonical order (docs/architecture.md) for every query: scores as one chain over the head's width, the sum of the
//! softmax in sixteen lanes by the key's position, the mix as one chain over keys. Neither the rest of the batch nor how a prompt is cut into
//! calls changes a bit. Decode has loops of its own, for which the same holds.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::aligned::Aligned;
use super::elementwise::{Max, exp};
use super::kv::{Cache, Part};
use super::pool::Pool;
use super::product::{Left, Panel, Strip, WIDTH, interleave, strip};
use super::scalar;
use super::simd::{Kernel, Lanes, Simd};
use crate::backend::{AttentionShape, Segment};
use crate::error::Result;

/// Queries of one task.
const BLOCK: usize = 64;
/// Keys whose values are laid out at a time.
const VALUES: usize = 256;

/// One task: queries `first .. first + count` of a segment, for one head.
struct Task<'a> {
    segment: &'a Segment,
    head: usize,
    sink: Option<f32>,
    first: usize,
    count: usize,
}

/// q `[T, heads · head_dim]`; segments checked to lie within q and the cache. `decode` is the pool of the decode phase; `sinks` `[heads]`,
/// see [`crate::backend::Backend::attention_with_sinks`].
pub fn attention(
    simd: Simd,
    decode: Option<&Pool>,
    q: &[f32],
    cache: &Cache,
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    segments: &[Segment],
) -> Result<Vec<f32>> {
    let mut tasks = Vec::new();
    for segment in segments {
        for head in 0..shape.heads {
            let starts = (0..segment.tokens).step_by(BLOCK);
            let sink = sinks.map(|s| s[head]);
            let count = |first: usize| BLOCK.min(segment.tokens - first);
            tasks.extend(starts.map(|first| Task { segment, head, sink, first, count: count(first) }));
        }
    }
    let blocks: Vec<Vec<f32>> = if let Some(pool) = decode {
        // Too little work to wake a sleeping thread for.
        let slots: Vec<Mutex<Vec<f32>>> = tasks.iter().map(|_| Mutex::new(Vec::new())).collect();
        pool.run(tasks.len(), &|i| {
            let y = by_query(simd, q, cache, shape, &tasks[i]);
            *slots[i].lock().unwrap_or_else(PoisonError::into_inner) = y;
        });
        slots.into_iter().map(|s| s.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    } else {
        tasks.par_iter().map(|t| by_block(simd, q, cache, shape, t)).collect::<Result<_>>()?
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

impl Task<'_> {
    /// Queries of the task, from the first one's head on.
    fn queries<'a>(&self, q: &'a [f32], shape: &AttentionShape) -> &'a [f32] {
        let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
        &q[(self.segment.row + self.first) * width + self.head * d..]
    }

    /// The largest of the scores and the sink.
    fn largest(&self, max: f32) -> f32 {
        self.sink.map_or(max, |sink| max.max(sink))
    }

    /// The sum of the softmax with the sink's share.
    fn with_sink(&self, sum: f32, max: f32) -> f32 {
        self.sink.map_or(sum, |sink| sum + exp(sink - max))
    }

    fn kv_head(&self, shape: &AttentionShape) -> usize {
        self.head / (shape.heads / shape.kv_heads)
    }

    /// First key query `i` of the task sees, and the end.
    fn visible(&self, i: usize, shape: &AttentionShape) -> (usize, usize) {
        let end = self.segment.past + self.first + i + 1;
        (shape.window.map_or(0, |w| end.saturating_sub(w)), end)
    }
}

/// Decode: every query on its own. Result `[count, head_dim]`.
fn by_query(simd: Simd, q: &[f32], cache: &Cache, shape: &AttentionShape, t: &Task) -> Vec<f32> {
    let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
    let q = t.queries(q, shape);
    let mut out = vec![0f32; t.count * d];
    for (i, out) in out.chunks_exact_mut(d).enumerate() {
        let (begin, end) = t.visible(i, shape);
        let runs = |part: Part, each: &mut dyn FnMut(&[f32])| {
            cache.runs(simd, part, t.segment.slot, t.kv_head(shape), begin..end, each);
        };
        let mut weights = vec![0f32; end - begin];
        let mut at = 0;
        runs(Part::Keys, &mut |keys| {
            let scores = &mut weights[at..at + keys.len() / d];
            at += scores.len();
            simd.run(Dots { q: &q[i * width..i * width + d], keys, scale: shape.scale, scores });
        });
        if let Some(cap) = shape.soft_cap {
            weights.iter_mut().for_each(|s| *s = scalar::soft_cap(*s, cap));
        }
        let max = t.largest(simd.run(Max(&weights)));
        let inv = 1.0 / t.with_sink(simd.run(ExpSum(&mut weights, max)), max);
        weights.iter_mut().for_each(|v| *v *= inv);
        let mut at = 0;
        runs(Part::Values, &mut |values| {
            let weights = &weights[at..at + values.len() / d];
            at += weights.len();
            simd.run(Mix { weights, values, out: &mut *out });
        });
    }
    out
}

/// Prefill: a block of queries against panels of keys and of values. Result `[count, head_dim]`.
fn by_block(simd: Simd, q: &[f32], cache: &Cache, shape: &AttentionShape, t: &Task) -> Result<Vec<f32>> {
    let (d, width) = (shape.head_dim, shape.heads * shape.head_dim);
    // Lanes of the softmax's sum go by the key's position, so the first key is that of a whole panel.
    let begin = t.visible(0, shape).0 / WIDTH * WIDTH;
    let end = t.visible(t.count - 1, shape).1;
    let n = (end - begin).next_multiple_of(WIDTH);
    let runs = |part: Part, from: usize, to: usize, each: &mut dyn FnMut(&[f32])| {
        cache.runs(simd, part, t.segment.slot, t.kv_head(shape), from..to, each);
    };
    let q = Left { data: t.queries(q, shape), row: width, step: 1 };
    let mut weights = vec![0f32; t.count * n];
    let (mut rows, mut panel) = (Vec::with_capacity(WIDTH * d), Aligned::zeros(WIDTH * d));
    for first in (begin..end).step_by(WIDTH) {
        rows.clear();
        runs(Part::Keys, first, end.min(first + WIDTH), &mut |keys| rows.extend_from_slice(keys));
        interleave(simd, &rows, d, &mut panel);
        let out = &mut weights[first - begin..];
        let panel = Panel { data: &panel, stride: WIDTH };
        strip(simd, Strip { left: q, panel, rows: t.count, inner: d, columns: WIDTH, keep: false, stride: n, out })?;
    }
    let mut sums = Vec::with_capacity(t.count);
    for (i, row) in weights.chunks_exact_mut(n).enumerate() {
        let (from, to) = t.visible(i, shape);
        row[..from - begin].fill(0.0);
        row[to - begin..].fill(0.0);
        let seen = &mut row[from - begin..to - begin];
        seen.iter_mut().for_each(|s| *s *= shape.scale);
        if let Some(cap) = shape.soft_cap {
            seen.iter_mut().for_each(|s| *s = scalar::soft_cap(*s, cap));
        }
        let max = t.largest(simd.run(Max(seen)));
        simd.run(Exp(seen, max));
        sums.push(t.with_sink(simd.run(LaneSum(row)), max));
    }
    let padded = d.next_multiple_of(WIDTH);
    let mut mixed = vec![0f32; t.count * padded];
    let mut values = Aligned::zeros(VALUES * padded);
    for first in (begin..end).step_by(VALUES) {
        let last = end.min(first + VALUES);
        let mut held = values.chunks_exact_mut(padded);
        runs(Part::Values, first, last, &mut |run| {
            for (value, slot) in run.chunks_exact(d).zip(held.by_ref()) {
                slot[..d].copy_from_slice(value);
            }
        });
        let left = Left { data: &weights[first - begin..], row: n, step: 1 };
        for c in (0..padded).step_by(WIDTH) {
            let panel = Panel { data: &values[c..], stride: padded };
            let (inner, keep, out) = (last - first, first > begin, &mut mixed[c..]);
            strip(simd, Strip { left, panel, rows: t.count, inner, columns: WIDTH, keep, stride: padded, out })?;
        }
    }
    let mut out = vec![0f32; t.count * d];
    for ((out, mixed), z) in out.chunks_exact_mut(d).zip(mixed.chunks_exact(padded)).zip(&sums) {
        out.iter_mut().zip(mixed).for_each(|(o, m)| *o = m / z);
    }
    Ok(out)
}

/// Replaces values by `exp(v − max)`.
struct Exp<'a>(&'a mut [f32], f32);

impl Kernel for Exp<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        self.0.iter_mut().for_each(|v| *v = exp(*v - self.1));
    }
}

/// Sum of a row whose length is a multiple of sixteen: lane l takes elements l, l + 16, ...; then halves are folded.
struct LaneSum<'a>(&'a [f32]);

impl Kernel for LaneSum<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        let mut acc = [0f32; 16];
        for c in self.0.as_chunks::<16>().0 {
            for i in 0..16 {
                acc[i] += c[i];
            }
        }
        super::elementwise::fold(acc)
    }
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
        let Self { q, keys, scale, scores } = self;
        let d = q.len();
        let (fours, rest) = scores.as_chunks_mut::<4>();
        let (many, few) = keys.split_at(fours.len() * 4 * d);
        for (scores, keys) in fours.iter_mut().zip(many.chunks_exact(4 * d)) {
            // SAFETY: four keys of `d` elements; the caller vouches for the instruction set.
            let sums = unsafe { L::sums(dots::<L, 4>(q, keys)) };
            for (j, (s, key)) in scores.iter_mut().zip(keys.chunks_exact(d)).enumerate() {
                *s = tail::<L>(q, key, sums[j]) * scale;
            }
        }
        for (s, key) in rest.iter_mut().zip(few.chunks_exact(d)) {
            // SAFETY: one key of `d` elements; the caller vouches for the instruction set.
            let sum = unsafe { L::sum(dots::<L, 1>(q, key)[0]) };
            *s = tail::<L>(q, key, sum) * scale;
        }
    }
}

/// q times K keys, over the whole registers of their width: the lanes still apart.
///
/// # Safety
/// The instruction set of `L`; `keys` holds K of q's length.
#[inline(always)]
unsafe fn dots<L: Lanes, const K: usize>(q: &[f32], keys: &[f32]) -> [L::V; K] {
    let d = q.len();
    // SAFETY: `i + N ≤ d` elements exist in q and in every key.
    unsafe {
        let mut acc = [L::splat(0.0); K];
        for i in (0..d / L::N * L::N).step_by(L::N) {
            let q = L::load(q.as_ptr().add(i));
            for (j, acc) in acc.iter_mut().enumerate() {
                *acc = L::fmadd(q, L::load(keys.as_ptr().add(j * d + i)), *acc);
            }
        }
        acc
    }
}

/// `sum` and the products of what does not fill a register.
#[inline(always)]
fn tail<L: Lanes>(q: &[f32], key: &[f32], mut sum: f32) -> f32 {
    let whole = q.len() / L::N * L::N;
    for (a, b) in q[whole..].iter().zip(&key[whole..]) {
        sum += a * b;
    }
    sum
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
    unsafe fn run<L: Lanes>(mut self) {
        let d = self.out.len();
        let mut from = 0;
        // Four registers of columns stay where they are while all keys pass.
        while from + L::N <= d {
            let count = if from + 4 * L::N <= d { 4 } else { 1 };
            // SAFETY: `from + count · N ≤ d`, the length of `out` and of every value; the caller vouches for the instruction set.
            unsafe {
                match count {
                    4 => self.columns::<L, 4>(from),
                    _ => self.columns::<L, 1>(from),
                }
            }
            from += count * L::N;
        }
        for (w, value) in self.weights.iter().zip(self.values.chunks_exact(d)) {
            for (o, v) in self.out[from..].iter_mut().zip(&value[from..]) {
                *o += w * v;
            }
        }
    }
}

impl Mix<'_> {
    /// Columns `from .. from + C · N` of every value.
    ///
    /// # Safety
    /// The instruction set of `L`; the columns exist.
    #[inline(always)]
    unsafe fn columns<L: Lanes, const C: usize>(&mut self, from: usize) {
        let out = self.out[from..].as_mut_ptr();
        // SAFETY: the caller's contract.
        unsafe {
            let mut acc = [L::splat(0.0); C];
            for c in 0..C {
                acc[c] = L::load(out.add(c * L::N));
            }
            for (w, value) in self.weights.iter().zip(self.values.chunks_exact(self.out.len())) {
                let w = L::splat(*w);
                for c in 0..C {
                    acc[c] = L::fmadd(w, L::load(value.as_ptr().add(from + c * L::N)), acc[c]);
                }
            }
            for c in 0..C {
                L::store(out.add(c * L::N), acc[c]);
            }
        }
    }
}
