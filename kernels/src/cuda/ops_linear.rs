//! Launches of the products with a weight.
//!
//! Up to [`GEMV_TOKENS`] tokens take the matrix–vector kernels, more the tensor-core tiles, and from 33 on the wide tiles
//! (`ops_wide.rs`) where device and weight have them. Within each, the result of a token does not depend on the tokens
//! beside it, bit for bit (wide tiles with one term excepted); between them it agrees to rounding.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_wide;
use super::rows::size;
use super::weights::{DeviceWeight, Layout, dtype_code};
use crate::backend::FloatType;
use crate::error::{KernelError, Result, check_len};

/// Most tokens the matrix–vector kernels take.
pub const GEMV_TOKENS: usize = 8;
/// Threads of a block, in both kernels.
const THREADS: u32 = 128;
/// Warps of a block, each with its own rows of the weight.
const WARPS: usize = 4;
/// Side of an output tile of the tensor-core kernels.
const TILE: usize = 64;
/// Bytes of one bf16 term of a 64 x 32 tile.
const PLANE_BYTES: u32 = 64 * 32 * 2;
/// Bytes of the columns of one token that the matrix–vector kernels stage at a time.
const WINDOW_BYTES: u32 = 1024 * 4;

/// `y = x · Wᵀ (+ bias)`: x `[tokens, in]`, y `[tokens, out]`, bias `[out]`, f32. `terms`: bf16 terms that a tensor core
/// reads x as, 3 for all of an f32, 1 for x rounded to bf16; the matrix–vector kernels read f32 either way.
pub fn linear(
    d: &Device,
    x: &Memory,
    w: &DeviceWeight,
    bias: Option<&Memory>,
    y: &Memory,
    tokens: usize,
    terms: u32,
) -> Result<()> {
    check("linear input", x, tokens, w.in_features)?;
    check("linear output", y, tokens, w.out_features)?;
    if let Some(b) = bias {
        check("bias", b, 1, w.out_features)?;
    }
    if tokens == 0 || w.out_features == 0 {
        return Ok(());
    }
    if ops_wide::takes(d, w, tokens, terms) {
        return ops_wide::linear(d, x, w, bias, y, tokens, terms);
    }
    let few = tokens <= GEMV_TOKENS;
    let sizes = [size("tokens", tokens)?, size("weight rows", w.out_features)?, size("weight columns", w.in_features)?];
    let [tokens_arg, out_arg, in_arg] = sizes.map(Arg::I32);
    let bias = bias.map_or(Arg::Null, Arg::In);
    match &w.layout {
        Layout::Dense { raw, dtype } => {
            let args = [
                Arg::In(raw),
                Arg::In(x),
                bias,
                Arg::Out(y),
                tokens_arg,
                out_arg,
                in_arg,
                Arg::I32(dtype_code(*dtype)),
                Arg::U32(terms),
            ];
            if few {
                return d.launch("gemv_dense", gemv_launch(tokens, w.out_features)?, &args[..8]);
            }
            let weight_terms = match dtype {
                FloatType::F32 => 3,
                FloatType::F16 => 2,
                FloatType::Bf16 => 1,
            };
            d.launch("gemm_dense", gemm_launch(tokens, w.out_features, terms + weight_terms)?, &args)
        }
        Layout::Packed { words, scales, zeros, bits, group_cols } => {
            let group = Arg::I32(size("group", *group_cols)?);
            let bits_arg = Arg::I32(i32::from(*bits));
            let args = [
                Arg::In(words),
                Arg::In(scales),
                Arg::In(zeros),
                Arg::In(x),
                bias,
                Arg::Out(y),
                tokens_arg,
                out_arg,
                in_arg,
                group,
                bits_arg,
                Arg::U32(terms),
            ];
            match (few, bits) {
                (true, 4) => d.launch("gemv_w4", gemv_launch(tokens, w.out_features)?, &args[..10]),
                (true, 8) => d.launch("gemv_w8", gemv_launch(tokens, w.out_features)?, &args[..10]),
                (false, 4 | 8) => d.launch("gemm_packed", gemm_launch(tokens, w.out_features, terms + 1)?, &args),
                (_, other) => Err(KernelError::Unsupported {
                    backend: d.name(),
                    op: "linear",
                    why: format!("{other}-bit codes on the device"),
                }),
            }
        }
    }
}

