//! Seconds that a plan will take: its own work, done on the first block with a few windows of random tokens.
//!
//! What is outside of the blocks (tables, copies) is done whole. The forward pass and the statistics of a block grow with the tokens along
//! a straight line, which two sizes give; solving it does not depend on them. Reading the calibration text is not part of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use lowbit_calibration::Windows;
use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::writer::Declared;
use lowbit_kernels::backend::Backend;

use crate::driver::{Silent, quantize};
use crate::error::{QuantizeError, Result};
use crate::plan::{Plan, QuantizeOptions};
use crate::resume::Resume;
use crate::room;

/// Tokens of the smaller measurement; the larger has [`LARGER`] times as many.
const TOKENS: usize = 2048;
const LARGER: usize = 3;

/// Seconds for quantizing `ckpt` as `plan` says on `samples` windows of `seq_len` tokens. `folder` takes what is written meanwhile; the
/// caller removes it. Fails where the blocks are of different kinds, of a GGUF file and of learned rounding: there one block says
/// nothing about the whole.
pub fn probe(
    ckpt: &Checkpoint,
    backends: &[&dyn Backend],
    plan: &Plan,
    (samples, seq_len): (usize, usize),
    folder: &Path,
    stop: &AtomicBool,
) -> Result<f64> {
    let layers = ckpt.config.num_layers;
    let sparse = |block: usize| ckpt.config.experts_of(block).is_some();
    let refuse = |what: &str| QuantizeError::Plan {
        summary: format!("--probe cannot estimate the time of {what}"),
        offenders: vec![],
        hint: Some("leave --probe out".into()),
    };
    if plan.gguf.is_some() {
        return Err(refuse("a GGUF file"));
    }
    if plan.options.method.recipe().learned {
        return Err(refuse("method round"));
    }
    if (1..layers).any(|block| sparse(block) != sparse(0)) {
        return Err(refuse("a model with dense and sparse blocks"));
    }
    let mut one = ckpt.overlay(std::iter::empty());
    one.config.num_layers = layers.min(1);
    let part = first_block(plan, folder);
    room::check_disk(folder, part.declared.iter().map(Declared::bytes).sum()).map_err(elsewhere)?;
    let vocab = ckpt.config.vocab_size.max(1);
    let measure = |windows: usize| -> Result<(f64, BTreeMap<String, f64>)> {
        let made = windows_of(windows, seq_len, vocab);
        let needed = plan.options.needs_data().then_some(&made);
        let resume = Resume { identity: "probe".into(), fresh: true };
        let target = folder.join("model");
        let (outcome, mut writer) = quantize(&one, backends, &part, needed, &target, true, &resume, &Silent, stop)?;
        writer.forget();
        Ok(((windows * seq_len) as f64, outcome.stage_seconds))
    };
    let few = TOKENS.div_ceil(seq_len.max(1)).min(samples.max(1));
    // The first one warms up: files are read, kernels compiled.
    measure(1)?;
    let small = measure(few)?;
    let many = few.saturating_mul(LARGER).min(samples);
    let large = if plan.options.needs_data() && many > few { measure(many)? } else { small.clone() };
    Ok(whole(&small, &large, (samples * seq_len) as f64, layers as f64))
}

/// The disk that has no room is that of the temporary folder.
fn elsewhere(e: QuantizeError) -> QuantizeError {
    match e {
        QuantizeError::Plan { summary, offenders, .. } => {
            QuantizeError::Plan { summary, offenders, hint: Some("set TMPDIR to a folder on another disk".into()) }
        }
        other => other,
    }
}

/// Seconds of the whole run from the stages of two measurements: tokens, and seconds by stage.
fn whole(small: &(f64, BTreeMap<String, f64>), large: &(f64, BTreeMap<String, f64>), tokens: f64, layers: f64) -> f64 {
    let of = |m: &(f64, BTreeMap<String, f64>), stage: &str| m.1.get(stage).copied().unwrap_or(0.0);
    let mean = |stage: &str| f64::midpoint(of(small, stage), of(large, stage));
    let by_tokens = |stage: &str| {
        let (a, b) = (of(small, stage), of(large, stage));
        if large.0 > small.0 {
            // Noise must make more tokens neither cheaper nor dearer than in proportion: what does not grow with them takes time, too.
            let slope = ((b - a) / (large.0 - small.0)).clamp(0.0, b / large.0);
            b + slope * (tokens - large.0)
        } else {
            b
        }
    };
    // Noise only adds to it, as does another attempt at a Hessian that few tokens made.
    let solve = of(small, "solve").min(of(large, "solve"));
    let block = solve + by_tokens("forward and statistics") + by_tokens("transforms");
    mean("copy") + mean("embedding and head") + layers * block
}

/// The plan without the blocks after the first.
fn first_block(plan: &Plan, folder: &Path) -> Plan {
    let (all, first) = (format!("{}.", plan.blocks), format!("{}.0.", plan.blocks));
    let stays = |name: &str| !name.starts_with(&all) || name.starts_with(&first);
    let offload = plan.options.offload.as_ref().map(|_| folder.join("activations"));
    Plan {
        options: QuantizeOptions { strict: false, offload, ..plan.options.clone() },
        blocks: plan.blocks.clone(),
        linears: plan.linears.iter().filter(|l| l.block.is_none_or(|b| b == 0)).cloned().collect(),
        copies: plan.copies.iter().filter(|name| stays(name)).cloned().collect(),
        rewritten: plan.rewritten.iter().filter(|(name, _)| stays(name)).map(|(n, b)| (n.clone(), *b)).collect(),
        declared: plan.declared.iter().filter(|d| stays(&d.name)).cloned().collect(),
        layout: plan.layout,
        config: plan.config.clone(),
        gguf: None,
        record: plan.record.clone(),
    }
}

/// Windows of tokens that look random, the same each time.
fn windows_of(count: usize, seq_len: usize, vocab: usize) -> Windows {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    };
    let tokens = (0..count).map(|_| (0..seq_len).map(|_| next()).collect()).collect();
    Windows::new(tokens, "random", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_tokens_are_multiplied_and_the_rest_is_not() {
        let at = |tokens: f64, forward: f64| {
            let stages =
                [("copy", 1.0), ("embedding and head", 2.0), ("solve", 4.0), ("forward and statistics", forward)];
            (tokens, stages.into_iter().map(|(name, s)| (name.to_string(), s)).collect::<BTreeMap<_, _>>())
        };
        // Half a second and a hundredth a token: 10.5 s for 1000 tokens.
        let (small, large) = (at(100.0, 1.5), at(300.0, 3.5));
        let seconds = whole(&small, &large, 1000.0, 2.0);
        assert!((seconds - (3.0 + 2.0 * 14.5)).abs() <= 1e-9, "{seconds}");
        // A first size that was too fast by chance: no more than in proportion.
        assert!((whole(&at(100.0, 0.0), &large, 1000.0, 1.0) - (7.0 + 3.5 / 0.3)).abs() <= 1e-9);
        // Without a second size, as without data, a block takes what it took.
        assert!((whole(&small, &small, 0.0, 2.0) - (3.0 + 2.0 * 5.5)).abs() <= 1e-9);
    }

    #[test]
    fn random_windows_are_of_the_vocabulary() {
        let windows = windows_of(3, 5, 7);
        assert_eq!((windows.tokens.len(), windows.token_count()), (3, 15));
        assert!(windows.tokens.iter().flatten().all(|id| *id < 7));
        assert_eq!(windows, windows_of(3, 5, 7));
    }
}
