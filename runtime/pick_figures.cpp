// Figures of a row's picks.
#include "runtime/pick_figures.h"

#include <algorithm>

namespace gca {

PickFigures pick_figures(std::span<const double> r, std::span<const double> landmarks, std::span<const int32_t> pick,
                         std::span<const double> w, int64_t C, int64_t K) {
  const int64_t D = std::ssize(r) / C;
  PickFigures figures;
  std::vector<int64_t> fetched(C);  // how often
  int64_t chunks = 0;
  for (int64_t c = 0; c < C; c++) {
    const int64_t past = candidates(c), at = PickTable{C, K}.picked_by(0, c);
    if (past <= K) continue;
    chunks++;
    double sum = 0, squares = 0;
    for (int64_t m = 0; m < past; m++) {
      double score = 0;
      for (int64_t j = 0; j < D; j++) score += r[c * D + j] * landmarks[m * D + j];
      score /= std::sqrt(static_cast<double>(D));
      sum += score;
      squares += score * score;
    }
    const double N = static_cast<double>(past), mean = sum / N;
    figures.score_spread += std::sqrt(std::max(0.0, squares / N - mean * mean));
    figures.largest_weight += *std::max_element(w.begin() + at, w.begin() + at + K);
    for (int64_t k = 0; k < K; k++) {
      figures.newest += pick[at + k] >= past - K;
      fetched[pick[at + k]]++;
    }
  }
  if (!chunks) return {};
  const double count = static_cast<double>(chunks), picks = count * static_cast<double>(K);
  return {figures.score_spread / count, figures.largest_weight / count, figures.newest / picks,
          static_cast<double>(*std::max_element(fetched.begin(), fetched.end())) / picks};
}

}  // namespace gca
