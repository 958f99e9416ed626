//! The linears of all blocks, and which of them are quantized.

use std::collections::BTreeMap;

use lowbit_checkpoint::config::ModelConfig;
use lowbit_kernels::LinearScheme;
use lowbit_kernels::ggml::GgmlType;
use lowbit_model::block::{LinearShape, linear_shapes};

use super::{PlannedLinear, Rules};

/// What becomes of a linear: its number formats, and its type where the output is a GGUF file; or why it stays as it is.
pub(crate) type Fate = Result<(LinearScheme, Option<GgmlType>), String>;

/// Linears to quantize in graph order, and by the names of their weights why others stay: for `--ignore`, or for what `fate` says of a
/// module in a block.
pub(crate) fn of_blocks(
    config: &ModelConfig,
    prefix: &str,
    ignore: &mut Rules,
    fate: &mut dyn FnMut(&str, usize, &LinearShape) -> Fate,
) -> (Vec<PlannedLinear>, BTreeMap<String, String>) {
    let (mut linears, mut reasons) = (Vec::new(), BTreeMap::new());
    for block in 0..config.num_layers {
        for shape in linear_shapes(config, block) {
            let module = format!("{prefix}.layers.{block}.{}", shape.suffix);
            let chosen = match ignore.hit(&module) {
                Some((_, rule)) => Err(format!("ignored by `{rule}`")),
                None => fate(&module, block, &shape),
            };
            match chosen {
                Ok((scheme, ggml)) => linears.push(PlannedLinear {
                    source: module.clone(),
                    module,
                    block: Some(block),
                    group: Some(shape.group),
                    scheme,
                    ggml,
                    out_features: shape.out_features,
                    in_features: shape.in_features,
                }),
                Err(why) => {
                    reasons.insert(format!("{module}.weight"), why);
                }
            }
        }
    }
    (linears, reasons)
}
