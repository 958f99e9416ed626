//! `lowbit bench`, and the bench `run` does.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Result, bail};
use lowbit_bench::suite::kernels::{CeilingSizes, ceilings};
use lowbit_bench::suite::{Ceilings, SuiteOptions};
use lowbit_bench::synthetic::SyntheticOptions;
use lowbit_bench::{BenchOptions, BenchOutput, BenchRecord, Limits};
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::{CpuBackend, read_bandwidth};
use lowbit_model::synthetic::parse_format;
use lowbit_quantize::Progress;

use crate::args::{BenchArgs, KvCacheArg};
use crate::commands::eval::refuse_existing;
use crate::commands::rounding;
use crate::commands::table::{megabytes, table};
use crate::commands::{bench_draft, bench_format};
use crate::context::{Context, Purpose};
use crate::models::{self, Located};
use crate::provenance;

/// How the driver names it.
const OUT_OF_MEMORY: &str = "OUT_OF_MEMORY";

/// `lowbit bench`.
pub fn bench(ctx: &Context, args: &BenchArgs) -> Result<()> {
    refuse_existing(args.output.as_ref(), args.force)?;
    if let (Some(model), Some(draft)) = (&args.model, &args.draft) {
        return bench_draft::bench(ctx, args, model, draft);
    }
    let record = match (&args.synthetic, &args.model) {
        (Some(shape), _) => synthetic(ctx, args, shape)?,
        (None, Some(model)) => {
            let candidate = models::locate(ctx, model)?;
            let reference = args.reference.as_deref().map(|r| models::locate(ctx, r)).transpose()?;
            let wanted = options(ctx, args, &BenchOptions::default());
            let mut record = measure(ctx, &candidate, reference.as_ref(), &wanted, args.kv_cache)?;
            if args.kv_cache != KvCacheArg::Float {
                record.provenance.options.insert("kv_cache".into(), args.kv_cache.name().into());
            }
            record
        }
        (None, None) => bail!("no MODEL\nhint: lowbit bench MODEL, or lowbit bench --synthetic llama-3.1-8b"),
    };
    if let Some(path) = &args.output {
        write_atomic(path, &serde_json::to_vec_pretty(&record)?)?;
    }
    ctx.print(&record, || args.format.map_or_else(|| summary(&record), |f| bench_format::render(&record, f)))?;
    let failed: Vec<_> = record.left.iter().filter(|l| !l.reason.contains(OUT_OF_MEMORY)).collect();
    match (failed.first(), record.rows.is_empty()) {
        (Some(first), _) => bail!("{} tests failed, the first: {}: {}", failed.len(), first.row, first.reason),
        (None, true) => bail!("no model fits the device\nhint: smaller formats, fewer sequences, less depth"),
        (None, false) => Ok(()),
    }
}

/// The command line's options; `usual` where it says nothing.
fn options(ctx: &Context, args: &BenchArgs, usual: &BenchOptions) -> BenchOptions {
    BenchOptions {
        prompt: args.prompt.unwrap_or(usual.prompt),
        generate: args.generate.unwrap_or(usual.generate),
        depth: args.depth.unwrap_or(usual.depth),
        batches: if args.batch.is_empty() { usual.batches.clone() } else { args.batch.clone() },
        repetitions: args.repetitions,
        threads: ctx.threads,
        ..usual.clone()
    }
}

/// Random weights in a known shape.
fn synthetic(ctx: &Context, args: &BenchArgs, shape: &str) -> Result<BenchRecord> {
    let usual = BenchOptions {
        prompt: 4096,
        generate: 32,
        depth: 1024,
        batches: vec![1, 4, 16, 64],
        latency_output: 0,
        ..BenchOptions::default()
    };
    let options = options(ctx, args, &usual);
    let wanted = SyntheticOptions {
        shape: shape.to_string(),
        formats: args.formats.iter().map(|f| parse_format(f)).collect::<Result<_, _>>()?,
        head: parse_format(&args.head)?,
    };
    ctx.progress.stage("bench", 0);
    let backend = ctx.backend_for(Purpose::Speed)?;
    let (limits, ceilings) = limits(ctx, backend.as_ref())?;
    let detail = |text: &str| ctx.progress.detail(text);
    let out = lowbit_bench::synthetic::run(&backend, &wanted, &options, &limits, &detail)?;
    let mut map = option_map(&options);
    map.insert("formats".to_string(), args.formats.clone().into());
    map.insert("head".to_string(), args.head.clone().into());
    let mut provenance = provenance::without_model(ctx, Purpose::Speed, options.seed, map)?;
    provenance.model = format!("synthetic {shape}");
    Ok(record(provenance, &limits, ceilings, out))
}

fn record(provenance: Provenance, limits: &Limits, ceilings: Option<Ceilings>, out: BenchOutput) -> BenchRecord {
    BenchRecord {
        schema: lowbit_bench::SCHEMA,
        provenance,
        bandwidth_bytes_per_second: limits.bytes_per_second,
        ceilings,
        rows: out.rows,
        speed_ups: out.speed_ups,
        latency: out.latency,
        memory: out.memory,
        rounding: None,
        left: out.left,
    }
}

