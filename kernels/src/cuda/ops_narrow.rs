//! Launches of `linear_narrow.cu`: products for few tokens, of one weight or of up to three that share x.

use std::sync::{Mutex, PoisonError};

use super::device::{Arg, Device, Launch, MAX_SHARED_BYTES, Memory};
use super::ops_elementwise::{flat, floats, holds, product};
use super::rows::size;
use super::weights::{DeviceWeight, Layout};
use crate::backend::FloatType;
use crate::error::{KernelError, Result};

/// Weights of one launch.
pub const MOST_WEIGHTS: usize = 3;
/// Rows of a tile.
const TILE: usize = 16;
/// Warps that share a tile's steps.
const TURNS: usize = 4;
/// Counters are made once, unless a launch needs more.
const COUNTER_BYTES: usize = 64 << 10;
/// Most splits of the columns.
const MOST_SPLITS: usize = 16;

/// What the kernels for few tokens need beside a weight's layout.
pub struct Narrow {
    /// Number format and step, as the kernels number them.
    kind: i32,
    /// Columns of a step.
    step: usize,
    /// Bytes of a step of one tile.
    step_bytes: usize,
    /// A step s lies in group `s >> group_shift`.
    group_shift: i32,
    /// Scale and zero point of each row and group, u32 `[ceil(out / 16), groups, 16]`: the scale in the low half, the zero
    /// point in the high; `None` for dense weights.
    meta: Option<Memory>,
    /// Scales in `meta` are f16, else bf16.
    f16_scales: bool,
}

impl Narrow {
    /// `None` when the shape or the format does not fit: rows of other than whole steps or of fewer than four, groups that are not whole
    /// steps times a power of two, other formats than bf16, 4 and 8 bits, or scales that 16 bits do not hold exactly.
    pub fn of(d: &Device, out: usize, cols: usize, layout: &Layout) -> Result<Option<Self>> {
        let fits = |step: usize| cols.is_multiple_of(step) && cols >= TURNS * step;
        match layout {
            Layout::Dense { dtype: FloatType::Bf16, .. } if fits(32) && out > 0 => {
                Ok(Some(Self { kind: 0, step: 32, step_bytes: 1024, group_shift: 31, meta: None, f16_scales: false }))
            }
            Layout::Dense { .. } => Ok(None),
            Layout::Packed { scales, zeros, bits, group_cols, .. } => {
                let whole = |step: usize| {
                    let steps = group_cols / step;
                    let regular = *group_cols == cols || steps.is_power_of_two();
                    fits(step) && group_cols.is_multiple_of(step) && regular
                };
                let (kind, step, step_bytes) = match bits {
                    4 if whole(128) => (1, 128, 1024),
                    4 if whole(64) => (2, 64, 512),
                    8 if whole(64) => (3, 64, 1024),
                    _ => return Ok(None),
                };
                let shift = if *group_cols == cols { 31 } else { (group_cols / step).ilog2() as i32 };
                let meta = meta(d, scales, zeros, out, cols / group_cols)?;
                Ok(meta.map(|(meta, f16_scales)| Self {
                    kind,
                    step,
                    step_bytes,
                    group_shift: shift,
                    meta: Some(meta),
                    f16_scales,
                }))
            }
        }
    }

    /// Whether one launch can take both.
    fn goes_with(&self, other: &Self) -> bool {
        (self.kind, self.group_shift, self.f16_scales) == (other.kind, other.group_shift, other.f16_scales)
    }
}

/// The words of [`Narrow::meta`], and whether their scales are f16; `None` where neither bf16 nor f16 holds every scale.
fn meta(d: &Device, scales: &Memory, zeros: &Memory, out: usize, groups: usize) -> Result<Option<(Memory, bool)>> {
    let cells = product("scales", out, groups)?;
    floats("scales", scales, cells)?;
    holds("zero points", zeros, cells, 1)?;
    if cells == 0 {
        return Ok(None);
    }
    let words = product("scales", out.next_multiple_of(TILE), groups)?;
    let meta = d.alloc(product("scales", words, 4)?)?;
    for f16 in [false, true] {
        let inexact = d.alloc_zeroed(4)?;
        let args = [
            Arg::In(scales),
            Arg::In(zeros),
            Arg::Out(&meta),
            Arg::Out(&inexact),
            Arg::I32(size("weight rows", out)?),
            Arg::I32(size("groups", groups)?),
            Arg::I32(i32::from(f16)),
        ];
        d.launch("narrow_meta", flat(words, 1)?, &args)?;
        if d.read(&inexact, 0..4)? == [0; 4] {
            return Ok(Some((meta, f16)));
        }
    }
    Ok(None)
}

