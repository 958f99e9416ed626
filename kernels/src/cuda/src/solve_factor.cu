#include "gpu.h"
// The factor of the inverse Hessian that GPTQ works with: U upper triangular with H^-1 = U^T U, columns in solving order.
//
// method    With J the reversal, J H J = L L^T (Cholesky) gives U = J L^-1 J: one factorization and one triangular inverse.
//           Both go by tiles of 64, in f32. A step of the factorization is three launches: the tile on the diagonal and its
//           inverse, the panel below it (a product with that inverse), the rest minus the panel's square. The inverse goes
//           by rows of tiles: X_ij = -L_ii^-1 sum_{j <= k < i} L_ik X_kj, X_ii = L_ii^-1.
// shapes    a [n, n] f32, lower triangle, reversed: row r and column c are positions n - 1 - r and n - 1 - c of the solving
//           order. inverses [ceil(n / 64), 64, 64] f32. u [n, n] f32, zeroed by the launcher. status [2] u32, all ones when
//           nothing failed: first row of `a` whose pivot is no positive number; first row of `u` that is not finite or has
//           no positive diagonal.
// launch    64 threads where nothing else is said; products as in reproducible.cu (8 x 8 results a thread).

enum { SF_TILE = 64, SF_CELLS = 64 * 64, SF_PAD = 65 };

// factor_prepare: the damped Hessian in reversed solving order.
// shapes    h [n, n], upper triangle read; perm [n] position -> column; diag [n] the diagonal, 0 at dead columns, which
//           are isolated; damped [n] what stands on the diagonal instead.
// launch    256 threads; grid (ceil(n / 256), n).
// limit     memory: half the square, gathered.
KERNEL BOUNDS(256, 4) factor_prepare(float* __restrict__ a, const float* __restrict__ h, const u32* __restrict__ perm,
                                     const float* __restrict__ diag, const float* __restrict__ damped, int n) {
  const int r = blockIdx.y, c = blockIdx.x * 256 + threadIdx.x;
  if (c > r) return;
  const u32 i = perm[n - 1 - r], j = perm[n - 1 - c];
  float v = 0.0f;
  if (i == j) v = damped[i];
  else if (diag[i] != 0.0f && diag[j] != 0.0f) v = h[(size_t)min(i, j) * n + max(i, j)];
  a[(size_t)r * n + c] = v;
}

// factor_diagonal: the inverse of the Cholesky factor of the tile at k0; rows past n are those of the identity.
// launch    one block.
KERNEL BOUNDS(64, 1) factor_diagonal(const float* __restrict__ a, float* __restrict__ inverses, u32* __restrict__ status,
                                     int n, int k0) {
  SHARED_ARRAY(float, l, SF_TILE * SF_PAD);
  SHARED_ARRAY(float, x, SF_TILE * SF_PAD);
  const int t = threadIdx.x;
  for (int r = 0; r < SF_TILE; r++)
    l[r * SF_PAD + t] = t <= r && k0 + r < n ? a[(size_t)(k0 + r) * n + k0 + t] : r == t ? 1.0f : 0.0f;
  __syncthreads();
  for (int k = 0; k < SF_TILE; k++) {
    const float pivot = l[k * SF_PAD + k];
    const bool good = pivot > 0.0f && pivot < INFINITY;
    if (!good && t == 0) atomicMin(status, (u32)(k0 + k));
    const float root = good ? __fsqrt_rn(pivot) : 1.0f;
    __syncthreads();  // every thread has read the pivot
    if (t == k) l[k * SF_PAD + k] = root;
    if (t > k) l[t * SF_PAD + k] = __fdiv_rn(l[t * SF_PAD + k], root);
    __syncthreads();
    if (t > k) {
      const float left = -l[t * SF_PAD + k];
      for (int c = k + 1; c <= t; c++) l[t * SF_PAD + c] = fmaf(left, l[c * SF_PAD + k], l[t * SF_PAD + c]);
    }
    __syncthreads();
  }
  // Column t of the inverse, by this thread alone.
  for (int r = 0; r < SF_TILE; r++) {
    float sum = r == t ? -1.0f : 0.0f;
    for (int k = t; k < r; k++) sum = fmaf(l[r * SF_PAD + k], x[k * SF_PAD + t], sum);
    x[r * SF_PAD + t] = r < t ? 0.0f : __fdiv_rn(-sum, l[r * SF_PAD + r]);
  }
  float* to = inverses + (size_t)(k0 / SF_TILE) * SF_CELLS;
  for (int r = 0; r < SF_TILE; r++) to[r * SF_TILE + t] = x[r * SF_PAD + t];
}

// A thread's results of a tile: f(row, column, value).
template <class F> DEV void sf_results(const float (&acc)[8][8], F f) {
  const int row = (threadIdx.x >> 3) * 8, col = (threadIdx.x & 7) * 8;
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) f(row + i, col + j, acc[i][j]);
}

