//! The kernels as PTX, embedded for machines that have a driver but no NVRTC; the driver compiles it when it is loaded,
//! and keeps the result itself.
//!
//! One virtual architecture suffices: no kernel uses what only a newer one has, so `compute_90` and `compute_90a` give
//! the same text but for its `.target` line (`examples/ptx.rs` fails once they do not). The files of `ptx/` are made by
//! `ptx/regenerate`, with an early CUDA 12 so that drivers from 525 on take them.

use std::ffi::CString;
use std::io::Read;

use flate2::read::GzDecoder;

use super::driver::absent;
use crate::error::Result;

/// The virtual architecture: PTX for it runs on every GPU of its compute capability or a higher one.
pub const ARCH: &str = "compute_80";

/// What the PTX was made from: `SHA-256 of the sources, nvrtc VERSION ARCH`.
pub const MADE_FROM: &str = include_str!("ptx/sources.sha256");

const COMPRESSED: &[u8] = include_bytes!("ptx/compute_80.ptx.gz");

/// The PTX, ending in NUL as the driver wants it.
pub fn text() -> Result<CString> {
    let mut text = Vec::new();
    GzDecoder::new(COMPRESSED).read_to_end(&mut text).ok().and_then(|_| CString::new(text).ok()).ok_or_else(|| {
        absent("the embedded PTX is damaged".to_string(), "run kernels/src/cuda/ptx/regenerate, rebuild")
    })
}
