//! The CUDA device: cudarc's driver API, loaded at run time, with our own memory, module and launches.
//!
//! One stream: operations run in the order they were submitted, so a buffer may be freed or reused as soon as the
//! host lets go of it. Nothing here panics on a machine without a driver; errors carry the driver's enum only
//! (its text would call into a driver that may be a stub).

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUfunction_attribute_enum as FunctionAttribute};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::device::{Launch, Start};
use super::graph::{CudaGraph, Recorder};
use super::module::{self, Images, Loaded};
use super::nvrtc::DeviceOptions;
use crate::error::{KernelError, Result};

const NAME: &str = "cuda";

/// Dynamic shared memory a kernel may use without asking.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

/// Allocations are rounded up to this and aligned to it.
const ALIGN: usize = 256;

pub(super) fn failed(doing: &str, e: DriverError) -> KernelError {
    KernelError::Device { device: NAME, problem: format!("{doing}: {:?}", e.0), hint: None }
}

pub(super) fn absent(problem: String, hint: &str) -> KernelError {
    KernelError::Device { device: NAME, problem, hint: Some(hint.to_string()) }
}

/// A kernel of the module and the dynamic shared memory it was allowed.
#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    shared_bytes: u32,
}

#[derive(Default)]
struct Launched {
    functions: HashMap<&'static str, Function>,
    /// Asynchronous errors surface at the next copy: this says where to look.
    last: Option<&'static str>,
}

/// What memory and device share; freed with the last of them.
pub(super) struct Shared {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    module: sys::CUmodule,
    launched: Mutex<Launched>,
    /// Stream-ordered allocation.
    pooled: bool,
}

// SAFETY: the raw module and function handles may be used from any thread that has the context current, which
// every method binds first; the driver API is thread-safe, and the map is behind a mutex.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.late("cuCtxSetCurrent", e))
    }

    /// An error that may stem from a launch before.
    pub(super) fn late(&self, doing: &str, e: DriverError) -> KernelError {
        let last = self.launched.lock().unwrap_or_else(PoisonError::into_inner).last;
        let hint = last.map(|k| format!("the last kernel launched was {k}; launches report late"));
        KernelError::Device { device: NAME, problem: format!("{doing}: {:?}", e.0), hint }
    }

    /// What an error of a later copy may stem from.
    pub(super) fn submitted(&self, what: &'static str) {
        self.launched.lock().unwrap_or_else(PoisonError::into_inner).last = Some(what);
    }

    pub(super) fn synchronize(&self, doing: &str) -> Result<()> {
        self.stream.synchronize().map_err(|e| self.late(doing, e))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the module was loaded in this context and is unloaded once; no memory refers to it.
            self.context.record_err(unsafe { result::module::unload(self.module) });
        }
    }
}

/// Device memory, freed in stream order.
pub struct CudaMemory {
    shared: Arc<Shared>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl CudaMemory {
    /// The device address, for kernel arguments.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        let s = &self.shared;
        s.context.record_err(s.context.bind_to_thread());
        if s.pooled {
            // SAFETY: allocated on this stream by `malloc_async`, freed once; launches submitted before keep it
            // alive because the free is ordered after them.
            s.context.record_err(unsafe { result::free_async(self.address, s.stream.cu_stream()) });
        } else {
            s.context.record_err(s.stream.synchronize());
            // SAFETY: allocated by `malloc_sync`, freed once, and the stream is idle.
            s.context.record_err(unsafe { result::free_sync(self.address) });
        }
    }
}

/// One GPU with the kernels compiled for it.
pub struct CudaDevice {
    shared: Arc<Shared>,
    arch: String,
    image: String,
    /// Of a device that records steps (`graph.rs`).
    recorder: Option<Recorder>,
    multiprocessors: usize,
    /// A launch may begin early: Hopper on, and kernels that wait for what they read.
    early: bool,
    /// Products of E4M3: Ada on, and code for it (the embedded PTX for most GPUs is older).
    fp8: bool,
}

impl CudaDevice {
    /// Opens GPU `ordinal`, compiles the kernels for it (or takes them from the cache; or, without NVRTC, has the driver
    /// compile the embedded PTX) and checks that memory works.
    pub fn open(ordinal: usize, options: &DeviceOptions) -> Result<Self> {
        Self::open_with(ordinal, Images::Any(options))
    }

