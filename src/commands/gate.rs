//! `lowbit gate`: two evaluations in, a verdict out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use lowbit_checkpoint::hash::sha256_hex;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_eval::judge::spec::PAIRWISE;
use lowbit_eval::record::{EvalRecord, Interval, ItemFile};
use lowbit_eval::stats::perplexity_ratio;
use lowbit_eval::tasks::Item;
use lowbit_eval::verdict::decide::{Policy, Verdict, judge, pool_level};
use lowbit_eval::verdict::record::{Endpoint, GateRecord, Threshold, count, pp};
use lowbit_eval::verdict::simulate::{Rates, Scenario, simulate};
use lowbit_eval::verdict::{Look, Paired, PairingOptions, junit, markdown, pair, power};
use serde_json::json;

use crate::args::GateArgs;
use crate::commands::eval::refuse_existing;
use crate::commands::table::table;
use crate::context::Context;
use crate::exit::VerdictError;
use crate::provenance;

/// One side: a record, or items alone.
struct Side {
    path: PathBuf,
    record: Option<EvalRecord>,
    items: Vec<Item>,
}

/// `lowbit gate`.
pub fn gate(ctx: &Context, args: &GateArgs) -> Result<()> {
    check(args)?;
    if args.simulate {
        return simulated(ctx, args);
    }
    for path in [&args.output, &args.junit, &args.markdown] {
        refuse_existing(path.as_ref(), args.force)?;
    }
    let Some(record) = judged(ctx, args)? else {
        bail!(
            "nothing to judge: {} has no items with a score\nhint: run `lowbit eval` with --tasks and -o, or give --max-kl or --max-ppl-ratio",
            args.candidate.as_deref().unwrap_or(Path::new("")).display()
        );
    };
    if let Some(path) = &args.junit {
        write_atomic(path, junit::junit(&record).as_bytes())?;
    }
    if let Some(path) = &args.markdown {
        write_atomic(path, markdown::markdown(&record).as_bytes())?;
    }
    // Last: where the record is, all is there.
    if let Some(path) = &args.output {
        write_atomic(path, &serde_json::to_vec_pretty(&record)?)?;
    }
    ctx.print(&record, || summary(&record))?;
    match record.verdict {
        Verdict::Pass => Ok(()),
        // The reason stands on stdout.
        v => {
            let code = v.exit_code();
            Err(VerdictError { code, text: format!("{} (exit code {code})", v.name()) }.into())
        }
    }
}

/// The verdict; none where there are neither items with a score nor limits on drift.
pub fn judged(ctx: &Context, args: &GateArgs) -> Result<Option<GateRecord>> {
    let Some(path) = &args.candidate else { bail!("no record given") };
    let candidate = Side::read(path)?;
    let reference = match &args.baseline {
        Some(path) => Side::read(path)?,
        None => candidate.reference()?,
    };
    let paired = pair(&candidate.items, &reference.items, &pairing(args, &candidate)?)?;
    check_judged(args, &paired)?;
    let policy = policy(args, candidate.record.as_ref());
    let thresholds = thresholds(ctx, args, &candidate, &reference, &paired)?;
    if paired.series.is_empty() && thresholds.iter().all(|t| t.limit.is_none()) {
        return Ok(None);
    }
    let mut record = judge(&paired, &policy, thresholds);
    record.provenance = provenance::of_client(ctx, args.seed, "", options(args, &policy));
    if let Some(r) = &candidate.record {
        record.provenance.model.clone_from(&r.provenance.model);
        record.provenance.model_sha256.clone_from(&r.provenance.model_sha256);
        record.provenance.reference.clone_from(&r.provenance.reference);
        record.provenance.reference_sha256.clone_from(&r.provenance.reference_sha256);
    }
    if let (Some(_), Some(r)) = (&args.baseline, &reference.record) {
        record.provenance.reference = Some(r.provenance.model.clone());
        record.provenance.reference_sha256 = Some(r.provenance.model_sha256.clone());
    }
    Ok(Some(record))
}

/// Fails unless `--margin` is absent or a number of percentage points.
pub fn check_margin(margin: Option<f64>) -> Result<()> {
    match margin.filter(|m| !(0.0..=100.0).contains(m)) {
        Some(m) => bail!("--margin is in percentage points between 0 and 100, found {m}"),
        None => Ok(()),
    }
}

