//! The reproducible kernels against the orders they state, bit for bit, on the emulated device.
#![cfg(all(feature = "emulated", feature = "cuda"))]

#[allow(dead_code, reason = "shared with the tests that compare to rounding")]
mod cases;

use std::sync::Arc;

use cases::Noise;
use lowbit_kernels::backend::{Activation, AttentionShape, Backend, Segment};
use lowbit_kernels::cpu::ScalarBackend;
use lowbit_kernels::cuda::{Arithmetic, Device, EmulatorOptions, GpuBackend};

fn emulated(options: EmulatorOptions) -> GpuBackend {
    let device = Device::emulated_with(options).unwrap();
    GpuBackend::new(Arc::new(device)).with_arithmetic(Arithmetic::Reproducible)
}

/// Plain, and with every access looked at where the compiler can instrument.
fn each(check: impl Fn(&GpuBackend, &str)) {
    check(&emulated(EmulatorOptions { threads: 2, ..EmulatorOptions::default() }), "plain");
    let checked = EmulatorOptions { checked: true, seed: 3, ..EmulatorOptions::default() };
    if Device::emulated_with(checked).is_ok() {
        check(&emulated(checked), "checked");
    }
}

/// The order of a product: upwards, one chain.
fn chain(pairs: impl Iterator<Item = (f32, f32)>) -> f32 {
    pairs.fold(0.0, |acc, (a, b)| a.mul_add(b, acc))
}

/// The order of a row's reduction.
fn lanes16(values: impl Iterator<Item = (usize, f32)>, add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    for (i, v) in values {
        lanes[i % 16] = add(v, lanes[i % 16]);
    }
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

fn exp(x: f32) -> f32 {
    let magic = 12_582_912f32;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, magic);
    let n = shifted - magic;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let p = p.iter().fold(1.987_569_1e-4f32, |p, c| p.mul_add(r, *c));
    let p = (p * r).mul_add(r, r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Bits, so that a NaN or a sign of zero counts.
fn same(got: &[f32], want: &[f32], case: &str) {
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() == w.to_bits(), "{case}: element {i}: {g:?} against {w:?}");
    }
}

#[test]
fn products_are_one_chain_for_every_format_and_edge() {
    let scalar = ScalarBackend::new();
    let ids: Vec<u32> = (0..70).collect();
    each(|gpu, label| {
        for (n, k) in [(1, 32), (70, 96), (64, 64), (17, 1)] {
            for (name, w) in cases::weights(&mut Noise(22), n, k) {
                // The exact rows, from the embedding.
                let table = scalar.upload_weight(&w).unwrap();
                let rows = scalar.download(&scalar.embed(&table, &ids[..n], 1.0).unwrap()).unwrap();
                for t in [1, 16, 17, 65] {
                    if label == "checked" && (t == 65 || name.contains("shuffled=true")) {
                        continue;
                    }
                    let mut noise = Noise(23 + t as u64);
                    let (x, bias) = (noise.many(t * k), noise.many(n));
                    let cell = |i: usize| (&x[i / n * k..][..k], &rows[i % n * k..][..k]);
                    let sums = (0..t * n).map(|i| {
                        let (x, w) = cell(i);
                        chain(x.iter().copied().zip(w.iter().copied()))
                    });
                    let plain: Vec<f32> = sums.collect();
                    let biased: Vec<f32> = plain.iter().enumerate().map(|(i, y)| y + bias[i % n]).collect();
                    let case = format!("{label} {name} t={t} n={n} k={k}");
                    same(&cases::linear(gpu, &w, &x, None), &plain, &case);
                    same(&cases::linear(gpu, &w, &x, Some(&bias)), &biased, &case);
                }
            }
        }
    });
}

#[test]
fn hessians_are_one_chain_a_call() {
    each(|gpu, label| {
        for (n, t) in [(1, 3), (15, 1), (64, 16), (70, 33), (130, 65)] {
            let mut noise = Noise(31);
            let (start, x) = (noise.many(n * n), noise.many(n * t));
            let mut h = gpu.upload(&start).unwrap();
            gpu.hessian_update(&mut h, &gpu.upload(&x).unwrap(), n).unwrap();
            let mut want = start;
            for i in 0..n {
                for j in i..n {
                    want[i * n + j] += chain((0..t).map(|t| (x[t * n + i], x[t * n + j])));
                }
            }
            same(&gpu.download(&h).unwrap(), &want, &format!("{label} n={n} t={t}"));
        }
    });
}

