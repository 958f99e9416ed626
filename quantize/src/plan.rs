//! Before any work: what happens to every tensor, why, and how many bytes come out. Impossible plans are refused here,
//! with all offenders listed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lowbit_calibration::experts::HESSIAN_BYTES;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::quant_config::{Layout, PackFormat};
use lowbit_checkpoint::writer::{DEFAULT_SHARD_BYTES, Declared};
use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::backend::FloatType;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, ScaleType, Scheme};
use lowbit_model::block::{LinearGroup, linear_shapes, router_modules};
use lowbit_model::decoder;
use serde_json::Value;

use crate::budget::BudgetRecord;
use crate::error::{QuantizeError, Result};
use crate::experts::expert_plan;
use crate::gguf::{self, GgufChoice, GgufPlan, scheme_name};
use crate::record::{ComponentSize, PlanRecord, PlannedTensor};
use crate::room;
use crate::scale_search::{ScaleSearch, SolverOptions};
use crate::target::Correction;
use crate::written::written_config;

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
    /// Most bytes of experts' Hessians at once. Does not change the result.
    pub expert_bytes: u64,
    /// Scheme of single modules, by full name, in the place of `scheme` (and of a table's 8 bits): a budget's choice.
    pub chosen: BTreeMap<String, Scheme>,
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
            expert_bytes: HESSIAN_BYTES,
            chosen: BTreeMap::new(),
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

impl Plan {
    /// Adds what a budget was spent on, and each linear's share of it as its reason.
    pub fn explain(&mut self, budget: BudgetRecord) {
        for t in self.record.tensors.iter_mut().filter(|t| t.action == "quantize") {
            if let Some(reason) = budget.reason(t.name.trim_end_matches(".weight")) {
                t.reason = format!("{}; {reason}", t.reason);
            }
        }
        self.record.budget = Some(budget);
    }
}

