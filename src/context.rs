//! What every command needs: backend, progress, the stop flag, and where text goes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result, bail};
use lowbit_kernels::backend::{Backend, KvFormat};
use lowbit_kernels::cpu::{CpuBackend, ScalarBackend};
use lowbit_kernels::cuda::device as gpu;
use lowbit_kernels::cuda::nvrtc::DeviceOptions;
use lowbit_kernels::cuda::{Arithmetic, GpuBackend};

use crate::args::{ArithmeticArg, Device, Global, KvCacheArg};
use crate::exit;
use crate::models;
use crate::progress::Bars;

/// Everything a command gets.
pub struct Context {
    device: Device,
    /// Devices beside it, for commands that take several.
    others: Vec<Device>,
    exact: bool,
    arithmetic: Option<Arithmetic>,
    graphs: bool,
    opened: OnceLock<Opened>,
    speed: OnceLock<Opened>,
    pub progress: Bars,
    pub stop: Arc<AtomicBool>,
    writing: Arc<AtomicBool>,
    released: Arc<AtomicBool>,
    pub json: bool,
    pub quiet: bool,
    pub threads: usize,
    flags: Vec<String>,
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
                std::process::exit(exit::interrupted().into());
            }
        })
        .context("cannot watch for Ctrl-C")?;
        Ok(Self {
            device: global.device.first,
            others: global.device.others.clone(),
            exact: global.exact,
            arithmetic: chosen(global)?,
            graphs: !global.no_graph,
            opened: OnceLock::new(),
            speed: OnceLock::new(),
            progress: Bars::new(global.quiet),
            stop,
            writing,
            released,
            json: global.json,
            quiet: global.quiet,
            threads,
            flags: flags(global, threads),
        })
    }

    /// The backend for accuracy, opened on first use: a command that computes nothing needs no device.
    pub fn backend(&self) -> Result<Arc<dyn Backend>> {
        self.backend_for(Purpose::Accuracy)
    }

    /// The backend for accuracy of every device that was named, the first one's first.
    pub fn backends(&self) -> Result<Vec<Arc<dyn Backend>>> {
        let first = self.opened(Purpose::Accuracy)?;
        let mut all = vec![first.backend.clone()];
        for device in &self.others {
            let other = self.open(*device)?;
            if other.gpu != first.gpu {
                let name = |gpu: &Option<String>| gpu.clone().unwrap_or_default();
                bail!(
                    "{device} ({}) and {} ({}) are of different kinds: what comes out would depend on which of them computes what\nhint: name GPUs of one kind",
                    name(&other.gpu),
                    self.device,
                    name(&first.gpu)
                );
            }
            all.push(other.backend);
        }
        Ok(all)
    }

    /// Refuses several devices, of which a command would use one.
    pub fn check_one_device(&self) -> Result<()> {
        match self.others.len() {
            0 => Ok(()),
            n => bail!(
                "--device names {} devices, and this command computes on one\nhint: --device {}; quantize, plan and run take several",
                n + 1,
                self.device
            ),
        }
    }

    /// The backend whose arithmetic suits a purpose; those of one context share the device and its memory.
    pub fn backend_for(&self, purpose: Purpose) -> Result<Arc<dyn Backend>> {
        Ok(self.opened(purpose)?.backend.clone())
    }

    /// The backend of a purpose with another format of keys and values.
    pub fn backend_with_kv(&self, purpose: Purpose, kv: KvCacheArg) -> Result<Arc<dyn Backend>> {
        let usual = self.backend_for(purpose)?;
        match (kv, usual.name()) {
            (KvCacheArg::Float, _) => Ok(usual),
            (KvCacheArg::Int8, "cpu") => Ok(Arc::new(self.on_cpu().with_kv(KvFormat::Int8))),
            (KvCacheArg::Fp8, "cpu") => Ok(Arc::new(self.on_cpu().with_kv(KvFormat::Fp8))),
            (eight, other) => bail!(
                "--kv-cache {} is there on the CPU only; {other} keeps keys and values as `--kv-cache float` does\nhint: --device cpu, or --kv-cache float",
                eight.name()
            ),
        }
    }

    /// Product name of the GPU in use.
    pub fn gpu(&self) -> Result<Option<String>> {
        Ok(self.opened(Purpose::Accuracy)?.gpu.clone())
    }

    /// The arithmetic of the GPU kernels in use, and where they came from.
    pub fn kernels(&self, purpose: Purpose) -> Result<Option<String>> {
        let o = self.opened(purpose)?;
        Ok(o.kernels.as_ref().map(|(arithmetic, image)| format!("{}; {image}", arithmetic.name())))
    }

    /// What decides the arithmetic beside the backend's name: part of what cached results are kept under.
    pub fn precision(&self) -> Result<String> {
        let gpu = self.gpu()?;
        Ok(match (gpu, self.kernels(Purpose::Accuracy)?) {
            (gpu, Some(kernels)) => format!("{} {kernels}", gpu.unwrap_or_default()),
            _ if self.in_f32() => "f32".into(),
            _ => "16-bit fixed point in prefill, 15-bit activations in decode".into(),
        })
    }

    /// The options that decide where and how is computed, for a process of our own, which takes one device.
    pub fn flags(&self) -> &[String] {
        &self.flags
    }

    /// Whether `--exact` was given.
    pub fn exact(&self) -> bool {
        self.exact
    }

    /// The arithmetic of a purpose on a GPU or its emulation; `None` on the CPU. Only `auto` opens a device for it.
    pub fn arithmetic(&self, purpose: Purpose) -> Result<Option<Arithmetic>> {
        let usual = match (self.device, purpose) {
            (Device::Auto, _) => return Ok(self.opened(purpose)?.kernels.as_ref().map(|k| k.0)),
            (Device::Cpu | Device::Scalar, _) => return Ok(None),
            (Device::Emulated, _) => Arithmetic::Reproducible,
            (Device::Cuda(_), Purpose::Accuracy) => Arithmetic::Fast,
            (Device::Cuda(_), Purpose::Speed) => Arithmetic::Half,
        };
        Ok(Some(self.arithmetic.unwrap_or(usual)))
    }

    fn opened(&self, purpose: Purpose) -> Result<&Opened> {
        let accurate = match self.opened.get() {
            Some(o) => o,
            None => {
                let made = self.open(self.device)?;
                self.opened.get_or_init(|| made)
            }
        };
        Ok(match purpose {
            Purpose::Accuracy => accurate,
            Purpose::Speed => self.speed.get_or_init(|| self.for_speed(accurate)),
        })
    }

    fn on_gpu(&self, device: Arc<gpu::Device>, arithmetic: Arithmetic) -> Arc<dyn Backend> {
        Arc::new(GpuBackend::new(device).with_arithmetic(arithmetic).with_recorded_steps(self.graphs))
    }

    /// Whether the CPU keeps f32 where it would round to fixed point.
    fn in_f32(&self) -> bool {
        self.exact || self.arithmetic == Some(Arithmetic::Reproducible)
    }

    fn on_cpu(&self) -> CpuBackend {
        CpuBackend::new().exact(self.in_f32())
    }

    /// The same device, in half arithmetic unless one was asked for or the usual one is
    /// reproducible.
    fn for_speed(&self, accurate: &Opened) -> Opened {
        let (mut backend, mut kernels) = (accurate.backend.clone(), accurate.kernels.clone());
        if let (Some(device), Some((Arithmetic::Fast, image)), None) =
            (&accurate.device, &accurate.kernels, self.arithmetic)
        {
            backend = self.on_gpu(device.clone(), Arithmetic::Half);
            kernels = Some((Arithmetic::Half, image.clone()));
        }
        Opened { backend, device: accurate.device.clone(), gpu: accurate.gpu.clone(), kernels }
    }

    fn open(&self, device: Device) -> Result<Opened> {
        let host = |backend: Arc<dyn Backend>| Ok(Opened { backend, device: None, gpu: None, kernels: None });
        let on = |device: gpu::Device, usual: Arithmetic| -> Result<Opened> {
            let arithmetic = self.arithmetic.unwrap_or(usual);
            let product = device.as_cuda().map(|c| c.product()).transpose()?;
            let image = device.as_cuda().map_or("compiled for the host", |c| c.image());
            let image = format!("{image}{}", if self.graphs { "" } else { "; decode steps not recorded" });
            let device = Arc::new(device);
            let backend = self.on_gpu(device.clone(), arithmetic);
            Ok(Opened { backend, device: Some(device), gpu: product, kernels: Some((arithmetic, image)) })
        };
        let gpu = |ordinal: usize| on(gpu::Device::cuda(ordinal, &device_options())?, Arithmetic::Fast);
        match device {
            Device::Cpu => host(Arc::new(self.on_cpu())),
            Device::Scalar => host(Arc::new(ScalarBackend::new())),
            Device::Emulated => {
                // Of one device, or shared by several.
                let threads = (self.threads / (1 + self.others.len())).max(1);
                on(gpu::Device::emulated(threads)?, Arithmetic::Reproducible)
            }
            Device::Cuda(n) => gpu(n),
            Device::Auto => match gpu(0) {
                Ok(found) => Ok(found),
                Err(e) => {
                    if !self.quiet {
                        exit::talk(&format!("device: cpu ({e})"));
                    }
                    host(Arc::new(self.on_cpu()))
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
            exit::talk(text.as_ref());
        }
    }

    /// The result on stdout: JSON under --json, text otherwise.
    pub fn print(&self, json: &impl serde::Serialize, text: impl FnOnce() -> String) -> Result<()> {
        self.progress.clear();
        let out = if self.json { serde_json::to_string_pretty(json)? } else { text() };
        write_out(format!("{}\n", out.trim_end()).as_bytes())
    }

    /// Fails when the user asked to stop.
    pub fn check_stop(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(lowbit_quantize::QuantizeError::Interrupted.into()) } else { Ok(()) }
    }
}

