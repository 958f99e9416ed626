//! `lowbit eval`, and the evaluation that `run` does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use lowbit_checkpoint::converted::ConvertRecord;
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_checkpoint::{Checkpoint, CheckpointError};
use lowbit_eval::engine::{EngineOptions, NoStore, Store};
use lowbit_eval::{EvalRecord, KlOptions, Protocol, Scorer, Setup, Source, evaluate_kl, evaluate_perplexity};
use lowbit_model::Model;
use lowbit_quantize::Progress;

use crate::args::{EvalArgs, EvalCommand, KvCacheArg};
use crate::commands::judge::{self, Judge};
use crate::commands::scores::{self, Job, Output};
use crate::commands::table::table;
use crate::commands::{drift, endpoint, merge, tasks};
use crate::context::{Context, Purpose};
use crate::models::{self, Located};
use crate::provenance;

/// What to evaluate.
pub struct Request {
    /// Text and protocols.
    pub perplexity: Option<(Source, Vec<String>)>,
    /// Text and options.
    pub kl: Option<(Source, KlOptions)>,
    /// Windows at most.
    pub limit: Option<usize>,
}

impl Request {
    /// The full options, for the record.
    pub fn options(&self) -> BTreeMap<String, serde_json::Value> {
        let mut options = BTreeMap::new();
        options.insert("limit".into(), self.limit.into());
        if let Some((s, p)) = &self.perplexity {
            options.insert("ppl".into(), s.name.clone().into());
            options.insert("protocol".into(), p.clone().into());
        }
        if let Some((s, o)) = &self.kl {
            options.insert("kl".into(), s.name.clone().into());
            options.insert("kl_window".into(), o.window.into());
            options.insert("kl_limit".into(), o.limit.into());
        }
        options
    }
}

/// The models of a run.
pub struct Models {
    /// Folder and name of the candidate.
    pub candidate: Located,
    /// Folder and name of the reference.
    pub reference: Option<Located>,
    /// The candidate.
    pub model: Model,
    /// The reference, of the same vocabulary.
    pub other: Option<Model>,
    /// How the candidate keeps keys and values.
    pub kv: KvCacheArg,
    /// Their folders, open while they are read.
    checkpoints: Vec<Checkpoint>,
    /// The candidate's tokenizer.
    pub tokenizer: Tokenizer,
    /// The candidate's family (`llama`, `gemma3_text`, ...).
    pub family: String,
    /// Fewest bits of the candidate's quantized weights.
    pub bits: Option<u32>,
}

impl Models {
    /// Opens and loads both; `kv` is how the candidate keeps keys and values.
    pub fn load(ctx: &Context, candidate: Located, reference: Option<Located>, kv: KvCacheArg) -> Result<Self> {
        // The record names the weights by their hash, which takes as long as loading them.
        candidate.hash_ahead();
        reference.iter().for_each(Located::hash_ahead);
        let (ckpt, model, tokenizer) = candidate.load_with_tokenizer(ctx.backend_with_kv(Purpose::Accuracy, kv)?)?;
        let usual = |r: &Located| r.load_with_tokenizer(ctx.backend_for(Purpose::Accuracy)?);
        let loaded = reference.as_ref().map(usual).transpose()?;
        if let (Some(r), Some((theirs, _, words))) = (&reference, &loaded)
            && (model.config().vocab_size != theirs.config.vocab_size || words.vocab_size() != tokenizer.vocab_size())
        {
            bail!(
                "{} and {} have different vocabularies: their distributions cannot be compared",
                candidate.name,
                r.name
            );
        }
        // What was converted, as a GGUF file is on import, may be dense here and was not there.
        let before = ConvertRecord::read(&candidate.dir)?.and_then(|r| r.bits);
        let groups = ckpt.quantization.iter().flat_map(|q| &q.groups);
        let bits = groups.map(|g| g.scheme.code_bits()).chain(before).min();
        let family = ckpt.config.family.clone();
        let (second, other) = loaded.map(|(ckpt, model, _)| (ckpt, model)).unzip();
        let checkpoints = [ckpt].into_iter().chain(second).collect();
        Ok(Self { candidate, reference, model, other, kv, checkpoints, tokenizer, family, bits })
    }
}

