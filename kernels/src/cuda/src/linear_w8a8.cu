#include "gpu.h"
// w8a8_*, fp8_*: y[t][o] = (xs[t] ws[o]) sum_i q[t][i] (W[o][i] - z[o]) (+ bias[o]), codes of eight bits on both sides, multiplied by
//           tensor cores as they are. The scales' product is rounded, then its product with the sum, then the sum with the bias.
//           w8a8: integers. The sum is exact (s32), so the result depends neither on tiles nor on the tokens beside it, and is that
//           of kernels/src/w8a8.rs, bit for bit. Stored codes are W = signed code + 128: the sum over signed codes, plus
//           (128 - z[o]) sums[t] where the zero point is another.
//           fp8: E4M3, products exact, sums in f32 within 64 columns, these added in f32 in the order of columns (*_few: in four
//           chains, then in order): a tensor core may keep fewer bits of a sum than an f32 has, so its chains are short. sm_89 on.
// shapes    q [tokens, in] and xs, sums [tokens] of input_codes; w [out, in] bytes; ws [out] f32; z [out] u8 (w8a8 only); bias [out]
//           f32 or null; y [tokens, out] f32. in a multiple of 16, at most 65536 for integers (so that the sum fits).
// launch    *_few: 128 threads, grid (ceil(out / 16), ceil(tokens / (8 N))), N the number in the name.
//           *_many: 128 threads, grid (ceil(out / 128), ceil(tokens / 64)), 48 KiB of dynamic shared memory.
// mapping   few: a block takes 16 rows of W, which are the 16 x 32 operand of mma.m16n8k32, and N x 8 tokens. A warp takes every
//           fourth step of 64 columns; a lane 16 consecutive bytes of a row, because a product may take columns in any order as
//           long as both operands do. No shared memory but for the four warps' sums.
//           many: 64 tokens x 128 rows x 64 columns, 4 warps of 32 x 64; four stages filled by cp.async, one barrier a step. Rows of
//           64 bytes, 16-byte chunks swizzled; an 8 x 16-byte matrix of ldmatrix is a fragment of bytes as it is.
// limit     not measured. Expected: few, weight bytes; many, ldmatrix and the adds of the fp8 totals.

// Codes as stored become operands (`flip`), and what becomes of a sum (`finish`).
struct W8Int8 {
  typedef int Sum;
  enum { EXACT = 1 };
  DEV u32 flip(u32 w) { return w ^ 0x80808080u; }  // code - 128, signed
  DEV void product(int (&d)[4], const u32 (&a)[4], const u32* b) { mma_16832_s8(d, a, b); }
  DEV float finish(int sum, const u8* zeros, const int* sums, int o, int t) {
    return __int2float_rn(sum + (128 - (int)zeros[o]) * sums[t]);
  }
};
#ifdef GPU_HAS_FP8
struct W8Fp8 {
  typedef float Sum;
  enum { EXACT = 0 };
  DEV u32 flip(u32 w) { return w; }
  DEV void product(float (&d)[4], const u32 (&a)[4], const u32* b) { mma_16832_e4m3(d, a, b); }
  DEV float finish(float sum, const u8*, const int*, int, int) { return sum; }
};
#endif

struct W8Args {
  const u8* w;
  const float* ws;
  const u8* zeros;
  const u8* q;
  const float* xs;
  const int* sums;
  const float* bias;
  float* y;
  int tokens, out, in;
};

template <class C> DEV void w8_put(const W8Args& p, int t, int o, typename C::Sum sum) {
  if (t >= p.tokens || o >= p.out) return;
  const float v = __fmul_rn(C::finish(sum, p.zeros, p.sums, o, t), __fmul_rn(p.xs[t], p.ws[o]));
  p.y[(size_t)t * p.out + o] = p.bias ? __fadd_rn(v, p.bias[o]) : v;
}

template <class C, int N> DEV void w8_few(const W8Args& p) {
  typedef typename C::Sum Sum;
  SHARED_ARRAY(Sum, parts, (3 * N * 4 * 32));  // [warp - 1][N][4][lane]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int o0 = blockIdx.x * 16, t0 = blockIdx.y * (8 * N);
  // Beyond the end: the last row or token again, not stored.
  const u8* const w0 = p.w + (size_t)min(o0 + g, p.out - 1) * p.in + c * 16;
  const u8* const w1 = p.w + (size_t)min(o0 + g + 8, p.out - 1) * p.in + c * 16;
  const u8* q[N];
#pragma unroll
  for (int n = 0; n < N; n++) q[n] = p.q + (size_t)min(t0 + n * 8 + g, p.tokens - 1) * p.in + c * 16;
  Sum total[N][4];
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) total[n][e] = 0;
#pragma unroll 2
  for (int k = warp * 64; k < p.in; k += 256) {
    const bool inside = k + c * 16 < p.in;  // else zeros of x, whose products are zeros
    uint4 a = make_uint4(0, 0, 0, 0), b = a;
    if (inside) {
      a = *reinterpret_cast<const uint4*>(w0 + k);
      b = *reinterpret_cast<const uint4*>(w1 + k);
    }
    const u32 lo[4] = {C::flip(a.x), C::flip(b.x), C::flip(a.y), C::flip(b.y)};
    const u32 hi[4] = {C::flip(a.z), C::flip(b.z), C::flip(a.w), C::flip(b.w)};
#pragma unroll
    for (int n = 0; n < N; n++) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (inside) v = *reinterpret_cast<const uint4*>(q[n] + k);
      const u32 f[4] = {v.x, v.y, v.z, v.w};
      if (C::EXACT) {
        C::product(total[n], lo, f);
        C::product(total[n], hi, f + 2);
      } else {
        Sum sum[4] = {0, 0, 0, 0};
        C::product(sum, lo, f);
        C::product(sum, hi, f + 2);
#pragma unroll
        for (int e = 0; e < 4; e++) total[n][e] += sum[e];
      }
    }
  }
  if (warp > 0) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) parts[(((warp - 1) * N + n) * 4 + e) * 32 + lane] = total[n][e];
  }
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      Sum sum = total[n][e];
#pragma unroll
      for (int i = 0; i < 3; i++) sum += parts[((i * N + n) * 4 + e) * 32 + lane];
      w8_put<C>(p, t0 + n * 8 + c * 2 + (e & 1), o0 + g + (e >> 1) * 8, sum);
    }
}

