//! The product by AVX-512 VNNI: four bytes of codes times four of activations a lane, the high and the low ones.

use std::arch::x86_64::*;

use super::*;
use crate::cpu::tiles::Line;

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
    values: (&[i8], &[i8]),
    out: &mut [f32],
) {
    let count = job.rows.div_ceil(TILE_ROWS);
    let mut i = 0;
    // SAFETY: the caller's contract; tiles `i .. i + R` are among the rows.
    unsafe {
        while i + R <= count {
            tiles_vnni::<BITS, T, R, C>(job, values, i, out);
            i += R;
        }
        while i < count {
            tiles_vnni::<BITS, T, 1, C>(job, values, i, out);
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
    (high, low): (&[i8], &[i8]),
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
        let (high, low) = (high.as_ptr().add(token * x.k), low.as_ptr().add(token * x.k));
        let (scale, total) = (x.scales.as_ptr().add(token), x.sums.as_ptr().add(token));
        let mut p = m.tiles.lines.as_ptr().add(tile * stride);
        let mut acc = [[_mm512_setzero_ps(); R]; T];
        for b in 0..blocks {
            let group = b * x.block / m.group_cols;
            let cell = |r: usize| ((tile + r) * m.groups + group) * TILE_ROWS;
            let mut h = [[[_mm512_setzero_si512(); C]; R]; T];
            let mut l = [[[_mm512_setzero_si512(); C]; R]; T];
            // The sums start from what the zero points take off.
            for t in 0..T {
                let total = (*total.add(b * x.t + t)).wrapping_neg();
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
                    let factor = _mm512_mul_ps(scales, _mm512_set1_ps(*scale.add(b * x.t + t)));
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
