#include "gpu.h"
// gemm_dense, gemm_packed: y[t][o] = sum_i x[t][i] W[o][i] (+ bias[o]) on tensor cores.
//           terms 3: to f32 accuracy. x = x0 + x1 + x2 with bf16 terms (24 bits: exact). Code minus zero point is exact in
//           bf16, and so is a bf16 weight: 3 products, all exact. An f16 weight is two terms, an f32 weight three; products
//           x_a w_b with a + b <= 2 are taken (5 and 6), the rest is below 2^-23 |x w|. Products with a + b > 0 have
//           accumulators of their own: added to the large ones they would be rounded away.
//           terms 1: x is rounded to bf16 (half to even); weights keep their terms: 1, 2 or 3 products.
//           Packed: W[o][i] = s[o][g] (q[o][i] - z[o][g]); s multiplies the accumulator once per group.
//           Every accumulator is moved into an f32 total at the end of its group (64 columns when dense), so the
//           tensor core's truncating additions stay within short chains.
// shapes    x [tokens, in] f32; y [tokens, out] f32; bias [out] f32 or null; scales [out, in/group_cols] f32; zeros
//           likewise, u8. Dense: w [out, in] in f32, f16 or bf16 (dtype 0, 1, 2), any width. Packed: words
//           [out, in*bits/32], lowest bits first, bits 4 or 8; in and group_cols multiples of 16. terms 1 or 3.
// launch    128 threads; grid (ceil(out/64), ceil(tokens/64)); dynamic shared memory 2 x (terms + P) x 4 KiB, P = 3, 2,
//           1, 1 weight terms for f32, f16, bf16, packed.
// mapping   64 x 64 x 32 tiles, 4 warps of 32 x 32, mma.m16n8k16. The next step's x and weights travel to registers
//           (bf16 weights by cp.async, when in % 8 == 0) during a step's products; they are split or decoded once per
//           tile on the way into the other half of shared memory: one barrier a step. Rows of 64 bytes, 16-byte chunks
//           swizzled. A token's result does not depend on the tokens beside it.
// limit     `terms` mma per 16 columns when packed or bf16. Each column of blocks splits x again (16 values a thread and
//           step, against 48 mma a warp).

enum { GM_F32 = 0, GM_F16 = 1, GM_BF16 = 2, GM_W4 = 4, GM_W8 = 8 };
enum { GM_PLANE = 64 * 32 };  // elements of one term of one tile

DEV u16* gm_at(u16* plane, int row, int chunk) { return plane + row * 32 + ((chunk ^ (row >> 1 & 3)) * 8); }

// Four columns, `P` terms each, into planes that follow one another.
template <int P> DEV void gm_store4(u16* planes, int row, int quad, float4 v) {
  u32 a[3], b[3], c[3], d[3];
  bf16_split(v.x, a); bf16_split(v.y, b); bf16_split(v.z, c); bf16_split(v.w, d);
#pragma unroll
  for (int p = 0; p < P; p++)
    *reinterpret_cast<uint2*>(gm_at(planes + p * GM_PLANE, row, quad >> 1) + (quad & 1) * 4) =
        make_uint2(a[p] | b[p] << 16, c[p] | d[p] << 16);
}

// Element i of a row stored as SRC.
template <int SRC> DEV float gm_element(const u8* row, int i) {
  if (SRC == GM_F32) return reinterpret_cast<const float*>(row)[i];
  u16 v = reinterpret_cast<const u16*>(row)[i];
  return SRC == GM_F16 ? h2f(v) : b2f(v);
}

// Columns col .. col + 3 of a row stored as SRC, zeros from `in` on.
template <int SRC> DEV float4 gm_load4(const u8* row, int col, int in) {
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (col >= in) return v;
  if (in % 4 == 0) {
    if (SRC == GM_F32) return *reinterpret_cast<const float4*>(row + (size_t)col * 4);
    uint2 q = *reinterpret_cast<const uint2*>(row + (size_t)col * 2);
    if (SRC == GM_F16)
      return make_float4(h2f((u16)q.x), h2f((u16)(q.x >> 16)), h2f((u16)q.y), h2f((u16)(q.y >> 16)));
    return make_float4(b2f((u16)q.x), b2f((u16)(q.x >> 16)), b2f((u16)q.y), b2f((u16)(q.y >> 16)));
  }
  v.x = gm_element<SRC>(row, col);
  if (col + 1 < in) v.y = gm_element<SRC>(row, col + 1);
  if (col + 2 < in) v.z = gm_element<SRC>(row, col + 2);
  if (col + 3 < in) v.w = gm_element<SRC>(row, col + 3);
  return v;
}

