// The command passkey: hides needles in a text, asks for them at its end, and counts the right answers.
#include <fcntl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>

#include "commands/commands.h"
#include "commands/shared.h"
#include "runtime/stream.h"

namespace gca {

namespace {

// The likeliest tokens at the answer's slots of row b of the last forward pass, the landmark left out.
template <class Device>
std::vector<int32_t> likeliest(DRT<Device>& model, int64_t first_row, int64_t count, int32_t landmark) {
  const int64_t V = model.table.padded_vocab;
  std::vector<typename DRT<Device>::act> logits(count * V);
  model.piece_of_logits(first_row, count);
  model.device.download(logits.data(), model.logits, count * V * static_cast<int64_t>(sizeof(logits[0])));
  std::vector<int32_t> best;
  for (int64_t i = 0; i < count; i++) {
    std::vector<float> row;
    for (int64_t j = 0; j < model.config.vocab; j++) row.push_back(static_cast<float>(logits[i * V + j]));
    row[landmark] = -INFINITY;
    best.push_back(sample_token(row, 0, 1, 0, 0));
  }
  return best;
}

// One trial in words: the question, what was fetched for its answer, and the answer as the model gives it when nobody
// helps.
template <class Device>
void show_trial(DRT<Device>& model, TaskRow row, int64_t C, const Selection& selection, const Tokenizer& tokenizer) {
  const int64_t S = model.config.chunk, K = model.config.topk;
  const Question& question = row.questions[0];
  auto says = [&](int64_t first, int64_t last) {
    std::string text;
    for (int64_t i = first; i < last; i++)
      if (row.tokens[i] != tokenizer.landmark) text += tokenizer.printable(row.tokens[i]);
    return text;
  };
  print("\n", C, " chunks; the needle is in chunk ", row.needles[question.needles[0]].chunk,
        ". The question ends chunk ", question.chunk, ", the answer is in chunk ", question.first_slot / S, ":\n  ...",
        says(question.chunk * S, question.first_slot), "|", says(question.first_slot, question.first_slot + 1), "\n");
  std::vector<int32_t> given;
  for (size_t i = 0; i < question.answer.size(); i++) {
    model.upload(row.tokens.data(), nullptr, nullptr, C * S);
    model.forward({1, C * S, selection});
    given = likeliest(model, question.first_slot, std::ssize(question.answer), tokenizer.landmark);
    row.tokens[static_cast<size_t>(question.first_slot) + i + 1] = given[i];
  }
  for (size_t g = 0; g < model.groups.size(); g++) {
    const FetchedChunks<Device> fetched(model, g, 1, C);
    print("fetched for it", model.groups.size() > 1 ? str(" by group ", g).c_str() : "", ", with weight:\n");
    for (int64_t k = 0; k < K; k++) {
      const size_t at = question.first_slot / S * K + k;
      if (fetched.pick[at] >= 0)
        print("  chunk ", right(fetched.pick[at], 5), "  ", fixed(static_cast<double>(fetched.w[at]), 3), "  ",
              says(fetched.pick[at] * S, (fetched.pick[at] + 1) * S), "\n");
    }
  }
  std::string answer, expected;
  for (const int32_t token : given) answer += tokenizer.printable(token);
  for (const int32_t token : question.answer) expected += tokenizer.printable(token);
  print("answer: ", answer, " (", answer == expected ? "right" : ("expected " + expected), ")\n");
}

// What the command line asks for, and what follows from it.
struct Asked {
  ModelSource source;
  TaskSettings task;
  std::unique_ptr<SavedRun> saved;
  std::vector<int64_t> lengths = {4096}, trials = {100};
  int64_t others = 4, chains = 2, show = 0, seed = 1, batch_slots = 16384;
  bool no_retrieval = false, random_retrieval = false, far_only = false;
  std::string out;
  Selection selection;

