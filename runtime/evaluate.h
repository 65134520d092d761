// The loss of a model on rows of shards.
#pragma once
#include <algorithm>
#include <vector>

#include "base/files.h"
#include "dataloader.h"
#include "model.h"
#include "tokenizer/tokenizer.h"

namespace gca {

struct Evaluation {
  int64_t rows = 0, targets = 0;
  double sum = 0;    // of cross entropies, nats
  double bytes = 0;  // that the targets stand for
  // By place in the row: the first chunk, then stretches that each end twice as far.
  std::vector<double> place_sum, place_count;
  uint32_t hash = 0;  // CRC-32C of all losses, row by row
  double loss() const { return targets ? sum / static_cast<double>(targets) : 0; }

  // Slots first .. of stretch i are S * 2^(i-1) .., of stretch 0: 0 ..
  static int64_t first_slot(int64_t S, size_t stretch) { return stretch ? S << (stretch - 1) : 0; }
  static size_t stretch_of(int64_t S, int64_t slot) {
    size_t stretch = 0;
    while (slot >= S << stretch) stretch++;
    return stretch;
  }

  // A target of chunks of S slots, and its loss.
  template <class stat>
  void add(int64_t S, int64_t slot, const stat& loss) {
    const size_t stretch = stretch_of(S, slot);
    hash = crc32c(&loss, sizeof loss, hash);
    sum += static_cast<double>(loss);
    targets++;
    if (place_sum.size() <= stretch) {
      place_sum.resize(stretch + 1);
      place_count.resize(stretch + 1);
    }
    place_sum[stretch] += static_cast<double>(loss);
    place_count[stretch]++;
  }
};

// losses (B,T) = those of B rows of T slots, from slot score_from on; the others stay as they are. read(after) runs the
// rows through the model without noise and calls after(first, count) whenever it holds what comes out of slots first ..
// first + count - 1 of each.
template <class Device, class Read>
void losses_of_rows(DRT<Device>& model, typename DRT<Device>::stat* losses, int64_t B, int64_t T, int64_t score_from,
                    Read read) {
  using stat = typename DRT<Device>::stat;
  std::vector<stat> piece;
  read([&](int64_t first, int64_t count) {
    if (first + count <= score_from) return;
    model.head(0, false);
    piece.resize(B * count);
    model.device.download(piece.data(), model.loss, B * count * static_cast<int64_t>(sizeof(stat)));
    for (int64_t r = 0; r < B; r++) std::copy_n(&piece[r * count], count, losses + (r * T + first));
  });
}

// Cross entropy over up to max_rows rows of T slots, evenly spread over the data, B at once. read(tokens, targets,
// first_row, after) runs B rows, (B,T), as losses_of_rows says. Slots before score_from are not scored. stop() ends it
// early. Of several ranks each takes its part of the rows.
template <class Device, class Read, class Stop>
Evaluation evaluate(DRT<Device>& model, const Rows& rows, int64_t max_rows, int64_t B, int64_t T, int64_t score_from,
                    Read read, Stop stop, const Tokenizer* tokenizer = nullptr) {
  const int64_t count = std::min(rows.count(), max_rows), S = model.config.chunk;
  const RowRange mine = rows_of_rank(count, model.shards.rank, model.shards.ranks);
  std::vector<int32_t> tokens(B * T), targets(tokens.size());
  std::vector<typename DRT<Device>::stat> losses(tokens.size());
  Evaluation result;
  for (int64_t first = mine.begin; first < mine.end && !stop(); first += B) {
    const int64_t here = std::min(B, mine.end - first);
    for (int64_t r = 0; r < B; r++)  // the last rows again where there are no more
      rows.fill_window((first + std::min(r, here - 1)) * rows.count() / count, &tokens[r * T], &targets[r * T]);
    losses_of_rows(model, losses.data(), B, T, score_from,
                   [&](const auto& after) { read(tokens.data(), targets.data(), first, after); });
    for (int64_t i = 0; i < here * T; i++) {
      const size_t at = i;
      if (targets[at] < 0 || i % T < score_from) continue;
      result.add(S, i % T, losses[at]);
      if (tokenizer) result.bytes += static_cast<double>(tokenizer->bytes_of(targets[at]).size());
    }
    result.rows += here;
  }
  return result;
}

}  // namespace gca
