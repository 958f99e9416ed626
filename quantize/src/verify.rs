//! `lowbit verify`: re-opens an artefact and checks every tensor against its config, its record, and (when at hand) the original.

use std::collections::BTreeSet;

use lowbit_checkpoint::{Checkpoint, linear};
use lowbit_kernels::backend::HostWeight;
use lowbit_model::block::matrices;
use lowbit_model::decoder;
use serde::Serialize;

use crate::error::{QuantizeError, Result};
use crate::record::QuantizeRecord;

/// What was checked.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verified {
    /// Packed linears whose codes, scales and shapes are in range.
    pub packed_linears: usize,
    /// Dense linears.
    pub dense_linears: usize,
    /// Other float tensors, all finite.
    pub float_tensors: usize,
    /// Tensors compared bit for bit with the original.
    pub compared_with_original: usize,
}

/// Checks `ckpt`; all problems are collected before failing.
pub fn verify(ckpt: &Checkpoint, record: Option<&QuantizeRecord>, original: Option<&Checkpoint>) -> Result<Verified> {
    let mut done = Verified::default();
    let mut problems = Vec::new();
    let c = &ckpt.config;
    let prefix = decoder::prefix(ckpt)?;
    let mut modules = matrices(c, prefix);
    if !c.tie_word_embeddings {
        modules.push((decoder::head(prefix).into(), c.vocab_size, c.hidden_size));
    }
    // Where codes of a byte have the name of the floats that they replace.
    let mut replaced = BTreeSet::new();
    for (module, out, n) in &modules {
        match ckpt.linear(module, *out, *n) {
            Err(e) => problems.push(e.to_string()),
            Ok(HostWeight::Dense { .. }) => done.dense_linears += 1,
            Ok(w @ (HostWeight::Packed(_) | HostWeight::Float(_))) => {
                replaced.insert(format!("{module}.weight"));
                let checked = match &w {
                    HostWeight::Packed(p) => linear::unpack(p).map(|_| ()),
                    HostWeight::Float(f) => f.validate(),
                    HostWeight::Dense { .. } => Ok(()),
                };
                match checked {
                    Ok(()) => done.packed_linears += 1,
                    Err(e) => problems.push(format!("`{module}`: {e}")),
                }
                if let Err(e) = ckpt.input_rule(module) {
                    problems.push(e.to_string());
                }
                let scheme = ckpt.scheme_of(module, &w).map_or_else(String::new, |s| s.full_name());
                let noted = record.and_then(|r| r.layers.iter().find(|l| l.name == *module));
                match (record.is_some(), noted) {
                    (true, None) => problems.push(format!("`{module}` is packed but quantize.json does not list it")),
                    (_, Some(l)) if l.scheme != scheme => {
                        problems.push(format!("`{module}`: quantize.json says {}, config.json {scheme}", l.scheme))
                    }
                    _ => {}
                }
            }
        }
    }
    for i in 0..c.num_layers {
        if let Err(e) = ckpt.kv_rules(&format!("{prefix}.layers.{i}.self_attn")) {
            problems.push(e.to_string());
        }
    }
    for (name, t) in ckpt.store.iter() {
        if let Some(v) = t.to_f32() {
            match v.iter().position(|x| !x.is_finite()) {
                Some(i) => problems.push(format!("`{name}`: {} at element {i}", v[i])),
                None => done.float_tensors += 1,
            }
        }
        let rewritten =
            |r: &QuantizeRecord| r.transforms.as_ref().is_some_and(|t| t.rewritten.iter().any(|n| n == name));
        let changed = replaced.contains(name) || record.is_some_and(rewritten);
        if let Some(o) = original.and_then(|o| o.store.find(name)).filter(|_| !changed) {
            if o.dtype != t.dtype || o.shape != t.shape || o.data.as_slice() != t.data.as_slice() {
                problems.push(format!("`{name}` should be the original's bits and is not"));
            } else {
                done.compared_with_original += 1;
            }
        }
    }
    if let Some(r) = record {
        for l in &r.layers {
            if !modules.iter().any(|(m, ..)| *m == l.name) {
                problems.push(format!("quantize.json lists `{}`, which the model does not have", l.name));
            }
        }
    }
    if problems.is_empty() {
        Ok(done)
    } else {
        Err(QuantizeError::Verify { dir: ckpt.dir.display().to_string(), problems })
    }
}
