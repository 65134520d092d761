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
  static constexpr int places = 8;
  int64_t rows = 0, targets = 0;
  double sum = 0;                                           // of cross entropies, nats
  double bytes = 0;                                         // that the targets stand for
  double place_sum[places] = {}, place_count[places] = {};  // by eighths of the row
  uint32_t hash = 0;                                        // CRC-32C of all losses, in order
  double loss() const { return targets ? sum / static_cast<double>(targets) : 0; }
};

// Cross entropy over up to max_rows rows, evenly spread over the data, B rows of T slots at once, without noise. stop()
// ends it early.
template <class Device, class Stop>
Evaluation evaluate(DRT<Device>& model, const Rows& rows, int64_t max_rows, int64_t B, int64_t T,
                    const Selection& selection, Stop stop, const Tokenizer* tokenizer = nullptr) {
  const int64_t count = std::min(rows.count(), max_rows);
  std::vector<int32_t> tokens(B * T), targets(tokens.size());
  std::vector<typename DRT<Device>::stat> losses(tokens.size());
  Evaluation result;
  for (int64_t first = 0; first < count && !stop(); first += B) {
    const int64_t here = std::min(B, count - first);
    for (int64_t r = 0; r < here; r++)
      rows.fill_window((first + r) * rows.count() / count, &tokens[r * T], &targets[r * T]);
    model.upload(tokens.data(), targets.data(), nullptr, here * T);
    typename DRT<Device>::Input in{here, T, selection};
    in.selection.first_row = first;
    model.forward(in);
    model.head(0, false);
    model.device.download(losses.data(), model.loss, here * T * static_cast<int64_t>(sizeof(losses[0])));
    for (int64_t i = 0; i < here * T; i++) {
      const size_t at = i;
      if (targets[at] < 0) continue;
      const int64_t place = i % T * Evaluation::places / T;
      const double loss = static_cast<double>(losses[at]);
      result.hash = crc32c(&losses[at], sizeof losses[at], result.hash);
      result.sum += loss;
      result.targets++;
      result.place_sum[place] += loss;
      result.place_count[place]++;
      if (tokenizer) result.bytes += static_cast<double>(tokenizer->bytes_of(targets[at]).size());
    }
    result.rows += here;
  }
  return result;
}

}  // namespace gca
