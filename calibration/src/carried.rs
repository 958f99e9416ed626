//! Activations between stages: in memory, or one file a chunk under a folder of the user's (`--offload DIR`).

use std::path::{Path, PathBuf};

use lowbit_kernels::backend::{Backend, Buffer};

use crate::error::{CalibrationError, Result};

/// One buffer per chunk.
///
/// [`Carried::load`] hands a chunk out; it goes back by [`Carried::store`] when it changed, by [`Carried::restore`]
/// when it did not (which costs no write on disk).
pub struct Carried<'a> {
    backend: &'a dyn Backend,
    memory: Vec<Option<Buffer>>,
    files: Option<Files>,
}

struct Files {
    dir: PathBuf,
    name: &'static str,
    /// By chunk.
    numbers: Vec<usize>,
}

impl<'a> Carried<'a> {
    /// Room for a buffer for each of `numbers`; on disk as `offload/NAME-NUMBER.f32` when `offload` is given, so that devices that
    /// carry different chunks share a folder.
    pub fn new(backend: &'a dyn Backend, numbers: Vec<usize>, name: &'static str, offload: Option<&Path>) -> Self {
        let memory = numbers.iter().map(|_| None).collect();
        let files = offload.map(|dir| Files { dir: dir.to_path_buf(), name, numbers });
        Self { backend, memory, files }
    }

    /// No room.
    pub fn nothing(backend: &'a dyn Backend) -> Self {
        Self { backend, memory: Vec::new(), files: None }
    }

    /// Takes chunk `i` out.
    pub fn load(&mut self, i: usize) -> Result<Buffer> {
        let missing = || CalibrationError::Record {
            path: PathBuf::from("activations"),
            place: format!("chunk {i}"),
            why: "was not carried".into(),
        };
        match &self.files {
            None => self.memory.get_mut(i).and_then(Option::take).ok_or_else(missing),
            Some(f) => {
                let path = f.path(i).ok_or_else(missing)?;
                let bytes = std::fs::read(&path).map_err(|source| CalibrationError::Io { path, source })?;
                let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
                Ok(self.backend.upload(&values)?)
            }
        }
    }

    /// Puts a changed chunk back.
    pub fn store(&mut self, i: usize, x: Buffer) -> Result<()> {
        let Some(path) = self.files.as_ref().and_then(|f| f.path(i)) else { return self.restore(i, x) };
        let bytes: Vec<u8> = self.backend.download(&x)?.iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(&path, bytes).map_err(|source| CalibrationError::Io { path, source })
    }

    /// Puts an unchanged chunk back.
    pub fn restore(&mut self, i: usize, x: Buffer) -> Result<()> {
        if self.files.is_none()
            && let Some(slot) = self.memory.get_mut(i)
        {
            *slot = Some(x);
        }
        Ok(())
    }
}

impl Files {
    fn path(&self, i: usize) -> Option<PathBuf> {
        self.numbers.get(i).map(|number| self.dir.join(format!("{}-{number}.f32", self.name)))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Only files of this name were written here; a file that never came to be is no loss.
        for path in (0..self.numbers.len()).filter_map(|i| self.path(i)) {
            let _ = std::fs::remove_file(path);
        }
    }
}
