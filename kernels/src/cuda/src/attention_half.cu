#include "gpu.h"
// Causal grouped-query attention on tensor cores over a bf16 cache (arXiv 2307.08691); definitions as in attention.cu.
// rounding  Queries and weights e^(s - max) are rounded to bf16 (nearest even), as keys and values are in the cache;
//           scores, maxima, sums of weights and of weighted values stay f32, and weights are summed before they are
//           rounded. e^x is the hardware's 2^x (2 units in the last place) of a product rounded once.
// others    As in attention.cu: a row depends on its own sequence alone, since key tiles lie at fixed positions and a
//           masked key changes nothing; infinite or NaN values of keys that share its tile show.

// Byte of 16-byte chunk `chunk` of row `row` in a tile of D bf16 columns: eight rows meet in no bank.
template <int D> DEV u32 ah_at(int row, int chunk) { return (u32)(row * (D * 2) + ((chunk ^ (row & 7)) << 4)); }

// Starts copying N rows of the cache; rows from `live` on become zero.
template <int D, int N, int THREADS> DEV void ah_load(unsigned char* to, const u16* from, int live) {
  constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && STEP % 8 == 0 && N % STEP == 0, "rows a step keep their place in the swizzle");
  const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  from += row * D + chunk * 8, to += ah_at<D>(row, chunk);
#pragma unroll
  for (int i = 0; i < N; i += STEP) cp_async16(to + i * D * 2, from + i * D, row + i < live);
}

// One tile of 16 M queries a warp, W warps, against tiles of N keys.
template <int D, int M, int N, int W>
DEV void ah_tile(unsigned char* shared, const float* q, const u16* keys, const u16* values, float* y,
                 const int* row_slot, const int* row_pos, int tokens, int heads, int kv_heads, int capacity,
                 float scale, int window, float soft_cap) {
  constexpr int ROWS = 16 * M * W, TILE = N * D * 2, THREADS = 32 * W;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  const int row0 = ((int)gridDim.x - 1 - (int)blockIdx.x) * ROWS, head = blockIdx.y, group = head / (heads / kv_heads);
  unsigned char* const sq = shared;               // [ROWS][D] queries
  unsigned char* const sk = sq + ROWS * D * 2;    // two stages of [N][D] keys and [N][D] values
  int* const slot = reinterpret_cast<int*>(sk + 4 * TILE);  // [ROWS]
  int* const pos = slot + ROWS;                             // [ROWS]

  for (int r = tid; r < ROWS; r += THREADS) {
    pos[r] = row0 + r < tokens ? row_pos[row0 + r] : -1;
    slot[r] = pos[r] < 0 ? -1 : row_slot[row0 + r];
  }
  const float sign = scale < 0.0f ? -1.0f : 1.0f;  // so that the largest product has the largest score
  for (int i = tid; i < ROWS * D / 8; i += THREADS) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
    if (row0 + row < tokens) {
      const float4* from = reinterpret_cast<const float4*>(q + ((size_t)(row0 + row) * heads + head) * D + chunk * 8);
      a = from[0], b = from[1];
    }
    *reinterpret_cast<uint4*>(sq + ah_at<D>(row, chunk)) =
        make_uint4(f2b_pair(sign * a.x, sign * a.y), f2b_pair(sign * a.z, sign * a.w),
                   f2b_pair(sign * b.x, sign * b.y), f2b_pair(sign * b.z, sign * b.w));
  }
  __syncthreads();

  float o[M][D / 8][4], top[M][2];
  float* const total = reinterpret_cast<float*>(pos + ROWS) + tid;  // [2 M][THREADS], of each thread's own columns
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      top[m][i] = -INFINITY, total[(2 * m + i) * THREADS] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.0f;
  }
  const float log2e = 1.4426950408889634f, unit = (soft_cap > 0.0f ? 1.0f : fabsf(scale)) * log2e;
  // Where this lane's rows lie for ldmatrix: queries and keys chunk by chunk, values transposed.
  const u32 at_q = ah_at<D>(warp * M * 16 + (lane & 15), lane >> 4);
  const u32 at_k = ah_at<D>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  const u32 at_v = ah_at<D>((lane & 7) + (lane >> 3 & 1) * 8, lane >> 4);

  // Runs of rows of one slot: usually one.
  for (int start = 0; start < ROWS;) {
    const int s0 = slot[start], run = start;
    int end = start, first = 0x7fffffff, last = -1;
    while (end < ROWS && slot[end] == s0) {
      const int p = pos[end++];
      last = max(last, p);
      first = min(first, window > 0 ? max(p - window + 1, 0) : 0);
    }
    start = end;
    if (s0 < 0) continue;
    int near = 0x7fffffff, far = -1;  // positions of this warp's rows of the run
    bool dead = false;                // has it others?
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = (warp * M + m) * 16 + g + 8 * i;
        const bool on = r >= run && r < end;
        dead = dead || !on;
        near = min(near, on ? pos[r] : 0x7fffffff), far = max(far, on ? pos[r] : -1);
      }
