// What a row's retrieval does while it is trained, for log.jsonl: whether its scores tell chunks apart, how much the
// best pick weighs, and what is fetched by habit.
#pragma once
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "base/json.h"
#include "model.h"
#include "ops.h"

namespace gca {

// Of the chunks of a row that may fetch more than K; 0 where there is none.
struct PickFigures {
  double score_spread = 0;    // standard deviation of a chunk's scores over its candidates, mean over chunks
  double largest_weight = 0;  // mean over chunks
  double newest = 0;          // share of picks that are among the newest K candidates
  double most_fetched = 0;    // share of all picks that the chunk fetched most often has
};

// r, landmarks (C,D); pick, w: (C+1,K), see PickTable.
PickFigures pick_figures(std::span<const double> r, std::span<const double> landmarks, std::span<const int32_t> pick,
                         std::span<const double> w, int64_t C, int64_t K);

// Of the first row of model's last forward() of whole rows, as fields of a step's line, a number a group.
template <class Device>
void add_pick_figures(Json& fields, DRT<Device>& model, int64_t C) {
  if (model.groups.empty()) return;
  const int64_t D = model.config.width, S = model.config.chunk, K = model.reach.topk;
  const auto download = [&](std::vector<double>& to, const auto* from, int64_t count) {
    std::vector<std::remove_cvref_t<decltype(*from)>> raw(count);
    model.device.download(raw.data(), from, count * static_cast<int64_t>(sizeof(raw[0])));
    to.insert(to.end(), raw.begin(), raw.end());
  };
  std::vector<double> landmarks;
  for (int64_t c = 0; c < C; c++) download(landmarks, model.enc_out + (c * S + S - 1) * D, D);
  for (const auto& group : model.groups) {
    std::vector<double> r, w;
    std::vector<int32_t> pick((C + 1) * K);
    download(r, group.r, C * D);
    download(w, group.w, (C + 1) * K);
    model.device.download(pick.data(), group.pick, std::ssize(pick) * static_cast<int64_t>(sizeof(pick[0])));
    const PickFigures figures = pick_figures(r, landmarks, pick, w, C, K);
    fields["score_spread"].push_back(figures.score_spread);
    fields["largest_weight"].push_back(figures.largest_weight);
    fields["picks_newest"].push_back(figures.newest);
    fields["picks_most_fetched"].push_back(figures.most_fetched);
  }
}

}  // namespace gca
