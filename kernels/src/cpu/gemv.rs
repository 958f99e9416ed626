//! Products of few tokens with one weight, or with several that read the same input, in one pass over the threads.

use std::ops::Range;

use super::Weight;
use super::dense::{GEMV_ROWS, GEMV_TOKENS};
use super::packed::Prepared;
use super::pool::{Parts, Pool};
use super::simd::Simd;

/// Whether all of these have a loop for the decode phase; the others keep prefill's arithmetic there.
pub fn takes(weights: &[&Weight]) -> bool {
    weights.iter().all(|w| match w {
        Weight::Dense(_) => true,
        Weight::Packed(p) => p.has_rows(),
    })
}

/// `ys[i] = x Wᵢᵀ`: x `[t, k]`, ys[i] `[t, nᵢ]`. Rows are split in fixed chunks and tokens are taken four at a time, each in an order
/// of its own, so neither threads nor the batch change a result.
pub fn gemv(simd: Simd, pool: &Pool, exact: bool, x: &[f32], t: usize, weights: &[&Weight], ys: &mut [Vec<f32>]) {
    let k = x.len() / t.max(1);
    let tokens: Vec<&[f32]> = x.chunks((GEMV_TOKENS * k).max(1)).collect();
    let prepared: Vec<Vec<Input>> = tokens.iter().map(|x| prepare(simd, exact, x, weights)).collect();
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
            if tokens.len() == 1 {
                return product(simd, weights[i], &prepared[0], i, x, rows, out);
            }
            let mut some = [0f32; GEMV_ROWS * GEMV_TOKENS];
            for (chunk, (x, prepared)) in tokens.iter().zip(&prepared).enumerate() {
                let count = x.len() / k.max(1);
                let some = &mut some[..rows.len() * count];
                product(simd, weights[i], prepared, i, x, rows.clone(), some);
                for (out, some) in out.chunks_exact_mut(t).zip(some.chunks_exact(count)) {
                    out[chunk * GEMV_TOKENS..][..count].copy_from_slice(some);
                }
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

/// Rows `rows` of weight `i` times at most four tokens; out `[rows, tokens]`.
fn product(simd: Simd, w: &Weight, inputs: &[Input], i: usize, x: &[f32], rows: Range<usize>, out: &mut [f32]) {
    let t = out.len() / rows.len().max(1);
    match (w, &inputs[i]) {
        (Weight::Packed(w), Input::Own(p)) => w.rows(simd, p, t, rows, out),
        (Weight::Packed(w), Input::As(j)) => {
            if let Input::Own(p) = &inputs[*j] {
                w.rows(simd, p, t, rows, out);
            }
        }
        (Weight::Dense(w), _) => w.rows(simd, x, t, rows, out),
        (Weight::Packed(_), Input::Plain) => {}
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
