#include "gpu.h"
// attention_decode_half_64, attention_decode_half_128: attention_decode over a bf16 cache on tensor cores; parts, order and
// shapes as in attention_decode.cu, keys and values [slots, kv_heads, capacity, head_dim] bf16.
// rounding  Queries and weights enter as two bf16 terms each (16 bits), so only keys and values are rounded to 8.
// mapping   grid (row * splits + part, key head * batches + batch of up to 8 query heads); 128 threads; a warp takes 16 keys
//           at a time straight from global memory into mma fragments, 16 bytes a load, the next while it computes:
//             scores   S [16 keys, 8 heads] = K q^T: the lane of key g and g + 8 holds 8 neighbouring columns of each,
//                      the mma's columns 2t, 2t+1, 2t+8, 2t+9 of two steps; queries are laid out the same way.
//             result   O^T [16 columns, 8 heads] += V^T P^T: a lane holds 8 neighbouring columns of its 4 keys, whose
//                      halves are paired (prmt); P is transposed in registers (movmatrix).
//           Shared memory: 160 head_dim bytes and 272: the merge of the warps, queries.
// limit     reads each key and value once: bandwidth-bound.

// a and b as pairs of bf16 terms: high + low holds 16 bits.
DEV void ad_terms(float a, float b, u32& high, u32& low) {
  high = f2b_pair(a, b);
  low = f2b_pair(a - b2f((u16)high), b - b2f((u16)(high >> 16)));
}

template <int D>
DEV void ad_half(unsigned char* shared, const u16* keys, const u16* values, const AttentionDecode& c) {
  constexpr int J = D / 32, H = D / 64;
  AdPart at;
  if (!ad_locate<8>(c, at)) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, n = at.n;
  float* const sums = reinterpret_cast<float*>(shared);  // [warp][8][D]
  float* const stat = sums + AD_WARPS * 8 * D;           // [warp][8][2]
  u32* const last = reinterpret_cast<u32*>(stat + AD_WARPS * 16);
  uint4* const q = reinterpret_cast<uint4*>(last + 4);  // [high, low][J][lane]
  const u16 *const from_k = keys + at.base + 8 * t, *const from_v = values + at.base + 8 * g;

  uint4 k[2][J], v[4][H];
  auto load_keys = [&](int key0) {
#pragma unroll
    for (int x = 0; x < 2; x++) {
      const int key = key0 + g + 8 * x;
#pragma unroll
      for (int j = 0; j < J; j++)
        k[x][j] = key < n ? *reinterpret_cast<const uint4*>(from_k + (size_t)key * D + 32 * j) : make_uint4(0, 0, 0, 0);
    }
  };
  auto load_values = [&](int key0) {
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const int key = key0 + 2 * t + (x & 1) + (x >> 1) * 8;
#pragma unroll
      for (int h = 0; h < H; h++)
        v[x][h] = key < n ? *reinterpret_cast<const uint4*>(from_v + (size_t)key * D + 64 * h) : make_uint4(0, 0, 0, 0);
    }
  };
  load_keys(warp * 16);
  load_values(warp * 16);

  if (warp < J) {  // the fragments of 32 columns of the queries, for all warps
    u32 high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float4 f = g < at.count ? ad_four(c.q + (at.row + g) * D + 32 * warp + 8 * t + 2 * e)
                                    : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      ad_terms(f.x, f.y, high[e], low[e]), ad_terms(f.z, f.w, high[e + 1], low[e + 1]);
    }
    q[warp * 32 + lane] = make_uint4(high[0], high[1], high[2], high[3]);
    q[(J + warp) * 32 + lane] = make_uint4(low[0], low[1], low[2], low[3]);
  }
  __syncthreads();
  float o[4 * H][4], top[2], total[2];  // of heads 2t and 2t + 1; `total` holds this lane's keys only, until the end
