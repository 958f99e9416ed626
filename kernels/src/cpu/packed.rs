//! Integer weights.
//!
//! 4- and 8-bit words are used as given, without a copy. Other widths, and any weight with a column → group table,
//! are unpacked at upload to one byte a code: those formats save disk, not memory traffic, on this backend.
//!
//! Decode: codes times x are summed per group, then `y += scale · (Σ code·x − zero · Σ x)`, so the inner loop has no multiplication by
//! the scale. Prefill: panels dequantized to f32 (see [`super::product`]).

use std::ops::Range;

use rayon::prelude::*;

use super::int8::{self, Int8Rows};
use super::product;
use super::simd::{Kernel, Lanes, Simd};
use crate::backend::{Bytes, PackedWeight};
use crate::error::{KernelError, Result, check_len};
use crate::pack::words_for;

enum Codes {
    /// Two codes a byte, `[rows, cols/2]` (row stride in whole words).
    Nibbles(Bytes),
    /// One code a byte, row stride in whole words.
    Bytes(Bytes),
}

/// Codes and their scales on this backend.
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    group_cols: usize,
    groups: usize,
    mid: u8,
    codes: Codes,
    row_stride: usize,
    scales: Vec<f32>,
    zeros: Option<Vec<u8>>,
    group_index: Option<Vec<u32>>,
}

impl PackedMatrix {
    /// Checks every length and chooses the layout.
    pub fn new(w: &PackedWeight) -> Result<Self> {
        let (rows, cols, bits) = (w.out_features, w.in_features, w.scheme.bits);
        check_weight(w)?;
        let stride = words_for(cols, bits) * 4;
        let (codes, row_stride) = match (bits, &w.group_index) {
            (4, None) => (Codes::Nibbles(w.words.clone()), stride),
            (8, None) => (Codes::Bytes(w.words.clone()), stride),
            _ => (Codes::Bytes(Bytes::from_vec(unpack(w.words.as_slice(), rows, cols, bits, stride))), cols),
        };
        Ok(Self {
            rows,
            cols,
            group_cols: w.scheme.group_cols(cols),
            groups: w.scheme.groups(cols)?,
            mid: w.scheme.mid_code(),
            codes,
            row_stride,
            scales: w.scales.clone(),
            zeros: w.zeros.clone(),
            group_index: w.group_index.clone(),
        })
    }

    fn zero(&self, at: usize) -> u8 {
        self.zeros.as_ref().map_or(self.mid, |z| z[at])
    }

