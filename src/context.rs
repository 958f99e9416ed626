//! What every command needs: backend, progress, the stop flag, and where text goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};

use crate::args::{Device, Global};
use crate::progress::Bars;

/// Everything a command gets.
pub struct Context {
    pub backend: Arc<dyn Backend>,
    pub progress: Bars,
    pub stop: Arc<AtomicBool>,
    writing: Arc<AtomicBool>,
    pub json: bool,
    pub quiet: bool,
    pub threads: usize,
}

impl Context {
    /// Sets up threads, backend and Ctrl-C.
    pub fn new(global: &Global) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = global.threads.unwrap_or(cores).max(1);
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .context("cannot start the worker threads")?;
        let backend: Arc<dyn Backend> = match global.device {
            Device::Auto | Device::Cpu => Arc::new(CpuBackend::new()),
            Device::Scalar => Arc::new(ScalarBackend::new()),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let writing = Arc::new(AtomicBool::new(false));
        let (flag, busy) = (stop.clone(), writing.clone());
        ctrlc::set_handler(move || {
            // With no output open there is nothing to clean up; a second Ctrl-C does not wait for the clean-up.
            if flag.swap(true, Ordering::SeqCst) || !busy.load(Ordering::SeqCst) {
                eprintln!("error: interrupted");
                std::process::exit(130);
            }
        })
        .context("cannot watch for Ctrl-C")?;
        Ok(Self {
            backend,
            progress: Bars::new(global.quiet),
            stop,
            writing,
            json: global.json,
            quiet: global.quiet,
            threads,
        })
    }

    /// While the guard lives an output is open: Ctrl-C waits for the writer to remove it.
    pub fn writing(&self) -> Writing<'_> {
        self.writing.store(true, Ordering::SeqCst);
        Writing(&self.writing)
    }

    /// Talk on stderr.
    pub fn say(&self, text: impl AsRef<str>) {
        self.progress.clear();
        if !self.quiet {
            eprintln!("{}", text.as_ref());
        }
    }

    /// The result on stdout: JSON under --json, text otherwise. A closed pipe is not a failure.
    pub fn print(&self, json: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
        use std::io::Write;
        self.progress.clear();
        let out = if self.json { serde_json::to_string_pretty(json)? } else { text() };
        let _ = writeln!(std::io::stdout(), "{}", out.trim_end());
        Ok(())
    }

    /// Fails when the user asked to stop.
    pub fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(lowbit_quantize::QuantizeError::Interrupted.into()) } else { Ok(()) }
    }
}

/// See [`Context::writing`].
pub struct Writing<'a>(&'a AtomicBool);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
