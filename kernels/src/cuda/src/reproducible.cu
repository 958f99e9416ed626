#include "gpu.h"
// The operations of calibration and scoring in one fixed order of f32 operations, the one the CPU backend has, so that
// both give the same bits: each fused multiply-add is written as fmaf, each other product and sum is rounded by itself
// (__fmul_rn, __fadd_rn), division and square root round correctly, and no sum is ever cut in parts.
//
// Order     A product sums its columns upwards in one chain: acc = +0, acc = fma(a_k, b_k, acc). A reduction of a row has
//           16 partial sums, lane l takes the elements i = l (mod 16) upwards; then l += l + 8, 4, 2, 1 ("lanes16").
//           Nothing depends on other rows, on the tile or on the launch.
// Cost      f32 on the ordinary cores, every operand staged through shared memory: the price of equal bits. The tensor
//           core kernels of linear_gemm.cu, hessian.cu and attention.cu are the fast ones.

// The element types a weight may have, and the packed ones.
enum { RP_F32 = 0, RP_F16 = 1, RP_BF16 = 2, RP_W4 = 4, RP_W8 = 8 };
// Columns of a tile, summed elements of a step, and the distance of two of these in shared memory.
enum { RP_COLS = 64, RP_STEP = 32, RP_LD = 68 };

// e^x to about two units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of r, n into the exponent.
DEV float rp_exp(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = fmaf(x, 1.44269504f, magic), n = __fsub_rn(shifted, magic);
  const float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, x));
  float p = fmaf(1.9875691e-4f, r, 1.3981999e-3f);
  p = fmaf(p, r, 8.333452e-3f);
  p = fmaf(p, r, 4.1665796e-2f);
  p = fmaf(p, r, 1.6666665e-1f);
  p = fmaf(p, r, 0.5f);
  p = __fadd_rn(fmaf(__fmul_rn(p, r), r, r), 1.0f);
  return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23)));
}

// ---- tiles: 8 R rows by 64 columns of a product, 64 threads; a thread has R x 8 of it.
// In shared memory both operands are [step][row or column], so that a step is R and 8 neighbours.

// From a matrix whose rows are what is summed: get(line, k) gives elements k .. k + 3 of a line (zeros past its end).
template <int LINES, class F> DEV void rp_stage_lines(float* to, F get) {
#pragma unroll
  for (int i = 0; i < LINES * 8 / 64; i++) {
    const int at = threadIdx.x + i * 64, line = at >> 3, k = (at & 7) * 4;
    const float4 v = get(line, k);
    to[k * RP_LD + line] = v.x, to[(k + 1) * RP_LD + line] = v.y;
    to[(k + 2) * RP_LD + line] = v.z, to[(k + 3) * RP_LD + line] = v.w;
  }
}
// From a matrix whose columns are what is summed: get(k, line) gives lines line .. line + 3 of element k.
template <int LINES, class F> DEV void rp_stage_steps(float* to, F get) {
#pragma unroll
  for (int i = 0; i < LINES * 8 / 64; i++) {
    const int at = threadIdx.x + i * 64, k = at / (LINES / 4), line = at % (LINES / 4) * 4;
    *reinterpret_cast<float4*>(to + k * RP_LD + line) = get(k, line);
  }
}
// acc = fma(a, b, acc) for `steps` summed elements, upwards.
template <int R> DEV void rp_chain(float (&acc)[R][8], const float* a, const float* b, int steps) {
  a += (threadIdx.x >> 3) * R, b += (threadIdx.x & 7) * 8;
  for (int k = 0; k < steps; k++, a += RP_LD, b += RP_LD) {
    float right[8];
#pragma unroll
    for (int j = 0; j < 8; j++) right[j] = b[j];
#pragma unroll
    for (int i = 0; i < R; i++) {
      const float left = a[i];
#pragma unroll
      for (int j = 0; j < 8; j++) acc[i][j] = fmaf(left, right[j], acc[i][j]);
    }
  }
}
template <int R> DEV void rp_clear(float (&acc)[R][8]) {
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) acc[i][j] = 0.0f;
}
// Elements i .. i + 3 of an f32 row of n, zeros past its end; one load where rows stay aligned.
DEV float4 rp_four(const float* row, int i, int n) {
  if (n % 4 == 0 && i + 4 <= n) return *reinterpret_cast<const float4*>(row + i);
  return make_float4(i < n ? row[i] : 0.0f, i + 1 < n ? row[i + 1] : 0.0f, i + 2 < n ? row[i + 2] : 0.0f,
                     i + 3 < n ? row[i + 3] : 0.0f);
}

struct RpLinear {
  const u8* w; const float* scales; const u8* zeros; const float *x, *bias; float* y;
  int tokens, out, in, group_cols;
};

