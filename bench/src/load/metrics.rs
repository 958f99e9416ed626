//! Numbers out of traces. The names are the definitions:
//!
//! | name | per | definition |
//! |---|---|---|
//! | `ttft_ms` | request | first output − scheduled start (closed loop: − when the stream was free) |
//! | `ttft_from_send_ms` | request | first output − start of sending |
//! | `e2e_ms` | request | end of the response − scheduled start |
//! | `e2e_from_send_ms` | request | end of the response − start of sending |
//! | `itl_request_mean_ms` | request | (last output − first output) / (tokens − 1) |
//! | `tpot_excl_ms` | request | (end − first output) / (tokens − 1) |
//! | `tpot_incl_ms` | request | (last output − start of sending) / tokens: the first token's wait is inside |
//! | `icl_chunk_ms` | gap | between neighbouring chunks with output |
//! | `itl_token_ms` | gap | between neighbouring tokens; tokens that came in one chunk are 0 apart; only where the tokens of every chunk are known |
//! | `schedule_delay_ms` | request | start of sending − scheduled start |

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::load::percentile::{Samples, Summary};
use crate::load::trace::RequestTrace;

/// The part of a stage that counts, nanoseconds from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// After the warm-up.
    pub from_ns: u64,
    /// Before the cool-down.
    pub to_ns: u64,
}

impl Window {
    /// Length in seconds.
    pub fn seconds(&self) -> f64 {
        self.to_ns.saturating_sub(self.from_ns) as f64 * 1e-9
    }

    fn holds(&self, t: u64) -> bool {
        (self.from_ns..self.to_ns).contains(&t)
    }
}

/// How much of a stage's two ends is left out: below 1 a share of it, else seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trim {
    /// At the start.
    pub warmup: f64,
    /// At the end.
    pub cooldown: f64,
}

impl Trim {
    /// Window of a stage whose last request could have started at `stop_ns`.
    pub fn window(&self, stop_ns: u64) -> Window {
        let part = |v: f64| if v < 1.0 { v.max(0.0) * stop_ns as f64 } else { v * 1e9 } as u64;
        let to = stop_ns.saturating_sub(part(self.cooldown));
        Window { from_ns: part(self.warmup).min(to), to_ns: to }
    }
}

/// Rates over the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Whole answers that ended in it, a second.
    pub requests_per_second: f64,
    /// Prompt tokens of those.
    pub input_tokens_per_second: f64,
    /// Output tokens that arrived in it, a second.
    pub output_tokens_per_second: f64,
    /// Mean number of requests in flight, weighted by time.
    pub mean_concurrency: f64,
    /// Most at once.
    pub peak_concurrency: u64,
}

/// What a stage came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// What counts.
    pub window: Window,
    /// Requests scheduled inside the window, by how they ended (`ok`, `status 429`, ...).
    pub outcomes: BTreeMap<String, u64>,
    /// Requests outside the window.
    pub trimmed: u64,
    /// Rates.
    pub rates: Rates,
    /// Latencies in milliseconds, under the names above.
    pub latency: BTreeMap<String, Summary>,
    /// Tokens of the prompts of whole answers.
    pub input_tokens: Option<Summary>,
    /// Tokens of whole answers.
    pub output_tokens: Option<Summary>,
    /// Who counted output tokens: `server usage`, `chunks`, or `mixed`.
    pub counted_by: String,
    /// Why `itl_token_ms` is missing, where it is.
    pub itl_token_missing: Option<String>,
    /// Requests in flight over time: seconds, number.
    pub concurrency: Vec<(f64, u64)>,
}

impl Metrics {
    /// A percentile of a latency.
    pub fn percentile(&self, name: &str, q: f64) -> Option<f64> {
        self.latency.get(name).and_then(|s| s.at(q))
    }

    /// Requests that ended well, in the window.
    pub fn ok(&self) -> u64 {
        self.outcomes.get("ok").copied().unwrap_or(0)
    }
}

const MS: f64 = 1e-6;

