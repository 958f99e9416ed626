//! `lowbit eval merge`: shards of a run to the record of the whole.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use lowbit_checkpoint::hash::sha256_file;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_eval::engine::{Answer, journal, request_key};
use lowbit_eval::record::EvalRecord;
use serde_json::Value;

use crate::args::{Compat, MergeArgs, TaskArgs};
use crate::commands::eval::{refuse_existing, summary};
use crate::commands::scores::{self, Output};
use crate::commands::tasks;
use crate::context::Context;

/// One shard's record.
struct Part {
    path: PathBuf,
    record: EvalRecord,
}

/// `lowbit eval merge`. Tasks are rendered again from the recorded options, answers come from the shards: the rest is what
/// one run does after its last answer.
pub fn merge(ctx: &Context, args: &MergeArgs) -> Result<()> {
    refuse_existing(Some(&args.output), args.force)?;
    let output = Output::of(&args.output)?;
    output.refuse_items(args.force)?;
    let parts: Vec<Part> = args.shards.iter().map(|p| read(p)).collect::<Result<_>>()?;
    let Some(first) = parts.first() else { bail!("no shards") };
    complete(&parts)?;
    for part in &parts {
        same(first, part)?;
    }
    let options = task_args(first)?;
    let limit = first.record.provenance.options.get("limit").and_then(Value::as_u64).map(|n| n as usize);
    let suite = tasks::load(ctx, &options)?;
    let recorded = &first.record.provenance;
    let text = |key: &str| recorded.options.get(key).and_then(Value::as_str);
    // Of a served model only the tokenizer's folder is here; conversations need no template.
    let template = match (text("endpoint_api"), text("tokenizer")) {
        (None, _) => tasks::chat_template(ctx, &options, &recorded.model)?,
        (Some(_), Some(model)) => tasks::chat_template(ctx, &options, model)?,
        (Some(_), None) => None,
    };
    let chat = tasks::chat_options(&options, template.as_ref(), text("endpoint_api") == Some("chat"));
    let plan = suite.plan(chat, limit)?;
    let known = answers(&parts)?;
    let mut found = Vec::with_capacity(plan.requests.len());
    for request in &plan.requests {
        let Some(answer) = known.get(&request_key(request)?) else {
            bail!(
                "document {} of {} is in no shard\nhint: the task files or the data have changed since the shards ran",
                request.doc,
                request.task
            );
        };
        found.push(answer.clone());
    }
    let mut provenance = first.record.provenance.clone();
    provenance.options.remove("shard");
    let mut record = EvalRecord {
        schema: first.record.schema,
        provenance,
        bits: first.record.bits,
        scoring_seconds: parts.iter().map(|p| p.record.scoring_seconds).sum(),
        seconds: parts.iter().map(|p| p.record.seconds).sum(),
        ..EvalRecord::default()
    };
    scores::score(&suite, &plan, &found, None)?.fill(&mut record, Some(&output))?;
    record.detectable = scores::sizes(&suite, &plan).filter(|_| record.items.reference.is_some());
    for (name, task) in &record.tasks {
        for part in &parts {
            let theirs =
                part.record.tasks.get(name).with_context(|| format!("{} has no task {name}", part.path.display()))?;
            if (&task.task_sha256, &task.data_sha256) != (&theirs.task_sha256, &theirs.data_sha256) {
                bail!("the file or the data of task {name} have changed since {} was written", part.path.display());
            }
        }
    }
    write_atomic(&output.record, &serde_json::to_vec_pretty(&record)?)?;
    ctx.print(&record, || summary(&record))
}

fn read(path: &Path) -> Result<Part> {
    let bytes =
        lowbit_checkpoint::files::read_stream(path).with_context(|| format!("cannot read {}", path.display()))?;
    let record: EvalRecord =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not an eval record", path.display()))?;
    Ok(Part { path: path.to_path_buf(), record })
}

