//! What of an unfinished checkpoint is done, so that the next process goes on from there.
//!
//! One small file an entry, in a hidden folder inside the unfinished one. It is written after its tensors, under the key of all
//! that determined them, and holds the SHA-256 of each: what a killed process, a power failure or another hand left half done
//! does not pass.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{CheckpointWriter, write_atomic};
use crate::error::{CheckpointError, Result};
use crate::hash::sha256_hex;

/// Folder of the entries, inside the unfinished checkpoint.
const FOLDER: &str = ".journal";
/// Names the key of everything inside.
const KEY: &str = "key";

/// What [`CheckpointWriter::kept`] found.
#[derive(Debug)]
pub enum Kept {
    /// No such entry.
    Nothing,
    /// An entry that cannot be used, and why.
    Unusable(String),
    /// Whole: the note it was kept with, and the digest of its tensors.
    Whole {
        /// As given to [`CheckpointWriter::keep`].
        note: Value,
        /// As returned by [`CheckpointWriter::keep`].
        digest: String,
    },
}

/// Whether the folder `partial` was begun under `key`.
pub(super) fn has_key(partial: &Path, key: &str) -> bool {
    std::fs::read_to_string(partial.join(FOLDER).join(KEY)).is_ok_and(|found| found == key)
}

/// Whether anything is kept in `partial`.
pub(super) fn has_entries(partial: &Path) -> bool {
    let entries = std::fs::read_dir(partial.join(FOLDER)).into_iter().flatten().flatten();
    entries.into_iter().any(|e| e.path().extension().is_some_and(|e| e == "json"))
}

/// Prepares `partial` for entries. In a folder that is gone on with, what is neither weights nor an entry is removed.
pub(super) fn begin(partial: &Path, key: &str) -> Result<()> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |e| CheckpointError::io(&path, e)
    };
    let folder = partial.join(FOLDER);
    std::fs::create_dir_all(&folder).map_err(io(&folder))?;
    for entry in std::fs::read_dir(partial).map_err(io(partial))? {
        let path = entry.map_err(io(partial))?.path();
        if path.is_file() && path.extension().is_none_or(|e| e != "safetensors") {
            std::fs::remove_file(&path).map_err(io(&path))?;
        }
    }
    if !has_key(partial, key) {
        write_atomic(&folder.join(KEY), key.as_bytes())?;
    }
    Ok(())
}

/// Removes the entries of a complete checkpoint.
pub(super) fn end(partial: &Path) -> Result<()> {
    let folder = partial.join(FOLDER);
    match std::fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(CheckpointError::io(&folder, e)),
        _ => Ok(()),
    }
}

impl CheckpointWriter {
    /// Folder of the unfinished checkpoint, and how many entries are kept there.
    pub fn unfinished(&self) -> (&Path, usize) {
        (&self.partial, self.entries)
    }

    /// Entries kept so far are of no use: dropping the writer removes the unfinished folder, as without them.
    pub fn forget(&mut self) {
        self.entries = 0;
    }

    /// Keeps the tensors `names`, written before, as the entry `unit` under `key`, with a note. Returns a digest of their bytes.
    /// Only for a writer made by [`CheckpointWriter::resume`].
    pub fn keep(&mut self, unit: &str, key: &str, names: &[String], note: &Value) -> Result<String> {
        let mut tensors = Vec::with_capacity(names.len());
        for name in names {
            let sha = self.slots.get(name).and_then(|s| s.sha256.clone());
            let sha = sha.ok_or_else(|| {
                CheckpointError::invalid(&self.partial, format!("tensor `{name}` is to be kept and was not written"))
            })?;
            tensors.push(json!([name, sha]));
        }
        let tensors = Value::Array(tensors);
        let digest = sha256_hex(tensors.to_string().as_bytes());
        let body = json!({"key": key, "tensors": tensors, "note": note}).to_string();
        let entry = json!({"sha256": sha256_hex(body.as_bytes()), "body": body});
        write_atomic(&self.entry(unit), entry.to_string().as_bytes())?;
        self.entries += 1;
        Ok(digest)
    }

