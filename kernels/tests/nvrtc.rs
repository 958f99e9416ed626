//! The kernels compiled by NVRTC for real GPUs: needs the library, not a GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr, reason = "says that a check was skipped")]

use std::path::PathBuf;

use lowbit_kernels::KernelError;
use lowbit_kernels::cuda::{Device, DeviceOptions, compile};

/// Folder of NVRTC named by the environment.
fn library() -> Option<PathBuf> {
    let folder = std::env::var_os("LOWBIT_NVRTC").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: LOWBIT_NVRTC names no folder with libnvrtc.so (pip install nvidia-cuda-nvrtc)");
    }
    folder
}

/// A cache of this test's own.
fn options(nvrtc: Option<PathBuf>, name: &str) -> DeviceOptions {
    let cache_dir = std::env::temp_dir().join(format!("lowbit-nvrtc-{name}-{}", std::process::id()));
    DeviceOptions { nvrtc, cache_dir, search: Vec::new() }
}

/// `n` of `n bytes spill stores` and the like.
fn spilled_bytes(log: &str) -> Vec<(String, u64)> {
    let mut out = Vec::new();
    let mut kernel = String::new();
    for line in log.lines() {
        if let Some(name) = line.split("Compiling entry function '").nth(1) {
            kernel = name.split('\'').next().unwrap_or_default().to_string();
        }
        let mut bytes = 0;
        for word in line.split([' ', ',']) {
            if word == "spill" {
                out.push((kernel.clone(), bytes));
            }
            bytes = word.parse().unwrap_or(bytes);
        }
    }
    out
}

/// For those that `LOWBIT_NVRTC_ARCHITECTURES` names, where only some are asked of a compiler.
#[test]
fn every_kernel_compiles_for_every_architecture_without_spilling() {
    let Some(folder) = library() else { return };
    let options = options(Some(folder), "arch");
    let all = "sm_80 sm_86 sm_89 sm_90a sm_100";
    let asked = std::env::var("LOWBIT_NVRTC_ARCHITECTURES").unwrap_or_else(|_| all.to_string());
    for arch in asked.split_whitespace() {
        let made = compile(arch, &options).unwrap();
        assert!(!made.cached && made.cubin.starts_with(b"\x7fELF"), "{arch}");
        let spills = spilled_bytes(&made.log);
        assert!(!spills.is_empty(), "{arch}: ptxas said nothing:\n{}", made.log);
        assert!(spills.iter().all(|(_, bytes)| *bytes == 0), "{arch}: {spills:?}");
        let again = compile(arch, &options).unwrap();
        assert!(again.cached && again.cubin == made.cubin && again.log == made.log, "{arch}");
    }
    std::fs::remove_dir_all(&options.cache_dir).unwrap();
}

#[test]
fn an_unknown_architecture_is_an_error_with_the_compilers_words() {
    let Some(folder) = library() else { return };
    let error = compile("sm_1", &options(Some(folder), "unknown")).err().unwrap().to_string();
    assert!(error.contains("NVRTC") && error.contains("sm_1"), "{error}");
}

#[test]
fn a_folder_without_nvrtc_is_an_error_that_says_how_to_get_it() {
    let error = compile("sm_80", &options(Some("/no/such/folder".into()), "missing")).err().unwrap();
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
    assert!(error.hint().is_some_and(|h| h.contains("LOWBIT_NVRTC")), "{error}");
}

#[test]
fn opening_a_gpu_that_is_not_there_is_an_error() {
    // No machine has a thousand GPUs; without a driver the first is not there either.
    let error = Device::cuda(1000, &options(None, "absent")).err().unwrap();
    assert!(matches!(error, KernelError::Device { device: "cuda", .. }), "{error}");
}

#[test]
fn spills_are_read_from_the_log() {
    let log = "ptxas info    : Compiling entry function 'gemm' for 'sm_80'\n\
               ptxas info    : Function properties for gemm\n    \
               16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n";
    assert_eq!(spilled_bytes(log), [("gemm".to_string(), 8), ("gemm".to_string(), 12)]);
}
