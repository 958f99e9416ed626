//! Counters under the names that vLLM gave them, in Prometheus' text format.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::engine::{Finish, Usage};

/// Upper bounds of latency buckets, in seconds.
const SECONDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Upper bounds of buckets of tokens and answers.
const SIZES: [f64; 18] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5];

/// Counts by bucket, the last of them above every bound, and a sum.
#[derive(Default)]
struct Buckets {
    counts: [AtomicU64; 19],
    sum: AtomicU64,
}

impl Buckets {
    fn observe(&self, bounds: &[f64; 18], value: f64, sum: u64) {
        let at = bounds.iter().position(|b| value <= *b).unwrap_or(bounds.len());
        self.counts[at].fetch_add(1, Relaxed);
        self.sum.fetch_add(sum, Relaxed);
    }

    fn count(&self) -> u64 {
        self.counts.iter().map(|c| c.load(Relaxed)).sum()
    }

    fn write(&self, out: &mut String, (name, help): (&str, &str), labels: &str, bounds: &[f64; 18], units: f64) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut below = 0;
        for (i, count) in self.counts.iter().enumerate() {
            below += count.load(Relaxed);
            let bound = bounds.get(i).map_or("+Inf".to_string(), f64::to_string);
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {below}");
        }
        let sum = self.sum.load(Relaxed) as f64 / units;
        let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}");
        let _ = writeln!(out, "{name}_count{{{labels}}} {below}");
    }
}

/// A histogram of durations.
#[derive(Default)]
pub struct Histogram(Buckets);

impl Histogram {
    /// Counts one.
    pub fn observe(&self, d: Duration) {
        self.0.observe(&SECONDS, d.as_secs_f64(), d.as_micros() as u64);
    }
}

/// A histogram of numbers of tokens or answers.
#[derive(Default)]
pub struct Sizes(Buckets);

impl Sizes {
    /// Counts one.
    pub fn observe(&self, n: usize) {
        self.0.observe(&SIZES, n as f64, n as u64);
    }
}

/// How the cache was made.
#[derive(Debug)]
pub struct CacheConfig {
    /// Tokens of a page.
    pub page_tokens: usize,
    /// How keys and values are kept.
    pub format: &'static str,
    /// Whether prompts are kept for others.
    pub keeps_prompts: bool,
}

/// An answer that ended well.
pub struct Ended {
    /// Why.
    pub finish: Finish,
    /// Tokens read and made.
    pub usage: Usage,
    /// Tokens it was allowed.
    pub max_tokens: usize,
    /// When it came.
    pub arrived: Instant,
    /// When it got a slot.
    pub admitted: Instant,
    /// Its first and its last token.
    pub tokens: Option<(Instant, Instant)>,
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
    /// From admission to the first token, from there to the last, and both.
    spans: [Histogram; 3],
    /// Mean time of an answer's tokens after the first.
    per_token: Histogram,
    /// Tokens of prompts, of answers, and allowed.
    sizes: [Sizes; 3],
    /// Answers that a request asks for.
    pub choices: Sizes,
    /// Set once the cache is made.
    pub cache: OnceLock<CacheConfig>,
}

impl Metrics {
    /// Counts an answer that ended well.
    pub fn finished(&self, e: &Ended) {
        let now = Instant::now();
        self.finished[usize::from(e.finish == Finish::Length)].fetch_add(1, Relaxed);
        self.latency.observe(now.duration_since(e.arrived));
        let (first, last) = e.tokens.unwrap_or((now, now));
        let decode = last.duration_since(first);
        let spans = [first.duration_since(e.admitted), decode, last.duration_since(e.admitted)];
        self.spans.iter().zip(spans).for_each(|(h, d)| h.observe(d));
        if let Some(more) = e.usage.completion.checked_sub(1).filter(|n| *n > 0) {
            self.per_token.observe(decode.div_f64(more as f64));
        }
        let sizes = [e.usage.prompt, e.usage.completion, e.max_tokens];
        self.sizes.iter().zip(sizes).for_each(|(h, n)| h.observe(n));
    }

    /// Mean latency of an answer, in seconds.
    pub fn mean_latency(&self) -> Option<f64> {
        let n = self.latency.0.count();
        (n > 0).then(|| self.latency.0.sum.load(Relaxed) as f64 / 1e6 / n as f64)
    }

