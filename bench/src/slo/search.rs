//! The highest rate that meets an objective.
//!
//! Rates double (or halve) until one passes and a higher one fails, then the bracket is halved. Each rate is a sequential
//! test: an undecided rate gets twice as many requests, up to four looks, the first of which must be the surest; what is still
//! undecided lies so near the limit that nothing practical could decide it, and the search goes on at its two sides. The
//! result is the bracket: the highest rate that passed and the lowest that failed.

use serde::{Deserialize, Serialize};

use crate::load::error::{LoadError, Result};
use crate::load::trace::RequestTrace;
use crate::slo::verdict::{Verdict, judge_clause, overall};
use crate::slo::{Measure, Slo};

/// Confidence of each look at a rate, two-sided. A short look sees little of how requests queue together and is surer of itself than it
/// should be: with 0.99 for all of them, from 400 requests on, 84 of 100 simulated searches held the truth.
const CONFIDENCE: [f64; 4] = [0.9995, 0.999, 0.997, 0.99];

/// What a search varies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Requests a second of an open loop.
    #[default]
    Rate,
    /// Streams of a closed loop, whole numbers.
    Streams,
    /// How many times as fast as its data says a trace is replayed.
    Speed,
}

impl Unit {
    /// After a number.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rate => "requests/s",
            Self::Streams => "streams",
            Self::Speed => "times the trace's speed",
        }
    }

    /// What is highest.
    pub fn what(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Streams => "concurrency",
            Self::Speed => "speed",
        }
    }
}

/// How far to search. Where it says rate, streams or speeds are meant as well.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SearchOptions {
    /// First rate tried, requests a second.
    pub start: f64,
    /// No rate above this.
    pub ceiling: f64,
    /// Requests of a first look, after warm-up.
    pub requests: usize,
    /// Stop when the bracket is this narrow, relative to its lower end.
    pub tolerance: f64,
    /// Rates at most.
    pub max_rates: usize,
    /// What the numbers are.
    pub unit: Unit,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self { start: 1.0, ceiling: 1e5, requests: 400, tolerance: 0.05, max_rates: 24, unit: Unit::Rate }
    }
}

/// Requests of one stage in the order of their schedule, warm-up left out.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Requests.
    pub traces: Vec<RequestTrace>,
    /// Whole answers a second.
    pub rate: f64,
    /// The server fell behind: no objective is met for long at this rate.
    pub saturated: bool,
    /// The client could not keep the schedule: nothing is known of the server.
    pub client_limited: bool,
}

/// A rate and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// Requests a second.
    pub rate: f64,
    /// Requests judged.
    pub requests: usize,
    /// Smallest margin of a clause: share attained less the share asked.
    pub margin: f64,
    /// Whole answers a second of the last look.
    #[serde(default)]
    pub requests_per_second: f64,
    /// Outcome.
    pub verdict: Verdict,
    /// The saturation test spoke.
    pub saturated: bool,
}

/// The highest rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FindMax {
    /// Objective.
    pub slo: Slo,
    /// What `low`, `high` and the rates tried are.
    #[serde(default)]
    pub unit: Unit,
    /// Highest rate that passed; 0 when none did.
    pub low: f64,
    /// Lowest rate that failed; the ceiling when none did.
    pub high: f64,
    /// Whether a rate failed at all.
    pub bounded: bool,
    /// Middle of the bracket.
    pub estimate: f64,
    /// Every rate, in order.
    pub tried: Vec<Tried>,
    /// Why the search ended.
    pub stopped_by: String,
}

impl FindMax {
    /// Requests a second the server bears: `low`, or what was answered with so many streams, at such a speed.
    pub fn rate(&self) -> f64 {
        if self.unit == Unit::Rate {
            return self.low;
        }
        let passed = self.tried.iter().filter(|t| t.verdict == Verdict::Met && t.rate <= self.low);
        passed.map(|t| t.requests_per_second).fold(0.0, f64::max)
    }
}

