// The command generate: continues a text, or several at once; without one, a talk on a terminal.
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <span>
#include <sstream>
#include <utility>

#include "base/files.h"
#include "base/json.h"
#include "base/progress.h"
#include "base/text.h"
#include "commands/commands.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "commands/talk.h"
#include "runtime/decode.h"
#include "runtime/memory_file.h"
#include "runtime/run.h"
#include "runtime/stream.h"
#include "tokenizer/text_files.h"

namespace gca {
namespace {

struct Options {
  ModelSource source;
  Reading reading;
  std::string prompt, prompts, context, save_memory, load_memory;
  std::vector<int64_t> prompt_ids;
  int64_t count = 200, seed = 1, batch = 16, talk_tokens = 64 << 10;
  double temperature = 0.8, top_p = 0.95;
  Choice choice() const { return {.temperature = temperature, .top_p = top_p, .seed = static_cast<uint64_t>(seed)}; }
};

Flags generate_flags(Options& options) {
  Flags flags(
      "generate",
      "Continues a prompt. Temperature 0 is greedy: exact and repeatable. Without a prompt, on a terminal: a talk, in "
      "one row that goes on, so\n"
      "  that all that was said stays in memory. Ctrl-C ends an answer, Ctrl-D the talk.");
  options.source.add_to(flags);
  options.reading.add_to(flags);
  flags.add("prompt", options.prompt, "TEXT", "what to continue");
  flags.add("prompt-ids", options.prompt_ids, 0, INT32_MAX,
            "the prompt as token ids, special ones too, instead of --prompt");
  flags.add("prompts", options.prompts, "FILE",
            "continue each of its lines: JSON lines {\"prompt\":N,\"text\":...} as the tokens come, N from 1 on, and "
            "{\"prompt\":N,\"tokens\":...,\"end\":...}");
  flags.add("batch", options.batch, 1, 1024,
            "of --prompts, so many at once; the next takes the place of one that ends");
  flags.add("context", options.context, "FILE",
            "text that goes before the prompt, or before each; its front is cut so that the prompt's last token opens "
            "a chunk. A talk begins after it");
  flags.add("save-memory", options.save_memory, "FILE",
            "once context and prompt are read, or a talk has ended, write what later slots read of them: window rings, "
            "picks, all chunks");
  flags.add(
      "load-memory", options.load_memory, "FILE",
      "go on after the text that a memory was saved of, instead of reading it: the prompt, or the talk, follows it");
  flags.add("count", options.count, 1, int64_t{1} << 36,
            "tokens to generate at most, in a talk for each answer (end-of-text ends it)");
  flags.add("talk-tokens", options.talk_tokens, 1, int64_t{1} << 36,
            "of a talk at most, what is said by both, for which memory is planned");
  flags.add("temperature", options.temperature, 0, 100, "0: always the likeliest token");
  flags.add("top-p", options.top_p, 0, 1, "draw from the smallest set of tokens with this probability");
  flags.add("seed", options.seed, 0, INT64_MAX, "of the draws");
  return flags;
}

std::vector<int32_t> tokens_of(const std::string& prompt, const SavedRun& saved) {
  std::vector<int32_t> ids = saved.tokenizer.encode(prompt);
  if (ids.empty()) ids.push_back(saved.tokenizer.end_of_text);  // a document's beginning
  return ids;
}

std::vector<int32_t> prompt_tokens(const Options& options, const SavedRun& saved) {
  if (options.prompt_ids.empty()) return tokens_of(options.prompt, saved);
  std::vector<int32_t> ids;
  for (const int64_t id : options.prompt_ids) {
    if (const int64_t V = saved.settings.config.vocab; id >= V)
      throw UsageError(str("--prompt-ids: expected ids below ", V, ", the model's vocabulary, found ", id));
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

// A chunk fetches with the landmark of the chunk before it: all of the prompt but its last token must be seen by one.
// So the context's front is cut until the prompt's last token opens a chunk. Returns whether it was long enough for
// that.
bool put_before(std::vector<int32_t>& prompt, const std::vector<int32_t>& context, int64_t S) {
  const size_t cut = (context.size() + prompt.size() - 1) % static_cast<size_t>(S - 1);
  const bool enough = cut <= context.size();
  prompt.insert(prompt.begin(), context.begin() + static_cast<std::ptrdiff_t>(enough ? cut : 0), context.end());
  return enough;
}

// A text to be continued, and what has come of it.
struct Text {
  int64_t number;  // from 1 on
  std::vector<int32_t> ids;
  int64_t tokens = 0;
  WholeCharacters characters = {};
};

// What comes of the texts, on standard output: of one its bytes, of several a line of JSON for each piece and for each
// end.
class Output {
 public:
  explicit Output(bool several) : several_(several) {}
  void piece(const Text& text, const std::string& bytes) const {
    if (!several_) return print_bytes(bytes);
    if (bytes.empty()) return;
    Json line;
    line["prompt"] = text.number;
    line["text"] = bytes;
    print_bytes(line.dump() + "\n");
  }
  void end(Text& text, const char* why) const {
    piece(text, text.characters.rest());
    if (!several_) return print_bytes("\n");
    Json line;
    line["prompt"] = text.number;
    line["tokens"] = text.tokens;
    line["end"] = why;
    print_bytes(line.dump() + "\n");
  }

 private:
  bool several_;
};

// Prints up to options.count tokens that follow each text; as many at once as options.batch.
template <class Device>
void continue_texts(Device& device, const Options& options, const SavedRun& saved, std::vector<Text> texts,
                    const std::vector<int32_t>& context) {
  const Tokenizer& tokenizer = saved.tokenizer;
  const Output output(!options.prompts.empty());
  DRT model(device, saved.settings.config, Use::inference);
  const MemoryFields fields = memory_fields(model, saved.weights_crc());
  std::optional<MemoryFile> memory;
  if (!options.load_memory.empty()) memory.emplace(options.load_memory, fields);
  int64_t longest = 0, slots_read = 0;
  for (const Text& text : texts)
    longest = std::max(longest, std::ssize(text.ids) + std::ssize(context) + options.count);
  const int64_t S = model.config.chunk, before = memory ? ceil_div(memory->slots(), S) : 0,
                at_once = std::min(options.batch, std::ssize(texts));
  const auto readers = open_readers(
      saved, model,
      {.chunks = before + ceil_div(longest, S - 1), .segment_slots = options.reading.batch_slots, .readers = at_once},
      options.reading.memory,
      options.prompts.empty() ? "a shorter --context or a smaller --count"
                              : "shorter prompts, a smaller --batch or a smaller --count");
  Decoder decoder(model, at_once, tokenizer.landmark, options.choice());
  std::vector<Text*> place(at_once);
  size_t begun = 0;
  double reading = 0;
  bool context_short = false;
  const Stopwatch clock;
  const auto begin = [&](int64_t i) {  // the next text that waits, at that place
    if (begun == texts.size()) return;
    const Stopwatch of_reading;
    place[i] = &texts[begun++];
    RowReader<Device>& rows = *readers[i];
    rows.rewind();
    if (memory) load_memory(*memory, model, rows);
    if (options.prompts.empty()) print_bytes(options.prompt);
    std::vector<int32_t> ids = std::move(place[i]->ids);
    if (!context.empty() && !put_before(ids, context, S) && !std::exchange(context_short, true))
      print_error("--context is too short to be cut: ", options.prompts.empty() ? "the row starts" : "rows start",
                  " with it, and a prompt's last token lies inside a chunk\n");
    TokenReader(model, rows, tokenizer.landmark).read(ids);
    if (!options.save_memory.empty()) save_memory(options.save_memory, fields, "", model, rows);
    slots_read += rows.slots();
    decoder.begin(i, rows, options.count, static_cast<int32_t>(place[i]->number - 1));
    device.synchronize();
    reading += of_reading.seconds();
  };
  for (int64_t i = 0; i < at_once; i++) begin(i);
  int64_t tokens = 0;
  for (Chosen chosen; (chosen = decoder.next()).text >= 0;) {
    Text& text = *place[chosen.text];
    const bool ends = chosen.token == tokenizer.end_of_text;
    if (!ends) {
      tokens++;
      text.tokens++;
      output.piece(text, text.characters.take(tokenizer.decode(std::span(&chosen.token, 1))));
    }
    if (!ends && text.tokens < options.count) continue;
    output.end(text, ends ? "end of text" : "count");
    decoder.end(chosen.text);
    begin(chosen.text);
  }
  if (options.prompts.empty()) return;
  const double seconds = clock.seconds() - reading;
  print_error(texts.size(), " prompts, ", at_once, " at once: ", slots_read, " slots read in ", fixed(reading, 2),
              " s, ", tokens, " tokens generated in ", fixed(seconds, 2), " s, ",
              static_cast<int64_t>(static_cast<double>(tokens) / std::max(seconds, 1e-9)), " tokens/s\n");
}

// The texts that are asked for.
std::vector<Text> texts_of(const Options& options, const SavedRun& saved) {
  std::vector<Text> texts;
  if (options.prompts.empty()) {
    texts.push_back({1, prompt_tokens(options, saved)});
  } else {
    std::istringstream lines(read_text(options.prompts));
    for (std::string line; std::getline(lines, line);) {
      if (line.ends_with('\r')) line.pop_back();
      texts.push_back({std::ssize(texts) + 1, tokens_of(line, saved)});
    }
    if (texts.empty()) throw Error("'" + options.prompts + "': expected a prompt a line, found nothing");
  }
  return texts;
}

}  // namespace

int generate_command(const std::vector<std::string>& arguments) {
  Options options;
  Flags flags = generate_flags(options);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  if (!options.prompt.empty() + !options.prompt_ids.empty() + !options.prompts.empty() > 1)
    throw UsageError("--prompt, --prompt-ids and --prompts exclude each other: choose one");
  if (flags.given("prompts") && options.prompts.empty()) throw UsageError("--prompts needs the name of a file");
  if (!options.prompts.empty() && !options.save_memory.empty())
    throw UsageError("--save-memory is of one text: give --prompt, not --prompts");
  if (flags.given("batch") && options.prompts.empty()) throw UsageError("--batch is of --prompts: give that too");
  if (!options.load_memory.empty() && !options.context.empty())
    throw UsageError("--load-memory stands in place of --context: choose one");
  const bool prompted = flags.given("prompt") || !options.prompt_ids.empty() || !options.prompts.empty(),
             talks = !prompted && isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
  if (!options.load_memory.empty() && !talks && options.prompt.empty() && options.prompt_ids.empty() &&
      options.prompts.empty())
    throw UsageError(
        "--load-memory goes on with a prompt: give --prompt, --prompt-ids or --prompts, or talk on a terminal");
  if (flags.given("talk-tokens") && !talks)
    throw UsageError("--talk-tokens is of a talk: leave --prompt out, on a terminal");
  check_can_save(options.save_memory);
  const SavedRun saved = SavedRun::open(options.source.checkpoint, options.source.fallback);
  std::vector<Text> texts = talks ? std::vector<Text>() : texts_of(options, saved);
  const std::vector<int32_t> context =
      options.context.empty() ? std::vector<int32_t>() : saved.tokenizer.encode(read_text(options.context));
  return with_device(options.source.device, options.source.precision, options.source.threads, [&](auto& device) {
    if (talks) {
      const TalkSettings settings = {options.reading,     options.choice(),    options.count,
                                     options.talk_tokens, options.load_memory, options.save_memory};
      Talk(device, saved, settings, context).go_on();
      return 0;
    }
    continue_texts(device, options, saved, std::move(texts), context);
    return 0;
  });
}

}  // namespace gca
