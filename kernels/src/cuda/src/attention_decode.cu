#include "gpu.h"
// Attention of one query a sequence over the cache, with the sequence cut into parts (split-K) that are merged in the
// same launch; definitions as in attention.cu.
// parts     A row that looks at n keys, the first of them key `first`, is cut into parts of P keys from `first`
//           on: P = 64 up to 1024 keys, else the smallest of 128, 256, .. for which 64 parts are enough. The cut depends on
//           the row alone.
// order     Each warp of a part takes every fourth tile of keys and keeps its own maximum and sums (arXiv 2205.14135);
//           warps are merged in order, then parts in order by the last block of a row to finish. Which block that is does
//           not enter the result.
// replay    The grid may have more parts than any row needs: blocks beyond a row's own leave at once. Lengths are read
//           on the device, so a captured launch stays good until a row needs more parts than the grid has.

constexpr int AD_KEYS = 64;   // keys of a part, at least
constexpr int AD_SHORT = 1024;  // keys of rows with such parts
constexpr int AD_PARTS = 64;  // parts of a row, at most
constexpr int AD_WARPS = 4;

struct AttentionDecode {
  const float* q;
  float* y;
  const int *row_slot, *row_pos;
  float *part_out, *part_top, *part_sum;
  u32* arrived;
  int row0, heads, kv_heads, head_dim, capacity;
  float scale;
  int window;
  float soft_cap;
  int splits;
};

// One part of one row.
struct AdPart {
  int turn, split, parts, count;  // row of the launch, part, parts of the row, query heads
  int n;                          // keys
  size_t row, place, base;        // first head's row in y, in the parts; first element in the cache
};

DEV float4 ad_four(const float* p) { return *reinterpret_cast<const float4*>(p); }
DEV void ad_fma(float4& o, float w, const float4& v) {
  o.x = fmaf(w, v.x, o.x), o.y = fmaf(w, v.y, o.y), o.z = fmaf(w, v.z, o.z), o.w = fmaf(w, v.w, o.w);
}

// Sums over 2 W lanes, each of which has its own 2 W numbers: half of them go to the partner at each step, until lane i
// holds sum i in s[0].
template <int W> DEV void ad_fold(float* s, int lane) {
#pragma unroll
  for (int x = 0; x < W; x++) {
    const float give = lane & W ? s[x] : s[x + W], keep = lane & W ? s[x + W] : s[x];
    s[x] = keep + __shfl_xor_sync(0xffffffffu, give, W);
  }
  if constexpr (W > 1) ad_fold<W / 2>(s, lane);
}

// The last block of a row and its heads: y = sum_s e^(top_s - top) out_s / sum_s e^(top_s - top) sum_s.
// `shared` holds AD_PARTS + 1 floats a head.
DEV void ad_merge(float* shared, const AttentionDecode& c, const AdPart& at) {
  const int tid = threadIdx.x, lane = tid & 31, n4 = c.head_dim / 4, columns = at.count * n4;
  float *weight = shared, *total = shared + at.count * AD_PARTS;
  float4 v[16];
  auto fetch = [&](int i, int from) {
    const float* p = c.part_out + (at.place + i / n4) * c.splits * c.head_dim + i % n4 * 4;
#pragma unroll
    for (int j = 0; j < 16; j++)
      v[j] = i < columns && from + j < at.parts ? ad_four(p + (size_t)(from + j) * c.head_dim)
                                                : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  fetch(tid, 0);  // arrives while the weights are computed
  for (int h = tid >> 5; h < at.count; h += AD_WARPS) {
    float top[AD_PARTS / 32], sums[AD_PARTS / 32], most = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < AD_PARTS / 32; i++) {
      const int s = lane + 32 * i;
      const size_t from = (at.place + h) * c.splits + s;
      top[i] = s < at.parts ? c.part_top[from] : -INFINITY;
      sums[i] = s < at.parts ? c.part_sum[from] : 0.0f;
      most = fmaxf(most, top[i]);
    }
    most = warp_max(most);
    const float zero = most == -INFINITY ? 0.0f : most;
#pragma unroll
    for (int i = 0; i < AD_PARTS / 32; i++) {
      const float w = expf(top[i] - zero);
      weight[h * AD_PARTS + lane + 32 * i] = w, sum += w * sums[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) total[h] = sum;
  }
  __syncthreads();
  for (int i = tid; i < columns; i += 32 * AD_WARPS) {
    const int h = i / n4;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < at.parts; s += 16) {
      if (i != tid || s > 0) fetch(i, s);
#pragma unroll
      for (int j = 0; j < 16; j++) ad_fma(o, weight[h * AD_PARTS + s + j], v[j]);
    }
    const float d = total[h];
    *reinterpret_cast<float4*>(c.y + (at.row + h) * c.head_dim + i % n4 * 4) =
        make_float4(o.x / d, o.y / d, o.z / d, o.w / d);
  }
}

