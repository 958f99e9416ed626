//! What transforms rewrite, what they hold, and where they do not apply: known before any work.

use std::collections::{BTreeMap, BTreeSet};

use lowbit_checkpoint::{Checkpoint, ModelConfig};
use lowbit_model::block::{LinearGroup, LinearShape, linear_shapes};
use lowbit_model::decoder;

use super::block::{feeder, norm_names};
use super::{Transform, ordered, scaling};
use crate::error::{QuantizeError, Result};
use crate::plan::{PlannedLinear, QuantizeOptions};

fn refuse(summary: impl Into<String>, offenders: Vec<String>, hint: &str) -> Result<()> {
    Err(QuantizeError::Plan { summary: summary.into(), offenders, hint: Some(hint.into()) })
}

/// Names of the decoder's tables and of its last norm: embedding, head, norm.
pub(super) fn table_names(prefix: &str) -> [String; 3] {
    let head = decoder::head(prefix);
    [format!("{prefix}.embed_tokens.weight"), format!("{head}.weight"), format!("{prefix}.norm.weight")]
}

/// Groups of a block whose inputs are scaled: those that are quantized, and of which what feeds them is a norm or quantized, too.
pub(super) fn scaled_groups(
    c: &ModelConfig,
    transforms: &[Transform],
    shapes: &[LinearShape],
    planned: &dyn Fn(&LinearShape) -> Option<PlannedLinear>,
) -> Vec<LinearGroup> {
    let Some(scaling) = scaling(transforms) else { return Vec::new() };
    let wanted = |group: &LinearGroup| {
        let members = || shapes.iter().filter(move |s| s.group == *group).map(planned);
        match (scaling, feeder(c, shapes, *group)) {
            // SmoothQuant's channels are those of norms (section 4), and only rounded inputs gain.
            (Transform::SmoothQuant { .. }, Some(_)) => false,
            (Transform::SmoothQuant { .. }, None) => members().all(|l| l.is_some_and(|l| l.scheme.input.is_some())),
            (_, Some((i, _))) => members().all(|l| l.is_some()) && shapes.get(i).and_then(planned).is_some(),
            (_, None) => members().all(|l| l.is_some()),
        }
    };
    let all = [LinearGroup::Attention, LinearGroup::Output, LinearGroup::Mlp, LinearGroup::Down];
    all.into_iter().filter(wanted).collect()
}

/// Tensors that are rewritten without being quantized, with their block; `None` for embedding, head and the last norm.
pub(crate) fn rewritten(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    linears: &[PlannedLinear],
) -> Result<BTreeMap<String, Option<usize>>> {
    let mut out = BTreeMap::new();
    if options.transforms.is_empty() {
        return Ok(out);
    }
    let (c, prefix) = (&ckpt.config, decoder::prefix(ckpt)?);
    let by_module: BTreeMap<&str, &PlannedLinear> = linears.iter().map(|l| (l.module.as_str(), l)).collect();
    let rotates = options.transforms.contains(&Transform::Rotate);
    for block in 0..c.num_layers {
        let name = format!("{prefix}.layers.{block}");
        let shapes = linear_shapes(c, block);
        let module = |s: &LinearShape| format!("{name}.{}", s.suffix);
        let planned = |s: &LinearShape| by_module.get(module(s).as_str()).copied().cloned();
        let bias = |s: &LinearShape| Some(format!("{}.bias", module(s))).filter(|b| ckpt.store.find(b).is_some());
        let norms = norm_names(c).map(|n| format!("{name}.{n}.weight"));
        let mut names: Vec<String> = Vec::new();
        for group in scaled_groups(c, &options.transforms, &shapes, &planned) {
            match feeder(c, &shapes, group).and_then(|(i, _)| shapes.get(i)) {
                Some(fed_by) => names.extend(bias(fed_by)),
                None => names.extend(norms.get(usize::from(group == LinearGroup::Mlp)).cloned()),
            }
        }
        if rotates {
            names.extend(norms);
            let values = feeder(c, &shapes, LinearGroup::Output).map(|(i, _)| i);
            for (i, s) in shapes.iter().enumerate() {
                if planned(s).is_none() {
                    names.push(format!("{}.weight", module(s)));
                }
                if matches!(s.group, LinearGroup::Output | LinearGroup::Down) || Some(i) == values {
                    names.extend(bias(s));
                }
            }
        }
        out.extend(names.into_iter().map(|n| (n, Some(block))));
    }
    if rotates {
        let tables = table_names(prefix);
        out.extend(
            tables.into_iter().filter(|t| !by_module.contains_key(t.trim_end_matches(".weight"))).map(|t| (t, None)),
        );
    }
    Ok(out)
}