#pragma unroll
    for (int w = 4; w < 32; w *= 2) {
      near = min(near, __shfl_xor_sync(0xffffffffu, near, w));
      far = max(far, __shfl_xor_sync(0xffffffffu, far, w));
    }
    if (__any_sync(0xffffffffu, dead)) near = -1;  // every tile is masked

    const size_t base = ((size_t)s0 * kv_heads + group) * capacity * D;
    int k0 = first / N * N;
    // Tiles take turns on the two stages by their place in the sequence.
    auto load = [&](int key) {
      unsigned char* const to = sk + (key / N & 1) * 2 * TILE;
      ah_load<D, N, THREADS>(to, keys + base + (size_t)key * D, last + 1 - key);
      ah_load<D, N, THREADS>(to + TILE, values + base + (size_t)key * D, last + 1 - key);
      cp_async_commit();
    };
    load(k0);
    for (; k0 <= last; k0 += N) {
      cp_async_wait<0>();
      __syncthreads();  // this tile is here, and the one before is done with
      if (k0 + N <= last) load(k0 + N);
      if (k0 > far || (window > 0 && near - (k0 + N - 1) >= window)) continue;  // no row of this warp sees it
      unsigned char *const tk = sk + (k0 / N & 1) * 2 * TILE, *const tv = tk + TILE;

      float s[M][N / 8][4];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(a[m], sq + (at_q ^ (u32)(k * 32)) + m * 16 * D * 2);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
          u32 b[4];
          ldmatrix_x4(b, tk + (at_k ^ (u32)(k * 32)) + n * 16 * D * 2);
#pragma unroll
          for (int m = 0; m < M; m++) mma_16816_bf16(s[m][2 * n], a[m], b), mma_16816_bf16(s[m][2 * n + 1], a[m], b + 2);
        }
      }

      if (soft_cap > 0.0f) {
        const float inner = fabsf(scale) / soft_cap * 2.0f * log2e;  // tanh a = 1 - 2 / (e^(2 a) + 1)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int x = 0; x < 4; x++)
              s[m][n][x] = fmaf(soft_cap * -2.0f, __fdividef(1.0f, exp2_fast(s[m][n][x] * inner) + 1.0f), soft_cap);
      }
      if (k0 + N - 1 > near || (window > 0 && far - k0 >= window)) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int r = (warp * M + m) * 16 + g + 8 * i, p = pos[r];
            const bool live = r >= run && r < end;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
              for (int x = 0; x < 2; x++) {
                const int key = k0 + n * 8 + 2 * t + x;
                if (!live || key > p || (window > 0 && p - key >= window)) s[m][n][2 * i + x] = -INFINITY;
              }
          }
      }
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float most = top[m][i];
#pragma unroll
          for (int n = 0; n < N / 8; n++) most = fmaxf(most, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
          const float zero = most == -INFINITY ? 0.0f : most * unit;  // nothing seen yet: every weight is 2^-inf = 0
          const float fade = top[m][i] == most ? 1.0f : exp2_fast((top[m][i] - most) * unit);  // 1 exactly, if so
          top[m][i] = most;
          float sum = 0.0f;
          if (__any_sync(0xffffffffu, fade != 1.0f)) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) o[m][n][2 * i] *= fade, o[m][n][2 * i + 1] *= fade;
          }
