//! `lowbit eval --tasks`: answers of both models, items beside the record, scores in it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use lowbit_checkpoint::CheckpointError;
use lowbit_checkpoint::hash::{sha256_file, sha256_hex};
use lowbit_checkpoint::writer::write_atomic;
use lowbit_eval::cache::Cache;
use lowbit_eval::drift::summary::{TaskDrift, task_drift};
use lowbit_eval::engine::{
    Answer, Answers, BosRule, Engine, EngineOptions, Found, Journal, Shard, Store, Weights, request_key,
};
use lowbit_eval::judge::Judging;
use lowbit_eval::record::{EvalRecord, ItemFile};
use lowbit_eval::tasks::{Evaluated, Item, Plan, Suite, TaskRecord};
use lowbit_eval::verdict::record::count;
use lowbit_eval::verdict::sizes::Size;
use lowbit_eval::verdict::{Look, Policy, Sizes};
use serde_json::Value;

use crate::args::{Compat, EvalArgs, KvCacheArg};
use crate::commands::eval::Models;
use crate::commands::judge::Judge;
use crate::commands::looks::Looks;
use crate::commands::table::table;
use crate::commands::tasks;
use crate::context::Context;
use crate::models::Located;

/// Where a record goes, and the files beside it.
pub struct Output {
    /// `eval.json`.
    pub record: PathBuf,
    /// `eval.items.jsonl`.
    candidate: PathBuf,
    /// `eval.reference.items.jsonl`.
    reference: PathBuf,
    /// `eval.journal` while the run lasts; `eval.reference.journal` where the reference is asked by itself.
    journals: [PathBuf; 2],
    /// `eval.texts.journal` while perplexity and KL are measured.
    texts: PathBuf,
    /// `eval.answers`: of a shard, all its answers.
    answers: PathBuf,
    /// `eval.judge.jsonl`.
    votes: PathBuf,
    /// `eval.judge.journal` while the judge is asked.
    judge: PathBuf,
}

impl Output {
    /// The files that belong to a record.
    pub fn of(record: &Path) -> Result<Self> {
        let stem = record.file_stem().with_context(|| format!("{} names no file", record.display()))?;
        let beside = |end: &str| record.with_file_name(format!("{}{end}", stem.to_string_lossy()));
        Ok(Self {
            record: record.to_path_buf(),
            candidate: beside(".items.jsonl"),
            reference: beside(".reference.items.jsonl"),
            journals: [beside(".journal"), beside(".reference.journal")],
            texts: beside(".texts.journal"),
            answers: beside(".answers"),
            votes: beside(".judge.jsonl"),
            judge: beside(".judge.journal"),
        })
    }

    /// Where the judge's answers are kept while it is asked.
    pub fn judge_journal(&self) -> PathBuf {
        self.judge.clone()
    }

    /// Where windows of texts are kept while they are measured; a record that goes to a device or a pipe has nothing beside it.
    pub fn texts_journal(&self) -> Option<&Path> {
        (self.record.is_file() || !self.record.exists()).then_some(self.texts.as_path())
    }

    /// The record is written: the journals have done their work.
    pub fn finish(&self) -> Result<()> {
        for journal in self.journals.iter().chain([&self.texts, &self.judge]).filter(|j| j.exists()) {
            std::fs::remove_file(journal).map_err(|e| CheckpointError::io(journal, e))?;
        }
        Ok(())
    }

    /// Says what was written: without its items a record cannot be judged.
    pub fn announce(&self, ctx: &Context, record: &EvalRecord) {
        if record.items.candidate.is_some() {
            let items = name(&self.candidate);
            ctx.say(format!("wrote {} and {items} beside it, which the gate reads", self.record.display()));
        }
    }

    /// Files of another run are not overwritten without --force; those of this run, cut short, are.
    pub fn refuse_items(&self, force: bool) -> Result<()> {
        let ours = force || self.journals.iter().any(|j| j.exists());
        match [&self.candidate, &self.reference, &self.answers, &self.votes].into_iter().find(|p| p.exists() && !ours) {
            Some(path) => Err(CheckpointError::Exists { path: path.clone() }.into()),
            None => Ok(()),
        }
    }
}

