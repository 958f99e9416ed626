#include "gpu.h"
// wide_half, wide_fast: y[t][o] = sum_i x[t][i] W[o][i] (+ bias[o]) for many tokens on Hopper's warpgroup products (sm_90a).
//           x comes as bf16 planes that wide_split wrote: one, x rounded (half), or three whose sum is x (fast).
//           half: bf16 weights as stored; a packed weight is s (q - z) rounded once to bf16. Sums in f32, one chain a split.
//           fast: bf16 weights and codes less zero points are exact, so all products are. Every 64 columns the accumulator
//           goes into an f32 total, times the group's scale where packed. Within 64 columns the small planes come first,
//           so that their sum is not rounded away against the large one.
// wide_split: plane p of x, [tokens rounded up to 256, stride] bf16, stride = in rounded up to 64, zeros from `in` on; rows past
//           the last token are left as they are. order 0: columns as they are; 4, 8: within 64 columns in the order in which
//           a thread's 4- or 8-bit codes become fragments (wd_decode).
// wide_sum: y[t][o] = sum of the splits, in order (+ bias[o]).
// shapes    x [tokens, in] f32; y [tokens, out] f32, or with splits > 1 parts [splits, tokens, out]; bias [out] f32 or null. bf16 w
//           [out, in], in a multiple of 8. Packed: words [out, in*bits/32], lowest bits first; scales [out, in/group_cols]
//           f32, zeros likewise, u8; in a multiple of 64; group_cols of 16 in half, of 64 in fast. Any tokens and out. Every
//           split has a step: splits <= ceil(steps / ceil(steps / splits)).
// launch    256 threads, one block a multiprocessor, grid min(work items, multiprocessors); dynamic shared memory STAGES x (planes
//           x N x 128 + weights) bytes, weights 16 KiB of bf16, 8 of 8-bit, 4 of 4-bit codes, STAGES as many as 224 KiB hold,
//           6 at most. wide_split: 256 threads, grid ceil(tokens*stride/2048). wide_sum: 256 threads, any grid.
// mapping   A block takes tiles of 128 rows of W by N tokens; rows of W are the M of wgmma, 64 a warpgroup, tokens its N = 256 or
//           128. 64 columns a step through STAGES buffers filled by cp.async, STAGES - 2 steps ahead (fast: - 1), past the
//           end of a tile into the next; one barrier a step, during which the last step's products run. Shared rows are 128
//           bytes, 16-byte chunks swizzled. Row 2 g + i of 16 lies at g + 8 i, so a thread holds neighbours and stores pairs.
//           Packed codes stay packed in shared memory: thread t of four reads columns 16 t .. 16 t + 15 of a row and makes the
//           A fragments of a step in registers, in three sets by turns, while the steps before multiply; x is permuted to match.
//           Tiles are taken in bands of 8 along the tokens, so that the blocks at work share operands in L2. Past the last
//           row or token a tile reads what is there: rows and columns of a product do not mix, and those are not stored.
// limit     dense: copies that arrive late; packed: instructions of the decoding; fast: the pause for the totals at every step.
//           Tried: emptying the tensor cores each step to copy one step further ahead, slower for packed weights and no
//           gain for dense; two sets of fragments, decoded after the wait: 10 % slower.
#if defined(GPU_HAS_WGMMA)

enum { WD_BF16 = 2, WD_W4 = 4, WD_W8 = 8, WD_BAND = 8, WD_PAD = 256 };

// Bytes of a weight's row in a step, of a stage, and stages that fit.
template <int SRC, int X, int N> struct WideShape {
  static const int W_ROW = SRC == WD_BF16 ? 128 : SRC * 8, X_BYTES = X * N * 128, STAGE = X_BYTES + 128 * W_ROW;
  static const int FIT = (224 << 10) / STAGE, STAGES = FIT > 6 ? 6 : FIT;
};

struct WideArgs {
  const u8* w;
  const float* scales;
  const u8* zeros;
  const u16* x;
  const float* bias;
  float* y;
  int tokens, out, in, group_cols, splits;
};

// Row r of 16 lies here: neighbours 2 g, 2 g + 1 at g, g + 8.
DEV int wd_place(int row) { return (row & ~15) | (row >> 1 & 7) | (row & 1) << 3; }