// factor_panel: the 64 columns at k0 below the tile there, times the transposed inverse of its factor; in place.
// launch    grid ceil((n - k0 - 64) / 64); dynamic shared memory 2 x 32 x 68 floats.
KERNEL BOUNDS(64, 6) factor_panel(float* __restrict__ a, const float* __restrict__ inverses, int n, int k0) {
  SHARED_DYN(float, sm);
  float *left = sm, *right = sm + RP_STEP * RP_LD;
  const int i0 = k0 + SF_TILE + blockIdx.x * SF_TILE;
  const float* inverse = inverses + (size_t)(k0 / SF_TILE) * SF_CELLS;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[8][8];
  rp_clear<8>(acc);
  for (int s = 0; s < SF_TILE; s += RP_STEP) {
    rp_stage_lines<64>(left, [&](int line, int k) {
      return i0 + line < n ? rp_four(a + (size_t)(i0 + line) * n, k0 + s + k, n) : none;
    });
    rp_stage_lines<64>(right, [&](int line, int k) { return rp_four(inverse + line * SF_TILE, s + k, SF_TILE); });
    __syncthreads();
    rp_chain<8>(acc, left, right, RP_STEP);
    __syncthreads();
  }
  sf_results(acc, [&](int r, int c, float v) {
    if (i0 + r < n) a[(size_t)(i0 + r) * n + k0 + c] = v;
  });
}

// factor_update: what is right of and below the panel at k0, minus the panel's products with itself.
// launch    grid (t, t) for t = ceil((n - k0 - 64) / 64), blocks above the diagonal exit; shared memory as above.
// limit     f32 arithmetic; 64 products for each element read and written.
KERNEL BOUNDS(64, 6) factor_update(float* __restrict__ a, int n, int k0) {
  SHARED_DYN(float, sm);
  if (blockIdx.x > blockIdx.y) return;
  float *left = sm, *right = sm + RP_STEP * RP_LD;
  const int first = k0 + SF_TILE, i0 = first + blockIdx.y * SF_TILE, j0 = first + blockIdx.x * SF_TILE;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[8][8];
  rp_clear<8>(acc);
  for (int s = 0; s < SF_TILE; s += RP_STEP) {
    rp_stage_lines<64>(left, [&](int line, int k) {
      return i0 + line < n ? rp_four(a + (size_t)(i0 + line) * n, k0 + s + k, n) : none;
    });
    rp_stage_lines<64>(right, [&](int line, int k) {
      return j0 + line < n ? rp_four(a + (size_t)(j0 + line) * n, k0 + s + k, n) : none;
    });
    __syncthreads();
    rp_chain<8>(acc, left, right, RP_STEP);
    __syncthreads();
  }
  sf_results(acc, [&](int r, int c, float v) {
    if (i0 + r < n && j0 + c <= i0 + r) a[(size_t)(i0 + r) * n + j0 + c] -= v;
  });
}

// factor_inverse: row i of tiles of L^-1, each element (r, c) written to (n - 1 - r, n - 1 - c) of u.
// launch    grid i + 1, after rows 0 .. i - 1; dynamic shared memory 4 x 32 x 68 floats.
// limit     f32 arithmetic; the last rows have the longest sums and the most blocks.
KERNEL BOUNDS(64, 4) factor_inverse(float* __restrict__ u, const float* __restrict__ a,
                                    const float* __restrict__ inverses, int n, int i) {
  SHARED_DYN(float, sm);
  const int j = blockIdx.x, i0 = i * SF_TILE, j0 = j * SF_TILE;
  const float* inverse = inverses + (size_t)i * SF_CELLS;
  const size_t last = (size_t)n * n - 1;
  if (j == i) {
    for (int at = threadIdx.x; at < SF_CELLS; at += 64) {
      const int r = at / SF_TILE, c = at % SF_TILE;
      if (c <= r && i0 + r < n) u[last - (size_t)(i0 + r) * n - (i0 + c)] = inverse[at];
    }
    return;
  }
  float *left = sm, *right = sm + 2 * RP_STEP * RP_LD;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[8][8];
  rp_clear<8>(acc);
  for (int k0 = j0; k0 < i0; k0 += RP_STEP) {
    rp_stage_lines<64>(left, [&](int line, int k) {
      return i0 + line < n ? rp_four(a + (size_t)(i0 + line) * n, k0 + k, n) : none;
    });
    rp_stage_steps<64>(right, [&](int k, int line) {
      const float* x = u + (last - (size_t)(k0 + k) * n - (j0 + line));
      return make_float4(x[0], x[-1], x[-2], x[-3]);
    });
    __syncthreads();
    rp_chain<8>(acc, left, right, RP_STEP);
    __syncthreads();
  }
  sf_results(acc, [&](int r, int c, float v) { right[r * RP_LD + c] = v; });
  for (int s = 0; s < SF_TILE; s += RP_STEP)
    rp_stage_lines<64>(left + s * RP_LD, [&](int line, int k) { return rp_four(inverse + line * SF_TILE, s + k, SF_TILE); });
  __syncthreads();
  rp_clear<8>(acc);
  rp_chain<8>(acc, left, right, SF_TILE);
  sf_results(acc, [&](int r, int c, float v) {
    if (i0 + r < n) u[last - (size_t)(i0 + r) * n - (j0 + c)] = -v;
  });
}

// factor_check: status[1] becomes the first row of u that no solver can use.
// launch    128 threads; grid n.
KERNEL BOUNDS(128, 8) factor_check(const float* __restrict__ u, u32* __restrict__ status, int n) {
  const int r = blockIdx.x;
  const float* row = u + (size_t)r * n;
  bool bad = threadIdx.x == 0 && !(row[r] > 0.0f);
  for (int c = r + threadIdx.x; c < n; c += 128) bad |= (__float_as_uint(row[c]) & 0x7f800000u) == 0x7f800000u;
  if (bad) atomicMin(status + 1, (u32)r);
}