// Code i of q less the zero point, as the upper half of an f32: exact, |code - zero| < 256.
template <int BITS> DEV u32 gm_code(const u32* q, int i, float zero) {
  u32 code = q[i * BITS / 32] >> (i * BITS % 32) & ((1u << BITS) - 1);
  return __float_as_uint(__uint_as_float(0x4b000000u | code) - zero) >> 16;
}

// SRC: how the weight is stored; X: bf16 terms of x.
template <int SRC, int X>
DEV void gm_tile(const u8* w, const float* scales, const u8* zeros, const float* x, const float* bias, float* y,
                 int tokens, int out, int in, int group_cols, u16* sm) {
  const int P = SRC == GM_F32 ? 3 : SRC == GM_F16 ? 2 : 1, STAGE = (X + P) * GM_PLANE, BITS = SRC == GM_W4 ? 4 : 8;
  const bool PACKED = SRC == GM_W4 || SRC == GM_W8;
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, m0 = blockIdx.y * 64, n0 = blockIdx.x * 64;
  int wm = (warp & 1) * 32, wn = (warp >> 1) * 32, steps = (in + 31) / 32, groups = PACKED ? in / group_cols : 1;
  bool direct = SRC == GM_BF16 && in % 8 == 0;
  size_t row_bytes = SRC == GM_W4 ? (size_t)in / 2 : SRC == GM_W8 ? (size_t)in : (size_t)in * (SRC == GM_F32 ? 4 : 2);

  float acc[2][4][4], low[2][4][4], total[2][4][4], scale[8];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = low[i][j][e] = total[i][j][e] = 0.f;

  // scales of this thread's columns: read when a group begins, used when it ends
  auto read_scales = [&](int group) {
#pragma unroll
    for (int c = 0; c < 8; c++) {
      int n = n0 + wn + (c >> 1) * 8 + (lane & 3) * 2 + (c & 1);
      scale[c] = !PACKED ? 1.f : n < out && group < groups ? scales[(size_t)n * groups + group] : 0.f;
    }
  };
  auto flush = [&] {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          total[i][j][e] = fmaf(scale[j * 2 + (e & 1)], acc[i][j][e] + low[i][j][e], total[i][j][e]);
          acc[i][j][e] = low[i][j][e] = 0.f;
        }
  };

  float4 xr[4], wr[4];
  u32 q[4] = {0, 0, 0, 0};
  float zero = 0.f;
  auto fetch = [&](int s) {
    int k0 = s * 32;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      int c = tid + r * 128, row = c >> 3, col = k0 + (c & 7) * 4;
      xr[r] = make_float4(0.f, 0.f, 0.f, 0.f);
      const u8* p = reinterpret_cast<const u8*>(x + (size_t)(m0 + row) * in);
      if (m0 + row < tokens) xr[r] = gm_load4<GM_F32>(p, col, in);
    }
    if (PACKED) {  // 16 columns a thread, of one group
      int row = n0 + (tid >> 1), col = k0 + (tid & 1) * 16;
      bool inside = row < out && col < in;
      const u8* p = w + (size_t)row * row_bytes + (size_t)col * BITS / 8;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (inside && BITS == 4) {
        uint2 half = *reinterpret_cast<const uint2*>(p);
        v.x = half.x;
        v.y = half.y;
      } else if (inside) {
        v = *reinterpret_cast<const uint4*>(p);
      }
      q[0] = v.x; q[1] = v.y; q[2] = v.z; q[3] = v.w;
      zero = __uint_as_float(0x4b000000u | (inside ? zeros[(size_t)row * groups + col / group_cols] : 0u));
    } else if (direct) {
      u16* planes = sm + (s & 1) * STAGE + X * GM_PLANE;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int c = tid + r * 128, row = c >> 2, chunk = c & 3, col = k0 + chunk * 8;
        bool inside = n0 + row < out && col < in;
        size_t at = inside ? (size_t)(n0 + row) * row_bytes + (size_t)col * 2 : 0;
        cp_async16(gm_at(planes, row, chunk), w + at, inside);
      }
      cp_async_commit();
    } else {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        int c = tid + r * 128, row = c >> 3, col = k0 + (c & 7) * 4;
        wr[r] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (n0 + row < out) wr[r] = gm_load4<PACKED ? GM_F32 : SRC>(w + (size_t)(n0 + row) * row_bytes, col, in);
      }
    }
  };
  auto store = [&](int s) {
    u16 *xs = sm + (s & 1) * STAGE, *ws = xs + X * GM_PLANE;
#pragma unroll
    for (int r = 0; r < 4; r++) gm_store4<X>(xs, (tid + r * 128) >> 3, tid & 7, xr[r]);
    if (PACKED) {
      u32 v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = gm_code<BITS>(q, i * 2, zero) | gm_code<BITS>(q, i * 2 + 1, zero) << 16;
      int row = tid >> 1, chunk = (tid & 1) * 2;
      *reinterpret_cast<uint4*>(gm_at(ws, row, chunk)) = make_uint4(v[0], v[1], v[2], v[3]);
      *reinterpret_cast<uint4*>(gm_at(ws, row, chunk + 1)) = make_uint4(v[4], v[5], v[6], v[7]);
    } else if (!direct) {
#pragma unroll
      for (int r = 0; r < 4; r++) gm_store4<P>(ws, (tid + r * 128) >> 3, tid & 7, wr[r]);
    }
  };

  int left = group_cols, group = 0;
  read_scales(0);
  fetch(0);
  store(0);
  for (int s = 0; s < steps; s++) {
    cp_async_wait<0>();
    __syncthreads();  // step s is stored; step s - 1, in the other half, has been read
    if (s + 1 < steps) fetch(s + 1);
    u16 *xs = sm + (s & 1) * STAGE, *ws = xs + X * GM_PLANE;
#pragma unroll
    for (int kk = 0; kk < 2; kk++) {
      if (s * 32 + kk * 16 >= in) break;
      u32 a[X][2][4], b[P][2][4];
#pragma unroll
      for (int p = 0; p < X; p++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          ldmatrix_x4(a[p][i], gm_at(xs + p * GM_PLANE, wm + i * 16 + (lane & 15), kk * 2 + (lane >> 4)));
#pragma unroll
      for (int p = 0; p < P; p++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int row = wn + j * 16 + (lane & 7) + (lane >> 4) * 8;
          ldmatrix_x4(b[p][j], gm_at(ws + p * GM_PLANE, row, kk * 2 + (lane >> 3 & 1)));
        }
#pragma unroll
      for (int order = 2; order >= 0; order--)
#pragma unroll
        for (int p = 0; p < P; p++) {
          if (p > order || order - p >= X) continue;
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
              mma_16816_bf16(order ? low[i][j] : acc[i][j], a[order - p][i], &b[p][j >> 1][(j & 1) * 2]);
        }
      left -= 16;
      if (left == 0) {
        flush();
        left = group_cols;
        read_scales(++group);
      }
    }
    if (s + 1 < steps) store(s + 1);
  }
  if (left != group_cols) flush();

#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int t = m0 + wm + i * 16 + (lane >> 2) + (e >> 1) * 8, o = n0 + wn + j * 8 + (lane & 3) * 2 + (e & 1);
        if (t < tokens && o < out) y[(size_t)t * out + o] = total[i][j][e] + (bias ? bias[o] : 0.f);
      }
}

