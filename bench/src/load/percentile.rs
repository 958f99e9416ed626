//! Percentiles that say how sure they are.
//!
//! A percentile is an order statistic of the raw samples, exact (inverse of the distribution function: the smallest sample
//! with at least `q` of all at or below it). Its 95 % interval comes from order statistics too: how many samples lie below
//! the true quantile is binomial, so ranks bound it without assuming a distribution. Samples of one cluster (gaps of one
//! answer, requests that queued together) are not independent: the binomial's n is divided by the design effect of the
//! indicator "at or below the percentile" over clusters (Woodruff, 1952; Kish, 1965). Where the bound would need a rank past
//! the last sample, the percentile is refused.

use serde::{Deserialize, Serialize};
use statrs::distribution::{Binomial, DiscreteCDF};

/// Error probability on each side of an interval.
const TAIL: f64 = 0.025;

/// Percentiles every metric is given with.
pub const QUANTILES: [f64; 5] = [0.5, 0.9, 0.95, 0.99, 0.999];

/// A percentile with its interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Percentile {
    /// 0.99 for p99.
    pub q: f64,
    /// Value; `None` where the sample is too small for it.
    pub value: Option<f64>,
    /// Lower end of the 95 % interval.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
    /// Independent samples this needs at least.
    pub needs: u64,
    /// Independent samples there are, as far as their clusters show.
    pub effective: f64,
}

/// A metric over requests or gaps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Samples.
    pub n: u64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation of the sample.
    pub sd: f64,
    /// Least.
    pub min: f64,
    /// Most.
    pub max: f64,
    /// See [`QUANTILES`].
    pub percentiles: Vec<Percentile>,
}

impl Summary {
    /// The percentile `q`, where the sample supports it.
    pub fn at(&self, q: f64) -> Option<f64> {
        self.percentiles.iter().find(|p| (p.q - q).abs() < 1e-9).and_then(|p| p.value)
    }
}

/// Samples of one metric, by cluster.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    values: Vec<f64>,
    clusters: Vec<u32>,
}

impl Samples {
    /// Adds one; `cluster` is what it shares its luck with.
    pub fn push(&mut self, value: f64, cluster: u32) {
        self.values.push(value);
        self.clusters.push(cluster);
    }

    /// All of them, in the order they came.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// `None` of no samples.
    pub fn summary(&self) -> Option<Summary> {
        let n = self.values.len();
        if n == 0 {
            return None;
        }
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_unstable_by(|&a, &b| self.values[a as usize].total_cmp(&self.values[b as usize]));
        let sorted: Vec<f64> = order.iter().map(|&i| self.values[i as usize]).collect();
        let mean = sorted.iter().sum::<f64>() / n as f64;
        let squares = sorted.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
        let percentiles = QUANTILES.iter().map(|&q| self.percentile(&sorted, q)).collect();
        let sd = if n > 1 { (squares / (n - 1) as f64).sqrt() } else { 0.0 };
        Some(Summary { n: n as u64, mean, sd, min: sorted[0], max: sorted[n - 1], percentiles })
    }

    fn percentile(&self, sorted: &[f64], q: f64) -> Percentile {
        let n = sorted.len();
        let rank = |p: f64| ((p * n as f64).ceil() as usize).clamp(1, n);
        let value = sorted[rank(q) - 1];
        let effective = n as f64 / self.design_effect(value, q);
        let needs = samples_needed(q);
        let found = rank_interval(effective.floor() as u64, q);
        match found {
            None => Percentile { q, value: None, low: None, high: None, needs, effective },
            Some((low, high)) => Percentile {
                q,
                value: Some(value),
                low: Some(sorted[rank(low) - 1]),
                high: Some(sorted[rank(high) - 1]),
                needs,
                effective,
            },
        }
    }

    /// Variance of the share at or below `value` over clusters, against that of independent samples; 1 at least.
    fn design_effect(&self, value: f64, q: f64) -> f64 {
        let last = self.clusters.iter().max().map_or(0, |&c| c as usize);
        let mut sums = vec![0.0; last + 1];
        for (v, &c) in self.values.iter().zip(&self.clusters) {
            sums[c as usize] += f64::from(u8::from(*v <= value)) - q;
        }
        let clustered: f64 = sums.iter().map(|s| s * s).sum();
        (clustered / (q * (1.0 - q) * self.values.len() as f64)).max(1.0)
    }
}

