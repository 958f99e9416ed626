//! gpt-oss keeps the experts of a layer in a few tensors; here they become a matrix an expert, under the names that Qwen's checkpoints
//! have, which is how the graph reads them. Quantized they are written under these names, as llm-compressor does, and found as they are.
//!
//! | stored under `mlp.` | shape | for expert e |
//! |---|---|---|
//! | `experts.gate_up_proj` | `[experts, hidden, 2 · width]` | `experts.e.{gate,up}_proj.weight` `[width, hidden]` |
//! | `experts.gate_up_proj_blocks` | `[experts, 2 · width, hidden/32, 16]`, MXFP4, the even column in the low half of a byte | `.weight_packed` `[width, hidden/2]` |
//! | `experts.gate_up_proj_scales` | `[experts, 2 · width, hidden/32]`, E8M0 | `.weight_scale` `[width, hidden/32]` |
//! | `experts.gate_up_proj_bias` | `[experts, 2 · width]` | `.bias` `[width]` |
//! | `experts.down_proj`, ... | the same with width and hidden exchanged, and one matrix for the two | `experts.e.down_proj.*` |
//!
//! Of the 2 · width rows the even ones are gate's, the odd ones up's. Floats are stored transposed, codes are not. What lies in one piece
//! stays in the file; the rest is put together when it is first read, so opening a checkpoint touches no weight. What is to be quantized is
//! read as floats ([`TensorStore::widen_experts`]), a block at a time ([`TensorStore::afresh`]).

use half::bf16;
use lowbit_kernels::backend::Bytes;
use lowbit_kernels::floats::{FloatCode, FloatScales, FloatWeight, MXFP4_GROUP as GROUP};
use safetensors::Dtype;

use super::{StoredTensor, TensorStore};
use crate::config::ExpertsConfig;
use crate::error::Result;
use crate::linear::typed;

/// Rows and columns that are moved together, so that lines of the cache are used whole.
const TILE: usize = 32;

/// A matrix whose elements lie apart in a stored tensor: element (r, c), of `unit` bytes, is the stored element
/// `first + r · row_step + c · column_step`.
struct Gathered {
    from: Bytes,
    unit: usize,
    first: usize,
    rows: usize,
    row_step: usize,
    columns: usize,
    column_step: usize,
}

impl Gathered {
    fn size(&self) -> usize {
        self.rows * self.columns * self.unit
    }

    fn make(&self) -> Vec<u8> {
        let (from, unit) = (self.from.as_slice(), self.unit);
        let mut out = vec![0; self.size()];
        for top in (0..self.rows).step_by(TILE) {
            for left in (0..self.columns).step_by(TILE) {
                for r in top..self.rows.min(top + TILE) {
                    for c in left..self.columns.min(left + TILE) {
                        let (to, at) = (r * self.columns + c, self.first + r * self.row_step + c * self.column_step);
                        out[to * unit..(to + 1) * unit].copy_from_slice(&from[at * unit..(at + 1) * unit]);
                    }
                }
            }
        }
        out
    }

    fn bytes(self) -> Bytes {
        let size = self.size();
        Bytes::made_when_read(move || self.make(), size)
    }
}

/// A matrix `[out, inner]` of MXFP4 as bf16: a code has two significant bits and a scale is a power of two, so that every product is exact.
/// One beyond the largest bf16 becomes infinite.
fn widened(codes: Bytes, scales: Bytes, [out, inner]: [usize; 2]) -> Bytes {
    let make = move || {
        // What of them is gathered is held no longer than this takes.
        let scales = FloatScales::Exponents { codes: scales.afresh() };
        let codes = codes.afresh();
        let from = FloatWeight { code: FloatCode::E2m1, out_features: out, in_features: inner, codes, scales };
        let mut row = vec![0f32; inner];
        let mut bytes = Vec::with_capacity(out * inner * size_of::<bf16>());
        for r in 0..out {
            from.widen(r..r + 1, &mut row);
            bytes.extend(row.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()));
        }
        bytes
    };
    Bytes::made_when_read(make, out * inner * size_of::<bf16>())
}

