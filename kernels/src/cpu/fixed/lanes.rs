//! The instructions of the product: pairs of i16 multiplied and summed in lanes of i32.

use crate::cpu::simd::{Lanes, Portable};

/// Lanes of i32 sums beside as many f32.
///
/// # Safety
/// As [`Lanes`]: every method requires its instruction set, the pointer ones also that what they name is readable.
pub(super) unsafe trait Pairs {
    /// The floats.
    type L: Lanes;
    /// The register of sums, `L::N` of them.
    type I: Copy;
    /// # Safety
    /// See the trait.
    unsafe fn zero() -> Self::I;
    /// `N` pairs from `p`.
    /// # Safety
    /// See the trait.
    unsafe fn load(p: *const u32) -> Self::I;
    /// The pair at `p` in all lanes.
    /// # Safety
    /// See the trait.
    unsafe fn splat(p: *const u32) -> Self::I;
    /// `acc + x₀·w₀ + x₁·w₁` in each lane.
    /// # Safety
    /// See the trait.
    unsafe fn accumulate(acc: Self::I, x: Self::I, w: Self::I) -> Self::I;
    /// Nearest f32, half to even.
    /// # Safety
    /// See the trait.
    unsafe fn float(v: Self::I) -> <Self::L as Lanes>::V;
    /// `a · b`.
    /// # Safety
    /// See the trait.
    unsafe fn times(a: <Self::L as Lanes>::V, b: <Self::L as Lanes>::V) -> <Self::L as Lanes>::V;
    /// `a · b + c`, rounded once on every machine.
    /// # Safety
    /// See the trait.
    unsafe fn fused(
        a: <Self::L as Lanes>::V,
        b: <Self::L as Lanes>::V,
        c: <Self::L as Lanes>::V,
    ) -> <Self::L as Lanes>::V;
}

// SAFETY: eight lanes in arrays; the pointers are read as the contract says. This is the scalar twin.
unsafe impl Pairs for Portable {
    type L = Portable;
    type I = [i32; 8];
    #[inline(always)]
    unsafe fn zero() -> [i32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> [i32; 8] {
        // SAFETY: the caller vouches for eight pairs at `p`.
        unsafe { p.cast::<[i32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u32) -> [i32; 8] {
        // SAFETY: the caller vouches for `p`.
        [unsafe { p.read_unaligned() } as i32; 8]
    }
    #[inline(always)]
    unsafe fn accumulate(acc: [i32; 8], x: [i32; 8], w: [i32; 8]) -> [i32; 8] {
        let halves = |v: i32| (i32::from(v as i16), v >> 16);
        std::array::from_fn(|i| {
            let ((x0, x1), (w0, w1)) = (halves(x[i]), halves(w[i]));
            acc[i] + x0 * w0 + x1 * w1
        })
    }
    #[inline(always)]
    unsafe fn float(v: [i32; 8]) -> [f32; 8] {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn times(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fused(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::super::product::{Raw, TILE, chains};
    use super::Pairs;
    use crate::cpu::simd::x86::{Avx2, Avx512};

    /// # Safety
    /// AVX-512F, BW and VNNI are available, and as [`Raw::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
    pub unsafe fn run_vnni(raw: &Raw<'_>) {
        // SAFETY: this function enables what `Vnni` needs; the rest is the caller's.
        unsafe { raw.run::<Vnni, 2>(TILE) }
    }

    /// # Safety
    /// AVX2 and FMA are available, and as [`Raw::run`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run_avx2(raw: &Raw<'_>) {
        // Two rows by four registers: with three, two of the sums lived in memory, and each step waited for a store.
        // SAFETY: this function enables what `Avx2` needs; the rest is the caller's.
        unsafe { raw.run::<Avx2, 4>(2) }
    }

    /// # Safety
    /// AVX-512F, BW and VNNI are available.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
    pub unsafe fn chains_vnni(steps: usize) -> usize {
        // SAFETY: this function enables what `Vnni` needs.
        unsafe { chains::<Vnni>(steps) }
    }

    /// # Safety
    /// AVX2 and FMA are available.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn chains_avx2(steps: usize) -> usize {
        // SAFETY: this function enables what `Avx2` needs.
        unsafe { chains::<Avx2>(steps) }
    }

    /// Sixteen lanes.
    struct Vnni;

    // SAFETY: sixteen i32 and f32; the pointers are read as the contract says.
    unsafe impl Pairs for Vnni {
        type L = Avx512;
        type I = __m512i;
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn zero() -> __m512i {
            _mm512_setzero_si512()
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn load(p: *const u32) -> __m512i {
            // SAFETY: the caller vouches for sixteen pairs at `p`.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn splat(p: *const u32) -> __m512i {
            // SAFETY: the caller vouches for `p`.
            _mm512_set1_epi32(unsafe { p.read_unaligned() } as i32)
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn accumulate(acc: __m512i, x: __m512i, w: __m512i) -> __m512i {
            _mm512_dpwssd_epi32(acc, x, w)
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn float(v: __m512i) -> __m512 {
            _mm512_cvtepi32_ps(v)
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn times(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn fused(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
    }

    // SAFETY: eight i32 and f32; the pointers are read as the contract says.
    unsafe impl Pairs for Avx2 {
        type L = Avx2;
        type I = __m256i;
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn zero() -> __m256i {
            _mm256_setzero_si256()
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn load(p: *const u32) -> __m256i {
            // SAFETY: the caller vouches for eight pairs at `p`.
            unsafe { _mm256_loadu_si256(p.cast()) }
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn splat(p: *const u32) -> __m256i {
            // SAFETY: the caller vouches for `p`.
            _mm256_set1_epi32(unsafe { p.read_unaligned() } as i32)
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn accumulate(acc: __m256i, x: __m256i, w: __m256i) -> __m256i {
            // No factor is −32768, so a pair's sum fits in an i32.
            _mm256_add_epi32(acc, _mm256_madd_epi16(x, w))
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn float(v: __m256i) -> __m256 {
            _mm256_cvtepi32_ps(v)
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn times(a: __m256, b: __m256) -> __m256 {
            _mm256_mul_ps(a, b)
        }
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn fused(a: __m256, b: __m256, c: __m256) -> __m256 {
            _mm256_fmadd_ps(a, b, c)
        }
    }
}
