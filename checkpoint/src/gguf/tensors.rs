//! Validation of a GGUF's header and tensor table, and the names of its tensors.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, Read};
use std::ops::Range;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo};
use lowbit_kernels::ggml::GgmlType;

use super::config::Shape;
use super::{Family, invalid};
use crate::error::{CheckpointError, Result};

/// Tensor with the rotary frequency divisors; becomes part of `config.json`.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

const MAX_NAME: u64 = 1 << 10;
const MAX_STRING: u64 = 1 << 24;
const MAX_ELEMENTS: u64 = 1 << 23;
const MAX_TENSORS: u64 = 1 << 20;

/// What the converter to GGUF did to a tensor, to be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fixup {
    None,
    /// One was added to a norm's weight.
    MinusOne,
    /// Rows of each head were interleaved for llama.cpp's rotary embedding.
    Rotary {
        heads: usize,
    },
}

/// One tensor of the output.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) hf: String,
    pub(super) gguf: String,
    pub(super) shape: Vec<usize>,
    pub(super) fixup: Fixup,
}

/// Reads a header without building anything, never past the end of the file.
struct Walk<'a, R> {
    reader: &'a mut R,
    left: u64,
    elements: u64,
    file: &'a Path,
}

impl<R: BufRead> Walk<'_, R> {
    fn error(&self, problem: impl Into<String>) -> CheckpointError {
        invalid(self.file, problem)
    }

    fn claim(&mut self, bytes: u64) -> Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| self.error("the GGUF header is cut short"))?;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.claim(N as u64)?;
        let mut bytes = [0; N];
        let file = self.file;
        self.reader
            .read_exact(&mut bytes)
            .map_err(|source| CheckpointError::Io { file: file.to_path_buf(), source })?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        self.claim(bytes)?;
        let file = self.file;
        let skipped = std::io::copy(&mut self.reader.by_ref().take(bytes), &mut std::io::sink())
            .map_err(|source| CheckpointError::Io { file: file.to_path_buf(), source })?;
        if skipped == bytes { Ok(()) } else { Err(self.error("the GGUF header is cut short")) }
    }

    fn string(&mut self, limit: u64) -> Result<()> {
        let length = self.u64()?;
        if length > limit {
            return Err(self.error(format!("a string of {length} bytes in the GGUF header")));
        }
        self.skip(length)
    }

    fn name(&mut self) -> Result<String> {
        let length = self.u64()?;
        if length > MAX_NAME {
            return Err(self.error(format!("a name of {length} bytes in the GGUF header")));
        }
        self.claim(length)?;
        let mut bytes = Vec::new();
        let file = self.file;
        self.reader
            .by_ref()
            .take(length)
            .read_to_end(&mut bytes)
            .map_err(|source| CheckpointError::Io { file: file.to_path_buf(), source })?;
        String::from_utf8(bytes).map_err(|_| self.error("a name in the GGUF header is not UTF-8"))
    }

    fn value(&mut self, kind: u32) -> Result<()> {
        match kind {
            0 | 1 | 7 => self.skip(1),
            2 | 3 => self.skip(2),
            4..=6 => self.skip(4),
            10..=12 => self.skip(8),
            8 => self.string(MAX_STRING),
            9 => {
                let kind = self.u32()?;
                let count = self.u64()?;
                self.elements = self.elements.saturating_add(count);
                if kind == 9 || count > self.left || self.elements > MAX_ELEMENTS {
                    return Err(self.error(format!("a list of {count} elements of type {kind} in the GGUF header")));
                }
                (0..count).try_for_each(|_| self.value(kind))
            }
            other => Err(self.error(format!("unknown metadata type {other}"))),
        }
    }
}

