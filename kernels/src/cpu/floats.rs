//! Weights of float codes: read as stored (the file's own pages), decoded sixteen rows at a time into the panels of [`super::product`].
//!
//! Prefill and decode share that product and its order of additions; nothing is kept in f32. Rounding of a linear's input lives here too.

use std::ops::Range;

use rayon::prelude::*;

use super::checks;
use super::product::{self, WIDTH};
use super::simd::Simd;
use crate::activation::InputRule;
use crate::error::{Result, check_len};
use crate::floats::{FloatCode, FloatWeight};
use crate::minifloat::{E4M3, e2m1};

/// Both values of every byte of two E2M1 codes.
static PAIRS: [[f32; 2]; 256] = {
    let mut table = [[0f32; 2]; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = [e2m1(i as u8 & 15), e2m1(i as u8 >> 4)];
        i += 1;
    }
    table
};

/// A matrix of float codes on this backend.
pub struct FloatMatrix(FloatWeight);

impl FloatMatrix {
    /// Checks every length, code and scale.
    pub fn new(w: &FloatWeight) -> Result<Self> {
        w.validate()?;
        Ok(Self(w.clone()))
    }

    /// Rows as f32 `[rows, cols]`; `rows` within the matrix.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        self.0.widen(rows, out);
    }

    /// `y = x Wᵀ`: x `[t, cols]`, y `[t, rows]`.
    pub fn panels(&self, simd: Simd, x: &[f32], t: usize, y: &mut [f32]) -> Result<()> {
        let w = &self.0;
        check_len("x", checks::product("x", t, w.in_features)?, x.len())?;
        product::linear(simd, y, x, (t, w.out_features, w.in_features), |rows, panel| self.fill(rows, panel))
    }

    /// Up to sixteen rows as a panel `[cols, 16]`, zero where rows are missing.
    fn fill(&self, rows: Range<usize>, panel: &mut [f32]) {
        let w = &self.0;
        let (n, bytes) = (w.in_features, w.code.row_bytes(w.in_features));
        let codes = w.codes.as_slice();
        let panel = &mut panel.as_chunks_mut::<WIDTH>().0[..n];
        if rows.len() < WIDTH {
            panel.fill([0.0; WIDTH]);
        }
        for (group, columns) in panel.chunks_mut(w.group_cols()).enumerate() {
            let first = group * w.group_cols();
            for (r, row) in rows.clone().enumerate() {
                let scale = w.scale(row, group);
                let codes = &codes[row * bytes..(row + 1) * bytes];
                match w.code {
                    FloatCode::E4m3 => {
                        for (out, c) in columns.iter_mut().zip(&codes[first..]) {
                            out[r] = E4M3[*c as usize] * scale;
                        }
                    }
                    FloatCode::E2m1 => {
                        // Groups are of sixteen or thirty-two columns: whole bytes.
                        for (out, c) in columns.as_chunks_mut::<2>().0.iter_mut().zip(&codes[first / 2..]) {
                            let [low, high] = PAIRS[*c as usize];
                            (out[0][r], out[1][r]) = (low * scale, high * scale);
                        }
                    }
                }
            }
        }
    }
}

/// Rows of a task.
const ROWS: usize = 16;

/// [`InputRule::apply`] on all threads.
pub fn quantize_input(x: &[f32], width: usize, rule: &InputRule) -> Result<Vec<f32>> {
    checks::rows("quantized input", x.len(), width)?;
    let mut y = x.to_vec();
    y.par_chunks_mut(ROWS * width).try_for_each(|rows| rule.apply(rows, width))?;
    Ok(y)
}
