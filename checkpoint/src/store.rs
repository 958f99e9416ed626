//! Opening safetensors checkpoints: single file or shards with an index, memory-mapped, validated before use.

mod gpt_oss;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowbit_kernels::backend::{Bytes, FloatType};
use safetensors::{Dtype, SafeTensors};

use crate::config::ExpertsConfig;
use crate::error::{CheckpointError, Result};
use crate::mapped::Mapped;

/// Bytes that [`TensorStore::map_ahead`] asks for at a time: a millisecond of work where the file was read before.
const AHEAD_BYTES: usize = 4 << 20;

/// A tensor's place and type, and its bytes.
#[derive(Clone)]
pub struct StoredTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Little-endian bytes, shared with the memory map.
    pub data: Bytes,
}

impl StoredTensor {
    /// Floats in memory, rounded to `dtype` half to even.
    pub fn floats(dtype: FloatType, shape: Vec<usize>, values: &[f32]) -> Self {
        let (dtype, bytes): (Dtype, Vec<u8>) = match dtype {
            FloatType::F32 => (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
            FloatType::F16 => (Dtype::F16, values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()),
            FloatType::Bf16 => {
                (Dtype::BF16, values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect())
            }
        };
        Self { dtype, shape, data: Bytes::from_vec(bytes) }
    }

    /// The float type, if it is one of the three the graph computes with.
    pub fn float_type(&self) -> Option<FloatType> {
        match self.dtype {
            Dtype::F32 => Some(FloatType::F32),
            Dtype::F16 => Some(FloatType::F16),
            Dtype::BF16 => Some(FloatType::Bf16),
            _ => None,
        }
    }

    /// The first float that is NaN or infinite, and its place, without a copy of the tensor.
    pub fn first_not_finite(&self) -> Option<(usize, f32)> {
        let b = self.data.as_slice();
        let bad = |(i, x): (usize, f32)| (!x.is_finite()).then_some((i, x));
        let (twos, fours) = (b.as_chunks::<2>().0.iter(), b.as_chunks::<4>().0.iter());
        match self.float_type()? {
            FloatType::F32 => fours.map(|c| f32::from_le_bytes(*c)).enumerate().find_map(bad),
            FloatType::F16 => twos.map(|c| half::f16::from_le_bytes(*c).to_f32()).enumerate().find_map(bad),
            FloatType::Bf16 => twos.map(|c| half::bf16::from_le_bytes(*c).to_f32()).enumerate().find_map(bad),
        }
    }

    /// All elements as f32 (for vectors and solver inputs, never for a whole model).
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let b = self.data.as_slice();
        Some(match self.float_type()? {
            FloatType::F32 => b.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect(),
            FloatType::F16 => b.as_chunks::<2>().0.iter().map(|c| half::f16::from_le_bytes(*c).to_f32()).collect(),
            FloatType::Bf16 => b.as_chunks::<2>().0.iter().map(|c| half::bf16::from_le_bytes(*c).to_f32()).collect(),
        })
    }
}

/// All tensors of a folder, by name.
#[derive(Clone)]
pub struct TensorStore {
    dir: PathBuf,
    tensors: BTreeMap<String, StoredTensor>,
    files: Vec<PathBuf>,
    maps: Vec<Arc<Mapped>>,
    /// Tensors of the files, of whose bytes others are made.
    gathered: BTreeMap<String, StoredTensor>,
    /// Bytes that tensors take in the files which are widened here, see [`Checkpoint::with_floats`](crate::Checkpoint::with_floats).
    widened: BTreeMap<String, u64>,
}

