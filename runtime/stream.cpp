// The next token, drawn from logits.
#include "runtime/stream.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include "model.h"

namespace gca {

int32_t sample_token(const std::vector<float>& logits, double temperature, double top_p, uint64_t seed, int64_t index) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature <= 0) return static_cast<int32_t>(best - logits.begin());
  std::vector<std::pair<double, int32_t>> candidates;
  double sum = 0;
  for (size_t i = 0; i < logits.size(); i++) {
    const double p = std::exp((static_cast<double>(logits[i]) - static_cast<double>(*best)) / temperature);
    candidates.push_back({p, static_cast<int32_t>(i)});
    sum += p;
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  double kept = 0;
  size_t count = 0;
  while (count < candidates.size() && kept < top_p * sum) kept += candidates[count++].first;
  count = std::max<size_t>(count, 1);
  double at =
      uniform_open(
          philox(seed, Draw::sample, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)).word[0]) *
      kept;
  for (size_t i = 0; i < count; i++)
    if ((at -= candidates[i].first) < 0) return candidates[i].second;
  return candidates[count - 1].second;
}

}  // namespace gca