#pragma unroll
          for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int x = 2 * i; x < 2 * i + 2; x++) sum += s[m][n][x] = exp2_fast(fmaf(s[m][n][x], unit, -zero));
          total[(2 * m + i) * THREADS] = total[(2 * m + i) * THREADS] * fade + sum;

        }
#pragma unroll
      for (int k = 0; k < N / 16; k++) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
          a[m][0] = f2b_pair(s[m][2 * k][0], s[m][2 * k][1]), a[m][1] = f2b_pair(s[m][2 * k][2], s[m][2 * k][3]);
          a[m][2] = f2b_pair(s[m][2 * k + 1][0], s[m][2 * k + 1][1]);
          a[m][3] = f2b_pair(s[m][2 * k + 1][2], s[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
          u32 b[4];
          ldmatrix_x4_trans(b, tv + (at_v ^ (u32)(n * 32)) + k * 16 * D * 2);
#pragma unroll
          for (int m = 0; m < M; m++) mma_16816_bf16(o[m][2 * n], a[m], b), mma_16816_bf16(o[m][2 * n + 1], a[m], b + 2);
        }
      }
    }
    __syncthreads();  // the last tile is done with
  }
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = total[(2 * m + i) * THREADS];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int r = (warp * M + m) * 16 + g + 8 * i, row = row0 + r;
      if (row >= tokens) continue;
      const float divisor = slot[r] < 0 ? 1.0f : sum;
      float* out = y + ((size_t)row * heads + head) * D + 2 * t;
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        *reinterpret_cast<float2*>(out + n * 8) = make_float2(o[m][n][2 * i] / divisor, o[m][n][2 * i + 1] / divisor);
    }
}

// attention_half_64, attention_half_128: any mix of rows; head_dim 64, 128.
// shapes    q, y [tokens, heads, head_dim] f32; keys, values [slots, kv_heads, capacity, head_dim] bf16; the rest as in
//           attention.cu.
// mapping   grid (tiles of rows, heads), last tiles (the longest in one sequence) first; 4 warps. At head_dim 64,
//           64 rows against 64 keys at a time; at 128, 128 rows (each fragment of keys and values is used twice) against 32. Scores, weights and results live
//           in mma fragments; weights go from one product to the other in registers. The next keys and values are copied
//           (cp.async) meanwhile. Shared memory: 41.5 and 67 KiB. A tile over several sequences takes them in turn,
//           masking the other rows: short segments waste work. Tiles that no row of a warp sees are skipped.
// limit     tensor cores: 4 head_dim a (row, key, head).
#define ATTENTION_HALF(NAME, D, M, N, W, BLOCKS)                                                                        \
  KERNEL BOUNDS(32 * W, BLOCKS)                                                                                         \
  NAME(const float* __restrict__ q, const u16* __restrict__ keys, const u16* __restrict__ values,                       \
       float* __restrict__ y, const int* __restrict__ row_slot, const int* __restrict__ row_pos, int tokens, int heads, \
       int kv_heads, int capacity, float scale, int window, float soft_cap) {                                           \
    SHARED_DYN(unsigned char, shared);                                                                                  \
    ah_tile<D, M, N, W>(shared, q, keys, values, y, row_slot, row_pos, tokens, heads, kv_heads, capacity, scale,        \
                        window, soft_cap);                                                                              \
  }
ATTENTION_HALF(attention_half_64, 64, 1, 64, 4, 3)
ATTENTION_HALF(attention_half_128, 128, 2, 32, 4, 2)
