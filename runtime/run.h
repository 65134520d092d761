// A model that was saved: a run's checkpoint, or a file that `export` made of one. Both have weights, settings and
// tokenizer, so whatever reads one reads the other.
#pragma once
#include <map>
#include <string>

#include "runtime/checkpoint.h"
#include "runtime/settings.h"
#include "tokenizer/tokenizer.h"

namespace gca {

struct SavedRun {
  Checkpoint checkpoint;  // of an exported file: its path in place of a folder, step, and no files
  TrainSettings settings;
  Tokenizer tokenizer;
  std::string weights;  // the file that has them
  static constexpr const char *model_file = "model.safetensors", *optimizer_file = "optimizer.safetensors",
                              *tokenizer_file = "tokenizer.bpe";

  std::string tokenizer_path() const { return exported() ? weights : checkpoint.file(tokenizer_file); }
  bool exported() const { return checkpoint.files.empty(); }
  JsonField state() const;

  // Of the file of weights: what tells a model from another.
  uint32_t weights_crc() const;

  // path: a RUN (its newest step), RUN/best, a STEP, or an exported file.
  static SavedRun open(const std::string& path, bool fallback = false, Check check = Check::bytes);
};

// The metadata of an exported file: state and settings in JSON, less the paths of the machine that it was trained on;
// the tokenizer; and a checksum over both.
std::map<std::string, std::string> exported_metadata(const SavedRun& saved);

// Whether SavedRun::open finds settings there: false of a file with weights alone.
bool has_settings(const std::string& path);

}  // namespace gca
