// What the tests of the CPU's ops share: inputs, directions of finite differences, pick tables.
#pragma once
#include "cpu/backend.h"
#include "dev/test/test.h"

namespace gca::test {

using Double = Cpu<double>;
inline constexpr double infinity = std::numeric_limits<double>::infinity();

inline Vec randoms(int64_t n, uint64_t seed, double deviation = 1, double mean = 0) {
  return random_values<double>(n, seed, deviation, mean);
}
inline Vec zeros(int64_t n) { return Vec(n, 0.0); }
inline double inner(const Vec& a, const Vec& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
  return sum;
}
// A random direction that moves only the columns begin .. end - 1 of rows that are `width` wide.
inline Vec direction_in(int64_t n, int64_t width, int64_t begin, int64_t end) {
  Vec direction = randoms(n, 99);
  for (int64_t i = 0; i < n; i++)
    if (i % width < begin || i % width >= end) direction[i] = 0;
  return direction;
}

// ---- pick tables --------------------------------------------------------------------------------------------------
struct Table {
  std::vector<int32_t> pick;  // (B,C+1,K)
  Vec w;
};
// A table as a row's C chunks make it: row c+1 holds up to K different chunks before c, in no order, weights in (0,1);
// holes of -1 at the end where the past is short, and one in the middle now and then.
inline Table random_table(int64_t B, int64_t C, int K, uint64_t seed) {
  Table table{std::vector<int32_t>(B * (C + 1) * K, -1), zeros(B * (C + 1) * K)};
  for (int64_t b = 0; b < B; b++)
    for (int64_t c = 1; c < C; c++) {
      std::vector<int32_t> past;
      for (int64_t m = 0; m < candidates(c); m++)
        past.insert(past.begin() + philox(seed, Draw::sample, static_cast<uint32_t>(b), static_cast<uint32_t>(c),
                                          static_cast<uint32_t>(m))
                                           .word[0] %
                                       (m + 1),
                    static_cast<int32_t>(m));
      for (int k = 0; k < K && k < c; k++) {
        const int64_t place = PickTable{C, K}.picked_by(b, c, k);
        const Philox draw = philox(seed, Draw::sample, static_cast<uint32_t>(place), 7);
        if (draw.word[0] % 8 == 0) continue;
        table.pick[place] = past[k];
        table.w[place] = uniform_open(draw.word[1]);
      }
    }
  return table;
}
struct Inverse {
  std::vector<int32_t> start, fetches;
};
template <class Device>
Inverse inverted(Device& cpu, const std::vector<int32_t>& pick, int64_t B, int64_t C, int K) {
  Inverse inverse{std::vector<int32_t>(B * (C + 1), -7), std::vector<int32_t>(B * C * K, -7)};
  cpu.invert_picks(inverse.start.data(), inverse.fetches.data(), pick.data(), B, C, K);
  return inverse;
}

// A memory of N chunks as the model makes it: random, the landmark rows zero.
template <class real>
std::vector<real> random_memory(Cpu<real>& cpu, int64_t N, int64_t S, int64_t D, uint64_t seed) {
  std::vector<real> kv = random_values<real>(N * S * 2 * D, seed);
  cpu.zero_landmarks(kv.data(), N, S, D);
  return kv;
}

}  // namespace gca::test
