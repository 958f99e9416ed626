//! `lowbit run --serve-bench`: what `lowbit load` sees of a server of each model, a process of its own each, and what the quantized
//! model is worth as the original's draft.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::{Args as _, FromArgMatches as _};
use lowbit_bench::load::record::LoadRecord;
use lowbit_bench::speculation::SpeculationRecord;
use lowbit_checkpoint::writer::write_atomic;
use serde_json::Value;

use crate::args::{LoadArgs, RunArgs};
use crate::commands::bench_draft::{self, DraftOptions};
use crate::commands::load;
use crate::commands::run::read;
use crate::commands::run_accuracy::Pair;
use crate::context::Context;
use crate::models::Located;

/// What is left, the quantized model's first.
pub const FILES: [&str; 2] = ["load.json", "load-reference.json"];

/// And this.
pub const SPECULATION: &str = "speculation.json";

/// Streams of the busiest stage.
const STREAMS: usize = 16;

/// A server, asked to end when dropped.
struct Server {
    child: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing of it is worth waiting for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(ctx: &Context, model: &Located) -> Result<Server> {
    let me = std::env::current_exe().context("cannot find the program itself")?;
    let queue = (4 * STREAMS).to_string();
    let mut command = Command::new(me);
    command.args(ctx.flags()).args(["--quiet", "--json", "serve"]).arg(&model.dir);
    command.args(["--port", "0", "--max-queue", &queue, "--served-name", &model.name, "--end-with-stdin"]);
    // Held open by this process alone: the server ends with it, even when it is killed.
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut server = Server { child: spawned.context("cannot start `lowbit serve`")?, url: String::new() };
    let out = server.child.stdout.take().context("`lowbit serve` has no output")?;
    let mut text = String::new();
    let mut lines = BufReader::new(out);
    // Its greeting is one document over several lines.
    while lines.read_line(&mut text).context("cannot read from `lowbit serve`")? > 0 {
        if let Ok(hello) = serde_json::from_str::<Value>(&text) {
            server.url = hello.get("url").and_then(Value::as_str).unwrap_or_default().to_string();
            return Ok(server);
        }
    }
    bail!("`lowbit serve {}` ended before it served", model.name)
}

/// The command line of `lowbit load` this is.
fn words(args: &RunArgs, demo: bool, model: &Located, url: &str) -> Vec<String> {
    let data = args.serve_data.clone().unwrap_or_else(|| if demo { "demo" } else { "chat" }.into());
    let mut words: Vec<String> = ["load", url, "--profile"].map(String::from).to_vec();
    words.push(format!("sweep:6:poisson:{STREAMS}"));
    words.extend(["--data".into(), data, "--slo".into(), args.serve_slo.clone()]);
    words.extend([
        "--duration".into(),
        args.serve_seconds.to_string(),
        "--grace".into(),
        args.serve_seconds.to_string(),
    ]);
    words.extend(["--tokenizer".into(), model.dir.display().to_string()]);
    words
}

/// Measures both models, one after the other. A record of the same weights and options is kept.
pub fn measure(ctx: &Context, args: &RunArgs, pair: &Pair, demo: bool, resume: bool) -> Result<()> {
    for (file, model) in FILES.iter().zip([pair.quantized, pair.original]) {
        let path = args.output.join(file);
        let sha = if std::ptr::eq(model, pair.quantized) { pair.sha256.to_string() } else { model.sha256()? };
        // The address is another every time.
        let wanted = words(args, demo, model, "").join(" ");
        if resume && kept(&path, &sha, &wanted) {
            ctx.say(format!("{file}: done before"));
            continue;
        }
        ctx.say(format!("serve-bench: {}", model.name));
        let server = start(ctx, model)?;
        let line = clap::Command::new("load");
        let parsed = LoadArgs::augment_args(line).try_get_matches_from(words(args, demo, model, &server.url))?;
        let mut record = load::measure(ctx, &LoadArgs::from_arg_matches(&parsed)?)?;
        ctx.check_stop()?;
        record.provenance.model_sha256 = sha;
        record.provenance.options.insert("serve_bench".into(), wanted.into());
        write_atomic(&path, &serde_json::to_vec(&record)?)?;
    }
    Ok(())
}

/// The quantized model drafts for the original. A record of the same weights and options is kept.
pub fn speculate(ctx: &Context, args: &RunArgs, pair: &Pair, resume: bool) -> Result<()> {
    let path = args.output.join(SPECULATION);
    let options = DraftOptions { draft_tokens: 4, output_tokens: 64, repetitions: args.repetitions.max(2) };
    let sha = pair.original.sha256()?;
    let done = resume
        && read::<SpeculationRecord>(&path).is_some_and(|r| {
            let p = &r.provenance;
            p.model_sha256 == sha
                && p.reference_sha256.as_deref() == Some(pair.sha256)
                && p.options == options.map(&pair.quantized.name)
                && p.threads == ctx.threads
        });
    if done {
        ctx.say(format!("{SPECULATION}: done before"));
        return Ok(());
    }
    let record = bench_draft::measure(ctx, pair.original, pair.quantized, options)?;
    write_atomic(&path, &serde_json::to_vec_pretty(&record)?)?;
    ctx.say(bench_draft::summary(&record));
    Ok(())
}

fn kept(path: &Path, sha: &str, wanted: &str) -> bool {
    read::<LoadRecord>(path).is_some_and(|r| {
        r.provenance.model_sha256 == sha && r.provenance.options.get("serve_bench").is_some_and(|v| v == wanted)
    })
}