/// `embedding`, `attention`, `experts`, `mlp`, `norms`, `lm_head` or `other`.
pub fn component(name: &str) -> &'static str {
    let rules = [
        ("embed_tokens", "embedding"),
        ("lm_head", "lm_head"),
        ("norm", "norms"),
        ("self_attn", "attention"),
        (".experts.", "experts"),
        (".mlp.", "mlp"),
        (".block_sparse_moe.", "mlp"),
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
    let mut offenders: BTreeMap<(usize, String), Vec<usize>> = BTreeMap::new();
    let mut fused_split = Vec::new();
    for block in 0..c.num_layers {
        let mut kept_by_group: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for s in linear_shapes(c, block) {
            let module = format!("{prefix}.layers.{block}.{}", s.suffix);
            let fused = match s.group {
                LinearGroup::Expert(_) | LinearGroup::ExpertDown(_) => "experts".to_string(),
                group => format!("{group:?}"),
            };
            let entry = kept_by_group.entry(fused).or_default();
            entry.1 += 1;
            if let Some(rule) = ignore.hit(&module) {
                reasons.insert(format!("{module}.weight"), format!("ignored by `{rule}`"));
                entry.0 += 1;
                continue;
            }
            let scheme = options.chosen.get(&module).copied().unwrap_or(options.scheme);
            if scheme.groups(s.in_features).is_err() {
                offenders.entry((s.in_features, s.kind())).or_default().push(block);
                continue;
            }
            linears.push(PlannedLinear {
                source: module.clone(),
                module,
                block: Some(block),
                scheme,
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
            summary: "engines fuse q/k/v, gate/up and a block's experts: a set must be quantized or ignored as a whole"
                .into(),
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
        scheme: options.chosen.get(&module).copied().unwrap_or(Scheme { bits: 8, symmetric: true, group }),
        module,
        source,
        block: None,
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
    refuse_layout(options, &linears)?;
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
fn refuse_layout(options: &QuantizeOptions, linears: &[PlannedLinear]) -> Result<()> {
    let format = options.format;
    let holds = |l: &PlannedLinear| {
        let uniform = l.block.is_some() && l.scheme == options.scheme;
        format.holds(l.scheme, l.out_features, l.in_features) && (uniform || !format.is_uniform())
    };
    let offenders: Vec<String> = linears
        .iter()
        .filter(|l| !holds(l))
        .map(|l| format!("{}: {} [{}, {}]", l.module, l.scheme.full_name(), l.out_features, l.in_features))
        .collect();
    if offenders.is_empty() {
        return Ok(());
    }
    let what = match format {
        PackFormat::Awq => "4 bits, and rows must be a multiple of 8",
        _ => "2, 3, 4 or 8 bits, and rows · bits and columns · bits must be multiples of 32",
    };
    Err(QuantizeError::Plan {
        summary: format!("the format {} holds one scheme of {what}", format.name()),
        offenders,
        hint: Some("use --format compressed-tensors".into()),
    })
}

fn refuse_widths(offenders: &BTreeMap<(usize, String), Vec<usize>>, scheme: Scheme, layers: usize) -> Result<()> {
    if offenders.is_empty() {
        return Ok(());
    }
    let count: usize = offenders.values().map(Vec::len).sum();
    let group = scheme.group_cols(0);
    let lines = offenders
        .iter()
        .map(|((width, kind), blocks)| {
            let mut distinct = blocks.clone();
            distinct.dedup();
            format!("{kind} in {} of {layers} blocks: in = {width}", distinct.len())
        })
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
    let prefix = decoder::prefix(ckpt)?;
    let routers: BTreeSet<String> = (0..ckpt.config.num_layers)
        .flat_map(|i| {
            router_modules(&ckpt.config, i).into_iter().map(move |(m, _)| format!("{prefix}.layers.{i}.{m}.weight"))
        })
        .collect();
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
            let router = routers.contains(name);
            row.action = if router || reasons.contains_key(name) { "keep".into() } else { "copy".into() };
            row.reason = reasons.get(name).cloned().unwrap_or_else(|| match row.component.as_str() {
                _ if router => "router: small, and it decides which experts run".into(),
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
    // Matrices that are copied and are no part of the graph (routers, layers for speculation) would be taken for quantized by engines.
    let unquantized = |name: &str| {
        ckpt.store.find(name).is_some_and(|t| t.shape.len() >= 2)
            && !matches!(component(name), "embedding" | "lm_head" | "norms")
    };
    let left: BTreeSet<String> = reasons
        .keys()
        .map(String::as_str)
        .chain(copies.iter().map(String::as_str).filter(|n| unquantized(n)))
        .filter_map(|n| n.strip_suffix(".weight").map(String::from))
        .collect();
    let config = written_config(ckpt, options, &linears, left, untie);
    let quantized = linears.len();
    let experts = expert_plan(&ckpt.config, options);
    let record = PlanRecord {
        schema: crate::record::PLAN_SCHEMA,
        provenance: Provenance::default(),
        before_bytes: tensors.iter().map(|t| t.before_bytes).sum(),
        after_bytes: tensors.iter().map(|t| t.after_bytes).sum(),
        // Offloaded activations are resident one chunk at a time.
        peak_memory_bytes: peak_memory(
            ckpt,
            if options.offload.is_some() { tokens.min(2048) } else { tokens },
            options.method.recipe(),
            experts.as_ref().map_or(0, |e| e.hessian_bytes_at_once),
        ),
        quantized_linears: quantized,
        kept_linears: reasons.len(),
        experts,
        budget: None,
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
pub(crate) fn peak_memory(ckpt: &Checkpoint, tokens: usize, recipe: Recipe, experts: u64) -> u64 {
    let c = &ckpt.config;
    let (h, m) = (c.hidden_size as u64, c.intermediate_size as u64);
    let t = tokens as u64;
    let streams = if recipe.float_stream() { 2 } else { 1 };
    let carried = streams * t * (h + m.max((c.num_heads * c.head_dim) as u64)) * 4;
    // The damped copy that sweeps read, and the drift on the device and on the host.
    let more = u64::from(recipe.sweeps > 0) + if recipe.float_stream() { 2 } else { 0 };
    let latent = c.latent.as_ref().map_or(0, |l| (c.num_heads * l.value) as u64);
    // Of the groups outside the experts, and of the one expert that is being solved.
    let wide = m.max(h).max(latent).max(c.experts.as_ref().map_or(0, |e| e.intermediate_size as u64));
    let hessian = wide.pow(2) * 4 * (5 + more) + experts;
    // A chunk's outputs of experts, who goes where, and the block itself, which is uploaded whole.
    let routed = c.experts.as_ref().map_or(0, |e| {
        let k = e.per_token as u64;
        let block = 3 * e.count as u64 * h * e.intermediate_size as u64 * FloatType::Bf16.size() as u64;
        2048 * k * (h + 2 * e.intermediate_size as u64) * 4 + t * k * 8 + streams * block
    });
    let matrix = h * m * 4 * 6;
    let table = (c.vocab_size as u64) * h * FloatType::Bf16.size() as u64;
    carried + hessian + routed + matrix + table
}
