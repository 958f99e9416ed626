//! The `config.json` of a quantized checkpoint: which scheme engines find for which module.

use std::collections::BTreeSet;

use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::quant_config::{PackFormat, WrittenGroup, write_compressed_tensors, write_uniform};
use lowbit_kernels::Scheme;
use serde_json::Value;

use crate::plan::{PlannedLinear, QuantizeOptions};
use crate::scale_search::ScaleSearch;

/// Modules that share a scheme.
struct Rule {
    scheme: Scheme,
    table: bool,
    targets: Vec<String>,
}

/// Tables by name, then `Linear` where the blocks have one scheme, and every module by name where they have several.
fn rules(options: &QuantizeOptions, linears: &[PlannedLinear]) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    let (tables, blocks): (Vec<&PlannedLinear>, Vec<_>) = linears.iter().partition(|l| l.block.is_none());
    for l in tables.iter().chain(&blocks) {
        let table = l.block.is_none();
        match rules.iter_mut().find(|r| r.scheme == l.scheme && r.table == table) {
            Some(r) => r.targets.push(l.module.clone()),
            None => rules.push(Rule { scheme: l.scheme, table, targets: vec![l.module.clone()] }),
        }
    }
    let linear = vec!["Linear".to_string()];
    match rules.iter().filter(|r| !r.table).count() {
        0 => rules.push(Rule { scheme: options.scheme, table: false, targets: linear }),
        1 => rules.iter_mut().filter(|r| !r.table).for_each(|r| r.targets.clone_from(&linear)),
        _ => {}
    }
    rules
}

/// `left` are the modules that stay as they are; `untie` where the head no longer is the embedding's matrix.
pub(crate) fn written_config(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    linears: &[PlannedLinear],
    left: BTreeSet<String>,
    untie: bool,
) -> Value {
    let mut config = ckpt.raw_config.clone();
    let tables: Vec<&PlannedLinear> = linears.iter().filter(|l| l.block.is_none()).collect();
    let mut ignore: Vec<String> = left.into_iter().collect();
    let head_module = if ckpt.has_weight("model.embed_tokens") { "lm_head" } else { "language_model.lm_head" };
    let q = match options.format {
        PackFormat::CompressedTensors => {
            let observer = if options.scale_search == ScaleSearch::Hessian { "mse" } else { "memoryless_minmax" };
            // The narrow targets first: loaders take the first rule that matches.
            let groups: Vec<WrittenGroup> = rules(options, linears)
                .into_iter()
                .map(|r| WrittenGroup {
                    scheme: r.scheme,
                    targets: r.targets,
                    observer,
                    static_act_order: !r.table && options.act_order && options.method.calibrated(),
                })
                .collect();
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
