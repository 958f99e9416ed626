//! `lowbit bench`, and the bench `run` does.

use std::collections::BTreeMap;

use anyhow::Result;
use lowbit_bench::suite::SuiteOptions;
use lowbit_bench::suite::kernels::{CeilingSizes, copy_bandwidth};
use lowbit_bench::{BenchOptions, BenchRecord};
use lowbit_checkpoint::writer::write_atomic;
use lowbit_kernels::cpu::read_bandwidth;
use lowbit_quantize::Progress;

use crate::args::BenchArgs;
use crate::commands::eval::refuse_existing;
use crate::commands::table::{megabytes, table};
use crate::context::{Context, Purpose};
use crate::models::{self, Located};
use crate::provenance;

/// `lowbit bench`.
pub fn bench(ctx: &Context, args: &BenchArgs) -> Result<()> {
    refuse_existing(args.output.as_ref(), args.force)?;
    let candidate = models::locate(ctx, &args.model)?;
    let reference = args.reference.as_deref().map(|r| models::locate(ctx, r)).transpose()?;
    let options = BenchOptions {
        prompt: args.prompt,
        generate: args.generate,
        batches: args.batch.clone(),
        repetitions: args.repetitions,
        threads: ctx.threads,
        ..BenchOptions::default()
    };
    let record = measure(ctx, &candidate, reference.as_ref(), &options)?;
    if let Some(path) = &args.output {
        write_atomic(path, &serde_json::to_vec_pretty(&record)?)?;
    }
    ctx.print(&record, || summary(&record))
}

/// Loads both models and measures.
pub fn measure(
    ctx: &Context,
    candidate: &Located,
    reference: Option<&Located>,
    options: &BenchOptions,
) -> Result<BenchRecord> {
    let (_, model) = candidate.load(ctx, Purpose::Speed)?;
    let other = reference.map(|r| r.load(ctx, Purpose::Speed)).transpose()?;
    ctx.progress.stage("bench", 0);
    ctx.progress.detail("memory bandwidth");
    let backend = ctx.backend_for(Purpose::Speed)?;
    let bandwidth = match backend.name() {
        // The weights are in the card's memory.
        "cuda" => {
            let elements = CeilingSizes::for_device("cuda").elements;
            copy_bandwidth(backend.as_ref(), elements, &SuiteOptions::default())?
        }
        _ => read_bandwidth(ctx.threads),
    };
    let pair = reference.zip(other.as_ref()).map(|(r, l)| (r.name.as_str(), &l.1));
    let out =
        lowbit_bench::run((&candidate.name, &model), pair, options, bandwidth, &|text| ctx.progress.detail(text))?;
    ctx.progress.clear();
    ctx.check_stop()?;
    Ok(BenchRecord {
        schema: lowbit_bench::SCHEMA,
        provenance: provenance::gather(ctx, Purpose::Speed, candidate, reference, options.seed, option_map(options))?,
        bandwidth_bytes_per_second: out.bandwidth,
        rows: out.rows,
        speed_ups: out.speed_ups,
        latency: out.latency,
        memory: out.memory,
    })
}

/// The full options, for the record.
pub fn option_map(options: &BenchOptions) -> BTreeMap<String, serde_json::Value> {
    let mut map = BTreeMap::new();
    map.insert("prompt".to_string(), options.prompt.into());
    map.insert("generate".to_string(), options.generate.into());
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
            ]
        })
        .collect();
    let mut out = vec![
        match &r.provenance.gpu {
            Some(gpu) => format!("copy bandwidth {:.1} GB/s of {gpu}", r.bandwidth_bytes_per_second / 1e9),
            None => {
                let rate = r.bandwidth_bytes_per_second / 1e9;
                format!("read bandwidth {rate:.1} GB/s with {} threads", r.provenance.threads)
            }
        },
        table(&["model", "test", "batch", "tok/s", "bytes/step", "of bandwidth"], &rows),
    ];
    for s in &r.speed_ups {
        out.push(format!("{} batch {}: {:.3}× [{:.3}, {:.3}]", s.test, s.batch, s.ratio, s.low, s.high));
    }
    for l in &r.latency {
        out.push(format!(
            "{}: TTFT ({} tokens) p50 {:.1} ms, p99 {:.1} ms; ITL p50 {:.2} ms, p99 {:.2} ms",
            l.role, l.prompt_tokens, l.ttft_ms[0], l.ttft_ms[2], l.itl_token_ms[0], l.itl_token_ms[2]
        ));
    }
    out.join("\n")
}