#[test]
fn norms_rotations_and_silu_keep_their_order() {
    each(|gpu, label| {
        let mut noise = Noise(41);
        for (rows, width) in [(1, 1), (9, 15), (5, 192), (17, 64)] {
            let (x, w) = (noise.many(rows * width), noise.many(width));
            let y = gpu.rms_norm(&gpu.upload(&x).unwrap(), &gpu.upload(&w).unwrap(), width, 1e-5, 1.0).unwrap();
            let want: Vec<f32> = x
                .chunks(width)
                .flat_map(|row| {
                    let squares = lanes16(row.iter().copied().enumerate(), |v, acc| v.mul_add(v, acc));
                    let inv = 1.0 / (squares / width as f32 + 1e-5).sqrt();
                    row.iter().zip(&w).map(move |(x, w)| (x * inv) * (1.0 + w)).collect::<Vec<_>>()
                })
                .collect();
            same(&gpu.download(&y).unwrap(), &want, &format!("{label} norm {rows}x{width}"));
        }
        let segments =
            [Segment { slot: 0, row: 1, tokens: 3, past: 40 }, Segment { slot: 1, row: 4, tokens: 1, past: 0 }];
        let (heads, head_dim, total) = (3, 20, 6);
        let x = noise.many(total * heads * head_dim);
        for half in [10, 4] {
            let freq: Vec<f32> = (0..half).map(|i| 100f32.powf(-(i as f32) / half as f32)).collect();
            let mut q = gpu.upload(&x).unwrap();
            gpu.rope(&mut q, heads, head_dim, &freq, 1.1, &segments).unwrap();
            let mut want = x.clone();
            for (row, position) in [(1, 40), (2, 41), (3, 42), (4, 0)] {
                for h in 0..heads {
                    for (i, f) in freq.iter().enumerate() {
                        let at = (row * heads + h) * head_dim + i;
                        let angle = position as f32 * f;
                        let (c, s) = (angle.cos() * 1.1, angle.sin() * 1.1);
                        let (a, b) = (x[at], x[at + half]);
                        want[at] = a.mul_add(c, -(b * s));
                        want[at + half] = b.mul_add(c, a * s);
                    }
                }
            }
            same(&gpu.download(&q).unwrap(), &want, &format!("{label} rope {half}"));
        }
        let (gate, up) = (noise.many(1003).iter().map(|v| v * 100.0).collect::<Vec<_>>(), noise.many(1003));
        let y = gpu.activation_mul(&gpu.upload(&gate).unwrap(), &gpu.upload(&up).unwrap(), Activation::Silu).unwrap();
        let want: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + exp(-g)) * u).collect();
        same(&gpu.download(&y).unwrap(), &want, &format!("{label} silu"));
    });
}

#[test]
fn attention_keeps_its_order_over_ragged_batches_windows_and_caps() {
    let seg = |slot, row, tokens, past| Segment { slot, row, tokens, past };
    let plan = [
        (vec![seg(2, 0, 70, 0), seg(0, 70, 1, 0), seg(1, 71, 17, 0)], 88),
        (vec![seg(0, 0, 65, 1), seg(2, 66, 3, 70)], 70),
        (vec![seg(1, 0, 1, 17), seg(0, 1, 1, 66), seg(2, 2, 1, 73)], 3),
    ];
    each(|gpu, label| {
        for (heads, kv_heads, head_dim) in [(6, 3, 68), (2, 2, 20), (3, 1, 15)] {
            for (window, soft_cap) in [(None, None), (Some(1), None), (Some(20), None), (Some(70), Some(5.0))] {
                if label == "checked" && head_dim != 20 {
                    continue;
                }
                let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.7, window, soft_cap };
                let (slots, capacity, width) = (3, 80, kv_heads * head_dim);
                let mut cache = gpu.kv_cache(slots, capacity, kv_heads, head_dim).unwrap();
                let (mut keys, mut values) =
                    (vec![0f32; slots * capacity * width], vec![0f32; slots * capacity * width]);
                let mut noise = Noise(51);
                for (segments, rows) in &plan {
                    let (q, k, v) =
                        (noise.many(rows * heads * head_dim), noise.many(rows * width), noise.many(rows * width));
                    gpu.kv_append(&mut cache, &gpu.upload(&k).unwrap(), &gpu.upload(&v).unwrap(), segments).unwrap();
                    let mut want = vec![0f32; q.len()];
                    for s in segments {
                        for i in 0..s.tokens {
                            let (from, to) = ((s.row + i) * width, (s.slot * capacity + s.past + i) * width);
                            keys[to..to + width].copy_from_slice(&k[from..from + width]);
                            values[to..to + width].copy_from_slice(&v[from..from + width]);
                        }
                        for (i, h) in (0..s.tokens).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                            let position = s.past + i;
                            let first = window.map_or(0, |w: usize| (position + 1).saturating_sub(w));
                            let at = |j: usize| (s.slot * capacity + j) * width + h / (heads / kv_heads) * head_dim;
                            let row = ((s.row + i) * heads + h) * head_dim;
                            let score = |j: usize| {
                                let dot = chain((0..head_dim).map(|d| (q[row + d], keys[at(j) + d])));
                                let s = shape.scale * dot;
                                soft_cap.map_or(s, |c: f32| c * (s / c).tanh())
                            };
                            let scores: Vec<f32> = (first..=position).map(score).collect();
                            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                            let p: Vec<f32> = scores.iter().map(|s| exp(s - most)).collect();
                            let z = lanes16(p.iter().enumerate().map(|(j, p)| (first + j, *p)), |v, acc| acc + v);
                            for d in 0..head_dim {
                                let o = chain(p.iter().enumerate().map(|(j, p)| (*p, values[at(first + j) + d])));
                                want[row + d] = o / z;
                            }
                        }
                    }
                    let y = gpu.attention(&gpu.upload(&q).unwrap(), &cache, &shape, segments).unwrap();
                    same(&gpu.download(&y).unwrap(), &want, &format!("{label} {shape:?}"));
                }
            }
        }
    });
}
