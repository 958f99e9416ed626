//! How weights change: the plan, one pure file per algorithm, and the driver that streams a model through them.
//!
//! ```
//! use lowbit_checkpoint::Checkpoint;
//! use lowbit_kernels::{GroupSize, Scheme};
//! use lowbit_quantize::{QuantizeOptions, plan};
//!
//! # let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/demo"));
//! let options = QuantizeOptions::new(Scheme::parse("w4a16", GroupSize::Cols(64), true)?);
//! let plan = plan::make(&Checkpoint::open(folder)?, &options, None, 128 * 512)?;
//! // Exact, and before any work.
//! assert!(plan.record.after_bytes < plan.record.before_bytes / 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod block_search;
pub mod blocks;
pub mod budget;
pub mod descent;
pub mod driver;
pub mod error;
mod experts;
pub mod factor;
pub mod floats;
pub mod gguf;
pub mod gptq;
pub mod hqq;
pub mod inputs;
pub mod learned;
pub mod loss;
mod on_device;
pub mod plan;
pub mod probe;
pub mod record;
pub mod resume;
mod room;
pub mod rtn;
pub mod scale_search;
pub mod solve;
pub mod target;
pub mod transform;
pub mod verify;
mod written;

pub use driver::{Outcome, Progress, Silent, quantize};
pub use error::{QuantizeError, Result};
pub use plan::{Method, Plan, QuantizeOptions};
pub use resume::Resume;
pub use transform::Transform;
