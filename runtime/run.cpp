// A saved run opened: checkpoint, tokenizer, settings.
#include "runtime/run.h"

#include <fcntl.h>

#include <string>
#include <utility>

#include "runtime/checkpoint.h"
#include "runtime/settings.h"
#include "tokenizer/tokenizer.h"

namespace gca {

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
