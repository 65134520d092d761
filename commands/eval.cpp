// The command eval: loss, perplexity and bits per byte of a checkpoint on token shards.
#include <fcntl.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "commands/commands.h"
#include "commands/shared.h"

namespace gca {

namespace {

// The figures, by eighths of the row too; bits: the same ones, the same hash.
void report(const Evaluation& result, int64_t T, double seconds) {
  print("loss ", fixed(result.loss(), 4), "  perplexity ", fixed(std::exp(result.loss()), 3), "  bits per byte ",
        fixed(result.bytes > 0 ? result.sum / std::log(2.0) / result.bytes : NAN, 4), "  (", result.targets,
        " targets, ", fixed(static_cast<double>(result.rows * T) / seconds, 0), " slots/s)  bits ", hex(result.bits, 8),
        "\n");
  for (int i = 0; i < Evaluation::places; i++)
    if (result.place_count[i] > 0)
      print("  slots ", right(i * T / Evaluation::places, 6), "..", left((i + 1) * T / Evaluation::places - 1, 6),
            " loss ", fixed(result.place_sum[i] / result.place_count[i], 4), "\n");
}

}  // namespace

int eval_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  std::string data;
  int64_t chunks = 0, max_rows = int64_t{1} << 40, batch = 4, seed = 1;
  bool no_retrieval = false, random_retrieval = false, no_cross = false;
  Flags flags("eval",
              "Loss, perplexity and bits per byte of a checkpoint on token shards, also by position in the row.");
  source.add_to(flags);
  flags.add("data", data, "GLOB", "token shards");
  flags.add("chunks", chunks, 0, 1 << 20, "C, chunks a row; 0: as in training");
  flags.add("rows", max_rows, 1, int64_t{1} << 40, "rows at most, spread over the data");
  flags.add("batch", batch, 1, 1 << 20, "rows at once");
  flags.add_switch("no-cross", no_cross, "a row is one document's");
  add_ablations(flags, no_retrieval, random_retrieval);
  flags.add("seed", seed, 0, INT64_MAX, "of --random-retrieval");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("data");
  const Selection selection = ablation(no_retrieval, random_retrieval, seed);
  const SavedRun saved = SavedRun::open(source.checkpoint, source.fallback);
  const Config& config = saved.settings.config;
  if (!chunks) chunks = saved.settings.chunks;
  const TokenStream stream(data, saved.tokenizer);
  const Rows rows(stream, saved.tokenizer, chunks, config.chunk, 0, !no_cross);
  batch = std::min({batch, max_rows, rows.count()});
  for (const std::string& note : {stream.notes(), rows.notes()})
    if (!note.empty()) print(note, "\n");
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    allocate_or_explain(model, batch, chunks * config.chunk);
    load_weights(saved.checkpoint.file(SavedRun::model_file), model);
    const auto began = std::chrono::steady_clock::now();
    const Evaluation result = evaluate(
        model, rows, max_rows, batch, chunks * config.chunk, selection, [] { return false; }, &saved.tokenizer);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    print("checkpoint ", saved.checkpoint.folder, ", ", result.rows, " rows of ", chunks * config.chunk, " slots (",
          chunks * (config.chunk - 1), " tokens)",
          no_retrieval       ? ", without retrieval"
          : random_retrieval ? ", random retrieval"
                             : "",
          "\n");
    report(result, chunks * config.chunk, seconds);
    return 0;
  });
}

}  // namespace gca
