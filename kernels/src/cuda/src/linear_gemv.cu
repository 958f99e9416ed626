#include "gpu.h"
// gemv_dense, gemv_w4, gemv_w8: y[t][o] = sum_i x[t][i] W[o][i] (+ bias[o]) for 1 to 8 tokens.
//           Packed: W[o][i] = s[o][g] (q[o][i] - z[o][g]), g = i / group_cols; codes minus zero points are exact small
//           integers, and the scale multiplies their sum with x over 16 columns.
// shapes    x [tokens, in] f32; y [tokens, out] f32; bias [out] f32 or null; scales [out, in/group_cols] f32; zeros
//           likewise, u8. Dense: w [out, in] in f32, f16 or bf16 (dtype 0, 1, 2), any width. Packed: words
//           [out, in*bits/32], lowest bits first; in and group_cols multiples of 16.
// launch    128 threads; grid ceil(out / 16), or ceil(out / 8) for more than 4 tokens; dynamic shared memory 4 KiB
//           times the tokens rounded up to 1, 2, 4 or 8.
// mapping   one warp for 4 rows (2 for more than 4 tokens), 16 bytes of each row a lane and step. x is staged through
//           shared memory 1024 columns at a time, in the order in which lanes read it; each value read serves all
//           rows of the warp. f32 accumulation by explicit fma, lanes joined by a butterfly: deterministic, and a
//           token's result does not depend on the tokens beside it.
// limit     reads the weight once: bandwidth-bound at 1 or 2 tokens. Rows whose bytes are not a multiple of 16 are read
//           in 4- or 2-byte pieces.

#define GV_WINDOW 1024  // columns of x in shared memory

// A codec says how the 16 bytes q of a lane become CHUNK columns. `zero` is 2^23 plus the zero point: or-ing a code
// into the low mantissa bits of 2^23 gives 2^23 + code exactly, without an integer-to-float conversion.
struct GvF32 {
  enum { CHUNK = 4, PACKED = 0 };
  DEV float get(const u32* q, int i, float) { return __uint_as_float(q[i]); }
};
struct GvF16 {
  enum { CHUNK = 8, PACKED = 0 };
  DEV float get(const u32* q, int i, float) { return h2f((u16)(q[i >> 1] >> 16 * (i & 1))); }
};
struct GvBf16 {
  enum { CHUNK = 8, PACKED = 0 };
  DEV float get(const u32* q, int i, float) {
    return __uint_as_float(i & 1 ? q[i >> 1] & 0xffff0000u : q[i >> 1] << 16);
  }
};
struct GvW8 {
  enum { CHUNK = 16, PACKED = 1 };
  DEV float get(const u32* q, int i, float zero) {
    return __uint_as_float((q[i >> 2] >> 8 * (i & 3) & 0xffu) | 0x4b000000u) - zero;
  }
};
struct GvW4 {
  enum { CHUNK = 32, PACKED = 1 };
  DEV float get(const u32* q, int i, float zero) {
    return __uint_as_float((q[i >> 3] >> 4 * (i & 7) & 0xfu) | 0x4b000000u) - zero;
  }
};

// The 16 bytes at `at` of a row of `bytes`, zeros beyond its end.
DEV void gv_load(u32 (&q)[4], const u8* row, size_t at, size_t bytes) {
  if (bytes % 16 == 0) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (at < bytes) v = *reinterpret_cast<const uint4*>(row + at);
    q[0] = v.x; q[1] = v.y; q[2] = v.z; q[3] = v.w;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    size_t a = at + 4 * j;
    q[j] = 0;
    if (bytes % 4 == 0) {
      if (a < bytes) q[j] = *reinterpret_cast<const u32*>(row + a);
    } else {
      if (a < bytes) q[j] = *reinterpret_cast<const u16*>(row + a);
      if (a + 2 < bytes) q[j] |= (u32) * reinterpret_cast<const u16*>(row + a + 2) << 16;
    }
  }
}

// Slot of the 16-byte piece `i` of a lane's chunk: lanes side by side for readers, xor-ed so that writers, which walk
// along x, meet different banks.
template <int CHUNK> DEV int gv_slot(int step, int lane, int i) {
  return (step * (CHUNK / 4) + i) * 32 + (lane ^ (i * (32 / CHUNK)));
}

template <class C, int T>
DEV void gv_stage(float4* stage, const float* x, int tokens, int in, int first) {
  for (int s = threadIdx.x; s < T * (GV_WINDOW / 4); s += 128) {
    int t = s / (GV_WINDOW / 4), quad = s % (GV_WINDOW / 4), col = first + quad * 4;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (t < tokens && col < in) {
      const float* p = x + (size_t)t * in + col;
      if (in % 4 == 0) {
        v = *reinterpret_cast<const float4*>(p);
      } else {
        v.x = p[0];
        if (col + 1 < in) v.y = p[1];
        if (col + 2 < in) v.z = p[2];
        if (col + 3 < in) v.w = p[3];
      }
    }
    int chunk = quad / (C::CHUNK / 4), i = quad % (C::CHUNK / 4);
    stage[t * (GV_WINDOW / 4) + gv_slot<C::CHUNK>(chunk / 32, chunk % 32, i)] = v;
  }
}