fn check(args: &GateArgs) -> Result<()> {
    let share = |name: &str, v: f64| {
        if v > 0.0 && v < 1.0 { Ok(()) } else { bail!("{name} is a probability between 0 and 1, found {v}") }
    };
    share("--alpha", args.alpha)?;
    share("--power", args.power)?;
    if args.alpha > 0.5 {
        bail!("--alpha {} is no error one would accept\nhint: 0.05", args.alpha);
    }
    check_margin(args.margin)?;
    if args.simulate {
        share("--discordant", args.discordant)?;
        if args.loss.abs() > 100.0 * args.discordant {
            bail!("--loss {} pp is more than the {} of items that change", args.loss, args.discordant);
        }
        if args.items.contains(&0) || args.looks == 0 || args.runs == 0 {
            bail!("--items, --looks and --runs are at least 1");
        }
    }
    Ok(())
}

/// Verdicts of a judge must be there for almost all items, and a comparison is about the reference of its own run.
fn check_judged(args: &GateArgs, paired: &Paired) -> Result<()> {
    for s in &paired.series {
        let all = s.scores.len() + s.unjudged;
        if s.unjudged as f64 * 100.0 > args.max_unjudged * all as f64 {
            bail!(
                "{} of {all} items of {} have no verdict of the judge, more than {} %\nhint: see why in the votes beside the record (.judge.jsonl); give the judge more tokens (`max_tokens`) or votes, or raise --max-unjudged",
                s.unjudged,
                s.name,
                args.max_unjudged
            );
        }
        if args.baseline.is_some() && s.metric == PAIRWISE {
            bail!(
                "{} of {} compares with the reference of its own run\nhint: leave out the second file",
                s.metric,
                s.name
            );
        }
    }
    Ok(())
}

impl Side {
    fn read(path: &Path) -> Result<Self> {
        let bytes =
            lowbit_checkpoint::files::read_stream(path).with_context(|| format!("cannot read {}", path.display()))?;
        if path.extension().is_some_and(|e| e == "jsonl") {
            return Ok(Self { path: path.to_path_buf(), record: None, items: items(path, &bytes)? });
        }
        let record: EvalRecord =
            serde_json::from_slice(&bytes).with_context(|| format!("{} is not an eval record", path.display()))?;
        if let Some(shard) = record.shard {
            bail!("{} is part {shard} of a run\nhint: put the parts together with `lowbit eval merge`", path.display());
        }
        let items = record.items.candidate.as_ref().map(|f| beside(path, f)).transpose()?.unwrap_or_default();
        Ok(Self { path: path.to_path_buf(), record: Some(record), items })
    }

    /// The reference that ran in the same pass.
    fn reference(&self) -> Result<Self> {
        let ran = self.record.as_ref().and_then(|r| r.provenance.reference.as_ref());
        if ran.is_none() {
            bail!(
                "{} has no reference beside it\nhint: give the reference's own record as the second file, or evaluate with --reference",
                self.path.display()
            );
        }
        let file = self.record.as_ref().and_then(|r| r.items.reference.as_ref());
        let items = file.map(|f| beside(&self.path, f)).transpose()?.unwrap_or_default();
        Ok(Self { path: self.path.clone(), record: None, items })
    }
}

/// Items of a file that a record names; its hash must be the record's.
fn beside(record: &Path, file: &ItemFile) -> Result<Vec<Item>> {
    if Path::new(&file.file).file_name() != Some(file.file.as_ref()) {
        bail!("{}: `{}` is not the name of a file beside it", record.display(), file.file);
    }
    let path = record.with_file_name(&file.file);
    let bytes = lowbit_checkpoint::files::read(&path)
        .with_context(|| format!("cannot read {}, the items of {}", path.display(), record.display()))?;
    let found = sha256_hex(&bytes);
    if found != file.sha256 {
        bail!("{} is not the file {} was written with: its SHA-256 is {found}", path.display(), record.display());
    }
    items(&path, &bytes)
}

fn items(path: &Path, bytes: &[u8]) -> Result<Vec<Item>> {
    let lines = bytes.split(|b| *b == b'\n').enumerate().filter(|(_, l)| !l.is_empty());
    lines
        .map(|(i, line)| {
            serde_json::from_slice(line).with_context(|| format!("{}:{}: not an item", path.display(), i + 1))
        })
        .collect()
}

