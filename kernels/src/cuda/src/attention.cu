#include "gpu.h"
// Causal grouped-query attention over the cache, f32 throughout, softmax kept online (arXiv 2205.14135, 2307.08691).
//   y[t][h] = sum_j p_j values[slot][g][j] / sum_j p_j, p_j = e^(s_j - max s), g = h / (heads / kv_heads)
//   s_j = cap(scale * q[t][h] . keys[slot][g][j]), cap(s) = soft_cap * tanh(s / soft_cap) when soft_cap > 0
//   j runs over the keys of the row's slot with j <= pos and, when window > 0, pos - j < window
// shapes    q, y [tokens, heads, head_dim]; keys, values [slots, kv_heads, capacity, head_dim]; row_slot, row_pos
//           [tokens] i32, a negative one for a row of no sequence, whose y is zero. head_dim a multiple of 4 up to 256.
// order     Keys are taken in tiles at fixed positions of the sequence, so a row's result depends on its own sequence
//           alone, never on the batch. The two kernels add in different orders and agree to rounding.
// others    Keys or values outside a row's range are never read, except in prefill those its tile of rows or of keys
//           shares (later rows, earlier than the window), with weight zero: an infinite or NaN value there shows in it.

DEV float attention_cap(float s, float soft_cap) { return soft_cap > 0.0f ? soft_cap * tanhf(s / soft_cap) : s; }

DEV float4 attention_at(const float* p) { return *reinterpret_cast<const float4*>(p); }
DEV void attention_put(float* p, const float4& v) { *reinterpret_cast<float4*>(p) = v; }
DEV float4 attention_over(const float4& o, float d) { return make_float4(o.x / d, o.y / d, o.z / d, o.w / d); }
DEV void attention_fma(float4& o, float w, const float4& v) {
  o.x += w * v.x, o.y += w * v.y, o.z += w * v.z, o.w += w * v.w;
}
DEV void attention_dot(float& s, const float4& a, const float4& b) {
  s += a.x * b.x, s += a.y * b.y, s += a.z * b.z, s += a.w * b.w;
}

// Starts copying `rows` rows of n4 16-byte chunks to shared memory by 128 threads; rows from `live` on become zero.
// `stride`, `ld`: floats from row to row.
DEV void attention_load(float* to, int ld, const float* from, size_t stride, int rows, int live, int n4) {
  const int down = 128 / n4, right = 128 % n4;
  int row = threadIdx.x / n4, col = threadIdx.x % n4;
  while (row < rows) {
    const bool on = row < live;
    cp_async16(to + row * ld + col * 4, from + (on ? (size_t)row * stride + col * 4 : (size_t)0), on);
    row += down, col += right;
    if (col >= n4) row++, col -= n4;
  }
}

struct AttentionCall {
  const float *q, *keys, *values; float* y; const int *row_slot, *row_pos;
  int tokens, heads, kv_heads, head_dim, capacity; float scale; int window; float soft_cap;
};