template <class C, int T>
DEV void gv_rows(const u8* w, size_t row_bytes, const float* scales, const u8* zeros, const float* x,
                 const float* bias, float* y, int tokens, int out, int in, int group_cols, float4* stage) {
  const int R = T > 4 ? 2 : 4, SPAN = C::PACKED ? 16 : C::CHUNK;
  int lane = threadIdx.x & 31, row0 = (int)(blockIdx.x * 4 + (threadIdx.x >> 5)) * R;
  int groups = C::PACKED ? in / group_cols : 1;
  size_t row[R];
#pragma unroll
  for (int r = 0; r < R; r++) row[r] = row0 + r < out ? row0 + r : out - 1;  // beyond the end: read again, not stored
  float acc[R][T];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int t = 0; t < T; t++) acc[r][t] = 0.f;

  for (int first = 0; first < in; first += GV_WINDOW) {
    if (first) __syncthreads();
    gv_stage<C, T>(stage, x, tokens, in, first);
    __syncthreads();
    for (int step = 0; step < GV_WINDOW / (32 * C::CHUNK) && first + step * 32 * C::CHUNK < in; step++) {
      int col = first + (step * 32 + lane) * C::CHUNK;
      u32 q[R][4];
#pragma unroll
      for (int r = 0; r < R; r++) gv_load(q[r], w + row[r] * row_bytes, (size_t)(col / C::CHUNK) * 16, row_bytes);
#pragma unroll
      for (int h = 0; h < C::CHUNK; h += SPAN) {
        float scale[R], zero[R], part[R][T];
        size_t group = C::PACKED ? (col + h) / group_cols : 0;
#pragma unroll
        for (int r = 0; r < R; r++) {
          bool inside = C::PACKED && col + h < in;
          scale[r] = inside ? scales[row[r] * groups + group] : 0.f;
          zero[r] = __uint_as_float(0x4b000000u | (inside ? zeros[row[r] * groups + group] : 0u));
#pragma unroll
          for (int t = 0; t < T; t++) part[r][t] = C::PACKED ? 0.f : acc[r][t];
        }
#pragma unroll
        for (int i = h / 4; i < (h + SPAN) / 4; i++) {
          float v[R][4];
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int e = 0; e < 4; e++) v[r][e] = C::get(q[r], i * 4 + e, zero[r]);
#pragma unroll
          for (int t = 0; t < T; t++) {
            float4 xv = stage[t * (GV_WINDOW / 4) + gv_slot<C::CHUNK>(step, lane, i)];
#pragma unroll
            for (int r = 0; r < R; r++) {
              float p = fmaf(v[r][0], xv.x, part[r][t]);
              p = fmaf(v[r][1], xv.y, p);
              p = fmaf(v[r][2], xv.z, p);
              part[r][t] = fmaf(v[r][3], xv.w, p);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
          for (int t = 0; t < T; t++) acc[r][t] = C::PACKED ? fmaf(scale[r], part[r][t], acc[r][t]) : part[r][t];
      }
    }
  }

  float mine = 0.f;  // lane r * T + t keeps the result of row r, token t
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int t = 0; t < T; t++) {
      float s = warp_sum(acc[r][t]);
      if (lane == r * T + t) mine = s;
    }
  int r = row0 + lane / T, t = lane % T;
  if (lane < R * T && r < out && t < tokens) y[(size_t)t * out + r] = mine + (bias ? bias[r] : 0.f);
}

template <class C>
DEV void gv_tokens(const u8* w, size_t row_bytes, const float* scales, const u8* zeros, const float* x,
                   const float* bias, float* y, int tokens, int out, int in, int group_cols, float4* stage) {
  if (tokens == 1) gv_rows<C, 1>(w, row_bytes, scales, zeros, x, bias, y, tokens, out, in, group_cols, stage);
  else if (tokens == 2) gv_rows<C, 2>(w, row_bytes, scales, zeros, x, bias, y, tokens, out, in, group_cols, stage);
  else if (tokens <= 4) gv_rows<C, 4>(w, row_bytes, scales, zeros, x, bias, y, tokens, out, in, group_cols, stage);
  else gv_rows<C, 8>(w, row_bytes, scales, zeros, x, bias, y, tokens, out, in, group_cols, stage);
}

KERNEL BOUNDS(128, 4) gemv_dense(const u8* __restrict__ w, const float* __restrict__ x, const float* __restrict__ bias,
                                 float* __restrict__ y, int tokens, int out, int in, int dtype) {
  SHARED_DYN(float4, stage);
  if (dtype == 0) gv_tokens<GvF32>(w, (size_t)in * 4, nullptr, nullptr, x, bias, y, tokens, out, in, 1, stage);
  else if (dtype == 1) gv_tokens<GvF16>(w, (size_t)in * 2, nullptr, nullptr, x, bias, y, tokens, out, in, 1, stage);
  else gv_tokens<GvBf16>(w, (size_t)in * 2, nullptr, nullptr, x, bias, y, tokens, out, in, 1, stage);
}

KERNEL BOUNDS(128, 4) gemv_w4(const u32* __restrict__ words, const float* __restrict__ scales,
                              const u8* __restrict__ zeros, const float* __restrict__ x,
                              const float* __restrict__ bias, float* __restrict__ y, int tokens, int out, int in,
                              int group_cols) {
  SHARED_DYN(float4, stage);
  gv_tokens<GvW4>(reinterpret_cast<const u8*>(words), (size_t)in / 2, scales, zeros, x, bias, y, tokens, out, in,
                  group_cols, stage);
}

KERNEL BOUNDS(128, 4) gemv_w8(const u32* __restrict__ words, const float* __restrict__ scales,
                              const u8* __restrict__ zeros, const float* __restrict__ x,
                              const float* __restrict__ bias, float* __restrict__ y, int tokens, int out, int in,
                              int group_cols) {
  SHARED_DYN(float4, stage);
  gv_tokens<GvW8>(reinterpret_cast<const u8*>(words), (size_t)in, scales, zeros, x, bias, y, tokens, out, in,
                  group_cols, stage);
}
