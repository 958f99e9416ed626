#include "gpu.h"
// narrow_*: y[t][o] = sum_i x[t][i] W[o][i] (+ bias[o]) for a few tokens on tensor cores, for up to three weights that
//           share x in one launch. The weight is read once, in checkpoint order: in mma.m16n8k16 it is the 16 x 16
//           operand, tokens are the 8 columns of the other. The order of columns within a step is free as long as
//           both operands agree, so a lane takes 16 (kind 2: 8) consecutive bytes of a row.
// exact     (narrow_x1, x2, x3: up to 2, 5, 8 tokens) x = x0 + x1 + x2 in bf16, exact, each term a column of its own:
//           f32 accuracy. half (narrow_h1, h2, h4: up to 8, 16, 32 tokens): x rounded to bf16.
//           Packed: W[o][i] = s[o][g] (q[o][i] - z[o][g]); code minus zero point is exact in bf16; s multiplies the
//           accumulator at the end of each step, a step lies in one group. Dense: bf16.
// shapes    x [tokens, in] f32; y_j [tokens, out_j] f32; bias_j [out_j] f32 or null; w_j [out_j, in] bf16, or words
//           [out_j, in*bits/32], lowest bits first; meta_j [ceil(out_j / 16), groups, 16] of narrow_meta. kind 0: bf16
//           in steps of 32 columns, 1: w4 in steps of 128, 2: w4 in steps of 64, 3: w8 in steps of 64; `in` a multiple
//           of the step. Step s lies in group s >> group_shift. An absent weight has out_j = 0.
// launch    512 threads; grid (any number of blocks, splits), at least 4 steps a split; dynamic shared
//           memory as ops_narrow.rs lays it out, for sums of `round` tiles. splits > 1: partial [splits, tokens, 16
//           tiles] and a zero counter for each grid column and round, left zero.
// mapping   A block takes tiles of 16 rows in turn, a warp one of four turns of a tile's steps. Each warp's next
//           weights are on the way to shared memory, across tiles, and before the launch before this one has ended; a
//           lane reads back what it copied itself, so the loop has no barrier.
// order     Steps, turns and splits are added in a fixed order that depends on the weight's shape and the splits alone:
//           a token's result does not depend on the tokens beside it.
// limit     weight bytes.

struct NrWeight {
  const u8* w;
  const u32* meta;
  const float* bias;
  float* y;
  int out;
};

// A codec: bytes of a lane's chunk, 8-column pieces in it, and a piece of one row as the four registers of two k-steps.
struct NrBf16 {
  enum { BYTES = 16, PIECES = 1, PACKED = 0, MID = 0 };
  DEV u32 zero(u32) { return 0; }
  DEV void decode(const u32* q, int, u32, u32 (&f)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = q[i];
  }
  DEV uint4 order(const u32 (&v)[8]) {
    return make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
  }
};
// 128 + code in bf16 is a matter of or-ing bits; pairs are the codes 16 bits apart.
template <int B> struct NrW4 {
  enum { BYTES = B, PIECES = B / 4, PACKED = 1, MID = 8 };
  DEV u32 zero(u32 z) { return 0xc300c300u + z * 0x10001u; }  // -(128 + z), z < 128
  DEV void decode(const u32* q, int piece, u32 zero, u32 (&f)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      f[i] = bfma2(lop3<0xea>(q[piece] >> 4 * i, 0x000f000fu, 0x43004300u), 0x3f803f80u, zero);
  }
  DEV uint4 order(const u32 (&v)[8]) {
    return make_uint4(v[0] | v[4] << 16, v[1] | v[5] << 16, v[2] | v[6] << 16, v[3] | v[7] << 16);
  }
};
struct NrW8 {
  enum { BYTES = 16, PIECES = 2, PACKED = 1, MID = 128 };
  DEV u32 zero(u32 z) { return 0x4b000000u | z; }
  DEV void decode(const u32* q, int piece, u32 zero, u32 (&f)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 word = q[piece * 2 + (i >> 1)], at = 0x7440u + 2 * (i & 1);
      float lo = __uint_as_float(__byte_perm(word, 0x4b000000u, at)) - __uint_as_float(zero);
      float hi = __uint_as_float(__byte_perm(word, 0x4b000000u, at + 1)) - __uint_as_float(zero);
      f[i] = __byte_perm(__float_as_uint(lo), __float_as_uint(hi), 0x7632u);
    }
  }
  DEV uint4 order(const u32 (&v)[8]) { return NrBf16::order(v); }
};