impl TensorStore {
    /// Puts bf16 matrices in the place of the experts' codes and scales, which [`Self::split_gpt_oss`] has found. They are made when they
    /// are first read; the bytes that the codes and scales take in the files stay known.
    pub(crate) fn widen_experts(&mut self, e: &ExpertsConfig, hidden: usize) -> Result<()> {
        let modules: Vec<String> = self
            .tensors
            .keys()
            .filter(|n| n.contains(".mlp.experts."))
            .filter_map(|n| n.strip_suffix(".weight_packed").map(String::from))
            .collect();
        for module in modules {
            let (out, inner) = match module.ends_with(e.names.down) {
                true => (hidden, e.intermediate_size),
                false => (e.intermediate_size, hidden),
            };
            let bytes = |own: &str, columns: usize| -> Result<Bytes> {
                Ok(typed(self, &format!("{module}.{own}"), Dtype::U8, &[out, columns])?.data.clone())
            };
            let codes = bytes("weight_packed", inner.div_ceil(2))?;
            let scales = bytes("weight_scale", inner.div_ceil(GROUP))?;
            let stored = (codes.size() + scales.size()) as u64;
            let data = widened(codes, scales, [out, inner]);
            let weight = StoredTensor { dtype: Dtype::BF16, shape: vec![out, inner], data };
            for own in ["weight_packed", "weight_scale"] {
                self.tensors.remove(&format!("{module}.{own}"));
            }
            let name = format!("{module}.weight");
            self.widened.insert(name.clone(), stored);
            self.tensors.insert(name, weight);
        }
        Ok(())
    }

    /// Brings the experts under their usual names.
    pub(crate) fn split_gpt_oss(&mut self, e: &ExpertsConfig, hidden: usize) -> Result<()> {
        let stored: Vec<String> = self.tensors.keys().filter(|n| n.contains(".mlp.experts.")).cloned().collect();
        let modules = [e.names.gate, e.names.up, e.names.down];
        for name in stored {
            let Some((block, part)) = name.split_once(".mlp.experts.") else { continue };
            let (end, parts, out, inner) = match (part.strip_prefix("gate_up_proj"), part.strip_prefix("down_proj")) {
                (Some(end), _) => (end, &modules[..2], 2 * e.intermediate_size, hidden),
                (_, Some(end)) => (end, &modules[2..], hidden, e.intermediate_size),
                _ => continue,
            };
            let own = match end {
                "" => "weight",
                "_blocks" => "weight_packed",
                "_scales" => "weight_scale",
                "_bias" => "bias",
                _ => continue,
            };
            let t = self.stored_experts(&name, own, (e.count, out, inner))?;
            let made = split(&t, own, (e.count, out, inner), parts.len());
            if let Some((name, whole)) = self.tensors.remove_entry(&name) {
                self.gathered.insert(name, whole);
            }
            for (i, tensor) in made.into_iter().enumerate() {
                let (expert, module) = (i / parts.len(), parts[i % parts.len()]);
                self.tensors.insert(format!("{block}.mlp.experts.{expert}.{module}.{own}"), tensor);
            }
        }
        Ok(())
    }

    /// A tensor of all experts, its shape and dtype being what `own` asks for.
    fn stored_experts(
        &self,
        name: &str,
        own: &str,
        (count, out, inner): (usize, usize, usize),
    ) -> Result<StoredTensor> {
        let t = self.get(name)?;
        let codes = own.starts_with("weight_");
        if codes && !inner.is_multiple_of(GROUP) {
            let expected = format!("a matrix of a multiple of {GROUP} columns");
            return Err(self.mismatch(name, expected, format!("{inner} of them")));
        }
        let shape = match own {
            "weight" => vec![count, inner, out],
            "weight_packed" => vec![count, out, inner / GROUP, GROUP / 2],
            "weight_scale" => vec![count, out, inner / GROUP],
            _ => vec![count, out],
        };
        if t.shape != shape {
            return Err(self.mismatch(name, format!("shape {shape:?}"), format!("{:?}", t.shape)));
        }
        match codes {
            true if t.dtype != Dtype::U8 => Err(self.mismatch(name, "U8".into(), format!("{:?}", t.dtype))),
            false if t.float_type().is_none() => {
                Err(self.mismatch(name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)))
            }
            _ => Ok(t.clone()),
        }
    }
}

