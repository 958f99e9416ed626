//! The reproducible kernels against the CPU backend, bit for bit, on the emulated device.
#![cfg(all(feature = "emulated", feature = "cuda"))]

#[allow(dead_code, reason = "shared with the tests that compare to rounding")]
mod cases;

use std::sync::Arc;

use cases::Noise;
use lowbit_kernels::backend::{Activation, AttentionShape, Backend, Segment};
use lowbit_kernels::cpu::CpuBackend;
use lowbit_kernels::cuda::{Arithmetic, Device, GpuBackend};

/// The same on both, by bits.
fn same(case: &str, run: impl Fn(&dyn Backend) -> Vec<f32>) {
    let device = Arc::new(Device::emulated(2).unwrap());
    let gpu = GpuBackend::new(device).with_arithmetic(Arithmetic::Reproducible);
    let (got, want) = (run(&gpu), run(&CpuBackend::new().exact(true)));
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!(g.to_bits() == w.to_bits(), "{case}: element {i}: {g:?} against the CPU's {w:?}");
    }
}

#[test]
fn products_of_every_format_equal_the_cpus() {
    for (n, k) in [(1, 32), (70, 96), (64, 256), (17, 1)] {
        for (name, w) in cases::weights(&mut Noise(1), n, k) {
            for t in [1, 3, 5, 16, 17, 65] {
                let (x, bias) = (Noise(2).many(t * k), Noise(3).many(n));
                same(&format!("{name} t={t} n={n} k={k}"), |b| cases::linear(b, &w, &x, Some(&bias)));
            }
        }
    }
}

#[test]
fn hessians_equal_the_cpus() {
    for (n, t) in [(1, 3), (15, 1), (64, 16), (150, 33), (300, 257)] {
        let (start, x) = (Noise(4).many(n * n), Noise(5).many(n * t));
        same(&format!("hessian n={n} t={t}"), |b| {
            let mut h = b.upload(&start).unwrap();
            b.hessian_update(&mut h, &b.upload(&x).unwrap(), n).unwrap();
            b.download(&h).unwrap()
        });
    }
}

#[test]
fn norms_rotations_and_activations_equal_the_cpus() {
    for (rows, width) in [(1, 1), (9, 15), (5, 192), (300, 64)] {
        let (x, w) = (Noise(6).many(rows * width), Noise(7).many(width));
        same(&format!("norm {rows}x{width}"), |b| {
            let y = b.rms_norm(&b.upload(&x).unwrap(), &b.upload(&w).unwrap(), width, 1e-5, 1.0).unwrap();
            b.download(&y).unwrap()
        });
    }
    let segments = [Segment { slot: 0, row: 1, tokens: 3, past: 40 }, Segment { slot: 1, row: 4, tokens: 1, past: 0 }];
    let (heads, head_dim) = (3, 64);
    let (x, freq) = (Noise(8).many(6 * heads * head_dim), (0..32).map(|i| 0.7f32.powi(i)).collect::<Vec<_>>());
    same("rope", |b| {
        let mut q = b.upload(&x).unwrap();
        b.rope(&mut q, heads, head_dim, &freq, 1.1, &segments).unwrap();
        b.download(&q).unwrap()
    });
    let gate: Vec<f32> = Noise(9).many(40_000).iter().map(|v| v * 100.0).collect();
    let up = Noise(10).many(40_000);
    same("silu", |b| {
        let y = b.activation_mul(&b.upload(&gate).unwrap(), &b.upload(&up).unwrap(), Activation::Silu).unwrap();
        b.download(&y).unwrap()
    });
}

#[test]
fn attention_equals_the_cpus() {
    let seg = |slot, row, tokens, past| Segment { slot, row, tokens, past };
    let plan = [
        (vec![seg(2, 0, 70, 0), seg(0, 70, 1, 0), seg(1, 71, 17, 0)], 88),
        (vec![seg(0, 0, 65, 1), seg(2, 66, 3, 70)], 70),
        (vec![seg(1, 0, 1, 17), seg(0, 1, 1, 66), seg(2, 2, 1, 73)], 3),
    ];
    for (heads, kv_heads, head_dim) in [(6, 3, 64), (4, 4, 20), (4, 1, 32)] {
        for (window, soft_cap) in [(None, None), (Some(1), None), (Some(20), None), (Some(70), Some(5.0))] {
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.7, window, soft_cap };
            same(&format!("{shape:?}"), |b| {
                let mut cache = b.kv_cache(3, 80, kv_heads, head_dim).unwrap();
                let (mut noise, mut out, width) = (Noise(11), Vec::new(), kv_heads * head_dim);
                for (segments, rows) in &plan {
                    let [q, k, v] = [heads * head_dim, width, width].map(|w| b.upload(&noise.many(rows * w)).unwrap());
                    b.kv_append(&mut cache, &k, &v, segments).unwrap();
                    out.extend(b.download(&b.attention(&q, &cache, &shape, segments).unwrap()).unwrap());
                }
                out
            });
        }
    }
}
