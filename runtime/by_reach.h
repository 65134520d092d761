// Losses by how far back in its row a bigram last stood, and what runs over the same rows differ by.
#pragma once
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "base/files.h"

namespace gca {

// For each slot with a target: how many slots back the same token had the same target last; 0 where it never had, and
// where there is no target. Linear in the row's length.
std::vector<int64_t> slots_back(std::span<const int32_t> tokens, std::span<const int32_t> targets);

// The classes that targets fall into: their bigram last stood up to edges[0] slots back, from there up to edges[1] ...,
// beyond the last edge, never. Without edges there is none of them. The last class holds all targets.
class ReachClasses {
 public:
  ReachClasses() = default;
  // edges: one at least, rising; otherwise a UsageError that names the flag.
  explicit ReachClasses(std::vector<int64_t> edges);

  size_t count() const { return edges_.empty() ? 1 : edges_.size() + 3; }
  size_t all() const { return count() - 1; }
  size_t never() const { return edges_.size() + 1; }  // where there are edges
  // back: of slots_back().
  size_t of(int64_t back) const;
  // The least and the most slots back; 0: no bound, or of no such class.
  int64_t from(size_t i) const { return i > edges_.size() || i == all() ? 0 : i ? edges_[i - 1] + 1 : 1; }
  int64_t to(size_t i) const { return i < edges_.size() ? edges_[i] : 0; }
  std::string name(size_t i) const;

 private:
  std::vector<int64_t> edges_;
};

// The scored slots of some rows: the class of each one's target; targets by row and class.
struct ScoredRows {
  ReachClasses classes;
  std::vector<std::vector<int64_t>> targets = {};  // (rows, classes)

  // Adds a row's last `scored` slots; returns the class of each, -1 where there is no target.
  std::vector<int32_t> add(std::span<const int32_t> row_tokens, std::span<const int32_t> row_targets, int64_t scored);
};

// The losses of one run over them: sums by row and class.
struct RunLosses {
  std::vector<std::vector<double>> sum = {};  // (rows, classes)
  uint32_t hash = 0;                          // CRC-32C of all losses, row by row; as Evaluation has it

  // classes: of the row's scored slots, see ScoredRows; their losses.
  template <class stat>
  void add(const ReachClasses& of, std::span<const int32_t> classes, const stat* losses) {
    sum.emplace_back(of.count());
    for (size_t i = 0; i < classes.size(); i++) {
      if (classes[i] < 0) continue;
      const double loss = static_cast<double>(losses[i]);
      hash = crc32c(&losses[i], sizeof losses[i], hash);
      sum.back()[of.all()] += loss;
      if (static_cast<size_t>(classes[i]) != of.all()) sum.back()[classes[i]] += loss;
    }
  }
};

// The mean over all targets of a class, and its standard error (not a number with fewer than two rows that have some).
//
//     mean = sum_r D_r / N       D_r: sum over the n_r targets of row r;  N = sum_r n_r
//     error^2 = R / (R - 1) sum_r (D_r - n_r mean)^2 / N^2       R: rows with n_r > 0
//
// That is the mean of the rows' means D_r / n_r, each weighing n_r / N, and its error as that of a ratio of two sums
// over rows: the targets of a row are not independent of each other.
struct MeanOverRows {
  int64_t targets = 0, rows = 0;
  double mean = 0, error = 0;
};
// Of a run's losses; of those less another run's, target by target.
MeanOverRows mean_loss(const ScoredRows& rows, const RunLosses& run, size_t i);
MeanOverRows mean_difference(const ScoredRows& rows, const RunLosses& run, const RunLosses& other, size_t i);

}  // namespace gca