/// Searches. `probe(rate, requests, look)` runs a stage of so many requests; looks of one rate are pooled.
pub fn find_max(
    slo: &Slo,
    options: &SearchOptions,
    probe: &mut dyn FnMut(f64, usize, u32) -> Result<Probe>,
) -> Result<FindMax> {
    if slo.clauses.iter().all(|c| c.measure == Measure::Rps) {
        return Err(LoadError::option(
            &slo.name,
            "limits no latency, so every rate is good",
            "add a clause such as ttft_p99<=200",
        ));
    }
    let mut tried: Vec<Tried> = Vec::new();
    let (mut low, mut high) = (0.0f64, f64::INFINITY);
    // The undecided stretch between them.
    let mut middle: Option<(f64, f64)> = None;
    let mut next = options.start.min(options.ceiling);
    let stopped_by = loop {
        if tried.len() >= options.max_rates {
            break "rates at most";
        }
        let result = test(slo, next, options.requests, probe)?;
        let Some(result) = result else { break "client limited" };
        let verdict = result.verdict;
        tried.push(result);
        match verdict {
            Verdict::Met => low = low.max(next),
            Verdict::Broken => high = high.min(next),
            Verdict::Inconclusive => middle = Some(middle.map_or((next, next), |(a, b)| (a.min(next), b.max(next)))),
        }
        // A decided rate beyond an undecided one overrules it.
        middle = middle.map(|(a, b)| (a.max(low), b.min(high))).filter(|(a, b)| low < *b && *a < high);
        if low >= options.ceiling {
            break "ceiling";
        }
        let whole = options.unit == Unit::Streams;
        if low == 0.0 && (next <= options.start / 1024.0 || whole && next <= 1.0) {
            break "no rate passes";
        }
        next = if high.is_infinite() {
            (middle.map_or(next, |m| m.1).max(next) * 2.0).min(options.ceiling)
        } else if low == 0.0 {
            middle.map_or(high, |m| m.0) / 2.0
        } else {
            let (a, b) = middle.unwrap_or((f64::NAN, f64::NAN));
            let left = if a.is_nan() { high - low } else { a - low };
            let right = if b.is_nan() { 0.0 } else { high - b };
            if left.max(right) <= options.tolerance * low {
                break "tolerance";
            }
            match (a.is_nan(), left >= right) {
                (true, _) => (low + high) / 2.0,
                (_, true) => (low + a) / 2.0,
                _ => (b + high) / 2.0,
            }
        };
        if whole {
            next = next.round().max(1.0);
            if tried.iter().any(|t| t.rate == next) {
                break "neighbours";
            }
        }
    };
    let bounded = high.is_finite();
    let high = if bounded { high } else { options.ceiling };
    Ok(FindMax {
        slo: slo.clone(),
        unit: options.unit,
        low,
        high,
        bounded,
        estimate: (low + high) / 2.0,
        tried,
        stopped_by: stopped_by.into(),
    })
}

