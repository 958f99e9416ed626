//! ONE decoder graph for every architecture and every weight format, driven by config.
//!
//! ```
//! use std::sync::Arc;
//!
//! use lowbit_checkpoint::{Checkpoint, tokenizer::Tokenizer};
//! use lowbit_kernels::cpu::CpuBackend;
//! use lowbit_model::{GenerateOptions, Model, generate};
//!
//! # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/demo"));
//! let model = Model::load(&Checkpoint::open(folder)?, Arc::new(CpuBackend::new()))?;
//! let tokenizer = Tokenizer::load(folder)?;
//! let prompt = tokenizer.encode("The boats on the river", true)?;
//! let options = GenerateOptions { max_new_tokens: 4, ..Default::default() };
//! let said = generate(&model, &prompt, &options, &mut |_| true)?;
//! println!("{}", tokenizer.decode(&said.tokens, true)?);
//! # assert_eq!(said.tokens.len(), 4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
