#include "gpu.h"
// Causal attention in the fixed order of reproducible.cu, in three kernels with the scores of some heads and some rows of
// one sequence in between:
//   scores    s_j = scale * chain_d fma(q_d, k_jd), then the soft cap
//   weights   m = max s_j, p_j = e^(s_j - m), z = lanes16 sum of p_j by the key's place in its sequence
//   mix       o_d = chain_j fma(p_j, v_jd), out = o_d / z
// Keys a row may not see (after it; `window` or more before it) add nothing to m and z and have weight +0 in the chain.
// shapes    q, y point at the first of `tokens` rows [heads, head_dim] whose positions are past, past + 1, ..; keys and
//           values [kv_heads, capacity, head_dim] of the sequence's slot. Scratch: scores [z, tokens, span] f32, z heads
//           from `head` on, span = past + tokens; totals [z, tokens] f32.
// others    An infinite or NaN value of a key that shares a tile with a row but is not visible to it shows in the row.

// First key that the row at `position` sees.
DEV int rp_first(int position, int window) { return window > 0 ? max(position - window + 1, 0) : 0; }

struct RpAttention {
  int tokens, past, head, heads, kv_heads, head_dim, capacity, window;
};

template <int R>
DEV void rp_scores(float* sm, const float* q, const float* keys, float* scores, const RpAttention& c, float scale,
                   float soft_cap) {
  float *left = sm, *right = sm + RP_STEP * RP_LD;
  const int m0 = blockIdx.y * (8 * R), n0 = blockIdx.x * 64, h = c.head + blockIdx.z, span = c.past + c.tokens;
  const int last = min(m0 + 8 * R, c.tokens) - 1;
  if (n0 > c.past + last || n0 + 64 <= rp_first(c.past + m0, c.window)) return;
  const float* key = keys + (size_t)(h / (c.heads / c.kv_heads)) * c.capacity * c.head_dim;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[R][8];
  rp_clear<R>(acc);
  for (int k0 = 0; k0 < c.head_dim; k0 += RP_STEP) {
    rp_stage_lines<8 * R>(left, [&](int line, int k) {
      const float* row = q + ((size_t)(m0 + line) * c.heads + h) * c.head_dim;
      return m0 + line < c.tokens && k0 + k < c.head_dim ? rp_four(row, k0 + k, c.head_dim) : none;
    });
    rp_stage_lines<64>(right, [&](int line, int k) {
      const float* row = key + (size_t)(n0 + line) * c.head_dim;
      return n0 + line < span && k0 + k < c.head_dim ? rp_four(row, k0 + k, c.head_dim) : none;
    });
    __syncthreads();
    rp_chain<R>(acc, left, right, min((int)RP_STEP, c.head_dim - k0));
    __syncthreads();
  }
  const int row = m0 + (threadIdx.x >> 3) * R, col = n0 + (threadIdx.x & 7) * 8;
  float* to = scores + (size_t)blockIdx.z * c.tokens * span;
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (row + i < c.tokens && col + j < span) {
        const float s = __fmul_rn(scale, acc[i][j]);
        to[(size_t)(row + i) * span + col + j] =
            soft_cap > 0.0f ? __fmul_rn(soft_cap, tanhf(__fdiv_rn(s, soft_cap))) : s;
      }
}

// scores_reproducible
// launch    64 threads; grid (ceil(span / 64), ceil(tokens / rows), heads at a time), rows as in linear_reproducible;
//           shared memory 2 x 32 x 68 floats. Tiles that no row sees exit at once and leave their scores unwritten.
// limit     f32 arithmetic.
KERNEL BOUNDS(64, 1) scores_reproducible(const float* __restrict__ q, const float* __restrict__ keys,
                                         float* __restrict__ scores, int tokens, int past, int head, int heads,
                                         int kv_heads, int head_dim, int capacity, int window, float scale,
                                         float soft_cap, int rows) {
  SHARED_DYN(float, sm);
  const RpAttention c = {tokens, past, head, heads, kv_heads, head_dim, capacity, window};
  if (rows == 16) rp_scores<2>(sm, q, keys, scores, c, scale, soft_cap);
  else rp_scores<8>(sm, q, keys, scores, c, scale, soft_cap);
}

