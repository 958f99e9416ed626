#include "gpu.h"
// Token embeddings, exact: one multiplication by `scale` after the stored value (dense) or after code and group scale
// (packed), in the order of the reference, so results are equal to it bit for bit.
// mapping   a thread takes one element of the result; reads of a row and writes are coalesced. Bandwidth-bound.

// embed_dense: y[t][c] = table[ids[t]][c] * scale
// shapes    table [vocab, hidden] of dtype 0 f32, 1 f16, 2 bf16; ids [tokens], each below vocab (checked by the
//           launcher); y [tokens, hidden] f32, fewer than 2^31 elements.
KERNEL BOUNDS(256, 4) embed_dense(const void* __restrict__ table, const u32* __restrict__ ids, float* __restrict__ y,
                                  int tokens, int hidden, int dtype, float scale) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, h = (u32)hidden;
  if (i >= (u32)tokens * h) return;
  const size_t at = (size_t)ids[i / h] * h + i % h;
  float v;
  if (dtype == 0) v = static_cast<const float*>(table)[at];
  else if (dtype == 1) v = h2f(static_cast<const u16*>(table)[at]);
  else v = b2f(static_cast<const u16*>(table)[at]);
  y[i] = v * scale;
}

// embed_packed: y[t][c] = (code - zero) * group scale * scale
// shapes    words [vocab, ceil(hidden * bits / 32)] u32, code c of a row at bits [c * bits, c * bits + bits), over two
//           words where bits does not divide 32; scales, zeros [vocab, hidden / group_cols]; ids [tokens], each below
//           vocab (checked by the launcher); y [tokens, hidden] f32. bits 1 to 8; group_cols divides hidden.
KERNEL BOUNDS(256, 4) embed_packed(const u32* __restrict__ words, const float* __restrict__ scales,
                                   const u8* __restrict__ zeros, const u32* __restrict__ ids, float* __restrict__ y,
                                   int tokens, int hidden, int group_cols, int bits, float scale) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, h = (u32)hidden;
  if (i >= (u32)tokens * h) return;
  const u32 id = ids[i / h], col = i % h, row_words = (u32)(((u64)h * bits + 31) / 32);
  const u64 bit = (u64)col * bits;
  const u32 shift = (u32)(bit % 32);
  const u32* word = words + (size_t)id * row_words + bit / 32;
  u64 wide = word[0];
  if (shift + bits > 32) wide |= (u64)word[1] << 32;
  const int code = (int)((u32)(wide >> shift) & ((1u << bits) - 1u));
  const size_t group = (size_t)id * (h / group_cols) + col / group_cols;
  y[i] = (float)(code - (int)zeros[group]) * scales[group] * scale;
}
