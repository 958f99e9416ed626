// planted.cu: kernels with a planted fault each, for tests/planted.rs; the emulator must name every one of them.
// `planted_clean` has none and does all of it right: reads and writes at the edge, barriers, __syncwarp, cp.async,
// ldmatrix, mma, wgmma. One block of 128 threads; n is the elements of x and y.

// y[i] = x[n - 1 - i], through shared memory.
KERNEL BOUNDS(128, 1) planted_clean(const float* x, float* y, int n) {
  SHARED_ARRAY(float, s, 128);
  int i = threadIdx.x;
  if (i < n) s[i] = x[i];
  __syncthreads();
  if (i < n) y[i] = s[n - 1 - i];
  __syncthreads();
  // Neighbours exchange within the warp.
  s[i] = (float)i;
  __syncwarp();
  float other = s[i ^ 1];
  __syncwarp();
  s[i] = other + warp_sum(0.f);
  __syncthreads();
  if (i < n && s[i] != (float)(i ^ 1)) y[i] = -1.f;
}

KERNEL BOUNDS(128, 1) planted_read_past_end(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < n) y[i] = x[i + 1];
}
KERNEL BOUNDS(128, 1) planted_write_past_end(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i <= n) y[i] = x[i < n ? i : 0];
}
// Lands in the few bytes between the end and the guard page, or before the start.
KERNEL BOUNDS(128, 1) planted_write_beside(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < n) y[i - 1] = x[i];
}
KERNEL BOUNDS(128, 1) planted_write_input(float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < n) x[i] = y[i];
}
// No barrier between the write and the read of another thread's element.
KERNEL BOUNDS(128, 1) planted_race(const float* x, float* y, int n) {
  SHARED_ARRAY(float, s, 128);
  int i = threadIdx.x;
  s[i] = i < n ? x[i] : 0.f;
  if (i < n) y[i] = s[n - 1 - i];
}
// The same in global memory; the barrier comes too late.
KERNEL BOUNDS(128, 1) planted_race_global(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < n) y[i] = x[i];
  if (i + 1 < n) y[i] += y[i + 1];
  __syncthreads();
}
// Every block writes the same element.
KERNEL BOUNDS(128, 1) planted_race_of_blocks(const float* x, float* y, int n) {
  if (threadIdx.x == 0 && n > 0) y[0] = x[0] + (float)blockIdx.x;
}
KERNEL BOUNDS(128, 1) planted_divergent_barrier(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < 16) __syncthreads();
  float v = i >= 16 ? warp_sum(1.f) : 0.f;
  if (i < n) y[i] = x[i] + v;
}
KERNEL BOUNDS(128, 1) planted_two_barriers(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (i < n) y[i] = x[i];
}
// The last block to arrive sums what all of them wrote into y[1..]; y[0], all ones at first, counts them.
DEV void planted_arrive(const float* x, float* y, int n, bool fenced) {
  SHARED_ARRAY(u32, last, 1);
  int i = threadIdx.x, at = 1 + blockIdx.x * blockDim.x + i;
  if (at < n) y[at] = x[at];
  __syncthreads();
  if (i == 0) {
    if (fenced) __threadfence();
    last[0] = atomicAdd(reinterpret_cast<u32*>(y), 1u) + 1 == gridDim.x - 1;
    if (fenced) __threadfence();
  }
  __syncthreads();
  float sum = 0.f;
  for (int k = 1; k < n && last[0] && i == 1; k++) sum += y[k];
  if (last[0] && i == 1) y[n - 1] = sum;
}
KERNEL BOUNDS(128, 1) planted_last_block(const float* x, float* y, int n) { planted_arrive(x, y, n, true); }
KERNEL BOUNDS(128, 1) planted_missing_fence(const float* x, float* y, int n) { planted_arrive(x, y, n, false); }
KERNEL BOUNDS(128, 1) planted_mask(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < n && (i & 1)) y[i] = warp_sum(x[i]);
}
KERNEL BOUNDS(128, 1) planted_shared_overrun(const float* x, float* y, int n) {
  SHARED_ARRAY(float, s, 128);
  int i = threadIdx.x;
  s[i + 1] = i < n ? x[i] : 0.f;
  __syncthreads();
  if (i < n) y[i] = s[i];
}
// Reads what its own cp.async has not delivered.
KERNEL BOUNDS(128, 1) planted_missing_wait(const float* x, float* y, int n) {
  SHARED_DYN(float, s);
  int i = threadIdx.x;
  cp_async4(s + i, x + (i < n ? i : 0), i < n);
  cp_async_commit();
  __syncthreads();
  if (i < n) y[i] = s[i];
  cp_async_wait<0>();
}
KERNEL BOUNDS(128, 1) planted_null(const float* x, float* y, int n) {
  int i = threadIdx.x;
  if (i < n) y[i] = x[i];
}
// A local array larger than the emulator's stack; a GPU would spill it to memory.
KERNEL BOUNDS(128, 1) planted_stack(const float* x, float* y, int n) {
  volatile float local[32768];
  int i = threadIdx.x;
  for (int k = 0; k < 32768; k++) local[k] = x[k % n];
  if (i < n) y[i] = local[i * 100];
}