/// Independent samples below which no sample bounds the quantile from both sides.
pub fn samples_needed(q: f64) -> u64 {
    let side = |p: f64| (TAIL.ln() / p.ln()).ceil();
    side(q).max(side(1.0 - q)) as u64
}

/// Shares of the sample between whose order statistics the quantile lies with 95 %, of `n` independent ones.
fn rank_interval(n: u64, q: f64) -> Option<(f64, f64)> {
    if n < samples_needed(q) {
        return None;
    }
    let below = Binomial::new(q, n).ok()?;
    // Largest l with P(B < l) <= TAIL, smallest u with P(B < u) >= 1 - TAIL: P(l <= B < u) >= 95 %.
    let search = |enough: &dyn Fn(u64) -> bool| {
        let (mut low, mut high) = (1, n + 1);
        while low < high {
            let mid = low + (high - low) / 2;
            if enough(mid) { high = mid } else { low = mid + 1 }
        }
        low
    };
    let l = search(&|r| below.cdf(r - 1) > TAIL).saturating_sub(1);
    let u = search(&|r| below.cdf(r - 1) >= 1.0 - TAIL);
    (l >= 1 && u <= n).then_some((l as f64 / n as f64, u as f64 / n as f64))
}

/// Wilson's 95 % interval of a share (Wilson, 1927), `n` effective samples.
pub fn wilson(share: f64, n: f64, z: f64) -> (f64, f64) {
    if n <= 0.0 {
        return (0.0, 1.0);
    }
    let (z2, center) = (z * z, share + z * z / (2.0 * n));
    let half = z * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    let scale = 1.0 + z2 / n;
    (((center - half) / scale).max(0.0), ((center + half) / scale).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn small_samples_are_refused() {
        assert_eq!([0.5, 0.9, 0.99, 0.999].map(samples_needed), [6, 36, 368, 3688]);
        let mut s = Samples::default();
        for i in 0..100 {
            s.push(f64::from(i), i);
        }
        let summary = s.summary().unwrap();
        assert_eq!(summary.at(0.5), Some(49.0));
        assert_eq!(summary.at(0.95), Some(94.0));
        assert_eq!((summary.at(0.99), summary.at(0.999)), (None, None));
        assert!(Samples::default().summary().is_none());
    }

    /// The interval covers the true quantile as often as it says, for independent samples and for clusters of ten that
    /// share most of their value; taken as independent, the clusters would cover far less.
    #[test]
    fn intervals_cover() {
        let mut rng = StdRng::seed_from_u64(4);
        for shared in [0.0, 0.9] {
            let (mut covered, mut naive) = (0, 0);
            for _ in 0..400 {
                let (mut s, mut alone) = (Samples::default(), Samples::default());
                for c in 0..200 {
                    let luck: f64 = rng.random();
                    for i in 0..10 {
                        let v = if rng.random::<f64>() < shared { luck } else { rng.random() };
                        s.push(v, c);
                        alone.push(v, c * 10 + i);
                    }
                }
                let holds = |s: &Samples| {
                    let p = s.summary().unwrap().percentiles[1];
                    p.low.unwrap() <= 0.9 && 0.9 <= p.high.unwrap()
                };
                covered += u32::from(holds(&s));
                naive += u32::from(holds(&alone));
            }
            assert!(covered >= 368, "shared {shared}: {covered} of 400");
            assert!(shared == 0.0 || naive < 320, "{naive}");
        }
    }

    #[test]
    fn wilson_by_hand() {
        let (low, high) = wilson(0.9, 100.0, 1.96);
        assert!((low - 0.8256).abs() < 1e-3 && (high - 0.9448).abs() < 1e-3, "{low} {high}");
        assert_eq!(wilson(1.0, 0.0, 1.96), (0.0, 1.0));
    }
}