/// The head that a rotation makes of a tied embedding, where it is left in floats: a matrix of its own.
pub(crate) fn untied_head(ckpt: &Checkpoint, rewritten: &BTreeMap<String, Option<usize>>) -> Option<String> {
    let missing = |(name, block): &(&String, &Option<usize>)| block.is_none() && ckpt.store.find(name).is_none();
    rewritten.iter().find(missing).map(|(name, _)| name.clone()).filter(|_| ckpt.config.tie_word_embeddings)
}

/// What transforms hold: a block in f32 twice, as it is changed and as the solver reads it, or a rotated table that is quantized.
pub(crate) fn transform_bytes(c: &ModelConfig, options: &QuantizeOptions) -> u64 {
    if options.transforms.is_empty() {
        return 0;
    }
    let elements = |s: LinearShape| s.out_features as u64 * s.in_features as u64;
    let block = 2 * 4 * linear_shapes(c, 0).into_iter().map(elements).sum::<u64>();
    let tables = options.transforms.contains(&Transform::Rotate) && (options.head_w8 || options.embedding_w8);
    block.max(if tables { 4 * c.vocab_size as u64 * c.hidden_size as u64 } else { 0 })
}

/// Fails where a transform does not apply, and says to what.
pub(crate) fn refuse_transforms(ckpt: &Checkpoint, options: &QuantizeOptions, linears: &[PlannedLinear]) -> Result<()> {
    let transforms = ordered(&options.transforms);
    let Some(first) = transforms.first() else { return Ok(()) };
    let c = &ckpt.config;
    let scales = transforms.iter().filter(|t| t.calibrated()).count();
    if scales > 1 || transforms.len() > scales + 1 {
        let names = transforms.iter().map(|t| format!("--transform {}", t.name())).collect();
        return refuse(
            "each transform once, and one of awq and smoothquant: both scale the same channels",
            names,
            "leave one of them out",
        );
    }
    if options.gguf.is_some() {
        return refuse(
            format!("--transform {}: a GGUF file's tensors are laid out from the original's", first.name()),
            vec![],
            "use --format compressed-tensors, or leave --transform out",
        );
    }
    let part = match (&c.experts, &c.latent) {
        (_, Some(_)) => Some("latent attention: a norm stands between the latent vectors and what reads them"),
        (Some(_), None) => Some("experts: the norm in front of them feeds the router, too"),
        (None, None) => None,
    };
    if let Some(part) = part {
        return refuse(
            format!("--transform {} does not know a part of a `{}` model yet", first.name(), c.family),
            vec![part.into()],
            "leave --transform out: --method best needs none",
        );
    }
    if transforms.contains(&Transform::Rotate) {
        refuse_rotation(ckpt)?;
    }
    let smooth = transforms.iter().find(|t| matches!(t, Transform::SmoothQuant { .. }));
    if let Some(smooth) = smooth.filter(|_| !linears.iter().any(|l| l.block.is_some() && l.scheme.input.is_some())) {
        return refuse(
            format!(
                "--transform {}: it makes inputs easier to round, and {} leaves them alone",
                smooth.name(),
                options.scheme_name()
            ),
            vec![],
            "use a scheme with quantized inputs, such as --scheme w8a8, or --transform awq",
        );
    }
    Ok(())
}

/// Everything that reads or writes the residual stream must be known, and must do so linearly.
fn refuse_rotation(ckpt: &Checkpoint) -> Result<()> {
    let (c, prefix) = (&ckpt.config, decoder::prefix(ckpt)?);
    if c.post_norms {
        return refuse(
            format!(
                "--transform rotate: `{}` has norms between the outputs of o and down and the residual stream",
                c.family
            ),
            vec!["their weights act on single channels, which a rotation mixes".into()],
            "use --transform awq, or --method best without a transform",
        );
    }
    if prefix != "model" {
        return refuse(
            "--transform rotate: other parts of this model write into the residual stream",
            vec![format!("the decoder is `{prefix}` of a larger model")],
            "use --transform awq, or --method best without a transform",
        );
    }
    let mut known: BTreeSet<String> = table_names(prefix).into();
    for block in 0..c.num_layers {
        known.extend(linear_shapes(c, block).iter().map(|s| format!("{prefix}.layers.{block}.{}.weight", s.suffix)));
    }
    let unknown = ckpt.store.iter().filter(|(name, t)| t.shape.len() >= 2 && !known.contains(*name));
    let unknown: Vec<String> = unknown.map(|(name, t)| format!("{name} {:?}", t.shape)).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    refuse(
        "--transform rotate: matrices that are no part of the graph may read or write the residual stream",
        unknown,
        "use --transform awq, or --method best without a transform",
    )
}
