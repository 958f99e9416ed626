//! The kernels as a module of the driver: a cubin made by NVRTC now or before, else the embedded PTX.

use std::ffi::{CStr, c_void};

use cudarc::driver::{result, sys};

use super::driver::{absent, failed};
use super::nvrtc::{DeviceOptions, Nvrtc};
use super::ptx;
use crate::error::{KernelError, Result};

/// Bytes for the words of the driver's compiler.
const LOG_BYTES: usize = 16 << 10;

/// Which images may be loaded.
#[derive(Clone, Copy)]
pub(super) enum Images<'a> {
    /// A cubin; the embedded PTX when no place was named and the usual ones have no usable NVRTC.
    Any(&'a DeviceOptions),
    /// The embedded PTX.
    Ptx,
}

/// Kernels in the current context.
pub(super) struct Loaded {
    pub(super) module: sys::CUmodule,
    /// Where they came from (see `CudaDevice::image`).
    pub(super) image: String,
    /// Compiled for this very architecture, with what only it has.
    pub(super) native: bool,
}

/// Loads the kernels for `arch` into the current context.
pub(super) fn load(arch: &str, images: Images<'_>) -> Result<Loaded> {
    let ptx_arch = ptx::arch_for(arch);
    let embedded = |without| {
        let native = ptx_arch.strip_prefix("compute_") == arch.strip_prefix("sm_");
        Ok(Loaded { module: load_ptx(ptx_arch, without)?, image: embedded(ptx_arch), native })
    };
    let Images::Any(options) = images else { return embedded(None) };
    let nvrtc = match Nvrtc::find(options, driver_major()?) {
        Ok(nvrtc) => nvrtc,
        Err(e) if options.nvrtc.is_some() => return Err(e),
        Err(e) => return embedded(Some(&e)),
    };
    let made = nvrtc.cubin(arch, options)?;
    // SAFETY: the image is a whole cubin (checked by `nvrtc`), and outlives the call, which copies it.
    let module = unsafe { result::module::load_data(made.cubin.as_ptr().cast::<c_void>()) }
        .map_err(|e| failed(&format!("loading the kernels for {arch}"), e))?;
    let (major, minor) = nvrtc.version();
    let image = format!("cubin {arch}, NVRTC {major}.{minor}{}", if made.cached { ", from the cache" } else { "" });
    Ok(Loaded { module, image, native: true })
}

/// The embedded PTX, in words.
fn embedded(arch: &str) -> String {
    let made = ptx::MADE_FROM.split_whitespace().nth(2).unwrap_or_default();
    format!("PTX {arch}, NVRTC {made}, embedded")
}

/// Has the driver compile the embedded PTX. `without` says why there is no NVRTC, for the error.
fn load_ptx(arch: &str, without: Option<&KernelError>) -> Result<sys::CUmodule> {
    let text = ptx::text(arch)?;
    let mut log = vec![0u8; LOG_BYTES];
    let mut names = [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // A size is passed in the pointer's place.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut::<c_void>(LOG_BYTES)];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image ends in NUL; there are as many options as stated; the log has the size stated and outlives the
    // call, like everything else, which is read or written only within it.
    let status = unsafe {
        let image = text.as_ptr().cast::<c_void>();
        sys::cuModuleLoadDataEx(&mut module, image, names.len() as u32, names.as_mut_ptr(), values.as_mut_ptr())
    };
    status.result().map(|()| module).map_err(|e| {
        let said = CStr::from_bytes_until_nul(&log).map(|l| l.to_string_lossy()).unwrap_or_default();
        let problem = format!("compiling the embedded PTX ({arch}): {:?}\n{said}", e.0);
        let why = without.map_or(String::new(), |e| format!(" ({e})"));
        absent(problem.trim_end().to_string(), &format!("install NVRTC{why}, or update the NVIDIA driver"))
    })
}

/// Major CUDA version the driver supports: it loads cubins of that toolkit and of older ones.
fn driver_major() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| failed("driver version", e))?;
    Ok(version / 1000)
}
