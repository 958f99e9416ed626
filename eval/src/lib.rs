//! How good a checkpoint is: perplexity, tasks, drift against a reference, and a verdict on it.

pub mod cache;
pub mod drift;
pub mod encode;
pub mod endpoint;
pub mod engine;
pub mod error;
pub mod judge;
pub mod kl;
pub mod perplexity;
pub mod protocol;
pub mod record;
pub mod scorer;
pub mod stats;
pub mod tasks;
pub mod text;
pub mod verdict;
pub mod windows;

#[cfg(test)]
mod fake;

pub use encode::Encode;
pub use error::{EvalError, Result};
pub use kl::{KlOptions, evaluate_kl};
pub use perplexity::evaluate_perplexity;
pub use protocol::{Protocol, Setup, Window, WindowPlan};
pub use record::{EvalRecord, Interval, ItemFile, ItemFiles, KlRecord, PerplexityRecord};
pub use scorer::{LogitRows, Scorer};
pub use tasks::{Item, Request, RequestKind, Response};
pub use text::Source;
