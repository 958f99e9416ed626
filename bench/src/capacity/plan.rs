//! From load records of several variants: servers for a peak rate, and what a million tokens costs.
//!
//! `servers = ceil(peak · burst / (λ · headroom)) + spare`, λ being the lower bound of the highest rate that meets the objective:
//! the low end of a `--find-max` bracket (over streams: the rate answered there), or the highest open-loop stage whose verdict is `met` below every stage that is
//! broken. Dollars a million output tokens divide the fleet's price by the tokens of the peak load, not of a saturated server.

use lowbit_checkpoint::provenance::Provenance;
use serde::{Deserialize, Serialize};

use crate::capacity::room::Room;
use crate::load::record::{LoadRecord, StageRecord};
use crate::slo::Slo;
use crate::slo::verdict::{Verdict, judge};

/// What is planned for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanOptions {
    /// Requests a second at the peak.
    pub peak_rps: f64,
    /// Price of a server's GPU for an hour.
    pub gpu_hour: f64,
    /// GPUs a server.
    pub gpus: u32,
    /// Bursts within the peak, as a factor.
    pub burst: f64,
    /// Share of λ a server is loaded to.
    pub headroom: f64,
    /// Servers that may fail.
    pub spare: u64,
    /// Objective; `None` takes that of the records.
    pub slo: Option<Slo>,
}

/// A variant.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Name.
    pub name: String,
    /// Its load.
    pub load: LoadRecord,
    /// Verdict on its accuracy, where given: `pass` or another word.
    pub accuracy: Option<String>,
    /// Its memory, where that was measured.
    pub room: Option<Room>,
}

/// What came of a variant: a point of the quality, latency, cost chart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanRow {
    /// Name.
    pub name: String,
    /// Rate a server bears, requests a second.
    pub rate: Option<f64>,
    /// Where the rate comes from.
    pub rate_from: String,
    /// Servers, spares included.
    pub servers: Option<u64>,
    /// Price of an hour of the fleet.
    pub dollars_per_hour: Option<f64>,
    /// Price of a million output tokens at the peak.
    pub dollars_per_million_output: Option<f64>,
    /// Median time to first token at what a server is planned for (the peak with its bursts, spares being down), on a straight line
    /// between the neighbouring stages, ms.
    pub ttft_p50_ms: Option<f64>,
    /// Verdict on accuracy.
    pub accuracy: Option<String>,
    /// Memory of a server, where the record of a bench lies beside the load's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<Room>,
    /// Why it cannot be used; empty when it can.
    pub infeasible: Vec<String>,
}

/// Version of the format.
pub const SCHEMA: u32 = 1;

/// `capacity.json`: what `lowbit capacity` came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CapacityRecord {
    /// Format of this record.
    #[serde(deserialize_with = "lowbit_checkpoint::provenance::known_schema::<_, SCHEMA>")]
    pub schema: u32,
    /// Where it came from.
    pub provenance: Provenance,
    /// What was planned for.
    pub options: PlanOptions,
    /// Every variant.
    pub variants: Vec<PlanRow>,
    /// The cheapest that can be used.
    pub best: Option<String>,
}

/// Every variant, and the cheapest that can be used.
pub fn plan(variants: &[Variant], o: &PlanOptions) -> (Vec<PlanRow>, Option<String>) {
    let rows: Vec<PlanRow> = variants.iter().map(|v| row(v, o)).collect();
    let usable = rows.iter().filter(|r| r.infeasible.is_empty());
    let best = usable.min_by(|a, b| {
        a.dollars_per_hour.unwrap_or(f64::INFINITY).total_cmp(&b.dollars_per_hour.unwrap_or(f64::INFINITY))
    });
    let name = best.map(|r| r.name.clone());
    (rows, name)
}

