//! Writing GGUF files: the header with metadata and places, exact before the first tensor is written.
//!
//! Version 3, little-endian, alignment 32. Tensors are given under their Hugging Face names and in their row order;
//! [`FileLayout::bytes`] makes of them what llama.cpp's graphs expect: vectors in f32, norms of Gemma plus one, rows of q and k
//! interleaved where the rotary embedding pairs neighbours.

use std::collections::BTreeMap;
use std::path::Path;

use lowbit_kernels::ggml::GgmlType;
use serde_json::Value;

use super::metadata::{self, Meta};
use super::tensors::{self, Fixup};
use super::{Family, vocabulary};
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};
use crate::store::StoredTensor;

/// File name inside a checkpoint folder.
pub const FILE: &str = "model.gguf";

const ALIGNMENT: u64 = 32;

/// One tensor of the file.
#[derive(Clone, Debug)]
pub struct Place {
    /// ggml's name.
    pub name: String,
    /// `[rows, cols]` or `[n]`.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub kind: GgmlType,
    fixup: Fixup,
    /// From the beginning of the tensors.
    offset: u64,
    bytes: u64,
}

/// A file to come.
#[derive(Clone, Debug, Default)]
pub struct FileLayout {
    header: Vec<u8>,
    /// By Hugging Face name.
    places: BTreeMap<String, Place>,
    /// Tensors that are made, not copied: ggml name and data.
    made: Option<(Place, Vec<u8>)>,
    total: u64,
}

/// A tensor to place: Hugging Face name, shape and type.
pub struct Wanted {
    /// Hugging Face name.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// How it is stored; [`dense_type`] for what is not quantized.
    pub kind: GgmlType,
}

/// Whether a model can be written, and what its tensors are called.
pub struct Names {
    family: Family,
    /// Hugging Face name → (ggml name, suffix that decides how rows are arranged).
    names: BTreeMap<String, (String, &'static str)>,
}

impl Names {
    /// Refuses, by name, what llama.cpp's graph of the architecture would not compute.
    pub fn new(config: &ModelConfig, file: &Path, has_bias: bool) -> Result<Self> {
        let family = metadata::family(config, file)?;
        let mut names = BTreeMap::new();
        names.insert("model.embed_tokens.weight".to_string(), ("token_embd.weight".to_string(), "token_embd.weight"));
        for layer in 0..config.num_layers {
            for (gguf, hf) in tensors::block_names(family, has_bias) {
                names.insert(format!("model.layers.{layer}.{hf}"), (format!("blk.{layer}.{gguf}"), gguf));
            }
        }
        names.insert("model.norm.weight".into(), ("output_norm.weight".into(), "output_norm.weight"));
        names.insert("lm_head.weight".into(), ("output.weight".into(), "output.weight"));
        Ok(Self { family, names })
    }

    /// Whether the tensor has a place in the file.
    pub fn has(&self, hf: &str) -> bool {
        self.names.contains_key(hf)
    }

    /// Whether the tensor may be left out: buffers that old checkpoints carry and every loader computes.
    pub fn may_drop(hf: &str) -> bool {
        hf.ends_with(".rotary_emb.inv_freq")
    }
}

/// The type a float tensor is stored as: vectors in f32, as ggml's operations ask for; matrices as they are.
pub fn dense_type(t: &StoredTensor) -> Option<GgmlType> {
    use lowbit_kernels::backend::FloatType;
    let float = t.float_type()?;
    Some(match float {
        _ if t.shape.len() == 1 => GgmlType::F32,
        FloatType::F32 => GgmlType::F32,
        FloatType::F16 => GgmlType::F16,
        FloatType::Bf16 => GgmlType::Bf16,
    })
}

impl FileLayout {
    /// Lays out a file for the checkpoint in `dir`. `file_type` is ggml's number for what most weights are.
    pub fn new(
        dir: &Path,
        config: &ModelConfig,
        raw: &Value,
        names: &Names,
        wanted: &[Wanted],
        most: GgmlType,
    ) -> Result<Self> {
        let mut meta = metadata::model(config, dir, names.family, most)?;
        meta.extend(vocabulary::metadata(dir, raw, config.vocab_size)?);
        let mut places = BTreeMap::new();
        let mut order = Vec::new();
        let mut at = 0u64;
        let mut place = |name: &str, shape: &[usize], kind: GgmlType, fixup: Fixup| -> Result<Place> {
            let (cols, rows) = match shape {
                [rows, cols] => (*cols, *rows),
                [n] => (*n, 1),
                other => return Err(CheckpointError::invalid(dir, format!("`{name}` has the shape {other:?}"))),
            };
            let kernel = |source| CheckpointError::Kernel { dir: dir.to_path_buf(), tensor: name.to_string(), source };
            let bytes = kind.bytes(rows, cols).map_err(kernel)? as u64;
            let place = Place { name: name.into(), shape: shape.to_vec(), kind, fixup, offset: at, bytes };
            at = (at + bytes).next_multiple_of(ALIGNMENT);
            order.push(place.clone());
            Ok(place)
        };
        for w in wanted {
            let (name, suffix) = names.names.get(&w.name).ok_or_else(|| CheckpointError::Unsupported {
                what: format!("{}: tensor `{}` has no place in a GGUF of this architecture", dir.display(), w.name),
                hint: Some("--format compressed-tensors carries every tensor".into()),
            })?;
            let fixup = tensors::fixup(suffix, names.family, config.num_heads, config.num_kv_heads);
            places.insert(w.name.clone(), place(name, &w.shape, w.kind, fixup)?);
        }
        let made = match metadata::rope_factors(config) {
            Some(f) => {
                let data = f.iter().flat_map(|v| v.to_le_bytes()).collect();
                Some((place(tensors::ROPE_FACTORS, &[f.len()], GgmlType::F32, Fixup::None)?, data))
            }
            None => None,
        };
        let header = header(&meta, &order);
        Ok(Self { header, places, made, total: at })
    }