// weights_reproducible: scores become weights, in place, for the keys a row sees; totals gets their sum.
// launch    128 threads, 8 rows: 16 lanes a row; grid (ceil(tokens / 8), heads at a time).
// limit     bandwidth-bound.
KERNEL BOUNDS(128, 8) weights_reproducible(float* __restrict__ scores, float* __restrict__ totals, int tokens, int past,
                                           int window) {
  const int lane = threadIdx.x & 15, t = blockIdx.x * 8 + (threadIdx.x >> 4), span = past + tokens;
  const bool live = t < tokens;
  const int end = live ? past + t + 1 : 0, first = rp_first(past + t, window);
  float* row = scores + ((size_t)blockIdx.y * tokens + (live ? t : 0)) * span;
  const int start = first - first % 16 + lane;  // lane l keeps the keys at places l (mod 16)
  float most = -INFINITY;
  for (int j = start; j < end; j += 16)
    if (j >= first) most = fmaxf(most, row[j]);
#pragma unroll
  for (int o = 8; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o, 16));
  float sum = 0.0f;
  for (int j = start; j < end; j += 16) {
    if (j < first) continue;
    const float p = rp_exp(__fsub_rn(row[j], most));
    row[j] = p;
    sum = __fadd_rn(sum, p);
  }
  sum = rp_fold(sum);
  if (live && lane == 0) totals[(size_t)blockIdx.y * tokens + t] = sum;
}

template <int R>
DEV void rp_mix(float* sm, const float* weights, const float* totals, const float* values, float* y,
                const RpAttention& c) {
  float *left = sm, *right = sm + RP_STEP * RP_LD;
  const int m0 = blockIdx.y * (8 * R), n0 = blockIdx.x * 64, h = c.head + blockIdx.z, span = c.past + c.tokens;
  const int first = rp_first(c.past + m0, c.window), end = c.past + min(m0 + 8 * R, c.tokens);
  const float* value = values + (size_t)(h / (c.heads / c.kv_heads)) * c.capacity * c.head_dim;
  weights += (size_t)blockIdx.z * c.tokens * span;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[R][8];
  rp_clear<R>(acc);
  for (int k0 = first; k0 < end; k0 += RP_STEP) {
    rp_stage_lines<8 * R>(left, [&](int line, int k) {
      const int t = m0 + line, low = rp_first(c.past + t, c.window), high = t < c.tokens ? c.past + t : -1, j = k0 + k;
      const float* row = weights + (size_t)t * span + j;
      return make_float4(j >= low && j <= high ? row[0] : 0.0f, j + 1 >= low && j + 1 <= high ? row[1] : 0.0f,
                         j + 2 >= low && j + 2 <= high ? row[2] : 0.0f, j + 3 >= low && j + 3 <= high ? row[3] : 0.0f);
    });
    rp_stage_steps<64>(right, [&](int k, int line) {
      const float* row = value + (size_t)(k0 + k) * c.head_dim;
      return k0 + k < end && n0 + line < c.head_dim ? rp_four(row, n0 + line, c.head_dim) : none;
    });
    __syncthreads();
    rp_chain<R>(acc, left, right, min((int)RP_STEP, end - k0));
    __syncthreads();
  }
  const int row = m0 + (threadIdx.x >> 3) * R, col = n0 + (threadIdx.x & 7) * 8;
#pragma unroll
  for (int i = 0; i < R; i++) {
    if (row + i >= c.tokens) continue;
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (col + j < c.head_dim) y[((size_t)(row + i) * c.heads + h) * c.head_dim + col + j] = acc[i][j];
  }
  // The division may call its slow path: done on what this thread has just written, when no sum has to live across the call.
#pragma unroll 1
  for (int e = 0; e < R * 8; e++) {
    const int t = row + e / 8, n = col + e % 8;
    if (t >= c.tokens || n >= c.head_dim) continue;
    float* const to = y + ((size_t)t * c.heads + h) * c.head_dim + n;
    *to = __fdiv_rn(*to, totals[(size_t)blockIdx.z * c.tokens + t]);
  }
}

// mix_reproducible
// launch    64 threads; grid (ceil(head_dim / 64), ceil(tokens / rows), heads at a time); shared memory as above.
// limit     f32 arithmetic. No minimum of blocks: sm_90a spills at the registers six would leave it.
KERNEL BOUNDS(64, 1) mix_reproducible(const float* __restrict__ weights, const float* __restrict__ totals,
                                      const float* __restrict__ values, float* __restrict__ y, int tokens, int past,
                                      int head, int heads, int kv_heads, int head_dim, int capacity, int window,
                                      int rows) {
  SHARED_DYN(float, sm);
  const RpAttention c = {tokens, past, head, heads, kv_heads, head_dim, capacity, window};
  if (rows == 16) rp_mix<2>(sm, weights, totals, values, y, c);
  else rp_mix<8>(sm, weights, totals, values, y, c);
}
