//! What a plan refuses, with all offenders: widths that groups do not divide, sets that engines hold as one in parts or in several
//! schemes, methods that know no float codes, layouts of one scheme, scales of a cache that holds something else.

use std::collections::{BTreeMap, BTreeSet};

use lowbit_checkpoint::ModelConfig;
use lowbit_checkpoint::quant_config::PackFormat;
use lowbit_kernels::backend::Activation;
use lowbit_kernels::{InputFormat, LinearScheme};
use lowbit_model::block::{LinearGroup, linear_shapes};

use super::{PlannedLinear, QuantizeOptions};
use crate::error::{QuantizeError, Result};

fn refuse(summary: impl Into<String>, offenders: Vec<String>, hint: impl Into<String>) -> Result<()> {
    if offenders.is_empty() {
        return Ok(());
    }
    Err(QuantizeError::Plan { summary: summary.into(), offenders, hint: Some(hint.into()) })
}

/// Linears of a block that engines hold as one: those that read the same input, and all experts.
fn set_of(group: LinearGroup) -> String {
    match group {
        LinearGroup::Expert(_) | LinearGroup::ExpertDown(_) => "experts".to_string(),
        group => format!("{group:?}"),
    }
}

/// Such a set is quantized or left as a whole.
pub(super) fn refuse_split_sets(c: &ModelConfig, linears: &[PlannedLinear]) -> Result<()> {
    let mut offenders = Vec::new();
    for block in 0..c.num_layers {
        let mut sets: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for s in linear_shapes(c, block) {
            sets.entry(set_of(s.group)).or_default().1 += 1;
        }
        for l in linears.iter().filter(|l| l.block == Some(block)) {
            sets.entry(l.group.map_or_else(String::new, set_of)).or_default().0 += 1;
        }
        for (set, (quantized, all)) in sets {
            if quantized != 0 && quantized != all {
                offenders.push(format!("block {block}, {set}: {} of {all} ignored", all - quantized));
            }
        }
    }
    refuse(
        "engines fuse q/k/v, gate/up and a block's experts: a set must be quantized or ignored as a whole",
        offenders,
        "ignore all members, for example --ignore 're:.*self_attn\\.[qkv]_proj'",
    )
}

/// Such a set has one scheme.
pub(super) fn refuse_mixed_sets(linears: &[PlannedLinear]) -> Result<()> {
    let mut offenders = Vec::new();
    let mut first: BTreeMap<(usize, String), &PlannedLinear> = BTreeMap::new();
    for l in linears {
        let (Some(block), Some(group)) = (l.block, l.group) else { continue };
        let f = *first.entry((block, set_of(group))).or_insert(l);
        if f.scheme != l.scheme {
            offenders.push(format!("{}: {}, {}: {}", f.module, f.scheme.full_name(), l.module, l.scheme.full_name()));
        }
    }
    refuse(
        "engines fuse q/k/v, gate/up and a block's experts: a set must have one scheme",
        offenders,
        "name all members, for example --module 're:.*self_attn\\.[qkv]_proj=w8a16'",
    )
}

/// Sweeps, refits and searches of scales are of integer codes only.
pub(super) fn refuse_methods(options: &QuantizeOptions, linears: &[PlannedLinear]) -> Result<()> {
    let Some(what) = options.integers_only() else { return Ok(()) };
    let floats = linears.iter().filter(|l| l.scheme.int().is_none());
    refuse(
        format!("{what} works on integer codes, and these are floats"),
        floats.map(|l| format!("{}: {}", l.module, l.scheme.full_name())).collect(),
        "use --method gptq, or rtn, and no --scale-search",
    )
}

/// What learned rounding cannot go back through: parts of blocks whose gradient is not written, rounded inputs, and caches whose ranges
/// its pass does not note.
pub(crate) fn refuse_learned(c: &ModelConfig, options: &QuantizeOptions, linears: &[PlannedLinear]) -> Result<()> {
    if !options.method.recipe().learned {
        return Ok(());
    }
    let name = options.method.name();
    let parts = [
        (c.experts.is_some(), "experts"),
        (c.latent.is_some(), "latent attention"),
        (c.fused_projections, "fused projections"),
        (c.post_norms, "norms after attention and MLP"),
        (c.norm_offset != 0.0, "an offset on the weights of its norms"),
        (c.activation != Activation::Silu, "another gate than SiLU"),
        (c.attention_soft_cap.is_some(), "a cap on attention scores"),
    ];
    let offenders = parts.iter().filter(|p| p.0).map(|p| format!("`{}`: {}", c.family, p.1));
    refuse(
        format!("method {name} needs the gradient of a whole block, and parts of this model have none"),
        offenders.collect(),
        "use --method best",
    )?;
    let rounded = linears.iter().filter(|l| l.block.is_some() && l.scheme.input.is_some());
    let rounded = rounded.map(|l| format!("{}: {}", l.module, l.scheme.full_name()));
    refuse(
        format!("method {name} learns weights alone, and these linears round their inputs, too"),
        rounded.collect(),
        "use --method gptq",
    )?;
    let cache = options.kv.map(|kv| format!("--kv-scheme {}", kv.name()));
    refuse(
        format!("method {name} notes no ranges of keys and values"),
        cache.into_iter().collect(),
        "leave --kv-scheme out, or use --method best",
    )
}

