//! Re-opens a GGUF file and checks every tensor against its record and, when at hand, the original.

use std::path::Path;

use lowbit_checkpoint::gguf::GgufModel;
use lowbit_checkpoint::gguf::write::dense_type;
use lowbit_checkpoint::{Checkpoint, CheckpointError};
use lowbit_kernels::ggml;

use super::scheme_name;
use crate::error::{QuantizeError, Result};
use crate::record::QuantizeRecord;
use crate::verify::Verified;

/// Checks the file; all problems are collected before failing.
pub fn verify(file: &Path, record: Option<&QuantizeRecord>, original: Option<&Checkpoint>) -> Result<Verified> {
    let mut model = GgufModel::open(file)?;
    // What cannot be made into a checkpoint again is a problem of its own.
    model.config_json()?;
    model.tokenizer_files()?;
    let mut done = Verified::default();
    let mut problems = Vec::new();
    for (name, shape) in model.tensor_names() {
        let (kind, data) = match model.stored(&name) {
            Ok(found) => found,
            // A type that is only read: the decoder says whether its blocks are sound.
            Err(CheckpointError::Unsupported { .. }) => {
                match model.read_bf16(&name) {
                    Ok(_) => done.packed_linears += 1,
                    Err(e) => problems.push(e.to_string()),
                }
                continue;
            }
            Err(e) => {
                problems.push(e.to_string());
                continue;
            }
        };
        let (cols, rows) = (shape.last().copied().unwrap_or(0), if shape.len() == 2 { shape[0] } else { 1 });
        match ggml::decode(kind, &data, rows, cols) {
            Err(e) => problems.push(format!("`{name}`: {e}")),
            Ok(v) => {
                if let Some(i) = v.iter().position(|x| !x.is_finite()) {
                    problems.push(format!("`{name}`: {} at element {i}", v[i]));
                }
            }
        }
        let module = name.strip_suffix(".weight").unwrap_or(&name);
        let noted = record.and_then(|r| r.layers.iter().find(|l| l.name == module));
        let packed = kind.block().0 > 1;
        match (packed, noted, record) {
            (true, Some(l), _) if l.scheme != scheme_name(kind) => {
                problems.push(format!("`{name}`: quantize.json says {}, the file {}", l.scheme, kind.name()))
            }
            (true, None, Some(_)) => problems.push(format!("`{name}` is quantized but quantize.json does not list it")),
            (false, Some(_), _) => problems.push(format!("`{name}` is listed in quantize.json and not quantized")),
            _ => {}
        }
        match (packed, shape.len()) {
            (true, _) => done.packed_linears += 1,
            (false, 2) => done.dense_linears += 1,
            _ => done.float_tensors += 1,
        }
        if let Some(o) = original.and_then(|o| o.store.find(&name)).filter(|_| !packed) {
            // Gemma's norms are stored plus one, which rounds the smallest of them.
            let shift = original.map_or(0.0, |o| o.config.norm_offset);
            let close = |v: Vec<f32>, f: Vec<f32>| v.iter().zip(&f).all(|(v, f)| v == f || (v + shift) - shift == *f);
            let same = match (shape.len(), dense_type(o)) {
                (2, Some(k)) => k == kind && o.data.as_slice() == data,
                _ => o.to_f32().is_some_and(|v| ggml::decode(kind, &data, 1, cols).is_ok_and(|f| close(v, f))),
            };
            match same && o.shape == shape {
                true => done.compared_with_original += 1,
                false => problems.push(format!("`{name}` should be the original's values and is not")),
            }
        }
    }
    for l in record.iter().flat_map(|r| &r.layers) {
        if !model.tensor_names().iter().any(|(n, _)| n.strip_suffix(".weight") == Some(l.name.as_str())) {
            problems.push(format!("quantize.json lists `{}`, which the file does not have", l.name));
        }
    }
    match problems.is_empty() {
        true => Ok(done),
        false => Err(QuantizeError::Verify { dir: file.display().to_string(), problems }),
    }
}
