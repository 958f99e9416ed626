//! Vector lanes chosen at run time: each kernel is written once over [`Lanes`] and compiled per instruction set.

use half::{bf16, f16};

/// The widest instruction set a kernel may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the build target guarantees.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The above and AVX-512F.
    Avx512,
    /// The above, AVX-512BW and the products of bytes (AVX-512 VNNI).
    Vnni,
}

/// A level this machine was seen to have. It cannot be made otherwise, which is what makes [`Simd::run`] sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simd(Level);

/// A loop nest generic in its vector width. Implementations of `run` must be `#[inline(always)]`: only then do the
/// intrinsics land in the function that enables their instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// # Safety
    /// The instruction set of `L` is available.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

impl Simd {
    /// The best level of this machine, no higher than `most`.
    pub fn up_to(most: Level) -> Self {
        Self(detected().min(most))
    }

    /// The level in use.
    pub fn level(self) -> Level {
        self.0
    }

    /// Runs the kernel compiled for this level.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Simd` holds only levels that `detected` found on this machine.
            Level::Avx512 | Level::Vnni => unsafe { x86::run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: the portable lanes use no instruction set beyond the build target's.
            _ => unsafe { kernel.run::<Portable>() },
        }
    }
}

fn detected() -> Level {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        return match is_x86_feature_detected!("avx512f") {
            true if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni") => Level::Vnni,
            true => Level::Avx512,
            false => Level::Avx2,
        };
    }
    Level::Portable
}

