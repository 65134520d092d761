// The retrieval of a backend over rows as long as training's, in segments: how many picks differ from those of one
// whole pass and from those of double on the CPU, and how near the scores of these lie to the K-th.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "base/arena.h"
#include "cpu/backend.h"
#include "ops.h"

namespace gca {

// Rows of random numbers that bf16 holds exactly, so that every backend has the same ones.
struct RetrievalRows {
  int64_t B = 4, C = 260;
  int D = 768, K = 8;
  std::vector<float> r, landmarks;  // (B,C,D)
  RetrievalRows();

  size_t picked_by(int64_t b, int64_t c, int64_t k) const { return (b * C + c) * K + k; }
};

// What each chunk picks, (B,C,K), where chunks are read so many at a time.
template <class Device>
std::vector<int32_t> picks_in_segments(Device& device, const RetrievalRows& rows, int64_t segment) {
  using act = typename Device::act;
  const auto [B, C, D, K] = std::tuple(rows.B, rows.C, int64_t{rows.D}, int64_t{rows.K});
  Arena arena;
  act *r = nullptr, *landmarks = nullptr;  // (B,segment,D), (B,C,D)
  int32_t* pick = nullptr;                 // (B,segment+1,K)
  typename Device::stat* w = nullptr;      // the same
  const int64_t table = PickTable{segment, K}.size(B);
  arena.want(r, "r", B * segment * D);
  arena.want(landmarks, "landmarks", B * C * D);
  arena.want(pick, "picks", table);
  arena.want(w, "weights", table);
  arena.commit(device);
  const auto upload = [&](act* to, const std::vector<float>& from) {
    std::vector<act> values;
    for (const float x : from) values.push_back(static_cast<act>(x));
    device.upload(to, values.data(), static_cast<int64_t>(values.size() * sizeof(act)));
  };
  upload(landmarks, rows.landmarks);
  std::vector<int32_t> all(B * C * K);
  for (int64_t first = 0; first < C; first += segment) {
    const RetrievalShape s{B, std::min(segment, C - first), rows.D, rows.K, first, D, C * D};
    std::vector<float> queries;
    for (int64_t b = 0; b < B; b++) {
      const float* from = &rows.r[(b * C + first) * D];
      queries.insert(queries.end(), from, from + s.C * D);
    }
    upload(r, queries);
    device.no_pick(pick, w, B, s.C, s.K);
    device.chunk_retrieval_forward(pick, w, r, landmarks, s, {});
    std::vector<int32_t> piece(s.table().size(B));
    device.download(piece.data(), pick, static_cast<int64_t>(piece.size() * sizeof(int32_t)));
    for (int64_t b = 0; b < B; b++)
      std::copy_n(&piece[s.table().picked_by(b, 0, 0)], s.C * K, &all[rows.picked_by(b, first, 0)]);
  }
  arena.release(device);
  return all;
}

struct PickDifferences {
  int64_t picks = 0, differing = 0;
  // The largest distance of a differing pick's score to the K-th, over what rounding may make of the two: D additions
  // of products, each by eps of the sum of magnitudes at most. Infinite where all chunks had to be picked.
  double furthest = 0;
  bool good() const { return 1000 * differing <= picks && furthest <= 1; }
};
// Picks as sets: the order of equal scores changes nothing but the order of sums. exact: those of double; eps: of sums.
PickDifferences differences(const RetrievalRows& rows, const std::vector<int32_t>& found,
                            const std::vector<int32_t>& expected, const std::vector<int32_t>& exact, double eps);

struct PickCheck {
  int64_t segment;
  PickDifferences from_whole, from_double;
};
// Segments of 260 (all), 16, 3 and 1 chunks.
template <class Device>
std::vector<PickCheck> check_picks(Device& device) {
  const RetrievalRows rows;
  Cpu<double> cpu;
  const double eps = std::numeric_limits<typename Device::stat>::epsilon();
  const std::vector<int32_t> exact = picks_in_segments(cpu, rows, rows.C),
                             whole = picks_in_segments(device, rows, rows.C);
  std::vector<PickCheck> checks;
  for (const int64_t segment : {rows.C, int64_t{16}, int64_t{3}, int64_t{1}}) {
    const std::vector<int32_t> found = picks_in_segments(device, rows, segment);
    checks.push_back(
        {segment, differences(rows, found, whole, exact, eps), differences(rows, found, exact, exact, eps)});
  }
  return checks;
}

// Says a line for each; true if all are good.
bool report(const std::vector<PickCheck>& checks);

}  // namespace gca
