#include "gpu.h"
// hessian_wide: h[i][j] += sum_t x[t][i] x[t][j] for j >= i on Hopper's warpgroup products (sm_90a); the lower triangle
//           stays as it is. Column i times a power of two s_i is h0 + h1 with f16 terms: with the largest element
//           of a column in [2^14, 2^15), 22 bits of every element down to 2^-17 of it and an absolute 2^-40 of it below.
//           Products h0 h0 + h0 h1 + h1 h0, all exact; h1 h1 is below 2^-22 of |x x|. Two terms of 11 bits do with three
//           products what three terms of 8 bits do with six. Every 64 tokens the accumulator goes into an f32 total, the
//           small products first, so that their sum is not rounded away against the large one; h is touched once.
// hessian_scales: s_i from the largest |x[t][i]|; 1 where that is zero or not finite.
// hessian_split: planes h0, h1 of x transposed, [2, n rounded up to 128, stride] f16, stride = tokens rounded up to 64, zeros from
//           the last token on; rows from n on are left as they are.
// shapes    h [n, n] f32; x [tokens, n] f32; scale [n] f32; any n, any tokens > 0.
// launch    hessian_wide: 256 threads, one block a multiprocessor, grid min(tiles of 128 x 128 with j >= i, multiprocessors); 192 KiB
//           of dynamic shared memory. hessian_scales: 256 threads, grid ceil(n/32). hessian_split: 256 threads, grid
//           (ceil(n/64), stride/64).
// mapping   As linear_wide.cu: 64 tokens a step through three buffers, two steps ahead and into the next tile. A tile on the
//           diagonal loads one operand for both sides. Tiles go in bands of 8 rows, columns first, so that the blocks at
//           work share operands in L2. No atomics: deterministic.
// limit     3 wgmma per 16 tokens on half the square.

// Largest of a column over all tokens: 32 columns by 8 tokens a block.
KERNEL BOUNDS(256, 4) hessian_scales(const float* __restrict__ x, float* __restrict__ scale, int tokens, int n) {
  SHARED_ARRAY(float, most, 256);
  int column = blockIdx.x * 32 + (threadIdx.x & 31);
  float m = 0.f;
  if (column < n)
    for (int t = threadIdx.x >> 5; t < tokens; t += 8) m = fmaxf(m, fabsf(x[(size_t)t * n + column]));
  most[threadIdx.x] = m;
  __syncthreads();
  if (threadIdx.x >= 32 || column >= n) return;
  for (int i = 1; i < 8; i++) m = fmaxf(m, most[threadIdx.x + i * 32]);
  int exponent = (int)(__float_as_uint(m) >> 23);  // of a number in [2^(exponent - 127), 2^(exponent - 126))
  bool plain = m > 0.f && exponent < 255;
  // 1 / s must be a normal number, too.
  scale[column] = plain ? __uint_as_float((u32)min(254 + 14 - exponent, 253) << 23) : 1.f;
}

// 64 tokens by 64 columns a block.
KERNEL BOUNDS(256, 4) hessian_split(const float* __restrict__ x, const float* __restrict__ scale,
                                    u16* __restrict__ planes, int tokens, int n) {
  SHARED_ARRAY(float, tile, 64 * 65);
  int c0 = blockIdx.x * 64, t0 = blockIdx.y * 64, column = threadIdx.x & 63;
  float s = c0 + column < n ? scale[c0 + column] : 0.f;
  for (int t = threadIdx.x >> 6; t < 64; t += 4) {
    bool inside = c0 + column < n && t0 + t < tokens;
    tile[column * 65 + t] = inside ? x[(size_t)(t0 + t) * n + c0 + column] * s : 0.f;
  }
  __syncthreads();
  size_t stride = (size_t)(tokens + 63) / 64 * 64, plane = (size_t)(n + 127) / 128 * 128 * stride;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int c = (threadIdx.x >> 3) + r * 32, chunk = threadIdx.x & 7;
    if (c0 + c >= n) continue;
    u32 high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float a = tile[c * 65 + chunk * 8 + e * 2], b = tile[c * 65 + chunk * 8 + e * 2 + 1];
      u16 ah = f2h(a), bh = f2h(b);
      // An infinity stays in the large term.
      u16 al = f2h((ah & 0x7c00) == 0x7c00 ? 0.f : a - h2f(ah)), bl = f2h((bh & 0x7c00) == 0x7c00 ? 0.f : b - h2f(bh));
      high[e] = ah | (u32)bh << 16;
      low[e] = al | (u32)bl << 16;
    }
    u16* to = planes + (size_t)(c0 + c) * stride + t0 + chunk * 8;
    *reinterpret_cast<uint4*>(to) = make_uint4(high[0], high[1], high[2], high[3]);
    *reinterpret_cast<uint4*>(to + plane) = make_uint4(low[0], low[1], low[2], low[3]);
  }
}

#if defined(GPU_HAS_WGMMA)
enum { HW_PLANE = 128 * 128, HW_SIDE = 2 * HW_PLANE, HW_STAGE = 2 * HW_SIDE, HW_STAGES = 3, HW_BAND = 8 };

// The i-th tile with column >= row: bands of 8 rows, within a band column by column.
DEV int2 hw_item(int i, int side) {
  int first = 0;
  for (;; first += HW_BAND) {
    int rows = min((int)HW_BAND, side - first), corner = rows * (rows + 1) / 2;
    if (i < corner) {
      int column = 0;
      while (i > column) i -= ++column;
      return make_int2(first + i, first + column);
    }
    int rest = rows * (side - first - rows);
    if (i < corner + rest) return make_int2(first + (i - corner) % rows, first + rows + (i - corner) / rows);
    i -= corner + rest;
  }
}

