//! What the pairs of one task, or of all tasks together, say about a loss.

use super::continuous::{Clustered, clustered};
use super::{mcnemar, paired, permutation};

/// Pairs summed up. Differences are reference less candidate: positive where the candidate is worse.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// Pairs.
    pub n: u64,
    /// Pairs the candidate did worse in; for yes and no, right to wrong.
    pub losses: u64,
    /// Pairs it did better in.
    pub gains: u64,
    /// Whether every score is 0 or 1.
    pub binary: bool,
    /// Sum of differences by cluster; empty where every pair is its own cluster and binary (the counts say all).
    sums: Vec<f64>,
    /// Pairs by cluster.
    sizes: Vec<f64>,
}

impl Evidence {
    /// A table of yes and no.
    pub fn table(n: u64, losses: u64, gains: u64) -> Self {
        Self { n, losses, gains, binary: true, ..Self::default() }
    }

    /// Differences with the cluster each belongs to; `binary` where all scores are 0 or 1.
    pub fn of(differences: &[f64], clusters: &[usize], binary: bool) -> Self {
        let count = |f: &dyn Fn(f64) -> bool| differences.iter().filter(|d| f(**d)).count() as u64;
        let mut out = Self {
            n: differences.len() as u64,
            losses: count(&|d| d > 0.0),
            gains: count(&|d| d < 0.0),
            binary,
            ..Self::default()
        };
        let most = clusters.iter().max().map_or(0, |m| m + 1);
        if binary && most == differences.len() {
            return out;
        }
        out.sums = vec![0.0; most];
        out.sizes = vec![0.0; most];
        for (d, &c) in differences.iter().zip(clusters) {
            out.sums[c] += d;
            out.sizes[c] += 1.0;
        }
        out
    }

    /// All of them together.
    pub fn pool(parts: &[Evidence]) -> Self {
        let mut out = Self { binary: parts.iter().all(|p| p.binary), ..Self::default() };
        let plain = parts.iter().all(|p| p.sums.is_empty());
        for part in parts {
            out.n += part.n;
            out.losses += part.losses;
            out.gains += part.gains;
            if plain {
                continue;
            }
            if part.sums.is_empty() {
                let same = part.n.saturating_sub(part.losses + part.gains);
                for (value, count) in [(1.0, part.losses), (-1.0, part.gains), (0.0, same)] {
                    out.sums.extend(std::iter::repeat_n(value, count as usize));
                }
                out.sizes.extend(std::iter::repeat_n(1.0, part.n as usize));
            } else {
                out.sums.extend(&part.sums);
                out.sizes.extend(&part.sizes);
            }
        }
        out
    }

    /// Independent units: clusters, or pairs where each is its own.
    pub fn clusters(&self) -> u64 {
        if self.sums.is_empty() { self.n } else { self.sums.len() as u64 }
    }

    fn robust(&self) -> Option<Clustered> {
        (!self.sums.is_empty()).then(|| clustered(&self.sums, &self.sizes))
    }

    /// Mean difference.
    pub fn loss(&self) -> f64 {
        match self.robust() {
            Some(r) => r.value,
            None => (self.losses as f64 - self.gains as f64) / self.n.max(1) as f64,
        }
    }

    /// Share of pairs that differ.
    pub fn flips(&self) -> f64 {
        (self.losses + self.gains) as f64 / self.n.max(1) as f64
    }

    /// Variance of one pair's difference; of clustered pairs, with their design effect.
    pub fn variance(&self) -> f64 {
        match self.robust() {
            Some(r) if r.error.is_finite() => self.n as f64 * r.error * r.error,
            _ => (self.flips() - self.loss().powi(2)).max(0.0),
        }
    }

    /// Name of the test of "no loss".
    pub fn test(&self) -> &'static str {
        if self.sums.is_empty() { "exact McNemar" } else { "sign-flip permutation" }
    }

    /// P-value of "no loss", one-sided.
    pub fn p_loss(&self, draws: usize, seed: u64) -> f64 {
        if self.sums.is_empty() {
            mcnemar::loss(self.losses, self.gains)
        } else {
            permutation::loss(&self.sums, draws, seed)
        }
    }

    /// P-value of "the loss is at most `margin`", for a margin of 0 and more.
    ///
    /// The largest of the exact test of no loss at all (a loss beyond the margin is one), Tango's score test and, where pairs
    /// come in clusters or are no yes or no, the cluster-robust t-test.
    pub fn p_above(&self, margin: f64, draws: usize, seed: u64) -> f64 {
        let mut p = self.p_loss(draws, seed);
        if self.binary {
            p = p.max(paired::p_above(self.losses, self.gains, self.n, margin));
        }
        if let Some(r) = self.robust() {
            p = p.max(r.p_above(margin));
        }
        p
    }

    /// One-sided bounds of the loss at level `alpha` each: Tango's, the cluster-robust t's, or the wider of both.
    pub fn bounds(&self, alpha: f64) -> (f64, f64) {
        let mut out = (self.loss(), self.loss());
        let mut widen = |(low, high): (f64, f64)| out = (out.0.min(low), out.1.max(high));
        if self.binary {
            widen(paired::bounds(self.losses, self.gains, self.n, alpha));
        }
        if let Some(r) = self.robust() {
            widen(r.bounds(alpha));
            if r.error == 0.0 {
                // No spread at all is the least one can have seen, not certainty.
                let (low, high) = paired::bounds(0, 0, self.clusters(), alpha);
                widen((r.value + low, r.value + high));
            }
        }
        (out.0.max(-1.0), out.1.min(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_pairs_are_a_table() {
        let d = [1.0, 0.0, -1.0, 1.0, 0.0];
        let e = Evidence::of(&d, &[0, 1, 2, 3, 4], true);
        assert_eq!(e, Evidence::table(5, 2, 1));
        assert_eq!((e.loss(), e.flips(), e.test()), (0.2, 0.6, "exact McNemar"));
        let pool = Evidence::pool(&[e.clone(), Evidence::table(10, 0, 3)]);
        assert_eq!(pool, Evidence::table(15, 2, 4));
    }

    #[test]
    fn clusters_widen() {
        let d: Vec<f64> = (0..200).map(|i| f64::from(u8::from(i % 20 < 2))).collect();
        let (alone, together): (Vec<usize>, Vec<usize>) = ((0..200).collect(), (0..200).map(|i| i % 20).collect());
        let (a, b) = (Evidence::of(&d, &alone, true), Evidence::of(&d, &together, true));
        assert_eq!((a.loss(), b.loss(), b.clusters()), (0.1, 0.1, 20));
        assert!(b.bounds(0.05).1 > a.bounds(0.05).1 && b.p_above(0.02, 1000, 0) > a.p_above(0.02, 1000, 0));
        let mixed = Evidence::pool(&[a, b]);
        assert_eq!((mixed.n, mixed.clusters(), mixed.losses), (400, 220, 40));
        assert!((mixed.loss() - 0.1).abs() < 1e-12);
    }

    #[test]
    fn equal_scores_are_no_certainty() {
        let e = Evidence::of(&[0.0; 100], &(0..100).collect::<Vec<_>>(), false);
        let (low, high) = e.bounds(0.025);
        assert!((high - 0.036993).abs() < 1e-5 && (low + high).abs() < 1e-9);
        assert_eq!(e.p_above(0.0, 100, 0), 1.0);
    }
}
