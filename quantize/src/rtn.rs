//! Round to nearest: every weight on its own.

use lowbit_kernels::QuantizedMatrix;
use lowbit_kernels::qdq::quantize;
use rayon::prelude::*;

use crate::factor::SolveError;
use crate::scale_search::{Scales, SolverOptions, multiversion, search_scales};

/// Quantizes `w` `[out, n]` by rounding to nearest.
///
/// `diag_h`, the diagonal of the Hessian, weights the scale search (all ones when absent); columns where it is zero
/// are dead and become 0, as in [`crate::gptq`].
pub fn quantize_rtn(
    w: &[f32],
    out: usize,
    n: usize,
    diag_h: Option<&[f32]>,
    opts: &SolverOptions,
) -> Result<QuantizedMatrix, SolveError> {
    nearest(w, out, n, search_scales(w, out, n, diag_h, opts)?, diag_h, opts)
}

/// The nearest codes on scales and zero points that are chosen; columns where `diag_h` is zero become 0.
pub(crate) fn nearest(
    w: &[f32],
    out: usize,
    n: usize,
    scales: Scales,
    diag_h: Option<&[f32]>,
    opts: &SolverOptions,
) -> Result<QuantizedMatrix, SolveError> {
    let Scales { scales, zeros, .. } = scales;
    let groups = opts.scheme.groups(n)?;
    let cols = opts.scheme.group_cols(n);
    let (mid, max) = (opts.scheme.mid_code(), opts.scheme.max_code());
    let mut codes = vec![0u8; out * n];
    if n > 0 {
        codes.par_chunks_mut(n).zip(w.par_chunks(n)).enumerate().for_each(|(row, (codes, w))| {
            for group in 0..groups {
                let at = row * groups + group;
                let zero = zeros.as_ref().map_or(mid, |z| z[at]);
                let span = group * cols..(group + 1) * cols;
                encode(&mut codes[span.clone()], &w[span], scales[at], zero, max);
            }
            if let Some(diag) = diag_h {
                for col in (0..n).filter(|c| diag[*c] == 0.0) {
                    codes[col] = zeros.as_ref().map_or(mid, |z| z[row * groups + col / cols]);
                }
            }
        });
    }
    Ok(QuantizedMatrix {
        scheme: opts.scheme,
        out_features: out,
        in_features: n,
        codes,
        scales,
        zeros,
        group_index: None,
    })
}

multiversion! {
    fn encode(codes: &mut [u8], w: &[f32], scale: f32, zero: u8, max: u8) {
        for (code, w) in codes.iter_mut().zip(w) {
            *code = quantize(*w, scale, zero, max);
        }
    }
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};

    use super::*;
    use crate::scale_search::ScaleSearch;

    fn options(symmetric: bool) -> SolverOptions {
        let scheme = Scheme { bits: 4, symmetric, group: GroupSize::Cols(4) };
        let mut opts = SolverOptions::new(scheme, ScaleType::F32);
        opts.scale_search = ScaleSearch::MinMax;
        opts
    }

    #[test]
    fn hand_worked_codes() {
        // absmax 7.5 and a half range of 7.5: scale 1.
        let w = [-7.5, -0.5, 1.5, 3.0, 0.0, 0.0, 0.0, 0.0];
        let q = quantize_rtn(&w, 1, 8, None, &options(true)).unwrap();
        assert_eq!(q.scales, [1.0, 1.0]);
        assert_eq!(q.codes, [0, 8, 10, 11, 8, 8, 8, 8]);
        q.validate().unwrap();
        // All positive: the range is widened to 0.
        let q = quantize_rtn(&[3.0, 6.0, 9.0, 15.0], 1, 4, None, &options(false)).unwrap();
        assert_eq!((q.scales[0], q.zeros.unwrap()[0]), (1.0, 0));
        assert_eq!(q.codes, [3, 6, 9, 15]);
        let q = quantize_rtn(&[-5.0, 0.0, 1.0, 10.0], 1, 4, None, &options(false)).unwrap();
        assert_eq!((q.zeros.unwrap()[0], q.codes), (5, vec![0, 5, 6, 15]));
    }

    #[test]
    fn dead_columns_become_zero_and_do_not_stretch_the_scale() {
        let w = [7.5, 100.0, 1.0, -2.0];
        let q = quantize_rtn(&w, 1, 4, Some(&[1.0, 0.0, 1.0, 1.0]), &options(true)).unwrap();
        assert_eq!(q.scales, [1.0]);
        assert_eq!(q.dequantize().unwrap()[1], 0.0);
    }

    #[test]
    fn nan_is_refused_with_its_place() {
        let e = quantize_rtn(&[0.0, 1.0, f32::NAN, 2.0], 1, 4, None, &options(true)).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "weight", index: 2 }), "{e}");
    }
}
