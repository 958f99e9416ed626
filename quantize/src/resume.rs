//! Going on with an unfinished quantization: which blocks are solved, and under what key.
//!
//! A block's result is determined by the model, the options, the calibration tokens, the backend's arithmetic, the program, and
//! the block before it. The first five make the first block's key; the key of each later one is hashed from the key and the
//! tensors of the block before, so the first block that does not fit ends what is taken over.
//!
//! Beside its tensors a block has its layer records, how it was transformed, and how many tokens its experts saw.
//!
//! Of a GGUF file nothing is kept: it starts over.

use lowbit_calibration::Windows;
use lowbit_checkpoint::hash::sha256_hex;
use lowbit_checkpoint::linear;
use lowbit_checkpoint::writer::{CheckpointWriter, Kept};
use serde_json::{Map, Value, json};

use crate::driver::Progress;
use crate::error::{QuantizeError, Result};
use crate::plan::{Plan, PlannedLinear, QuantizeOptions};
use crate::record::{ExpertCoverage, LayerRecord};
use crate::transform::BlockFold;

/// How a run meets what an earlier one left.
#[derive(Clone, Debug)]
pub struct Resume {
    /// All that determines the result beside the plan and the calibration tokens: the model's hash, the program, the arithmetic.
    pub identity: String,
    /// Start over.
    pub fresh: bool,
}

/// Whether solved blocks are kept: not of a GGUF file.
pub fn keeps_blocks(options: &QuantizeOptions) -> bool {
    options.gguf.is_none()
}

/// What an earlier run left of its solved blocks, beside their tensors.
#[derive(Default)]
pub(crate) struct Taken {
    /// How each block was transformed.
    pub(crate) folds: Vec<BlockFold>,
    /// The records of all their linears.
    pub(crate) layers: Vec<LayerRecord>,
    /// Of blocks whose experts were calibrated.
    pub(crate) experts: Vec<ExpertCoverage>,
}

/// The chain of keys.
pub(crate) struct Chain {
    /// Of the next block; `None` where nothing is kept.
    key: Option<String>,
}

impl Chain {
    /// The first block's key.
    pub(crate) fn start(resume: &Resume, plan: &Plan, windows: Option<&Windows>) -> Self {
        if !keeps_blocks(&plan.options) {
            return Self { key: None };
        }
        let mut options = plan.options.to_map();
        // These change no code: strictness is checked again, and the writer looks at the layout of the shards itself.
        options.retain(|k, _| !matches!(k.as_str(), "strict" | "shard_bytes"));
        let linears: Vec<Value> = plan.linears.iter().map(|l| json!([l.module, l.source, l.scheme_name()])).collect();
        let all = json!({
            "identity": resume.identity, "options": options, "linears": linears,
            "windows": windows.map(|w| w.sha256.as_str()),
        });
        Self { key: Some(sha256_hex(all.to_string().as_bytes())) }
    }

    /// The key of the next block; `None` where nothing is kept.
    pub(crate) fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Goes on to the block after one with these tensors, which was kept under `key`.
    fn push(&mut self, key: &str, digest: &str) {
        self.key = Some(sha256_hex(format!("{key}\n{digest}").as_bytes()));
    }

    /// Keeps a solved block, with how it was transformed and what its experts saw, where that is so.
    pub(crate) fn keep(
        &mut self,
        writer: &mut CheckpointWriter,
        plan: &Plan,
        block: usize,
        records: &[LayerRecord],
        fold: Option<&BlockFold>,
        experts: Option<&ExpertCoverage>,
    ) -> Result<()> {
        let Some(key) = self.key.clone() else { return Ok(()) };
        let mut notes = Vec::with_capacity(records.len());
        for r in records {
            // A record is plain data; it cannot fail to become JSON.
            notes.push(exact(serde_json::to_value(r).unwrap_or_default()));
        }
        let names = tensors_of(plan, block)?;
        let mut note = Map::from_iter([("layers".to_string(), Value::Array(notes))]);
        if let Some(fold) = fold {
            note.insert("fold".into(), exact(serde_json::to_value(fold).unwrap_or_default()));
        }
        if let Some(experts) = experts {
            note.insert("experts".into(), exact(serde_json::to_value(experts).unwrap_or_default()));
        }
        let digest = writer.keep(&unit(block), &key, &names, &Value::Object(note))?;
        self.push(&key, &digest);
        Ok(())
    }

