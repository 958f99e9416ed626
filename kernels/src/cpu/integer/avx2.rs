//! The product by AVX2, in two forms that both make sixteen products an instruction of the multiplier.
//!
//! Pairs of words add up in 32 bits until the end of a block, and up to eight tokens share a pair of codes once it is unpacked. Bytes, high
//! and low, take fewer instructions to unpack but must be widened every slab: the better form for one token.

use std::arch::asm;
use std::arch::x86_64::*;

use super::*;
use crate::cpu::tiles::Line;

/// Half `half` (eight rows) of quad `q`, of codes of less than eight bits.
///
/// # Safety
/// `p` is a slab of BITS lines; AVX2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quad_256<const BITS: usize>(p: *const Line, q: usize, half: usize) -> __m256i {
    // SAFETY: lines `q / 2`, `q / 4` or 2 are within the slab's BITS lines, each of two halves.
    unsafe {
        let line = |i: usize| _mm256_load_si256(p.add(i).cast::<__m256i>().add(half));
        let shifted = |v: __m256i, by: usize| _mm256_srl_epi16(v, _mm_cvtsi32_si128(by as i32));
        match BITS {
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

/// `v`, of which the compiler knows nothing: sums that it regroups, as integers allow, take more registers than there are.
///
/// # Safety
/// AVX2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn as_is(mut v: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags)) };
    v
}

/// Activations beside codes: T tokens in the form of [`Values`].
///
/// # Safety
/// AVX2; `slab` has BITS lines; columns `32 s ..` of T tokens exist; H halves of a tile from `half` on are at most two.
pub unsafe trait Slabs: Copy {
    /// Adds slab `s` of H halves of a tile, times T tokens, to `sums`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn add<const BITS: usize, const T: usize, const H: usize>(
        self,
        slab: *const Line,
        half: usize,
        s: usize,
        sums: &mut [[__m256i; T]; H],
    );
}

/// [`Values::Pairs`] of `stride` tokens, from `token` on.
#[derive(Clone, Copy)]
pub struct Pairs<'a> {
    pub x: &'a [u32],
    pub stride: usize,
    pub token: usize,
}

/// [`Values::Bytes`] of one token.
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    pub high: &'a [i8],
    pub low: &'a [i8],
}

// SAFETY: `add` reads sixteen pairs of T tokens, and the slab's lines, which the caller vouches for.
unsafe impl Slabs for Pairs<'_> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add<const BITS: usize, const T: usize, const H: usize>(
        self,
        slab: *const Line,
        half: usize,
        s: usize,
        sums: &mut [[__m256i; T]; H],
    ) {
        let quads = match BITS {
            8 => 1,
            4 => 2,
            _ => 4,
        };
        // Words of a line hold columns 0 and 2 of its quads in their low byte, 1 and 3 in the high one.
        let mask = _mm256_set1_epi16(if BITS == 3 { 3 } else { (1 << BITS) - 1 });
        let shifted = |v: __m256i, by: usize| _mm256_srl_epi16(v, _mm_cvtsi32_si128(by as i32));
        // SAFETY: a line has two halves.
        let load = |line: usize, h: usize| unsafe {
            _mm256_load_si256(slab.wrapping_add(line).cast::<__m256i>().wrapping_add(half + h))
        };
        let mut x = self.x.as_ptr().wrapping_add(s * (SLAB / 2) * self.stride + self.token);
        for line in 0..QUADS / quads {
            let (mut v, mut third) = ([_mm256_setzero_si256(); H], [_mm256_setzero_si256(); H]);
            for h in 0..H {
                v[h] = load(line, h);
                if BITS == 3 {
                    // The third bit of the line's first quad where it will be in a code.
                    third[h] = _mm256_slli_epi16::<2>(shifted(load(2, h), 4 * line));
                }
            }
            for q in 0..quads {
                for odd in 0..2 {
                    let mut codes = [_mm256_setzero_si256(); H];
                    for h in 0..H {
                        codes[h] = _mm256_and_si256(shifted(v[h], 8 / quads * q + 8 * odd), mask);
                        if BITS == 3 {
                            let bit = _mm256_and_si256(shifted(third[h], q + 8 * odd), _mm256_set1_epi16(4));
                            codes[h] = _mm256_or_si256(codes[h], bit);
                        }
                    }
                    for t in 0..T {
                        // SAFETY: T tokens of this pair exist.
                        let pair = _mm256_set1_epi32(unsafe { *x.add(t) } as i32);
                        for h in 0..H {
                            sums[h][t] = _mm256_add_epi32(sums[h][t], _mm256_madd_epi16(codes[h], pair));
                            // SAFETY: AVX2.
                            sums[h][t] = unsafe { as_is(sums[h][t]) };
                        }
                    }
                    x = x.wrapping_add(self.stride);
                }
            }
        }
    }
}