/// What the device can do at best.
fn limits(ctx: &Context, backend: &dyn Backend) -> Result<(Limits, Option<Ceilings>)> {
    ctx.progress.detail("memory bandwidth");
    if backend.name() != "cuda" {
        return Ok((Limits { bytes_per_second: read_bandwidth(ctx.threads), flops_per_second: None }, None));
    }
    // The weights are in the card's memory.
    let sizes = CeilingSizes::for_device("cuda");
    let c = ceilings(backend, &sizes, &SuiteOptions::default(), &|text| ctx.progress.detail(text))?;
    let limits = Limits { bytes_per_second: c.bytes_per_second, flops_per_second: Some(c.flops_per_second) };
    Ok((limits, Some(c)))
}

/// Loads both models and measures; `kv` is how the candidate keeps keys and values.
pub fn measure(
    ctx: &Context,
    candidate: &Located,
    reference: Option<&Located>,
    options: &BenchOptions,
    kv: KvCacheArg,
) -> Result<BenchRecord> {
    let (_, model) = candidate.load_on(ctx.backend_with_kv(Purpose::Speed, kv)?)?;
    let other = reference.map(|r| r.load(ctx, Purpose::Speed)).transpose()?;
    ctx.progress.stage("bench", 0);
    let (limits, ceilings) = limits(ctx, ctx.backend_for(Purpose::Speed)?.as_ref())?;
    let pair = reference.zip(other.as_ref()).map(|(r, l)| (r.name.as_str(), &l.1));
    let detail = |text: &str| ctx.progress.detail(text);
    let out = lowbit_bench::run((&candidate.name, &model), pair, options, &limits, &detail)?;
    detail("rounding of activations");
    // Keys and values in eight bits change far more: `eval --kl --kv-cache int8` measures that.
    let text = if kv == KvCacheArg::Float { rounding::text(&model, ctx.exact())? } else { None };
    drop((model, other));
    let rounding = match text {
        Some(text) => Some(text.compare(&candidate.load_on(Arc::new(CpuBackend::new().exact(true)))?.1)?),
        None => None,
    };
    ctx.progress.clear();
    ctx.check_stop()?;
    let provenance = provenance::gather(ctx, Purpose::Speed, candidate, reference, options.seed, option_map(options))?;
    Ok(BenchRecord { rounding, ..record(provenance, &limits, ceilings, out) })
}

/// The full options, for the record.
pub fn option_map(options: &BenchOptions) -> BTreeMap<String, serde_json::Value> {
    let mut map = BTreeMap::new();
    map.insert("prompt".to_string(), options.prompt.into());
    map.insert("generate".to_string(), options.generate.into());
    map.insert("depth".to_string(), options.depth.into());
    map.insert("batches".to_string(), options.batches.clone().into());
    map.insert("repetitions".to_string(), options.repetitions.into());
    map.insert("latency_prompt".to_string(), options.latency_prompt.into());
    map.insert("latency_output".to_string(), options.latency_output.into());
    map
}

/// The result as text.
pub fn summary(r: &BenchRecord) -> String {
    let rows: Vec<Vec<String>> = r
        .rows
        .iter()
        .map(|b| {
            vec![
                format!("{} {}", b.role, b.model),
                b.test.clone(),
                b.batch.to_string(),
                format!("{:.2}", b.tokens_per_second),
                if b.bytes_per_step > 0 { megabytes(b.bytes_per_step) } else { "–".into() },
                b.roofline_frac.map_or("–".into(), |f| format!("{:.0} %", 100.0 * f)),
                b.flops_frac.map_or("–".into(), |f| format!("{:.0} %", 100.0 * f)),
            ]
        })
        .collect();
    let mut out = vec![
        match (&r.ceilings, &r.provenance.gpu) {
            (Some(c), Some(gpu)) => format!(
                "copy {:.1} GB/s, addition {:.1} GB/s, large bf16 linear {:.1} TFLOP/s of {gpu}",
                c.copy_bytes_per_second / 1e9,
                c.add_bytes_per_second / 1e9,
                c.flops_per_second / 1e12
            ),
            _ => {
                let rate = r.bandwidth_bytes_per_second / 1e9;
                format!("read bandwidth {rate:.1} GB/s with {} threads", r.provenance.threads)
            }
        },
        table(&["model", "test", "batch", "tok/s", "bytes/step", "of bandwidth", "of flops"], &rows),
    ];
    for s in &r.speed_ups {
        let name = if r.latency.is_empty() { format!("{}, ", s.model) } else { String::new() };
        out.push(format!("{name}{} batch {}: {:.3}× [{:.3}, {:.3}]", s.test, s.batch, s.ratio, s.low, s.high));
    }
    out.extend(r.left.iter().map(|l| format!("not measured: {}: {}", l.row, l.reason)));
    for l in &r.latency {
        out.push(format!(
            "{}: TTFT ({} tokens) p50 {:.1} ms, p99 {:.1} ms; ITL p50 {:.2} ms, p99 {:.2} ms",
            l.role, l.prompt_tokens, l.ttft_ms[0], l.ttft_ms[2], l.itl_token_ms[0], l.itl_token_ms[2]
        ));
    }
    if let Some(r) = &r.rounding {
        out.push(format!(
            "rounding against --exact, {} positions: KL mean {:.1e}, max {:.1e}; first token the same at {}",
            r.tokens, r.kl_mean, r.kl_max, r.same_top
        ));
    }
    out.join("\n")
}
