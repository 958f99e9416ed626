//! Super-blocks of GGUF (`Q4_K`, `Q6_K`): their grids from the weights and the Hessian's diagonal, their codes by rounding or
//! by GPTQ on those grids.

use std::ops::Range;

use lowbit_kernels::error::check_len;
use lowbit_kernels::ggml::GgmlType;
use lowbit_kernels::ggml::k_quants::{SUPER, SuperBlock};
use rayon::prelude::*;

use crate::factor::{Factor, SolveError};
use crate::gptq::{Grid, GridScales, Shifts, grid_codes};
use crate::scale_search::{SolverOptions, check_finite};

/// A matrix `[rows, cols]` in super-blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockMatrix {
    /// `Q4_K` or `Q6_K`.
    pub kind: GgmlType,
    /// Columns.
    pub cols: usize,
    grids: Vec<SuperBlock>,
    codes: Vec<u8>,
}

impl BlockMatrix {
    /// The bytes of the tensor.
    pub fn bytes(&self) -> Vec<u8> {
        let blocks = self.grids.par_iter().zip(self.codes.as_chunks::<SUPER>().0);
        let packed: Vec<Vec<u8>> = blocks.map(|(grid, codes)| grid.pack(codes)).collect();
        packed.concat()
    }

    /// What it stands for, `[rows, cols]`.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0f32; self.codes.len()];
        self.widen(0..self.codes.len() / self.cols.max(1), &mut values);
        values
    }

    /// Rows as f32 `[rows, cols]`; `rows` is within the matrix.
    pub fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        let first = rows.start * (self.cols / SUPER);
        let blocks = self.grids.iter().zip(self.codes.as_chunks::<SUPER>().0).skip(first);
        for (out, (grid, codes)) in out.as_chunks_mut::<SUPER>().0.iter_mut().zip(blocks) {
            *out = grid.values(codes);
        }
    }
}

/// Best grids of `w` under importances (ones when absent).
fn grids(kind: GgmlType, w: &[f32], n: usize, diag: Option<&[f32]>) -> Result<Vec<SuperBlock>, SolveError> {
    check_finite("weight", w)?;
    check_len("weight", w.len() / n.max(1) * n, w.len())?;
    kind.bytes(1, n)?;
    if let Some(diag) = diag {
        check_len("Hessian diagonal", n, diag.len())?;
        check_finite("Hessian diagonal", diag)?;
    }
    let ones = [1f32; SUPER];
    let per_row = n / SUPER;
    w.as_chunks::<SUPER>()
        .0
        .par_iter()
        .enumerate()
        .map(|(i, x)| {
            let at = i % per_row * SUPER;
            let weight = diag.and_then(|d| d.get(at..)?.first_chunk::<SUPER>()).unwrap_or(&ones);
            // Dead columns become zero.
            let live: [f32; SUPER] = std::array::from_fn(|c| if weight[c] == 0.0 { 0.0 } else { x[c] });
            SuperBlock::fit(kind, &live, weight).map_err(|e| match e {
                lowbit_kernels::KernelError::BadScale { value, .. } => {
                    SolveError::ScaleOverflow { row: i / per_row, group: i % per_row, value }
                }
                other => other.into(),
            })
        })
        .collect()
}

/// Rounds to nearest, without data.
pub fn blocks_rtn(kind: GgmlType, w: &[f32], n: usize) -> Result<BlockMatrix, SolveError> {
    let grids = grids(kind, w, n, None)?;
    let blocks = grids.par_iter().zip(w.as_chunks::<SUPER>().0);
    let codes: Vec<[u8; SUPER]> = blocks.map(|(grid, x)| grid.codes(x)).collect();
    Ok(BlockMatrix { kind, cols: n, grids, codes: codes.into_flattened() })
}

