//! Launch of the Hessian's accumulation.

use super::device::{Arg, Device, Launch, Memory};
use super::rows::size;
use crate::error::{KernelError, Result, check_len};

/// Side of a tile of the Hessian.
const TILE: usize = 64;
/// Two halves of two operands of three bf16 terms of 32 tokens by 64 columns.
const SHARED_BYTES: u32 = 2 * 2 * 3 * 32 * 64 * 2;

/// `h += xᵀ x`, upper triangle and diagonal: h `[n, n]`, x `[tokens, n]`, f32.
pub fn hessian_update(d: &Device, h: &Memory, x: &Memory, tokens: usize, n: usize) -> Result<()> {
    let bytes = |what, rows: usize| {
        rows.checked_mul(n).and_then(|cells| cells.checked_mul(4)).ok_or(KernelError::Overflow(what))
    };
    check_len("hessian", bytes("hessian", n)? / 4, h.bytes() / 4)?;
    check_len("hessian input", bytes("hessian input", tokens)? / 4, x.bytes() / 4)?;
    if tokens == 0 || n == 0 {
        return Ok(());
    }
    let side = u32::try_from(n.div_ceil(TILE)).map_err(|_| KernelError::Overflow("grid"))?;
    let launch = Launch { grid: [side, side, 1], block: [128, 1, 1], shared_bytes: SHARED_BYTES };
    let args = [Arg::Out(h), Arg::In(x), Arg::I32(size("tokens", tokens)?), Arg::I32(size("columns", n)?)];
    d.launch("hessian_update", launch, &args)
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::*;
    use crate::cuda::EmulatorOptions;
    use crate::cuda::rows::{bytes_of, floats_of};

    /// Uniform in [-1, 1).
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (s >> 32) as f32 / 2f32.powi(31) - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn the_upper_triangle_grows_by_the_products_and_the_rest_stays() {
        let sizes = [(1, 3), (15, 1), (16, 16), (17, 33), (64, 31), (65, 64), (150, 200), (132, 97)];
        agrees(&Device::emulated(2).unwrap(), &sizes);
        // Every access looked at, where the compiler can instrument: tiles on and off the diagonal, halves used again.
        let checked = EmulatorOptions { checked: true, seed: 5, ..EmulatorOptions::default() };
        if let Ok(d) = Device::emulated_with(checked) {
            agrees(&d, &[(70, 150)]);
        }
    }

    fn agrees(d: &Device, sizes: &[(usize, usize)]) {
        for &(n, tokens) in sizes {
            let (start, x) = (noise(n * n, 1), noise(tokens * n, 2));
            let (h, xm) = (d.upload(&bytes_of(&start)).unwrap(), d.upload(&bytes_of(&x)).unwrap());
            hessian_update(d, &h, &xm, tokens, n).unwrap();
            let got = floats_of(&d.read(&h, 0..h.bytes()).unwrap());
            for (at, g) in got.iter().enumerate() {
                let (i, j) = (at / n, at % n);
                if j < i {
                    assert_eq!(*g, start[at], "n={n} tokens={tokens}: below the diagonal at {i},{j}");
                    continue;
                }
                let (mut sum, mut size) = (f64::from(start[at]), f64::from(start[at]).abs());
                for t in 0..tokens {
                    let p = f64::from(x[t * n + i]) * f64::from(x[t * n + j]);
                    sum += p;
                    size += p.abs();
                }
                let bound = f64::from(f32::EPSILON) * (tokens as f64).sqrt() * size;
                let off = (f64::from(*g) - sum).abs();
                assert!(off <= bound, "n={n} tokens={tokens} at {i},{j}: {g} against {sum}, off {off:e} > {bound:e}");
            }
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let d = Device::emulated(1).unwrap();
        let (h, x) = (d.alloc_zeroed(16 * 4).unwrap(), d.alloc_zeroed(8 * 4).unwrap());
        assert!(hessian_update(&d, &h, &x, 2, 4).is_ok());
        assert!(matches!(hessian_update(&d, &h, &x, 3, 4), Err(KernelError::Length { what: "hessian input", .. })));
        assert!(matches!(hessian_update(&d, &h, &x, 2, 3), Err(KernelError::Length { what: "hessian", .. })));
    }
}
