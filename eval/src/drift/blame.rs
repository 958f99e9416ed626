//! Which layers the drift comes from: each swapped back to the reference's weights, one at a time.
//!
//! What a swap regains is measured on the same tokens with everything else left quantized. Gains of several swaps need not add up.

use lowbit_model::{Linear, Model, Part};
use serde::{Deserialize, Serialize};

use crate::engine::NoStore;
use crate::error::Result;
use crate::kl::{KlOptions, evaluate_kl};
use crate::record::{Interval, KlRecord};
use crate::stats::clustered_mean;
use crate::text::Source;

/// What is swapped at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// One linear.
    Linear,
    /// All linears of a block.
    Block,
}

/// One swap.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Suspect {
    /// Module, as in the checkpoint; of a block, without the linear's name.
    pub module: String,
    /// Mean KL with it swapped, nats a token.
    pub kl: f64,
    /// How much less that is, with its 95 % interval over windows.
    pub regained: Interval,
    /// Bytes it would cost to keep the reference's weights.
    pub bytes: i64,
    /// KL regained a million bytes.
    pub per_megabyte: f64,
}

/// All swaps, the most regained per byte first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Blame {
    /// What was swapped at a time.
    pub unit: Unit,
    /// Mean KL of the candidate as it is.
    pub kl: f64,
    /// Windows compared.
    pub windows: usize,
    /// Tokens a window.
    pub window: usize,
    /// Ranked.
    pub suspects: Vec<Suspect>,
}

/// Swaps each part of `candidate` for that of `donor`, a second copy of `reference`, and back again; parts the donor stores in no more
/// bytes are taken for unquantized and left out. `progress` hears of swaps done and their number.
#[expect(clippy::too_many_arguments, reason = "three models, a text and how to read it")]
pub fn blame(
    candidate: &mut Model,
    donor: &mut Model,
    reference: &Model,
    ids: &[u32],
    source: &Source,
    options: &KlOptions,
    unit: Unit,
    progress: &dyn Fn(usize, usize),
) -> Result<Blame> {
    let measure =
        |m: &Model| -> Result<KlRecord> { evaluate_kl(m, reference, ids, source, options, &mut NoStore, &|_, _| ()) };
    let whole = measure(candidate)?;
    let parts: Vec<(Part, String, i64)> = parts(candidate, donor, unit);
    progress(0, parts.len());
    let mut suspects = Vec::with_capacity(parts.len());
    for (done, (part, module, bytes)) in parts.iter().enumerate() {
        candidate.swap(donor, *part)?;
        let swapped = measure(candidate);
        // Back again, whether or not that went well.
        candidate.swap(donor, *part)?;
        let swapped = swapped?;
        let gains: Vec<f64> = whole.window_means.iter().zip(&swapped.window_means).map(|(a, b)| a - b).collect();
        let regained = clustered_mean(&gains, &vec![1.0; gains.len()]);
        suspects.push(Suspect {
            module: module.clone(),
            kl: swapped.mean,
            regained,
            bytes: *bytes,
            per_megabyte: regained.value / (*bytes as f64 / 1e6),
        });
        progress(done + 1, parts.len());
    }
    suspects.sort_by(|a, b| b.per_megabyte.total_cmp(&a.per_megabyte).then(a.module.cmp(&b.module)));
    Ok(Blame { unit, kl: whole.mean, windows: whole.windows, window: whole.window, suspects })
}

/// Parts whose storage differs, with module and bytes more in the donor.
fn parts(candidate: &Model, donor: &Model, unit: Unit) -> Vec<(Part, String, i64)> {
    let mut out = Vec::new();
    for (block, (own, theirs)) in candidate.blocks().iter().zip(donor.blocks()).enumerate() {
        let more = |i: usize| -> i64 {
            let bytes = |l: Option<&Linear>| l.map_or(0, |l| l.weight.stored_bytes as i64);
            bytes(theirs.linears.get(i)) - bytes(own.linears.get(i))
        };
        match unit {
            Unit::Linear => out.extend(
                own.linears
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| more(*i) > 0)
                    .map(|(i, l)| (Part::Linear { block, linear: i }, l.module.clone(), more(i))),
            ),
            Unit::Block => {
                let bytes: i64 = (0..own.linears.len()).map(more).sum();
                let name = own.linears.first().map_or(String::new(), |l| {
                    // `model.layers.3.self_attn.q_proj` without its last two parts.
                    l.module.rsplitn(3, '.').last().unwrap_or_default().to_owned()
                });
                if bytes > 0 {
                    out.push((Part::Block(block), name, bytes));
                }
            }
        }
    }
    out
}
