// The command inspect: which chunks each chunk of a text fetches.
#include <fcntl.h>

#include <cstdio>
#include <span>

#include "commands/commands.h"
#include "commands/shared.h"
#include "runtime/stream.h"

namespace gca {

int inspect_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  std::string text;
  int64_t width = 60;
  Flags flags(
      "inspect",
      "For each chunk of a text: what it says, which chunks it fetches for the next one, and with what weight.");
  source.add_to(flags);
  flags.add("text", text, "FILE", "the text; its last tokens that fill no chunk are left out");
  flags.add("columns", width, 10, 10000, "characters of each chunk to print");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("text");
  const SavedRun saved = SavedRun::open(source.checkpoint, source.fallback);
  const Config& config = saved.settings.config;
  const int64_t S = config.chunk, K = config.topk;
  if (config.groups.empty())
    throw Error("'" + saved.checkpoint.folder +
                "' is a sliding-window baseline: it fetches nothing; inspect a model with --groups");
  const std::vector<int32_t> ids = saved.tokenizer.encode(read_file(text, size_t{1} << 40));
  const int64_t chunks = static_cast<int64_t>(ids.size()) / (S - 1);
  if (!chunks)
    throw Error(str("'", text, "': expected at least the ", S - 1, " tokens of one chunk, found ", ids.size(),
                    "; give a longer text"));
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < chunks * (S - 1); i++) {
    slots.push_back(ids[i]);
    if ((i + 1) % (S - 1) == 0) slots.push_back(saved.tokenizer.landmark);
  }
  auto says = [&](int64_t chunk) {
    const std::string all = printable(saved.tokenizer.decode(std::span(ids).subspan(chunk * (S - 1), S - 1)));
    return all.size() > static_cast<size_t>(width) ? all.substr(0, width) : all;
  };
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    allocate_or_explain(model, 1, chunks * S);
    load_weights(saved.checkpoint.file(SavedRun::model_file), model);
    model.upload(slots.data(), nullptr, nullptr, chunks * S);
    model.forward({1, chunks * S, {}});
    std::vector<FetchedChunks<std::remove_reference_t<decltype(device)>>> fetched;
    for (size_t g = 0; g < model.groups.size(); g++) fetched.emplace_back(model, g, 1, chunks);
    for (int64_t c = 0; c < chunks; c++) {
      print("chunk ", c, ": ", says(c), "\n");
      for (size_t g = 0; g < model.groups.size(); g++)
        for (int64_t k = 0; k < K; k++) {
          const size_t at = (c + 1) * K + k;
          if (fetched[g].pick[at] >= 0)
            print("  group ", g, " fetches ", right(fetched[g].pick[at], 5), "  ",
                  fixed(static_cast<double>(fetched[g].w[at]), 3), "  ", says(fetched[g].pick[at]), "\n");
        }
    }
    return 0;
  });
}

}  // namespace gca