fn row(v: &Variant, o: &PlanOptions) -> PlanRow {
    let (rate, rate_from) = rate(&v.load, o.slo.as_ref());
    let mut infeasible = Vec::new();
    if rate.is_none() {
        infeasible.push(rate_from.clone());
    }
    if let Some(a) = v.accuracy.as_ref().filter(|a| !a.eq_ignore_ascii_case("pass")) {
        infeasible.push(format!("accuracy: {a}"));
    }
    infeasible.extend(v.room.as_ref().and_then(Room::refuses));
    let servers = rate.map(|r| (o.peak_rps * o.burst / (r * o.headroom)).ceil().max(1.0) as u64 + o.spare);
    let dollars_per_hour = servers.map(|s| s as f64 * f64::from(o.gpus) * o.gpu_hour);
    let valid: Vec<_> = v.load.valid().collect();
    let output = valid.iter().filter_map(|s| s.metrics.output_tokens.as_ref()).map(|t| t.mean).next_back();
    let dollars_per_million_output = dollars_per_hour.zip(output).map(|(d, t)| d / (3600.0 * o.peak_rps * t) * 1e6);
    let planned = servers.map(|s| o.peak_rps * o.burst / s.saturating_sub(o.spare).max(1) as f64);
    PlanRow {
        name: v.name.clone(),
        rate,
        rate_from,
        servers,
        dollars_per_hour,
        dollars_per_million_output,
        ttft_p50_ms: planned.and_then(|p| ttft_at(&v.load, p)),
        accuracy: v.accuracy.clone(),
        room: v.room.clone(),
        infeasible,
    }
}

