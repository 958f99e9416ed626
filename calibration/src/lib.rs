//! What data says about each linear: a corpus becomes token windows, windows become statistics.

pub mod carried;
pub mod corpus;
pub mod error;
pub mod experts;
pub mod lanes;
pub mod sequential;
pub mod stats;
pub mod survey;
mod units;
pub mod windows;

pub use corpus::{Source, load_texts};
pub use error::{CalibrationError, Result};
pub use sequential::{KvRange, PassOptions, SequentialPass, WholeBlock};
pub use stats::{Blend, Drift, InputStats};
pub use survey::Channels;
pub use windows::{WindowOrder, Windows, build_windows};
