//! Many positions in one record.

use serde::{Deserialize, Serialize};

use super::row::{RowDrift, TOP};
use crate::record::Interval;
use crate::stats::{clustered_mean, mean, percentile, percentiles, root_mean_square};

/// Ends of the confidence buckets: the last holds positions the reference is all but sure of.
pub const CONFIDENCE: [f64; 7] = [0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0];

/// Agreement of both models' `k` most likely tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopAgreement {
    /// How many.
    pub k: usize,
    /// Share of positions where they are the same in the same order.
    pub same_order: f64,
    /// Mean share of them in common, whatever the order.
    pub in_common: f64,
}

/// KL where the reference's first choice has a probability in `from..to`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConfidenceBucket {
    /// Least probability.
    pub from: f64,
    /// Most.
    pub to: f64,
    /// Positions.
    pub tokens: u64,
    /// Mean KL(reference ‖ candidate), nats; 0 without positions.
    pub kl_mean: f64,
    /// Share of positions where the first choice is the same; 0 without positions.
    pub top1_agreement: f64,
}

/// Change of the margin between the reference's first and second choice (log-probabilities, nats).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MarginChange {
    /// Mean of candidate less reference.
    pub mean: f64,
    /// Root mean square of the same.
    pub rms: f64,
    /// Percentiles of the same: label → value.
    pub percentiles: Vec<(String, f64)>,
    /// Share of positions where the candidate prefers the reference's second choice to its first.
    pub turned: f64,
}

/// Statistics of drift beside KL(reference ‖ candidate).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DriftStatistics {
    /// Mean KL(candidate ‖ reference), nats.
    pub reverse_mean: f64,
    /// Percentiles of the same.
    pub reverse_percentiles: Vec<(String, f64)>,
    /// Mean Jensen–Shannon divergence, nats.
    pub js_mean: f64,
    /// Percentiles of the same.
    pub js_percentiles: Vec<(String, f64)>,
    /// For k = 1 to 5 and 10.
    pub top_k: Vec<TopAgreement>,
    /// By the reference's probability of its first choice.
    pub by_confidence: Vec<ConfidenceBucket>,
    /// Of the reference's first and second choice.
    pub margin: MarginChange,
}

/// Drift on the prompts of a task, at the positions its requests score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskDrift {
    /// Task.
    pub task: String,
    /// Different positions compared; a position several choices share counts once.
    pub tokens: u64,
    /// Mean KL(reference ‖ candidate), nats.
    pub mean: f64,
    /// 95 % interval of the mean, clustered by document.
    pub mean_interval: Interval,
    /// Median.
    pub median: f64,
    /// Percentiles of KL.
    pub percentiles: Vec<(String, f64)>,
    /// Largest.
    pub max: f64,
    /// Mean change of the probability of the scored token, candidate less reference.
    pub delta_p_mean: f64,
    /// Root mean square of the same.
    pub delta_p_rms: f64,
    /// The rest.
    pub statistics: DriftStatistics,
}

