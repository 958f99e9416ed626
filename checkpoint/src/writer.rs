//! Writing a checkpoint: streaming, atomic, deterministic.
//!
//! All names, dtypes and shapes are declared first, so headers, shard boundaries and the index are exact before the first
//! byte; tensors may then arrive in any order. Everything lands in a sibling folder that [`CheckpointWriter::finish`]
//! puts in place; dropping the writer removes it, and the next writer removes what a killed process left. A writer made by
//! [`CheckpointWriter::resume`] goes on with what is there instead, entry by entry ([`CheckpointWriter::keep`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::error::{CheckpointError, Result};
use crate::gguf::{self, write::FileLayout};
use crate::hash::sha256_hex;

mod journal;
mod place;

pub use journal::Kept;

/// A tensor to come.
#[derive(Clone, Debug)]
pub struct Declared {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
}

impl Declared {
    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        let bits = self.shape.iter().map(|d| *d as u64).product::<u64>() * self.dtype.bitsize() as u64;
        bits.div_ceil(8)
    }
}

struct Slot {
    file: usize,
    offset: u64,
    bytes: u64,
    written: bool,
    /// Of what was written, where entries are kept.
    sha256: Option<String>,
}

/// Writes one checkpoint folder.
pub struct CheckpointWriter {
    target: PathBuf,
    partial: PathBuf,
    /// Held while this process writes: the lock ends with the process, however that ends.
    _lock: Option<File>,
    files: Vec<(PathBuf, File)>,
    slots: BTreeMap<String, Slot>,
    force: bool,
    finished: bool,
    /// Of its inputs, where entries are kept.
    key: Option<String>,
    /// Entries kept.
    entries: usize,
    /// Whether an unfinished checkpoint of other inputs was there.
    replaced: bool,
}

/// Default shard size: 5 GB, as transformers.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

impl CheckpointWriter {
    /// Starts `target`. An existing target is refused unless `force`; then a checkpoint is replaced, at [`Self::finish`], and
    /// anything else is refused all the same. What a killed process left beside the target is removed.
    pub fn create(target: &Path, tensors: Vec<Declared>, shard_bytes: u64, force: bool) -> Result<Self> {
        let (writer, _) = Self::start(target, force, None, true)?;
        writer.lay_out(tensors, shard_bytes, false)
    }

    /// As [`Self::create`], for work that is kept entry by entry: an unfinished checkpoint of the same `key` and layout is gone
    /// on with, unless `fresh`. Once an entry is kept, dropping the writer leaves the unfinished folder for the next one.
    pub fn resume(
        target: &Path,
        tensors: Vec<Declared>,
        shard_bytes: u64,
        force: bool,
        key: &str,
        fresh: bool,
    ) -> Result<Self> {
        let mut layout = format!("{key}\n{shard_bytes}\n");
        for t in &tensors {
            layout.push_str(&format!("{} {:?} {:?}\n", t.name, t.dtype, t.shape));
        }
        let (writer, kept) = Self::start(target, force, Some(sha256_hex(layout.as_bytes())), fresh)?;
        writer.lay_out(tensors, shard_bytes, kept)
    }

    /// As [`Self::create`], for a folder whose weights are one GGUF file.
    pub fn create_gguf(target: &Path, layout: &FileLayout, force: bool) -> Result<Self> {
        let (mut writer, _) = Self::start(target, force, None, true)?;
        let path = writer.partial.join(gguf::write::FILE);
        let write = || -> std::io::Result<File> {
            let mut file = File::create(&path)?;
            file.write_all(layout.header())?;
            file.set_len(layout.end())?;
            if let Some((at, data)) = layout.made() {
                file.seek(SeekFrom::Start(at))?;
                file.write_all(data)?;
            }
            Ok(file)
        };
        let file = write().map_err(|e| CheckpointError::io(&path, e))?;
        for (name, offset, bytes) in layout.tensors() {
            writer.slots.insert(name.to_string(), Slot { file: 0, offset, bytes, written: false, sha256: None });
        }
        writer.files.push((path, file));
        Ok(writer)
    }

