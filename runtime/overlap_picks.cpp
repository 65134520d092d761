#include "runtime/overlap_picks.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>

namespace gca {

std::vector<int32_t> overlap_picks(std::span<const int32_t> tokens, int64_t S, int64_t K, int64_t distance,
                                   bool hindsight) {
  const int64_t C = std::ssize(tokens) / S;
  const auto words_of = [&](int64_t chunk) {  // each once, in order
    std::vector<int32_t> words(&tokens[chunk * S], &tokens[chunk * S] + S - 1);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    return words;
  };
  std::unordered_map<int32_t, std::vector<int32_t>> stands_in;  // the chunks 0 .. c that have a token, oldest first
  std::vector<int32_t> picks(C * K, -1), order;
  std::vector<double> overlap;
  for (int64_t c = 0; c < C; c++) {
    for (const int32_t word : words_of(c)) stands_in[word].push_back(static_cast<int32_t>(c));
    const int64_t past = std::max<int64_t>(0, c - distance + 1), count = std::min(K, past);
    overlap.assign(past, 0);
    for (const int32_t word : words_of(hindsight ? std::min(c + 1, C - 1) : c)) {
      const auto found = stands_in.find(word);
      if (found == stands_in.end()) continue;
      const double weight = std::log(static_cast<double>(c + 1) / static_cast<double>(found->second.size()));
      for (const int32_t chunk : found->second)
        if (chunk < past) overlap[chunk] += weight;
    }
    order.resize(past);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + count, order.end(),
                      [&](int32_t a, int32_t b) { return overlap[a] != overlap[b] ? overlap[a] > overlap[b] : a > b; });
    std::copy_n(order.begin(), count, &picks[c * K]);
  }
  return picks;
}

}  // namespace gca
