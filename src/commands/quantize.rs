//! `lowbit plan` and `lowbit quantize`, and the pieces `run` shares with them.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use lowbit_calibration::{Source, WindowOrder, Windows, build_windows, load_texts};
use lowbit_checkpoint::chat_template::ChatTemplate;
use lowbit_checkpoint::hub;
use lowbit_checkpoint::quant_config::{KvScheme, PackFormat};
use lowbit_checkpoint::tokenizer::Tokenizer;
use lowbit_checkpoint::{Checkpoint, CheckpointError};
use lowbit_kernels::activation::InputCode;
use lowbit_kernels::{GroupSize, LinearScheme};
use lowbit_model::Model;
use lowbit_quantize::plan::{self, Plan};
use lowbit_quantize::record::{PlanRecord, QuantizeRecord};
use lowbit_quantize::scale_search::ScaleSearch;
use lowbit_quantize::{Method, Progress, QuantizeOptions};

use crate::args::{FormatArg, HeadArg, KvSchemeArg, MethodArg, PlanArgs, QuantOptions, QuantizeArgs};
use crate::commands::table::{megabytes, table};
use crate::context::{Context, Purpose};
use crate::models::{self, Located};
use crate::provenance;

/// Validates the options.
pub fn options(q: &QuantOptions) -> Result<QuantizeOptions> {
    let group = match q.group_size.as_deref() {
        None => GroupSize::Cols(128),
        Some("channel" | "-1") => GroupSize::PerChannel,
        Some(n) => match n.parse::<usize>() {
            Ok(n) if n > 0 => GroupSize::Cols(n),
            _ => bail!("--group-size {n}: expected a positive number or `channel`"),
        },
    };
    if !(q.damp.is_finite() && (0.0..=1.0).contains(&q.damp)) {
        bail!("--damp {}: expected a fraction between 0 and 1", q.damp);
    }
    if q.samples == 0 || q.seq_len == 0 {
        bail!("--samples and --seq-len must be at least 1");
    }
    let scheme = LinearScheme::parse(&q.scheme, group, !q.asymmetric)?;
    let plain = scheme.int().is_some() && scheme.input.is_none();
    if !plain && q.group_size.is_some() {
        bail!("--group-size: {} fixes its groups\nhint: leave --group-size out", q.scheme);
    }
    if !plain && q.asymmetric {
        bail!("--asymmetric: {} is symmetric\nhint: leave --asymmetric out", q.scheme);
    }
    let modules = q.module.iter().map(|m| module_rule(m, group, !q.asymmetric)).collect::<Result<_>>()?;
    let format = match q.format {
        FormatArg::CompressedTensors => PackFormat::CompressedTensors,
        FormatArg::Gptq => PackFormat::GptqV1,
        FormatArg::Bf16 => bail!("--format bf16 writes dense weights: that is `lowbit convert`"),
    };
    Ok(QuantizeOptions {
        method: match q.method {
            MethodArg::Gptq => Method::Gptq,
            MethodArg::Best => Method::Best,
            MethodArg::Fast => Method::Fast,
            MethodArg::Rtn => Method::Rtn,
        },
        format,
        damp_frac: q.damp,
        act_order: !q.no_act_order,
        scale_search: if q.minmax_scales { ScaleSearch::MinMax } else { ScaleSearch::Hessian },
        signed_scales: !q.unsigned_scales,
        head_w8: q.head == HeadArg::W8,
        embedding_w8: q.embedding == HeadArg::W8,
        ignore: q.ignore.clone(),
        strict: q.strict,
        offload: q.offload.clone(),
        modules,
        kv: q.kv_scheme.map(|kv| match kv {
            KvSchemeArg::Fp8 => KvScheme { code: InputCode::Fp8, per_head: false },
            KvSchemeArg::Fp8Head => KvScheme { code: InputCode::Fp8, per_head: true },
            KvSchemeArg::Int8 => KvScheme { code: InputCode::Int8, per_head: false },
            KvSchemeArg::Int8Head => KvScheme { code: InputCode::Int8, per_head: true },
        }),
        shard_bytes: q.shard_mb.max(1).saturating_mul(1_000_000),
        ..QuantizeOptions::new(scheme)
    })
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
    let parsed = LinearScheme::parse(name, group, symmetric)?;
    if scheme.contains(':') && (parsed.int().is_none() || parsed.input.is_some()) {
        bail!("--module {text}: {name} fixes its groups\nhint: leave `:GROUP` out");
    }
    Ok((pattern.to_string(), parsed))
}

