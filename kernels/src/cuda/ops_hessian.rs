//! Launch of the Hessian's accumulation.

use super::device::{Arg, Device, Launch, Memory};
use super::rows::size;
use crate::error::{KernelError, Result, check_len};

/// Side of a tile of the Hessian.
const TILE: usize = 64;
/// Two halves of two operands of three bf16 terms of 32 tokens by 64 columns.
const SHARED_BYTES: u32 = 2 * 2 * 3 * 32 * 64 * 2;

/// From so many columns and tokens on the warpgroup kernels are used, where there are any.
const WIDE_COLUMNS: usize = 256;
const WIDE_TOKENS: usize = 64;
/// Side of their tiles, tokens of a step, and three buffers of two operands of two terms of 128 columns by 64 tokens.
const WIDE_TILE: usize = 128;
const WIDE_STEP: usize = 64;
const WIDE_SHARED: u32 = 3 * 2 * 2 * 128 * 64 * 2;

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
    if n >= WIDE_COLUMNS && tokens >= WIDE_TOKENS && d.has_warpgroup_products() {
        return wide(d, h, x, tokens, n);
    }
    let side = u32::try_from(n.div_ceil(TILE)).map_err(|_| KernelError::Overflow("grid"))?;
    let launch = Launch { grid: [side, side, 1], block: [128, 1, 1], shared_bytes: SHARED_BYTES };
    let args = [Arg::Out(h), Arg::In(x), Arg::I32(size("tokens", tokens)?), Arg::I32(size("columns", n)?)];
    d.launch("hessian_update", launch, &args)
}

/// By `hessian_wide.cu`: a power of two a column, two transposed f16 planes, three products.
fn wide(d: &Device, h: &Memory, x: &Memory, tokens: usize, n: usize) -> Result<()> {
    let grid = |blocks: usize| u32::try_from(blocks).map_err(|_| KernelError::Overflow("grid"));
    let flat = |x: u32, y: u32| Launch { grid: [x, y, 1], block: [256, 1, 1], shared_bytes: 0 };
    let (tokens_arg, n_arg) = (Arg::I32(size("tokens", tokens)?), Arg::I32(size("columns", n)?));
    let scales = d.alloc(n * 4)?;
    let args = [Arg::In(x), Arg::Out(&scales), tokens_arg, n_arg];
    d.launch("hessian_scales", flat(grid(n.div_ceil(32))?, 1), &args)?;
    let cells = n.next_multiple_of(WIDE_TILE).checked_mul(tokens.next_multiple_of(WIDE_STEP));
    let planes = d.alloc(cells.and_then(|c| c.checked_mul(4)).ok_or(KernelError::Overflow("hessian planes"))?)?;
    let args = [Arg::In(x), Arg::In(&scales), Arg::Out(&planes), tokens_arg, n_arg];
    d.launch("hessian_split", flat(grid(n.div_ceil(64))?, grid(tokens.div_ceil(WIDE_STEP))?), &args)?;
    let side = n.div_ceil(WIDE_TILE);
    let tiles = grid((side * (side + 1) / 2).min(d.multiprocessors()))?;
    let args = [Arg::Out(h), Arg::In(&planes), Arg::In(&scales), tokens_arg, n_arg];
    d.launch("hessian_wide", Launch { shared_bytes: WIDE_SHARED, ..flat(tiles, 1) }, &args)
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

    #[test]
    fn wide_tiles_do_the_same_and_take_any_range() {
        let update = wide;
        let d = Device::emulated(2).unwrap();
        agrees_by(update, &d, &[(1, 3), (70, 64), (129, 200), (300, 65), (1153, 64)], |_| 1.0);
        // Columns of very different size, also beyond what f16 holds, and one of zeros.
        agrees_by(update, &d, &[(130, 130)], |c| [1e-12, 0.0, 3e4, 1e9, 1e-3][c % 5]);
        let checked = EmulatorOptions { checked: true, seed: 5, ..EmulatorOptions::default() };
        if let Ok(d) = Device::emulated_with(checked) {
            agrees_by(update, &d, &[(131, 200)], |_| 1.0);
        }
    }

    #[test]
    fn a_nan_or_infinity_reaches_its_row_and_column() {
        let (n, tokens) = (260, 70);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = noise(tokens * n, 3);
            x[5 * n + 150] = bad;
            let d = Device::emulated(2).unwrap();
            let (h, xm) = (d.alloc_zeroed(n * n * 4).unwrap(), d.upload(&bytes_of(&x)).unwrap());
            hessian_update(&d, &h, &xm, tokens, n).unwrap();
            let got = floats_of(&d.read(&h, 0..h.bytes()).unwrap());
            for (i, j) in (0..n).flat_map(|i| (i..n).map(move |j| (i, j))) {
                assert_eq!(got[i * n + j].is_finite(), i != 150 && j != 150, "{bad} at {i},{j}");
            }
        }
    }

    fn agrees(d: &Device, sizes: &[(usize, usize)]) {
        agrees_by(hessian_update, d, sizes, |_| 1.0);
    }

    type Update = fn(&Device, &Memory, &Memory, usize, usize) -> Result<()>;

    fn agrees_by(update: Update, d: &Device, sizes: &[(usize, usize)], times: impl Fn(usize) -> f32) {
        for &(n, tokens) in sizes {
            let mut x = noise(tokens * n, 2);
            x.iter_mut().enumerate().for_each(|(at, v)| *v *= times(at % n));
            // A start of the size of the sums.
            let start = noise(n * n, 1);
            let start: Vec<f32> = start.iter().enumerate().map(|(at, v)| v * times(at / n) * times(at % n)).collect();
            let (h, xm) = (d.upload(&bytes_of(&start)).unwrap(), d.upload(&bytes_of(&x)).unwrap());
            update(d, &h, &xm, tokens, n).unwrap();
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
