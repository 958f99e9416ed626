//! Decode's product of integer weights: codes in tiles ([`super::tiles`]) times rounded activations ([`super::rounded`]).
//!
//! For every row, in f32, over the blocks in ascending order: `y ← fma(Σ code·x − zero·Σ x, s_w · s_x, y)`; the sums are exact
//! integers. So the result is the same on every instruction set, for any number of threads and any batch, and the only
//! approximation is the rounding of x.

use super::rounded::Rounded;
use super::simd::{Level, Simd};
use super::tiles::{Line, QUAD, SLAB, TILE_ROWS, Tiles, quad};
use half::{bf16, f16};

/// Tokens of a call that fill the registers.
pub const TOKENS: usize = 6;
/// Quads of a slab.
const QUADS: usize = SLAB / QUAD;

/// A scale a row and group, `[tiles, groups, 16]`, in 16 bits where that loses nothing (an eighth less to read at 4 bits and groups
/// of 64).
pub enum Scales {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

impl Scales {
    /// The narrowest form that holds every value.
    pub fn new(values: Vec<f32>) -> Self {
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits();
        if values.iter().all(|v| same(bf16::from_f32(*v).to_f32(), *v)) {
            Scales::Bf16(values.iter().map(|v| bf16::from_f32(*v).to_bits()).collect())
        } else if values.iter().all(|v| same(f16::from_f32(*v).to_f32(), *v)) {
            Scales::F16(values.iter().map(|v| f16::from_f32(*v).to_bits()).collect())
        } else {
            Scales::F32(values)
        }
    }

    /// One of them.
    pub fn at(&self, i: usize) -> f32 {
        match self {
            Scales::F32(v) => v[i],
            Scales::F16(v) => f16::from_bits(v[i]).to_f32(),
            Scales::Bf16(v) => bf16::from_bits(v[i]).to_f32(),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Scales::F32(v) => v.len(),
            Scales::F16(v) | Scales::Bf16(v) => v.len(),
        }
    }

    fn sixteen(&self, at: usize) -> [f32; TILE_ROWS] {
        std::array::from_fn(|r| self.at(at + r))
    }
}

/// A matrix for the product.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub tiles: &'a Tiles,
    pub scales: &'a Scales,
    /// `[tiles, groups, 16]`; `mid` where there are none.
    pub zeros: Option<&'a [u8]>,
    pub mid: u8,
    /// Groups of a row.
    pub groups: usize,
    /// Columns of a group: a multiple of the activations' block.
    pub group_cols: usize,
}

/// Whether the product reads [`Rounded::words`] of this matrix's activations.
pub fn wants_words(simd: Simd, tiles: &Tiles) -> bool {
    tiles.bits == 8 && simd.level() < Level::Vnni && simd.level() >= Level::Avx2
}

/// `out[t][r] = W[first · 16 + r] · x[t]` for `out.len() / t` rows from tile `first` on.
///
/// Panics when shapes and slices disagree: they come from [`super::packed`], not from a file.
pub fn product(simd: Simd, m: Matrix<'_>, x: &Rounded, first: usize, out: &mut [f32]) {
    let t = x.high.len() / x.k.max(1);
    let rows = out.len() / t.max(1);
    let (count, blocks) = (rows.div_ceil(TILE_ROWS), x.k / x.block.max(1));
    assert!(out.len() == rows * t, "tokens");
    assert!(x.k == m.groups * m.group_cols && m.group_cols.is_multiple_of(x.block), "groups");
    assert!(x.block.is_multiple_of(SLAB) && x.k == m.tiles.slabs * SLAB, "slabs");
    assert!(x.low.len() == t * x.k && x.scales.len() == t * blocks && x.sums.len() == t * blocks, "activations");
    assert!(!wants_words(simd, m.tiles) || x.words.len() == t * x.k, "words");
    assert!((first + count) * m.tiles.slabs * m.tiles.bits <= m.tiles.lines.len(), "tiles");
    let cells = (first + count) * m.groups * TILE_ROWS;
    assert!(cells <= m.scales.len() && m.zeros.is_none_or(|z| cells <= z.len()), "scales");
    let mut token = 0;
    while token < t {
        let count = match t - token {
            6.. if simd.level() == Level::Vnni => 6,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let job = Job { m, x, first, rows, token };
        let out = &mut out[token * rows..][..count * rows];
        match m.tiles.bits {
            8 => job.dispatch::<8>(simd, count, out),
            4 => job.dispatch::<4>(simd, count, out),
            3 => job.dispatch::<3>(simd, count, out),
            _ => job.dispatch::<2>(simd, count, out),
        }
        token += count;
    }
}

/// A product whose shapes were checked: tokens from `token` on, rows from tile `first` on.
#[derive(Clone, Copy)]
struct Job<'a> {
    m: Matrix<'a>,
    x: &'a Rounded,
    first: usize,
    rows: usize,
    token: usize,
}

