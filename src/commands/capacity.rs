//! `lowbit capacity`: how many servers, which variant, what it costs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use lowbit_bench::capacity::estimate::{EstimateOptions, SCHEMES, estimate};
use lowbit_bench::capacity::gpus::{GPUS, Gpu};
use lowbit_bench::capacity::plan::{CapacityRecord, PlanOptions, SCHEMA, Variant, plan};
use lowbit_bench::capacity::room::Room;
use lowbit_bench::capacity::shape::ModelShape;
use lowbit_bench::load::import;
use lowbit_bench::load::record::LoadRecord;
use lowbit_bench::load::workload::Workload;
use lowbit_bench::record::{BenchRecord, MemoryRow};
use lowbit_bench::slo::Slo;
use lowbit_checkpoint::writer::write_atomic;
use serde_json::{Value, json};

use crate::args::CapacityArgs;
use crate::commands::eval::refuse_existing;
use crate::commands::table::table;
use crate::context::Context;
use crate::exit::VerdictError;
use crate::{models, provenance};

/// `lowbit capacity`.
pub fn capacity(ctx: &Context, args: &CapacityArgs) -> Result<()> {
    if args.estimate { estimates(ctx, args) } else { plans(ctx, args) }
}

fn estimates(ctx: &Context, args: &CapacityArgs) -> Result<()> {
    let gpu = gpu(args.gpu.as_deref().unwrap_or("h200"))?;
    if args.model.is_empty() {
        bail!(
            "--estimate needs a model\nhint: --model llama3.1-8b (or {}), a folder, or a hub id",
            ModelShape::names().collect::<Vec<_>>().join(", ")
        );
    }
    let workload = Workload::parse(&args.data)?;
    let o = EstimateOptions {
        input: workload.input.mean as u64 + u64::from(workload.prefix_tokens),
        output: workload.output.mean as u64,
        gpus: u64::from(args.gpus.max(1)),
        kv_bytes: if args.kv_8bit { 1.0 } else { 2.0 },
        ..EstimateOptions::default()
    };
    let mut rows = Vec::new();
    let mut documents = Vec::new();
    let mut any = false;
    for model in &args.model {
        let shape = shape(ctx, model)?;
        let list = estimate(&shape, gpu, SCHEMES, &o);
        let mut fleet = Vec::new();
        for e in &list {
            any |= e.fits;
            let when = |text: String| if e.fits { text } else { "–".into() };
            let rate = e.requests_per_second;
            let need = |p: f64| (p * args.burst / (rate * args.headroom)).ceil().max(1.0) as u64 + args.spare;
            let servers = args.peak_rps.filter(|_| e.fits).map(need);
            fleet.push(servers);
            rows.push(vec![
                format!("{} {}", shape.name, e.scheme),
                format!("{:.1}", e.weight_bytes / 1e9),
                if e.fits { format!("{:.1}", e.kv_room_bytes / 1e9) } else { "does not fit".into() },
                when(e.concurrency.to_string()),
                when(format!("{:.0}", e.decode_one)),
                when(format!("{:.0}", e.decode_full)),
                when(format!("{:.1}", e.itl_ms)),
                when(format!("{:.1}", e.ttft_ms)),
                when(format!("{rate:.2}")),
                servers.map_or("–".into(), |s| s.to_string()),
            ]);
        }
        documents.push(json!({"model": shape, "estimates": list, "servers": fleet}));
    }
    let header = [
        "model",
        "weights GB",
        "KV room GB",
        "at once",
        "tok/s, 1",
        "tok/s, all",
        "ITL ms",
        "TTFT ms",
        "req/s",
        "servers",
    ];
    ctx.print(&json!({"gpu": gpu, "options": o, "models": documents}), || {
        format!(
            "{} × {}: {} GB, {:.2} TB/s each; {} tokens in, {} out\n{}\nceilings from the data sheet, no engine reaches them: load a server before you buy",
            o.gpus,
            gpu.name,
            gpu.memory_bytes / 1_000_000_000,
            gpu.bandwidth / 1e12,
            o.input,
            o.output,
            table(&header, &rows)
        )
    })?;
    if any { Ok(()) } else { Err(VerdictError { code: 1, text: "infeasible: no variant fits".into() }.into()) }
}