KERNEL BOUNDS(256, 1) hessian_wide(float* __restrict__ h, const u16* __restrict__ planes, const float* __restrict__ scale,
                                   int tokens, int n) {
  SHARED_DYN_ALIGNED(u8, sm);  // [stage][rows' side, columns' side][term][128 columns of x, 64 tokens]
  int tid = threadIdx.x, lane = tid & 31, wg_row = (tid >> 7) * 64;
  int side = (n + 127) / 128, items = side * (side + 1) / 2, steps = (tokens + 63) / 64, stride = steps * 64;

  int load_item = blockIdx.x, load_step = 0, load_slot = 0;
  bool diagonal = false;
  size_t plane = (size_t)side * 128 * stride;
  const u16 *from_rows = planes, *from_columns = planes;
  auto begin = [&] {
    if (load_item >= items) return;
    int2 at = hw_item(load_item, side);
    diagonal = at.x == at.y;
    from_rows = planes + (size_t)(at.x * 128 + (tid >> 3)) * stride + (tid & 7) * 8;
    from_columns = planes + (size_t)(at.y * 128 + (tid >> 3)) * stride + (tid & 7) * 8;
  };
  begin();
  auto copy = [&](u8* to, const u16* from) {
#pragma unroll
    for (int term = 0; term < 2; term++, from += plane) {
      const u16* p = from;
#pragma unroll
      for (int r = 0; r < 4; r++, p += 32 * stride) cp_async16(to + (term * 4 + r) * 32 * 128, p, true);
    }
  };
  auto issue = [&] {
    if (load_item < items) {
      u8* to = sm + load_slot * HW_STAGE + (tid >> 3) * 128 + (((tid & 7) ^ (tid >> 3 & 7)) * 16);
      copy(to, from_rows);
      if (!diagonal) copy(to + HW_SIDE, from_columns);
      from_rows += 64;
      from_columns += 64;
      load_slot = load_slot + 1 == HW_STAGES ? 0 : load_slot + 1;
      if (++load_step == steps) {
        load_step = 0;
        load_item += gridDim.x;
        begin();
      }
    }
    cp_async_commit();
  };
  for (int i = 0; i < HW_STAGES - 1; i++) issue();

  float acc[64], total[64];
  int slot = 0;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    int2 at = hw_item(item, side);
#pragma unroll
    for (int e = 0; e < 64; e++) total[e] = 0.f;
#pragma unroll 1
    for (int k = 0; k < steps; k++) {
      cp_async_wait<HW_STAGES - 2>();
      fence_async_proxy();
      __syncthreads();  // step k has arrived; all are done with k - 1, whose slot is filled next
      const u8* rows = sm + slot * HW_STAGE;
      u64 a = wgmma_desc(rows + wg_row * 128), b = wgmma_desc(at.x == at.y ? rows : rows + HW_SIDE);
      wgmma_fence();
#pragma unroll
      for (int order = 0; order < 3; order++)  // h1 h0, h0 h1, h0 h0
#pragma unroll
        for (int f = 0; f < 4; f++)
          wgmma_m64n128k16_f16(acc, a + (order == 0 ? HW_PLANE / 16 : 0) + f * 2,
                               b + (order == 1 ? HW_PLANE / 16 : 0) + f * 2, order + f > 0);
      wgmma_commit();
      issue();
      wgmma_wait<0>();
#pragma unroll
      for (int e = 0; e < 64; e++) {
        keep(acc[e]);
        total[e] += acc[e];
      }
      slot = slot + 1 == HW_STAGES ? 0 : slot + 1;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int r = at.x * 128 + wg_row + ((tid >> 5) & 3) * 16 + (lane >> 2) + i * 8, c0 = at.y * 128 + (lane & 3) * 2;
      if (r < n) {
        float own = 1.f / scale[r];
        float* to = h + (size_t)r * n + c0;
        float2 old[16], other[16];
        // All reads first: the compiler may not move one past a write.
#pragma unroll
        for (int j = 0; j < 16; j++) {
          int c = c0 + j * 8;
          bool first = c < n, second = c + 1 < n;
          old[j] = other[j] = make_float2(0.f, 0.f);
          if (second && n % 2 == 0) {
            old[j] = *reinterpret_cast<const float2*>(to + j * 8);
            other[j] = *reinterpret_cast<const float2*>(scale + c);
          } else {
            if (first) old[j].x = to[j * 8], other[j].x = scale[c];
            if (second) old[j].y = to[j * 8 + 1], other[j].y = scale[c + 1];
          }
        }
#pragma unroll
        for (int j = 0; j < 16; j++) {
          int c = c0 + j * 8;
          bool first = c < n && c >= r, second = c + 1 < n && c + 1 >= r;
          float x = old[j].x + total[j * 4 + i * 2] * own * (1.f / other[j].x);
          float y = old[j].y + total[j * 4 + i * 2 + 1] * own * (1.f / other[j].y);
          if (first && second && n % 2 == 0) {
            *reinterpret_cast<float2*>(to + j * 8) = make_float2(x, y);
          } else {
            if (first) to[j * 8] = x;
            if (second) to[j * 8 + 1] = y;
          }
        }
      }
    }
    __syncwarp();
  }
}
#endif
