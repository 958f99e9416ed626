//! `lowbit run`: plan, quantize, verify, eval, gate, bench, serving, report. A stage whose record is there and belongs to the same
//! input and options is not done again.

use std::path::Path;

use anyhow::{Result, bail};
use lowbit_bench::{BenchOptions, BenchRecord};
use lowbit_checkpoint::CheckpointError;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_kernels::LinearScheme;
use lowbit_quantize::record::{PlanRecord, QuantizeRecord};
use lowbit_quantize::{gguf, verify};
use serde::de::DeserializeOwned;

use crate::args::{KvCacheArg, RunArgs};
use crate::commands::run_accuracy::{self, Pair};
use crate::commands::{bench, quantize, report, run_serving};
use crate::context::Context;
use crate::exit::VerdictError;
use crate::models::{self, Located};

/// The main job.
pub fn run(ctx: &Context, args: &RunArgs) -> Result<()> {
    let demo = args.model == "demo";
    let mut q = args.quant.clone();
    if demo {
        // The demo needs no data of the user's: the model writes its own calibration text.
        q.calib.get_or_insert_with(|| "self".into());
        if LinearScheme::has_groups(&q.scheme) {
            q.group_size.get_or_insert_with(|| "64".into());
        }
        if args.quant.samples == 128 && args.quant.seq_len == 512 {
            (q.samples, q.seq_len) = (64, 256);
        }
    }
    let options = quantize::options(&q)?;
    let timing = BenchOptions { repetitions: args.repetitions, threads: ctx.threads, ..BenchOptions::default() };
    if !args.no_bench {
        timing.check(true)?;
    }
    run_accuracy::check_limits(args, demo)?;
    let located = models::locate_floats(ctx, &args.model)?;
    let ckpt = located.open_floats()?;
    let dir = &args.output;
    let model_dir = dir.join("model");
    quantize::refuse_same(&located.dir, &model_dir)?;
    let made = quantize::make_plan(ctx, &located, &ckpt, &options, &q, Some(&model_dir))?;
    let old_plan: Option<PlanRecord> = read(&dir.join("plan.json"));
    let same = old_plan.as_ref().is_some_and(|p| {
        p.provenance.model_sha256 == made.record.provenance.model_sha256
            && p.provenance.options == made.record.provenance.options
    });
    let occupied = dir.exists() && std::fs::read_dir(dir).is_ok_and(|mut d| d.next().is_some());
    if occupied && !same && !args.force {
        bail!(
            "{} already holds something else: another model, other options, or foreign files\nhint: choose another output, or pass --force to start anew",
            dir.display()
        );
    }
    let resume = same && !args.force;
    if !(resume && model_dir.exists()) {
        // Mistakes in task files and texts come before the work, not after it.
        run_accuracy::check(ctx, args, &located.name, demo)?;
    }
    ctx.say(quantize::describe(&made.record));
    std::fs::create_dir_all(dir).map_err(|e| CheckpointError::io(dir, e))?;
    if !resume {
        run_accuracy::forget(dir)?;
        for old in ["quantize.json", "bench.json", run_serving::SPECULATION]
            .iter()
            .chain(&report::FILES)
            .chain(&run_serving::FILES)
        {
            match std::fs::remove_file(dir.join(old)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(CheckpointError::io(&dir.join(old), e).into());
                }
                _ => {}
            }
        }
    }
    write_atomic(&dir.join("plan.json"), &serde_json::to_vec_pretty(&made.record)?)?;

    let done: Option<QuantizeRecord> =
        if resume && model_dir.exists() { read(&dir.join("quantize.json")) } else { None };
    let record = match done {
        Some(r) => {
            ctx.say("quantize: done before");
            r
        }
        None => {
            let r = quantize::execute(ctx, &ckpt, &made, &q, &model_dir, true, args.force)?;
            if let Ok(recipe) = std::fs::read(model_dir.join("recipe.toml")) {
                write_atomic(&dir.join("recipe.toml"), &recipe)?;
            }
            write_atomic(&dir.join("quantize.json"), &serde_json::to_vec_pretty(&r)?)?;
            r
        }
    };
    ctx.say(quantize::summary(&record));
    let name = model_dir.display().to_string();
    let (quantized, verified) = match models::gguf_file(&model_dir) {
        // llama.cpp's file is scored as lowbit reads it.
        Some(f) => (models::locate(ctx, &name)?, gguf::verify(&f, Some(&record), Some(&ckpt))?),
        None => {
            let quantized = Located::new(name, model_dir.clone());
            let verified = verify::verify(&quantized.open()?, Some(&record), Some(&ckpt))?;
            (quantized, verified)
        }
    };
    ctx.say(format!(
        "verify: {} packed linears, {} tensors bit for bit the original's",
        verified.packed_linears, verified.compared_with_original
    ));
    drop(ckpt);
    let sha = quantized.sha256()?;

    let pair = Pair { original: &located, quantized: &quantized, sha256: &sha };
    let verdict = match run_accuracy::evaluate(ctx, args, &pair, demo, resume)? {
        Some(_) => run_accuracy::verdict(ctx, args)?,
        None => None,
    };
    if !args.no_bench {
        let old: Option<BenchRecord> = if resume { read(&dir.join("bench.json")) } else { None };
        if old.is_some_and(|b| {
            b.provenance.model_sha256 == sha
                && b.provenance.options == bench::option_map(&timing)
                && b.provenance.threads == ctx.threads
        }) {
            ctx.say("bench: done before");
        } else {
            let b = bench::measure(ctx, &quantized, Some(&located), &timing, KvCacheArg::Float)?;
            write_atomic(&dir.join("bench.json"), &serde_json::to_vec_pretty(&b)?)?;
            ctx.say(bench::summary(&b));
        }
    }
    if args.serve_bench {
        run_serving::measure(ctx, args, &pair, demo, resume)?;
        run_serving::speculate(ctx, args, &pair, resume)?;
    }
    let written = lowbit_report::write(std::slice::from_ref(dir), dir)?;
    let name = verdict.as_ref().map(|v| v.verdict.name());
    ctx.print(&serde_json::json!({"output": dir, "verdict": name, "written": written}), || {
        format!("report: {}", dir.join("report.html").display())
    })?;
    match verdict {
        Some(v) if run_accuracy::asked(args) && v.verdict.exit_code() != 0 => {
            let text = format!("{}: {}", v.verdict.name(), v.reason);
            Err(VerdictError { code: v.verdict.exit_code(), text }.into())
        }
        _ => Ok(()),
    }
}

/// A record of an earlier run; one that cannot be read is made again.
pub fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
