//! Estimates and their uncertainty. Tokens of one window are not independent, so intervals are clustered by window.

use statrs::distribution::{ContinuousCDF, StudentsT};

use crate::record::Interval;

/// Percentiles every record lists.
pub const PERCENTILES: [f64; 11] = [0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9];

impl Interval {
    /// A value nothing is known about: one cluster has no spread. The ends are finite so that JSON can hold them.
    pub fn unbounded(value: f64) -> Self {
        Self { value, low: f64::MIN, high: f64::MAX }
    }

    /// Whether the data bound the value on both sides.
    pub fn is_bounded(&self) -> bool {
        self.low > f64::MIN && self.high < f64::MAX
    }

    /// `[low, high]` with so many digits; an end that the data leave open is infinite.
    pub fn range(&self, digits: usize) -> String {
        let end = |x: f64| match x {
            f64::MAX => "∞".to_owned(),
            f64::MIN => "−∞".to_owned(),
            x => format!("{x:.digits$}"),
        };
        format!("[{}, {}]", end(self.low), end(self.high))
    }

    /// The interval of `exp(value)`; overflow stops at the largest finite number.
    pub fn exp(self) -> Self {
        let exp = |x: f64| x.exp().min(f64::MAX);
        Self { value: exp(self.value), low: exp(self.low), high: exp(self.high) }
    }

    /// The interval cut to values the quantity can take.
    pub fn clamp(self, low: f64, high: f64) -> Self {
        Self { value: self.value, low: self.low.clamp(low, high), high: self.high.clamp(low, high) }
    }
}

/// Arithmetic mean; NaN of nothing.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Root of the mean square; NaN of nothing.
pub fn root_mean_square(values: &[f64]) -> f64 {
    (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt()
}

/// Two-sided 95 % quantile of Student's t; `None` without degrees of freedom.
pub fn t_critical(degrees_of_freedom: usize) -> Option<f64> {
    if degrees_of_freedom == 0 {
        return None;
    }
    let t = StudentsT::new(0.0, 1.0, degrees_of_freedom as f64).ok()?;
    Some(t.inverse_cdf(0.975))
}

/// `Σ sums / Σ weights` over clusters and its sandwich variance
/// `C/(C−1) · Σ (sum − ratio·weight)² / (Σ weights)²`; the variance is `None` below two clusters.
fn ratio_estimate(sums: &[f64], weights: &[f64]) -> (f64, Option<f64>) {
    let total: f64 = weights.iter().sum();
    let ratio = sums.iter().sum::<f64>() / total;
    let clusters = sums.len() as f64;
    if sums.len() < 2 {
        return (ratio, None);
    }
    let squares: f64 = sums.iter().zip(weights).map(|(s, w)| (s - ratio * w).powi(2)).sum();
    (ratio, Some(clusters / (clusters - 1.0) * squares / (total * total)))
}

/// Mean per unit of weight with a clustered 95 % interval: `sums[c]` is the total of cluster `c`, `weights[c]` its
/// size (tokens, words). Student's t with clusters − 1 degrees of freedom; unbounded for a single cluster.
pub fn clustered_mean(sums: &[f64], weights: &[f64]) -> Interval {
    let (value, variance) = ratio_estimate(sums, weights);
    match variance.zip(t_critical(sums.len().saturating_sub(1))) {
        Some((variance, t)) => {
            let half = t * variance.sqrt();
            Interval { value, low: value - half, high: value + half }
        }
        None => Interval::unbounded(value),
    }
}

/// Ratio of two perplexities measured on the same clusters: `exp` of the clustered mean of the paired differences
/// (delta method on the log), so that what both models find hard cancels.
pub fn perplexity_ratio(candidate: &[f64], reference: &[f64], weights: &[f64]) -> Interval {
    let differences: Vec<f64> = candidate.iter().zip(reference).map(|(c, r)| c - r).collect();
    clustered_mean(&differences, weights).exp()
}

/// A share with a clustered interval: Wilson's, at the sample size that independent draws would need for the
/// clustered variance. Unlike a symmetric interval it neither leaves 0..1 nor shrinks to nothing at a share of 1.
pub fn clustered_share(hits: &[f64], weights: &[f64]) -> Interval {
    let (share, variance) = ratio_estimate(hits, weights);
    let total: f64 = weights.iter().sum();
    match variance.zip(t_critical(hits.len().saturating_sub(1))) {
        Some((variance, t)) => {
            let effective = if variance > 0.0 { (share * (1.0 - share) / variance).min(total) } else { total };
            wilson(share, effective, t)
        }
        None => Interval { value: share, low: 0.0, high: 1.0 },
    }
}

/// Wilson's score interval of a `share` seen in `n` draws; `critical` is 1.96 for 95 %.
pub fn wilson(share: f64, n: f64, critical: f64) -> Interval {
    if n <= 0.0 {
        return Interval { value: share, low: 0.0, high: 1.0 };
    }
    let z2 = critical * critical;
    let scale = 1.0 + z2 / n;
    let middle = (share + z2 / (2.0 * n)) / scale;
    let half = critical * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt() / scale;
    Interval { value: share, low: (middle - half).clamp(0.0, share), high: (middle + half).clamp(share, 1.0) }
}

/// The `percent`-th percentile of ascending values by linear interpolation between order statistics; NaN of nothing.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let place = (percent / 100.0).clamp(0.0, 1.0) * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (place - below as f64) * (sorted[above] - sorted[below])
}

