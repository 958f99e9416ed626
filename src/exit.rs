//! Errors to one line, a hint, and an exit code.

use std::process::ExitCode;

use lowbit_calibration::CalibrationError;
use lowbit_checkpoint::CheckpointError;
use lowbit_kernels::KernelError;
use lowbit_model::ModelError;
use lowbit_quantize::QuantizeError;

/// Bad input or usage.
pub const BAD_INPUT: u8 = 3;
/// A fault of ours.
const INTERNAL: u8 = 4;
/// Ctrl-C.
const INTERRUPTED: u8 = 130;

/// A verdict that is no error of ours: the exit code tells it.
#[derive(Debug)]
pub struct VerdictError {
    /// 1 broken, 2 inconclusive.
    pub code: u8,
    /// In words.
    pub text: String,
}

impl std::fmt::Display for VerdictError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for VerdictError {}

/// Prints `error: ...` and `hint: ...`; returns the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(v) = error.downcast_ref::<VerdictError>() {
        eprintln!("verdict: {}", v.text);
        return ExitCode::from(v.code);
    }
    let mut lines: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Transparent wrappers repeat their source.
        if lines.iter().all(|l| !l.contains(&text)) {
            lines.push(text);
        }
    }
    let text = lines.join(": ");
    eprintln!("error: {text}");
    if !text.contains("hint:")
        && let Some(hint) = error.chain().find_map(hint_of)
    {
        eprintln!("hint: {hint}");
    }
    let interrupted =
        error.chain().any(|c| matches!(c.downcast_ref::<QuantizeError>(), Some(QuantizeError::Interrupted)));
    // Kernels get validated shapes: one that refuses means a fault of ours, not of the input.
    let internal = error.chain().any(|c| matches!(c.downcast_ref::<ModelError>(), Some(ModelError::Kernel { .. })));
    ExitCode::from(match (interrupted, internal) {
        (true, _) => INTERRUPTED,
        (_, true) => INTERNAL,
        _ => BAD_INPUT,
    })
}

fn hint_of(cause: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(e) = cause.downcast_ref::<CheckpointError>() {
        return e.hint();
    }
    if let Some(ModelError::Checkpoint(e)) = cause.downcast_ref::<ModelError>() {
        return e.hint();
    }
    if let Some(lowbit_serve::ServeError::Checkpoint(e) | lowbit_serve::ServeError::Model(ModelError::Checkpoint(e))) =
        cause.downcast_ref()
    {
        return e.hint();
    }
    match cause.downcast_ref::<QuantizeError>() {
        Some(QuantizeError::Plan { hint, .. }) => return hint.clone(),
        Some(QuantizeError::Checkpoint(e)) => return e.hint(),
        Some(QuantizeError::Model(ModelError::Checkpoint(e))) => return e.hint(),
        Some(QuantizeError::Calibration(CalibrationError::Checkpoint(e))) => return e.hint(),
        _ => {}
    }
    if let Some(e) = cause.downcast_ref::<KernelError>() {
        return e.hint();
    }
    if let Some(CalibrationError::Checkpoint(e)) = cause.downcast_ref::<CalibrationError>() {
        return e.hint();
    }
    None
}
