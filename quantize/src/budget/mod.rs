//! A budget of bits: every linear gets the scheme that serves the whole model best for its bytes.
//!
//! One pass over the float model measures (`measure.rs`), for each unit of linears that must share a scheme,
//!
//! 1. the **curve**: the relative proxy loss `tr(E H Eᵀ) / tr(W H Wᵀ)` under every candidate scheme, solved on a sample of rows;
//! 2. the **weight** of the unit: the KL divergence of the model's next-token distributions with only this unit quantized, by one
//!    candidate, against the float model's on a few short windows.
//!
//! To second order the divergence is quadratic in a unit's error and adds up over units, so a candidate is expected to cost
//! `KL(measured) · loss(candidate) / loss(measured)`. `allocate.rs` then minimizes the sum under the budget. What is chosen is solved
//! in the usual sequential pass.

mod allocate;
mod measure;

use std::collections::BTreeMap;

use lowbit_checkpoint::Checkpoint;
use lowbit_checkpoint::linear;
use lowbit_checkpoint::writer::Declared;
use lowbit_kernels::{GroupSize, Scheme};
use serde::{Deserialize, Serialize};

use crate::error::{QuantizeError, Result};
use crate::experts::refuse_budget;
use crate::plan::{Plan, QuantizeOptions};

pub use allocate::{Choice, allocate};
pub use measure::measure;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ask {
    /// Bits per weight over the blocks' linears, scales included. An embedding or head that takes part does so with the bytes it has
    /// in the original.
    Bits(f64),
    /// Bytes of the checkpoint's weight files.
    Size(u64),
    /// Bytes of a device's memory that has to hold the weights, and keys and values of `context` tokens in 16 bits; a tenth is left
    /// for activations and the engine.
    Fit {
        /// Bytes of memory.
        memory: u64,
        /// Tokens.
        context: u64,
    },
}

/// One candidate of a unit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Full scheme name, `keep` for the original; of two tables `EMBEDDING + HEAD`.
    pub scheme: String,
    /// Bytes of the unit on disk.
    pub bytes: u64,
    /// Relative proxy loss, mean of the unit's linears (of a table: relative squared error).
    pub loss: f64,
    /// Expected KL divergence, nats a token.
    pub kl: f64,
}

/// A unit and its candidates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Linears that share the scheme.
    pub modules: Vec<String>,
    /// Block; `None` for embedding and head.
    pub block: Option<usize>,
    /// Weights.
    pub weights: u64,
    /// KL divergence measured with this unit alone quantized by `probe`.
    pub probe_kl: f64,
    /// Scheme of the measurement.
    pub probe: String,
    /// By rising bytes.
    pub points: Vec<Point>,
    /// Index of the chosen point.
    #[serde(default)]
    pub chosen: Option<usize>,
}

/// The budget, what it was spent on, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BudgetRecord {
    /// As it was asked for.
    pub asked: String,
    /// Bytes all units may have together.
    pub budget_bytes: u64,
    /// Bytes they have.
    pub used_bytes: u64,
    /// Average bits per weight of the blocks' linears, scales included.
    pub bits_per_weight: f64,
    /// Sum of the chosen points' KL.
    pub expected_kl: f64,
    /// The best single scheme that fits, and its expected KL.
    pub uniform: Option<Point>,
    /// Windows of the measurement: tokens for the Hessians, tokens for the KL.
    pub tokens: [u64; 2],
    /// Unit by unit.
    pub curves: Vec<Curve>,
}

/// The candidates where none are named: 2 to 6 and 8 bits, in groups of 32, 64 and 128.
pub fn default_candidates() -> Vec<Scheme> {
    let mut out = Vec::new();
    for bits in [2, 3, 4, 5, 6, 8] {
        for group in [128, 64, 32] {
            out.push(Scheme { bits, symmetric: true, group: GroupSize::Cols(group) });
        }
        out.push(Scheme { bits, symmetric: true, group: GroupSize::PerChannel });
    }
    out
}

