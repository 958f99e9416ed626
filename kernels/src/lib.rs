//! Number formats and the operations on them: slices, buffers and sizes only, no files, no layer names.
//!
//! ```
//! use lowbit_kernels::{GroupSize, Scheme, pack, qdq};
//!
//! let scheme = Scheme::parse("w4a16", GroupSize::Cols(64), true)?;
//! assert_eq!(scheme.full_name(), "w4a16-g64");
//! // One code by the one rounding rule, and what it stands for.
//! let code = qdq::quantize(0.3, 0.1, scheme.mid_code(), scheme.max_code());
//! assert_eq!((code, qdq::dequantize(code, 0.1, scheme.mid_code())), (11, 0.3));
//! // Eight codes of four bits fill a word.
//! assert_eq!(pack::pack_rows(&[code, 0, 0, 0, 0, 0, 0, 1], 1, 8, 4)?, [0x1000_000b]);
//! # Ok::<(), lowbit_kernels::KernelError>(())
//! ```

pub mod activation;
pub mod backend;
pub mod cpu;
#[cfg(any(feature = "emulated", feature = "cuda"))]
pub mod cuda;
pub mod draw;
pub mod error;
pub mod floats;
pub mod ggml;
pub mod minifloat;
pub mod pack;
pub mod qdq;
pub mod quantized;
pub mod random;
pub mod scheme;
pub mod solver;
pub mod w8a8;

pub use error::{KernelError, Result};
pub use qdq::ScaleType;
pub use quantized::{QuantizedMatrix, QuantizedWeight};
pub use scheme::{Fp8Scale, GroupSize, InputFormat, LinearScheme, Scheme, WeightFormat};
