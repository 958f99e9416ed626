//! Where a checkpoint goes: who may write there, what may be replaced, and the step that puts it there.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::error::{CheckpointError, Result};

/// The path behind a link, so that a link stays one; the path itself where there is none.
pub(super) fn followed(path: &Path) -> PathBuf {
    match path.is_symlink() {
        true => path.canonicalize().unwrap_or_else(|_| path.to_path_buf()),
        false => path.to_path_buf(),
    }
}

/// Where the replaced folder stands while it is neither here nor there.
pub(super) fn old_path(partial: &Path) -> PathBuf {
    partial.with_extension("old")
}

/// Refuses an existing target: any without `force`, and with it whatever is not a checkpoint. A mistyped `--force -o ~` must
/// not be the end of a home folder.
pub(super) fn refuse(target: &Path, force: bool) -> Result<()> {
    let Ok(found) = std::fs::symlink_metadata(target) else { return Ok(()) };
    if !force {
        return Err(CheckpointError::Exists { path: target.to_path_buf() });
    }
    let foreign = |problem: String| {
        let hint = "--force replaces a checkpoint and nothing else: choose another output, or remove this one yourself";
        Err(CheckpointError::invalid_hint(target, problem, hint))
    };
    if !found.is_dir() {
        return foreign("is not a folder".into());
    }
    let io = |e| CheckpointError::io(target, e);
    let (mut empty, mut checkpoint) = (true, false);
    for entry in std::fs::read_dir(target).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().map_err(io)?.is_dir() {
            return foreign(format!("holds the folder `{name}`, so it is not a checkpoint"));
        }
        empty = false;
        checkpoint |= name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".gguf");
    }
    match empty || checkpoint {
        true => Ok(()),
        false => foreign("holds files, and neither config.json nor *.safetensors nor *.gguf among them".into()),
    }
}

/// What [`claim`] found and made.
pub(super) struct Claimed {
    /// Held as long as the folder is ours.
    pub lock: Option<File>,
    /// The folder was there and stays as it is.
    pub kept: bool,
    /// A folder with entries was there and was replaced by an empty one.
    pub replaced: bool,
}

/// Makes the folder `partial` and locks it for the life of this process. What a process left that is no more is removed, unless
/// `keep` says that it is to be gone on with.
pub(super) fn claim(target: &Path, partial: &Path, keep: &dyn Fn(&Path) -> bool) -> Result<Claimed> {
    let io = |e| CheckpointError::io(partial, e);
    let lock = || -> Result<Option<File>> {
        // A file system without locks loses the warning, not the output.
        let Ok(folder) = File::open(partial) else { return Ok(None) };
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => Err(CheckpointError::invalid_hint(
                target,
                "another process is writing it",
                "wait for that one, or choose another output",
            )),
            _ => Ok(Some(folder)),
        }
    };
    match std::fs::create_dir(partial) {
        Ok(()) => return Ok(Claimed { lock: lock()?, kept: false, replaced: false }),
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(e)),
        Err(_) => {}
    }
    let mut replaced = false;
    if std::fs::symlink_metadata(partial).is_ok_and(|m| m.is_dir()) {
        let left = lock()?;
        if keep(partial) {
            return Ok(Claimed { lock: left, kept: true, replaced: false });
        }
        replaced = super::journal::has_entries(partial);
        std::fs::remove_dir_all(partial).map_err(io)?;
        drop(left);
    } else {
        std::fs::remove_file(partial).map_err(io)?;
    }
    std::fs::create_dir(partial).map_err(io)?;
    Ok(Claimed { lock: lock()?, kept: false, replaced })
}

/// Undoes what a process killed inside [`put`] left: a target moved aside comes back, one replaced is removed.
pub(super) fn recover(target: &Path, old: &Path) -> Result<()> {
    if !old.is_dir() {
        return Ok(());
    }
    let io = |e| CheckpointError::io(old, e);
    match target.exists() {
        true => std::fs::remove_dir_all(old).map_err(io),
        false => std::fs::rename(old, target).map_err(io),
    }
}