// Stores a sum of row r of a tile: to the partial sums, or finished to y.
DEV void nr_put(const NrWeight& wa, const NrWeight& wb, const NrWeight& wc, int tiles0, int tiles1, int tiles, int tile,
                int r, int token, int tokens, float* partial, float v) {
  if (partial) {
    partial[((size_t)blockIdx.y * tokens + token) * (tiles * 16) + tile * 16 + r] = v;
    return;
  }
  const bool a = tile < tiles0, b = tile < tiles1;
  const int out = a ? wa.out : b ? wb.out : wc.out, o = (a ? tile : b ? tile - tiles0 : tile - tiles1) * 16 + r;
  const float* bias = a ? wa.bias : b ? wb.bias : wc.bias;
  float* y = a ? wa.y : b ? wb.y : wc.y;
  if (o < out) y[(size_t)token * out + o] = v + (bias ? bias[o] : 0.f);
}

// NT tiles of 8 columns; column c of the product is term c / tokens of token c % tokens.
template <class C, int NT, int TERMS, int WARPS, int AHEAD>
DEV void nr_rows(const NrWeight& wa, const NrWeight& wb, const NrWeight& wc, const float* x, float* partial,
                 int* counters, int tokens, int in, int group_shift, int f16_scales, int round, u8* shared) {
  enum { CHUNK = C::PIECES * 8, STEP = 4 * CHUNK, WORDS = C::BYTES / 4, SLOT = 64 * C::BYTES };
  enum { TURNS = 4, SIDE = WARPS / TURNS };
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, turn = warp % TURNS, g = lane >> 2, t = lane & 3;
  const int cols = tokens * TERMS, steps = in / STEP, splits = gridDim.y, groups = ((steps - 1) >> group_shift) + 1;
  const int from = (int)((long long)steps * blockIdx.y / splits);
  const int to = (int)((long long)steps * (blockIdx.y + 1) / splits);
  const int tiles0 = (wa.out + 15) / 16, tiles1 = tiles0 + (wb.out + 15) / 16, tiles = tiles1 + (wc.out + 15) / 16;
  const int mine = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  const int row_bytes = in / CHUNK * C::BYTES;
  u8* const ring = shared + (warp * AHEAD) * SLOT + lane * C::BYTES;            // [warp][AHEAD][2][32] chunks
  uint4* const frag = reinterpret_cast<uint4*>(shared + WARPS * AHEAD * SLOT);  // [step][piece][cols][4]
  float* const sums =                                                           // [tile][turn][16][cols]
      reinterpret_cast<float*>(frag + (size_t)(to - from) * C::PIECES * cols * 4);

  const u8* at_w = nullptr;  // this lane's bytes of row g at the next step
  int down = 0, next_tile = 0, next_step = 0;  // rows from g to the second row: 8, fewer at the end
  auto aim = [&] {
    const int tile = blockIdx.x + next_tile * gridDim.x;
    const bool a = tile < tiles0, b = tile < tiles1;
    const u8* w = a ? wa.w : b ? wb.w : wc.w;
    const int out = a ? wa.out : b ? wb.out : wc.out, row = (a ? tile : b ? tile - tiles0 : tile - tiles1) * 16 + g;
    // beyond the end: the last row again, not stored
    const int r0 = row < out ? row : out - 1, r1 = row + 8 < out ? row + 8 : out - 1;
    at_w = w + (size_t)r0 * row_bytes + t * C::BYTES + (size_t)next_step * (4 * C::BYTES);
    down = (r1 - r0) * row_bytes;
  };
  u32 meta[2] = {0, 0};
  auto fetch = [&](u8* slot, int end) {
    if (next_tile < end) {
      if (C::BYTES == 16) {
        cp_async16(slot, at_w, true);
        cp_async16(slot + 32 * C::BYTES, at_w + down, true);
      } else {
        cp_async8(slot, at_w, true);
        cp_async8(slot + 32 * C::BYTES, at_w + down, true);
      }
      at_w += TURNS * 4 * C::BYTES;
      next_step += TURNS;
      if (next_step >= to) {
        next_step = from + turn;
        next_tile += SIDE;
        if (next_tile < end) aim();
      }
    }
    cp_async_commit();
  };
  auto begin = [&](int first, int end) {
    next_tile = first + warp / TURNS;
    next_step = from + turn;
    if (next_tile < end) aim();
#pragma unroll
    for (int u = 0; u < AHEAD - 1; u++) fetch(ring + u * SLOT, end);
  };
  grid_ready();
  begin(0, round < mine ? round : mine);
  grid_wait();  // x and y belong to the launches before

  const int pieces = (to - from) * (STEP / 8);
  for (int c = threadIdx.x; c < pieces * tokens; c += WARPS * 32) {
    int token = c / pieces, p = c - token * pieces;
    int s = p / (4 * C::PIECES), l = p / C::PIECES % 4, piece = p % C::PIECES;
    const float4* in4 = reinterpret_cast<const float4*>(x + (size_t)token * in + (size_t)from * STEP + p * 8);
    float4 a = in4[0], b = in4[1];
    float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    uint4* at = frag + ((size_t)(s * C::PIECES + piece) * cols + token) * 4 + l;
    u32 h[TERMS][8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (TERMS == 1) {
        h[0][i] = f2b(v[i]);
      } else {
        u32 term[3];
        bf16_split(v[i], term);
#pragma unroll
        for (int k = 0; k < TERMS; k++) h[k][i] = term[k];
      }
    }
#pragma unroll
    for (int k = 0; k < TERMS; k++) at[(size_t)k * tokens * 4] = C::order(h[k]);
  }
  __syncthreads();

  float total[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) total[n][e] = 0.f;
  for (int first = 0; first < mine; first += round) {
    const int end = first + round < mine ? first + round : mine;
    if (first) begin(first, end);
    int step = from + turn, slot = 0;
    const u32* m = nullptr;  // the next step's scales are on their way while a step is multiplied
    auto aim_meta = [&](int tile_at) {
      const int tile = blockIdx.x + tile_at * gridDim.x;
      const bool a = tile < tiles0, b = tile < tiles1;
      const int local = a ? tile : b ? tile - tiles0 : tile - tiles1;
      m = (a ? wa.meta : b ? wb.meta : wc.meta) + (size_t)local * groups * 16 + g;
    };
    int tile = first + warp / TURNS;
    if (C::PACKED && tile < end) {
      aim_meta(tile);
      meta[0] = m[(step >> group_shift) * 16];
      meta[1] = m[(step >> group_shift) * 16 + 8];
    }
    const uint4* at = frag + (size_t)(turn * C::PIECES) * cols * 4 + lane;
#pragma unroll 1
    while (tile < end) {
      cp_async_wait<AHEAD - 2>();
      u32 q[2][WORDS];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const u8* from_slot = ring + slot + r * 32 * C::BYTES;
        if (C::BYTES == 16) {
          uint4 v = *reinterpret_cast<const uint4*>(from_slot);
          q[r][0] = v.x; q[r][1] = v.y; q[r][WORDS - 2] = v.z; q[r][WORDS - 1] = v.w;
        } else {
          uint2 v = *reinterpret_cast<const uint2*>(from_slot);
          q[r][0] = v.x; q[r][1] = v.y;
        }
      }
      const u32 now[2] = {meta[0], meta[1]};
      const int here_tile = tile;
      bool last = false;
      step += TURNS;
      if (step >= to) {
        step = from + turn;
        tile += SIDE;
        last = true;
        if (C::PACKED && tile < end) aim_meta(tile);
      }
      if (C::PACKED && tile < end) {
        meta[0] = m[(step >> group_shift) * 16];
        meta[1] = m[(step >> group_shift) * 16 + 8];
      }
      // the slot read in the step before is free
      fetch(ring + (slot == 0 ? (AHEAD - 1) * SLOT : slot - SLOT), end);
      slot = slot == (AHEAD - 1) * SLOT ? 0 : slot + SLOT;

      float acc[NT][4];
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = 0.f;
      const u32 z[2] = {C::zero(now[0] >> 16), C::zero(now[1] >> 16)};
#pragma unroll
      for (int piece = 0; piece < C::PIECES; piece++) {
        u32 a[4], b[4];
        C::decode(q[0], piece, z[0], a);
        C::decode(q[1], piece, z[1], b);
        const u32 lo[4] = {a[0], b[0], a[1], b[1]}, hi[4] = {a[2], b[2], a[3], b[3]};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (n * 8 + g < cols) v = at[piece * cols * 4 + n * 32];
          const u32 f[4] = {v.x, v.y, v.z, v.w};
          mma_16816_bf16(acc[n], lo, f);
          mma_16816_bf16(acc[n], hi, f + 2);
        }
      }
      float scale[2];
#pragma unroll
      for (int r = 0; r < 2; r++) scale[r] = f16_scales ? h2f((u16)now[r]) : b2f((u16)now[r]);
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          total[n][e] = C::PACKED ? fmaf(scale[e >> 1], acc[n][e], total[n][e]) : total[n][e] + acc[n][e];
      at += TURNS * C::PIECES * cols * 4;
      if (last) {
        float* const here = sums + (size_t)(((here_tile - first) * TURNS + turn) * 16 + g) * cols + t * 2;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            if (n * 8 + t * 2 + (e & 1) < cols) here[(e >> 1) * 8 * cols + n * 8 + (e & 1)] = total[n][e];
            total[n][e] = 0.f;
          }
        at = frag + (size_t)(turn * C::PIECES) * cols * 4 + lane;
      }
    }
    __syncthreads();
    // The sums of the round's tiles in the order of turns and terms.
    for (int i = threadIdx.x; i < (end - first) * 16 * tokens; i += WARPS * 32) {
      const int r = i & 15, k = (i >> 4) % (end - first), token = (i >> 4) / (end - first);
      const int tile = blockIdx.x + (first + k) * gridDim.x;
      float v = 0.f;
#pragma unroll
      for (int j = 0; j < TURNS; j++) {
        const float* s = sums + (size_t)((k * TURNS + j) * 16 + r) * cols + token;
        v += TERMS == 3 ? (s[2 * tokens] + s[tokens]) + s[0] : s[0];
      }
      nr_put(wa, wb, wc, tiles0, tiles1, tiles, tile, r, token, tokens, splits > 1 ? partial : nullptr, v);
    }
    if (splits > 1) {  // the last block to come adds the splits, in their order
      SHARED_ARRAY(int, last, 1);
      int* const counter = counters + blockIdx.x + first / round * gridDim.x;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last[0] = atomicAdd(counter, 1) == splits - 1;
      __syncthreads();
      if (last[0]) {
        __threadfence();
        for (int i = threadIdx.x; i < (end - first) * 16 * tokens; i += WARPS * 32) {
          const int r = i & 15, k = (i >> 4) % (end - first), token = (i >> 4) / (end - first);
          const int tile = blockIdx.x + (first + k) * gridDim.x;
          float v = 0.f;
          for (int j = 0; j < splits; j++) v += partial[((size_t)j * tokens + token) * (tiles * 16) + tile * 16 + r];
          nr_put(wa, wb, wc, tiles0, tiles1, tiles, tile, r, token, tokens, nullptr, v);
        }
        if (threadIdx.x == 0) *counter = 0;
      }
    }
    if (end < mine) __syncthreads();
  }
}