    /// Claims the unfinished folder; also whether it was there and is gone on with.
    fn start(target: &Path, force: bool, key: Option<String>, fresh: bool) -> Result<(Self, bool)> {
        let target = &place::followed(target);
        let partial = partial_path(target)?;
        if let Some(parent) = partial.parent() {
            std::fs::create_dir_all(parent).map_err(|e| CheckpointError::io(parent, e))?;
        }
        place::recover(target, &place::old_path(&partial))?;
        place::refuse(target, force)?;
        let same = |folder: &Path| !fresh && key.as_ref().is_some_and(|k| journal::has_key(folder, k));
        let place::Claimed { lock, kept, replaced } = place::claim(target, &partial, &same)?;
        if let Some(key) = &key {
            journal::begin(&partial, key)?;
        }
        let writer = Self {
            target: target.to_path_buf(),
            partial,
            _lock: lock,
            files: Vec::new(),
            slots: BTreeMap::new(),
            force,
            finished: false,
            key,
            entries: 0,
            replaced: replaced && !fresh,
        };
        Ok((writer, kept))
    }

    /// Begins the shards, or goes on with `kept` ones.
    fn lay_out(mut self, mut tensors: Vec<Declared>, shard_bytes: u64, kept: bool) -> Result<Self> {
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let mut shards: Vec<Vec<Declared>> = vec![Vec::new()];
        let mut in_shard = 0u64;
        for t in tensors {
            let bytes = t.bytes();
            if in_shard > 0 && in_shard + bytes > shard_bytes {
                shards.push(Vec::new());
                in_shard = 0;
            }
            in_shard += bytes;
            if let Some(last) = shards.last_mut() {
                last.push(t);
            }
        }
        let count = shards.len();
        for (i, shard) in shards.iter().enumerate() {
            let name = if count == 1 {
                "model.safetensors".to_string()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", i + 1)
            };
            self.start_shard(&name, shard, kept)?;
        }
        if count > 1 {
            self.write_index()?;
        }
        Ok(self)
    }

    /// Whether an unfinished checkpoint of other inputs or options was replaced.
    pub fn replaced_unfinished(&self) -> bool {
        self.replaced
    }

