//! Errors to one line, a hint, and an exit code.

use std::io::Write;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use lowbit_calibration::CalibrationError;
use lowbit_checkpoint::CheckpointError;
use lowbit_kernels::KernelError;
use lowbit_model::ModelError;
use lowbit_quantize::QuantizeError;

/// Bad input or usage.
pub const BAD_INPUT: u8 = 3;
/// A fault of ours.
pub const INTERNAL: u8 = 4;
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

/// What an interrupted command leaves, and how to go on.
static RESUME: OnceLock<&'static str> = OnceLock::new();

/// Whether the quantization at work starts over after an interrupt.
static NO_BLOCKS: AtomicBool = AtomicBool::new(false);

/// Sets whether [`interrupted`] says that the quantization starts over.
pub fn starts_over(yes: bool) {
    NO_BLOCKS.store(yes, Ordering::SeqCst);
}

/// Sets what [`interrupted`] says beside the fact.
pub fn on_interrupt(hint: &'static str) {
    let _ = RESUME.set(hint);
}

/// Talk on stderr. Nobody may be listening any more, which ends no command.
pub fn talk(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Says that the user stopped the command, and how to go on; returns the exit code.
pub fn interrupted() -> u8 {
    talk("error: interrupted");
    if NO_BLOCKS.load(Ordering::SeqCst) {
        talk("hint: give the same command again; this quantization starts over");
    } else if let Some(hint) = RESUME.get() {
        talk(&format!("hint: {hint}"));
    }
    INTERRUPTED
}

/// A panic is a fault of ours: one message, and [`INTERNAL`] as every other.
pub fn watch_panics() {
    std::panic::set_hook(Box::new(|info| {
        if lowbit_checkpoint::guard::panics_are_errors() {
            return;
        }
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let place = info.location().map_or(String::new(), |l| format!(" ({}:{})", l.file(), l.line()));
        talk(&format!("error: internal failure: {}{place}", text.unwrap_or("no message")));
        talk(
            "hint: this is a fault of lowbit, not of the input: please report it with the command; RUST_BACKTRACE=1 says more",
        );
        let trace = std::backtrace::Backtrace::capture();
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            talk(&trace.to_string());
        }
    }));
}

/// Prints `error: ...` and `hint: ...`; returns the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(v) = error.downcast_ref::<VerdictError>() {
        talk(&format!("verdict: {}", v.text));
        return ExitCode::from(v.code);
    }
    if error.chain().any(|c| matches!(c.downcast_ref::<QuantizeError>(), Some(QuantizeError::Interrupted))) {
        return ExitCode::from(interrupted());
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
    talk(&format!("error: {text}"));
    if !text.contains("hint:")
        && let Some(hint) = error.chain().find_map(hint_of)
    {
        talk(&format!("hint: {hint}"));
    }
    // Kernels get validated shapes: one that refuses means a fault of ours, not of the input.
    let kernel = error.chain().any(|c| matches!(c.downcast_ref::<ModelError>(), Some(ModelError::Kernel { .. })));
    let room = error.chain().any(|c| matches!(c.downcast_ref::<KernelError>(), Some(KernelError::OutOfMemory { .. })));
    let internal = kernel && !room;
    ExitCode::from(if internal { INTERNAL } else { BAD_INPUT })
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
        Some(QuantizeError::Calibration(e)) => return e.hint(),
        _ => {}
    }
    if let Some(e) = cause.downcast_ref::<KernelError>() {
        return e.hint();
    }
    if let Some(e) = cause.downcast_ref::<CalibrationError>() {
        return e.hint();
    }
    cause.downcast_ref::<std::io::Error>().and_then(lowbit_checkpoint::error::io_hint).map(str::to_string)
}
