//! A quantized matrix: codes from the solver, never re-derived from floats.

use std::ops::Range;

use crate::error::{KernelError, Result, check_len};
use crate::floats::FloatWeight;
use crate::scheme::Scheme;

/// Codes, scales and zero points of one linear `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    /// Number format.
    pub scheme: Scheme,
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// `[out, in]` unsigned codes, one per byte.
    pub codes: Vec<u8>,
    /// `[out, groups]`, already rounded to the dtype they are stored in. May be negative (signed scales).
    pub scales: Vec<f32>,
    /// `[out, groups]` zero points as unsigned codes; `None` for symmetric schemes.
    pub zeros: Option<Vec<u8>>,
    /// `[in]` column → group when columns are not in group order (`g_idx`); `None` means `col / group`.
    pub group_index: Option<Vec<u32>>,
}

impl QuantizedMatrix {
    /// Checks every length, code range and scale. Run before packing and after unpacking.
    pub fn validate(&self) -> Result<()> {
        let groups = self.scheme.groups(self.in_features)?;
        let cells = self.out_features.checked_mul(self.in_features).ok_or(KernelError::Overflow("codes"))?;
        check_len("codes", cells, self.codes.len())?;
        check_len("scales", self.out_features * groups, self.scales.len())?;
        if let Some(z) = &self.zeros {
            check_len("zero points", self.out_features * groups, z.len())?;
        }
        if let Some(g) = &self.group_index {
            check_len("g_idx", self.in_features, g.len())?;
            if let Some(bad) = g.iter().find(|g| **g as usize >= groups) {
                return Err(KernelError::Length { what: "g_idx group", expected: groups, found: *bad as usize });
            }
        }
        let max = self.scheme.max_code();
        if let Some(index) = self.codes.iter().position(|c| *c > max) {
            return Err(KernelError::BadCode { index, code: self.codes[index], bits: self.scheme.bits });
        }
        // A zero scale is legal only where it dequantizes a dead group; NaN and infinity never are.
        if let Some(i) = self.scales.iter().position(|s| !s.is_finite()) {
            return Err(KernelError::BadScale { row: i / groups, group: i % groups, value: self.scales[i] });
        }
        Ok(())
    }

    /// Rows as f32 `[rows, in]`: `scale · (code − zero)`, one f32 multiplication a weight. The lengths were checked and `rows` is within
    /// the matrix.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        let n = self.in_features;
        let (groups, cols) = (self.scales.len() / self.out_features.max(1), self.scheme.group_cols(n).max(1));
        let mid = self.scheme.mid_code();
        for (row, out) in rows.zip(out.chunks_exact_mut(n.max(1))) {
            for (col, v) in out.iter_mut().enumerate() {
                let group = self.group_index.as_ref().map_or(col / cols, |g| g[col] as usize);
                let at = row * groups + group;
                let zero = self.zeros.as_ref().map_or(mid, |z| z[at]);
                *v = (i32::from(self.codes[row * n + col]) - i32::from(zero)) as f32 * self.scales[at];
            }
        }
    }

    /// The whole matrix as f32 `[out, in]`.
    pub fn dequantize(&self) -> Result<Vec<f32>> {
        self.validate()?;
        let mut w = vec![0f32; self.codes.len()];
        self.widen(0..self.out_features, &mut w);
        Ok(w)
    }
}

/// What a solver makes of a matrix.
#[derive(Clone)]
pub enum QuantizedWeight {
    /// Integer codes.
    Int(QuantizedMatrix),
    /// Float codes.
    Float(FloatWeight),
}

impl QuantizedWeight {
    /// As f32 `[out, in]`.
    pub fn dequantize(&self) -> Result<Vec<f32>> {
        match self {
            QuantizedWeight::Int(m) => m.dequantize(),
            QuantizedWeight::Float(w) => w.dequantize(),
        }
    }

    /// Rows as f32 `[rows, in]`; the lengths were checked and `rows` is within the matrix.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            QuantizedWeight::Int(m) => m.widen(rows, out),
            QuantizedWeight::Float(w) => w.widen(rows, out),
        }
    }
}
