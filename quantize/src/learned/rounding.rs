//! One linear whose rounding is learned: an offset for each weight and clip factors for each group (arXiv 2309.05516, section 3).

use lowbit_kernels::{QuantizedMatrix, ScaleType};
use rayon::prelude::*;

use crate::factor::SolveError;
use crate::scale_search::{Scales, SolverOptions, multiversion, search_scales, usable};

/// How far a clip factor may go from 1.
const LEAST: f32 = 0.5;
const MOST: f32 = 1.5;

/// What is learned of a weight `[out, in]`, and what it is learned from.
pub struct Rounding {
    w: Vec<f32>,
    out: usize,
    n: usize,
    groups: usize,
    grid: Grid,
    scheme: lowbit_kernels::Scheme,
    /// Where the factors are 1: the scales and zero points that rounding to nearest takes.
    base: Scales,
    /// V `[out, in]`, −½ to ½: added to `w / scale` before it is rounded.
    offsets: Vec<f32>,
    /// α `[out, groups]` on the upper end of a group's range; of a symmetric scheme on its scale.
    upper: Vec<f32>,
    /// β `[out, groups]` on the lower end; of a symmetric scheme unused.
    lower: Vec<f32>,
}

/// What every group of a linear has in common.
#[derive(Clone, Copy)]
struct Grid {
    cols: usize,
    symmetric: bool,
    scale_type: ScaleType,
    /// Largest code.
    top: f32,
    /// Smallest zero point of an asymmetric scheme.
    lowest: f32,
}

/// Scale, zero point, and the ends of the range where the factors are 1.
#[derive(Clone, Copy)]
struct Group {
    scale: f32,
    zero: f32,
    hi: f32,
    lo: f32,
}

impl Grid {
    /// `s = (α hi − β lo) / top`, `z = −β lo / s`, both as they are stored; α times the scale for a symmetric scheme.
    #[inline(always)]
    fn group(&self, scale: f32, zero: f32, alpha: f32, beta: f32) -> Group {
        let (hi, lo) = ((self.top - zero) * scale, -zero * scale);
        let wanted = if self.symmetric { alpha * scale } else { (alpha * hi - beta * lo) / self.top };
        let rounded = self.scale_type.round(wanted);
        let found = if usable(rounded) { rounded } else { scale };
        let zero =
            if self.symmetric { zero } else { (-beta * lo / found).round_ties_even().clamp(self.lowest, self.top) };
        Group { scale: found, zero, hi, lo }
    }
}

/// The code less the zero point, and whether it is what rounding gives, unclipped.
#[inline(always)]
fn code(w: f32, offset: f32, g: &Group, top: f32) -> (f32, bool) {
    let (lo, hi) = (-g.zero, top - g.zero);
    let z = (w / g.scale + offset).round_ties_even();
    let inside = z >= lo && z <= hi;
    let z = if z < lo { lo } else { z };
    (if z > hi { hi } else { z }, inside)
}

impl Rounding {
    /// Starts at rounding to nearest of `w` `[out, n]`.
    pub fn new(w: Vec<f32>, out: usize, n: usize, opts: &SolverOptions) -> Result<Self, SolveError> {
        let base = search_scales(&w, out, n, None, opts)?;
        let groups = opts.scheme.groups(n)?;
        let grid = Grid {
            cols: opts.scheme.group_cols(n),
            symmetric: opts.scheme.symmetric,
            scale_type: opts.scale_type,
            top: f32::from(opts.scheme.max_code()),
            lowest: f32::from(opts.min_zero),
        };
        let mut new = Self {
            w,
            out,
            n,
            groups,
            grid,
            scheme: opts.scheme,
            base,
            offsets: Vec::new(),
            upper: Vec::new(),
            lower: Vec::new(),
        };
        new.reset();
        Ok(new)
    }

    /// Back to rounding to nearest.
    pub fn reset(&mut self) {
        self.offsets = vec![0.0; self.out * self.n];
        self.upper = vec![1.0; self.out * self.groups];
        self.lower = vec![1.0; self.out * self.groups];
    }

    /// The original weight.
    pub fn weight(&self) -> &[f32] {
        &self.w
    }

    /// The grid of a group as it stands.
    fn group(&self, at: usize) -> Group {
        let zero = self.base.zeros.as_ref().map_or(self.scheme.mid_code(), |z| z[at]);
        self.grid.group(self.base.scales[at], f32::from(zero), self.upper[at], self.lower[at])
    }

