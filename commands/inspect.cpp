// The command inspect: which chunks each chunk of a text fetches.
#include <span>

#include "base/files.h"
#include "base/text.h"
#include "commands/commands.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "runtime/run.h"
#include "runtime/stream.h"
#include "tokenizer/text_files.h"

namespace gca {
namespace {

// The text in whole chunks; the tokens that fill none are left out.
struct ChunkedText {
  int64_t chunks;
  std::vector<std::string> words;  // what each chunk says, on a line
  std::vector<int32_t> slots;      // (chunks*S): a landmark closes each chunk
};

ChunkedText cut_into_chunks(const std::string& path, const Tokenizer& tokenizer, int64_t S, int64_t width) {
  const std::vector<int32_t> ids = tokenizer.encode(read_text(path));
  ChunkedText text{std::ssize(ids) / (S - 1), {}, {}};
  if (!text.chunks)
    throw Error(str("'", path, "': expected at least the ", S - 1, " tokens of one chunk, found ", ids.size(),
                    "; give a longer text"));
  for (int64_t c = 0; c < text.chunks; c++) {
    const std::span<const int32_t> chunk = std::span(ids).subspan(c * (S - 1), S - 1);
    text.words.push_back(first_columns(tokenizer.words(ids, c * (S - 1), (c + 1) * (S - 1)), width));
    text.slots.insert(text.slots.end(), chunk.begin(), chunk.end());
    text.slots.push_back(tokenizer.landmark);
  }
  return text;
}

// What the chunks of a segment fetched, of which first is the first.
void print_fetched(const ChunkedText& text, int64_t first, const std::vector<FetchedChunks>& fetched) {
  for (int64_t c = 0; c < fetched[0].table.C; c++) {
    print("chunk ", first + c, ": ", text.words[first + c], "\n");
    for (size_t g = 0; g < fetched.size(); g++)
      for (int64_t k = 0; k < fetched[g].table.K; k++) {
        const int64_t i = fetched[g].table.picked_by(0, c, k);
        if (const int32_t pick = fetched[g].pick[i]; pick >= 0)
          print("  group ", g, " fetches ", right(pick, 5), "  ", fixed(fetched[g].w[i], 3), "  ", text.words[pick],
                "\n");
      }
  }
  flush_output();
}

}  // namespace

int inspect_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  Reading reading;
  Ablation ablation;
  std::string path;
  int64_t width = 60, seed = 1;
  Flags flags(
      "inspect",
      "For each chunk of a text: what it says, which chunks it fetches for the next one, and with what weight.");
  source.add_to(flags);
  reading.add_to(flags);
  ablation.add_to(flags);
  flags.add("seed", seed, 0, INT64_MAX, "of --picks random");
  flags.add("text", path, "FILE", "the text; its last tokens that fill no chunk are left out");
  flags.add("columns", width, 10, 10000,
            "of each chunk's text to print: as a terminal counts, two of a wide character");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("text");
  ablation.settle(flags);
  const SavedRun saved = SavedRun::open(source.checkpoint, source.fallback);
  const Config& config = saved.settings.config;
  if (config.groups.empty())
    throw Error("'" + saved.checkpoint.folder +
                "' is a sliding-window baseline: it fetches nothing; inspect a model with --groups");
  const ChunkedText text = cut_into_chunks(path, saved.tokenizer, config.chunk, width);
  const int64_t T = std::ssize(text.slots);
  const Selection selection = ablation.selection(config, seed);
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    const auto reader = open_reader(saved, model, {.chunks = text.chunks, .segment_slots = reading.batch_slots},
                                    reading.memory, "a shorter --text");
    print("checkpoint ", saved.checkpoint.folder, ", ", text.chunks, " chunks of ", config.chunk, " slots",
          ablation.remark(), "\n");
    reader->rewind();
    reader->read(text.slots.data(), nullptr, T, T, selection,
                 [&](int64_t first, int64_t) { print_fetched(text, first / config.chunk, reader->fetched()); });
    return 0;
  });
}

}  // namespace gca
