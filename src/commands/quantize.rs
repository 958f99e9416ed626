//! `lowbit plan` and `lowbit quantize`, and the pieces `run` shares with them.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use lowbit_calibration::{Source, WindowOrder, Windows, build_windows, load_texts};
use lowbit_checkpoint::chat_template::ChatTemplate;
use lowbit_checkpoint::hub;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::quant_config::{KvScheme, PackFormat};
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::{Checkpoint, CheckpointError};
use lowbit_kernels::activation::InputCode;
use lowbit_kernels::backend::Backend;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, LinearScheme, Scheme};
use lowbit_model::Model;
use lowbit_quantize::gguf::GgufChoice;
use lowbit_quantize::plan::{self, Plan};
use lowbit_quantize::record::{PlanRecord, QuantizeRecord};
use lowbit_quantize::scale_search::ScaleSearch;
use lowbit_quantize::{Method, Progress, QuantizeError, QuantizeOptions, Resume, Transform};

use crate::args::{FormatArg, HeadArg, KvSchemeArg, MethodArg, PlanArgs, QuantOptions, QuantizeArgs, ScaleSearchArg};
use crate::commands::budget;
use crate::commands::table::{megabytes, table};
use crate::context::{Context, Purpose};
use crate::exit;
use crate::models::{self, Located};
use crate::provenance;
use crate::recipe;

/// Validates the options.
pub fn options(q: &QuantOptions) -> Result<QuantizeOptions> {
    if q.format == FormatArg::Gguf {
        return gguf_options(q);
    }
    if let Some(kind) = gguf_kind(&q.scheme) {
        bail!("--scheme {} is {}, a type of GGUF\nhint: add --format gguf", q.scheme, kind.name());
    }
    if q.head == HeadArg::Q6K || q.embedding == HeadArg::Q6K {
        bail!("q6_k is a type of GGUF\nhint: w8, or --format gguf");
    }
    let group = match q.group_size.as_deref() {
        None => GroupSize::Cols(128),
        Some("channel" | "-1") => GroupSize::PerChannel,
        Some(n) => match n.parse::<usize>() {
            Ok(n) if n > 0 => GroupSize::Cols(n),
            _ => bail!("--group-size {n}: expected a positive number or `channel`"),
        },
    };
    let scheme = LinearScheme::parse(&q.scheme, group, !q.asymmetric)?;
    if !LinearScheme::has_groups(&q.scheme) && q.group_size.is_some() {
        bail!("--group-size: {} fixes its groups\nhint: leave --group-size out", q.scheme);
    }
    if !LinearScheme::has_groups(&q.scheme) && q.asymmetric {
        bail!("--asymmetric: {} is symmetric\nhint: leave --asymmetric out", q.scheme);
    }
    let format = match q.format {
        FormatArg::CompressedTensors => PackFormat::CompressedTensors,
        FormatArg::Gptq => PackFormat::GptqV1,
        FormatArg::GptqV2 => PackFormat::GptqV2,
        FormatArg::Awq => PackFormat::Awq,
        FormatArg::Bf16 | FormatArg::Gguf => bail!("--format bf16 writes dense weights: that is `lowbit convert`"),
    };
    common(q, group, QuantizeOptions { format, ..QuantizeOptions::new(scheme) })
}

