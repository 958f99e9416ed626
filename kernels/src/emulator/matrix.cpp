// matrix.cpp: ldmatrix, mma.sync and wgmma, with the PTX manual's fragment layouts. Sums of products run along k in
// f32; the hardware's own order and rounding differ within the same error bound.
#include "runtime.h"

namespace emu {
typedef float v8 __attribute__((vector_size(32)));

struct Rows {
  u32* r;
  const u8* row;
};
struct RowsKind {
  u32 matrices;
  bool transposed;
};
void ldmatrix(u32* r, const void* row, u32 matrices, bool transposed) {
  Rows mine = {r, static_cast<const u8*>(row)};
  RowsKind common = {matrices, transposed};
  bool used = fiber->lane < matrices * 8;
  if (used && (uintptr_t)row & 15) fail("ldmatrix: a row address is not aligned to 16 bytes");
  if (used && shared_offset(row) >= SHARED_LIMIT) fail("ldmatrix: a row address is not in shared memory");
  warp_meet(0xffffffffu, &mine, [](void** args, const void* common) {
    const RowsKind& k = *static_cast<const RowsKind*>(common);
    Fiber* first = &block->fibers[fiber->warp * 32];
    for (u32 m = 0; m < k.matrices; m++) {
      u16 tile[8][8];
      for (u32 i = 0; i < 8; i++) {
        const u8* p = static_cast<Rows*>(args[m * 8 + i])->row;
        // Every lane gets a part of every row: on behalf of the lane that names it and of another.
        touch_as(first[m * 8 + i], p, 16, READ);
        touch_as(first[(m * 8 + i + 1) & 31], p, 16, READ);
        memcpy(tile[i], p, 16);
      }
      for (u32 l = 0; l < 32; l++) {
        u32 g = l >> 2, t = (l & 3) * 2;
        static_cast<Rows*>(args[l])->r[m] =
            k.transposed ? tile[t][g] | (u32)tile[t + 1][g] << 16 : tile[g][t] | (u32)tile[g][t + 1] << 16;
      }
    }
  }, &common);
}

u32 movmatrix(u32 a) {
  u32 value = a;
  warp_meet(0xffffffffu, &value, [](void** args, const void*) {
    u16 m[8][8];
    for (u32 l = 0; l < 32; l++) memcpy(&m[l >> 2][(l & 3) * 2], args[l], 4);
    for (u32 l = 0; l < 32; l++) {
      u32 g = l >> 2, t = (l & 3) * 2;
      *static_cast<u32*>(args[l]) = m[t][g] | (u32)m[t + 1][g] << 16;
    }
  }, nullptr);
  return value;
}

static inline float widen(u16 h, Type type) { return type == BF16 ? bf16_to_float(h) : half_to_float(h); }

struct Fragments {
  void* d;
  const u32 *a, *b;
};
// C += A B, each sum along k.
template <u32 K>
static void add_product(const float (&A)[16][K], const float (&B)[K][8], float (&C)[16][8]) {
  for (u32 row = 0; row < 16; row++) {
    v8 sum, b;
    memcpy(&sum, C[row], 32);
    for (u32 k = 0; k < K; k++) {
      memcpy(&b, B[k], 32);
      sum += A[row][k] * b;
    }
    memcpy(C[row], &sum, 32);
  }
}
void mma_16816(float* d, const u32* a, const u32* b, Type type) {
  Fragments mine = {d, a, b};
  WarpOp op = [](void** args, const void* common) {
    Type type = *static_cast<const Type*>(common);
    alignas(64) float A[16][16], B[16][8], C[16][8];
    for (u32 l = 0; l < 32; l++) {
      const Fragments& m = *static_cast<Fragments*>(args[l]);
      u32 g = l >> 2, t = (l & 3) * 2;
      const float* d = static_cast<const float*>(m.d);
      for (u32 i = 0; i < 4; i++) {
        u32 row = g + (i & 1) * 8, column = t + (i >> 1) * 8;
        A[row][column] = widen((u16)m.a[i], type);
        A[row][column + 1] = widen((u16)(m.a[i] >> 16), type);
      }
      for (u32 i = 0; i < 2; i++) {
        B[t + i * 8][g] = widen((u16)m.b[i], type);
        B[t + i * 8 + 1][g] = widen((u16)(m.b[i] >> 16), type);
      }
      C[g][t] = d[0];
      C[g][t + 1] = d[1];
      C[g + 8][t] = d[2];
      C[g + 8][t + 1] = d[3];
    }
    add_product(A, B, C);
    for (u32 l = 0; l < 32; l++) {
      u32 g = l >> 2, t = (l & 3) * 2;
      float* d = static_cast<float*>(static_cast<Fragments*>(args[l])->d);
      d[0] = C[g][t];
      d[1] = C[g][t + 1];
      d[2] = C[g + 8][t];
      d[3] = C[g + 8][t + 1];
    }
  };
  warp_meet(0xffffffffu, &mine, op, &type);
}

void mma_16832_s8(int* d, const u32* a, const u32* b) {
  Fragments mine = {d, a, b};
  warp_meet(0xffffffffu, &mine, [](void** args, const void*) {
    int8_t A[16][32], B[8][32];
    for (u32 l = 0; l < 32; l++) {
      const Fragments& m = *static_cast<Fragments*>(args[l]);
      u32 g = l >> 2, t = (l & 3) * 4;
      for (u32 i = 0; i < 4; i++) memcpy(&A[g + (i & 1) * 8][t + (i >> 1) * 16], &m.a[i], 4);
      for (u32 i = 0; i < 2; i++) memcpy(&B[g][t + i * 16], &m.b[i], 4);
    }
    for (u32 l = 0; l < 32; l++) {
      u32 g = l >> 2, t = (l & 3) * 2;
      int* d = static_cast<int*>(static_cast<Fragments*>(args[l])->d);
      for (u32 i = 0; i < 4; i++)
        for (u32 k = 0; k < 32; k++) d[i] += A[g + (i >> 1) * 8][k] * B[t + (i & 1)][k];
    }
  }, nullptr);
}

// E4M3: a sign, four bits of exponent (bias 7), three of mantissa; no infinity, 0x7f is NaN.
static float e4m3(u8 code) {
  u32 magnitude = code & 0x7f;
  float v = magnitude == 0x7f ? NAN : magnitude < 8 ? magnitude / 512.f : ldexpf(8 + (magnitude & 7), (int)(magnitude >> 3) - 10);
  return code & 0x80 ? -v : v;
}
void mma_16832_e4m3(float* d, const u32* a, const u32* b) {
  Fragments mine = {d, a, b};
  warp_meet(0xffffffffu, &mine, [](void** args, const void*) {
    alignas(64) float A[16][32], B[32][8], C[16][8];
    for (u32 l = 0; l < 32; l++) {
      const Fragments& m = *static_cast<Fragments*>(args[l]);
      u32 g = l >> 2, t = l & 3;
      for (u32 j = 0; j < 4; j++) {
        for (u32 i = 0; i < 4; i++) A[g + (i & 1) * 8][t * 4 + j + (i >> 1) * 16] = e4m3((u8)(m.a[i] >> 8 * j));
        for (u32 i = 0; i < 2; i++) B[t * 4 + j + i * 16][g] = e4m3((u8)(m.b[i] >> 8 * j));
      }
      for (u32 i = 0; i < 4; i++) C[g + (i >> 1) * 8][t * 2 + (i & 1)] = static_cast<const float*>(m.d)[i];
    }
    add_product(A, B, C);
    for (u32 l = 0; l < 32; l++) {
      u32 g = l >> 2, t = (l & 3) * 2;
      float* d = static_cast<float*>(static_cast<Fragments*>(args[l])->d);
      for (u32 i = 0; i < 4; i++) d[i] = C[g + (i >> 1) * 8][t + (i & 1)];
    }
  }, nullptr);
}

// ---- wgmma: carried out at the wait, so that a missing wait, or an operand overwritten too early, shows in the result.
u64 wgmma_desc(const void* p) {
  u32 at = shared_offset(p);
  if (at >= SHARED_LIMIT || at & 15) fail("wgmma: a descriptor address is not in shared memory or not aligned");
  return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Element (row, k) of a K-major tile: rows of 128 bytes, groups of 8 rows apart by the descriptor's stride.
static const u8* element(u64 desc, u32 row, u32 k) {
  u32 start = (u32)(desc & 0x3fff) << 4, stride = (u32)(desc >> 32 & 0x3fff) << 4;
  u32 at = start + (row & 7) * 128 + (row >> 3) * stride + k * 2;
  if (desc >> 62 == 1) at ^= (at >> 7 & 7) << 4;
  if (at + 2 > SHARED_LIMIT) fail("wgmma: a tile reaches past shared memory");
  return block->shared + at;
}
void wgmma(float* d, u32 n, const u32* a, u64 da, u64 db, Type type, bool add) {
  Product mine = {};
  mine.d[0] = d;
  mine.registers[0] = a;
  mine.a = da;
  mine.b = db;
  mine.n = n;
  mine.type = type;
  mine.add = add;
  group_meet(&mine, [](Group& group, void** args, u32) {
    Product p = *static_cast<Product*>(args[0]);
    for (u32 i = 0; i < 128; i++) {
      const Product& x = *static_cast<Product*>(args[i]);
      bool same = x.a == p.a && x.b == p.b && x.type == p.type && x.n == p.n && x.add == p.add;
      if (!same || !x.registers[0] != !p.registers[0]) fail("wgmma: operands differ within the warpgroup");
    }
    for (u32 i = 0; i < 128; i++) {
      p.d[i] = static_cast<Product*>(args[i])->d[0];
      p.registers[i] = static_cast<Product*>(args[i])->registers[0];
    }
    group.open.push_back(p);
  });
}
void wgmma_commit() {
  group_meet(nullptr, [](Group& group, void**, u32) {
    group.committed.push_back(std::move(group.open));
    group.open.clear();
  });
}
static void multiply(const Product& p) {
  alignas(64) static thread_local float A[64][16], B[16][256], C[64][256];
  auto from_shared = [&p](u64 desc, u32 row, u32 k) {
    const u8* at = element(desc, row, k);
    touch(at, 2, READ);
    u16 h;
    memcpy(&h, at, 2);
    return widen(h, p.type);
  };
  for (u32 k = 0; k < 16; k++) {
    for (u32 row = 0; row < 64; row++) {
      if (!p.registers[0]) A[row][k] = from_shared(p.a, row, k);
      // As mma.m16n8k16 has it: a[0], a[1] hold columns 0 to 7 of rows g and g + 8, a[2], a[3] columns 8 to 15.
      u32 thread = row / 16 * 32 + (row & 7) * 4 + (k & 7) / 2;
      if (p.registers[0]) A[row][k] = widen((u16)(p.registers[thread][(row >> 3 & 1) + (k >> 3) * 2] >> (k & 1) * 16), p.type);
    }
    for (u32 column = 0; column < p.n; column++) B[k][column] = from_shared(p.b, column, k);
  }
  for (u32 row = 0; row < 64; row++)
    for (u32 at = 0; at < p.n; at += 8) {
      v8 sum = {}, b;
      for (u32 k = 0; k < 16; k++) {
        memcpy(&b, &B[k][at], 32);
        sum += A[row][k] * b;
      }
      memcpy(&C[row][at], &sum, 32);
    }
  for (u32 t = 0; t < 128; t++)
    for (u32 e = 0; e < p.n / 2; e++) {
      float v = C[t / 32 * 16 + (t % 32) / 4 + (e >> 1 & 1) * 8][(e >> 2) * 8 + t % 4 * 2 + (e & 1)];
      p.d[t][e] = p.add ? p.d[t][e] + v : v;
    }
}
void wgmma_wait(u32 left) {
  group_meet(&left, [](Group& group, void** args, u32) {
    u32 left = *static_cast<u32*>(args[0]);
    size_t done = group.committed.size() > left ? group.committed.size() - left : 0;
    for (size_t i = 0; i < done; i++)
      for (const Product& p : group.committed[i]) multiply(p);
    group.committed.erase(group.committed.begin(), group.committed.begin() + done);
  });
}
}  // namespace emu