    /// Rows as f32 `[rows, cols]`: `scale · (code − zero)`; `rows` within the matrix.
    pub fn widen(&self, simd: Simd, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols.max(1))) {
            let at = row * self.row_stride;
            let base = row * self.groups;
            match (&self.codes, &self.group_index) {
                (Codes::Bytes(b), Some(index)) => {
                    let codes = &b.as_slice()[at..at + self.cols];
                    for ((o, code), g) in out.iter_mut().zip(codes).zip(index) {
                        let cell = base + *g as usize;
                        *o = (f32::from(*code) - f32::from(self.zero(cell))) * self.scales[cell];
                    }
                }
                (codes, _) => {
                    let (bytes, nibbles) = match codes {
                        Codes::Nibbles(b) => (b, true),
                        Codes::Bytes(b) => (b, false),
                    };
                    simd.run(WidenRow {
                        m: self,
                        bytes: &bytes.as_slice()[at..at + self.row_stride],
                        nibbles,
                        base,
                        out,
                    });
                }
            }
        }
    }

    /// `y = x Wᵀ` for many tokens: x `[t, cols]`, y `[t, rows]`.
    pub fn panels(&self, simd: Simd, x: &[f32], t: usize, y: &mut [f32]) -> Result<()> {
        check_len("x", t * self.cols, x.len())?;
        product::linear(simd, y, x, (t, self.rows, self.cols), |rows, out| self.widen(simd, rows, out))
    }

    /// Whether few tokens have a loop of their own; else they go through panels too.
    pub fn has_rows(&self) -> bool {
        // The group kernels step whole registers of 16 lanes over nibble pairs, hence 32.
        self.group_index.is_none() && self.group_cols.is_multiple_of(32)
    }

    /// Activations in the form the row loops read; `exact` keeps them in f32.
    pub fn prepare(&self, simd: Simd, x: &[f32], exact: bool) -> Prepared {
        let nibbles = matches!(self.codes, Codes::Nibbles(_));
        // One-byte codes count from 128 there, so the zero point must be the middle.
        let int8 = !exact
            && int8::available()
            && self.group_cols.is_multiple_of(int8::BLOCK)
            && (nibbles || (self.mid == 128 && self.zeros.is_none()));
        if int8 {
            return Prepared::Int8(Int8Rows::new(x, self.cols, self.group_cols, nibbles));
        }
        let sums = x.chunks_exact(self.group_cols).map(|g| simd.run(Sum(g))).collect();
        if !nibbles {
            return Prepared::Float { x: x.to_vec(), sums };
        }
        // Byte j holds columns 2j and 2j+1: with x parted the same way, a register of low nibbles meets a plain load of
        // the even columns.
        let half = self.cols / 2;
        let mut parted = vec![0f32; x.len()];
        for (row, x) in parted.chunks_exact_mut(self.cols).zip(x.chunks_exact(self.cols)) {
            let (even, odd) = row.split_at_mut(half);
            for ((pair, e), o) in x.chunks_exact(2).zip(even).zip(odd) {
                (*e, *o) = (pair[0], pair[1]);
            }
        }
        Prepared::Float { x: parted, sums }
    }

    /// Whether two matrices read the same [`Prepared`].
    pub fn shares(&self, other: &Self) -> bool {
        let kind = |m: &Self| (matches!(m.codes, Codes::Nibbles(_)), m.cols, m.group_cols, m.mid, m.zeros.is_some());
        kind(self) == kind(other)
    }

    /// `out[r][t] = W[r] · x[t]` for some rows and few tokens; out `[rows, t]`.
    pub fn rows(&self, simd: Simd, x: &Prepared, t: usize, rows: Range<usize>, out: &mut [f32]) {
        let (bytes, nibbles) = match &self.codes {
            Codes::Nibbles(b) => (b.as_slice(), true),
            Codes::Bytes(b) => (b.as_slice(), false),
        };
        match x {
            Prepared::Int8(x) => {
                let codes = int8::Codes {
                    bytes,
                    stride: self.row_stride,
                    scales: &self.scales,
                    groups: self.groups,
                    group_cols: self.group_cols,
                    nibbles,
                };
                let done = int8::gemv(codes, x, rows.clone(), out);
                debug_assert!(done, "prepare chose int8 for a shape it does not take");
                if nibbles {
                    for (i, row) in rows.enumerate() {
                        let cells = row * self.groups..(row + 1) * self.groups;
                        for token in 0..t {
                            let sums = &x.sums[token * self.groups..(token + 1) * self.groups];
                            out[i * t + token] -= shift(self, cells.clone(), sums);
                        }
                    }
                }
            }
            Prepared::Float { x, sums } if nibbles => {
                simd.run(GroupGemv::<true> { m: self, bytes, first: rows.start, x, sums, t, out });
            }
            Prepared::Float { x, sums } => {
                simd.run(GroupGemv::<false> { m: self, bytes, first: rows.start, x, sums, t, out });
            }
        }
    }
}

/// Activations for the row loops.
pub enum Prepared {
    /// f32, parted into even and odd columns for 4-bit codes, with the sums of each group.
    Float { x: Vec<f32>, sums: Vec<f32> },
    /// Rounded to int8.
    Int8(Int8Rows),
}

fn check_weight(w: &PackedWeight) -> Result<()> {
    let (rows, cols, bits) = (w.out_features, w.in_features, w.scheme.bits);
    if !(1..=8).contains(&bits) {
        let why = format!("{bits}-bit codes");
        return Err(KernelError::Unsupported { backend: "cpu", op: "upload_weight", why });
    }
    let groups = w.scheme.groups(cols)?;
    let bytes = words_for(cols, bits).checked_mul(4).and_then(|n| n.checked_mul(rows));
    check_len("packed bytes", bytes.ok_or(KernelError::Overflow("packed bytes"))?, w.words.as_slice().len())?;
    check_len("scales", rows * groups, w.scales.len())?;
    if let Some(z) = &w.zeros {
        check_len("zero points", rows * groups, z.len())?;
    }
    if let Some(index) = &w.group_index {
        check_len("g_idx", cols, index.len())?;
        if let Some(bad) = index.iter().find(|g| **g as usize >= groups) {
            return Err(KernelError::Length { what: "g_idx group", expected: groups, found: *bad as usize });
        }
    }
    Ok(())
}

