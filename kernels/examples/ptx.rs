//! Writes the PTX that `src/cuda/ptx.rs` embeds, and what it was made from: `ptx NVRTC_FOLDER NVRTC_VERSION OUT_FOLDER`.
//! Called by `src/cuda/ptx/regenerate`.

use std::error::Error;
use std::fs;
use std::path::Path;

use lowbit_kernels::cuda::DeviceOptions;
use lowbit_kernels::cuda::nvrtc::{compile_ptx, source_hash};
use lowbit_kernels::cuda::ptx::{ARCH, HOPPER};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [nvrtc, version, out] = args.as_slice() else {
        return Err("usage: ptx NVRTC_FOLDER NVRTC_VERSION OUT_FOLDER".into());
    };
    let options = DeviceOptions { nvrtc: Some(nvrtc.into()), ..DeviceOptions::default() };
    let out = Path::new(out);
    for arch in [ARCH, HOPPER] {
        let text = compile_ptx(arch, &options)?;
        if !text.contains(&format!("V{version}\n")) {
            return Err(format!("{nvrtc} is not NVRTC {version}").into());
        }
        fs::write(out.join(format!("{arch}.ptx")), &text)?;
    }
    fs::write(out.join("sources.sha256"), format!("{} nvrtc {version} {ARCH} {HOPPER}\n", source_hash()))?;
    Ok(())
}
