//! `lowbit suite`: the device's operations against the reference, and their times.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lowbit_bench::suite::correctness::Activations;
use lowbit_bench::suite::cost::tokens;
use lowbit_bench::suite::kernels::{self, CeilingSizes};
use lowbit_bench::suite::{SCHEMA, SuiteOptions, SuiteRecord, correctness, table as rows_of};
use lowbit_checkpoint::writer::write_atomic;
use lowbit_kernels::cuda::Arithmetic;
use lowbit_quantize::Progress;
use lowbit_report::gpu;
use serde_json::json;

use crate::args::{SuiteArgs, SuitePart};
use crate::commands::eval::refuse_existing;
use crate::commands::table::listing;
use crate::context::{Context, Purpose};
use crate::provenance;

/// `lowbit suite`.
pub fn suite(ctx: &Context, args: &SuiteArgs) -> Result<()> {
    let (check, time) = (args.only != Some(SuitePart::Kernels), args.only != Some(SuitePart::Correctness));
    if let Some(path) = &args.render {
        let record = gpu::GpuRecord::read(path)?;
        return ctx.print(&record, || gpu::markdown(&record));
    }
    if args.dry_run {
        return dry_run(ctx, check, time);
    }
    refuse_existing(args.output.as_ref(), args.force)?;
    let record = measure(ctx, args, check, time)?;
    if let Some(path) = &args.output {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        write_atomic(path, &serde_json::to_vec_pretty(&record)?)?;
    }
    ctx.print(&record, || summary(&record))?;
    let (wrong, failed) = (record.wrong().count(), record.left.iter().filter(|l| l.failed).count());
    if wrong + failed > 0 {
        let rows = record.correctness.len();
        bail!("{wrong} of {rows} operations disagree with the scalar reference, {failed} timed rows failed");
    }
    Ok(())
}

fn measure(ctx: &Context, args: &SuiteArgs, check: bool, time: bool) -> Result<SuiteRecord> {
    let (start, backend) = (Instant::now(), ctx.backend_for(Purpose::Speed)?);
    if time && matches!(backend.name(), "emulated" | "scalar") {
        bail!("times on the device {} say nothing\nhint: --only correctness, or --device cuda or cpu", backend.name());
    }
    let options = SuiteOptions { limit: args.limit_seconds.map(Duration::from_secs), ..SuiteOptions::default() };
    let mut map = BTreeMap::new();
    map.insert("correctness".to_string(), check.into());
    map.insert("kernels".to_string(), time.into());
    map.insert("limit_seconds".to_string(), args.limit_seconds.into());
    map.insert("repetitions".to_string(), options.repetitions.into());
    map.insert("cold_bytes".to_string(), options.cold_bytes.into());
    let mut record = SuiteRecord {
        schema: SCHEMA,
        provenance: provenance::without_model(ctx, Purpose::Speed, 0, map)?,
        correctness: Vec::new(),
        ceilings: None,
        kernels: Vec::new(),
        left: Vec::new(),
        seconds: 0.0,
    };
    ctx.progress.stage("suite", 0);
    let detail = |text: &str| ctx.progress.detail(text);
    if check {
        let accurate = ctx.backend()?;
        // What rounds activations is held against a reference that does the same.
        let activations = activations(ctx, Purpose::Accuracy)?;
        record.correctness = correctness::check(accurate.as_ref(), &correctness::cases(activations), &detail);
        if self::activations(ctx, Purpose::Speed)? != activations {
            let mut cases = correctness::linears(Activations::Bf16);
            cases.extend(correctness::attentions(Activations::Bf16));
            record.correctness.extend(correctness::check(backend.as_ref(), &cases, &detail));
        }
    }
    if time {
        let element = activations(ctx, Purpose::Speed)?.cache_bytes();
        let ceilings =
            kernels::ceilings(backend.as_ref(), &CeilingSizes::for_device(backend.name()), &options, &detail)?;
        let mut rows = rows_of::rows(element);
        rows.retain(|r| !r.kernel.is_solver() || backend.solver().is_some());
        let timed = kernels::run(backend.as_ref(), &rows, &ceilings, &options, start, &detail)?;
        record.ceilings = Some(ceilings);
        (record.kernels, record.left) = (timed.rows, timed.left);
    }
    ctx.progress.clear();
    record.seconds = start.elapsed().as_secs_f64();
    Ok(record)
}

