//! Is the server falling behind? A change-point test on the backlog of an open loop.
//!
//! While a server keeps up, arrivals and completions cancel and the number in flight wanders about a level. Past its
//! capacity the backlog grows by the excess rate for ever. Page's cumulative sum (Page, 1954) of `arrivals − completions −
//! k · arrivals`, held at 0 from below, stays small in the first case and climbs in the second. `k` = 2 % of the arrivals
//! makes even a load at 100 % of capacity drift down. For a walk of variance σ² a request with that drift the chance to
//! reach h is exp(−2kh/σ²); h grows with the measured σ². Times are not assumed: no threshold on latency, so a fast server that
//! saturates is seen as well as a slow one. The sum starts when the first requests are through, else the filling of the
//! server would look like growth.

/// Allowance, as a share of arrivals.
const ALLOWANCE: f64 = 0.02;
/// Height of the alarm, in requests per unit of variance: the least of 60, 90, 120 with at most 2 % false alarms on the
/// simulator (`sim.rs`), where 60 gave 10 %.
const HEIGHT: f64 = 90.0;
/// The variance is taken over blocks of so many arrivals.
const BLOCK: u64 = 16;
/// The filling time is judged after every so many ends of requests.
const FILL_SAMPLES: usize = 20;

/// State of the test.
#[derive(Clone, Debug, Default)]
pub struct Saturation {
    arrivals: u64,
    completions: u64,
    fill_durations: Vec<u64>,
    start_ns: Option<u64>,
    sum: f64,
    last_zero_ns: u64,
    block_arrivals: u64,
    block_net: f64,
    last_block: Option<f64>,
    squares: f64,
    blocks: u64,
    alarm: Option<Alarm>,
}

/// The server fell behind.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Alarm {
    /// When it was known.
    pub at_ns: u64,
    /// Since when, as the sum says.
    pub since_ns: u64,
    /// Growth of the backlog, requests a second.
    pub growth_per_second: f64,
}

impl Saturation {
    /// A request arrived (its scheduled time).
    pub fn arrival(&mut self, now_ns: u64) {
        self.arrivals += 1;
        self.step(now_ns, 1.0);
    }

    /// A request that was scheduled at `scheduled_ns` ended, well or badly.
    pub fn completion(&mut self, now_ns: u64, scheduled_ns: u64) {
        self.completions += 1;
        if self.start_ns.is_none() {
            self.fill_durations.push(now_ns.saturating_sub(scheduled_ns));
            // Three times the median duration so far: then what began first has left. Early answers are the short ones, so
            // the median is taken anew until the time has caught up with it.
            if self.fill_durations.len().is_multiple_of(FILL_SAMPLES) {
                let mut sorted = self.fill_durations.clone();
                sorted.sort_unstable();
                let median = sorted[sorted.len() / 2];
                if now_ns >= median.saturating_mul(3) {
                    self.start_ns = Some(now_ns);
                    self.last_zero_ns = now_ns;
                }
            }
            return;
        }
        self.step(now_ns, -1.0);
    }

    /// The alarm, if it was raised.
    pub fn alarm(&self) -> Option<Alarm> {
        self.alarm
    }

    fn step(&mut self, now_ns: u64, net: f64) {
        if self.start_ns.is_none() {
            return;
        }
        self.block_net += net;
        if net > 0.0 {
            self.block_arrivals += 1;
            if self.block_arrivals == BLOCK {
                // Differences of neighbours: a drift does not count as variance.
                if let Some(last) = self.last_block {
                    self.squares += (self.block_net - last).powi(2) / 2.0;
                    self.blocks += 1;
                }
                self.last_block = Some(self.block_net);
                (self.block_arrivals, self.block_net) = (0, 0.0);
            }
        }
        self.sum += if net > 0.0 { 1.0 - ALLOWANCE } else { -1.0 };
        if self.sum <= 0.0 {
            (self.sum, self.last_zero_ns) = (0.0, now_ns);
        }
        if self.alarm.is_none() && self.blocks >= 4 && self.sum > self.height() {
            let seconds = now_ns.saturating_sub(self.last_zero_ns) as f64 * 1e-9;
            let growth_per_second = self.sum / seconds.max(1e-9);
            self.alarm = Some(Alarm { at_ns: now_ns, since_ns: self.last_zero_ns, growth_per_second });
        }
    }

    /// Variance a request, between a half (a metronome) and eight.
    fn height(&self) -> f64 {
        let variance = self.squares / self.blocks.max(1) as f64 / BLOCK as f64;
        HEIGHT * variance.clamp(0.5, 8.0)
    }
}
