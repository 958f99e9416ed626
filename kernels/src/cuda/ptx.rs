//! The kernels as PTX, embedded for machines that have a driver but no NVRTC; the driver compiles it when it is loaded,
//! and keeps the result itself.
//!
//! Two virtual architectures: `compute_80` runs on every GPU from Ampere on; `compute_90a` has Hopper's warpgroup products
//! and runs on nothing else. The files of `ptx/` are made by `ptx/regenerate`, with an early CUDA 12 so that drivers from
//! 525 on take them.

use std::ffi::CString;
use std::io::Read;

use flate2::read::GzDecoder;

use super::driver::absent;
use crate::error::Result;

/// The virtual architecture for most GPUs: its PTX runs on every one of its compute capability or a higher one.
pub const ARCH: &str = "compute_80";

/// The virtual architecture for `sm_90a`.
pub const HOPPER: &str = "compute_90a";

/// What the PTX was made from: `SHA-256 of the sources, nvrtc VERSION ARCH HOPPER`.
pub const MADE_FROM: &str = include_str!("ptx/sources.sha256");

/// The virtual architecture of the PTX for a GPU: `compute_90a` for `sm_90a`, else `compute_80`.
pub fn arch_for(arch: &str) -> &'static str {
    if arch == "sm_90a" { HOPPER } else { ARCH }
}

/// The PTX of [`ARCH`] or [`HOPPER`], ending in NUL as the driver wants it.
pub fn text(arch: &str) -> Result<CString> {
    let compressed: &[u8] = match arch {
        HOPPER => include_bytes!("ptx/compute_90a.ptx.gz"),
        _ => include_bytes!("ptx/compute_80.ptx.gz"),
    };
    let mut text = Vec::new();
    GzDecoder::new(compressed).read_to_end(&mut text).ok().and_then(|_| CString::new(text).ok()).ok_or_else(|| {
        absent("the embedded PTX is damaged".to_string(), "run kernels/src/cuda/ptx/regenerate, rebuild")
    })
}