template <int X>
DEV void gm_dense(const u8* w, const float* x, const float* bias, float* y, int tokens, int out, int in, int dtype,
                  u16* sm) {
  if (dtype == 0) gm_tile<GM_F32, X>(w, nullptr, nullptr, x, bias, y, tokens, out, in, 64, sm);
  else if (dtype == 1) gm_tile<GM_F16, X>(w, nullptr, nullptr, x, bias, y, tokens, out, in, 64, sm);
  else gm_tile<GM_BF16, X>(w, nullptr, nullptr, x, bias, y, tokens, out, in, 64, sm);
}

KERNEL BOUNDS(128, 2) gemm_dense(const u8* __restrict__ w, const float* __restrict__ x, const float* __restrict__ bias,
                                 float* __restrict__ y, int tokens, int out, int in, int dtype, int terms) {
  SHARED_DYN(u16, sm);
  if (terms == 1) gm_dense<1>(w, x, bias, y, tokens, out, in, dtype, sm);
  else gm_dense<3>(w, x, bias, y, tokens, out, in, dtype, sm);
}

KERNEL BOUNDS(128, 2) gemm_packed(const u32* __restrict__ words, const float* __restrict__ scales,
                                  const u8* __restrict__ zeros, const float* __restrict__ x,
                                  const float* __restrict__ bias, float* __restrict__ y, int tokens, int out, int in,
                                  int group_cols, int bits, int terms) {
  SHARED_DYN(u16, sm);
  const u8* w = reinterpret_cast<const u8*>(words);
  if (bits == 4 && terms == 1) gm_tile<GM_W4, 1>(w, scales, zeros, x, bias, y, tokens, out, in, group_cols, sm);
  else if (bits == 4) gm_tile<GM_W4, 3>(w, scales, zeros, x, bias, y, tokens, out, in, group_cols, sm);
  else if (terms == 1) gm_tile<GM_W8, 1>(w, scales, zeros, x, bias, y, tokens, out, in, group_cols, sm);
  else gm_tile<GM_W8, 3>(w, scales, zeros, x, bias, y, tokens, out, in, group_cols, sm);
}