// The part of this block, of up to GB heads; false where there is none, a row of no sequence having been cleared.
template <int GB> DEV bool ad_locate(const AttentionDecode& c, AdPart& at) {
  at.turn = blockIdx.x / c.splits, at.split = blockIdx.x % c.splits;
  const int token = c.row0 + at.turn, batches = gridDim.y / c.kv_heads, G = c.heads / c.kv_heads;
  const int pos = c.row_pos[token], slot = c.row_slot[token], group = blockIdx.y / batches;
  const int head = blockIdx.y % batches * GB;
  at.count = min(GB, G - head);
  at.row = (size_t)token * c.heads + group * G + head, at.place = (size_t)at.turn * c.heads + group * G + head;
  if (pos < 0 || slot < 0) {
    const int n = at.split == 0 ? at.count * c.head_dim : 0;
    for (int i = threadIdx.x; i < n; i += 32 * AD_WARPS) c.y[at.row * c.head_dim + i] = 0.0f;
    return false;
  }
  const int first = c.window > 0 ? max(pos - c.window + 1, 0) : 0, all = pos + 1 - first;
  int size = all <= AD_SHORT ? AD_KEYS : 2 * AD_KEYS;
  while (size * AD_PARTS < all) size *= 2;
  at.parts = (all + size - 1) / size;
  at.n = min(size, all - at.split * size);
  at.base = (((size_t)slot * c.kv_heads + group) * c.capacity + first + at.split * size) * c.head_dim;
  return at.split < at.parts;
}

// From the sums of the warps [warp][GB][head_dim], their maxima and sums of weights `stat` [warp][GB][2], to the part's,
// and when it is the row's last to y. `last`: a word of shared memory.
template <int GB>
DEV void ad_finish(float* sums, const float* stat, u32* last, const AttentionDecode& c, const AdPart& at) {
  const int tid = threadIdx.x, d = c.head_dim;
  __syncthreads();
  for (int i = tid; i < at.count * (d / 4); i += 32 * AD_WARPS) {
    const int h = i / (d / 4), e = i % (d / 4) * 4;
    float most = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < AD_WARPS; w++) most = fmaxf(most, stat[(w * GB + h) * 2]);
    const float zero = most == -INFINITY ? 0.0f : most;
    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < AD_WARPS; w++) {
      const float f = expf(stat[(w * GB + h) * 2] - zero);
      sum += f * stat[(w * GB + h) * 2 + 1];
      ad_fma(out, f, ad_four(sums + (w * GB + h) * d + e));
    }
    if (at.parts == 1) {
      const float4 y = make_float4(out.x / sum, out.y / sum, out.z / sum, out.w / sum);
      *reinterpret_cast<float4*>(c.y + (at.row + h) * d + e) = y;
      continue;
    }
    const size_t to = (at.place + h) * c.splits + at.split;
    *reinterpret_cast<float4*>(c.part_out + to * d + e) = out;
    if (e == 0) c.part_top[to] = most, c.part_sum[to] = sum;
  }
  if (at.parts == 1) return;
  __syncthreads();
  if (tid == 0) {
    u32* const count = c.arrived + (size_t)at.turn * gridDim.y + blockIdx.y;
    *last = atomic_arrive(count) == (u32)at.parts - 1;
    if (*last) atomicExch(count, 0u);  // as the next launch expects it
  }
  __syncthreads();
  if (*last) ad_merge(sums, c, at);
}