    /// Looks for the entry `unit` under `key` with the tensors `names`; when it is whole, its tensors count as written.
    pub fn kept(&mut self, unit: &str, key: &str, names: &[String]) -> Result<Kept> {
        let path = self.entry(unit);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Kept::Nothing),
            Err(e) => return Err(CheckpointError::io(&path, e)),
        };
        let unusable = |why: &str| Ok(Kept::Unusable(format!("{}: {why}", path.display())));
        let part = |v: &Value, k: &str| v.get(k).and_then(Value::as_str).map(str::to_string);
        let Ok(entry) = serde_json::from_str::<Value>(&text) else { return unusable("not JSON") };
        let body =
            part(&entry, "body").filter(|b| part(&entry, "sha256").is_some_and(|s| s == sha256_hex(b.as_bytes())));
        let Some(Ok(body)) = body.map(|b| serde_json::from_str::<Value>(&b)) else {
            return unusable("damaged: its hash is not that of its text");
        };
        if part(&body, "key").is_none_or(|k| k != key) {
            return unusable("made from other inputs, options or blocks before it");
        }
        let tensors = body.get("tensors").and_then(Value::as_array).cloned().unwrap_or_default();
        if tensors.len() != names.len() {
            return unusable("of other tensors");
        }
        for (name, t) in names.iter().zip(&tensors) {
            let (found, sha) = (t.get(0).and_then(Value::as_str), t.get(1).and_then(Value::as_str));
            if found != Some(name) || sha.is_none() || sha != self.hash_of(name)?.as_deref() {
                return unusable(&format!("tensor `{name}` is not the one that was kept"));
            }
        }
        for (name, t) in names.iter().zip(&tensors) {
            if let Some(slot) = self.slots.get_mut(name) {
                slot.written = true;
                slot.sha256 = t.get(1).and_then(Value::as_str).map(str::to_string);
            }
        }
        self.entries += 1;
        let digest = sha256_hex(Value::Array(tensors).to_string().as_bytes());
        Ok(Kept::Whole { note: body.get("note").cloned().unwrap_or_default(), digest })
    }

    fn entry(&self, unit: &str) -> PathBuf {
        self.partial.join(FOLDER).join(format!("{unit}.json"))
    }

    /// SHA-256 of the bytes at a tensor's place.
    fn hash_of(&mut self, name: &str) -> Result<Option<String>> {
        let Some(slot) = self.slots.get(name) else { return Ok(None) };
        let (path, file) = &mut self.files[slot.file];
        let mut bytes = vec![0u8; slot.bytes as usize];
        file.seek(SeekFrom::Start(slot.offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|e| CheckpointError::io(path, e))?;
        Ok(Some(sha256_hex(&bytes)))
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::super::Declared;
    use super::*;

    fn writer(target: &Path, key: &str, fresh: bool) -> CheckpointWriter {
        let tensors = ["a", "b"].map(|n| Declared { name: n.into(), dtype: Dtype::U8, shape: vec![4] }).to_vec();
        CheckpointWriter::resume(target, tensors, 4, false, key, fresh).unwrap()
    }

    fn note() -> Value {
        json!({"x": 0.25, "text": "für später"})
    }

    /// A process that wrote `a`, kept it, and was killed while it wrote `b`.
    fn killed(target: &Path) -> String {
        let mut w = writer(target, "k", false);
        w.write("a", b"aaaa").unwrap();
        w.write_file("config.json", b"old").unwrap();
        let digest = w.keep("0", "first", &["a".into()], &note()).unwrap();
        w.write("b", b"bbbb").unwrap();
        drop(w);
        digest
    }

    #[test]
    fn kept_entries_survive_and_are_gone_when_the_checkpoint_is_complete() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("out");
        let digest = killed(&target);
        let mut w = writer(&target, "k", false);
        assert!(!w.unfinished().0.join("config.json").exists());
        match w.kept("0", "first", &["a".into()]).unwrap() {
            Kept::Whole { note: n, digest: d } => assert_eq!((n, d), (note(), digest)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(w.kept("1", "first", &["b".into()]).unwrap(), Kept::Nothing));
        assert!(matches!(w.kept("0", "other", &["a".into()]).unwrap(), Kept::Unusable(_)));
        w.write("b", b"BBBB").unwrap();
        w.finish().unwrap();
        let mut names: Vec<_> =
            std::fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(names, [shards[0], shards[1], "model.safetensors.index.json"]);
        assert!(std::fs::read(target.join(shards[0])).unwrap().ends_with(b"aaaa"));
        assert!(std::fs::read(target.join(shards[1])).unwrap().ends_with(b"BBBB"));
        assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_damaged_or_made_otherwise_is_not_used() {
        type Damage = (&'static str, fn(&Path));
        let damage: [Damage; 4] = [
            ("not JSON", |p| std::fs::write(p.join(".journal/0.json"), "{").unwrap()),
            ("hash", |p| {
                let path = p.join(".journal/0.json");
                let text = std::fs::read_to_string(&path).unwrap().replace("0.25", "0.75");
                std::fs::write(path, text).unwrap();
            }),
            ("tensor `a`", |p| {
                let path = p.join("model-00001-of-00002.safetensors");
                let mut bytes = std::fs::read(&path).unwrap();
                *bytes.last_mut().unwrap() = b'b';
                std::fs::write(path, bytes).unwrap();
            }),
            ("tensor `a`", |p| {
                // Cut short: begun anew, with zeros.
                std::fs::write(p.join("model-00001-of-00002.safetensors"), "x").unwrap();
            }),
        ];
        for (why, damage) in damage {
            let tmp = tempfile::tempdir().unwrap();
            let target = tmp.path().join("out");
            killed(&target);
            damage(&tmp.path().join(".out.partial"));
            let mut w = writer(&target, "k", false);
            match w.kept("0", "first", &["a".into()]).unwrap() {
                Kept::Unusable(text) => assert!(text.contains(why), "{text}"),
                other => panic!("{why}: {other:?}"),
            }
            // Nothing is kept, so nothing is left.
            drop(w);
            assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 0);
        }
        // Another key, or an explicit new start.
        for (key, fresh) in [("other", false), ("k", true)] {
            let tmp = tempfile::tempdir().unwrap();
            let target = tmp.path().join("out");
            killed(&target);
            let mut w = writer(&target, key, fresh);
            assert!(matches!(w.kept("0", "first", &["a".into()]).unwrap(), Kept::Nothing));
            assert_eq!(w.replaced_unfinished(), !fresh);
        }
    }
}
