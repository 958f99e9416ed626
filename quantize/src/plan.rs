//! Before any work: what happens to every tensor, why, and how many bytes come out. Impossible plans are refused here,
//! with all offenders listed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::quant_config::{Layout, PackFormat, WrittenGroup, write_compressed_tensors, write_uniform};
use lowbit_checkpoint::writer::{DEFAULT_SHARD_BYTES, Declared};
use lowbit_checkpoint::{Checkpoint, awq, linear};
use lowbit_kernels::backend::FloatType;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, ScaleType, Scheme};
use lowbit_model::block::linear_shapes;
use lowbit_model::decoder;
use serde_json::Value;

use crate::error::{QuantizeError, Result};
use crate::gguf::{self, GgufChoice, GgufPlan, scheme_name};
use crate::record::{ComponentSize, PlanRecord, PlannedTensor};
use crate::room;
use crate::scale_search::{ScaleSearch, SolverOptions};
use crate::target::Correction;

/// Which solver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Round to nearest, no data.
    Rtn,
    /// GPTQ (arXiv 2210.17323) on calibration data.
    Gptq,
    /// The most accurate composition: see [`Recipe`].
    Best,
    /// What is nearly free on top of GPTQ.
    Fast,
}

/// What a calibrated method does beside GPTQ.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recipe {
    /// Shares of the drift that are corrected; any needs the float stream.
    pub correction: Correction,
    /// Tokens of o and down weighted by 1 / rms of the residual.
    pub token_weights: bool,
    /// Sweeps of coordinate descent with scale refits.
    pub sweeps: usize,
}

impl Recipe {
    /// Whether the float model runs beside the quantized one.
    pub fn float_stream(&self) -> bool {
        self.correction != Correction::default()
    }
}

impl Method {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Method::Rtn => "rtn",
            Method::Gptq => "gptq",
            Method::Best => "best",
            Method::Fast => "fast",
        }
    }

    /// Whether it needs calibration data.
    pub fn calibrated(self) -> bool {
        self != Method::Rtn
    }

    /// What it does beside GPTQ.
    pub fn recipe(self) -> Recipe {
        match self {
            Method::Rtn | Method::Gptq => Recipe::default(),
            Method::Fast => Recipe { token_weights: true, sweeps: 1, ..Recipe::default() },
            Method::Best => {
                Recipe { correction: Correction { input: 0.5, residual: 0.5 }, token_weights: true, sweeps: 3 }
            }
        }
    }
}

/// Everything a user can choose.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// Number format of the block linears.
    pub scheme: Scheme,
    /// Solver.
    pub method: Method,
    /// Layout on disk.
    pub format: PackFormat,
    /// Damping as a fraction of mean(diag H).
    pub damp_frac: f64,
    /// Columns by falling Hessian diagonal, static groups.
    pub act_order: bool,
    /// How scales are chosen.
    pub scale_search: ScaleSearch,
    /// Let the extreme weight take the code −2^(b−1) by a negative scale.
    pub signed_scales: bool,
    /// Quantize lm_head to 8 bits by rounding (it is untied when it shares the embedding's matrix).
    pub head_w8: bool,
    /// Quantize the token embedding to 8 bits by rounding. With a tied head this needs `head_w8`: both then carry the same codes.
    pub embedding_w8: bool,
    /// Modules to leave alone: exact names, or `re:` patterns.
    pub ignore: Vec<String>,
    /// Any event is an error.
    pub strict: bool,
    /// Largest shard.
    pub shard_bytes: u64,
    /// Folder for the carried activations; in memory when absent. Does not change the result.
    pub offload: Option<PathBuf>,
    /// Write one GGUF file with these types; `scheme`, `format` and `shard_bytes` are not read then.
    pub gguf: Option<GgufChoice>,
}

