//! Float codes: the scales of E4M3, NVFP4 and MXFP4 weights, and rounding or GPTQ onto them.
//!
//! Scales are fixed before any rounding, as for integers. E4M3: the largest magnitude of a row, matrix or block over 448. NVFP4 and MXFP4:
//! with the Hessian search, the neighbour of the usual scale whose squared error, weighted by the Hessian's diagonal, is least; a scale
//! of eight or of no bits of mantissa has few neighbours.

use lowbit_kernels::backend::Bytes;
use lowbit_kernels::error::check_len;
use lowbit_kernels::floats::{FloatCode, FloatScales, FloatWeight, MXFP4_GROUP, NVFP4_GROUP, pack_e2m1};
use lowbit_kernels::minifloat::{E2M1_MAX, E4M3_MAX, e2m1, e4m3, e8m0, mx_scale, to_e2m1, to_e4m3};
use lowbit_kernels::{Fp8Scale, ScaleType, WeightFormat};
use rayon::prelude::*;

use crate::factor::{Factor, SolveError};
use crate::gptq::{Grid, GridScales, Shifts, grid_codes};
use crate::scale_search::{ScaleSearch, SolverOptions, check_finite, usable};

/// The global scale of an NVFP4 matrix whose fused set has the largest magnitude `set_max`: local scales then use E4M3's whole range.
pub fn global_scale(set_max: f32) -> f32 {
    let global = E4M3_MAX * E2M1_MAX / set_max.max(f32::MIN_POSITIVE);
    if global.is_finite() { global } else { 1.0 }
}

/// Quantizes `w` `[out, n]` to `format`, which is not of integers: by GPTQ under `factor`, or by rounding where there is none.
/// `set_max` is the largest magnitude in all matrices that share the global scale (NVFP4 alone reads it).
pub fn quantize_float(
    w: &[f32],
    out: usize,
    n: usize,
    format: WeightFormat,
    set_max: f32,
    factor: Option<&Factor>,
    opts: &SolverOptions,
) -> Result<FloatWeight, SolveError> {
    opts.check()?;
    check_len("weight", out * n, w.len())?;
    check_finite("weight", w)?;
    let diag = factor.map(|f| f.diag.as_slice());
    if let Some(d) = diag {
        check_len("factor's diagonal", n, d.len())?;
    }
    let scales = choose(w, out, n, format, set_max, diag, opts)?;
    let (grid, code) = match format {
        WeightFormat::Nvfp4 | WeightFormat::Mxfp4 => (Grid::E2m1, FloatCode::E2m1),
        _ => (Grid::E4m3, FloatCode::E4m3),
    };
    let groups = scales.groups(n);
    let every: Vec<f32> = (0..out * groups).map(|i| scales.at(i / groups, i % groups, groups)).collect();
    let on = GridScales { grid, scales: &every, shifts: Shifts::None, cols: scales.group_cols() };
    let codes = match factor {
        Some(f) => grid_codes(w, out, n, f, &on, opts.block)?,
        None => rounded(w, n, &on),
    };
    let codes = if code == FloatCode::E2m1 { pack_e2m1(&codes) } else { codes };
    let weight = FloatWeight { code, out_features: out, in_features: n, codes: Bytes::from_vec(codes), scales };
    weight.validate()?;
    Ok(weight)
}

/// Every weight on its own.
fn rounded(w: &[f32], n: usize, on: &GridScales) -> Vec<u8> {
    let mut codes = vec![0u8; w.len()];
    if n > 0 {
        let groups = n.div_ceil(on.cols);
        codes.par_chunks_mut(n).zip(w.par_chunks(n)).enumerate().for_each(|(row, (codes, w))| {
            for (col, (code, w)) in codes.iter_mut().zip(w).enumerate() {
                let x = w / on.scales[row * groups + col / on.cols];
                *code = if on.grid == Grid::E2m1 { to_e2m1(x) } else { to_e4m3(x) };
            }
        });
    }
    codes
}

