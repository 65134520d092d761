// What the commands share, less what needs a model.
#include "commands/shared.h"

#include <unistd.h>

#include <algorithm>

#include "base/files.h"
#include "base/text.h"

namespace gca {

bool wants_help(const std::vector<std::string>& arguments, const Flags& flags) {
  const bool wanted = std::any_of(arguments.begin(), arguments.end(),
                                  [](const std::string& argument) { return argument == "--help" || argument == "-h"; });
  if (wanted) {
    print(flags.help());
    flush_output();
  }
  return wanted;
}

void print_bytes(const std::string& bytes) {
  print(isatty(STDOUT_FILENO) ? printable(bytes, true) : bytes);
  flush_output();
}

void ModelSource::add_to(Flags& flags) {
  flags.add("checkpoint", checkpoint, "STEP",
            "a RUN: its newest checkpoint, RUN/best: that of its best validation, a checkpoint's folder, or an "
            "exported file");
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

int64_t distance_beyond_window(int64_t window, int64_t S) { return std::max<int64_t>(1, (window + 1) / S - 1); }

void Ablation::add_to(Flags& flags, bool by_words) {
  if (by_words)
    flags.add_choice(
        "picks", picks, "learned|noisy|random|latest|newest|lexical|hindsight|none",
        "what is fetched: the best chunks; the best with Gumbel noise of scale 1; K uniform past ones; the last K; "
        "the last K not wholly in the window; of those and older ones whose words overlap most with the chunk's, or "
        "(hindsight) with the next one's, which is to be predicted; none");
  else
    flags.add_choice("picks", picks, "learned|noisy|random|latest|newest|none",
                     "what is fetched: the best chunks; the best with Gumbel noise of scale 1; K uniform past ones; "
                     "the last K; the last K not wholly in the window; none");
  flags.add_choice("pick-weights", weights, "scores|equal",
                   "what a fetched chunk weighs: by its score, or all the same");
  flags.add_switch("random-retrieval", random_retrieval_, "short for --picks random");
  flags.add_switch("no-retrieval", no_retrieval_, "short for --picks none");
}

void Ablation::settle(Flags& flags) {
  if (no_retrieval_ && random_retrieval_)
    throw UsageError("--no-retrieval and --random-retrieval exclude each other: choose one");
  const std::string wanted = no_retrieval_ ? "none" : random_retrieval_ ? "random" : picks;
  if (flags.given("picks") && picks != wanted)
    throw UsageError(str("--", no_retrieval_ ? "no" : "random", "-retrieval: expected no other picks, found --picks ",
                         picks, "; leave one out"));
  picks = wanted;
  if (picks == "none" && weights == "equal")
    throw UsageError("--pick-weights equal: expected chunks to weigh, found --picks none; leave one out");
}

void Ablation::check(const Config& config) const {
  if (config.groups.empty() && replaces())
    throw UsageError(str(picks != "learned" ? "--picks " + picks : "--pick-weights " + weights,
                         ": expected a model that retrieves, found a sliding-window baseline; leave it out"));
}

Selection Ablation::selection(const Config& config, int64_t seed) const {
  Selection selection;
  const bool latest = picks == "latest";
  selection.picking = picks == "none"               ? Picking::none
                      : picks == "random"           ? Picking::uniform
                      : picks == "newest" || latest ? Picking::newest
                      : by_words()                  ? Picking::given
                                                    : Picking::learned;
  selection.noise = picks == "noisy";
  selection.newest_distance = latest ? 1 : distance_beyond_window(config.reach.window, config.chunk);
  selection.equal_weights = weights == "equal";
  selection.seed = static_cast<uint64_t>(seed);
  return selection;
}

std::string Ablation::remark() const {
  const std::string of_picks = picks == "none"      ? ", without retrieval"
                               : picks == "random"  ? ", random retrieval"
                               : picks == "newest"  ? ", newest chunks"
                               : picks != "learned" ? ", " + picks + " picks"
                                                    : "";
  return of_picks + (weights == "equal" ? ", equal weights" : "");
}

}  // namespace gca
