//! Errors to one line, a hint, and an exit code.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use lowbit_bench::BenchError;
use lowbit_calibration::CalibrationError;
use lowbit_checkpoint::CheckpointError;
use lowbit_eval::EvalError;
use lowbit_kernels::KernelError;
use lowbit_model::ModelError;
use lowbit_quantize::QuantizeError;
use lowbit_serve::ServeError;

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

impl Error for VerdictError {}

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
    let code = code_of(error);
    match error.downcast_ref::<VerdictError>() {
        Some(v) => talk(&format!("verdict: {}", v.text)),
        None if code == INTERRUPTED => {
            interrupted();
        }
        None => tell(error),
    }
    ExitCode::from(code)
}

/// The exit code that a failure ends with.
fn code_of(error: &anyhow::Error) -> u8 {
    if let Some(v) = error.downcast_ref::<VerdictError>() {
        return v.code;
    }
    if error.chain().any(|c| matches!(c.downcast_ref::<QuantizeError>(), Some(QuantizeError::Interrupted))) {
        return INTERRUPTED;
    }
    // Kernels get validated shapes: one that refuses means a fault of ours, not of the input. A device without room does not.
    let refused = error.chain().any(|c| match model_error(c) {
        Some(ModelError::Kernel { source, .. }) => !matches!(source, KernelError::OutOfMemory { .. }),
        _ => false,
    });
    if refused { INTERNAL } else { BAD_INPUT }
}

/// The error with its causes, and the way out.
fn tell(error: &anyhow::Error) {
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
}

