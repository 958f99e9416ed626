//! Two next-token distributions at one position.

use crate::stats::first_max;

/// Ranks compared: the first five and the tenth.
pub const TOP: [usize; 6] = [1, 2, 3, 4, 5, 10];

/// What one position says about drift. Nats; probabilities in 0..1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowDrift {
    /// KL(reference ‖ candidate).
    pub kl: f64,
    /// KL(candidate ‖ reference).
    pub reverse_kl: f64,
    /// Jensen–Shannon divergence, at most ln 2.
    pub js: f64,
    /// −log probability of the true token by the reference.
    pub reference_nll: f64,
    /// The same by the candidate.
    pub candidate_nll: f64,
    /// Probability of the reference's first choice, by the reference.
    pub confidence: f64,
    /// Log-probability of the reference's first choice less that of its second, by the reference: at least 0.
    pub reference_margin: f64,
    /// The same two tokens by the candidate: negative where their order has turned.
    pub candidate_margin: f64,
    /// Length of the common beginning of both models' ten most likely tokens.
    pub same_order: u8,
    /// Tokens in common among both models' first `TOP[i]`.
    pub in_common: [u8; TOP.len()],
}

/// Largest value of a divergence or margin that is infinite because a logit is: JSON has no infinity.
const CEILING: f64 = 1e6;

/// Values of a row in a journal.
pub(crate) const WORDS: usize = 8;

impl RowDrift {
    /// The floating-point values, in the order of the fields.
    pub(crate) fn values(&self) -> [f64; WORDS] {
        [
            self.kl,
            self.reverse_kl,
            self.js,
            self.reference_nll,
            self.candidate_nll,
            self.confidence,
            self.reference_margin,
            self.candidate_margin,
        ]
    }

    pub(crate) fn from_values(v: [f64; WORDS], same_order: u8, in_common: [u8; TOP.len()]) -> Self {
        let [kl, reverse_kl, js, reference_nll, candidate_nll, confidence, reference_margin, candidate_margin] = v;
        Self {
            kl,
            reverse_kl,
            js,
            reference_nll,
            candidate_nll,
            confidence,
            reference_margin,
            candidate_margin,
            same_order,
            in_common,
        }
    }
}

/// The `k` largest entries and their indices, largest first, the first index among equals.
pub fn top(row: &[f32], k: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k + 1);
    for (i, &x) in row.iter().enumerate() {
        if best.len() == k && best.last().is_none_or(|l| x <= l.0) {
            continue;
        }
        let at = best.partition_point(|b| b.0 >= x);
        best.insert(at, (x, i as u32));
        best.truncate(k);
    }
    best
}

