//! Fused operations of the GPU backend give the bits of the operations one by one.
#![cfg(feature = "emulated")]

use std::sync::Arc;

use lowbit_kernels::backend::{AttentionShape, Backend, Buffer, Segment};
use lowbit_kernels::cuda::{Arithmetic, Device, EmulatorOptions, GpuBackend};
use lowbit_kernels::random::normals;

/// Plain, and with every access checked where the compiler can.
fn backends() -> Vec<GpuBackend> {
    let checked = EmulatorOptions { checked: true, seed: 3, ..EmulatorOptions::default() };
    let devices = [Device::emulated(2), Device::emulated_with(checked)];
    let devices = devices.into_iter().filter_map(Result::ok).map(Arc::new);
    devices
        .flat_map(|d| {
            [Arithmetic::Fast, Arithmetic::Reproducible].map(|a| GpuBackend::new(d.clone()).with_arithmetic(a))
        })
        .collect()
}

fn bits(b: &dyn Backend, x: &Buffer) -> Vec<u32> {
    b.download(x).unwrap().iter().map(|v| v.to_bits()).collect()
}

#[test]
fn residual_and_norm() {
    for b in backends() {
        // Odd widths, one with all of a row in registers, one with more.
        for (rows, width) in [(1, 1), (3, 7), (2, 36), (1, 4096), (2, 8448)] {
            let [x, y] = [1, 2].map(|seed| normals(rows * width, 1.0, seed));
            let weight = b.upload(&normals(width, 1.0, 3)).unwrap();
            let y = b.upload(&y).unwrap();
            let (mut one, mut two) = (b.upload(&x).unwrap(), b.upload(&x).unwrap());
            b.add_assign(&mut one, &y).unwrap();
            let want = b.rms_norm(&one, &weight, width, 1e-5, 1.0).unwrap();
            let got = b.add_rms_norm(&mut two, &y, &weight, width, 1e-5, 1.0).unwrap();
            assert_eq!(bits(&b, &got), bits(&b, &want), "{rows}x{width}");
            assert_eq!(bits(&b, &two), bits(&b, &one), "{rows}x{width}");
            assert!(b.add_rms_norm(&mut two, &b.zeros(width + 1).unwrap(), &weight, width, 1e-5, 1.0).is_err());
        }
    }
}

#[test]
fn rotation_and_cache() {
    for b in backends() {
        for (heads, kv_heads, head_dim, half) in [(4, 2, 32, 16), (6, 3, 20, 6), (5, 1, 8, 4), (2, 2, 64, 0)] {
            let (slots, capacity) = (3, 12);
            let segments = [
                Segment { slot: 2, row: 0, tokens: 1, past: 7 },
                Segment { slot: 0, row: 1, tokens: 3, past: 0 },
                Segment { slot: 1, row: 4, tokens: 1, past: 11 },
            ];
            let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / (1.0 + i as f32 * 1.7)).collect();
            let [q, k, v] = [(heads, 1), (kv_heads, 2), (kv_heads, 3)].map(|(n, s)| normals(5 * n * head_dim, 1.0, s));
            let run = |fused: bool| {
                let mut cache = b.kv_cache(slots, capacity, kv_heads, head_dim).unwrap();
                let [mut q, mut k, v] = [&q, &k, &v].map(|x| b.upload(x).unwrap());
                if fused {
                    let place = (&mut q, &mut k, &v);
                    b.rope_append(
                        &mut cache,
                        place.0,
                        place.1,
                        place.2,
                        heads,
                        head_dim,
                        &frequencies,
                        1.25,
                        &segments,
                    )
                    .unwrap();
                } else {
                    b.rope(&mut q, heads, head_dim, &frequencies, 1.25, &segments).unwrap();
                    b.rope(&mut k, kv_heads, head_dim, &frequencies, 1.25, &segments).unwrap();
                    b.kv_append(&mut cache, &k, &v, &segments).unwrap();
                }
                let (scale, window, soft_cap) = (0.3, None, None);
                let shape = AttentionShape { heads: kv_heads, kv_heads, head_dim, scale, window, soft_cap };
                // Attention of one query a slot sees every key and value.
                let last = [(2, 8), (0, 3), (1, 12)];
                let ones = b.upload(&vec![0.5; 3 * kv_heads * head_dim]).unwrap();
                let place = |(row, (slot, end)): (usize, &(usize, usize))| Segment {
                    slot: *slot,
                    row,
                    tokens: 1,
                    past: end - 1,
                };
                let segments: Vec<Segment> = last.iter().enumerate().map(place).collect();
                let seen = b.attention(&ones, &cache, &shape, &segments).unwrap();
                [bits(&b, &q), bits(&b, &seen)]
            };
            assert!(run(true) == run(false), "{heads} {kv_heads} {head_dim} {half}");
        }
    }
}
