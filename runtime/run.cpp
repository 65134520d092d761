// A saved run opened: checkpoint, tokenizer, settings.
#include "runtime/run.h"

#include <fcntl.h>

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/checkpoint.h"
#include "runtime/settings.h"
#include "tokenizer/tokenizer.h"

namespace gca {

uint32_t SavedRun::weights_crc() const {
  const Manifest manifest = Manifest::read(checkpoint.folder);
  const auto entry = std::find_if(manifest.entries.begin(), manifest.entries.end(),
                                  [](const Manifest::Entry& file) { return file.name == model_file; });
  GCA_CHECK(entry != manifest.entries.end(), "'", checkpoint.folder, "' lists its weights");
  return entry->crc;
}

SavedRun SavedRun::open(const std::string& path, bool fallback) {
  Checkpoint checkpoint = open_checkpoint(path, fallback);
  for (const std::string& error : checkpoint.passed_over) print_error("passed over: ", error, "\n");
  Tokenizer tokenizer = Tokenizer::load(checkpoint.file(tokenizer_file));
  SavedRun saved{std::move(checkpoint), {}, std::move(tokenizer)};
  train_flags(saved.settings).restore(saved.state().at("settings"));
  try {
    saved.settings.finish(saved.tokenizer.vocab_size());
  } catch (const UsageError& error) {  // not of this command's line
    throw Error(saved.state().where() + ": settings: " + error.what());
  }
  return saved;
}

}  // namespace gca
