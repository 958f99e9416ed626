//! What `lowbit run` measures of accuracy: texts, tasks, where drift comes from, and the gate's verdict on them.

use std::path::Path;

use anyhow::{Result, bail};
use lowbit_checkpoint::CheckpointError;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_eval::verdict::GateRecord;
use lowbit_eval::{EvalRecord, KlOptions, Protocol, Source};
use serde_json::Value;

use crate::args::{BlameArg, EndpointArgs, EvalArgs, GateArgs, JudgeArgs, KvCacheArg, RunArgs, TaskArgs};
use crate::commands::run::read;
use crate::commands::scores::{Job, Output};
use crate::commands::{drift, eval, gate};
use crate::context::Context;
use crate::demo_tasks;
use crate::models::{self, Located};

/// Positions shown of the demo.
const DEMO_TOKENS: usize = 12;

/// Files an evaluation leaves, its verdict among them.
pub const FILES: [&str; 7] = [
    "eval.json",
    "eval.items.jsonl",
    "eval.reference.items.jsonl",
    "eval.journal",
    "eval.reference.journal",
    "eval.texts.journal",
    "gate.json",
];

/// Both models of a run.
pub struct Pair<'a> {
    /// The original.
    pub original: &'a Located,
    /// What was made of it.
    pub quantized: &'a Located,
    /// SHA-256 of the latter.
    pub sha256: &'a str,
}

/// What an evaluation asks.
struct Asked {
    /// As `lowbit eval` takes it.
    args: EvalArgs,
    /// Texts.
    request: eval::Request,
    /// Tasks, rendered.
    job: Option<Job>,
}

/// Fails where a limit is on something that this run does not measure: it would not be judged, and the exit code would say pass.
pub fn check_limits(args: &RunArgs, demo: bool) -> Result<()> {
    let text = demo || args.eval_text.is_some();
    let tasks = !args.tasks.is_empty() || (demo && !args.no_gate);
    gate::check_margin(args.margin)?;
    if args.margin.is_some() && !tasks {
        bail!("--margin is of tasks\nhint: give --tasks; --max-kl and --max-ppl-ratio judge an --eval-text");
    }
    if args.max_kl.is_some() && !text {
        bail!("--max-kl is of a text\nhint: give --eval-text TEXT");
    }
    if args.max_ppl_ratio.is_some() && !text && !tasks {
        bail!("--max-ppl-ratio is of a text\nhint: give --eval-text TEXT");
    }
    Ok(())
}

/// Finds what is wrong with texts and tasks before there is a model to ask.
pub fn check(ctx: &Context, args: &RunArgs, original: &str, demo: bool) -> Result<()> {
    let quantized = args.output.join("model").display().to_string();
    let output = Output::of(&args.output.join("eval.json"))?;
    prepare(ctx, args, (quantized.as_str(), original), demo, &output).map(drop)
}

/// Reads all that an evaluation needs beside the models (named quantized, original); none where neither a text nor a task was given.
fn prepare(ctx: &Context, args: &RunArgs, names: (&str, &str), demo: bool, output: &Output) -> Result<Option<Asked>> {
    let source = match &args.eval_text {
        Some(p) => Some(Source::read(p)?),
        None if demo => Some(Source::from_text("demo-text/evaluation.txt", models::DEMO_TEXT.to_string())),
        None => None,
    };
    let wanted = eval_args(args, names, demo, source.is_some())?;
    if source.is_none() && wanted.tasks.tasks.is_empty() {
        return Ok(None);
    }
    let protocol = args.protocol.clone().unwrap_or_else(|| if demo { "gptq-512".into() } else { "gptq-2048".into() });
    protocol.parse::<Protocol>()?;
    let kl = KlOptions { window: if demo { 512 } else { 1024 }, limit: Some(args.kl_windows) };
    let request = eval::Request {
        perplexity: source.clone().map(|s| (s, vec![protocol])),
        kl: source.map(|s| (s, kl)),
        limit: Some(args.limit),
    };
    let job = match wanted.tasks.tasks.is_empty() {
        true => None,
        false => Some(Job::prepare(ctx, &wanted, Some(output))?),
    };
    if let Some((task, _)) = job.as_ref().and_then(|j| j.suite.judges().next()) {
        bail!("{task} is judged by a language model\nhint: leave it out, and score it with `lowbit eval --judge URL`");
    }
    Ok(Some(Asked { args: wanted, request, job }))
}