fn choose(
    w: &[f32],
    out: usize,
    n: usize,
    format: WeightFormat,
    set_max: f32,
    diag: Option<&[f32]>,
    opts: &SolverOptions,
) -> Result<FloatScales, SolveError> {
    let search = opts.scale_search != ScaleSearch::MinMax;
    match format {
        WeightFormat::Int(_) => Err(SolveError::BadOption { what: "float format of integer codes", value: 0.0 }),
        WeightFormat::Fp8(by) => {
            let (rows, cols) = match by {
                Fp8Scale::Tensor => (out.max(1), n.max(1)),
                Fp8Scale::Channel => (1, n.max(1)),
                Fp8Scale::Block(r, c) => (r, c),
            };
            block_scales(w, n, (rows, cols), diag, opts.scale_type).map(|values| FloatScales::Blocks {
                values,
                rows,
                cols,
            })
        }
        WeightFormat::Nvfp4 => {
            let global = global_scale(set_max);
            let codes = group_codes(w, out, n, NVFP4_GROUP, diag, |values, weight| {
                let usual = match to_e4m3(global * (largest(values) / E2M1_MAX)) {
                    0 => to_e4m3(0.125),
                    code => code,
                };
                let around =
                    if search { usual.saturating_sub(4).max(1)..=(usual + 1).min(0x7e) } else { usual..=usual };
                best(values, weight, usual, around, |code| e4m3(code) / global)
            })?;
            Ok(FloatScales::Local { codes, global })
        }
        WeightFormat::Mxfp4 => {
            let codes = group_codes(w, out, n, MXFP4_GROUP, diag, |values, weight| {
                let usual = mx_scale(largest(values));
                let around = if search { usual.saturating_sub(1)..=(usual + 1).min(254) } else { usual..=usual };
                best(values, weight, usual, around, e8m0)
            })?;
            Ok(FloatScales::Exponents { codes })
        }
    }
}

/// Scales of blocks of E4M3, rounded to the dtype they are stored in. A block without a live weight gets scale 1.
fn block_scales(
    w: &[f32],
    n: usize,
    (rows, cols): (usize, usize),
    diag: Option<&[f32]>,
    scale_type: ScaleType,
) -> Result<Vec<f32>, SolveError> {
    let groups = n.div_ceil(cols).max(1);
    let mut values = vec![0f32; (w.len() / n.max(1)).div_ceil(rows) * groups];
    for (row, w) in w.chunks_exact(n.max(1)).enumerate() {
        for (col, v) in w.iter().enumerate() {
            if diag.is_none_or(|d| d[col] != 0.0) {
                let cell = &mut values[row / rows * groups + col / cols];
                *cell = cell.max(v.abs());
            }
        }
    }
    for (i, v) in values.iter_mut().enumerate() {
        let scale = scale_type.round(*v / E4M3_MAX);
        if !scale.is_finite() {
            return Err(SolveError::ScaleOverflow { row: i / groups * rows, group: i % groups, value: scale });
        }
        *v = if usable(scale) { scale } else { 1.0 };
    }
    Ok(values)
}

/// A scale code for every group of `cols` columns: `pick` sees the live weights (dead ones are 0) and the weights of their errors.
fn group_codes(
    w: &[f32],
    out: usize,
    n: usize,
    cols: usize,
    diag: Option<&[f32]>,
    pick: impl Fn(&[f32], &[f32]) -> u8 + Sync,
) -> Result<Bytes, SolveError> {
    if !n.is_multiple_of(cols) {
        return Err(lowbit_kernels::KernelError::NotDivisible { what: "input width", value: n, by: cols }.into());
    }
    let ones = vec![1f32; n];
    let weight = diag.unwrap_or(&ones);
    let groups = n / cols;
    let mut codes = vec![0u8; out * groups];
    if groups > 0 {
        codes.par_chunks_mut(groups).zip(w.par_chunks(n)).for_each_init(
            || vec![0f32; cols],
            |live, (codes, w)| {
                for (g, code) in codes.iter_mut().enumerate() {
                    let span = g * cols..(g + 1) * cols;
                    for ((l, w), h) in live.iter_mut().zip(&w[span.clone()]).zip(&weight[span.clone()]) {
                        *l = if *h == 0.0 { 0.0 } else { *w };
                    }
                    *code = pick(live, &weight[span]);
                }
            },
        );
    }
    Ok(Bytes::from_vec(codes))
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |m, v| m.max(v.abs()))
}