DEV void wd_product(float (&d)[64], u64 a, u64 b, int add) { wgmma_m64n128k16_bf16(d, a, b, add); }
DEV void wd_product(float (&d)[128], u64 a, u64 b, int add) { wgmma_m64n256k16_bf16(d, a, b, add); }
DEV void wd_product(float (&d)[64], const u32 (&a)[4], u64 b, int add) { wgmma_rs_m64n128k16_bf16(d, a, b, add); }
DEV void wd_product(float (&d)[128], const u32 (&a)[4], u64 b, int add) { wgmma_rs_m64n256k16_bf16(d, a, b, add); }

// The four A fragments of a step from 16 codes of rows g (i = 0) and g + 8 (i = 1). Step `f` takes at position 2 t + e + 8 h:
// 4 bits: column 16 t + 8 (f / 2) + 2 (f & 1) + 4 e + h; 8 bits: column 16 t + 4 f + 2 h + e.
template <int BITS, bool ROUND> DEV void wd_decode(u32 (&a)[4][4], const u8* rows, int i, int t, float scale, int zero) {
  // A scale that is a bf16 multiplies pairs at once: the same product, rounded once.
  bool narrow = (__float_as_uint(scale) & 0xffff) == 0;
  if (BITS == 4) {
    uint2 q = *reinterpret_cast<const uint2*>(rows + t * 8);
    u32 minus = 0xc300c300u | (u32)zero << 16 | (u32)zero;  // -(128 + zero), twice
    u32 pair = __byte_perm(__float_as_uint(scale), 0, 0x3232);
#pragma unroll
    for (int f = 0; f < 4; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 v = lop3<0xea>((f < 2 ? q.x : q.y) >> (8 * (f & 1) + 4 * h), 0x000f000fu, 0x43004300u);  // 128 + q
        a[f][h * 2 + i] = bfma2(v, 0x3f803f80u, minus);
      }
    if (ROUND && narrow) {
#pragma unroll
      for (int f = 0; f < 4; f++)
#pragma unroll
        for (int h = 0; h < 2; h++) a[f][h * 2 + i] = bfma2(a[f][h * 2 + i], pair, 0x80008000u);  // + -0 keeps signs
    } else if (ROUND) {
#pragma unroll
      for (int f = 0; f < 4; f++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          u32 v = a[f][h * 2 + i];
          a[f][h * 2 + i] = bf16_pair(__uint_as_float(v << 16) * scale, __uint_as_float(v & 0xffff0000u) * scale);
        }
    }
  } else {
    uint4 q4 = *reinterpret_cast<const uint4*>(rows + t * 16);
    u32 q[4] = {q4.x, q4.y, q4.z, q4.w};
    float minus = __uint_as_float(0x4b000000u | (u32)zero);
#pragma unroll
    for (int f = 0; f < 4; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float lo = __uint_as_float(__byte_perm(q[f], 0x4b000000u, 0x7540 + h * 2)) - minus;
        float hi = __uint_as_float(__byte_perm(q[f], 0x4b000000u, 0x7541 + h * 2)) - minus;
        a[f][h * 2 + i] = ROUND ? bf16_pair(lo * scale, hi * scale)
                                : __byte_perm(__float_as_uint(lo), __float_as_uint(hi), 0x7632);
      }
  }
}
DEV void wd_keep(u32 (&a)[4][4]) {
#pragma unroll
  for (int f = 0; f < 4; f++)
#pragma unroll
    for (int e = 0; e < 4; e++) keep(a[f][e]);
}

// A work item: rows m0.., tokens n0.., steps begin .. end of split `split`.
struct WideItem {
  int m0, n0, begin, end, split;
};
template <int N> DEV WideItem wd_item(int i, const WideArgs& p) {
  int tiles_m = (p.out + 127) / 128, tiles_n = (p.tokens + N - 1) / N, tiles = tiles_m * tiles_n;
  int steps = (p.in + 63) / 64, per = (steps + p.splits - 1) / p.splits;
  WideItem r;
  r.split = i / tiles;
  i -= r.split * tiles;
  int band = i / (WD_BAND * tiles_m), left = tiles_n - band * WD_BAND, wide = left < WD_BAND ? left : WD_BAND;
  i -= band * WD_BAND * tiles_m;
  r.n0 = (band * WD_BAND + i % wide) * N;
  r.m0 = i / wide * 128;
  r.begin = min(r.split * per, steps);
  r.end = min(r.begin + per, steps);
  return r;
}