  const Config& config() const { return saved->settings.config; }
  int64_t reach() const {
    return (config().lower + config().upper()) * config().window;
  }  // slots, of the stacked windows
  int64_t hops() const { return task.two_hop() ? 2 : 1; }
  const char* retrieval() const { return no_retrieval ? "none" : random_retrieval ? "random" : "learned"; }
};

Flags passkey_flags(Asked& asked) {
  Flags flags("passkey", "Hides needles in a text, asks for them at its end, and counts the right answers.");
  asked.source.add_to(flags);
  flags.add_choice("task", asked.task.task, "single|two-hop",
                   "the needle's name leads to its value; or to a name that leads to it");
  add_task_flags(flags, asked.task, Flags::setup);
  flags.add("length", asked.lengths, 1, int64_t{1} << 40,
            "slots of a row, whole chunks; several lengths are tried in turn");
  flags.add("trials", asked.trials, 1, 1 << 30, "trials a length; the last number stays");
  flags.add("others", asked.others, 0, 1 << 20, "single: needles with other names in each row");
  flags.add("chains", asked.chains, 1, 1 << 20, "two-hop: chains in each row");
  add_ablations(flags, asked.no_retrieval, asked.random_retrieval);
  flags.add_switch("far-only", asked.far_only, "leave out the trials whose needle the stacked windows may reach");
  flags.add("show", asked.show, 0, 1 << 20, "trials of the first length to print in words");
  flags.add("out", asked.out, "FILE", "append the figures to it, a line of JSON a row of the table");
  flags.add("batch-slots", asked.batch_slots, 1, int64_t{1} << 40, "slots at once, in whole rows");
  flags.add("seed", asked.seed, 0, INT64_MAX, "of text, needles and places, and of --random-retrieval");
  return flags;
}

void check(Asked& asked, Flags& flags) {
  flags.need("checkpoint");
  flags.need("haystack");
  if (asked.lengths.empty() || asked.trials.empty())
    throw UsageError("--length and --trials: expected one number at least, found none");
  const int64_t S = asked.config().chunk;
  for (const int64_t length : asked.lengths)
    if (length % S || length < 3 * S)
      throw UsageError(str("--length: expected a multiple of ", S,
                           ", the slots of a chunk, and three chunks at least, found ", length));
  asked.selection = ablation(asked.no_retrieval, asked.random_retrieval, asked.seed);
  if (asked.task.two_hop()) asked.others = asked.chains - 1;
}

void print_heading(const Asked& asked, const Task& maker, const Haystack& haystack) {
  print(asked.task.task,
        asked.no_retrieval       ? ", without retrieval"
        : asked.random_retrieval ? ", random retrieval"
                                 : "",
        ": ", maker.answer_length(), " tokens in an answer, ", asked.others, " other ",
        asked.task.two_hop() ? "chains" : "needles", "; text of ", haystack.files, " files (", haystack.left_out,
        " left out); windows reach ", asked.reach(), " slots\n");
  print(right("slots", 9), " ", right("tokens", 9), " ", right("chunks", 7), " ", left("place", 5), " ",
        right("trials", 6), " ", right("exact", 7), " ", left("(95%)", 14), " ", right("forced", 7), " ",
        right("first", 7), " ", right("hit", 7), " ", right("chance", 8), "  ", left("exact by depth, oldest", 22), " ",
        right("slots/s", 8), " ", right("memory", 11), "\n");
}

// The rows of one length whose needles lie in chunks first .. end - 1.
struct Place {
  int64_t C, first, end;
  bool near;
  const char* name() const { return near ? "near" : "far"; }
  int64_t depth_of(int64_t chunk) const { return (chunk - first) * Score::depths / (end - first); }
};

// Trials done .. of a batch, scored in one forward pass. Greedy and right so far, the model reads what stands in the
// row already: the row's own answer gives free-running figures too.
template <class Device>
void score_batch(DRT<Device>& model, const Asked& asked, const std::vector<TaskRow>& rows, int64_t done,
                 const Place& place, Score& score) {
  const int64_t S = model.config.chunk, K = model.config.topk, C = place.C, T = C * S, B = std::ssize(rows);
  std::vector<int32_t> tokens;
  for (const TaskRow& row : rows) tokens.insert(tokens.end(), row.tokens.begin(), row.tokens.end());
  Selection drawn = asked.selection;
  drawn.first_row = done;
  model.upload(tokens.data(), nullptr, nullptr, B * T);
  model.forward({B, T, drawn});
  std::vector<FetchedChunks<Device>> fetched;
  for (size_t g = 0; g < model.groups.size(); g++) fetched.emplace_back(model, g, B, C);
  for (int64_t b = 0; b < B; b++) {
    const Question& question = rows[b].questions[0];
    const std::vector<int32_t> given =
        likeliest(model, b * T + question.first_slot, std::ssize(question.answer), asked.saved->tokenizer.landmark);
    const auto is_fetched = [&](int64_t needle) {
      const int64_t first = (b * (C + 1) + question.first_slot / S) * K;
      return std::any_of(fetched.begin(), fetched.end(), [&](const auto& f) {
        const auto begin = f.pick.begin() + first, end = begin + K;
        return std::find(begin, end, rows[b].needles[needle].chunk) != end;
      });
    };
    const bool hit = std::all_of(question.needles.begin(), question.needles.end(), is_fetched);
    score.add(given, question.answer, hit, place.depth_of(rows[b].needles[0].chunk));
  }
}

template <class Device>
Score score_trials(DRT<Device>& model, const Asked& asked, const Task& maker, const Place& place, int64_t count) {
  const int64_t B = std::max<int64_t>(1, asked.batch_slots / (place.C * model.config.chunk));
  Score score;
  for (int64_t done = 0; done < count; done += B) {
    std::vector<TaskRow> rows;
    for (int64_t i = done; i < std::min(done + B, count); i++)
      rows.push_back(
          maker.trial(static_cast<uint64_t>(asked.seed), i, place.C, asked.others, asked.reach(), place.near));
    const auto began = std::chrono::steady_clock::now();
    score_batch(model, asked, rows, done, place, score);
    score.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
  return score;
}

double share(int64_t part, int64_t of) { return static_cast<double>(part) / static_cast<double>(of); }
std::string percent(double share, size_t width, int digits = 1) {
  return right(fixed(100 * share, digits), width) + "% ";
}

// A row of the table, and its line of JSON where --out asks for one.
void report(const Asked& asked, const Place& place, const Score& score, double chance, int64_t memory_bytes) {
  const int64_t S = asked.config().chunk, C = place.C, T = C * S;
  const auto [low, high] = Score::interval(score.exact, score.trials);
  const double exact = share(score.exact, score.trials), forced = share(score.tokens_right, score.tokens),
               first = share(score.first, score.trials), hit = share(score.hits, score.trials),
               speed = static_cast<double>(score.trials * T) / score.seconds;
  std::string by_depth;
  Json depth_list = Json::array();
  for (int i = 0; i < Score::depths; i++) {
    const double there = share(score.depth_exact[i], score.depth_trials[i]);
    by_depth += score.depth_trials[i] ? percent(there, 4, 0) : "    - ";
    depth_list.push_back(there);
  }
  print(right(T, 9), " ", right(C * (S - 1), 9), " ", right(C, 7), " ", left(place.name(), 5), " ",
        right(score.trials, 6), " ", percent(exact, 6),
        left(str("(", fixed(100 * low, 1), "-", fixed(100 * high, 1), ")"), 14), " ", percent(forced, 6),
        percent(first, 6), percent(hit, 6), right(significant(100 * chance, 2), 7), "%  ", left(by_depth, 22), " ",
        right(fixed(speed, 0), 8), " ", right(mebibytes(memory_bytes), 11), "\n");
  fflush(stdout);
  if (asked.out.empty()) return;
  Json line = Json::object();
  line["task"] = asked.task.task;
  line["retrieval"] = asked.retrieval();
  line["place"] = place.name();
  line["slots"] = T;
  line["tokens"] = C * (S - 1);
  line["chunks"] = C;
  line["trials"] = score.trials;
  line["exact"] = exact;
  line["exact_low"] = low;
  line["exact_high"] = high;
  line["teacher_forced"] = forced;
  line["first_right"] = first;
  line["hit"] = hit;
  line["exact_by_depth"] = depth_list;
  line["slots_per_second"] = speed;
  line["memory_bytes"] = memory_bytes;
  line["chance"] = chance;
  line["checkpoint"] = asked.saved->checkpoint.folder;
  line["seed"] = asked.seed;
  append_line(asked.out, line.dump());
}

// All trials of one length: those out of the windows' reach, then those that lie within.
template <class Device>
void try_length(Device& device, const Asked& asked, const Task& maker, int64_t length, int64_t count) {
  const int64_t S = asked.config().chunk, C = length / S, B = std::max<int64_t>(1, asked.batch_slots / length);
  DRT<Device> model(device, asked.config(), Use::inference);
  allocate_or_explain(model, std::min(B, count), length);
  load_weights(asked.saved->checkpoint.file(SavedRun::model_file), model);
  const int64_t far = maker.far_chunks(C, asked.reach()), question = C - 2 - asked.task.gap;
  for (const Place& place : {Place{C, 0, far, false}, Place{C, far, question, true}}) {
    if (place.near && asked.far_only) continue;
    if (place.end - place.first < asked.hops()) {
      print(right(length, 9), " ", right(C * (S - 1), 9), " ", right(C, 8), "  ", left(place.name(), 5),
            " no chunk lies there\n");
      continue;
    }
    const Score score = score_trials(model, asked, maker, place, count);
    const double chance = maker.chance(C, asked.random_retrieval ? asked.config().topk : 0, model.groups.size());
    report(asked, place, score, chance, model.model_memory().total_bytes() + model.activation_memory().total_bytes());
  }
}

template <class Device>
void show_trials(Device& device, const Asked& asked, const Task& maker) {
  const int64_t length = asked.lengths[0], C = length / asked.config().chunk;
  DRT<Device> model(device, asked.config(), Use::inference);
  allocate_or_explain(model, 1, length);
  load_weights(asked.saved->checkpoint.file(SavedRun::model_file), model);
  const bool near = maker.far_chunks(C, asked.reach()) < asked.hops();
  for (int64_t i = 0; i < asked.show; i++)
    show_trial(model, maker.trial(static_cast<uint64_t>(asked.seed), i, C, asked.others, asked.reach(), near), C,
               asked.selection, asked.saved->tokenizer);
}

}  // namespace

int passkey_command(const std::vector<std::string>& arguments) {
  Asked asked;
  if (const std::string checkpoint = Flags::peek(arguments, "checkpoint"); !checkpoint.empty()) {
    const bool fallback = std::find(arguments.begin(), arguments.end(), "--fallback") != arguments.end();
    asked.saved = std::make_unique<SavedRun>(SavedRun::open(checkpoint, fallback));
    asked.task = asked.saved->settings.task;  // its run's task is where the settings start from
  }
  if (!asked.task.two_hop()) asked.task.task = "single";
  Flags flags = passkey_flags(asked);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  check(asked, flags);
  const Haystack haystack = Haystack::load(asked.task.haystack, asked.saved->tokenizer);
  const Task maker(asked.task, asked.saved->tokenizer, haystack, asked.config().chunk);
  maker.check_names(asked.others + 1);
  print_heading(asked, maker, haystack);
  return with_device(asked.source.device, asked.source.precision, asked.source.threads, [&](auto& device) {
    for (size_t i = 0; i < asked.lengths.size(); i++)
      try_length(device, asked, maker, asked.lengths[i], asked.trials[std::min(i, asked.trials.size() - 1)]);
    if (asked.show) show_trials(device, asked, maker);
    return 0;
  });
}

}  // namespace gca