// One part for up to GB query heads of a key head. L lanes a key, C groups of 4 elements a lane (4 L C >= head_dim).
template <int GB, int L, int C>
DEV void ad_part(unsigned char* shared, const float* keys, const float* values, const AttentionDecode& c) {
  constexpr int T = 8;               // keys of a tile
  constexpr int K = L / GB;          // keys of a lane group in a round: L scores, one a lane after the reduction
  constexpr int ROUND = K * 32 / L;  // keys of a warp in a round
  static_assert(T % ROUND == 0 && K >= 1, "whole rounds");
  AdPart at;
  if (!ad_locate<GB>(c, at)) return;
  const int tid = threadIdx.x, count = at.count, d = c.head_dim, n = at.n;
  const int warp = tid >> 5, lane = tid & 31, in = lane % L, sub = lane / L;
  const int bytes = T * d * 4, mine = ((n + T - 1) / T - warp + AD_WARPS - 1) / AD_WARPS;
  unsigned char* const tile = shared + warp * (2 * bytes);
  float* const weight = reinterpret_cast<float*>(shared + AD_WARPS * 2 * bytes) + warp * 64;  // [2][32]
  float* const stat = reinterpret_cast<float*>(shared + AD_WARPS * 2 * bytes) + AD_WARPS * 64;  // [warp][GB][2]
  u32* const last = reinterpret_cast<u32*>(stat + AD_WARPS * GB * 2);

  // Tile i of this warp, keys or values: a run of bytes in the cache.
  auto fetch = [&](unsigned char* to, const float* cache, int i) {
    const int number = warp + i * AD_WARPS, left = i < mine ? (n - number * T) * d * 4 : 0;
    const unsigned char* from = reinterpret_cast<const unsigned char*>(cache + at.base + (size_t)number * T * d);
    for (int b = lane * 16; b < bytes; b += 512) cp_async16(to + b, from + b, b < left);
    cp_async_commit();
  };
  fetch(tile, keys, 0);
  fetch(tile + bytes, values, 0);

  float4 q[GB][C], o[GB][C];
#pragma unroll
  for (int h = 0; h < GB; h++)
#pragma unroll
    for (int j = 0; j < C; j++) {
      const int e = in * 4 + j * L * 4;
      o[h][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      q[h][j] = h < count && e < d ? ad_four(c.q + (at.row + h) * d + e) : o[h][j];
    }
  float top = -INFINITY, total = 0.0f;  // of head in % GB; `total` holds this lane's keys only, until the end

  for (int i = 0; i < mine; i++) {
    const float *k = reinterpret_cast<const float*>(tile), *v = k + T * d;
    const int left = n - (warp + i * AD_WARPS) * T;  // keys of the tile
    cp_async_wait<1>();
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < T / ROUND; r++) {
      float s[L];
#pragma unroll
      for (int x = 0; x < K; x++) {
        const float* key = k + (r * ROUND + x * (32 / L) + sub) * d;
        float4 b[C];
#pragma unroll
        for (int j = 0; j < C; j++) {
          const int e = in * 4 + j * L * 4;
          b[j] = e < d ? ad_four(key + e) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int h = 0; h < GB; h++) {
          float t = 0.0f;
#pragma unroll
          for (int j = 0; j < C; j++) {
            t = fmaf(q[h][j].x, b[j].x, t), t = fmaf(q[h][j].y, b[j].y, t);
            t = fmaf(q[h][j].z, b[j].z, t), t = fmaf(q[h][j].w, b[j].w, t);
          }
          s[x * GB + h] = t;
        }
      }
      ad_fold<L / 2>(s, in);
      const int key = r * ROUND + in / GB * (32 / L) + sub;
      const float score = key < left ? attention_cap(s[0] * c.scale, c.soft_cap) : -INFINITY;
      float most = score;
#pragma unroll
      for (int w = GB; w < 32; w *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, w));
      most = fmaxf(most, top);
      const float zero = most == -INFINITY ? 0.0f : most, fade = expf(top - zero), p = expf(score - zero);
      top = most, total = total * fade + p;
      if (__any_sync(0xffffffffu, fade != 1.0f)) {
#pragma unroll
        for (int h = 0; h < GB; h++) {
          const float f = __shfl_sync(0xffffffffu, fade, h);
#pragma unroll
          for (int j = 0; j < C; j++) o[h][j].x *= f, o[h][j].y *= f, o[h][j].z *= f, o[h][j].w *= f;
        }
      }
      float* const w = weight + (r & 1) * 32;
      w[(in / GB * (32 / L) + sub) * GB + in % GB] = p;
      if (r == 0) cp_async_wait<0>();
      __syncwarp();
#pragma unroll
      for (int x = 0; x < K; x++) {
        const int y = x * (32 / L) + sub;
        float4 b[C];
#pragma unroll
        for (int j = 0; j < C; j++) {
          const int e = in * 4 + j * L * 4;
          b[j] = e < d ? ad_four(v + (r * ROUND + y) * d + e) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int h = 0; h < GB; h += 4) {
          const float4 p4 = ad_four(w + y * GB + h);
#pragma unroll
          for (int j = 0; j < C; j++) {
            ad_fma(o[h][j], p4.x, b[j]), ad_fma(o[h + 1][j], p4.y, b[j]);
            ad_fma(o[h + 2][j], p4.z, b[j]), ad_fma(o[h + 3][j], p4.w, b[j]);
          }
        }
      }
    }
    __syncwarp();  // the tile is done with
    fetch(tile, keys, i + 1);
    fetch(tile + bytes, values, i + 1);
  }
  cp_async_wait<0>();
