//! Bytes on disk to named tensors and back: safetensors, `config.json`, tokenizer, chat template, quantization configs,
//! GGUF import, hub download, provenance hashes. Computes nothing.
//!
//! ```
//! use lowbit_checkpoint::Checkpoint;
//!
//! # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/demo"));
//! let checkpoint = Checkpoint::open(folder)?;
//! assert_eq!((checkpoint.config.num_layers, checkpoint.quantization.is_some()), (4, false));
//! assert_eq!(checkpoint.store.get("model.norm.weight")?.shape, [256]);
//! # Ok::<(), lowbit_checkpoint::CheckpointError>(())
//! ```

pub mod awq;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod converted;
pub mod error;
pub mod files;
pub mod gguf;
pub mod guard;
pub mod hash;
pub mod hub;
pub mod linear;
pub mod mapped;
pub mod provenance;
pub mod quant_config;
pub mod store;
pub mod tokenizer;
pub mod writer;

pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use error::{CheckpointError, Result};
pub use safetensors::Dtype;