/// Fails where no budget can be spent: a layout of one scheme, modules whose scheme is given, or a model with parts that no budget
/// knows yet (experts, latent attention).
pub fn check(ckpt: &Checkpoint, options: &QuantizeOptions) -> Result<()> {
    refuse_budget(&ckpt.config)?;
    let refuse = |summary, hint: &str| Err(QuantizeError::Plan { summary, offenders: vec![], hint: Some(hint.into()) });
    if options.gguf.is_some() || options.format.is_uniform() {
        let summary = format!("{} holds one scheme, a budget needs several", options.format_name());
        return refuse(summary, "use --format compressed-tensors");
    }
    if let Some((pattern, scheme)) = options.modules.first() {
        let summary = format!(
            "--module {pattern}={}: a budget chooses the scheme of every linear, so none can be given",
            scheme.full_name()
        );
        return refuse(summary, "leave --module out, keep these linears with --ignore, or give no budget");
    }
    if let Some(transform) = options.transforms.first() {
        let summary = format!("--transform {}: a budget weighs linears as the original has them", transform.name());
        return refuse(summary, "leave --transform out, or give all linears one scheme: --scheme w4a16");
    }
    Ok(())
}

/// The plan that lists what takes part, whatever the budget will be.
pub fn outline(ckpt: &Checkpoint, options: &QuantizeOptions) -> Result<Plan> {
    check(ckpt, options)?;
    let scheme = Scheme { bits: 8, symmetric: true, group: GroupSize::PerChannel };
    crate::plan::make(
        ckpt,
        &QuantizeOptions { scheme: scheme.into(), chosen: BTreeMap::new(), ..options.clone() },
        None,
        0,
    )
}

/// Bytes of a linear on disk under a scheme.
fn packed_bytes(plan: &Plan, module: &str, scheme: Scheme, out: usize, n: usize) -> Result<u64> {
    let declared = linear::declare(module, scheme, plan.layout, out, n)
        .map_err(|source| QuantizeError::Kernel { module: module.to_string(), source })?;
    Ok(declared.iter().map(Declared::bytes).sum())
}

/// Spends the budget: the options with every module's scheme, and the record.
pub fn choose(
    ckpt: &Checkpoint,
    options: &QuantizeOptions,
    outline: &Plan,
    mut curves: Vec<Curve>,
    tokens: [u64; 2],
    ask: Ask,
) -> Result<(QuantizeOptions, BudgetRecord)> {
    let budget = units_budget(ckpt, outline, &curves, ask);
    let uniform = uniform(&curves, budget);
    curves.iter_mut().for_each(Curve::prune);
    let choices: Vec<Vec<Choice>> =
        curves.iter().map(|c| c.points.iter().map(|p| Choice { bytes: p.bytes, loss: p.kl }).collect()).collect();
    let Some(chosen) = allocate(&choices, budget) else {
        let least: u64 = choices.iter().filter_map(|c| c.iter().map(|c| c.bytes).min()).sum();
        return Err(QuantizeError::Plan {
            summary: format!(
                "{}: {:.1} MB are left for the linears, the smallest candidates need {:.1} MB",
                describe(ask),
                budget as f64 / 1e6,
                least as f64 / 1e6
            ),
            offenders: vec![],
            hint: Some("ask for more, or let embedding and head take part: --head auto --embedding auto".into()),
        });
    };
    let mut schemes = BTreeMap::new();
    let (mut used, mut kl, mut bits, mut weights) = (0, 0f64, 0f64, 0u64);
    let (mut head, mut embedding) = (options.head_w8, options.embedding_w8);
    for (curve, at) in curves.iter_mut().zip(chosen) {
        curve.chosen = Some(at);
        let Some(point) = curve.points.get(at) else { continue };
        used += point.bytes;
        kl += point.kl;
        if curve.block.is_some() {
            bits += point.bytes as f64 * 8.0;
            weights += curve.weights;
        }
        let names: Vec<&str> = point.scheme.split(" + ").collect();
        for (i, module) in curve.modules.iter().enumerate() {
            let name = names.get(i).or(names.last()).copied().unwrap_or_default();
            if name == "keep" {
                let head_module = module.ends_with("lm_head");
                (head, embedding) = (head && !head_module, embedding && head_module);
            } else if let Some(scheme) = parse_scheme(name) {
                schemes.insert(module.clone(), scheme.into());
            }
        }
    }
    let record = BudgetRecord {
        asked: describe(ask),
        budget_bytes: budget,
        used_bytes: used,
        bits_per_weight: bits / weights.max(1) as f64,
        expected_kl: kl,
        uniform,
        tokens,
        curves,
    };
    let options = QuantizeOptions { chosen: schemes, head_w8: head, embedding_w8: embedding, ..options.clone() };
    Ok((options, record))
}

