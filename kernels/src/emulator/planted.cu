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
