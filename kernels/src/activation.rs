//! Quantized activations: a linear's input is rounded to few bits and widened again before the product, as compressed-tensors does it.
//!
//! For each span of a row that shares a scale: `scale · round(clamp(x / scale))`, with `scale = largest |x| / half range`, the half range
//! 127.5 for int8 (codes −128 to 127), 448 for E4M3 and 6 for E2M1. A span of zeros has the scale [`f32::EPSILON`]. NaN stays NaN.

use crate::error::{KernelError, Result};
use crate::minifloat::{E2M1_MAX, E4M3_MAX, round_e2m1, round_e4m3, to_e4m3};

/// What values are rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputCode {
    /// Integers from −128 to 127.
    Int8,
    /// E4M3.
    Fp8,
    /// E2M1.
    Fp4,
}

/// Where scales come from.
#[derive(Clone, Debug, PartialEq)]
pub enum InputScale {
    /// Each row's largest magnitude.
    Token,
    /// The largest magnitude of each this many columns of a row.
    Group(usize),
    /// Stored: one for each of equal parts of a row (one for a whole tensor, several for heads).
    Stored(Vec<f32>),
    /// Each sixteen columns' largest magnitude, times `global` rounded to E4M3, over `global` (NVFP4).
    Local {
        /// Stored global scale.
        global: f32,
    },
}

/// How a linear's input is rounded.
#[derive(Clone, Debug, PartialEq)]
pub struct InputRule {
    /// What values become.
    pub code: InputCode,
    /// Their scales.
    pub scale: InputScale,
}

impl InputCode {
    /// Largest magnitude over its scale.
    pub fn half_range(self) -> f32 {
        match self {
            InputCode::Int8 => 127.5,
            InputCode::Fp8 => E4M3_MAX,
            InputCode::Fp4 => E2M1_MAX,
        }
    }

    fn round(self, x: f32) -> f32 {
        match self {
            InputCode::Int8 => x.clamp(-128.0, 127.0).round_ties_even(),
            InputCode::Fp8 => round_e4m3(x),
            InputCode::Fp4 => round_e2m1(x),
        }
    }
}

impl InputRule {
    /// Columns that share a scale in rows of `width`.
    pub(crate) fn span(&self, width: usize) -> Result<usize> {
        let divided = |by: usize| {
            if by == 0 || !width.is_multiple_of(by) {
                return Err(KernelError::NotDivisible { what: "width of quantized activations", value: width, by });
            }
            Ok(width / by)
        };
        match &self.scale {
            InputScale::Token => Ok(width),
            InputScale::Group(n) => divided(*n).map(|_| *n),
            InputScale::Local { .. } => divided(crate::floats::NVFP4_GROUP).map(|_| crate::floats::NVFP4_GROUP),
            InputScale::Stored(scales) => {
                if let Some(i) = scales.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
                    return Err(KernelError::BadScale { row: 0, group: i, value: scales[i] });
                }
                divided(scales.len())
            }
        }
    }

    /// Scale of the `i`-th span of a row.
    fn scale(&self, i: usize, values: &[f32]) -> f32 {
        let never_zero = |s: f32, least: f32| if s == 0.0 { least } else { s };
        match &self.scale {
            InputScale::Stored(scales) => scales[i],
            InputScale::Local { global } => {
                let local = round_e4m3(global * (largest(values) / self.code.half_range()));
                never_zero(local, 0.125) / global
            }
            InputScale::Token | InputScale::Group(_) => {
                never_zero(largest(values) / self.code.half_range(), f32::EPSILON)
            }
        }
    }

    /// What [`Self::apply`] multiplies by its scale again, where it is one byte and a row has one scale ([`crate::w8a8::input_code`]):
    /// codes `[rows, width]`, int8 or E4M3, and scales `[rows]`. A row with a NaN, or with an infinity and a scale of its own, has the
    /// scale NaN and codes 0.
    pub fn codes(&self, x: &[f32], width: usize) -> Result<(Vec<u8>, Vec<f32>)> {
        let span = self.span(width)?;
        if crate::w8a8::input_code(self).is_none() || span == 0 {
            let why = format!("codes of {self:?} in rows of {width}");
            return Err(KernelError::Unsupported { backend: "scalar", op: "rounded_linears", why });
        }
        let own = self.scale == InputScale::Token;
        let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::with_capacity(x.len() / span));
        for values in x.chunks_exact(span) {
            let most = largest(values);
            let bad = most.is_nan() || (own && most.is_infinite());
            let scale = if bad { f32::NAN } else { self.scale(0, values) };
            codes.extend(values.iter().map(|v| match self.code {
                _ if bad => 0,
                InputCode::Int8 => self.code.round(v / scale) as i8 as u8,
                _ => to_e4m3(v / scale),
            }));
            scales.push(scale);
        }
        Ok((codes, scales))
    }

    /// Rounds rows of `width` in place. Rows do not see each other.
    pub fn apply(&self, x: &mut [f32], width: usize) -> Result<()> {
        let span = self.span(width)?;
        if span == 0 {
            return Ok(());
        }
        let per_row = width / span;
        for (i, values) in x.chunks_exact_mut(span).enumerate() {
            let scale = self.scale(i % per_row, values);
            for v in values {
                *v = self.code.round(*v / scale) * scale;
            }
        }
        Ok(())
    }
}