/// The budget in words.
pub fn describe(ask: Ask) -> String {
    match ask {
        Ask::Bits(b) => format!("{b} bits"),
        Ask::Size(s) => format!("{:.3} GB on disk", s as f64 / 1e9),
        Ask::Fit { memory, context } => {
            format!("{:.3} GB of memory with a context of {context} tokens", memory as f64 / 1e9)
        }
    }
}

/// Bytes all units may take.
fn units_budget(ckpt: &Checkpoint, outline: &Plan, curves: &[Curve], ask: Ask) -> u64 {
    let others: u64 = outline.copies.iter().filter_map(|n| ckpt.store.find(n)).map(|t| t.data.size() as u64).sum();
    // Name, dtype, shape and place of each tensor in the headers.
    let headers = 192 * outline.declared.len() as u64;
    match ask {
        Ask::Bits(bits) => {
            let blocks: u64 = curves.iter().filter(|c| c.block.is_some()).map(|c| c.weights).sum();
            let tables = curves.iter().filter(|c| c.block.is_none());
            // Where a table's scheme is given, its bytes.
            let own = |c: &Curve| {
                let keep = c.points.iter().find(|p| p.scheme.starts_with("keep"));
                keep.or(c.points.iter().max_by_key(|p| p.bytes)).map_or(0, |p| p.bytes)
            };
            let kept: u64 = tables.map(own).sum();
            (blocks as f64 * bits / 8.0) as u64 + kept
        }
        Ask::Size(bytes) => bytes.saturating_sub(others + headers),
        Ask::Fit { memory, context } => {
            let c = &ckpt.config;
            let token = 2 * 2 * (c.num_layers * c.num_kv_heads * c.head_dim) as u64;
            (memory - memory / 10).saturating_sub(token.saturating_mul(context)).saturating_sub(others)
        }
    }
}

/// The single scheme with the least expected KL that fits; tables are kept.
fn uniform(curves: &[Curve], budget: u64) -> Option<Point> {
    let names: Vec<&String> = curves.iter().find(|c| c.block.is_some())?.points.iter().map(|p| &p.scheme).collect();
    let of = |name: &String| -> Option<Point> {
        let mut sum = Point { scheme: name.clone(), ..Point::default() };
        for c in curves {
            let wanted = if c.block.is_some() { name.as_str() } else { "keep" };
            let p =
                c.points.iter().find(|p| p.scheme == wanted || c.block.is_none() && p.scheme.starts_with("keep"))?;
            sum.bytes += p.bytes;
            sum.kl += p.kl;
        }
        (sum.bytes <= budget).then_some(sum)
    };
    names.into_iter().filter_map(of).min_by(|a, b| a.kl.total_cmp(&b.kl))
}

/// Reads `w4-g64`, `w4g64`, `w4a16-g64`, `w8-channel`, with `-asym` for a zero point.
pub fn parse_scheme(text: &str) -> Option<Scheme> {
    let text = text.trim().to_ascii_lowercase();
    let (text, symmetric) = text.strip_suffix("-asym").map_or((text.as_str(), true), |t| (t, false));
    let rest = text.strip_prefix('w')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let bits: u8 = rest.get(..digits)?.parse().ok().filter(|b| (2..=8).contains(b))?;
    let rest = rest.get(digits..)?;
    let rest = rest.strip_prefix("a16").unwrap_or(rest);
    let rest = rest.strip_prefix('-').unwrap_or(rest);
    let group = match rest {
        "channel" => GroupSize::PerChannel,
        g => GroupSize::Cols(g.strip_prefix('g')?.parse().ok().filter(|g| *g > 0)?),
    };
    Some(Scheme { bits, symmetric, group })
}