/// The kernel for a number of tokens: name, bf16 terms of x, warps, steps on the way for each warp.
struct Variant {
    name: &'static str,
    most_tokens: usize,
    terms: usize,
    warps: usize,
    ahead: usize,
}

const EXACT: [Variant; 3] = [
    Variant { name: "narrow_x1", most_tokens: 2, terms: 3, warps: 16, ahead: 4 },
    Variant { name: "narrow_x2", most_tokens: 5, terms: 3, warps: 16, ahead: 4 },
    Variant { name: "narrow_x3", most_tokens: 8, terms: 3, warps: 16, ahead: 4 },
];
const HALF: [Variant; 3] = [
    Variant { name: "narrow_h1", most_tokens: 8, terms: 1, warps: 16, ahead: 4 },
    Variant { name: "narrow_h2", most_tokens: 16, terms: 1, warps: 16, ahead: 4 },
    Variant { name: "narrow_h4", most_tokens: 32, terms: 1, warps: 16, ahead: 4 },
];

/// How a launch divides its work.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    blocks: usize,
    splits: usize,
    /// Tiles whose sums a block keeps at a time.
    round: usize,
    shared_bytes: usize,
}

impl Variant {
    fn of(tokens: usize, terms: u32) -> Option<&'static Self> {
        let list = if terms == 1 { &HALF } else { &EXACT };
        list.iter().find(|v| tokens <= v.most_tokens)
    }

    /// The fewest splits for which a block's share of x, its weights on the way and the sums of a tile or more fit in
    /// `limit` bytes of shared memory.
    fn plan(&self, n: &Narrow, cols: usize, tiles: usize, tokens: usize, sms: usize, limit: usize) -> Option<Plan> {
        let (steps, wide) = (cols / n.step, tokens * self.terms);
        let ring = self.warps * self.ahead * n.step_bytes;
        let tile_sums = TURNS * TILE * wide * 4;
        (1..=MOST_SPLITS.min(steps / TURNS)).find_map(|splits| {
            let fragments = steps.div_ceil(splits) * n.step * wide * 2;
            let room = limit.checked_sub(ring + fragments)? / tile_sums;
            let blocks = tiles.min((sms / splits).max(1));
            let mine = tiles.div_ceil(blocks);
            // A round that is not the last is whole turns of the block's warps.
            let side = self.warps / TURNS;
            let round = if room >= mine { mine } else { room / side * side };
            (round > 0).then_some(Plan { blocks, splits, round, shared_bytes: ring + fragments + round * tile_sums })
        })
    }
}

/// Whether [`linears`] has a kernel for these weights, which share x, and this many tokens.
pub fn takes(weights: &[&DeviceWeight], tokens: usize, terms: u32) -> bool {
    let Some(first) = weights.first() else { return false };
    let together = |w: &&DeviceWeight| {
        let same = |n: &Narrow| first.narrow.as_ref().is_some_and(|f| f.goes_with(n));
        w.in_features == first.in_features && w.narrow.as_ref().is_some_and(same)
    };
    (1..=MOST_WEIGHTS).contains(&weights.len()) && tokens > 0 && weights.iter().all(together) && {
        let plan = |v: &Variant| {
            let tiles = weights.iter().map(|w| w.out_features.div_ceil(TILE)).sum();
            let limit = MAX_SHARED_BYTES as usize;
            first.narrow.as_ref().and_then(|n| v.plan(n, first.in_features, tiles, tokens, 1, limit))
        };
        Variant::of(tokens, terms).and_then(plan).is_some()
    }
}

/// Counters of the blocks of a launch with splits, made once for a device: zero between launches, and used by one
/// launch at a time.
#[derive(Default)]
pub struct Counters(Mutex<Option<Memory>>);

/// One weight of a launch: bias `[out]` f32, y `[tokens, out]` f32.
pub struct Output<'a> {
    /// The matrix.
    pub weight: &'a DeviceWeight,
    /// Added to every row of y.
    pub bias: Option<&'a Memory>,
    /// Where the product goes.
    pub y: &'a Memory,
}

