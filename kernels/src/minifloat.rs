//! Floats of eight and four bits: E4M3 (the OCP format without infinities, `float8_e4m3fn`), E2M1, and E8M0, a bare exponent.
//!
//! Rounding is half to even; what is too large becomes the largest value. Codes are those of the files.

/// Largest E4M3 value.
pub const E4M3_MAX: f32 = 448.0;
/// Largest E2M1 value.
pub const E2M1_MAX: f32 = 6.0;
/// The E4M3 code that stands for "not a number", without its sign.
const E4M3_NAN: u8 = 0x7f;
/// Magnitudes of the E2M1 codes 0 to 7; bit 3 is the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
/// The bits of an f32's mantissa that E4M3 has no room for.
const DROPPED: u32 = 20;

/// Value of an E4M3 code: sign, four bits of exponent (bias 7), three of mantissa; `0x7f` and `0xff` are NaN.
pub const fn e4m3(code: u8) -> f32 {
    let magnitude = code & 0x7f;
    let value = if magnitude == E4M3_NAN {
        f32::NAN
    } else if magnitude < 8 {
        // Subnormal: units of 2^-9.
        magnitude as f32 / 512.0
    } else {
        f32::from_bits(((magnitude as u32) + ((127 - 7) << 3)) << DROPPED)
    };
    if code & 0x80 == 0 { value } else { -value }
}

/// [`e4m3`] of every code.
pub static E4M3: [f32; 256] = {
    let mut table = [0f32; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = e4m3(i as u8);
        i += 1;
    }
    table
};

/// The E4M3 code nearest to `x`; beyond ±448 the largest, NaN stays NaN.
pub fn to_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let a = x.abs();
    let magnitude = if a.is_nan() {
        E4M3_NAN
    } else if a >= E4M3_MAX {
        E4M3_NAN - 1
    } else if a < 1.0 / 64.0 {
        // Eight units are the smallest normal number, whose code is 8 as well.
        (a * 512.0).round_ties_even() as u8
    } else {
        let bits = a.to_bits();
        let even = (bits >> DROPPED) & 1;
        // A carry out of the mantissa raises the exponent, as it should.
        (((bits + (1 << (DROPPED - 1)) - 1 + even) >> DROPPED) - ((127 - 7) << 3)) as u8
    };
    sign | magnitude
}

/// `x` rounded to E4M3. NaN stays.
pub fn round_e4m3(x: f32) -> f32 {
    E4M3[to_e4m3(x) as usize]
}

/// Value of an E2M1 code, of which the four low bits count.
pub const fn e2m1(code: u8) -> f32 {
    let value = E2M1[(code & 7) as usize];
    if code & 8 == 0 { value } else { -value }
}

/// The E2M1 code nearest to `x`; beyond ±6 the largest. E2M1 has no NaN: it becomes 0, so check before.
pub fn to_e2m1(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 28) & 8) as u8;
    let a = x.abs();
    // A tie goes to the code whose mantissa is even: upwards where the bound is inside the next value's interval.
    let magnitude = u8::from(a > 0.25)
        + u8::from(a >= 0.75)
        + u8::from(a > 1.25)
        + u8::from(a >= 1.75)
        + u8::from(a > 2.5)
        + u8::from(a >= 3.5)
        + u8::from(a > 5.0);
    sign | magnitude
}

/// `x` rounded to E2M1. NaN stays.
pub fn round_e2m1(x: f32) -> f32 {
    if x.is_nan() { x } else { e2m1(to_e2m1(x)) }
}

/// Value of an E8M0 code, `2^(code − 127)`; 255 is NaN.
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// The E8M0 scale of a group of E2M1 values whose largest magnitude is `absmax` (finite): `2^(e − 2)`, e the exponent of `absmax` after a
/// mantissa of 1.75 and more has been rounded up to the next power of two. A group of zeros gets scale 1.
pub fn mx_scale(absmax: f32) -> u8 {
    if absmax == 0.0 {
        return 127;
    }
    // A quarter of the mantissa's range carries into the exponent from 1.75 on.
    let exponent = ((absmax.to_bits() + (1 << 21)) >> 23) as i32;
    (exponent - 2).clamp(0, 254) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: the nearest of all values, the even code on a tie.
    fn nearest(x: f32, codes: std::ops::Range<u8>, value: fn(u8) -> f32) -> u8 {
        let mut best = codes.start;
        for c in codes {
            let (d, b) = (f64::from(value(c)) - f64::from(x), f64::from(value(best)) - f64::from(x));
            if d.abs() < b.abs() || (d.abs() == b.abs() && c % 2 == 0) {
                best = c;
            }
        }
        best
    }

    #[test]
    fn every_code_comes_back() {
        for c in 0..=255u8 {
            let v = e4m3(c);
            assert_eq!(v.is_nan(), c & 0x7f == 0x7f);
            assert_eq!(to_e4m3(v) & 0x7f, c & 0x7f);
            if !v.is_nan() {
                assert_eq!(to_e4m3(v), c);
            }
        }
        assert_eq!((e4m3(0x7e), e4m3(0x08), e4m3(0x01), e4m3(0xb8)), (448.0, 1.0 / 64.0, 1.0 / 512.0, -1.0));
        for c in 0..16u8 {
            assert_eq!(to_e2m1(e2m1(c)), c);
        }
        assert_eq!((e8m0(127), e8m0(128), e8m0(1)), (1.0, 2.0, 2f32.powi(-126)));
        assert_eq!(e8m0(0), 2f32.powi(-127));
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn all_bfloat16_values_and_all_ties_round_as_the_definition_says() {
        let mut inputs: Vec<f32> =
            (0..=u16::MAX).map(|b| f32::from_bits(u32::from(b) << 16)).filter(|x| x.is_finite()).collect();
        for c in 0..126u8 {
            let tie = (e4m3(c) + e4m3(c + 1)) / 2.0;
            inputs.extend([tie, tie.next_up(), tie.next_down(), -tie]);
        }
        for c in 0..7u8 {
            let tie = (e2m1(c) + e2m1(c + 1)) / 2.0;
            inputs.extend([tie, tie.next_up(), tie.next_down(), -tie]);
        }
        for x in inputs {
            let sign = if x.is_sign_negative() { (0x80, 8) } else { (0, 0) };
            assert_eq!(to_e4m3(x), nearest(x.abs().min(448.0), 0..0x7f, e4m3) | sign.0, "{x}");
            assert_eq!(to_e2m1(x), nearest(x.abs().min(6.0), 0..8, e2m1) | sign.1, "{x}");
        }
    }

    #[test]
    fn what_has_no_value_is_said() {
        assert!(round_e4m3(f32::NAN).is_nan() && round_e2m1(f32::NAN).is_nan());
        assert_eq!((round_e4m3(f32::INFINITY), round_e4m3(-1e30)), (448.0, -448.0));
        assert_eq!((round_e2m1(f32::INFINITY), round_e2m1(-7.0)), (6.0, -6.0));
    }

    #[test]
    fn a_group_of_microscaled_values_fits_its_scale() {
        for (absmax, scale) in [(6.0, 1.0), (6.99, 1.0), (7.0, 2.0), (1.0, 0.25), (1.74, 0.25), (1.75, 0.5), (0.0, 1.0)]
        {
            assert_eq!(e8m0(mx_scale(absmax)), scale, "{absmax}");
        }
        // The smallest scale there is, and one too large for any.
        assert_eq!((mx_scale(f32::MIN_POSITIVE), mx_scale(f32::MAX)), (0, 253));
    }
}
