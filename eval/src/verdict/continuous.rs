//! Mean differences of clusters: for scores that are no yes or no, and for items that come in groups.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// A mean per item over clusters, with its cluster-robust standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clustered {
    /// `Σ sums / Σ sizes`.
    pub value: f64,
    /// Square root of `C/(C−1) Σ (sum − value·size)² / (Σ sizes)²`; infinite below two clusters.
    pub error: f64,
    /// C.
    pub clusters: usize,
}

/// Of the totals and sizes of clusters.
pub fn clustered(sums: &[f64], sizes: &[f64]) -> Clustered {
    let total: f64 = sizes.iter().sum();
    let value = if total > 0.0 { sums.iter().sum::<f64>() / total } else { 0.0 };
    let clusters = sums.len();
    let squares: f64 = sums.iter().zip(sizes).map(|(s, n)| (s - value * n).powi(2)).sum();
    let scale = clusters as f64 / (clusters as f64 - 1.0);
    let error = if clusters < 2 { f64::INFINITY } else { (scale * squares).sqrt() / total };
    Clustered { value, error, clusters }
}

impl Clustered {
    fn t(&self) -> Option<StudentsT> {
        let freedom = self.clusters.checked_sub(1).filter(|f| *f > 0)?;
        StudentsT::new(0.0, 1.0, freedom as f64).ok()
    }

    /// One-sided bounds at level `alpha` each, by Student's t with C − 1 degrees of freedom.
    pub fn bounds(&self, alpha: f64) -> (f64, f64) {
        let half = self.t().map_or(f64::INFINITY, |t| t.inverse_cdf(1.0 - alpha) * self.error);
        (self.value - half, self.value + half)
    }

    /// P-value of "the mean is at most `margin`".
    pub fn p_above(&self, margin: f64) -> f64 {
        let distance = self.value - margin;
        match self.t() {
            Some(t) if self.error > 0.0 => t.sf(distance / self.error),
            Some(_) if distance > 0.0 => 0.0,
            _ => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paired_t_test_by_hand() {
        // Differences 1, 2, 6: mean 3, standard error √(7/3), t = 3/1.5275 = 1.964 with 2 degrees: one-sided p 0.0943.
        let c = clustered(&[1.0, 2.0, 6.0], &[1.0; 3]);
        assert!((c.value - 3.0).abs() < 1e-12 && (c.error - (7f64 / 3.0).sqrt()).abs() < 1e-12);
        assert!((c.p_above(0.0) - 0.0943).abs() < 1e-4, "{}", c.p_above(0.0));
        // t(0.975, 2) = 4.3027.
        assert!((c.bounds(0.025).1 - (3.0 + 4.302_652_7 * c.error)).abs() < 1e-5);
        assert_eq!(
            (clustered(&[5.0], &[2.0]).p_above(0.0), clustered(&[5.0], &[2.0]).bounds(0.05).1),
            (1.0, f64::INFINITY)
        );
    }

    #[test]
    fn items_of_one_cluster_count_together() {
        // Ten items that all moved with their cluster are no ten observations.
        let apart = clustered(&[1.0, 0.0].repeat(10), &[1.0; 20]);
        let together = clustered(&[10.0, 0.0], &[10.0, 10.0]);
        assert_eq!(apart.value, together.value);
        assert!(together.error > 4.0 * apart.error);
    }
}
