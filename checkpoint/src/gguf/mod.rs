//! GGUF files. Import: tensors, configuration and tokenizer as a Hugging Face
//! directory would hold them. Export: [`mod@write`].
//!
//! [`GgufModel::open`] checks the whole header and every tensor's place in the file
//! before anything is decoded, so that a truncated or hostile file is an error. Tensors
//! are then decoded one at a time.

mod config;
mod metadata;
mod tensors;
mod tokenizer;
mod vocabulary;
pub mod write;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use half::bf16;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::{QuantizedMatrix, Scheme};

use crate::error::{CheckpointError, Result};
use tensors::{Entry, Fixup};

/// An opened GGUF file whose header, tensor table and architecture were validated.
#[derive(Debug)]
pub struct GgufModel {
    file: File,
    content: Content,
    meta: Metadata,
    family: Family,
    shape: config::Shape,
    entries: Vec<Entry>,
    /// Position of a Hugging Face name in `entries`.
    index: HashMap<String, usize>,
}

impl GgufModel {
    /// Opens and validates `path`.
    ///
    /// # Errors
    /// When the file cannot be read, is not a well-formed GGUF (version 2 or 3), lacks a
    /// tensor or a field, or holds an architecture or tensor type that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| CheckpointError::Io { file: path.to_path_buf(), source };
        let file = crate::files::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        tensors::check_header(&mut BufReader::new(&file), length, path)?;
        (&file).rewind().map_err(io)?;
        let mut content = Content::read(&mut BufReader::new(&file)).map_err(|e| decode_error(path, &e))?;
        tensors::check_places(&content, length, path)?;
        let meta = Metadata { file: path.to_path_buf(), map: std::mem::take(&mut content.metadata) };
        let family = Family::parse(meta.str("general.architecture")?)?;
        let shape = config::Shape::read(&meta, family, &content)?;
        let entries = tensors::table(&content, family, &shape, path)?;
        let index = entries.iter().enumerate().map(|(i, e)| (e.hf.clone(), i)).collect();
        Ok(Self { file, content, meta, family, shape, entries, index })
    }

    /// The architecture as the file names it, such as `llama`.
    pub fn architecture(&self) -> &str {
        self.family.gguf_name()
    }

    /// The contents of `config.json`.
    ///
    /// # Errors
    /// When a field is missing or malformed, or the file uses a rotary scaling that
    /// cannot be expressed.
    pub fn config_json(&self) -> Result<serde_json::Value> {
        let factors = self.rope_factors()?;
        config::config_json(&self.meta, self.family, &self.shape, self.tied(), factors.as_deref())
    }

    /// `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and, when the
    /// file carries a template, `chat_template.jinja`.
    ///
    /// # Errors
    /// When the tokenizer metadata is missing, malformed or of an unsupported kind.
    pub fn tokenizer_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = tokenizer::files(&self.meta, self.shape.context)?;
        files.push((
            "generation_config.json".to_string(),
            tokenizer::pretty(&config::generation_json(&self.meta)?, &self.meta.file)?,
        ));
        Ok(files)
    }

    /// Hugging Face name and shape of every tensor, in output order.
    pub fn tensor_names(&self) -> Vec<(String, Vec<usize>)> {
        self.entries.iter().map(|e| (e.hf.clone(), e.shape.clone())).collect()
    }

    /// Fewest bits of a quantized tensor, by its type (`Q4_K`: 4); none where all are floats.
    pub fn bits(&self) -> Option<u32> {
        use candle_core::quantized::GgmlDType as Type;
        let bits = |kind: Type| match kind {
            Type::F32 | Type::F16 | Type::BF16 => None,
            Type::Q2K => Some(2),
            Type::Q3K => Some(3),
            Type::Q4_0 | Type::Q4_1 | Type::Q4K => Some(4),
            Type::Q5_0 | Type::Q5_1 | Type::Q5K => Some(5),
            Type::Q6K => Some(6),
            Type::Q8_0 | Type::Q8_1 | Type::Q8K => Some(8),
        };
        self.content.tensor_infos.values().filter_map(|t| bits(t.ggml_dtype)).min()
    }

    /// Decodes one tensor into little-endian bf16 bytes (round to nearest, ties to even).
    ///
    /// # Errors
    /// When there is no such tensor or it cannot be read or decoded.
    pub fn read_bf16(&mut self, hf_name: &str) -> Result<Vec<u8>> {
        let entry = self.index.get(hf_name).and_then(|&i| self.entries.get(i));
        let Some(entry) = entry else {
            return Err(invalid(&self.meta.file, format!("no tensor '{hf_name}'")));
        };
        let values = self.decode(&entry.gguf)?;
        let mut bytes = Vec::with_capacity(values.len().saturating_mul(2));
        let mut put = |x: f32| bytes.extend_from_slice(&bf16::from_f32(x).to_le_bytes());
        match entry.fixup {
            Fixup::None => values.iter().for_each(|&x| put(x)),
            Fixup::MinusOne => values.iter().for_each(|&x| put(x - 1.0)),
            Fixup::Rotary { heads } => {
                let rows = entry.shape.first().copied().unwrap_or(0);
                tensors::rotary_rows(rows, heads, values.len())
                    .ok_or_else(|| invalid(&self.meta.file, format!("'{hf_name}' does not split into {heads} heads")))?
                    .for_each(|range| values.get(range).unwrap_or_default().iter().for_each(|&x| put(x)));
            }
        }
        if bytes.len() != values.len().saturating_mul(2) {
            return Err(invalid(&self.meta.file, format!("'{hf_name}' has an unexpected size")));
        }
        Ok(bytes)
    }

    /// How a tensor is stored, and its data with the rows in the checkpoint's order. Gemma's norms lose the one that was added.
    ///
    /// # Errors
    /// When there is no such tensor, it cannot be read, or its type is one that [`lowbit_kernels::ggml`] does not decode.
    pub fn stored(&self, hf_name: &str) -> Result<(GgmlType, Vec<u8>)> {
        let missing = || invalid(&self.meta.file, format!("no tensor '{hf_name}'"));
        let entry = self.index.get(hf_name).and_then(|&i| self.entries.get(i)).ok_or_else(missing)?;
        let info = self.content.tensor_infos.get(&entry.gguf).ok_or_else(missing)?;
        let kind = tensors::kind(info.ggml_dtype).ok_or_else(|| CheckpointError::Unsupported {
            what: format!("tensor '{}' of type {:?}", entry.gguf, info.ggml_dtype),
            hint: Some("`lowbit convert FILE.gguf -o DIR` decodes it to bf16".to_string()),
        })?;
        let (block, bytes) = kind.block();
        let mut data = vec![0u8; info.shape.elem_count() / block * bytes];
        let io = |source| CheckpointError::Io { file: self.meta.file.clone(), source };
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.content.tensor_data_offset + info.offset)).map_err(io)?;
        file.read_exact(&mut data).map_err(io)?;
        match entry.fixup {
            Fixup::None => Ok((kind, data)),
            Fixup::MinusOne => {
                let values = lowbit_kernels::ggml::decode(kind, &data, 1, info.shape.elem_count());
                let values = values.map_err(|e| invalid(&self.meta.file, format!("tensor '{}': {e}", entry.gguf)))?;
                Ok((GgmlType::F32, values.iter().flat_map(|v| (v - 1.0).to_le_bytes()).collect()))
            }
            Fixup::Rotary { heads } => {
                let rows = entry.shape.first().copied().unwrap_or(0);
                let from = tensors::rotary_rows(rows, heads, data.len()).ok_or_else(|| {
                    invalid(&self.meta.file, format!("'{hf_name}' does not split into {heads} heads"))
                })?;
                Ok((kind, from.flat_map(|range| data.get(range).unwrap_or_default()).copied().collect()))
            }
        }
    }

    /// The codes and scales of a block's linear whose type is an integer scheme; `None` for vectors, tables and other types.
    ///
    /// # Errors
    /// As [`Self::stored`].
    pub fn packed(&self, hf_name: &str) -> Result<Option<QuantizedMatrix>> {
        let entry = self.index.get(hf_name).and_then(|&i| self.entries.get(i));
        let (Some([rows, cols]), Some(_)) = (entry.map(|e| e.shape.as_slice()), self.packed_scheme(hf_name)) else {
            return Ok(None);
        };
        let (kind, data) = self.stored(hf_name)?;
        let q = lowbit_kernels::ggml::decode_codes(kind, &data, *rows, *cols);
        q.map(Some).map_err(|e| invalid(&self.meta.file, format!("'{hf_name}': {e}")))
    }

    /// The integer scheme that [`Self::packed`] finds.
    pub fn packed_scheme(&self, hf_name: &str) -> Option<Scheme> {
        let entry = self.index.get(hf_name).and_then(|&i| self.entries.get(i))?;
        let kind = tensors::kind(self.content.tensor_infos.get(&entry.gguf)?.ggml_dtype)?;
        kind.scheme().filter(|_| entry.shape.len() == 2 && hf_name.starts_with("model.layers."))
    }

    /// Whether the output projection is the embedding.
    pub fn tied(&self) -> bool {
        !self.content.tensor_infos.contains_key("output.weight")
    }

    /// The rotary frequency divisors of Llama 3.1 and later, where the file has them.
    fn rope_factors(&self) -> Result<Option<Vec<f32>>> {
        match self.content.tensor_infos.contains_key(tensors::ROPE_FACTORS) {
            true => self.decode(tensors::ROPE_FACTORS).map(Some),
            false => Ok(None),
        }
    }

    /// Dequantizes one tensor by its GGUF name, in f32, row-major.
    fn decode(&self, gguf: &str) -> Result<Vec<f32>> {
        let read = || {
            let mut file = &self.file;
            let packed = self.content.tensor(&mut file, gguf, &Device::Cpu)?;
            packed.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
        };
        read().map_err(|e| invalid(&self.meta.file, format!("tensor '{gguf}': {e}")))
    }
}