/// The scale code of least weighted squared error under rounding; the usual one on a tie.
fn best(
    values: &[f32],
    weight: &[f32],
    usual: u8,
    around: std::ops::RangeInclusive<u8>,
    scale: impl Fn(u8) -> f32,
) -> u8 {
    let error = |code: u8| -> f32 {
        let s = scale(code);
        let e = |w: &f32| w - e2m1(to_e2m1(w / s)) * s;
        values.iter().zip(weight).map(|(w, h)| h * e(w).powi(2)).sum()
    };
    let mut best = (usual, error(usual));
    for code in around {
        let found = error(code);
        if found < best.1 {
            best = (code, found);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::factor::factorize;
    use crate::loss::proxy_loss;

    fn options(search: ScaleSearch) -> SolverOptions {
        let scheme = Scheme { bits: 8, symmetric: true, group: GroupSize::PerChannel };
        SolverOptions { scale_search: search, ..SolverOptions::new(scheme, ScaleType::Bf16) }
    }

    const FORMATS: [WeightFormat; 5] = [
        WeightFormat::Fp8(Fp8Scale::Tensor),
        WeightFormat::Fp8(Fp8Scale::Channel),
        WeightFormat::Fp8(Fp8Scale::Block(16, 24)),
        WeightFormat::Nvfp4,
        WeightFormat::Mxfp4,
    ];

    fn example(out: usize, n: usize) -> (Vec<f32>, Vec<f32>) {
        let mut rng = StdRng::seed_from_u64(7);
        let w: Vec<f32> = (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect();
        let mut h = vec![0f32; n * n];
        for _ in 0..3 * n {
            let shared: f32 = rng.random_range(-1.0..1.0);
            let x: Vec<f32> =
                (0..n).map(|i| (1.0 + i as f32 / n as f32) * (shared + rng.random_range(-1f32..1.0))).collect();
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += x[i] * x[j];
                }
            }
        }
        (w, h)
    }

    #[test]
    fn hand_worked_scales() {
        let mut w = vec![0f32; 64];
        (w[0], w[1], w[20], w[33]) = (6.0, -1.4, 3.0, 448.0);
        let opts = options(ScaleSearch::MinMax);
        let q = |format| quantize_float(&w, 2, 32, format, 448.0, None, &opts).unwrap();
        let fp8 = q(WeightFormat::Fp8(Fp8Scale::Channel));
        // 6 / 448 in bf16; 448 / 448.
        assert_eq!((fp8.scale(0, 0), fp8.scale(1, 0)), (ScaleType::Bf16.round(6.0 / 448.0), 1.0));
        assert_eq!(fp8.dequantize().unwrap()[33], 448.0);
        let nv = q(WeightFormat::Nvfp4);
        let FloatScales::Local { codes, global } = &nv.scales else { panic!("two levels") };
        // 2688 / 448 = 6; a local scale is 6 · largest / 6.
        assert_eq!(*global, 6.0);
        let local: Vec<f32> = codes.as_slice().iter().map(|c| e4m3(*c)).collect();
        // The fourth group is all zeros.
        assert_eq!(local, [36.0 / 6.0, 18.0 / 6.0, 448.0, 0.125]);
        assert_eq!(nv.dequantize().unwrap()[..2], [6.0, -1.5]);
        let mx = q(WeightFormat::Mxfp4);
        assert_eq!((mx.scale(0, 0), mx.scale(1, 0)), (1.0, 128.0));
    }

    #[test]
    fn a_scale_search_and_gptq_each_lower_the_loss() {
        let (out, n) = (33, 96);
        let (w, h) = example(out, n);
        for format in FORMATS {
            let opts = options(ScaleSearch::Hessian);
            let factor = factorize(&h, n, &opts).unwrap();
            let loss = |q: FloatWeight| proxy_loss(&w, &q.dequantize().unwrap(), &h, out, n).relative();
            let plain = quantize_float(&w, out, n, format, 1.0, None, &options(ScaleSearch::MinMax)).unwrap();
            let solved = loss(quantize_float(&w, out, n, format, 1.0, Some(&factor), &opts).unwrap());
            let plain = loss(plain);
            assert!(solved < 0.8 * plain, "{format:?}: {solved} {plain}");
            // E4M3 keeps four bits of each weight, E2M1 two.
            let most = if matches!(format, WeightFormat::Fp8(_)) { 2e-3 } else { 3e-2 };
            assert!(plain < most, "{format:?}: {plain}");
        }
    }

    #[test]
    fn an_identity_hessian_gives_rounding() {
        let (out, n) = (9, 96);
        let (w, _) = example(out, n);
        let h: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
        for format in FORMATS {
            let opts = SolverOptions { act_order: false, ..options(ScaleSearch::Hessian) };
            let factor = factorize(&h, n, &opts).unwrap();
            let a = quantize_float(&w, out, n, format, 1.0, Some(&factor), &opts).unwrap();
            let b = quantize_float(&w, out, n, format, 1.0, None, &opts).unwrap();
            assert_eq!(a.codes.as_slice(), b.codes.as_slice(), "{format:?}");
        }
    }

    #[test]
    fn dead_columns_become_zero_and_nan_is_refused() {
        let (out, n) = (3, 32);
        let (mut w, _) = example(out, n);
        w[5] = 100.0;
        let h: Vec<f32> = (0..n * n).map(|i| if i / n == i % n && i % n != 5 { 1.0 } else { 0.0 }).collect();
        for format in FORMATS {
            let opts = options(ScaleSearch::Hessian);
            let factor = factorize(&h, n, &opts).unwrap();
            let q = quantize_float(&w, out, n, format, 1.0, Some(&factor), &opts).unwrap();
            let back = q.dequantize().unwrap();
            assert!((0..out).all(|r| back[r * n + 5] == 0.0) && q.scale(0, 0) < 1.0, "{format:?}");
        }
        w[7] = f32::NAN;
        let e = quantize_float(&w, out, n, FORMATS[0], 1.0, None, &options(ScaleSearch::MinMax)).err().unwrap();
        assert!(matches!(e, SolveError::NonFinite { what: "weight", index: 7 }), "{e}");
    }
}
