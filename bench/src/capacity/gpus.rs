//! Data sheets of GPUs. Dense rates: what a sheet gives "with sparsity" is halved.

use serde::Serialize;

/// One card.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// Name on the command line.
    pub name: &'static str,
    /// Memory, bytes (sheets count 10^9).
    pub memory_bytes: u64,
    /// Memory bandwidth, bytes a second.
    pub bandwidth: f64,
    /// bf16 tensor rate, floating-point operations a second, dense.
    pub bf16_flops: f64,
    /// FP8 tensor rate, dense; 0 where there is none.
    pub fp8_flops: f64,
}

const fn gpu(name: &'static str, gb: u64, gb_per_s: u64, bf16_tflops: f64, fp8_tflops: f64) -> Gpu {
    Gpu {
        name,
        memory_bytes: gb * 1_000_000_000,
        bandwidth: gb_per_s as f64 * 1e9,
        bf16_flops: bf16_tflops * 1e12,
        fp8_flops: fp8_tflops * 1e12,
    }
}

/// All we know.
pub const GPUS: &[Gpu] = &[
    // NVIDIA H200 Tensor Core GPU datasheet: 141 GB HBM3e, 4.8 TB/s; 1,979 / 3,958 TFLOPS with sparsity.
    gpu("h200", 141, 4800, 989.5, 1979.0),
    // NVIDIA H100 datasheet, SXM: 80 GB HBM3, 3.35 TB/s; 1,979 / 3,958 with sparsity.
    gpu("h100", 80, 3350, 989.5, 1979.0),
    // The same, PCIe: 80 GB HBM2e, 2 TB/s; 1,513 / 3,026 with sparsity.
    gpu("h100-pcie", 80, 2000, 756.5, 1513.0),
    // NVIDIA A100 datasheet: 312 TFLOPS dense; 2,039 GB/s (80 GB SXM), 1,555 GB/s (40 GB).
    gpu("a100-80", 80, 2039, 312.0, 0.0),
    gpu("a100-40", 40, 1555, 312.0, 0.0),
    // NVIDIA L40S datasheet: 48 GB GDDR6, 864 GB/s; 362.05 dense, FP8 733 dense.
    gpu("l40s", 48, 864, 362.0, 733.0),
    // NVIDIA L4 datasheet: 24 GB, 300 GB/s; 242 / 485 with sparsity.
    gpu("l4", 24, 300, 121.0, 242.5),
    // NVIDIA A10 datasheet: 24 GB, 600 GB/s; 125 dense.
    gpu("a10", 24, 600, 125.0, 0.0),
    // NVIDIA Ada architecture whitepaper, RTX 4090: 1,008 GB/s; 165.2 dense (FP32 accumulate), FP8 330.3.
    gpu("rtx4090", 24, 1008, 165.2, 330.3),
];

impl Gpu {
    /// By name, without regard to case.
    pub fn find(name: &str) -> Option<&'static Gpu> {
        GPUS.iter().find(|g| g.name.eq_ignore_ascii_case(name))
    }
}
