//! Launches of the products for many tokens on Hopper's warpgroup products (`linear_wide.cu`).
//!
//! With three terms every result is one chain of totals, whatever the number of tokens. With one, a product of few tiles
//! is split along its columns to fill the device: then a token's rounding depends on how many tokens there are.

use super::device::{Arg, Device, Launch, Memory};
use super::rows::size;
use super::weights::{DeviceWeight, Layout};
use crate::backend::FloatType;
use crate::error::{KernelError, Result};

/// Fewest tokens that come here: more than the narrow kernels take in one launch.
const TOKENS: usize = 33;
/// Rows of a weight in a tile.
const ROWS: usize = 128;
/// Columns of a step.
const STEP: usize = 64;
/// Planes of x have whole tiles of tokens.
const PAD: usize = 256;
/// Shared memory that stages may fill, and stages at most.
const SHARED: usize = 224 << 10;
const STAGES: usize = 6;
/// Splits that are considered, for no more tokens than this.
const SPLITS: [usize; 5] = [1, 2, 4, 8, 16];
const SPLIT_TOKENS: usize = 512;

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Bf16,
    W4,
    W8,
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Tokens of a tile: 128 or 256.
    tokens: usize,
    /// Parts of a sum, each with at least one step.
    splits: usize,
}

impl Plan {
    /// The cheapest by a model of the times measured on an H100, whose units are microseconds.
    fn choose(sms: usize, tokens: usize, out: usize, cols: usize, source: Source, terms: u32) -> Self {
        if terms == 3 {
            return Self { tokens: 128, splits: 1 };
        }
        let steps = cols.div_ceil(STEP);
        let cost = |p: &Plan| {
            let step = match (source, p.tokens) {
                (Source::Bf16, 128) => 0.45,
                (Source::Bf16, _) => 0.88,
                (_, 128) => 0.7,
                _ => 1.0,
            };
            let tiles = out.div_ceil(ROWS) * tokens.div_ceil(p.tokens) * p.splits;
            let product = 3.0 + step * (tiles.div_ceil(sms.max(1)) * steps.div_ceil(p.splits)) as f64;
            // The parts are written and read again by a launch of its own.
            let parts = p.splits as f64 * tokens as f64 * out as f64 * 8.0 / 4e6;
            product + if p.splits > 1 { 4.0 + parts } else { 0.0 }
        };
        let plans = [128, 256].into_iter().flat_map(|n| SPLITS.map(|s| Plan { tokens: n, splits: s }));
        let allowed = plans.filter(|p| p.splits == 1 || (tokens <= SPLIT_TOKENS && steps >= 2 * p.splits));
        let best = allowed.min_by(|a, b| cost(a).total_cmp(&cost(b)));
        let best = best.unwrap_or(Plan { tokens: 128, splits: 1 });
        // No split without a step.
        Plan { splits: steps.div_ceil(steps.div_ceil(best.splits).max(1)).max(1), ..best }
    }
}

/// Whether [`linear`] is for this product; what it does not take goes to `linear_gemm.cu`.
pub fn takes(d: &Device, w: &DeviceWeight, tokens: usize, terms: u32) -> bool {
    let shape = match &w.layout {
        Layout::Dense { dtype: FloatType::Bf16, .. } => w.in_features.is_multiple_of(8),
        Layout::Packed { bits: 4 | 8, group_cols, .. } => {
            w.in_features.is_multiple_of(STEP) && (terms == 1 || group_cols.is_multiple_of(STEP))
        }
        _ => false,
    };
    shape && w.in_features > 0 && tokens >= TOKENS && d.has_warpgroup_products()
}

/// `y = x · Wᵀ (+ bias)`, sizes checked and not zero; `terms` as in `ops_linear::linear`. With one term a packed weight
/// is rounded to bf16 once, after scaling.
pub fn linear(
    d: &Device,
    x: &Memory,
    w: &DeviceWeight,
    bias: Option<&Memory>,
    y: &Memory,
    tokens: usize,
    terms: u32,
) -> Result<()> {
    let plan = Plan::choose(d.multiprocessors(), tokens, w.out_features, w.in_features, source(d, w)?, terms);
    launch(d, x, w, bias, y, tokens, terms, plan)
}