/// [`PERCENTILES`] of ascending values, labelled.
pub fn percentiles(sorted: &[f64]) -> Vec<(String, f64)> {
    PERCENTILES.iter().map(|&p| (p.to_string(), percentile(sorted, p))).collect()
}

/// Pearson's correlation. Where a series does not vary it is undefined: 1 if both are equal, else 0.
pub fn correlation(x: &[f64], y: &[f64]) -> f64 {
    let (mx, my) = (mean(x), mean(y));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (a, b) in x.iter().zip(y) {
        xx += (a - mx) * (a - mx);
        yy += (b - my) * (b - my);
        xy += (a - mx) * (b - my);
    }
    let norm = (xx * yy).sqrt();
    if norm > 0.0 {
        (xy / norm).clamp(-1.0, 1.0)
    } else if x == y {
        1.0
    } else {
        0.0
    }
}

/// `ln Σ exp(row)` in f64 and the first index of the largest entry.
pub fn log_sum_exp(row: &[f32]) -> (f64, u32) {
    let (max, top1) = first_max(row);
    let max = f64::from(max);
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    (max + sum.ln(), top1)
}

/// The largest entry and its first index; a NaN anywhere is the largest, so that it cannot pass unseen.
pub(crate) fn first_max(row: &[f32]) -> (f32, u32) {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, &x) in row.iter().enumerate() {
        if x.is_nan() {
            return (x, i as u32);
        }
        if x > best.0 {
            best = (x, i as u32);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{found} is not {expected}");
    }

    /// t(0.975, 2).
    const T2: f64 = 4.302652729749464;

    #[test]
    fn open_ends_are_infinite_in_words() {
        assert_eq!(Interval { value: 1.0, low: 0.25, high: 2.0 }.range(2), "[0.25, 2.00]");
        assert_eq!(Interval::unbounded(1.0).range(2), "[−∞, ∞]");
        assert_eq!(Interval::unbounded(0.1).clamp(0.0, f64::MAX).range(1), "[0.0, ∞]");
        assert_eq!(Interval::unbounded(0.1).exp().range(1), "[0.0, ∞]");
    }

    #[test]
    fn clustered_mean_of_three_equal_windows() {
        // Means 1, 2, 6 over 10 tokens each: mean 3, sd sqrt(7), se sqrt(7/3).
        let i = clustered_mean(&[10.0, 20.0, 60.0], &[10.0; 3]);
        close(i.value, 3.0);
        close(i.high - i.value, T2 * (7.0f64 / 3.0).sqrt());
        close(i.value - i.low, T2 * (7.0f64 / 3.0).sqrt());
    }

    #[test]
    fn clustered_mean_of_unequal_clusters() {
        // Sums 2, 6, 4 over weights 1, 2, 3: ratio 2, residuals 0, 2, −2; variance 3/2 · 8 / 36 = 1/3.
        let i = clustered_mean(&[2.0, 6.0, 4.0], &[1.0, 2.0, 3.0]);
        close(i.value, 2.0);
        close(i.high - 2.0, T2 / 3f64.sqrt());
    }

    #[test]
    fn one_cluster_has_no_interval() {
        let i = clustered_mean(&[6.0], &[2.0]);
        close(i.value, 3.0);
        assert!(!i.is_bounded());
        assert!(!i.exp().is_bounded() && i.exp().high.is_finite());
        assert!(clustered_mean(&[6.0, 4.0], &[2.0, 2.0]).is_bounded());
    }

    #[test]
    fn ratio_cancels_what_is_common() {
        // Differences 0.1, 0.2, 0.3 a token: mean 0.2, se 0.1/sqrt(3), whatever the windows' own difficulty.
        let r = perplexity_ratio(&[1.1, 5.2, 9.3], &[1.0, 5.0, 9.0], &[1.0; 3]);
        close(r.value, 0.2f64.exp());
        close(r.high, (0.2 + T2 * 0.1 / 3f64.sqrt()).exp());
        close(r.low, (0.2 - T2 * 0.1 / 3f64.sqrt()).exp());
    }

    #[test]
    fn percentiles_interpolate() {
        close(percentile(&[1.0, 2.0, 4.0], 50.0), 2.0);
        close(percentile(&[1.0, 2.0, 4.0], 75.0), 3.0);
        close(percentile(&[1.0, 2.0, 4.0], 10.0), 1.2);
        close(percentile(&[1.0, 2.0, 4.0], 100.0), 4.0);
        close(percentile(&[7.0], 99.9), 7.0);
        assert!(percentile(&[], 50.0).is_nan());
        let labels: Vec<String> = percentiles(&[0.0]).into_iter().map(|p| p.0).collect();
        assert_eq!(labels.join(" "), "0.1 1 5 10 25 50 75 90 95 99 99.9");
    }

    #[test]
    fn wilson_by_hand() {
        // 1 of 2 at z = 2: middle 1/2, half = 2·sqrt(1/8 + 1/4)/3.
        let i = wilson(0.5, 2.0, 2.0);
        close(i.low, 0.5 - 2.0 * 0.375f64.sqrt() / 3.0);
        // All of n: low = n/(n+z²).
        let i = wilson(1.0, 12.0, 2.0);
        close(i.low, 0.75);
        close(i.high, 1.0);
    }

    #[test]
    fn a_share_of_one_keeps_an_interval() {
        let i = clustered_share(&[10.0; 3], &[10.0; 3]);
        close(i.low, 30.0 / (30.0 + T2 * T2));
        close(i.high, 1.0);
        // Hits 4, 5, 6 of 10: share 1/2, variance 3/2 · 2/900 = 1/300, so 75 effective draws, capped at 30.
        let i = clustered_share(&[4.0, 5.0, 6.0], &[10.0; 3]);
        close(i.low, wilson(0.5, 30.0, T2).low);
        // Hits 0, 5, 10: variance 3/2 · 50/900 = 1/12, 3 effective draws.
        let i = clustered_share(&[0.0, 5.0, 10.0], &[10.0; 3]);
        close(i.low, wilson(0.5, 3.0, T2).low);
    }

    #[test]
    fn correlation_by_hand() {
        // Deviations −1 0 1 and −1 1 0: 1 / sqrt(2·2).
        close(correlation(&[1.0, 2.0, 3.0], &[1.0, 3.0, 2.0]), 0.5);
        close(correlation(&[1.0, 2.0, 3.0], &[6.0, 4.0, 2.0]), -1.0);
        close(correlation(&[1.0, 1.0], &[1.0, 1.0]), 1.0);
        close(correlation(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
    }

    #[test]
    fn log_sum_exp_survives_large_logits() {
        let (z, top) = log_sum_exp(&[1000.0, 1000.0, -1000.0]);
        close(z, 1000.0 + 2f64.ln());
        assert_eq!(top, 0);
        assert!(log_sum_exp(&[0.0, f32::NAN]).0.is_nan());
        close(root_mean_square(&[3.0, 4.0, 0.0]), (25.0f64 / 3.0).sqrt());
    }
}
