//! Launcher of `input.cu`.

use super::device::{Arg, Device, Memory};
use super::ops_elementwise::{floats, per_row, product};
use super::rows::{bytes_of, size};
use crate::activation::{InputCode, InputRule, InputScale};
use crate::error::Result;

/// Rows of x `[rows, width]` f32 rounded into y, as [`InputRule::apply`] does it: the same bits.
pub fn round_input(d: &Device, x: &Memory, y: &Memory, rows: usize, width: usize, rule: &InputRule) -> Result<()> {
    let len = product("quantized input", rows, width)?;
    floats("quantized input", x, len)?;
    floats("rounded input", y, len)?;
    let span = rule.span(width)?;
    if span == 0 || rows == 0 {
        return Ok(());
    }
    let code = match rule.code {
        InputCode::Int8 => 0,
        InputCode::Fp8 => 1,
        InputCode::Fp4 => 2,
    };
    let (kind, stored, global) = match &rule.scale {
        InputScale::Token | InputScale::Group(_) => (0, None, 1.0),
        InputScale::Stored(scales) => (1, Some(d.upload(&bytes_of(scales))?), 1.0),
        InputScale::Local { global } => (2, None, *global),
    };
    let args = [
        Arg::In(x),
        stored.as_ref().map_or(Arg::Null, Arg::In),
        Arg::Out(y),
        Arg::I32(size("span", span)?),
        Arg::I32(size("parts", width / span)?),
        Arg::I32(code),
        Arg::I32(kind),
        Arg::F32(global),
    ];
    d.launch("round_input", per_row(product("spans", rows, width / span)?, span, 0)?, &args)
}
