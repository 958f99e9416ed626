//! Products that read each weight once, of few tokens (any weight) or of many (packed ones), with one weight or with several
//! that share their input, in one pass over the threads.

use std::ops::Range;
use std::sync::OnceLock;

use super::Weight;
use super::dense::{GEMV_ROWS, GEMV_TOKENS};
use super::integer::{self, TOKENS};
use super::pool::{Parts, Pool};
use super::rounded::Rounded;
use super::simd::Simd;

/// Whether all of these have a loop for the decode phase; the others keep prefill's arithmetic there, as all packed ones do
/// when `exact`.
pub fn takes(exact: bool, weights: &[&Weight]) -> bool {
    weights.iter().all(|w| match w {
        Weight::Dense(_) => true,
        Weight::Packed(p) => !exact && p.has_rows(),
        Weight::Float(_) => false,
    })
}

/// `ys[i] = x Wᵢᵀ`: x `[t, k]`, ys[i] `[t, nᵢ]`. Rows are split in fixed chunks and tokens are taken a few at a time, each in an order
/// of its own, so neither threads nor the batch change a result.
pub fn gemv(simd: Simd, pool: &Pool, x: &[f32], t: usize, weights: &[&Weight], ys: &mut [Vec<f32>]) {
    let k = x.len() / t.max(1);
    let packed = weights.iter().all(|w| matches!(w, Weight::Packed(_)));
    let most = if packed { integer::tokens(simd) } else { GEMV_TOKENS };
    let tokens: Vec<&[f32]> = x.chunks((most * k).max(1)).collect();
    let prepared: Vec<OnceLock<Vec<Input>>> = tokens.iter().map(|_| OnceLock::new()).collect();
    // Before the products: a thread that found its input in the making would sleep for longer than the product takes. One chunk
    // is made by the caller alone.
    pool.run(tokens.len(), &|i| {
        prepared[i].get_or_init(|| prepare(simd, tokens[i], weights));
    });
    // A task of many tokens takes long: half the rows, so that no thread waits for another's last one.
    let step = if t >= TOKENS { GEMV_ROWS / 2 } else { GEMV_ROWS };
    let mut tasks: Vec<(usize, Range<usize>)> = Vec::new();
    for (i, y) in ys.iter().enumerate() {
        let n = y.len() / t;
        tasks.extend((0..n).step_by(step).map(|r| (i, r..(r + step).min(n))));
    }
    let widths: Vec<usize> = ys.iter().map(|y| y.len() / t).collect();
    let parts: Vec<Parts<f32>> = ys.iter_mut().map(|y| Parts::new(y)).collect();
    pool.run(tasks.len(), &|task| {
        let (i, rows) = tasks[task].clone();
        let mut some = [0f32; GEMV_ROWS * TOKENS];
        for (chunk, (x, prepared)) in tokens.iter().zip(&prepared).enumerate() {
            let prepared = prepared.get_or_init(|| prepare(simd, x, weights));
            let count = x.len() / k.max(1);
            let some = &mut some[..rows.len() * count];
            product(simd, weights[i], prepared, i, x, rows.clone(), some);
            for (token, row) in some.chunks_exact(rows.len()).enumerate() {
                let at = (chunk * most + token) * widths[i] + rows.start;
                // SAFETY: a row of every token belongs to one chunk of rows, which is one task, and `ys` is borrowed for the whole call.
                unsafe { parts[i].part(at, rows.len()) }.copy_from_slice(row);
            }
        }
    });
}

/// Rows `rows` of weight `i` times the tokens of a chunk; out `[tokens, rows]`.
fn product(simd: Simd, w: &Weight, inputs: &[Input], i: usize, x: &[f32], rows: Range<usize>, out: &mut [f32]) {
    let t = out.len() / rows.len().max(1);
    match (w, &inputs[i]) {
        (Weight::Packed(w), Input::Own(p)) => w.rows(simd, p, rows.start, out),
        (Weight::Packed(w), Input::As(j)) => {
            if let Input::Own(p) = &inputs[*j] {
                w.rows(simd, p, rows.start, out);
            }
        }
        (Weight::Dense(w), _) => w.rows(simd, x, t, rows, out),
        // `takes` lets neither of them come here.
        (Weight::Packed(_), Input::Plain) | (Weight::Float(_), _) => {}
    }
}

/// What a weight reads.
enum Input {
    /// x itself.
    Plain,
    /// A form of its own.
    Own(Rounded),
    /// The form made for an earlier weight.
    As(usize),
}

fn prepare(simd: Simd, x: &[f32], weights: &[&Weight]) -> Vec<Input> {
    let mut out: Vec<Input> = Vec::with_capacity(weights.len());
    for (i, w) in weights.iter().enumerate() {
        let Weight::Packed(p) = w else {
            out.push(Input::Plain);
            continue;
        };
        let earlier = (0..i).find(|j| {
            matches!(out[*j], Input::Own(_)) && matches!(weights[*j], Weight::Packed(other) if other.shares(p, simd))
        });
        out.push(earlier.map_or_else(|| Input::Own(p.prepare(simd, x)), Input::As));
    }
    out
}