/// `lowbit eval`.
pub fn eval(ctx: &Context, args: &EvalArgs) -> Result<()> {
    if let Some(EvalCommand::Merge(m)) = &args.command {
        return merge::merge(ctx, m);
    }
    if args.tasks.render {
        return tasks::render(ctx, args);
    }
    let names = [("MODEL", &args.model, "--endpoint"), ("--reference", &args.reference, "--reference-endpoint")];
    for (what, name, option) in names {
        if let Some(url) = name.as_ref().filter(|n| n.starts_with("http://") || n.starts_with("https://")) {
            bail!("{what} is a folder, a .gguf file, `demo` or a hub id, found {url}\nhint: {option} {url}");
        }
    }
    if args.endpoint.any() {
        return endpoint::eval(ctx, args);
    }
    if args.ppl.is_none() && args.kl.is_none() && args.tasks.tasks.is_empty() {
        bail!("nothing to evaluate\nhint: give --tasks, --ppl TEXT, or --kl TEXT with --reference MODEL");
    }
    if args.kl.is_some() && args.reference.is_none() {
        bail!("--kl compares with a reference\nhint: give --reference MODEL");
    }
    refuse_existing(args.output.as_ref(), args.force)?;
    let output = args.output.as_deref().map(Output::of).transpose()?;
    let read = |p: &Option<PathBuf>| p.as_ref().map(|p| Source::read(p)).transpose();
    let windows = args.windows.or(args.limit);
    let request = Request {
        perplexity: read(&args.ppl)?.map(|s| (s, args.protocol.clone())),
        kl: read(&args.kl)?.map(|s| (s, KlOptions { window: args.kl_window, limit: windows })),
        limit: windows,
    };
    let name = args.model.as_deref().unwrap_or_default();
    // Mistakes in task files and data come before any weight is read.
    let job = if args.tasks.tasks.is_empty() { None } else { Some(Job::prepare(ctx, args, output.as_ref())?) };
    let judge = match &job {
        Some(job) => Judge::connect(ctx, args, job, output.as_ref())?,
        None => None,
    };
    let candidate = models::locate(ctx, name)?;
    let reference = args.reference.as_deref().map(|r| models::locate(ctx, r)).transpose()?;
    let models = Models::load(ctx, candidate, reference, args.kv_cache)?;
    let mut record = evaluate(ctx, args, &request, (job.as_ref(), judge.as_ref()), models, output.as_ref())?;
    if let Some(n) = args.windows {
        record.provenance.options.insert("windows".into(), n.into());
        record.provenance.options.insert("limit".into(), args.limit.into());
    }
    if args.kv_cache != KvCacheArg::Float {
        record.provenance.options.insert("kv_cache".into(), args.kv_cache.name().into());
    }
    if let Some(output) = &output {
        write_atomic(&output.record, &serde_json::to_vec_pretty(&record)?)?;
        output.finish()?;
        output.announce(ctx, &record);
    }
    ctx.print(&record, || summary(&record))
}

/// An existing record is not overwritten without --force.
pub fn refuse_existing(path: Option<&PathBuf>, force: bool) -> Result<()> {
    match path {
        // A device or a pipe (`/dev/stdout`) is written to.
        Some(p) if (p.is_file() || p.is_dir()) && !force => Err(CheckpointError::Exists { path: p.clone() }.into()),
        _ => Ok(()),
    }
}

/// Texts by `request`, tasks by a job and its judge with their items beside `output`, and what `args` wants to know of drift. What an
/// earlier run that was cut short has measured is not measured again. The record itself is left to the caller to write.
pub fn evaluate(
    ctx: &Context,
    args: &EvalArgs,
    request: &Request,
    (job, judge): (Option<&Job>, Option<&Judge>),
    mut models: Models,
    output: Option<&Output>,
) -> Result<EvalRecord> {
    let start = Instant::now();
    let answered = match job {
        None => None,
        Some(job) => Some(job.answer(ctx, &[job.party(ctx, &models)?], models.other.is_some(), models.bits)?),
    };
    let mut record = measure(ctx, &models, request, output.and_then(Output::texts_journal))?;
    if let Some((source, options)) = &request.kl {
        drift::fill(ctx, args, &mut models, source, options, &mut record)?;
    }
    if let (Some(job), Some(answered)) = (job, &answered) {
        record.provenance.options.extend(job.options.clone());
        record.shard = job.shard;
        record.look.clone_from(&answered.look);
        record.scoring_seconds = Some(answered.seconds);
        record.detectable = job.sizes.clone().filter(|_| models.other.is_some());
        if let Some(judge) = judge {
            record.provenance.options.insert("judge".into(), judge.described());
        }
        scores::judged(ctx, job, answered, judge)?.fill(&mut record, output)?;
    }
    // Weights are read where they are used: a file rewritten meanwhile would be half of one model and half of another.
    models.checkpoints.iter().try_for_each(|c| c.store.unchanged())?;
    record.seconds = start.elapsed().as_secs_f64();
    Ok(record)
}

