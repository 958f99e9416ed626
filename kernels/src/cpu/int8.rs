//! Decode products of packed weights with activations rounded to int8, one scale per 64 columns.
//!
//! `y = Σ_g s_w · s_x · Σ (code − zero) · q_x`: the inner sum is exact in integers, so the only error is the rounding of
//! the activations (at most half of `max|x| / 127` in each block of 64). AVX2: one block costs two `maddubs`, one `madd`
//! and one fused multiply-add, about a third of the instructions of the f32 loop in [`super::packed`], which stays as
//! the exact path ([`super::CpuBackend::exact`]) and serves every shape this one does not take.

use std::ops::Range;

/// Columns that share an activation scale.
pub const BLOCK: usize = 64;

/// Rows of activations, quantized.
pub struct Int8Rows {
    /// `[t, k]`; of every block of 64 the even columns first when `parted`.
    q: Vec<i8>,
    /// `[t, k / 64]`.
    scales: Vec<f32>,
    /// `[t, groups]`: Σ of the dequantized values of a weight group.
    pub sums: Vec<f32>,
    k: usize,
}

impl Int8Rows {
    /// Rounds x `[t, k]`, `k` a multiple of 64; `group_cols` (a multiple of 64) only shapes `sums`. NaN becomes 0 in
    /// a block whose scale is NaN, so it still reaches the result.
    pub fn new(x: &[f32], k: usize, group_cols: usize, parted: bool) -> Self {
        let blocks = x.len() / BLOCK;
        let mut q = vec![0i8; x.len()];
        let mut scales = Vec::with_capacity(blocks);
        let mut block_sums = Vec::with_capacity(blocks);
        for (q, x) in q.as_chunks_mut::<BLOCK>().0.iter_mut().zip(x.as_chunks::<BLOCK>().0) {
            let max = x.iter().fold(0f32, |m, v| if v.abs() > m || v.is_nan() { v.abs() } else { m });
            let scale = max / 127.0;
            let inv = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let mut sum = 0i32;
            for i in 0..BLOCK {
                let v = (x[i] * inv).round_ties_even() as i8;
                sum += i32::from(v);
                let at = if parted { i / 2 + (i % 2) * (BLOCK / 2) } else { i };
                q[at] = v;
            }
            scales.push(scale);
            block_sums.push(scale * sum as f32);
        }
        let per_group = group_cols / BLOCK;
        let sums = block_sums.chunks(per_group.max(1)).map(|g| g.iter().sum()).collect();
        Self { q, scales, sums, k }
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.q.len() / self.k.max(1)
    }
}

/// Packed rows as the kernels read them.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    /// `[rows, stride]`.
    pub bytes: &'a [u8],
    /// Bytes of a row.
    pub stride: usize,
    /// `[rows, groups]`.
    pub scales: &'a [f32],
    /// Groups of a row.
    pub groups: usize,
    /// Columns of a group, a multiple of 64.
    pub group_cols: usize,
    /// Two codes a byte, else one.
    pub nibbles: bool,
}

/// Whether this machine has the instructions.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// `out[r][t] = Σ s_w s_x Σ code · q_x` for `rows`; codes of one byte count from 128. `out` is `[rows, t]`.
///
/// Fails (false) where [`available`] is false or a slice is too short for its shape.
pub fn gemv(codes: Codes<'_>, x: &Int8Rows, rows: Range<usize>, out: &mut [f32]) -> bool {
    let t = x.tokens();
    let row_bytes = if codes.nibbles { x.k / 2 } else { x.k };
    let fits = row_bytes <= codes.stride
        && x.k == codes.groups * codes.group_cols
        && codes.group_cols.is_multiple_of(BLOCK)
        && codes.bytes.len() >= rows.end * codes.stride
        && codes.scales.len() >= rows.end * codes.groups
        && out.len() >= rows.len() * t;
    if !fits || !available() {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: AVX2 and FMA were detected; the lengths above are the contract of `rows_avx2`.
    unsafe {
        if codes.nibbles {
            rows_avx2::<true>(codes, x, rows, out, t);
        } else {
            rows_avx2::<false>(codes, x, rows, out, t);
        }
    }
    true
}

/// # Safety
/// AVX2 and FMA; `codes`, `x` and `out` hold `rows` rows of `x.k` columns and `t` tokens (checked by [`gemv`]).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2<const NIBBLES: bool>(c: Codes<'_>, x: &Int8Rows, rows: Range<usize>, out: &mut [f32], t: usize) {
    let mut row = rows.start;
    while row < rows.end {
        let at = (row - rows.start) * t;
        // SAFETY: the caller's contract; a block of rows ends at `rows.end`.
        unsafe {
            if rows.end - row >= 4 {
                for token in 0..t {
                    let sums = block_avx2::<NIBBLES, 4>(c, x, row, token);
                    for (r, s) in sums.into_iter().enumerate() {
                        out[at + r * t + token] = s;
                    }
                }
                row += 4;
            } else {
                for token in 0..t {
                    out[at + token] = block_avx2::<NIBBLES, 1>(c, x, row, token)[0];
                }
                row += 1;
            }
        }
    }
}

