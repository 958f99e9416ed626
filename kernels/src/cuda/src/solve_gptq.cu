#include "gpu.h"
// GPTQ (arXiv 2210.17323) on the device: scales of groups, codes column by column, the error of a block of columns moved
// into the columns after it, and the loss of the result.
//
// Order     gptq_scales, gptq_block and gptq_update do the operations of the host's solver (quantize: scale_search.rs,
//           gptq.rs) in its order, each product and sum rounded as there, so that one factor gives the same codes on both:
//           16 partial sums an error, a product and a difference for each column of a block, and for the columns after it
//           one fma chain over the block, subtracted once.
// shapes    w [out, n] f32, columns in their own order; p [out, n] the same in solving order, worked on in place;
//           perm [n] position -> column; u [n, n] upper triangular factor in solving order; diag [n], 0 at dead columns;
//           scales [out, groups] f32; zeros [out, groups] u8, null when symmetric; codes [out, n] u8, columns in their own
//           order.

enum { GQ_LANES = 16, GQ_CHUNK = 512, GQ_MAX_CANDIDATES = 128, GQ_WARPS = 4 };
enum { GQ_SYMMETRIC = 1, GQ_SIGNED = 2 };

DEV bool gq_finite(float v) { return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u; }
// Whether a rounded scale can be divided by.
DEV bool gq_usable(float s) { return gq_finite(s) && s != 0.0f && gq_finite(__fdiv_rn(1.0f, s)); }
// Rounded to bf16 (0), f16 (1) or not (2).
DEV float gq_round(float v, int type) { return type == 0 ? b2f(f2b(v)) : type == 1 ? h2f(f2h(v)) : v; }
DEV float gq_clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

// gptq_scales: for each group of each row the scale (and zero point) with the least sum of diag * (w - value)^2.
// shapes    above. Candidate 0 spans the extremes; then for p = first, first + 2, ... hundredths that range times p, each
//           followed, where GQ_SIGNED, by the one whose outermost code is at the extreme. min_zero: the smallest zero point.
//           A range that rounds to zero gives scale 1; one that overflows is stored as it is, for the launcher to refuse.
// launch    a block a group, a thread a candidate: blockDim.x = whole warps, at least `candidates`, at most 128.
// limit     arithmetic: some ten instructions a weight and candidate.
KERNEL BOUNDS(128, 4) gptq_scales(const float* __restrict__ w, const float* __restrict__ diag, float* __restrict__ scales,
                                  u8* __restrict__ zeros, int n, int cols, int max_code, int scale_type, int flags,
                                  int min_zero, int first, int candidates) {
  SHARED_ARRAY(float, values, GQ_CHUNK);
  SHARED_ARRAY(float, weights, GQ_CHUNK);
  SHARED_ARRAY(float, lows, GQ_MAX_CANDIDATES);
  SHARED_ARRAY(float, highs, GQ_MAX_CANDIDATES);
  SHARED_ARRAY(float, losses, GQ_MAX_CANDIDATES);
  const int tid = threadIdx.x, threads = blockDim.x, groups = n / cols, group = blockIdx.x % groups;
  const float* from = w + (size_t)(blockIdx.x / groups) * n + (size_t)group * cols;
  const float* heights = diag + (size_t)group * cols;

  float lo = 0.0f, hi = 0.0f;
  for (int i = tid; i < cols; i += threads) {
    const float v = heights[i] == 0.0f ? 0.0f : from[i];
    lo = v < lo ? v : lo, hi = v > hi ? v : hi;
  }
  lows[tid] = lo, highs[tid] = hi;
  __syncthreads();
  for (int i = 0; i < threads; i++) lo = min(lo, lows[i]), hi = max(hi, highs[i]);
  __syncthreads();  // lows and highs are written again below

  const bool symmetric = flags & GQ_SYMMETRIC, is_signed = flags & GQ_SIGNED;
  const float top = (float)max_code, mid = (float)((max_code + 1) / 2), lowest = (float)min_zero;
  const int turn = tid - 1, step = symmetric && is_signed ? turn >> 1 : turn;
  const float p = __fdiv_rn((float)(first + 2 * step), 100.0f), most = max(hi, -lo);
  float scale, zero = mid;
  if (symmetric) {
    const float half = __fmul_rn(top, 0.5f);
    if (tid == 0) scale = __fdiv_rn(most, half);
    else if (is_signed && (turn & 1)) scale = __fmul_rn(p, __fdiv_rn(hi >= -lo ? -most : most, mid));
    else scale = __fdiv_rn(__fmul_rn(p, most), half);
    scale = gq_round(scale, scale_type);
  } else {
    // Divided one by one: the difference of two large finite weights may overflow.
    const float range = __fsub_rn(__fdiv_rn(hi, top), __fdiv_rn(lo, top));
    scale = gq_round(tid == 0 ? range : __fmul_rn(p, range), scale_type);
    zero = gq_clamp(rintf(__fdiv_rn(tid == 0 ? -lo : __fmul_rn(-lo, p), scale)), lowest, top);
  }

  const bool usable = tid < candidates && gq_usable(scale);
  const float inverse = usable ? __fdiv_rn(1.0f, scale) : 0.0f, low = -zero, high = __fadd_rn(top, low);
  float sums[GQ_LANES];
#pragma unroll
  for (int l = 0; l < GQ_LANES; l++) sums[l] = 0.0f;
  for (int c0 = 0; c0 < cols; c0 += GQ_CHUNK) {
    const int count = min((int)GQ_CHUNK, cols - c0), padded = (count + GQ_LANES - 1) / GQ_LANES * GQ_LANES;
    for (int i = tid; i < padded; i += threads) {
      const float height = i < count ? heights[c0 + i] : 0.0f;
      weights[i] = height;
      values[i] = height == 0.0f ? 0.0f : from[c0 + i];
    }
    __syncthreads();
    if (usable) {
      for (int i = 0; i < padded; i += GQ_LANES) {
#pragma unroll
        for (int l = 0; l < GQ_LANES; l++) {
          const float v = values[i + l];
          const float z = gq_clamp(rintf(__fmul_rn(v, inverse)), low, high);
          const float e = __fsub_rn(v, __fmul_rn(scale, z));
          sums[l] = __fadd_rn(sums[l], __fmul_rn(weights[i + l], __fmul_rn(e, e)));
        }
      }
    }
    __syncthreads();
  }
  float loss = sums[0];
#pragma unroll
  for (int l = 1; l < GQ_LANES; l++) loss = __fadd_rn(loss, sums[l]);
  // No comparison below is true for NaN.
  losses[tid] = usable ? loss : NAN;
  lows[tid] = scale, highs[tid] = zero;
  __syncthreads();
  if (tid != 0) return;
  if (!usable) {
    if (gq_finite(scale)) scale = 1.0f;
    zero = symmetric ? mid : lowest;
  } else {
    for (int c = 1; c < candidates; c++)
      if (losses[c] < loss) loss = losses[c], scale = lows[c], zero = highs[c];
  }
  scales[blockIdx.x] = scale;
  if (zeros) zeros[blockIdx.x] = (u8)zero;
}

