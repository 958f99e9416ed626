//! Norms, rotary embedding, activations, scoring: one pass over rows, parallel over chunks whose split is fixed.

use rayon::prelude::*;

use super::pool::{Parts, Pool};
use super::scalar;
use super::simd::{Kernel, Lanes, Simd};
use crate::backend::{Activation, TokenScore};

/// Elements of one task; small enough to balance, large enough to be worth a task.
const CHUNK: usize = 16 << 10;

/// `exp(x)` to about two units in the last place, saturating near the ends of the f32 range; branch-free, so loops
/// over it vectorize. NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer and leaves that in the low bits
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = (p * r).mul_add(r, r) + 1.0;
    // The low bits of `shifted` are n (mod 2⁹ suffices); placed in the exponent they make 2ⁿ.
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// erfc with a relative error below 1.2e-7 (Numerical Recipes, Chebyshev fit).
fn erfc(x: f64) -> f64 {
    const C: [f64; 10] = [
        -1.26551223,
        1.00002368,
        0.37409196,
        0.09678418,
        -0.18628806,
        0.27886807,
        -1.13520398,
        1.48851587,
        -0.82215223,
        0.17087277,
    ];
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.5 * z);
    let poly = C.iter().rev().fold(0.0, |acc, c| acc * t + c);
    let tail = t * (poly - z * z).exp();
    if x >= 0.0 { tail } else { 2.0 - tail }
}

/// Sum of sixteen lanes: halves are folded, 8, 4, 2, 1.
#[inline(always)]
pub fn fold(mut lanes: [f32; 16]) -> f32 {
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

struct ActivationMul<'a>(&'a mut [f32], &'a [f32], Activation);

impl Kernel for ActivationMul<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let pairs = self.0.iter_mut().zip(self.1);
        match self.2 {
            Activation::Silu => pairs.for_each(|(g, u)| *g = *g / (1.0 + exp(-*g)) * u),
            Activation::GeluTanh => pairs.for_each(|(g, u)| {
                // 0.5 · (1 + tanh y) = sigmoid(2y), which does not cancel for negative y.
                let y = 1.595_769 * (*g + 0.044_715 * *g * *g * *g);
                *g = *g / (1.0 + exp(-y)) * u;
            }),
            Activation::Gelu => pairs.for_each(|(g, u)| {
                let v = f64::from(*g);
                *g = (0.5 * v * erfc(-v * std::f64::consts::FRAC_1_SQRT_2)) as f32 * u;
            }),
        }
    }
}

/// `act(gate) · up`; `decode` is the pool of the decode phase.
pub fn activation_mul(simd: Simd, decode: Option<&Pool>, gate: &[f32], up: &[f32], act: Activation) -> Vec<f32> {
    /// Of a task in the decode phase: a few microseconds.
    const STEP: usize = CHUNK / 4;
    let mut y = gate.to_vec();
    if let Some(pool) = decode {
        let parts = Parts::new(&mut y);
        pool.run(up.len().div_ceil(STEP), &|i| {
            let up = &up[i * STEP..up.len().min((i + 1) * STEP)];
            // SAFETY: `y` is borrowed for the whole call, and a task has a part of its own.
            simd.run(ActivationMul(unsafe { parts.part(i * STEP, up.len()) }, up, act));
        });
        return y;
    }
    if y.len() <= CHUNK {
        // One chunk: handing it to another thread costs more than it takes.
        simd.run(ActivationMul(&mut y, up, act));
        return y;
    }
    y.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(y, up)| simd.run(ActivationMul(y, up, act)));
    y
}

struct ClampedSwiglu<'a>(&'a mut [f32], &'a [f32], f32, f32);

impl Kernel for ClampedSwiglu<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self(gate, up, alpha, limit) = self;
        gate.iter_mut().zip(up).for_each(|(g, u)| {
            let v = if *g > limit { limit } else { *g };
            *g = v / (1.0 + exp(-alpha * v)) * (u.clamp(-limit, limit) + 1.0);
        });
    }
}

/// See [`crate::backend::Backend::clamped_swiglu`].
pub fn clamped_swiglu(simd: Simd, gate: &[f32], up: &[f32], alpha: f32, limit: f32) -> Vec<f32> {
    let mut y = gate.to_vec();
    let chunks = y.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK));
    chunks.for_each(|(y, up)| simd.run(ClampedSwiglu(y, up, alpha, limit)));
    y
}

struct NormRow<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    out: &'a mut [f32],
    eps: f32,
    offset: f32,
}

impl Kernel for NormRow<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut acc = [0f32; 16];
        for c in self.x.chunks(16) {
            for (a, v) in acc.iter_mut().zip(c) {
                *a = v.mul_add(*v, *a);
            }
        }
        let sum = fold(acc);
        let scale = 1.0 / (sum / self.x.len() as f32 + self.eps).sqrt();
        for ((o, x), w) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *o = x * scale * (self.offset + w);
        }
    }
}

/// Root-mean-square norm of each row of `width > 0`.
pub fn rms_norm(simd: Simd, x: &[f32], weight: &[f32], width: usize, eps: f32, offset: f32) -> Vec<f32> {
    let mut y = vec![0f32; x.len()];
    if y.len() <= CHUNK {
        y.chunks_mut(width).zip(x.chunks(width)).for_each(|(out, x)| simd.run(NormRow { x, weight, out, eps, offset }));
        return y;
    }
    let rows = (CHUNK / width).max(1);
    y.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .with_min_len(rows)
        .for_each(|(out, x)| simd.run(NormRow { x, weight, out, eps, offset }));
    y
}

