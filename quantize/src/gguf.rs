//! Quantizing into one GGUF file, for llama.cpp and what is built on it.
//!
//! `Q4_0`, `Q5_0` and `Q8_0` are symmetric integer schemes with groups of 32 and f16 scales: every method works on them, and the
//! solver's codes are the file's. `Q4_K` and `Q6_K` have their own grids ([`crate::blocks`]). Rows that a type's blocks do not
//! fit get the type llama.cpp takes for them, and the plan says so.

mod driver;
mod plan;
mod verify;

use lowbit_checkpoint::gguf::write::FileLayout;
use lowbit_kernels::ggml::GgmlType;

pub(crate) use driver::quantize;
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

/// One matrix to quantize.
#[derive(Clone, Debug)]
pub struct GgufLinear {
    /// Full module name.
    pub module: String,
    /// Module whose weight is read (the embedding's for a tied head).
    pub source: String,
    /// Block, or `None` for embedding and head.
    pub block: Option<usize>,
    /// How it is stored.
    pub kind: GgmlType,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
}

/// The part of a plan that only GGUF has.
pub struct GgufPlan {
    /// Matrices to quantize, in graph order; tables last.
    pub linears: Vec<GgufLinear>,
    /// Tensors that stay what they are.
    pub copies: Vec<String>,
    /// The file.
    pub layout: FileLayout,
}

/// A type's name as schemes are written: `q4_0`, `q6_k`.
pub fn scheme_name(kind: GgmlType) -> String {
    kind.name().to_ascii_lowercase()
}
