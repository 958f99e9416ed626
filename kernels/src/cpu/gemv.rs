//! Products of few tokens with one weight, or with several that read the same input, in one pass over the threads.

use std::ops::Range;

use super::Weight;
use super::dense::{GEMV_ROWS, GEMV_TOKENS};
use super::packed::Prepared;
use super::pool::{Parts, Pool};
use super::simd::Simd;

/// Whether all of these take this path for `t` tokens.
pub fn takes(weights: &[&Weight], t: usize) -> bool {
    t <= GEMV_TOKENS
        && weights.iter().all(|w| match w {
            Weight::Dense(_) => true,
            Weight::Packed(p) => p.has_rows(),
        })
}

/// `ys[i] = x Wᵢᵀ`: x `[t, k]`, ys[i] `[t, nᵢ]`. Rows are split in fixed chunks, so threads change nothing.
pub fn gemv(simd: Simd, pool: &Pool, exact: bool, x: &[f32], t: usize, weights: &[&Weight], ys: &mut [Vec<f32>]) {
    let prepared = prepare(simd, exact, x, weights);
    // One row-major [n, t] result a weight; for one token that is already y.
    let mut by_row: Vec<Vec<f32>> = if t == 1 {
        ys.iter_mut().map(std::mem::take).collect()
    } else {
        ys.iter().map(|y| vec![0f32; y.len()]).collect()
    };
    let mut tasks: Vec<(usize, Range<usize>)> = Vec::new();
    for (i, y) in by_row.iter().enumerate() {
        let n = y.len() / t;
        tasks.extend((0..n).step_by(GEMV_ROWS).map(|r| (i, r..(r + GEMV_ROWS).min(n))));
    }
    {
        let parts: Vec<Parts<f32>> = by_row.iter_mut().map(|y| Parts::new(y)).collect();
        pool.run(tasks.len(), &|task| {
            let (i, rows) = tasks[task].clone();
            // SAFETY: chunks of rows do not overlap, each is one task, and `by_row` is borrowed for the whole block.
            let out = unsafe { parts[i].part(rows.start * t, rows.len() * t) };
            match (weights[i], &prepared[i]) {
                (Weight::Packed(w), Input::Own(p)) => w.rows(simd, p, t, rows, out),
                (Weight::Packed(w), Input::As(j)) => {
                    if let Input::Own(p) = &prepared[*j] {
                        w.rows(simd, p, t, rows, out);
                    }
                }
                (Weight::Dense(w), _) => w.rows(simd, x, t, rows, out),
                (Weight::Packed(_), Input::Plain) => {}
            }
        });
    }
    for (y, rows) in ys.iter_mut().zip(by_row) {
        if t == 1 {
            *y = rows;
            continue;
        }
        let n = y.len() / t;
        for (row, values) in rows.chunks_exact(t).enumerate() {
            for (token, v) in values.iter().enumerate() {
                y[token * n + row] = *v;
            }
        }
    }
}

/// What a weight reads.
enum Input {
    /// x itself.
    Plain,
    /// A form of its own.
    Own(Prepared),
    /// The form made for an earlier weight.
    As(usize),
}

fn prepare(simd: Simd, exact: bool, x: &[f32], weights: &[&Weight]) -> Vec<Input> {
    let mut out: Vec<Input> = Vec::with_capacity(weights.len());
    for (i, w) in weights.iter().enumerate() {
        let Weight::Packed(p) = w else {
            out.push(Input::Plain);
            continue;
        };
        let earlier = (0..i).find(|j| {
            matches!(out[*j], Input::Own(_)) && matches!(weights[*j], Weight::Packed(other) if other.shares(p))
        });
        out.push(earlier.map_or_else(|| Input::Own(p.prepare(simd, x, exact)), Input::As));
    }
    out
}
