//! Orthogonal matrices that spread outliers over all channels (QuaRot, arXiv 2404.00456, sections 3.1 and 4; SpinQuant, arXiv 2405.16406,
//! section 3: R1 and R2, the rotations that weights absorb whole).
//!
//! `Q = D (H ⊗ O)`: D random signs, H the normalized Hadamard matrix of the largest power of two that divides n, O the orthonormal DCT-II
//! of what is left (an odd number; 1 leaves the randomized Hadamard matrix). Hadamard matrices exist for some other sizes, but not for
//! odd ones, and need tables; the DCT exists for all. Entries of Q are at most `√(2/n)` where those of a Hadamard matrix are
//! `√(1/n)`: no channel of the rotated vector takes more than twice its share of an outlier's energy.

use std::f64::consts::PI;

use lowbit_kernels::random::word;
use rayon::prelude::*;

/// Rows of a task; fixed, and rows do not depend on one another.
const ROWS: usize = 16;

/// An orthogonal matrix `[n, n]` in its factors.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// ±1, `[n]`.
    signs: Vec<f64>,
    /// Order of the Hadamard factor, a power of two.
    power: usize,
    /// `[odd, odd]`, row-major.
    odd: Vec<f64>,
}

impl Rotation {
    /// The one of this size and seed: the same on every machine.
    pub fn new(n: usize, seed: u32) -> Self {
        let power = if n == 0 { 1 } else { 1 << n.trailing_zeros() };
        let m = n / power;
        let signs = (0..n as u64).map(|i| if word(seed, i) >> 31 == 0 { 1.0 } else { -1.0 }).collect();
        let dct = |i: usize, j: usize| {
            let norm = if j == 0 { (1.0 / m as f64).sqrt() } else { (2.0 / m as f64).sqrt() };
            norm * (PI * (2 * i + 1) as f64 * j as f64 / (2 * m) as f64).cos()
        };
        let odd = (0..m).flat_map(|i| (0..m).map(move |j| (i, j))).map(|(i, j)| dct(i, j)).collect();
        Self { signs, power, odd }
    }

    /// The one that changes nothing, to look at another by itself.
    #[cfg(test)]
    pub(crate) fn identity(n: usize) -> Self {
        let odd = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
        Self { signs: vec![1.0; n], power: 1, odd }
    }

    /// n.
    pub fn size(&self) -> usize {
        self.signs.len()
    }

    /// `x ← x Q` for a row vector of n, in f64; `held` is room for as many.
    fn apply(&self, x: &mut [f64], held: &mut [f64]) {
        let m = self.size() / self.power;
        x.iter_mut().zip(&self.signs).for_each(|(x, s)| *x *= s);
        // x as [power, m]: H works down the columns ...
        let mut half = 1;
        while half < self.power {
            for pair in x.chunks_exact_mut(2 * half * m) {
                let (a, b) = pair.split_at_mut(half * m);
                a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
            }
            half *= 2;
        }
        let norm = 1.0 / (self.power as f64).sqrt();
        if m <= 1 {
            x.iter_mut().for_each(|x| *x *= norm);
            return;
        }
        // ... and O along the rows.
        for (from, to) in x.chunks_exact(m).zip(held.chunks_exact_mut(m)) {
            to.fill(0.0);
            for (v, row) in from.iter().zip(self.odd.chunks_exact(m)) {
                to.iter_mut().zip(row).for_each(|(t, o)| *t += v * norm * o);
            }
        }
        x.copy_from_slice(held);
    }

    /// Every row `[n]` of `w` times Q: weights whose input is rotated by Q, or vectors that are.
    pub fn rows(&self, w: &mut [f32]) {
        let n = self.size().max(1);
        w.par_chunks_mut(ROWS * n).for_each_init(
            || (vec![0f64; n], vec![0f64; n]),
            |(x, held), rows| {
                for row in rows.chunks_exact_mut(n) {
                    x.iter_mut().zip(&*row).for_each(|(x, w)| *x = f64::from(*w));
                    self.apply(x, held);
                    row.iter_mut().zip(&*x).for_each(|(w, x)| *w = *x as f32);
                }
            },
        );
    }

    /// Qᵀ times each block of n rows of `w` `[rows, cols]`: weights whose output is rotated by Q.
    pub fn outputs(&self, w: &mut [f32], cols: usize) {
        let n = self.size().max(1);
        for block in w.chunks_exact_mut(n * cols.max(1)) {
            let mut columns = transposed(block, n, cols);
            self.rows(&mut columns);
            block.copy_from_slice(&transposed(&columns, cols, n));
        }
    }
}

/// `[cols, rows]` of `[rows, cols]`.
fn transposed(w: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0f32; w.len()];
    out.par_chunks_mut(rows.max(1)).enumerate().for_each(|(c, out)| {
        out.iter_mut().zip(w.iter().skip(c).step_by(cols.max(1))).for_each(|(o, w)| *o = *w);
    });
    out
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn matrix(r: &Rotation) -> Vec<f32> {
        let n = r.size();
        let mut q: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
        r.rows(&mut q);
        q
    }

    #[test]
    fn it_is_orthogonal_and_spreads() {
        for n in [1, 2, 3, 4, 9, 12, 40, 64, 72, 144] {
            let r = Rotation::new(n, 5);
            let q = matrix(&r);
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = (0..n).map(|k| f64::from(q[i * n + k]) * f64::from(q[j * n + k])).sum();
                    let want = f64::from(u8::from(i == j));
                    // Entries are rounded to f32 once.
                    assert!((dot - want).abs() <= 4.0 * f64::from(f32::EPSILON), "{n}: {i} {j} {dot}");
                }
            }
            let most = q.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
            let bound = if n.is_power_of_two() { 1.0 } else { 2.0 } / n as f64;
            assert!(most <= bound.sqrt() * (1.0 + 1e-6), "{n}: {most}");
        }
    }

    #[test]
    fn inputs_and_outputs_undo_each_other() {
        let (out, n, m) = (6, 24, 10);
        let mut rng = StdRng::seed_from_u64(2);
        let mut sample = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1f32..1.0)).collect() };
        // y = B A x, with A's output and B's input rotated alike.
        let (mut a, mut b, x) = (sample(n * m), sample(out * n), sample(m));
        let product = |w: &[f32], x: &[f32]| -> Vec<f32> {
            w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let before = product(&b, &product(&a, &x));
        let middle = product(&a, &x);
        for size in [24, 12, 8] {
            // Smaller sizes rotate block by block, as heads are.
            let r = Rotation::new(size, 9);
            r.outputs(&mut a, m);
            r.rows(&mut b);
            let after = product(&b, &product(&a, &x));
            let far = before.iter().zip(&after).fold(0f32, |m, (x, y)| m.max((x - y).abs()));
            // Sums of 24 and 10 products of numbers below 1, in f32.
            assert!(far <= 1e-4, "{size}: {far}");
            let rotated = product(&a, &x);
            assert!(rotated.iter().zip(&middle).any(|(x, y)| (x - y).abs() > 0.1));
        }
    }

    #[test]
    fn seeds_differ_and_repeat() {
        let q = |seed| matrix(&Rotation::new(36, seed));
        assert_eq!(q(1), q(1));
        assert_ne!(q(1), q(2));
        assert_eq!(Rotation::new(0, 1).size(), 0);
    }
}