/// Walks the whole header and refuses what cannot be decoded safely.
pub(super) fn check_header<R: BufRead>(reader: &mut R, length: u64, file: &Path) -> Result<()> {
    let mut walk = Walk { reader, left: length, elements: 0, file };
    if length < 24 || walk.array::<4>()? != *b"GGUF" {
        return Err(invalid(file, "not a GGUF file"));
    }
    let version = walk.u32()?;
    if !(2..=3).contains(&version) {
        let what = format!("GGUF version {version}");
        return Err(CheckpointError::Unsupported { what, hint: Some("versions 2 and 3 are read".to_string()) });
    }
    let (tensors, pairs) = (walk.u64()?, walk.u64()?);
    if tensors > MAX_TENSORS || pairs > MAX_TENSORS {
        return Err(invalid(file, format!("the header declares {tensors} tensors and {pairs} metadata entries")));
    }
    let mut seen = HashSet::new();
    for _ in 0..pairs {
        let key = walk.name()?;
        let kind = walk.u32()?;
        if key == "general.alignment" {
            let alignment = if kind == 4 { walk.u32()? } else { 0 };
            if !alignment.is_power_of_two() || alignment > 1 << 20 {
                return Err(invalid(file, "'general.alignment' is not a power of two"));
            }
        } else {
            walk.value(kind)?;
        }
        if !seen.insert(key) {
            return Err(invalid(file, "the same metadata key twice"));
        }
    }
    seen.clear();
    for _ in 0..tensors {
        let name = walk.name()?;
        let rank = walk.u32()?;
        if !(1..=4).contains(&rank) {
            return Err(invalid(file, format!("tensor '{name}' has {rank} dimensions")));
        }
        (0..rank).try_for_each(|_| walk.u64().map(drop))?;
        let kind = walk.u32()?;
        if !matches!(kind, 0..=3 | 6..=8 | 10..=14 | 30) {
            return Err(CheckpointError::Unsupported {
                what: format!("GGUF tensor type {kind} (tensor '{name}')"),
                hint: Some("F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are read".to_string()),
            });
        }
        walk.u64()?;
        if !seen.insert(name) {
            return Err(invalid(file, "the same tensor name twice"));
        }
    }
    Ok(())
}

/// Checks that every tensor lies within the file and has whole blocks.
pub(super) fn check_places(content: &Content, length: u64, file: &Path) -> Result<()> {
    for (name, info) in &content.tensor_infos {
        let place = end_of(info, content.tensor_data_offset)
            .ok_or_else(|| invalid(file, format!("tensor '{name}' has an impossible shape")))?;
        if place > length {
            return Err(CheckpointError::Invalid {
                file: file.to_path_buf(),
                problem: format!("tensor '{name}' ends at byte {place}, the file at byte {length}"),
                hint: Some("the file is cut short; download it again".to_string()),
            });
        }
    }
    Ok(())
}

fn end_of(info: &TensorInfo, base: u64) -> Option<u64> {
    let dims = info.shape.dims();
    let (block, bytes) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
    let count = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    if count == 0 || !dims.last()?.is_multiple_of(block) {
        return None;
    }
    count.checked_mul(4)?;
    let size = (count / block).checked_mul(bytes)?;
    base.checked_add(info.offset)?.checked_add(u64::try_from(size).ok()?)
}

/// The type, where lowbit has its own decoder for it.
pub(super) fn kind(dtype: GgmlDType) -> Option<GgmlType> {
    Some(match dtype {
        GgmlDType::F32 => GgmlType::F32,
        GgmlDType::F16 => GgmlType::F16,
        GgmlDType::BF16 => GgmlType::Bf16,
        GgmlDType::Q4_0 => GgmlType::Q4_0,
        GgmlDType::Q5_0 => GgmlType::Q5_0,
        GgmlDType::Q8_0 => GgmlType::Q8_0,
        GgmlDType::Q4K => GgmlType::Q4K,
        GgmlDType::Q6K => GgmlType::Q6K,
        _ => return None,
    })
}

/// Source ranges, row by row in output order, that undo the rotary interleaving.
pub(super) fn rotary_rows(rows: usize, heads: usize, values: usize) -> Option<impl Iterator<Item = Range<usize>>> {
    let head = rows.checked_div(heads)?;
    let (half, width) = (head / 2, values.checked_div(rows)?);
    if half == 0 || half * 2 * heads != rows || rows * width != values {
        return None;
    }
    Some((0..rows).map(move |row| {
        let (h, within) = (row / head, row % head);
        let from = (h * head + (within % half) * 2 + within / half) * width;
        from..from + width
    }))
}

/// (GGUF suffix, Hugging Face suffix).
type Name = (&'static str, &'static str);