impl QuantizeOptions {
    /// The defaults for a scheme.
    pub fn new(scheme: Scheme) -> Self {
        Self {
            scheme,
            method: Method::Gptq,
            format: PackFormat::CompressedTensors,
            damp_frac: 0.01,
            act_order: true,
            scale_search: ScaleSearch::Hessian,
            signed_scales: true,
            head_w8: false,
            embedding_w8: false,
            ignore: Vec::new(),
            strict: false,
            shard_bytes: DEFAULT_SHARD_BYTES,
            offload: None,
            gguf: None,
        }
    }

    /// What the linears of the blocks become: the full name of a scheme, or a type of GGUF.
    pub fn scheme_name(&self) -> String {
        self.gguf.map_or_else(|| self.scheme.full_name(), |g| scheme_name(g.kind))
    }

    /// The layout's name.
    pub fn format_name(&self) -> &'static str {
        if self.gguf.is_some() { "gguf" } else { self.format.name() }
    }

    /// Solver settings for a scheme whose scales are stored as `scale_type`.
    pub fn solver(&self, scheme: Scheme, scale_type: ScaleType) -> SolverOptions {
        SolverOptions {
            damp_frac: self.damp_frac,
            act_order: self.act_order && self.method.calibrated(),
            scale_search: self.scale_search,
            signed_scales: self.signed_scales,
            min_zero: u8::from(self.format == PackFormat::GptqV1),
            correction: self.method.recipe().correction,
            sweeps: self.method.recipe().sweeps,
            ..SolverOptions::new(scheme, scale_type)
        }
    }

    /// All options by name, for records.
    pub fn to_map(&self) -> BTreeMap<String, Value> {
        let mut m = BTreeMap::new();
        m.insert("scheme".into(), self.scheme_name().into());
        m.insert("method".into(), self.method.name().into());
        m.insert("format".into(), self.format_name().into());
        let recipe = self.method.recipe();
        m.insert("input_correction".into(), f64::from(recipe.correction.input).into());
        m.insert("residual_correction".into(), f64::from(recipe.correction.residual).into());
        m.insert("token_weights".into(), recipe.token_weights.into());
        m.insert("sweeps".into(), recipe.sweeps.into());
        m.insert("damp_frac".into(), self.damp_frac.into());
        m.insert("act_order".into(), self.act_order.into());
        m.insert(
            "scale_search".into(),
            if self.scale_search == ScaleSearch::Hessian { "hessian" } else { "minmax" }.into(),
        );
        m.insert("signed_scales".into(), self.signed_scales.into());
        let table = |w8: bool, kind: fn(&GgufChoice) -> Option<GgmlType>| match self.gguf.as_ref().and_then(kind) {
            Some(kind) => scheme_name(kind),
            None => if w8 { "w8" } else { "keep" }.into(),
        };
        m.insert("head".into(), table(self.head_w8, |g| g.head).into());
        m.insert("embedding".into(), table(self.embedding_w8, |g| g.embedding).into());
        m.insert("ignore".into(), self.ignore.clone().into());
        m.insert("strict".into(), self.strict.into());
        m.insert("shard_bytes".into(), self.shard_bytes.into());
        m
    }
}

/// One linear to quantize.
#[derive(Clone, Debug)]
pub struct PlannedLinear {
    /// Full module name.
    pub module: String,
    /// Module whose weight is read (the embedding's for a tied head).
    pub source: String,
    /// Block, or `None` for the head.
    pub block: Option<usize>,
    /// Number format.
    pub scheme: Scheme,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
}

/// A checked plan.
pub struct Plan {
    /// Options it was made with.
    pub options: QuantizeOptions,
    /// Linears in graph order; the head last.
    pub linears: Vec<PlannedLinear>,
    /// Tensors copied bit for bit.
    pub copies: Vec<String>,
    /// Tensors of the output.
    pub declared: Vec<Declared>,
    /// Layout of the packed linears.
    pub layout: Layout,
    /// `config.json` of the output.
    pub config: Value,
    /// One GGUF file instead of `linears`, `copies` and `declared`.
    pub gguf: Option<GgufPlan>,
    /// The record (provenance still empty).
    pub record: PlanRecord,
}

