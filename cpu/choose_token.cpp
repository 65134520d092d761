#include "cpu/choose_token.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace gca {

int32_t choose_token(std::span<const float> logits, double temperature, double top_p, float random, int32_t excluded) {
  const auto counts = [&](int64_t i) { return i != excluded && !std::isnan(logits[i]); };
  int64_t best = -1;
  for (int64_t i = 0; i < std::ssize(logits); i++)
    if (counts(i) && (best < 0 || logits[i] > logits[best])) best = i;
  if (best < 0) return excluded == 0 ? 1 : 0;
  if (temperature <= 0) return static_cast<int32_t>(best);
  std::vector<std::pair<double, int32_t>> candidates;
  double sum = 0;
  for (int64_t i = 0; i < std::ssize(logits); i++) {
    if (!counts(i)) continue;
    // Equals of the largest by themselves: it may be infinite.
    const double below =
                     logits[i] == logits[best] ? 0 : static_cast<double>(logits[i]) - static_cast<double>(logits[best]),
                 p = std::exp(below / temperature);
    candidates.push_back({p, static_cast<int32_t>(i)});
    sum += p;
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  double kept = 0;
  size_t count = 0;
  while (count < candidates.size() && kept < top_p * sum) kept += candidates[count++].first;
  if (count == 0) kept = candidates[count++].first;
  double at = static_cast<double>(random) * kept;
  for (size_t i = 0; i < count; i++)
    if ((at -= candidates[i].first) < 0) return candidates[i].second;
  return candidates[count - 1].second;
}

}  // namespace gca