// SAFETY: `add` reads 32 columns of one token, and the slab's lines, which the caller vouches for.
unsafe impl Slabs for Bytes<'_> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add<const BITS: usize, const T: usize, const H: usize>(
        self,
        slab: *const Line,
        half: usize,
        s: usize,
        sums: &mut [[__m256i; T]; H],
    ) {
        let word = |x: &[i8], q: usize| {
            // SAFETY: four bytes of columns `32 s + 4 q ..`.
            _mm256_set1_epi32(unsafe { x.as_ptr().add(s * SLAB + q * QUAD).cast::<i32>().read_unaligned() })
        };
        let ones = _mm256_set1_epi16(1);
        for h in 0..H {
            // Eight quads of at most 2 · 15 · 127 stay below 2^15.
            let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for q in 0..QUADS {
                // SAFETY: the caller's contract.
                let codes = unsafe { quad_256::<BITS>(slab, q, half + h) };
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes, word(self.high, q)));
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes, word(self.low, q)));
            }
            let high = _mm256_slli_epi32::<7>(_mm256_madd_epi16(high, ones));
            let both = _mm256_add_epi32(high, _mm256_madd_epi16(low, ones));
            sums[h][0] = _mm256_add_epi32(sums[h][0], both);
        }
    }
}

/// T tokens times all rows, H halves of a tile at a time: T · H sums stay in registers, and a pair of codes is unpacked once for all
/// of the tokens.
///
/// # Safety
/// AVX2, FMA and F16C; shapes as [`product`] checks them; `values` are those of `job.x` from `job.token` on; `out` holds T tokens; H is
/// 1 or 2; T is 1 for bytes.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn rows_avx2<X: Slabs, const BITS: usize, const T: usize, const H: usize>(
    job: Job<'_>,
    values: X,
    out: &mut [f32],
) {
    let Job { m, x, first, rows, token } = job;
    let (slabs_of_block, blocks) = (x.block / SLAB, x.k / x.block);
    // SAFETY: a tile has `slabs · BITS` lines; slab `s` meets columns `32 s ..` of T tokens; block `b` has one scale and one sum a token,
    // group `b · block / group_cols` sixteen scales (and zero points) a tile; all as checked by `product`.
    unsafe {
        for i in 0..rows.div_ceil(TILE_ROWS) {
            let tile = first + i;
            let mut p = m.tiles.lines.as_ptr().add(tile * m.tiles.slabs * BITS);
            let mut acc = [[_mm256_setzero_ps(); T]; 2];
            for b in 0..blocks {
                for line in 0..slabs_of_block * BITS {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + line).cast());
                }
                let cell = b * x.t + token;
                let total = |t: usize| _mm256_set1_epi32(*x.sums.as_ptr().add(cell + t));
                for half in (0..2).step_by(H) {
                    let at = |h: usize| (tile * m.groups + b * x.block / m.group_cols) * TILE_ROWS + 8 * (half + h);
                    // The sums start from what the zero points take off.
                    let mut sums = [[_mm256_setzero_si256(); T]; H];
                    for h in 0..H {
                        let zeros = match m.zeros {
                            None => _mm256_set1_epi32(-i32::from(m.mid)),
                            Some(z) => {
                                let zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(z.as_ptr().add(at(h)).cast()));
                                _mm256_sub_epi32(_mm256_setzero_si256(), zeros)
                            }
                        };
                        for t in 0..T {
                            sums[h][t] = _mm256_mullo_epi32(zeros, total(t));
                        }
                    }
                    for s in 0..slabs_of_block {
                        let slab = b * slabs_of_block + s;
                        values.add::<BITS, T, H>(p.add(s * BITS), half, slab, &mut sums);
                    }
                    for h in 0..H {
                        let scales = scales_256(m.scales, at(h));
                        for t in 0..T {
                            let scale = *x.scales.as_ptr().add(cell + t);
                            let factor = _mm256_mul_ps(scales, _mm256_set1_ps(scale));
                            let value = _mm256_cvtepi32_ps(sums[h][t]);
                            acc[half + h][t] = _mm256_fmadd_ps(value, factor, acc[half + h][t]);
                        }
                    }
                }
                p = p.add(slabs_of_block * BITS);
            }
            let from = i * TILE_ROWS;
            for t in 0..T {
                let mut row = [0f32; TILE_ROWS];
                _mm256_storeu_ps(row.as_mut_ptr(), acc[0][t]);
                _mm256_storeu_ps(row.as_mut_ptr().add(8), acc[1][t]);
                let count = TILE_ROWS.min(rows - from);
                out[t * rows + from..][..count].copy_from_slice(&row[..count]);
            }
        }
    }
}