/// `embedding`, `attention`, `mlp`, `norms`, `lm_head` or `other`.
pub fn component(name: &str) -> &'static str {
    let rules = [
        ("embed_tokens", "embedding"),
        ("lm_head", "lm_head"),
        ("norm", "norms"),
        ("self_attn", "attention"),
        (".mlp.", "mlp"),
    ];
    rules.iter().find(|(k, _)| name.contains(k)).map_or("other", |(_, c)| c)
}

pub(crate) struct Ignore {
    rules: Vec<(String, Option<regex::Regex>, bool)>,
}

impl Ignore {
    pub(crate) fn new(patterns: &[String]) -> Result<Self> {
        let rules = patterns
            .iter()
            .map(|p| {
                let pattern = p.strip_prefix("re:").map(regex::Regex::new).transpose();
                let pattern = pattern.map_err(|e| QuantizeError::Plan {
                    summary: format!("--ignore {p}: {e}"),
                    offenders: vec![],
                    hint: None,
                })?;
                Ok((p.clone(), pattern, false))
            })
            .collect::<Result<_>>()?;
        Ok(Self { rules })
    }

    /// One line for each pattern that matched nothing.
    pub(crate) fn unused(&self) -> Vec<String> {
        self.rules.iter().filter(|r| !r.2).map(|r| format!("--ignore {} matches no linear", r.0)).collect()
    }

    pub(crate) fn hit(&mut self, module: &str) -> Option<String> {
        let mut found = None;
        for (text, pattern, used) in &mut self.rules {
            if pattern.as_ref().map_or(text == module, |p| p.is_match(module)) {
                *used = true;
                found.get_or_insert_with(|| text.clone());
            }
        }
        found
    }
}

