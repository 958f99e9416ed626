//! Launches of `linear_w8a8.cu`: products of activations and weights that are both eight-bit codes ([`crate::w8a8`]).
//!
//! Integers give the definition's bits, whatever the number of tokens. Of E4M3 a token's result does not depend on the tokens beside it
//! either, but up to [`FEW`] tokens and more go through different kernels, which agree to rounding.

use super::device::{Arg, Device, Launch, Memory};
use super::ops_elementwise::{floats, per_row, product};
use super::ops_narrow::Output;
use super::rows::{bytes_of, size};
use super::weights::{DeviceWeight, Layout};
use crate::activation::{InputCode, InputRule, InputScale};
use crate::error::{KernelError, Result};
use crate::floats::FloatWeight;
use crate::w8a8::{MOST_COLUMNS, input_code, row_scales};

/// Rows of bytes start at multiples of it.
const COLUMNS: usize = 16;
/// Most tokens of the kernels that read a weight once.
const FEW: usize = 32;
/// Threads of a block, in all of them.
const THREADS: u32 = 128;
/// Rows of a weight in a block: of few tokens, of many.
const ROWS: [usize; 2] = [16, 128];
/// Tokens of a block of many, and the bytes of its four stages of 64 columns.
const MANY: usize = 64;
const STAGES_BYTES: usize = 4 * (MANY + ROWS[1]) * 64;

/// An E4M3 weight as tensor cores read it, beside its dense form.
pub struct Fp8Codes {
    /// `[out, in]`, a byte each.
    codes: Memory,
    /// `[out]` f32.
    scales: Memory,
}

impl Fp8Codes {
    /// `None` where the device has no products of E4M3, a row has several scales, or the width is not a multiple of 16.
    pub fn of(d: &Device, w: &FloatWeight) -> Result<Option<Self>> {
        if !d.has_fp8_products() || !w.in_features.is_multiple_of(COLUMNS) {
            return Ok(None);
        }
        let Some(scales) = row_scales(w) else { return Ok(None) };
        Ok(Some(Self { codes: d.upload(w.codes.as_slice())?, scales: d.upload(&bytes_of(&scales))? }))
    }
}

/// A weight's arguments.
struct Codes<'a> {
    codes: &'a Memory,
    scales: &'a Memory,
    zeros: Option<&'a Memory>,
}

fn codes(w: &DeviceWeight, code: InputCode) -> Option<Codes<'_>> {
    let cols = w.in_features;
    match (code, &w.layout) {
        (InputCode::Int8, Layout::Packed { words, scales, zeros, bits: 8, group_cols })
            if *group_cols == cols && cols.is_multiple_of(COLUMNS) && (1..=MOST_COLUMNS).contains(&cols) =>
        {
            Some(Codes { codes: words, scales, zeros: Some(zeros) })
        }
        (InputCode::Fp8, _) => w.fp8.as_ref().map(|f| Codes { codes: &f.codes, scales: &f.scales, zeros: None }),
        _ => None,
    }
}

/// Whether [`linears`] has a kernel for these weights, which share x, and x rounded so.
pub fn takes(weights: &[&DeviceWeight], rule: &InputRule) -> bool {
    let (Some(code), Some(first)) = (input_code(rule), weights.first()) else { return false };
    weights.iter().all(|w| w.in_features == first.in_features && codes(w, code).is_some())
}