/// Tasks rendered, and how they are to be answered.
pub struct Job {
    /// The tasks.
    pub suite: Suite,
    /// Their requests, of this shard.
    pub plan: Plan,
    /// For the record.
    pub options: BTreeMap<String, Value>,
    /// Which part.
    pub shard: Option<Shard>,
    /// BOS rule.
    pub compat: Compat,
    /// Most tokens of one input.
    pub max_length: Option<usize>,
    /// Seconds it took to render them.
    pub rendering: f64,
    /// What all shards together can find beside a reference; none without items that a verdict pairs.
    pub sizes: Option<Sizes>,
    cache: Option<PathBuf>,
    journals: Option<[PathBuf; 2]>,
    file: Option<PathBuf>,
    looks: Option<Looks>,
}

/// Who answers the requests of a job: one for both models, or one for each.
pub struct Party<'a> {
    /// Answers.
    pub answers: Box<dyn Answers + 'a>,
    /// What its answers depend on.
    pub identity: String,
    /// Address, where it is a server.
    pub url: Option<String>,
}

/// Answers of a job.
pub struct Answered {
    /// In order of the requests of `plan`.
    pub answers: Vec<Answer>,
    /// What was asked: all of it, unless an early look decided.
    pub plan: Plan,
    /// Where a run with several looks ended.
    pub look: Option<Look>,
    /// Wall seconds of rendering and answering.
    pub seconds: f64,
}

impl Job {
    /// Reads task files and data, and renders.
    pub fn prepare(ctx: &Context, args: &EvalArgs, output: Option<&Output>) -> Result<Self> {
        if let Some(output) = output {
            output.refuse_items(args.force)?;
        } else if args.tasks.shard.is_some() {
            bail!("a shard is of no use without its record\nhint: give -o FILE");
        }
        if args.tasks.until_decided && args.reference.is_none() && args.endpoint.reference_endpoint.is_none() {
            bail!("--until-decided compares with a reference\nhint: give --reference MODEL");
        }
        let suite = tasks::load(ctx, &args.tasks)?;
        let template = match tasks::template_of(args) {
            Some(model) => tasks::chat_template(ctx, &args.tasks, model)?,
            None => None,
        };
        let chat = tasks::chat_options(&args.tasks, template.as_ref(), tasks::asks_chat(args));
        let start = Instant::now();
        let all = suite.plan(chat, args.limit)?;
        let rendering = start.elapsed().as_secs_f64();
        let sizes = sizes(&suite, &all);
        let mut options = tasks::options(&args.tasks, args.limit);
        let plan = match args.tasks.shard {
            Some(shard) => {
                options.insert("shard".into(), shard.to_string().into());
                all.part(|d| shard.holds(d.doc))
            }
            None => all,
        };
        let looks = args.tasks.until_decided.then(|| Looks::new(args.tasks.looks, args.tasks.margin)).transpose()?;
        if let Some(looks) = &looks {
            options.insert("looks".into(), looks.count.into());
            options.insert("margin".into(), args.tasks.margin.into());
        }
        Ok(Self {
            suite,
            plan,
            options,
            shard: args.tasks.shard,
            compat: args.tasks.compat,
            max_length: args.tasks.max_length,
            rendering,
            sizes,
            cache: args.tasks.cache.clone(),
            journals: output.map(|o| o.journals.clone()),
            file: output.map(|o| o.answers.clone()),
            looks,
        })
    }