/// Puts `partial` at `target`, in one step: at every moment the target is the old checkpoint or the new one, whole.
pub(super) fn put(partial: &Path, target: &Path) -> Result<()> {
    let io = |e| CheckpointError::io(target, e);
    if !target.exists() {
        std::fs::rename(partial, target).map_err(io)?;
        return sync_parent(target);
    }
    match renameat_with(CWD, partial, CWD, target, RenameFlags::EXCHANGE) {
        Ok(()) => {
            sync_parent(target)?;
            std::fs::remove_dir_all(partial).map_err(io)
        }
        // Network file systems cannot exchange.
        Err(_) => put_in_two_steps(partial, target),
    }
}

/// As [`put`]; between its two renames the target is missing, and [`recover`] brings it back.
fn put_in_two_steps(partial: &Path, target: &Path) -> Result<()> {
    let io = |e| CheckpointError::io(target, e);
    let old = old_path(partial);
    std::fs::rename(target, &old).map_err(io)?;
    if let Err(e) = std::fs::rename(partial, target) {
        std::fs::rename(&old, target).map_err(io)?;
        return Err(io(e));
    }
    sync_parent(target)?;
    std::fs::remove_dir_all(&old).map_err(io)
}

fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    File::open(parent).and_then(|f| f.sync_all()).map_err(|e| CheckpointError::io(parent, e))
}

/// A link that leads out of the checkpoint is refused; one into the folder, or into the hub cache's `blobs`, is its file.
pub(super) fn refuse_foreign_link(source: &Path, file: &Path) -> Result<()> {
    if !file.is_symlink() {
        return Ok(());
    }
    let io = |e| CheckpointError::io(file, e);
    let (folder, real) = (source.canonicalize().map_err(io)?, file.canonicalize().map_err(io)?);
    let blobs = folder.parent().filter(|p| p.ends_with("snapshots")).and_then(Path::parent).map(|p| p.join("blobs"));
    if real.starts_with(&folder) || blobs.is_some_and(|b| real.starts_with(b)) {
        return Ok(());
    }
    Err(CheckpointError::invalid_hint(
        file,
        format!("is a link out of the checkpoint, to {}", real.display()),
        "put the file itself in its place, or remove the link",
    ))
}

#[cfg(test)]
mod tests {
    use super::super::{CheckpointWriter, Declared, write_atomic};
    use super::*;

    fn writer(target: &Path, force: bool) -> Result<CheckpointWriter> {
        let tensors = vec![Declared { name: "a".into(), dtype: safetensors::Dtype::U8, shape: vec![3] }];
        let mut w = CheckpointWriter::create(target, tensors, 100, force)?;
        w.write("a", b"new")?;
        w.write_file("config.json", b"{}")?;
        Ok(w)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut n: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        n.sort();
        n
    }

    #[test]
    fn force_replaces_a_checkpoint_and_nothing_else() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("out");
        writer(&target, false).unwrap().finish().unwrap();
        assert!(writer(&target, false).is_err());
        std::fs::write(target.join("old"), "").unwrap();
        writer(&target, true).unwrap().finish().unwrap();
        assert_eq!(names(&target), ["config.json", "model.safetensors"]);
        assert_eq!(names(tmp.path()), ["out"]);

