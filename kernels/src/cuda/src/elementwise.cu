#include "gpu.h"
// Element-by-element operations on f32. All are bandwidth-bound, all sizes are below 2^31 (the launchers refuse more).
// mapping   activation_mul, add_assign, soft_cap: a thread takes four neighbours, the last thread what is left.
//           gather_rows, slice_columns: a thread takes one element of the result, so that any width is coalesced.

// First of the four elements of this thread.
DEV u32 elementwise_first() { return (blockIdx.x * blockDim.x + threadIdx.x) * 4u; }

// kind: 0 silu x / (1 + e^-x), 1 gelu with tanh, 2 gelu with erf. Written without a difference of near-equal numbers:
// (1 + tanh z) / 2 = 1 / (1 + e^-2z), (1 + erf z) / 2 = erfc(-z) / 2.
DEV float elementwise_act(float x, int kind) {
  if (kind == 0) return x / (1.0f + expf(-x));
  if (kind == 1) return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  return 0.5f * x * erfcf(-0.70710678118654752f * x);
}

// activation_mul: y[i] = act(gate[i]) * up[i]
// shapes    gate, up, y [n].
KERNEL BOUNDS(256, 4) activation_mul(const float* __restrict__ gate, const float* __restrict__ up,
                                     float* __restrict__ y, int n, int act) {
  grid_ready();
  const u32 i = elementwise_first();
  if (i + 4u <= (u32)n) {
    float4 g = *reinterpret_cast<const float4*>(gate + i), u = *reinterpret_cast<const float4*>(up + i);
    *reinterpret_cast<float4*>(y + i) =
        make_float4(elementwise_act(g.x, act) * u.x, elementwise_act(g.y, act) * u.y, elementwise_act(g.z, act) * u.z,
                    elementwise_act(g.w, act) * u.w);
  } else {
    for (u32 j = i; j < (u32)n; j++) y[j] = elementwise_act(gate[j], act) * up[j];
  }
}

// add_assign: x[i] += y[i]
// shapes    x, y [n]; x and y do not overlap.
KERNEL BOUNDS(256, 4) add_assign(float* __restrict__ x, const float* __restrict__ y, int n) {
  grid_ready();
  const u32 i = elementwise_first();
  if (i + 4u <= (u32)n) {
    float4 a = *reinterpret_cast<const float4*>(x + i), b = *reinterpret_cast<const float4*>(y + i);
    *reinterpret_cast<float4*>(x + i) = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  } else {
    for (u32 j = i; j < (u32)n; j++) x[j] += y[j];
  }
}

// soft_cap: x[i] = cap * tanh(x[i] / cap)
// shapes    x [n]; cap > 0.
KERNEL BOUNDS(256, 4) soft_cap(float* __restrict__ x, int n, float cap) {
  const u32 i = elementwise_first();
  if (i + 4u <= (u32)n) {
    float4 a = *reinterpret_cast<const float4*>(x + i);
    *reinterpret_cast<float4*>(x + i) = make_float4(cap * tanhf(a.x / cap), cap * tanhf(a.y / cap),
                                                    cap * tanhf(a.z / cap), cap * tanhf(a.w / cap));
  } else {
    for (u32 j = i; j < (u32)n; j++) x[j] = cap * tanhf(x[j] / cap);
  }
}

// gather_rows: y[r][c] = x[rows_index[r]][c]
// shapes    x [any, width]; rows_index [count], each a row of x (checked by the launcher); y [count, width].
KERNEL BOUNDS(256, 4) gather_rows(const float* __restrict__ x, const int* __restrict__ rows_index,
                                  float* __restrict__ y, int count, int width) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, w = (u32)width;
  if (i >= (u32)count * w) return;
  y[i] = x[(size_t)rows_index[i / w] * w + i % w];
}

// slice_columns: y[r][c] = x[r][first + c]
// shapes    x [rows, width]; y [rows, count]; first + count <= width.
KERNEL BOUNDS(256, 4) slice_columns(const float* __restrict__ x, float* __restrict__ y, int rows, int width, int first,
                                    int count) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, c = (u32)count;
  if (i >= (u32)rows * c) return;
  y[i] = x[(size_t)(i / c) * width + first + i % c];
}

// abs_max: out[0] = max(out[0], max_i |x[i]|), a NaN counting as infinity
// shapes    x [n]; out [1], zero before the launch.
// mapping   blocks stride over x; each gives its maximum to one integer atomicMax on the bits, whose order is that of
//           the non-negative floats. A maximum does not depend on the order of its operands: deterministic.
KERNEL BOUNDS(256, 4) abs_max(const float* __restrict__ x, float* __restrict__ out, int n) {
  SHARED_ARRAY(float, part, 8);
  const u32 tid = threadIdx.x, step = gridDim.x * blockDim.x;
  float top = 0.0f;
  for (u32 i = blockIdx.x * blockDim.x + tid; i < (u32)n; i += step) {
    float v = fabsf(x[i]);
    top = fmaxf(top, v == v ? v : INFINITY);
  }
  top = warp_max(top);
  if ((tid & 31u) == 0) part[tid >> 5] = top;
  __syncthreads();
  if (tid == 0) {
    for (u32 w = 1; w < blockDim.x / 32; w++) top = fmaxf(top, part[w]);
    atomicMax(reinterpret_cast<u32*>(out), __float_as_uint(top));
  }
}