// y [8, 8] = the transpose of x [8, 8], of 16-bit elements, by the first warp.
KERNEL BOUNDS(128, 1) planted_transpose(const u32* x, u32* y) {
  if (threadIdx.x < 32) y[threadIdx.x] = movmatrix_trans(x[threadIdx.x]);
}

// A [16, 32] B [8, 32]^T of bytes by the first warp: as integers into c [16, 8], as E4M3 into f [16, 8], each added to what is there.
KERNEL BOUNDS(128, 1) planted_matrix_bytes(const u8* a, const u8* b, int* c, float* f) {
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  if (lane >= 32) return;
  u32 fa[4], fb[2];
  for (int i = 0; i < 4; i++) fa[i] = *reinterpret_cast<const u32*>(a + (g + (i & 1) * 8) * 32 + t * 4 + (i >> 1) * 16);
  for (int i = 0; i < 2; i++) fb[i] = *reinterpret_cast<const u32*>(b + g * 32 + t * 4 + i * 16);
  int whole[4];
  float real[4];
  for (int e = 0; e < 4; e++) {
    const int at = (g + (e >> 1) * 8) * 8 + t * 2 + (e & 1);
    whole[e] = c[at];
    real[e] = f[at];
  }
  mma_16832_s8(whole, fa, fb);
  mma_16832_e4m3(real, fa, fb);
  for (int e = 0; e < 4; e++) {
    const int at = (g + (e >> 1) * 8) * 8 + t * 2 + (e & 1);
    c[at] = whole[e];
    f[at] = real[e];
  }
}

