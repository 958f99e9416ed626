//! One decoder block of the Llama kind in f32 on the host, forwards and backwards, with windows of tokens stacked in rows.
//!
//! `y = x₁ + down(silu(gate(h₂)) ∘ up(h₂))`, `h₂ = norm(x₁)`, `x₁ = x + o(attention(q(h₁), k(h₁), v(h₁)))`, `h₁ = norm(x)`: the stages of
//! [`lowbit_model::block::Block`], which computes the same on any device but forwards only. Biases, norms of queries and keys per head
//! (Qwen 3), grouped queries and sliding windows are known; experts, latent attention, fused projections and norms after attention and
//! MLP are not.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use lowbit_kernels::backend::AttentionShape;
use lowbit_model::rope::Rope;
use rayon::prelude::*;

use super::attention;

/// Linears of a block, in the order of `linear_shapes`: q, k, v, o, gate, up, down.
pub const LINEARS: usize = 7;
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// Rows of a product's task. Fixed, so that results do not depend on the thread count.
const ROWS: usize = 128;

/// Everything of a block but the weights of its linears.
pub struct Graph {
    /// Heads, scale and window.
    pub attention: AttentionShape,
    /// Frequencies.
    pub rope: Rope,
    /// ε of the norms.
    pub eps: f32,
    /// Rows and columns of the linears.
    pub dims: [(usize, usize); LINEARS],
    /// `[out]` of the linears that have one.
    pub biases: [Option<Vec<f32>>; LINEARS],
    /// `[hidden]`, before attention.
    pub input_norm: Vec<f32>,
    /// `[hidden]`, before the MLP.
    pub mlp_norm: Vec<f32>,
    /// `[head_dim]`, on queries.
    pub q_norm: Option<Vec<f32>>,
    /// `[head_dim]`, on keys.
    pub k_norm: Option<Vec<f32>>,
}

/// Weights `[out, in]` of the linears.
pub type Weights<'a> = [&'a [f32]; LINEARS];

/// What [`Graph::forward`] leaves for [`Graph::backward`]; all `[tokens, ...]`.
pub struct Trace {
    h1: Vec<f32>,
    /// Before their norm, where there is one.
    q_raw: Option<Vec<f32>>,
    k_raw: Option<Vec<f32>>,
    /// After their rotation.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    x1: Vec<f32>,
    h2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    activated: Vec<f32>,
    /// The block's output `[tokens, hidden]`.
    pub y: Vec<f32>,
}

/// `x` `[rows, cols]` as a matrix.
fn rows(x: &[f32], rows: usize, cols: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(x, rows, cols)
}

/// `a · b`, row-major.
fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let cols = b.ncols();
    let mut y = vec![0f32; a.nrows() * cols];
    if cols > 0 {
        y.par_chunks_mut(ROWS * cols).enumerate().for_each(|(task, y)| {
            let count = y.len() / cols;
            let part = a.submatrix(task * ROWS, 0, count, a.ncols());
            matmul(MatMut::from_row_major_slice_mut(y, count, cols), Accum::Replace, part, b, 1.0, Par::Seq);
        });
    }
    y
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `1 / rms` of a row.
fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let mean = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / row.len().max(1) as f64;
    (1.0 / (mean + f64::from(eps)).sqrt()) as f32
}

/// `x ∘ weight / rms(x)` of each row as long as `weight`.
fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut y = x.to_vec();
    y.par_chunks_mut(weight.len().max(1)).for_each(|row| {
        let r = inverse_rms(row, eps);
        row.iter_mut().zip(weight).for_each(|(v, w)| *v *= r * w);
    });
    y
}