    /// The text of `/metrics`.
    pub fn render(&self, model: &str) -> String {
        let model = model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        // One engine, as vLLM numbers them.
        let own = format!("model_name=\"{model}\",engine=\"0\"");
        let mut out = String::new();
        let mut one = |kind: &str, name: &str, help: &str, labels: &str, value: f64| {
            if !labels.contains("length") {
                let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            }
            let _ = writeln!(out, "{name}{{{own}{labels}}} {value}");
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
        if let Some(c) = self.cache.get() {
            let blocks = all.load(Relaxed);
            let prefixes = if c.keeps_prompts { "True" } else { "False" };
            let (page, format) = (c.page_tokens, c.format);
            let labels = format!(
                ",block_size=\"{page}\",cache_dtype=\"{format}\",enable_prefix_caching=\"{prefixes}\",num_gpu_blocks=\"{blocks}\""
            );
            one("gauge", "vllm:cache_config_info", "How the cache was made.", &labels, 1.0);
        }
        let [prefill, decode, inference] = &self.spans;
        for (h, name, help) in [
            (&self.first_token, "vllm:time_to_first_token_seconds", "From arrival to the first token."),
            (&self.inter_token, "vllm:inter_token_latency_seconds", "Between two tokens of a sequence."),
            (
                &self.per_token,
                "vllm:request_time_per_output_token_seconds",
                "Mean of an answer's tokens after the first.",
            ),
            (&self.queue, "vllm:request_queue_time_seconds", "From arrival to admission."),
            (prefill, "vllm:request_prefill_time_seconds", "From admission to the first token."),
            (decode, "vllm:request_decode_time_seconds", "From the first token to the last."),
            (inference, "vllm:request_inference_time_seconds", "From admission to the last token."),
            (&self.latency, "vllm:e2e_request_latency_seconds", "From arrival to the end."),
        ] {
            h.0.write(&mut out, (name, help), &own, &SECONDS, 1e6);
        }
        let [prompt, generated, allowed] = &self.sizes;
        for (h, name, help) in [
            (prompt, "vllm:request_prompt_tokens", "Tokens of a prompt."),
            (generated, "vllm:request_generation_tokens", "Tokens of an answer."),
            (allowed, "vllm:request_params_max_tokens", "Tokens an answer may have."),
            (&self.choices, "vllm:request_params_n", "Answers that a request asks for."),
        ] {
            h.0.write(&mut out, (name, help), &own, &SIZES, 1.0);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What vLLM's dashboard and the tools around it read.
    #[test]
    fn names_are_those_of_vllm() {
        let m = Metrics::default();
        m.pages[1].store(9, Relaxed);
        m.cache.set(CacheConfig { page_tokens: 64, format: "int8", keeps_prompts: true }).unwrap();
        let arrived = Instant::now();
        let at = |ms| arrived + Duration::from_millis(ms);
        let usage = Usage { prompt: 30, completion: 3, ..Usage::default() };
        let tokens = Some((arrived, arrived));
        m.finished(&Ended { finish: Finish::Stop, usage, max_tokens: 7, arrived, admitted: arrived, tokens });
        m.choices.observe(2);
        let tokens = Some((at(20), at(60)));
        m.finished(&Ended { finish: Finish::Length, usage, max_tokens: 3, arrived, admitted: at(10), tokens });
        let text = m.render("a \"b\"");
        let kinds: Vec<(&str, &str)> =
            text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' ')).collect();
        let wanted = [
            ("vllm:num_requests_running", "gauge"),
            ("vllm:num_requests_waiting", "gauge"),
            ("vllm:kv_cache_usage_perc", "gauge"),
            ("vllm:cache_config_info", "gauge"),
            ("vllm:prefix_cache_queries_total", "counter"),
            ("vllm:prefix_cache_hits_total", "counter"),
            ("vllm:prompt_tokens_total", "counter"),
            ("vllm:generation_tokens_total", "counter"),
            ("vllm:request_success_total", "counter"),
            ("vllm:num_preemptions_total", "counter"),
            ("vllm:spec_decode_num_drafts_total", "counter"),
            ("vllm:spec_decode_num_draft_tokens_total", "counter"),
            ("vllm:spec_decode_num_accepted_tokens_total", "counter"),
            ("vllm:time_to_first_token_seconds", "histogram"),
            ("vllm:inter_token_latency_seconds", "histogram"),
            ("vllm:request_time_per_output_token_seconds", "histogram"),
            ("vllm:e2e_request_latency_seconds", "histogram"),
            ("vllm:request_queue_time_seconds", "histogram"),
            ("vllm:request_prefill_time_seconds", "histogram"),
            ("vllm:request_decode_time_seconds", "histogram"),
            ("vllm:request_inference_time_seconds", "histogram"),
            ("vllm:request_prompt_tokens", "histogram"),
            ("vllm:request_generation_tokens", "histogram"),
            ("vllm:request_params_max_tokens", "histogram"),
            ("vllm:request_params_n", "histogram"),
        ];
        for family in wanted {
            assert_eq!(kinds.iter().filter(|k| **k == family).count(), 1, "{family:?} in {text}");
        }
        let samples: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
        let labels = "{model_name=\"a \\\"b\\\"\",engine=\"0\"";
        assert!(samples.iter().all(|l| l.contains(labels)), "{text}");
        let has = |line: &str| assert!(samples.contains(&line.replace('{', labels).as_str()), "{line} in {text}");
        has("vllm:request_prompt_tokens_sum{} 60");
        has("vllm:request_prompt_tokens_bucket{,le=\"20\"} 0");
        has("vllm:request_prompt_tokens_bucket{,le=\"50\"} 2");
        has("vllm:request_generation_tokens_sum{} 6");
        has("vllm:request_params_max_tokens_sum{} 10");
        has("vllm:request_params_n_count{} 1");
        has("vllm:request_prefill_time_seconds_sum{} 0.01");
        has("vllm:request_decode_time_seconds_bucket{,le=\"0.02\"} 1");
        has("vllm:request_decode_time_seconds_bucket{,le=\"0.04\"} 2");
        has("vllm:request_time_per_output_token_seconds_bucket{,le=\"0.02\"} 2");
        has(
            "vllm:cache_config_info{,block_size=\"64\",cache_dtype=\"int8\",enable_prefix_caching=\"True\",num_gpu_blocks=\"9\"} 1",
        );
    }
}
