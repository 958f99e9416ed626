//! Tango's score interval for the difference of paired proportions (Statistics in Medicine 17, 1998, 891–908).
//!
//! Of `n` pairs `b` were lost and `c` gained; the loss is `(b − c) / n`. It holds its level down to small and empty tables,
//! where Wald's interval has no width.

use super::normal;

/// Test statistic of "the loss is δ": standard normal under it, falling in δ.
///
/// `(b − c − nδ) / √(n(2q + δ(1 − δ)))` with `q` the probability of a gain estimated under the restriction: the larger root of
/// `2n q² + (−b − c + (2n − b + c)δ) q − cδ(1 − δ) = 0`.
pub fn statistic(b: u64, c: u64, n: u64, delta: f64) -> f64 {
    let (b, c, n) = (b as f64, c as f64, n as f64);
    let half = -b - c + (2.0 * n - b + c) * delta;
    let q = ((half * half + 8.0 * n * c * delta * (1.0 - delta)).max(0.0).sqrt() - half) / (4.0 * n);
    let variance = n * (2.0 * q + delta * (1.0 - delta));
    let excess = b - c - n * delta;
    if variance > 0.0 {
        excess / variance.sqrt()
    } else if excess == 0.0 {
        0.0
    } else {
        excess.signum() * f64::INFINITY
    }
}

/// P-value of "the loss is at most δ" against "it is larger".
pub fn p_above(b: u64, c: u64, n: u64, delta: f64) -> f64 {
    if n == 0 { 1.0 } else { normal::upper(statistic(b, c, n, delta)) }
}

/// One-sided bounds at level `alpha` each: together an interval of level `1 − 2·alpha`.
pub fn bounds(b: u64, c: u64, n: u64, alpha: f64) -> (f64, f64) {
    if n == 0 {
        return (-1.0, 1.0);
    }
    let z = normal::quantile(1.0 - alpha);
    let point = (b as f64 - c as f64) / n as f64;
    let root = |mut inside: f64, mut outside: f64| {
        for _ in 0..80 {
            let middle = 0.5 * (inside + outside);
            if statistic(b, c, n, middle).abs() <= z { inside = middle } else { outside = middle }
        }
        inside
    };
    (root(point, -1.0), root(point, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_intervals() {
        for (b, c, n, low, high) in [
            (1, 7, 21, -0.51723, -0.02600),
            (6, 16, 161, -0.12402, -0.00543),
            (12, 2, 50, 0.06111, 0.34471),
            (40, 20, 160, 0.03086, 0.21806),
            (0, 0, 100, -0.036993, 0.036993),
        ] {
            let (l, h) = bounds(b, c, n, 0.025);
            assert!((l - low).abs() < 1e-5 && (h - high).abs() < 1e-5, "{b} {c} {n}: {l} {h}");
        }
    }

    #[test]
    fn all_lost_and_all_gained() {
        // (n − z²) / (n + z²) with z = 1.6449.
        let end = (20.0 - 2.705_543) / (20.0 + 2.705_543);
        let (low, high) = bounds(20, 0, 20, 0.05);
        assert!((low - end).abs() < 1e-6 && high == 1.0, "{low} {high}");
        let (low, high) = bounds(0, 20, 20, 0.05);
        assert!(low == -1.0 && (high + end).abs() < 1e-6, "{low} {high}");
        assert_eq!(bounds(0, 0, 0, 0.05), (-1.0, 1.0));
    }

    #[test]
    fn the_p_value_and_the_bound_agree() {
        let (low, _) = bounds(60, 30, 2000, 0.04);
        assert!((p_above(60, 30, 2000, low) - 0.04).abs() < 1e-9);
        assert!(p_above(60, 30, 2000, 0.05) > 0.99);
    }
}
