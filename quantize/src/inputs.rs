//! Stored scales of quantized inputs, keys and values, from the largest magnitudes that calibration saw.

use lowbit_kernels::activation::{InputCode, InputRule, InputScale};
use lowbit_kernels::{InputFormat, ScaleType};

use crate::factor::SolveError;
use crate::floats::global_scale;
use crate::scale_search::usable;

/// `largest / half_range`, rounded to the dtype it is stored in; 1 for what was never anything but zero.
pub fn scale_of(largest: f32, half_range: f32, scale_type: ScaleType) -> Result<f32, SolveError> {
    let scale = scale_type.round(largest / half_range);
    if !scale.is_finite() {
        return Err(SolveError::NonFinite { what: "activation", index: 0 });
    }
    Ok(if usable(scale) { scale } else { 1.0 })
}

/// How an input of which `largest` is the largest magnitude is to be rounded.
pub fn input_rule(format: InputFormat, largest: f32, scale_type: ScaleType) -> Result<InputRule, SolveError> {
    let stored = |code: InputCode| -> Result<InputRule, SolveError> {
        let scale = scale_of(largest, code.half_range(), scale_type)?;
        Ok(InputRule { code, scale: InputScale::Stored(vec![scale]) })
    };
    let own = |code, scale| Ok(InputRule { code, scale });
    match format {
        InputFormat::Int8Token => own(InputCode::Int8, InputScale::Token),
        InputFormat::Int8Static => stored(InputCode::Int8),
        InputFormat::Fp8Token => own(InputCode::Fp8, InputScale::Token),
        InputFormat::Fp8Static => stored(InputCode::Fp8),
        InputFormat::Fp8Group(n) => own(InputCode::Fp8, InputScale::Group(n)),
        InputFormat::Nvfp4 if !largest.is_finite() => Err(SolveError::NonFinite { what: "activation", index: 0 }),
        InputFormat::Nvfp4 => own(InputCode::Fp4, InputScale::Local { global: global_scale(largest) }),
    }
}

/// The scale that a rule stores, for the record.
pub fn stored_scale(rule: Option<&InputRule>) -> Option<f32> {
    match rule.map(|r| &r.scale) {
        Some(InputScale::Stored(scales)) => scales.first().copied(),
        Some(InputScale::Local { global }) => Some(*global),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_scales_map_the_largest_magnitude_to_the_end_of_the_range() {
        let rule = |format, largest| input_rule(format, largest, ScaleType::Bf16);
        let stored = |format, largest| stored_scale(rule(format, largest).ok().as_ref());
        assert_eq!(stored(InputFormat::Fp8Static, 896.0), Some(2.0));
        assert_eq!(stored(InputFormat::Int8Static, 127.5), Some(1.0));
        assert_eq!(stored(InputFormat::Nvfp4, 2688.0), Some(1.0));
        assert_eq!(stored(InputFormat::Fp8Static, 0.0), Some(1.0));
        assert_eq!(stored(InputFormat::Fp8Token, 5.0), None);
        assert!(
            rule(InputFormat::Fp8Static, f32::INFINITY).is_err() && rule(InputFormat::Nvfp4, f32::INFINITY).is_err()
        );
    }
}