/// `N` f32 lanes.
///
/// # Safety
/// `V` must consist of exactly `N` f32 (it is read back as such). Every method requires its instruction set to be
/// available; the pointer ones also that the bytes they name (`N` elements from `p`, no alignment) are readable.
pub unsafe trait Lanes {
    /// The register.
    type V: Copy;
    /// Lanes.
    const N: usize;
    /// All lanes `x`.
    /// # Safety
    /// See the trait.
    unsafe fn splat(x: f32) -> Self::V;
    /// `N` f32.
    /// # Safety
    /// See the trait.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Writes `N` f32.
    /// # Safety
    /// See the trait; `p` is writable.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a · b + c`.
    /// # Safety
    /// See the trait.
    unsafe fn fmadd(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a + b`.
    /// # Safety
    /// See the trait.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `N` little-endian bfloat16, widened.
    /// # Safety
    /// See the trait.
    unsafe fn load_bf16(p: *const u8) -> Self::V;
    /// `N` little-endian IEEE halves, widened.
    /// # Safety
    /// See the trait.
    unsafe fn load_f16(p: *const u8) -> Self::V;
    /// Asks for the cache line at `p`, which need not exist.
    #[inline(always)]
    fn prefetch(p: *const u8) {
        let _ = p;
    }

    /// The largest magnitude's bits, which order as magnitudes do, NaN above infinity.
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn top(x: &[f32; 32]) -> u32 {
        x.iter().fold(0, |top, v| top.max(v.to_bits() & 0x7fff_ffff))
    }

    /// Products with `inverse`, rounded half to even and kept from `-most` to `most` (at most 32767; NaN becomes `-most`), two in each
    /// word, the first in its low half.
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn round(x: &[f32; 32], inverse: f32, most: f32, to: &mut [u32; 16]) {
        // |v| < 2²²: adding 1.5 · 2²³ leaves no place for a fraction.
        const MAGIC: f32 = 12_582_912.0;
        let word = |v: f32| ((v * inverse).max(-most).min(most) + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
        for (to, v) in to.iter_mut().zip(x.as_chunks::<2>().0) {
            *to = (word(v[0]) as u32 & 0xffff) | (word(v[1]) as u32) << 16;
        }
    }

    /// `block[r][c]` and `block[c][r]` change places.
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn transpose(block: &mut [[u32; 16]; 16]) {
        for r in 0..16 {
            for c in 0..r {
                (block[r][c], block[c][r]) = (block[c][r], block[r][c]);
            }
        }
    }

    /// Sum of the lanes, as a binary tree (the same order on every machine of equal `N`).
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        let mut lanes = [0f32; 16];
        // SAFETY: N ≤ 16 lanes fit in the array; the caller vouches for the instruction set.
        unsafe { Self::store(lanes.as_mut_ptr(), v) };
        let mut width = Self::N / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// [`Self::sum`] of four registers, each in the same order.
    ///
    /// # Safety
    /// See the trait.
    #[inline(always)]
    unsafe fn sums(v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: the caller's contract.
        v.map(|v| unsafe { Self::sum(v) })
    }
}

/// Eight lanes in an array; the compiler makes of it what the target has.
pub struct Portable;

// SAFETY: `V` is eight f32; the methods only read the N elements the contract names.
unsafe impl Lanes for Portable {
    type V = [f32; 8];
    const N: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller vouches for eight f32 at `p`; the read needs no alignment.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for eight writable f32 at `p`.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fmadd(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not `mul_add`: without FMA that is a library call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::V {
        // SAFETY: the caller vouches for sixteen bytes at `p`.
        let raw = unsafe { p.cast::<[[u8; 2]; 8]>().read_unaligned() };
        raw.map(|b| bf16::from_le_bytes(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::V {
        // SAFETY: as in `load_bf16`.
        let raw = unsafe { p.cast::<[[u8; 2]; 8]>().read_unaligned() };
        raw.map(|b| f16::from_le_bytes(b).to_f32())
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Lanes};

    /// # Safety
    /// AVX2, FMA and F16C are available.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: this function enables what `Avx2` needs.
        unsafe { kernel.run::<Avx2>() }
    }

    /// # Safety
    /// AVX-512F, AVX2, FMA and F16C are available.
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: this function enables what `Avx512` needs.
        unsafe { kernel.run::<Avx512>() }
    }

    /// The tree of [`Lanes::sum`] for eight lanes.
    ///
    /// # Safety
    /// AVX2 is available.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sum_256(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }

    /// Four of [`sum_256`], their steps side by side.
    ///
    /// # Safety
    /// AVX2 is available.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sums_256(v: [__m256; 4]) -> [f32; 4] {
        let four = v.map(|v| _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)));
        let two = |a, b| _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let (ab, cd) = (two(four[0], four[1]), two(four[2], four[3]));
        let mut sums = [0f32; 4];
        // SAFETY: four writable f32.
        unsafe { _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab))) };
        sums
    }

    /// [`Lanes::top`].
    ///
    /// # Safety
    /// AVX2 is available.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn top_256(x: &[f32; 32]) -> u32 {
        let magnitudes = _mm256_set1_epi32(0x7fff_ffff);
        // SAFETY: `i` is 0, 8, 16 or 24 of 32.
        let load = |i: usize| unsafe { _mm256_and_si256(_mm256_loadu_si256(x.as_ptr().add(i).cast()), magnitudes) };
        let eight = _mm256_max_epu32(_mm256_max_epu32(load(0), load(8)), _mm256_max_epu32(load(16), load(24)));
        let four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
        _mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two))) as u32
    }

    /// [`Lanes::round`].
    ///
    /// # Safety
    /// AVX2 is available.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn round_256(x: &[f32; 32], inverse: f32, most: f32, to: &mut [u32; 16]) {
        let (inverse, low, high) = (_mm256_set1_ps(inverse), _mm256_set1_ps(-most), _mm256_set1_ps(most));
        let eight = |i: usize| {
            // SAFETY: `i + 8 ≤ 32`.
            let v = _mm256_mul_ps(unsafe { _mm256_loadu_ps(x.as_ptr().add(i)) }, inverse);
            // Where one is NaN, the second operand is taken.
            _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, low), high))
        };
        for i in [0, 16] {
            // Packing takes four and four of either register.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(eight(i), eight(i + 8)));
            // SAFETY: eight words from 0 or 8 of sixteen.
            unsafe { _mm256_storeu_si256(to.as_mut_ptr().add(i / 2).cast(), words) };
        }
    }

    /// Eight lanes.
    pub struct Avx2;

    /// Eight rows of eight u32, sixteen apart in memory, as columns.
    ///
    /// # Safety
    /// AVX2 is available; 120 u32 from `p` are readable.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn eight_by_eight(p: *const u32) -> [__m256i; 8] {
        // Three rounds, each of which brings elements 1, 2 and 4 rows apart side by side.
        let mut a = [_mm256_setzero_si256(); 8];
        for (r, a) in a.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            *a = unsafe { _mm256_loadu_si256(p.add(16 * r).cast()) };
        }
        let mut b = a;
        for i in 0..4 {
            b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        for i in 0..2 {
            for h in 0..2 {
                a[4 * i + 2 * h] = _mm256_unpacklo_epi64(b[4 * i + h], b[4 * i + 2 + h]);
                a[4 * i + 2 * h + 1] = _mm256_unpackhi_epi64(b[4 * i + h], b[4 * i + 2 + h]);
            }
        }
        // a[4 i + j] holds, of rows 4 i .. 4 i + 4, columns j and 4 + j.
        for j in 0..4 {
            b[j] = _mm256_permute2x128_si256::<0x20>(a[j], a[4 + j]);
            b[4 + j] = _mm256_permute2x128_si256::<0x31>(a[j], a[4 + j]);
        }
        b
    }

    // SAFETY: `V` is eight f32; each method reads or writes the N elements its contract names.
    unsafe impl Lanes for Avx2 {
        type V = __m256;
        const N: usize = 8;
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn transpose(block: &mut [[u32; 16]; 16]) {
            // SAFETY: a quarter is eight rows of eight u32, sixteen apart.
            unsafe {
                let at = block.as_mut_ptr().cast::<u32>();
                let quarters = [0, 8, 128, 136].map(|from| eight_by_eight(at.add(from)));
                for (to, quarter) in [0, 128, 8, 136].into_iter().zip(quarters) {
                    for (r, row) in quarter.into_iter().enumerate() {
                        _mm256_storeu_si256(at.add(to + 16 * r).cast(), row);
                    }
                }
            }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn top(x: &[f32; 32]) -> u32 {
            // SAFETY: the caller's contract.
            unsafe { top_256(x) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn round(x: &[f32; 32], inverse: f32, most: f32, to: &mut [u32; 16]) {
            // SAFETY: the caller's contract.
            unsafe { round_256(x, inverse, most, to) }
        }
        #[inline(always)]
        fn prefetch(p: *const u8) {
            // SAFETY: a prefetch reads nothing; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn sum(v: __m256) -> f32 {
            // SAFETY: the caller's contract.
            unsafe { sum_256(v) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn sums(v: [__m256; 4]) -> [f32; 4] {
            // SAFETY: the caller's contract.
            unsafe { sums_256(v) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn splat(x: f32) -> __m256 {
            _mm256_set1_ps(x)
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: the caller vouches for eight f32 at `p`; loadu needs no alignment.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn store(p: *mut f32, v: __m256) {
            // SAFETY: the caller vouches for eight writable f32 at `p`.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn fmadd(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmadd_ps(a, b, c)
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            _mm256_add_ps(a, b)
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load_bf16(p: *const u8) -> __m256 {
            // SAFETY: the caller vouches for sixteen bytes at `p`.
            let raw = unsafe { _mm_loadu_si128(p.cast()) };
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(raw)))
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load_f16(p: *const u8) -> __m256 {
            // SAFETY: the caller vouches for sixteen bytes at `p`.
            _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
        }
    }

    /// Sixteen lanes.
    pub struct Avx512;

    // SAFETY: `V` is sixteen f32; each method reads or writes the N elements its contract names.
    unsafe impl Lanes for Avx512 {
        type V = __m512;
        const N: usize = 16;
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn transpose(block: &mut [[u32; 16]; 16]) {
            // Four rounds, each of which brings elements 1, 2, 4 and 8 rows apart side by side.
            let mut a = [_mm512_setzero_si512(); 16];
            for (a, row) in a.iter_mut().zip(block.iter()) {
                // SAFETY: a row is sixteen u32.
                *a = unsafe { _mm512_loadu_si512(row.as_ptr().cast()) };
            }
            let mut b = a;
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                for h in 0..2 {
                    a[4 * i + 2 * h] = _mm512_unpacklo_epi64(b[4 * i + h], b[4 * i + 2 + h]);
                    a[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(b[4 * i + h], b[4 * i + 2 + h]);
                }
            }
            // a[4 i + j] holds, of rows 4 i .. 4 i + 4, columns j, 4 + j, 8 + j, 12 + j.
            for j in 0..4 {
                let even = |x, y| _mm512_shuffle_i32x4::<0b10_00_10_00>(x, y);
                let odd = |x, y| _mm512_shuffle_i32x4::<0b11_01_11_01>(x, y);
                let (low, high) = ((a[j], a[4 + j]), (a[8 + j], a[12 + j]));
                let (e, f) = (even(low.0, low.1), even(high.0, high.1));
                let (g, h) = (odd(low.0, low.1), odd(high.0, high.1));
                (b[j], b[8 + j]) = (even(e, f), odd(e, f));
                (b[4 + j], b[12 + j]) = (even(g, h), odd(g, h));
            }
            for (row, b) in block.iter_mut().zip(b) {
                // SAFETY: a row is sixteen u32.
                unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), b) };
            }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn top(x: &[f32; 32]) -> u32 {
            // SAFETY: the caller's contract.
            unsafe { top_256(x) }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn round(x: &[f32; 32], inverse: f32, most: f32, to: &mut [u32; 16]) {
            // SAFETY: the caller's contract.
            unsafe { round_256(x, inverse, most, to) }
        }
        #[inline(always)]
        fn prefetch(p: *const u8) {
            // SAFETY: a prefetch reads nothing; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn sum(v: __m512) -> f32 {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            // SAFETY: the caller's contract.
            unsafe { sum_256(_mm256_add_ps(_mm512_castps512_ps256(v), high)) }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn sums(v: [__m512; 4]) -> [f32; 4] {
            let halves = v.map(|v| {
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
                _mm256_add_ps(_mm512_castps512_ps256(v), high)
            });
            // SAFETY: the caller's contract.
            unsafe { sums_256(halves) }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: the caller vouches for sixteen f32 at `p`; loadu needs no alignment.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn store(p: *mut f32, v: __m512) {
            // SAFETY: the caller vouches for sixteen writable f32 at `p`.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn fmadd(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn load_bf16(p: *const u8) -> __m512 {
            // SAFETY: the caller vouches for thirty-two bytes at `p`.
            let raw = unsafe { _mm256_loadu_si256(p.cast()) };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        unsafe fn load_f16(p: *const u8) -> __m512 {
            // SAFETY: the caller vouches for thirty-two bytes at `p`.
            _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Transpose<'a>(&'a mut [[u32; 16]; 16]);

    impl Kernel for Transpose<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<L: Lanes>(self) {
            // SAFETY: the caller vouches for the instruction set.
            unsafe { L::transpose(self.0) };
        }
    }

    #[test]
    fn rows_become_columns() {
        for level in [Level::Portable, Level::Avx2, Level::Avx512] {
            let mut block: [[u32; 16]; 16] = std::array::from_fn(|r| std::array::from_fn(|c| (100 * r + c) as u32));
            Simd::up_to(level).run(Transpose(&mut block));
            for (r, row) in block.iter().enumerate() {
                assert!(row.iter().enumerate().all(|(c, v)| *v as usize == 100 * c + r), "{level:?} {block:?}");
            }
        }
    }
}
