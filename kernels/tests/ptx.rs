//! The embedded PTX: that it is of the present sources needs nothing, that it runs needs a GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr, reason = "says that a check was skipped")]

use std::sync::Arc;

use lowbit_kernels::backend::Backend;
use lowbit_kernels::cuda::nvrtc::source_hash;
use lowbit_kernels::cuda::{Device, GpuBackend, ptx};

/// Names in the emulator's table, but for the planted faults.
fn kernels() -> Vec<&'static str> {
    let table = include_str!("../src/emulator/registry.cpp").rsplit("EMU_TABLE[]").next().unwrap();
    let names = table.split("K(").skip(1).map(|rest| rest.split(')').next().unwrap());
    names.filter(|n| !n.starts_with("planted_")).collect()
}

#[test]
fn the_embedded_ptx_is_of_the_present_sources() {
    let found: Vec<&str> = ptx::MADE_FROM.split_whitespace().collect();
    assert!(matches!(found.as_slice(), [_, "nvrtc", _, ptx::ARCH, ptx::HOPPER]), "{}", ptx::MADE_FROM);
    assert!(found[0] == source_hash(), "the embedded PTX is stale: run kernels/src/cuda/ptx/regenerate");
}

#[test]
fn the_embedded_ptx_has_every_kernel() {
    let kernels = kernels();
    assert!(kernels.contains(&"rms_norm") && kernels.contains(&"hessian_update"), "{kernels:?}");
    // Of warpgroup products, which only Hopper has, and of E4M3.
    let warpgroup =
        |name: &str| name.starts_with("wide_half") || name.starts_with("wide_fast") || name == "hessian_wide";
    // Products of E4M3 are Ada's: compute_80 has none.
    let hopper = |name: &str| warpgroup(name) || name.starts_with("fp8_");
    assert!(kernels.iter().any(|n| hopper(n)));
    for (arch, target) in [(ptx::ARCH, "sm_80"), (ptx::HOPPER, "sm_90a")] {
        let text = ptx::text(arch).unwrap().into_string().unwrap();
        assert!(text.contains(&format!("\n.target {target}\n")));
        let expected: Vec<_> = kernels.iter().filter(|n| arch == ptx::HOPPER || !hopper(n)).collect();
        for name in &expected {
            assert!(text.contains(&format!(".entry {name}(")), "{name} {arch}");
        }
        assert_eq!(text.matches(".entry ").count(), expected.len(), "{arch}");
    }
    assert_eq!((ptx::arch_for("sm_90a"), ptx::arch_for("sm_100a")), (ptx::HOPPER, ptx::ARCH));
}

#[test]
fn a_gpu_runs_the_embedded_ptx() {
    let device = match Device::cuda_from_ptx(0) {
        Ok(device) => Arc::new(device),
        Err(e) => {
            // A GPU that refuses the PTX is a failure, one that is not there is not.
            assert!(!e.to_string().contains("PTX"), "{e}");
            eprintln!("skipped: {e}");
            return;
        }
    };
    assert!(device.as_cuda().unwrap().image().starts_with("PTX compute_"));
    let gpu = GpuBackend::new(device);
    let mut x = gpu.upload(&[1.0, 2.0, 3.0]).unwrap();
    gpu.add_assign(&mut x, &gpu.upload(&[0.5, 0.25, 4.0]).unwrap()).unwrap();
    assert_eq!(gpu.download(&x).unwrap(), [1.5, 2.25, 7.0]);
}
