#include "gpu.h"
// Root-mean-square norms of rows.

// What both kernels do with a row: x (+ y, kept in x), its norm to out. Up to eight fours of the row stay in registers
// between the two passes.
template <bool ADD>
DEV void rms_norm_row(float* part, float* __restrict__ x, const float* __restrict__ y, const float* __restrict__ w,
                      float* __restrict__ out, int width, float eps, float offset) {
  constexpr int HELD = 8;
  const int tid = threadIdx.x, step = blockDim.x, warps = blockDim.x / 32, quads = width % 4 == 0 ? width / 4 : 0;
  float4* const fours = reinterpret_cast<float4*>(x);
  auto take = [&](int i) {
    float4 v = fours[i];
    if (ADD) {
      const float4 a = reinterpret_cast<const float4*>(y)[i];
      v = make_float4(v.x + a.x, v.y + a.y, v.z + a.z, v.w + a.w);
      fours[i] = v;
    }
    return v;
  };
  auto put = [&](int i, float4 v, float r) {
    const float4 g = reinterpret_cast<const float4*>(w)[i];
    reinterpret_cast<float4*>(out)[i] = make_float4(v.x * r * (offset + g.x), v.y * r * (offset + g.y),
                                                    v.z * r * (offset + g.z), v.w * r * (offset + g.w));
  };
  float sum = 0.0f;
  auto square = [&](float4 v) {
    sum = fmaf(v.x, v.x, sum);
    sum = fmaf(v.y, v.y, sum);
    sum = fmaf(v.z, v.z, sum);
    sum = fmaf(v.w, v.w, sum);
  };
  float4 held[HELD];
#pragma unroll
  for (int j = 0; j < HELD; j++)
    if (tid + j * step < quads) held[j] = take(tid + j * step);
#pragma unroll
  for (int j = 0; j < HELD; j++)
    if (tid + j * step < quads) square(held[j]);
  for (int i = tid + HELD * step; i < quads; i += step) square(take(i));
  for (int i = quads * 4 + tid; i < width; i += step) {
    if (ADD) x[i] += y[i];
    sum = fmaf(x[i], x[i], sum);
  }
  sum = warp_sum(sum);
  if ((tid & 31) == 0) part[tid >> 5] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int i = 0; i < warps; i++) sum += part[i];
  const float r = 1.0f / sqrtf(sum / (float)width + eps);
#pragma unroll
  for (int j = 0; j < HELD; j++)
    if (tid + j * step < quads) put(tid + j * step, held[j], r);
  for (int i = tid + HELD * step; i < quads; i += step) put(i, fours[i], r);
  for (int i = quads * 4 + tid; i < width; i += step) out[i] = x[i] * r * (offset + w[i]);
}

// rms_norm: y[r][i] = x[r][i] / sqrt(sum_j x[r][j]^2 / width + eps) * (offset + w[i])
// shapes    x, y [rows, width] f32; w [width] f32. Any width >= 1.
// mapping   one block a row, blockDim.x = 32 to 256 threads (whole warps, chosen from width alone); a thread takes four
//           neighbours a step when 4 divides width, else one. Each thread sums its squares in f32, then a shuffle tree
//           in each warp, then the warps in order: the result depends on nothing but the row.
// limit     reads x once up to 8192 columns and writes y once: bandwidth-bound.
KERNEL BOUNDS(256, 4) rms_norm(const float* __restrict__ x, const float* __restrict__ w, float* __restrict__ y,
                               int rows, int width, float eps, float offset) {
  grid_ready();
  SHARED_ARRAY(float, part, 8);
  if ((int)blockIdx.x >= rows) return;
  const size_t row = (size_t)blockIdx.x * width;
  rms_norm_row<false>(part, const_cast<float*>(x) + row, nullptr, w, y + row, width, eps, offset);
}

// add_rms_norm: x[r][i] += a[r][i]; y = rms_norm of x. The same operations in the same order as one after the other.
// shapes    x, a, y [rows, width] f32; w [width] f32.
// mapping   as rms_norm.
// limit     bandwidth-bound; in a decode step, launch latency.
KERNEL BOUNDS(256, 4) add_rms_norm(float* __restrict__ x, const float* __restrict__ a, const float* __restrict__ w,
                                   float* __restrict__ y, int rows, int width, float eps, float offset) {
  grid_ready();
  grid_ready();
  SHARED_ARRAY(float, part, 8);
  if ((int)blockIdx.x >= rows) return;
  const size_t row = (size_t)blockIdx.x * width;
  rms_norm_row<true>(part, x + row, a + row, w, y + row, width, eps, offset);
}