/// Computes everything. `traces` may be in any order.
pub fn measure(traces: &[RequestTrace], window: Window) -> Metrics {
    let mut inside: Vec<&RequestTrace> = traces.iter().filter(|t| window.holds(t.scheduled_ns)).collect();
    inside.sort_by_key(|t| t.scheduled_ns);
    let mut outcomes = BTreeMap::new();
    for t in &inside {
        *outcomes.entry(t.outcome.class()).or_insert(0) += 1;
    }
    let ok: Vec<&RequestTrace> = inside.iter().copied().filter(|t| t.ok()).collect();
    // Requests that follow each other meet the same queue: blocks of about √n share their luck.
    let block = (ok.len() as f64).sqrt().ceil().max(1.0) as usize;
    let mut samples: BTreeMap<&str, Samples> = BTreeMap::new();
    let (mut input, mut output) = (Samples::default(), Samples::default());
    let mut unknown_tokens = 0u64;
    for (i, t) in ok.iter().enumerate() {
        let cluster = (i / block) as u32;
        let mut put = |name, value: f64, cluster| samples.entry(name).or_default().push(value * MS, cluster);
        let since = |at: u64, from: u64| at.saturating_sub(from) as f64;
        put("schedule_delay_ms", since(t.sent_ns, t.scheduled_ns), cluster);
        put("e2e_ms", since(t.end_ns, t.scheduled_ns), cluster);
        put("e2e_from_send_ms", since(t.end_ns, t.sent_ns), cluster);
        if let Some(n) = t.input_tokens {
            input.push(f64::from(n), cluster);
        }
        output.push(f64::from(t.output_tokens), cluster);
        let (Some(first), Some(last)) = (t.first_ns(), t.last_ns()) else { continue };
        put("ttft_ms", since(first, t.scheduled_ns), cluster);
        put("ttft_from_send_ms", since(first, t.sent_ns), cluster);
        if t.output_tokens > 0 {
            put("tpot_incl_ms", since(last, t.sent_ns) / f64::from(t.output_tokens), cluster);
        }
        if t.output_tokens > 1 && t.chunks_ns.len() > 1 {
            let gaps = f64::from(t.output_tokens - 1);
            put("itl_request_mean_ms", since(last, first) / gaps, cluster);
            put("tpot_excl_ms", since(t.end_ns, first) / gaps, cluster);
        }
        for pair in t.chunks_ns.windows(2) {
            put("icl_chunk_ms", since(pair[1], pair[0]), i as u32);
        }
        match t.tokens_by_chunk() {
            None => unknown_tokens += 1,
            Some(tokens) => {
                for (k, &n) in tokens.iter().enumerate() {
                    let gap = k.checked_sub(1).map(|before| since(t.chunks_ns[k], t.chunks_ns[before]));
                    if let Some(gap) = gap.filter(|_| n > 0) {
                        put("itl_token_ms", gap, i as u32);
                    }
                    for _ in 1..n {
                        put("itl_token_ms", 0.0, i as u32);
                    }
                }
            }
        }
    }
    let mut itl_token_missing = None;
    if unknown_tokens > 0 {
        samples.remove("itl_token_ms");
        itl_token_missing = Some(format!(
            "{unknown_tokens} answers have chunks of several tokens, and the server does not say how many in which"
        ));
    }
    let by_server = ok.iter().filter(|t| t.counted_by_server).count();
    let (concurrency, mean, peak) = concurrency(traces, window);
    Metrics {
        window,
        trimmed: (traces.len() - inside.len()) as u64,
        outcomes,
        rates: rates(traces, window, mean, peak),
        latency: samples.iter().filter_map(|(k, s)| Some((k.to_string(), s.summary()?))).collect(),
        input_tokens: input.summary(),
        output_tokens: output.summary(),
        counted_by: if by_server == ok.len() {
            "server usage"
        } else if by_server == 0 {
            "chunks"
        } else {
            "mixed"
        }
        .into(),
        itl_token_missing,
        concurrency,
    }
}

fn rates(traces: &[RequestTrace], window: Window, mean_concurrency: f64, peak_concurrency: u64) -> Rates {
    let seconds = window.seconds();
    if seconds <= 0.0 {
        return Rates::default();
    }
    let ended: Vec<&RequestTrace> = traces.iter().filter(|t| t.ok() && window.holds(t.end_ns)).collect();
    let input: f64 = ended.iter().map(|t| f64::from(t.input_tokens.unwrap_or(0))).sum();
    let output: f64 = traces
        .iter()
        .map(|t| match t.chunks_ns.len() {
            // A whole answer arrives at its end.
            0 if t.ok() && window.holds(t.end_ns) => f64::from(t.output_tokens),
            0 => 0.0,
            all => {
                let inside = t.chunks_ns.iter().filter(|c| window.holds(**c)).count();
                f64::from(t.output_tokens) * inside as f64 / all as f64
            }
        })
        .sum();
    Rates {
        requests_per_second: ended.len() as f64 / seconds,
        input_tokens_per_second: input / seconds,
        output_tokens_per_second: output / seconds,
        mean_concurrency,
        peak_concurrency,
    }
}

