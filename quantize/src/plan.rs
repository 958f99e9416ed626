//! Before any work: what happens to every tensor, why, and how many bytes come out. Impossible plans are refused here,
//! with all offenders listed.

mod refusals;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowbit_checkpoint::linear::narrow::declare_kv;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::quant_config::{
    KvScheme, Layout, PackFormat, WrittenGroup, write_compressed_tensors, write_gptq,
};
use lowbit_checkpoint::writer::{DEFAULT_SHARD_BYTES, Declared};
use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::backend::FloatType;
use lowbit_kernels::{GroupSize, InputFormat, LinearScheme, ScaleType, Scheme};
use lowbit_model::block::linear_shapes;
use lowbit_model::decoder;
use serde_json::Value;

use crate::error::{QuantizeError, Result};
use crate::record::{ComponentSize, PlanRecord, PlannedTensor};
use crate::room;
use crate::scale_search::{ScaleSearch, SolverOptions};
use crate::target::Correction;
pub use refusals::fused;
use refusals::{refuse_methods, refuse_mixed_sets, refuse_widths};

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
    /// Number formats of the block linears.
    pub scheme: LinearScheme,
    /// Number formats of modules that match a pattern (an exact name, or `re:`), in the place of `scheme`; the first match counts.
    pub modules: Vec<(String, LinearScheme)>,
    /// How keys and values are quantized: stored scales from calibration.
    pub kv: Option<KvScheme>,
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
}

impl QuantizeOptions {
    /// The defaults for a scheme.
    pub fn new(scheme: impl Into<LinearScheme>) -> Self {
        Self {
            scheme: scheme.into(),
            modules: Vec::new(),
            kv: None,
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
        }
    }

    /// Whether the work needs calibration data: for the method, or for scales that are stored.
    pub fn needs_data(&self) -> bool {
        let stored = |s: &LinearScheme| s.input.is_some_and(InputFormat::is_static);
        self.method.calibrated()
            || self.kv.is_some()
            || stored(&self.scheme)
            || self.modules.iter().any(|m| stored(&m.1))
    }

    /// Solver settings for a scheme whose scales are stored as `scale_type`. Float codes have no integer scheme: theirs is not read.
    pub fn solver(&self, scheme: LinearScheme, scale_type: ScaleType) -> SolverOptions {
        let scheme = scheme.int().unwrap_or(Scheme { bits: 8, symmetric: true, group: GroupSize::PerChannel });
        SolverOptions {
            damp_frac: self.damp_frac,
            act_order: self.act_order && self.method.calibrated(),
            scale_search: self.scale_search,
            signed_scales: self.signed_scales,
            correction: self.method.recipe().correction,
            sweeps: self.method.recipe().sweeps,
            ..SolverOptions::new(scheme, scale_type)
        }
    }

