//! Products of eight-bit codes on both sides: W8A8 (integers) and FP8 (E4M3), where a token of x and a row of W have one scale each.
//!
//! `y[t][o] = f32(Σᵢ q[t][i] · (c[o][i] − z[o])) · (s_x[t] · s_w[o]) (+ bias[o])`: q and s_x are those of [`crate::activation`], c, z and
//! s_w the weight's. The sum is exact for integers (then rounded to f32 once, half to even); of E4M3 it is f32's or better. The scales'
//! product is rounded, then its product with the sum, then the sum with the bias. Here is the definition, which `linear_w8a8.cu` computes
//! on tensor cores and the scalar backend as below; the CPU backend multiplies rounded values in f32, equal to rounding.

use crate::activation::{InputCode, InputRule, InputScale};
use crate::backend::HostWeight;
use crate::error::{KernelError, Result, check_len};
use crate::floats::{FloatCode, FloatScales, FloatWeight};
use crate::minifloat::E4M3;
use crate::pack::unpack_rows;

/// Most columns of an integer product: `2^16 · 128 · 255` fits an i32.
pub const MOST_COLUMNS: usize = 1 << 16;

/// What a rule makes of activations, where it is eight bits with one scale a token.
pub fn input_code(rule: &InputRule) -> Option<InputCode> {
    let one = match &rule.scale {
        InputScale::Token => true,
        InputScale::Stored(scales) => scales.len() == 1,
        InputScale::Group(_) | InputScale::Local { .. } => false,
    };
    (one && matches!(rule.code, InputCode::Int8 | InputCode::Fp8)).then_some(rule.code)
}

/// A scale for each row of an E4M3 weight; `None` where a row has several, or another code.
pub fn row_scales(w: &FloatWeight) -> Option<Vec<f32>> {
    let whole = matches!(w.scales, FloatScales::Blocks { cols, .. } if cols >= w.in_features);
    let fits = whole && w.code == FloatCode::E4m3 && w.in_features > 0;
    fits.then(|| (0..w.out_features).map(|row| w.scale(row, 0)).collect())
}

/// A weight of eight-bit codes with one scale a row.
pub struct RowCodes {
    code: InputCode,
    out_features: usize,
    in_features: usize,
    /// `[out, in]`.
    codes: Vec<u8>,
    /// `[out]`; of integers.
    zeros: Vec<u8>,
    /// `[out]`.
    scales: Vec<f32>,
}

impl RowCodes {
    /// `None` where the weight has other codes or other scales. Lengths of float codes were checked.
    pub fn of(w: &HostWeight) -> Result<Option<Self>> {
        let (out_features, in_features) = w.dims();
        Ok(match w {
            HostWeight::Packed(p)
                if p.scheme.bits == 8
                    && p.group_index.is_none()
                    && p.scheme.group_cols(in_features) == in_features
                    && (1..=MOST_COLUMNS).contains(&in_features) =>
            {
                let words: Vec<u32> =
                    p.words.as_slice().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
                let codes = unpack_rows(&words, out_features, in_features, 8)?;
                let zeros = p.zeros.clone().unwrap_or_else(|| vec![p.scheme.mid_code(); out_features]);
                check_len("scales", out_features, p.scales.len())?;
                check_len("zero points", out_features, zeros.len())?;
                let scales = p.scales.clone();
                Some(Self { code: InputCode::Int8, out_features, in_features, codes, zeros, scales })
            }
            HostWeight::Float(f) => row_scales(f).map(|scales| {
                let codes = f.codes.as_slice().to_vec();
                Self { code: InputCode::Fp8, out_features, in_features, codes, zeros: Vec::new(), scales }
            }),
            _ => None,
        })
    }

    /// What its codes are, and those of activations must be.
    pub fn code(&self) -> InputCode {
        self.code
    }

