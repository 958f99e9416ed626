//! Errors of the load generator.

use std::path::PathBuf;

/// What can go wrong before or around a load run. A request that fails is not an error but a result: see
/// [`crate::load::trace::Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// An option that cannot be.
    #[error("{what}: {why}\nhint: {hint}")]
    Option {
        /// Which, as given.
        what: String,
        /// What is wrong with it.
        why: String,
        /// What would be right.
        hint: String,
    },
    /// The server cannot be reached.
    #[error("cannot reach {url}: {why}\nhint: is the server up? `lowbit serve MODEL` starts one")]
    Unreachable {
        /// Address.
        url: String,
        /// The system's words.
        why: String,
    },
    /// The server answers, but not as an OpenAI-compatible one.
    #[error("{url}: {why}")]
    Server {
        /// Address.
        url: String,
        /// What it answered.
        why: String,
    },
    /// A file could not be read.
    #[error("cannot read {path}")]
    Io {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// A row of a file is not what it should be.
    #[error("{path}, {place}: {why}")]
    Row {
        /// File.
        path: PathBuf,
        /// Line or row, counted from 1.
        place: String,
        /// Why.
        why: String,
    },
    /// The poller or a socket of ours failed.
    #[error("the client's event loop failed: {0}")]
    Loop(std::io::Error),
    /// Nothing can be said from the samples.
    #[error("no result: {0}")]
    Samples(String),
}

impl LoadError {
    /// An option that cannot be.
    pub fn option(what: impl Into<String>, why: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Option { what: what.into(), why: why.into(), hint: hint.into() }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, LoadError>;
