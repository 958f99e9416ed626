//! Results of `vllm bench serve --save-result --save-detailed` (keys as `vllm/benchmarks/serve.py` writes them): lists with an entry a
//! request, times in seconds. `ttfts` and `itls` are the gaps of chunks, so every chunk's stamp is known.

use serde::Deserialize;
use serde_json::Value;

use super::{Foreign, Imported, Source, record, since};
use crate::load::error::Result;
use crate::load::openai::Endpoint;
use crate::load::record::{LoadRecord, TargetRecord};
use crate::load::trace::{Outcome, RequestTrace};

#[derive(Deserialize)]
struct Detailed {
    #[serde(default)]
    model_id: String,
    #[serde(default)]
    backend: String,
    /// A number, or `"inf"`.
    request_rate: Value,
    burstiness: Option<f64>,
    max_concurrency: Option<usize>,
    completed: u64,
    input_lens: Vec<u32>,
    output_lens: Vec<u32>,
    ttfts: Vec<f64>,
    itls: Vec<Vec<f64>>,
    start_times: Vec<f64>,
    errors: Vec<String>,
    /// Whole answers, in versions that write them.
    latencies: Option<Vec<f64>>,
    /// From arrival to sending, under `--max-concurrency`.
    queue_times: Option<Vec<f64>>,
}

/// See the module.
pub fn read(from: &Source, documents: &[Value]) -> Result<LoadRecord> {
    let mut stages = Vec::new();
    let mut target: Option<TargetRecord> = None;
    for (i, d) in documents.iter().enumerate() {
        let place = format!("result {}", i + 1);
        if d.get("ttfts").is_none() {
            let why =
                "has no times of single requests\nhint: run vllm bench serve with --save-detailed beside --save-result";
            return Err(from.bad(place, why));
        }
        if d.get("start_times").is_none() {
            let why = "does not say when its requests were sent (`start_times`)\nhint: measure with a newer vLLM, which writes it";
            return Err(from.bad(place, why));
        }
        let r: Detailed = from.parse(&place, d)?;
        let model = target.get_or_insert_with(|| TargetRecord {
            url: String::new(),
            endpoint: if r.backend.contains("chat") { Endpoint::Chat } else { Endpoint::Completions },
            model: r.model_id.clone(),
            streaming: true,
            // Not written; lengths are in the traces.
            exact_output: false,
            server: None,
        });
        if model.model != r.model_id {
            return Err(from.bad(place, format!("is about {}, the first about {}", r.model_id, model.model)));
        }
        stages.push(stage(from, &place, r)?);
    }
    let Some(target) = target else { return Err(from.bad("document", "the file is empty")) };
    Ok(record(Imported { tool: "vllm bench".into(), all_stamps: true }, target, "not known".into(), 0, stages))
}

fn stage(from: &Source, place: &str, r: Detailed) -> Result<Foreign> {
    let n = r.start_times.len();
    let lengths = [
        ("input_lens", Some(r.input_lens.len())),
        ("output_lens", Some(r.output_lens.len())),
        ("ttfts", Some(r.ttfts.len())),
        ("itls", Some(r.itls.len())),
        ("errors", Some(r.errors.len())),
        ("latencies", r.latencies.as_ref().map(Vec::len)),
        ("queue_times", r.queue_times.as_ref().map(Vec::len)),
    ];
    if let Some((name, found)) = lengths.iter().find(|(_, len)| len.is_some_and(|l| l != n)) {
        let found = found.unwrap_or(0);
        return Err(from.bad(place, format!("`start_times` has {n} entries, `{name}` {found}")));
    }
    let rate = r.request_rate.as_f64().filter(|v| v.is_finite());
    let wait = |i: usize| r.queue_times.as_ref().and_then(|q| q.get(i)).copied().unwrap_or(0.0).max(0.0);
    // A closed loop's request counts from when its stream was free.
    let scheduled = |i: usize, sent: f64| if rate.is_some() { sent - wait(i) } else { sent };
    let start = r.start_times.iter().enumerate().map(|(i, s)| scheduled(i, *s)).fold(f64::INFINITY, f64::min);
    let mut requests = Vec::with_capacity(n);
    for (i, sent) in r.start_times.iter().enumerate() {
        let error = r.errors.get(i).map_or("", String::as_str);
        let (ttft, gaps) = (r.ttfts.get(i).copied().unwrap_or(0.0), r.itls.get(i).map_or(&[][..], Vec::as_slice));
        let mut at = sent + ttft;
        let mut chunks_ns = Vec::new();
        if error.is_empty() && ttft > 0.0 {
            chunks_ns.push(since(at, start));
            for gap in gaps {
                at += gap.max(0.0);
                chunks_ns.push(since(at, start));
            }
        }
        let end = r.latencies.as_ref().and_then(|l| l.get(i)).map_or(at, |l| (sent + l).max(at));
        requests.push(RequestTrace {
            scheduled_ns: since(scheduled(i, *sent), start),
            sent_ns: since(*sent, start),
            chunks_ns,
            chunk_tokens: Vec::new(),
            end_ns: since(end, start),
            input_tokens: r.input_lens.get(i).copied(),
            output_tokens: r.output_lens.get(i).copied().unwrap_or(0),
            counted_by_server: false,
            outcome: if error.is_empty() { Outcome::Ok } else { Outcome::Failed(error.chars().take(200).collect()) },
        });
    }
    let ok = requests.iter().filter(|t| t.ok()).count() as u64;
    if ok != r.completed {
        return Err(from.bad(place, format!("`completed` is {}, but {ok} requests have no error", r.completed)));
    }
    let profile = match (rate, r.burstiness, r.max_concurrency) {
        (Some(_), None | Some(1.0), _) => "poisson",
        (Some(_), Some(_), _) => "gamma",
        (None, _, Some(1)) => "synchronous",
        (None, _, Some(_)) => "concurrent",
        (None, _, None) => "throughput",
    };
    let streams = rate.is_none().then(|| r.max_concurrency.unwrap_or(n));
    Ok(Foreign { profile: profile.into(), rate, streams, requests, window: None, invalid: Vec::new() })
}
