//! How weights change: the plan, one pure file per algorithm, and the driver that streams a model through them.

pub mod blocks;
pub mod descent;
pub mod driver;
pub mod error;
pub mod factor;
pub mod gguf;
pub mod gptq;
pub mod loss;
pub mod plan;
pub mod record;
mod room;
pub mod rtn;
pub mod scale_search;
pub mod solve;
pub mod target;
pub mod verify;

pub use driver::{Outcome, Progress, Silent, quantize};
pub use error::{QuantizeError, Result};
pub use plan::{Method, Plan, QuantizeOptions};
