//! `lowbit load`: a serving load, its verdict, and the highest rate that meets an objective.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use lowbit_bench::load::client::Limits;
use lowbit_bench::load::data::{CountTokens, Data};
use lowbit_bench::load::import;
use lowbit_bench::load::metrics::Trim;
use lowbit_bench::load::openai::Endpoint;
use lowbit_bench::load::profile::{Profile, Search};
use lowbit_bench::load::record::{LoadRecord, SCHEMA};
use lowbit_bench::load::run::{Live, LoadOptions, Session};
use lowbit_bench::load::workload::Workload;
use lowbit_bench::slo::Slo;
use lowbit_bench::slo::search::SearchOptions;
use lowbit_bench::slo::verdict::Verdict;
use lowbit_checkpoint::hub;
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_quantize::Progress;

use crate::args::{EndpointArg, LoadArgs};
use crate::commands::eval::refuse_existing;
use crate::commands::{load_as, load_text};
use crate::context::Context;
use crate::exit::VerdictError;
use crate::{models, provenance};

/// `lowbit load`.
pub fn load(ctx: &Context, args: &LoadArgs) -> Result<()> {
    refuse_existing(args.output.as_ref(), args.force)?;
    refuse_existing(args.csv.as_ref(), args.force)?;
    if let Some(path) = &args.import {
        return imported(ctx, args, path);
    }
    finish(ctx, args, &measure(ctx, args)?)
}

/// Loads the server and makes the record.
pub fn measure(ctx: &Context, args: &LoadArgs) -> Result<LoadRecord> {
    // A search has a profile of its own.
    let text = args.profile.as_deref().unwrap_or(if args.find_max { "poisson" } else { "synchronous" });
    let search = args.find_max.then(|| Search::parse(text)).transpose()?;
    let profile = if args.find_max { None } else { Some(Profile::parse(text)?) };
    let replay = text.split(':').next() == Some("replay");
    if replay && args.shuffle {
        bail!("--shuffle would ask a trace out of its order\nhint: replay without it");
    }
    let slo = args.slo.as_deref().map(Slo::parse).transpose()?;
    if args.find_max && slo.is_none() {
        bail!("--find-max needs an objective\nhint: --slo guidellm/chatbot, or --slo ttft_p99<=200,itl_p99<=50");
    }
    let data = data(ctx, args)?;
    let name = data.name().to_string();
    let trim = trim(args)?;
    let mut session = Session::connect(options(args, data, replay, trim, slo.clone())?)?;
    let t = session.target();
    ctx.say(format!("{} at {}, {}, data {name}", t.model, t.url, t.endpoint.path()));
    let stop = ctx.stop.clone();
    let _writing = ctx.writing();
    let mut live = |l: &Live| {
        ctx.progress.detail(&format!(
            "{:.0} s  {} in flight  {} ok  {} failed  {:.0} tok/s{}",
            l.seconds,
            l.in_flight,
            l.ok,
            l.failed,
            l.output_tokens as f64 / l.seconds.max(0.1),
            l.ttft_ms.map_or(String::new(), |t| format!("  TTFT {t:.0} ms"))
        ));
        stop.load(Ordering::Relaxed)
    };
    let (stages, find_max) = match (slo.as_ref().zip(search), profile) {
        (Some((slo, over)), _) => {
            let search = SearchOptions {
                start: args.start_rate,
                ceiling: args.max_rate,
                requests: args.max_requests.map_or(400, |n| n as usize),
                tolerance: args.tolerance,
                ..SearchOptions::default()
            };
            let unit = over.unit().name();
            let mut begin = |at: f64, n: usize| ctx.progress.stage(&format!("{at:.3} {unit}, {n}"), 0);
            let (found, stages) = session.find_max(slo, over, &search, &mut begin, &mut live)?;
            (stages, Some(found))
        }
        (None, None) => bail!("no profile"),
        (None, Some(profile)) => {
            let mut begin = |s: &lowbit_bench::load::profile::StageSpec| {
                let of = s
                    .rate()
                    .map_or_else(|| s.streams().map_or(String::new(), |n| n.to_string()), |r| format!("{r:.3}/s"));
                ctx.progress.stage(&format!("{} {of}", s.name()), 0)
            };
            (session.profile(&profile, &mut begin, &mut live)?, None)
        }
    };
    ctx.progress.clear();
    let mut map = BTreeMap::new();
    map.insert("profile".to_string(), text.into());
    map.insert("data".to_string(), name.clone().into());
    map.insert("duration_seconds".to_string(), args.duration.into());
    map.insert("max_requests".to_string(), args.max_requests.into());
    map.insert("slo".to_string(), args.slo.clone().into());
    map.insert("stream".to_string(), (!args.no_stream).into());
    map.insert("max_concurrency".to_string(), args.max_concurrency.into());
    Ok(LoadRecord {
        schema: SCHEMA,
        provenance: provenance::of_client(ctx, args.seed, &session.target().model, map),
        target: session.target().clone(),
        data: name,
        trim,
        stages,
        find_max,
        imported: None,
    })
}