// Weight columns k .. k + 3 of a row, in f32: floats widened exactly, codes as f32(code - zero) * scale, rounded once.
template <int SRC> DEV float4 rp_weight(const RpLinear& c, int row, int k) {
  const size_t first = (size_t)row * c.in + k;
  if (SRC == RP_F32) return rp_four(reinterpret_cast<const float*>(c.w) + (size_t)row * c.in, k, c.in);
  if (SRC == RP_F16 || SRC == RP_BF16) {
    const u16* p = reinterpret_cast<const u16*>(c.w) + first;
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = k + i >= c.in ? 0.0f : SRC == RP_F16 ? h2f(p[i]) : b2f(p[i]);
    return make_float4(v[0], v[1], v[2], v[3]);
  }
  // in and group_cols are multiples of 16: four columns share a scale.
  const size_t group = (size_t)row * (c.in / c.group_cols) + k / c.group_cols;
  const u32 q = SRC == RP_W4 ? (u32)*reinterpret_cast<const u16*>(c.w + first / 2) : *reinterpret_cast<const u32*>(c.w + first);
  const float scale = c.scales[group];
  const int zero = c.zeros[group], bits = SRC == RP_W4 ? 4 : 8;
  const u32 mask = (1u << bits) - 1u;
  return make_float4(__fmul_rn((float)((int)(q & mask) - zero), scale),
                     __fmul_rn((float)((int)(q >> bits & mask) - zero), scale),
                     __fmul_rn((float)((int)(q >> 2 * bits & mask) - zero), scale),
                     __fmul_rn((float)((int)(q >> 3 * bits & mask) - zero), scale));
}

template <int R, int SRC> DEV void rp_linear_tile(float* sm, const RpLinear& c) {
  float *left = sm, *right = sm + RP_STEP * RP_LD;
  const int m0 = blockIdx.y * (8 * R), n0 = blockIdx.x * RP_COLS;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[R][8];
  rp_clear<R>(acc);
  for (int k0 = 0; k0 < c.in; k0 += RP_STEP) {
    rp_stage_lines<8 * R>(left, [&](int line, int k) {
      return m0 + line < c.tokens && k0 + k < c.in ? rp_four(c.x + (size_t)(m0 + line) * c.in, k0 + k, c.in) : none;
    });
    rp_stage_lines<RP_COLS>(right, [&](int line, int k) {
      return n0 + line < c.out && k0 + k < c.in ? rp_weight<SRC>(c, n0 + line, k0 + k) : none;
    });
    __syncthreads();
    rp_chain<R>(acc, left, right, min((int)RP_STEP, c.in - k0));
    __syncthreads();
  }
  const int row = m0 + (threadIdx.x >> 3) * R, col = n0 + (threadIdx.x & 7) * 8;
#pragma unroll
  for (int i = 0; i < R; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (row + i < c.tokens && col + j < c.out)
        c.y[(size_t)(row + i) * c.out + col + j] = c.bias ? __fadd_rn(acc[i][j], c.bias[col + j]) : acc[i][j];
}

template <int R> DEV void rp_linear(float* sm, const RpLinear& c, int source) {
  if (source == RP_F32) rp_linear_tile<R, RP_F32>(sm, c);
  else if (source == RP_F16) rp_linear_tile<R, RP_F16>(sm, c);
  else if (source == RP_BF16) rp_linear_tile<R, RP_BF16>(sm, c);
  else if (source == RP_W4) rp_linear_tile<R, RP_W4>(sm, c);
  else rp_linear_tile<R, RP_W8>(sm, c);
}

// linear_reproducible: y[t][o] = chain_i fma(x[t][i], W[o][i]) (+ bias[o])
// shapes    as gemm_dense and gemm_packed of linear_gemm.cu; scales and zeros null when dense. source: 0, 1, 2 for f32,
//           f16, bf16; 4, 8 for packed codes. Packed: in and group_cols multiples of 16.
// launch    64 threads; grid (ceil(out / 64), ceil(tokens / rows)); rows = 64, or 16 for calls of at most 16 tokens;
//           dynamic shared memory 2 x 32 x 68 floats.
// mapping   64 x 64 x 32 tiles, 8 x 8 results a thread: 16 floats from shared memory for 64 fma.
// limit     f32 arithmetic.
KERNEL BOUNDS(64, 4) linear_reproducible(const u8* __restrict__ w, const float* __restrict__ scales,
                                         const u8* __restrict__ zeros, const float* __restrict__ x,
                                         const float* __restrict__ bias, float* __restrict__ y, int tokens, int out,
                                         int in, int group_cols, int source, int rows) {
  SHARED_DYN(float, sm);
  const RpLinear c = {w, scales, zeros, x, bias, y, tokens, out, in, group_cols};
  if (rows == 16) rp_linear<2>(sm, c, source);
  else rp_linear<8>(sm, c, source);
}

// hessian_reproducible: h[i][j] += chain_t fma(x[t][i], x[t][j]) for j >= i; the lower triangle is not touched.
// shapes    h [n, n] f32; x [tokens, n] f32.
// launch    64 threads; grid (ceil(n / 64), ceil(n / 64)), blocks below the diagonal exit; shared memory as above.
// limit     f32 arithmetic, half the square.
KERNEL BOUNDS(64, 6) hessian_reproducible(float* __restrict__ h, const float* __restrict__ x, int tokens, int n) {
  SHARED_DYN(float, sm);
  if (blockIdx.x < blockIdx.y) return;
  float *left = sm, *right = blockIdx.x == blockIdx.y ? sm : sm + RP_STEP * RP_LD;
  const int i0 = blockIdx.y * 64, j0 = blockIdx.x * 64;
  const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float acc[8][8];
  rp_clear<8>(acc);
  for (int t0 = 0; t0 < tokens; t0 += RP_STEP) {
    auto stage = [&](float* to, int first) {
      rp_stage_steps<64>(to, [&](int k, int line) {
        return t0 + k < tokens && first + line < n ? rp_four(x + (size_t)(t0 + k) * n, first + line, n) : none;
      });
    };
    stage(left, i0);
    if (right != left) stage(right, j0);
    __syncthreads();
    rp_chain<8>(acc, left, right, min((int)RP_STEP, tokens - t0));
    __syncthreads();
  }
  const int row = i0 + (threadIdx.x >> 3) * 8, col = j0 + (threadIdx.x & 7) * 8;
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (col + j < n && col + j >= row + i) {
        float* to = h + (size_t)(row + i) * n + col + j;
        *to = __fadd_rn(*to, acc[i][j]);
      }
}

// The fold of lanes16: 16 neighbouring lanes hold a partial sum each, all get the whole.
DEV float rp_fold(float v) {
#pragma unroll
  for (int o = 8; o; o >>= 1) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, o, 16));
  return v;
}