/// Options that every format has; `group` is that of modules whose rule names none.
fn common(q: &QuantOptions, group: GroupSize, base: QuantizeOptions) -> Result<QuantizeOptions> {
    if !(q.damp.is_finite() && (0.0..=1.0).contains(&q.damp)) {
        bail!("--damp {}: expected a fraction between 0 and 1", q.damp);
    }
    if q.samples == 0 || q.seq_len == 0 {
        bail!("--samples and --seq-len must be at least 1");
    }
    if q.batch_size == Some(0) {
        bail!("--batch-size must be at least 1\nhint: leave it out for the default");
    }
    if q.learn_steps == 0 {
        bail!("--learn-steps must be at least 1");
    }
    budget::refuse_auto(q)?;
    let modules = q.module.iter().map(|m| module_rule(m, group, !q.asymmetric)).collect::<Result<_>>()?;
    let transform = |name: &String| match Transform::parse(name) {
        Some(t) => Ok(t),
        None => bail!("--transform {name}: expected awq, smoothquant, smoothquant=ALPHA (0 to 1) or rotate"),
    };
    let transforms = q.transform.iter().map(transform).collect::<Result<_>>()?;
    Ok(QuantizeOptions {
        method: match q.method {
            MethodArg::Gptq => Method::Gptq,
            MethodArg::Best => Method::Best,
            MethodArg::Fast => Method::Fast,
            MethodArg::Round => Method::Round,
            MethodArg::Hqq => Method::Hqq,
            MethodArg::Rtn => Method::Rtn,
        },
        damp_frac: q.damp,
        learn_steps: q.learn_steps,
        act_order: !q.no_act_order,
        scale_search: scale_search(q)?,
        signed_scales: !q.unsigned_scales,
        head_w8: q.head != HeadArg::Keep,
        embedding_w8: q.embedding != HeadArg::Keep,
        ignore: q.ignore.clone(),
        strict: q.strict,
        offload: q.offload.clone(),
        modules,
        transforms,
        kv: q.kv_scheme.map(|kv| match kv {
            KvSchemeArg::Fp8 => KvScheme { code: InputCode::Fp8, per_head: false },
            KvSchemeArg::Fp8Head => KvScheme { code: InputCode::Fp8, per_head: true },
            KvSchemeArg::Int8 => KvScheme { code: InputCode::Int8, per_head: false },
            KvSchemeArg::Int8Head => KvScheme { code: InputCode::Int8, per_head: true },
        }),
        shard_bytes: q.shard_mb.max(1).saturating_mul(1_000_000),
        chunk_tokens: q.batch_size.map_or(base.chunk_tokens, |n| n.saturating_mul(q.seq_len)),
        ..base
    })
}

fn scale_search(q: &QuantOptions) -> Result<ScaleSearch> {
    let by_hessian = matches!(q.method, MethodArg::Gptq | MethodArg::Best | MethodArg::Fast);
    Ok(match q.scale_search {
        Some(_) if !by_hessian => {
            bail!("--scale-search weighs errors by a Hessian\nhint: add --method gptq, fast or best, or leave it out")
        }
        _ if q.minmax_scales => ScaleSearch::MinMax,
        None | Some(ScaleSearchArg::Diagonal) => ScaleSearch::Hessian,
        Some(ScaleSearchArg::Pivots) => ScaleSearch::Pivots,
        Some(ScaleSearchArg::Blocks) => ScaleSearch::Blocks,
    })
}

/// The type of GGUF that a scheme's name is.
fn gguf_kind(name: &str) -> Option<GgmlType> {
    use GgmlType::{Q4_0, Q4K, Q5_0, Q6K, Q8_0};
    [Q4_0, Q5_0, Q8_0, Q4K, Q6K].into_iter().find(|k| k.name().eq_ignore_ascii_case(name))
}

fn gguf_options(q: &QuantOptions) -> Result<QuantizeOptions> {
    let Some(kind) = gguf_kind(&q.scheme) else {
        bail!("--format gguf with --scheme {}\nhint: --scheme q4_0, q5_0, q8_0, q4_k or q6_k", q.scheme);
    };
    if q.group_size.is_some() || q.asymmetric {
        bail!("{} has its own groups and zero points\nhint: leave --group-size and --asymmetric away", kind.name());
    }
    let table = |arg: HeadArg| match arg {
        // Of a budget, which a GGUF does not have.
        HeadArg::Keep | HeadArg::Auto => None,
        HeadArg::W8 => Some(GgmlType::Q8_0),
        HeadArg::Q6K => Some(GgmlType::Q6K),
    };
    let gguf = GgufChoice { kind, embedding: table(q.embedding), head: table(q.head) };
    let scheme = kind.scheme().unwrap_or(Scheme { bits: 8, symmetric: true, group: GroupSize::Cols(32) });
    common(q, GroupSize::Cols(32), QuantizeOptions { gguf: Some(gguf), ..QuantizeOptions::new(scheme) })
}

