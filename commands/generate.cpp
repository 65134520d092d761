// The command generate: continues a text.
#include <cmath>
#include <optional>
#include <span>

#include "base/files.h"
#include "base/text.h"
#include "commands/commands.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "runtime/decode.h"
#include "runtime/memory_file.h"
#include "runtime/run.h"
#include "runtime/stream.h"

namespace gca {
namespace {

struct Options {
  ModelSource source;
  Reading reading;
  std::string prompt, context, save_memory, load_memory;
  std::vector<int64_t> prompt_ids;
  int64_t count = 200, seed = 1;
  double temperature = 0.8, top_p = 0.95;
};

Flags generate_flags(Options& options) {
  Flags flags("generate", "Continues a prompt. Temperature 0 is greedy: exact and repeatable.");
  options.source.add_to(flags);
  options.reading.add_to(flags);
  flags.add("prompt", options.prompt, "TEXT", "what to continue");
  flags.add("prompt-ids", options.prompt_ids, 0, INT32_MAX,
            "the prompt as token ids, special ones too, instead of --prompt");
  flags.add("context", options.context, "FILE",
            "text that goes before the prompt; its front is cut so that the prompt's last token opens a chunk");
  flags.add("save-memory", options.save_memory, "FILE",
            "once context and prompt are read, write what later slots read of them: window rings, picks, all chunks");
  flags.add("load-memory", options.load_memory, "FILE",
            "go on after the text that a memory was saved of, instead of reading it: the prompt follows it");
  flags.add("count", options.count, 1, int64_t{1} << 36, "tokens to generate at most (end-of-text ends it)");
  flags.add("temperature", options.temperature, 0, 100, "0: always the likeliest token");
  flags.add("top-p", options.top_p, 0, 1, "draw from the smallest set of tokens with this probability");
  flags.add("seed", options.seed, 0, INT64_MAX, "of the draws");
  return flags;
}

std::vector<int32_t> prompt_tokens(const Options& options, const SavedRun& saved) {
  std::vector<int32_t> ids;
  for (const int64_t id : options.prompt_ids) {
    if (const int64_t V = saved.settings.config.vocab; id >= V)
      throw UsageError(str("--prompt-ids: expected ids below ", V, ", the model's vocabulary, found ", id));
    ids.push_back(static_cast<int32_t>(id));
  }
  if (options.prompt_ids.empty()) ids = saved.tokenizer.encode(options.prompt);
  if (ids.empty()) ids.push_back(saved.tokenizer.end_of_text);  // a document's beginning
  return ids;
}

// A chunk fetches with the landmark of the chunk before it: all of the prompt but its last token must be seen by one.
// So the context's front is cut until the prompt's last token opens a chunk.
void put_before(std::vector<int32_t>& prompt, std::vector<int32_t> context, int64_t S) {
  const size_t tokens = context.size() + prompt.size(), cut = (tokens - 1) % static_cast<size_t>(S - 1);
  if (cut > context.size()) {
    print_error(
        "--context is too short to be cut: the row starts with it, and the prompt's last token lies inside a "
        "chunk\n");
  } else {
    context.erase(context.begin(), context.begin() + static_cast<std::ptrdiff_t>(cut));
  }
  prompt.insert(prompt.begin(), context.begin(), context.end());
}

// Prints up to options.count tokens that follow ids.
template <class Device>
void continue_text(Device& device, const Options& options, const SavedRun& saved, const std::vector<int32_t>& ids) {
  const Tokenizer& tokenizer = saved.tokenizer;
  DRT model(device, saved.settings.config, Use::inference);
  const MemoryFields fields = memory_fields(model, saved.weights_crc());
  std::optional<MemoryFile> memory;
  if (!options.load_memory.empty()) memory.emplace(options.load_memory, fields);
  const int64_t longest = std::ssize(ids) + options.count, S = model.config.chunk,
                before = memory ? ceil_div(memory->slots(), S) : 0;
  const auto rows = open_reader(
      saved, model, {.chunks = before + ceil_div(longest, S - 1), .segment_slots = options.reading.batch_slots},
      options.reading.memory, "a shorter --context or a smaller --count");
  rows->rewind();
  if (memory) load_memory(*memory, model, *rows);
  TokenReader reader(model, *rows, tokenizer.landmark);
  print_bytes(options.prompt);
  reader.read(ids);
  if (!options.save_memory.empty()) save_memory(options.save_memory, fields, "", model, *rows);
  Decoder decoder(
      model, *rows, tokenizer.landmark,
      {.temperature = options.temperature, .top_p = options.top_p, .seed = static_cast<uint64_t>(options.seed)},
      options.count);
  for (int32_t token; (token = decoder.next()) >= 0 && token != tokenizer.end_of_text;)
    print_bytes(tokenizer.decode(std::span(&token, 1)));
  print("\n");
}

}  // namespace

int generate_command(const std::vector<std::string>& arguments) {
  Options options;
  Flags flags = generate_flags(options);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  if (!options.prompt.empty() && !options.prompt_ids.empty())
    throw UsageError("--prompt and --prompt-ids exclude each other: choose one");
  if (!options.load_memory.empty() && !options.context.empty())
    throw UsageError("--load-memory stands in place of --context: choose one");
  if (!options.load_memory.empty() && options.prompt.empty() && options.prompt_ids.empty())
    throw UsageError("--load-memory goes on with a prompt: give --prompt or --prompt-ids");
  check_can_save(options.save_memory);
  const SavedRun saved = SavedRun::open(options.source.checkpoint, options.source.fallback);
  std::vector<int32_t> ids = prompt_tokens(options, saved);
  if (!options.context.empty())
    put_before(ids, saved.tokenizer.encode(read_file(options.context, size_t{1} << 40)), saved.settings.config.chunk);
  return with_device(options.source.device, options.source.precision, options.source.threads, [&](auto& device) {
    continue_text(device, options, saved, ids);
    return 0;
  });
}

}  // namespace gca
