//! SHA-256 of bytes, of files and of whole checkpoints.

use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};

use crate::error::{CheckpointError, Result};

const BUFFER: usize = 1 << 20;

fn hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// Lower-case hexadecimal SHA-256 of some bytes.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hexadecimal SHA-256 of a file, read in pieces of 1 MiB.
pub fn sha256_file(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let io = |source| CheckpointError::Io { file: path.to_path_buf(), source };
    let mut file = crate::files::open(path).map_err(io)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; BUFFER];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(read) => hasher.update(buffer.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io(error)),
        }
    }
}

/// Whether a file name counts towards the identity of a checkpoint.
fn is_part_of_model(name: &str) -> bool {
    let ends = [".safetensors", ".index.json", ".gguf"];
    name == "config.json" || name == "tokenizer.json" || ends.iter().any(|e| name.ends_with(e))
}

/// SHA-256 of some files of a folder, several at a time: reading a file and hashing it each keep one core busy.
fn sha256_files(dir: &Path, names: &[String]) -> Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let pull = || {
        let mut done = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(name) = names.get(i) else { return done };
            done.push((i, sha256_file(dir.join(name))));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(names.len());
    let mut done = std::thread::scope(|scope| {
        // Where the system has no thread to give, those that are there do the work.
        let others: Vec<_> =
            (1..threads).filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, pull).ok()).collect();
        let mut done = pull();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, sha)| sha).collect()
}

/// The identity of a checkpoint folder: SHA-256 over one line `name NUL sha256 LF` for each of
/// `config.json`, `tokenizer.json`, `*.safetensors`, `*.index.json` and `*.gguf`, sorted by name.
pub fn model_sha256(dir: &Path) -> Result<String> {
    let io = |source| CheckpointError::Io { file: dir.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        if let Some(name) = name.to_str()
            && is_part_of_model(name)
            && entry.path().is_file()
        {
            names.push(name.to_string());
        }
    }
    if names.is_empty() {
        return Err(CheckpointError::Invalid {
            file: dir.to_path_buf(),
            problem: "no config.json, tokenizer.json or *.safetensors to hash".into(),
            hint: Some("give the folder that holds the checkpoint's files".into()),
        });
    }
    names.sort();
    let mut all = Sha256::new();
    for (name, sha) in names.iter().zip(sha256_files(dir, &names)?) {
        all.update(name.as_bytes());
        all.update(b"\0");
        all.update(sha.as_bytes());
        all.update(b"\n");
    }
    Ok(hex(&all.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_digest_of_bytes_and_of_a_file_longer_than_the_buffer() {
        assert_eq!(sha256_hex(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big");
        let data: Vec<u8> = (0..BUFFER * 2 + 17).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        assert_eq!(sha256_file(&path).unwrap(), sha256_hex(&data));
        assert!(sha256_file(dir.path().join("none")).is_err());
    }

    #[test]
    fn model_hash_follows_the_files_that_count_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        assert!(model_sha256(dir.path()).is_err());
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        std::fs::write(dir.path().join("model.safetensors"), "w").unwrap();
        let first = model_sha256(dir.path()).unwrap();
        let text = format!("config.json\0{}\nmodel.safetensors\0{}\n", sha256_hex(b"{}"), sha256_hex(b"w"));
        assert_eq!(first, sha256_hex(text.as_bytes()));
        std::fs::write(dir.path().join("README.md"), "x").unwrap();
        assert_eq!(first, model_sha256(dir.path()).unwrap());
        std::fs::write(dir.path().join("model.safetensors"), "v").unwrap();
        assert_ne!(first, model_sha256(dir.path()).unwrap());
    }

    #[test]
    fn files_hashed_at_once_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..40).map(|i| format!("model-{i:02}.safetensors")).collect();
        let mut text = String::new();
        for (i, name) in names.iter().enumerate() {
            let data = vec![i as u8; 1 << (i % 17)];
            std::fs::write(dir.path().join(name), &data).unwrap();
            text += &format!("{name}\0{}\n", sha256_hex(&data));
        }
        assert_eq!(model_sha256(dir.path()).unwrap(), sha256_hex(text.as_bytes()));
        let missing = ["none-b".to_string(), names[0].clone(), "none-a".to_string()];
        let error = sha256_files(dir.path(), &missing).unwrap_err().to_string();
        assert!(error.contains("none-b"), "the first of the list is told: {error}");
    }
}
