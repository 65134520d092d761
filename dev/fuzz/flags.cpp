// libFuzzer: any words (a newline ends one) as the command line of train are refused with a UsageError, or give
// settings that say themselves again.
#include "runtime/run.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  std::vector<std::string> words;
  for (std::string_view text(reinterpret_cast<const char*>(data), size); !text.empty();) {
    const size_t end = std::min(text.find('\n'), text.size());
    words.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  for (const char* name : {"out", "init", "model"}) static_cast<void>(Flags::peek(words, name));
  TrainSettings settings;
  Flags flags = train_flags(settings);
  try {
    flags.parse(words);
    settings.config.vocab = 263;
    settings.config.validate();
  } catch (const UsageError& error) {
    if (*error.what() == '\0') __builtin_trap();
    return 0;
  }
  const Json values = flags.values();
  TrainSettings again;
  Flags copy = train_flags(again);
  copy.restore(JsonField(values, "the copy"));
  if (copy.values() != values) __builtin_trap();
  return 0;
}
