#include "gpu.h"
// Inputs of linears rounded to few bits and widened again, bit for bit as kernels/src/activation.rs.

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

// round_input: y = s round(clamp(x / s)) with one s a span: the largest |x| over the half range of the code (an f32's epsilon
//           for zeros), a stored one, or that of the span times `global` rounded to E4M3, over `global` (0.125 for zeros).
// shapes    x, y [spans, span] f32, the spans of a row one after another; stored [parts] f32, of span i the (i mod parts)-th,
//           null where there is none.
// launch    a block a span, 32 to 256 threads (whole warps).
// limit     memory; the second reading mostly hits a cache.
KERNEL BOUNDS(256, 4) round_input(const float* __restrict__ x, const float* __restrict__ stored, float* __restrict__ y,
                                  int span, int parts, int code, int kind, float global) {
  SHARED_ARRAY(u32, tops, 8);
  const size_t first = (size_t)blockIdx.x * span;
  const int tid = threadIdx.x, threads = blockDim.x;
  // Magnitudes order as their bits do, NaN last.
  u32 most = 0;
  for (int i = tid; i < span; i += threads) most = max(most, __float_as_uint(x[first + i]) & 0x7fffffffu);
#pragma unroll
  for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(0xffffffffu, most, o));
  if ((tid & 31) == 0) tops[tid >> 5] = most;
  __syncthreads();
  for (int w = 0; w < threads / 32; w++) most = max(most, tops[w]);

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
