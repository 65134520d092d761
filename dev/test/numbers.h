// Numbers from Philox, the same on every machine: what tests and dev/bench.cu give to ops.
#pragma once
#include <vector>

#include "common.h"

namespace gca::test {

using Vec = std::vector<double>;

// n numbers, uniform, of the given mean and standard deviation. Each is a float whatever real is, so that backends of
// any precision get the same ones.
template <class real>
std::vector<real> random_values(int64_t n, uint64_t seed, double deviation = 1, double mean = 0) {
  std::vector<real> values(n);
  for (size_t i = 0; i < values.size(); i++) {
    const double unit =
        2 * static_cast<double>(uniform_open(philox(seed, Draw::sample, static_cast<uint32_t>(i)).word[0])) - 1;
    values[i] = static_cast<real>(static_cast<float>(mean + deviation * std::sqrt(3.0) * unit));
  }
  return values;
}

// n numbers in [0, limit)
inline std::vector<int32_t> random_ids(int64_t n, uint64_t seed, int64_t limit) {
  std::vector<int32_t> ids(n);
  for (size_t i = 0; i < ids.size(); i++)
    ids[i] = static_cast<int32_t>(philox(seed, Draw::sample, static_cast<uint32_t>(i), 1).word[0] %
                                  static_cast<uint64_t>(limit));
  return ids;
}

}  // namespace gca::test
