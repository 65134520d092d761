// The command passkey: hides needles in a text, asks for them at its end, and counts the right answers.
#include <algorithm>
#include <chrono>
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
#include "commands/shared.h"
#include "commands/trial_reader.h"
#include "runtime/needles.h"
#include "runtime/run.h"
#include "runtime/stream.h"
#include "runtime/trials.h"

namespace gca {
namespace {

// ---- what the command line asks for -------------------------------------------------------------------------------
struct Options {
  ModelSource source;
  TaskSettings task;
  Ablation ablation;
  std::vector<int64_t> lengths = {4096}, trials = {100};
  int64_t others = 4, chains = 2, asks = 1, show = 0, seed = 1;
  Reading reading;
  bool far_only = false;
  std::string out;
};

Flags passkey_flags(Options& options) {
  Flags flags("passkey", "Hides needles in a text, asks for them at its end, and counts the right answers.");
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
  options.reading.add_to(flags);
  flags.add("seed", options.seed, 0, INT64_MAX, "of text, needles and places, and of --random-retrieval");
  return flags;
}

void check_lengths(const Options& options, int64_t S) {
  if (options.lengths.empty() || options.trials.empty())
    throw UsageError("--length and --trials: expected one number at least, found none");
  for (const int64_t length : options.lengths)
    if (length % S || length < 3 * S)
      throw UsageError(str("--length: expected a multiple of ", S,
                           ", the slots of a chunk, and three chunks at least, found ", length));
}

// What all trials share.
struct Trials {
  const Options& options;
  const SavedRun& saved;
  const Haystack& haystack;
  const Task& task;
  const Selection selection;

