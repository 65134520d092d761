// What a training says of itself: the table at its start, a line a step and a line a validation on the terminal, and
// the same in RUN/log.jsonl.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "ops.h"
#include "runtime/rows.h"
#include "runtime/settings.h"

namespace gca {

// One step as it is told: its number from 0, its figures, and what it took.
struct StepReport {
  int64_t step, slots;           // slots read
  double seconds, mean_seconds;  // of this step; of all since the start
  double peak_flops;             // of the device, for the share of it that was used
};

class RunLog {
 public:
  // settings must outlive it. Of several ranks the first one writes log.jsonl.
  RunLog(const TrainSettings& settings, bool writes) : s_(settings), writes_(writes) {}

  // The table's first lines: model, parameters, tokenizer. The trainer adds its own with line().
  void model(int64_t parameters, const Tokenizer& tokenizer) const;
  void line(const char* name, const std::string& value) const;
  void schedule(int64_t rows, int64_t rows_at_once, int64_t from_step) const;

  // Where a run goes on after that step: takes out of log.jsonl what a killed run had told of later ones, which are
  // made again, a line that was cut off, and steps that stand twice. The file is the old one or the new one at any
  // instant.
  void go_back_to(int64_t step);

  void step(const StepReport& report, const StepState& state, const StepFigures& more);
  void validation(int64_t step, double loss, int64_t rows);

 private:
  std::string path() const { return s_.out + "/log.jsonl"; }
  void append(Json line);
  void tell(const Error& error);

  const TrainSettings& s_;
  const bool writes_;
  bool told_ = false;  // that log.jsonl cannot be written
};

}  // namespace gca