    /// What the weight is rounded to as it stands, `[out, in]`.
    pub fn values(&self) -> Vec<f32> {
        let mut q = vec![0f32; self.w.len()];
        let cols = self.grid.cols;
        let inputs = self.w.par_chunks(cols).zip(self.offsets.par_chunks(cols));
        q.par_chunks_mut(cols).zip(inputs).enumerate().for_each(|(at, (q, (w, offsets)))| {
            values(&self.group(at), self.grid.top, w, offsets, q);
        });
        q
    }

    /// One step of signed gradient descent: `gradient` `[out, in]` is that of [`Self::values`], and every parameter moves by `rate` against
    /// the sign of its own. Rounding counts as the identity; a clipped weight moves its range alone.
    pub fn step(&mut self, gradient: &[f32], rate: f32) {
        let (cols, grid) = (self.grid.cols, self.grid);
        let before: Vec<Group> = (0..self.upper.len()).map(|at| self.group(at)).collect();
        let lower = &self.lower;
        let moves: Vec<(f32, f32)> = self
            .offsets
            .par_chunks_mut(cols)
            .zip(self.w.par_chunks(cols))
            .zip(gradient.par_chunks(cols))
            .enumerate()
            .map(|(at, ((offsets, w), gradient))| {
                let g = &before[at];
                let mut sums = [0f32; 2];
                step(g, grid.top, w, gradient, rate, offsets, &mut sums);
                let [by_scale, by_zero] = sums;
                if grid.symmetric {
                    return (by_scale * g.hi.signum(), 0.0);
                }
                // z = −β lo / s depends on the scale, too.
                let by_scale = by_scale + by_zero * lower[at] * g.lo / (g.scale * g.scale);
                (by_scale * g.hi / grid.top, -by_scale * g.lo / grid.top - by_zero * g.lo / g.scale)
            })
            .collect();
        for (at, (up, down)) in moves.into_iter().enumerate() {
            self.upper[at] = (self.upper[at] - rate * sign(up)).clamp(LEAST, MOST);
            self.lower[at] = (self.lower[at] - rate * sign(down)).clamp(LEAST, MOST);
        }
    }

    /// The codes as they stand.
    pub fn matrix(&self) -> QuantizedMatrix {
        let cols = self.grid.cols;
        let groups: Vec<Group> = (0..self.upper.len()).map(|at| self.group(at)).collect();
        let mut codes = vec![0u8; self.w.len()];
        let inputs = self.w.par_chunks(cols).zip(self.offsets.par_chunks(cols));
        codes.par_chunks_mut(cols).zip(inputs).zip(&groups).for_each(|((codes, (w, offsets)), g)| {
            for ((c, w), offset) in codes.iter_mut().zip(w).zip(offsets) {
                *c = (code(*w, *offset, g, self.grid.top).0 + g.zero) as u8;
            }
        });
        QuantizedMatrix {
            scheme: self.scheme,
            out_features: self.out,
            in_features: self.n,
            codes,
            scales: groups.iter().map(|g| g.scale).collect(),
            zeros: (!self.grid.symmetric).then(|| groups.iter().map(|g| g.zero as u8).collect()),
            group_index: None,
        }
    }
}

/// −1, 0 or 1; 0 for NaN.
#[inline(always)]
fn sign(x: f32) -> f32 {
    if x > 0.0 {
        1.0
    } else if x < 0.0 {
        -1.0
    } else {
        0.0
    }
}

multiversion! {
    fn values(g: &Group, top: f32, w: &[f32], offsets: &[f32], q: &mut [f32]) {
        for ((q, w), offset) in q.iter_mut().zip(w).zip(offsets) {
            *q = g.scale * code(*w, *offset, g, top).0;
        }
    }
}

