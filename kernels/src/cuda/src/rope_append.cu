#include "gpu.h"
// What a decode step does to q, k and v between the products and attention, in one launch.

DEV void append_put(float* to, float v) { *to = v; }
DEV void append_put(u16* to, float v) { *to = f2b(v); }

template <class T>
DEV void rope_append_heads(float* turn, float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                           T* __restrict__ keys, T* __restrict__ values, const float* __restrict__ inv_freq,
                           const int* __restrict__ slots, const int* __restrict__ positions, int heads, int kv_heads,
                           int head_dim, int h, int capacity, float mscale) {
  const int t = blockIdx.x, d = head_dim, position = positions[t];
  if (position < 0) return;
  for (int i = threadIdx.x; i < h; i += blockDim.x) {
    const float angle = (float)position * inv_freq[i];
    turn[i] = cosf(angle) * mscale;
    turn[h + i] = sinf(angle) * mscale;
  }
  __syncthreads();
  const int first = blockIdx.y * 4, count = min(4, heads + kv_heads - first);
  for (int p = threadIdx.x; p < count * d; p += blockDim.x) {
    const int head = first + p / d, e = p % d;
    if (head < heads) {
      if (e >= h) continue;
      float* x = q + ((size_t)t * heads + head) * d + e;
      rope_turn(x[0], x[h], turn[e], turn[h + e], x[0], x[h]);
      continue;
    }
    const int g = head - heads;
    const size_t from = ((size_t)t * kv_heads + g) * d + e;
    const size_t to = (((size_t)slots[t] * kv_heads + g) * capacity + position) * d + e;
    if (e < h) {
      float low, high;
      rope_turn(k[from], k[from + h], turn[e], turn[h + e], low, high);
      append_put(keys + to, low);
      append_put(keys + to + h, high);
    } else if (e >= 2 * h) {
      append_put(keys + to, k[from]);
    }
    append_put(values + to, v[from]);
  }
}

// rope_append, rope_append_half: rope of q in place, rope of k and kv_append; k stays as it was. The same arithmetic as
//           the kernels of rope.cu; a bf16 cache takes keys and values rounded to nearest even.
// shapes    q [tokens, heads, head_dim], k, v [tokens, kv_heads, head_dim] f32; keys, values [slots, kv_heads, capacity,
//           head_dim] f32 or bf16; inv_freq [rotated_half]; slots, positions [tokens], inside the cache (checked by the
//           launcher), no two rows at one place; 2 * rotated_half <= head_dim. Shared memory: 2 * rotated_half floats.
// mapping   grid (token, four heads of queries and then keys), 128 threads; sines once a block, a thread a pair or an
//           element. A row whose position is negative is left alone.
// limit     launch latency: one in place of three.
KERNEL BOUNDS(128, 8)
rope_append(float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v, float* __restrict__ keys,
            float* __restrict__ values, const float* __restrict__ inv_freq, const int* __restrict__ slots,
            const int* __restrict__ positions, int heads, int kv_heads, int head_dim, int rotated_half, int capacity,
            float mscale) {
  grid_ready();
  SHARED_DYN(float, turn);
  rope_append_heads(turn, q, k, v, keys, values, inv_freq, slots, positions, heads, kv_heads, head_dim, rotated_half,
                    capacity, mscale);
}
KERNEL BOUNDS(128, 8)
rope_append_half(float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
                 u16* __restrict__ keys, u16* __restrict__ values, const float* __restrict__ inv_freq,
                 const int* __restrict__ slots, const int* __restrict__ positions, int heads, int kv_heads,
                 int head_dim, int rotated_half, int capacity, float mscale) {
  grid_ready();
  SHARED_DYN(float, turn);
  rope_append_heads(turn, q, k, v, keys, values, inv_freq, slots, positions, heads, kv_heads, head_dim, rotated_half,
                    capacity, mscale);
}