/// Bytes of the original tensor of a module.
fn dense_bytes(ckpt: &Checkpoint, module: &str) -> Result<u64> {
    Ok(ckpt.store.get(&format!("{module}.weight"))?.data.size() as u64)
}

impl Curve {
    /// Leaves only the points that give `module` a scheme of `bits`, where it is one of the unit's.
    pub fn pin(&mut self, module: &str, bits: u8) {
        if let Some(i) = self.modules.iter().position(|m| m == module) {
            let wanted = format!("w{bits}a16-");
            self.points.retain(|p| p.scheme.split(" + ").nth(i).is_some_and(|s| s.starts_with(&wanted)));
        }
    }

    /// Sorts by bytes and leaves out what costs more and gives no less loss.
    fn prune(&mut self) {
        self.points.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.kl.total_cmp(&b.kl)));
        let mut least = f64::INFINITY;
        self.points.retain(|p| {
            let better = p.kl < least;
            least = least.min(p.kl);
            better
        });
    }
}

impl BudgetRecord {
    /// Why a module got its scheme, for the plan.
    pub fn reason(&self, module: &str) -> Option<String> {
        let c = self.curves.iter().find(|c| c.modules.iter().any(|m| m == module))?;
        let at = c.chosen?;
        let p = c.points.get(at)?;
        let next = c.points.iter().filter(|q| q.bytes > p.bytes && q.kl < p.kl);
        let next = next.max_by(|a, b| {
            let gain = |q: &Point| (p.kl - q.kl) / (q.bytes - p.bytes) as f64;
            gain(a).total_cmp(&gain(b))
        });
        let next = next.map_or("nothing larger helps".to_string(), |q| {
            format!("{} would save {:.1e} for {} kB", q.scheme, p.kl - q.kl, (q.bytes - p.bytes).div_ceil(1000))
        });
        Some(format!("budget: {} of {:.1e} expected KL; {next}", percent(p.kl, self.expected_kl), self.expected_kl))
    }
}

fn percent(part: f64, whole: f64) -> String {
    format!("{:.1} %", if whole > 0.0 { 100.0 * part / whole } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheme_names_are_read_and_written_back() {
        for name in ["w4a16-g64", "w8a16-channel", "w3a16-g32-asym", "w5a16-g128"] {
            assert_eq!(parse_scheme(name).unwrap().full_name(), name);
        }
        assert_eq!(parse_scheme("w4g64"), parse_scheme("W4-g64"));
        for bad in ["w4", "w9g64", "w1g64", "4g64", "w4g0", "w4a8-g64", "w4-g", "wg64"] {
            assert_eq!(parse_scheme(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_uniform_scheme_is_the_best_that_fits() {
        let point = |scheme: &str, bytes, kl| Point { scheme: scheme.into(), bytes, kl, loss: 0.0 };
        let curve = |block, points| Curve { block, points, ..Curve::default() };
        let curves = vec![
            curve(Some(0), vec![point("a", 10, 0.3), point("b", 20, 0.1), point("c", 30, 0.0)]),
            curve(Some(1), vec![point("a", 10, 0.2), point("b", 20, 0.1)]),
            curve(None, vec![point("w4", 5, 0.5), point("keep", 50, 0.0)]),
        ];
        let best = uniform(&curves, 95).unwrap();
        assert_eq!((best.scheme.as_str(), best.bytes), ("b", 90));
        assert_eq!(uniform(&curves, 80).unwrap().scheme, "a");
        assert_eq!(uniform(&curves, 60), None);
    }
}