    /// As [`CudaDevice::open`] where there is no NVRTC.
    pub fn open_from_ptx(ordinal: usize) -> Result<Self> {
        Self::open_with(ordinal, Images::Ptx)
    }

    fn open_with(ordinal: usize, images: Images<'_>) -> Result<Self> {
        // SAFETY: only tries to load the library; its initialisers are the driver's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(absent(
                "no CUDA driver (libcuda.so.1) was found".to_string(),
                "install the NVIDIA driver, or run with another device",
            ));
        }
        // cudarc panics where the driver lacks a symbol (stubs, very old drivers).
        catch_unwind(AssertUnwindSafe(|| Self::start(ordinal, images))).unwrap_or_else(|_| {
            Err(absent("the CUDA driver lacks a function this program needs".to_string(), "update the NVIDIA driver"))
        })
    }

    fn start(ordinal: usize, images: Images<'_>) -> Result<Self> {
        let context = CudaContext::new(ordinal).map_err(|e| failed(&format!("opening GPU {ordinal}"), e))?;
        let (major, minor) = context.compute_capability().map_err(|e| failed("compute capability", e))?;
        if major < 8 {
            return Err(absent(
                format!("GPU {ordinal} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"),
                "run with another device",
            ));
        }
        // From Hopper on the `a` architectures carry features that are not forward compatible.
        let arch = format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" });
        context.bind_to_thread().map_err(|e| failed("binding the context", e))?;
        let Loaded { module, image, native } = module::load(&arch, images)?;
        // A stream of our own: the default one waits for others', and others for it.
        let stream = context.new_stream().map_err(|e| failed("making a stream", e))?;
        let pooled = context.has_async_alloc();
        if pooled {
            keep_freed_memory(&context)?;
        }
        let shared = Shared { context, stream, module, launched: Mutex::default(), pooled };
        let count = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = shared.context.attribute(count).map_err(|e| failed("multiprocessors", e))?;
        let multiprocessors = usize::try_from(count).unwrap_or(1).max(1);
        let (early, fp8) = (native && major >= 9, native && (major, minor) >= (8, 9));
        let device = Self { shared: Arc::new(shared), arch, image, recorder: None, multiprocessors, early, fp8 };
        device.check_memory()?;
        Ok(device)
    }

    /// Uses every memory call once, so that a missing symbol is found here.
    fn check_memory(&self) -> Result<()> {
        let m = self.alloc(2 * ALIGN)?;
        self.clear(&m)?;
        self.write(&m, ALIGN, &[7; ALIGN])?;
        let back = self.read(&m, ALIGN - 1..ALIGN + 1)?;
        if back == [0, 7] { Ok(()) } else { Err(absent(format!("memory read back as {back:?}"), "check the GPU")) }
    }

    /// The same GPU with a recorder: see [`super::device::Device::recorder`].
    pub fn recorder(&self) -> Result<Self> {
        let recorder = Some(Recorder::new(&self.shared)?);
        let (arch, image) = (self.arch.clone(), self.image.clone());
        let (multiprocessors, early, fp8) = (self.multiprocessors, self.early, self.fp8);
        Ok(Self { shared: self.shared.clone(), arch, image, recorder, multiprocessors, early, fp8 })
    }

    fn own_recorder(&self) -> Result<&Recorder> {
        self.recorder.as_ref().ok_or_else(|| absent("this device records nothing".to_string(), "take a recorder of it"))
    }

    /// Launches are recorded from now on.
    pub fn record(&self) -> Result<()> {
        self.own_recorder()?.begin(&self.shared)
    }

    /// What was recorded, ready to run.
    pub fn recorded(&self) -> Result<CudaGraph> {
        self.own_recorder()?.end(&self.shared)
    }

    /// Submits it.
    pub fn repeat(&self, graph: &CudaGraph) -> Result<()> {
        self.refuse_recorded()?;
        graph.launch(&self.shared)
    }

    /// Copies a few bytes without waiting: through pinned memory, or waiting where they are too many for it.
    pub fn stage(&self, m: &CudaMemory, offset: usize, bytes: &[u8]) -> Result<()> {
        self.refuse_recorded()?;
        self.own(m, &(offset..offset.saturating_add(bytes.len())))?;
        match self.own_recorder()?.stage(&self.shared, m.address + offset as u64, bytes)? {
            true => Ok(()),
            false => self.write(m, offset, bytes),
        }
    }

    /// `cuda`.
    pub fn name(&self) -> &'static str {
        NAME
    }

    /// The GPU's architecture, for which NVRTC compiles: `sm_90a`.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Whether there are kernels of E4M3 products: a GPU of `sm_89` or later, and code compiled for it.
    pub fn has_fp8_products(&self) -> bool {
        self.fp8
    }

    /// What kernels run and who compiled them: `cubin sm_90a, NVRTC 13.0` (with `, from the cache` when not now), or
    /// `PTX compute_80, NVRTC 12.0.140, embedded` (`compute_90a` on Hopper), which the driver compiles.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// The GPU's product name.
    pub fn product(&self) -> Result<String> {
        self.shared.context.name().map_err(|e| failed("device name", e))
    }

    /// Free and total bytes of the GPU.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        self.shared.context.mem_get_info().map_err(|e| failed("memory info", e))
    }

    /// Memory with undefined contents.
    pub fn alloc(&self, bytes: usize) -> Result<CudaMemory> {
        let s = &self.shared;
        s.bind()?;
        let size = bytes.max(1).checked_next_multiple_of(ALIGN).ok_or(KernelError::Overflow("device memory"))?;
        let address = if s.pooled {
            // SAFETY: unset memory; the stream lives as long as `shared`, which the result holds.
            unsafe { result::malloc_async(s.stream.cu_stream(), size) }
        } else {
            // SAFETY: unset memory.
            unsafe { result::malloc_sync(size) }
        };
        let address = address.map_err(|e| match (e.0, self.memory_info()) {
            (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => {
                KernelError::OutOfMemory { device: NAME, asked: size, free, total }
            }
            _ => s.late(&format!("allocating {size} bytes"), e),
        })?;
        Ok(CudaMemory { shared: self.shared.clone(), address, bytes })
    }

    /// Zeros.
    pub fn clear(&self, m: &CudaMemory) -> Result<()> {
        self.own(m, &(0..m.bytes))?;
        if m.bytes > 0 {
            self.shared.bind()?;
            // SAFETY: the memory is alive and holds that many bytes; every use of it is in the order of this stream.
            unsafe { result::memset_d8_async(m.address, 0, m.bytes, self.stream()) }
                .map_err(|e| self.shared.late("clearing memory", e))?;
        }
        Ok(())
    }

    /// Where launches go: the device's stream, or the one that records them.
    fn stream(&self) -> sys::CUstream {
        self.recorder.as_ref().and_then(Recorder::capturing).unwrap_or_else(|| self.shared.stream.cu_stream())
    }

    /// A copy to or from the host has no place in a recording.
    fn refuse_recorded(&self) -> Result<()> {
        match self.recorder.as_ref().and_then(Recorder::capturing) {
            None => Ok(()),
            Some(_) => {
                Err(absent("a copy to or from the host cannot be recorded".to_string(), "run it before the recording"))
            }
        }
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, m: &CudaMemory, offset: usize, bytes: &[u8]) -> Result<()> {
        self.refuse_recorded()?;
        self.own(m, &(offset..offset.saturating_add(bytes.len())))?;
        if bytes.is_empty() {
            return Ok(());
        }
        let s = &self.shared;
        s.bind()?;
        // SAFETY: the range was checked, the memory is alive, and the stream is waited for before `bytes` may go.
        unsafe { result::memcpy_htod_async(m.address + offset as u64, bytes, s.stream.cu_stream()) }
            .map_err(|e| s.late("copying to the GPU", e))?;
        s.synchronize("copying to the GPU")
    }

    /// Copies `range` back, after everything submitted before.
    pub fn read(&self, m: &CudaMemory, range: Range<usize>) -> Result<Vec<u8>> {
        self.refuse_recorded()?;
        self.own(m, &range)?;
        let mut out = vec![0u8; range.len()];
        if out.is_empty() {
            return Ok(out);
        }
        let s = &self.shared;
        s.bind()?;
        // SAFETY: the range was checked, the memory is alive, and the stream is waited for before `out` is used.
        unsafe { result::memcpy_dtoh_async(&mut out, m.address + range.start as u64, s.stream.cu_stream()) }
            .map_err(|e| s.late("copying from the GPU", e))?;
        s.synchronize("copying from the GPU")?;
        Ok(out)
    }

    /// Launches a kernel; every argument sits in the low bytes of its word, as `cuLaunchKernel` reads them.
    ///
    /// The caller vouches that count, order and sizes are the kernel's own, and that addresses point to memory large
    /// enough: `device.rs` builds them from live memory, the launchers from checked shapes.
    pub(super) fn launch(&self, kernel: &'static str, l: &Launch, args: &mut [u64], start: Start) -> Result<()> {
        let s = &self.shared;
        s.bind()?;
        let error = |doing: &str, e: DriverError| KernelError::Launch {
            kernel,
            launch: l.to_string(),
            problem: format!("{doing}: {:?}", e.0),
        };
        let function = self.function(kernel, l.shared_bytes).map_err(|(doing, e)| error(doing, e))?;
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: l.grid[0],
            gridDimY: l.grid[1],
            gridDimZ: l.grid[2],
            blockDimX: l.block[0],
            blockDimY: l.block[1],
            blockDimZ: l.block[2],
            sharedMemBytes: l.shared_bytes,
            hStream: self.stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(start == Start::Early && self.early),
        };
        // SAFETY: the function belongs to the loaded module; `pointers` point into `args` and `config` to `early`, which
        // the call copies; the addresses in `args` are of memory that is freed in stream order, so not before the kernel
        // is done.
        unsafe { sys::cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|e| error("launching", e))
    }

    /// The kernel's handle, allowed to use `shared_bytes`.
    fn function(
        &self,
        kernel: &'static str,
        shared_bytes: u32,
    ) -> std::result::Result<sys::CUfunction, (&'static str, DriverError)> {
        let mut launched = self.shared.launched.lock().unwrap_or_else(PoisonError::into_inner);
        launched.last = Some(kernel);
        let mut f = match launched.functions.get(kernel) {
            Some(f) => *f,
            None => {
                let invalid = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
                let name = CString::new(kernel).map_err(|_| ("kernel name", invalid))?;
                // SAFETY: the module is loaded for as long as `shared` lives.
                let handle = unsafe { result::module::get_function(self.shared.module, name) };
                Function { handle: handle.map_err(|e| ("no such kernel", e))?, shared_bytes: PLAIN_SHARED_BYTES }
            }
        };
        if shared_bytes > f.shared_bytes {
            let what = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function exists.
            unsafe { result::function::set_function_attribute(f.handle, what, shared_bytes as i32) }
                .map_err(|e| ("asking for shared memory", e))?;
            f.shared_bytes = shared_bytes;
        }
        launched.functions.insert(kernel, f);
        Ok(f.handle)
    }

    /// Fails unless `m` is of this device and holds `range`.
    fn own(&self, m: &CudaMemory, range: &Range<usize>) -> Result<()> {
        if !Arc::ptr_eq(&self.shared, &m.shared) {
            return Err(KernelError::ForeignHandle { backend: NAME, what: "memory" });
        }
        if range.start > range.end || range.end > m.bytes {
            return Err(KernelError::Length { what: "device memory", expected: m.bytes, found: range.end });
        }
        Ok(())
    }
}

/// By default the pool gives freed memory back at every synchronisation, which makes allocation slow.
fn keep_freed_memory(context: &CudaContext) -> Result<()> {
    let mut threshold = u64::MAX;
    // SAFETY: the device belongs to a live context, its default pool always exists, and the attribute is a u64.
    unsafe {
        result::device::get_default_mem_pool(context.cu_device()).and_then(|pool| {
            let what = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, what, std::ptr::from_mut(&mut threshold).cast::<c_void>())
        })
    }
    .map_err(|e| failed("memory pool", e))
}