    fn start_shard(&mut self, name: &str, tensors: &[Declared], kept: bool) -> Result<()> {
        let path = self.partial.join(name);
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        let mut at = 0u64;
        for t in tensors {
            let end = at + t.bytes();
            let dtype = serde_json::to_value(t.dtype).map_err(|e| CheckpointError::invalid(&path, e.to_string()))?;
            header.insert(
                t.name.clone(),
                serde_json::json!({"dtype": dtype, "shape": t.shape, "data_offsets": [at, end]}),
            );
            at = end;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        while !text.len().is_multiple_of(8) {
            text.push(b' ');
        }
        let base = 8 + text.len() as u64;
        let start = [(text.len() as u64).to_le_bytes().as_slice(), &text].concat();
        let begin = || -> std::io::Result<File> {
            let mut file = File::options().read(true).write(true).create(true).truncate(!kept).open(&path)?;
            let mut found = vec![0u8; start.len()];
            if file.metadata()?.len() != base + at || file.read_exact(&mut found).is_err() || found != start {
                file.set_len(0)?;
                file.seek(SeekFrom::Start(0))?;
                file.write_all(&start)?;
                file.set_len(base + at)?;
            }
            Ok(file)
        };
        let file = begin().map_err(|e| CheckpointError::io(&path, e))?;
        let mut offset = base;
        for t in tensors {
            let slot = Slot { file: self.files.len(), offset, bytes: t.bytes(), written: false, sha256: None };
            offset += t.bytes();
            if self.slots.insert(t.name.clone(), slot).is_some() {
                return Err(CheckpointError::invalid(&path, format!("tensor `{}` is declared twice", t.name)));
            }
        }
        self.files.push((path, file));
        Ok(())
    }

    fn write_index(&self) -> Result<()> {
        let total: u64 = self.slots.values().map(|s| s.bytes).sum();
        let map: serde_json::Map<String, serde_json::Value> = self
            .slots
            .iter()
            .map(|(n, s)| {
                let file =
                    self.files[s.file].0.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
                (n.clone(), file.into())
            })
            .collect();
        let json = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
        self.write_file("model.safetensors.index.json", format!("{json:#}\n").as_bytes())
    }

    /// Writes one declared tensor.
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<()> {
        let slot = self
            .slots
            .get_mut(name)
            .ok_or_else(|| CheckpointError::invalid(&self.target, format!("tensor `{name}` was never declared")))?;
        let (path, file) = &mut self.files[slot.file];
        if data.len() as u64 != slot.bytes {
            return Err(CheckpointError::invalid(
                path,
                format!("tensor `{name}`: declared {} bytes, got {}", slot.bytes, data.len()),
            ));
        }
        file.seek(SeekFrom::Start(slot.offset))
            .and_then(|_| file.write_all(data))
            .map_err(|e| CheckpointError::io(path, e))?;
        slot.written = true;
        slot.sha256 = self.key.is_some().then(|| sha256_hex(data));
        Ok(())
    }

    /// Writes another file of the folder (`config.json`, a tokenizer).
    pub fn write_file(&self, name: &str, data: &[u8]) -> Result<()> {
        let path = self.partial.join(name);
        std::fs::write(&path, data).map_err(|e| CheckpointError::io(&path, e))
    }

    /// Copies every file of `source` that is not weights, index or one of `except`, bit for bit. A link out of the checkpoint is
    /// refused: what a stranger's link names must not end up in an artefact that is passed on.
    pub fn carry_over(&self, source: &Path, except: &[&str]) -> Result<()> {
        let entries = std::fs::read_dir(source).map_err(|e| CheckpointError::io(source, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| CheckpointError::io(source, e))?;
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
            // Hidden files are the download tool's own notes.
            if !path.is_file() || weights || name.starts_with('.') || except.contains(&name.as_str()) {
                continue;
            }
            place::refuse_foreign_link(source, &path)?;
            let to = self.partial.join(&name);
            std::fs::copy(&path, &to).map_err(|e| CheckpointError::io(&to, e))?;
        }
        Ok(())
    }

    /// Checks that every tensor came, flushes to disk, and puts the folder in place.
    pub fn finish(mut self) -> Result<()> {
        if let Some((name, _)) = self.slots.iter().find(|(_, s)| !s.written) {
            return Err(CheckpointError::invalid(
                &self.target,
                format!("tensor `{name}` was declared but never written"),
            ));
        }
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |e| CheckpointError::io(&path, e)
        };
        for entry in std::fs::read_dir(&self.partial).map_err(io(&self.partial))? {
            let path = entry.map_err(io(&self.partial))?.path();
            if path.is_dir() {
                continue;
            }
            File::open(&path).and_then(|f| f.sync_all()).map_err(io(&path))?;
        }
        place::refuse(&self.target, self.force)?;
        journal::end(&self.partial)?;
        place::put(&self.partial, &self.target)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.finished && self.entries == 0 {
            // Best effort: the error that got us here is the one to show.
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

fn partial_path(target: &Path) -> Result<PathBuf> {
    let name = target
        .file_name()
        .ok_or_else(|| CheckpointError::invalid(target, "not a folder name"))?
        .to_string_lossy()
        .into_owned();
    Ok(target.with_file_name(format!(".{name}.partial")))
}

/// Writes a file beside `path` and renames it into place: it is there whole or not at all, after a power failure too. Behind a
/// link the file it names is replaced; a device or a pipe (`/dev/stdout`) is written to, never replaced.
pub fn write_atomic(path: &Path, data: &[u8]) -> Result<()> {
    let path = &place::followed(path);
    let io = |e| CheckpointError::io(path, e);
    match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => {
            return Err(CheckpointError::invalid_hint(path, "is a folder", "name a file for the output"));
        }
        Ok(m) if !m.is_file() => {
            return std::fs::OpenOptions::new().write(true).open(path).and_then(|mut f| f.write_all(data)).map_err(io);
        }
        _ => {}
    }
    let partial = partial_path(path)?;
    // What a killed process left; and whoever put a link there does not get to choose the file that is written.
    let _ = std::fs::remove_file(&partial);
    let write = || -> std::io::Result<()> {
        let mut file = File::create_new(&partial)?;
        file.write_all(data)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&partial);
        io(e)
    })
}
