//! The plan of a GGUF file: exact to the byte, with every fallback said.

use std::collections::BTreeMap;

use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::gguf::write::{FILE, FileLayout, Names, Wanted, dense_type};
use lowbit_checkpoint::provenance::Provenance;
use lowbit_checkpoint::quant_config::Layout;
use lowbit_kernels::backend::FloatType;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{GroupSize, LinearScheme, Scheme};

use super::GgufChoice;
use crate::error::{QuantizeError, Result};
use crate::plan::{
    Plan, PlannedLinear, QuantizeOptions, Rules, component, component_sizes, of_blocks, peak_memory, refuse_learned,
};
use crate::record::{PLAN_SCHEMA, PlanRecord, PlannedTensor};

fn refuse<T>(summary: impl Into<String>, offenders: Vec<String>, hint: &str) -> Result<T> {
    Err(QuantizeError::Plan { summary: summary.into(), offenders, hint: Some(hint.into()) })
}

/// Makes the plan.
pub(crate) fn make(ckpt: &Checkpoint, options: &QuantizeOptions, choice: &GgufChoice, tokens: usize) -> Result<Plan> {
    let c = &ckpt.config;
    if !ckpt.has_weight("model.embed_tokens") {
        return refuse("a checkpoint with parts beside the language model", vec![], "GGUF is written for text models");
    }
    if let Some((pattern, _)) = options.modules.first() {
        return refuse(
            format!(
                "--module {pattern}: a GGUF file gets one type, and those that llama.cpp takes where it does not fit"
            ),
            vec![],
            "leave --module out, or use --format compressed-tensors",
        );
    }
    if options.kv.is_some() {
        return refuse(
            "a GGUF file holds no scales of keys and values",
            vec![],
            "leave --kv-scheme out, or use --format compressed-tensors",
        );
    }
    if let (None, Some(what)) = (choice.kind.scheme(), options.integers_only()) {
        return refuse(
            format!("{what} moves scales, and those of {} are stored in steps", choice.kind.name()),
            vec![],
            "use --method gptq, or rtn, and no --scale-search",
        );
    }
    refuse_learned(c, options, &[])?;
    let has_bias = c.family != "qwen2" && ckpt.store.find("model.layers.0.self_attn.q_proj.bias").is_some();
    let names = Names::new(c, &ckpt.dir, has_bias)?;
    let (linears, reasons) = choose(ckpt, options, choice)?;

    let by_weight: BTreeMap<String, &PlannedLinear> =
        linears.iter().map(|l| (format!("{}.weight", l.module), l)).collect();
    let mut wanted = Vec::new();
    let mut tensors = Vec::new();
    let mut copies = Vec::new();
    for (name, t) in ckpt.store.iter() {
        let mut row = PlannedTensor {
            name: name.to_string(),
            shape: t.shape.clone(),
            action: "copy".into(),
            scheme: None,
            reason: String::new(),
            component: component(name).into(),
            before_bytes: t.data.size() as u64,
            after_bytes: 0,
        };
        let tied_head = name == "lm_head.weight" && c.tie_word_embeddings;
        if Names::may_drop(name) || (tied_head && !by_weight.contains_key(name)) {
            row.action = "drop".into();
            row.reason = if tied_head { "the embedding is the head" } else { "computed by every loader" }.into();
            tensors.push(row);
            continue;
        }
        let float = || ckpt.store.mismatch(name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype));
        let dense = dense_type(t).ok_or_else(float)?;
        let kind = match by_weight.get(name) {
            Some(l) => {
                row.action = "quantize".into();
                row.scheme = Some(l.scheme_name());
                row.reason = reason(l, choice, options);
                l.ggml.unwrap_or(dense)
            }
            None => {
                row.action = if reasons.contains_key(name) { "keep" } else { "copy" }.into();
                row.reason = reasons.get(name).cloned().unwrap_or_else(|| format!("stored in {}", dense.name()));
                copies.push(name.to_string());
                dense
            }
        };
        wanted.push(Wanted { name: name.to_string(), shape: t.shape.clone(), kind });
        tensors.push(row);
    }
    // A head that was the embedding's matrix.
    for l in linears.iter().filter(|l| ckpt.store.find(&format!("{}.weight", l.module)).is_none()) {
        let name = format!("{}.weight", l.module);
        let shape = vec![l.out_features, l.in_features];
        wanted.push(Wanted { name: name.clone(), shape: shape.clone(), kind: l.ggml.unwrap_or(choice.kind) });
        tensors.push(PlannedTensor {
            component: component(&name).into(),
            name,
            shape,
            action: "quantize".into(),
            scheme: Some(l.scheme_name()),
            reason: "rtn; untied from the embedding".into(),
            before_bytes: 0,
            after_bytes: 0,
        });
    }
    let layout = FileLayout::new(&ckpt.dir, c, &ckpt.raw_config, &names, &wanted, choice.kind)?;
    for row in &mut tensors {
        row.after_bytes = layout.tensor_bytes(&row.name);
    }
    tensors.push(PlannedTensor {
        name: format!("{FILE}: metadata, tokenizer, padding"),
        shape: vec![],
        action: "add".into(),
        scheme: None,
        reason: "one file holds everything".into(),
        component: "other".into(),
        before_bytes: 0,
        after_bytes: layout.other_bytes(),
    });
    let record = PlanRecord {
        schema: PLAN_SCHEMA,
        provenance: Provenance::default(),
        before_bytes: tensors.iter().map(|t| t.before_bytes).sum(),
        after_bytes: layout.file_bytes(),
        peak_memory_bytes: peak_memory(ckpt, options, &linears, tokens),
        seconds: None,
        probe_seconds: None,
        quantized_linears: linears.len(),
        kept_linears: reasons.len(),
        sizes: component_sizes(&tensors),
        experts: None,
        budget: None,
        notes: fallback_notes(&linears, &reasons, choice),
        tensors,
    };
    if options.strict && !record.notes.is_empty() {
        return refuse("--strict, and some linears do not get the type asked for", record.notes, "leave --strict away");
    }
    Ok(Plan {
        options: options.clone(),
        blocks: "model.layers".into(),
        linears,
        copies,
        rewritten: BTreeMap::new(),
        declared: Vec::new(),
        layout: Layout::new(options.format, FloatType::F16),
        config: ckpt.raw_config.clone(),
        gguf: Some(layout),
        record,
    })
}

