// Classes of targets by how far back their bigram last stood; means and their errors over rows.
#include "runtime/by_reach.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <utility>

#include "base/text.h"
#include "common.h"

namespace gca {

std::vector<int64_t> slots_back(std::span<const int32_t> tokens, std::span<const int32_t> targets) {
  std::vector<int64_t> back(tokens.size());
  std::unordered_map<uint64_t, int64_t> last;  // slot where a token had that target
  last.reserve(tokens.size());
  for (int64_t i = 0; i < std::ssize(tokens); i++) {
    if (targets[i] < 0) continue;
    const uint64_t bigram = static_cast<uint64_t>(static_cast<uint32_t>(tokens[i])) << 32 |
                            static_cast<uint64_t>(static_cast<uint32_t>(targets[i]));
    const auto [place, is_new] = last.try_emplace(bigram, i);
    if (!is_new) back[i] = i - std::exchange(place->second, i);
  }
  return back;
}

ReachClasses::ReachClasses(std::vector<int64_t> edges) : edges_(std::move(edges)) {
  const bool rising = std::adjacent_find(edges_.begin(), edges_.end(), std::greater_equal<>()) == edges_.end();
  if (edges_.empty() || !rising)
    throw UsageError(
        str("--reach-edges: expected one number of slots at least, each larger than the one before, found '",
            comma_list(edges_), "'"));
}

size_t ReachClasses::of(int64_t back) const {
  if (edges_.empty()) return all();
  if (back == 0) return never();
  return static_cast<size_t>(std::lower_bound(edges_.begin(), edges_.end(), back) - edges_.begin());
}

std::string ReachClasses::name(size_t i) const {
  if (i == all()) return "all";
  if (i == never()) return "never";
  return str(from(i), "..", i < edges_.size() ? str(to(i)) : "");
}

std::vector<int32_t> ScoredRows::add(std::span<const int32_t> row_tokens, std::span<const int32_t> row_targets,
                                     int64_t scored) {
  const std::vector<int64_t> back = slots_back(row_tokens, row_targets);
  targets.emplace_back(classes.count());
  std::vector<int32_t> found;
  for (int64_t i = std::ssize(back) - scored; i < std::ssize(back); i++) {
    const size_t of_target = classes.of(back[i]);
    found.push_back(row_targets[i] < 0 ? -1 : static_cast<int32_t>(of_target));
    if (row_targets[i] < 0) continue;
    targets.back()[classes.all()]++;
    if (of_target != classes.all()) targets.back()[of_target]++;
  }
  return found;
}

namespace {

// sum_of(r): D_r.
template <class Sum>
MeanOverRows mean_over_rows(const ScoredRows& rows, size_t i, Sum sum_of) {
  MeanOverRows result;
  double sum = 0, squares = 0;
  for (size_t r = 0; r < rows.targets.size(); r++) {
    result.targets += rows.targets[r][i];
    result.rows += rows.targets[r][i] > 0;
    sum += sum_of(r);
  }
  const double N = static_cast<double>(result.targets), R = static_cast<double>(result.rows);
  result.mean = sum / N;
  for (size_t r = 0; r < rows.targets.size(); r++)
    squares += std::pow(sum_of(r) - static_cast<double>(rows.targets[r][i]) * result.mean, 2);
  result.error = result.rows > 1 ? std::sqrt(R / (R - 1) * squares) / N : NAN;
  return result;
}

}  // namespace

MeanOverRows mean_loss(const ScoredRows& rows, const RunLosses& run, size_t i) {
  return mean_over_rows(rows, i, [&](size_t r) { return run.sum[r][i]; });
}

MeanOverRows mean_difference(const ScoredRows& rows, const RunLosses& run, const RunLosses& other, size_t i) {
  return mean_over_rows(rows, i, [&](size_t r) { return run.sum[r][i] - other.sum[r][i]; });
}

}  // namespace gca