// Where a thread's copies of a step come from; past the last row of W it reads that row again, for rows that are not stored.
template <int SRC, int X, int N> struct WideLoad {
  typedef WideShape<SRC, X, N> S;
  static const int CHUNKS = S::W_ROW / 16, ROWS = 256 / CHUNKS, COPIES = 128 / ROWS;  // chunks a row, rows at a time
  int item, step, end, slot;
  const u16* x;
  const u8* w[COPIES];
  static MEMBER void begin(WideLoad& l, const WideArgs& p, int stride, size_t w_stride, int items) {
    if (l.item >= items) return;
    WideItem it = wd_item<N>(l.item, p);
    l.step = it.begin;
    l.end = it.end;
    l.x = p.x + (size_t)(it.n0 + (threadIdx.x >> 3)) * stride + it.begin * 64 + (threadIdx.x & 7) * 8;
#pragma unroll
    for (int r = 0; r < COPIES; r++) {
      int o = min(it.m0 + (int)threadIdx.x / CHUNKS + r * ROWS, p.out - 1);
      l.w[r] = p.w + (size_t)o * w_stride + (size_t)it.begin * S::W_ROW + threadIdx.x % CHUNKS * 16;
    }
  }
};

template <int SRC, int X, int N> DEV void wd_run(const WideArgs& p, u8* sm) {
  typedef WideShape<SRC, X, N> S;
  typedef WideLoad<SRC, X, N> L;
  const bool PACKED = SRC != WD_BF16, FAST = X == 3;
  const int BITS = PACKED ? SRC : 8, AHEAD = S::STAGES - (FAST ? 1 : 2), PLANE = N * 128;
  int tid = threadIdx.x, lane = tid & 31, g = lane >> 2, t = lane & 3;
  int wg_row = (tid >> 7) * 64, row = wg_row + ((tid >> 5) & 3) * 16 + g * 2;  // and row + 1
  int stride = (p.in + 63) / 64 * 64, groups = PACKED ? p.in / p.group_cols : 1;
  int items = (p.out + 127) / 128 * ((p.tokens + N - 1) / N) * p.splits;
  size_t w_stride = PACKED ? (size_t)p.in / 8 * SRC : (size_t)p.in * 2;
  size_t plane_elements = (size_t)((p.tokens + WD_PAD - 1) / WD_PAD * WD_PAD) * stride;

  L load;
  load.item = blockIdx.x;
  load.slot = 0;
  L::begin(load, p, stride, w_stride, items);
  u32 x_to = (tid >> 3) * 128 + (((tid & 7) ^ (tid >> 3 & 7)) * 16), w_to;
  if (PACKED) w_to = wd_place(tid / L::CHUNKS) * S::W_ROW + tid % L::CHUNKS * 16;
  else w_to = wd_place(tid >> 3) * 128 + (((tid & 7) ^ (wd_place(tid >> 3) & 7)) * 16);
  auto issue = [&] {
    if (load.item < items) {
      u8 *xs = sm + load.slot * S::STAGE + x_to, *ws = sm + load.slot * S::STAGE + S::X_BYTES + w_to;
#pragma unroll
      for (int plane = 0; plane < X; plane++) {
        const u16* from = load.x + plane * plane_elements;
#pragma unroll
        for (int r = 0; r < N / 32; r++, from += 32 * stride) cp_async16(xs + (plane * (N / 32) + r) * 32 * 128, from, true);
      }
      bool inside = PACKED || load.step * 64 + (tid & 7) * 8 < p.in;
#pragma unroll
      for (int r = 0; r < L::COPIES; r++) {
        cp_async16(ws + r * L::ROWS * S::W_ROW, inside ? load.w[r] : p.w, inside);
        load.w[r] += S::W_ROW;
      }
      load.x += 64;
      load.slot = load.slot + 1 == S::STAGES ? 0 : load.slot + 1;
      if (++load.step == load.end) {
        load.item += gridDim.x;
        L::begin(load, p, stride, w_stride, items);
      }
    }
    cp_async_commit();
  };
  for (int i = 0; i < AHEAD; i++) issue();

  float acc[N / 2];
  const int TOTALS = FAST ? N / 2 : 1;
  float total[TOTALS];
  u32 first[4][4] = {}, second[4][4] = {}, third[4][4] = {};
  float scale[2] = {0.f, 0.f};
  int zero[2] = {0, 0};
  int slot = 0;
  auto after = [&](int s) { return s + 1 == S::STAGES ? 0 : s + 1; };
  auto arrived = [&] {
    cp_async_wait<AHEAD - (PACKED ? 2 : 1)>();
    fence_async_proxy();
    __syncthreads();
  };

  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    WideItem it = wd_item<N>(item, p);
    // The group of this thread's columns in the next step whose codes are decoded, and how far into it they lie.
    int group = 0, into = 0;
    size_t cell[2] = {0, 0};
    auto parameters = [&] {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        scale[i] = p.scales[cell[i] + group];
        zero[i] = p.zeros[cell[i] + group];
      }
    };
    auto next_group = [&](int k) {
      if (k >= it.end) return;
      int old = group;
      for (into += 64; into >= p.group_cols; into -= p.group_cols) group++;
      if (group != old) parameters();
    };
    auto decode = [&](u32(&a)[4][4], int from) {
      const u8* ws = sm + from * S::STAGE + S::X_BYTES + (wd_place(row) & ~8) * S::W_ROW;
#pragma unroll
      for (int i = 0; i < 2; i++) wd_decode<BITS, !FAST>(a, ws + i * 8 * S::W_ROW, i, t, scale[i], zero[i]);
    };
    if (FAST) {
#pragma unroll
      for (int e = 0; e < TOTALS; e++) total[e] = 0.f;
    }
    if (PACKED) {
      int column = it.begin * 64 + t * 16;
      group = column / p.group_cols;
      into = column - group * p.group_cols;
#pragma unroll
      for (int i = 0; i < 2; i++) cell[i] = (size_t)min(it.m0 + row + i, p.out - 1) * groups;
      parameters();
      arrived();
      decode(first, slot);
      if (!FAST) next_group(it.begin + 1);
    }

    // `next` was last read at step k - 2, which is done; `last` at k - 1.
    auto step = [&](int k, u32(&a)[4][4], u32(&next)[4][4], u32(&last)[4][4]) {
      // Step k has arrived, and k + 1 whose codes are decoded during k; all are done with the slot that is filled next.
      arrived();
      const u8 *xs = sm + slot * S::STAGE, *ws = xs + S::X_BYTES;
      u64 db = wgmma_desc(xs), da = PACKED ? 0 : wgmma_desc(ws + wg_row * 128);
      wgmma_fence();
#pragma unroll
      for (int plane = X - 1; plane >= 0; plane--)
#pragma unroll
        for (int f = 0; f < 4; f++) {
          int add = (FAST ? plane < X - 1 : k > it.begin) || f > 0;
          u64 b = db + (u64)(plane * (PLANE / 16) + f * 2);
          if (PACKED) wd_product(acc, a[f], b, add);
          else wd_product(acc, da + f * 2, b, add);
        }
      wgmma_commit();
      issue();
      if (FAST) {
        float now[2] = {scale[0], scale[1]};
        if (PACKED && k + 1 < it.end) {
          next_group(k + 1);
          decode(next, after(slot));
        }
        wgmma_wait<0>();
        if (PACKED) wd_keep(a);
#pragma unroll
        for (int e = 0; e < N / 2; e++) {
          keep(acc[e]);
          if (PACKED) total[e % TOTALS] = fmaf(now[e >> 1 & 1], acc[e], total[e % TOTALS]);
          else total[e % TOTALS] += acc[e];
        }
      } else {
        if (PACKED && k + 1 < it.end) {
          decode(next, after(slot));
          next_group(k + 2);
        }
        wgmma_wait<1>();
        if (PACKED) wd_keep(last);
      }
      slot = after(slot);
    };
    if (PACKED) {
#pragma unroll 1
      for (int k = it.begin; k < it.end; k += 3) {
        step(k, first, second, third);
        if (k + 1 < it.end) step(k + 1, second, third, first);
        if (k + 2 < it.end) step(k + 2, third, first, second);
      }
    } else {
#pragma unroll 1
      for (int k = it.begin; k < it.end; k++) step(k, first, second, third);
    }
    wgmma_wait<0>();
    if (PACKED) {
      wd_keep(first);
      wd_keep(second);
      wd_keep(third);
    }