/// `eval.json`; none where neither a text nor a task was given.
pub fn evaluate(ctx: &Context, args: &RunArgs, pair: &Pair, demo: bool, resume: bool) -> Result<Option<EvalRecord>> {
    let path = args.output.join("eval.json");
    let output = Output::of(&path)?;
    let names = (pair.quantized.name.as_str(), pair.original.name.as_str());
    let Some(Asked { args: wanted, request, mut job }) = prepare(ctx, args, names, demo, &output)? else {
        // Records of an earlier text would end up in the report of this run.
        forget(&args.output)?;
        ctx.say("eval: neither --eval-text nor --tasks, so nothing on accuracy");
        return Ok(None);
    };
    if let Some(job) = &mut job {
        // `limit` is that of texts.
        let limit = job.options.remove("limit").unwrap_or(Value::Null);
        job.options.insert("task_limit".into(), limit);
    }
    let mut options = request.options();
    if let Some((_, o)) = &request.kl {
        options.extend(drift::options(&wanted, o));
    }
    options.extend(job.iter().flat_map(|j| j.options.clone()));
    let old: Option<EvalRecord> = if resume { read(&path) } else { None };
    if let Some(old) = old
        && old.provenance.model_sha256 == pair.sha256
        && old.provenance.options == options
    {
        ctx.say("eval: done before");
        // Of a process killed after it wrote the record.
        output.finish()?;
        return Ok(Some(old));
    }
    let models = eval::Models::load(ctx, pair.quantized.clone(), Some(pair.original.clone()), KvCacheArg::Float)?;
    let record = eval::evaluate(ctx, &wanted, &request, (job.as_ref(), None), models, Some(&output))?;
    write_atomic(&path, &serde_json::to_vec_pretty(&record)?)?;
    output.finish()?;
    ctx.say(eval::summary(&record));
    Ok(Some(record))
}

/// Removes what an earlier evaluation left.
pub fn forget(dir: &Path) -> Result<()> {
    for file in FILES {
        match std::fs::remove_file(dir.join(file)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(CheckpointError::io(&dir.join(file), e).into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// As `lowbit eval` takes them.
fn eval_args(args: &RunArgs, (quantized, original): (&str, &str), demo: bool, text: bool) -> Result<EvalArgs> {
    let demo = demo && !args.no_gate;
    let mut tasks = args.tasks.clone();
    if demo && tasks.is_empty() {
        tasks = demo_tasks::unpacked()?.iter().map(|p| p.display().to_string()).collect();
    }
    Ok(EvalArgs {
        command: None,
        model: Some(quantized.to_string()),
        reference: Some(original.to_string()),
        ppl: None,
        protocol: Vec::new(),
        kl: None,
        kv_cache: KvCacheArg::Float,
        kl_window: 0,
        free_running: None,
        free_tokens: 0,
        worst_tokens: args.worst_tokens.or(demo.then_some(DEMO_TOKENS)).filter(|_| text),
        blame: args.blame.or(demo.then_some(BlameArg::Linear)).filter(|_| text),
        blame_windows: 4,
        limit: args.task_limit,
        windows: None,
        tasks: TaskArgs {
            tasks,
            data: args.data.clone(),
            include: args.include.clone(),
            looks: 1,
            fewshot_as_multiturn: true,
            ..TaskArgs::default()
        },
        output: None,
        force: true,
        endpoint: EndpointArgs::default(),
        judge: JudgeArgs::default(),
    })
}

/// Whether the user asked for a verdict: the demo's own tasks are there to be shown.
pub fn asked(args: &RunArgs) -> bool {
    !args.no_gate && !args.tasks.is_empty()
        || args.margin.is_some()
        || args.max_kl.is_some()
        || args.max_ppl_ratio.is_some()
}

/// `gate.json`; none where nothing can be judged.
pub fn verdict(ctx: &Context, args: &RunArgs) -> Result<Option<GateRecord>> {
    let path = args.output.join("gate.json");
    let gate = GateArgs {
        candidate: Some(args.output.join("eval.json")),
        baseline: None,
        margin: args.margin,
        alpha: 0.05,
        power: 0.8,
        metric: Vec::new(),
        max_kl: args.max_kl,
        max_ppl_ratio: args.max_ppl_ratio,
        max_unjudged: 1.0,
        seed: 0,
        output: None,
        junit: None,
        markdown: None,
        force: true,
        simulate: false,
        items: Vec::new(),
        discordant: 0.0,
        loss: 0.0,
        looks: 1,
        runs: 0,
    };
    let judged = if args.no_gate { None } else { gate::judged(ctx, &gate)? };
    let Some(record) = judged else {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        if args.no_gate {
            return Ok(None);
        }
        ctx.say("gate: no task with a score and no limit on drift (--tasks, --max-kl, --max-ppl-ratio): no verdict");
        return Ok(None);
    };
    write_atomic(&path, &serde_json::to_vec_pretty(&record)?)?;
    ctx.say(gate::summary(&record));
    Ok(Some(record))
}