enum { W8_TOKENS = 64, W8_ROWS = 128, W8_STAGE = (W8_TOKENS + W8_ROWS) * 64, W8_STAGES = 4 };

DEV u8* w8_at(u8* tile, int row, int chunk) { return tile + row * 64 + ((chunk ^ (row >> 1 & 3)) * 16); }

template <class C> DEV void w8_many(const W8Args& p, u8* sm) {
  typedef typename C::Sum Sum;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, t0 = blockIdx.y * W8_TOKENS, o0 = blockIdx.x * W8_ROWS;
  const int wt = (warp & 1) * 32, wo = (warp >> 1) * 64, steps = (p.in + 63) / 64;
  // Columns beyond the end are zeros on both sides; of x, zeros as codes.
  auto load = [&](int s) {
    u8* const stage = sm + (s % W8_STAGES) * W8_STAGE;
    const int chunk = tid & 3, col = s * 64 + chunk * 16;
    const bool inside = col < p.in;
    const int at = inside ? col : 0;
#pragma unroll
    for (int i = 0; i < W8_TOKENS / 32; i++) {
      const int row = (tid >> 2) + i * 32;
      cp_async16(w8_at(stage, row, chunk), p.q + (size_t)min(t0 + row, p.tokens - 1) * p.in + at, inside);
    }
#pragma unroll
    for (int i = 0; i < W8_ROWS / 32; i++) {
      const int row = (tid >> 2) + i * 32;
      cp_async16(w8_at(stage + W8_TOKENS * 64, row, chunk), p.w + (size_t)min(o0 + row, p.out - 1) * p.in + at, inside);
    }
  };
  Sum total[2][8][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) total[i][j][e] = 0;
  auto multiply = [&](u8* stage, Sum (&sum)[2][8][4]) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      u32 a[2][4], b[4][4];
#pragma unroll
      for (int i = 0; i < 2; i++) ldmatrix_x4(a[i], w8_at(stage, wt + i * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int row = wo + j * 16 + (lane & 7) + (lane >> 4) * 8;
        ldmatrix_x4(b[j], w8_at(stage + W8_TOKENS * 64, row, k * 2 + (lane >> 3 & 1)));
#pragma unroll
        for (int e = 0; e < 4; e++) b[j][e] = C::flip(b[j][e]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) C::product(sum[i][j], a[i], &b[j >> 1][(j & 1) * 2]);
    }
  };
#pragma unroll
  for (int s = 0; s < W8_STAGES - 1; s++) {
    if (s < steps) load(s);
    cp_async_commit();
  }
  for (int s = 0; s < steps; s++) {
    cp_async_wait<W8_STAGES - 2>();
    __syncthreads();  // step s is there; step s - 1, whose stage is filled again, has been read
    if (s + W8_STAGES - 1 < steps) load(s + W8_STAGES - 1);
    cp_async_commit();
    u8* const stage = sm + (s % W8_STAGES) * W8_STAGE;
    if (C::EXACT) {
      multiply(stage, total);
    } else {
      Sum sum[2][8][4];
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
      multiply(stage, sum);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) total[i][j][e] += sum[i][j][e];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        w8_put<C>(p, t0 + wt + i * 16 + (lane >> 2) + (e >> 1) * 8, o0 + wo + j * 8 + (lane & 3) * 2 + (e & 1),
                  total[i][j][e]);
}

#define W8_PARAMETERS                                                                                                  \
  const u8 *__restrict__ w, const float *__restrict__ ws, const u8 *__restrict__ zeros, const u8 *__restrict__ q,      \
      const float *__restrict__ xs, const int *__restrict__ sums, const float *__restrict__ bias, float *__restrict__ y, \
      int tokens, int out, int in
#define W8_FEW(NAME, CODE, N)                                                      \
  KERNEL BOUNDS(128, 4) NAME(W8_PARAMETERS) {                                      \
    const W8Args p = {w, ws, zeros, q, xs, sums, bias, y, tokens, out, in};        \
    w8_few<CODE, N>(p);                                                            \
  }
#define W8_MANY(NAME, CODE)                                                        \
  KERNEL BOUNDS(128, 2) NAME(W8_PARAMETERS) {                                      \
    SHARED_DYN(u8, sm);                                                            \
    const W8Args p = {w, ws, zeros, q, xs, sums, bias, y, tokens, out, in};        \
    w8_many<CODE>(p, sm);                                                          \
  }
W8_FEW(w8a8_few_1, W8Int8, 1)
W8_FEW(w8a8_few_2, W8Int8, 2)
W8_FEW(w8a8_few_4, W8Int8, 4)
W8_MANY(w8a8_many, W8Int8)
#ifdef GPU_HAS_FP8
W8_FEW(fp8_few_1, W8Fp8, 1)
W8_FEW(fp8_few_2, W8Fp8, 2)
W8_FEW(fp8_few_4, W8Fp8, 4)
W8_MANY(fp8_many, W8Fp8)
#endif