/// The full options of a run, for the record.
fn option_map(options: &QuantizeOptions, q: &QuantOptions) -> std::collections::BTreeMap<String, serde_json::Value> {
    let mut m = options.to_map();
    m.insert("calib".into(), q.calib.clone().into());
    m.insert("samples".into(), q.samples.into());
    m.insert("seq_len".into(), q.seq_len.into());
    m
}

/// `lowbit plan`.
pub fn plan(ctx: &Context, args: &PlanArgs) -> Result<()> {
    let located = models::locate(ctx, &args.model)?;
    let ckpt = located.open()?;
    let options = options(&args.quant)?;
    let made = make_plan(ctx, &located, &ckpt, &options, &args.quant, None)?;
    ctx.print(&made.record, || describe(&made.record))
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
    let mut made = plan::make(ckpt, options, output, tokens)?;
    made.record.provenance =
        provenance::gather(ctx, Purpose::Accuracy, located, None, q.seed.unwrap_or(0), option_map(options, q))?;
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
    format!(
        "{} linears to quantize, {} ignored; peak memory about {}\n\n{}",
        p.quantized_linears,
        p.kept_linears,
        megabytes(p.peak_memory_bytes),
        table(&["component", "before", "after", "ratio"], &rows)
    )
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
    let located = models::locate(ctx, &args.model)?;
    refuse_same(&located.dir, &args.output)?;
    let ckpt = located.open()?;
    let made = make_plan(ctx, &located, &ckpt, &options, &args.quant, Some(&args.output))?;
    let record = execute(ctx, &ckpt, &made, &args.quant, &args.output, args.force)?;
    ctx.print(&record, || summary(&record))
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

/// Calibrates, solves and writes the checkpoint, its record inside.
pub fn execute(
    ctx: &Context,
    ckpt: &Checkpoint,
    made: &Plan,
    q: &QuantOptions,
    output: &Path,
    force: bool,
) -> Result<QuantizeRecord> {
    let start = Instant::now();
    let windows = if made.options.needs_data() { Some(calibration_windows(ctx, ckpt, q)?) } else { None };
    let writing = ctx.writing();
    let (outcome, writer) = lowbit_quantize::quantize(
        ckpt,
        ctx.backend()?.as_ref(),
        made,
        windows.as_ref(),
        output,
        force,
        &ctx.progress,
        &ctx.stop,
    )?;
    ctx.progress.clear();
    for l in &outcome.layers {
        for event in &l.events {
            ctx.say(format!("note: {}: {event}", l.name));
        }
    }
    let record = QuantizeRecord {
        schema: 1,
        provenance: made.record.provenance.clone(),
        scheme: made.options.scheme.full_name(),
        method: made.options.method.name().into(),
        format: made.options.format.name().into(),
        options: made.record.provenance.options.clone(),
        calibration: outcome.calibration,
        layers: outcome.layers,
        sizes: made.record.sizes.clone(),
        before_bytes: made.record.before_bytes,
        after_bytes: made.record.after_bytes,
        seconds: start.elapsed().as_secs_f64(),
        stage_seconds: outcome.stage_seconds,
        peak_rss_bytes: lowbit_bench::memory::peak_rss_bytes(),
    };
    writer.write_file("quantize.json", &serde_json::to_vec_pretty(&record)?)?;
    writer.finish()?;
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
    format!(
        "{} {} ({}): {} linears in {:.1} s, {} → {} ({}), mean relative error {:.4}, {events} events{}",
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

fn calibration_windows(ctx: &Context, ckpt: &Checkpoint, q: &QuantOptions) -> Result<Windows> {
    let Some(given) = q.calib.as_deref() else {
        bail!(
            "this method or scheme needs calibration data\nhint: give --calib FILE (.txt, .jsonl, .parquet), a hub data set, or `self`; or choose --method rtn and a scheme without stored scales"
        );
    };
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