    /// Takes over solved blocks from the first on, until one is missing or unusable; the latter is said.
    pub(crate) fn take(
        &mut self,
        writer: &mut CheckpointWriter,
        plan: &Plan,
        blocks: usize,
        progress: &dyn Progress,
    ) -> Result<Taken> {
        if writer.replaced_unfinished() {
            progress.say("note: an unfinished output of another model, other options or another program was there: starting over");
        }
        let mut taken = Taken::default();
        for block in 0..blocks {
            let Some(key) = self.key.clone() else { break };
            let names = tensors_of(plan, block)?;
            match writer.kept(&unit(block), &key, &names)? {
                Kept::Nothing => break,
                Kept::Unusable(why) => {
                    progress.say(&format!("note: block {block} is solved anew: {why}"));
                    break;
                }
                Kept::Whole { note, digest } => {
                    let Some((fold, records, experts)) = read_note(note) else {
                        progress.say(&format!("note: block {block} is solved anew: its records cannot be read"));
                        break;
                    };
                    if let Some((r, event)) =
                        records.iter().find_map(|r| Some((r, r.events.first()?))).filter(|_| plan.options.strict)
                    {
                        return Err(QuantizeError::Strict { module: r.name.clone(), event: event.clone() });
                    }
                    taken.folds.push(fold);
                    taken.layers.extend(records);
                    taken.experts.extend(experts);
                    self.push(&key, &digest);
                }
            }
        }
        Ok(taken)
    }
}

/// What [`Chain::keep`] noted: how the block was changed, records, and what its experts saw.
fn read_note(note: Value) -> Option<(BlockFold, Vec<LayerRecord>, Option<ExpertCoverage>)> {
    let Value::Object(mut note) = inexact(note) else { return None };
    let layers = serde_json::from_value(note.remove("layers")?).ok()?;
    let fold = note.remove("fold").map(serde_json::from_value::<BlockFold>).transpose().ok()?;
    let experts = note.remove("experts").map(serde_json::from_value::<ExpertCoverage>).transpose().ok()?;
    Some((fold.unwrap_or_default(), layers, experts))
}

fn unit(block: usize) -> String {
    format!("block-{block:05}")
}

/// Planned linears of a block.
pub(crate) fn linears_of(plan: &Plan, block: usize) -> impl Iterator<Item = &PlannedLinear> {
    plan.linears.iter().filter(move |l| l.block == Some(block))
}

/// Names of the tensors that a solved block has: its linears, the scales of its keys and values, and what transforms rewrite.
fn tensors_of(plan: &Plan, block: usize) -> Result<Vec<String>> {
    let mut names = plan.kv_scales(block);
    names.extend(plan.rewritten_in(Some(block)).cloned());
    for l in linears_of(plan, block) {
        let declared = linear::declare(&l.module, l.scheme, plan.layout, l.out_features, l.in_features)
            .map_err(|source| QuantizeError::Kernel { module: l.module.clone(), source })?;
        names.extend(declared.into_iter().map(|d| d.name));
    }
    Ok(names)
}

/// Floats as text: the JSON reader may miss a float's last bit, and a resumed run's record is to equal an uninterrupted one's.
pub fn exact(v: Value) -> Value {
    match v {
        Value::Number(n) if n.is_f64() => json!({"f64": format!("{:?}", n.as_f64().unwrap_or(f64::NAN))}),
        Value::Array(a) => a.into_iter().map(exact).collect(),
        Value::Object(o) => Value::Object(o.into_iter().map(|(k, v)| (k, exact(v))).collect()),
        other => other,
    }
}

/// Undoes [`exact`].
pub fn inexact(v: Value) -> Value {
    match v {
        Value::Array(a) => a.into_iter().map(inexact).collect(),
        Value::Object(o) => match o.get("f64").and_then(Value::as_str).and_then(|t| t.parse::<f64>().ok()) {
            Some(f) => json!(f),
            None => Value::Object(o.into_iter().map(|(k, v)| (k, inexact(v))).collect()),
        },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_bit_for_bit() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            f64::from_bits((state >> 12) | 0x3f50_0000_0000_0000)
        };
        let records: Vec<LayerRecord> = (0..200)
            .map(|i| LayerRecord {
                name: format!("l{i}"),
                proxy_loss: next(),
                relative_error: next() * 1e-30,
                damp_frac: next() * 1e9,
                input_abs_max: next() as f32,
                seconds: f64::from(i),
                events: vec!["retry".into()],
                ..LayerRecord::default()
            })
            .collect();
        let text = exact(serde_json::to_value(&records).unwrap()).to_string();
        let back: Vec<LayerRecord> = serde_json::from_value(inexact(serde_json::from_str(&text).unwrap())).unwrap();
        for (a, b) in records.iter().zip(&back) {
            assert_eq!(serde_json::to_string(a).unwrap(), serde_json::to_string(b).unwrap());
            assert_eq!(
                (a.proxy_loss.to_bits(), a.input_abs_max.to_bits()),
                (b.proxy_loss.to_bits(), b.input_abs_max.to_bits())
            );
        }
    }
}