/// One byte a code, `[rows, cols]`. A little-endian word stream is a byte stream with the same bit order.
fn unpack(bytes: &[u8], rows: usize, cols: usize, bits: u8, stride: usize) -> Vec<u8> {
    let mut out = vec![0u8; rows * cols];
    let mask = (1u32 << bits) - 1;
    out.par_chunks_mut(cols.max(1)).zip(bytes.par_chunks(stride.max(1))).for_each(|(out, src)| {
        for (i, o) in out.iter_mut().enumerate() {
            let bit = i * bits as usize;
            let low = u32::from(src[bit / 8]);
            let high = u32::from(src.get(bit / 8 + 1).copied().unwrap_or(0));
            *o = (((low | high << 8) >> (bit % 8)) & mask) as u8;
        }
    });
    out
}

struct WidenRow<'a> {
    m: &'a PackedMatrix,
    bytes: &'a [u8],
    nibbles: bool,
    base: usize,
    out: &'a mut [f32],
}

impl Kernel for WidenRow<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let Self { m, bytes, nibbles, base, out } = self;
        for (g, out) in out.chunks_exact_mut(m.group_cols).enumerate() {
            let (scale, zero) = (m.scales[base + g], f32::from(m.zero(base + g)));
            let first = g * m.group_cols;
            if nibbles && first.is_multiple_of(2) {
                let pairs = &bytes[first / 2..];
                let (head, odd) = out.as_chunks_mut::<2>();
                for (pair, b) in head.iter_mut().zip(pairs) {
                    *pair = [(f32::from(b & 15) - zero) * scale, (f32::from(b >> 4) - zero) * scale];
                }
                if let [last] = odd {
                    *last = (f32::from(pairs[head.len()] & 15) - zero) * scale;
                }
            } else if nibbles {
                for (i, o) in out.iter_mut().enumerate() {
                    let col = first + i;
                    *o = (f32::from((bytes[col / 2] >> (col % 2 * 4)) & 15) - zero) * scale;
                }
            } else {
                for (o, b) in out.iter_mut().zip(&bytes[first..]) {
                    *o = (f32::from(*b) - zero) * scale;
                }
            }
        }
    }
}

/// Sum of a slice whose length is a multiple of 16.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        // SAFETY: chunks are exactly N long; the caller vouches for the instruction set.
        unsafe {
            let mut acc = L::splat(0.0);
            for c in self.0.chunks_exact(L::N) {
                acc = L::add(acc, L::load(c.as_ptr()));
            }
            L::sum(acc)
        }
    }
}

/// `out[r][t] = W[first + r] · x[t]`; x parted into even and odd columns when `NIBBLES`; sums `[t, groups]`.
struct GroupGemv<'a, const NIBBLES: bool> {
    m: &'a PackedMatrix,
    bytes: &'a [u8],
    first: usize,
    x: &'a [f32],
    sums: &'a [f32],
    t: usize,
    out: &'a mut [f32],
}

impl<const NIBBLES: bool> Kernel for GroupGemv<'_, NIBBLES> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let rows = self.out.len() / self.t;
        // As in the dense loop: more rows at a time when tokens are few, the same order of additions for each pair.
        let block = match self.t {
            1 => 4,
            2 => 2,
            _ => 1,
        };
        let mut r = 0;
        while r < rows {
            let full = r + block <= rows;
            // SAFETY: the caller vouches for the instruction set; the blocks check their own ranges.
            unsafe {
                match (self.t, full) {
                    (1, true) => self.block::<L, 4, 1>(r),
                    (1, false) => self.block::<L, 1, 1>(r),
                    (2, true) => self.block::<L, 2, 2>(r),
                    (2, false) => self.block::<L, 1, 2>(r),
                    (3, _) => self.block::<L, 1, 3>(r),
                    _ => self.block::<L, 1, 4>(r),
                }
            }
            r += if full { block } else { 1 };
        }
    }
}