// Scale (bf16, or f16) and zero point of a group in one word, in the order in which a tile of 16 rows reads them:
// meta [ceil(out / 16), groups, 16]. inexact counts the scales that are not of that type.
KERNEL BOUNDS(256, 4) narrow_meta(const float* __restrict__ scales, const u8* __restrict__ zeros,
                                  u32* __restrict__ meta, int* inexact, int out, int groups, int f16) {
  const size_t n = (size_t)((out + 15) / 16) * groups * 16, stride = (size_t)gridDim.x * 256;
  for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < n; i += stride) {
    const size_t row = i / 16 / groups * 16 + i % 16, at = row * groups + i / 16 % groups;
    if (row >= (size_t)out) {
      meta[i] = 0;
      continue;
    }
    const float scale = scales[at];
    const u16 h = f16 ? f2h(scale) : f2b(scale);
    if (!((f16 ? h2f(h) : b2f(h)) == scale)) atomicAdd(inexact, 1);
    meta[i] = h | (u32)zeros[at] << 16;
  }
}

#define NR_ROWS(CODEC, NT, TERMS, WARPS, AHEAD) \
  nr_rows<CODEC, NT, TERMS, WARPS, AHEAD>(a, b, c, x, partial, counters, tokens, in, group_shift, f16_scales, round, sm)