    /// All options by name, for records.
    pub fn to_map(&self) -> BTreeMap<String, Value> {
        let mut m = BTreeMap::new();
        m.insert("scheme".into(), self.scheme.full_name().into());
        m.insert("method".into(), self.method.name().into());
        m.insert("format".into(), self.format.name().into());
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
        m.insert("head".into(), if self.head_w8 { "w8" } else { "keep" }.into());
        m.insert("embedding".into(), if self.embedding_w8 { "w8" } else { "keep" }.into());
        m.insert("ignore".into(), self.ignore.clone().into());
        m.insert("strict".into(), self.strict.into());
        let modules: Vec<String> = self.modules.iter().map(|(p, s)| format!("{p}={}", s.full_name())).collect();
        m.insert("modules".into(), modules.into());
        m.insert("kv_scheme".into(), self.kv.map(KvScheme::name).into());
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
    /// Number formats.
    pub scheme: LinearScheme,
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

/// Patterns of an option, and which of them have matched a module.
struct Rules {
    rules: Vec<(String, Option<regex::Regex>, bool)>,
}

impl Rules {
    fn new(option: &str, patterns: &[String]) -> Result<Self> {
        let rules = patterns
            .iter()
            .map(|p| {
                let pattern = p.strip_prefix("re:").map(regex::Regex::new).transpose();
                let pattern = pattern.map_err(|e| QuantizeError::Plan {
                    summary: format!("--{option} {p}: {e}"),
                    offenders: vec![],
                    hint: None,
                })?;
                Ok((p.clone(), pattern, false))
            })
            .collect::<Result<_>>()?;
        Ok(Self { rules })
    }

    fn hit(&mut self, module: &str) -> Option<String> {
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
    let c = &ckpt.config;
    let prefix = decoder::prefix(ckpt)?;
    let mut ignore = Rules::new("ignore", &options.ignore)?;
    let patterns: Vec<String> = options.modules.iter().map(|m| m.0.clone()).collect();
    let mut modules = Rules::new("module", &patterns)?;
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
            let rule = modules.hit(&module);
            let chosen = options.modules.iter().find(|m| Some(&m.0) == rule.as_ref());
            let scheme = chosen.map_or(options.scheme, |m| m.1);
            if let Err(e) = scheme.check_width(s.in_features) {
                if scheme != options.scheme {
                    return Err(QuantizeError::Kernel { module, source: e });
                }
                offenders.entry((s.in_features, s.suffix)).or_default().push(block);
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
        scheme: Scheme { bits: 8, symmetric: true, group }.into(),
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
    refuse_mixed_sets(&linears)?;
    refuse_methods(options, &linears)?;
    let named = [("ignore", &ignore), ("module", &modules)];
    let unused = named.iter().flat_map(|(option, rules)| {
        rules.rules.iter().filter(|r| !r.2).map(move |r| format!("--{option} {} matches no linear", r.0))
    });
    let unused: Vec<String> = unused.collect();
    if !unused.is_empty() {
        return Err(QuantizeError::Plan {
            summary: "patterns that match nothing".into(),
            offenders: unused,
            hint: Some(format!(
                "modules are named like `{prefix}.layers.0.self_attn.q_proj`; `lowbit inspect` lists them"
            )),
        });
    }
    if options.format != PackFormat::CompressedTensors
        && (linears.iter().any(|l| l.block.is_none())
            || linears.iter().any(|l| l.scheme != options.scheme || l.scheme.input.is_some())
            || linears
                .iter()
                .any(|l| l.scheme.int().is_none_or(|s| !(l.out_features * s.bits as usize).is_multiple_of(32)))
            || options.kv.is_some())
    {
        return Err(QuantizeError::Plan {
            summary: "the GPTQ format holds one bit width, and rows · bits must be a multiple of 32".into(),
            offenders: vec![],
            hint: Some("use --format compressed-tensors".into()),
        });
    }
    let plan = assemble(ckpt, options, linears, reasons, untie, calibration_tokens)?;
    if let Some(output) = output {
        room::check_disk(output, plan.record.after_bytes)?;
        room::check_memory(plan.record.peak_memory_bytes, options.offload.is_some())?;
    }
    Ok(plan)
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
    for block in options.kv.iter().flat_map(|_| 0..ckpt.config.num_layers) {
        let Some(kv) = options.kv else { continue };
        let attention = format!("{}.layers.{block}.self_attn", decoder::prefix(ckpt)?);
        for d in declare_kv(kv, &attention, ckpt.config.num_kv_heads, layout) {
            tensors.push(PlannedTensor {
                name: d.name.clone(),
                shape: d.shape.clone(),
                action: "add".into(),
                scheme: Some(kv.name()),
                reason: "scale of cached keys or values".into(),
                component: "attention".into(),
                before_bytes: 0,
                after_bytes: d.bytes(),
            });
            declared.push(d);
        }
    }
    let config = written_config(ckpt, options, &linears, &reasons, untie);
    let mut sizes: BTreeMap<String, ComponentSize> = BTreeMap::new();
    for t in &tensors {
        let s = sizes
            .entry(t.component.clone())
            .or_insert_with(|| ComponentSize { component: t.component.clone(), ..Default::default() });
        s.before_bytes += t.before_bytes;
        s.after_bytes += t.after_bytes;
    }
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
        sizes: sizes.into_values().collect(),
        tensors,
    };
    Ok(Plan { options: options.clone(), linears, copies, declared, layout, config, record })
}

/// Estimate: carried activations of each stream, the widest group's Hessian with its factors, and one block in f32.
fn peak_memory(ckpt: &Checkpoint, tokens: usize, recipe: Recipe) -> u64 {
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
            // One group a scheme. The narrow targets first: loaders take the first rule that matches.
            let mut groups: Vec<WrittenGroup<'_>> = Vec::new();
            for l in linears.iter().filter(|l| l.block.is_none() || l.scheme != options.scheme) {
                let static_act_order = l.block.is_some() && options.act_order && options.method.calibrated();
                let same = |g: &&mut WrittenGroup<'_>| g.scheme == l.scheme && g.static_act_order == static_act_order;
                match groups.iter_mut().find(same) {
                    Some(g) => g.targets.push(l.module.clone()),
                    None => {
                        let targets = vec![l.module.clone()];
                        groups.push(WrittenGroup { scheme: l.scheme, targets, observer, static_act_order });
                    }
                }
            }
            if linears.iter().any(|l| l.block.is_some() && l.scheme == options.scheme) {
                groups.push(WrittenGroup {
                    scheme: options.scheme,
                    targets: vec!["Linear".into()],
                    observer,
                    static_act_order: options.act_order && options.method.calibrated(),
                });
            }
            if !tables.iter().any(|t| t.module == head_module) {
                ignore.push(head_module.into());
            }
            write_compressed_tensors(&groups, &ignore, options.kv)
        }
        _ => {
            let damp = options.method.calibrated().then_some(options.damp_frac);
            // `make` lets nothing else come here.
            options.scheme.int().map_or(Value::Null, |scheme| write_gptq(scheme, damp, false, &ignore))
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