/// GPTQ with the scales and minima of grids fitted under the Hessian's diagonal.
pub fn blocks_gptq(
    kind: GgmlType,
    w: &[f32],
    n: usize,
    factor: &Factor,
    opts: &SolverOptions,
) -> Result<BlockMatrix, SolveError> {
    check_len("factor", n, factor.n)?;
    let grids = grids(kind, w, n, Some(&factor.diag))?;
    let Some(first) = grids.first() else { return blocks_rtn(kind, w, n) };
    let (sub, max) = (first.sub(), first.max_code());
    let all = |f: fn(&SuperBlock, usize) -> f32| -> Vec<f32> {
        grids.iter().flat_map(|g| (0..SUPER / sub).map(move |j| f(g, j))).collect()
    };
    let (scales, offsets) = (all(SuperBlock::scale), all(SuperBlock::offset));
    let shifts = Shifts::Offsets(&offsets);
    let on = GridScales { grid: Grid::Steps { max }, scales: &scales, shifts, cols: sub };
    let codes = grid_codes(w, w.len() / n.max(1), n, factor, &on, opts.block)?;
    Ok(BlockMatrix { kind, cols: n, grids, codes })
}

#[cfg(test)]
mod tests {
    use lowbit_kernels::ggml::{GgmlType, decode};
    use lowbit_kernels::{GroupSize, ScaleType, Scheme};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::factor::factorize;
    use crate::loss::proxy_loss;

    const KINDS: [GgmlType; 2] = [GgmlType::Q4K, GgmlType::Q6K];

    fn options() -> SolverOptions {
        SolverOptions::new(Scheme { bits: 4, symmetric: true, group: GroupSize::Cols(32) }, ScaleType::F32)
    }

    fn data(seed: u64, out: usize, n: usize) -> (Vec<f32>, Vec<f32>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let w = (0..out * n).map(|_| rng.random_range(-1f32..1.0).powi(3)).collect();
        let tokens = 2 * n;
        let mut h = vec![0f32; n * n];
        for _ in 0..tokens {
            let shared: f32 = rng.random_range(-1.0..1.0);
            let x: Vec<f32> =
                (0..n).map(|i| (1.0 + (i % 5) as f32) * (shared + rng.random_range(-1f32..1.0))).collect();
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += x[i] * x[j];
                }
            }
        }
        (w, h)
    }

    #[test]
    fn bytes_decode_to_the_values() {
        let (w, _) = data(1, 3, 512);
        for kind in KINDS {
            let m = blocks_rtn(kind, &w, 512).unwrap();
            assert_eq!(decode(kind, &m.bytes(), 3, 512).unwrap(), m.values());
        }
    }

    #[test]
    fn gptq_on_the_grids_is_well_below_rounding_and_the_same_where_nothing_is_correlated() {
        let (out, n) = (24, 256);
        for kind in KINDS {
            let (w, h) = data(2, out, n);
            let factor = factorize(&h, n, &options()).unwrap();
            let solved = blocks_gptq(kind, &w, n, &factor, &options()).unwrap();
            let rounded = blocks_rtn(kind, &w, n).unwrap();
            let loss = |m: &BlockMatrix| proxy_loss(&w, &m.values(), &h, out, n).proxy;
            assert!(loss(&solved) < 0.7 * loss(&rounded), "{kind:?}: {} {}", loss(&solved), loss(&rounded));

            let identity: Vec<f32> = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
            let factor = factorize(&identity, n, &options()).unwrap();
            assert_eq!(blocks_gptq(kind, &w, n, &factor, &options()).unwrap(), rounded);
        }
    }

    #[test]
    fn bad_input_is_refused_with_its_place() {
        let mut w = vec![0.5f32; 512];
        w[300] = f32::NAN;
        let e = blocks_rtn(GgmlType::Q4K, &w, 256).unwrap_err();
        assert!(matches!(e, SolveError::NonFinite { what: "weight", index: 300 }), "{e}");
        w[300] = 1e9;
        let e = blocks_rtn(GgmlType::Q6K, &w, 256).unwrap_err();
        assert!(matches!(e, SolveError::ScaleOverflow { row: 1, group: 0, .. }), "{e}");
        assert!(blocks_rtn(GgmlType::Q6K, &w[..300], 300).is_err());
    }
}
