#include "gpu.h"
// Inputs of linears rounded to few bits, widened again or as codes, bit for bit as kernels/src/activation.rs.

enum { IN_INT8 = 0, IN_FP8 = 1, IN_FP4 = 2 };
enum { IN_OWN = 0, IN_STORED = 1, IN_LOCAL = 2 };

DEV float in_signed(float magnitude, float like) {
  return __uint_as_float(__float_as_uint(magnitude) | (__float_as_uint(like) & 0x80000000u));
}
// The nearest E4M3 value, half to even; beyond 448 that. NaN stays.
DEV float in_e4m3(float x) {
  const u32 b = __float_as_uint(x) & 0x7fffffffu;
  const float a = __uint_as_float(b);
  if (b > 0x7f800000u) return x;
  if (a >= 448.0f) return in_signed(448.0f, x);
  if (a < 0.015625f) return in_signed(__fmul_rn(rintf(__fmul_rn(a, 512.0f)), 0.001953125f), x);
  return in_signed(__uint_as_float((b + 0x7ffffu + (b >> 20 & 1u)) & 0xfff00000u), x);
}
// The nearest E2M1 value, ties to the even mantissa; beyond 6 that. NaN stays.
DEV float in_e2m1(float x) {
  const u32 b = __float_as_uint(x) & 0x7fffffffu;
  const float a = __uint_as_float(b);
  if (b > 0x7f800000u) return x;
  const float m = a > 5.0f ? 6.0f : a >= 3.5f ? 4.0f : a > 2.5f ? 3.0f : a >= 1.75f ? 2.0f : a > 1.25f ? 1.5f : a >= 0.75f ? 1.0f : a > 0.25f ? 0.5f : 0.0f;
  return in_signed(m, x);
}

// Bits of the largest magnitude of n values, in every thread of the block; magnitudes order as their bits do, NaN last.
DEV u32 in_largest(const float* x, int n) {
  SHARED_ARRAY(u32, tops, 8);
  const int tid = threadIdx.x, threads = blockDim.x;
  u32 most = 0;
  for (int i = tid; i < n; i += threads) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
#pragma unroll
  for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(0xffffffffu, most, o));
  if ((tid & 31) == 0) tops[tid >> 5] = most;
  __syncthreads();
  for (int w = 0; w < threads / 32; w++) most = max(most, tops[w]);
  return most;
}

// round_input: y = s round(clamp(x / s)) with one s a span: the largest |x| over the half range of the code (an f32's epsilon
//           for zeros), a stored one, or that of the span times `global` rounded to E4M3, over `global` (0.125 for zeros).
// shapes    x, y [spans, span] f32, the spans of a row one after another; stored [parts] f32, of span i the (i mod parts)-th,
//           null where there is none.
// launch    a block a span, 32 to 256 threads (whole warps).
// limit     memory; the second reading mostly hits a cache.
KERNEL BOUNDS(256, 4) round_input(const float* __restrict__ x, const float* __restrict__ stored, float* __restrict__ y,
                                  int span, int parts, int code, int kind, float global) {
  const size_t first = (size_t)blockIdx.x * span;
  const int tid = threadIdx.x, threads = blockDim.x;
  const u32 most = in_largest(x + first, span);

  const float half = code == IN_INT8 ? 127.5f : code == IN_FP8 ? 448.0f : 6.0f;
  float scale = __fdiv_rn(__uint_as_float(most), half);
  if (kind == IN_STORED) {
    scale = stored[blockIdx.x % (u32)parts];
  } else if (kind == IN_LOCAL) {
    const float local = in_e4m3(__fmul_rn(global, scale));
    scale = __fdiv_rn(local == 0.0f ? 0.125f : local, global);
  } else if (scale == 0.0f) {
    scale = 1.1920929e-7f;
  }
  for (int i = tid; i < span; i += threads) {
    float v = __fdiv_rn(x[first + i], scale);
    if (code == IN_INT8) v = rintf(v < -128.0f ? -128.0f : v > 127.0f ? 127.0f : v);
    else v = code == IN_FP8 ? in_e4m3(v) : in_e2m1(v);
    y[first + i] = __fmul_rn(v, scale);
  }
}

// The E4M3 code nearest to x, half to even; beyond 448 that. x is a number.
DEV u32 in_e4m3_code(float x) {
  const u32 b = __float_as_uint(x) & 0x7fffffffu, sign = __float_as_uint(x) >> 24 & 0x80u;
  const float a = __uint_as_float(b);
  if (a >= 448.0f) return sign | 0x7eu;
  // Below 2^-6 units of 2^-9, whose codes count them; the exponent's bias is 7 where an f32's is 127.
  if (a < 0.015625f) return sign | (u32)rintf(__fmul_rn(a, 512.0f));
  return sign | (((b + 0x7ffffu + (b >> 20 & 1u)) >> 20) - (120u << 3));
}

// input_codes: what round_input multiplies by its scale again, as codes: q [rows, width] bytes, int8 or E4M3, scales [rows] and, of int8,
//           sums [rows] of a row's codes. `stored` is the scale of all rows, or 0 where each has its own. A row with a NaN, or with an
//           infinity and a scale of its own, gets the scale NaN and codes 0: its products are NaN, as they should be.
// shapes    x [rows, width] f32, width a multiple of 16; sums null for E4M3.
// launch    a block a row, 32 to 256 threads (whole warps).
// limit     memory.
KERNEL BOUNDS(256, 4) input_codes(const float* __restrict__ x, u8* __restrict__ q, float* __restrict__ scales,
                                  int* __restrict__ sums, int width, int code, float stored) {
  SHARED_ARRAY(int, parts, 8);
  const size_t first = (size_t)blockIdx.x * width;
  const int tid = threadIdx.x, threads = blockDim.x;
  const u32 most = in_largest(x + first, width);
  const bool own = stored == 0.0f, bad = own ? most >= 0x7f800000u : most > 0x7f800000u;
  float scale = stored;
  if (own) {
    scale = __fdiv_rn(__uint_as_float(most), code == IN_INT8 ? 127.5f : 448.0f);
    if (scale == 0.0f) scale = 1.1920929e-7f;
  }
  int sum = 0;
  for (int i = tid * 4; i < width; i += threads * 4) {
    const float4 v4 = *reinterpret_cast<const float4*>(x + first + i);
    const float v[4] = {v4.x, v4.y, v4.z, v4.w};
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float r = bad ? 0.0f : __fdiv_rn(v[j], scale);
      if (code == IN_INT8) {
        const int c = (int)rintf(r < -128.0f ? -128.0f : r > 127.0f ? 127.0f : r);
        word |= ((u32)c & 0xffu) << 8 * j;
        sum += c;
      } else {
        word |= in_e4m3_code(r) << 8 * j;
      }
    }
    *reinterpret_cast<u32*>(q + first + i) = word;
  }
  if (tid == 0) scales[blockIdx.x] = bad ? NAN : scale;
  if (code != IN_INT8) return;
#pragma unroll
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if ((tid & 31) == 0) parts[tid >> 5] = sum;
  __syncthreads();
  if (tid > 0) return;
  for (int w = 1; w < threads / 32; w++) sum += parts[w];
  sums[blockIdx.x] = sum;
}