fn source(d: &Device, w: &DeviceWeight) -> Result<Source> {
    match &w.layout {
        Layout::Dense { dtype: FloatType::Bf16, .. } => Ok(Source::Bf16),
        Layout::Packed { bits: 4, .. } => Ok(Source::W4),
        Layout::Packed { bits: 8, .. } => Ok(Source::W8),
        _ => Err(KernelError::Unsupported { backend: d.name(), op: "linear", why: "this weight in wide tiles".into() }),
    }
}

#[expect(clippy::too_many_arguments, reason = "a product and its plan")]
fn launch(
    d: &Device,
    x: &Memory,
    w: &DeviceWeight,
    bias: Option<&Memory>,
    y: &Memory,
    tokens: usize,
    terms: u32,
    plan: Plan,
) -> Result<()> {
    let (out, cols, source) = (w.out_features, w.in_features, source(d, w)?);
    let (order, row_bytes) = match source {
        Source::Bf16 => (0, 128),
        Source::W4 => (4, 32),
        Source::W8 => (8, 64),
    };
    let stride = cols.next_multiple_of(STEP);
    let plane = bytes("activation planes", &[tokens.next_multiple_of(PAD), stride, 2, terms as usize])?;
    let planes = d.alloc(plane)?;
    let [tokens_arg, out_arg, cols_arg] =
        [size("tokens", tokens)?, size("weight rows", out)?, size("weight columns", cols)?].map(Arg::I32);
    let blocks = |n: usize| u32::try_from(n.div_ceil(256)).map_err(|_| KernelError::Overflow("grid"));
    let flat =
        |n: usize| Ok::<_, KernelError>(Launch { grid: [blocks(n)?, 1, 1], block: [256, 1, 1], shared_bytes: 0 });
    let args = [Arg::In(x), Arg::Out(&planes), tokens_arg, cols_arg, Arg::U32(terms), Arg::I32(order)];
    d.launch("wide_split", flat(bytes("activation planes", &[tokens, stride / 8])?)?, &args)?;

    let kernel = match (source, terms, plan.tokens) {
        (Source::Bf16, 1, 128) => "wide_half_bf16_128",
        (Source::Bf16, 1, _) => "wide_half_bf16_256",
        (Source::W4, 1, 128) => "wide_half_w4_128",
        (Source::W4, 1, _) => "wide_half_w4_256",
        (Source::W8, 1, 128) => "wide_half_w8_128",
        (Source::W8, 1, _) => "wide_half_w8_256",
        (Source::Bf16, ..) => "wide_fast_bf16",
        (Source::W4, ..) => "wide_fast_w4",
        (Source::W8, ..) => "wide_fast_w8",
    };
    let stage = terms as usize * plan.tokens * 128 + ROWS * row_bytes;
    let items = out.div_ceil(ROWS) * tokens.div_ceil(plan.tokens) * plan.splits;
    let grid = u32::try_from(items.min(d.multiprocessors())).map_err(|_| KernelError::Overflow("grid"))?;
    let shared_bytes = (stage * (SHARED / stage).min(STAGES)) as u32;
    let (raw, scales, zeros, group) = match &w.layout {
        Layout::Dense { raw, .. } => (raw, Arg::Null, Arg::Null, STEP),
        Layout::Packed { words, scales, zeros, group_cols, .. } => {
            (words, Arg::In(scales), Arg::In(zeros), *group_cols)
        }
    };
    let parts = match plan.splits {
        1 => None,
        n => Some(d.alloc(bytes("partial sums", &[n, tokens, out, 4])?)?),
    };
    let bias = bias.map_or(Arg::Null, Arg::In);
    let args = [
        Arg::In(raw),
        scales,
        zeros,
        Arg::In(&planes),
        bias,
        Arg::Out(parts.as_ref().unwrap_or(y)),
        tokens_arg,
        out_arg,
        cols_arg,
        Arg::I32(size("group", group)?),
        Arg::I32(size("splits", plan.splits)?),
    ];
    d.launch(kernel, Launch { grid: [grid, 1, 1], block: [256, 1, 1], shared_bytes }, &args)?;
    if let Some(parts) = &parts {
        let args = [Arg::In(parts), bias, Arg::Out(y), tokens_arg, out_arg, args[10]];
        let mut sum = flat(bytes("linear output", &[tokens, out])?)?;
        sum.grid[0] = sum.grid[0].min(8 * grid.max(d.multiprocessors() as u32));
        d.launch("wide_sum", sum, &args)?;
    }
    Ok(())
}

