//! Before any work: what happens to every tensor, why, and how many bytes come out. Impossible plans are refused here,
//! with all offenders listed.

mod linears;
mod memory;
mod options;
mod refusals;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lowbit_checkpoint::gguf::write::FileLayout;
use lowbit_checkpoint::linear::narrow::declare_kv;
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::quant_config::Layout;
use lowbit_checkpoint::writer::Declared;
use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::backend::FloatType;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, LinearScheme, Scheme};
use lowbit_model::block::{LinearGroup, router_modules};
use lowbit_model::decoder;
use serde_json::Value;

use self::refusals::{
    Misfit, refuse_cache, refuse_gathered, refuse_layout, refuse_methods, refuse_mixed_sets, refuse_split_sets,
    refuse_widths,
};
use crate::budget::BudgetRecord;
use crate::error::{QuantizeError, Result};
use crate::experts::expert_plan;
use crate::gguf;
use crate::record::{ComponentSize, PLAN_SCHEMA, PlanRecord, PlannedTensor};
use crate::room;
use crate::solve::Wanted;
use crate::transform::{Transform, refuse_transforms, rewritten, untied_head};
use crate::written::written_config;

pub(crate) use self::linears::of_blocks;
pub(crate) use self::memory::peak_memory;
pub use self::options::{Method, QuantizeOptions, Recipe};
pub(crate) use self::refusals::refuse_learned;
pub(crate) use self::rules::Rules;

/// One linear to quantize.
#[derive(Clone, Debug)]
pub struct PlannedLinear {
    /// Full module name.
    pub module: String,
    /// Module whose weight is read (the embedding's for a tied head).
    pub source: String,
    /// Block, or `None` for embedding and head.
    pub block: Option<usize>,
    /// Linears of the block that read the same input; `None` for embedding and head.
    pub group: Option<LinearGroup>,
    /// Number formats.
    pub scheme: LinearScheme,
    /// Its type in a GGUF file; where that is of super-blocks, `scheme` is not read.
    pub ggml: Option<GgmlType>,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
}

impl PlannedLinear {
    /// Full scheme name, or the type of GGUF.
    pub fn scheme_name(&self) -> String {
        self.ggml.map_or_else(|| self.scheme.full_name(), gguf::scheme_name)
    }

    /// What its weight is to become.
    pub fn wanted(&self) -> Wanted {
        match self.ggml.filter(|kind| kind.scheme().is_none()) {
            Some(kind) => Wanted::Blocks(kind),
            None => Wanted::Codes(self.scheme.weight),
        }
    }
}

/// A checked plan.
pub struct Plan {
    /// Options it was made with.
    pub options: QuantizeOptions,
    /// Before the number of a block in the name of a module: `model.layers`.
    pub blocks: String,
    /// Linears in graph order; embedding and head last.
    pub linears: Vec<PlannedLinear>,
    /// Tensors that stay what they are.
    pub copies: Vec<String>,
    /// Tensors that transforms rewrite without quantizing them, with their block; `None` for embedding, head and the last norm.
    pub rewritten: BTreeMap<String, Option<usize>>,
    /// Tensors of the output; none of a GGUF file.
    pub declared: Vec<Declared>,
    /// Layout of the packed linears.
    pub layout: Layout,
    /// `config.json` of the output; a GGUF file has none.
    pub config: Value,
    /// One GGUF file in the place of safetensors.
    pub gguf: Option<FileLayout>,
    /// The record (provenance still empty).
    pub record: PlanRecord,
}

impl Plan {
    /// Names of the stored scales of a block's keys and values.
    pub(crate) fn kv_scales(&self, block: usize) -> Vec<String> {
        let Some(kv) = self.options.kv else { return Vec::new() };
        let declared = declare_kv(kv, &format!("{}.{block}.self_attn", self.blocks), 1, self.layout);
        declared.into_iter().map(|d| d.name).collect()
    }