/// Makes the plan for writing into `output`.
pub fn make(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    output: Option<&Path>,
    calibration_tokens: usize,
) -> Result<Plan> {
    if ckpt.quantization.is_some() {
        return Err(QuantizeError::Plan {
            summary: format!("{} is quantized already", ckpt.dir.display()),
            offenders: vec![],
            hint: Some("start from the original weights".into()),
        });
    }
    if let Some(choice) = &options.gguf {
        let plan = gguf::make(ckpt, options, choice, calibration_tokens)?;
        return room_for(plan, options, output);
    }
    let c = &ckpt.config;
    let prefix = decoder::prefix(ckpt)?;
    let mut ignore = Ignore::new(&options.ignore)?;
    let mut reasons: BTreeMap<String, String> = BTreeMap::new();
    let mut linears = Vec::new();
    let mut offenders: BTreeMap<(usize, &'static str), Vec<usize>> = BTreeMap::new();
    let mut fused_split = Vec::new();
    for block in 0..c.num_layers {
        let mut kept_by_group: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for s in linear_shapes(c) {
            let module = format!("{prefix}.layers.{block}.{}", s.suffix);
            let fused = format!("{:?}", s.group);
            let entry = kept_by_group.entry(fused).or_default();
            entry.1 += 1;
            if let Some(rule) = ignore.hit(&module) {
                reasons.insert(format!("{module}.weight"), format!("ignored by `{rule}`"));
                entry.0 += 1;
                continue;
            }
            if options.scheme.groups(s.in_features).is_err() {
                offenders.entry((s.in_features, s.suffix)).or_default().push(block);
                continue;
            }
            linears.push(PlannedLinear {
                source: module.clone(),
                module,
                block: Some(block),
                scheme: options.scheme,
                out_features: s.out_features,
                in_features: s.in_features,
            });
        }
        for (group, (kept, all)) in kept_by_group {
            if kept != 0 && kept != all {
                fused_split.push(format!("block {block}, {group}: {kept} of {all} ignored"));
            }
        }
    }
    refuse_widths(&offenders, options.scheme, c.num_layers)?;
    if !fused_split.is_empty() {
        return Err(QuantizeError::Plan {
            summary: "engines fuse q/k/v and gate/up: a set must be quantized or ignored as a whole".into(),
            offenders: fused_split,
            hint: Some("ignore all members, for example --ignore 're:.*self_attn\\.[qkv]_proj'".into()),
        });
    }
    let head_module = if prefix == "model" { "lm_head" } else { "language_model.lm_head" };
    let head_ignored = ignore.hit(head_module).is_some();
    let untie = options.head_w8 && !head_ignored && c.tie_word_embeddings;
    // One scale per 64 columns adds 3 % to the codes and is what 8-bit kernels like.
    let group = if c.hidden_size.is_multiple_of(64) { GroupSize::Cols(64) } else { GroupSize::PerChannel };
    let table = |module: String, source: String| PlannedLinear {
        module,
        source,
        block: None,
        scheme: Scheme { bits: 8, symmetric: true, group },
        out_features: c.vocab_size,
        in_features: c.hidden_size,
    };
    let embedding = format!("{prefix}.embed_tokens");
    if options.embedding_w8 {
        if c.tie_word_embeddings && !untie {
            return Err(QuantizeError::Plan {
                summary: "lm_head shares the embedding's matrix: an 8-bit embedding would quantize it too".into(),
                offenders: vec![],
                hint: Some("add --head w8".into()),
            });
        }
        linears.push(table(embedding.clone(), embedding.clone()));
    }
    if options.head_w8 && !head_ignored {
        linears.push(table(head_module.into(), if c.tie_word_embeddings { embedding } else { head_module.into() }));
    }
    let unused = ignore.unused();
    if !unused.is_empty() {
        return Err(QuantizeError::Plan {
            summary: "patterns that match nothing".into(),
            offenders: unused,
            hint: Some(format!(
                "modules are named like `{prefix}.layers.0.self_attn.q_proj`; `lowbit inspect` lists them"
            )),
        });
    }
    refuse_layout(options.format, &linears)?;
    let plan = assemble(ckpt, options, linears, reasons, untie, calibration_tokens)?;
    room_for(plan, options, output)
}

fn room_for(plan: Plan, options: &QuantizeOptions, output: Option<&Path>) -> Result<Plan> {
    if let Some(output) = output {
        room::check_disk(output, plan.record.after_bytes)?;
        room::check_memory(plan.record.peak_memory_bytes, options.offload.is_some())?;
    }
    Ok(plan)
}

/// What a layout of one scheme cannot hold.
fn refuse_layout(format: PackFormat, linears: &[PlannedLinear]) -> Result<()> {
    let (summary, holds): (&str, fn(&PlannedLinear) -> bool) = match format {
        PackFormat::CompressedTensors => return Ok(()),
        PackFormat::Awq => ("the AWQ format holds 4 bits, and rows must be a multiple of 8", |l| {
            l.block.is_some() && awq::holds(l.scheme, l.out_features)
        }),
        PackFormat::GptqV1 | PackFormat::GptqV2 => {
            ("the GPTQ format holds one bit width, and rows · bits and columns · bits must be multiples of 32", |l| {
                let whole = |n: usize| (n * l.scheme.bits as usize).is_multiple_of(32);
                l.block.is_some() && whole(l.out_features) && whole(l.in_features)
            })
        }
    };
    let offenders: Vec<String> = linears
        .iter()
        .filter(|l| !holds(l))
        .map(|l| format!("{}: {} [{}, {}]", l.module, l.scheme.full_name(), l.out_features, l.in_features))
        .collect();
    match offenders.is_empty() {
        true => Ok(()),
        false => Err(QuantizeError::Plan {
            summary: summary.into(),
            offenders,
            hint: Some("use --format compressed-tensors".into()),
        }),
    }
}

fn refuse_widths(offenders: &BTreeMap<(usize, &'static str), Vec<usize>>, scheme: Scheme, layers: usize) -> Result<()> {
    if offenders.is_empty() {
        return Ok(());
    }
    let count: usize = offenders.values().map(Vec::len).sum();
    let group = scheme.group_cols(0);
    let lines = offenders
        .iter()
        .map(|((width, suffix), blocks)| format!("{suffix} in {} of {layers} blocks: in = {width}", blocks.len()))
        .collect();
    let widths: Vec<usize> = offenders.keys().map(|k| k.0).collect();
    let fits =
        [128usize, 64, 32, 16].into_iter().find(|g| *g < group.max(1) && widths.iter().all(|w| w.is_multiple_of(*g)));
    Err(QuantizeError::Plan {
        summary: format!("{count} linears have an input width that group size {group} does not divide"),
        offenders: lines,
        hint: Some(
            fits.map_or("use --group-size channel".into(), |g| format!("{g} divides every width: --group-size {g}")),
        ),
    })
}

fn assemble(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    linears: Vec<PlannedLinear>,
    reasons: BTreeMap<String, String>,
    untie: bool,
    tokens: usize,
) -> Result<Plan> {
    let mut declared = Vec::new();
    let mut copies = Vec::new();
    let mut tensors = Vec::new();
    let model_dtype =
        linears.first().and_then(|l| ckpt.store.find(&format!("{}.weight", l.source))).and_then(|t| t.float_type());
    let layout = Layout::new(options.format, model_dtype.unwrap_or(FloatType::Bf16));
    let by_weight: BTreeMap<String, &PlannedLinear> =
        linears.iter().map(|l| (format!("{}.weight", l.module), l)).collect();
    let packed_bytes = |l: &PlannedLinear| -> Result<(Vec<Declared>, u64)> {
        let d = linear::declare(&l.module, l.scheme, layout, l.out_features, l.in_features)
            .map_err(|source| QuantizeError::Kernel { module: l.module.clone(), source })?;
        let bytes = d.iter().map(Declared::bytes).sum();
        Ok((d, bytes))
    };
    for (name, t) in ckpt.store.iter() {
        let before = t.data.as_slice().len() as u64;
        let mut row = PlannedTensor {
            name: name.to_string(),
            shape: t.shape.clone(),
            action: "copy".into(),
            scheme: None,
            reason: String::new(),
            component: component(name).into(),
            before_bytes: before,
            after_bytes: before,
        };
        if let Some(l) = by_weight.get(name) {
            if t.float_type().is_none() {
                return Err(ckpt.store.mismatch(name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)).into());
            }
            let (d, bytes) = packed_bytes(l)?;
            declared.extend(d);
            row.action = "quantize".into();
            row.scheme = Some(l.scheme.full_name());
            row.reason = if l.block.is_some() { options.method.name() } else { "rtn" }.into();
            row.after_bytes = bytes;
        } else {
            row.action = if reasons.contains_key(name) { "keep".into() } else { "copy".into() };
            row.reason = reasons.get(name).cloned().unwrap_or_else(|| match row.component.as_str() {
                "embedding" => "lookup table: read one row a token".into(),
                "lm_head" => "kept in full precision (--head w8 changes that)".into(),
                "norms" => "a vector".into(),
                _ => "not a linear of the graph: carried bit for bit".into(),
            });
            declared.push(Declared { name: name.to_string(), dtype: t.dtype, shape: t.shape.clone() });
            copies.push(name.to_string());
        }
        tensors.push(row);
    }
    if untie && let Some(l) = linears.last() {
        let (d, bytes) = packed_bytes(l)?;
        declared.extend(d);
        tensors.push(PlannedTensor {
            name: format!("{}.weight", l.module),
            shape: vec![l.out_features, l.in_features],
            action: "quantize".into(),
            scheme: Some(l.scheme.full_name()),
            reason: "rtn; untied from the embedding".into(),
            component: "lm_head".into(),
            before_bytes: 0,
            after_bytes: bytes,
        });
    }
    let config = written_config(ckpt, options, &linears, &reasons, untie);
    let quantized = linears.len();
    let record = PlanRecord {
        schema: 1,
        provenance: Provenance::default(),
        before_bytes: tensors.iter().map(|t| t.before_bytes).sum(),
        after_bytes: tensors.iter().map(|t| t.after_bytes).sum(),
        // Offloaded activations are resident one chunk at a time.
        peak_memory_bytes: peak_memory(
            ckpt,
            if options.offload.is_some() { tokens.min(2048) } else { tokens },
            options.method.recipe(),
        ),
        quantized_linears: quantized,
        kept_linears: reasons.len(),
        sizes: component_sizes(&tensors),
        notes: Vec::new(),
        tensors,
    };
    Ok(Plan { options: options.clone(), linears, copies, declared, layout, config, gguf: None, record })
}

/// Bytes before and after of each component.
pub(crate) fn component_sizes(tensors: &[PlannedTensor]) -> Vec<ComponentSize> {
    let mut sizes: BTreeMap<String, ComponentSize> = BTreeMap::new();
    for t in tensors {
        let s = sizes
            .entry(t.component.clone())
            .or_insert_with(|| ComponentSize { component: t.component.clone(), ..Default::default() });
        s.before_bytes += t.before_bytes;
        s.after_bytes += t.after_bytes;
    }
    sizes.into_values().collect()
}

/// Estimate: carried activations of each stream, the widest group's Hessian with its factors, and one block in f32.
pub(crate) fn peak_memory(ckpt: &Checkpoint, tokens: usize, recipe: Recipe) -> u64 {
    let c = &ckpt.config;
    let (h, m) = (c.hidden_size as u64, c.intermediate_size as u64);
    let t = tokens as u64;
    let streams = if recipe.float_stream() { 2 } else { 1 };
    let carried = streams * t * (h + m.max((c.num_heads * c.head_dim) as u64)) * 4;
    // The damped copy that sweeps read, and the drift on the device and on the host.
    let more = u64::from(recipe.sweeps > 0) + if recipe.float_stream() { 2 } else { 0 };
    let hessian = m.max(h).pow(2) * 4 * (5 + more);
    let matrix = h * m * 4 * 6;
    let table = (c.vocab_size as u64) * h * FloatType::Bf16.size() as u64;
    carried + hessian + matrix + table
}

fn written_config(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    linears: &[PlannedLinear],
    reasons: &BTreeMap<String, String>,
    untie: bool,
) -> Value {
    let mut config = ckpt.raw_config.clone();
    let tables: Vec<&PlannedLinear> = linears.iter().filter(|l| l.block.is_none()).collect();
    let mut ignore: Vec<String> = reasons.keys().map(|k| k.trim_end_matches(".weight").to_string()).collect();
    let head_module = if ckpt.has_weight("model.embed_tokens") { "lm_head" } else { "language_model.lm_head" };
    let q = match options.format {
        PackFormat::CompressedTensors => {
            let observer = if options.scale_search == ScaleSearch::Hessian { "mse" } else { "memoryless_minmax" };
            let mut groups = vec![WrittenGroup {
                scheme: options.scheme,
                targets: vec!["Linear".into()],
                observer,
                static_act_order: options.act_order && options.method.calibrated(),
            }];
            if let Some(first) = tables.first() {
                // The narrow targets first: loaders take the first rule that matches.
                groups.insert(
                    0,
                    WrittenGroup {
                        scheme: first.scheme,
                        targets: tables.iter().map(|t| t.module.clone()).collect(),
                        observer,
                        static_act_order: false,
                    },
                );
            }
            if !tables.iter().any(|t| t.module == head_module) {
                ignore.push(head_module.into());
            }
            write_compressed_tensors(&groups, &ignore)
        }
        _ => {
            let damp = options.method.calibrated().then_some(options.damp_frac);
            write_uniform(options.format, options.scheme, damp, false, &ignore)
        }
    };
    if let Some(map) = config.as_object_mut() {
        map.insert("quantization_config".into(), q);
        if untie {
            map.insert("tie_word_embeddings".into(), false.into());
        }
    }
    config
}
