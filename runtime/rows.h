// Where a training's rows come from: token shards, or needles hidden in a haystack, behind one interface.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/json.h"
#include "ranks/shards.h"
#include "runtime/settings.h"
#include "tokenizer/tokenizer.h"

namespace gca {

// What one step reads: B rows of C chunks of S slots, T = C*S.
struct StepRows {
  int64_t rows = 0, chunks = 0, slots = 0;  // B, C, T
  std::vector<int32_t> tokens, targets;     // (B,T); a negative target is none
  std::vector<float> weights;               // (B,T) of the loss; empty where all are 1
  int64_t targets_in_all = 0;               // N, which the loss is divided by
};

// What the maker of rows adds to a step's line on the terminal and in log.jsonl.
struct StepFigures {
  std::string words;
  Json fields = Json::object();
};

class RowMaker {
 public:
  virtual ~RowMaker() = default;

  // The rows of a step, from (seed, step) alone.
  virtual void make(StepRows& out, int64_t step) = 0;
  // Chunks of a row in the next step, C, and how many rows stand for `rows` of the first step's: longer ones are fewer.
  virtual int64_t chunks() const = 0;
  virtual int64_t rows(int64_t rows) const = 0;

  // After a step, where wants_losses() says so: the loss of each slot, (B,T), of this rank's own rows; add_up sums
  // numbers over ranks. True: from the next step on rows are longer, and the maker has said so.
  using AddUp = std::function<void(double* data, int64_t count)>;
  virtual bool wants_losses() const { return false; }
  virtual bool learn_from(const StepRows&, const std::vector<float>& /*losses*/, RowRange /*own*/,
                          const AddUp& /*add_up*/, int64_t /*step*/, StepFigures&) {
    return false;
  }

  // For the run's table: the name of the line, and what it says.
  virtual std::pair<const char*, std::string> description() const = 0;
  // What a checkpoint keeps, and back: an Error where the data are not the same as then.
  virtual void save(Json& state) const = 0;
  virtual void resume(const JsonField& state) = 0;
};

// The maker that the settings ask for. A UsageError where they do not fit each other. settings and tokenizer must
// outlive it.
std::unique_ptr<RowMaker> row_maker(const TrainSettings& settings, const Tokenizer& tokenizer);

}  // namespace gca