    /// Models here, side by side.
    pub fn party<'a>(&self, ctx: &Context, models: &'a Models) -> Result<Party<'a>> {
        let bos = match self.compat {
            // The release had one exception.
            Compat::Old if !models.family.starts_with("gemma") => BosRule::Never,
            _ => BosRule::Tokenizer,
        };
        let options = EngineOptions { bos, max_length: self.max_length, ..EngineOptions::default() };
        let (engine, identity) = engine(ctx, models, options)?;
        Ok(Party { answers: Box::new(engine), identity, url: None })
    }

    /// Answers every request by all parties, the candidate's first; what an earlier run finished is taken from its journal or the
    /// cache. `compared` says that there is a reference.
    pub fn answer(&self, ctx: &Context, parties: &[Party<'_>], compared: bool, bits: Option<u32>) -> Result<Answered> {
        let start = Instant::now();
        let mut stores: Vec<Vec<Box<dyn Store>>> = Vec::new();
        for (i, party) in parties.iter().enumerate() {
            let path = self.journals.as_ref().and_then(|j| j.get(i));
            stores.push(open_stores(ctx, path, self.cache.as_deref(), &party.identity)?);
        }
        ctx.say(format!("tasks: {} documents, {} requests", self.plan.len(), self.plan.requests.len()));
        if let (true, Some(sizes)) = (compared, &self.sizes) {
            say_sizes(ctx, sizes);
        }
        if self.looks.is_some() {
            // Later looks ask again what earlier ones did.
            stores.iter_mut().for_each(|s| s.push(Box::new(Memory::default())));
        }
        let mut all = |part: &Plan| -> Result<Vec<Answer>> {
            let mut answers: Option<Vec<Answer>> = None;
            for (party, stores) in parties.iter().zip(&mut stores) {
                let own = ask(ctx, party, part, stores)?;
                answers = Some(match answers {
                    None => own,
                    Some(first) => first.into_iter().zip(own).map(side_by_side).collect(),
                });
            }
            answers.context("nobody is asked")
        };
        let mut answered = match &self.looks {
            None => {
                let answers = all(&self.plan)?;
                Answered { answers, plan: self.plan.clone(), look: None, seconds: 0.0 }
            }
            Some(looks) => looks.run(ctx, &self.suite, &self.plan, bits, &mut all)?,
        };
        answered.seconds = self.rendering + start.elapsed().as_secs_f64();
        if let (Some(path), Some(_)) = (&self.file, self.shard) {
            let identities: Vec<&str> = parties.iter().map(|p| p.identity.as_str()).collect();
            let identity = match identities.as_slice() {
                [one] => (*one).to_owned(),
                several => sha256_hex(several.join(" ").as_bytes()),
            };
            let mut file = Journal::open(path, &identity)?;
            for (request, answer) in self.plan.requests.iter().zip(&answered.answers) {
                file.put(&request_key(request)?, answer)?;
            }
            file.finish()?;
        }
        Ok(answered)
    }
}

/// What a plan can find, at the levels and power of the gate.
pub fn sizes(suite: &Suite, plan: &Plan) -> Option<Sizes> {
    let items = suite.sizes(plan);
    (!items.is_empty()).then(|| Sizes::planned(&items, &Policy::default()))
}

fn say_sizes(ctx: &Context, sizes: &Sizes) {
    let (changed, power) = (100.0 * sizes.discordant, 100.0 * sizes.power);
    ctx.say(format!(
        "tasks: where {changed:.0} % of the items change, the gate finds with power {power:.0} % a loss of"
    ));
    let line = |name: &str, s: &Size| ctx.say(format!("  {:.2} pp in {name} ({} items)", 100.0 * s.loss, count(s.n)));
    if sizes.tasks.len() > 1 {
        line("all tasks", &sizes.pool);
    }
    sizes.tasks.iter().for_each(|(name, size)| line(name, size));
}

/// The models of a run as those who answer, and what every answer of theirs depends on.
pub fn engine<'a>(ctx: &Context, models: &'a Models, options: EngineOptions) -> Result<(Engine<'a>, String)> {
    let engine = Engine::new(&models.model, models.other.as_ref(), &models.tokenizer, options)?;
    let mut precision = ctx.precision()?;
    if models.kv != KvCacheArg::Float {
        precision.push_str(&format!("; keys and values in {}", models.kv.name()));
    }
    let candidate = models.candidate.sha256()?;
    let reference = models.reference.as_ref().map(Located::sha256).transpose()?;
    let identity = engine.identity(&Weights {
        candidate: &candidate,
        reference: reference.as_deref(),
        tokenizer: models.tokenizer.sha256(),
        precision: &precision,
    });
    Ok((engine, identity))
}