/// `PATTERN=SCHEME` or `PATTERN=SCHEME:GROUP`; a pattern may hold `=` itself.
fn module_rule(text: &str, group: GroupSize, symmetric: bool) -> Result<(String, LinearScheme)> {
    let Some((pattern, scheme)) = text.rsplit_once('=').filter(|(p, s)| !p.is_empty() && !s.is_empty()) else {
        bail!("--module {text}: expected PATTERN=SCHEME\nhint: for example --module 're:.*down_proj=w8a16'");
    };
    let (name, group) = match scheme.split_once(':') {
        Some((name, "channel" | "-1")) => (name, GroupSize::PerChannel),
        Some((name, n)) => match n.parse::<usize>() {
            Ok(n) if n > 0 => (name, GroupSize::Cols(n)),
            _ => bail!("--module {text}: group {n}: expected a positive number or `channel`"),
        },
        None => (scheme, group),
    };
    if scheme.contains(':') && !LinearScheme::has_groups(name) {
        bail!("--module {text}: {name} fixes its groups\nhint: leave `:GROUP` out");
    }
    Ok((pattern.to_string(), LinearScheme::parse(name, group, symmetric)?))
}

/// The full options of a run, for the record.
fn option_map(options: &QuantizeOptions, q: &QuantOptions) -> std::collections::BTreeMap<String, serde_json::Value> {
    let mut m = options.to_map();
    m.insert("calib".into(), q.calib.clone().into());
    m.insert("samples".into(), q.samples.into());
    m.insert("seq_len".into(), q.seq_len.into());
    if let Some(n) = q.batch_size {
        m.insert("batch_size".into(), n.into());
    }
    let b = &q.budget;
    if b.bits.is_some() || b.size.is_some() || b.fit.is_some() {
        let asked = serde_json::json!({
            "bits": b.bits, "size": b.size, "fit": b.fit, "context": b.context, "candidates": b.candidates,
        });
        m.insert("budget".into(), asked);
    }
    m
}

/// `lowbit plan`.
pub fn plan(ctx: &Context, args: &PlanArgs) -> Result<()> {
    let located = models::locate_floats(ctx, &args.model)?;
    let ckpt = located.open_floats()?;
    let options = options(&args.quant)?;
    let mut made = make_plan(ctx, &located, &ckpt, &options, &args.quant, None)?;
    if args.probe {
        let start = Instant::now();
        made.record.seconds = Some(probe(ctx, &ckpt, &made, &args.quant)?);
        made.record.probe_seconds = Some(start.elapsed().as_secs_f64());
    }
    ctx.print(&made.record, || describe(&made.record))
}