/// Tests one rate; `None` when the client was the limit.
fn test(
    slo: &Slo,
    rate: f64,
    requests: usize,
    probe: &mut dyn FnMut(f64, usize, u32) -> Result<Probe>,
) -> Result<Option<Tried>> {
    let mut pooled: Vec<RequestTrace> = Vec::new();
    let mut saturated = false;
    for (look, &confidence) in CONFIDENCE.iter().enumerate() {
        let got = probe(rate, requests << look, look as u32)?;
        if got.client_limited {
            return Ok(None);
        }
        saturated |= got.saturated;
        pooled.extend(got.traces);
        let refs: Vec<&RequestTrace> = pooled.iter().collect();
        let clauses: Vec<_> = slo.clauses.iter().map(|c| judge_clause(&refs, c, got.rate, confidence)).collect();
        let margins =
            slo.clauses.iter().zip(&clauses).filter(|(c, _)| c.measure != Measure::Rps).map(|(c, v)| v.attained - c.q);
        let margin = margins.fold(f64::INFINITY, f64::min);
        let verdict = if saturated { Verdict::Broken } else { overall(&clauses) };
        if verdict != Verdict::Inconclusive || look + 1 == CONFIDENCE.len() {
            let requests_per_second = got.rate;
            return Ok(Some(Tried { rate, requests: pooled.len(), margin, requests_per_second, verdict, saturated }));
        }
    }
    Err(LoadError::Samples("a rate was never looked at".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::schedule::{Arrivals, Schedule};
    use crate::load::sim::{Queue, Service, mmc_wait_exceeds, watch};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    /// The rate at which just 90 % of a queue's requests wait at most 100 ms, by bisection of the share that waits longer.
    fn truth(capacity: f64, longer: impl Fn(f64) -> f64) -> f64 {
        let (mut low, mut high) = (0.3 * capacity, capacity);
        for _ in 0..14 {
            let mid = (low + high) / 2.0;
            if longer(mid) < 0.1 { low = mid } else { high = mid }
        }
        low
    }

    /// Share of two million requests that wait longer than 100 ms: no formula is known beyond exponential service. The same draws at every
    /// rate, so that bisection sees one curve.
    fn simulated(q: &Queue, rate: f64) -> f64 {
        const REQUESTS: usize = 2_000_000;
        let mut rng = StdRng::seed_from_u64(77);
        let mut free = vec![0u64; q.servers];
        let schedule = Schedule::new(rate, Arrivals::Poisson, 78).unwrap();
        let late = schedule.take(REQUESTS).filter(|&at| {
            let first = (0..free.len()).min_by_key(|&i| free[i]).unwrap();
            let start = free[first].max(at);
            free[first] = start + (q.service.draw(&mut rng) * 1e9) as u64;
            start - at > 100_000_000
        });
        late.count() as f64 / REQUESTS as f64
    }

    /// Searches of which the interval holds the truth, of 100, and their mean width.
    fn coverage(q: &Queue, want: f64, requests: usize) -> (u32, f64) {
        let slo = Slo::parse("ttft_p90<=100").unwrap();
        let options = SearchOptions { requests, ..SearchOptions::default() };
        let (mut covered, mut width) = (0, 0.0);
        for run in 0..100u64 {
            let mut seed = run * 1000;
            let found = find_max(&slo, &options, &mut |rate, requests, _| {
                seed += 1;
                let warm = requests / 4;
                let traces = q.run(rate, Arrivals::Poisson, requests + warm, seed)?;
                let saturated = watch(&traces).is_some();
                let traces = waits(&traces, q.servers).split_off(warm);
                Ok(Probe { traces, rate, saturated, client_limited: false })
            })
            .unwrap();
            assert!(found.bounded && found.low > 0.0, "{found:?}");
            covered += u32::from(found.low <= want && want <= found.high);
            width += (found.high - found.low) / want / 100.0;
        }
        (covered, width)
    }

    /// The interval holds the truth in at least 90 of 100 simulated searches: for two laws of service, from the first look the command line
    /// takes and from a longer one.
    #[test]
    fn the_interval_covers_the_truth() {
        // The first token comes when service starts: TTFT is the wait.
        let memoryless = Queue { servers: 4, service: Service::Exponential(0.1), tokens: 1, failures: 0.0 };
        let heavy = Queue { service: Service::LogNormal(0.1, 1.5), ..memoryless };
        let exact = truth(memoryless.capacity(), |rate| mmc_wait_exceeds(rate, 4, 0.1, 0.1));
        // The simulation finds what the formula says.
        let found = truth(memoryless.capacity(), |rate| simulated(&memoryless, rate));
        assert!((found / exact - 1.0).abs() < 0.01, "{found}, by the formula {exact}");
        for (q, want) in [(&memoryless, exact), (&heavy, truth(heavy.capacity(), |rate| simulated(&heavy, rate)))] {
            for requests in [SearchOptions::default().requests, 1000] {
                let (covered, width) = coverage(q, want, requests);
                assert!(covered >= 90, "{:?}, {requests} requests first: {covered} of 100", q.service);
                assert!(width < 0.4, "{:?}, {requests} requests first: {width} wide, right and of no use", q.service);
            }
        }
    }

    /// First tokens at the start of service: the instant a server became free for the request.
    fn waits(traces: &[RequestTrace], servers: usize) -> Vec<RequestTrace> {
        let mut free = vec![0u64; servers];
        traces
            .iter()
            .map(|t| {
                let at = free.iter().enumerate().min_by_key(|f| f.1).map_or(0, |f| f.0);
                let start = free[at].max(t.scheduled_ns);
                free[at] = t.end_ns;
                RequestTrace { chunks_ns: vec![start], ..t.clone() }
            })
            .collect()
    }

    /// First tokens that take 10 ms a stream: ten streams keep to 100 ms, eleven do not.
    #[test]
    fn streams_are_whole_numbers() {
        let options = SearchOptions { unit: Unit::Streams, ceiling: 64.0, requests: 100, ..SearchOptions::default() };
        let search = |limit: f64| {
            let slo = Slo::parse(&format!("ttft_p90<={limit}")).unwrap();
            find_max(&slo, &options, &mut |streams, n, _| {
                assert_eq!(streams.fract(), 0.0);
                let q = Queue { servers: 1000, service: Service::Constant(0.01 * streams), tokens: 1, failures: 0.0 };
                let traces = q.run(1.0, Arrivals::Constant, n, 1)?;
                Ok(Probe { traces, rate: 50.0 + streams, saturated: false, client_limited: false })
            })
            .unwrap()
        };
        let found = search(101.0);
        assert_eq!((found.low, found.high, found.stopped_by.as_str()), (10.0, 11.0, "neighbours"), "{found:?}");
        // What capacity plans with is a rate.
        assert_eq!((found.unit, found.rate()), (Unit::Streams, 60.0));
        let none = search(5.0);
        assert_eq!((none.low, none.rate(), none.stopped_by.as_str()), (0.0, 0.0, "no rate passes"));
        let all = search(1e9);
        assert!((all.low, all.bounded) == (64.0, false), "{all:?}");
    }

    #[test]
    fn a_hopeless_objective_and_a_client_at_its_limit_are_told() {
        let q = Queue { servers: 1, service: Service::Constant(1.0), tokens: 1, failures: 0.0 };
        let slo = Slo::parse("ttft_p90<=100").unwrap();
        let none = find_max(&slo, &SearchOptions::default(), &mut |rate, n, _| {
            Ok(Probe { traces: q.run(rate, Arrivals::Poisson, n, 1)?, rate, saturated: false, client_limited: false })
        })
        .unwrap();
        assert_eq!((none.low, none.stopped_by.as_str()), (0.0, "no rate passes"));
        let fast = Queue { servers: 1, service: Service::Constant(1e-6), tokens: 1, failures: 0.0 };
        let all = find_max(&slo, &SearchOptions { ceiling: 64.0, ..SearchOptions::default() }, &mut |rate, n, _| {
            Ok(Probe {
                traces: fast.run(rate, Arrivals::Poisson, n, 1)?,
                rate,
                saturated: false,
                client_limited: false,
            })
        })
        .unwrap();
        assert!(!all.bounded && all.low == 64.0 && all.stopped_by == "ceiling");
        assert!(
            find_max(&Slo::parse("rps>=1").unwrap(), &SearchOptions::default(), &mut |_, _, _| unreachable!()).is_err()
        );
    }
}