/// Median time to first token at a rate: between the measured rates on a straight line, beyond them that of the nearest. Without an
/// open loop the rates are those that closed ones were answered at.
fn ttft_at(load: &LoadRecord, at: f64) -> Option<f64> {
    let measured = |open: bool| {
        let stages = load.valid().filter(|s| s.rate.is_some() == open);
        let point = |s: &StageRecord| {
            Some((s.rate.unwrap_or(s.metrics.rates.requests_per_second), s.metrics.percentile("ttft_ms", 0.5)?))
        };
        let mut points: Vec<(f64, f64)> = stages.filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let mut points = measured(true);
    if points.is_empty() {
        points = measured(false);
    }
    let (below, above) = (points.iter().rfind(|p| p.0 <= at), points.iter().find(|p| p.0 >= at));
    match (below, above) {
        (Some(b), Some(a)) if a.0 > b.0 => Some(b.1 + (a.1 - b.1) * (at - b.0) / (a.0 - b.0)),
        (Some(p), _) | (None, Some(p)) => Some(p.1),
        (None, None) => None,
    }
}

/// Lower bound of the rate a server bears, and its source or why there is none.
fn rate(load: &LoadRecord, slo: Option<&Slo>) -> (Option<f64>, String) {
    if let Some(f) = load.find_max.as_ref().filter(|f| slo.is_none_or(|s| s.clauses == f.slo.clauses)) {
        return match f.rate() > 0.0 {
            true => (Some(f.rate()), "find-max".into()),
            false => (None, "no rate meets the objective".into()),
        };
    }
    if let Some(why) = load.imported.as_ref().zip(slo).and_then(|(i, s)| i.refuses(s)) {
        return (None, why);
    }
    let mut judged: Vec<(f64, Verdict)> = load
        .valid()
        .filter_map(|s| {
            let slo = slo.or(s.slo.as_ref().map(|v| &v.slo))?;
            let v = judge(&s.requests, s.metrics.window, s.metrics.rates.requests_per_second, slo);
            let verdict = if s.saturation.is_some() { Verdict::Broken } else { v.verdict };
            Some((s.rate?, verdict))
        })
        .collect();
    judged.sort_by(|a, b| a.0.total_cmp(&b.0));
    let broken = judged.iter().find(|j| j.1 == Verdict::Broken).map_or(f64::INFINITY, |j| j.0);
    let best = judged.iter().filter(|j| j.1 == Verdict::Met && j.0 < broken).map(|j| j.0).next_back();
    match best {
        Some(r) => (Some(r), "highest stage that meets the objective".into()),
        None if judged.is_empty() => {
            (None, "no valid open-loop stage with an objective: run `lowbit load --find-max --slo ...`".into())
        }
        None => (None, "no stage is shown to meet the objective".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::metrics::{Trim, Window, measure};
    use crate::load::openai::Endpoint;
    use crate::load::record::{ClientCheck, TargetRecord};
    use crate::load::schedule::Arrivals;
    use crate::load::sim::{Queue, Service};

    fn variant(name: &str, service: f64, rates: &[f64], accuracy: Option<&str>) -> Variant {
        let q = Queue { servers: 4, service: Service::Exponential(service), tokens: 10, failures: 0.0 };
        let stages = rates
            .iter()
            .map(|&rate| {
                let requests = q.run(rate, Arrivals::Poisson, 4000, 1).unwrap();
                let window = Window { from_ns: 0, to_ns: u64::MAX / 4 };
                StageRecord {
                    profile: "poisson".into(),
                    rate: Some(rate),
                    streams: None,
                    seconds: 1.0,
                    stopped_by: "requests".into(),
                    rejected: 0,
                    saturation: None,
                    client: ClientCheck {
                        schedule_delay_p99_ms: 0.0,
                        schedule_delay_max_ms: 0.0,
                        cpu_frac: None,
                        connections: 0,
                        resent: 0,
                        invalid: vec![],
                    },
                    metrics: measure(&requests, window),
                    slo: None,
                    requests,
                }
            })
            .collect();
        let target = TargetRecord {
            url: String::new(),
            endpoint: Endpoint::Chat,
            model: name.into(),
            streaming: true,
            exact_output: true,
            server: None,
        };
        let load = LoadRecord {
            schema: 1,
            provenance: Default::default(),
            target,
            data: String::new(),
            trim: Trim::default(),
            stages,
            find_max: None,
            imported: None,
        };
        Variant { name: name.into(), load, accuracy: accuracy.map(str::to_string), room: None }
    }

    #[test]
    fn the_cheapest_that_is_good_enough_wins() {
        let o = PlanOptions {
            peak_rps: 100.0,
            gpu_hour: 2.0,
            gpus: 1,
            burst: 1.5,
            headroom: 0.8,
            spare: 1,
            slo: Some(Slo::parse("e2e_p95<=500").unwrap()),
        };
        // Capacities 40, 80 and 160 a second; the last is fast and wrong.
        let variants = [
            variant("bf16", 0.1, &[10.0, 20.0, 39.9], None),
            variant("w8", 0.05, &[20.0, 40.0, 79.0], Some("pass")),
            variant("w4", 0.025, &[40.0, 80.0], Some("regression")),
            variant("slow", 0.5, &[6.0], None),
        ];
        let (rows, best) = plan(&variants, &o);
        assert_eq!(best.as_deref(), Some("w8"), "{rows:#?}");
        // bf16: 20 a second a server; 100 · 1.5 / (20 · 0.8) = 9.4, so 10 and a spare.
        assert_eq!((rows[0].rate, rows[0].servers, rows[0].dollars_per_hour), (Some(20.0), Some(11), Some(22.0)));
        // 22 $/h over 100 requests of 10 tokens a second: 3.6 million tokens an hour.
        assert!((rows[0].dollars_per_million_output.unwrap() - 22.0 / 3.6).abs() < 1e-9);
        // Each of the ten is planned for 15 a second: half way between two stages.
        let ttft = |i: usize| variants[0].load.stages[i].metrics.percentile("ttft_ms", 0.5).unwrap();
        assert!((rows[0].ttft_p50_ms.unwrap() - (ttft(0) + ttft(1)) / 2.0).abs() < 1e-9);
        assert_eq!(ttft_at(&variants[0].load, 1.0), Some(ttft(0)));
        assert!(rows[2].infeasible[0].contains("regression") && rows[3].infeasible[0].contains("no stage"));
        assert!(rows[3].servers.is_none());
    }
}