  const Config& config() const { return saved.settings.config; }
  int64_t chunks(int64_t length) const { return length / config().chunk; }
  int64_t reach() const {
    return (config().lower + config().upper()) * config().reach.window;
  }  // slots, of stacked windows
  int64_t others() const { return options.task.two_hop() ? options.chains - 1 : options.others; }
  // Out of the windows' reach, then within, where that is wanted.
  std::vector<Place> places(int64_t C) const {
    const int64_t far = task.far_chunks(C, reach()), question_chunk = C - 2 - options.task.gap;
    if (options.far_only) return {{C, 0, far, false}};
    return {{C, 0, far, false}, {C, far, question_chunk, true}};
  }
  int64_t fewest_places() const { return options.task.two_hop() ? 2 : 1; }  // chunks that hold a question's needles
  TaskRow row(int64_t number, int64_t C, bool near) const {
    return task.trial(static_cast<uint64_t>(options.seed), number, C, others(), reach(), near);
  }
};

// What trials have in common whose records may stand for each other, as a name: all that their outcomes depend on.
std::string run_name(const Trials& trials) {
  const Options& options = trials.options;
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

// Reads haystacks of equal length, numbers first_number and up; at: see TrialReader.
using Reader =
    std::function<Answers(const Haystacks& haystacks, int64_t first_number, const std::function<void(int64_t)>& at)>;

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
    const auto began = std::chrono::steady_clock::now();
    const Answers answers =
        read(rows, first, [&](int64_t slots) { progress.at((first - there) * T + here * std::min(slots, T)); });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
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

// ---- the table ----------------------------------------------------------------------------------------------------
void print_heading(const Trials& trials) {
  const Options& options = trials.options;
  print(options.task.task, options.ablation.remark(), ": ", trials.task.answer_length(), " tokens in an answer, ",
        trials.others(), " other ", options.task.two_hop() ? "chains" : "needles", "; text of ", trials.haystack.files,
        " files (", trials.haystack.left_out, " left out); windows reach ", trials.reach(), " slots\n");
  print(
      "    slots    tokens  chunks place trials   exact (95%)           forced   first     hit   chance  "
      "margin (5%)     weight  exact by depth, oldest  slots/s      memory     of host\n");
}

// The figures of one row of the table.
struct Figures {
  int64_t slots, tokens, chunks, haystacks, trials;
  ReaderBytes memory;
  double exact, low, high, forced, first, hit, chance, slots_per_second;
  double margin, margin_5, weight;  // of the needle: its margin's mean and 5% quantile, its mean weight
  double by_depth[Place::depths];   // of exact; not a number where there was no trial
};

double share(int64_t part, int64_t of) { return static_cast<double>(part) / static_cast<double>(of); }

Figures figures(const Trials& trials, const Place& place, const Score& score, const ReaderBytes& memory) {
  const Config& config = trials.config();
  const int64_t C = place.C, T = C * config.chunk,
                random = trials.options.ablation.random_retrieval ? config.reach.topk : 0;
  const auto [low, high] = score.exact_interval();
  Figures f{.slots = T,
            .tokens = C * (config.chunk - 1),
            .chunks = C,
            .haystacks = score.haystacks,
            .trials = score.trials,
            .memory = memory,
            .exact = share(score.exact, score.trials),
            .low = low,
            .high = high,
            .forced = share(score.tokens_right, score.tokens),
            .first = share(score.first, score.trials),
            .hit = share(score.hits, score.trials),
            .chance = trials.task.chance(C, random, config.groups.size()),
            .slots_per_second = static_cast<double>(score.slots) / score.seconds,
            .margin = score.margin(),
            .margin_5 = score.margin_quantile(0.05),
            .weight = score.weight / static_cast<double>(score.trials),
            .by_depth = {}};
  for (int i = 0; i < Place::depths; i++) f.by_depth[i] = share(score.depth_exact[i], score.depth_trials[i]);
  return f;
}

std::string percent(double share, size_t width, int digits = 1) {
  return right(fixed(100 * share, digits), width) + "% ";
}

std::string figure(double x) { return std::isnan(x) ? "-" : fixed(x, 2); }

void print_row(const Figures& f, const Place& place) {
  std::string by_depth;
  for (const double there : f.by_depth) by_depth += std::isnan(there) ? "    - " : percent(there, 4, 0);
  const std::string interval = str("(", fixed(100 * f.low, 1), "-", fixed(100 * f.high, 1), ")");
  print(right(f.slots, 9), " ", right(f.tokens, 9), " ", right(f.chunks, 7), " ", left(place.name(), 5), " ",
        right(f.trials, 6), " ", percent(f.exact, 6), left(interval, 14), " ", percent(f.forced, 6),
        percent(f.first, 6), percent(f.hit, 6), right(significant(100 * f.chance, 2), 7), "%  ",
        right(figure(f.margin), 6), " ", left("(" + figure(f.margin_5) + ")", 8), " ", right(fixed(f.weight, 3), 6),
        "  ", left(by_depth, 22), " ", right(fixed(f.slots_per_second, 0), 8), " ",
        right(mebibytes(f.memory.device), 11), " ", right(mebibytes(f.memory.host), 11), "\n");
  fflush(stdout);
}

Json json_of(const Figures& f, const Place& place, const Trials& trials) {
  Json line = Json::object();
  line["task"] = trials.options.task.task;
  line["retrieval"] = trials.options.ablation.name();
  line["place"] = place.name();
  line["slots"] = f.slots;
  line["tokens"] = f.tokens;
  line["chunks"] = f.chunks;
  line["haystacks"] = f.haystacks;
  line["trials"] = f.trials;
  line["exact"] = f.exact;
  line["exact_low"] = f.low;
  line["exact_high"] = f.high;
  line["teacher_forced"] = f.forced;
  line["first_right"] = f.first;
  line["hit"] = f.hit;
  line["margin"] = f.margin;
  line["margin_5"] = f.margin_5;
  line["needle_weight"] = f.weight;
  line["exact_by_depth"] = std::vector<double>(std::begin(f.by_depth), std::end(f.by_depth));
  line["slots_per_second"] = f.slots_per_second;
  line["memory_bytes"] = f.memory.device;
  line["host_memory_bytes"] = f.memory.host;
  line["chance"] = f.chance;
  line["checkpoint"] = trials.saved.checkpoint.folder;
  line["seed"] = trials.options.seed;
  return line;
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
    const Figures f = figures(trials, place, score_trials(trials, place, count, read, file), memory);
    print_row(f, place);
    if (!file.has_figures(length, place, count)) file.add_figures(json_of(f, place, trials));
  }
}

// ---- a trial in words ---------------------------------------------------------------------------------------------
std::string words(const std::vector<int32_t>& tokens, const Tokenizer& tokenizer) {
  std::string text;
  for (const int32_t token : tokens)
    if (token != tokenizer.landmark) text += tokenizer.printable(token);
  return text;
}
// Slots first .. last - 1 of a row.
std::string words(const TaskRow& row, int64_t first, int64_t last, const Tokenizer& tokenizer) {
  return words({row.tokens.begin() + first, row.tokens.begin() + last}, tokenizer);
}

void print_fetched(const TaskRow& row, const Answer& reading, int64_t S, const Tokenizer& tokenizer) {
  for (size_t g = 0; g < reading.fetched.size(); g++) {
    const FetchedFor& fetched = reading.fetched[g];
    print("fetched for it", reading.fetched.size() > 1 ? str(" by group ", g) : "", ", with weight:\n");
    for (size_t k = 0; k < fetched.pick.size(); k++)
      if (const int32_t pick = fetched.pick[k]; pick >= 0)
        print("  chunk ", right(pick, 5), "  ", fixed(fetched.w[k], 3), "  ",
              words(row, pick * S, (pick + 1) * S, tokenizer), "\n");
  }
}

// The question, what was fetched for its answer, and the answer as the model gives it when nobody helps: the row gets
// the model's own tokens in place of the right ones.
void show_trial(const Trials& trials, TaskRow row, const Reader& read) {
  const Tokenizer& tokenizer = trials.saved.tokenizer;
  const int64_t S = trials.config().chunk;
  const Question question = row.questions[0];
  const int64_t answer_slot = question.first_slot;
  print("\n", std::ssize(row.tokens) / S, " chunks; the needle is in chunk ", row.needles[question.needles[0]].chunk,
        ". The question ends chunk ", question.chunk, ", the answer is in chunk ", answer_slot / S, ":\n  ...",
        words(row, question.chunk * S, answer_slot, tokenizer), "|",
        words(row, answer_slot, answer_slot + 1, tokenizer), "\n");
  Answer reading;
  for (int64_t i = 0; i < std::ssize(question.answer); i++) {
    reading = read({{row}}, 0, [](int64_t) {})[0][0];
    row.tokens[answer_slot + i + 1] = reading.answer[i];
  }
  print_fetched(row, reading, S, tokenizer);
  const std::string answer = words(reading.answer, tokenizer), expected = words(question.answer, tokenizer);
  print("answer: ", answer, " (", answer == expected ? "right" : "expected " + expected, ")\n");
}

void show_trials(const Trials& trials, const Reader& read) {
  const int64_t C = trials.chunks(trials.options.lengths[0]);
  const bool near = trials.task.far_chunks(C, trials.reach()) < trials.fewest_places();
  for (int64_t i = 0; i < trials.options.show; i++) show_trial(trials, trials.row(i, C, near), read);
}

// ---- on a backend -------------------------------------------------------------------------------------------------
// A model for up to B rows of that length, and body(what reads with it, what it takes).
template <class Device, class Body>
void with_model(Device& device, const Trials& trials, int64_t B, int64_t length, Body body) {
  const bool split = trials.options.asks > 1;
  DRT model(device, trials.config(), Use::inference);
  const auto reader = open_reader(
      trials.saved, model,
      {.B = B, .chunks = trials.chunks(length), .segment_slots = trials.options.reading.batch_slots, .kept = split},
      trials.options.reading.memory, "a shorter --length");
  TrialReader<Device> trial_reader(model, *reader, trials.selection, trials.saved.tokenizer.landmark, split);
  const auto read = [&](const Haystacks& haystacks, int64_t first_number, const std::function<void(int64_t)>& at) {
    return trial_reader.read(haystacks, first_number, at);
  };
  body(read, reader->bytes());
}

template <class Device>
void run_trials(Device& device, const Trials& trials) {
  const Options& options = trials.options;
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
  Options options;
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
  const Selection selection = options.ablation.selection(options.seed);
  options.ablation.check(saved->settings.config);
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
