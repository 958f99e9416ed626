//! `lowbit eval --free-running`, `--worst-tokens`, `--blame`: what drift looks like, and where it comes from.

use std::collections::BTreeMap;

use anyhow::Result;
use lowbit_eval::drift::blame::{Unit, blame};
use lowbit_eval::drift::free_running::free_running;
use lowbit_eval::drift::tokens::{Choice, worst_tokens};
use lowbit_eval::engine::Limits;
use lowbit_eval::{Encode, EvalRecord, KlOptions, Source};
use lowbit_quantize::Progress;
use serde_json::Value;

use crate::args::{BlameArg, EvalArgs};
use crate::commands::eval::Models;
use crate::commands::table::table;
use crate::context::{Context, Purpose};

/// Tokens of a prompt both models write on from.
const PROMPT: usize = 32;

/// What was asked for, for the record.
pub fn options(args: &EvalArgs, kl: &KlOptions) -> BTreeMap<String, Value> {
    let mut out = BTreeMap::new();
    if let Some(count) = args.free_running {
        out.insert("free_running".into(), count.into());
        out.insert("free_tokens".into(), args.free_tokens.into());
    }
    if let Some(count) = args.worst_tokens {
        out.insert("worst_tokens".into(), count.into());
    }
    if let Some(unit) = args.blame {
        let unit = match unit {
            BlameArg::Linear => "linear",
            BlameArg::Block => "block",
        };
        out.insert("blame".into(), unit.into());
        out.insert("blame_windows".into(), blame_windows(args, kl).into());
    }
    out
}

/// Every swap is measured on no more windows than KL itself.
fn blame_windows(args: &EvalArgs, kl: &KlOptions) -> usize {
    args.blame_windows.min(kl.limit.unwrap_or(usize::MAX))
}

/// What was asked for, into the record.
pub fn fill(
    ctx: &Context,
    args: &EvalArgs,
    models: &mut Models,
    source: &Source,
    options: &KlOptions,
    record: &mut EvalRecord,
) -> Result<()> {
    let ids = models.tokenizer.encode(&source.text()?, true)?;
    let Some(other) = &models.other else { return Ok(()) };
    record.provenance.options.extend(self::options(args, options));
    if let Some(count) = args.free_running {
        let bos = models.tokenizer.added_bos()?;
        let step = (ids.len() / count.max(1)).max(1);
        let prompts: Vec<Vec<u32>> = (0..count)
            .filter_map(|i| ids.get(i * step..i * step + PROMPT))
            .map(|p| bos.filter(|b| p.first() != Some(b)).into_iter().chain(p.iter().copied()).collect())
            .collect();
        let limits = Limits::default();
        record.free_running =
            Some(free_running(&models.model, other, &models.tokenizer, &prompts, args.free_tokens, &limits)?);
    }
    if let Some(count) = args.worst_tokens {
        ctx.check_stop()?;
        record.worst_tokens = worst_tokens(&models.model, other, &models.tokenizer, &ids, options, count)?;
    }
    if let (Some(unit), Some(reference)) = (args.blame, &models.reference) {
        ctx.check_stop()?;
        let (_, mut donor) = reference.load(ctx, Purpose::Accuracy)?;
        let unit = match unit {
            BlameArg::Linear => Unit::Linear,
            BlameArg::Block => Unit::Block,
        };
        let options = KlOptions { limit: Some(blame_windows(args, options)), ..*options };
        let found = blame(&mut models.model, &mut donor, other, &ids, source, &options, unit, &|done, total| {
            if done == 0 {
                ctx.progress.stage("blame", total as u64);
            } else {
                ctx.progress.advance(1);
            }
        })?;
        ctx.progress.clear();
        record.blame = Some(found);
    }
    Ok(())
}

/// As text; nothing of what was not asked for.
pub fn summary(r: &EvalRecord) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(f) = &r.free_running {
        out.push(format!(
            "written freely from {} prompts: first differing token {:.1} on average (median {:.0}) of {}, {:.1} % of tokens differ, {:.0} % of texts the same; length ratio {:.3}; texts in a loop {:.1} % → {:.1} %",
            f.prompts,
            f.first_divergent_mean,
            f.first_divergent_median,
            f.max_new_tokens,
            100.0 * f.differing_mean,
            100.0 * f.identical,
            f.length_ratio,
            100.0 * f.reference_loop_rate,
            100.0 * f.candidate_loop_rate
        ));
    }
    if !r.worst_tokens.is_empty() {
        let best = |c: &[Choice]| c.first().map_or(String::new(), |c| format!("{:?} {:.2}", c.token, c.probability));
        let rows: Vec<Vec<String>> = r
            .worst_tokens
            .iter()
            .map(|t| {
                let tail: String = t.context.chars().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect();
                vec![
                    format!("{tail:?}"),
                    format!("{:?}", t.token),
                    best(&t.reference_choices),
                    best(&t.candidate_choices),
                    format!("{:.3}", t.kl),
                ]
            })
            .collect();
        out.push(table(&["after", "text", "reference", "candidate", "KL"], &rows));
    }
    if let Some(b) = &r.blame {
        let rows: Vec<Vec<String>> = b
            .suspects
            .iter()
            .take(20)
            .map(|s| {
                vec![
                    s.module.trim_start_matches("model.layers.").to_string(),
                    format!("{:.5}", s.kl),
                    format!("{:.5} {}", s.regained.value, s.regained.range(5)),
                    format!("{:.2}", s.bytes.unsigned_abs() as f64 / 1e6),
                    format!("{:+.5}", s.per_megabyte),
                ]
            })
            .collect();
        out.push(format!(
            "KL {:.5} on {} windows of {}; swapped back to the reference, one at a time:\n{}",
            b.kl,
            b.windows,
            b.window,
            table(&["layer", "KL", "regained [95 %]", "costs, MB", "a MB"], &rows)
        ));
    }
    out
}