// One tile of 8 R queries against tiles of 16 C keys; V float4 columns of the result a thread (64 V >= head_dim).
template <int R, int C, int V>
DEV void attention_tile(float* shared, const AttentionCall& call) {
  const auto [q, keys, values, y, row_slot, row_pos, tokens, heads, kv_heads, head_dim, capacity, scale, window,
              soft_cap] = call;
  constexpr int BR = 8 * R, BC = 16 * C, WV = 64 * V, LP = BC + 4;
  const int tid = threadIdx.x, tx = tid & 15, ty = tid >> 4, n4 = head_dim / 4;
  const int ld = head_dim + ((n4 & 1) ? 0 : 4);  // an odd number of 16-byte chunks: rows start in different banks
  const int row0 = ((int)gridDim.x - 1 - (int)blockIdx.x) * BR, head = blockIdx.y, group = head / (heads / kv_heads);
  float* const sq = shared;         // [BR][ld] queries
  float* const sk = sq + BR * ld;   // [BC][ld] keys
  float* const sv = sk + BC * ld;   // [BC][WV] values, zero from head_dim on
  float* const sp = sv + BC * WV;   // [BR][LP] weights
  int* const slot = reinterpret_cast<int*>(sp + BR * LP);  // [BR]
  int* const pos = slot + BR;                              // [BR]

  if (tid < BR) {
    pos[tid] = row0 + tid < tokens ? row_pos[row0 + tid] : -1;
    slot[tid] = pos[tid] < 0 ? -1 : row_slot[row0 + tid];
  }
  for (int i = tid; i < BC * WV && head_dim < WV; i += 128)
    if (i % WV >= head_dim) sv[i] = 0.0f;
  attention_load(sq, ld, q + ((size_t)row0 * heads + head) * head_dim, (size_t)heads * head_dim, BR, tokens - row0, n4);
  cp_async_commit();

  float4 o[R][V];
  float top[R], total[R];  // `total` holds this thread's columns only, until the end
#pragma unroll
  for (int i = 0; i < R; i++) {
    top[i] = -INFINITY, total[i] = 0.0f;
#pragma unroll
    for (int v = 0; v < V; v++) o[i][v] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  __syncthreads();

  // Runs of rows of one slot: usually one.
  for (int start = 0; start < BR;) {
    const int s0 = slot[start];
    int end = start, first = 0x7fffffff, last = -1;
    while (end < BR && slot[end] == s0) {
      const int p = pos[end++];
      last = max(last, p);
      first = min(first, window > 0 ? max(p - window + 1, 0) : 0);
    }
    const int run = start;
    start = end;
    if (s0 < 0) continue;
    const size_t base = ((size_t)s0 * kv_heads + group) * capacity * head_dim;
    int k0 = first / BC * BC;
    attention_load(sk, ld, keys + base + (size_t)k0 * head_dim, head_dim, BC, last + 1 - k0, n4);
    cp_async_commit();
    for (; k0 <= last; k0 += BC) {
      attention_load(sv, WV, values + base + (size_t)k0 * head_dim, head_dim, BC, last + 1 - k0, n4);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();  // queries and keys are here

      float s[R][C];
#pragma unroll
      for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < C; j++) s[i][j] = 0.0f;
      for (int e = 0; e < head_dim; e += 4) {
        float4 b[C];
#pragma unroll
        for (int j = 0; j < C; j++) b[j] = attention_at(sk + (tx + 16 * j) * ld + e);
#pragma unroll
        for (int i = 0; i < R; i++) {
          const float4 a = attention_at(sq + (ty + 8 * i) * ld + e);
#pragma unroll
          for (int j = 0; j < C; j++) attention_dot(s[i][j], a, b[j]);
        }
      }

#pragma unroll
      for (int i = 0; i < R; i++) {
        const int r = ty + 8 * i, p = pos[r];
        const bool live = r >= run && r < end;
        float most = -INFINITY;
#pragma unroll
        for (int j = 0; j < C; j++) {
          const int key = k0 + tx + 16 * j;
          const bool on = live && key <= p && (window <= 0 || p - key < window);
          s[i][j] = on ? attention_cap(s[i][j] * scale, soft_cap) : -INFINITY;
          most = fmaxf(most, s[i][j]);
        }
#pragma unroll
        for (int w = 8; w; w >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, w));
        most = fmaxf(most, top[i]);
        const float zero = most == -INFINITY ? 0.0f : most;  // nothing seen yet: every weight is e^-inf = 0
        const float keep = expf(top[i] - zero);
        top[i] = most, total[i] *= keep;
#pragma unroll
        for (int j = 0; j < C; j++) {
          const float w = expf(s[i][j] - zero);
          total[i] += w;
          sp[r * LP + tx + 16 * j] = w;
        }
#pragma unroll
        for (int v = 0; v < V; v++) o[i][v].x *= keep, o[i][v].y *= keep, o[i][v].z *= keep, o[i][v].w *= keep;
      }
      cp_async_wait<0>();
      __syncthreads();  // values and weights are here, keys are done with
      if (k0 + BC <= last) {
        attention_load(sk, ld, keys + base + (size_t)(k0 + BC) * head_dim, head_dim, BC, last + 1 - k0 - BC, n4);
        cp_async_commit();
      }
      for (int k = 0; k < BC; k += 4) {
        float4 b[4][V];
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
          for (int v = 0; v < V; v++) b[e][v] = attention_at(sv + (k + e) * WV + 64 * v + tx * 4);
#pragma unroll
        for (int i = 0; i < R; i++) {
          const float4 w = attention_at(sp + (ty + 8 * i) * LP + k);
#pragma unroll
          for (int v = 0; v < V; v++) {
            attention_fma(o[i][v], w.x, b[0][v]);
            attention_fma(o[i][v], w.y, b[1][v]);
            attention_fma(o[i][v], w.z, b[2][v]);
            attention_fma(o[i][v], w.w, b[3][v]);
          }
        }
      }
      __syncthreads();  // values and weights are done with
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int w = 8; w; w >>= 1) total[i] += __shfl_xor_sync(0xffffffffu, total[i], w);
    const int r = ty + 8 * i, row = row0 + r;
    if (row >= tokens) continue;
    const float divisor = slot[r] < 0 ? 1.0f : total[i];
    float* out = y + ((size_t)row * heads + head) * head_dim;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int col = 64 * v + tx * 4;
      if (col < head_dim) attention_put(out + col, attention_over(o[i][v], divisor));
    }
  }
}

// attention_prefill: any mix of rows.
// mapping   grid (tiles of rows, heads), last tiles (the longest in one sequence) first; 128 threads as 8 x 16. Tiles
//           of 64 rows and 32 keys up to head_dim 128, of 32 rows and 16 keys above; a thread holds 8 x 2 (or 4 x 1)
//           scores and 8 x 4 V (or 4 x 16) results in registers. Values are copied (cp.async) while scores are
//           computed, the next keys while weights are applied. Shared memory: 43, 75, 68 KiB at head_dim 64, 128, 256.
//           A tile over several sequences takes them in turn, masking the other rows: short segments waste work.
// limit     f32 arithmetic: 4 head_dim a (row, key, head); by count the shared memory is busy 3/4 (scores) and 3/8
//           (values) of that time at head_dim 128.
KERNEL BOUNDS(128, 3)
attention_prefill(const float* __restrict__ q, const float* __restrict__ keys, const float* __restrict__ values,
                  float* __restrict__ y, const int* __restrict__ row_slot, const int* __restrict__ row_pos, int tokens,
                  int heads, int kv_heads, int head_dim, int capacity, float scale, int window, float soft_cap) {
  SHARED_DYN(float, shared);
  const AttentionCall call = {q,     keys,     values,   y,        row_slot, row_pos, tokens,
                              heads, kv_heads, head_dim, capacity, scale,    window,  soft_cap};
  if (head_dim <= 64) attention_tile<8, 2, 1>(shared, call);
  else if (head_dim <= 128) attention_tile<8, 2, 2>(shared, call);
  else attention_tile<4, 1, 4>(shared, call);
}