/// # Safety
/// As [`rows_avx2`], for rows `row .. row + R` and one token.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn block_avx2<const NIBBLES: bool, const R: usize>(
    c: Codes<'_>,
    x: &Int8Rows,
    row: usize,
    token: usize,
) -> [f32; R] {
    use std::arch::x86_64::*;
    let blocks = x.k / BLOCK;
    let per_group = c.group_cols / BLOCK;
    let ones = _mm256_set1_epi16(1);
    let low = _mm256_set1_epi8(15);
    let top = _mm256_set1_epi8(-128);
    let mut acc = [_mm256_setzero_ps(); R];
    // SAFETY: block `b < blocks` of a row lies in its k/2 (or k) bytes of codes and its 64 values of q; group `g` in its
    // row of scales: all within the slices the caller checked.
    unsafe {
        let q = x.q.as_ptr().add(token * x.k);
        let xs = x.scales.as_ptr().add(token * blocks);
        let mut b = 0;
        for g in 0..c.groups {
            for _ in 0..per_group {
                let first = _mm256_loadu_si256(q.add(b * BLOCK).cast());
                let second = _mm256_loadu_si256(q.add(b * BLOCK + 32).cast());
                let scale = *xs.add(b);
                for r in 0..R {
                    let base = c.bytes.as_ptr().add((row + r) * c.stride);
                    let d = if NIBBLES {
                        let bytes = _mm256_loadu_si256(base.add(b * 32).cast());
                        let even = _mm256_and_si256(bytes, low);
                        let odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
                        // At most 4 · 15 · 127 = 7620 in an i16.
                        let pairs =
                            _mm256_add_epi16(_mm256_maddubs_epi16(even, first), _mm256_maddubs_epi16(odd, second));
                        _mm256_madd_epi16(pairs, ones)
                    } else {
                        let a = _mm256_xor_si256(_mm256_loadu_si256(base.add(b * BLOCK).cast()), top);
                        let z = _mm256_xor_si256(_mm256_loadu_si256(base.add(b * BLOCK + 32).cast()), top);
                        // |w| ≤ 128 unsigned, x with w's sign: at most 2 · 128 · 127 = 32512.
                        let pa = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(first, a));
                        let pz = _mm256_maddubs_epi16(_mm256_abs_epi8(z), _mm256_sign_epi8(second, z));
                        _mm256_add_epi32(_mm256_madd_epi16(pa, ones), _mm256_madd_epi16(pz, ones))
                    };
                    let s = *c.scales.as_ptr().add((row + r) * c.groups + g) * scale;
                    acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), _mm256_set1_ps(s), acc[r]);
                }
                b += 1;
            }
        }
        let mut out = [0f32; R];
        for r in 0..R {
            let half = _mm_add_ps(_mm256_castps256_ps128(acc[r]), _mm256_extractf128_ps(acc[r], 1));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            out[r] = _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scalar twin: the same sums in f64.
    fn twin(
        codes: &[u8],
        scales: &[f32],
        k: usize,
        group: usize,
        x: &Int8Rows,
        natural: &[f32],
        offset: f64,
    ) -> Vec<f64> {
        assert_eq!(x.k, k);
        codes
            .chunks_exact(k)
            .enumerate()
            .map(|(r, row)| {
                row.iter()
                    .zip(natural)
                    .enumerate()
                    .map(|(i, (c, v))| {
                        f64::from(scales[r * (k / group) + i / group]) * (f64::from(*c) - offset) * f64::from(*v)
                    })
                    .sum()
            })
            .collect()
    }

    #[test]
    fn products_match_the_scalar_twin() {
        if !available() {
            return; // nothing to compare: this path is never taken here
        }
        let mut seed = 1u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f32 / (1 << 24) as f32
        };
        for (rows, k, group, nibbles) in
            [(7, 128, 64, true), (4, 256, 128, true), (5, 128, 64, false), (9, 192, 192, false)]
        {
            let max = if nibbles { 16.0 } else { 256.0 };
            let codes: Vec<u8> = (0..rows * k).map(|_| (next() * max) as u8).collect();
            let scales: Vec<f32> = (0..rows * k / group).map(|_| next() - 0.5).collect();
            let x: Vec<f32> = (0..k).map(|_| next() * 4.0 - 2.0).collect();
            let q = Int8Rows::new(&x, k, group, nibbles);
            // The values the integers stand for, in natural order.
            let plain = Int8Rows::new(&x, k, group, false);
            let values: Vec<f32> =
                plain.q.iter().enumerate().map(|(i, v)| f32::from(*v) * plain.scales[i / BLOCK]).collect();
            for (v, x) in values.iter().zip(&x) {
                assert!((v - x).abs() <= 2.0 / 127.0 * 0.5 + 1e-6);
            }
            let bytes: Vec<u8> =
                if nibbles { codes.chunks(2).map(|p| p[0] | p[1] << 4).collect() } else { codes.clone() };
            let stride = bytes.len() / rows;
            let c = Codes { bytes: &bytes, stride, scales: &scales, groups: k / group, group_cols: group, nibbles };
            let mut out = vec![0f32; rows];
            assert!(gemv(c, &q, 0..rows, &mut out));
            let want = twin(&codes, &scales, k, group, &q, &values, if nibbles { 0.0 } else { 128.0 });
            let bound: f64 = values.iter().map(|v| f64::from(v.abs())).sum::<f64>() * f64::from(max) * 0.5;
            for (a, b) in out.iter().zip(&want) {
                assert!((f64::from(*a) - b).abs() <= bound * f64::from(f32::EPSILON) * 4.0, "{a} {b}");
            }
        }
    }

    #[test]
    fn nan_reaches_the_result() {
        let mut x = vec![1f32; 64];
        x[5] = f32::NAN;
        let q = Int8Rows::new(&x, 64, 64, true);
        assert!(q.scales[0].is_nan());
    }
}