/// The matrices or vectors of a checked tensor, expert by expert, within one gate before up; `parts` take turns row by row.
fn split(t: &StoredTensor, own: &str, (count, out, inner): (usize, usize, usize), parts: usize) -> Vec<StoredTensor> {
    let rows = out / parts;
    let (unit, shape) = match own {
        "weight" => (t.dtype.bitsize() / 8, vec![rows, inner]),
        "weight_packed" => (inner / 2, vec![rows, inner / 2]),
        "weight_scale" => (inner / GROUP, vec![rows, inner / GROUP]),
        _ => (t.dtype.bitsize() / 8, vec![rows]),
    };
    let one = |i: usize| {
        let (expert, part) = (i / parts, i % parts);
        let from = t.data.clone();
        // Floats are transposed; rows of codes, of scales and of a bias are moved whole.
        let (first, row_step, columns, column_step) = match own {
            "weight" => (expert * inner * out + part, parts, inner, out),
            _ => (expert * out + part, parts, 1, 0),
        };
        let whole = own != "weight" && parts == 1;
        let data = match t.data.part(first * unit..(first + rows) * unit).filter(|_| whole) {
            Some(data) => data,
            None => Gathered { from, unit, first, rows, row_step, columns, column_step }.bytes(),
        };
        StoredTensor { dtype: t.dtype, shape: shape.clone(), data }
    };
    (0..count * parts).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: Dtype, shape: &[usize]) -> StoredTensor {
        let size = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        StoredTensor { dtype, shape: shape.to_vec(), data: Bytes::from_vec((0..size).map(|i| i as u8).collect()) }
    }

    #[test]
    fn gate_and_up_take_turns_and_floats_are_transposed() {
        // Two experts, width 2, hidden 3, in bf16: element i is the bytes 2 i and 2 i + 1.
        let made = split(&tensor(Dtype::BF16, &[2, 3, 4]), "weight", (2, 4, 3), 2);
        assert!(made.iter().all(|t| t.shape == [2, 3] && t.data.size() == 12));
        // Stored [expert][hidden][column]: gate of expert 1 are the columns 0 and 2.
        let elements = |t: &StoredTensor| t.data.as_slice().chunks(2).map(|b| b[0] / 2).collect::<Vec<u8>>();
        assert_eq!(elements(&made[2]), [12, 16, 20, 14, 18, 22]);
        assert_eq!(elements(&made[1]), [1, 5, 9, 3, 7, 11]);
        // Scales: rows as they are, every other one.
        let made = split(&tensor(Dtype::U8, &[2, 4, 2]), "weight_scale", (2, 4, 64), 2);
        assert!(made.iter().all(|t| t.shape == [2, 2]));
        assert_eq!(made[1].data.as_slice(), [2, 3, 6, 7]);
        assert_eq!(made[2].data.as_slice(), [8, 9, 12, 13]);
        let made = split(&tensor(Dtype::F32, &[2, 4]), "bias", (2, 4, 3), 2);
        assert_eq!(made[3].data.as_slice(), [20, 21, 22, 23, 28, 29, 30, 31]);
    }

    #[test]
    fn codes_are_widened_exactly() {
        // Two rows of 64: every code in turn, under scales of 2^-127 (below the smallest normal float), 1, 2^5 and 2^125.
        let pair = |i: u8| (2 * i) | ((2 * i + 1) << 4);
        let codes = Bytes::from_vec((0..64).map(|i| pair(i % 8)).collect());
        let data = widened(codes, Bytes::from_vec(vec![0, 127, 132, 252]), [2, 64]);
        assert!(data.is_made_when_read() && data.size() == 256);
        let values = StoredTensor { dtype: Dtype::BF16, shape: vec![2, 64], data }.to_f32().unwrap();
        let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for (i, v) in values.iter().enumerate() {
            let sign = if i % 16 < 8 { 1.0 } else { -1.0 };
            let scale = 2f64.powi([-127, 0, 5, 125][i / 32]);
            assert_eq!(f64::from(*v), sign * magnitudes[i % 8] * scale, "element {i}");
        }
    }

    #[test]
    fn what_lies_in_one_piece_is_not_copied() {
        let t = tensor(Dtype::U8, &[2, 3, 2, 16]);
        let made = split(&t, "weight_packed", (2, 3, 64), 1);
        assert_eq!(made[1].shape, [3, 32]);
        assert_eq!(made[1].data.as_slice().as_ptr(), t.data.as_slice()[96..].as_ptr());
        assert!(!made[1].data.is_made_when_read());
        // Transposed, it is made when it is read, and once more where that is asked for.
        let made = split(&tensor(Dtype::F32, &[1, 70, 40]), "weight", (1, 40, 70), 1);
        assert!(made[0].data.is_made_when_read());
        let values = made[0].to_f32().unwrap();
        let stored = tensor(Dtype::F32, &[1, 70, 40]).to_f32().unwrap();
        for (r, row) in values.chunks(70).enumerate() {
            assert!(row.iter().enumerate().all(|(c, v)| v.to_bits() == stored[c * 40 + r].to_bits()), "row {r}");
        }
        let again = made[0].data.afresh();
        assert!(again.is_made_when_read() && again.as_slice() == made[0].data.as_slice());
        assert_ne!(again.as_slice().as_ptr(), made[0].data.as_slice().as_ptr());
        assert_eq!(again.as_slice().as_ptr(), again.clone().as_slice().as_ptr());
    }
}
