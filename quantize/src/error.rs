//! Errors of this crate: the layer is named here, the cause kept.

use lowbit_calibration::CalibrationError;
use lowbit_checkpoint::CheckpointError;
use lowbit_model::ModelError;

use crate::factor::SolveError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, QuantizeError>;

/// What can go wrong while planning, quantizing or verifying.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// The plan is impossible; every offender is listed.
    #[error("{summary}{}", offenders.iter().map(|o| format!("\n  {o}")).collect::<String>())]
    Plan {
        /// One line.
        summary: String,
        /// All of them.
        offenders: Vec<String>,
        /// A way out.
        hint: Option<String>,
    },
    /// The solver failed for a linear.
    #[error("cannot quantize `{module}`: {source}")]
    Solve {
        /// Linear.
        module: String,
        /// Reason.
        source: SolveError,
    },
    /// `--strict` and something a reader must know happened.
    #[error("`{module}`: {event} (refused by --strict)")]
    Strict {
        /// Linear.
        module: String,
        /// What happened.
        event: String,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The artefact is not what its config and record say.
    #[error("{} problems in {dir}:{}", problems.len(), problems.iter().map(|p| format!("\n  {p}")).collect::<String>())]
    Verify {
        /// Folder.
        dir: String,
        /// All of them.
        problems: Vec<String>,
    },
    /// Checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Calibration.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// Model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A matrix operation.
    #[error("`{module}`: {source}")]
    Kernel {
        /// Linear.
        module: String,
        /// Reason.
        source: lowbit_kernels::KernelError,
    },
}

impl QuantizeError {
    /// `what` was given no data to calibrate on; `instead` needs none.
    pub fn no_data(what: &str, instead: &str) -> Self {
        QuantizeError::Plan {
            summary: format!("{what} needs calibration data"),
            offenders: vec![],
            hint: Some(format!(
                "give --calib FILE (.txt, .jsonl, .parquet), a hub data set, or `self`; or choose {instead}"
            )),
        }
    }
}