/// The journal of a stage that counts answers by `unit`; says what it holds already.
pub fn open_journal(ctx: &Context, (stage, unit): (&str, &str), path: &Path, identity: &str) -> Result<Journal> {
    let journal = Journal::open(path, identity)?;
    match journal.found {
        Found::Continued(n) => ctx.say(format!("{stage}: {n} {unit} of an earlier run that was cut short")),
        Found::Replaced => ctx.say(format!("{stage}: {} was of another run, and starts anew", path.display())),
        Found::New => {}
    }
    Ok(journal)
}

/// Journal and cache of a run.
pub fn open_stores(
    ctx: &Context,
    journal: Option<&PathBuf>,
    cache: Option<&Path>,
    identity: &str,
) -> Result<Vec<Box<dyn Store>>> {
    let mut stores: Vec<Box<dyn Store>> = Vec::new();
    if let Some(path) = journal {
        stores.push(Box::new(open_journal(ctx, ("tasks", "answers"), path, identity)?));
    }
    if let Some(dir) = cache {
        stores.push(Box::new(Cache::open(dir, identity)?));
    }
    Ok(stores)
}

/// The candidate's answer and the reference's, asked apart.
fn side_by_side((own, other): (Answer, Answer)) -> Answer {
    Answer { response: own.response, reference: Some(other.response), drift: Vec::new() }
}

/// Answers of this run, for its later looks.
#[derive(Default)]
struct Memory(HashMap<String, Answer>);

impl Store for Memory {
    fn get(&self, key: &str) -> Option<Answer> {
        self.0.get(key).cloned()
    }

    fn put(&mut self, key: &str, answer: &Answer) -> lowbit_eval::Result<()> {
        self.0.insert(key.to_owned(), answer.clone());
        Ok(())
    }
}

/// Runs a plan and says what it cost.
fn ask(ctx: &Context, party: &Party<'_>, plan: &Plan, stores: &mut Vec<Box<dyn Store>>) -> Result<Vec<Answer>> {
    let outcome = party.answers.answer(&plan.requests, stores, &mut ctx.progress.counting("tasks"))?;
    ctx.progress.clear();
    let w = outcome.work;
    let cost = match &party.url {
        None => format!("{} tokens computed for {} asked", w.computed_tokens, w.asked_tokens),
        Some(url) => format!("{} requests sent to {url}", w.calls),
    };
    ctx.say(format!("tasks: {cost}, {} of {} requests answered before", outcome.restored, plan.requests.len()));
    Ok(outcome.answers)
}

/// Results of both models.
pub struct Scored {
    /// The candidate's.
    pub candidate: Evaluated,
    /// The reference's.
    pub reference: Option<Evaluated>,
    records: BTreeMap<String, TaskRecord>,
    drift: BTreeMap<String, TaskDrift>,
    judging: Judging,
    /// Name asked for → labels of its tasks.
    pub families: BTreeMap<String, Vec<String>>,
}

/// The answers of a job as scores, with its judge's verdicts.
pub fn judged(ctx: &Context, job: &Job, answered: &Answered, judge: Option<&Judge>) -> Result<Scored> {
    let (suite, plan) = (&job.suite, &answered.plan);
    match judge {
        None => score(suite, plan, &answered.answers, None),
        Some(judge) => {
            let mut verdicts = |own: &mut [Item], other: Option<&mut [Item]>| judge.run(ctx, suite, plan, own, other);
            score(suite, plan, &answered.answers, Some(&mut verdicts))
        }
    }
}

/// Puts verdicts into the items of both models.
pub type Verdicts<'a> = &'a mut dyn FnMut(&mut [Item], Option<&mut [Item]>) -> Result<Judging>;