#pragma unroll
  for (int w = GB; w < 32; w *= 2) total += __shfl_xor_sync(0xffffffffu, total, w);
  if (lane < GB) stat[(warp * GB + lane) * 2] = top, stat[(warp * GB + lane) * 2 + 1] = total;
#pragma unroll
  for (int w = L; w < 32; w *= 2)
#pragma unroll
    for (int h = 0; h < GB; h++)
#pragma unroll
      for (int j = 0; j < C; j++) {
        o[h][j].x += __shfl_xor_sync(0xffffffffu, o[h][j].x, w), o[h][j].y += __shfl_xor_sync(0xffffffffu, o[h][j].y, w);
        o[h][j].z += __shfl_xor_sync(0xffffffffu, o[h][j].z, w), o[h][j].w += __shfl_xor_sync(0xffffffffu, o[h][j].w, w);
      }
  __syncthreads();  // the tiles are done with
  float* const sums = reinterpret_cast<float*>(shared);  // [warp][GB][head_dim]
#pragma unroll
  for (int h = 0; h < GB; h++)
#pragma unroll
    for (int j = 0; j < C; j++) {
      const int e = in * 4 + j * L * 4;
      if (sub == 0 && e < d) *reinterpret_cast<float4*>(sums + (warp * GB + h) * d + e) = o[h][j];
    }
  ad_finish<GB>(sums, stat, last, c, at);
}

// Two kernels, so that the common heads take few registers.
template <bool WIDE>
DEV void ad_parts(unsigned char* shared, const float* keys, const float* values, const AttentionDecode& c) {
  if constexpr (WIDE) {
    if (c.head_dim > 128) ad_part<4, 32, 2>(shared, keys, values, c);
    else if (c.head_dim > 64) ad_part<8, 32, 1>(shared, keys, values, c);
    else ad_part<8, 16, 1>(shared, keys, values, c);
  } else {
    if (c.head_dim > 64) ad_part<4, 32, 1>(shared, keys, values, c);
    else ad_part<4, 16, 1>(shared, keys, values, c);
  }
}

// attention_decode, and attention_decode_wide for 5 or more query heads a key head or head_dim > 128: f32 throughout.
// shapes    Rows from row0 on, a row every `splits` blocks of the grid. part_out [rows, heads, splits, head_dim], part_top,
//           part_sum [rows, heads, splits]: weighted sum, maximum and sum of weights of a part; arrived [rows, gridDim.y]
//           u32, zero before and after. All four are untouched where splits is 1. head_dim a multiple of 4 up to 256.
// mapping   grid (row * splits + part, key head * batches + batch of up to 8 query heads, 4 in the first kernel and
//           above head_dim 128); 128 threads. A warp streams
//           its tiles of 8 keys and values through shared memory of its own (cp.async), all its heads' queries in
//           registers: each key and value is read once. The lanes of a key fold their products so that each ends with one
//           score. Shared memory: 256 head_dim bytes and 1.5 KiB.
// limit     reads each key and value once: bandwidth-bound.
#define ATTENTION_DECODE(NAME, BLOCKS, WIDE)                                                                            \
  KERNEL BOUNDS(128, BLOCKS)                                                                                            \
  NAME(const float* __restrict__ q, const float* __restrict__ keys, const float* __restrict__ values, float* y,         \
       const int* __restrict__ row_slot, const int* __restrict__ row_pos, float* part_out, float* part_top,             \
       float* part_sum, u32* arrived, int row0, int heads, int kv_heads, int head_dim, int capacity, float scale,       \
       int window, float soft_cap, int splits) {                                                                        \
    grid_ready();                                                                                                       \
    SHARED_DYN(unsigned char, shared);                                                                                  \
    const AttentionDecode c = {q,     y,        row_slot, row_pos,  part_out, part_top, part_sum, arrived, row0,        \
                               heads, kv_heads, head_dim, capacity, scale,    window,   soft_cap, splits};              \
    ad_parts<WIDE>(shared, keys, values, c);                                                                            \
  }
ATTENTION_DECODE(attention_decode, 4, false)
ATTENTION_DECODE(attention_decode_wide, 3, true)