impl Job<'_> {
    fn dispatch<const BITS: usize>(self, simd: Simd, count: usize, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Simd` holds only levels that this machine has; `product` checked the shapes, and `out` holds `count` tokens.
        unsafe {
            match (simd.level(), count) {
                (Level::Vnni, 1) => return x86::rows_vnni::<BITS, 1, 1, 2>(self, out),
                (Level::Vnni, 2) => return x86::rows_vnni::<BITS, 2, 2, 1>(self, out),
                (Level::Vnni, 4) => return x86::rows_vnni::<BITS, 4, 2, 1>(self, out),
                (Level::Vnni, _) => return x86::rows_vnni::<BITS, 6, 2, 1>(self, out),
                (Level::Avx2 | Level::Avx512, 1) => return x86::rows_avx2::<BITS, 1>(self, out),
                (Level::Avx2 | Level::Avx512, 2) => return x86::rows_avx2::<BITS, 2>(self, out),
                (Level::Avx2 | Level::Avx512, _) => return x86::rows_avx2::<BITS, 4>(self, out),
                (Level::Portable, _) => {}
            }
        }
        let _ = simd;
        self.portable::<BITS>(count, out);
    }

    /// The scalar twin, and the definition.
    fn portable<const BITS: usize>(self, count: usize, out: &mut [f32]) {
        let Self { m, x, first, rows, token } = self;
        let (slabs_of_block, blocks) = (x.block / SLAB, x.k / x.block);
        for (token, out) in (token..token + count).zip(out.chunks_mut(rows.max(1))) {
            for (i, out) in out.chunks_mut(TILE_ROWS).enumerate() {
                let tile = first + i;
                let mut acc = [0f32; TILE_ROWS];
                for b in 0..blocks {
                    let mut sum = [0i32; TILE_ROWS];
                    for s in b * slabs_of_block..(b + 1) * slabs_of_block {
                        let slab = &m.tiles.tile(tile)[s * BITS..][..BITS];
                        for q in 0..QUADS {
                            let at = token * x.k + s * SLAB + q * QUAD;
                            let v: [i32; QUAD] =
                                std::array::from_fn(|j| i32::from(x.high[at + j]) * 128 + i32::from(x.low[at + j]));
                            for (sum, word) in sum.iter_mut().zip(quad::<BITS>(slab, q)) {
                                let c = word.to_le_bytes();
                                *sum += (0..QUAD).map(|j| i32::from(c[j]) * v[j]).sum::<i32>();
                            }
                        }
                    }
                    let at = (tile * m.groups + b * x.block / m.group_cols) * TILE_ROWS;
                    let scales = m.scales.sixteen(at);
                    let (total, scale) = (x.sums[token * blocks + b], x.scales[token * blocks + b]);
                    for r in 0..TILE_ROWS {
                        let zero = i32::from(m.zeros.map_or(m.mid, |z| z[at + r]));
                        acc[r] = ((sum[r] - zero * total) as f32).mul_add(scales[r] * scale, acc[r]);
                    }
                }
                out.copy_from_slice(&acc[..out.len()]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// Lines fetched ahead of their use: the hardware's own prefetch stops at page ends and starts anew at each.
    const AHEAD: usize = 32;

    /// # Safety
    /// `p` has 64 bytes a line of the slab; the instruction set is that of the caller.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn quad_512<const BITS: usize>(p: *const Line, q: usize) -> __m512i {
        // SAFETY: lines `q / 2`, `q / 4` or 2 are within the slab's BITS lines.
        unsafe {
            let line = |i: usize| _mm512_load_si512(p.add(i).cast());
            let shifted = |v: __m512i, by: usize| _mm512_srl_epi16(v, _mm_cvtsi32_si128(by as i32));
            match BITS {
                8 => line(q),
                4 => _mm512_and_si512(shifted(line(q / 2), 4 * (q % 2)), _mm512_set1_epi8(15)),
                3 => {
                    let low = _mm512_and_si512(shifted(line(q / 4), 2 * (q % 4)), _mm512_set1_epi8(3));
                    let high = _mm512_and_si512(shifted(line(2), q), _mm512_set1_epi8(1));
                    _mm512_or_si512(low, _mm512_slli_epi16::<2>(high))
                }
                _ => _mm512_and_si512(shifted(line(q / 4), 2 * (q % 4)), _mm512_set1_epi8(3)),
            }
        }
    }

    /// # Safety
    /// Sixteen scales exist from `at`; AVX-512F and F16C.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn scales_512(scales: &Scales, at: usize) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe {
            match scales {
                Scales::F32(v) => _mm512_loadu_ps(v.as_ptr().add(at)),
                Scales::F16(v) => _mm512_cvtph_ps(_mm256_loadu_si256(v.as_ptr().add(at).cast())),
                Scales::Bf16(v) => {
                    let raw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(v.as_ptr().add(at).cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw))
                }
            }
        }
    }

    /// T tokens times all rows, R tiles at a time.
    ///
    /// # Safety
    /// AVX-512 F, BW and VNNI; shapes as [`product`] checks them; `out` holds T tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub unsafe fn rows_vnni<const BITS: usize, const T: usize, const R: usize, const C: usize>(
        job: Job<'_>,
        out: &mut [f32],
    ) {
        let count = job.rows.div_ceil(TILE_ROWS);
        let mut i = 0;
        // SAFETY: the caller's contract; tiles `i .. i + R` are among the rows.
        unsafe {
            while i + R <= count {
                tiles_vnni::<BITS, T, R, C>(job, i, out);
                i += R;
            }
            while i < count {
                tiles_vnni::<BITS, T, 1, C>(job, i, out);
                i += 1;
            }
        }
    }

    /// R tiles from the `i`-th on; C chains a sum: with one token a single one would wait for its own additions.
    ///
    /// # Safety
    /// As [`rows_vnni`]; tiles `i .. i + R` are among the rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn tiles_vnni<const BITS: usize, const T: usize, const R: usize, const C: usize>(
        job: Job<'_>,
        i: usize,
        out: &mut [f32],
    ) {
        let Job { m, x, first, rows, token } = job;
        let (slabs_of_block, blocks, tile) = (x.block / SLAB, x.k / x.block, first + i);
        let stride = m.tiles.slabs * BITS;
        // SAFETY: a tile has `slabs · BITS` lines; quad `q` of slab `s` meets columns `32 s + 4 q ..` of each of T rows of k
        // activations from `token` on; block `b` has one scale and one sum a token, group `b · block / group_cols` sixteen scales (and
        // zero points) a tile; all as checked by `product`.
        unsafe {
            let (high, low) = (x.high.as_ptr().add(token * x.k), x.low.as_ptr().add(token * x.k));
            let (scale, total) = (x.scales.as_ptr().add(token * blocks), x.sums.as_ptr().add(token * blocks));
            let mut p = m.tiles.lines.as_ptr().add(tile * stride);
            let mut acc = [[_mm512_setzero_ps(); R]; T];
            for b in 0..blocks {
                let group = b * x.block / m.group_cols;
                let cell = |r: usize| ((tile + r) * m.groups + group) * TILE_ROWS;
                let mut h = [[[_mm512_setzero_si512(); C]; R]; T];
                let mut l = [[[_mm512_setzero_si512(); C]; R]; T];
                // The sums start from what the zero points take off.
                for t in 0..T {
                    let total = (*total.add(t * blocks + b)).wrapping_neg();
                    for r in 0..R {
                        l[t][r][0] = match m.zeros {
                            None => _mm512_set1_epi32(total.wrapping_mul(i32::from(m.mid))),
                            Some(z) => {
                                let z = _mm512_cvtepu8_epi32(_mm_loadu_si128(z.as_ptr().add(cell(r)).cast()));
                                _mm512_mullo_epi32(z, _mm512_set1_epi32(total))
                            }
                        };
                    }
                }
                for s in b * slabs_of_block..(b + 1) * slabs_of_block {
                    if T == 1 {
                        for line in 0..BITS * R {
                            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + line).cast());
                        }
                    }
                    for q in 0..QUADS {
                        let mut codes = [_mm512_setzero_si512(); R];
                        for r in 0..R {
                            codes[r] = quad_512::<BITS>(p.add(r * stride), q);
                        }
                        for t in 0..T {
                            let at = t * x.k + s * SLAB + q * QUAD;
                            let xh = _mm512_set1_epi32(high.add(at).cast::<i32>().read_unaligned());
                            let xl = _mm512_set1_epi32(low.add(at).cast::<i32>().read_unaligned());
                            for r in 0..R {
                                h[t][r][q % C] = _mm512_dpbusd_epi32(h[t][r][q % C], codes[r], xh);
                                l[t][r][q % C] = _mm512_dpbusd_epi32(l[t][r][q % C], codes[r], xl);
                            }
                        }
                    }
                    p = p.add(BITS);
                }
                for r in 0..R {
                    let scales = scales_512(m.scales, cell(r));
                    for t in 0..T {
                        let (mut high, mut sum) = (h[t][r][0], l[t][r][0]);
                        for c in 1..C {
                            high = _mm512_add_epi32(high, h[t][r][c]);
                            sum = _mm512_add_epi32(sum, l[t][r][c]);
                        }
                        let value = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<7>(high), sum));
                        let factor = _mm512_mul_ps(scales, _mm512_set1_ps(*scale.add(t * blocks + b)));
                        acc[t][r] = _mm512_fmadd_ps(value, factor, acc[t][r]);
                    }
                }
            }
            for r in 0..R {
                let from = (i + r) * TILE_ROWS;
                let mask = if rows - from >= TILE_ROWS { u16::MAX } else { (1u16 << (rows - from)) - 1 };
                for t in 0..T {
                    _mm512_mask_storeu_ps(out.as_mut_ptr().add(t * rows + from), mask, acc[t][r]);
                }
            }
        }
    }

    /// Half `half` (eight rows) of quad `q`.
    ///
    /// # Safety
    /// As [`quad_512`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn quad_256<const BITS: usize>(p: *const Line, q: usize, half: usize) -> __m256i {
        // SAFETY: as in `quad_512`; a line has two halves.
        unsafe {
            let line = |i: usize| _mm256_load_si256(p.add(i).cast::<__m256i>().add(half));
            let shifted = |v: __m256i, by: usize| _mm256_srl_epi16(v, _mm_cvtsi32_si128(by as i32));
            match BITS {
                8 => line(q),
                4 => _mm256_and_si256(shifted(line(q / 2), 4 * (q % 2)), _mm256_set1_epi8(15)),
                3 => {
                    let low = _mm256_and_si256(shifted(line(q / 4), 2 * (q % 4)), _mm256_set1_epi8(3));
                    let high = _mm256_and_si256(shifted(line(2), q), _mm256_set1_epi8(1));
                    _mm256_or_si256(low, _mm256_slli_epi16::<2>(high))
                }
                _ => _mm256_and_si256(shifted(line(q / 4), 2 * (q % 4)), _mm256_set1_epi8(3)),
            }
        }
    }

    /// # Safety
    /// Eight scales exist from `at`; AVX2 and F16C.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales_256(scales: &Scales, at: usize) -> __m256 {
        // SAFETY: the caller's contract.
        unsafe {
            match scales {
                Scales::F32(v) => _mm256_loadu_ps(v.as_ptr().add(at)),
                Scales::F16(v) => _mm256_cvtph_ps(_mm_loadu_si128(v.as_ptr().add(at).cast())),
                Scales::Bf16(v) => {
                    let raw = _mm256_cvtepu16_epi32(_mm_loadu_si128(v.as_ptr().add(at).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(raw))
                }
            }
        }
    }

    /// Σ of one slab's codes times the activations of T tokens from `at` on, added to `sum`.
    ///
    /// # Safety
    /// As [`rows_avx2`]; `p` is the slab, `at` the first token's element of its first column.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn slab_256<const BITS: usize, const T: usize>(
        x: &Rounded,
        p: *const Line,
        at: usize,
        sum: &mut [[__m256i; 2]; T],
    ) {
        // SAFETY: 32 columns from `at` exist in each of the T rows of k activations; the slab has BITS lines.
        unsafe {
            if BITS == 8 {
                // A byte times a word: the even bytes of a lane, then the odd ones.
                let even = _mm256_set1_epi16(255);
                for q in 0..QUADS {
                    for half in 0..2 {
                        let codes = quad_256::<BITS>(p, q, half);
                        let (a, b) = (_mm256_and_si256(codes, even), _mm256_srli_epi16::<8>(codes));
                        for t in 0..T {
                            let w = x.words.as_ptr().add(t * x.k + at + q * QUAD).cast::<i32>();
                            let (xa, xb) = (w.read_unaligned(), w.add(1).read_unaligned());
                            let pair = _mm256_add_epi32(
                                _mm256_madd_epi16(a, _mm256_set1_epi32(xa)),
                                _mm256_madd_epi16(b, _mm256_set1_epi32(xb)),
                            );
                            sum[t][half] = _mm256_add_epi32(sum[t][half], pair);
                        }
                    }
                }
                return;
            }
            let ones = _mm256_set1_epi16(1);
            for half in 0..2 {
                // Eight quads of at most 2 · 15 · 127 stay below 2^15.
                let mut high = [_mm256_setzero_si256(); T];
                let mut low = [_mm256_setzero_si256(); T];
                for q in 0..QUADS {
                    let codes = quad_256::<BITS>(p, q, half);
                    for t in 0..T {
                        let c = t * x.k + at + q * QUAD;
                        let xh = _mm256_set1_epi32(x.high.as_ptr().add(c).cast::<i32>().read_unaligned());
                        let xl = _mm256_set1_epi32(x.low.as_ptr().add(c).cast::<i32>().read_unaligned());
                        high[t] = _mm256_add_epi16(high[t], _mm256_maddubs_epi16(codes, xh));
                        low[t] = _mm256_add_epi16(low[t], _mm256_maddubs_epi16(codes, xl));
                    }
                }
                for t in 0..T {
                    let h = _mm256_slli_epi32::<7>(_mm256_madd_epi16(high[t], ones));
                    let both = _mm256_add_epi32(h, _mm256_madd_epi16(low[t], ones));
                    sum[t][half] = _mm256_add_epi32(sum[t][half], both);
                }
            }
        }
    }

    /// # Safety
    /// AVX2, FMA and F16C; shapes as [`product`] checks them; `out` holds T tokens.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn rows_avx2<const BITS: usize, const T: usize>(job: Job<'_>, out: &mut [f32]) {
        let Job { m, x, first, rows, token } = job;
        let (slabs_of_block, blocks) = (x.block / SLAB, x.k / x.block);
        // SAFETY: as in `tiles_vnni`.
        unsafe {
            for i in 0..rows.div_ceil(TILE_ROWS) {
                let tile = first + i;
                let mut p = m.tiles.lines.as_ptr().add(tile * m.tiles.slabs * BITS);
                let mut acc = [[_mm256_setzero_ps(); 2]; T];
                for b in 0..blocks {
                    let mut sum = [[_mm256_setzero_si256(); 2]; T];
                    for s in b * slabs_of_block..(b + 1) * slabs_of_block {
                        for line in 0..BITS {
                            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + line).cast());
                        }
                        slab_256::<BITS, T>(x, p, token * x.k + s * SLAB, &mut sum);
                        p = p.add(BITS);
                    }
                    for half in 0..2 {
                        let at = (tile * m.groups + b * x.block / m.group_cols) * TILE_ROWS + 8 * half;
                        let scales = scales_256(m.scales, at);
                        let zeros = match m.zeros {
                            None => _mm256_set1_epi32(i32::from(m.mid)),
                            Some(z) => _mm256_cvtepu8_epi32(_mm_loadl_epi64(z.as_ptr().add(at).cast())),
                        };
                        for t in 0..T {
                            let total = *x.sums.as_ptr().add((token + t) * blocks + b);
                            let scale = *x.scales.as_ptr().add((token + t) * blocks + b);
                            let shift = _mm256_mullo_epi32(zeros, _mm256_set1_epi32(total));
                            let value = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum[t][half], shift));
                            let factor = _mm256_mul_ps(scales, _mm256_set1_ps(scale));
                            acc[t][half] = _mm256_fmadd_ps(value, factor, acc[t][half]);
                        }
                    }
                }
                let from = i * TILE_ROWS;
                for t in 0..T {
                    let mut row = [0f32; TILE_ROWS];
                    _mm256_storeu_ps(row.as_mut_ptr(), acc[t][0]);
                    _mm256_storeu_ps(row.as_mut_ptr().add(8), acc[t][1]);
                    let count = TILE_ROWS.min(rows - from);
                    out[t * rows + from..][..count].copy_from_slice(&row[..count]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: &mut u64) -> f32 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Every width, grouping, number of tokens and instruction set, against sums in f64 and bit for bit against the twin.
    #[test]
    fn every_instruction_set_gives_the_twins_bits() {
        let mut seed = 3;
        for bits in [2u8, 3, 4, 8] {
            for (rows, k, group, asymmetric) in [(33, 192, 64, false), (16, 96, 32, true), (50, 256, 128, true)] {
                let codes: Vec<u8> =
                    (0..rows * k).map(|_| ((noise(&mut seed) + 1.0) * f32::from(1u16 << (bits - 1))) as u8).collect();
                let words = crate::pack::pack_rows(&codes, rows, k, bits).unwrap();
                let stream: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                let tiles = Tiles::new(&stream, (rows, k), bits, crate::pack::words_for(k, bits) * 4, None).unwrap();
                let cells = rows.div_ceil(TILE_ROWS) * (k / group) * TILE_ROWS;
                let values: Vec<f32> = (0..cells).map(|_| bf16::from_f32(noise(&mut seed)).to_f32()).collect();
                let zeros: Vec<u8> = (0..cells).map(|i| (i % (1 << bits)) as u8).collect();
                for scales in [Scales::new(values.clone()), Scales::F32(values.clone())] {
                    let m = Matrix {
                        tiles: &tiles,
                        scales: &scales,
                        zeros: asymmetric.then_some(&zeros[..]),
                        mid: 1 << (bits - 1),
                        groups: k / group,
                        group_cols: group,
                    };
                    for t in [1, 2, 3, 4, 6, 7, 13] {
                        let x: Vec<f32> = (0..t * k).map(|_| noise(&mut seed)).collect();
                        let block = super::super::rounded::block_of(group);
                        let mut twin = vec![0f32; rows * t];
                        let none = Simd::up_to(Level::Portable);
                        product(none, m, &Rounded::new(none, &x, k, block, false), 0, &mut twin);
                        for level in [Level::Avx2, Level::Avx512, Level::Vnni] {
                            let simd = Simd::up_to(level);
                            let rounded = Rounded::new(simd, &x, k, block, wants_words(simd, &tiles));
                            let mut out = vec![0f32; rows * t];
                            product(simd, m, &rounded, 0, &mut out);
                            assert_eq!(out, twin, "{level:?} {bits} bits, {rows}×{k}, {t} tokens");
                            if rows > TILE_ROWS {
                                let tail = rows - TILE_ROWS;
                                let mut last = vec![0f32; tail * t];
                                product(simd, m, &rounded, 1, &mut last);
                                for token in 0..t {
                                    assert_eq!(last[token * tail..][..tail], out[token * rows + TILE_ROWS..][..tail]);
                                }
                            }
                        }
                        for (i, y) in twin.iter().enumerate() {
                            let (token, r) = (i / rows, i % rows);
                            let (mut want, mut size) = (0f64, 0f64);
                            for c in 0..k {
                                let at = (r / TILE_ROWS * m.groups + c / group) * TILE_ROWS + r % TILE_ROWS;
                                let zero = f64::from(if asymmetric { zeros[at] } else { m.mid });
                                let w = f64::from(values[at]) * (f64::from(codes[r * k + c]) - zero);
                                want += w * f64::from(x[token * k + c]);
                                size += w.abs();
                            }
                            assert!((f64::from(*y) - want).abs() <= size * 4e-5, "{y} {want} {size}");
                        }
                    }
                }
            }
        }
    }
}
