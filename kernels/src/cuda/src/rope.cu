#include "gpu.h"
// Positions and the cache of keys and values. A row whose position is negative is of no sequence and is left alone.

// (x, y) turned by (c, s): each result one product and one fused multiply-add, in the CPU's order.
DEV void rope_turn(float x, float y, float c, float s, float& low, float& high) {
  low = fmaf(x, c, -(y * s));
  high = fmaf(y, c, x * s);
}

// rope: for i < h = rotated_half, a = positions[t] * inv_freq[i], c = mscale * cos a, s = mscale * sin a:
//           x[t][head][i], x[t][head][i + h] = x_i * c - x_{i+h} * s, x_{i+h} * c + x_i * s; elements >= 2 h stay.
// shapes    x [tokens, heads, head_dim] f32, in place; inv_freq [rotated_half] f32; positions [tokens] i32;
//           2 * rotated_half <= head_dim. Shared memory: 2 * rotated_half floats.
// mapping   one block a token, blockDim.x <= 256: sines once a row into shared memory, then a thread a pair.
// limit     bandwidth-bound; sinf and cosf at full precision (angles reach tens of thousands of radians).
KERNEL BOUNDS(256, 4) rope(float* __restrict__ x, const float* __restrict__ inv_freq, const int* __restrict__ positions,
                           int tokens, int heads, int head_dim, int rotated_half, float mscale) {
  grid_ready();
  SHARED_DYN(float, turn);  // cosines, then sines
  const int t = blockIdx.x, h = rotated_half;
  if (t >= tokens) return;
  const int position = positions[t];
  if (position < 0) return;
  for (int i = threadIdx.x; i < h; i += blockDim.x) {
    float angle = (float)position * inv_freq[i];
    turn[i] = cosf(angle) * mscale;
    turn[h + i] = sinf(angle) * mscale;
  }
  __syncthreads();
  float* row = x + (size_t)t * heads * head_dim;
  for (int p = threadIdx.x; p < heads * h; p += blockDim.x) {
    int i = p % h;
    float *low = row + p / h * head_dim + i, *high = low + h;
    rope_turn(*low, *high, turn[i], turn[h + i], *low, *high);
  }
}

// kv_append: keys[slots[t]][g][positions[t]][e] = k[t][g][e], and the same for values
// shapes    k, v [tokens, kv_heads, head_dim] f32; keys, values [slots, kv_heads, capacity, head_dim] f32; slots,
//           positions [tokens] i32, inside the cache (checked by the launcher), no two rows at one place.
// mapping   a thread copies one element of each; bandwidth-bound.
KERNEL BOUNDS(256, 4) kv_append(float* __restrict__ keys, float* __restrict__ values, const float* __restrict__ k,
                                const float* __restrict__ v, const int* __restrict__ slots,
                                const int* __restrict__ positions, int tokens, int kv_heads, int head_dim,
                                int capacity) {
  grid_ready();
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, d = (u32)head_dim, width = (u32)kv_heads * d;
  if (i >= (u32)tokens * width) return;
  const u32 t = i / width, g = i % width / d, e = i % d;
  const int position = positions[t];
  if (position < 0) return;
  const size_t to = (((size_t)slots[t] * kv_heads + g) * capacity + position) * d + e;
  keys[to] = k[i];
  values[to] = v[i];
}

// kv_append_half: kv_append into a bf16 cache, rounding to nearest even
// shapes    keys, values bf16; the rest as in kv_append.
// mapping   a thread copies one element of each; bandwidth-bound.
KERNEL BOUNDS(256, 4) kv_append_half(u16* __restrict__ keys, u16* __restrict__ values, const float* __restrict__ k,
                                     const float* __restrict__ v, const int* __restrict__ slots,
                                     const int* __restrict__ positions, int tokens, int kv_heads, int head_dim,
                                     int capacity) {
  grid_ready();
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, d = (u32)head_dim, width = (u32)kv_heads * d;
  if (i >= (u32)tokens * width) return;
  const u32 t = i / width, g = i % width / d, e = i % d;
  const int position = positions[t];
  if (position < 0) return;
  const size_t to = (((size_t)slots[t] * kv_heads + g) * capacity + position) * d + e;
  keys[to] = f2b(k[i]);
  values[to] = f2b(v[i]);
}