/// Seconds that a plan will take, measured; what is written meanwhile is removed.
fn probe(ctx: &Context, ckpt: &Checkpoint, made: &Plan, q: &QuantOptions) -> Result<f64> {
    let backends = if made.options.needs_data() { ctx.backends()? } else { vec![ctx.backend()?] };
    let backends: Vec<&dyn Backend> = backends.iter().map(|b| b.as_ref()).collect();
    let folder = std::env::temp_dir().join(format!("lowbit-probe-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|e| CheckpointError::io(&folder, e))?;
    let writing = ctx.writing();
    let found = lowbit_quantize::probe::probe(ckpt, &backends, made, (q.samples, q.seq_len), &folder, &ctx.stop);
    let removed = std::fs::remove_dir_all(&folder).map_err(|e| CheckpointError::io(&folder, e));
    drop(writing);
    let seconds = found?;
    removed?;
    Ok(seconds)
}

/// Plan with provenance.
pub fn make_plan(
    ctx: &Context,
    located: &Located,
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    q: &QuantOptions,
    output: Option<&Path>,
) -> Result<Plan> {
    let tokens = if options.needs_data() { q.samples.saturating_mul(q.seq_len) } else { 0 };
    let gathered =
        provenance::gather(ctx, Purpose::Accuracy, located, None, q.seed.unwrap_or(0), option_map(options, q))?;
    let mut made = match budget::ask(&q.budget)? {
        None => plan::make(ckpt, options, output, tokens)?,
        Some(ask) => {
            lowbit_quantize::budget::check(ckpt, options)?;
            let missing = || QuantizeError::no_data("a budget", "one scheme: --scheme w4a16");
            let windows = calibration_windows(ctx, ckpt, q, missing)?;
            let (options, spent) = budget::spend(ctx, ckpt, options, q, ask, &windows, &identity(&gathered))?;
            let mut made = plan::make(ckpt, &options, output, tokens)?;
            made.explain(spent);
            made
        }
    };
    made.record.provenance = gathered;
    Ok(made)
}

/// The plan as text.
pub fn describe(p: &PlanRecord) -> String {
    let rows: Vec<Vec<String>> = p
        .sizes
        .iter()
        .map(|s| {
            vec![
                s.component.clone(),
                megabytes(s.before_bytes),
                megabytes(s.after_bytes),
                ratio(s.before_bytes, s.after_bytes),
            ]
        })
        .chain([vec![
            "total".into(),
            megabytes(p.before_bytes),
            megabytes(p.after_bytes),
            ratio(p.before_bytes, p.after_bytes),
        ]])
        .collect();
    let notes: String = p.notes.iter().map(|n| format!("\nnote: {n}")).collect();
    let time = p.seconds.map_or(String::new(), |s| format!("; time about {s:.1} s"));
    let experts = p.experts.as_ref().map_or(String::new(), |e| {
        format!(
            "\n{} experts a block, {} a token: Hessians of {} at once ({} in all), {} a block; an expert needs {} tokens",
            e.experts,
            e.per_token,
            megabytes(e.hessian_bytes_at_once),
            megabytes(e.hessian_bytes),
            if e.passes == 1 { "one pass".to_string() } else { format!("{} passes", e.passes) },
            e.tokens_needed,
        )
    });
    format!(
        "{} linears to quantize, {} ignored; peak memory about {}{time}{experts}{notes}\n\n{}",
        p.quantized_linears,
        p.kept_linears,
        megabytes(p.peak_memory_bytes),
        table(&["component", "before", "after", "ratio"], &rows)
    ) + &p.budget.as_ref().map_or(String::new(), |b| format!("\n{}", budget::describe(b)))
}

fn ratio(before: u64, after: u64) -> String {
    if before == 0 || after == 0 { "–".into() } else { format!("{:.2}×", before as f64 / after as f64) }
}

/// `lowbit quantize`.
pub fn quantize(ctx: &Context, args: &QuantizeArgs) -> Result<()> {
    let options = options(&args.quant)?;
    if args.output.exists() && !args.force {
        return Err(CheckpointError::Exists { path: args.output.clone() }.into());
    }
    let located = models::locate_floats(ctx, &args.model)?;
    refuse_same(&located.dir, &args.output)?;
    let ckpt = located.open_floats()?;
    let made = make_plan(ctx, &located, &ckpt, &options, &args.quant, Some(&args.output))?;
    for note in &made.record.notes {
        ctx.say(format!("note: {note}"));
    }
    let record = execute(ctx, &ckpt, &made, &args.quant, &args.output, args.force, args.fresh)?;
    ctx.print(&record, || summary(&record))?;
    let (out, model) = (args.output.display(), &args.model);
    ctx.say(format!(
        "next: what it lost: lowbit eval {out} --reference {model} --tasks FILE -o eval.json; to serve it: lowbit serve {out}"
    ));
    Ok(())
}

/// Writing over the input is refused.
pub fn refuse_same(input: &Path, output: &Path) -> Result<()> {
    if let (Ok(a), Ok(b)) = (input.canonicalize(), output.canonicalize())
        && a == b
    {
        bail!("{}: the output is the input\nhint: choose another output", output.display());
    }
    Ok(())
}

/// All that determines codes beside the plan and the calibration tokens.
fn identity(p: &Provenance) -> String {
    let parts =
        [Some(&p.tool), p.commit.as_ref(), Some(&p.model_sha256), Some(&p.device), p.gpu.as_ref(), p.kernels.as_ref()];
    parts.map(|part| part.map_or("", String::as_str)).join("\n")
}

/// Calibrates, solves and writes the checkpoint, its record inside. Blocks that a stopped run solved are taken over, unless `fresh`.
pub fn execute(
    ctx: &Context,
    ckpt: &Checkpoint,
    made: &Plan,
    q: &QuantOptions,
    output: &Path,
    force: bool,
    fresh: bool,
) -> Result<QuantizeRecord> {
    let start = Instant::now();
    let needed = made.options.needs_data();
    let windows = needed.then(|| calibration_windows(ctx, ckpt, q, || made.options.no_data())).transpose()?;
    exit::starts_over(!lowbit_quantize::resume::keeps_blocks(&made.options));
    let backends = if needed { ctx.backends()? } else { vec![ctx.backend()?] };
    let backends: Vec<&dyn Backend> = backends.iter().map(|b| b.as_ref()).collect();
    let writing = ctx.writing();
    let (outcome, writer) = lowbit_quantize::quantize(
        ckpt,
        &backends,
        made,
        windows.as_ref(),
        output,
        force,
        &Resume { identity: identity(&made.record.provenance), fresh },
        &ctx.progress,
        &ctx.stop,
    )?;
    ctx.progress.clear();
    let (starved, dead) = outcome.experts.iter().fold((0, 0), |(s, d), e| (s + e.starved, d + e.dead));
    if starved > 0 {
        ctx.say(format!("note: {starved} experts are starved of calibration tokens, {dead} of them without any"));
    }
    for l in &outcome.layers {
        for event in &l.events {
            ctx.say(format!("note: {}: {event}", l.name));
        }
    }
    let record = QuantizeRecord {
        schema: lowbit_quantize::record::SCHEMA,
        provenance: made.record.provenance.clone(),
        scheme: match &made.record.budget {
            Some(b) => format!("mixed, {:.2} bits", b.bits_per_weight),
            None => made.options.scheme_name(),
        },
        method: made.options.method.name().into(),
        format: made.options.format_name().into(),
        options: made.record.provenance.options.clone(),
        calibration: outcome.calibration,
        transforms: outcome.transforms,
        layers: outcome.layers,
        experts: outcome.experts,
        sizes: made.record.sizes.clone(),
        before_bytes: made.record.before_bytes,
        after_bytes: made.record.after_bytes,
        seconds: start.elapsed().as_secs_f64(),
        stage_seconds: outcome.stage_seconds,
        peak_rss_bytes: lowbit_bench::memory::peak_rss_bytes(),
        budget: made.record.budget.clone(),
    };
    writer.write_file("quantize.json", &serde_json::to_vec_pretty(&record)?)?;
    let calibration = record.calibration.as_ref().map(|c| c.windows_sha256.as_str());
    if let Some(text) = recipe::record(q, &record.provenance, calibration) {
        writer.write_file("recipe.toml", text.as_bytes())?;
    }
    writer.finish()?;
    exit::starts_over(false);
    drop(writing);
    Ok(record)
}

/// The result as text.
pub fn summary(r: &QuantizeRecord) -> String {
    let mean = |f: fn(&lowbit_quantize::record::LayerRecord) -> f64| {
        let v: Vec<f64> = r.layers.iter().filter(|l| l.block.is_some()).map(f).collect();
        v.iter().sum::<f64>() / v.len().max(1) as f64
    };
    let events: usize = r.layers.iter().map(|l| l.events.len()).sum();
    let coverage = if r.experts.is_empty() { String::new() } else { format!("\n\n{}", coverage(r)) };
    format!(
        "{} {} ({}): {} linears in {:.1} s, {} → {} ({}), mean relative error {:.4}, {events} events{}{coverage}",
        r.scheme,
        r.method,
        r.format,
        r.layers.len(),
        r.seconds,
        megabytes(r.before_bytes),
        megabytes(r.after_bytes),
        ratio(r.before_bytes, r.after_bytes),
        mean(|l| l.relative_error),
        r.peak_rss_bytes.map_or(String::new(), |b| format!(", peak memory {}", megabytes(b))),
    )
}

/// Calibration tokens of each block's experts, as text.
fn coverage(r: &QuantizeRecord) -> String {
    let rows: Vec<Vec<String>> = r
        .experts
        .iter()
        .map(|e| {
            [e.block as u64, e.tokens.len() as u64, e.min, e.median, e.needed, e.starved as u64, e.dead as u64]
                .iter()
                .map(u64::to_string)
                .collect()
        })
        .collect();
    table(&["block", "experts", "fewest tokens", "median", "needed", "starved", "dead"], &rows)
}

/// The windows of `--calib`; `missing` says what needs them.
fn calibration_windows(
    ctx: &Context,
    ckpt: &Checkpoint,
    q: &QuantOptions,
    missing: impl FnOnce() -> QuantizeError,
) -> Result<Windows> {
    let given = q.calib.as_deref().ok_or_else(missing)?;
    let order = q.seed.map_or(WindowOrder::Packed, WindowOrder::Random);
    let path = match Source::parse(given)? {
        Source::SelfGenerated => return self_generated(ctx, ckpt, q),
        Source::File(p) | Source::Directory(p) => p,
        Source::Hub(id) => hub::resolve_dataset(&id, &models::hub_options(), &ctx.progress)?,
    };
    let template = ChatTemplate::load(&ckpt.dir)?;
    let texts = load_texts(&path, template.as_ref())?;
    let tokenizer = Tokenizer::load(&ckpt.dir)?;
    ctx.progress.stage("tokenize", 1);
    Ok(build_windows(&texts, &tokenizer, q.samples, q.seq_len, order)?.with_source(given))
}

/// Texts that [`self_generated`] writes in one batch; a fixed number, but what is written does not depend on it.
const TEXTS_AT_ONCE: usize = 16;

/// Text the model writes itself, sampled at temperature 1 from its start token: for users with no data.
fn self_generated(ctx: &Context, ckpt: &Checkpoint, q: &QuantOptions) -> Result<Windows> {
    let model = Model::load(ckpt, ctx.backend()?)?;
    let tokenizer = Tokenizer::load(&ckpt.dir)?;
    let first = tokenizer.bos_id().or(tokenizer.eos_ids().first().copied()).unwrap_or(0);
    let seed = q.seed.unwrap_or(0);
    ctx.progress.stage("write text", q.samples as u64);
    let seeds: Vec<u64> = (0..q.samples as u64).map(|i| seed.wrapping_add(i)).collect();
    let mut tokens = Vec::with_capacity(q.samples);
    for seeds in seeds.chunks(TEXTS_AT_ONCE) {
        ctx.check_stop()?;
        tokens.extend(lowbit_model::write_texts(&model, first, q.seq_len, seeds)?);
        ctx.progress.advance(seeds.len() as u64);
    }
    Ok(Windows::new(tokens, "self", seed))
}