fn sorted(rows: &[RowDrift], f: impl Fn(&RowDrift) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = rows.iter().map(f).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Summarizes positions; zeros of none.
pub fn statistics(rows: &[RowDrift]) -> DriftStatistics {
    if rows.is_empty() {
        return DriftStatistics::default();
    }
    let count = rows.len() as f64;
    let share = |f: &dyn Fn(&RowDrift) -> bool| rows.iter().filter(|r| f(r)).count() as f64 / count;
    let reverse = sorted(rows, |r| r.reverse_kl);
    let js = sorted(rows, |r| r.js);
    let margin = sorted(rows, |r| r.candidate_margin - r.reference_margin);
    let top_k = TOP
        .iter()
        .enumerate()
        .map(|(i, &k)| TopAgreement {
            k,
            same_order: share(&|r| usize::from(r.same_order) >= k),
            in_common: rows.iter().map(|r| f64::from(r.in_common[i])).sum::<f64>() / (count * k as f64),
        })
        .collect();
    let mut from = 0.0;
    let by_confidence = CONFIDENCE
        .iter()
        .map(|&to| {
            let last = to >= 1.0;
            let inside = |r: &&RowDrift| r.confidence >= from && (last || r.confidence < to);
            let own: Vec<&RowDrift> = rows.iter().filter(inside).collect();
            let n = own.len().max(1) as f64;
            let bucket = ConfidenceBucket {
                from,
                to,
                tokens: own.len() as u64,
                kl_mean: own.iter().map(|r| r.kl).sum::<f64>() / n,
                top1_agreement: own.iter().filter(|r| r.same_order >= 1).count() as f64 / n,
            };
            from = to;
            bucket
        })
        .collect();
    DriftStatistics {
        reverse_mean: mean(&reverse),
        reverse_percentiles: percentiles(&reverse),
        js_mean: mean(&js),
        js_percentiles: percentiles(&js),
        top_k,
        by_confidence,
        margin: MarginChange {
            mean: mean(&margin),
            rms: root_mean_square(&margin),
            percentiles: percentiles(&margin),
            turned: share(&|r| r.candidate_margin < 0.0),
        },
    }
}

/// Summarizes a task: `documents[d]` holds the hashed rows of every request of one document. `None` without rows.
pub fn task_drift(task: &str, documents: &[Vec<(u64, RowDrift)>]) -> Option<TaskDrift> {
    let (mut rows, mut sums, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut delta_p = Vec::new();
    for document in documents {
        let before = rows.len();
        let mut seen = std::collections::HashSet::new();
        for (place, row) in document {
            // Every scored token has its own change of probability; a position has one divergence.
            delta_p.push((-row.candidate_nll).exp() - (-row.reference_nll).exp());
            if seen.insert(*place) {
                rows.push(*row);
            }
        }
        if rows.len() > before {
            sums.push(rows[before..].iter().map(|r| r.kl).sum());
            weights.push((rows.len() - before) as f64);
        }
    }
    if rows.is_empty() {
        return None;
    }
    let kl = sorted(&rows, |r| r.kl);
    let mean_interval = clustered_mean(&sums, &weights);
    Some(TaskDrift {
        task: task.to_owned(),
        tokens: rows.len() as u64,
        mean: mean_interval.value,
        mean_interval: mean_interval.clamp(0.0, f64::MAX),
        median: percentile(&kl, 50.0),
        percentiles: percentiles(&kl),
        max: percentile(&kl, 100.0),
        delta_p_mean: mean(&delta_p),
        delta_p_rms: root_mean_square(&delta_p),
        statistics: statistics(&rows),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kl: f64, confidence: f64, candidate_margin: f64) -> RowDrift {
        let values = [kl, 2.0 * kl, 0.5 * kl, 2f64.ln(), 4f64.ln(), confidence, 1.0, candidate_margin];
        RowDrift::from_values(values, 2, [1, 2, 2, 3, 3, 8])
    }

    #[test]
    fn by_hand() {
        let s = statistics(&[row(1.0, 0.05, 1.0), row(3.0, 0.95, -1.0)]);
        assert_eq!((s.reverse_mean, s.js_mean), (4.0, 1.0));
        assert_eq!((s.margin.mean, s.margin.turned), (-1.0, 0.5));
        assert_eq!(s.margin.rms, 2f64.sqrt());
        let top: Vec<(usize, f64)> = s.top_k.iter().map(|t| (t.k, t.same_order)).collect();
        assert_eq!(top, [(1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0), (5, 0.0), (10, 0.0)]);
        assert_eq!((s.top_k[3].in_common, s.top_k[5].in_common), (0.75, 0.8));
        let tokens: Vec<u64> = s.by_confidence.iter().map(|b| b.tokens).collect();
        assert_eq!(tokens, [1, 0, 0, 0, 0, 1, 0]);
        assert_eq!(s.by_confidence[5].kl_mean, 3.0);
    }

    #[test]
    fn a_shared_position_counts_once() {
        let documents = [vec![(1, row(1.0, 0.5, 0.0)), (1, row(1.0, 0.5, 0.0)), (2, row(4.0, 0.5, 0.0))], vec![]];
        let d = task_drift("t", &documents).unwrap();
        assert_eq!((d.tokens, d.mean, d.max), (2, 2.5, 4.0));
        assert!((d.delta_p_mean + 0.25).abs() < 1e-12);
        assert!(task_drift("t", &[vec![]]).is_none());
    }
}