#pragma unroll
    for (int e = 0; e < N / 2; e++) keep(acc[e]);

    int o = it.m0 + row;
    if (o < p.out) {
      bool second = o + 1 < p.out, pair = second && p.out % 2 == 0;
      float bias[2] = {0.f, 0.f};
      if (p.bias && p.splits == 1) {
        bias[0] = p.bias[o];
        if (second) bias[1] = p.bias[o + 1];
      }
      float* y = p.y + ((size_t)it.split * p.tokens + it.n0 + t * 2) * p.out + o;
      int left = p.tokens - it.n0 - t * 2;
#pragma unroll
      for (int j = 0; j < N / 8; j++, y += (size_t)8 * p.out)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float v[2];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            int e = j * 4 + i * 2 + c;
            v[i] = (FAST ? total[e % TOTALS] : acc[e]) + bias[i];
          }
          if (j * 8 + c >= left) continue;
          float* to = y + (c ? p.out : 0);
          if (pair) {
            *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
          } else {
            to[0] = v[0];
            if (second) to[1] = v[1];
          }
        }
    }
    __syncwarp();
  }
}

#define WIDE_PARAMS                                                                                                     \
  const u8 *__restrict__ w, const float *__restrict__ scales, const u8 *__restrict__ zeros, const u16 *__restrict__ x, \
      const float *__restrict__ bias, float *__restrict__ y, int tokens, int out, int in, int group_cols, int splits
