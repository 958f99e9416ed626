//! Medians, percentiles and the bootstrap over pairs.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::error::{BenchError, Result};

/// Resamples of the bootstrap.
pub const RESAMPLES: usize = 10_000;

/// A ratio and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Of all samples.
    pub value: f64,
    /// 2.5th percentile of the resamples.
    pub low: f64,
    /// 97.5th percentile of the resamples.
    pub high: f64,
}

/// The `q`-th quantile (0 to 1), linear between neighbours as NumPy does by default.
pub fn percentile(samples: &[f64], q: f64) -> Result<f64> {
    let mut sorted = checked(samples)?;
    sorted.sort_unstable_by(f64::total_cmp);
    Ok(quantile_of_sorted(&sorted, q))
}

/// The middle, or the mean of the middle two.
pub fn median(samples: &[f64]) -> Result<f64> {
    percentile(samples, 0.5)
}

/// p50, p95, p99.
pub fn p50_p95_p99(samples: &[f64]) -> Result<[f64; 3]> {
    let mut sorted = checked(samples)?;
    sorted.sort_unstable_by(f64::total_cmp);
    Ok([0.5, 0.95, 0.99].map(|q| quantile_of_sorted(&sorted, q)))
}

/// `median(a) / median(b)` with its percentile bootstrap interval. The statistic of every resample is the same ratio
/// of medians; what is resampled, with replacement, are the pairs `(a[i], b[i])`, so drift that both samples of a
/// repetition share stays shared. With few repetitions the interval can only be as wide as what was seen.
pub fn ratio_of_medians(a: &[f64], b: &[f64], seed: u64) -> Result<Interval> {
    if a.len() != b.len() {
        return Err(BenchError::Samples("the numbers of repetitions differ"));
    }
    if a.len() < 2 {
        return Err(BenchError::OnePair);
    }
    let value = median(a)? / median(b)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut x, mut y) = (vec![0.0; a.len()], vec![0.0; a.len()]);
    let mut ratios = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        for i in 0..a.len() {
            let pick = rng.random_range(0..a.len());
            (x[i], y[i]) = (a[pick], b[pick]);
        }
        x.sort_unstable_by(f64::total_cmp);
        y.sort_unstable_by(f64::total_cmp);
        ratios.push(quantile_of_sorted(&x, 0.5) / quantile_of_sorted(&y, 0.5));
    }
    ratios.sort_unstable_by(f64::total_cmp);
    Ok(Interval { value, low: quantile_of_sorted(&ratios, 0.025), high: quantile_of_sorted(&ratios, 0.975) })
}

fn checked(samples: &[f64]) -> Result<Vec<f64>> {
    if samples.is_empty() {
        return Err(BenchError::Samples("there are none"));
    }
    if !samples.iter().all(|&s| s.is_finite() && s > 0.0) {
        return Err(BenchError::Samples("one is not a positive number"));
    }
    Ok(samples.to_vec())
}

/// `sorted` is not empty.
fn quantile_of_sorted(sorted: &[f64], q: f64) -> f64 {
    let last = sorted.len() - 1;
    let at = q.clamp(0.0, 1.0) * last as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate_as_numpy() {
        let samples = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(median(&samples).unwrap(), 2.5);
        assert!((percentile(&samples, 0.95).unwrap() - 3.85).abs() < 1e-12);
        assert_eq!(percentile(&samples, 1.0).unwrap(), 4.0);
        assert_eq!(p50_p95_p99(&[7.0]).unwrap(), [7.0; 3]);
    }

    #[test]
    fn nothing_and_zero_are_errors() {
        for bad in [&[][..], &[1.0, 0.0], &[f64::NAN], &[f64::INFINITY], &[-1.0]] {
            assert!(median(bad).is_err(), "{bad:?}");
        }
        assert!(ratio_of_medians(&[1.0], &[1.0], 0).is_err());
        assert!(ratio_of_medians(&[1.0, 2.0], &[1.0], 0).is_err());
        assert!(ratio_of_medians(&[1.0, 2.0], &[1.0, 0.0], 0).is_err());
    }

    #[test]
    fn a_constant_ratio_has_no_width_though_the_machine_drifts() {
        let slow = [10.0, 12.0, 9.0, 15.0, 11.0];
        let fast = slow.map(|s| 2.0 * s);
        assert_eq!(ratio_of_medians(&fast, &slow, 3).unwrap(), Interval { value: 2.0, low: 2.0, high: 2.0 });
    }

    #[test]
    fn the_interval_holds_the_ratio_and_follows_the_seed() {
        let a = [10.0, 11.0, 12.5, 9.0, 10.4];
        let b = [5.0, 5.2, 4.9, 5.5, 5.1];
        let first = ratio_of_medians(&a, &b, 7).unwrap();
        assert!(first.low < first.value && first.value < first.high);
        assert!((first.value - 10.4 / 5.1).abs() < 1e-12);
        assert_eq!(first, ratio_of_medians(&a, &b, 7).unwrap());
    }

    /// Where the median of two pairs is one of three values, the resampled quantiles are known exactly.
    #[test]
    fn quantiles_of_two_pairs() {
        let got = ratio_of_medians(&[1.0, 3.0], &[1.0, 1.0], 0).unwrap();
        assert_eq!((got.value, got.low, got.high), (2.0, 1.0, 3.0));
    }
}
