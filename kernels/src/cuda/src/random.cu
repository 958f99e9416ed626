#include "gpu.h"
// Random weights made where they are used. Element i depends on seed and i alone, and everything before one last product
// (and one rounding to 16 bits) is integer arithmetic: the same bits on every device as on the host (kernels/src/random.rs).

// 32 random bits of counter i: a multiplicative hash of the low word, MurmurHash3's finalizer, the high word between.
DEV u32 random_word(u32 seed, u64 i) {
  u32 h = (u32)i * 0x9e3779b9u + seed;
  h ^= h >> 16, h *= 0x85ebca6bu;
  h ^= (u32)(i >> 32) * 0x27d4eb2fu;
  h ^= h >> 13, h *= 0xc2b2ae35u;
  return h ^ h >> 16;
}

// About normal: the sum of four bytes, centred, times `scale` (the deviation over that of the sum, 147.8).
DEV float random_normal(u32 seed, u64 i, float scale) {
  const u32 h = random_word(seed, i);
  return (float)((int)((h & 255u) + (h >> 8 & 255u) + (h >> 16 & 255u) + (h >> 24)) - 510) * scale;
}

// random_fill: words of random bits (kind 3), or normal floats of dtype kind 0 f32, 1 f16, 2 bf16
// shapes    to [elements] of 4 bytes (kinds 0, 3) or 2 (kinds 1, 2: element i in half i % 2 of word i / 2).
// mapping   a thread a word; writes are coalesced: bandwidth-bound.
KERNEL BOUNDS(256, 4) random_fill(u32* __restrict__ to, int elements, int kind, u32 seed, float scale) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, n = (u32)elements;
  if (kind == 0 || kind == 3) {
    if (i < n) to[i] = kind == 3 ? random_word(seed, i) : __float_as_uint(random_normal(seed, i, scale));
    return;
  }
  const u32 e = 2u * i;
  if (e >= n) return;
  const float a = random_normal(seed, e, scale), b = random_normal(seed, e + 1u, scale);
  const u32 low = kind == 1 ? f2h(a) : f2b(a), high = kind == 1 ? f2h(b) : f2b(b);
  if (e + 1u < n) to[i] = low | high << 16;
  else reinterpret_cast<u16*>(to)[e] = (u16)low;
}