#define WIDE_KERNEL(NAME, SRC, X, N)                                                                     \
  KERNEL BOUNDS(256, 1) NAME(WIDE_PARAMS) {                                                              \
    SHARED_DYN_ALIGNED(u8, sm);                                                                          \
    WideArgs p = {w, scales, zeros, x, bias, y, tokens, out, in, group_cols, splits};                    \
    wd_run<SRC, X, N>(p, sm);                                                                            \
  }
WIDE_KERNEL(wide_half_bf16_128, WD_BF16, 1, 128)
WIDE_KERNEL(wide_half_bf16_256, WD_BF16, 1, 256)
WIDE_KERNEL(wide_half_w4_128, WD_W4, 1, 128)
WIDE_KERNEL(wide_half_w4_256, WD_W4, 1, 256)
WIDE_KERNEL(wide_half_w8_128, WD_W8, 1, 128)
WIDE_KERNEL(wide_half_w8_256, WD_W8, 1, 256)
WIDE_KERNEL(wide_fast_bf16, WD_BF16, 3, 128)
WIDE_KERNEL(wide_fast_w4, WD_W4, 3, 128)
WIDE_KERNEL(wide_fast_w8, WD_W8, 3, 128)
#endif

// Eight columns a thread.
KERNEL BOUNDS(256, 4) wide_split(const float* __restrict__ x, u16* __restrict__ planes, int tokens, int in, int terms,
                                 int order) {
  int stride = (in + 63) / 64 * 64, per_row = stride / 8;
  size_t at = (size_t)blockIdx.x * 256 + threadIdx.x, plane = (size_t)((tokens + 255) / 256 * 256) * per_row;
  if (at >= (size_t)tokens * per_row) return;
  int token = (int)(at / per_row), chunk = (int)(at % per_row), base = chunk / 8 * 64, f = chunk / 2 & 3, h = chunk & 1;
  const float* row = x + (size_t)token * in;
  float v[8];
  if (order == 0 && in % 8 == 0) {
    float4 lo = make_float4(0.f, 0.f, 0.f, 0.f), hi = lo;
    if (chunk * 8 < in) {
      lo = reinterpret_cast<const float4*>(row)[chunk * 2];
      hi = reinterpret_cast<const float4*>(row)[chunk * 2 + 1];
    }
    v[0] = lo.x; v[1] = lo.y; v[2] = lo.z; v[3] = lo.w;
    v[4] = hi.x; v[5] = hi.y; v[6] = hi.z; v[7] = hi.w;
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) {
      int col = chunk * 8 + e, t16 = base + (e >> 1) * 16;
      if (order == 4) col = t16 + (f >> 1) * 8 + (f & 1) * 2 + (e & 1) * 4 + h;
      if (order == 8) col = t16 + f * 4 + h * 2 + (e & 1);
      v[e] = col < in ? row[col] : 0.f;
    }
  }
  u32 q[3][4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    u32 a[3], b[3];
    bf16_split(v[e * 2], a);
    bf16_split(v[e * 2 + 1], b);
#pragma unroll
    for (int p = 0; p < 3; p++) q[p][e] = a[p] | b[p] << 16;
  }
  uint4* to = reinterpret_cast<uint4*>(planes) + at;
  to[0] = make_uint4(q[0][0], q[0][1], q[0][2], q[0][3]);
  if (terms == 3) {
    to[plane] = make_uint4(q[1][0], q[1][1], q[1][2], q[1][3]);
    to[plane * 2] = make_uint4(q[2][0], q[2][1], q[2][2], q[2][3]);
  }
}

KERNEL BOUNDS(256, 1) wide_sum(const float* __restrict__ parts, const float* __restrict__ bias, float* __restrict__ y,
                               int tokens, int out, int splits) {
  size_t count = (size_t)tokens * out;
  for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < count; i += (size_t)gridDim.x * 256) {
    float v = parts[i];
    for (int s = 1; s < splits; s++) v += parts[(size_t)s * count + i];
    y[i] = v + (bias ? bias[i % out] : 0.f);
  }
}
