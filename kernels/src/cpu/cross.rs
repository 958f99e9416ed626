//! Row-wise operations that prepare two streams of activations for the sums over both ([`super::hessian::cross`]).

use rayon::prelude::*;

use super::checks;
use crate::error::{Result, check_len};

/// Elements of a task of the row-wise operations.
const SPAN: usize = 1 << 15;

/// `x − y`.
pub fn subtract(x: &[f32], y: &[f32]) -> Result<Vec<f32>> {
    check_len("subtrahend", x.len(), y.len())?;
    let mut out = vec![0f32; x.len()];
    out.par_chunks_mut(SPAN).zip(x.par_chunks(SPAN).zip(y.par_chunks(SPAN))).for_each(|(out, (x, y))| {
        for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
            *out = x - y;
        }
    });
    Ok(out)
}

/// Row t times `factors[t]`.
pub fn scale_rows(x: &mut [f32], width: usize, factors: &[f32]) -> Result<()> {
    check_len("row factors", checks::rows("rows to scale", x.len(), width)?, factors.len())?;
    x.par_chunks_exact_mut(width)
        .zip(factors)
        .with_min_len(SPAN / width.min(SPAN))
        .for_each(|(row, f)| row.iter_mut().for_each(|v| *v *= f));
    Ok(())
}

/// Mean of the squares of each row, summed in f64.
pub fn mean_squares(x: &[f32], width: usize) -> Result<Vec<f32>> {
    checks::rows("rows to square", x.len(), width)?;
    let mean = |row: &[f32]| (row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64) as f32;
    Ok(x.par_chunks_exact(width).with_min_len(SPAN / width.min(SPAN)).map(mean).collect())
}