/// By name.
fn gpu(name: &str) -> Result<&'static Gpu> {
    Gpu::find(name).with_context(|| {
        format!(
            "no data sheet of the GPU {name}\nhint: one of {}",
            GPUS.iter().map(|g| g.name).collect::<Vec<_>>().join(", ")
        )
    })
}

fn shape(ctx: &Context, model: &str) -> Result<ModelShape> {
    if let Some(shape) = ModelShape::known(model) {
        return Ok(shape);
    }
    let c = models::locate(ctx, model)?.open()?.config;
    if c.experts.is_some() || c.latent.is_some() {
        bail!(
            "{model}: --estimate knows dense decoders, not `{}`\nhint: load a server and give `lowbit capacity` the records",
            c.family
        );
    }
    let n = |v: usize| v as u64;
    Ok(ModelShape {
        name: model.to_string(),
        layers: n(c.num_layers),
        hidden: n(c.hidden_size),
        heads: n(c.num_heads),
        kv_heads: n(c.num_kv_heads),
        head_dim: n(c.head_dim),
        intermediate: n(c.intermediate_size),
        vocab: n(c.vocab_size),
        tied: c.tie_word_embeddings,
    })
}

fn plans(ctx: &Context, args: &CapacityArgs) -> Result<()> {
    if args.files.is_empty() {
        bail!(
            "no load records\nhint: lowbit load URL --find-max --slo NAME -o a.json, then lowbit capacity a.json; or --estimate"
        );
    }
    let positive =
        |name: &str, v: f64| if v.is_finite() && v > 0.0 { Ok(v) } else { bail!("{name} must be above 0, found {v}") };
    let o = PlanOptions {
        peak_rps: positive(
            "--peak-rps",
            args.peak_rps.context("--peak-rps is missing: requests a second at the peak")?,
        )?,
        gpu_hour: positive(
            "--gpu-hour",
            args.gpu_hour.context("--gpu-hour is missing: the price of a GPU for an hour")?,
        )?,
        gpus: args.gpus.max(1),
        burst: positive("--burst", args.burst)?,
        headroom: positive("--headroom", args.headroom)?,
        spare: args.spare,
        slo: args.slo.as_deref().map(Slo::parse).transpose()?,
    };
    refuse_existing(args.output.as_ref(), args.force)?;
    let card = args.gpu.as_deref().map(gpu).transpose()?;
    let variants = args.files.iter().map(|f| variant(ctx, f, card, args)).collect::<Result<Vec<_>>>()?;
    let (rows, best) = plan(&variants, &o);
    let options = BTreeMap::from([("files".into(), json!(args.files))]);
    let record = CapacityRecord {
        schema: SCHEMA,
        provenance: provenance::of_client(ctx, 0, "", options),
        options: o,
        variants: rows,
        best,
    };
    if let Some(path) = &args.output {
        write_atomic(path, &serde_json::to_vec_pretty(&record)?)?;
    }
    let roomy = record.variants.iter().any(|r| r.room.is_some());
    let lines: Vec<Vec<String>> = record
        .variants
        .iter()
        .map(|r| {
            let n = |v: Option<f64>, d: usize| v.map_or("–".into(), |v| format!("{v:.d$}"));
            let mut line = vec![
                r.name.clone(),
                n(r.rate, 3),
                r.servers.map_or("–".into(), |s| s.to_string()),
                n(r.dollars_per_hour, 2),
                n(r.dollars_per_million_output, 3),
                n(r.ttft_p50_ms, 1),
            ];
            if roomy {
                let room = r.room.as_ref();
                line.push(n(room.map(|m| m.weight_bytes as f64 / 1e9), 1));
                line.push(n(room.and_then(|m| m.kv_room_bytes).map(|b| b / 1e9), 1));
                line.push(room.and_then(|m| m.concurrency).map_or("–".into(), |c| c.to_string()));
            }
            line.push(r.accuracy.clone().unwrap_or_else(|| "not given".into()));
            line.push(if r.infeasible.is_empty() { "ok".into() } else { "infeasible".into() });
            line
        })
        .collect();
    let mut header = vec!["variant", "req/s a server", "servers", "$/h", "$/M out", "TTFT p50"];
    if roomy {
        header.extend(["weights GB", "KV room GB", "at once"]);
    }
    header.extend(["accuracy", ""]);
    let best = record.best.as_ref();
    ctx.print(&record, || {
        let said = best.map_or("infeasible: no variant meets the objective and the accuracy".to_string(), |b| {
            format!("cheapest that can be used: {b}")
        });
        let why = record.variants.iter().filter(|r| !r.infeasible.is_empty());
        let why: String = why.map(|r| format!("{}: {}\n", r.name, r.infeasible.join("; "))).collect();
        format!("{}\n\n{why}{said}", table(&header, &lines))
    })?;
    if best.is_some() { Ok(()) } else { Err(VerdictError { code: 1, text: "infeasible".into() }.into()) }
}

