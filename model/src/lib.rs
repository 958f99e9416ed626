//! ONE decoder graph for every architecture and every weight format, driven by config.

pub mod block;
pub mod decoder;
pub mod error;
pub mod experts;
pub mod generate;
mod latent;
pub mod rope;
pub mod sampling;
mod shapes;
pub mod source;
mod step;
pub mod synthetic;

pub use block::Linear;
pub use decoder::{Embedding, Head, KvCache, Model, Part};
pub use error::{ModelError, Result};
pub use generate::{GenerateOptions, Generation, generate, write_texts};
pub use sampling::Sampling;
pub use source::Source;
