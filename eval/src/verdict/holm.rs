//! Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979, 65–70).

/// Which hypotheses are rejected so that any false rejection has probability `alpha` at most.
///
/// The smallest p is compared with `level(alpha / m)`, the next with `level(alpha / (m − 1))`, and so on up to the first that
/// passes. `level` maps a share of the error to the level of this look (the identity without sequential looks).
pub fn rejected(p: &[f64], alpha: f64, level: &dyn Fn(f64) -> f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]).then(a.cmp(&b)));
    let mut out = vec![false; p.len()];
    for (step, &i) in order.iter().enumerate() {
        if p[i] > level(alpha / (p.len() - step) as f64) {
            break;
        }
        out[i] = true;
    }
    out
}

/// Adjusted p-values: at most `alpha` exactly where [`rejected`] rejects.
pub fn adjusted(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]).then(a.cmp(&b)));
    let mut out = vec![1.0; p.len()];
    let mut largest = 0f64;
    for (step, &i) in order.iter().enumerate() {
        largest = largest.max((p[i] * (p.len() - step) as f64).min(1.0));
        out[i] = largest;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_down_by_hand() {
        // R: p.adjust(c(.01, .04, .03, .005), "holm") = .03 .06 .06 .02.
        let p = [0.01, 0.04, 0.03, 0.005];
        for (a, b) in adjusted(&p).iter().zip([0.03, 0.06, 0.06, 0.02]) {
            assert!((a - b).abs() < 1e-12);
        }
        assert_eq!(rejected(&p, 0.05, &|a| a), [true, false, false, true]);
        // After the first that passes, none is rejected, however small against its own level.
        assert_eq!(rejected(&[0.02, 0.021, 0.022], 0.05, &|a| a), [false; 3]);
        assert!(rejected(&[], 0.05, &|a| a).is_empty());
    }
}
