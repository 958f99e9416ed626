//! Sign-flip permutation: under "no change" a pair's difference could as well have had the other sign.
//!
//! Flips are drawn within pairs (or clusters of pairs), so every task keeps its own items: the test is stratified by task.

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use rayon::prelude::*;

/// Differences up to which all sign patterns are counted.
const EXACT: usize = 14;
/// Draws in one seeded chunk.
const CHUNK: usize = 1000;

/// P(a random choice of signs gives at least the sum observed): small where more was lost than chance explains.
///
/// Up to 14 differences that are not zero, over all patterns; else over `draws` of them, counting the one observed.
pub fn loss(differences: &[f64], draws: usize, seed: u64) -> f64 {
    let own: Vec<f64> = differences.iter().copied().filter(|d| *d != 0.0).collect();
    if own.is_empty() {
        return 1.0;
    }
    let size: f64 = own.iter().map(|d| d.abs()).sum();
    // Equal sums in another order of additions are equal.
    let observed = own.iter().sum::<f64>() - 1e-9 * size;
    if own.len() <= EXACT {
        let patterns = 1u32 << own.len();
        let reach = |p: &u32| {
            let sum: f64 = own.iter().enumerate().map(|(i, d)| if p >> i & 1 == 1 { -d } else { *d }).sum();
            sum >= observed
        };
        return (0..patterns).filter(reach).count() as f64 / f64::from(patterns);
    }
    let chunks = draws.div_ceil(CHUNK).max(1);
    let hits: usize = (0..chunks as u64)
        .into_par_iter()
        .map(|chunk| {
            let mut random = StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(chunk));
            (0..CHUNK)
                .filter(|_| {
                    let mut sum = 0.0;
                    for part in own.chunks(64) {
                        let bits = random.next_u64();
                        for (i, d) in part.iter().enumerate() {
                            sum += if bits >> i & 1 == 1 { -d } else { *d };
                        }
                    }
                    sum >= observed
                })
                .count()
        })
        .sum();
    (hits + 1) as f64 / (chunks * CHUNK + 1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::mcnemar;

    #[test]
    fn ones_are_coins() {
        // Of yes and no the permutation test is McNemar's.
        let table = |b: usize, c: usize| [vec![1.0; b], vec![-1.0; c], vec![0.0; 50]].concat();
        assert!((loss(&table(7, 1), 0, 0) - mcnemar::loss(7, 1)).abs() < 1e-12);
        let many = loss(&table(130, 100), 100_000, 7);
        assert!((many - mcnemar::loss(130, 100)).abs() < 0.002, "{many} {}", mcnemar::loss(130, 100));
        assert_eq!(loss(&[0.0; 9], 1000, 0), 1.0);
    }

    #[test]
    fn by_hand() {
        // Sums of ±1 ±2 ±4 at least 5: 7 and 5, of 8 patterns.
        assert_eq!(loss(&[-1.0, 2.0, 4.0], 0, 0), 2.0 / 8.0);
    }
}
