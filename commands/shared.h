// What the commands share, less what needs a model: help, bytes on a terminal, where a model comes from, ablations. The
// choice of a backend, and a saved model on it, are in commands/device.h.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "base/flags.h"
#include "model.h"
#include "ops.h"

namespace gca {

// In a few words; in lines, as --version prints it.
std::string build_description();
std::string version_description();

// Prints the help where --help is among the arguments.
bool wants_help(const std::vector<std::string>& arguments, const Flags& flags);

// Bytes to standard output: as they are, but on a terminal without what could steer it.
void print_bytes(const std::string& bytes);

struct ModelSource {
  std::string checkpoint, device = "auto", precision = "float";
  int64_t threads = 0;
  bool fallback = false;
  void add_to(Flags& flags);
};

// How rows are read: slots at once, and where the memory of chunks lies.
struct Reading {
  int64_t batch_slots = 16384;  // enough to fill a GPU
  std::string memory = "auto";
  void add_to(Flags& flags);
};

// The nearest e such that chunk c - e does not lie wholly in the window of every slot that it would serve, and is in
// the past (candidates() in ops.h). The furthest of them, the last slot of chunk c+1, sees W slots back and itself.
int64_t distance_beyond_window(int64_t window, int64_t S);

// Which chunks are fetched in place of the best ones, and with what weights.
struct Ablation {
  std::string picks = "learned", weights = "scores";
  // by_words: of picks that are made of the row's tokens, too; the command gives them to the model (GivenPicks).
  void add_to(Flags& flags, bool by_words = false);
  // After flags were parsed. A UsageError where they contradict each other.
  void settle(Flags& flags);
  // A UsageError where that model retrieves nothing.
  void check(const Config& config) const;
  bool by_words() const { return picks == "lexical" || picks == "hindsight"; }
  bool replaces() const { return picks != "learned" || weights != "scores"; }
  Selection selection(const Config& config, int64_t seed) const;
  std::string name() const { return picks + (weights == "equal" ? ", equal weights" : ""); }
  // The end of a line that says what was measured; of the best chunks, weighed by their scores, nothing.
  std::string remark() const;

 private:
  bool no_retrieval_ = false, random_retrieval_ = false;  // short forms
};

}  // namespace gca
