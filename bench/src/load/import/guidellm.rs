//! GuideLLM's JSON report (read from files of 0.8.1, `metadata.version` 2).
//!
//! Of an answer it keeps the stamps of the first and the last output. An open loop's schedule is `timings.targeted_start`; in a closed
//! loop that is the start of the stage, and a request counts from `timings.request_start`.

use serde::Deserialize;
use serde_json::Value;

use super::{Foreign, Imported, Source, record, since};
use crate::load::error::Result;
use crate::load::metrics::Window;
use crate::load::openai::Endpoint;
use crate::load::record::{LoadRecord, TargetRecord};
use crate::load::trace::{Outcome, RequestTrace};

#[derive(Deserialize)]
struct Benchmark {
    config: Config,
    requests: Requests,
    scheduler_metrics: SchedulerMetrics,
    start_time: f64,
    end_time: f64,
    #[serde(default)]
    warmup_duration: f64,
    #[serde(default)]
    cooldown_duration: f64,
}

#[derive(Deserialize)]
struct Config {
    strategy: Strategy,
    backend: Backend,
}

#[derive(Deserialize)]
struct Strategy {
    type_: String,
    rate: Option<f64>,
    streams: Option<usize>,
    max_concurrency: Option<usize>,
}

#[derive(Deserialize)]
struct Backend {
    target: Option<String>,
    model: Option<String>,
    request_format: Option<String>,
    stream: Option<bool>,
}

#[derive(Default, Deserialize)]
struct Requests {
    successful: Option<Vec<Request>>,
    errored: Option<Vec<Request>>,
    incomplete: Option<Vec<Request>>,
}

#[derive(Deserialize)]
struct SchedulerMetrics {
    requests_made: Made,
}

#[derive(Deserialize)]
struct Made {
    successful: u64,
    errored: u64,
    incomplete: u64,
}

#[derive(Deserialize)]
struct Request {
    info: Info,
    request_args: Option<String>,
    prompt_tokens: Option<u32>,
    output_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct Info {
    timings: Timings,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Timings {
    targeted_start: Option<f64>,
    request_start: Option<f64>,
    first_output_token_iteration: Option<f64>,
    first_token_iteration: Option<f64>,
    last_token_iteration: Option<f64>,
    request_end: Option<f64>,
    resolve_end: Option<f64>,
}

impl Timings {
    fn sent(&self) -> Option<f64> {
        self.request_start.or(self.targeted_start)
    }

    fn scheduled(&self, open: bool) -> Option<f64> {
        if open { self.targeted_start.or(self.request_start) } else { self.sent() }
    }
}

/// See the module.
pub fn read(from: &Source, document: &Value) -> Result<LoadRecord> {
    let version = document.pointer("/metadata/guidellm_version").and_then(Value::as_str).unwrap_or("of no version");
    let list = document.get("benchmarks").and_then(Value::as_array);
    let list = list.ok_or_else(|| from.bad("benchmarks", "expected a list"))?;
    let benchmarks: Vec<Benchmark> = list
        .iter()
        .enumerate()
        .map(|(i, b)| from.parse(&format!("benchmarks[{i}] (GuideLLM {version}; 0.8.1 is read)"), b))
        .collect::<Result<_>>()?;
    let Some(first) = benchmarks.first() else { return Err(from.bad("benchmarks", "the list is empty")) };
    let backend = &first.config.backend;
    let chat = backend.request_format.as_deref().is_none_or(|f| f.contains("chat"));
    let fixed = |r: &Request| r.request_args.as_deref().is_some_and(|a| a.contains("\"ignore_eos\":true"));
    let target = TargetRecord {
        url: backend.target.clone().unwrap_or_default(),
        endpoint: if chat { Endpoint::Chat } else { Endpoint::Completions },
        model: backend.model.clone().unwrap_or_default(),
        streaming: backend.stream.unwrap_or(true),
        exact_output: benchmarks.iter().all(|b| b.requests.successful.iter().flatten().all(fixed)),
        server: None,
    };
    let data = document.pointer("/config/spec/data/0/kind").and_then(Value::as_str).unwrap_or("not known").to_string();
    let time = first.start_time as u64;
    let stages = benchmarks.into_iter().map(stage).collect();
    Ok(record(Imported { tool: format!("guidellm {version}"), all_stamps: false }, target, data, time, stages))
}

fn stage(b: Benchmark) -> Foreign {
    let (warmup, cooldown) = (b.warmup_duration, b.cooldown_duration);
    let Benchmark { config, requests, scheduler_metrics: m, start_time, end_time, .. } = b;
    let trimmed = warmup + cooldown > 0.0;
    let s = config.strategy;
    let open = s.rate.is_some() || s.type_ == "trace";
    let Requests { successful, errored, incomplete } = requests;
    let made = &m.requests_made;
    let all: Vec<(Request, u8)> = [successful, errored, incomplete]
        .into_iter()
        .zip(0u8..)
        .flat_map(|(list, kind)| list.unwrap_or_default().into_iter().map(move |r| (r, kind)))
        .collect();
    let start = all.iter().filter_map(|(r, _)| r.info.timings.scheduled(open)).fold(start_time, f64::min);
    let mut invalid = Vec::new();
    let (held, total) = (all.len() as u64, made.successful + made.errored + made.incomplete);
    if held < total {
        invalid.push(format!(
            "the file holds {held} of {total} requests: its warm-up and cool-down, or a sample, are left out"
        ));
    }
    let requests = all.into_iter().filter_map(|(r, kind)| trace(r, kind, start, open)).collect();
    let kind = s.type_.as_str();
    let streams = match kind {
        _ if open => None,
        "synchronous" => Some(1),
        _ => s.streams.or(s.max_concurrency),
    };
    let profile = match (kind, streams) {
        ("trace", _) => "replay",
        // One stream has one name, whichever way it was asked for.
        ("concurrent", Some(1)) => "synchronous",
        (other, _) => other,
    };
    Foreign {
        profile: profile.to_string(),
        rate: s.rate,
        streams,
        requests,
        // Without a warm-up their window begins when the first request was sent: its schedule was before.
        window: trimmed
            .then(|| Window { from_ns: since(start_time, start), to_ns: since(end_time, start).saturating_add(1) }),
        invalid,
    }
}

/// `None` of a request that never began.
fn trace(r: Request, kind: u8, start: f64, open: bool) -> Option<RequestTrace> {
    let t = &r.info.timings;
    let at = |v: f64| since(v, start);
    let (scheduled, sent) = (t.scheduled(open)?, t.sent()?);
    let first = t.first_output_token_iteration.or(t.first_token_iteration);
    let mut chunks_ns: Vec<u64> = first.map(at).into_iter().collect();
    // An answer of one token has one stamp.
    chunks_ns.extend(t.last_token_iteration.map(at).filter(|l| chunks_ns.last().is_some_and(|f| f < l)));
    let outcome = match kind {
        0 => Outcome::Ok,
        1 => Outcome::Failed(r.info.error.unwrap_or_else(|| "not known".into()).chars().take(200).collect()),
        _ => Outcome::Cancelled,
    };
    Some(RequestTrace {
        scheduled_ns: at(scheduled),
        sent_ns: at(sent).max(at(scheduled)),
        chunks_ns,
        chunk_tokens: Vec::new(),
        end_ns: at(t.request_end.or(t.resolve_end).unwrap_or(sent)),
        input_tokens: r.prompt_tokens,
        output_tokens: r.output_tokens.unwrap_or(0),
        counted_by_server: false,
        outcome,
    })
}
