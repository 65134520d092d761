// The rows whose picks are checked, and how picks are compared.
#include "commands/pick_check.h"

#include "common.h"

namespace gca {
namespace {

// About normal.
std::vector<float> random_numbers(int64_t n, uint64_t seed) {
  std::vector<float> numbers;
  for (int64_t i = 0; i < n; i++) {
    const Philox draw = philox(seed, Draw::sample, static_cast<uint32_t>(i));
    float sum = -2;
    for (const uint32_t word : draw.word) sum += static_cast<float>(uniform_open(word));
    numbers.push_back(round_bf16(sum));
  }
  return numbers;
}

// r_c . L_m, without the common factor 1/sqrt(D).
struct ExactScore {
  double sum = 0, magnitudes = 0;
};
ExactScore score(const RetrievalRows& rows, int64_t b, int64_t c, int64_t m) {
  ExactScore score;
  for (int64_t j = 0; j < rows.D; j++) {
    const double product =
        static_cast<double>(rows.r[(b * rows.C + c) * rows.D + j]) * rows.landmarks[(b * rows.C + m) * rows.D + j];
    score.sum += product;
    score.magnitudes += std::fabs(product);
  }
  return score;
}

}  // namespace

RetrievalRows::RetrievalRows() : r(random_numbers(B * C * D, 1)), landmarks(random_numbers(B * C * D, 2)) {}

PickDifferences differences(const RetrievalRows& rows, const std::vector<int32_t>& found,
                            const std::vector<int32_t>& expected, const std::vector<int32_t>& exact, double eps) {
  PickDifferences result;
  for (int64_t b = 0; b < rows.B; b++)
    for (int64_t c = 0; c < rows.C; c++) {
      const size_t first = rows.picked_by(b, c, 0);
      const auto chosen = [&](const std::vector<int32_t>& picks) {
        return std::vector(picks.begin() + first, picks.begin() + first + rows.K);
      };
      // The largest distance of those in `these` that are not among `those`; counts them.
      const auto only_in = [&](const std::vector<int32_t>& these, const std::vector<int32_t>& those) {
        int64_t count = 0;
        for (const int32_t m : these) {
          if (std::find(those.begin(), those.end(), m) != those.end()) continue;
          count++;
          const int32_t last = exact[first + rows.K - 1];  // the K-th
          if (m < 0 || m >= candidates(c) || last < 0) {
            result.furthest = INFINITY;
            continue;
          }
          const ExactScore ours = score(rows, b, c, m), kth = score(rows, b, c, last);
          result.furthest = std::max(result.furthest, std::fabs(ours.sum - kth.sum) /
                                                          ((rows.D + 1) * eps * (ours.magnitudes + kth.magnitudes)));
        }
        return count;
      };
      const std::vector<int32_t> here = chosen(found), there = chosen(expected);
      result.picks += std::min<int64_t>(rows.K, candidates(c));
      result.differing += std::max(only_in(here, there), only_in(there, here));
    }
  return result;
}

bool report(const std::vector<PickCheck>& checks) {
  const RetrievalRows sizes;
  bool good = true;
  print("retrieval: ", sizes.B, " rows of ", sizes.C, " chunks, D=", sizes.D, ", K=", sizes.K,
        "; picks that differ, and the furthest score from the K-th, in what rounding may make of it\n");
  for (const PickCheck& check : checks) {
    const auto said = [](const PickDifferences& d) {
      return str(d.differing, " of ", d.picks, " (", fixed(d.furthest, 4), ")");
    };
    const bool here = check.from_whole.good() && check.from_double.good();
    good = good && here;
    print("  ", left(check.segment == sizes.C ? "one whole pass" : str("segments of ", check.segment), 16),
          " from one whole pass ", left(said(check.from_whole), 20), " from double ", left(said(check.from_double), 20),
          here ? "" : " PAST 1 IN 1,000, OR BEYOND ROUNDING", "\n");
  }
  return good;
}

}  // namespace gca
