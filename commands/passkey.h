// What the parts of the command passkey share: passkey.cpp reads trials, passkey_table.cpp prints what they came to.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "commands/shared.h"
#include "commands/trial_reader.h"
#include "runtime/needles.h"
#include "runtime/run.h"
#include "runtime/trials.h"

namespace gca {

// What the command line asks for.
struct PasskeyOptions {
  ModelSource source;
  TaskSettings task;
  Ablation ablation;
  std::vector<int64_t> lengths = {4096}, trials = {100};
  int64_t others = 4, chains = 2, asks = 1, show = 0, seed = 1;
  Reading reading;
  bool far_only = false;
  std::string out, save_memory, load_memory;
  bool one_memory() const { return !save_memory.empty() || !load_memory.empty(); }
};

// What all trials share.
struct Trials {
  const PasskeyOptions& options;
  const SavedRun& saved;
  const Haystack& haystack;
  const Task& task;
  const Selection selection;

  const Config& config() const { return saved.settings.config; }
  int64_t chunks(int64_t length) const { return length / config().chunk; }
  int64_t reach() const {
    return (config().lower + config().upper()) * config().reach.window;
  }  // slots, of stacked windows
  int64_t others() const { return options.task.two_hop() ? options.chains - 1 : options.others; }
  // Out of the windows' reach, then within, where that is wanted.
  std::vector<Place> places(int64_t C) const {
    const int64_t far = task.far_chunks(C, reach()), question_chunk = C - 2 - options.task.gap;
    if (options.far_only) return {{C, 0, far, false}};
    return {{C, 0, far, false}, {C, far, question_chunk, true}};
  }
  int64_t fewest_places() const { return options.task.two_hop() ? 2 : 1; }  // chunks that hold a question's needles
  TaskRow row(int64_t number, int64_t C, bool near) const {
    return task.trial(static_cast<uint64_t>(options.seed), number, C, others(), reach(), near);
  }
};

// Reads haystacks of equal length, numbers first_number and up; at: see TrialReader.
using Reader =
    std::function<Answers(const Haystacks& haystacks, int64_t first_number, const std::function<void(int64_t)>& at)>;

void print_heading(const Trials& trials);
// A row of the table; returns its line of JSON.
Json print_row(const Trials& trials, const Place& place, const Score& score, const ReaderBytes& memory);
// Trials of the first length in words.
void show_trials(const Trials& trials, const Reader& read);

}  // namespace gca