struct RotateHead<'a>(&'a mut [f32], &'a [(f32, f32)]);

impl Kernel for RotateHead<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let half = self.1.len();
        let (low, rest) = self.0.split_at_mut(half);
        for ((a, b), (c, s)) in low.iter_mut().zip(rest).zip(self.1) {
            (*a, *b) = (a.mul_add(*c, -(*b * s)), b.mul_add(*c, *a * s));
        }
    }
}

/// Cosines and sines of positions: one table serves queries and keys of every layer of a step.
pub struct Turns {
    inv_freq: Vec<f32>,
    mscale: f32,
    positions: Vec<Option<usize>>,
    /// `[rows, inv_freq]`; rows without a position have zeros, which nobody reads.
    table: Vec<(f32, f32)>,
}

impl Turns {
    /// `positions[row]`, where it is known.
    pub fn new(inv_freq: &[f32], mscale: f32, positions: Vec<Option<usize>>) -> Self {
        let half = inv_freq.len();
        let mut table = vec![(0f32, 0f32); positions.len() * half];
        let turn_row = |(row, position): (&mut [(f32, f32)], &Option<usize>)| {
            let Some(position) = position else { return };
            for (turn, f) in row.iter_mut().zip(inv_freq) {
                let angle = *position as f32 * f;
                *turn = (angle.cos() * mscale, angle.sin() * mscale);
            }
        };
        if table.len() <= CHUNK / 8 {
            table.chunks_mut(half.max(1)).zip(&positions).for_each(turn_row);
        } else {
            table.par_chunks_mut(half.max(1)).zip(&positions).with_min_len(CHUNK / 64 / half.max(1)).for_each(turn_row);
        }
        Self { inv_freq: inv_freq.to_vec(), mscale, positions, table }
    }

    /// Whether these are the turns of other arguments too.
    pub fn are(&self, inv_freq: &[f32], mscale: f32, positions: &[Option<usize>]) -> bool {
        self.positions == positions && self.inv_freq == inv_freq && self.mscale == mscale
    }
}

/// Rotates rows of `width` whose position is known.
pub fn rope(simd: Simd, x: &mut [f32], width: usize, head_dim: usize, turns: &Turns) {
    let half = turns.inv_freq.len();
    let turn_row = |(i, row): (usize, &mut [f32])| {
        let known = turns.positions.get(i).is_some_and(Option::is_some);
        if let Some(turns) = turns.table.get(i * half..(i + 1) * half).filter(|_| known) {
            row.chunks_exact_mut(head_dim).for_each(|head| simd.run(RotateHead(head, turns)));
        }
    };
    if x.len() <= CHUNK {
        x.chunks_mut(width).enumerate().for_each(turn_row);
    } else {
        x.par_chunks_mut(width).enumerate().with_min_len((CHUNK / 8 / width).max(1)).for_each(turn_row);
    }
}

/// `x += y`.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    if x.len() <= CHUNK {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        return;
    }
    x.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
}

/// `x ← cap · tanh(x / cap)`.
pub fn soft_cap(x: &mut [f32], cap: f32) {
    x.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|v| *v = scalar::soft_cap(*v, cap)));
}

/// Largest value, NaN ignored; −∞ when there is none.
pub struct Max<'a>(pub &'a [f32]);

impl Kernel for Max<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        let (chunks, tail) = self.0.as_chunks::<16>();
        let mut best = [f32::NEG_INFINITY; 16];
        for c in chunks {
            for i in 0..16 {
                best[i] = if c[i] > best[i] { c[i] } else { best[i] };
            }
        }
        best.iter().chain(tail).fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m })
    }
}

/// `Σ exp(x − max)`: f32 lanes within blocks of 512, f64 over blocks.
struct SumExp<'a>(&'a [f32], f32);

impl Kernel for SumExp<'_> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f64 {
        let mut total = 0f64;
        for block in self.0.chunks(512) {
            let (chunks, tail) = block.as_chunks::<16>();
            let mut acc = [0f32; 16];
            for c in chunks {
                for i in 0..16 {
                    acc[i] += exp(c[i] - self.1);
                }
            }
            total += acc.iter().map(|v| f64::from(*v)).sum::<f64>();
            total += tail.iter().map(|v| f64::from(exp(v - self.1))).sum::<f64>();
        }
        total
    }
}

fn top(simd: Simd, row: &[f32]) -> (usize, f32) {
    let max = simd.run(Max(row));
    (row.iter().position(|v| *v == max).unwrap_or(0), max)
}

/// Log-probability of each row's target (each below `vocab`) and the argmax.
pub fn score(simd: Simd, logits: &[f32], vocab: usize, targets: &[u32]) -> Vec<TokenScore> {
    let one = |(row, target): (&[f32], &u32)| {
        let (top1, max) = top(simd, row);
        let sum = simd.run(SumExp(row, max));
        let log_prob = (f64::from(row[*target as usize]) - f64::from(max) - sum.ln()) as f32;
        TokenScore { log_prob, top1: top1 as u32 }
    };
    logits.par_chunks_exact(vocab).zip(targets).map(one).collect()
}

/// First index of the largest value of each row; 0 for a row of NaN.
pub fn argmax(simd: Simd, logits: &[f32], vocab: usize) -> Vec<u32> {
    logits.par_chunks_exact(vocab).map(|row| top(simd, row).0 as u32).collect()
}