/// `y_j = x · W_jᵀ (+ bias_j)` for x f32 `[tokens, in]`; `terms` 3: accurate to f32, 1: x rounded to bf16. Only what
/// [`takes`] says yes to.
pub fn linears(
    d: &Device,
    counters: &Counters,
    x: &Memory,
    outputs: &[Output<'_>],
    tokens: usize,
    terms: u32,
) -> Result<()> {
    linears_within(d, counters, x, outputs, tokens, terms, MAX_SHARED_BYTES as usize)
}

fn linears_within(
    d: &Device,
    counters: &Counters,
    x: &Memory,
    outputs: &[Output<'_>],
    tokens: usize,
    terms: u32,
    limit: usize,
) -> Result<()> {
    let refuse = || KernelError::Unsupported {
        backend: d.name(),
        op: "narrow linear",
        why: format!("{} weights and {tokens} tokens", outputs.len()),
    };
    let weights: Vec<&DeviceWeight> = outputs.iter().map(|o| o.weight).collect();
    let (Some(first), true) = (weights.first(), takes(&weights, tokens, terms)) else { return Err(refuse()) };
    let (Some(narrow), Some(variant)) = (&first.narrow, Variant::of(tokens, terms)) else { return Err(refuse()) };
    let cols = first.in_features;
    floats("linear input", x, product("linear input", tokens, cols)?)?;
    let tiles: usize = weights.iter().map(|w| w.out_features.div_ceil(TILE)).sum();
    let sms = d.multiprocessors();
    let plan = variant.plan(narrow, cols, tiles, tokens, sms, limit).ok_or_else(refuse)?;

    let mut args = Vec::with_capacity(25);
    for o in outputs {
        floats("linear output", o.y, product("linear output", tokens, o.weight.out_features)?)?;
        o.bias.map_or(Ok(()), |b| floats("bias", b, o.weight.out_features))?;
        let raw = match &o.weight.layout {
            Layout::Dense { raw, .. } => raw,
            Layout::Packed { words, .. } => words,
        };
        let meta = o.weight.narrow.as_ref().and_then(|n| n.meta.as_ref());
        args.extend([Arg::In(raw), meta.map_or(Arg::Null, Arg::In), o.bias.map_or(Arg::Null, Arg::In), Arg::Out(o.y)]);
    }
    args.resize(4 * MOST_WEIGHTS, Arg::Null);
    for j in 0..MOST_WEIGHTS {
        args.push(Arg::I32(size("weight rows", outputs.get(j).map_or(0, |o| o.weight.out_features))?));
    }
    let partial = match plan.splits {
        1 => None,
        n => {
            let sums = product("partial sums", product("partial sums", n * tokens, tiles)?, TILE * 4)?;
            Some(d.alloc(sums)?)
        }
    };
    let mut held = counters.0.lock().unwrap_or_else(PoisonError::into_inner);
    let rounds = tiles.div_ceil(plan.blocks).div_ceil(plan.round);
    let needed = product("counters", product("counters", plan.blocks, rounds)?, 4)?;
    if partial.is_some() && held.as_ref().is_none_or(|m| m.bytes() < needed) {
        *held = Some(d.alloc_zeroed(needed.max(COUNTER_BYTES))?);
    }
    args.extend([
        Arg::In(x),
        partial.as_ref().map_or(Arg::Null, Arg::Out),
        held.as_ref().filter(|_| partial.is_some()).map_or(Arg::Null, Arg::Out),
        Arg::I32(size("tokens", tokens)?),
        Arg::I32(size("weight columns", cols)?),
        Arg::I32(narrow.kind),
        Arg::I32(narrow.group_shift),
        Arg::I32(i32::from(narrow.f16_scales)),
        Arg::I32(size("tiles", plan.round)?),
    ]);
    let grid = [size("grid", plan.blocks)? as u32, size("grid", plan.splits)? as u32, 1];
    let launch = Launch { grid, block: [variant.warps as u32 * 32, 1, 1], shared_bytes: plan.shared_bytes as u32 };
    d.launch_early(variant.name, launch, &args)
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::backend::{Bytes, HostWeight, PackedWeight};
    use crate::cuda::EmulatorOptions;
    use crate::cuda::rows::{bytes_of, floats_of, words_of};
    use crate::pack::pack_rows;
    use crate::scheme::{GroupSize, Scheme};

    struct Noise(u64);

    impl Noise {
        fn bits(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 32) as u32
        }
        fn many(&mut self, n: usize) -> Vec<f32> {
            (0..n).map(|_| self.bits() as f32 / 2f32.powi(31) - 1.0).collect()
        }
    }

    fn dense(noise: &mut Noise, out: usize, cols: usize) -> (HostWeight, Vec<f64>) {
        let values: Vec<bf16> = noise.many(out * cols).into_iter().map(bf16::from_f32).collect();
        let data = Bytes::from_vec(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        let exact = values.iter().map(|v| v.to_f64()).collect();
        (HostWeight::Dense { dtype: FloatType::Bf16, out_features: out, in_features: cols, data }, exact)
    }

    fn packed(noise: &mut Noise, scheme: Scheme, out: usize, cols: usize, f16_scales: bool) -> (HostWeight, Vec<f64>) {
        let (groups, per_group) = (scheme.groups(cols).unwrap(), scheme.group_cols(cols));
        let codes: Vec<u8> = (0..out * cols).map(|_| (noise.bits() >> 9) as u8 & scheme.max_code()).collect();
        let round = |v: f32| if f16_scales { f16::from_f32(v).to_f32() } else { bf16::from_f32(v).to_f32() };
        let scales: Vec<f32> = noise.many(out * groups).into_iter().map(|v| round(v / 8.0)).collect();
        let zeros: Option<Vec<u8>> = (!scheme.symmetric)
            .then(|| (0..out * groups).map(|_| (noise.bits() >> 11) as u8 & scheme.max_code()).collect());
        let exact = |i: usize| {
            let at = i / cols * groups + i % cols / per_group;
            let zero = zeros.as_ref().map_or(scheme.mid_code(), |z| z[at]);
            (f64::from(codes[i]) - f64::from(zero)) * f64::from(scales[at])
        };
        let exact = (0..out * cols).map(exact).collect();
        let words = Bytes::from_vec(bytes_of(&pack_rows(&codes, out, cols, scheme.bits).unwrap()));
        let (out_features, in_features) = (out, cols);
        let w = PackedWeight { scheme, out_features, in_features, words, scales, zeros, group_index: None };
        (HostWeight::Packed(w), exact)
    }

    /// Every kind, with symmetric and other zero points, both scale types, one group a row and several.
    fn weights(noise: &mut Noise, out: usize, cols: usize) -> Vec<(String, HostWeight, Vec<f64>)> {
        let (w, exact) = dense(noise, out, cols);
        let mut list = vec![("bf16".to_string(), w, exact)];
        for (bits, group) in [
            (4, GroupSize::Cols(128)),
            (4, GroupSize::Cols(64)),
            (4, GroupSize::PerChannel),
            (8, GroupSize::Cols(128)),
            (8, GroupSize::Cols(64)),
        ] {
            for (symmetric, f16_scales) in [(true, false), (false, true)] {
                let scheme = Scheme { bits, symmetric, group };
                let (w, exact) = packed(noise, scheme, out, cols, f16_scales);
                list.push((format!("{} f16={f16_scales}", scheme.full_name()), w, exact));
            }
        }
        list
    }

    struct Case<'a> {
        weight: &'a DeviceWeight,
        bias: Option<&'a [f32]>,
    }

    fn run(d: &Device, cases: &[Case<'_>], x: &[f32], tokens: usize, terms: u32, limit: usize) -> Vec<Vec<f32>> {
        let counters = Counters::default();
        let x = d.upload(&bytes_of(x)).unwrap();
        let upload = |c: &Case<'_>| c.bias.map(|b| d.upload(&bytes_of(b)).unwrap());
        let biases: Vec<_> = cases.iter().map(upload).collect();
        let ys: Vec<_> = cases.iter().map(|c| d.alloc(tokens * c.weight.out_features * 4).unwrap()).collect();
        let output = |i: usize| Output { weight: cases[i].weight, bias: biases[i].as_ref(), y: &ys[i] };
        let outputs: Vec<_> = (0..cases.len()).map(output).collect();
        // Twice: counters must be left as they were found.
        for _ in 0..2 {
            linears_within(d, &counters, &x, &outputs, tokens, terms, limit).unwrap();
        }
        ys.iter().map(|y| floats_of(&d.read(y, 0..y.bytes()).unwrap())).collect()
    }

    /// Fails where the error is beyond `eps · sqrt(k) · Σ|x w|`.
    fn check(what: &str, got: &[f32], x: &[f32], exact: &[f64], bias: &[f32], cols: usize) {
        let out = bias.len();
        for (i, g) in got.iter().enumerate() {
            let (t, o) = (i / out, i % out);
            let (mut sum, mut size) = (f64::from(bias[o]), f64::from(bias[o]).abs());
            for c in 0..cols {
                let p = f64::from(x[t * cols + c]) * exact[o * cols + c];
                sum += p;
                size += p.abs();
            }
            let bound = f64::from(f32::EPSILON) * (cols as f64).sqrt() * size;
            assert!((f64::from(*g) - sum).abs() <= bound, "{what} token {t} row {o}: {g} against {sum}");
        }
    }

    const ALL: usize = MAX_SHARED_BYTES as usize;

    #[test]
    fn exact_products_are_f32_sums_and_half_ones_those_of_rounded_x() {
        let (d, mut noise, cols) = (Device::emulated(2).unwrap(), Noise(1), 640);
        for out in [1, 23, 80] {
            for (name, w, exact) in weights(&mut noise, out, cols) {
                let w = DeviceWeight::upload(&d, &w).unwrap();
                assert!(w.narrow.is_some(), "{name}");
                let bias = noise.many(out);
                for (terms, tokens) in [(3, 1), (3, 2), (3, 4), (3, 8), (1, 1), (1, 7), (1, 16), (1, 29)] {
                    let x = noise.many(tokens * cols);
                    let read = |v: &f32| if terms == 1 { bf16::from_f32(*v).to_f32() } else { *v };
                    let rounded: Vec<f32> = x.iter().map(read).collect();
                    let got = run(&d, &[Case { weight: &w, bias: Some(&bias) }], &x, tokens, terms, ALL);
                    check(&format!("{name} {out} rows, {terms} terms"), &got[0], &rounded, &exact, &bias, cols);
                }
            }
        }
    }

    #[test]
    fn little_shared_memory_means_splits_and_rounds_of_the_same_product() {
        let (d, mut noise, cols, out) = (Device::emulated(2).unwrap(), Noise(2), 1536, 17 * TILE + 3);
        let (w, exact) =
            packed(&mut noise, Scheme { bits: 4, symmetric: true, group: GroupSize::Cols(64) }, out, cols, false);
        let w = DeviceWeight::upload(&d, &w).unwrap();
        let (narrow, tiles) = (w.narrow.as_ref().unwrap(), out.div_ceil(TILE));
        let mut seen = (false, false);
        for (terms, tokens) in [(3, 2), (1, 8), (1, 16)] {
            let (x, bias) = (noise.many(tokens * cols), noise.many(out));
            let rounded: Vec<f32> =
                x.iter().map(|v| if terms == 1 { bf16::from_f32(*v).to_f32() } else { *v }).collect();
            for limit in [ALL, 100 << 10, 76 << 10, 64 << 10] {
                let Some(plan) = Variant::of(tokens, terms).unwrap().plan(narrow, cols, tiles, tokens, 3, limit) else {
                    continue;
                };
                seen = (seen.0 || plan.splits > 1, seen.1 || plan.round < tiles.div_ceil(plan.blocks));
                assert!(plan.shared_bytes <= limit);
                let got = run(&d, &[Case { weight: &w, bias: Some(&bias) }], &x, tokens, terms, limit);
                check(&format!("{plan:?}"), &got[0], &rounded, &exact, &bias, cols);
            }
        }
        assert_eq!(seen, (true, true), "splits and rounds were both tried");
    }

    #[test]
    fn a_token_and_a_weight_compute_the_same_alone_and_in_company() {
        let (d, mut noise, cols) = (Device::emulated(2).unwrap(), Noise(3), 512);
        let scheme = Scheme { bits: 4, symmetric: false, group: GroupSize::Cols(128) };
        let made: Vec<_> = [40, 16, 9]
            .iter()
            .map(|out| DeviceWeight::upload(&d, &packed(&mut noise, scheme, *out, cols, false).0).unwrap())
            .collect();
        let bias = noise.many(16);
        let case = |i: usize| Case { weight: &made[i], bias: (i == 1).then_some(&bias[..]) };
        for (terms, most) in [(3, 2), (3, 8), (1, 8), (1, 32)] {
            let x = noise.many(most * cols);
            let all = run(&d, &[case(0), case(1), case(2)], &x, most, terms, ALL);
            for (i, together) in all.iter().enumerate() {
                let out = made[i].out_features;
                for t in [0, most - 1] {
                    let alone = run(&d, &[case(i)], &x[t * cols..][..cols], 1, terms, ALL);
                    assert_eq!(alone[0], together[t * out..][..out], "weight {i} token {t} of {most}, {terms} terms");
                }
            }
        }
    }

    #[test]
    fn no_race_and_nothing_out_of_bounds() {
        let options = EmulatorOptions { checked: true, seed: 5, ..EmulatorOptions::default() };
        let Ok(d) = Device::emulated_with(options) else { return }; // a compiler that cannot instrument
        let (mut noise, cols, out) = (Noise(4), 512, 37);
        for (name, w, exact) in weights(&mut noise, out, cols).into_iter().step_by(3) {
            let w = DeviceWeight::upload(&d, &w).unwrap();
            for (terms, tokens) in [(3, 2), (1, 9)] {
                let (x, bias) = (noise.many(tokens * cols), noise.many(out));
                let rounded: Vec<f32> =
                    x.iter().map(|v| if terms == 1 { bf16::from_f32(*v).to_f32() } else { *v }).collect();
                let got = run(&d, &[Case { weight: &w, bias: Some(&bias) }], &x, tokens, terms, ALL);
                check(&name, &got[0], &rounded, &exact, &bias, cols);
            }
        }
    }

    #[test]
    fn infinities_and_nans_reach_their_own_token_only() {
        let (d, mut noise, cols) = (Device::emulated(1).unwrap(), Noise(5), 512);
        for (name, w, _) in weights(&mut noise, 5, cols) {
            let w = DeviceWeight::upload(&d, &w).unwrap();
            for terms in [1, 3] {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut x = noise.many(2 * cols);
                    x[cols + 7] = bad;
                    let y = run(&d, &[Case { weight: &w, bias: None }], &x, 2, terms, ALL).remove(0);
                    assert!(
                        y[..5].iter().all(|v| v.is_finite()) && y[5..].iter().all(|v| !v.is_finite()),
                        "{name} {bad}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_the_kernels_cannot_read_is_left_to_others() {
        let (d, mut noise) = (Device::emulated(1).unwrap(), Noise(6));
        let mut narrow = |bits, group, cols| {
            let scheme = Scheme { bits, symmetric: true, group };
            let w = packed(&mut noise, scheme, 16, cols, false).0;
            DeviceWeight::upload(&d, &w).unwrap().narrow.is_some()
        };
        assert!(narrow(4, GroupSize::Cols(64), 256));
        assert!(!narrow(4, GroupSize::Cols(32), 256), "a group is less than a step");
        assert!(!narrow(4, GroupSize::Cols(64), 192), "fewer than four steps");
        assert!(!narrow(4, GroupSize::Cols(192), 768), "three steps a group");
        let scheme = Scheme { bits: 4, symmetric: true, group: GroupSize::Cols(64) };
        let (HostWeight::Packed(mut w), _) = packed(&mut noise, scheme, 16, 256, false) else { unreachable!() };
        w.scales[3] = 1.0 + f32::EPSILON;
        assert!(DeviceWeight::upload(&d, &HostWeight::Packed(w)).unwrap().narrow.is_none(), "a scale of 24 bits");
    }

    #[test]
    fn words_hold_scale_and_zero_point_in_tile_order() {
        let (d, mut noise) = (Device::emulated(1).unwrap(), Noise(7));
        let scheme = Scheme { bits: 8, symmetric: false, group: GroupSize::Cols(64) };
        let (HostWeight::Packed(p), _) = packed(&mut noise, scheme, 19, 256, false) else { unreachable!() };
        let w = DeviceWeight::upload(&d, &HostWeight::Packed(p.clone())).unwrap();
        let meta = w.narrow.as_ref().unwrap().meta.as_ref().unwrap();
        let words = words_of(&d.read(meta, 0..meta.bytes()).unwrap());
        let zeros = p.zeros.unwrap();
        for (row, group) in (0..19).flat_map(|r| (0..4).map(move |g| (r, g))) {
            let word = words[(row / TILE * 4 + group) * TILE + row % TILE];
            assert_eq!(f32::from_bits(word << 16), p.scales[row * 4 + group]);
            assert_eq!(word >> 16, u32::from(zeros[row * 4 + group]));
        }
    }
}
