//! The operations as plain loops on slices: the reference other backends are compared with. Nothing here is fast.

use crate::backend::{Activation, AttentionShape, PackedWeight, Segment, TokenScore};
use crate::error::Result;
use crate::pack::unpack_rows;

/// A packed weight as f32 `[out, in]`.
pub fn dequantize(w: &PackedWeight) -> Result<Vec<f32>> {
    let words: Vec<u32> = w.words.as_slice().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let matrix = crate::QuantizedMatrix {
        scheme: w.scheme,
        out_features: w.out_features,
        in_features: w.in_features,
        codes: unpack_rows(&words, w.out_features, w.in_features, w.scheme.bits)?,
        scales: w.scales.clone(),
        zeros: w.zeros.clone(),
        group_index: w.group_index.clone(),
    };
    matrix.dequantize()
}

/// `y[t][o] = Σ x[t][i] · w[o][i] (+ bias[o])`, summed in order.
pub fn linear(x: &[f32], w: &[f32], k: usize, n: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len() / k.max(1) * n);
    for x in x.chunks_exact(k.max(1)) {
        for o in 0..n {
            let mut sum = 0f32;
            for i in 0..k {
                sum += x[i] * w[o * k + i];
            }
            y.push(sum + bias.map_or(0.0, |b| b[o]));
        }
    }
    y
}

/// Root-mean-square norm of each row of `width`; the mean in f64.
pub fn rms_norm(x: &[f32], weight: &[f32], width: usize, eps: f32, offset: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width.max(1)) {
        let mean = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / width as f64;
        let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        y.extend(row.iter().zip(weight).map(|(v, w)| v * scale * (offset + w)));
    }
    y
}

/// Rotates the first `2 · inv_freq.len()` elements of each head of one row at `position`.
pub fn rope_row(row: &mut [f32], head_dim: usize, inv_freq: &[f32], mscale: f32, position: usize) {
    let half = inv_freq.len();
    for head in row.chunks_exact_mut(head_dim.max(1)) {
        for i in 0..half {
            let angle = position as f32 * inv_freq[i];
            let (c, s) = (angle.cos() * mscale, angle.sin() * mscale);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * c - b * s;
            head[i + half] = b * c + a * s;
        }
    }
}

/// erf by its all-positive series, or 1 where f64 cannot tell the difference.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a > 6.0 {
        return x.signum();
    }
    let mut term = a;
    let mut sum = a;
    let mut n = 0.0;
    while term > sum * 1e-17 {
        n += 1.0;
        term *= 2.0 * a * a / (2.0 * n + 1.0);
        sum += term;
    }
    (2.0 / std::f64::consts::PI.sqrt() * (-a * a).exp() * sum).copysign(x)
}

/// The gate activation, in f64.
pub fn activation(x: f32, act: Activation) -> f32 {
    let v = f64::from(x);
    let y = match act {
        Activation::Silu => v / (1.0 + (-v).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v);
            0.5 * v * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * v * (1.0 + erf(v / std::f64::consts::SQRT_2)),
    };
    y as f32
}

/// `cap · tanh(x / cap)`.
pub fn soft_cap(x: f32, cap: f32) -> f32 {
    cap * (x / cap).tanh()
}

/// Softmax weights of one query over keys `[first, last]`; `keys(j)` is the key of token j.
fn attention_weights<'a>(
    q: &[f32],
    keys: impl Fn(usize) -> &'a [f32],
    first: usize,
    last: usize,
    shape: &AttentionShape,
    sink: Option<f32>,
) -> Vec<f32> {
    let mut scores = Vec::with_capacity(last + 1 - first);
    for j in first..=last {
        let dot: f32 = q.iter().zip(keys(j)).map(|(a, b)| a * b).sum();
        let s = dot * shape.scale;
        scores.push(shape.soft_cap.map_or(s, |cap| soft_cap(s, cap)));
    }
    let max = scores.iter().copied().chain(sink).fold(f32::NEG_INFINITY, f32::max);
    for s in &mut scores {
        *s = (*s - max).exp();
    }
    let sum: f32 = scores.iter().sum::<f32>() + sink.map_or(0.0, |s| (s - max).exp());
    for s in &mut scores {
        *s /= sum;
    }
    scores
}

/// Causal attention of one segment; k and v `[capacity, kv_heads · head_dim]` of its slot; q and out whole `[T, heads · head_dim]`;
/// sinks `[heads]`.
pub fn attention(
    q: &[f32],
    (k, v): (&[f32], &[f32]),
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    seg: &Segment,
    out: &mut [f32],
) {
    let d = shape.head_dim;
    let (width, kv_width) = (shape.heads * d, shape.kv_heads * d);
    for i in 0..seg.tokens {
        let position = seg.past + i;
        let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
        for h in 0..shape.heads {
            let g = h / (shape.heads / shape.kv_heads);
            let at = (seg.row + i) * width + h * d;
            let sink = sinks.map(|s| s[h]);
            let weights =
                attention_weights(&q[at..at + d], |j| &k[j * kv_width + g * d..][..d], first, position, shape, sink);
            for e in 0..d {
                out[at + e] = (first..=position).zip(&weights).map(|(j, w)| w * v[j * kv_width + g * d + e]).sum();
            }
        }
    }
}

/// See [`crate::backend::Backend::clamped_swiglu`].
pub fn clamped_swiglu(gate: f32, up: f32, alpha: f32, limit: f32) -> f32 {
    // Comparisons that NaN fails: it stays.
    let (g, u) = (if gate > limit { limit } else { gate }, up.clamp(-limit, limit));
    g / (1.0 + (-alpha * g).exp()) * (u + 1.0)
}

/// First index of the largest value; 0 when there is none (all NaN).
pub fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    let mut max = f32::NEG_INFINITY;
    for (i, v) in row.iter().enumerate() {
        if *v > max {
            (best, max) = (i, *v);
        }
    }
    best
}

/// Log-probability of `target` and the argmax; everything in f64.
pub fn score(row: &[f32], target: usize) -> TokenScore {
    let top1 = argmax(row);
    let max = f64::from(row[top1]);
    let sum: f64 = row.iter().map(|v| (f64::from(*v) - max).exp()).sum();
    TokenScore { log_prob: (f64::from(row[target]) - max - sum.ln()) as f32, top1: top1 as u32 }
}

/// `h[i][j] += Σ x[t][i] · x[t][j]` for `j ≥ i`.
pub fn hessian_update(h: &mut [f32], x: &[f32], n: usize) {
    for i in 0..n {
        for j in i..n {
            h[i * n + j] += x.chunks_exact(n).map(|x| x[i] * x[j]).sum::<f32>();
        }
    }
}