/// The gradient of [`rms_norm`]'s input: `r w ∘ dy − x r³ / n · Σ x ∘ w ∘ dy`, r = 1 / rms.
fn rms_norm_back(x: &[f32], weight: &[f32], dy: &[f32], eps: f32) -> Vec<f32> {
    let n = weight.len().max(1);
    let mut dx = dy.to_vec();
    dx.par_chunks_mut(n).zip(x.par_chunks(n)).for_each(|(dx, x)| {
        let r = inverse_rms(x, eps);
        dx.iter_mut().zip(weight).for_each(|(d, w)| *d *= w);
        let along = dx.iter().zip(x).map(|(d, x)| f64::from(*d) * f64::from(*x)).sum::<f64>() as f32;
        let back = r * r * r / n as f32 * along;
        dx.iter_mut().zip(x).for_each(|(d, x)| *d = r * *d - back * x);
    });
    dx
}

impl Graph {
    /// Runs `x` `[tokens, hidden]`, windows of these lengths one after another.
    pub fn forward(&self, w: &Weights<'_>, x: &[f32], windows: &[usize]) -> Trace {
        let tokens: usize = windows.iter().sum();
        let h1 = rms_norm(x, &self.input_norm, self.eps);
        let (mut q, mut k) = (self.apply(Q, w, &h1, tokens), self.apply(K, w, &h1, tokens));
        let v = self.apply(V, w, &h1, tokens);
        let (mut q_raw, mut k_raw) = (None, None);
        if let Some(weight) = &self.q_norm {
            let normed = rms_norm(&q, weight, self.eps);
            q_raw = Some(std::mem::replace(&mut q, normed));
        }
        if let Some(weight) = &self.k_norm {
            let normed = rms_norm(&k, weight, self.eps);
            k_raw = Some(std::mem::replace(&mut k, normed));
        }
        self.rotate(&mut q, self.attention.heads, windows, false);
        self.rotate(&mut k, self.attention.kv_heads, windows, false);
        let attended = attention::forward(&q, &k, &v, &self.attention, windows);
        let mut x1 = self.apply(O, w, &attended, tokens);
        add(&mut x1, x);
        let h2 = rms_norm(&x1, &self.mlp_norm, self.eps);
        let (gate, up) = (self.apply(GATE, w, &h2, tokens), self.apply(UP, w, &h2, tokens));
        let activated: Vec<f32> = gate.par_iter().zip(&up).map(|(g, u)| g * sigmoid(*g) * u).collect();
        let mut y = self.apply(DOWN, w, &activated, tokens);
        add(&mut y, &x1);
        Trace { h1, q_raw, k_raw, q, k, v, attended, x1, h2, gate, up, activated, y }
    }

    /// The gradient of the weights `[out, in]` of every linear, from that of the output `[tokens, hidden]`.
    pub fn backward(&self, w: &Weights<'_>, trace: &Trace, dy: &[f32], windows: &[usize]) -> [Vec<f32>; LINEARS] {
        let tokens: usize = windows.iter().sum();
        let d_down = self.weight_gradient(DOWN, dy, &trace.activated, tokens);
        let d_activated = self.input_gradient(DOWN, w, dy, tokens);
        let (d_gate, d_up): (Vec<f32>, Vec<f32>) = d_activated
            .par_iter()
            .zip(&trace.gate)
            .zip(&trace.up)
            .map(|((d, g), u)| {
                let s = sigmoid(*g);
                (d * u * s * (1.0 + g * (1.0 - s)), d * g * s)
            })
            .unzip();
        let mut d_h2 = self.input_gradient(GATE, w, &d_gate, tokens);
        add(&mut d_h2, &self.input_gradient(UP, w, &d_up, tokens));
        let mut d_x1 = rms_norm_back(&trace.x1, &self.mlp_norm, &d_h2, self.eps);
        add(&mut d_x1, dy);

        let d_attended = self.input_gradient(O, w, &d_x1, tokens);
        let qkv = [&trace.q, &trace.k, &trace.v].map(Vec::as_slice);
        let [mut dq, mut dk, dv] = attention::backward(qkv, &d_attended, &self.attention, windows);
        self.rotate(&mut dq, self.attention.heads, windows, true);
        self.rotate(&mut dk, self.attention.kv_heads, windows, true);
        if let (Some(weight), Some(raw)) = (&self.q_norm, &trace.q_raw) {
            dq = rms_norm_back(raw, weight, &dq, self.eps);
        }
        if let (Some(weight), Some(raw)) = (&self.k_norm, &trace.k_raw) {
            dk = rms_norm_back(raw, weight, &dk, self.eps);
        }
        [
            self.weight_gradient(Q, &dq, &trace.h1, tokens),
            self.weight_gradient(K, &dk, &trace.h1, tokens),
            self.weight_gradient(V, &dv, &trace.h1, tokens),
            self.weight_gradient(O, &d_x1, &trace.attended, tokens),
            self.weight_gradient(GATE, &d_gate, &trace.h2, tokens),
            self.weight_gradient(UP, &d_up, &trace.h2, tokens),
            d_down,
        ]
    }