impl<const NIBBLES: bool> GroupGemv<'_, NIBBLES> {
    /// # Safety
    /// The instruction set of `L` is available; `group_cols` is a multiple of 32.
    #[inline(always)]
    unsafe fn block<L: Lanes, const R: usize, const T: usize>(&mut self, r0: usize) {
        let m = self.m;
        let (k, groups, stride, row) = (m.cols, m.groups, m.row_stride, self.first + r0);
        let x = &self.x[..T * k];
        let codes = &self.bytes[row * stride..(row + R) * stride];
        let scales = &m.scales[row * groups..(row + R) * groups];
        // Bytes of 32 columns; a fixed inner count of steps is unrolled, a count from the group size is not.
        let span = if NIBBLES { 16 } else { 32 };
        let mut total = [[0f32; T]; R];
        // SAFETY: a row has `stride` bytes of codes for its k columns (k or k/2 of them read, one byte a lane), x has
        // T rows of k, and N divides `span`, so every offset stays inside the slices above.
        unsafe {
            let mut sum = [[L::splat(0.0); T]; R];
            let mut byte = 0;
            for g in 0..groups {
                let mut acc = [[L::splat(0.0); T]; R];
                for _ in 0..m.group_cols / 32 {
                    for step in 0..span / L::N {
                        let at = byte + step * L::N;
                        for r in 0..R {
                            let p = codes.as_ptr().add(r * stride + at);
                            self.step::<L, T>(p, x.as_ptr().add(at), &mut acc[r]);
                        }
                    }
                    byte += span;
                }
                for r in 0..R {
                    let scale = L::splat(*scales.as_ptr().add(r * groups + g));
                    for t in 0..T {
                        sum[r][t] = L::fmadd(scale, acc[r][t], sum[r][t]);
                    }
                }
            }
            for r in 0..R {
                for t in 0..T {
                    total[r][t] = L::sum(sum[r][t]);
                }
            }
        }
        for r in 0..R {
            let cells = (row + r) * groups..(row + r + 1) * groups;
            for t in 0..T {
                let shift = shift(m, cells.clone(), &self.sums[t * groups..(t + 1) * groups]);
                self.out[(r0 + r) * T + t] = total[r][t] - shift;
            }
        }
    }

    /// N bytes of codes at `p` times the columns of each token, the first token's at `x`.
    ///
    /// # Safety
    /// As [`Self::block`], which chooses the pointers.
    #[inline(always)]
    unsafe fn step<L: Lanes, const T: usize>(&self, p: *const u8, x: *const f32, acc: &mut [L::V; T]) {
        let k = self.m.cols;
        // SAFETY: `block` keeps N bytes at `p` and N columns of each of T tokens (in both halves of a parted x) in
        // bounds.
        unsafe {
            if NIBBLES {
                let (low, high) = L::load_nibbles(p);
                for t in 0..T {
                    acc[t] = L::fmadd(low, L::load(x.add(t * k)), acc[t]);
                    acc[t] = L::fmadd(high, L::load(x.add(t * k + k / 2)), acc[t]);
                }
            } else {
                let wide = L::load_u8(p);
                for t in 0..T {
                    acc[t] = L::fmadd(wide, L::load(x.add(t * k)), acc[t]);
                }
            }
        }
    }
}

/// `Σ scale · zero · Σx` over the groups of one row, in eight chains.
#[inline(always)]
fn shift(m: &PackedMatrix, cells: Range<usize>, sums: &[f32]) -> f32 {
    let scales = &m.scales[cells.clone()];
    let mut acc = [0f32; 8];
    match &m.zeros {
        None => {
            for (s, x) in scales.chunks(8).zip(sums.chunks(8)) {
                for (a, (s, x)) in acc.iter_mut().zip(s.iter().zip(x)) {
                    *a += s * x;
                }
            }
            acc.iter().sum::<f32>() * f32::from(m.mid)
        }
        Some(zeros) => {
            let zeros = &zeros[cells];
            for ((s, z), x) in scales.chunks(8).zip(zeros.chunks(8)).zip(sums.chunks(8)) {
                for (a, ((s, z), x)) in acc.iter_mut().zip(s.iter().zip(z).zip(x)) {
                    *a += s * f32::from(*z) * x;
                }
            }
            acc.iter().sum()
        }
    }
}