/// `--import`: a file instead of a server.
fn imported(ctx: &Context, args: &LoadArgs, path: &Path) -> Result<()> {
    let mut record = import::read(path)?;
    if let Some(tool) = &record.imported {
        let options = BTreeMap::from([
            ("import".into(), path.display().to_string().into()),
            ("tool".into(), tool.tool.clone().into()),
        ]);
        let (model, time) = (record.target.model.clone(), record.provenance.unix_time);
        record.provenance = provenance::of_client(ctx, 0, &model, options);
        // When it was measured, where the file says so.
        if time > 0 {
            record.provenance.unix_time = time;
        }
    }
    let trim = trim(args)?;
    let slo = args.slo.as_deref().map(Slo::parse).transpose()?;
    import::restage(&mut record, (trim != Trim::default()).then_some(trim), slo.as_ref())?;
    finish(ctx, args, &record)
}

/// Writes, prints, and gives the verdict.
fn finish(ctx: &Context, args: &LoadArgs, record: &LoadRecord) -> Result<()> {
    if let Some(path) = &args.output {
        write_atomic(path, &serde_json::to_vec(record)?)?;
    }
    if let Some(path) = &args.csv {
        write_atomic(path, load_text::csv(record).as_bytes())?;
    }
    ctx.print(&load_text::without_samples(record), || match args.show_as {
        Some(tool) => load_as::as_tool(record, tool),
        None => load_text::summary(record),
    })?;
    ctx.check_stop()?;
    verdict(record)
}

/// Exit code: 1 when the objective is broken, 2 when nothing can be said.
fn verdict(record: &LoadRecord) -> Result<()> {
    if let Some(f) = &record.find_max {
        return match f.low > 0.0 {
            true => Ok(()),
            false => Err(VerdictError { code: 1, text: "no rate meets the objective".into() }.into()),
        };
    }
    let invalid = record.stages.iter().filter(|s| !s.client.invalid.is_empty()).count();
    if record.stages.iter().all(|s| s.metrics.ok() == 0) {
        return Err(VerdictError { code: 1, text: "no request succeeded".into() }.into());
    }
    let worst = |v: Verdict| record.valid().filter_map(|s| s.slo.as_ref()).any(|s| s.verdict == v);
    if worst(Verdict::Broken) {
        return Err(VerdictError { code: 1, text: "the objective is broken".into() }.into());
    }
    if worst(Verdict::Inconclusive) {
        return Err(
            VerdictError { code: 2, text: "too few requests to tell whether the objective is met".into() }.into()
        );
    }
    if invalid > 0 {
        return Err(VerdictError {
            code: 2,
            text: format!("{invalid} of {} stages were limited by the client", record.stages.len()),
        }
        .into());
    }
    Ok(())
}

fn trim(args: &LoadArgs) -> Result<Trim> {
    for (name, v) in [("--warmup", args.warmup), ("--cooldown", args.cooldown)] {
        if !(v.is_finite() && v >= 0.0) {
            bail!("{name} must be 0 or more, found {v}");
        }
    }
    Ok(Trim { warmup: args.warmup, cooldown: args.cooldown })
}

/// Seconds of a stage, where time ends it. Something must; a trace ends by itself.
fn stage_seconds(duration: Option<f64>, max_requests: Option<u64>, replay: bool) -> Option<f64> {
    duration.or((max_requests.is_none() && !replay).then_some(30.0))
}

