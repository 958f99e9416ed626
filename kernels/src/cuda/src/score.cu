#include "gpu.h"
// Scoring rows of logits without bringing them to the host.
// mapping   one block a row, blockDim.x = 32 to 256 threads (whole warps, chosen from vocab alone).
// limit     argmax reads a row once, score twice (the second time partly from L2): bandwidth-bound.

// The largest value and its first index, known to every thread; NaN is passed over; index 0 where nothing is above
// minus infinity. `values`, `places`: shared, one a warp.
DEV u32 score_top(const float* row, int vocab, float* values, u32* places) {
  const u32 none = 0xffffffffu, tid = threadIdx.x;
  float best = -INFINITY;
  u32 place = none;
  for (u32 i = tid; i < (u32)vocab; i += blockDim.x) {
    float v = row[i];
    if (v > best) {
      best = v;
      place = i;
    }
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    float v = __shfl_xor_sync(0xffffffffu, best, o);
    u32 p = __shfl_xor_sync(0xffffffffu, place, o);
    if (v > best || (v == best && p < place)) {
      best = v;
      place = p;
    }
  }
  if ((tid & 31u) == 0) {
    values[tid >> 5] = best;
    places[tid >> 5] = place;
  }
  __syncthreads();
  best = values[0];
  place = places[0];
  for (u32 w = 1; w < blockDim.x / 32; w++) {
    if (values[w] > best || (values[w] == best && places[w] < place)) {
      best = values[w];
      place = places[w];
    }
  }
  return place == none ? 0u : place;
}

// argmax: top1[r] = first index of the largest logits[r][.]
// shapes    logits [rows, vocab] f32; top1 [rows] u32.
KERNEL BOUNDS(256, 4) argmax(const float* __restrict__ logits, u32* __restrict__ top1, int rows, int vocab) {
  SHARED_ARRAY(float, values, 8);
  SHARED_ARRAY(u32, places, 8);
  if ((int)blockIdx.x >= rows) return;
  const u32 place = score_top(logits + (size_t)blockIdx.x * vocab, vocab, values, places);
  if (threadIdx.x == 0) top1[blockIdx.x] = place;
}

// score: log_prob[r] = l_t - max - ln sum_i e^(l_i - max) for l = logits[r], t = targets[r]; top1[r] as argmax
// shapes    logits [rows, vocab] f32; targets [rows] u32, each below vocab (checked by the launcher); log_prob [rows]
//           f32; top1 [rows] u32.
// accuracy  eight exponentials are added in f32, those sums in f64 (one f64 addition in eight: cheap on every GPU).
KERNEL BOUNDS(256, 4) score(const float* __restrict__ logits, const u32* __restrict__ targets,
                            float* __restrict__ log_prob, u32* __restrict__ top1, int rows, int vocab) {
  SHARED_ARRAY(float, values, 8);
  SHARED_ARRAY(u32, places, 8);
  SHARED_ARRAY(double, sums, 256);
  if ((int)blockIdx.x >= rows) return;
  const u32 tid = threadIdx.x, step = blockDim.x;
  const float* row = logits + (size_t)blockIdx.x * vocab;
  const u32 place = score_top(row, vocab, values, places);
  const float most = row[place];
  double sum = 0.0;
  for (u32 i = tid; i < (u32)vocab; i += step * 8) {
    float part = 0.0f;
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      u32 at = i + j * step;
      if (at < (u32)vocab) part += expf(row[at] - most);
    }
    sum += (double)part;
  }
  sums[tid] = sum;  // added by lane over the warps, then over the lanes
  __syncthreads();
  if (tid < 32) {
    for (u32 i = tid + 32; i < step; i += 32) sum += sums[i];
    sums[tid] = sum;
  }
  __syncthreads();
  if (tid == 0) {
    for (u32 i = 1; i < 32; i++) sum += sums[i];
    log_prob[blockIdx.x] = (float)((double)row[targets[blockIdx.x]] - (double)most - log(sum));
    top1[blockIdx.x] = place;
  }
}
