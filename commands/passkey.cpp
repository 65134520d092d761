// The command passkey: hides needles in a text, asks for them at its end, and counts the right answers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>

#include "base/files.h"
#include "base/json.h"
#include "base/progress.h"
#include "base/text.h"
#include "commands/commands.h"
#include "commands/device.h"
#include "commands/passkey.h"
#include "commands/trial_reader.h"
#include "runtime/memory_file.h"
#include "runtime/needles.h"
#include "runtime/run.h"
#include "runtime/stream.h"
#include "runtime/trials.h"

namespace gca {
namespace {

// ---- what the command line asks for -------------------------------------------------------------------------------
Flags passkey_flags(PasskeyOptions& options) {
  Flags flags(
      "passkey",
      "Hides needles in a text, asks for them at its end, and counts the right answers. Its table: exact, whole "
      "answers right, given freely; forced, their tokens that are right behind right ones; first, their first "
      "tokens; hit, trials whose needles were fetched for the answer's chunk (with a gap a name may have come "
      "before, and not count); chance, of exact; margin, the needle's score less that of the best chunk not "
      "fetched; weight, the needle's.");
  options.source.add_to(flags);
  flags.add_choice("task", options.task.task, "single|two-hop",
                   "the needle's name leads to its value; or to a name that leads to it");
  add_task_flags(flags, options.task, Flags::setup);
  flags.add("length", options.lengths, 1, int64_t{1} << 40,
            "slots of a row, whole chunks; several lengths are tried in turn");
  flags.add("trials", options.trials, 1, 1 << 30, "haystacks a length; the last number stays");
  flags.add("others", options.others, 0, 1 << 20, "single: needles with other names in each row");
  flags.add("chains", options.chains, 1, 1 << 20, "two-hop: chains in each row");
  flags.add(
      "asks", options.asks, 1, 1 << 20,
      "questions of each haystack, which is read once: other needles asked in the same place, at most all that lie "
      "as far. Each is a trial; the interval counts as many as are independent, by a cluster-robust standard error");
  options.ablation.add_to(flags);
  flags.add_switch("far-only", options.far_only, "leave out the trials whose needle the stacked windows may reach");
  flags.add("show", options.show, 0, 1 << 20, "trials of the first length to print in words");
  flags.add(
      "out", options.out, "FILE",
      "append to it, in lines of JSON, each haystack's trials as they are done, and the figures of each row of the "
      "table; the same command goes on after the trials that it finds there");
  flags.add("save-memory", options.save_memory, "FILE",
            "once the text before the question is read, write what the question and its answer read of it: one "
            "--length, --trials 1, --far-only");
  flags.add("load-memory", options.load_memory, "FILE",
            "take the memory that was saved of that text, instead of reading it; the same flags");
  options.reading.add_to(flags);
  flags.add("seed", options.seed, 0, INT64_MAX, "of text, needles and places, and of --picks random");
  return flags;
}

void check_lengths(const PasskeyOptions& options, int64_t S) {
  if (options.lengths.empty() || options.trials.empty())
    throw UsageError("--length and --trials: expected one number at least, found none");
  for (const int64_t length : options.lengths)
    if (length % S || length < 3 * S)
      throw UsageError(str("--length: expected a multiple of ", S,
                           ", the slots of a chunk, and three chunks at least, found ", length));
}

// A file holds the memory of one row.
void check_memory(const PasskeyOptions& options) {
  if (!options.one_memory()) return;
  check_can_save(options.save_memory);
  const char* flag = options.save_memory.empty() ? "--load-memory" : "--save-memory";
  if (options.lengths.size() != 1 || options.trials != std::vector<int64_t>{1} || !options.far_only || options.show)
    throw UsageError(str(flag,
                         ": a file holds the memory of one text: expected one --length, --trials 1 and --far-only, "
                         "without --show"));
  if (!options.out.empty())
    throw UsageError(
        str(flag, " and --out exclude each other: trials that --out finds are not read again; leave one out"));
}

// What trials have in common whose records may stand for each other, as a name: all that their outcomes depend on.
std::string run_name(const Trials& trials) {
  const PasskeyOptions& options = trials.options;
  const TaskSettings& task = options.task;
  Json all = Json::object();
  for (const std::string& word : {task.task, task.style, task.values, std::string(options.ablation.name()),
                                  options.source.precision, trials.haystack.state().dump()})
    all["words"].push_back(word);
  for (const int64_t number :
       {task.value_tokens, task.name_tokens, task.gap, trials.others(), options.asks, options.seed,
        trials.config().reach.topk, trials.config().reach.window, static_cast<int64_t>(trials.saved.weights_crc())})
    all["numbers"].push_back(number);
  const std::string text = all.dump();
  return hex(crc32c(text.data(), text.size()), 8);
}

// What would stop a later length, said before the first is tried.
void check_trials(const Trials& trials) {
  trials.task.check_names(trials.others() + 1);
  for (const int64_t length : trials.options.lengths) {
    const int64_t C = trials.chunks(length);
    if (C < trials.task.fewest_chunks())
      throw UsageError(str("--length: expected at least ", trials.task.fewest_chunks(),
                           " chunks, for needle, question and answer, found ", length, " slots, which are ", C));
    for (const Place& place : trials.places(C))
      if (place.end - place.first >= trials.fewest_places())
        trials.task.check_trial(C, trials.others(), trials.reach(), place.near);
  }
  if (!trials.options.out.empty()) check_can_append(trials.options.out);
}

// ---- trials of one length, scored ---------------------------------------------------------------------------------
// `count` haystacks: those that the file has already, then the others, read B at a time.
Score score_trials(const Trials& trials, const Place& place, int64_t count, const Reader& read, TrialFile& file) {
  const int64_t S = trials.config().chunk, T = place.C * S, question = place.C - 2 - trials.options.task.gap,
                B = std::max<int64_t>(1, trials.options.reading.batch_slots / T), asks = trials.options.asks,
                asked = asks > 1 ? T - question * S : 0;  // slots that each question after the first takes
  Score score;
  for (const TrialRecord& record : file.found(T, place, count)) score.add(record);
  const int64_t there = score.haystacks;
  if (there)
    print_error("'", file.path(), "' has ", there, " of ", count, " haystacks of ", T, " slots, ", place.name(),
                there < count ? ": going on after them\n" : "\n");
  Progress progress("passkey", (count - there) * T, "M slots", 1e6);
  for (int64_t first = there; first < count; first += B) {
    Haystacks rows;
    for (int64_t i = first; i < std::min(first + B, count); i++)
      rows.push_back(trials.task.questions_of(trials.row(i, place.C, place.near), asks, trials.reach(), place.near));
    const int64_t here = std::ssize(rows);
    const Stopwatch clock;
    const Answers answers =
        read(rows, first, [&](int64_t slots) { progress.at((first - there) * T + here * std::min(slots, T)); });
    const double seconds = clock.seconds();
    for (int64_t b = 0; b < here; b++) {
      const int64_t questions = std::ssize(rows[b]);
      TrialRecord record{first + b, T + (questions - 1) * asked, seconds / static_cast<double>(here), {}};
      for (int64_t q = 0; q < questions; q++) record.questions.push_back(outcome_of(rows[b][q], answers[b][q], place));
      file.add(T, place, record);
      score.add(record);
    }
  }
  return score;
}

// `count` trials whose needles lie out of the windows' reach, then as many whose needles lie within.
void try_length(const Trials& trials, int64_t length, int64_t count, const ReaderBytes& memory, const Reader& read,
                TrialFile& file) {
  const int64_t C = trials.chunks(length);
  for (const Place& place : trials.places(C)) {
    if (place.end - place.first < trials.fewest_places()) {
      print(right(length, 9), " ", right(C * (trials.config().chunk - 1), 9), " ", right(C, 8), "  ",
            left(place.name(), 5), " no chunk lies there\n");
      continue;
    }
    const Json figures = print_row(trials, place, score_trials(trials, place, count, read, file), memory);
    if (!file.has_figures(length, place, count)) file.add_figures(figures);
  }
}

// ---- on a backend -------------------------------------------------------------------------------------------------
// A model for up to B rows of that length, and body(what reads with it, what it takes).
template <class Device, class Body>
void with_model(Device& device, const Trials& trials, int64_t B, int64_t length, Body body) {
  const bool split = trials.options.asks > 1 || trials.options.one_memory();
  DRT model(device, trials.config(), Use::inference);
  const auto reader = open_reader(
      trials.saved, model,
      {.B = B, .chunks = trials.chunks(length), .segment_slots = trials.options.reading.batch_slots, .kept = split},
      trials.options.reading.memory, "a shorter --length");
  TrialReader<Device> trial_reader(model, *reader, trials.selection, trials.saved.tokenizer.landmark, split);
  const MemoryFields fields = memory_fields(model, trials.saved.weights_crc(), trials.options.ablation.name());
  if (!trials.options.load_memory.empty())
    trial_reader.load = [&](std::span<const int32_t> slots) {
      const MemoryFile file(trials.options.load_memory, fields);
      file.check_text(slots);
      load_memory(file, model, *reader);
    };
  if (!trials.options.save_memory.empty())
    trial_reader.save = [&](std::span<const int32_t> slots) {
      save_memory(trials.options.save_memory, fields, text_name(slots), model, *reader);
    };
  std::vector<double> readings;
  const auto read = [&](const Haystacks& haystacks, int64_t first_number, const std::function<void(int64_t)>& at) {
    const Stopwatch clock;
    Answers answers = trial_reader.read(haystacks, first_number, at);
    readings.push_back(clock.seconds());
    return answers;
  };
  body(read, reader->bytes());
  print_host_memory(*reader, readings);
}

template <class Device>
void run_trials(Device& device, const Trials& trials) {
  const PasskeyOptions& options = trials.options;
  TrialFile file(options.out, run_name(trials));
  if (file.damaged())
    print_error("'", options.out, "': ", file.damaged(),
                " lines are cut off or damaged, as of a process that was killed: they are left out\n");
  for (size_t l = 0; l < options.lengths.size(); l++) {
    const int64_t length = options.lengths[l], count = options.trials[std::min(l, options.trials.size() - 1)],
                  B = std::min(count, std::max<int64_t>(1, options.reading.batch_slots / length));
    with_model(device, trials, B, length, [&](const Reader& read, const ReaderBytes& memory) {
      try_length(trials, length, count, memory, read, file);
    });
  }
  if (options.show)
    with_model(device, trials, 1, options.lengths[0],
               [&](const Reader& read, const ReaderBytes&) { show_trials(trials, read); });
}

}  // namespace

int passkey_command(const std::vector<std::string>& arguments) {
  PasskeyOptions options;
  std::unique_ptr<SavedRun> saved;
  if (const std::string checkpoint = Flags::peek(arguments, "checkpoint"); !checkpoint.empty()) {
    const bool fallback = std::find(arguments.begin(), arguments.end(), "--fallback") != arguments.end();
    saved = std::make_unique<SavedRun>(SavedRun::open(checkpoint, fallback));
    options.task = saved->settings.task;  // its run's task is where the settings start from
  }
  if (!options.task.two_hop()) options.task.task = "single";
  Flags flags = passkey_flags(options);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("haystack");
  const int64_t S = saved->settings.config.chunk;
  check_lengths(options, S);
  options.ablation.settle(flags);
  options.ablation.check(saved->settings.config);
  const Selection selection = options.ablation.selection(saved->settings.config, options.seed);
  check_memory(options);
  const Haystack haystack = Haystack::load(options.task.haystack, saved->tokenizer);
  const Task task(options.task, saved->tokenizer, haystack, S);
  const Trials trials{options, *saved, haystack, task, selection};
  check_trials(trials);
  print_heading(trials);
  return with_device(options.source.device, options.source.precision, options.source.threads, [&](auto& device) {
    run_trials(device, trials);
    return 0;
  });
}

}  // namespace gca