fn bytes(what: &'static str, factors: &[usize]) -> Result<usize> {
    factors.iter().try_fold(1usize, |n, f| n.checked_mul(*f)).ok_or(KernelError::Overflow(what))
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::EmulatorOptions;
    use crate::cuda::ops_linear::tests::{Noise, dense, packed, share_of_bound};
    use crate::cuda::rows::{bytes_of, floats_of};
    use crate::scheme::GroupSize;

    /// Weights that come here, with their exact values: groups of 16 in one term only.
    fn weights(noise: &mut Noise, out: usize, cols: usize, terms: u32) -> Vec<(String, DeviceWeight, Vec<f64>)> {
        let d = Device::emulated(1).unwrap();
        let mut list = vec![("bf16".to_string(), dense(noise, FloatType::Bf16, out, cols))];
        for (bits, group) in [(4, 64), (8, 64), (4, 16), (8, 48), (4, 0), (8, 192)] {
            if !cols.is_multiple_of(64) || (group > 0 && !cols.is_multiple_of(group)) {
                continue;
            }
            let size = if group > 0 { GroupSize::Cols(group) } else { GroupSize::PerChannel };
            list.push((format!("{bits} bits, groups of {group}"), packed(noise, bits, size, out, cols)));
        }
        let upload = |(name, (host, exact))| (name, DeviceWeight::upload(&d, &host).unwrap(), exact);
        list.into_iter().map(upload).filter(|(_, w, _)| takes(&d, w, TOKENS, terms)).collect()
    }

    fn run(d: &Device, w: &DeviceWeight, x: &[f32], bias: Option<&[f32]>, terms: u32, plan: Option<Plan>) -> Vec<f32> {
        let tokens = x.len() / w.in_features;
        let x = d.upload(&bytes_of(x)).unwrap();
        let bias = bias.map(|b| d.upload(&bytes_of(b)).unwrap());
        let y = d.alloc(tokens * w.out_features * 4).unwrap();
        match plan {
            Some(plan) => launch(d, &x, w, bias.as_ref(), &y, tokens, terms, plan).unwrap(),
            None => linear(d, &x, w, bias.as_ref(), &y, tokens, terms).unwrap(),
        }
        floats_of(&d.read(&y, 0..y.bytes()).unwrap())
    }

    /// What one term leaves of numbers.
    fn rounded(v: f64) -> f64 {
        f64::from(bf16::from_f32(v as f32).to_f32())
    }

    fn agrees(d: &Device, sizes: &[(usize, usize, usize)], terms: u32, plans: &[Plan]) {
        let mut noise = Noise(1);
        for &(tokens, out, cols) in sizes {
            for (name, w, mut exact) in weights(&mut noise, out, cols, terms) {
                let (x, bias) = (noise.many(tokens * cols), noise.many(out));
                let mut seen = x.clone();
                if terms == 1 {
                    seen.iter_mut().for_each(|v| *v = rounded(f64::from(*v)) as f32);
                    // The f32 product of scale and code, as the kernel takes it; exact for bf16 weights.
                    exact.iter_mut().for_each(|v| *v = rounded(*v));
                }
                for plan in plans {
                    let got = run(d, &w, &x, Some(&bias), terms, Some(*plan));
                    let share = share_of_bound(&got, &seen, &exact, &bias, cols);
                    assert!(share <= 1.0, "{name} {tokens} tokens {out}x{cols} {plan:?}: {share} of the bound");
                }
            }
        }
    }

    const HALF: [Plan; 3] =
        [Plan { tokens: 128, splits: 1 }, Plan { tokens: 256, splits: 1 }, Plan { tokens: 128, splits: 2 }];

    #[test]
    fn one_term_is_the_product_of_rounded_operands() {
        // Sixteen steps and more than three tiles: every stage is used again, and a block goes on to another tile.
        let sizes = [(65, 17, 192), (130, 200, 320), (300, 130, 1024)];
        agrees(&Device::emulated(2).unwrap(), &sizes, 1, &HALF);
    }

    #[test]
    fn three_terms_are_exact_to_f32_sums() {
        let sizes = [(65, 17, 192), (130, 200, 320), (257, 129, 576), (66, 3, 8), (65, 130, 72)];
        agrees(&Device::emulated(2).unwrap(), &sizes, 3, &[Plan { tokens: 128, splits: 1 }]);
    }

    #[test]
    fn no_race_and_no_stray_access() {
        let options = EmulatorOptions { checked: true, seed: 5, ..EmulatorOptions::default() };
        let Ok(d) = Device::emulated_with(options) else { return }; // a compiler that cannot instrument
        agrees(&d, &[(65, 9, 576)], 1, &HALF[1..]);
        agrees(&d, &[(65, 9, 320)], 3, &HALF[..1]);
    }

    #[test]
    fn a_token_computes_the_same_in_any_company() {
        let (d, mut noise) = (Device::emulated(2).unwrap(), Noise(2));
        let (out, cols) = (37, 192);
        for terms in [1, 3] {
            for (name, w, _) in weights(&mut noise, out, cols, terms) {
                let x = noise.many(200 * cols);
                let plan = (terms == 1).then_some(HALF[0]);
                let all = run(&d, &w, &x, None, terms, plan);
                assert_eq!(run(&d, &w, &x[..65 * cols], None, terms, plan), all[..65 * out], "{name}, the first");
                assert_eq!(run(&d, &w, &x[120 * cols..], None, terms, plan), all[120 * out..], "{name}, the last");
            }
        }
    }

    #[test]
    fn infinities_and_nans_stay_in_their_token() {
        let (d, mut noise) = (Device::emulated(1).unwrap(), Noise(3));
        for terms in [1, 3] {
            for (name, w, _) in weights(&mut noise, 5, 64, terms) {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut x = noise.many(65 * 64);
                    x[64 + 7] = bad;
                    let y = run(&d, &w, &x, None, terms, None);
                    assert!(y[5..10].iter().all(|v| !v.is_finite()), "{name} {bad}");
                    assert!(y[..5].iter().chain(&y[10..]).all(|v| v.is_finite()), "{name} {bad}");
                }
            }
        }
    }

    #[test]
    fn plans_fill_the_device_and_leave_no_split_empty() {
        let of = |tokens, out, cols| Plan::choose(132, tokens, out, cols, Source::Bf16, 1);
        assert_eq!(of(4096, 8192, 8192), Plan { tokens: 256, splits: 1 });
        assert!(of(128, 1024, 4096).splits > 1 && of(128, 14336, 4096).splits == 1);
        assert_eq!(of(128, 1024, 64).splits, 1);
        for steps in 1..200usize {
            let p = of(65, 128, steps * STEP);
            assert!((p.splits - 1) * steps.div_ceil(p.splits) < steps, "{steps} steps: {p:?}");
        }
        assert_eq!(Plan::choose(132, 65, 128, 8192, Source::W4, 3).splits, 1);
    }
}
