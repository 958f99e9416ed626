//! Errors of this crate.

use lowbit_kernels::KernelError;
use lowbit_model::ModelError;

/// What can go wrong while measuring.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A count that must be positive is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// All tests are left out.
    #[error("nothing to measure: prompt, generated and latency tokens are all 0")]
    NothingToMeasure,
    /// An interval over one pair says nothing.
    #[error("a comparison needs at least 2 repetitions")]
    OnePair,
    /// A request of one token has no gap between tokens.
    #[error("the latency test needs at least 2 output tokens (0 leaves it out)")]
    OneToken,
    /// A repetition took no time: the clock is too coarse or nothing ran.
    #[error("{test} of the {role} took no measurable time")]
    ZeroTime {
        /// Test.
        test: String,
        /// Role.
        role: &'static str,
    },
    /// A sample is not a positive finite number, or there is none, or the pairs do not match.
    #[error("no statistic of these samples: {0}")]
    Samples(&'static str),
    /// The bandwidth is not a positive number.
    #[error("the memory bandwidth must be a positive number of bytes a second, found {0}")]
    Bandwidth(f64),
    /// A model with no vocabulary.
    #[error("the vocabulary of {0} cannot be drawn from")]
    Vocabulary(String),
    /// A size overflowed.
    #[error("the size of {0} overflows")]
    Overflow(&'static str),
    /// From the forward pass.
    #[error(transparent)]
    Model(Box<ModelError>),
    /// From an operation.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl BenchError {
    /// The way out, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::OnePair => Some("-r 5".to_string()),
            _ => None,
        }
    }
}

impl From<ModelError> for BenchError {
    fn from(e: ModelError) -> Self {
        Self::Model(Box::new(e))
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, BenchError>;
