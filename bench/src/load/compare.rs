//! Two runs against each other: ratios with intervals.
//!
//! Stages are paired by profile, rate and streams. Of each latency the ratio of medians and of p95 (B over A) gets a 95 % interval by
//! the block bootstrap: requests that queued together stay together, so blocks of about √n in the order of the schedule are
//! drawn, not single requests (Künsch, 1989).

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::load::record::{LoadRecord, StageRecord};
use crate::slo::Measure;

const RESAMPLES: usize = 1000;

/// A latency of one pair of stages.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// Stage, as in both records.
    pub stage: String,
    /// `ttft`, `itl`, `tpot`, `e2e`.
    pub measure: &'static str,
    /// 0.5 or 0.95.
    pub q: f64,
    /// Of the first run, ms.
    pub a: f64,
    /// Of the second.
    pub b: f64,
    /// `b / a`.
    pub ratio: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Compared {
    /// The whole interval is above 1: the second run is slower.
    pub fn slower(&self) -> bool {
        self.low > 1.0
    }

    /// The whole interval is below 1.
    pub fn faster(&self) -> bool {
        self.high < 1.0
    }
}

fn key(s: &StageRecord) -> String {
    match (s.rate, s.streams) {
        (Some(r), _) => format!("{} {r}/s", s.profile),
        (_, Some(n)) => format!("{} {n}", s.profile),
        _ => s.profile.clone(),
    }
}

/// Values in the order of the schedule, of whole answers inside the window.
fn values(s: &StageRecord, m: Measure) -> Vec<f64> {
    let w = s.metrics.window;
    let mut inside: Vec<_> =
        s.requests.iter().filter(|t| t.ok() && (w.from_ns..w.to_ns).contains(&t.scheduled_ns)).collect();
    inside.sort_by_key(|t| t.scheduled_ns);
    inside.into_iter().filter_map(|t| m.of(t)).collect()
}

/// Every latency of every stage both records have and that says something about the server. Needs 20 answers a stage.
pub fn compare(a: &LoadRecord, b: &LoadRecord, seed: u64) -> Vec<Compared> {
    let mut out = Vec::new();
    for x in a.valid() {
        let Some(y) = b.valid().find(|y| key(y) == key(x)) else { continue };
        for m in [Measure::Ttft, Measure::Itl, Measure::Tpot, Measure::E2e] {
            let (va, vb) = (values(x, m), values(y, m));
            if va.len() < 20 || vb.len() < 20 {
                continue;
            }
            for q in [0.5, 0.95] {
                let (qa, qb) = (quantile(va.clone(), q), quantile(vb.clone(), q));
                if qa <= 0.0 {
                    continue;
                }
                let mut rng = StdRng::seed_from_u64(seed);
                let draws = (0..RESAMPLES).map(|_| {
                    let low = quantile(blocks(&va, &mut rng), q);
                    quantile(blocks(&vb, &mut rng), q) / low.max(f64::MIN_POSITIVE)
                });
                let mut ratios: Vec<f64> = draws.collect();
                ratios.sort_unstable_by(f64::total_cmp);
                let at = |p: f64| ratios[((p * RESAMPLES as f64) as usize).min(RESAMPLES - 1)];
                let (low, high) = (at(0.025), at(0.975));
                out.push(Compared { stage: key(x), measure: m.name(), q, a: qa, b: qb, ratio: qb / qa, low, high });
            }
        }
    }
    out
}

/// As many values as there are, in blocks drawn with replacement. `values` is not empty.
fn blocks(values: &[f64], rng: &mut StdRng) -> Vec<f64> {
    let n = values.len();
    let size = (n as f64).sqrt().ceil() as usize;
    let mut out = Vec::with_capacity(n + size);
    while out.len() < n {
        let from = rng.random_range(0..=n - size.min(n));
        out.extend_from_slice(&values[from..(from + size).min(n)]);
    }
    out.truncate(n);
    out
}

fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    let rank = ((q * values.len() as f64).ceil() as usize).clamp(1, values.len());
    let (_, v, _) = values.select_nth_unstable_by(rank - 1, f64::total_cmp);
    *v
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::metrics::{Trim, Window, measure};
    use crate::load::openai::Endpoint;
    use crate::load::record::{ClientCheck, TargetRecord};
    use crate::load::schedule::Arrivals;
    use crate::load::sim::{Queue, Service};

    fn record(service: f64, seed: u64) -> LoadRecord {
        let q = Queue { servers: 8, service: Service::Gamma(service, 0.2), tokens: 10, failures: 0.0 };
        let requests = q.run(20.0, Arrivals::Poisson, 1000, seed).unwrap();
        let client = ClientCheck {
            schedule_delay_p99_ms: 0.0,
            schedule_delay_max_ms: 0.0,
            cpu_frac: None,
            connections: 0,
            resent: 0,
            invalid: vec![],
        };
        let stage = StageRecord {
            profile: "poisson".into(),
            rate: Some(20.0),
            streams: None,
            seconds: 50.0,
            stopped_by: "requests".into(),
            rejected: 0,
            saturation: None,
            client,
            metrics: measure(&requests, Window { from_ns: 0, to_ns: u64::MAX / 4 }),
            slo: None,
            requests,
        };
        let target = TargetRecord {
            url: String::new(),
            endpoint: Endpoint::Chat,
            model: String::new(),
            streaming: true,
            exact_output: true,
            server: None,
        };
        LoadRecord {
            schema: 1,
            provenance: Default::default(),
            target,
            data: String::new(),
            trim: Trim::default(),
            stages: vec![stage],
            find_max: None,
            imported: None,
        }
    }

    #[test]
    fn a_real_difference_is_told_from_none() {
        let same: Vec<Compared> = (0..10).flat_map(|i| compare(&record(0.1, i), &record(0.1, 100 + i), 1)).collect();
        // Two of a hundred intervals miss on each side; latencies of one run are correlated.
        let wrong = same.iter().filter(|c| c.slower() || c.faster()).count();
        assert!(same.len() == 80 && wrong <= 10, "{wrong} of {}", same.len());
        let slower = compare(&record(0.1, 1), &record(0.12, 2), 1);
        let e2e = slower.iter().find(|c| c.measure == "e2e" && c.q == 0.5).unwrap();
        assert!(e2e.slower() && (e2e.ratio - 1.2).abs() < 0.1, "{e2e:?}");
    }
}
