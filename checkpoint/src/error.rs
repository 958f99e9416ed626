//! Errors of this crate: they name the file, the tensor, what was expected and found, and a way out.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, CheckpointError>;

/// What can go wrong between bytes on disk and named tensors.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// File or folder.
        file: PathBuf,
        /// Its reason.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {problem}", file.display())]
    Invalid {
        /// File or folder.
        file: PathBuf,
        /// Expected and found.
        problem: String,
        /// A way out.
        hint: Option<String>,
    },
    /// A model we cannot compute, or a format we cannot read yet.
    #[error("{what}")]
    Unsupported {
        /// What, by name.
        what: String,
        /// A way out.
        hint: Option<String>,
    },
    /// A tensor is missing.
    #[error("{}: tensor `{tensor}` is missing", dir.display())]
    MissingTensor {
        /// Checkpoint folder.
        dir: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// A tensor has another shape or dtype than the config says.
    #[error("{}: tensor `{tensor}`: expected {expected}, found {found}", dir.display())]
    Tensor {
        /// Checkpoint folder.
        dir: PathBuf,
        /// Its name.
        tensor: String,
        /// Expected.
        expected: String,
        /// Found.
        found: String,
    },
    /// The output exists.
    #[error("{} already exists", path.display())]
    Exists {
        /// Output path.
        path: PathBuf,
    },
    /// The hub or the way there.
    #[error("hub: {repo}: {problem}")]
    Hub {
        /// Repository.
        repo: String,
        /// Reason.
        problem: String,
        /// A way out.
        hint: Option<String>,
    },
    /// A matrix operation failed for a tensor.
    #[error("{}: tensor `{tensor}`: {source}", dir.display())]
    Kernel {
        /// Checkpoint folder.
        dir: PathBuf,
        /// Its name.
        tensor: String,
        /// Reason.
        source: lowbit_kernels::KernelError,
    },
}

impl CheckpointError {
    /// An I/O error with its file.
    pub fn io(file: &Path, source: std::io::Error) -> Self {
        Self::Io { file: file.to_path_buf(), source }
    }

    /// An invalid file.
    pub fn invalid(file: &Path, problem: impl Into<String>) -> Self {
        Self::Invalid { file: file.to_path_buf(), problem: problem.into(), hint: None }
    }

    /// An invalid file with a way out.
    pub fn invalid_hint(file: &Path, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Invalid { file: file.to_path_buf(), problem: problem.into(), hint: Some(hint.into()) }
    }

    /// The way out, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Invalid { hint, .. } | Self::Unsupported { hint, .. } | Self::Hub { hint, .. } => hint.clone(),
            Self::Exists { .. } => Some("choose another output, or pass --force to replace it".into()),
            Self::MissingTensor { .. } => Some("the download may be incomplete: fetch the checkpoint again".into()),
            Self::Io { source, .. } => io_hint(source).map(str::to_string),
            _ => None,
        }
    }
}

/// The way out of a refusal by the operating system, where there is a usual one.
pub fn io_hint(error: &std::io::Error) -> Option<&'static str> {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Some("free some space or choose an output on another disk; the same command then completes")
        }
        ErrorKind::ReadOnlyFilesystem => Some("choose an output where you may write"),
        ErrorKind::NotFound => Some("check the spelling of the path, and the folder that it starts from"),
        ErrorKind::PermissionDenied => Some("check who may read and write there, or choose another place"),
        _ if error.raw_os_error() == Some(libc::EIO) => {
            Some("the disk there reports a fault: check it, or choose another place")
        }
        // The system was to copy from a mapped page that is no more.
        _ if error.raw_os_error() == Some(libc::EFAULT) => {
            Some("an input file was cut short while it was read: make it whole again, and give the same command again")
        }
        _ => None,
    }
}
