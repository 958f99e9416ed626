#include "gpu.h"
// rms_norm: y[r][i] = x[r][i] / sqrt(sum_j x[r][j]^2 / width + eps) * (offset + w[i])
// shapes    x, y [rows, width] f32; w [width] f32. Any width >= 1.
// mapping   one block a row, blockDim.x = 32 to 256 threads (whole warps, chosen from width alone); a thread takes four
//           neighbours a step when 4 divides width, else one. Each thread sums its squares in f32, then a shuffle tree
//           in each warp, then the warps in order: the result depends on nothing but the row.
// limit     reads x twice (the second time from L1 or L2) and writes y once: bandwidth-bound.
KERNEL BOUNDS(256, 4) rms_norm(const float* __restrict__ x, const float* __restrict__ w, float* __restrict__ y,
                               int rows, int width, float eps, float offset) {
  grid_ready();
  SHARED_ARRAY(float, part, 8);
  if ((int)blockIdx.x >= rows) return;
  const int tid = threadIdx.x, step = blockDim.x, warps = blockDim.x / 32, quads = width % 4 == 0 ? width / 4 : 0;
  const float* row = x + (size_t)blockIdx.x * width;
  float* out = y + (size_t)blockIdx.x * width;
  float sum = 0.0f;
  for (int i = tid; i < quads; i += step) {
    float4 v = *reinterpret_cast<const float4*>(row + i * 4);
    sum += v.x * v.x;
    sum += v.y * v.y;
    sum += v.z * v.z;
    sum += v.w * v.w;
  }
  for (int i = quads * 4 + tid; i < width; i += step) sum += row[i] * row[i];
  sum = warp_sum(sum);
  if ((tid & 31) == 0) part[tid >> 5] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int i = 0; i < warps; i++) sum += part[i];
  const float r = 1.0f / sqrtf(sum / (float)width + eps);
  for (int i = tid; i < quads; i += step) {
    float4 v = *reinterpret_cast<const float4*>(row + i * 4), g = *reinterpret_cast<const float4*>(w + i * 4);
    *reinterpret_cast<float4*>(out + i * 4) = make_float4(v.x * r * (offset + g.x), v.y * r * (offset + g.y),
                                                          v.z * r * (offset + g.z), v.w * r * (offset + g.w));
  }
  for (int i = quads * 4 + tid; i < width; i += step) out[i] = row[i] * r * (offset + w[i]);
}
