//! The `config.json` of a quantized checkpoint: which scheme engines find for which module.

use std::collections::BTreeSet;

use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::quant_config::{PackFormat, WrittenGroup, by_scheme, write_compressed_tensors, write_uniform};
use lowbit_kernels::LinearScheme;
use lowbit_model::decoder;
use serde_json::Value;

use crate::plan::{PlannedLinear, QuantizeOptions};
use crate::scale_search::ScaleSearch;

/// Schemes and their targets: tables by name, then the blocks' linears. Where those have one scheme, and where `scheme` is one of
/// several, it gets `Linear`; every other has its modules by name. The second value says whether they are tables.
fn rules(options: &QuantizeOptions, linears: &[PlannedLinear]) -> Vec<(LinearScheme, Vec<String>, bool)> {
    let of = |tables: bool| {
        let some = linears.iter().filter(move |l| l.block.is_none() == tables);
        by_scheme(some.map(|l| (l.scheme, l.module.clone())))
    };
    let (tables, mut blocks) = (of(true), of(false));
    let linear = || vec!["Linear".to_string()];
    let default = blocks.iter().position(|(scheme, _)| *scheme == options.scheme).filter(|_| options.chosen.is_empty());
    match (blocks.as_mut_slice(), default) {
        ([], _) => blocks.push((options.scheme, linear())),
        ([(_, targets)], _) => *targets = linear(),
        (_, Some(i)) => {
            // The narrow targets first: loaders take the first rule that matches.
            let (scheme, _) = blocks.remove(i);
            blocks.push((scheme, linear()));
        }
        (_, None) => {}
    }
    let tables = tables.into_iter().map(|(scheme, targets)| (scheme, targets, true));
    tables.chain(blocks.into_iter().map(|(scheme, targets)| (scheme, targets, false))).collect()
}

/// The decoder is at `prefix`; `left` are the modules that stay as they are; `untie` where the head no longer is the embedding's matrix.
pub(crate) fn written_config(
    ckpt: &Checkpoint,
    prefix: &str,
    options: &QuantizeOptions,
    linears: &[PlannedLinear],
    left: BTreeSet<String>,
    untie: bool,
) -> Value {
    let mut config = ckpt.raw_config.clone();
    let tables: Vec<&PlannedLinear> = linears.iter().filter(|l| l.block.is_none()).collect();
    let mut ignore: Vec<String> = left.into_iter().collect();
    let head_module = decoder::head(prefix);
    let q = match options.format {
        PackFormat::CompressedTensors => {
            let observer = if options.scale_search == ScaleSearch::MinMax { "memoryless_minmax" } else { "mse" };
            let groups: Vec<WrittenGroup> = rules(options, linears)
                .into_iter()
                .map(|(scheme, targets, table)| WrittenGroup {
                    scheme,
                    targets,
                    observer,
                    static_act_order: !table && options.act_order && options.method.by_hessian(),
                })
                .collect();
            if !tables.iter().any(|t| t.module == head_module) {
                ignore.push(head_module.into());
            }
            write_compressed_tensors(&groups, &ignore, options.kv)
        }
        _ => {
            let damp = options.method.by_hessian().then_some(options.damp_frac);
            // The plan lets nothing else come here.
            options.scheme.int().map_or(Value::Null, |s| write_uniform(options.format, s, damp, false, &ignore))
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
