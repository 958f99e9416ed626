//! Weights of float codes: E4M3 bytes or pairs of E2M1, with their scales as they are stored.

use std::ops::Range;

use crate::backend::Bytes;
use crate::error::{KernelError, Result, check_len};
use crate::minifloat::{E4M3, e2m1, e8m0};

/// Columns that share a scale in NVFP4.
pub const NVFP4_GROUP: usize = 16;
/// Columns that share a scale in MXFP4.
pub const MXFP4_GROUP: usize = 32;

/// What a code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatCode {
    /// One byte each, see [`crate::minifloat::e4m3`].
    E4m3,
    /// Two in a byte, the even column in the low half, see [`crate::minifloat::e2m1`].
    E2m1,
}

impl FloatCode {
    /// Bytes of a row of `cols`.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            FloatCode::E4m3 => cols,
            FloatCode::E2m1 => cols.div_ceil(2),
        }
    }
}

/// Scales of a matrix `[out, in]`.
#[derive(Clone)]
pub enum FloatScales {
    /// `[ceil(out/rows), ceil(in/cols)]`, one a block.
    Blocks {
        /// Row-major.
        values: Vec<f32>,
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
    },
    /// `[out, in/16]` E4M3; a scale is the code's value over `global` (NVFP4).
    Local {
        /// Codes.
        codes: Bytes,
        /// What local scales were multiplied with before they were rounded.
        global: f32,
    },
    /// `[out, in/32]` E8M0 (MXFP4).
    Exponents {
        /// Codes.
        codes: Bytes,
    },
}

impl FloatScales {
    /// Columns that share a scale.
    pub fn group_cols(&self) -> usize {
        match self {
            FloatScales::Blocks { cols, .. } => *cols,
            FloatScales::Local { .. } => NVFP4_GROUP,
            FloatScales::Exponents { .. } => MXFP4_GROUP,
        }
    }

    /// Groups of a row of `in_features`.
    pub fn groups(&self, in_features: usize) -> usize {
        in_features.div_ceil(self.group_cols()).max(1)
    }

    /// Scale of a group of a row; `groups` are a row's.
    pub fn at(&self, row: usize, group: usize, groups: usize) -> f32 {
        match self {
            FloatScales::Blocks { values, rows, .. } => values[row / rows * groups + group],
            FloatScales::Local { codes, global } => E4M3[codes.as_slice()[row * groups + group] as usize] / global,
            FloatScales::Exponents { codes } => e8m0(codes.as_slice()[row * groups + group]),
        }
    }
}

/// A matrix of float codes: `w = scale · code`, one f32 product a weight.
#[derive(Clone)]
pub struct FloatWeight {
    /// What a code is.
    pub code: FloatCode,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// `[out, row_bytes]`.
    pub codes: Bytes,
    /// Scales.
    pub scales: FloatScales,
}

impl FloatWeight {
    /// Checks every length, that no code is NaN and that every scale is finite.
    pub fn validate(&self) -> Result<()> {
        self.check_lengths()?;
        if self.code == FloatCode::E4m3
            && let Some(index) = self.codes.as_slice().iter().position(|c| c & 0x7f == 0x7f)
        {
            return Err(KernelError::BadCode { index, code: self.codes.as_slice()[index], bits: 8 });
        }
        let groups = self.groups();
        let bad = |i: usize, value: f32| KernelError::BadScale { row: i / groups, group: i % groups, value };
        let found = match &self.scales {
            FloatScales::Blocks { values, .. } => values.iter().position(|s| !s.is_finite()).map(|i| bad(i, values[i])),
            FloatScales::Local { codes, global } => {
                if !(global.is_finite() && *global > 0.0) {
                    return Err(KernelError::BadScale { row: 0, group: 0, value: *global });
                }
                let codes = codes.as_slice();
                codes.iter().position(|c| c & 0x7f == 0x7f).map(|i| bad(i, f32::NAN))
            }
            FloatScales::Exponents { codes } => {
                codes.as_slice().iter().position(|c| *c == 255).map(|i| bad(i, f32::NAN))
            }
        };
        found.map_or(Ok(()), Err)
    }

    /// Checks every length.
    pub fn check_lengths(&self) -> Result<()> {
        let (out, n) = (self.out_features, self.in_features);
        let cells = |a: usize, b: usize| a.checked_mul(b).ok_or(KernelError::Overflow("float codes"));
        check_len("float codes", cells(out, self.code.row_bytes(n))?, self.codes.as_slice().len())?;
        if self.code == FloatCode::E2m1 && !n.is_multiple_of(2) {
            return Err(KernelError::NotDivisible { what: "input width", value: n, by: 2 });
        }
        let grouped = |by: usize, codes: &Bytes| {
            if !n.is_multiple_of(by) {
                return Err(KernelError::NotDivisible { what: "input width", value: n, by });
            }
            check_len("scales", cells(out, n / by)?, codes.as_slice().len())
        };
        match &self.scales {
            FloatScales::Blocks { values, rows, cols } => {
                if *rows == 0 || *cols == 0 {
                    return Err(KernelError::NotDivisible { what: "scale block", value: 0, by: 1 });
                }
                check_len("scales", cells(out.div_ceil(*rows), n.div_ceil(*cols))?, values.len())
            }
            FloatScales::Local { codes, .. } => grouped(NVFP4_GROUP, codes),
            FloatScales::Exponents { codes } => grouped(MXFP4_GROUP, codes),
        }
    }

    /// Columns of a group: a row has one scale for each.
    pub fn group_cols(&self) -> usize {
        self.scales.group_cols()
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.scales.groups(self.in_features)
    }