fn options(args: &LoadArgs, data: Data, replay: bool, trim: Trim, slo: Option<Slo>) -> Result<LoadOptions> {
    let headers = args.header.iter().map(|h| {
        let (name, value) = h.split_once(':').with_context(|| format!("--header {h:?} is not NAME: VALUE"))?;
        Ok((name.trim().to_string(), value.trim().to_string()))
    });
    let extra = match &args.body {
        None => serde_json::Map::new(),
        Some(text) => match serde_json::from_str(text) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => bail!("--body is not a JSON object\nhint: --body '{{\"temperature\": 0}}'"),
        },
    };
    let seconds = |name: &str, v: f64| {
        Duration::try_from_secs_f64(v)
            .ok()
            .filter(|d| !d.is_zero())
            .with_context(|| format!("{name} {v} is not a number of seconds above 0"))
    };
    let limits = Limits {
        duration: stage_seconds(args.duration, args.max_requests, replay)
            .map(|s| seconds("--duration", s))
            .transpose()?,
        requests: args.max_requests,
        errors: args.max_errors,
        error_rate: Some(args.max_error_rate),
        request_timeout: seconds("--timeout", args.timeout)?,
        grace: Duration::try_from_secs_f64(args.grace)
            .with_context(|| format!("--grace {} is not a number of seconds", args.grace))?,
    };
    Ok(LoadOptions {
        url: args.url.clone().context("no server")?,
        endpoint: match args.endpoint {
            EndpointArg::Completions => Endpoint::Completions,
            EndpointArg::Chat => Endpoint::Chat,
        },
        model: args.model.clone(),
        stream: !args.no_stream,
        exact_output: !args.natural_output,
        api_key: args.api_key.clone().or_else(|| std::env::var("OPENAI_API_KEY").ok().filter(|k| !k.is_empty())),
        headers: headers.collect::<Result<Vec<_>>>()?,
        extra,
        data,
        limits,
        stop_saturated: args.stop_saturated,
        trim,
        max_concurrency: args.max_concurrency,
        seed: args.seed,
        slo,
    })
}

/// `datasets/org/name[/file or folder][@revision]`, also with `hf://`, or plain `org/name`: a data set on the hub.
fn hub_data(text: &str) -> Option<&str> {
    let id = text.strip_prefix("hf://").unwrap_or(text);
    let plain = |p: &str| !p.is_empty() && p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c));
    let marked = id.starts_with("datasets/");
    let parts: Vec<&str> = id.split('/').collect();
    let named = parts.iter().all(|p| plain(p)) && !id.starts_with(['.', '/']);
    (named && (marked && parts.len() > 2 || parts.len() == 2 && !id.contains('.'))).then_some(id)
}

/// `--data`: a named workload, its options, a file, or `text` for the demo's own text.
fn data(ctx: &Context, args: &LoadArgs) -> Result<Data> {
    let path = Path::new(&args.data);
    let name = args.data.as_str();
    let path = match hub_data(name) {
        Some(id) if !path.exists() => hub::resolve_dataset(id, &models::hub_options(), &ctx.progress)?,
        _ => path.to_path_buf(),
    };
    if path.is_dir() || path.is_file() {
        // A file that cannot be read says so here, before the server is asked anything.
        let data = Data::read(&path, name, args.shuffle, args.output_tokens, counter(ctx, args)?)?;
        ctx.say(format!("{} rows in {name}", data.rows()));
        return Ok(data);
    }
    if args.data == "text" {
        let lines: Vec<&str> = models::DEMO_TEXT.split("\n\n").map(str::trim).filter(|p| !p.is_empty()).collect();
        return Ok(Data::from_texts("text", &lines, args.output_tokens.unwrap_or(32)));
    }
    let workload = Workload::parse(&args.data)?;
    Ok(Data::Synthetic { workload, count: counter(ctx, args)? })
}

/// `--tokenizer`.
fn counter(ctx: &Context, args: &LoadArgs) -> Result<Option<CountTokens>> {
    let Some(model) = &args.tokenizer else { return Ok(None) };
    let tokenizer = Tokenizer::load(&models::locate(ctx, model)?.dir)?;
    let count: CountTokens = Arc::new(move |text: &str| tokenizer.encode(text, false).map_or(0, |ids| ids.len()));
    Ok(Some(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_ends_what_nothing_else_does() {
        assert_eq!(stage_seconds(None, None, false), Some(30.0));
        assert_eq!(stage_seconds(None, Some(9), false), None);
        assert_eq!(stage_seconds(None, None, true), None, "a trace is replayed to its end");
        assert_eq!(stage_seconds(Some(5.0), Some(9), false), Some(5.0));
        assert_eq!(stage_seconds(Some(5.0), None, true), Some(5.0));
    }
}