/// Every part of one run, each once.
fn complete(parts: &[Part]) -> Result<()> {
    let mut seen: Vec<Option<&Path>> = Vec::new();
    for part in parts {
        let Some(shard) = part.record.shard else {
            bail!("{} is not a shard: it was written without --shard", part.path.display());
        };
        if seen.is_empty() {
            seen.resize(shard.count, None);
        }
        let count = seen.len();
        match seen.get_mut(shard.index.wrapping_sub(1)) {
            _ if count != shard.count => {
                bail!("{} is part {shard}, and others are parts of {count}", part.path.display())
            }
            Some(place @ None) => *place = Some(&part.path),
            Some(Some(other)) => bail!("{} and {} are both part {shard}", other.display(), part.path.display()),
            None => bail!("{} says it is part {shard}", part.path.display()),
        }
    }
    let missing: Vec<String> =
        seen.iter().enumerate().filter(|s| s.1.is_none()).map(|(i, _)| format!("{}/{}", i + 1, seen.len())).collect();
    if !missing.is_empty() {
        bail!("shards are missing: {}\nhint: run them, then merge all", missing.join(", "));
    }
    Ok(())
}

/// Parts of one run agree in all but the part.
fn same(a: &Part, b: &Part) -> Result<()> {
    let (p, q) = (&a.record.provenance, &b.record.provenance);
    let differ = |what: &str, x: &str, y: &str| -> Result<()> {
        bail!("{} and {} differ in {what}: {x} and {y}", a.path.display(), b.path.display())
    };
    if p.model_sha256 != q.model_sha256 {
        differ("the model's weights", &p.model_sha256, &q.model_sha256)?;
    }
    if p.reference_sha256 != q.reference_sha256 {
        let text = |s: &Option<String>| s.clone().unwrap_or_else(|| "none".into());
        differ("the reference's weights", &text(&p.reference_sha256), &text(&q.reference_sha256))?;
    }
    let keys = p.options.keys().chain(q.options.keys());
    for key in keys.filter(|k| *k != "shard") {
        let (x, y) = (p.options.get(key).unwrap_or(&Value::Null), q.options.get(key).unwrap_or(&Value::Null));
        if x != y {
            differ(key, &x.to_string(), &y.to_string())?;
        }
    }
    Ok(())
}

/// All answers; the shards' identities (weights, tokenizer, kernels, protocol) must be one.
fn answers(parts: &[Part]) -> Result<HashMap<String, Answer>> {
    let mut known = HashMap::new();
    let mut identity: Option<(String, &Path)> = None;
    for part in parts {
        let named = part.record.items.answers.as_ref();
        let file = named.with_context(|| format!("{} names no answers", part.path.display()))?;
        let path = part.path.with_file_name(&file.file);
        if sha256_file(&path)? != file.sha256 {
            bail!("{} is not the file that {} was written with", path.display(), part.path.display());
        }
        let Some((own, more)) = journal::read_all(&path)? else { bail!("{} holds no answers", path.display()) };
        match &identity {
            Some((other, of)) if *other != own => bail!(
                "{} and {} were computed by other kernels, precision or versions of lowbit\nhint: run all shards with the same program on devices of the same kind",
                of.display(),
                part.path.display()
            ),
            _ => identity = Some((own, &part.path)),
        }
        known.extend(more);
    }
    Ok(known)
}

/// The recorded options as they were given.
fn task_args(part: &Part) -> Result<TaskArgs> {
    let o = &part.record.provenance.options;
    let list = |key: &str| -> Vec<String> {
        let found = o.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        found.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let text = |key: &str| o.get(key).and_then(Value::as_str).map(str::to_owned);
    let tasks = list("tasks");
    if tasks.is_empty() {
        bail!("{} names no tasks", part.path.display());
    }
    Ok(TaskArgs {
        tasks,
        data: text("data").map(PathBuf::from),
        include: list("include").into_iter().map(PathBuf::from).collect(),
        compat: if text("compat").as_deref() == Some("lm-eval-0.4.9.1") { Compat::Old } else { Compat::Current },
        looks: 1,
        apply_chat_template: o.get("apply_chat_template") == Some(&Value::Bool(true)),
        fewshot_as_multiturn: o.get("fewshot_as_multiturn") != Some(&Value::Bool(false)),
        system_instruction: text("system_instruction"),
        ..TaskArgs::default()
    })
}