// gptq_gather: p[r][j] = w[r][perm[j]], 0 at dead columns.
// launch    256 threads; grid (ceil(n / 256), min(out, 65535)), rows in turn.
KERNEL BOUNDS(256, 4) gptq_gather(const float* __restrict__ w, const u32* __restrict__ perm, const float* __restrict__ diag,
                                  float* __restrict__ p, int out, int n) {
  const int j = blockIdx.x * 256 + threadIdx.x;
  if (j >= n) return;
  const u32 col = perm[j];
  const bool dead = diag[col] == 0.0f;
  for (int r = blockIdx.y; r < out; r += gridDim.y) p[(size_t)r * n + j] = dead ? 0.0f : w[(size_t)r * n + col];
}

// gptq_block: codes of positions start .. start + count - 1, one after another, and their errors over the diagonal of u.
// shapes    above; errors [out, block] f32, the first `count` columns written; cols: columns of a group.
// launch    128 threads, a warp a row; grid ceil(out / 4); dynamic shared memory 4 x block floats.
// limit     latency of the chain of columns; all rows are under way at once.
KERNEL BOUNDS(128, 8) gptq_block(const float* __restrict__ p, const float* __restrict__ u, const u32* __restrict__ perm,
                                 const float* __restrict__ scales, const u8* __restrict__ zeros, u8* __restrict__ codes,
                                 float* __restrict__ errors, int out, int n, int cols, int max_code, int start, int count,
                                 int block) {
  SHARED_DYN(float, sm);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = blockIdx.x * GQ_WARPS + warp;
  if (r >= out) return;
  const int groups = (n + cols - 1) / cols, mid = (max_code + 1) / 2;
  const float top = (float)max_code;
  float* row = sm + warp * block;
  for (int j = lane; j < count; j += 32) row[j] = p[(size_t)r * n + start + j];
  __syncwarp();
  for (int j = 0; j < count; j++) {
    const u32 col = perm[start + j];
    const size_t at = (size_t)r * groups + col / (u32)cols;
    const float scale = scales[at], v = row[j];
    const int zero = zeros ? (int)zeros[at] : mid;
    const float* across = u + (size_t)(start + j) * n + start;
    const float q = rintf(__fdiv_rn(v, scale));
    const int code = q != q ? zero : (int)gq_clamp(__fadd_rn(q, (float)zero), 0.0f, top);
    const float e = __fdiv_rn(__fsub_rn(v, __fmul_rn((float)(code - zero), scale)), across[j]);
    if (lane == 0) {
      codes[(size_t)r * n + col] = (u8)code;
      errors[(size_t)r * block + j] = e;
    }
    for (int k = j + 1 + lane; k < count; k += 32) row[k] = __fsub_rn(row[k], __fmul_rn(e, across[k]));
    __syncwarp();
  }
}

