//! Result files as load records: our own, GuideLLM's and `vllm bench serve`'s.
//!
//! Only what a file holds of every request is taken over; metrics and verdicts are computed anew by our definitions, so that
//! numbers of different tools can be compared.

mod guidellm;
mod vllm;

use std::path::Path;

use lowbit_checkpoint::provenance::Provenance;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::load::client::StageTraces;
use crate::load::error::{LoadError, Result};
use crate::load::metrics::{Trim, Window, measure};
use crate::load::record::{LoadRecord, SCHEMA, StageRecord, TargetRecord};
use crate::load::run::stage_record;
use crate::load::sim::watch;
use crate::load::trace::RequestTrace;
use crate::slo::verdict::judge;
use crate::slo::{Measure, Slo};

/// Who measured, and how much of it the file keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// `guidellm 0.8.1`, `vllm bench`.
    pub tool: String,
    /// The stamps of all chunks; else only those of the first and the last output, and no gap between is known.
    pub all_stamps: bool,
}

impl Imported {
    /// Why an objective cannot be judged from such stamps.
    pub fn refuses(&self, slo: &Slo) -> Option<String> {
        let stalls = !self.all_stamps && slo.clauses.iter().any(|c| c.measure == Measure::Stall);
        stalls.then(|| format!("{} keeps the first and the last stamp of an answer: a stall cannot be seen", self.tool))
    }
}

/// A stage as another tool describes it.
struct Foreign {
    profile: String,
    rate: Option<f64>,
    streams: Option<usize>,
    requests: Vec<RequestTrace>,
    /// What counts, where the tool has left out the ends.
    window: Option<Window>,
    /// Why the stage says nothing about the server.
    invalid: Vec<String>,
}

/// A file with its name, for errors.
struct Source<'a> {
    path: &'a Path,
}

impl Source<'_> {
    fn bad(&self, place: impl Into<String>, why: impl Into<String>) -> LoadError {
        LoadError::Row { path: self.path.to_path_buf(), place: place.into(), why: why.into() }
    }

    fn parse<T: DeserializeOwned>(&self, place: &str, v: &Value) -> Result<T> {
        T::deserialize(v).map_err(|e| self.bad(place, e.to_string()))
    }
}

/// Reads a load record, a GuideLLM report (`--output kind=json`) or a result of `vllm bench serve --save-result --save-detailed`
/// (one, or a line each as `--append-result` writes them).
pub fn read(path: &Path) -> Result<LoadRecord> {
    let bytes = lowbit_checkpoint::files::read_stream(path)
        .map_err(|source| LoadError::Io { path: path.to_path_buf(), source })?;
    let from = Source { path };
    let documents: Vec<Value> = serde_json::Deserializer::from_slice(&bytes)
        .into_iter()
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| from.bad("document", e.to_string()))?;
    let Some(first) = documents.first() else { return Err(from.bad("document", "the file is empty")) };
    let has = |key: &str| first.get(key).is_some();
    if has("stages") && has("target") {
        return from.parse("load record", first);
    }
    if has("benchmarks") {
        return guidellm::read(&from, first);
    }
    if has("request_throughput") {
        return vllm::read(&from, &documents);
    }
    Err(from.bad(
        "document",
        "neither a load record nor a result of GuideLLM (`benchmarks`) or vllm bench serve (`request_throughput`)",
    ))
}

/// The record of foreign stages.
fn record(tool: Imported, target: TargetRecord, data: String, unix_time: u64, stages: Vec<Foreign>) -> LoadRecord {
    let stages = stages.into_iter().map(|s| stage(s, &tool)).collect();
    LoadRecord {
        schema: SCHEMA,
        provenance: Provenance {
            tool: tool.tool.clone(),
            model: target.model.clone(),
            unix_time,
            ..Default::default()
        },
        target,
        data,
        trim: Trim::default(),
        stages,
        find_max: None,
        imported: Some(tool),
    }
}

fn stage(mut s: Foreign, tool: &Imported) -> StageRecord {
    s.requests.sort_by_key(|t| t.end_ns);
    let end = s.requests.last().map_or(0, |t| t.end_ns);
    let open = s.rate.is_some();
    let saturation = open.then(|| watch(&s.requests)).flatten();
    let traces = StageTraces {
        traces: s.requests,
        stop_ns: end.saturating_add(1),
        end_ns: end,
        stopped_by: "not known".into(),
        cpu_frac: None,
        connections: 0,
        resent: 0,
        rejected: 0,
    };
    let window = s.window.unwrap_or(Window { from_ns: 0, to_ns: end.saturating_add(1) });
    let mut out = stage_record(&s.profile, s.rate, s.streams, traces, window, None, true);
    out.saturation = saturation;
    out.client.invalid.extend(s.invalid);
    name_gaps(&mut out, tool);
    out
}

/// Takes out what the stamps do not say.
fn name_gaps(s: &mut StageRecord, tool: &Imported) {
    s.metrics.counted_by = tool.tool.clone();
    if !tool.all_stamps {
        s.metrics.latency.remove("icl_chunk_ms");
        s.metrics.latency.remove("itl_token_ms");
        s.metrics.itl_token_missing = Some(format!("{} keeps the first and the last stamp of an answer", tool.tool));
    }
}

/// Computes the stages of a record again: with other ends left out, or against another objective.
pub fn restage(r: &mut LoadRecord, trim: Option<Trim>, slo: Option<&Slo>) -> Result<()> {
    if let Some(why) = r.imported.as_ref().zip(slo).and_then(|(i, s)| i.refuses(s)) {
        return Err(LoadError::option("--slo", why, "clauses on ttft, itl, tpot, e2e or rps"));
    }
    for s in &mut r.stages {
        if let Some(trim) = trim {
            let stop = s.requests.iter().map(|t| t.end_ns.saturating_add(1)).max().unwrap_or(0);
            s.metrics = measure(&s.requests, trim.window(stop));
            if let Some(tool) = &r.imported {
                name_gaps(s, tool);
            }
        }
        if let Some(slo) = slo {
            s.slo = Some(judge(&s.requests, s.metrics.window, s.metrics.rates.requests_per_second, slo));
        }
    }
    r.trim = trim.unwrap_or(r.trim);
    Ok(())
}

/// Seconds as nanoseconds since `start`; 0 before it.
fn since(seconds: f64, start: f64) -> u64 {
    ((seconds - start).max(0.0) * 1e9).round() as u64
}
