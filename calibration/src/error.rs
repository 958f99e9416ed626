//! Errors of this crate: they name the file and the line, item or row.

use std::path::PathBuf;

use lowbit_checkpoint::error::CheckpointError;
use lowbit_kernels::KernelError;
use lowbit_model::ModelError;

/// What can go wrong between a corpus and its statistics.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// A file or directory could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A `--calib` value is none of the forms we know.
    #[error("unknown calibration source `{given}`: {why}")]
    UnknownSource {
        /// As given.
        given: String,
        /// Why it is not one.
        why: &'static str,
    },
    /// A line, item or row of a file is malformed.
    #[error("{}, {place}: {why}", path.display())]
    Record {
        /// File.
        path: PathBuf,
        /// `line 3`, `item 3`, `row 3`; all counted from 1.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// A chat record cannot become text without the model's chat template.
    #[error("{}, {place}: a chat record needs a chat template and the model has none", path.display())]
    NeedsTemplate {
        /// File.
        path: PathBuf,
        /// Where.
        place: String,
    },
    /// Rendering a chat record failed.
    #[error("{}, {place}: the chat template failed: {source}", path.display())]
    Template {
        /// File.
        path: PathBuf,
        /// Where.
        place: String,
        /// Why.
        source: Box<CheckpointError>,
    },
    /// A parquet file could not be decoded.
    #[error("{}: {source}", path.display())]
    Parquet {
        /// File.
        path: PathBuf,
        /// Why.
        source: parquet::errors::ParquetError,
    },
    /// A float stream without the block it runs through.
    #[error("block {block}: the float stream needs the block with its original weights")]
    NoOriginal {
        /// Block.
        block: usize,
    },
    /// A block that is not on every device.
    #[error("a block is on {found} devices, and {expected} calibrate")]
    Replicas {
        /// Devices that have it.
        found: usize,
        /// Devices of the pass.
        expected: usize,
    },
    /// A file or directory holds no text.
    #[error("{} holds no text", .0.display())]
    NoText(PathBuf),
    /// A count that must be positive is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The product of two counts does not fit.
    #[error("{samples} windows of {seq_len} tokens overflow")]
    TooLarge {
        /// Windows.
        samples: usize,
        /// Tokens in each.
        seq_len: usize,
    },
    /// The corpus is too short.
    #[error("the corpus holds {available} windows of {seq_len} tokens ({tokens} tokens), {wanted} were asked for")]
    TooFewWindows {
        /// Windows there are.
        available: usize,
        /// Windows asked for.
        wanted: usize,
        /// Tokens in each.
        seq_len: usize,
        /// Tokens in the corpus.
        tokens: usize,
    },
    /// From the checkpoint: tokenizer, files.
    #[error(transparent)]
    Checkpoint(Box<CheckpointError>),
    /// From the forward pass.
    #[error(transparent)]
    Model(Box<ModelError>),
    /// From an operation.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl CalibrationError {
    /// The way out, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownSource { .. } => Some(
                "give a .txt, .raw, .jsonl, .json or .parquet file, a directory of them, a data set id such as \
                 datasets/owner/name, or `self`"
                    .to_string(),
            ),
            Self::NeedsTemplate { .. } => Some("calibrate on records with a `text` field".to_string()),
            Self::TooFewWindows { available: 0, tokens, .. } => {
                Some(format!("--seq-len {tokens} --samples 1 fits; otherwise give a longer corpus"))
            }
            Self::TooFewWindows { available, .. } => Some(format!(
                "--samples {available} fits, and so do more with a smaller --seq-len; otherwise give a longer corpus"
            )),
            Self::Parquet { .. } => {
                Some("snappy and uncompressed columns are read; convert other files to .jsonl".to_string())
            }
            Self::Checkpoint(source) | Self::Template { source, .. } => source.hint(),
            _ => None,
        }
    }
}

impl From<CheckpointError> for CalibrationError {
    fn from(e: CheckpointError) -> Self {
        Self::Checkpoint(Box::new(e))
    }
}

impl From<ModelError> for CalibrationError {
    fn from(e: ModelError) -> Self {
        Self::Model(Box::new(e))
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, CalibrationError>;