multiversion! {
    /// Moves the offsets of a group, and adds up the gradients of its scale and of its zero point into `sums`.
    fn step(g: &Group, top: f32, w: &[f32], gradient: &[f32], rate: f32, offsets: &mut [f32], sums: &mut [f32; 2]) {
        for ((offset, w), d) in offsets.iter_mut().zip(w).zip(gradient) {
            let (z, inside) = code(*w, *offset, g, top);
            // q = s round(w / s + v): dq/dv = s and dq/ds = z − w / s within the range; beyond it q = s z, and z falls with the zero point.
            if inside {
                sums[0] += d * (z - w / g.scale);
                let slope = d * g.scale;
                *offset = (*offset - rate * sign(slope)).clamp(-0.5, 0.5);
            } else {
                sums[0] += d * z;
                sums[1] -= d * g.scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::rtn::quantize_rtn;

    fn options(bits: u8, symmetric: bool) -> SolverOptions {
        SolverOptions::new(Scheme { bits, symmetric, group: GroupSize::Cols(40) }, ScaleType::Bf16)
    }

    fn sample(rng: &mut StdRng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect()
    }

    #[test]
    fn it_starts_at_rounding_to_nearest_and_codes_are_its_values() {
        let (out, n) = (6, 80);
        let mut rng = StdRng::seed_from_u64(1);
        for (bits, symmetric) in [(2, true), (3, false), (4, true), (4, false), (8, false)] {
            let opts = options(bits, symmetric);
            let w = sample(&mut rng, out * n);
            let mut r = Rounding::new(w.clone(), out, n, &opts).unwrap();
            assert_eq!(r.matrix(), quantize_rtn(&w, out, n, None, &opts).unwrap(), "{bits} {symmetric}");
            for _ in 0..5 {
                r.step(&sample(&mut rng, out * n), 0.1);
                let q = r.matrix();
                q.validate().unwrap();
                assert!(q.scales.iter().all(|s| *s == ScaleType::Bf16.round(*s)));
                assert_eq!(q.dequantize().unwrap(), r.values(), "{bits} {symmetric}");
            }
            r.reset();
            assert_eq!(r.matrix(), quantize_rtn(&w, out, n, None, &opts).unwrap());
        }
    }

    #[test]
    fn it_follows_the_gradient_of_a_quadratic() {
        // ½ dᵀ H d of each row with strong correlations: what rounding to nearest cannot see.
        let (out, n) = (8, 40);
        let mut rng = StdRng::seed_from_u64(2);
        let mut h = vec![0f32; n * n];
        for _ in 0..2 * n {
            let shared = rng.random_range(-1f32..1.0);
            let x: Vec<f32> = (0..n).map(|_| shared + 0.5 * rng.random_range(-1f32..1.0)).collect();
            (0..n * n).for_each(|k| h[k] += x[k / n] * x[k % n]);
        }
        for (bits, symmetric) in [(3, true), (3, false), (4, true)] {
            let w = sample(&mut rng, out * n);
            let mut r = Rounding::new(w.clone(), out, n, &options(bits, symmetric)).unwrap();
            let gradient = |r: &Rounding| -> (Vec<f32>, f64) {
                let d: Vec<f32> = r.values().iter().zip(&w).map(|(q, w)| q - w).collect();
                let g: Vec<f32> =
                    (0..out * n).map(|i| (0..n).map(|j| d[i / n * n + j] * h[j * n + i % n]).sum()).collect();
                let loss = d.iter().zip(&g).map(|(d, g)| f64::from(d * g)).sum();
                (g, loss)
            };
            let first = gradient(&r).1;
            let steps = 100;
            for i in 0..steps {
                let (g, _) = gradient(&r);
                r.step(&g, (1.0 - i as f32 / steps as f32) / steps as f32);
            }
            let last = gradient(&r).1;
            assert!(last < 0.7 * first, "{bits} {symmetric}: {first} -> {last}");
        }
    }

    #[test]
    fn a_clipped_group_widens_its_range() {
        // Half a range: the ends are clipped, and the gradient of d = q − w asks for more.
        let w: Vec<f32> = (0..40).map(|i| (i as f32 - 19.5) / 20.0).collect();
        for symmetric in [true, false] {
            let mut r = Rounding::new(w.clone(), 1, 40, &options(3, symmetric)).unwrap();
            r.upper[0] = 0.5;
            r.lower[0] = 0.5;
            let error = |r: &Rounding| r.values().iter().zip(&w).map(|(q, w)| (q - w).powi(2)).sum::<f32>();
            let first = error(&r);
            for _ in 0..10 {
                let g: Vec<f32> = r.values().iter().zip(&w).map(|(q, w)| q - w).collect();
                r.step(&g, 0.02);
            }
            assert!(error(&r) < 0.7 * first, "{symmetric}: {first} -> {}", error(&r));
            assert!(r.upper[0] > 0.6, "{}", r.upper[0]);
        }
    }
}