fn pairing(args: &GateArgs, candidate: &Side) -> Result<PairingOptions> {
    let mut metrics = BTreeMap::new();
    for text in &args.metric {
        let (task, metric) = text
            .split_once('=')
            .with_context(|| format!("--metric {text:?} is not TASK=METRIC\nhint: arc_challenge=acc_norm"))?;
        metrics.insert(task.to_owned(), metric.to_owned());
    }
    let mut out = PairingOptions { metrics, ..PairingOptions::default() };
    if let Some(r) = &candidate.record {
        out.families.clone_from(&r.families);
        let lower = |t: &lowbit_eval::tasks::TaskRecord| -> Vec<(String, String)> {
            let metrics = t.higher_is_better.iter().filter(|m| !m.1);
            metrics.map(|m| (t.label.clone(), m.0.clone())).collect()
        };
        out.lower_is_better = r.tasks.values().flat_map(lower).collect();
    }
    let known = |t: &String| out.families.contains_key(t) || candidate.items.iter().any(|i| i.task == *t);
    if let Some(task) = out.metrics.keys().find(|t| !known(t)) {
        bail!("--metric names {task}, which is no task of {}", candidate.path.display());
    }
    Ok(out)
}

/// Margin in percentage points by the candidate's bits.
pub fn default_margin(bits: Option<u32>) -> f64 {
    if bits.is_none_or(|b| b >= 8) { 0.5 } else { 1.0 }
}

fn policy(args: &GateArgs, record: Option<&EvalRecord>) -> Policy {
    // A run that stopped once its verdict was clear was looked at by its own margin.
    let recorded = record.and_then(|r| r.provenance.options.get("margin")).and_then(serde_json::Value::as_f64);
    let margin = args.margin.or(recorded).unwrap_or_else(|| default_margin(record.and_then(|r| r.bits)));
    Policy {
        margin: margin / 100.0,
        alpha: args.alpha,
        power: args.power,
        max_kl: args.max_kl,
        max_ppl_ratio: args.max_ppl_ratio,
        seed: args.seed,
        look: record.and_then(|r| r.look.clone()).unwrap_or_else(Look::single),
        ..Policy::default()
    }
}

fn options(args: &GateArgs, policy: &Policy) -> BTreeMap<String, serde_json::Value> {
    BTreeMap::from([
        ("candidate".into(), json!(args.candidate)),
        ("baseline".into(), json!(args.baseline)),
        ("margin_pp".into(), (100.0 * policy.margin).into()),
        ("metric".into(), json!(args.metric)),
    ])
}

/// KL and perplexities, where they are of these two models.
fn thresholds(
    ctx: &Context,
    args: &GateArgs,
    candidate: &Side,
    reference: &Side,
    paired: &Paired,
) -> Result<Vec<Threshold>> {
    let mut out = Vec::new();
    let ends = |i: &Interval| (i.low, i.high);
    if let Some(r) = &candidate.record {
        // The drift in a record is from the reference it ran with.
        let other = reference.record.as_ref().map(|o| &o.provenance.model_sha256);
        if args.baseline.is_none() || other == r.provenance.reference_sha256.as_ref() {
            if let Some(k) = &r.kl {
                out.push(Threshold::new("KL".into(), k.mean, ends(&k.mean_interval), args.max_kl));
            }
            for p in &r.perplexities {
                if let Some(ratio) = &p.ratio {
                    let name = format!("perplexity {}", p.protocol);
                    out.push(Threshold::new(name, ratio.value, ends(ratio), args.max_ppl_ratio));
                }
            }
        } else if r.kl.is_some() || !r.perplexities.is_empty() {
            ctx.say(format!("note: drift in {} is from another reference and left out", candidate.path.display()));
        }
    }
    for t in &paired.texts {
        let nll = |f: &dyn Fn(&(f64, f64)) -> f64| -> Vec<f64> { t.log_probs.iter().map(|p| -f(p)).collect() };
        let ratio = perplexity_ratio(&nll(&|p| p.0), &nll(&|p| p.1), &t.words);
        out.push(Threshold::new(format!("perplexity {}", t.name), ratio.value, ends(&ratio), args.max_ppl_ratio));
    }
    if args.max_kl.is_some() && out.iter().all(|t| t.name != "KL") {
        bail!(
            "--max-kl, and {} has no KL from this reference\nhint: evaluate with --kl TEXT --reference MODEL",
            candidate.path.display()
        );
    }
    if args.max_ppl_ratio.is_some() && out.iter().all(|t| !t.name.starts_with("perplexity")) {
        bail!(
            "--max-ppl-ratio, and {} has no perplexity beside this reference's\nhint: evaluate with --ppl TEXT --reference MODEL",
            candidate.path.display()
        );
    }
    Ok(out)
}

