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

std::string build_description();

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

// What the retriever is replaced by.
struct Ablation {
  bool no_retrieval = false, random_retrieval = false;
  void add_to(Flags& flags);
  Selection selection(int64_t seed) const;  // a UsageError where both are asked for
  void check(const Config& config) const;   // a UsageError where that model retrieves nothing
  const char* name() const { return no_retrieval ? "none" : random_retrieval ? "random" : "learned"; }
  // The end of a line that says what was measured.
  const char* remark() const {
    return no_retrieval ? ", without retrieval" : random_retrieval ? ", random retrieval" : "";
  }
};

}  // namespace gca