        for (what, make) in [
            ("folder `sub`", (|d: &Path| std::fs::create_dir_all(d.join("sub")).unwrap()) as fn(&Path)),
            ("neither config.json", |d| std::fs::write(d.join("thesis.txt"), "").unwrap()),
        ] {
            let home = tmp.path().join("home");
            std::fs::create_dir(&home).unwrap();
            make(&home);
            let error = writer(&home, true).err().unwrap();
            assert!(error.to_string().contains(what), "{error}");
            assert_eq!(names(&home).len(), 1);
            std::fs::remove_dir_all(&home).unwrap();
        }
        std::fs::write(tmp.path().join("file"), "mine").unwrap();
        assert!(writer(&tmp.path().join("file"), true).is_err());
        assert_eq!(names(tmp.path()), ["file", "out"]);
    }

    #[test]
    fn what_a_killed_process_left_is_cleared_and_a_living_one_is_respected() {
        let tmp = tempfile::tempdir().unwrap();
        let (target, partial) = (tmp.path().join("out"), tmp.path().join(".out.partial"));
        std::fs::create_dir(&partial).unwrap();
        std::fs::write(partial.join("junk"), "").unwrap();
        let living = writer(&target, false).unwrap();
        assert_eq!(names(&partial), ["config.json", "model.safetensors"]);
        let error = writer(&target, false).err().unwrap();
        assert!(error.to_string().contains("another process"), "{error}");
        living.finish().unwrap();
        assert_eq!(names(&target), ["config.json", "model.safetensors"]);

        // Killed between the two renames of a file system that cannot exchange: the old checkpoint comes back.
        let old = tmp.path().join(".out.old");
        std::fs::rename(&target, &old).unwrap();
        assert!(matches!(writer(&target, false).err().unwrap(), CheckpointError::Exists { .. }));
        assert!(target.join("config.json").exists() && !old.exists());
        // Killed after them: the old one goes.
        std::fs::create_dir(&old).unwrap();
        writer(&target, true).unwrap().finish().unwrap();
        assert_eq!(names(tmp.path()), ["out"]);

        std::fs::create_dir(&partial).unwrap();
        put_in_two_steps(&partial, &target).unwrap();
        assert_eq!((names(tmp.path()), names(&target).len()), (vec!["out".into()], 0));
    }

    #[test]
    fn links_stay_and_devices_are_written_to() {
        let tmp = tempfile::tempdir().unwrap();
        let at = |n: &str| tmp.path().join(n);
        std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
        assert!(writer(&at("link"), true).is_err(), "a link to nothing");
        writer(&at("real"), false).unwrap().finish().unwrap();
        writer(&at("link"), true).unwrap().finish().unwrap();
        assert!(at("link").is_symlink() && at("real/config.json").exists());

        std::fs::write(at("record"), "old").unwrap();
        std::os::unix::fs::symlink(at("record"), at("alias")).unwrap();
        // Left by a killed process, or put there by a stranger.
        std::os::unix::fs::symlink(at("victim"), at(".record.partial")).unwrap();
        write_atomic(&at("alias"), b"new").unwrap();
        assert!(at("alias").is_symlink() && !at("victim").exists());
        assert_eq!(std::fs::read(at("record")).unwrap(), b"new");
        assert!(write_atomic(&at("real"), b"x").is_err());
        write_atomic(Path::new("/dev/null"), b"x").unwrap();
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file(), "the device is still one");
    }

    #[test]
    fn links_out_of_a_checkpoint_are_not_carried_over() {
        let tmp = tempfile::tempdir().unwrap();
        let source = tmp.path().join("models--a--b/snapshots/1");
        std::fs::create_dir_all(&source).unwrap();
        let blobs = tmp.path().join("models--a--b/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        for (file, text) in [(blobs.join("1"), "{}"), (tmp.path().join("secret"), "key")] {
            std::fs::write(file, text).unwrap();
        }
        std::os::unix::fs::symlink("../../blobs/1", source.join("tokenizer.json")).unwrap();
        let w = writer(&tmp.path().join("out"), false).unwrap();
        w.carry_over(&source, &[]).unwrap();
        std::os::unix::fs::symlink("../../../secret", source.join("notes.txt")).unwrap();
        let error = w.carry_over(&source, &[]).unwrap_err().to_string();
        assert!(error.contains("notes.txt") && error.contains("secret"), "{error}");
        w.finish().unwrap();
        assert_eq!(names(&tmp.path().join("out")), ["config.json", "model.safetensors", "tokenizer.json"]);
    }
}
