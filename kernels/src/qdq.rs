//! The rounding rule, in one place: `code = clamp(round_half_even(w / scale) + zero, 0, 2^b − 1)`.

use half::{bf16, f16};

/// The dtype scales are stored in; solvers compute their error against the rounded value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleType {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// No rounding.
    F32,
}

impl ScaleType {
    /// Rounds to this dtype (half to even) and back.
    pub fn round(self, x: f32) -> f32 {
        match self {
            ScaleType::Bf16 => bf16::from_f32(x).to_f32(),
            ScaleType::F16 => f16::from_f32(x).to_f32(),
            ScaleType::F32 => x,
        }
    }
}

/// Code of `w`. `scale` may be negative; a zero or non-finite quotient gives `zero`.
#[inline]
pub fn quantize(w: f32, scale: f32, zero: u8, max_code: u8) -> u8 {
    let q = (w / scale).round_ties_even();
    if q.is_nan() {
        return zero;
    }
    (q + f32::from(zero)).clamp(0.0, f32::from(max_code)) as u8
}

/// Value of a code: `scale · (code − zero)`.
#[inline]
pub fn dequantize(code: u8, scale: f32, zero: u8) -> f32 {
    (i32::from(code) - i32::from(zero)) as f32 * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_even_and_ends_clamp() {
        assert_eq!(quantize(0.5, 1.0, 8, 15), 8);
        assert_eq!(quantize(1.5, 1.0, 8, 15), 10);
        assert_eq!(quantize(-100.0, 1.0, 8, 15), 0);
        assert_eq!(quantize(100.0, 1.0, 8, 15), 15);
        assert_eq!(quantize(8.0, -1.0, 8, 15), 0);
        assert_eq!(quantize(0.0, 0.0, 8, 15), 8);
    }
}
