//! Counters under the names that vLLM gave them, in Prometheus' text format.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::engine::Finish;

/// Upper bounds of latency buckets, in seconds.
const BOUNDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// A histogram of durations.
#[derive(Default)]
pub struct Histogram {
    counts: [AtomicU64; 19],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Counts one.
    pub fn observe(&self, d: Duration) {
        let at = BOUNDS.iter().position(|b| d.as_secs_f64() <= *b).unwrap_or(BOUNDS.len());
        self.counts[at].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(d.as_micros() as u64, Relaxed);
    }

    fn count(&self) -> u64 {
        self.counts.iter().map(|c| c.load(Relaxed)).sum()
    }

    fn write(&self, out: &mut String, name: &str, help: &str, model: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut below = 0;
        for (i, count) in self.counts.iter().enumerate() {
            below += count.load(Relaxed);
            let bound = BOUNDS.get(i).map_or("+Inf".to_string(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{model_name=\"{model}\",le=\"{bound}\"}} {below}");
        }
        let sum = self.sum_us.load(Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum{{model_name=\"{model}\"}} {sum}");
        let _ = writeln!(out, "{name}_count{{model_name=\"{model}\"}} {below}");
    }
}

/// Everything counted.
#[derive(Default)]
pub struct Metrics {
    /// Sequences with a slot.
    pub running: AtomicUsize,
    /// Sequences without.
    pub waiting: AtomicUsize,
    /// Pages held and pages there are.
    pub pages: [AtomicUsize; 2],
    /// Prompt tokens computed or taken over.
    pub prompt: AtomicU64,
    /// Tokens generated.
    pub generated: AtomicU64,
    /// Prompt tokens looked for in the prefix cache, and found.
    pub prefix: [AtomicU64; 2],
    /// Draft rounds, tokens proposed, tokens accepted.
    pub drafts: [AtomicU64; 3],
    /// Requests refused for want of room.
    pub refused: AtomicU64,
    /// Answers given up because the client went away.
    pub cancelled: AtomicU64,
    finished: [AtomicU64; 2],
    /// From arrival to the first token.
    pub first_token: Histogram,
    /// Between two tokens of a sequence.
    pub inter_token: Histogram,
    /// From arrival to admission.
    pub queue: Histogram,
    /// From arrival to the end.
    pub latency: Histogram,
}

impl Metrics {
    /// Counts an answer that ended well.
    pub fn finished(&self, finish: Finish, latency: Duration) {
        self.finished[usize::from(finish == Finish::Length)].fetch_add(1, Relaxed);
        self.latency.observe(latency);
    }

    /// Mean latency of an answer, in seconds.
    pub fn mean_latency(&self) -> Option<f64> {
        let n = self.latency.count();
        (n > 0).then(|| self.latency.sum_us.load(Relaxed) as f64 / 1e6 / n as f64)
    }

    /// The text of `/metrics`.
    pub fn render(&self, model: &str) -> String {
        let model = model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let mut out = String::new();
        let mut one = |kind: &str, name: &str, help: &str, labels: &str, value: f64| {
            if !labels.contains("length") {
                let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            }
            let _ = writeln!(out, "{name}{{model_name=\"{model}\"{labels}}} {value}");
        };
        let [held, all] = &self.pages;
        let share = held.load(Relaxed) as f64 / (all.load(Relaxed) as f64).max(1.0);
        let gauge = |v: &AtomicUsize| v.load(Relaxed) as f64;
        one("gauge", "vllm:num_requests_running", "Sequences that run.", "", gauge(&self.running));
        one("gauge", "vllm:num_requests_waiting", "Sequences that wait.", "", gauge(&self.waiting));
        one("gauge", "vllm:kv_cache_usage_perc", "Pages held, as a fraction of all.", "", share);
        one("gauge", "lowbit:kv_cache_pages", "Pages held.", "", gauge(held));
        let total = |v: &AtomicU64| v.load(Relaxed) as f64;
        let [asked, found] = &self.prefix;
        one("counter", "vllm:prefix_cache_queries_total", "Prompt tokens looked up.", "", total(asked));
        one("counter", "vllm:prefix_cache_hits_total", "Prompt tokens found.", "", total(found));
        one("counter", "vllm:prompt_tokens_total", "Prompt tokens.", "", total(&self.prompt));
        one("counter", "vllm:generation_tokens_total", "Tokens generated.", "", total(&self.generated));
        let [rounds, proposed, accepted] = &self.drafts;
        one("counter", "vllm:spec_decode_num_drafts_total", "Draft rounds.", "", total(rounds));
        one("counter", "vllm:spec_decode_num_draft_tokens_total", "Tokens proposed.", "", total(proposed));
        one("counter", "vllm:spec_decode_num_accepted_tokens_total", "Tokens accepted.", "", total(accepted));
        let ended = "vllm:request_success_total";
        one(
            "counter",
            ended,
            "Answers, by reason of their end.",
            ",finished_reason=\"stop\"",
            total(&self.finished[0]),
        );
        one("counter", ended, "", ",finished_reason=\"length\"", total(&self.finished[1]));
        one("counter", "vllm:num_preemptions_total", "Sequences thrown out.", "", 0.0);
        one("counter", "lowbit:requests_refused_total", "Requests answered 429.", "", total(&self.refused));
        one("counter", "lowbit:requests_cancelled_total", "Clients that went away.", "", total(&self.cancelled));
        for (h, name, help) in [
            (&self.first_token, "vllm:time_to_first_token_seconds", "From arrival to the first token."),
            (&self.inter_token, "vllm:inter_token_latency_seconds", "Between two tokens of a sequence."),
            (&self.queue, "vllm:request_queue_time_seconds", "From arrival to admission."),
            (&self.latency, "vllm:e2e_request_latency_seconds", "From arrival to the end."),
        ] {
            h.write(&mut out, name, help, &model);
        }
        out
    }
}