// C [64, 64] += A [64, 64] B [64, 64]^T in bf16 by mma and by wgmma; y[0] becomes their largest difference.
KERNEL BOUNDS(128, 1) planted_matrix(const u16* a, const u16* b, float* c, float* y) {
  SHARED_DYN_ALIGNED(u16, s);  // A, B: 64 rows of 128 bytes, chunks swizzled
  SHARED_ARRAY(float, worst, 4);
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  u16* sb = s + 64 * 64;
  for (int i = tid; i < 512; i += 128) {
    int row = i >> 3, chunk = i & 7, at = row * 64 + ((chunk ^ (row & 7)) * 8);
    cp_async16(s + at, a + row * 64 + chunk * 8, true);
    cp_async16(sb + at, b + row * 64 + chunk * 8, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  float acc[8][4];
  for (int j = 0; j < 8; j++)
    for (int e = 0; e < 4; e++) acc[j][e] = 0.f;
  for (int k = 0; k < 4; k++) {
    u32 fa[4];
    int row = warp * 16 + (lane & 15), chunk = k * 2 + (lane >> 4);
    ldmatrix_x4(fa, s + row * 64 + ((chunk ^ (row & 7)) * 8));
    for (int j = 0; j < 8; j++) {
      u32 fb[2];
      int brow = j * 8 + (lane & 7), bchunk = k * 2 + (lane >> 3 & 1);
      ldmatrix_x2(fb, sb + brow * 64 + ((bchunk ^ (brow & 7)) * 8));
      mma_16816_bf16(acc[j], fa, fb);
    }
  }
  float off = 0.f;
#ifdef GPU_HAS_WGMMA
  float w[32];
  for (int i = 0; i < 32; i++) w[i] = 0.f;
  u64 da = wgmma_desc(s), db = wgmma_desc(sb);
  fence_async_proxy();
  wgmma_fence();
  for (int k = 0; k < 4; k++) wgmma_m64n64k16_bf16(w, da + k * 2, db + k * 2);
  wgmma_commit();
  wgmma_wait<0>();
  for (int j = 0; j < 8; j++)
    for (int e = 0; e < 4; e++) off = fmaxf(off, fabsf(w[j * 4 + e] - acc[j][e]));
#endif
  for (int j = 0; j < 8; j++)
    for (int e = 0; e < 4; e++)
      c[(warp * 16 + (lane >> 2) + (e >> 1) * 8) * 64 + j * 8 + (lane & 3) * 2 + (e & 1)] = acc[j][e];
  off = warp_max(off);
  if (lane == 0) worst[warp] = off;
  __syncthreads();
  if (tid == 0) y[0] = fmaxf(fmaxf(worst[0], worst[1]), fmaxf(worst[2], worst[3]));
}

// C [64, 256] = A [64, 64] B [256, 64]^T in bf16; y[0] becomes the largest difference of the other shapes and of A from
// registers, y[1] that of f16 products of 128 and of 64 columns, of operands read as f16.
KERNEL BOUNDS(128, 1) planted_matrix_wide(const u16* a, const u16* b, float* c, float* y) {
  SHARED_DYN_ALIGNED(u16, s);  // A, B: rows of 128 bytes, chunks swizzled
  SHARED_ARRAY(float, worst, 8);
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  u16* sb = s + 64 * 64;
  for (int i = tid; i < 2048; i += 128) {
    int row = i >> 3, chunk = i & 7, at = row * 64 + ((chunk ^ (row & 7)) * 8);
    if (row < 64) cp_async16(s + at, a + row * 64 + chunk * 8, true);
    cp_async16(sb + at, b + row * 64 + chunk * 8, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_async_proxy();
  __syncthreads();
  u32 fa[4][4];
  for (int k = 0; k < 4; k++) {
    int row = warp * 16 + (lane & 15), chunk = k * 2 + (lane >> 4);
    ldmatrix_x4(fa[k], s + row * 64 + ((chunk ^ (row & 7)) * 8));
  }
  float w256[128], r256[128], w128[64], r128[64], h128[64], h64[32];
  for (int i = 0; i < 32; i++) h64[i] = 0.f;
  for (int i = 0; i < 64; i++) w128[i] = r128[i] = h128[i] = 9.f;
  u64 da = wgmma_desc(s), db = wgmma_desc(sb);
  wgmma_fence();
  for (int k = 0; k < 4; k++) {
    wgmma_m64n256k16_bf16(w256, da + k * 2, db + k * 2, k > 0);
    wgmma_rs_m64n256k16_bf16(r256, fa[k], db + k * 2, k > 0);
    wgmma_m64n128k16_bf16(w128, da + k * 2, db + k * 2, k > 0);
    wgmma_rs_m64n128k16_bf16(r128, fa[k], db + k * 2, k > 0);
    wgmma_m64n128k16_f16(h128, da + k * 2, db + k * 2, k > 0);
    wgmma_m64n64k16_f16(h64, da + k * 2, db + k * 2);
  }
  wgmma_commit();
  wgmma_wait<0>();
  float off = 0.f, half = 0.f;
  for (int i = 0; i < 128; i++) off = fmaxf(off, fabsf(w256[i] - r256[i]));
  for (int i = 0; i < 64; i++) off = fmaxf(off, fmaxf(fabsf(w256[i] - w128[i]), fabsf(w128[i] - r128[i])));
  for (int i = 0; i < 32; i++) half = fmaxf(half, fabsf(h64[i] - h128[i]));
  for (int e = 0; e < 128; e++)
    c[(warp * 16 + (lane >> 2) + (e >> 1 & 1) * 8) * 256 + (e >> 2) * 8 + (lane & 3) * 2 + (e & 1)] = w256[e];
  off = warp_max(off);
  half = warp_max(half);
  if (lane == 0) {
    worst[warp] = off;
    worst[4 + warp] = half;
  }
  __syncthreads();
  if (tid < 2) y[tid] = fmaxf(fmaxf(worst[tid * 4], worst[tid * 4 + 1]), fmaxf(worst[tid * 4 + 2], worst[tid * 4 + 3]));
}
