//! Dense weights, read in the dtype they are stored in.
//!
//! Prefill: the product in fixed point of [`super::fixed`], or f32 panels and that of [`super::product`]. Decode: a matrix–vector loop that widens in registers, so that the weight
//! is read once for up to [`GEMV_TOKENS`] tokens. In neither does a token's result depend on the others or on the number of threads.

use std::ops::Range;

use super::fixed::{self, BLOCK, PanelBuffer};
use super::product;
use super::simd::{Kernel, Lanes, Simd};
use crate::backend::{Bytes, FloatType};
use crate::error::{KernelError, Result, check_len};
use half::{bf16, f16};

/// Most tokens the matrix–vector loops take.
pub const GEMV_TOKENS: usize = 4;
/// Rows of one task of a matrix–vector product.
pub const GEMV_ROWS: usize = 64;

/// Bytes of a row beyond which its own later columns are fetched ahead, not the next rows.
const LONG_ROW: usize = 8192;

/// `[rows, cols]` floats as stored.
pub struct DenseWeight {
    dtype: FloatType,
    rows: usize,
    cols: usize,
    data: Bytes,
}

/// A stored element type.
trait Element {
    const SIZE: usize;
    /// # Safety
    /// As [`Lanes::load_bf16`].
    unsafe fn lanes<L: Lanes>(p: *const u8) -> L::V;
    fn widen(bytes: &[u8]) -> f32;
}

struct F32;
struct F16;
struct Bf16;

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(p: *const u8) -> L::V {
        // SAFETY: the caller's contract; `load` needs no alignment.
        unsafe { L::load(p.cast()) }
    }
    #[inline(always)]
    fn widen(b: &[u8]) -> f32 {
        f32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(p: *const u8) -> L::V {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(p) }
    }
    #[inline(always)]
    fn widen(b: &[u8]) -> f32 {
        f16::from_le_bytes([b[0], b[1]]).to_f32()
    }
}

impl Element for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(p: *const u8) -> L::V {
        // SAFETY: the caller's contract.
        unsafe { L::load_bf16(p) }
    }
    #[inline(always)]
    fn widen(b: &[u8]) -> f32 {
        bf16::from_le_bytes([b[0], b[1]]).to_f32()
    }
}

impl DenseWeight {
    /// Checks the length; copies nothing.
    pub fn new(dtype: FloatType, rows: usize, cols: usize, data: Bytes) -> Result<Self> {
        let cells = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        check_len("weight bytes", cells.ok_or(KernelError::Overflow("weight bytes"))?, data.as_slice().len())?;
        Ok(Self { dtype, rows, cols, data })
    }

    fn row_bytes(&self, rows: Range<usize>) -> &[u8] {
        let stride = self.cols * self.dtype.size();
        &self.data.as_slice()[rows.start * stride..rows.end * stride]
    }

    /// Rows as f32 `[rows, cols]`; `rows` within the matrix.
    pub fn widen(&self, simd: Simd, rows: Range<usize>, out: &mut [f32]) {
        let bytes = self.row_bytes(rows);
        match self.dtype {
            FloatType::F32 => simd.run(Widen::<F32>(bytes, out, F32)),
            FloatType::F16 => simd.run(Widen::<F16>(bytes, out, F16)),
            FloatType::Bf16 => simd.run(Widen::<Bf16>(bytes, out, Bf16)),
        }
    }

    /// Whether fixed point loses nothing to speak of: weights of eight or eleven significant bits.
    pub fn has_fixed(&self) -> bool {
        self.dtype != FloatType::F32
    }

    /// `y = x Wᵀ` for many tokens in fixed point: x `[t, cols]`, y `[t, rows]`; only where [`Self::has_fixed`].
    pub fn fixed(&self, simd: Simd, x: &fixed::Rows, y: &mut [f32]) -> Result<()> {
        fixed::linear(simd, y, x, self.rows, |rows, panel| {
            let (count, bytes) = (rows.len(), self.row_bytes(rows));
            match self.dtype {
                FloatType::F16 => simd.run(Fill::<F16> { bytes, count, panel, element: F16 }),
                _ => simd.run(Fill::<Bf16> { bytes, count, panel, element: Bf16 }),
            }
        })
    }