/// Perplexity and drift on texts, their windows kept in `journal` as they come; a record without tasks.
fn measure(ctx: &Context, models: &Models, request: &Request, journal: Option<&Path>) -> Result<EvalRecord> {
    let start = Instant::now();
    let Models { model, tokenizer, .. } = models;
    let other = models.other.as_ref();
    let report = |done: usize, total: usize, stage: &str| {
        if done == 0 {
            ctx.progress.stage(stage, total as u64);
        } else {
            ctx.progress.advance(1);
        }
    };
    let mut store: Box<dyn Store> = match journal.filter(|_| request.perplexity.is_some() || request.kl.is_some()) {
        None => Box::new(NoStore),
        Some(path) => {
            let (_, identity) = scores::engine(ctx, models, EngineOptions::default())?;
            Box::new(scores::open_journal(ctx, ("texts", "windows"), path, &identity)?)
        }
    };
    let mut perplexities = Vec::new();
    if let Some((source, protocols)) = &request.perplexity {
        for name in protocols {
            ctx.check_stop()?;
            let protocol: Protocol = name.parse()?;
            let positions = model.max_positions().min(other.map_or(usize::MAX, Scorer::max_positions));
            let setup =
                Setup { max_positions: positions, eos: tokenizer.eos_ids().first().copied(), limit: request.limit };
            let plan = protocol.plan(source, tokenizer, &setup)?;
            let other = other.map(|m| m as &dyn Scorer);
            let told = |d, t| report(d, t, "perplexity");
            perplexities.push(evaluate_perplexity(model, other, &plan, source, &mut *store, &told)?);
        }
    }
    let kl = match (&request.kl, other) {
        (Some((source, options)), Some(r)) => {
            ctx.check_stop()?;
            let ids = tokenizer.encode(&source.text()?, true)?;
            Some(evaluate_kl(model, r, &ids, source, options, &mut *store, &|d, t| report(d, t, "KL"))?)
        }
        _ => None,
    };
    ctx.progress.clear();
    ctx.check_stop()?;
    Ok(EvalRecord {
        schema: lowbit_eval::record::SCHEMA,
        provenance: provenance::gather(
            ctx,
            Purpose::Accuracy,
            &models.candidate,
            models.reference.as_ref(),
            0,
            request.options(),
        )?,
        perplexity: perplexities.first().map(|p| p.perplexity.value),
        perplexities,
        kl,
        bits: models.bits,
        seconds: start.elapsed().as_secs_f64(),
        ..EvalRecord::default()
    })
}

/// The result as text.
pub fn summary(r: &EvalRecord) -> String {
    let mut out = Vec::new();
    let rows: Vec<Vec<String>> = r
        .perplexities
        .iter()
        .map(|p| {
            vec![
                p.protocol.clone(),
                p.windows.to_string(),
                p.scored_tokens.to_string(),
                p.reference.map_or("–".into(), |v| format!("{:.4}", v.value)),
                format!("{:.4}", p.perplexity.value),
                p.ratio.map_or("–".into(), |v| format!("{:.4} {}", v.value, v.range(4))),
            ]
        })
        .collect();
    if !rows.is_empty() {
        out.push(table(&["perplexity", "windows", "tokens", "reference", "candidate", "ratio [95 %]"], &rows));
    }
    if let Some(k) = &r.kl {
        out.push(format!(
            "KL(reference ‖ candidate) over {} tokens: mean {:.5} {} nats, median {:.5}, p99 {:.4}, max {:.3}\ntop-1 agreement {:.2} % [{:.2}, {:.2}]; perplexity {:.4} → {:.4}",
            k.tokens, k.mean, k.mean_interval.range(5), k.median, k.p99, k.max,
            100.0 * k.top1_agreement.value, 100.0 * k.top1_agreement.low, 100.0 * k.top1_agreement.high, k.reference_perplexity, k.perplexity
        ));
    }
    out.extend(drift::summary(r));
    if !r.tasks.is_empty() {
        out.push(scores::summary(r));
    }
    out.extend(judge::summary(r));
    out.push(format!("{:.1} s", r.seconds));
    out.join("\n\n")
}
