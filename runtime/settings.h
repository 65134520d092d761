// The settings of a run: the flags of `train`, with their defaults.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "base/flags.h"
#include "model.h"
#include "runtime/needles.h"

namespace gca {

const Preset& preset(const std::string& name);

void add_model_flags(Flags& flags, std::string& model, Config& c);

void add_recompute_flag(Flags& flags, std::string& recompute);
Recompute recompute_named(const std::string& name);

// Whether what is done every so many steps is due after that many; of 0 it never is.
inline bool due(int64_t steps, int64_t every) { return every > 0 && steps % every == 0; }

struct TrainSettings {
  std::string model = "small", data, val_data, tokenizer = "bytes", out, init, device = "auto", precision = "float",
              recompute = "none", gpus = "1";
  Config config = preset("small").config;
  int64_t batch = 4, micro_batch = 0, chunks = 10, steps = 0, tokens = 0, warmup = -1, seed = 1, threads = 0, ranks = 1;
  int64_t print_every = 1, eval_every = 100, eval_rows = 32, save_every = 500, keep = 2;
  double lr = 1.5e-3, lr_final = -1, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, clip = 1;
  bool resume = false, fallback = false, noise = true, no_cross = false;
  TaskSettings task;
  std::vector<int64_t> curriculum, needles = {8}, questions = {8};
  double promote = 0.95, answer_weight = 2;
  bool landmark_answers = false;
  double noise_scale = 1, noise_scale_final = -1;
  double score_gradient = 1;
  int64_t short_window = -1;
  double short_share = 0.5;

  // What follows from several flags together, and from the vocabulary; a UsageError where they do not agree. A training
  // is as long as --steps says, or as --tokens does, from which steps is set.
  void finish(int64_t vocab);

  // Of a run that goes on after step `done`, after finish(). Another length keeps the warm-up that it had; a UsageError
  // where there are more steps already.
  void go_on(const TrainSettings& before, int64_t done);
  // What that changes, in sentences.
  std::vector<std::string> changes(const TrainSettings& before, int64_t done) const;

  // The stage of a curriculum fixes the chunks of a row. Longer rows are fewer, so that a step keeps its slots.
  int64_t stages() const { return std::max<int64_t>(1, std::ssize(curriculum)); }
  int64_t stage_chunks(int64_t stage) const { return curriculum.empty() ? chunks : curriculum[stage]; }
  int64_t stage_rows(int64_t rows, int64_t stage) const;
  int64_t of_stage(const std::vector<int64_t>& list, int64_t stage) const;
  // After the last step too, where there are validations.
  bool validates_after(int64_t step) const {
    return !val_data.empty() && eval_every > 0 && eval_rows > 0 && (step == steps || due(step, eval_every));
  }
  int64_t micro() const { return micro_batch ? micro_batch : batch; }
  int64_t warmup_steps() const { return warmup >= 0 ? warmup : steps / 50; }
  double final_rate() const { return lr_final >= 0 ? lr_final : lr / 10; }
  // What the noise is multiplied by: from noise_scale at the first step on a straight line to the last one's.
  double noise_scale_at(int64_t step) const;
  // W of a step: short_window in a share of them, drawn from seed and step, but never in the last tenth (rounded up).
  int64_t window_at(int64_t step) const;
  // Linear to lr over the warm-up, then a cosine to final_rate() at the last step.
  double learning_rate(int64_t step) const;
};

Flags train_flags(TrainSettings& s);

// A UsageError where the model that the flags say is another than that of `trained`, whose weights it is to start from.
// The null slot may differ, and K and W where they are given: then sentences that say so are returned. path: where the
// weights are.
std::string check_same_model(const TrainSettings& trained, const TrainSettings& now, Flags& flags,
                             const std::string& path);
// A sentence for weights that come without settings: what is taken on trust.
std::string model_on_trust(const Config& config, const std::string& path);

}  // namespace gca