/// What was scored.
fn scored(e: &Endpoint) -> Vec<String> {
    vec![
        e.name.clone(),
        e.metric.clone(),
        count(e.n),
        format!("{:.4}", e.reference),
        format!("{:.4}", e.candidate),
        format!("{}/{}", count(e.losses), count(e.gains)),
    ]
}

/// What it says, in percentage points.
fn said(e: &Endpoint) -> Vec<String> {
    let points = |share: f64| format!("{:+.2}", 100.0 * share);
    vec![
        e.name.clone(),
        format!("{} [{}, {}]", points(e.loss), points(e.interval.0), points(e.interval.1)),
        format!("{:.2e}", e.p_loss),
        format!("{:.2}", 100.0 * e.detectable),
        e.verdict.name().to_string(),
    ]
}

/// The result as text.
pub fn summary(r: &GateRecord) -> String {
    let mut out = Vec::new();
    let shown = || r.pool.iter().filter(|_| r.tasks.len() > 1).chain(&r.tasks);
    if shown().next().is_some() {
        let rows = |f: fn(&Endpoint) -> Vec<String>| shown().map(f).collect::<Vec<_>>();
        out.push(table(&["", "metric", "items", "reference", "candidate", "lost/gained"], &rows(scored)));
        out.push(table(&["percentage points", "loss [95 %]", "p(loss)", "finds", ""], &rows(said)));
    }
    let rows: Vec<Vec<String>> = r
        .thresholds
        .iter()
        .map(|t| {
            vec![
                t.name.clone(),
                format!("{:.5} {}", t.value, t.range(5)),
                t.limit.map_or("–".into(), |l| l.to_string()),
                t.verdict.map_or("–", Verdict::name).to_string(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        out.push(table(&["", "value [95 %]", "limit", ""], &rows));
    }
    out.push(format!("{}: {}", r.verdict.name(), r.reason));
    out.join("\n\n")
}

/// `--simulate`: the gate's own decision on made-up tables.
fn simulated(ctx: &Context, args: &GateArgs) -> Result<()> {
    let policy = Policy {
        margin: args.margin.unwrap_or(0.0) / 100.0,
        alpha: args.alpha,
        power: args.power,
        seed: args.seed,
        ..Policy::default()
    };
    let total: u64 = args.items.iter().sum();
    let detectable = power::detectable(total, args.discordant, pool_level(args.items.len(), args.alpha), args.power);
    let mut truths = vec![("no loss", 0.0), ("loss", args.loss / 100.0)];
    if policy.margin > 0.0 && policy.margin <= args.discordant {
        truths.push(("loss of the margin", policy.margin));
    }
    let mut found: Vec<(&str, f64, Rates)> = Vec::new();
    for (name, loss) in truths {
        ctx.check_stop()?;
        let scenario = Scenario {
            tasks: args.items.clone(),
            discordant: args.discordant,
            loss,
            looks: args.looks,
            runs: args.runs,
            seed: args.seed,
        };
        found.push((name, loss, simulate(&scenario, &policy)));
    }
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|(name, loss, r)| {
            let percent = |x: f64| format!("{:.2} %", 100.0 * x);
            vec![
                format!("{name} ({})", pp(*loss)),
                percent(r.regression),
                percent(r.pass),
                percent(r.inconclusive),
                percent(r.loss_shown),
                percent(r.pairs_used),
            ]
        })
        .collect();
    let json = json!({
        "items": args.items, "discordant": args.discordant, "looks": args.looks, "runs": args.runs, "policy": policy, "detectable": detectable,
        "truths": found.iter().map(|(name, loss, rates)| json!({"name": name, "loss": loss, "rates": rates})).collect::<Vec<_>>(),
    });
    ctx.print(&json, || {
        format!(
            "{} items, {:.1} % of them change, margin {:.2} pp, error {:.0} %, {} look(s), {} runs\n\n{}\n\na loss of {:.2} pp is found with power {:.0} %",
            count(total),
            100.0 * args.discordant,
            100.0 * policy.margin,
            100.0 * args.alpha,
            args.looks,
            count(args.runs),
            table(&["truth", "regression", "pass", "inconclusive", "loss shown", "items used"], &rows),
            100.0 * detectable,
            100.0 * args.power
        )
    })
}
