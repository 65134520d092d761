// The page of inspect --html: what was read, and the file that a browser opens. Its HTML, style and script are in
// commands/inspect_page_text.h.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace gca {

// A text in chunks of S slots.
struct InspectedRow {
  std::string name;              // for people
  int64_t S, chunks;             // whole ones, which are read
  std::vector<int32_t> slots;    // (chunks*S) and what fills no chunk: a landmark closes each
  std::vector<int32_t> targets;  // of each slot the next token; negative: none
  int64_t T() const { return chunks * S; }
};

// A reading of it.
struct InspectedReading {
  std::string picks;        // how chunks were fetched; "" by a model that fetches none
  int64_t K;                // by a group, at most
  std::vector<float> loss;  // (chunks*S), nats
  std::vector<std::vector<std::pair<int32_t, float>>>
      fetched;  // a group: (chunks*K), by chunk c: pick (-1: none), weight
};

// What the page opens with.
struct InspectedLosses {
  std::vector<double> mean;  // of each reading, over all targets
  int64_t best = 0;  // the chunk that gains most by the first reading against the second; of one alone: that loses most
  double of_best = 0;  // the sum over its targets, nats
};
InspectedLosses losses_of(const InspectedRow& row, const std::vector<InspectedReading>& readings);

// An Error where the row is longer than a browser's page can hold.
void check_fits_page(const InspectedRow& row);

// An Error where save_inspect_page could not make that file, or would replace something else than such a page.
void check_can_save_page(const std::string& path);
// Writes the page, whole or not at all. The second reading, if there is one, is what the first is compared with.
void save_inspect_page(const std::string& path, const InspectedRow& row, const std::vector<InspectedReading>& readings,
                       const InspectedLosses& losses, const std::string& checkpoint, const Tokenizer& tokenizer);

}  // namespace gca
