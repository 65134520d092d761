// The command generate: continues a text.
#include <fcntl.h>

#include <cmath>
#include <cstdio>
#include <span>

#include "commands/commands.h"
#include "commands/shared.h"
#include "runtime/stream.h"

namespace gca {

int generate_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  std::string prompt, context;
  std::vector<int64_t> prompt_ids;
  int64_t count = 200, seed = 1;
  double temperature = 0.8, top_p = 0.95;
  Flags flags("generate", "Continues a prompt. Temperature 0 is greedy: exact and repeatable.");
  source.add_to(flags);
  flags.add("prompt", prompt, "TEXT", "what to continue");
  flags.add("prompt-ids", prompt_ids, 0, INT32_MAX, "the prompt as token ids, special ones too, instead of --prompt");
  flags.add("context", context, "FILE",
            "text that goes before the prompt; its front is cut so that the prompt's last token opens a chunk");
  flags.add("count", count, 1, 1 << 30, "tokens to generate at most (end-of-text ends it)");
  flags.add("temperature", temperature, 0, 100, "0: always the likeliest token");
  flags.add("top-p", top_p, 0, 1, "draw from the smallest set of tokens with this probability");
  flags.add("seed", seed, 0, INT64_MAX, "of the draws");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  if (!prompt.empty() && !prompt_ids.empty())
    throw UsageError("--prompt and --prompt-ids exclude each other: choose one");
  const SavedRun saved = SavedRun::open(source.checkpoint, source.fallback);
  const Tokenizer& tokenizer = saved.tokenizer;
  const Config& config = saved.settings.config;
  std::vector<int32_t> ids;
  for (const int64_t id : prompt_ids) {
    if (id >= config.vocab)
      throw UsageError(str("--prompt-ids: expected ids below ", config.vocab, ", the model's vocabulary, found ", id));
    ids.push_back(static_cast<int32_t>(id));
  }
  if (prompt_ids.empty()) ids = tokenizer.encode(prompt);
  if (ids.empty()) ids.push_back(tokenizer.end_of_text);  // a document's beginning
  if (!context.empty()) {
    std::vector<int32_t> before = tokenizer.encode(read_file(context, size_t{1} << 40));
    // A chunk fetches with the landmark of the chunk before it: all of the prompt but its last token must be seen by
    // one.
    const size_t tokens = before.size() + ids.size(), cut = (tokens - 1) % static_cast<size_t>(config.chunk - 1);
    if (cut <= before.size()) before.erase(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(cut));
    else
      print_error(
          "--context is too short to be cut: the row starts with it, and the prompt's last token lies inside a "
          "chunk\n");
    ids.insert(ids.begin(), before.begin(), before.end());
  }
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    if (const int64_t n_bytes =
            model.model_memory().total_bytes() + TokenReader<std::remove_reference_t<decltype(device)>>::memory_bytes(
                                                     model, static_cast<int64_t>(ids.size()) + count),
        room = device.free_bytes();
        n_bytes > room)
      throw Error(str(ids.size(), " tokens and ", count, " more need ", mebibytes(n_bytes), ", ", mebibytes(room),
                      " are free; use a shorter --context or a smaller --count"));
    model.allocate();
    load_weights(saved.checkpoint.file(SavedRun::model_file), model);
    TokenReader reader(model, tokenizer.landmark, static_cast<int64_t>(ids.size()) + count);
    print_bytes(prompt);
    reader.read(ids);
    for (int64_t i = 0; i < count; i++) {
      std::vector<float> logits = reader.logits();
      logits[tokenizer.landmark] = -INFINITY;  // never a target: put in by the reader, not by the model
      const int32_t next = sample_token(logits, temperature, top_p, static_cast<uint64_t>(seed), i);
      if (next == tokenizer.end_of_text) break;
      print_bytes(tokenizer.decode(std::span(&next, 1)));
      if (i + 1 < count) reader.read({&next, 1});
    }
    print("\n");
    return 0;
  });
}

}  // namespace gca
