//! AWQ's search for channel scales (arXiv 2306.00978).
//!
//! Few channels of an input are large, and errors of the weights that read them cost most. Multiplied by s > 1 before rounding, such a
//! column is rounded in finer steps than its neighbours (section 3.2); too large an s widens the steps of the others. The paper searches
//! `s = mean|x|^α` for one α a group of linears (Eq. 5) on a grid of 20, by the error of the output on calibration data.
//!
//! The output's squared error needs no pass over the data: it is `tr(E H Eᵀ)`, E the error of the weights and H the input's
//! Hessian. α = 0 is plain rounding and among the candidates, so the error never rises.

use crate::factor::SolveError;
use crate::loss::proxy_loss;
use crate::scale_search::check_finite;
use crate::transform::fold::scale_columns;

/// Candidates of α: 0, 1/20, … 19/20.
pub const GRID: u8 = 20;

/// What the search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The exponent.
    pub alpha: f32,
    /// The free scales, before they are spread: `[channels]`, all positive.
    pub scales: Vec<f32>,
    /// Summed `tr(E H Eᵀ)` with them.
    pub loss: f64,
    /// The same for α = 0: nothing scaled.
    pub plain: f64,
}

/// `mean|x|^α`, divided by the root of its largest and its smallest, as the authors' code does, so that scales lie about 1. A channel
/// that was never active gets the smallest scale of those that were.
pub fn channel_scales(mean_abs: &[f32], alpha: f32) -> Vec<f32> {
    let power = |m: f32| m.powf(alpha);
    let live = mean_abs.iter().copied().filter(|m| *m > 0.0);
    let (least, most) = live.fold((f32::INFINITY, 0f32), |(a, b), m| (a.min(m), b.max(m)));
    if !(most > 0.0 && most.is_finite()) {
        return vec![1.0; mean_abs.len()];
    }
    let middle = (power(least) * power(most)).sqrt();
    let scales: Vec<f32> = mean_abs.iter().map(|m| power(m.max(least)) / middle).collect();
    if scales.iter().all(|s| s.is_normal()) { scales } else { vec![1.0; mean_abs.len()] }
}

/// Rounds matrices of one set and gives what they then stand for.
pub type Round<'a> = dyn Fn(&[Vec<f32>]) -> Result<Vec<Vec<f32>>, SolveError> + 'a;

