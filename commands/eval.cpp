// The command eval: loss, perplexity and bits per byte of a checkpoint on token shards.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "commands/commands.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "runtime/evaluate.h"
#include "runtime/run.h"
#include "runtime/stream.h"

namespace gca {
namespace {

struct Options {
  ModelSource source;
  Ablation ablation;
  std::string data;
  int64_t chunks = 0, max_rows = int64_t{1} << 40, batch = 4, seed = 1, score_last = 0;
  Reading reading;
  bool no_cross = false;
};

Flags eval_flags(Options& options) {
  Flags flags("eval",
              "Loss, perplexity and bits per byte of a checkpoint on token shards, also by position in the row.");
  options.source.add_to(flags);
  flags.add("data", options.data, "GLOB", "token shards");
  flags.add("chunks", options.chunks, 0, int64_t{1} << 34, "C, chunks a row, as many as you like; 0: as in training");
  flags.add("rows", options.max_rows, 1, int64_t{1} << 40, "rows at most, spread over the data");
  flags.add("batch", options.batch, 1, 1 << 20, "rows at once");
  options.reading.add_to(flags);
  flags.add("score-last", options.score_last, 0, int64_t{1} << 34, "chunks at the row's end that are scored; 0: all");
  flags.add_switch("no-cross", options.no_cross, "a row is one document's");
  options.ablation.add_to(flags);
  flags.add("seed", options.seed, 0, INT64_MAX, "of --picks random");
  return flags;
}

// The figures, also by place in the row, and the hash of all losses: runs of the same bits have the same one.
void print_losses(const Evaluation& result, int64_t T, int64_t S, double seconds) {
  const double bits_per_byte = result.bytes > 0 ? result.sum / std::log(2.0) / result.bytes : NAN;
  print("loss ", fixed(result.loss(), 4), "  perplexity ", fixed(std::exp(result.loss()), 3), "  bits per byte ",
        fixed(bits_per_byte, 4), "  (", result.targets, " targets, ",
        fixed(static_cast<double>(result.rows * T) / seconds, 0), " slots/s)  hash ", hex(result.hash, 8), "\n");
  for (size_t i = 0; i < result.place_sum.size(); i++)
    if (result.place_count[i] > 0)
      print("  slots ", right(Evaluation::first_slot(S, i), 9), "..",
            left(std::min(T, Evaluation::first_slot(S, i + 1)) - 1, 9), " loss ",
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
  options.ablation.settle(flags);
  const SavedRun saved = SavedRun::open(options.source.checkpoint, options.source.fallback);
  options.ablation.check(saved.settings.config);
  const Selection selection = options.ablation.selection(saved.settings.config, options.seed);
  const int64_t S = saved.settings.config.chunk, C = options.chunks ? options.chunks : saved.settings.chunks, T = C * S;
  const TokenStream stream(options.data, saved.tokenizer);
  const Rows rows(stream, saved.tokenizer, C, S, 0, !options.no_cross);
  const int64_t B = std::min({options.batch, options.max_rows, rows.count()});
  for (const std::string& note : {stream.notes(), rows.notes()})
    if (!note.empty()) print(note, "\n");
  return with_device(options.source.device, options.source.precision, options.source.threads, [&](auto& device) {
    DRT model(device, saved.settings.config, Use::inference);
    const auto reader = open_reader(saved, model, {.B = B, .chunks = C, .segment_slots = options.reading.batch_slots},
                                    options.reading.memory, "fewer --chunks");
    const auto began = std::chrono::steady_clock::now();
    const auto read = [&](const int32_t* tokens, const int32_t* targets, int64_t first_row, const auto& after) {
      Selection of_rows = selection;
      of_rows.first_row = first_row;
      reader->rewind();
      reader->read(tokens, targets, T, T, of_rows, after);
    };
    const Evaluation result = evaluate(
        model, rows, options.max_rows, B, T, options.score_last ? T - options.score_last * S : 0, read,
        [] { return false; }, &saved.tokenizer);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    print("checkpoint ", saved.checkpoint.folder, ", ", result.rows, " rows of ", T, " slots (", C * (S - 1),
          " tokens)", options.ablation.remark(), "\n");
    print_losses(result, T, S, seconds);
    return 0;
  });
}

}  // namespace gca
