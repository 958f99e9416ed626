//! Whether a run met an objective, as a statistical statement.
//!
//! "TTFT p99 ≤ 200 ms" says that at least 99 % of requests get their first token within 200 ms, so each clause is a share of
//! requests with an interval. Requests that failed do not keep to it; one that the end of the run cut off counts against
//! it once it was already too late, else not at all. Requests queue together, so the interval comes from twenty batches of
//! neighbours (batch means) and Student's t, not from independent draws.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

use crate::load::metrics::Window;
use crate::load::percentile::wilson;
use crate::load::trace::{Outcome, RequestTrace};
use crate::slo::{Clause, Measure, Slo};

/// Batches the variance is estimated from.
const BATCHES: usize = 20;

/// Met, broken, or neither can be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval is on the good side.
    Met,
    /// The whole interval is on the bad side.
    Broken,
    /// The interval holds the limit: more requests would be needed.
    Inconclusive,
}

/// A clause and what was seen of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClauseVerdict {
    /// As text.
    pub clause: String,
    /// Requests judged.
    pub n: u64,
    /// Share that kept to it; for a rate, the rate.
    pub attained: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Verdict.
    pub verdict: Verdict,
}

/// The objective and what was seen of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SloVerdict {
    /// Objective.
    pub slo: Slo,
    /// Every clause.
    pub clauses: Vec<ClauseVerdict>,
    /// Whole answers a second that kept to every limit on latency.
    pub goodput_per_second: f64,
    /// Share of judged requests that kept to every limit on latency.
    pub good_frac: f64,
    /// Broken if any clause is, met if all are.
    pub verdict: Verdict,
}

/// Whether a request kept to a clause; `None` when it cannot be judged.
pub fn keeps(t: &RequestTrace, clause: &Clause) -> Option<bool> {
    match &t.outcome {
        // An answer without gaps keeps to every limit on gaps.
        Outcome::Ok => Some(clause.measure.of(t).is_none_or(|v| v <= clause.limit)),
        Outcome::Cancelled => {
            let waited = t.end_ns.saturating_sub(t.scheduled_ns) as f64 * 1e-6;
            let late = match clause.measure {
                Measure::Ttft => {
                    t.chunks_ns.is_empty() && waited > clause.limit
                        || clause.measure.of(t).is_some_and(|v| v > clause.limit)
                }
                Measure::E2e => waited > clause.limit,
                _ => false,
            };
            late.then_some(false)
        }
        _ => Some(false),
    }
}

/// Share of `true` with an interval at `confidence`, the order of `kept` being that of the schedule.
pub fn attainment(kept: &[bool], confidence: f64) -> (f64, f64, f64) {
    let n = kept.len();
    if n == 0 {
        return (0.0, 0.0, 1.0);
    }
    let share = kept.iter().filter(|k| **k).count() as f64 / n as f64;
    let batches = BATCHES.min(n);
    let size = n.div_ceil(batches);
    let between: f64 =
        kept.chunks(size).map(|b| b.iter().map(|k| f64::from(u8::from(*k)) - share).sum::<f64>().powi(2)).sum();
    let alone = share * (1.0 - share) * n as f64;
    let effect =
        if alone > 0.0 { (between / alone * batches as f64 / (batches as f64 - 1.0).max(1.0)).max(1.0) } else { 1.0 };
    // Independent draws need no t: with no excess between batches the normal quantile is right.
    let freedom = if effect > 1.0 { (batches as f64 - 1.0).max(1.0) } else { 1e6 };
    let z = StudentsT::new(0.0, 1.0, freedom).map_or(1.96, |t| t.inverse_cdf(0.5 + confidence / 2.0));
    let (low, high) = wilson(share, n as f64 / effect, z);
    (share, low, high)
}

/// Judges a clause on requests in the order of their schedule.
pub fn judge_clause(traces: &[&RequestTrace], clause: &Clause, rate: f64, confidence: f64) -> ClauseVerdict {
    if clause.measure == Measure::Rps {
        let verdict = if rate >= clause.limit { Verdict::Met } else { Verdict::Broken };
        return ClauseVerdict {
            clause: clause.to_string(),
            n: traces.len() as u64,
            attained: rate,
            low: rate,
            high: rate,
            verdict,
        };
    }
    let kept: Vec<bool> = traces.iter().filter_map(|t| keeps(t, clause)).collect();
    let (attained, low, high) = attainment(&kept, confidence);
    let verdict = if low >= clause.q {
        Verdict::Met
    } else if high < clause.q {
        Verdict::Broken
    } else {
        Verdict::Inconclusive
    };
    ClauseVerdict { clause: clause.to_string(), n: kept.len() as u64, attained, low, high, verdict }
}

