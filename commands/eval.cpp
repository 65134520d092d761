// The command eval: loss, perplexity and bits per byte of a checkpoint on token shards.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "commands/commands.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "runtime/evaluate.h"
#include "runtime/run.h"

namespace gca {
namespace {

struct Options {
  ModelSource source;
  Ablation ablation;
  std::string data;
  int64_t chunks = 0, max_rows = int64_t{1} << 40, batch = 4, seed = 1;
  bool no_cross = false;
};

Flags eval_flags(Options& options) {
  Flags flags("eval",
              "Loss, perplexity and bits per byte of a checkpoint on token shards, also by position in the row.");
  options.source.add_to(flags);
  flags.add("data", options.data, "GLOB", "token shards");
  flags.add("chunks", options.chunks, 0, 1 << 20, "C, chunks a row; 0: as in training");
  flags.add("rows", options.max_rows, 1, int64_t{1} << 40, "rows at most, spread over the data");
  flags.add("batch", options.batch, 1, 1 << 20, "rows at once");
  flags.add_switch("no-cross", options.no_cross, "a row is one document's");
  options.ablation.add_to(flags);
  flags.add("seed", options.seed, 0, INT64_MAX, "of --random-retrieval");
  return flags;
}

// The figures, by eighths of the row too, and the hash of all losses: runs of the same bits have the same one.
void print_losses(const Evaluation& result, int64_t T, double seconds) {
  const double bits_per_byte = result.bytes > 0 ? result.sum / std::log(2.0) / result.bytes : NAN;
  print("loss ", fixed(result.loss(), 4), "  perplexity ", fixed(std::exp(result.loss()), 3), "  bits per byte ",
        fixed(bits_per_byte, 4), "  (", result.targets, " targets, ",
        fixed(static_cast<double>(result.rows * T) / seconds, 0), " slots/s)  hash ", hex(result.hash, 8), "\n");
  for (int i = 0; i < Evaluation::places; i++)
    if (result.place_count[i] > 0)
      print("  slots ", right(ceil_div(i * T, Evaluation::places), 6), "..",
            left(ceil_div((i + 1) * T, Evaluation::places) - 1, 6), " loss ",
            fixed(result.place_sum[i] / result.place_count[i], 4), "\n");
}

}  // namespace

int eval_command(const std::vector<std::string>& arguments) {
  Options options;
  Flags flags = eval_flags(options);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("data");
  const Selection selection = options.ablation.selection(options.seed);
  const SavedRun saved = SavedRun::open(options.source.checkpoint, options.source.fallback);
  options.ablation.check(saved.settings.config);
  const int64_t S = saved.settings.config.chunk, C = options.chunks ? options.chunks : saved.settings.chunks, T = C * S;
  const TokenStream stream(options.data, saved.tokenizer);
  const Rows rows(stream, saved.tokenizer, C, S, 0, !options.no_cross);
  const int64_t B = std::min({options.batch, options.max_rows, rows.count()});
  for (const std::string& note : {stream.notes(), rows.notes()})
    if (!note.empty()) print(note, "\n");
  return with_device(options.source.device, options.source.precision, options.source.threads, [&](auto& device) {
    DRT model(device, saved.settings.config, Use::inference);
    load_model(saved, model, B, T);
    const auto began = std::chrono::steady_clock::now();
    const auto never = [] { return false; };
    const Evaluation result = evaluate(model, rows, options.max_rows, B, T, selection, never, &saved.tokenizer);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    print("checkpoint ", saved.checkpoint.folder, ", ", result.rows, " rows of ", T, " slots (", C * (S - 1),
          " tokens)", options.ablation.remark(), "\n");
    print_losses(result, T, seconds);
    return 0;
  });
}

}  // namespace gca
