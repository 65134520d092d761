// What trials of the command passkey came to: a table, its lines of JSON, and single trials in words.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "base/files.h"
#include "base/json.h"
#include "base/text.h"
#include "commands/passkey.h"

namespace gca {
namespace {

// ---- the table ----------------------------------------------------------------------------------------------------
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
                random = trials.options.ablation.picks == "random" ? config.reach.topk : 0;
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

void print_figures(const Figures& f, const Place& place) {
  std::string by_depth;
  for (const double there : f.by_depth) by_depth += std::isnan(there) ? "    - " : percent(there, 4, 0);
  const std::string interval = str("(", fixed(100 * f.low, 1), "-", fixed(100 * f.high, 1), ")");
  print(right(f.slots, 9), " ", right(f.tokens, 9), " ", right(f.chunks, 7), " ", left(place.name(), 5), " ",
        right(f.trials, 6), " ", percent(f.exact, 6), left(interval, 14), " ", percent(f.forced, 6),
        percent(f.first, 6), percent(f.hit, 6), right(significant(100 * f.chance, 2), 7), "%  ",
        right(figure(f.margin), 6), " ", left("(" + figure(f.margin_5) + ")", 8), " ", right(fixed(f.weight, 3), 6),
        "  ", left(by_depth, 22), " ", right(fixed(f.slots_per_second, 0), 8), " ",
        right(mebibytes(f.memory.device), 11), " ", right(mebibytes(f.memory.host), 11), "\n");
  flush_output();
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

// ---- a trial in words ---------------------------------------------------------------------------------------------
std::string words(const std::vector<int32_t>& tokens, const Tokenizer& tokenizer) {
  return tokenizer.words(tokens, 0, tokens.size());
}

void print_fetched(const TaskRow& row, const Answer& reading, int64_t S, const Tokenizer& tokenizer) {
  for (size_t g = 0; g < reading.fetched.size(); g++) {
    const FetchedFor& fetched = reading.fetched[g];
    print("fetched for it", reading.fetched.size() > 1 ? str(" by group ", g) : "", ", with weight:\n");
    for (size_t k = 0; k < fetched.pick.size(); k++)
      if (const int32_t pick = fetched.pick[k]; pick >= 0)
        print("  chunk ", right(pick, 5), "  ", fixed(fetched.w[k], 3), "  ",
              tokenizer.words(row.tokens, pick * S, (pick + 1) * S), "\n");
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
        tokenizer.words(row.tokens, question.chunk * S, answer_slot), "|",
        tokenizer.words(row.tokens, answer_slot, answer_slot + 1), "\n");
  Answer reading;
  for (int64_t i = 0; i < std::ssize(question.answer); i++) {
    reading = read({{row}}, 0, [](int64_t) {})[0][0];
    row.tokens[answer_slot + i + 1] = reading.answer[i];
  }
  print_fetched(row, reading, S, tokenizer);
  const std::string answer = words(reading.answer, tokenizer), expected = words(question.answer, tokenizer);
  print("answer: ", answer, " (", reading.answer == question.answer ? "right" : "expected " + expected, ")\n");
  flush_output();
}

}  // namespace

void print_heading(const Trials& trials) {
  const PasskeyOptions& options = trials.options;
  if (!trials.haystack.notes.empty()) print(trials.haystack.notes, "\n");
  print(options.task.task, options.ablation.remark(), ": ", trials.task.answer_length(), " tokens in an answer, ",
        trials.others(), " other ", options.task.two_hop() ? "chains" : "needles", "; text of ", trials.haystack.files,
        " files (", trials.haystack.left_out, " left out); windows reach ", trials.reach(), " slots\n");
  print(
      "    slots    tokens  chunks place trials   exact (95%)           forced   first     hit   chance  "
      "margin (5%)     weight  exact by depth, oldest  slots/s      memory     of host\n");
}

Json print_row(const Trials& trials, const Place& place, const Score& score, const ReaderBytes& memory) {
  const Figures f = figures(trials, place, score, memory);
  print_figures(f, place);
  return json_of(f, place, trials);
}

void show_trials(const Trials& trials, const Reader& read) {
  const int64_t C = trials.chunks(trials.options.lengths[0]);
  const bool near = trials.task.far_chunks(C, trials.reach()) < trials.fewest_places();
  for (int64_t i = 0; i < trials.options.show; i++) show_trial(trials, trials.row(i, C, near), read);
}

}  // namespace gca