#pragma unroll
  for (int i = 0; i < 4 * H; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
  top[0] = top[1] = -INFINITY, total[0] = total[1] = 0.0f;

  for (int key0 = warp * 16; key0 < n; key0 += 16 * AD_WARPS) {
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < J; j++) {
      const u32 low[4] = {k[0][j].x, k[1][j].x, k[0][j].y, k[1][j].y};
      const u32 high[4] = {k[0][j].z, k[1][j].z, k[0][j].w, k[1][j].w};
#pragma unroll
      for (int term = 0; term < 2; term++) {
        const uint4 b = q[(term * J + j) * 32 + lane];
        const u32 pairs[4] = {b.x, b.y, b.z, b.w};
        mma_16816_bf16(s, low, pairs);
        mma_16816_bf16(s, high, pairs + 2);
      }
    }
    load_keys(key0 + 16 * AD_WARPS);
    float fade[2], p[4];
#pragma unroll
    for (int x = 0; x < 4; x++)
      p[x] = key0 + g + 8 * (x >> 1) < n ? attention_cap(s[x] * c.scale, c.soft_cap) : -INFINITY;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = fmaxf(p[h], p[h + 2]);
#pragma unroll
      for (int w = 4; w < 32; w *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, w));
      most = fmaxf(most, top[h]);
      const float zero = most == -INFINITY ? 0.0f : most;
      fade[h] = expf(top[h] - zero), top[h] = most;
      p[h] = expf(p[h] - zero), p[h + 2] = expf(p[h + 2] - zero);
      total[h] = total[h] * fade[h] + (p[h] + p[h + 2]);
    }
    u32 weight[2][2];
#pragma unroll
    for (int x = 0; x < 2; x++) {
      ad_terms(p[2 * x], p[2 * x + 1], weight[0][x], weight[1][x]);
      weight[0][x] = movmatrix_trans(weight[0][x]), weight[1][x] = movmatrix_trans(weight[1][x]);
    }
#pragma unroll
    for (int h = 0; h < H; h++) {
      const u32 w[4][4] = {{v[0][h].x, v[0][h].y, v[0][h].z, v[0][h].w}, {v[1][h].x, v[1][h].y, v[1][h].z, v[1][h].w},
                           {v[2][h].x, v[2][h].y, v[2][h].z, v[2][h].w}, {v[3][h].x, v[3][h].y, v[3][h].z, v[3][h].w}};
#pragma unroll
      for (int i = 0; i < 4; i++) {  // rows g: column 8 g + 2 i of this half; rows g + 8: the next
        const u32 a[4] = {__byte_perm(w[0][i], w[1][i], 0x5410), __byte_perm(w[0][i], w[1][i], 0x7632),
                          __byte_perm(w[2][i], w[3][i], 0x5410), __byte_perm(w[2][i], w[3][i], 0x7632)};
        float(&to)[4] = o[4 * h + i];
        to[0] *= fade[0], to[1] *= fade[1], to[2] *= fade[0], to[3] *= fade[1];
        mma_16816_bf16(to, a, weight[0]);
        mma_16816_bf16(to, a, weight[1]);
      }
    }
    load_values(key0 + 16 * AD_WARPS);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int w = 4; w < 32; w *= 2) total[h] += __shfl_xor_sync(0xffffffffu, total[h], w);
    const int at_head = warp * 8 + 2 * t + h;
    if (g == 0) stat[at_head * 2] = top[h], stat[at_head * 2 + 1] = total[h];
#pragma unroll
    for (int i = 0; i < 4 * H; i++)
      *reinterpret_cast<float2*>(sums + at_head * D + i / 4 * 64 + 8 * g + i % 4 * 2) = make_float2(o[i][h], o[i][h + 2]);
  }
  ad_finish<8>(sums, stat, last, c, at);
}

#define ATTENTION_DECODE_HALF(NAME, D)                                                                                  \
  KERNEL BOUNDS(128, 3)                                                                                                 \
  NAME(const float* __restrict__ q, const u16* __restrict__ keys, const u16* __restrict__ values, float* y,             \
       const int* __restrict__ row_slot, const int* __restrict__ row_pos, float* part_out, float* part_top,             \
       float* part_sum, u32* arrived, int row0, int heads, int kv_heads, int capacity, float scale, int window,         \
       float soft_cap, int splits) {                                                                                    \
    grid_ready();                                                                                                       \
    SHARED_DYN(unsigned char, shared);                                                                                  \
    const AttentionDecode c = {q,     y,        row_slot, row_pos,  part_out, part_top, part_sum, arrived, row0,        \
                               heads, kv_heads, D,        capacity, scale,    window,   soft_cap, splits};              \
    ad_half<D>(shared, keys, values, c);                                                                                \
  }
ATTENTION_DECODE_HALF(attention_decode_half_64, 64)
ATTENTION_DECODE_HALF(attention_decode_half_128, 128)