    /// `y = x Wᵀ` for many tokens in f32: x `[t, cols]`, y `[t, rows]`.
    pub fn panels(&self, simd: Simd, x: &[f32], t: usize, y: &mut [f32]) -> Result<()> {
        check_len("x", t * self.cols, x.len())?;
        product::linear(simd, y, x, (t, self.rows, self.cols), |rows, panel| {
            let mut wide = vec![0f32; rows.len() * self.cols];
            self.widen(simd, rows, &mut wide);
            product::interleave(simd, &wide, self.cols, panel);
        })
    }

    /// `out[t][r] = W[r] · x[t]` for some rows and few tokens: x `[t, cols]`, out `[t, rows]`.
    pub fn rows(&self, simd: Simd, x: &[f32], t: usize, rows: Range<usize>, out: &mut [f32]) {
        let (bytes, k) = (self.row_bytes(rows), self.cols);
        match self.dtype {
            FloatType::F32 => simd.run(Gemv { bytes, x, k, t, out, element: F32 }),
            FloatType::F16 => simd.run(Gemv { bytes, x, k, t, out, element: F16 }),
            FloatType::Bf16 => simd.run(Gemv { bytes, x, k, t, out, element: Bf16 }),
        }
    }
}

struct Widen<'a, E>(&'a [u8], &'a mut [f32], E);

impl<E: Element> Kernel for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Widen(bytes, out, _) = self;
        let n = out.len().min(bytes.len() / E::SIZE);
        let whole = n / L::N * L::N;
        for i in (0..whole).step_by(L::N) {
            // SAFETY: `i + N ≤ n` elements exist in both slices; the caller vouches for the instruction set.
            unsafe { L::store(out.as_mut_ptr().add(i), E::lanes::<L>(bytes.as_ptr().add(i * E::SIZE))) };
        }
        for i in whole..n {
            out[i] = E::widen(&bytes[i * E::SIZE..]);
        }
    }
}

/// Rows as a panel in fixed point.
struct Fill<'a, E> {
    bytes: &'a [u8],
    count: usize,
    panel: &'a mut PanelBuffer,
    element: E,
}

impl<E: Element> Kernel for Fill<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let _ = &self.element;
        let row_bytes = self.bytes.len() / self.count.max(1);
        let block = |r: usize, b: usize, values: &mut [f32; BLOCK]| {
            let row = &self.bytes[r * row_bytes..(r + 1) * row_bytes];
            let bytes = &row[b * BLOCK * E::SIZE..row_bytes.min((b + 1) * BLOCK * E::SIZE)];
            if bytes.len() == BLOCK * E::SIZE {
                for i in (0..BLOCK).step_by(L::N) {
                    // SAFETY: `i + N ≤ 32` elements exist on both sides; the caller vouches for the instruction set.
                    unsafe { L::store(values.as_mut_ptr().add(i), E::lanes::<L>(bytes.as_ptr().add(i * E::SIZE))) };
                }
            } else {
                *values = [0.0; BLOCK];
                values.iter_mut().zip(bytes.chunks_exact(E::SIZE)).for_each(|(v, b)| *v = E::widen(b));
            }
        };
        // SAFETY: the caller vouches for the instruction set.
        unsafe { self.panel.fill_by_rows::<L>(self.count, block) };
    }
}

/// `out[t][r] = W[r] · x[t]`.
struct Gemv<'a, E> {
    bytes: &'a [u8],
    x: &'a [f32],
    k: usize,
    t: usize,
    out: &'a mut [f32],
    element: E,
}

