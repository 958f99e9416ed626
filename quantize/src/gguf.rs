//! Quantizing into one GGUF file, for llama.cpp and what is built on it.
//!
//! `Q4_0`, `Q5_0` and `Q8_0` are symmetric integer schemes with groups of 32 and f16 scales: every method works on them, and the
//! solver's codes are the file's. `Q4_K` and `Q6_K` have their own grids ([`crate::blocks`]). Rows that a type's blocks do not
//! fit get the type llama.cpp takes for them, and the plan says so.

mod plan;
mod verify;

use lowbit_kernels::ggml::GgmlType;

pub(crate) use plan::make;
pub use verify::verify;

/// What becomes what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufChoice {
    /// The linears of the blocks.
    pub kind: GgmlType,
    /// The token embedding; as it is when absent.
    pub embedding: Option<GgmlType>,
    /// The head; as it is when absent.
    pub head: Option<GgmlType>,
}

/// A type's name as schemes are written: `q4_0`, `q6_k`.
pub fn scheme_name(kind: GgmlType) -> String {
    kind.name().to_ascii_lowercase()
}
