//! Writes the PTX that `src/cuda/ptx.rs` embeds, and what it was made from: `ptx NVRTC_FOLDER NVRTC_VERSION OUT_FOLDER`.
//! Called by `src/cuda/ptx/regenerate`.

use std::error::Error;
use std::fs;
use std::path::Path;

use lowbit_kernels::cuda::DeviceOptions;
use lowbit_kernels::cuda::nvrtc::{compile_ptx, source_hash};
use lowbit_kernels::cuda::ptx::ARCH;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [nvrtc, version, out] = args.as_slice() else {
        return Err("usage: ptx NVRTC_FOLDER NVRTC_VERSION OUT_FOLDER".into());
    };
    let options = DeviceOptions { nvrtc: Some(nvrtc.into()), ..DeviceOptions::default() };
    let text = compile_ptx(ARCH, &options)?;
    if !text.contains(&format!("V{version}\n")) {
        return Err(format!("{nvrtc} is not NVRTC {version}").into());
    }
    for newer in ["compute_90", "compute_90a"] {
        if without_target(&compile_ptx(newer, &options)?) != without_target(&text) {
            return Err(format!("{newer} gives other code than {ARCH}: embed it too").into());
        }
    }
    let out = Path::new(out);
    fs::write(out.join(format!("{ARCH}.ptx")), &text)?;
    fs::write(out.join("sources.sha256"), format!("{} nvrtc {version} {ARCH}\n", source_hash()))?;
    Ok(())
}

fn without_target(ptx: &str) -> Vec<&str> {
    ptx.lines().filter(|l| !l.starts_with(".target")).collect()
}