/// `y_j = x · W_jᵀ (+ bias_j)` for x f32 `[tokens, in]`, rounded to codes by `rule` once for all of the weights. Only what [`takes`] says
/// yes to.
pub fn linears(d: &Device, x: &Memory, rule: &InputRule, outputs: &[Output<'_>], tokens: usize) -> Result<()> {
    let refuse = || KernelError::Unsupported {
        backend: d.name(),
        op: "rounded_linears",
        why: format!("{} weights and inputs {rule:?}", outputs.len()),
    };
    let weights: Vec<&DeviceWeight> = outputs.iter().map(|o| o.weight).collect();
    let (Some(first), Some(code), true) = (weights.first(), input_code(rule), takes(&weights, rule)) else {
        return Err(refuse());
    };
    let cols = first.in_features;
    let cells = product("linear input", tokens, cols)?;
    floats("linear input", x, cells)?;
    rule.span(cols)?;
    if tokens == 0 {
        return Ok(());
    }
    // A stored scale is never 0, which `span` saw to.
    let stored = match &rule.scale {
        InputScale::Stored(scales) => scales.first().copied().unwrap_or(0.0),
        _ => 0.0,
    };
    let int8 = code == InputCode::Int8;
    let (q, x_scales) = (d.alloc(cells)?, d.alloc(product("scales", tokens, 4)?)?);
    let sums = if int8 { Some(d.alloc(product("sums", tokens, 4)?)?) } else { None };
    let args = [
        Arg::In(x),
        Arg::Out(&q),
        Arg::Out(&x_scales),
        sums.as_ref().map_or(Arg::Null, Arg::Out),
        Arg::I32(size("columns", cols)?),
        Arg::I32(i32::from(!int8)),
        Arg::F32(stored),
    ];
    d.launch("input_codes", per_row(tokens, cols / 4, 0)?, &args)?;
    for o in outputs {
        let (out, w) = (o.weight.out_features, codes(o.weight, code).ok_or_else(refuse)?);
        floats("linear output", o.y, product("linear output", tokens, out)?)?;
        o.bias.map_or(Ok(()), |b| floats("bias", b, out))?;
        if out == 0 {
            continue;
        }
        let args = [
            Arg::In(w.codes),
            Arg::In(w.scales),
            w.zeros.map_or(Arg::Null, Arg::In),
            Arg::In(&q),
            Arg::In(&x_scales),
            sums.as_ref().map_or(Arg::Null, Arg::In),
            o.bias.map_or(Arg::Null, Arg::In),
            Arg::Out(o.y),
            Arg::I32(size("tokens", tokens)?),
            Arg::I32(size("weight rows", out)?),
            Arg::I32(size("weight columns", cols)?),
        ];
        let (kernel, launch) = kernel(int8, tokens, out)?;
        d.launch(kernel, launch, &args)?;
    }
    Ok(())
}

fn kernel(int8: bool, tokens: usize, out: usize) -> Result<(&'static str, Launch)> {
    let (name, rows, of_block, bytes) = match (tokens, int8) {
        (0..=8, true) => ("w8a8_few_1", ROWS[0], 8, 0),
        (0..=8, false) => ("fp8_few_1", ROWS[0], 8, 0),
        (9..=16, true) => ("w8a8_few_2", ROWS[0], 16, 0),
        (9..=16, false) => ("fp8_few_2", ROWS[0], 16, 0),
        (17..=FEW, true) => ("w8a8_few_4", ROWS[0], 32, 0),
        (17..=FEW, false) => ("fp8_few_4", ROWS[0], 32, 0),
        (_, true) => ("w8a8_many", ROWS[1], MANY, STAGES_BYTES),
        (_, false) => ("fp8_many", ROWS[1], MANY, STAGES_BYTES),
    };
    let blocks = |n: usize, by: usize| u32::try_from(n.div_ceil(by)).map_err(|_| KernelError::Overflow("grid"));
    let grid = [blocks(out, rows)?, blocks(tokens, of_block)?, 1];
    Ok((name, Launch { grid, block: [THREADS, 1, 1], shared_bytes: bytes as u32 }))
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::*;
    use crate::backend::{Bytes, HostWeight, PackedWeight};
    use crate::floats::{FloatCode, FloatScales};
    use crate::scheme::{GroupSize, Scheme};

    fn int8(d: &Device, group: GroupSize, cols: usize) -> DeviceWeight {
        let scheme = Scheme { bits: 8, symmetric: true, group };
        let words = Bytes::from_vec(vec![129; 3 * cols]);
        let scales = vec![1.0; 3 * scheme.groups(cols).unwrap()];
        let (out_features, in_features, zeros, group_index) = (3, cols, None, None);
        let p = PackedWeight { scheme, out_features, in_features, words, scales, zeros, group_index };
        DeviceWeight::upload(d, &HostWeight::Packed(p)).unwrap()
    }

    fn fp8(d: &Device, block: usize, cols: usize) -> DeviceWeight {
        let scales = FloatScales::Blocks { values: vec![1.0; cols.div_ceil(block)], rows: 3, cols: block };
        let codes = Bytes::from_vec(vec![0x38; 3 * cols]);
        let (code, out_features, in_features) = (FloatCode::E4m3, 3, cols);
        let f = FloatWeight { code, out_features, in_features, codes, scales };
        DeviceWeight::upload(d, &HostWeight::Float(f)).unwrap()
    }

    #[test]
    fn what_has_eight_bits_and_one_scale_is_taken() {
        let d = Device::emulated(1).unwrap();
        let rule = |code| InputRule { code, scale: InputScale::Token };
        let (int, float) = (rule(InputCode::Int8), rule(InputCode::Fp8));
        let channel = int8(&d, GroupSize::PerChannel, 64);
        assert!(takes(&[&channel, &channel], &int) && !takes(&[&channel], &float) && !takes(&[], &int));
        assert!(!takes(&[&channel, &int8(&d, GroupSize::PerChannel, 32)], &int));
        assert!(!takes(&[&int8(&d, GroupSize::Cols(32), 64)], &int));
        assert!(takes(&[&fp8(&d, 64, 64)], &float) && !takes(&[&fp8(&d, 64, 64)], &int));
        assert!(!takes(&[&fp8(&d, 32, 64)], &float) && !takes(&[&fp8(&d, 40, 40)], &float));
        let groups = InputRule { code: InputCode::Fp8, scale: InputScale::Group(32) };
        assert!(!takes(&[&fp8(&d, 64, 64)], &groups));
    }

    #[test]
    fn wrong_sizes_and_other_weights_are_refused() {
        let d = Device::emulated(1).unwrap();
        let rule = InputRule { code: InputCode::Int8, scale: InputScale::Token };
        let memory = |n: usize| d.alloc(n * 4).unwrap();
        let w = int8(&d, GroupSize::PerChannel, 64);
        let refuse = |w: &DeviceWeight, x: usize, y: usize, bias: usize| {
            let (x, y, bias) = (memory(x), memory(y), memory(bias));
            linears(&d, &x, &rule, &[Output { weight: w, bias: Some(&bias), y: &y }], 2).unwrap_err().to_string()
        };
        assert!(refuse(&w, 127, 6, 3).contains("linear input"));
        assert!(refuse(&w, 128, 5, 3).contains("linear output"));
        assert!(refuse(&w, 128, 6, 2).contains("bias"));
        let grouped = int8(&d, GroupSize::Cols(32), 64);
        assert!(refuse(&grouped, 128, 6, 3).contains("rounded_linears"));
    }
}