impl TensorStore {
    /// Opens `dir`: `model.safetensors.index.json` with its shards, or `model.safetensors`, or one other `.safetensors`.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = dir.join("model.safetensors.index.json");
        if index.exists() {
            return Self::open_sharded(dir, &index);
        }
        let single = dir.join("model.safetensors");
        if !single.exists() {
            return Err(CheckpointError::invalid_hint(
                dir,
                "no model.safetensors and no model.safetensors.index.json here",
                "lowbit reads safetensors: save a model in .bin or .pt files anew (save_pretrained, which writes safetensors), and convert a .gguf file with `lowbit convert FILE.gguf -o DIR`",
            ));
        }
        let (map, tensors) = open_file(&single)?;
        Ok(Self::of(dir, tensors, vec![single], vec![map]))
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Self> {
        let text = crate::files::read_text(index).map_err(|e| CheckpointError::io(index, e))?;
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| CheckpointError::invalid(index, format!("not valid JSON: {e}")))?;
        let map = json
            .get("weight_map")
            .and_then(|m| m.as_object())
            .ok_or_else(|| CheckpointError::invalid(index, "expected an object `weight_map`, found none"))?;
        let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, file) in map {
            let file = file
                .as_str()
                .filter(|f| !f.is_empty() && !f.contains(['/', '\\']) && !f.starts_with('.'))
                .ok_or_else(|| {
                    CheckpointError::invalid(
                        index,
                        format!("`{name}` maps to {file}, which is not a file name beside the index"),
                    )
                })?;
            by_file.entry(file.to_string()).or_default().push(name.clone());
        }
        let mut tensors = BTreeMap::new();
        let (mut files, mut maps) = (Vec::new(), Vec::new());
        for (file, names) in by_file {
            let path = dir.join(&file);
            let (map, mut shard) = open_file(&path)?;
            maps.push(map);
            for name in names {
                let t = shard.remove(&name).ok_or_else(|| {
                    CheckpointError::invalid_hint(
                        index,
                        format!("tensor `{name}` is listed in {file}, but that shard does not hold it"),
                        "index and shards are of different versions: fetch both again",
                    )
                })?;
                tensors.insert(name, t);
            }
            // Tensors a shard holds beyond the index are carried, not lost.
            for (name, t) in shard {
                tensors.entry(name).or_insert(t);
            }
            files.push(path);
        }
        Ok(Self::of(dir, tensors, files, maps))
    }

    fn of(dir: &Path, tensors: BTreeMap<String, StoredTensor>, files: Vec<PathBuf>, maps: Vec<Arc<Mapped>>) -> Self {
        let (gathered, widened) = (BTreeMap::new(), BTreeMap::new());
        Self { dir: dir.to_path_buf(), tensors, files, maps, gathered, widened }
    }

    /// Folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Files opened.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Fails when a file was changed since it was opened: what was made of it must not be kept.
    pub fn unchanged(&self) -> Result<()> {
        self.maps.iter().try_for_each(|m| m.unchanged())
    }

    /// Gives the memory of the tensors whose names start with `prefix` back to the system: pages of a mapped file that were read
    /// count as this process's until then. They can be read again.
    pub fn release(&self, prefix: &str) {
        let all = named(&self.tensors, prefix).chain(named(&self.gathered, prefix));
        for (_, t) in all.filter(|(_, t)| !t.data.is_made_when_read()) {
            self.maps.iter().for_each(|m| m.release(t.data.as_slice()));
        }
    }

    /// Has the system read from disk what the tensors hold whose names start with `prefix`, and does not wait for it. Only time changes
    /// by it; the memory is the system's until something is read.
    pub fn read_ahead(&self, prefix: &str) {
        let all = named(&self.tensors, prefix).chain(named(&self.gathered, prefix));
        for (_, t) in all.filter(|(_, t)| !t.data.is_made_when_read()) {
            self.maps.iter().for_each(|m| m.read_ahead(t.data.as_slice()));
        }
    }

    /// The same store with the tensors afresh whose names start with `prefix` and which are made when they are read: made once more, and
    /// held only by what is returned here. `None` where there are none.
    pub fn afresh(&self, prefix: &str) -> Option<Self> {
        let made: Vec<(String, StoredTensor)> = named(&self.tensors, prefix)
            .filter(|(_, t)| t.data.is_made_when_read())
            .map(|(name, t)| {
                (name.clone(), StoredTensor { dtype: t.dtype, shape: t.shape.clone(), data: t.data.afresh() })
            })
            .collect();
        (!made.is_empty()).then(|| self.overlay(made))
    }

    /// The same store with some tensors replaced, or added. The rest shares the files' memory.
    #[must_use]
    pub fn overlay(&self, tensors: impl IntoIterator<Item = (String, StoredTensor)>) -> Self {
        let mut store = self.clone();
        store.tensors.extend(tensors);
        store
    }

    /// Has the system map the bytes of the float matrices, by name and a piece at a time, for as long as `go_on` says: whoever
    /// multiplies with a mapped matrix for the first time otherwise stops at every few pages. Only time changes by it.
    pub fn map_ahead(&self, go_on: &dyn Fn() -> bool) {
        let mapped = self.tensors.values().filter(|t| !t.data.is_made_when_read());
        let matrices = mapped.filter(|t| t.shape.len() == 2 && t.float_type().is_some());
        for piece in matrices.flat_map(|t| t.data.as_slice().chunks(AHEAD_BYTES)) {
            if !go_on() {
                return;
            }
            self.maps.iter().for_each(|m| m.map_ahead(piece));
        }
    }

    /// A tensor that may be absent.
    pub fn find(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// A tensor that must be there.
    pub fn get(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| CheckpointError::MissingTensor { dir: self.dir.clone(), tensor: name.to_string() })
    }

    /// All of them, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(n, t)| (n.as_str(), t))
    }

    /// Bytes that a tensor takes in the files: fewer than its own where it was widened. 0 where it is absent.
    pub fn stored_bytes(&self, name: &str) -> u64 {
        let own = || self.tensors.get(name).map_or(0, |t| t.data.size() as u64);
        self.widened.get(name).copied().unwrap_or_else(own)
    }

    /// Experts that are stored as one tensor a layer, `experts.gate_up_proj` `[experts, 2 · width, hidden]` and `experts.down_proj`
    /// `[experts, hidden, width]`, become a matrix each under the names that the family's checkpoints have otherwise: the bytes
    /// are the same, since a matrix lies in one piece. transformers writes such tensors when it is asked not to keep the
    /// original layout.
    pub(crate) fn split_experts(&mut self, e: &ExpertsConfig, hidden: usize) -> Result<()> {
        let fused =
            |name: &str| name.ends_with(".mlp.experts.gate_up_proj") || name.ends_with(".mlp.experts.down_proj");
        let found: Vec<String> = self.tensors.keys().filter(|n| fused(n)).cloned().collect();
        let width = e.intermediate_size;
        for name in &found {
            let both = name.ends_with("gate_up_proj");
            let shape = if both { [e.count, 2 * width, hidden] } else { [e.count, hidden, width] };
            let Some(t) = self.tensors.get(name).filter(|t| t.shape == shape) else {
                let found = self.tensors.get(name).map_or(String::new(), |t| format!("{:?}", t.shape));
                return Err(self.mismatch(name, format!("shape {shape:?}"), found));
            };
            let parts: &[&str] = if both { &[e.names.gate, e.names.up] } else { &[e.names.down] };
            let rows = shape[1] / parts.len();
            let size = t.data.size() / (e.count * parts.len()).max(1);
            let block = name.split(".mlp.experts.").next().unwrap_or_default().to_string();
            let mut split = Vec::with_capacity(e.count * parts.len());
            for i in 0..e.count * parts.len() {
                let (expert, part) = (i / parts.len(), parts[i % parts.len()]);
                let Some(data) = t.data.part(i * size..(i + 1) * size) else {
                    return Err(self.mismatch(name, format!("{} bytes", size * e.count * parts.len()), "fewer".into()));
                };
                let tensor = StoredTensor { dtype: t.dtype, shape: vec![rows, shape[2]], data };
                split.push((format!("{block}.{}.experts.{expert}.{part}.weight", e.names.mlp), tensor));
            }
            self.tensors.remove(name);
            self.tensors.extend(split);
        }
        // The router's module moves with them where the family calls its MLP otherwise.
        if e.names.mlp != "mlp" && !found.is_empty() {
            let routers: Vec<String> =
                self.tensors.keys().filter(|n| n.ends_with(".mlp.gate.weight")).cloned().collect();
            for name in routers {
                if let Some(t) = self.tensors.remove(&name) {
                    self.tensors.insert(name.replace(".mlp.gate.", &format!(".{}.gate.", e.names.mlp)), t);
                }
            }
        }
        Ok(())
    }

    /// A vector of floats of a known length.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let t = self.get(name)?;
        if t.shape.iter().product::<usize>() != len {
            return Err(self.mismatch(name, format!("{len} elements"), format!("shape {:?}", t.shape)));
        }
        t.to_f32().ok_or_else(|| self.mismatch(name, "f32, f16 or bf16".into(), format!("{:?}", t.dtype)))
    }

    /// A shape or dtype error of one of these tensors.
    pub fn mismatch(&self, name: &str, expected: String, found: String) -> CheckpointError {
        CheckpointError::Tensor { dir: self.dir.clone(), tensor: name.to_string(), expected, found }
    }
}

