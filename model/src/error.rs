//! Errors of this crate.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

/// What can go wrong while loading or running a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A checkpoint problem.
    #[error(transparent)]
    Checkpoint(#[from] lowbit_checkpoint::CheckpointError),
    /// A kernel refused; the op and layer are named.
    #[error("{place}: {source}")]
    Kernel {
        /// Module or step.
        place: String,
        /// Reason.
        source: lowbit_kernels::KernelError,
    },
    /// More tokens than the cache holds.
    #[error("sequence of {tokens} tokens does not fit a cache of {capacity}")]
    CacheFull {
        /// Tokens needed.
        tokens: usize,
        /// Tokens it holds.
        capacity: usize,
    },
    /// A bad argument.
    #[error("{0}")]
    Argument(String),
}

/// Names the place of a kernel error.
pub(crate) trait At<T> {
    fn at(self, place: &str) -> Result<T>;
}

impl<T> At<T> for lowbit_kernels::Result<T> {
    fn at(self, place: &str) -> Result<T> {
        self.map_err(|source| ModelError::Kernel { place: place.to_string(), source })
    }
}
