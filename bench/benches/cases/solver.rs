//! The solver on real widths: the factor of the inverse Hessian, and GPTQ's codes by it.
//!
//! Operations are those the formulas need, two a product: a third of n³ for the Cholesky factor and as many for its inverse, which run
//! on one thread so that no thread count shows in a result; out · n² for carrying every column's error into the columns after it,
//! where scales and rounding come on top.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use lowbit_kernels::backend::Backend;
use lowbit_kernels::cpu::{CpuBackend, peak_products};
use lowbit_kernels::random::normals;
use lowbit_kernels::{GroupSize, ScaleType, Scheme};
use lowbit_quantize::factor::factorize;
use lowbit_quantize::gptq::gptq_codes;
use lowbit_quantize::scale_search::SolverOptions;

use crate::{Ceilings, case};

/// Model, group, and the width of its blocks.
const WIDTHS: [(&str, usize, usize); 3] =
    [("smollm2-135m", 64, 576), ("llama-3.2-1b", 128, 2048), ("llama-3.1-8b", 128, 4096)];

/// `XᵀX` of twice as many random tokens as columns.
fn hessian(cpu: &CpuBackend, n: usize) -> Vec<f32> {
    let x = cpu.upload(&normals(2 * n * n, 1.0, 5)).expect("rows");
    let mut h = cpu.zeros(n * n).expect("a Hessian");
    cpu.hessian_update(&mut h, &x, n).expect("a sum");
    cpu.download(&h).expect("a Hessian")
}

/// All of them.
pub fn cases(c: &mut Criterion, cpu: &CpuBackend, ceilings: &Ceilings) {
    let alone = 2.0 * peak_products(1).f32;
    for (model, group, n) in WIDTHS {
        let scheme = Scheme { bits: 4, symmetric: true, group: GroupSize::Cols(group) };
        let options = SolverOptions::new(scheme, ScaleType::Bf16);
        let h = hessian(cpu, n);
        let cubes = 2.0 * (n as f64).powi(3) / 3.0;
        let name = format!("solver/factor/{model}/{n}");
        case(c, &name, Throughput::Elements(cubes as u64), cubes, (alone, "f32 of one thread"), &mut || {
            black_box(factorize(&h, n, &options).expect("a positive definite matrix"));
        });
        let factor = factorize(&h, n, &options).expect("a positive definite matrix");
        let w = normals(n * n, 0.02, 6);
        let carried = (n as f64).powi(3);
        let name = format!("solver/gptq-w4/{model}/{n}x{n}");
        case(c, &name, Throughput::Elements(carried as u64), carried, (ceilings.f32, "f32"), &mut || {
            black_box(gptq_codes(&w, n, n, &factor, &options).expect("codes"));
        });
    }
}