/// Requests in flight, from sending to end: a curve of at most 200 points, the mean over time and the peak.
fn concurrency(traces: &[RequestTrace], window: Window) -> (Vec<(f64, u64)>, f64, u64) {
    let mut steps: Vec<(u64, i64)> =
        traces.iter().flat_map(|t| [(t.sent_ns, 1), (t.end_ns.max(t.sent_ns), -1)]).collect();
    // At one instant ends come first: a stream that goes on at once was never two.
    steps.sort_unstable();
    let (mut level, mut peak, mut area, mut at) = (0i64, 0i64, 0.0, window.from_ns);
    let mut curve = Vec::new();
    let every = window.to_ns.saturating_sub(window.from_ns) / 200 + 1;
    let mut next = window.from_ns;
    for (t, change) in steps.iter().copied().chain([(window.to_ns, 0)]) {
        while next <= t && next < window.to_ns {
            curve.push((next as f64 * 1e-9, level.max(0) as u64));
            // A window may end where numbers do: a record says so.
            next = next.saturating_add(every);
        }
        if t > at {
            let until = t.min(window.to_ns);
            area += level as f64 * until.saturating_sub(at) as f64;
            at = until.max(at);
        }
        level += change;
        if window.holds(t) {
            peak = peak.max(level);
        }
    }
    let length = window.to_ns.saturating_sub(window.from_ns) as f64;
    (curve, if length > 0.0 { area / length } else { 0.0 }, peak.max(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::trace::Outcome;

    fn trace(scheduled: u64, sent: u64, chunks: &[u64], end: u64, tokens: u32) -> RequestTrace {
        let ms = |v: u64| v * 1_000_000;
        RequestTrace {
            scheduled_ns: ms(scheduled),
            sent_ns: ms(sent),
            chunks_ns: chunks.iter().map(|&c| ms(c)).collect(),
            chunk_tokens: Vec::new(),
            end_ns: ms(end),
            input_tokens: Some(10),
            output_tokens: tokens,
            counted_by_server: true,
            outcome: Outcome::Ok,
        }
    }

    /// One answer worked by hand: scheduled at 10, sent at 12, chunks at 20, 24, 30, over at 31.
    #[test]
    fn definitions_by_hand() {
        let all = Window { from_ns: 0, to_ns: 100_000_000 };
        let m = measure(&[trace(10, 12, &[20, 24, 30], 31, 3)], all);
        let mean = |n: &str| m.latency[n].mean;
        let near = |n: &str, want: f64| assert!((mean(n) - want).abs() < 1e-9, "{n}: {} not {want}", mean(n));
        near("schedule_delay_ms", 2.0);
        near("ttft_ms", 10.0);
        near("ttft_from_send_ms", 8.0);
        near("e2e_ms", 21.0);
        near("itl_request_mean_ms", 5.0);
        near("tpot_excl_ms", 5.5);
        near("tpot_incl_ms", 6.0);
        near("icl_chunk_ms", 5.0);
        near("itl_token_ms", 5.0);
        assert!(
            (m.rates.requests_per_second - 10.0).abs() < 1e-9 && (m.rates.output_tokens_per_second - 30.0).abs() < 1e-9
        );
        assert!((m.rates.mean_concurrency - 0.19).abs() < 1e-9 && m.rates.peak_concurrency == 1);
    }

    #[test]
    fn chunks_of_several_tokens_are_told_apart_or_refused() {
        let all = Window { from_ns: 0, to_ns: 100_000_000 };
        let mut t = trace(0, 0, &[10, 20], 20, 5);
        let m = measure(std::slice::from_ref(&t), all);
        assert!(m.itl_token_missing.is_some() && !m.latency.contains_key("itl_token_ms"));
        assert_eq!(m.latency["icl_chunk_ms"].n, 1);
        t.chunk_tokens = vec![2, 3];
        let m = measure(&[t], all);
        // Gaps: 0 inside the first chunk; 10, then 0 and 0 in the second.
        assert_eq!((m.latency["itl_token_ms"].n, m.latency["itl_token_ms"].max), (4, 10.0));
        assert!((m.latency["itl_token_ms"].mean - 2.5).abs() < 1e-9);
    }

    #[test]
    fn ends_are_trimmed_by_schedule() {
        let stop = 100_000_000;
        assert_eq!(Trim { warmup: 0.1, cooldown: 0.2 }.window(stop), Window { from_ns: 10_000_000, to_ns: 80_000_000 });
        let traces = [trace(5, 5, &[6, 7], 7, 2), trace(50, 50, &[51, 52], 52, 2), trace(90, 90, &[91, 92], 92, 2)];
        let m = measure(&traces, Trim { warmup: 0.1, cooldown: 0.2 }.window(stop));
        assert_eq!((m.ok(), m.trimmed), (1, 2));
        let empty = measure(&[], Window { from_ns: 0, to_ns: 0 });
        assert!(empty.latency.is_empty() && empty.rates.requests_per_second == 0.0);
    }
}