pub(super) fn block_names(family: Family, bias: bool) -> Vec<Name> {
    let mut names: Vec<Name> = vec![("attn_norm.weight", "input_layernorm.weight")];
    if family == Family::Phi3 {
        names.push(("attn_qkv.weight", "self_attn.qkv_proj.weight"));
    } else {
        names.extend([
            ("attn_q.weight", "self_attn.q_proj.weight"),
            ("attn_k.weight", "self_attn.k_proj.weight"),
            ("attn_v.weight", "self_attn.v_proj.weight"),
        ]);
    }
    names.push(("attn_output.weight", "self_attn.o_proj.weight"));
    if bias || family == Family::Qwen2 {
        names.extend([
            ("attn_q.bias", "self_attn.q_proj.bias"),
            ("attn_k.bias", "self_attn.k_proj.bias"),
            ("attn_v.bias", "self_attn.v_proj.bias"),
        ]);
    }
    if bias {
        names.push(("attn_output.bias", "self_attn.o_proj.bias"));
    }
    if matches!(family, Family::Qwen3 | Family::Gemma3) {
        names.push(("attn_q_norm.weight", "self_attn.q_norm.weight"));
        names.push(("attn_k_norm.weight", "self_attn.k_norm.weight"));
    }
    if family == Family::Gemma3 {
        names.extend([
            ("post_attention_norm.weight", "post_attention_layernorm.weight"),
            ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
            ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
        ]);
    } else {
        names.push(("ffn_norm.weight", "post_attention_layernorm.weight"));
    }
    if family == Family::Phi3 {
        names.push(("ffn_up.weight", "mlp.gate_up_proj.weight"));
    } else {
        names.push(("ffn_gate.weight", "mlp.gate_proj.weight"));
        names.push(("ffn_up.weight", "mlp.up_proj.weight"));
    }
    names.push(("ffn_down.weight", "mlp.down_proj.weight"));
    names
}

/// How a tensor in the file differs from the checkpoint's.
pub(super) fn fixup(suffix: &str, family: Family, heads: usize, kv_heads: usize) -> Fixup {
    match suffix {
        "attn_q.weight" | "attn_q.bias" if family.permuted() => Fixup::Rotary { heads },
        "attn_k.weight" | "attn_k.bias" if family.permuted() => Fixup::Rotary { heads: kv_heads },
        _ if family == Family::Gemma3 && suffix.ends_with("norm.weight") => Fixup::MinusOne,
        _ => Fixup::None,
    }
}

/// The shape that a tensor must have.
fn expected(name: &str, family: Family, s: &Shape) -> Vec<usize> {
    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let weight = !name.ends_with(".bias");
    let (rows, cols) = match name.split_once('.').map_or(name, |(stem, _)| stem) {
        "token_embd" | "output" => (s.vocab, s.hidden),
        "attn_q" => (q, s.hidden),
        "attn_k" | "attn_v" => (kv, s.hidden),
        "attn_qkv" => (q + 2 * kv, s.hidden),
        "attn_output" => (s.hidden, q),
        "attn_q_norm" | "attn_k_norm" => return vec![s.head_dim],
        "ffn_gate" => (s.ffn, s.hidden),
        "ffn_up" if family == Family::Phi3 => (2 * s.ffn, s.hidden),
        "ffn_up" => (s.ffn, s.hidden),
        "ffn_down" => (s.hidden, s.ffn),
        _ => return vec![s.hidden],
    };
    if weight { vec![rows, cols] } else { vec![rows] }
}

/// Names every tensor of the output; refuses missing, misshapen and unknown tensors.
pub(super) fn table(content: &Content, family: Family, shape: &Shape, file: &Path) -> Result<Vec<Entry>> {
    let mut left: HashMap<&str, &TensorInfo> = content.tensor_infos.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let mut entries = Vec::new();
    let mut add = |gguf: String, suffix: &str, hf: String, required: bool| -> Result<()> {
        let Some(info) = left.remove(gguf.as_str()) else {
            if required {
                return Err(invalid(file, format!("tensor '{gguf}' is missing")));
            }
            return Ok(());
        };
        let wanted = expected(suffix, family, shape);
        let found = info.shape.dims().to_vec();
        if found != wanted {
            return Err(invalid(file, format!("tensor '{gguf}' has shape {found:?} instead of {wanted:?}")));
        }
        let fixup = fixup(suffix, family, shape.heads, shape.kv_heads);
        entries.push(Entry { hf, gguf, shape: found, fixup });
        Ok(())
    };
    add("token_embd.weight".into(), "token_embd.weight", "model.embed_tokens.weight".into(), true)?;
    let names = block_names(family, shape.bias);
    for layer in 0..shape.layers {
        for &(gguf, hf) in &names {
            add(format!("blk.{layer}.{gguf}"), gguf, format!("model.layers.{layer}.{hf}"), true)?;
        }
    }
    add("output_norm.weight".into(), "output_norm.weight", "model.norm.weight".into(), true)?;
    add("output.weight".into(), "output.weight", "lm_head.weight".into(), false)?;
    left.remove(ROPE_FACTORS);
    if let Some(name) = left.keys().min() {
        return Err(CheckpointError::Unsupported {
            what: format!("tensor '{name}' in a GGUF of architecture '{}'", family.gguf_name()),
            hint: None,
        });
    }
    Ok(entries)
}
