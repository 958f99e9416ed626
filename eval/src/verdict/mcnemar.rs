//! McNemar's exact test: of the pairs that differ, how many went which way.
//!
//! Under "no change" each discordant pair falls either way with probability ½, whatever the pairs that agree (McNemar 1947; exact
//! form: Fagerland, Lydersen & Laake 2013, section 2).

use statrs::distribution::{Binomial, DiscreteCDF};

/// P(at least `losses` of `losses + gains` fair coins): small where more was lost than chance explains.
///
/// ```
/// use lowbit_eval::verdict::mcnemar;
///
/// // Eight items lost and none gained: a coin falls so once in 256.
/// assert!((mcnemar::loss(8, 0) - 1.0 / 256.0).abs() < 1e-12);
/// assert_eq!(mcnemar::loss(0, 8), 1.0);
/// ```
pub fn loss(losses: u64, gains: u64) -> f64 {
    match (losses, Binomial::new(0.5, losses + gains)) {
        (0, _) | (_, Err(_)) => 1.0,
        (_, Ok(coin)) => coin.sf(losses - 1).min(1.0),
    }
}

/// Twice the smaller tail, at most 1.
pub fn two_sided(losses: u64, gains: u64) -> f64 {
    (2.0 * loss(losses.max(gains), losses.min(gains))).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_tables_by_hand() {
        // 7 of 8: (8 + 1) / 256.
        assert!((loss(7, 1) - 9.0 / 256.0).abs() < 1e-12);
        assert!((loss(1, 7) - 255.0 / 256.0).abs() < 1e-12);
        assert!((two_sided(1, 7) - 18.0 / 256.0).abs() < 1e-12);
        assert_eq!((loss(0, 0), loss(0, 9), two_sided(3, 3)), (1.0, 1.0, 1.0));
    }

    #[test]
    fn a_published_pair_of_counts() {
        // 958 and 824 of 1,782: z = 134 / √1782 = 3.174, two-sided p about 0.0015.
        let p = two_sided(958, 824);
        assert!((p - 0.0016).abs() < 0.0001, "{p}");
    }
}