/// How the products of a purpose's backend read their activations.
fn activations(ctx: &Context, purpose: Purpose) -> Result<Activations> {
    let half = ctx.arithmetic(purpose)? == Some(Arithmetic::Half);
    Ok(if half { Activations::Bf16 } else { Activations::F32 })
}

fn dry_run(ctx: &Context, check: bool, time: bool) -> Result<()> {
    let mut cases = Vec::new();
    if check {
        cases.extend(correctness::cases(Activations::F32));
        cases.extend(correctness::linears(Activations::Bf16));
        cases.extend(correctness::attentions(Activations::Bf16));
    }
    let rows = if time { rows_of::rows(activations(ctx, Purpose::Speed)?.cache_bytes()) } else { Vec::new() };
    let json = json!({
        "correctness": cases.iter().map(|c| json!({"op": c.op, "case": c.case, "tolerance": c.tolerance})).collect::<Vec<_>>(),
        "kernels": rows.iter().map(|r| json!({"row": r.name(), "bytes": r.kernel.bytes(), "flops": r.kernel.flops()})).collect::<Vec<_>>(),
    });
    ctx.print(&json, || {
        let mut parts = Vec::new();
        if check {
            let lines: Vec<_> =
                cases.iter().map(|c| vec![format!("{}: {}", c.op, c.case), format!("{:.1e}", c.tolerance)]).collect();
            parts.push(format!("{} operations against the scalar reference\n", lines.len()));
            parts.push(listing(&["operation", "tolerance"], &lines));
        }
        if time {
            let lines: Vec<_> = rows
                .iter()
                .map(|r| vec![r.name(), r.kernel.bytes().to_string(), r.kernel.flops().to_string()])
                .collect();
            let gap = if check { "\n" } else { "" };
            parts.push(format!(
                "{gap}{} timed rows, after the ceilings (copy, addition, large bf16 linear)\n",
                lines.len()
            ));
            parts.push(listing(&["row", "bytes", "flops"], &lines));
        }
        parts.join("\n")
    })
}

/// Every row as text.
fn summary(r: &SuiteRecord) -> String {
    let mut out = Vec::new();
    if !r.correctness.is_empty() {
        let lines: Vec<_> = r
            .correctness
            .iter()
            .map(|c| {
                let error = c.error.map_or("–".to_string(), |e| format!("{e:.1e}"));
                let verdict = if c.passed { "ok" } else { c.problem.as_deref().unwrap_or("too far") };
                vec![format!("{}: {}", c.op, c.case), error, format!("{:.1e}", c.tolerance), verdict.to_string()]
            })
            .collect();
        out.push(listing(&["operation", "error", "tolerance", ""], &lines));
    }
    if let Some(c) = &r.ceilings {
        out.push(format!(
            "copy {:.1} GB/s, addition {:.1} GB/s, large bf16 linear {:.2} TFLOP/s",
            c.copy_bytes_per_second / 1e9,
            c.add_bytes_per_second / 1e9,
            c.flops_per_second / 1e12
        ));
        let lines: Vec<_> = r
            .kernels
            .iter()
            .map(|k| {
                let format = k.format.map_or(String::new(), |f| format!("{} ", f.name()));
                vec![
                    format!("{} {}: {} {format}{}, {}", k.model, k.layers, k.op, k.shape, tokens(k.tokens)),
                    format!("{:.2} µs", k.median_ns / 1e3),
                    format!("{:.1}", k.bytes_per_second / 1e9),
                    format!("{:.2}", k.flops_per_second / 1e12),
                    format!("{:.0} %", 100.0 * k.ceiling_frac),
                ]
            })
            .collect();
        out.push(listing(&["row", "time", "GB/s", "TFLOP/s", "of ceiling"], &lines));
    }
    out.extend(r.left.iter().map(|l| format!("not timed: {}: {}", l.row, l.reason)));
    out.join("\n\n")
}