/// Compares one row of logits; sums in f64. `target` is inside the rows.
///
/// With `Z = Σ exp(a)`, KL = Σ exp(a)(a − b) / Z_a − ln Z_a + ln Z_b, and the reverse likewise. The Jensen–Shannon
/// divergence needs both normalizers first, hence a second sweep.
pub fn compare(reference: &[f32], candidate: &[f32], target: usize) -> RowDrift {
    let (max_a, max_b) = (f64::from(first_max(reference).0), f64::from(first_max(candidate).0));
    let (mut sum_a, mut sum_b, mut forward, mut backward) = (0.0, 0.0, 0.0, 0.0);
    for (&a, &b) in reference.iter().zip(candidate) {
        let (a, b) = (f64::from(a) - max_a, f64::from(b) - max_b);
        let (p, q) = (a.exp(), b.exp());
        sum_a += p;
        sum_b += q;
        // 0 · ln 0 is 0; a NaN stays one.
        if p != 0.0 {
            forward += p * (a - b);
        }
        if q != 0.0 {
            backward += q * (b - a);
        }
    }
    let (log_a, log_b) = (f64::ln(sum_a), f64::ln(sum_b));
    let mut js = 0.0;
    for (&a, &b) in reference.iter().zip(candidate) {
        let (a, b) = (f64::from(a) - max_a - log_a, f64::from(b) - max_b - log_b);
        let (p, q) = (a.exp(), b.exp());
        let middle = (0.5 * (p + q)).ln();
        if p != 0.0 {
            js += 0.5 * p * (a - middle);
        }
        if q != 0.0 {
            js += 0.5 * q * (b - middle);
        }
    }
    let (top_a, top_b) = (top(reference, 10), top(candidate, 10));
    let log_p = |x: f32| f64::from(x) - max_a - log_a;
    let (first, second) = (top_a.first().copied().unwrap_or_default(), top_a.get(1).copied());
    let margin = |row: &[f32]| {
        let at = |i: u32| f64::from(row[i as usize]);
        second.map_or(0.0, |s| (at(first.1) - at(s.1)).clamp(-CEILING, CEILING))
    };
    let mut in_common = [0; TOP.len()];
    for (n, &k) in in_common.iter_mut().zip(&TOP) {
        let b = &top_b[..k.min(top_b.len())];
        *n = top_a.iter().take(k).filter(|a| b.iter().any(|b| b.1 == a.1)).count() as u8;
    }
    // Negative by rounding only; `max` would turn NaN into 0.
    let floor = |x: f64| if x < 0.0 { 0.0 } else { x };
    RowDrift {
        kl: floor(forward / sum_a - log_a + log_b),
        reverse_kl: floor(backward / sum_b - log_b + log_a).clamp(0.0, CEILING),
        js: floor(js),
        reference_nll: log_a - (f64::from(reference[target]) - max_a),
        candidate_nll: log_b - (f64::from(candidate[target]) - max_b),
        confidence: log_p(first.0).exp(),
        reference_margin: margin(reference),
        candidate_margin: margin(candidate),
        same_order: top_a.iter().zip(&top_b).take_while(|(a, b)| a.1 == b.1).count() as u8,
        in_common,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln() + 3.0).collect()
    }

    #[test]
    fn known_distributions() {
        // P = (1/2, 1/4, 1/4), Q = (1/4, 1/4, 1/2): KL = ¼ ln 2 both ways; M = (3/8, 1/4, 3/8) gives
        // JS = ½ ln(4/3) + ¼ ln(2/3).
        let d = compare(&logits(&[0.5, 0.25, 0.25]), &logits(&[0.25, 0.25, 0.5]), 0);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
        close(d.kl, 0.25 * 2f64.ln());
        close(d.reverse_kl, 0.25 * 2f64.ln());
        close(d.js, 0.5 * (4.0f64 / 3.0).ln() + 0.25 * (2.0f64 / 3.0).ln());
        close(d.confidence, 0.5);
        // First and second choice of the reference are 0 and 1 (the first of equals).
        close(d.reference_margin, 2f64.ln());
        close(d.candidate_margin, 0.0);
        close(d.reference_nll, 2f64.ln());
        close(d.candidate_nll, 4f64.ln());
        // Orders 0 1 2 and 2 0 1.
        assert_eq!((d.same_order, d.in_common), (0, [0, 1, 3, 3, 3, 3]));
    }

    #[test]
    fn top_is_a_stable_sort() {
        let row: Vec<f32> = (0..200).map(|i| ((i * 37) % 11) as f32).collect();
        let mut sorted: Vec<(f32, u32)> = row.iter().enumerate().map(|(i, &x)| (x, i as u32)).collect();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        assert_eq!(top(&row, 30), sorted[..30]);
        assert_eq!(top(&row[..3], 10).len(), 3);
    }

    #[test]
    fn equal_rows_do_not_differ() {
        let row: Vec<f32> = (0..2000).map(|i| ((i * 7919) % 997) as f32 * 0.02).collect();
        let d = compare(&row, &row, 5);
        assert!(d.kl < 1e-12 && d.reverse_kl < 1e-12 && d.js < 1e-12 && d.same_order == 10, "{d:?}");
        let shifted: Vec<f32> = row.iter().map(|x| x + 8.0).collect();
        assert!(compare(&row, &shifted, 5).js < 1e-6);
    }
}