    /// Scale of a group of a row.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.at(row, group, self.groups())
    }

    /// Rows as f32 `[rows, in]`; the lengths were checked and `rows` is within the matrix.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        let n = self.in_features;
        for (row, out) in rows.zip(out.chunks_exact_mut(n.max(1))) {
            let bytes = self.code.row_bytes(n);
            let codes = &self.codes.as_slice()[row * bytes..(row + 1) * bytes];
            for (group, out) in out.chunks_mut(self.group_cols()).enumerate() {
                let (scale, first) = (self.scale(row, group), group * self.group_cols());
                match self.code {
                    FloatCode::E4m3 => {
                        for (v, c) in out.iter_mut().zip(&codes[first..]) {
                            *v = E4M3[*c as usize] * scale;
                        }
                    }
                    FloatCode::E2m1 => {
                        for (i, v) in out.iter_mut().enumerate() {
                            let at = first + i;
                            *v = e2m1(codes[at / 2] >> (at % 2 * 4)) * scale;
                        }
                    }
                }
            }
        }
    }

    /// The whole matrix as f32 `[out, in]`.
    pub fn dequantize(&self) -> Result<Vec<f32>> {
        self.validate()?;
        let mut w = vec![0f32; self.out_features * self.in_features];
        self.widen(0..self.out_features, &mut w);
        Ok(w)
    }

    /// Bytes one pass reads: codes and scales as stored (block scales in 16 bits).
    pub fn stored_bytes(&self) -> usize {
        self.codes.as_slice().len()
            + match &self.scales {
                FloatScales::Blocks { values, .. } => values.len() * 2,
                FloatScales::Local { codes, .. } => codes.as_slice().len() + 4,
                FloatScales::Exponents { codes } => codes.as_slice().len(),
            }
    }
}

/// Pairs of E2M1 codes `[rows, cols]`, one a byte, into bytes: even columns in the low half. `cols` is even.
pub fn pack_e2m1(codes: &[u8]) -> Vec<u8> {
    codes.as_chunks::<2>().0.iter().map(|[low, high]| (low & 15) | (high << 4)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::minifloat::{to_e2m1, to_e4m3};

    fn bytes(v: &[u8]) -> Bytes {
        Bytes::from_vec(v.to_vec())
    }

    #[test]
    fn blocks_reach_over_the_edge() {
        let codes: Vec<u8> = (0..3 * 5).map(|i| to_e4m3(i as f32)).collect();
        let scales = FloatScales::Blocks { values: vec![1.0, 2.0, 4.0, 8.0], rows: 2, cols: 3 };
        let w = FloatWeight { code: FloatCode::E4m3, out_features: 3, in_features: 5, codes: bytes(&codes), scales };
        let w = w.dequantize().unwrap();
        assert_eq!(w[..5], [0.0, 1.0, 2.0, 6.0, 8.0]);
        assert_eq!(w[10..], [40.0, 44.0, 48.0, 104.0, 112.0]);
    }

    #[test]
    fn two_level_scales_divide_by_the_global_one() {
        let codes: Vec<u8> = (0..32).map(|i| to_e2m1([0.5, -1.5, 6.0, -4.0][i % 4])).collect();
        let scales = FloatScales::Local { codes: bytes(&[to_e4m3(1.0), to_e4m3(24.0)]), global: 2.0 };
        let codes = bytes(&pack_e2m1(&codes));
        assert_eq!(codes.as_slice()[0], 0xb1);
        let w = FloatWeight { code: FloatCode::E2m1, out_features: 1, in_features: 32, codes, scales };
        let values = w.dequantize().unwrap();
        assert_eq!(values[..4], [0.25, -0.75, 3.0, -2.0]);
        assert_eq!(values[16..20], [6.0, -18.0, 72.0, -48.0]);
        assert_eq!(w.stored_bytes(), 16 + 2 + 4);
    }

    #[test]
    fn exponents_are_powers_of_two() {
        let scales = FloatScales::Exponents { codes: bytes(&[128, 125]) };
        let codes = bytes(&[0x21; 32]);
        let w = FloatWeight { code: FloatCode::E2m1, out_features: 2, in_features: 32, codes, scales };
        let values = w.dequantize().unwrap();
        assert_eq!((values[0], values[1], values[32], values[33]), (1.0, 2.0, 0.125, 0.25));
    }

    #[test]
    fn what_cannot_be_a_weight_is_refused_with_its_place() {
        let make = |codes: &[u8], values: Vec<f32>| FloatWeight {
            code: FloatCode::E4m3,
            out_features: 2,
            in_features: 2,
            codes: bytes(codes),
            scales: FloatScales::Blocks { values, rows: 1, cols: 2 },
        };
        let refuse = |w: FloatWeight| w.dequantize().unwrap_err().to_string();
        assert!(refuse(make(&[0; 3], vec![1.0; 2])).contains("expected 4 elements, found 3"));
        assert!(refuse(make(&[0; 4], vec![1.0; 3])).contains("scales: expected 2"));
        assert!(refuse(make(&[0, 0, 0xff, 0], vec![1.0; 2])).contains("code 255 at 2"));
        assert!(refuse(make(&[0; 4], vec![1.0, f32::NAN])).contains("row 1, group 0"));
        let odd = FloatWeight {
            code: FloatCode::E2m1,
            out_features: 1,
            in_features: 24,
            codes: bytes(&[0; 12]),
            scales: FloatScales::Local { codes: bytes(&[0]), global: 1.0 },
        };
        assert!(refuse(odd).contains("24 is not divisible by 16"));
    }
}