/// Tensors whose names start with `prefix`.
fn named<'a>(
    tensors: &'a BTreeMap<String, StoredTensor>,
    prefix: &'a str,
) -> impl Iterator<Item = (&'a String, &'a StoredTensor)> {
    tensors.range(prefix.to_string()..).take_while(move |(n, _)| n.starts_with(prefix))
}

fn open_file(path: &Path) -> Result<(Arc<Mapped>, BTreeMap<String, StoredTensor>)> {
    let map = Arc::new(Mapped::open(path)?);
    let bytes: &[u8] = (*map).as_ref();
    let (header, meta) = SafeTensors::read_metadata(bytes).map_err(|e| {
        CheckpointError::invalid_hint(
            path,
            format!("not a valid safetensors file of {} bytes: {e}", bytes.len()),
            "the file is damaged or its download was cut short: fetch it again",
        )
    })?;
    let base = header + 8;
    let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = map.clone();
    let mut out = BTreeMap::new();
    for (name, info) in meta.tensors() {
        let bad = |what: String| CheckpointError::invalid(path, format!("tensor `{name}`: {what}"));
        let (start, end) = info.data_offsets;
        let range = base.checked_add(start).zip(base.checked_add(end)).ok_or_else(|| bad("offsets overflow".into()))?;
        let elements = info
            .shape
            .iter()
            .try_fold(1usize, |a, d| a.checked_mul(*d))
            .ok_or_else(|| bad(format!("shape {:?} overflows", info.shape)))?;
        let bits = elements
            .checked_mul(info.dtype.bitsize())
            .ok_or_else(|| bad(format!("shape {:?} overflows", info.shape)))?;
        if bits.div_ceil(8) != end - start {
            return Err(bad(format!(
                "shape {:?} of {:?} needs {} bytes, found {}",
                info.shape,
                info.dtype,
                bits.div_ceil(8),
                end - start
            )));
        }
        let data =
            Bytes::new(owner.clone(), range.0..range.1).ok_or_else(|| bad("its bytes lie outside the file".into()))?;
        out.insert(name.clone(), StoredTensor { dtype: info.dtype, shape: info.shape.clone(), data });
    }
    Ok((map, out))
}