/// Judges a stage: the requests scheduled in its window, at 95 %. `rate` is whole answers a second.
pub fn judge(traces: &[RequestTrace], window: Window, rate: f64, slo: &Slo) -> SloVerdict {
    let mut inside: Vec<&RequestTrace> =
        traces.iter().filter(|t| (window.from_ns..window.to_ns).contains(&t.scheduled_ns)).collect();
    inside.sort_by_key(|t| t.scheduled_ns);
    let clauses: Vec<ClauseVerdict> = slo.clauses.iter().map(|c| judge_clause(&inside, c, rate, 0.95)).collect();
    let judged = inside.iter().filter(|t| t.outcome != Outcome::Cancelled).count();
    let latency: Vec<&Clause> = slo.clauses.iter().filter(|c| c.measure != Measure::Rps).collect();
    let good = inside.iter().filter(|t| t.ok() && latency.iter().all(|c| keeps(t, c) == Some(true))).count();
    let seconds = window.seconds();
    SloVerdict {
        slo: slo.clone(),
        verdict: overall(&clauses),
        goodput_per_second: if seconds > 0.0 { good as f64 / seconds } else { 0.0 },
        good_frac: if judged > 0 { good as f64 / judged as f64 } else { 0.0 },
        clauses,
    }
}

/// Broken if any is, met if all are.
pub fn overall(clauses: &[ClauseVerdict]) -> Verdict {
    if clauses.iter().any(|c| c.verdict == Verdict::Broken) {
        Verdict::Broken
    } else if clauses.iter().all(|c| c.verdict == Verdict::Met) && !clauses.is_empty() {
        Verdict::Met
    } else {
        Verdict::Inconclusive
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(at_ms: u64, ttft_ms: u64, outcome: Outcome) -> RequestTrace {
        let ns = |ms: u64| ms * 1_000_000;
        let chunks =
            if outcome == Outcome::Cancelled { vec![] } else { vec![ns(at_ms + ttft_ms), ns(at_ms + ttft_ms + 10)] };
        RequestTrace {
            scheduled_ns: ns(at_ms),
            sent_ns: ns(at_ms),
            end_ns: ns(at_ms + ttft_ms + 10),
            chunks_ns: chunks,
            chunk_tokens: vec![],
            input_tokens: None,
            output_tokens: 2,
            counted_by_server: true,
            outcome,
        }
    }

    #[test]
    fn verdicts_need_enough_requests() {
        let slo = Slo::parse("ttft_p99<=200").unwrap();
        let window = |n: u64| Window { from_ns: 0, to_ns: n * 10_000_000 };
        let run = |n: u64, late_every: u64| -> SloVerdict {
            let traces: Vec<_> =
                (0..n).map(|i| trace(i * 10, if i % late_every == 0 { 300 } else { 100 }, Outcome::Ok)).collect();
            judge(&traces, window(n), 100.0, &slo)
        };
        assert_eq!(run(100, u64::MAX).verdict, Verdict::Inconclusive, "100 requests cannot show 99 %");
        assert_eq!(run(2000, 500).verdict, Verdict::Met);
        let broken = run(2000, 20);
        assert_eq!(broken.verdict, Verdict::Broken);
        assert!((broken.good_frac - 0.95).abs() < 1e-9 && (broken.goodput_per_second - 95.0).abs() < 1e-6);
    }

    #[test]
    fn failures_break_and_cut_off_requests_count_once_late() {
        let clause = Slo::parse("ttft_p99<=200").unwrap().clauses[0];
        assert_eq!(keeps(&trace(0, 1, Outcome::Timeout), &clause), Some(false));
        assert_eq!(keeps(&trace(0, 50, Outcome::Cancelled), &clause), None);
        assert_eq!(keeps(&trace(0, 500, Outcome::Cancelled), &clause), Some(false));
        let slo = Slo::parse("rps>=100").unwrap();
        let window = Window { from_ns: 0, to_ns: 1_000_000_000 };
        assert_eq!(judge(&[trace(0, 1, Outcome::Ok)], window, 120.0, &slo).verdict, Verdict::Met);
        assert_eq!(judge(&[trace(0, 1, Outcome::Ok)], window, 80.0, &slo).verdict, Verdict::Broken);
    }
}
