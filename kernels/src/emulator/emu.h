// emu.h: CUDA's names on the host, for the kernels; gpu.h includes it where there is no device compiler.
//
// Each CUDA thread is a fiber with its own stack. A block's fibers share one OS thread, so a shared array is plain
// memory and a barrier is a switch of stacks. What needs other lanes (shuffles, matrix fragments) is one primitive of
// the runtime: every lane leaves a pointer to its operands, the last to arrive computes for all.
//
// registry.cpp compiles the kernels twice. With EMU_CHECKED the compiler reports each of their memory accesses
// (-fsanitize=thread, whose callbacks are ours: check.cpp), so no name below may read the runtime's memory inline.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define KERNEL void
#define BOUNDS(threads, blocks)
#define DEV static inline
#define MEMBER inline

struct dim3 {
  u32 x, y, z;
};
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
DEV uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
DEV uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEV int2 make_int2(int x, int y) { return {x, y}; }
DEV int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEV float2 make_float2(float x, float y) { return {x, y}; }
DEV float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emu {
// Where the running fiber is.
struct Here {
  dim3 thread, block, block_dim, grid_dim;
};
extern __thread const Here* here;
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

[[noreturn]] void fail(const char* problem);
void sync_block(int line);
void sync_warp(u32 mask);
// The shared array declared at `site`; the same for every thread and every call.
u8* shared_array(const void* site, u32 bytes);
u8* shared_dynamic();
u32 shared_offset(const void* p);
enum Shuffle { INDEX, XOR, DOWN, UP };
u32 shuffle(Shuffle kind, u32 mask, u32 value, int lane, int width);
u32 ballot(u32 mask, bool vote);
void copy_async(void* to, const void* from, u32 bytes, bool pred);
void copy_commit();
void copy_wait(u32 left);
void ldmatrix(u32* r, const void* row, u32 matrices, bool transposed);
enum Type { F16, BF16 };
u32 movmatrix(u32 a);
void mma_16816(float* d, const u32* a, const u32* b, Type type);
void mma_16832_s8(int* d, const u32* a, const u32* b);
void mma_16832_e4m3(float* d, const u32* a, const u32* b);
u64 wgmma_desc(const void* p);
// d [64, n] (+)= a b^T; a from shared memory, or from each thread's registers where `a` is not null.
void wgmma(float* d, u32 n, const u32* a, u64 da, u64 db, Type type, bool add);
void wgmma_commit();
void wgmma_wait(u32 left);
void fence();
u32 atomic(int op, u32* p, u32 value, u32 compare);
enum { ATOMIC_ADD, ATOMIC_MAX, ATOMIC_MIN, ATOMIC_OR, ATOMIC_AND, ATOMIC_EXCH, ATOMIC_CAS, ATOMIC_MAX_S, ATOMIC_MIN_S };

static inline float half_to_float(u16 h) {
#ifdef __F16C__
  _Float16 v;
  memcpy(&v, &h, 2);
  return (float)v;
#else
  u32 sign = (u32)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023, b;
  if (e == 31) {
    b = sign | 0x7f800000 | m << 13;
  } else if (e) {
    b = sign | (e + 112) << 23 | m << 13;
  } else {
    float f = (float)m * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&b, &f, 4);
    b |= sign;
  }
  float f;
  memcpy(&f, &b, 4);
  return f;
#endif
}
static inline u16 float_to_half(float f) {
#ifdef __F16C__
  _Float16 v = (_Float16)f;
  u16 h;
  memcpy(&h, &v, 2);
  return h;
#else
  u32 b;
  memcpy(&b, &f, 4);
  u32 sign = b >> 16 & 0x8000, a = b & 0x7fffffff;
  if (a > 0x7f800000) return 0x7fff;
  if (a >= 0x477ff000) return (u16)(sign | 0x7c00);
  if (a < 0x38800000) {
    float g;
    memcpy(&g, &a, 4);
    return (u16)(sign | (u16)lrintf(g * 16777216.f));
  }
  u32 r = a + 0xfff + (a >> 13 & 1);
  return (u16)(sign | (u16)((r - 0x38000000) >> 13));
#endif
}
static inline u16 float_to_bf16(float f) {
  u32 b;
  memcpy(&b, &f, 4);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
static inline float bf16_to_float(u16 h) {
  u32 b = (u32)h << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
}  // namespace emu

#ifdef EMU_CHECKED
#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
#else
#define threadIdx (emu::here->thread)
#define blockIdx (emu::here->block)
#define blockDim (emu::here->block_dim)
#define gridDim (emu::here->grid_dim)
#endif
#define warpSize 32
#define SHARED_ARRAY(T, name, n) \
  static char name##_site;       \
  T* name = reinterpret_cast<T*>(emu::shared_array(&name##_site, (u32)(sizeof(T) * (n))))
#define SHARED_DYN(T, name) T* name = reinterpret_cast<T*>(emu::shared_dynamic())
#define SHARED_DYN_ALIGNED(T, name) SHARED_DYN(T, name)
// A barrier knows its line, so that threads waiting at different ones are told apart.
#define __syncthreads() emu::sync_block(__LINE__)
DEV void __syncwarp(u32 mask = 0xffffffffu) { emu::sync_warp(mask); }
DEV void __threadfence() { emu::fence(); }
DEV void __threadfence_block() {}

template <class T> static inline T emu_shuffle(emu::Shuffle kind, u32 mask, T v, int lane, int width) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  u32 bits;
  memcpy(&bits, &v, 4);
  bits = emu::shuffle(kind, mask, bits, lane, width);
  memcpy(&v, &bits, 4);
  return v;
}
template <class T> static inline T __shfl_sync(u32 m, T v, int lane, int w = 32) { return emu_shuffle(emu::INDEX, m, v, lane, w); }
template <class T> static inline T __shfl_xor_sync(u32 m, T v, int x, int w = 32) { return emu_shuffle(emu::XOR, m, v, x, w); }
template <class T> static inline T __shfl_down_sync(u32 m, T v, int by, int w = 32) { return emu_shuffle(emu::DOWN, m, v, by, w); }
template <class T> static inline T __shfl_up_sync(u32 m, T v, int by, int w = 32) { return emu_shuffle(emu::UP, m, v, by, w); }
DEV u32 __ballot_sync(u32 mask, int p) { return emu::ballot(mask, p != 0); }
DEV int __any_sync(u32 mask, int p) { return emu::ballot(mask, p != 0) != 0; }
DEV int __all_sync(u32 mask, int p) { return emu::ballot(mask, p == 0) == 0; }

// Atomics on integers only: sums of floats would depend on the order.
DEV u32 atomicAdd(u32* p, u32 v) { return emu::atomic(emu::ATOMIC_ADD, p, v, 0); }
DEV int atomicAdd(int* p, int v) { return (int)emu::atomic(emu::ATOMIC_ADD, (u32*)p, (u32)v, 0); }
DEV u32 atomicMax(u32* p, u32 v) { return emu::atomic(emu::ATOMIC_MAX, p, v, 0); }
DEV int atomicMax(int* p, int v) { return (int)emu::atomic(emu::ATOMIC_MAX_S, (u32*)p, (u32)v, 0); }
DEV u32 atomicMin(u32* p, u32 v) { return emu::atomic(emu::ATOMIC_MIN, p, v, 0); }
DEV int atomicMin(int* p, int v) { return (int)emu::atomic(emu::ATOMIC_MIN_S, (u32*)p, (u32)v, 0); }
DEV u32 atomicOr(u32* p, u32 v) { return emu::atomic(emu::ATOMIC_OR, p, v, 0); }
DEV u32 atomicAnd(u32* p, u32 v) { return emu::atomic(emu::ATOMIC_AND, p, v, 0); }
DEV u32 atomicExch(u32* p, u32 v) { return emu::atomic(emu::ATOMIC_EXCH, p, v, 0); }
DEV u32 atomicCAS(u32* p, u32 compare, u32 v) { return emu::atomic(emu::ATOMIC_CAS, p, v, compare); }

DEV u32 atomic_arrive(u32* p) {
  __threadfence();
  u32 old = atomicAdd(p, 1u);
  __threadfence();
  return old;
}

DEV float __uint_as_float(u32 b) { float f; memcpy(&f, &b, 4); return f; }
DEV float __int_as_float(int b) { float f; memcpy(&f, &b, 4); return f; }
DEV u32 __float_as_uint(float f) { u32 b; memcpy(&b, &f, 4); return b; }
DEV int __float_as_int(float f) { int b; memcpy(&b, &f, 4); return b; }
// Macros where a C library has, or may come to have, the name.
DEV float emu_rsqrt(float x) { return 1.0f / sqrtf(x); }
#define rsqrtf emu_rsqrt
#define __expf expf
#define __logf logf
DEV float __fdividef(float a, float b) { return a / b; }
DEV float __fdiv_rn(float a, float b) { return a / b; }
DEV float __fsqrt_rn(float a) { return sqrtf(a); }
DEV float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// build.rs turns contraction off, so that a product and a sum stay two roundings.
DEV float __fmul_rn(float a, float b) { return a * b; }
DEV float __fadd_rn(float a, float b) { return a + b; }
DEV float __fsub_rn(float a, float b) { return a - b; }
DEV int __float2int_rn(float v) { return (int)lrintf(v); }
DEV int __float2int_rz(float v) { return (int)v; }
DEV float __int2float_rn(int v) { return (float)v; }
DEV float __uint2float_rn(u32 v) { return (float)v; }
DEV int __popc(u32 v) { return __builtin_popcount(v); }
DEV int __clz(int v) { return v ? __builtin_clz((u32)v) : 32; }
DEV int __ffs(int v) { return __builtin_ffs(v); }
DEV u32 __byte_perm(u32 a, u32 b, u32 select) {
  u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)(both >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
DEV int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
  return c;
}
template <class T> static inline T __ldg(const T* p) { return *p; }
using std::max;
using std::min;

DEV float h2f(u16 h) { return emu::half_to_float(h); }
DEV u16 f2h(float f) { return emu::float_to_half(f); }
DEV float b2f(u16 h) { return emu::bf16_to_float(h); }
DEV u16 f2b(float f) { return emu::float_to_bf16(f); }
DEV u32 f2b_pair(float lo, float hi) { return (u32)f2b(lo) | (u32)f2b(hi) << 16; }
DEV float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
DEV u32 hfma2(u32 a, u32 b, u32 c) {  // an f32 fma then one rounding is exact enough for f16: 24 >= 2 * 11 + 2 bits
  u32 lo = f2h(fmaf(h2f((u16)a), h2f((u16)b), h2f((u16)c)));
  return lo | (u32)f2h(fmaf(h2f((u16)(a >> 16)), h2f((u16)(b >> 16)), h2f((u16)(c >> 16)))) << 16;
}
DEV u32 bfma2(u32 a, u32 b, u32 c) {  // as hfma2: 24 >= 2 * 8 + 2 bits
  u32 lo = f2b(fmaf(b2f((u16)a), b2f((u16)b), b2f((u16)c)));
  return lo | (u32)f2b(fmaf(b2f((u16)(a >> 16)), b2f((u16)(b >> 16)), b2f((u16)(c >> 16)))) << 16;
}
DEV u32 bf16_pair(float lo, float hi) { return f2b(lo) | (u32)f2b(hi) << 16; }
DEV void grid_wait() {}
DEV void grid_ready() {}
DEV u32 hsub2(u32 a, u32 b) {
  return (u32)f2h(h2f((u16)a) - h2f((u16)b)) | (u32)f2h(h2f((u16)(a >> 16)) - h2f((u16)(b >> 16))) << 16;
}
DEV void keep(u32&) {}
DEV void keep(float&) {}
template <int TABLE> static inline u32 lop3(u32 a, u32 b, u32 c) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (TABLE >> i & 1) r |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
  return r;
}

DEV u32 shared_u32(const void* p) { return emu::shared_offset(p); }
DEV void cp_async16(void* to, const void* from, bool pred) { emu::copy_async(to, from, 16, pred); }
DEV void cp_async8(void* to, const void* from, bool pred) { emu::copy_async(to, from, 8, pred); }
DEV void cp_async4(void* to, const void* from, bool pred) { emu::copy_async(to, from, 4, pred); }
DEV void cp_async_commit() { emu::copy_commit(); }
template <int N> static inline void cp_async_wait() { emu::copy_wait(N); }
DEV void ldmatrix_x4(u32 (&r)[4], const void* p) { emu::ldmatrix(r, p, 4, false); }
DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* p) { emu::ldmatrix(r, p, 4, true); }
DEV void ldmatrix_x2(u32 (&r)[2], const void* p) { emu::ldmatrix(r, p, 2, false); }
DEV void ldmatrix_x2_trans(u32 (&r)[2], const void* p) { emu::ldmatrix(r, p, 2, true); }
DEV u32 movmatrix_trans(u32 a) { return emu::movmatrix(a); }
DEV void mma_16816_f16(float (&d)[4], const u32 (&a)[4], const u32* b) { emu::mma_16816(d, a, b, emu::F16); }
DEV void mma_16816_bf16(float (&d)[4], const u32 (&a)[4], const u32* b) { emu::mma_16816(d, a, b, emu::BF16); }
DEV void mma_16832_s8(int (&d)[4], const u32 (&a)[4], const u32* b) { emu::mma_16832_s8(d, a, b); }
#define GPU_HAS_FP8 1
DEV void mma_16832_e4m3(float (&d)[4], const u32 (&a)[4], const u32* b) { emu::mma_16832_e4m3(d, a, b); }
#define GPU_HAS_WGMMA 1
DEV u64 wgmma_desc(const void* p) { return emu::wgmma_desc(p); }
DEV void wgmma_fence() {}
DEV void fence_async_proxy() {}
DEV void wgmma_m64n64k16_f16(float (&d)[32], u64 a, u64 b) { emu::wgmma(d, 64, nullptr, a, b, emu::F16, true); }
DEV void wgmma_m64n64k16_bf16(float (&d)[32], u64 a, u64 b) { emu::wgmma(d, 64, nullptr, a, b, emu::BF16, true); }
DEV void wgmma_m64n128k16_bf16(float (&d)[64], u64 a, u64 b, int add) { emu::wgmma(d, 128, nullptr, a, b, emu::BF16, add); }
DEV void wgmma_m64n128k16_f16(float (&d)[64], u64 a, u64 b, int add) { emu::wgmma(d, 128, nullptr, a, b, emu::F16, add); }
DEV void wgmma_m64n256k16_bf16(float (&d)[128], u64 a, u64 b, int add) { emu::wgmma(d, 256, nullptr, a, b, emu::BF16, add); }
DEV void wgmma_rs_m64n128k16_bf16(float (&d)[64], const u32 (&a)[4], u64 b, int add) {
  emu::wgmma(d, 128, a, 0, b, emu::BF16, add);
}
DEV void wgmma_rs_m64n256k16_bf16(float (&d)[128], const u32 (&a)[4], u64 b, int add) {
  emu::wgmma(d, 256, a, 0, b, emu::BF16, add);
}
DEV void wgmma_commit() { emu::wgmma_commit(); }
template <int N> static inline void wgmma_wait() { emu::wgmma_wait(N); }
