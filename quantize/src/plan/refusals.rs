//! What a plan refuses: widths that groups do not divide, fused sets of several schemes, methods that know no float codes.

use std::collections::BTreeMap;

use lowbit_kernels::{InputFormat, LinearScheme};

use super::{PlannedLinear, QuantizeOptions};
use crate::error::{QuantizeError, Result};

/// Whether engines fuse two linears of a block into one matrix: q, k and v, or gate and up, of the same parent.
pub fn fused(a: &str, b: &str) -> bool {
    let sets: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];
    let (Some((parent, x)), Some((other, y))) = (a.rsplit_once('.'), b.rsplit_once('.')) else { return false };
    parent == other && sets.iter().any(|s| s.contains(&x) && s.contains(&y))
}

/// A fused set has one scheme.
pub(super) fn refuse_mixed_sets(linears: &[PlannedLinear]) -> Result<()> {
    let mut offenders = Vec::new();
    for (i, a) in linears.iter().enumerate() {
        // Sets lie within a block, whose linears are neighbours.
        let later = linears[i + 1..].iter().take_while(|b| b.block == a.block && b.block.is_some());
        for b in later.filter(|b| b.scheme != a.scheme && fused(&a.module, &b.module)) {
            offenders.push(format!("{}: {}, {}: {}", a.module, a.scheme.full_name(), b.module, b.scheme.full_name()));
        }
    }
    if offenders.is_empty() {
        return Ok(());
    }
    Err(QuantizeError::Plan {
        summary: "engines fuse q/k/v and gate/up: a set must have one scheme".into(),
        offenders,
        hint: Some("name all members, for example --module 're:.*self_attn\\.[qkv]_proj=w8a16'".into()),
    })
}

/// Sweeps and refits move integer codes only.
pub(super) fn refuse_methods(options: &QuantizeOptions, linears: &[PlannedLinear]) -> Result<()> {
    if options.method.recipe().sweeps == 0 {
        return Ok(());
    }
    let floats = linears.iter().filter(|l| l.scheme.int().is_none());
    let offenders: Vec<String> = floats.map(|l| format!("{}: {}", l.module, l.scheme.full_name())).collect();
    if offenders.is_empty() {
        return Ok(());
    }
    Err(QuantizeError::Plan {
        summary: format!("method {} works on integer codes, and these are floats", options.method.name()),
        offenders,
        hint: Some("use --method gptq, or rtn".into()),
    })
}

pub(super) fn refuse_widths(
    offenders: &BTreeMap<(usize, &'static str), Vec<usize>>,
    scheme: LinearScheme,
    layers: usize,
) -> Result<()> {
    if offenders.is_empty() {
        return Ok(());
    }
    let count: usize = offenders.values().map(Vec::len).sum();
    let group = scheme.group_cols(0).max(match scheme.input {
        Some(InputFormat::Fp8Group(n)) => n,
        _ => 0,
    });
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
        hint: Some(match (scheme.input.is_none().then(|| scheme.int()).flatten(), fits) {
            (Some(_), Some(g)) => format!("{g} divides every width: --group-size {g}"),
            (Some(_), None) => "use --group-size channel".into(),
            _ => format!(
                "the groups of {} are fixed: leave these out with --ignore, or give them another scheme with --module",
                scheme.full_name()
            ),
        }),
    })
}