fn check(what: &'static str, m: &Memory, rows: usize, cols: usize) -> Result<()> {
    let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(4)).ok_or(KernelError::Overflow(what))?;
    check_len(what, bytes / 4, m.bytes() / 4)
}

fn blocks(n: usize, by: usize) -> Result<u32> {
    u32::try_from(n.div_ceil(by)).map_err(|_| KernelError::Overflow("grid"))
}

fn gemv_launch(tokens: usize, out: usize) -> Result<Launch> {
    let rows = if tokens > 4 { 2 } else { 4 };
    let shared_bytes = tokens.next_power_of_two() as u32 * WINDOW_BYTES;
    Ok(Launch { grid: [blocks(out, WARPS * rows)?, 1, 1], block: [THREADS, 1, 1], shared_bytes })
}

fn gemm_launch(tokens: usize, out: usize, planes: u32) -> Result<Launch> {
    let shared_bytes = 2 * planes * PLANE_BYTES;
    Ok(Launch { grid: [blocks(out, TILE)?, blocks(tokens, TILE)?, 1], block: [THREADS, 1, 1], shared_bytes })
}

#[cfg(all(test, feature = "emulated"))]
pub(in crate::cuda) mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::backend::{Bytes, HostWeight, PackedWeight};
    use crate::cuda::EmulatorOptions;
    use crate::cuda::rows::{bytes_of, floats_of};
    use crate::pack::pack_rows;
    use crate::scheme::{GroupSize, Scheme};

    pub(in crate::cuda) struct Noise(pub u64);

    impl Noise {
        fn bits(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 32) as u32
        }
        pub(in crate::cuda) fn many(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.bits() as f32 / 2f32.powi(31) - 1.0).collect()
        }
    }

    /// A weight with its exact values.
    pub(in crate::cuda) fn dense(
        noise: &mut Noise,
        dtype: FloatType,
        out: usize,
        cols: usize,
    ) -> (HostWeight, Vec<f64>) {
        let (mut raw, mut exact) = (Vec::new(), Vec::new());
        for v in noise.many(out * cols) {
            match dtype {
                FloatType::F32 => raw.extend(v.to_le_bytes()),
                FloatType::F16 => raw.extend(f16::from_f32(v).to_le_bytes()),
                FloatType::Bf16 => raw.extend(bf16::from_f32(v).to_le_bytes()),
            }
            exact.push(match dtype {
                FloatType::F32 => f64::from(v),
                FloatType::F16 => f16::from_f32(v).to_f64(),
                FloatType::Bf16 => bf16::from_f32(v).to_f64(),
            });
        }
        let data = Bytes::from_vec(raw);
        (HostWeight::Dense { dtype, out_features: out, in_features: cols, data }, exact)
    }

    pub(in crate::cuda) fn packed(
        noise: &mut Noise,
        bits: u8,
        group: GroupSize,
        out: usize,
        cols: usize,
    ) -> (HostWeight, Vec<f64>) {
        let scheme = Scheme { bits, symmetric: false, group };
        let (groups, per_group) = (scheme.groups(cols).unwrap(), scheme.group_cols(cols));
        let codes: Vec<u8> = (0..out * cols).map(|_| noise.bits() as u8 & scheme.max_code()).collect();
        let scales: Vec<f32> = noise.many(out * groups).iter().map(|s| s / f32::from(scheme.max_code())).collect();
        let zeros: Vec<u8> = (0..out * groups).map(|_| noise.bits() as u8 & scheme.max_code()).collect();
        let at = |i: usize| i / cols * groups + i % cols / per_group;
        let weight = |i: usize| (f64::from(codes[i]) - f64::from(zeros[at(i)])) * f64::from(scales[at(i)]);
        let exact = (0..out * cols).map(weight).collect();
        let words = Bytes::from_vec(bytes_of(&pack_rows(&codes, out, cols, bits).unwrap()));
        let (zeros, group_index) = (Some(zeros), None);
        let p = PackedWeight { scheme, out_features: out, in_features: cols, words, scales, zeros, group_index };
        (HostWeight::Packed(p), exact)
    }

    fn weights(noise: &mut Noise, out: usize, cols: usize) -> Vec<(String, HostWeight, Vec<f64>)> {
        let mut list = Vec::new();
        for dtype in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
            let (w, exact) = dense(noise, dtype, out, cols);
            list.push((format!("{dtype:?}"), w, exact));
        }
        for bits in [4, 8] {
            for group in [GroupSize::Cols(16), GroupSize::Cols(48), GroupSize::Cols(64), GroupSize::PerChannel] {
                if group != GroupSize::PerChannel
                    && !cols.is_multiple_of(Scheme { bits, symmetric: false, group }.group_cols(cols))
                {
                    continue;
                }
                let (w, exact) = packed(noise, bits, group, out, cols);
                list.push((format!("{bits} bits {group:?}"), w, exact));
            }
        }
        list
    }

    fn run(d: &Device, w: &DeviceWeight, x: &[f32], bias: Option<&[f32]>, tokens: usize) -> Vec<f32> {
        run_with(d, w, x, bias, tokens, 3)
    }

    fn run_with(d: &Device, w: &DeviceWeight, x: &[f32], bias: Option<&[f32]>, tokens: usize, terms: u32) -> Vec<f32> {
        let x = d.upload(&bytes_of(x)).unwrap();
        let bias = bias.map(|b| d.upload(&bytes_of(b)).unwrap());
        let y = d.alloc(tokens * w.out_features * 4).unwrap();
        linear(d, &x, w, bias.as_ref(), &y, tokens, terms).unwrap();
        floats_of(&d.read(&y, 0..y.bytes()).unwrap())
    }

    /// Worst error over its bound `eps · sqrt(k) · Σ|x w|` (at most 1), for one product.
    pub(in crate::cuda) fn share_of_bound(got: &[f32], x: &[f32], exact: &[f64], bias: &[f32], cols: usize) -> f64 {
        let (out, mut worst) = (bias.len(), 0f64);
        for (i, g) in got.iter().enumerate() {
            let (t, o) = (i / out, i % out);
            let (mut sum, mut size) = (f64::from(bias[o]), f64::from(bias[o]).abs());
            for c in 0..cols {
                let p = f64::from(x[t * cols + c]) * exact[o * cols + c];
                sum += p;
                size += p.abs();
            }
            let share = (f64::from(*g) - sum).abs() / (f64::from(f32::EPSILON) * (cols as f64).sqrt() * size);
            assert!(share <= 1.0, "token {t} row {o}: {g} against {sum}, {share} of the bound");
            worst = worst.max(share);
        }
        worst
    }

    #[test]
    fn products_are_exact_to_f32_sums_at_every_edge() {
        let (d, mut noise) = (Device::emulated(2).unwrap(), Noise(1));
        for cols in [1, 15, 16, 17, 36, 48, 96, 136, 192, 1104] {
            for out in [1, 15, 16, 17, 65] {
                if cols > 1000 && out > 17 {
                    continue;
                }
                for (name, w, exact) in weights(&mut noise, out, cols) {
                    if cols % 16 != 0 && matches!(w, HostWeight::Packed(_)) && name.contains("Cols") {
                        continue;
                    }
                    let w = DeviceWeight::upload(&d, &w).unwrap();
                    for tokens in [1, 2, 3, 5, 8, 9, 16, 17, 65] {
                        let (x, bias) = (noise.many(tokens * cols), noise.many(out));
                        let got = run(&d, &w, &x, Some(&bias), tokens);
                        let share = share_of_bound(&got, &x, &exact, &bias, cols);
                        assert!(share <= 1.0, "{name} cols={cols} out={out} tokens={tokens}");
                    }
                }
            }
        }
    }

    #[test]
    fn one_term_is_x_rounded_to_bf16_and_the_rest_exact() {
        let (d, mut noise) = (Device::emulated(2).unwrap(), Noise(6));
        for (cols, out) in [(1, 3), (17, 16), (48, 65), (192, 17)] {
            for (name, w, exact) in weights(&mut noise, out, cols) {
                if cols % 16 != 0 && matches!(w, HostWeight::Packed(_)) && name.contains("Cols") {
                    continue;
                }
                let w = DeviceWeight::upload(&d, &w).unwrap();
                for tokens in [9, 32, 130] {
                    let wide = ops_wide::takes(&d, &w, tokens, 1) && matches!(w.layout, Layout::Packed { .. });
                    let round = |v: &f64| f64::from(bf16::from_f32(*v as f32).to_f32());
                    let exact: Vec<f64> = exact.iter().map(|v| if wide { round(v) } else { *v }).collect();
                    let (x, bias) = (noise.many(tokens * cols), noise.many(out));
                    let rounded: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
                    let got = run_with(&d, &w, &x, Some(&bias), tokens, 1);
                    let share = share_of_bound(&got, &rounded, &exact, &bias, cols);
                    assert!(share <= 1.0, "{name} cols={cols} out={out} tokens={tokens}");
                }
            }
        }
    }

    #[test]
    fn a_token_computes_the_same_alone_and_in_company() {
        let (d, mut noise) = (Device::emulated(2).unwrap(), Noise(2));
        let (out, cols) = (37, 192);
        for (name, w, _) in weights(&mut noise, out, cols) {
            let w = DeviceWeight::upload(&d, &w).unwrap();
            let x = noise.many(32 * cols);
            let few = run(&d, &w, &x[..8 * cols], None, 8);
            for t in 1..8 {
                assert_eq!(run(&d, &w, &x[..t * cols], None, t), few[..t * out], "{name} {t} of 8 tokens");
            }
            let many = run(&d, &w, &x, None, 32);
            assert_eq!(run(&d, &w, &x[..9 * cols], None, 9), many[..9 * out], "{name} 9 of 32 tokens");
            assert_eq!(run(&d, &w, &x[23 * cols..], None, 9), many[23 * out..], "{name} later tokens");
        }
    }

    #[test]
    fn no_race_where_shared_memory_is_used_again() {
        let options = EmulatorOptions { checked: true, seed: 5, ..EmulatorOptions::default() };
        let Ok(d) = Device::emulated_with(options) else { return }; // a compiler that cannot instrument
        let (mut noise, cols, out) = (Noise(5), 2064, 9);
        for (name, w, exact) in weights(&mut noise, out, cols) {
            let w = DeviceWeight::upload(&d, &w).unwrap();
            for tokens in [2, 10] {
                let (x, bias) = (noise.many(tokens * cols), noise.many(out));
                let share = share_of_bound(&run(&d, &w, &x, Some(&bias), tokens), &x, &exact, &bias, cols);
                assert!(share <= 1.0, "{name} tokens={tokens}");
            }
        }
    }

    #[test]
    fn infinities_and_nans_reach_the_result() {
        let (d, mut noise) = (Device::emulated(1).unwrap(), Noise(3));
        for (name, w, _) in weights(&mut noise, 5, 48) {
            let w = DeviceWeight::upload(&d, &w).unwrap();
            for tokens in [2, 20] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut x = noise.many(tokens * 48);
                    x[48 + 7] = bad;
                    let y = run(&d, &w, &x, None, tokens);
                    assert!(y[5..10].iter().all(|v| !v.is_finite()), "{name} tokens={tokens} {bad}");
                    assert!(y[..5].iter().chain(&y[10..]).all(|v| v.is_finite()), "{name} tokens={tokens} {bad}");
                }
            }
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let (d, mut noise) = (Device::emulated(1).unwrap(), Noise(4));
        let w = DeviceWeight::upload(&d, &dense(&mut noise, FloatType::F32, 3, 8).0).unwrap();
        let memory = |n: usize| d.alloc(n * 4).unwrap();
        let refuse =
            |x: usize, y: usize, bias: usize| match linear(&d, &memory(x), &w, Some(&memory(bias)), &memory(y), 2, 3) {
                Err(KernelError::Length { what, .. }) => what,
                _ => "accepted",
            };
        assert_eq!(refuse(15, 6, 3), "linear input");
        assert_eq!(refuse(16, 5, 3), "linear output");
        assert_eq!(refuse(16, 6, 4), "bias");
    }
}