/// A linear whose width holds no whole groups of its scheme.
pub(super) struct Misfit {
    pub scheme: LinearScheme,
    pub width: usize,
    /// Its suffix, `*` for the number of an expert.
    pub kind: String,
    pub block: usize,
}

/// Names those of the first scheme that does not fit.
pub(super) fn refuse_widths(misfits: &[Misfit], options: &QuantizeOptions, layers: usize) -> Result<()> {
    let Some(scheme) = misfits.first().map(|m| m.scheme) else { return Ok(()) };
    let mut kinds: BTreeMap<(usize, &str), Vec<usize>> = BTreeMap::new();
    for m in misfits.iter().filter(|m| m.scheme == scheme) {
        kinds.entry((m.width, &m.kind)).or_default().push(m.block);
    }
    let count: usize = kinds.values().map(Vec::len).sum();
    let group = scheme.group_cols(0).max(match scheme.input {
        Some(InputFormat::Fp8Group(n)) => n,
        _ => 0,
    });
    let lines = kinds
        .iter()
        .map(|((width, kind), blocks)| {
            let mut distinct = blocks.clone();
            distinct.dedup();
            format!("{kind} in {} of {layers} blocks: in = {width}", distinct.len())
        })
        .collect();
    let whole = |g: &usize| *g < group.max(1) && kinds.keys().all(|(width, _)| width.is_multiple_of(*g));
    let fits = [128usize, 64, 32, 16].into_iter().find(whole);
    let plain = scheme.int().filter(|_| scheme.input.is_none());
    let hint = match (plain, fits) {
        (None, _) => format!(
            "the groups of {} are fixed: leave these out with --ignore, or give them another scheme with --module",
            scheme.full_name()
        ),
        (Some(s), fits) if scheme != options.scheme => {
            let group = fits.map_or("channel".to_string(), |g| g.to_string());
            format!("--module PATTERN={}:{group} has a group that divides every width", s.name())
        }
        (_, Some(g)) => format!("{g} divides every width: --group-size {g}"),
        (_, None) => "use --group-size channel".into(),
    };
    refuse(format!("{count} linears have an input width that group size {group} does not divide"), lines, hint)
}

/// What a layout of one scheme cannot hold.
pub(super) fn refuse_layout(options: &QuantizeOptions, linears: &[PlannedLinear]) -> Result<()> {
    let format = options.format;
    if !format.is_uniform() {
        return Ok(());
    }
    let holds = |l: &PlannedLinear| {
        l.block.is_some() && l.scheme == options.scheme && format.holds(l.scheme, l.out_features, l.in_features)
    };
    let line =
        |l: &PlannedLinear| format!("{}: {} [{}, {}]", l.module, l.scheme.full_name(), l.out_features, l.in_features);
    let cache = options.kv.map(|kv| format!("keys and values: {}", kv.name()));
    refuse(
        match format {
            PackFormat::Awq => {
                "the AWQ format holds 4 bits of integers in one scheme, and rows must be a multiple of 8"
            }
            _ => {
                "the GPTQ format holds integers of 2, 3, 4 or 8 bits in one scheme, and rows · bits and columns · bits must be multiples of 32"
            }
        },
        linears.iter().filter(|l| !holds(l)).map(line).chain(cache).collect(),
        "use --format compressed-tensors",
    )
}

/// Where engines know float experts as a few tensors a layer, and quantized ones as modules by the names of compressed-tensors alone:
/// experts that would stay floats, and other layouts.
pub(super) fn refuse_gathered(c: &ModelConfig, options: &QuantizeOptions, linears: &[PlannedLinear]) -> Result<()> {
    if !c.gathers_experts() {
        return Ok(());
    }
    let expert = |l: &&PlannedLinear| matches!(l.group, Some(LinearGroup::Expert(_) | LinearGroup::ExpertDown(_)));
    let quantized: BTreeSet<usize> = linears.iter().filter(expert).filter_map(|l| l.block).collect();
    let left = (0..c.num_layers).filter(|block| !quantized.contains(block));
    refuse(
        format!(
            "engines know experts of `{}` that stay floats as one tensor a layer, which lowbit does not write",
            c.family
        ),
        left.map(|block| format!("block {block}: experts ignored")).collect(),
        "leave the experts out of --ignore",
    )?;
    let format = options.format;
    refuse(
        format!("engines have other names for the experts of `{}` in the format {}", c.family, format.name()),
        format.is_uniform().then(|| format!("{} in {}", c.family, format.name())).into_iter().collect(),
        "use --format compressed-tensors",
    )
}

/// Scales of keys and values where engines cache the latent vector in their place.
pub(super) fn refuse_cache(c: &ModelConfig, options: &QuantizeOptions) -> Result<()> {
    let offenders = options.kv.filter(|_| c.latent.is_some()).map(|kv| format!("--kv-scheme {}", kv.name()));
    refuse(
        format!(
            "latent attention (`{}`): engines cache the latent vector, not the keys and values whose scales these are",
            c.family
        ),
        offenders.into_iter().collect(),
        "leave --kv-scheme out",
    )
}