/// Searches α for `weights`, matrices of `n` columns that read the same input with Hessian `h` `[n, n]`.
///
/// `mean_abs` are the free channels; `spread` makes the `n` column scales of them (one to one, except for o under
/// grouped-query attention). Of candidates with the same loss the smaller α is taken.
pub fn search(
    weights: &[&[f32]],
    n: usize,
    mean_abs: &[f32],
    spread: &dyn Fn(&[f32]) -> Vec<f32>,
    h: &[f32],
    round: &Round<'_>,
) -> Result<Found, SolveError> {
    check_finite("mean activation", mean_abs)?;
    check_finite("Hessian", h)?;
    let mut best: Option<Found> = None;
    let mut plain = 0.0;
    for step in 0..GRID {
        let alpha = f32::from(step) / f32::from(GRID);
        let scales = channel_scales(mean_abs, alpha);
        let columns = spread(&scales);
        let scaled: Vec<Vec<f32>> = weights
            .iter()
            .map(|w| {
                let mut w = w.to_vec();
                scale_columns(&mut w, &columns);
                w
            })
            .collect();
        let back: Vec<f32> = columns.iter().map(|s| 1.0 / s).collect();
        let mut loss = 0.0;
        for (w, mut q) in weights.iter().zip(round(&scaled)?) {
            scale_columns(&mut q, &back);
            loss += proxy_loss(w, &q, h, w.len() / n.max(1), n).proxy;
        }
        if !loss.is_finite() {
            return Err(SolveError::NonFinite { what: "loss of channel scales", index: usize::from(step) });
        }
        if step == 0 {
            plain = loss;
        }
        if best.as_ref().is_none_or(|b| loss < b.loss) {
            best = Some(Found { alpha, scales, loss, plain });
        }
    }
    best.ok_or(SolveError::EmptyHessian { dim: n })
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::rtn::quantize_rtn;
    use crate::scale_search::SolverOptions;

    /// Weights `[out, n]`, inputs with some large channels: their mean magnitudes and Hessian.
    fn data(seed: u64, out: usize, n: usize, large: f32) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let w = (0..out * n).map(|_| rng.random_range(-1f32..1.0)).collect();
        let tokens = 3 * n;
        let (mut h, mut mean) = (vec![0f32; n * n], vec![0f32; n]);
        for _ in 0..tokens {
            let x: Vec<f32> =
                (0..n).map(|i| rng.random_range(-1f32..1.0) * if i % 16 == 3 { large } else { 1.0 }).collect();
            for i in 0..n {
                mean[i] += x[i].abs() / tokens as f32;
                for j in 0..n {
                    h[i * n + j] += x[i] * x[j] / tokens as f32;
                }
            }
        }
        (w, mean, h)
    }

    fn rounded(n: usize) -> impl Fn(&[Vec<f32>]) -> Result<Vec<Vec<f32>>, SolveError> {
        let scheme = Scheme { bits: 3, symmetric: true, group: GroupSize::Cols(32) };
        let opts = SolverOptions { act_order: false, ..SolverOptions::new(scheme, ScaleType::Bf16) };
        move |w: &[Vec<f32>]| {
            let one = |w: &Vec<f32>| -> Result<Vec<f32>, SolveError> {
                Ok(quantize_rtn(w, w.len() / n, n, None, &opts)?.dequantize()?)
            };
            w.iter().map(one).collect()
        }
    }

    #[test]
    fn the_error_never_rises_and_falls_where_channels_are_large() {
        let (out, n) = (24, 64);
        let round = rounded(n);
        let mut ratios = 0.0;
        for seed in 0..8 {
            let (w, mean, h) = data(seed, out, n, 20.0);
            let found = search(&[&w[..8 * n], &w[8 * n..]], n, &mean, &|s| s.to_vec(), &h, &round).unwrap();
            assert!(found.loss <= found.plain, "{found:?}");
            ratios += found.loss / found.plain / 8.0;
            // The loss is that of the folded matrices.
            let mut scaled = w.clone();
            scale_columns(&mut scaled, &found.scales);
            let mut q = round(&[scaled]).unwrap().remove(0);
            scale_columns(&mut q, &found.scales.iter().map(|s| 1.0 / s).collect::<Vec<_>>());
            let loss = proxy_loss(&w, &q, &h, out, n).proxy;
            assert!((loss - found.loss).abs() <= 1e-4 * loss, "{loss} {}", found.loss);
        }
        // Four of 64 channels carry 400 times the power of the others. A simulation in f64 gives 0.70 on average, and 0.46 to 0.88.
        assert!(ratios < 0.85, "{ratios}");
    }

    #[test]
    fn flat_inputs_leave_little_to_gain_and_dead_channels_stay_finite() {
        let (out, n) = (16, 64);
        let (w, mut mean, h) = data(1, out, n, 1.0);
        let found = search(&[&w], n, &mean, &|s| s.to_vec(), &h, &rounded(n)).unwrap();
        assert!(found.loss > 0.8 * found.plain, "{found:?}");
        mean[5] = 0.0;
        let s = channel_scales(&mean, 0.5);
        assert!(s.iter().all(|s| *s > 0.0) && s[5] == s.iter().copied().fold(f32::INFINITY, f32::min));
        assert_eq!(channel_scales(&[0.0, 0.0], 0.5), [1.0, 1.0]);
        assert_eq!(channel_scales(&[1.0, 5.0], 0.0), [1.0, 1.0]);
        mean[0] = f32::NAN;
        let e = search(&[&w], n, &mean, &|s| s.to_vec(), &h, &rounded(n)).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "mean activation", index: 0 }), "{e}");
    }
}