    /// The definition: x `[tokens, in]`, y `[tokens, out]`, bias `[out]`; sums of E4M3 in f64.
    pub fn linear(&self, x: &[f32], rule: &InputRule, bias: Option<&[f32]>) -> Result<Vec<f32>> {
        if input_code(rule) != Some(self.code) {
            let why = format!("inputs {rule:?} of a weight of {:?} codes", self.code);
            return Err(KernelError::Unsupported { backend: "scalar", op: "rounded_linears", why });
        }
        let n = self.in_features;
        let (q, scales) = rule.codes(x, n)?;
        let mut y = Vec::with_capacity(scales.len() * self.out_features);
        for (q, x_scale) in q.chunks_exact(n).zip(&scales) {
            for (o, w) in self.codes.chunks_exact(n).enumerate() {
                let sum = match self.code {
                    InputCode::Int8 => {
                        let zero = i32::from(self.zeros[o]);
                        let terms = q.iter().zip(w).map(|(q, w)| i32::from(*q as i8) * (i32::from(*w) - zero));
                        terms.sum::<i32>() as f32
                    }
                    _ => {
                        let value = |code: u8| f64::from(E4M3[usize::from(code)]);
                        q.iter().zip(w).map(|(q, w)| value(*q) * value(*w)).sum::<f64>() as f32
                    }
                };
                let v = sum * (x_scale * self.scales[o]);
                y.push(bias.map_or(v, |b| v + b[o]));
            }
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Bytes, PackedWeight};
    use crate::minifloat::to_e4m3;
    use crate::scheme::{GroupSize, Scheme};

    fn int8(codes: &[u8], scales: &[f32], zeros: Option<&[u8]>) -> HostWeight {
        let (out_features, in_features) = (scales.len(), codes.len() / scales.len());
        let scheme = Scheme { bits: 8, symmetric: zeros.is_none(), group: GroupSize::PerChannel };
        let words = crate::pack::pack_rows(codes, out_features, in_features, 8).unwrap();
        let words = Bytes::from_vec(words.iter().flat_map(|w| w.to_le_bytes()).collect());
        let (scales, zeros) = (scales.to_vec(), zeros.map(<[u8]>::to_vec));
        let group_index = None;
        HostWeight::Packed(PackedWeight { scheme, out_features, in_features, words, scales, zeros, group_index })
    }

    fn fp8(values: &[f32], scales: FloatScales, out_features: usize) -> HostWeight {
        let codes = Bytes::from_vec(values.iter().map(|v| to_e4m3(*v)).collect());
        let in_features = values.len() / out_features;
        HostWeight::Float(FloatWeight { code: FloatCode::E4m3, out_features, in_features, codes, scales })
    }

    #[test]
    fn hand_worked_products() {
        // Largest magnitude 127.5: scale 1, codes 127 (clipped), −2, 0 (a tie), 4.
        let x = [127.5, -2.0, 0.5, 4.0];
        let rule = InputRule { code: InputCode::Int8, scale: InputScale::Token };
        let codes = [129, 128, 255, 0, 10, 20, 30, 40];
        let w = RowCodes::of(&int8(&codes, &[0.5, 2.0], None)).unwrap().unwrap();
        // 127 · 1 − 2 · 0 + 0 − 4 · 128 = −385; 127 · −118 + 2 · 108 − 4 · 88 = −15122.
        assert_eq!(w.linear(&x, &rule, None).unwrap(), [-192.5, -30244.0]);
        let w = RowCodes::of(&int8(&codes, &[0.5, 2.0], Some(&[129, 10]))).unwrap().unwrap();
        // 0 + 2 + 0 − 4 · 129 = −514; 0 − 2 · 10 + 4 · 30 = 100.
        assert_eq!(w.linear(&x, &rule, Some(&[1.0, 0.0])).unwrap(), [-256.0, 200.0]);
        let rule = InputRule { code: InputCode::Fp8, scale: InputScale::Stored(vec![2.0]) };
        let scales = FloatScales::Blocks { values: vec![0.5], rows: 2, cols: 2 };
        let w = RowCodes::of(&fp8(&[1.0, 2.0, -3.0, 0.0], scales, 2)).unwrap().unwrap();
        // 34 / 2 = 17 rounds to 16; 3 / 2.
        assert_eq!(w.linear(&[34.0, 3.0], &rule, None).unwrap(), [19.0, -48.0]);
        let other = InputRule { code: InputCode::Int8, scale: InputScale::Token };
        assert!(w.linear(&[34.0, 3.0], &other, None).unwrap_err().to_string().contains("Fp8 codes"));
    }

    #[test]
    fn the_largest_sum_does_not_overflow() {
        let n = MOST_COLUMNS;
        let rule = InputRule { code: InputCode::Int8, scale: InputScale::Stored(vec![1.0]) };
        let w = RowCodes::of(&int8(&vec![255; n], &[1.0], Some(&[0]))).unwrap().unwrap();
        assert_eq!(w.linear(&vec![-1000.0; n], &rule, None).unwrap(), [-(65536.0 * 128.0 * 255.0)]);
        assert!(RowCodes::of(&int8(&vec![255; n + 4], &[1.0], None)).unwrap().is_none());
    }

    #[test]
    fn a_row_with_what_is_no_number_has_no_product() {
        let w = RowCodes::of(&int8(&[129; 8], &[1.0, 1.0], None)).unwrap().unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let x = [1.0, 2.0, bad, 3.0, 1.0, 1.0, 1.0, 1.0];
            let rule = InputRule { code: InputCode::Int8, scale: InputScale::Token };
            let y = w.linear(&x, &rule, None).unwrap();
            assert!(y[..2].iter().all(|v| v.is_nan()) && y[2..].iter().all(|v| v.is_finite()), "{bad} {y:?}");
            // A stored scale clips an infinity, as every other value.
            let rule = InputRule { code: InputCode::Int8, scale: InputScale::Stored(vec![1.0]) };
            assert_eq!(w.linear(&x, &rule, None).unwrap()[0].is_nan(), bad.is_nan());
        }
    }

    #[test]
    fn other_scales_have_no_such_product() {
        let group = Scheme { bits: 8, symmetric: true, group: GroupSize::Cols(4) };
        let HostWeight::Packed(mut p) = int8(&[128; 8], &[1.0], None) else { unreachable!("packed") };
        (p.scheme, p.scales) = (group, vec![1.0; 2]);
        assert!(RowCodes::of(&HostWeight::Packed(p)).unwrap().is_none());
        let blocks = FloatScales::Blocks { values: vec![1.0; 2], rows: 1, cols: 2 };
        assert!(RowCodes::of(&fp8(&[1.0; 4], blocks, 1)).unwrap().is_none());
        let rule = |code, scale| input_code(&InputRule { code, scale });
        assert_eq!(rule(InputCode::Int8, InputScale::Token), Some(InputCode::Int8));
        assert_eq!(rule(InputCode::Fp8, InputScale::Stored(vec![1.0])), Some(InputCode::Fp8));
        assert_eq!(rule(InputCode::Fp8, InputScale::Group(128)), None);
        assert_eq!(rule(InputCode::Int8, InputScale::Stored(vec![1.0; 2])), None);
        assert_eq!(rule(InputCode::Fp4, InputScale::Token), None);
    }
}