/// The architectures that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma3,
    Phi3,
}

impl Family {
    fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "llama" => Self::Llama,
            "mistral" => Self::Mistral,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "gemma3" => Self::Gemma3,
            "phi3" => Self::Phi3,
            other => {
                return Err(CheckpointError::Unsupported {
                    what: format!("GGUF architecture '{other}'"),
                    hint: Some("supported: llama, mistral, qwen2, qwen3, gemma3, phi3".to_string()),
                });
            }
        })
    }

    fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
        }
    }

    /// Whether llama.cpp's converter permuted the rows of q and k.
    fn permuted(self) -> bool {
        matches!(self, Self::Llama | Self::Mistral)
    }
}

/// Typed access to a GGUF's key-value metadata.
#[derive(Debug)]
pub(crate) struct Metadata {
    pub(crate) file: PathBuf,
    map: HashMap<String, Value>,
}

impl Metadata {
    fn wrong(&self, key: &str, wanted: &str) -> CheckpointError {
        invalid(&self.file, format!("metadata '{key}' is not {wanted}"))
    }

    fn missing(&self, key: &str) -> CheckpointError {
        invalid(&self.file, format!("metadata '{key}' is missing"))
    }

    pub(crate) fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    pub(crate) fn str(&self, key: &str) -> Result<&str> {
        self.opt_str(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn opt_uint(&self, key: &str) -> Result<Option<u64>> {
        self.map.get(key).map(|v| unsigned(v).ok_or_else(|| self.wrong(key, "a whole number"))).transpose()
    }

    pub(crate) fn uint(&self, key: &str) -> Result<u64> {
        self.opt_uint(key)?.ok_or_else(|| self.missing(key))
    }

    /// A finite float, as the shortest decimal that names the stored f32.
    pub(crate) fn opt_float(&self, key: &str) -> Result<Option<f64>> {
        let value = match self.map.get(key) {
            None => return Ok(None),
            Some(Value::F32(x)) => shortest(*x),
            Some(Value::F64(x)) => *x,
            Some(_) => f64::NAN,
        };
        if value.is_finite() { Ok(Some(value)) } else { Err(self.wrong(key, "a finite number")) }
    }

    pub(crate) fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        match self.map.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.wrong(key, "a boolean")),
        }
    }

    fn list<'a, T>(&'a self, key: &str, wanted: &str, take: impl Fn(&'a Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        let Some(value) = self.map.get(key) else { return Ok(None) };
        let Value::Array(values) = value else { return Err(self.wrong(key, wanted)) };
        let taken: Option<Vec<T>> = values.iter().map(take).collect();
        taken.map(Some).ok_or_else(|| self.wrong(key, wanted))
    }

    pub(crate) fn opt_strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.list(key, "a list of strings", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Vec<&str>> {
        self.opt_strings(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn opt_floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.list(key, "a list of f32", |v| match v {
            Value::F32(x) => Some(*x),
            _ => None,
        })
    }

    pub(crate) fn opt_uints(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.list(key, "a list of whole numbers", unsigned)
    }
}

fn unsigned(value: &Value) -> Option<u64> {
    match value {
        Value::U8(x) => Some(u64::from(*x)),
        Value::U16(x) => Some(u64::from(*x)),
        Value::U32(x) => Some(u64::from(*x)),
        Value::U64(x) => Some(*x),
        Value::I8(x) => u64::try_from(*x).ok(),
        Value::I16(x) => u64::try_from(*x).ok(),
        Value::I32(x) => u64::try_from(*x).ok(),
        Value::I64(x) => u64::try_from(*x).ok(),
        _ => None,
    }
}

/// `1e-05` stored as f32 comes back as the f64 `1e-05`, not `9.999999747378752e-06`.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn invalid(file: &Path, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Invalid { file: file.to_path_buf(), problem: problem.into(), hint: None }
}

fn decode_error(file: &Path, error: &candle_core::Error) -> CheckpointError {
    invalid(file, format!("not a readable GGUF: {error}"))
}