// rms_norm_reproducible: ss = lanes16 sum of x^2, inv = 1 / sqrt(ss / width + eps), y = (x * inv) * (offset + w)
// shapes    x, y [rows, width] f32; w [width] f32.
// launch    128 threads, 8 rows: 16 lanes a row; grid ceil(rows / 8).
// limit     bandwidth-bound.
KERNEL BOUNDS(128, 8) rms_norm_reproducible(const float* __restrict__ x, const float* __restrict__ w,
                                            float* __restrict__ y, int rows, int width, float eps, float offset) {
  const int lane = threadIdx.x & 15, r = blockIdx.x * 8 + (threadIdx.x >> 4);
  const bool live = r < rows;
  const float* row = x + (size_t)(live ? r : 0) * width;
  float sum = 0.0f;
  for (int i = lane; i < width; i += 16) sum = fmaf(row[i], row[i], sum);
  sum = rp_fold(sum);
  const float inv = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)width), eps)));
  float* out = y + (size_t)r * width;
  for (int i = lane; i < width && live; i += 16) out[i] = __fmul_rn(__fmul_rn(row[i], inv), __fadd_rn(offset, w[i]));
}

// rope_reproducible: x1' = fma(x1, c, -(x2 * s)), x2' = fma(x2, c, x1 * s) with cosines and sines made on the host.
// shapes    x [tokens, heads, head_dim] f32, in place; cosines, sines [tokens, half] f32; positions [tokens] i32, a
//           negative one for a row that stays; 2 half <= head_dim, elements from 2 half on stay.
// mapping   a thread a pair; bandwidth-bound.
KERNEL BOUNDS(256, 4) rope_reproducible(float* __restrict__ x, const float* __restrict__ cosines,
                                        const float* __restrict__ sines, const int* __restrict__ positions,
                                        int tokens, int heads, int head_dim, int half) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x, width = (u32)heads * half;
  if (i >= (u32)tokens * width) return;
  const u32 t = i / width, p = i % width, e = p % half;
  if (positions[t] < 0) return;
  float* low = x + ((size_t)t * heads + p / half) * head_dim + e;
  const float a = low[0], b = low[half], c = cosines[(size_t)t * half + e], s = sines[(size_t)t * half + e];
  low[0] = fmaf(a, c, -__fmul_rn(b, s));
  low[half] = fmaf(b, c, __fmul_rn(a, s));
}

// activation_reproducible: y[i] = act(gate[i]) * up[i]; act 0 silu x / (1 + e^-x)
// shapes    gate, up, y [n].
// mapping   a thread takes four neighbours; bandwidth-bound.
KERNEL BOUNDS(256, 4) activation_reproducible(const float* __restrict__ gate, const float* __restrict__ up,
                                              float* __restrict__ y, int n) {
  const u32 first = (blockIdx.x * blockDim.x + threadIdx.x) * 4u;
#pragma unroll
  for (u32 i = first; i < first + 4u; i++) {
    if (i >= (u32)n) return;
    const float g = gate[i];
    y[i] = __fmul_rn(__fdiv_rn(g, __fadd_rn(1.0f, rp_exp(-g))), up[i]);
  }
}
