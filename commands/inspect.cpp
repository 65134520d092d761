// The command inspect: which chunks each chunk of a text fetches, in lines or as a page for a browser.
#include "base/files.h"
#include "base/text.h"
#include "commands/commands.h"
#include "commands/device.h"
#include "commands/inspect_page.h"
#include "commands/shared.h"
#include "dataloader.h"
#include "runtime/evaluate.h"
#include "runtime/memory_file.h"
#include "runtime/needles.h"
#include "runtime/run.h"
#include "runtime/stream.h"
#include "tokenizer/text_files.h"

namespace gca {
namespace {

// ---- what the command line asks for -------------------------------------------------------------------------------
struct Options {
  ModelSource source;
  Reading reading;
  Ablation ablation;
  std::string against = "none", text, haystack, page;
  int64_t chunks = 0, width = 60, seed = 1;
};

Flags inspect_flags(Options& options) {
  Flags flags("inspect",
              "For each chunk of a text: what it says, which chunks it fetches for the next one, and with what weight. "
              "With --html also what each token gains by that, as one page to explore in a browser.");
  options.source.add_to(flags);
  options.reading.add_to(flags);
  options.ablation.add_to(flags);
  flags.add("seed", options.seed, 0, INT64_MAX, "of random picks, and of needles");
  flags.add("text", options.text, "FILE", "the text; its last tokens that fill no chunk are left out");
  flags.add_patterns("haystack", options.haystack, "GLOB...",
                     "or a row of needles and questions in such text, as the model was trained on (train --task)");
  flags.add("chunks", options.chunks, 0, int64_t{1} << 34, "of --haystack; 0: as many as at the end of training");
  flags.add("columns", options.width, 10, 10000,
            "of each chunk's text to print: as a terminal counts, two of a wide character");
  flags.heading("a page for a browser, whole in one file (some 25 bytes a token; of a baseline too)");
  flags.add("html", options.page, "FILE", "write it, instead of the lines");
  flags.add_choice("against", options.against, "none|random|newest",
                   "the picks of a second reading: how much more each token loses with these is what retrieval gains");
  return flags;
}

void check(Options& options, Flags& flags) {
  flags.need("checkpoint");
  if (options.text.empty() == options.haystack.empty())
    throw UsageError(str("inspect needs --text FILE, or --haystack GLOB of a model that was trained on needles; found ",
                         options.text.empty() ? "none: give one" : "both: leave one out"));
  if (options.chunks && options.haystack.empty())
    throw UsageError(
        "--chunks: expected --haystack, whose row has so many; a --text is as long as it is: leave it out");
  options.ablation.settle(flags);
  if (options.page.empty() && flags.given("against"))
    throw UsageError("--against: expected --html, whose page shows the comparison; give it, or leave --against out");
  if (options.page.empty()) return;
  if (flags.given("columns"))
    throw UsageError("--columns: expected no --html, whose page wraps lines by itself; leave one of them out");
  if (options.against == options.ablation.picks)
    throw UsageError(str("--against ", options.against, ": expected other picks than --picks ", options.ablation.picks,
                         "; choose another of none, random, newest"));
  check_can_save_page(options.page);
}

// ---- the text -----------------------------------------------------------------------------------------------------
InspectedRow cut_into_chunks(const std::string& path, const Tokenizer& tokenizer, int64_t S) {
  const std::vector<int32_t> ids = tokenizer.encode(read_text(path));
  if (std::ssize(ids) < S - 1)
    throw Error(str("'", path, "': expected at least the ", S - 1, " tokens of one chunk, found ", ids.size(),
                    "; give a longer text"));
  InspectedRow row{path.substr(path.rfind('/') + 1), S, std::ssize(ids) / (S - 1), {}, {}};
  for (size_t i = 0; i < ids.size(); i++) {
    row.slots.push_back(ids[i]);
    row.targets.push_back(i + 1 < ids.size() ? ids[i + 1] : no_target);
    if (std::ssize(row.slots) % S != S - 1) continue;
    row.slots.push_back(tokenizer.landmark);
    row.targets.push_back(no_target);
  }
  return row;
}

InspectedRow needle_row(const Options& options, const SavedRun& saved) {
  const TrainSettings& s = saved.settings;
  if (!s.task.any())
    throw UsageError("--haystack: expected a model that was trained on needles (train --task), found '" +
                     saved.checkpoint.folder + "'; give --text");
  const Haystack haystack = Haystack::load(options.haystack, saved.tokenizer);
  const Task task(s.task, saved.tokenizer, haystack, s.config.chunk);
  const int64_t last = s.stages() - 1, C = options.chunks ? options.chunks : s.stage_chunks(last);
  if (C < task.fewest_chunks())
    throw UsageError(
        str("--chunks: expected at least ", task.fewest_chunks(), ", for needle, question and answer, found ", C));
  TaskRow row = task.training_row(options.seed, 0, C, s.of_stage(s.needles, last), s.of_stage(s.questions, last));
  return {"a row of needles", s.config.chunk, C, std::move(row.tokens), std::move(row.targets)};
}

// ---- lines --------------------------------------------------------------------------------------------------------
// What the chunks of a segment fetched, of which first is the first.
void print_fetched(const std::vector<std::string>& words, int64_t first, const std::vector<FetchedChunks>& fetched) {
  for (int64_t c = 0; c < fetched[0].table.C; c++) {
    print("chunk ", first + c, ": ", words[first + c], "\n");
    for (size_t g = 0; g < fetched.size(); g++)
      for (int64_t k = 0; k < fetched[g].table.K; k++) {
        const int64_t i = fetched[g].table.picked_by(0, c, k);
        if (const int32_t pick = fetched[g].pick[i]; pick >= 0)
          print("  group ", g, " fetches ", right(pick, 5), "  ", fixed(fetched[g].w[i], 3), "  ", words[pick], "\n");
      }
  }
  flush_output();
}

template <class Device>
void print_lines(RowReader<Device>& reader, const InspectedRow& row, const Tokenizer& tokenizer, int64_t width,
                 const Selection& selection) {
  std::vector<std::string> words;  // what each chunk says, on a line
  for (int64_t c = 0; c < row.chunks; c++)
    words.push_back(first_columns(tokenizer.words(row.slots, c * row.S, (c + 1) * row.S), width));
  reader.rewind();
  reader.read(row.slots.data(), nullptr, row.T(), row.T(), selection,
              [&](int64_t first, int64_t) { print_fetched(words, first / row.S, reader.fetched()); });
}

// ---- the page -----------------------------------------------------------------------------------------------------
// What a reading of the row came to: the loss of every slot, and what each chunk fetched.
template <class Device>
InspectedReading read_once(DRT<Device>& model, RowReader<Device>& reader, const InspectedRow& row,
                           const Ablation& picks, int64_t seed) {
  const size_t G = model.config.groups.size();
  InspectedReading result{model.config.groups.empty() ? "" : picks.name(), model.reach.topk, {}, {}};
  result.loss.resize(row.T());
  result.fetched.resize(G);
  reader.rewind();
  losses_of_rows(model, result.loss.data(), 1, row.T(), 0, [&](const auto& after) {
    const Selection selection = picks.selection(model.config, seed);
    reader.read(row.slots.data(), row.targets.data(), row.T(), row.T(), selection, [&](int64_t first, int64_t count) {
      after(first, count);
      const std::vector<FetchedChunks> fetched = reader.fetched();
      for (size_t g = 0; g < G; g++)
        for (int64_t i = fetched[g].table.picked_by(0, 0, 0); i < std::ssize(fetched[g].pick); i++)
          result.fetched[g].push_back({fetched[g].pick[i], static_cast<float>(fetched[g].w[i])});
    });
  });
  return result;
}

template <class Device>
void write_page(DRT<Device>& model, RowReader<Device>& reader, const InspectedRow& row, const Options& options,
                const SavedRun& saved) {
  std::vector<InspectedReading> readings = {read_once(model, reader, row, options.ablation, options.seed)};
  if (!model.config.groups.empty()) {
    Ablation against;
    against.picks = options.against;
    readings.push_back(read_once(model, reader, row, against, options.seed));
  }
  const InspectedLosses found = losses_of(row, readings);
  print(row.chunks, " chunks of ", row.S, " slots, loss ", fixed(found.mean[0], 4));
  if (found.mean.size() > 1) {
    const bool none = options.against == "none";
    print(" with ", readings[0].picks, " chunks, ", fixed(found.mean[1], 4), " with ",
          none ? "none" : options.against + " ones", "; chunk ", found.best,
          found.of_best < 0 ? " loses least by it: " : " gains most: ", fixed(found.of_best, 3), " nats");
  }
  save_inspect_page(options.page, row, readings, found, saved.checkpoint.folder, saved.tokenizer);
  print("\nwrote ", options.page, ": open it in a browser\n");
}

}  // namespace

int inspect_command(const std::vector<std::string>& arguments) {
  Options options;
  Flags flags = inspect_flags(options);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  check(options, flags);
  const SavedRun saved = SavedRun::open(options.source.checkpoint, options.source.fallback);
  const Config& config = saved.settings.config;
  options.ablation.check(config);
  if (config.groups.empty() && options.page.empty())
    throw Error("'" + saved.checkpoint.folder +
                "' is a sliding-window baseline: it fetches nothing; inspect a model with --groups, or its losses with "
                "--html FILE");
  if (config.groups.empty() && flags.given("against"))
    throw UsageError("--against: expected a model that retrieves, found a sliding-window baseline; leave it out");
  const InspectedRow row = options.haystack.empty() ? cut_into_chunks(options.text, saved.tokenizer, config.chunk)
                                                    : needle_row(options, saved);
  if (!options.page.empty()) check_fits_page(row);
  return with_device(options.source.device, options.source.precision, options.source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    const auto reader =
        open_reader(saved, model, {.chunks = row.chunks, .segment_slots = options.reading.batch_slots},
                    options.reading.memory, options.haystack.empty() ? "a shorter --text" : "fewer --chunks");
    if (!options.page.empty()) {
      write_page(model, *reader, row, options, saved);
      return 0;
    }
    print("checkpoint ", saved.checkpoint.folder, ", ", row.chunks, " chunks of ", config.chunk, " slots",
          options.ablation.remark(), "\n");
    print_lines(*reader, row, saved.tokenizer, options.width, options.ablation.selection(config, options.seed));
    return 0;
  });
}

}  // namespace gca
