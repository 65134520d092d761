// What the commands share, less what needs a model.
#include "commands/shared.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "base/files.h"
#include "base/text.h"

namespace gca {

std::string build_description() {
#ifdef GCA_CUDA
  return std::string("CPU and CUDA, ") + __VERSION__;
#else
  return std::string("CPU only, ") + __VERSION__;
#endif
}

bool wants_help(const std::vector<std::string>& arguments, const Flags& flags) {
  const bool wanted = std::any_of(arguments.begin(), arguments.end(),
                                  [](const std::string& argument) { return argument == "--help" || argument == "-h"; });
  if (wanted) print(flags.help());
  return wanted;
}

void print_bytes(const std::string& bytes) {
  const std::string shown = isatty(STDOUT_FILENO) ? printable(bytes, true) : bytes;
  if (fwrite(shown.data(), 1, shown.size(), stdout) != shown.size() || fflush(stdout) != 0 || ferror(stdout))
    throw system_error("cannot write standard output", errno);
}

void ModelSource::add_to(Flags& flags) {
  flags.add("checkpoint", checkpoint, "STEP", "a checkpoint's folder, or a RUN: its newest");
  flags.add_switch("fallback", fallback, "take an older checkpoint of the RUN where the newest is damaged");
  flags.add_choice("device", device, "auto|cpu|cuda", "auto: cuda where a GPU answers");
  flags.add_choice("precision", precision, "float|bf16", "bf16 on a GPU only");
  flags.add("threads", threads, 0, 4096, "CPU threads; 0: one a processor");
}

void Reading::add_to(Flags& flags) {
  flags.add("batch-slots", batch_slots, 1, int64_t{1} << 30,
            "slots at once: several rows, or a segment of a longer one");
  flags.add_choice("memory", memory, "auto|gpu|host",
                   "where the memory of chunks lies; auto: the GPU, where it fits (on a CPU both are the same memory)");
}

void Ablation::add_to(Flags& flags) {
  flags.add_switch("no-retrieval", no_retrieval, "GCA gives zero");
  flags.add_switch("random-retrieval", random_retrieval, "K uniform past chunks, weights by their scores");
}

Selection Ablation::selection(int64_t seed) const {
  if (no_retrieval && random_retrieval)
    throw UsageError("--no-retrieval and --random-retrieval exclude each other: choose one");
  Selection selection;
  selection.picking = no_retrieval ? Picking::none : random_retrieval ? Picking::uniform : Picking::learned;
  selection.seed = static_cast<uint64_t>(seed);
  return selection;
}

void Ablation::check(const Config& config) const {
  if (config.groups.empty() && (no_retrieval || random_retrieval))
    throw UsageError(str("--", no_retrieval ? "no" : "random",
                         "-retrieval: expected a model that retrieves, found a sliding-window baseline; leave it out"));
}

}  // namespace gca