    /// `x Wᵀ + b`.
    fn apply(&self, i: usize, w: &Weights<'_>, x: &[f32], tokens: usize) -> Vec<f32> {
        let (out, n) = self.dims[i];
        let mut y = product(rows(x, tokens, n), rows(w[i], out, n).transpose());
        if let Some(bias) = &self.biases[i] {
            y.chunks_mut(out.max(1)).for_each(|row| add(row, bias));
        }
        y
    }

    /// `dy W`.
    fn input_gradient(&self, i: usize, w: &Weights<'_>, dy: &[f32], tokens: usize) -> Vec<f32> {
        let (out, n) = self.dims[i];
        product(rows(dy, tokens, out), rows(w[i], out, n))
    }

    /// `dyᵀ x`.
    fn weight_gradient(&self, i: usize, dy: &[f32], x: &[f32], tokens: usize) -> Vec<f32> {
        let (out, n) = self.dims[i];
        product(rows(dy, tokens, out).transpose(), rows(x, tokens, n))
    }

    /// Turns the first elements of each head by its position in its window, or the other way. The gradient of a rotation is the
    /// rotation back; the factor on cos and sin is the same both ways.
    fn rotate(&self, x: &mut [f32], heads: usize, windows: &[usize], back: bool) {
        let Rope { inv_freq, mscale } = &self.rope;
        let (half, d) = (inv_freq.len(), self.attention.head_dim);
        let positions: Vec<usize> = windows.iter().flat_map(|tokens| 0..*tokens).collect();
        x.par_chunks_mut((heads * d).max(1)).zip(&positions).for_each(|(row, position)| {
            for i in 0..half {
                let angle = *position as f32 * inv_freq[i];
                let (c, s) = (angle.cos() * mscale, angle.sin() * mscale);
                let s = if back { -s } else { s };
                for head in row.chunks_exact_mut(d.max(1)) {
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = a * c - b * s;
                    head[i + half] = b * c + a * s;
                }
            }
        });
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// A block with everything: two query heads a key head, a part of a head that turns, norms and biases, a window.
    fn tiny(rng: &mut StdRng, norms: bool, window: Option<usize>) -> (Graph, Vec<Vec<f32>>) {
        let (hidden, heads, kv_heads, d, wide) = (12, 4, 2, 6, 20);
        let (q, kv) = (heads * d, kv_heads * d);
        let dims =
            [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (wide, hidden), (wide, hidden), (hidden, wide)];
        let mut sample =
            |len: usize, scale: f32| -> Vec<f32> { (0..len).map(|_| scale * rng.random_range(-1f32..1.0)).collect() };
        let weights = dims.iter().map(|(out, n)| sample(out * n, 1.2 / (*n as f32).sqrt())).collect();
        let mut near_one = |len| -> Vec<f32> { sample(len, 0.3).iter().map(|v| 1.0 + v).collect() };
        let (input_norm, mlp_norm) = (near_one(hidden), near_one(hidden));
        let (q_norm, k_norm) = (norms.then(|| near_one(d)), norms.then(|| near_one(d)));
        let mut biases = [const { None }; LINEARS];
        biases[Q] = Some(sample(q, 0.2));
        biases[V] = Some(sample(kv, 0.2));
        let graph = Graph {
            attention: AttentionShape { heads, kv_heads, head_dim: d, scale: 0.6, window, soft_cap: None },
            rope: Rope { inv_freq: vec![1.0, 0.3], mscale: 1.1 },
            eps: 1e-5,
            dims,
            biases,
            input_norm,
            mlp_norm,
            q_norm,
            k_norm,
        };
        (graph, weights)
    }

    /// `½ Σ (y − t)²`, in f64.
    fn loss(graph: &Graph, weights: &[Vec<f32>], x: &[f32], t: &[f32], windows: &[usize]) -> f64 {
        let w: Weights<'_> = std::array::from_fn(|i| weights[i].as_slice());
        let y = graph.forward(&w, x, windows).y;
        0.5 * y.iter().zip(t).map(|(y, t)| (f64::from(*y) - f64::from(*t)).powi(2)).sum::<f64>()
    }

    #[test]
    fn gradients_are_those_of_differences() {
        let mut rng = StdRng::seed_from_u64(1);
        for (norms, window) in [(false, None), (true, None), (true, Some(3))] {
            let (graph, weights) = tiny(&mut rng, norms, window);
            let windows = [7, 1, 4];
            let mut sample =
                |scale: f32| -> Vec<f32> { (0..12 * 12).map(|_| scale * rng.random_range(-1f32..1.0)).collect() };
            let (x, t) = (sample(1.5), sample(1.0));
            let w: Weights<'_> = std::array::from_fn(|i| weights[i].as_slice());
            let trace = graph.forward(&w, &x, &windows);
            let dy: Vec<f32> = trace.y.iter().zip(&t).map(|(y, t)| y - t).collect();
            let gradients = graph.backward(&w, &trace, &dy, &windows);
            for (i, gradient) in gradients.iter().enumerate() {
                // Along the gradient, where the slope is its norm, and along a random direction across it.
                let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                assert!(norm > 1e-2, "linear {i} has no gradient");
                let along: Vec<f64> = gradient.iter().map(|g| f64::from(*g) / norm).collect();
                let random: Vec<f64> = along.iter().map(|a| a.signum() * rng.random_range(0.02..0.1)).collect();
                for direction in [along, random] {
                    let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum();
                    let at = |step: f64| {
                        let mut moved = weights.clone();
                        moved[i].iter_mut().zip(&direction).for_each(|(w, d)| *w += (step * d) as f32);
                        loss(&graph, &moved, &x, &t, &windows)
                    };
                    // Differences to the fourth order: their own error is far below that of f32 sums, some 1e-6 of the loss over the step.
                    let h = 2e-2;
                    let found = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
                    let budget = 0.02 * slope.abs() + 1e-3;
                    assert!((found - slope).abs() <= budget, "linear {i}, norms {norms}, {window:?}: {found} {slope}");
                }
            }
        }
    }

    #[test]
    fn windows_do_not_see_each_other() {
        let mut rng = StdRng::seed_from_u64(2);
        let (graph, weights) = tiny(&mut rng, true, None);
        let w: Weights<'_> = std::array::from_fn(|i| weights[i].as_slice());
        let x: Vec<f32> = (0..9 * 12).map(|_| rng.random_range(-1f32..1.0)).collect();
        let whole = graph.forward(&w, &x, &[4, 5]).y;
        let apart = [graph.forward(&w, &x[..4 * 12], &[4]).y, graph.forward(&w, &x[4 * 12..], &[5]).y].concat();
        for (a, b) in whole.iter().zip(&apart) {
            assert!((a - b).abs() <= 1e-5, "{a} {b}");
        }
        // Causal: the last token changes nothing before it.
        let mut other = x.clone();
        other[8 * 12..].fill(0.5);
        assert_eq!(graph.forward(&w, &other, &[4, 5]).y[..8 * 12], whole[..8 * 12]);
    }
}