    /// The header.
    pub(crate) fn header(&self) -> &[u8] {
        &self.header
    }

    /// Every tensor's name, place in the file and bytes.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        let base = self.header.len() as u64;
        self.places.iter().map(move |(hf, p)| (hf.as_str(), base + p.offset, p.bytes))
    }

    /// Size of the file.
    pub(crate) fn end(&self) -> u64 {
        self.header.len() as u64 + self.total
    }

    /// A tensor that does not come from the checkpoint: its place in the file and its data.
    pub(crate) fn made(&self) -> Option<(u64, &[u8])> {
        self.made.as_ref().map(|(p, data)| (self.header.len() as u64 + p.offset, data.as_slice()))
    }

    /// The place of a tensor.
    pub fn place(&self, hf: &str) -> Option<&Place> {
        self.places.get(hf)
    }

    /// Bytes of a tensor's data.
    pub fn tensor_bytes(&self, hf: &str) -> u64 {
        self.places.get(hf).map_or(0, |p| p.bytes)
    }

    /// Bytes of the file that are not a copied or quantized tensor's: header, padding, rotary factors.
    pub fn other_bytes(&self) -> u64 {
        self.header.len() as u64 + self.total - self.places.values().map(|p| p.bytes).sum::<u64>()
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.total
    }

    /// Blocks of a matrix in the checkpoint's row order → in the file's.
    pub fn arrange(&self, hf: &str, data: Vec<u8>) -> Result<Vec<u8>> {
        let missing = || CheckpointError::invalid(Path::new(FILE), format!("no place for `{hf}`"));
        let place = self.places.get(hf).ok_or_else(missing)?;
        match place.fixup {
            Fixup::Rotary { heads } => {
                let rows = place.shape.first().copied().unwrap_or(0);
                let from = tensors::rotary_rows(rows, heads, data.len()).ok_or_else(|| {
                    CheckpointError::invalid(Path::new(FILE), format!("`{hf}` does not split into {heads} heads"))
                })?;
                let width = data.len() / rows;
                let mut out = vec![0u8; data.len()];
                for (row, to) in from.enumerate() {
                    if let (Some(to), Some(row)) = (out.get_mut(to), data.get(row * width..(row + 1) * width)) {
                        to.copy_from_slice(row);
                    }
                }
                Ok(out)
            }
            _ => Ok(data),
        }
    }

    /// A float tensor of the checkpoint as the file holds it.
    pub fn bytes(&self, hf: &str, t: &StoredTensor) -> Result<Vec<u8>> {
        let Some(place) = self.places.get(hf) else { return self.arrange(hf, Vec::new()) };
        if t.shape.len() > 1 {
            return self.arrange(hf, t.data.as_slice().to_vec());
        }
        let shift = if place.fixup == Fixup::MinusOne { 1.0 } else { 0.0 };
        let values = t.to_f32().ok_or_else(|| {
            CheckpointError::invalid(Path::new(FILE), format!("`{hf}`: expected floats, found {:?}", t.dtype))
        })?;
        self.arrange(hf, values.iter().flat_map(|v| (v + shift).to_le_bytes()).collect())
    }
}

fn string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn header(meta: &[(String, Meta)], tensors: &[Place]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((meta.len() as u64).to_le_bytes());
    for (key, value) in meta {
        string(&mut out, key);
        out.extend(value.kind().to_le_bytes());
        value.write(&mut out);
    }
    for t in tensors {
        string(&mut out, &t.name);
        out.extend((t.shape.len() as u32).to_le_bytes());
        // ggml counts dimensions from the innermost.
        t.shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        out.extend(t.kind.id().to_le_bytes());
        out.extend(t.offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

impl Meta {
    fn kind(&self) -> u32 {
        match self {
            Meta::U32(_) => 4,
            Meta::F32(_) => 6,
            Meta::Bool(_) => 7,
            Meta::String(_) => 8,
            Meta::Strings(_) | Meta::Floats(_) | Meta::Ints(_) => 9,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let list = |out: &mut Vec<u8>, kind: u32, count: usize| {
            out.extend(kind.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        };
        match self {
            Meta::U32(v) => out.extend(v.to_le_bytes()),
            Meta::F32(v) => out.extend(v.to_le_bytes()),
            Meta::Bool(v) => out.push(u8::from(*v)),
            Meta::String(s) => string(out, s),
            Meta::Strings(v) => {
                list(out, 8, v.len());
                v.iter().for_each(|s| string(out, s));
            }
            Meta::Floats(v) => {
                list(out, 6, v.len());
                v.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
            Meta::Ints(v) => {
                list(out, 5, v.len());
                v.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }
        }
    }
}