/// The candidate's memory in the `bench.json` beside a load record; the reference's beside `load-reference.json`.
fn memory(ctx: &Context, load: &Path, record: &LoadRecord) -> Option<MemoryRow> {
    let path = load.with_file_name("bench.json");
    let bytes = lowbit_checkpoint::files::read_stream(&path).ok()?;
    let bench: BenchRecord = match serde_json::from_slice(&bytes) {
        Ok(bench) => bench,
        Err(e) => {
            ctx.say(format!("{} is left out: {e}", path.display()));
            return None;
        }
    };
    let reference = load.file_stem().is_some_and(|s| s == "load-reference");
    let role = if reference { "reference" } else { "candidate" };
    let rows: Vec<MemoryRow> = bench.memory.into_iter().filter(|m| m.role == role).collect();
    // Of several, the one that was loaded.
    let named = rows.iter().find(|m| m.model == record.target.model);
    named.or(if rows.len() == 1 { rows.first() } else { None }).cloned()
}

/// `LOAD.json`, or `LOAD.json=GATE.json` with the verdict on accuracy.
fn variant(ctx: &Context, text: &str, card: Option<&Gpu>, args: &CapacityArgs) -> Result<Variant> {
    let (load, gate) = text.split_once('=').map_or((text, None), |(l, g)| (l, Some(g)));
    let read = |path: &str| {
        lowbit_checkpoint::files::read_stream(Path::new(path)).with_context(|| format!("cannot read {path}"))
    };
    let record = import::read(Path::new(load))?;
    let accuracy = gate
        .map(|g| -> Result<String> {
            let v: Value = serde_json::from_slice(&read(g)?).with_context(|| format!("{g} is not JSON"))?;
            let found = v.get("verdict").and_then(Value::as_str).map(str::to_string);
            found.with_context(|| format!("{g} has no verdict\nhint: the record of `lowbit gate`"))
        })
        .transpose()?;
    let stem = Path::new(load).file_stem().map_or(load.to_string(), |s| s.to_string_lossy().into_owned());
    // Folders of `lowbit run` all call theirs load.json.
    let folder = Path::new(load).parent().and_then(Path::file_name).map(|f| f.to_string_lossy().into_owned());
    let stem = folder.filter(|_| stem == "load").unwrap_or(stem);
    let last = record.valid().last().map(|s| &s.metrics);
    let tokens = last.and_then(|m| Some(m.input_tokens.as_ref()?.mean + m.output_tokens.as_ref()?.mean));
    let o = EstimateOptions {
        gpus: u64::from(args.gpus.max(1)),
        kv_bytes: if args.kv_8bit { 1.0 } else { 2.0 },
        ..EstimateOptions::default()
    };
    let room = memory(ctx, Path::new(load), &record).and_then(|row| Room::of(&row, card, &o, tokens));
    Ok(Variant { name: format!("{stem} ({})", record.target.model), load: record, accuracy, room })
}