impl<E: Element> Kernel for Gemv<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let _ = &self.element;
        let rows = self.out.len() / self.t;
        // More rows at a time when tokens are few: eight chains of additions hide the multiplier's latency, and each
        // (row, token) pair keeps its own order whatever the blocking.
        let block = match self.t {
            1 => 4,
            2 => 2,
            _ => 1,
        };
        let mut r = 0;
        while r < rows {
            let full = r + block <= rows;
            let w = &self.bytes[r * self.k * E::SIZE..];
            let to = (&mut *self.out, r, rows);
            // SAFETY: the caller vouches for the instruction set; `block`'s lengths are checked inside.
            unsafe {
                match (self.t, full) {
                    (1, true) => dot_block::<L, E, 4, 1>(w, self.x, self.k, to),
                    (1, false) => dot_block::<L, E, 1, 1>(w, self.x, self.k, to),
                    (2, true) => dot_block::<L, E, 2, 2>(w, self.x, self.k, to),
                    (2, false) => dot_block::<L, E, 1, 2>(w, self.x, self.k, to),
                    (3, _) => dot_block::<L, E, 1, 3>(w, self.x, self.k, to),
                    _ => dot_block::<L, E, 1, 4>(w, self.x, self.k, to),
                }
            }
            r += if full { block } else { 1 };
        }
    }
}

/// R rows times T tokens, written to rows `first ..` of `[T, rows]`.
///
/// # Safety
/// The instruction set of `L` is available.
#[inline(always)]
unsafe fn dot_block<L: Lanes, E: Element, const R: usize, const T: usize>(
    w: &[u8],
    x: &[f32],
    k: usize,
    (out, first, rows): (&mut [f32], usize, usize),
) {
    let (w, x) = (&w[..R * k * E::SIZE], &x[..T * k]);
    // Where these rows' successors are, or further along long rows: R streams of their own confuse the hardware's prefetch.
    let ahead = if k * E::SIZE <= LONG_ROW { R * k * E::SIZE } else { LONG_ROW / 4 };
    // SAFETY: offsets stay below `R · k` elements of `w` and `T · k` of `x`, sliced above.
    unsafe {
        let mut acc = [[[L::splat(0.0); 2]; T]; R];
        let mut i = 0;
        while i + 2 * L::N <= k {
            for s in 0..2 {
                step::<L, E, R, T>(w, x, (k, ahead), i + s * L::N, s, &mut acc);
            }
            i += 2 * L::N;
        }
        if i + L::N <= k {
            step::<L, E, R, T>(w, x, (k, ahead), i, 0, &mut acc);
            i += L::N;
        }
        for r in 0..R {
            for t in 0..T {
                let mut sum = L::sum(L::add(acc[r][t][0], acc[r][t][1]));
                for j in i..k {
                    sum += E::widen(&w[(r * k + j) * E::SIZE..]) * x[t * k + j];
                }
                out[t * rows + first + r] = sum;
            }
        }
    }
}

/// One register of columns at `at`, into chain `s`.
///
/// # Safety
/// As [`dot_block`]; `at + N ≤ k`.
#[inline(always)]
unsafe fn step<L: Lanes, E: Element, const R: usize, const T: usize>(
    w: &[u8],
    x: &[f32],
    (k, ahead): (usize, usize),
    at: usize,
    s: usize,
    acc: &mut [[[L::V; 2]; T]; R],
) {
    // SAFETY: N elements from column `at` exist in each of the R rows of `w` and T rows of `x`.
    unsafe {
        let mut xv = [L::splat(0.0); T];
        for t in 0..T {
            xv[t] = L::load(x.as_ptr().add(t * k + at));
        }
        for r in 0..R {
            let p = w.as_ptr().add((r * k + at) * E::SIZE);
            L::prefetch(p.wrapping_add(ahead));
            let wv = E::lanes::<L>(p);
            for t in 0..T {
                acc[r][t][s] = L::fmadd(wv, xv[t], acc[r][t][s]);
            }
        }
    }
}
