//! What every command needs: backend, progress, the stop flag, and where text goes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result};
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};
use lowbit_kernels::cuda::device as gpu;
use lowbit_kernels::cuda::nvrtc::DeviceOptions;
use lowbit_kernels::cuda::{Arithmetic, GpuBackend};

use crate::args::{ArithmeticArg, Device, Global};
use crate::models;
use crate::progress::Bars;

/// Everything a command gets.
pub struct Context {
    device: Device,
    exact: bool,
    arithmetic: Option<Arithmetic>,
    opened: OnceLock<Opened>,
    pub progress: Bars,
    pub stop: Arc<AtomicBool>,
    writing: Arc<AtomicBool>,
    released: Arc<AtomicBool>,
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
        let stop = Arc::new(AtomicBool::new(false));
        let writing = Arc::new(AtomicBool::new(false));
        let released = Arc::new(AtomicBool::new(false));
        let (flag, busy, ours) = (stop.clone(), writing.clone(), released.clone());
        ctrlc::set_handler(move || {
            if ours.load(Ordering::SeqCst) {
                return;
            }
            // With no output open there is nothing to clean up; a second Ctrl-C does not wait for the clean-up.
            if flag.swap(true, Ordering::SeqCst) || !busy.load(Ordering::SeqCst) {
                eprintln!("error: interrupted");
                std::process::exit(130);
            }
        })
        .context("cannot watch for Ctrl-C")?;
        Ok(Self {
            device: global.device,
            exact: global.exact,
            arithmetic: global.arithmetic.map(|a| match a {
                ArithmeticArg::Fast => Arithmetic::Fast,
                ArithmeticArg::Reproducible => Arithmetic::Reproducible,
            }),
            opened: OnceLock::new(),
            progress: Bars::new(global.quiet),
            stop,
            writing,
            released,
            json: global.json,
            quiet: global.quiet,
            threads,
        })
    }

    /// The backend, opened on first use: a command that computes nothing needs no device.
    pub fn backend(&self) -> Result<Arc<dyn Backend>> {
        Ok(self.opened()?.backend.clone())
    }

    /// Product name of the GPU in use.
    pub fn gpu(&self) -> Result<Option<String>> {
        Ok(self.opened()?.gpu.clone())
    }

    /// The arithmetic of the GPU kernels in use, and where they came from.
    pub fn kernels(&self) -> Result<Option<String>> {
        Ok(self.opened()?.kernels.clone())
    }

    fn opened(&self) -> Result<&Opened> {
        if let Some(o) = self.opened.get() {
            return Ok(o);
        }
        let made = self.open()?;
        Ok(self.opened.get_or_init(|| made))
    }

    fn open(&self) -> Result<Opened> {
        let host = |backend: Arc<dyn Backend>| Ok(Opened { backend, gpu: None, kernels: None });
        let on = |device: gpu::Device, usual: Arithmetic| -> Result<Opened> {
            let arithmetic = self.arithmetic.unwrap_or(usual);
            let product = device.as_cuda().map(|c| c.product()).transpose()?;
            let image = device.as_cuda().map_or("compiled for the host", |c| c.image());
            let kernels = Some(format!("{}; {image}", arithmetic.name()));
            let backend = Arc::new(GpuBackend::new(Arc::new(device)).with_arithmetic(arithmetic));
            Ok(Opened { backend, gpu: product, kernels })
        };
        let gpu = |ordinal: usize| on(gpu::Device::cuda(ordinal, &device_options())?, Arithmetic::Fast);
        match self.device {
            Device::Cpu => host(Arc::new(CpuBackend::new().exact(self.exact))),
            Device::Scalar => host(Arc::new(ScalarBackend::new())),
            Device::Emulated => on(gpu::Device::emulated(self.threads)?, Arithmetic::Reproducible),
            Device::Cuda(n) => gpu(n),
            Device::Auto => match gpu(0) {
                Ok(found) => Ok(found),
                Err(e) => {
                    if !self.quiet {
                        eprintln!("device: cpu ({e})");
                    }
                    host(Arc::new(CpuBackend::new().exact(self.exact)))
                }
            },
        }
    }

    /// While the guard lives an output is open: Ctrl-C waits for the writer to remove it.
    pub fn writing(&self) -> Writing<'_> {
        self.writing.store(true, Ordering::SeqCst);
        Writing(&self.writing)
    }

    /// From now on a signal does not end the program: the command watches for it itself.
    pub fn release_signals(&self) {
        self.released.store(true, Ordering::SeqCst);
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

/// The backend, and of a GPU its name and kernels.
struct Opened {
    backend: Arc<dyn Backend>,
    gpu: Option<String>,
    kernels: Option<String>,
}

/// Where NVRTC may be and where compiled kernels are kept, from the environment.
fn device_options() -> DeviceOptions {
    let var = |k: &str| std::env::var_os(k).filter(|v| !v.is_empty()).map(PathBuf::from);
    DeviceOptions {
        nvrtc: var("LOWBIT_NVRTC"),
        cache_dir: models::cache_dir().join("cubin"),
        search: ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"].iter().filter_map(|k| var(k)).collect(),
    }
}

/// See [`Context::writing`].
pub struct Writing<'a>(&'a AtomicBool);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
