//! Errors of this crate.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ServeError>;

/// What can go wrong while serving.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The model or its cache.
    #[error(transparent)]
    Model(#[from] lowbit_model::ModelError),
    /// The tokenizer or the chat template.
    #[error(transparent)]
    Checkpoint(#[from] lowbit_checkpoint::CheckpointError),
    /// The network.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Reason.
        source: std::io::Error,
    },
    /// A request that cannot be served as it is.
    #[error("{0}")]
    Request(String),
    /// No room now.
    #[error("the queue is full ({waiting} requests wait); try again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
    },
    /// The engine is going down.
    #[error("the server is shutting down")]
    Closing,
    /// Options that cannot work.
    #[error("{0}")]
    Options(String),
}
