//! Number formats and the operations on them: slices, buffers and sizes only, no files, no layer names.

pub mod backend;
pub mod cpu;
#[cfg(any(feature = "emulated", feature = "cuda"))]
pub mod cuda;
pub mod error;
pub mod ggml;
pub mod pack;
pub mod qdq;
pub mod quantized;
pub mod random;
pub mod scheme;

pub use error::{KernelError, Result};
pub use qdq::ScaleType;
pub use quantized::QuantizedMatrix;
pub use scheme::{GroupSize, Scheme};
