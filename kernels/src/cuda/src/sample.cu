#include "gpu.h"
// The next token of each row of logits, drawn where the logits are (kernels/src/draw.rs says how and is the reference).
//
// draw_tokens: temperature, top-k, top-p, min-p, then an exponential race whose noise is a hash of the row's key and the
// token. What top-k and top-p keep is a head of the tokens in order of falling logit, equal ones by their number: a
// threshold, found bit by bit, each bit one pass that counts tokens or adds their weights.
// shapes    logits [rows, vocab] f32; draws [rows, 6] u32: temperature, top-k (0: all), top-p, min-p (bits of floats where
//           these are floats), the key's low and high half; chosen [rows] u32.
// launch    a block of 256 threads a row.
// accuracy  weights e^((l - max) / t) in f32, added in f32 sixteen at a time and from there in f64. A draw differs from the
//           reference's where two arrivals, or a sum and top-p, are equal to rounding. NaN is never drawn.
// limit     up to 32 passes over a row for each of top-k and top-p, from L2; one without them.

enum { SA_THREADS = 256 };

// Larger for larger floats, 0 for NaN.
DEV u32 sa_order(float v) {
  const u32 b = __float_as_uint(v);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0u;
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}

// The sum of f(i) over all tokens, known to every thread.
template <class F> DEV double sa_sum(double* sums, int vocab, F f) {
  const int tid = threadIdx.x;
  double sum = 0.0;
  for (int i0 = tid; i0 < vocab; i0 += 16 * SA_THREADS) {
    float part = 0.0f;
    for (int i = i0; i < min(vocab, i0 + 16 * SA_THREADS); i += SA_THREADS) part += f(i);
    sum += (double)part;
  }
  __syncthreads();  // the last sum has been read by all
  sums[tid] = sum;
  for (int o = SA_THREADS / 2; o; o >>= 1) {
    __syncthreads();
    if (tid < o) sums[tid] += sums[tid + o];
  }
  __syncthreads();
  return sums[0];
}

// SplitMix64's finalizer.
DEV u64 sa_mix(u64 x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The first `wanted` of the tokens whose order is `at`, by number: the largest number among them.
template <class F> DEV u32 sa_last_tie(double* sums, int vocab, double wanted, F tie) {
  u32 last = 0;
  for (u32 bit = 1u << 30; bit; bit >>= 1) {
    const u32 tried = last | bit;
    if (tried >= (u32)vocab) continue;  // the same for every thread
    const double before = sa_sum(sums, vocab, [&](int i) { return (u32)i < tried && tie(i) ? 1.0f : 0.0f; });
    if (before < wanted) last = tried;
  }
  return last;
}

KERNEL BOUNDS(256, 4) draw_tokens(const float* __restrict__ logits, const u32* __restrict__ draws,
                                  u32* __restrict__ chosen, int vocab) {
  SHARED_ARRAY(float, values, SA_THREADS);
  SHARED_ARRAY(u32, places, SA_THREADS);
  SHARED_ARRAY(double, sums, SA_THREADS);
  const int tid = threadIdx.x;
  const float* row = logits + (size_t)blockIdx.x * vocab;
  const u32* d = draws + (size_t)blockIdx.x * 6;
  const float temperature = __uint_as_float(d[0]), top_p = __uint_as_float(d[2]), min_p = __uint_as_float(d[3]);
  const u32 top_k = d[1];
  const u64 key = (u64)d[5] << 32 | d[4];
  const u32 first = score_top(row, vocab, values, places);
  const float most = row[first];
  if (!(temperature > 0.0f) || (__float_as_uint(most) & 0x7f800000u) == 0x7f800000u) {
    if (tid == 0) chosen[blockIdx.x] = first;
    return;
  }
  auto weight = [&](int i) { return expf(__fdiv_rn(__fsub_rn(row[i], most), temperature)); };

  // Kept: order above `least`, or equal to it and a number up to `tied`.
  u32 least = 1, tied = 0xffffffffu;
  auto keeps = [&](int i) {
    const u32 order = sa_order(row[i]);
    return order > least || (order == least && (u32)i <= tied);
  };
  if (top_k > 0 && top_k < (u32)vocab) {
    u32 found = 0;
    for (u32 bit = 0x80000000u; bit; bit >>= 1) {
      const u32 tried = found | bit;
      const double count = sa_sum(sums, vocab, [&](int i) { return sa_order(row[i]) >= tried ? 1.0f : 0.0f; });
      if (count >= (double)top_k) found = tried;
    }
    if (found > 0) {  // else some of the k are NaN: all others are kept
      const double above = sa_sum(sums, vocab, [&](int i) { return sa_order(row[i]) > found ? 1.0f : 0.0f; });
      const double ties = sa_sum(sums, vocab, [&](int i) { return sa_order(row[i]) == found ? 1.0f : 0.0f; });
      if (above + ties > (double)top_k)
        tied = sa_last_tie(sums, vocab, (double)top_k - above, [&](int i) { return sa_order(row[i]) == found; });
      least = found;
    }
  }
  if (top_p < 1.0f) {
    const double total = sa_sum(sums, vocab, [&](int i) { return keeps(i) ? weight(i) : 0.0f; });
    const double wanted = (double)top_p * total;
    u32 found = least;
    for (u32 bit = 0x80000000u, tried = 0; bit; bit >>= 1) {
      const double mass = sa_sum(sums, vocab, [&](int i) {
        return keeps(i) && sa_order(row[i]) >= (tried | bit) ? weight(i) : 0.0f;
      });
      if (mass >= wanted) tried |= bit;
      found = max(found, tried);
    }
    const double above = sa_sum(sums, vocab, [&](int i) { return sa_order(row[i]) > found ? weight(i) : 0.0f; });
    const double ties = sa_sum(sums, vocab, [&](int i) { return keeps(i) && sa_order(row[i]) == found ? 1.0f : 0.0f; });
    const double one = sa_sum(sums, vocab, [&](int i) { return keeps(i) && sa_order(row[i]) == found ? weight(i) : 0.0f; });
    if (ties > 1.0) {
      const double needed = ceil((wanted - above) / (one / ties));
      if (needed < ties)
        tied = sa_last_tie(sums, vocab, needed > 1.0 ? needed : 1.0, [&](int i) { return sa_order(row[i]) == found; });
      else if (found > least) tied = 0xffffffffu;
    } else if (found > least) {
      tied = 0xffffffffu;
    }
    least = found;
  }

  float time = INFINITY;
  u32 winner = first;
  for (int i = tid; i < vocab; i += SA_THREADS) {
    if (!keeps(i)) continue;
    const float w = weight(i);
    if (!(w > 0.0f) || w < min_p) continue;
    const float u = __fdiv_rn((float)(u32)(sa_mix(key ^ (u64)i) >> 41) + 0.5f, 8388608.0f);
    const float arrival = __fdiv_rn(-logf(u), w);
    if (arrival < time) time = arrival, winner = i;
  }
  __syncthreads();  // score_top's results have been read by all
  values[tid] = time;
  places[tid] = winner;
  for (int o = SA_THREADS / 2; o; o >>= 1) {
    __syncthreads();
    if (tid < o) {
      const float t = values[tid + o];
      if (t < values[tid] || (t == values[tid] && places[tid + o] < places[tid])) {
        values[tid] = t;
        places[tid] = places[tid + o];
      }
    }
  }
  if (tid == 0) chosen[blockIdx.x] = places[0];
}