/// Writes to stdout. A closed pipe is not a failure; a full disk behind it is.
pub fn write_out(bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("cannot write to stdout"),
        _ => Ok(()),
    }
}

fn flags(global: &Global, threads: usize) -> Vec<String> {
    let device = global.device.first.to_string();
    let mut out = vec!["--device".into(), device, "--threads".into(), threads.to_string()];
    let arithmetic = global.arithmetic.as_ref().and_then(clap::ValueEnum::to_possible_value);
    out.extend(arithmetic.into_iter().flat_map(|v| ["--arithmetic".into(), v.get_name().to_string()]));
    out.extend(global.exact.then(|| "--exact".into()));
    out.extend(global.no_graph.then(|| "--no-graph".into()));
    out
}

/// What a backend is opened for: it decides the arithmetic of a GPU's products where none was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Calibration and scoring: activations count with all their bits.
    Accuracy,
    /// Serving, generation and their timing: activations in bf16, as other engines have them.
    Speed,
}

/// The backend, and of a GPU the device, its name, its arithmetic and where its kernels came from.
struct Opened {
    backend: Arc<dyn Backend>,
    device: Option<Arc<gpu::Device>>,
    gpu: Option<String>,
    kernels: Option<(Arithmetic, String)>,
}

/// The arithmetic that was asked for: by name, or by `--exact`, which leaves activations unrounded.
fn chosen(global: &Global) -> Result<Option<Arithmetic>> {
    let named = global.arithmetic.map(|a| match a {
        ArithmeticArg::Half => Arithmetic::Half,
        ArithmeticArg::Fast => Arithmetic::Fast,
        ArithmeticArg::Reproducible => Arithmetic::Reproducible,
    });
    match (global.exact, named) {
        (true, Some(Arithmetic::Half)) => {
            bail!(
                "--exact keeps activations in f32, --arithmetic half rounds them to bf16\nhint: leave one of them out"
            )
        }
        // The emulator's usual arithmetic is exact already.
        (true, None) if global.device.first != Device::Emulated => Ok(Some(Arithmetic::Fast)),
        (_, named) => Ok(named),
    }
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
