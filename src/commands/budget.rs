//! A budget of bits: measured once, kept in the cache, spent as asked.

use anyhow::{Result, bail};
use lowbit_calibration::Windows;
use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::hash::sha256_hex;
use lowbit_checkpoint::writer::write_atomic;
use lowbit_kernels::Scheme;
use lowbit_quantize::QuantizeOptions;
use lowbit_quantize::budget::{self, Ask, BudgetRecord, Curve};
use lowbit_quantize::resume::{exact, inexact};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::{BudgetArgs, HeadArg, QuantOptions};
use crate::commands::table::{megabytes, table};
use crate::context::Context;
use crate::models;

/// What the options ask for; `None` without a budget.
pub fn ask(b: &BudgetArgs) -> Result<Option<Ask>> {
    Ok(match (b.bits, b.size, b.fit.zip(b.context)) {
        (Some(bits), ..) => Some(Ask::Bits(bits)),
        (_, Some(size), _) => Some(Ask::Size(size)),
        (.., Some((memory, context))) => Some(Ask::Fit { memory, context }),
        _ if !b.candidates.is_empty() => {
            bail!("--candidates are what a budget chooses from\nhint: add --bits, --size or --fit")
        }
        _ => None,
    })
}

/// Options that only a budget understands, without one.
pub fn refuse_auto(q: &QuantOptions) -> Result<()> {
    for (name, value) in [("--head", q.head), ("--embedding", q.embedding)] {
        if value == HeadArg::Auto && ask(&q.budget)?.is_none() {
            bail!("{name} auto lets a budget decide\nhint: add --bits, --size or --fit, or choose w8 or keep");
        }
    }
    Ok(())
}

fn candidates(b: &BudgetArgs) -> Result<Vec<Scheme>> {
    if b.candidates.is_empty() {
        return Ok(budget::default_candidates());
    }
    let parse = |text: &String| match budget::parse_scheme(text) {
        Some(s) => Ok(s),
        None => bail!("--candidates {text}: expected schemes such as w4-g64, w3-g32 or w8-channel, 2 to 8 bits"),
    };
    b.candidates.iter().map(parse).collect()
}

#[derive(Serialize, Deserialize)]
struct Kept {
    curves: Vec<Curve>,
    tokens: [u64; 2],
}

/// Measures, or takes an earlier measurement of the same model, data and candidates from the cache, and spends the budget: the
/// options with every linear's scheme.
pub fn spend(
    ctx: &Context,
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    args: &QuantOptions,
    ask: Ask,
    windows: &Windows,
    identity: &str,
) -> Result<(QuantizeOptions, BudgetRecord)> {
    let candidates = candidates(&args.budget)?;
    let outline = budget::outline(ckpt, options)?;
    let mut settings = outline.options.to_map();
    settings
        .retain(|k, _| !matches!(k.as_str(), "strict" | "shard_bytes" | "format" | "sweeps" | "ignore" | "kv_scheme"));
    let names: Vec<String> = candidates.iter().map(Scheme::full_name).collect();
    let modules: Vec<&String> = outline.linears.iter().map(|l| &l.module).collect();
    let key = json!({"identity": identity, "windows": windows.sha256, "candidates": names, "modules": modules, "settings": settings});
    let file = models::cache_dir().join("curves").join(format!("{}.json", sha256_hex(key.to_string().as_bytes())));
    let kept = std::fs::read(&file).ok().and_then(|b| serde_json::from_slice(&b).ok());
    let kept = match kept.and_then(|v| serde_json::from_value::<Kept>(inexact(v)).ok()) {
        Some(kept) => {
            ctx.say("bits: measured before");
            kept
        }
        None => {
            let backend = ctx.backend()?;
            let (curves, tokens) =
                budget::measure(ckpt, backend.as_ref(), &outline, &candidates, windows, &ctx.progress, &ctx.stop)?;
            ctx.progress.clear();
            let kept = Kept { curves, tokens };
            // A cache that cannot be written costs time later, nothing now.
            let _ = file.parent().map(std::fs::create_dir_all);
            let _ = write_atomic(&file, exact(serde_json::to_value(&kept)?).to_string().as_bytes());
            kept
        }
    };
    let mut curves = kept.curves;
    for l in outline.linears.iter().filter(|l| l.block.is_none()) {
        let given = if l.module.ends_with("lm_head") { args.head } else { args.embedding };
        if given == HeadArg::W8 {
            curves.iter_mut().for_each(|c| c.pin(&l.module, 8));
        }
    }
    Ok(budget::choose(ckpt, options, &outline, curves, kept.tokens, ask)?)
}

/// The choices as text: a row a block, a column a unit, and what they add up to.
pub fn describe(b: &BudgetRecord) -> String {
    let mut columns: Vec<String> = Vec::new();
    let mut rows: Vec<Vec<String>> = Vec::new();
    for c in &b.curves {
        let chosen = c.chosen.and_then(|i| c.points.get(i)).map_or("–", |p| p.scheme.as_str());
        let short = chosen.replace("a16", "");
        let Some(block) = c.block else {
            let names: Vec<&str> = c.modules.iter().filter_map(|m| m.rsplit('.').next()).collect();
            rows.push(vec![names.join(" + "), short]);
            continue;
        };
        let leaf = |m: &String| m.rsplit('.').next().unwrap_or_default().trim_end_matches("_proj").to_string();
        let unit = c.modules.iter().map(leaf).collect::<Vec<_>>().join("/");
        let column = columns.iter().position(|u| *u == unit).unwrap_or_else(|| {
            columns.push(unit);
            columns.len() - 1
        });
        let name = format!("block {block}");
        if rows.last().is_none_or(|r| r.first() != Some(&name)) {
            rows.push(vec![name]);
        }
        if let Some(row) = rows.last_mut() {
            row.resize(row.len().max(column + 2), String::new());
            if let Some(cell) = row.get_mut(column + 1) {
                *cell = short;
            }
        }
    }
    let width = columns.len() + 1;
    rows.iter_mut().for_each(|r| r.resize(width.max(r.len()), String::new()));
    let mut header = vec!["unit"];
    header.extend(columns.iter().map(String::as_str));
    header.resize(rows.iter().map(Vec::len).max().unwrap_or(1).max(header.len()), "");
    let against = b
        .uniform
        .as_ref()
        .map_or(String::new(), |u| format!("; uniform {} would be {:.2e} at {}", u.scheme, u.kl, megabytes(u.bytes)));
    format!(
        "budget of {}: {} of {}, {:.3} bits a weight in the blocks, expected KL {:.2e}{against}\n\n{}",
        b.asked,
        megabytes(b.used_bytes),
        megabytes(b.budget_bytes),
        b.bits_per_weight,
        b.expected_kl,
        table(&header, &rows)
    )
}