// gptq_update: p[r][j] -= sum_k errors[r][k] u[start + k][j] for the positions j after the block.
// launch    64 threads; grid (ceil((n - start - count) / 64), ceil(out / 64)); dynamic shared memory 2 x 32 x 68 floats.
// limit     f32 arithmetic, and once a block the rest of p.
KERNEL BOUNDS(64, 6) gptq_update(float* __restrict__ p, const float* __restrict__ errors, const float* __restrict__ u,
                                 int out, int n, int start, int count, int block) {
  SHARED_DYN(float, sm);
  float *left = sm, *right = sm + RP_STEP * RP_LD;
  const int m0 = blockIdx.y * 64, j0 = start + count + blockIdx.x * 64;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[8][8];
  rp_clear<8>(acc);
  for (int k0 = 0; k0 < count; k0 += RP_STEP) {
    rp_stage_lines<64>(left, [&](int line, int k) {
      return m0 + line < out ? rp_four(errors + (size_t)(m0 + line) * block, k0 + k, block) : none;
    });
    rp_stage_steps<64>(right, [&](int k, int line) {
      if (k0 + k >= count) return none;
      const float* x = u + (size_t)(start + k0 + k) * n;
      const int j = j0 + line;
      return make_float4(j < n ? x[j] : 0.0f, j + 1 < n ? x[j + 1] : 0.0f, j + 2 < n ? x[j + 2] : 0.0f,
                         j + 3 < n ? x[j + 3] : 0.0f);
    });
    __syncthreads();
    rp_chain<8>(acc, left, right, min((int)RP_STEP, count - k0));
    __syncthreads();
  }
  sf_results(acc, [&](int r, int c, float v) {
    if (m0 + r < out && j0 + c < n) {
      float* to = p + (size_t)(m0 + r) * n + j0 + c;
      *to = __fsub_rn(*to, v);
    }
  });
}

// gptq_loss: x H x^T of every row of x = w - q (z = 0) and of x = w (z = 1), summed over tiles of 64 rows and 64 columns.
// shapes    w, q [out, n] f32; h [n, n] f32, upper triangle read; partial [2, ceil(out / 64), ceil(n / 64)] f64.
// launch    64 threads; grid (ceil(n / 64), ceil(out / 64), 2); shared memory as above.
// accuracy  products of a row with H in f32, one chain a column; all sums over columns and rows in f64.
// limit     f32 arithmetic, half the square.
KERNEL BOUNDS(64, 6) gptq_loss(const float* __restrict__ w, const float* __restrict__ q, const float* __restrict__ h,
                               double* __restrict__ partial, int out, int n) {
  SHARED_DYN(float, sm);
  SHARED_ARRAY(double, sums, 64);
  float *left = sm, *right = sm + RP_STEP * RP_LD;
  const int m0 = blockIdx.y * 64, j0 = blockIdx.x * 64;
  const bool difference = blockIdx.z == 0;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[8][8];
  rp_clear<8>(acc);
  for (int k0 = 0; k0 < min(n, j0 + 64); k0 += RP_STEP) {
    rp_stage_lines<64>(left, [&](int line, int k) {
      if (m0 + line >= out) return none;
      const size_t row = (size_t)(m0 + line) * n;
      float4 v = rp_four(w + row, k0 + k, n);
      if (difference) {
        const float4 b = rp_four(q + row, k0 + k, n);
        v = make_float4(v.x - b.x, v.y - b.y, v.z - b.z, v.w - b.w);
      }
      return v;
    });
    rp_stage_steps<64>(right, [&](int k, int line) {
      // The upper triangle with twice what lies off the diagonal: the same form.
      const int i = k0 + k, j = j0 + line;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float g = i <= j + e && j + e < n ? h[(size_t)i * n + j + e] : 0.0f;
        v[e] = i < j + e ? 2.0f * g : g;
      }
      return make_float4(v[0], v[1], v[2], v[3]);
    });
    __syncthreads();
    rp_chain<8>(acc, left, right, RP_STEP);
    __syncthreads();
  }
  double sum = 0.0;
  sf_results(acc, [&](int r, int c, float v) {
    if (m0 + r < out && j0 + c < n) {
      const size_t at = (size_t)(m0 + r) * n + j0 + c;
      sum += (double)v * (double)(difference ? w[at] - q[at] : w[at]);
    }
  });
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 64; i++) sum += sums[i];
    partial[((size_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
  }
}