/// Largest magnitude; NaN if there is one.
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |m, v| if v.is_nan() || m.is_nan() { f32::NAN } else { m.max(v.abs()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(code: InputCode, scale: InputScale, x: &[f32], width: usize) -> Vec<f32> {
        let mut x = x.to_vec();
        InputRule { code, scale }.apply(&mut x, width).unwrap();
        x
    }

    #[test]
    fn hand_worked_rows() {
        // Scale 1 (127.5 / 127.5): the extreme positive value clips to 127, ties go to even.
        let x = [127.5, -127.5, 0.5, 1.5, 0.0, 0.0, 0.0, 0.0];
        let y = rounded(InputCode::Int8, InputScale::Token, &x, 4);
        assert_eq!(y, [127.0, -128.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
        let y = rounded(InputCode::Fp8, InputScale::Token, &[448.0, 17.0, 19.0, -1.06], 4);
        assert_eq!(y, [448.0, 16.0, 20.0, -1.0]);
        let y = rounded(InputCode::Fp8, InputScale::Group(2), &[448.0, 17.0, 4.48, 0.17], 4);
        assert_eq!(y[..2], [448.0, 16.0]);
        assert!((y[2] - 4.48).abs() < 1e-6 && (y[3] - 0.16).abs() < 1e-6, "{y:?}");
        let y = rounded(InputCode::Int8, InputScale::Stored(vec![1.0, 0.5]), &[1.4, 200.0, 1.4, -100.0], 4);
        assert_eq!(y, [1.0, 127.0, 1.5, -64.0]);
    }

    #[test]
    fn local_scales_are_rounded_to_eight_bits() {
        let mut x = vec![0.0f32; 32];
        x[0] = 6.0;
        x[1] = 2.4;
        // global 1: the local scale of the first group is 1, that of the second, all zeros, 0.125.
        let y = rounded(InputCode::Fp4, InputScale::Local { global: 1.0 }, &x, 32);
        assert_eq!(y[..3], [6.0, 2.0, 0.0]);
        // 6.3 / 6 = 1.05 rounds to 1.0 in E4M3 (steps of 1/8): 6.3 then clips to 6.
        x[0] = 6.3;
        assert_eq!(rounded(InputCode::Fp4, InputScale::Local { global: 1.0 }, &x, 32)[0], 6.0);
        // A global scale of 16 shifts which scales there are: 16.8 rounds to 16, the same step.
        assert_eq!(rounded(InputCode::Fp4, InputScale::Local { global: 16.0 }, &x, 32)[0], 6.0);
    }

    #[test]
    fn nan_stays_visible_and_widths_are_checked() {
        for code in [InputCode::Int8, InputCode::Fp8, InputCode::Fp4] {
            assert!(rounded(code, InputScale::Token, &[1.0, f32::NAN], 2).iter().all(|v| v.is_nan()));
            assert!(rounded(code, InputScale::Stored(vec![1.0]), &[1.0, f32::NAN], 2)[1].is_nan());
        }
        let mut x = [0.0; 6];
        let refuse = |scale| InputRule { code: InputCode::Fp8, scale }.apply(&mut x.clone(), 6).is_err();
        assert!(refuse(InputScale::Group(4)) && refuse(InputScale::Stored(vec![1.0; 4])));
        assert!(refuse(InputScale::Stored(vec![0.0])) && refuse(InputScale::Local { global: 1.0 }));
        assert!(InputRule { code: InputCode::Fp8, scale: InputScale::Group(3) }.apply(&mut x, 6).is_ok());
    }
}
