// A run that was saved: checkpoint, settings, tokenizer.
#pragma once
#include <string>

#include "runtime/checkpoint.h"
#include "runtime/settings.h"
#include "tokenizer/tokenizer.h"

namespace gca {

struct SavedRun {
  Checkpoint checkpoint;
  TrainSettings settings;
  Tokenizer tokenizer;
  static constexpr const char *model_file = "model.safetensors", *optimizer_file = "optimizer.safetensors",
                              *tokenizer_file = "tokenizer.bpe";

  JsonField state() const { return {checkpoint.state, checkpoint.folder + "/state.json"}; }

  // Of the file of weights: what tells a model from another.
  uint32_t weights_crc() const;

  // path: a RUN (its newest step) or a STEP.
  static SavedRun open(const std::string& path, bool fallback = false);
};

}  // namespace gca