fn hint_of(cause: &(dyn Error + 'static)) -> Option<String> {
    if let Some(e) = checkpoint_error(cause) {
        return e.hint();
    }
    if let Some(e) = kernel_error(cause) {
        return e.hint();
    }
    if let Some(QuantizeError::Plan { hint, .. }) = cause.downcast_ref() {
        return hint.clone();
    }
    if let Some(e) = calibration_error(cause) {
        return e.hint();
    }
    if let Some(e) = cause.downcast_ref::<BenchError>() {
        return e.hint();
    }
    cause.downcast_ref::<std::io::Error>().and_then(lowbit_checkpoint::error::io_hint).map(str::to_string)
}

// A transparent wrapper stands in the chain for what it wraps, which is not there beside it: it is opened here.

fn calibration_error<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a CalibrationError> {
    match cause.downcast_ref() {
        Some(QuantizeError::Calibration(e)) => Some(e),
        _ => cause.downcast_ref(),
    }
}

fn model_error<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a ModelError> {
    if let Some(QuantizeError::Model(e)) = cause.downcast_ref() {
        return Some(e);
    }
    if let Some(CalibrationError::Model(e)) = calibration_error(cause) {
        return Some(e);
    }
    if let Some(EvalError::Model(e)) = cause.downcast_ref() {
        return Some(e);
    }
    if let Some(BenchError::Model(e)) = cause.downcast_ref() {
        return Some(e);
    }
    if let Some(ServeError::Model(e)) = cause.downcast_ref() {
        return Some(e);
    }
    cause.downcast_ref()
}

fn checkpoint_error<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a CheckpointError> {
    if let Some(ModelError::Checkpoint(e)) = model_error(cause) {
        return Some(e);
    }
    if let Some(QuantizeError::Checkpoint(e)) = cause.downcast_ref() {
        return Some(e);
    }
    if let Some(EvalError::Checkpoint(e)) = cause.downcast_ref() {
        return Some(e);
    }
    if let Some(ServeError::Checkpoint(e)) = cause.downcast_ref() {
        return Some(e);
    }
    cause.downcast_ref()
}

fn kernel_error<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a KernelError> {
    if let Some(ModelError::Kernel { source, .. }) = model_error(cause) {
        return Some(source);
    }
    if let Some(CalibrationError::Kernel(e)) = calibration_error(cause) {
        return Some(e);
    }
    if let Some(EvalError::Kernel(e)) = cause.downcast_ref() {
        return Some(e);
    }
    if let Some(BenchError::Kernel(e)) = cause.downcast_ref() {
        return Some(e);
    }
    cause.downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(source: KernelError) -> ModelError {
        ModelError::Kernel { place: "layer 1".into(), source }
    }

    fn refused() -> ModelError {
        kernel(KernelError::Overflow("x"))
    }

    fn no_room() -> KernelError {
        KernelError::OutOfMemory { device: "cuda", asked: 5_000_000, free: 3_000_000, total: 9_000_000 }
    }

    #[test]
    fn codes_say_whose_fault_it_is() {
        let verdict = |code| VerdictError { code, text: "v".into() };
        let absent = std::io::Error::from(std::io::ErrorKind::NotFound);
        for (error, code) in [
            (anyhow::Error::new(verdict(1)), 1),
            (anyhow::Error::new(verdict(2)), 2),
            (anyhow::anyhow!("nothing to do"), BAD_INPUT),
            (anyhow::Error::new(absent).context("cannot read x"), BAD_INPUT),
            (anyhow::Error::new(QuantizeError::Interrupted), INTERRUPTED),
            (anyhow::Error::new(QuantizeError::Interrupted).context("quantize"), INTERRUPTED),
            (anyhow::Error::new(refused()), INTERNAL),
            (anyhow::Error::new(QuantizeError::Model(refused())), INTERNAL),
            (anyhow::Error::new(QuantizeError::Calibration(refused().into())), INTERNAL),
            (anyhow::Error::new(EvalError::Model(refused())).context("eval"), INTERNAL),
            (anyhow::Error::new(BenchError::from(refused())), INTERNAL),
            (anyhow::Error::new(ServeError::Model(refused())), INTERNAL),
            (anyhow::Error::new(QuantizeError::Model(kernel(no_room()))), BAD_INPUT),
            (anyhow::Error::new(EvalError::Kernel(no_room())), BAD_INPUT),
        ] {
            assert_eq!(code_of(&error), code, "{error:#}");
        }
    }

    #[test]
    fn every_crates_hints_are_told() {
        let plan = QuantizeError::Plan { summary: "s".into(), offenders: vec![], hint: Some("h".into()) };
        let there = || CheckpointError::Exists { path: "x".into() };
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        for (error, hint) in [
            (anyhow::Error::new(plan), "h"),
            (anyhow::Error::new(BenchError::OnePair), "-r 5"),
            (anyhow::Error::new(there()).context("output"), "choose another output"),
            (anyhow::Error::new(QuantizeError::Checkpoint(there())), "choose another output"),
            (anyhow::Error::new(QuantizeError::Calibration(there().into())), "choose another output"),
            (anyhow::Error::new(EvalError::Checkpoint(there())), "choose another output"),
            (anyhow::Error::new(EvalError::Model(ModelError::Checkpoint(there()))), "choose another output"),
            (anyhow::Error::new(ServeError::Checkpoint(there())), "choose another output"),
            (anyhow::Error::new(full()).context("cannot write x"), "free some space"),
        ] {
            let found = error.chain().find_map(hint_of).unwrap_or_default();
            assert!(found.starts_with(hint), "{error:#}: {found}");
        }
    }

    #[test]
    fn what_would_fit_is_said_wherever_the_memory_ended() {
        let calibration = || CalibrationError::Kernel(no_room());
        for error in [
            anyhow::Error::new(kernel(no_room())),
            anyhow::Error::new(no_room()).context("serve"),
            anyhow::Error::new(calibration()),
            anyhow::Error::new(QuantizeError::Calibration(calibration())),
            anyhow::Error::new(QuantizeError::Model(kernel(no_room()))).context("block 3"),
            anyhow::Error::new(QuantizeError::Kernel { module: "down_proj".into(), source: no_room() }),
            anyhow::Error::new(EvalError::Kernel(no_room())),
            anyhow::Error::new(EvalError::Model(kernel(no_room()))),
            anyhow::Error::new(BenchError::Kernel(no_room())),
            anyhow::Error::new(ServeError::Model(kernel(no_room()))),
        ] {
            let hint = error.chain().find_map(hint_of).unwrap_or_default();
            assert!(hint.starts_with("what fits is 3.0 MB more: "), "{error:#}: {hint}");
            assert_eq!(code_of(&error), BAD_INPUT, "{error:#}");
        }
    }
}