    /// Tensors that transforms rewrite in a block, or outside of the blocks.
    pub(crate) fn rewritten_in(&self, block: Option<usize>) -> impl Iterator<Item = &String> {
        self.rewritten.iter().filter(move |(_, of)| **of == block).map(|(name, _)| name)
    }

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

/// Makes the plan for writing `ckpt`, which is as [`Checkpoint::with_floats`] makes it, into `output`.
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
        refuse_transforms(ckpt, options, &[])?;
        let plan = gguf::make(ckpt, options, choice, calibration_tokens)?;
        return room_for(plan, options, output);
    }
    let c = &ckpt.config;
    let prefix = decoder::prefix(ckpt)?;
    let mut ignore = Rules::new("ignore", &options.ignore)?;
    let mut modules = Rules::new("module", options.modules.iter().map(|m| &m.0))?;
    let mut misfits = Vec::new();
    let (mut linears, reasons) = of_blocks(c, prefix, &mut ignore, &mut |module, block, s| {
        let rule = modules.hit(module).and_then(|(i, _)| options.modules.get(i));
        let scheme = options.chosen.get(module).copied().unwrap_or(rule.map_or(options.scheme, |m| m.1));
        if scheme.check_width(s.in_features).is_err() {
            misfits.push(Misfit { scheme, width: s.in_features, kind: s.kind(), block });
        }
        Ok((scheme, None))
    });
    refuse_widths(&misfits, options, c.num_layers)?;
    refuse_split_sets(c, &linears)?;
    refuse_mixed_sets(&linears)?;
    refuse_gathered(c, options, &linears)?;
    refuse_cache(c, options)?;
    let head_module = decoder::head(prefix);
    let head_ignored = ignore.hit(head_module).is_some();
    let untie = options.head_w8 && !head_ignored && c.tie_word_embeddings;
    // One scale per 64 columns adds 3 % to the codes and is what 8-bit kernels like.
    let group = if c.hidden_size.is_multiple_of(64) { GroupSize::Cols(64) } else { GroupSize::PerChannel };
    let table = |module: String, source: String| PlannedLinear {
        scheme: options.chosen.get(&module).copied().unwrap_or(Scheme { bits: 8, symmetric: true, group }.into()),
        module,
        source,
        block: None,
        group: None,
        ggml: None,
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
    let hint = format!("modules are named like `{prefix}.layers.0.self_attn.q_proj`; `lowbit inspect` lists them");
    Rules::refuse_unused(&[&ignore, &modules], hint)?;
    refuse_methods(options, &linears)?;
    refuse_learned(c, options, &linears)?;
    refuse_layout(options, &linears)?;
    refuse_transforms(ckpt, options, &linears)?;
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
    let rewritten = rewritten(ckpt, options, &linears)?;
    let transforms = options.transforms.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
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
        let before = ckpt.store.stored_bytes(name);
        let mut row = PlannedTensor {
            name: name.to_string(),
            shape: t.shape.clone(),
            action: "copy".into(),
            scheme: None,
            reason: String::new(),
            component: component(name).into(),
            before_bytes: before,
            after_bytes: t.data.size() as u64,
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
            if rewritten.contains_key(name) {
                row.action = "rewrite".into();
                row.reason = format!("{transforms}; {}", row.reason);
            } else {
                copies.push(name.to_string());
            }
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
    let mut notes = Vec::new();
    let head = untied_head(ckpt, &rewritten);
    if let Some((name, t)) = head.zip(ckpt.store.find(&format!("{prefix}.embed_tokens.weight"))) {
        let d = Declared { name: name.clone(), dtype: t.dtype, shape: t.shape.clone() };
        notes.push(format!(
            "a rotation unties the head from the embedding: the last norm is folded into it alone ({} MB more)",
            d.bytes() / 1_000_000
        ));
        tensors.push(PlannedTensor {
            component: component(&name).into(),
            name,
            shape: t.shape.clone(),
            action: "add".into(),
            scheme: None,
            reason: format!("{transforms}; untied from the embedding"),
            before_bytes: 0,
            after_bytes: d.bytes(),
        });
        declared.push(d);
    }
    for block in 0..ckpt.config.num_layers {
        let Some(kv) = options.kv else { break };
        for d in declare_kv(kv, &format!("{prefix}.layers.{block}.self_attn"), ckpt.config.num_kv_heads, layout) {
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
    // Rotated, the head has the last norm in it and the embedding has not.
    let untie = untie || (ckpt.config.tie_word_embeddings && options.transforms.contains(&Transform::Rotate));
    let config = written_config(ckpt, prefix, options, &linears, left, untie);
    let quantized = linears.len();
    let experts = expert_plan(&ckpt.config, options);
    let record = PlanRecord {
        schema: PLAN_SCHEMA,
        provenance: Provenance::default(),
        before_bytes: tensors.iter().map(|t| t.before_bytes).sum(),
        after_bytes: tensors.iter().map(|t| t.after_bytes).sum(),
        peak_memory_bytes: peak_memory(ckpt, options, &linears, tokens),
        seconds: None,
        probe_seconds: None,
        quantized_linears: quantized,
        kept_linears: reasons.len(),
        experts,
        budget: None,
        sizes: component_sizes(&tensors),
        notes,
        tensors,
    };
    let (options, blocks) = (options.clone(), format!("{prefix}.layers"));
    Ok(Plan { options, blocks, linears, copies, rewritten, declared, layout, config, gguf: None, record })
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
