#include "gpu.h"
// hessian_update: h[i][j] += sum_t x[t][i] x[t][j] for j >= i; the lower triangle is neither read nor written.
//           x = x0 + x1 + x2 with bf16 terms; products x_a x_b with a + b <= 2 (six); the rest is below 2^-23 |x x|.
//           Products with a + b > 0 have accumulators of their own: x_1 x_1 is never negative on the diagonal, and
//           rounded away against a large sum it cost the diagonal up to 10 eps in 64 tokens (2 eps this way). Every 64
//           tokens the accumulators are moved into f32 totals, so the tensor core's truncating additions stay within
//           short chains; h is touched once.
// shapes    h [n, n] f32; x [tokens, n] f32; any n, any tokens > 0.
// launch    128 threads; grid (ceil(n/64), ceil(n/64)), x the column tile, y the row tile; blocks below the diagonal
//           exit at once. Dynamic shared memory 2 x 6 x 4 KiB = 48 KiB.
// mapping   64 x 64 tiles of h, 32 tokens a step, 4 warps of 32 x 32, mma.m16n8k16. Tokens are the rows in shared
//           memory and the summed dimension, so both operands come through ldmatrix.trans. The next step travels to
//           registers during a step's products and is split on its way into the other half of shared memory; a
//           diagonal block holds one operand for both sides. No atomics: deterministic.
// limit     6 mma per 16 tokens on half the square: a third of the work of the full product in bf16, three times over.

enum { HS_PLANE = 32 * 64, HS_SIDE = 3 * HS_PLANE, HS_STAGE = 2 * HS_SIDE };

// Rows of 128 bytes (64 columns of one token), 16-byte chunks swizzled.
DEV u16* hs_at(u16* plane, int token, int chunk) { return plane + token * 64 + ((chunk ^ (token & 7)) * 8); }

DEV void hs_fetch(float4 (&v)[4], const float* x, int t0, int tokens, int c0, int n) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    int c = threadIdx.x + r * 128, t = t0 + (c >> 4), col = c0 + (c & 15) * 4;
    v[r] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (t >= tokens || col >= n) continue;
    const float* p = x + (size_t)t * n + col;
    if (n % 4 == 0) {
      v[r] = *reinterpret_cast<const float4*>(p);
    } else {
      v[r].x = p[0];
      if (col + 1 < n) v[r].y = p[1];
      if (col + 2 < n) v[r].z = p[2];
      if (col + 3 < n) v[r].w = p[3];
    }
  }
}

DEV void hs_store(u16* side, const float4 (&v)[4]) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    int c = threadIdx.x + r * 128, t = c >> 4, quad = c & 15;
    u32 a[3], b[3], d[3], e[3];
    bf16_split(v[r].x, a); bf16_split(v[r].y, b); bf16_split(v[r].z, d); bf16_split(v[r].w, e);
#pragma unroll
    for (int p = 0; p < 3; p++)
      *reinterpret_cast<uint2*>(hs_at(side + p * HS_PLANE, t, quad >> 1) + (quad & 1) * 4) =
          make_uint2(a[p] | b[p] << 16, d[p] | e[p] << 16);
  }
}

KERNEL BOUNDS(128, 2) hessian_update(float* __restrict__ h, const float* __restrict__ x, int tokens, int n) {
  SHARED_DYN(u16, sm);  // [half][rows' side, columns' side][term][32 tokens, 64]
  if (blockIdx.x < blockIdx.y) return;
  bool diagonal = blockIdx.x == blockIdx.y;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, i0 = blockIdx.y * 64, j0 = blockIdx.x * 64;
  int wm = (warp & 1) * 32, wn = (warp >> 1) * 32, steps = (tokens + 31) / 32;
  float acc[2][4][4], low[2][4][4], total[2][4][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = low[i][j][e] = total[i][j][e] = 0.f;

  float4 left[4], right[4];
  auto fetch = [&](int s) {
    hs_fetch(left, x, s * 32, tokens, i0, n);
    if (!diagonal) hs_fetch(right, x, s * 32, tokens, j0, n);
  };
  auto store = [&](int s) {
    u16* side = sm + (s & 1) * HS_STAGE;
    hs_store(side, left);
    if (!diagonal) hs_store(side + HS_SIDE, right);
  };

  fetch(0);
  store(0);
  for (int s = 0; s < steps; s++) {
    __syncthreads();  // step s is stored; step s - 1, in the other half, has been read
    if (s + 1 < steps) fetch(s + 1);
    u16 *rows = sm + (s & 1) * HS_STAGE, *cols = diagonal ? rows : rows + HS_SIDE;
#pragma unroll
    for (int kk = 0; kk < 2; kk++) {
      if (s * 32 + kk * 16 >= tokens) break;
      u32 a[3][2][4], b[3][2][4];
      int octet = lane >> 3, t = kk * 16 + (lane & 7);
#pragma unroll
      for (int p = 0; p < 3; p++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          // a: blocks (row 0, token 0), (row 8, token 0), (row 0, token 8), (row 8, token 8); b: the middle two swapped
          ldmatrix_x4_trans(a[p][i], hs_at(rows + p * HS_PLANE, t + (octet >> 1) * 8, (wm + i * 16) / 8 + (octet & 1)));
          ldmatrix_x4_trans(b[p][i], hs_at(cols + p * HS_PLANE, t + (octet & 1) * 8, (wn + i * 16) / 8 + (octet >> 1)));
        }
#pragma unroll
      for (int order = 2; order >= 0; order--)
#pragma unroll
        for (int p = 0; p <= order; p++)
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
              mma_16816_bf16(order ? low[i][j] : acc[i][j], a[order - p][i], &b[p][j >> 1][(j & 1) * 2]);
    }
    if ((s & 1) || s + 1 == steps) {
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            total[i][j][e] += acc[i][j][e] + low[i][j][e];
            acc[i][j][e] = low[i][j][e] = 0.f;
          }
    }
    if (s + 1 < steps) store(s + 1);
  }

#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int r = i0 + wm + i * 16 + (lane >> 2) + (e >> 1) * 8, c = j0 + wn + j * 8 + (lane & 3) * 2 + (e & 1);
        if (c < n && c >= r) h[(size_t)r * n + c] += total[i][j][e];
      }
}