#define NR_KERNEL(NAME, NT, TERMS, WARPS, AHEAD)                                                                       \
  KERNEL BOUNDS(WARPS * 32, 1) NAME(                                                                                   \
      const u8* __restrict__ w0, const u32* __restrict__ meta0, const float* __restrict__ bias0, float* y0,            \
      const u8* __restrict__ w1, const u32* __restrict__ meta1, const float* __restrict__ bias1, float* y1,            \
      const u8* __restrict__ w2, const u32* __restrict__ meta2, const float* __restrict__ bias2, float* y2, int out0,  \
      int out1, int out2, const float* x, float* partial, int* counters, int tokens, int in, int kind,                 \
      int group_shift, int f16_scales, int round) {                                                                    \
    SHARED_DYN(u8, sm);                                                                                                \
    const NrWeight a = {w0, meta0, bias0, y0, out0}, b = {w1, meta1, bias1, y1, out1};                                 \
    const NrWeight c = {w2, meta2, bias2, y2, out2};                                                                   \
    if (kind == 0) NR_ROWS(NrBf16, NT, TERMS, WARPS, AHEAD);                                                           \
    else if (kind == 1) NR_ROWS(NrW4<16>, NT, TERMS, WARPS, AHEAD);                                                    \
    else if (kind == 2) NR_ROWS(NrW4<8>, NT, TERMS, WARPS, AHEAD);                                                     \
    else NR_ROWS(NrW8, NT, TERMS, WARPS, AHEAD);                                                                       \
  }

NR_KERNEL(narrow_x1, 1, 3, 16, 4)
NR_KERNEL(narrow_x2, 2, 3, 16, 4)
NR_KERNEL(narrow_x3, 3, 3, 16, 4)
NR_KERNEL(narrow_h1, 1, 1, 16, 4)
NR_KERNEL(narrow_h2, 2, 1, 16, 4)
NR_KERNEL(narrow_h4, 4, 1, 16, 4)
