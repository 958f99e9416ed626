//! How large a loss a number of pairs can show, and how many pairs a decision needs.

use super::normal;

/// The smallest loss a one-sided test at `alpha` finds with probability `power` in `n` pairs of which a share `discordant`
/// differ: `(z₁₋α + z_power) √(discordant / n)`.
pub fn detectable(n: u64, discordant: f64, alpha: f64, power: f64) -> f64 {
    let z = normal::quantile(1.0 - alpha) + normal::quantile(power);
    if n == 0 { 1.0 } else { (z * (discordant / n as f64).sqrt()).min(1.0) }
}

/// Pairs that decide with probability `power` whether a true `loss` lies below or above `margin`; none where it lies on it.
///
/// `variance` is that of one pair's difference. The count is for the side the loss is on; to pass, it is at least what a score
/// interval needs that has seen no pair differ, `z² (1 − margin) / margin`.
pub fn needed(loss: f64, margin: f64, variance: f64, alpha: f64, power: f64) -> Option<u64> {
    let distance = (margin - loss).abs();
    let z = normal::quantile(1.0 - alpha) + normal::quantile(power);
    let spread = z * z * variance / (distance * distance);
    let alone = normal::quantile(1.0 - alpha).powi(2) * (1.0 - margin) / margin;
    let n = if loss < margin { spread.max(alone) } else { spread };
    // Beyond any data set: the loss is all but the margin.
    (n.is_finite() && n < 1e9).then(|| n.ceil().max(1.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detectable_losses() {
        // Two-sided 5 % is one-sided 2.5 %: 2.8016 · √(0.05 / 10042) = 0.63 pp for hellaswag, 0.31 pp for 40,477 items pooled.
        assert!((detectable(10_042, 0.05, 0.025, 0.8) - 0.00625).abs() < 1e-4);
        assert!((detectable(40_477, 0.05, 0.025, 0.8) - 0.00311).abs() < 1e-4);
        assert_eq!(detectable(0, 0.05, 0.05, 0.8), 1.0);
    }

    #[test]
    fn pairs_that_decide() {
        // (1.6449 + 0.8416)² · 0.05 / 0.005² = 12,365.
        assert_eq!(needed(0.0, 0.005, 0.05, 0.05, 0.8), Some(12_366));
        assert_eq!(needed(0.01, 0.005, 0.05, 0.05, 0.8), Some(12_366));
        assert_eq!(needed(0.005, 0.005, 0.05, 0.05, 0.8), None);
        // Nothing differs: 1.6449² · 0.99 / 0.01 = 267.9; and no number shows a loss below none.
        assert_eq!(needed(0.0, 0.01, 0.0, 0.05, 0.8), Some(268));
        assert_eq!(needed(-0.01, 0.0, 0.05, 0.05, 0.8), None);
    }
}