/// Answers to items, scores and drift; judged where there is a judge.
pub fn score(suite: &Suite, plan: &Plan, answers: &[Answer], judge: Option<Verdicts<'_>>) -> Result<Scored> {
    let own: Vec<_> = answers.iter().map(|a| a.response.clone()).collect();
    let mut items = suite.items(plan, &own)?;
    let theirs: Option<Vec<_>> = answers.iter().map(|a| a.reference.clone()).collect();
    // An empty shard has no answers: `collect` would take that for a reference.
    let theirs = theirs.filter(|t| !t.is_empty());
    let mut other = theirs.map(|t| suite.items(plan, &t)).transpose()?;
    let judging = match judge {
        Some(judge) => judge(&mut items, other.as_deref_mut())?,
        None => Judging::default(),
    };
    let candidate = suite.aggregate(items)?;
    let reference = other.map(|items| suite.aggregate(items)).transpose()?;
    let mut rows: BTreeMap<&str, Vec<Vec<_>>> = BTreeMap::new();
    for span in plan.spans() {
        let Some(task) = suite.tasks.get(span.task) else { continue };
        let of_document = answers.get(span.requests).unwrap_or_default();
        rows.entry(&task.label).or_default().push(of_document.iter().flat_map(|a| a.drift.clone()).collect());
    }
    let drift = rows.into_iter().filter_map(|(label, d)| Some((label.to_owned(), task_drift(label, &d)?))).collect();
    let records = suite.records(&candidate, reference.as_ref());
    Ok(Scored { candidate, reference, records, drift, judging, families: suite.families() })
}

impl Scored {
    /// Puts everything into the record, and writes the items beside it.
    pub fn fill(self, record: &mut EvalRecord, output: Option<&Output>) -> Result<()> {
        if let Some(output) = output {
            record.items.candidate = Some(write_lines(&output.candidate, &self.candidate.items)?);
            record.items.reference =
                self.reference.as_ref().map(|r| write_lines(&output.reference, &r.items)).transpose()?;
            if !self.judging.votes.is_empty() {
                record.items.judge = Some(write_lines(&output.votes, &self.judging.votes)?);
            }
            if record.shard.is_some() {
                record.items.answers = Some(ItemFile {
                    file: name(&output.answers),
                    sha256: sha256_file(&output.answers)?,
                    items: self.candidate.items.len() as u64,
                });
            }
        }
        record.tasks = self.records;
        record.judges = self.judging.records;
        record.task_drift = self.drift;
        record.families = self.families;
        Ok(())
    }
}

fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn write_lines<T: serde::Serialize>(path: &Path, items: &[T]) -> Result<ItemFile> {
    let mut out = Vec::new();
    for item in items {
        serde_json::to_writer(&mut out, item)?;
        out.push(b'\n');
    }
    write_atomic(path, &out)?;
    Ok(ItemFile { file: name(path), sha256: sha256_hex(&out), items: items.len() as u64 })
}

/// The tasks of a record as text; of groups with many tasks, the groups.
pub fn summary(r: &EvalRecord) -> String {
    let hidden = |label: &str| r.families.values().any(|m| m.len() > 5 && m.iter().any(|l| l == label));
    let mut rows = Vec::new();
    for (name, t) in r.tasks.iter().filter(|(_, t)| !hidden(&t.label)) {
        for (metric, value) in t.metrics.iter().filter(|(m, _)| t.higher_is_better.contains_key(*m)) {
            let (own, filter) =
                metric.split_once(',').map_or((metric.as_str(), String::new()), |(m, f)| (m, format!(",{f}")));
            let stderr = t.metrics.get(&format!("{own}_stderr{filter}"));
            rows.push(vec![
                name.clone(),
                t.n.to_string(),
                t.num_fewshot.map_or("–".into(), |n| n.to_string()),
                metric.clone(),
                t.reference.get(metric).map_or("–".into(), |v| format!("{v:.4}")),
                format!("{value:.4}{}", stderr.map_or(String::new(), |s| format!(" ± {s:.4}"))),
                t.delta.get(metric).map_or("–".into(), |d| format!("{d:+.4}")),
            ]);
        }
    }
    let mut out = table(&["task", "n", "shots", "metric", "reference", "candidate", "Δ"], &rows);
    if let Some(worst) = r.task_drift.values().max_by(|a, b| a.mean.total_cmp(&b.mean)) {
        out.push_str(&format!(
            "\nKL at the scored positions: at most {:.5} nats on average ({})",
            worst.mean, worst.task
        ));
    }
    out
}