/// The scheme of a type's codes; super-blocks have none, and theirs is not read.
fn scheme(kind: GgmlType) -> LinearScheme {
    kind.scheme().unwrap_or(Scheme { bits: 8, symmetric: true, group: GroupSize::Cols(32) }).into()
}

/// The matrices to quantize, and why others stay.
fn choose(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    choice: &GgufChoice,
) -> Result<(Vec<PlannedLinear>, BTreeMap<String, String>)> {
    let c = &ckpt.config;
    let mut ignore = Rules::new("ignore", &options.ignore)?;
    let (mut linears, reasons) =
        of_blocks(c, "model", &mut ignore, &mut |_, _, s| match choice.kind.for_width(s.in_features) {
            GgmlType::F16 => Err(format!("kept: {} columns are not whole blocks of 32", s.in_features)),
            kind => Ok((scheme(kind), Some(kind))),
        });
    let table = |module: &str, source: &str, kind: GgmlType| {
        let kind = kind.for_width(c.hidden_size);
        PlannedLinear {
            module: module.into(),
            source: source.into(),
            block: None,
            group: None,
            scheme: scheme(kind),
            ggml: Some(kind),
            out_features: c.vocab_size,
            in_features: c.hidden_size,
        }
    };
    if choice.embedding.or(choice.head).is_some_and(|kind| kind.for_width(c.hidden_size) == GgmlType::F16) {
        let summary = format!("embedding and head have {} columns, which are not whole blocks of 32", c.hidden_size);
        return refuse(summary, vec![], "leave --embedding and --head away: they then keep their floats");
    }
    let embedding = "model.embed_tokens";
    let ignored = ignore.hit("lm_head").is_some();
    let head = choice.head.filter(|_| !ignored);
    if c.tie_word_embeddings && choice.embedding.is_some() && choice.embedding != head {
        return refuse(
            "lm_head shares the embedding's matrix: a quantized embedding would quantize it too",
            vec![],
            "give --head the same type",
        );
    }
    linears.extend(choice.embedding.map(|kind| table(embedding, embedding, kind)));
    // One matrix serves both where both have the same codes.
    if let Some(kind) = head.filter(|_| !(c.tie_word_embeddings && choice.embedding.is_some())) {
        linears.push(table("lm_head", if c.tie_word_embeddings { embedding } else { "lm_head" }, kind));
    }
    Rules::refuse_unused(&[&ignore], "`lowbit inspect` lists the modules".into())?;
    Ok((linears, reasons))
}

fn reason(l: &PlannedLinear, choice: &GgufChoice, options: &QuantizeOptions) -> String {
    let method = if l.block.is_some() { options.method.name() } else { "rtn" };
    match l.block {
        Some(_) if l.ggml != Some(choice.kind) => {
            format!("{method}; {} does not fit {} columns", choice.kind.name(), l.in_features)
        }
        _ => method.into(),
    }
}

/// What a user who asked for one type should read about those that got another.
fn fallback_notes(linears: &[PlannedLinear], reasons: &BTreeMap<String, String>, choice: &GgufChoice) -> Vec<String> {
    let mut counts: BTreeMap<(usize, &str), usize> = BTreeMap::new();
    for l in linears.iter().filter(|l| l.block.is_some()) {
        if let Some(kind) = l.ggml.filter(|k| *k != choice.kind) {
            *counts.entry((l.in_features, kind.name())).or_default() += 1;
        }
    }
    let block = choice.kind.block().0;
    let mut notes: Vec<String> = counts
        .into_iter()
        .map(|((cols, kind), n)| {
            format!(
                "{n} linears become {kind} and not {}: {cols} columns are not whole blocks of {block}",
                choice.kind.name()
            )
        })
        .collect();
    let kept = reasons.values().filter(|r| r.starts_with("kept")).count();
    if kept > 0 {
        notes.push(format!("{kept} linears keep their floats: their columns are not whole blocks of 32"));
    }
    notes
}
