// Needles in a haystack: the text, the rows that hold and ask them, chance, and the score of answers.
#include "runtime/needles.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/flags.h"
#include "dataloader.h"
#include "ops.h"
#include "tokenizer/text_files.h"

namespace gca {

// ---- settings -----------------------------------------------------------------------------------------------------
void add_task_flags(Flags& flags, TaskSettings& s, Flags::Role role) {
  flags.add_patterns(
      "haystack", s.haystack, "GLOB,...",
      "text that needles are hidden in: files, folders or patterns; files with the task's own words are left out",
      role == Flags::run ? Flags::remembered : role);
  flags.add_choice("style", s.style, "ids|text", "of needles and questions: special ids, or words", role);
  flags.add_choice("values", s.values, "letters|random", "what names and values are made of: letters, or any tokens",
                   role);
  flags.add("value-tokens", s.value_tokens, 1, 4096, "tokens of a value (two-hop: of A, B and C)", role);
  flags.add("name-tokens", s.name_tokens, 1, 4096, "tokens of a name (two-hop: as a value)", role);
  flags.add("gap", s.gap, 0, 1 << 20, "chunks of text between a question's chunk and its answer's", role);
}

// ---- random choices -----------------------------------------------------------------------------------------------
Draws::Draws(uint64_t seed, Purpose purpose, int64_t number)
    : seed_(seed), purpose_(purpose), number_(static_cast<uint64_t>(number)) {}

int64_t Draws::below(int64_t n) {
  if (drawn_ % 4 == 0)
    words_ = philox(seed_, Draw::task, drawn_ / 4, purpose_, static_cast<uint32_t>(number_),
                    static_cast<uint32_t>(number_ >> 32));
  return static_cast<int64_t>(static_cast<uint64_t>(words_.word[drawn_++ % 4]) * static_cast<uint64_t>(n) >> 32);
}

std::vector<int64_t> Draws::choose(int64_t first, int64_t last, int64_t count) {
  std::vector<int64_t> all(std::max<int64_t>(0, last - first));
  std::iota(all.begin(), all.end(), first);
  count = std::min(count, static_cast<int64_t>(all.size()));
  for (int64_t i = 0; i < count; i++) std::swap(all[i], all[i + below(static_cast<int64_t>(all.size()) - i)]);
  all.resize(count);
  return all;
}

// ---- the haystack -------------------------------------------------------------------------------------------------
Haystack Haystack::load(const std::string& patterns, const Tokenizer& tokenizer) {
  Haystack haystack;
  std::vector<std::string> paths;
  for (size_t at = 0, comma; at <= patterns.size(); at = comma + 1) {
    comma = std::min(patterns.find(',', at), patterns.size());
    for (std::string& path : glob_files(patterns.substr(at, comma - at))) paths.push_back(std::move(path));
  }
  const TextFiles found = text_files(paths);
  haystack.notes = found.left_out;
  for (const TextFile& file : found.files) {
    const std::string text = read_file(file.path, size_t{1} << 40);
    const bool clean = std::none_of(std::begin(words), std::end(words),
                                    [&](const char* word) { return text.find(word) != text.npos; });
    (clean ? haystack.files : haystack.left_out)++;
    if (!clean) continue;
    haystack.tokens.push_back(tokenizer.end_of_text);
    const std::vector<int32_t> ids = tokenizer.encode(text);
    haystack.tokens.insert(haystack.tokens.end(), ids.begin(), ids.end());
  }
  if (haystack.tokens.size() <= static_cast<size_t>(haystack.files))
    throw Error("--haystack '" + patterns + "': expected some text, found " +
                (haystack.left_out        ? "only files that hold the words of needles themselves (\"The passkey of\")"
                 : haystack.notes.empty() ? "only empty files"
                                          : haystack.notes) +
                "; give other files");
  return haystack;
}

Json Haystack::state() const {
  Json state = Json::object();
  state["tokens"] = tokens.size();
  state["crc32c"] = crc32c(tokens.data(), tokens.size() * sizeof(tokens[0]));
  return state;
}

void Haystack::check_same(const JsonField& saved) const {
  if (state() != saved.json())
    throw Error(saved.where() + ": the haystack has changed: expected " + saved.json().dump() + ", found " +
                state().dump() + "; resume with the same text, or start a new run from the weights with --init");
}

// ---- rows ---------------------------------------------------------------------------------------------------------
Task::Task(const TaskSettings& settings, const Tokenizer& tokenizer, const Haystack& haystack, int64_t S)
    : s_(settings), two_hop_(settings.two_hop()), tokenizer_(tokenizer), haystack_(haystack), S_(S) {
  const bool ids = s_.style == "ids";
  auto word = [&](int32_t id, const char* text) { return ids ? std::vector<int32_t>{id} : tokenizer.encode(text); };
  open_ = word(tokenizer.KEY, two_hop_ ? "|After " : "|The passkey of ");
  close_ = word(tokenizer.END, "|");
  ask_ = word(tokenizer.ASK, two_hop_ ? "|After " : "|The passkey of ");
  comma_ = word(tokenizer.COMMA, ", ");
  if (two_hop_) middle_ = word(tokenizer.ARROW, " comes ");
  else if (!ids) middle_ = tokenizer.encode(" is: ");
  const bool letters = s_.values == "letters";
  for (int32_t id = 0; id < tokenizer.vocab_size(); id++) {
    const std::string_view bytes = tokenizer.bytes_of(id);
    const bool upper = bytes.size() == 1 && bytes[0] >= 'A' && bytes[0] <= 'Z',
               lower = bytes.size() == 1 && bytes[0] >= 'a' && bytes[0] <= 'z';
    if (letters ? upper || (two_hop_ && lower) : !bytes.empty()) names_.push_back(id);
    if (letters ? lower || (two_hop_ && upper) : !bytes.empty()) values_.push_back(id);
  }
  name_tokens_ = two_hop_ ? s_.value_tokens : s_.name_tokens;
  const int64_t most = static_cast<int64_t>(values_.size()) / 2;
  if (s_.value_tokens > most)
    throw UsageError(str("--value-tokens: expected at most ", most, ", half of the different tokens that --values ",
                         s_.values, " has, found ", s_.value_tokens));
  const int64_t room = S - 1, longest = std::max({needle_length(), question_length(), 1 + answer_length()});
  if (longest > room)
    throw UsageError(str("--chunk: a needle takes ", needle_length(), " tokens, a question ", question_length(),
                         " before its chunk's end, the answer's chunk ", 1 + answer_length(), ": expected at least ",
                         longest + 1, " slots a chunk, found ", S,
                         "; use fewer --value-tokens, or a model of larger chunks"));
}

int64_t Task::needle_length() const {
  return std::ssize(open_) + name_tokens_ + std::ssize(middle_) + s_.value_tokens + std::ssize(close_);
}

int64_t Task::question_length() const {
  return std::ssize(ask_) + name_tokens_ + std::max<int64_t>(0, std::ssize(middle_) - 1);
}

void Task::check_names(int64_t needles) const {
  const int64_t most = (two_hop_ ? std::ssize(names_) / 3 : std::ssize(names_));
  if (needles > most)
    throw UsageError(str("--values ", s_.values, " has names for ", most, " ", two_hop_ ? "chains" : "needles",
                         " in a row, expected ", needles, "; use fewer, or --values random"));
}

double Task::chance(int64_t C, int64_t random, size_t groups) const {
  double guess = 1;
  for (int64_t i = 0; i < s_.value_tokens * (two_hop_ ? 2 : 1); i++)
    guess /= static_cast<double>(std::ssize(values_) - i % s_.value_tokens);
  // The answer's chunk C-1 is served by what chunk C-2 picked, wherever the question stands.
  const double missed = 1 - std::min(1.0, static_cast<double>(random) / static_cast<double>(candidates(C - 2)));
  return guess + (1 - guess) * std::pow(1 - std::pow(missed, static_cast<double>(groups)), two_hop_ ? 2 : 1);
}

TaskRow Task::training_row(uint64_t seed, int64_t number, int64_t C, int64_t needles, int64_t questions) const {
  return make(Draws(seed, Draws::training, number), C, [&](Draws& draws, TaskRow& row, const Text& text) {
    const int64_t last = C - 1 - s_.gap, hops = two_hop_ ? 2 : 1;  // one past the last chunk that may ask
    const std::vector<int64_t> places = draws.choose(0, last - 1, needles * hops);
    place_needles(draws, row,
                  std::span(places).first(places.size() / static_cast<size_t>(hops) * static_cast<size_t>(hops)), text);
    std::vector<int64_t> at = draws.choose(1, last, questions);
    std::sort(at.begin(), at.end());
    std::vector<char> asked(row.needles.size());
    std::vector<int64_t> taken(C);  // tokens of each chunk, for a needle and an answer
    for (const Needle& needle : row.needles) taken[needle.chunk] += needle.length;
    for (const int64_t chunk : at) {
      int64_t& head = taken[chunk + 1 + s_.gap];
      if (taken[chunk] + question_length() > S_ - 1 || head + 1 + answer_length() > S_ - 1) continue;
      std::vector<int64_t> known;  // first needles of what may be asked here
      for (int64_t i = 0; i < std::ssize(row.needles); i += hops)
        if (!asked[i] && std::max(row.needles[i].chunk, row.needles[i + hops - 1].chunk) < chunk) known.push_back(i);
      if (known.empty()) continue;
      const int64_t needle = known[draws.below(std::ssize(known))];
      asked[needle] = 1;
      head += 1 + answer_length();  // tails need no count: only earlier questions have their answers here
      ask(row, chunk, needle);
    }
  });
}

void Task::check_trial(int64_t C, int64_t others, int64_t reach, bool near) const {
  const int64_t question = C - 2 - s_.gap, hops = two_hop_ ? 2 : 1, far = far_chunks(C, reach), begin = near ? far : 0,
                end = near ? question : far;
  if (end - begin < hops || question < (others + 1) * hops)
    throw UsageError(str("a row of ", C, " chunks has ", question, " before the question, ", end - begin, " of them ",
                         near ? "near" : "out of the windows' reach", ": expected room for ", (others + 1) * hops,
                         " needles and ", hops, " of these; use a longer --length or fewer needles"));
}

TaskRow Task::trial(uint64_t seed, int64_t number, int64_t C, int64_t others, int64_t reach, bool near) const {
  check_trial(C, others, reach, near);
  const int64_t question = C - 2 - s_.gap, hops = two_hop_ ? 2 : 1, far = far_chunks(C, reach), begin = near ? far : 0,
                end = near ? question : far;
  return make(Draws(seed, Draws::trial, number), C, [&](Draws& draws, TaskRow& row, const Text& text) {
    std::vector<int64_t> places = draws.choose(begin, end, hops);
    for (const int64_t place : draws.choose(0, question, (others + 1) * hops))
      if (std::ssize(places) < (others + 1) * hops &&
          std::find(places.begin(), places.begin() + hops, place) == places.begin() + hops)
        places.push_back(place);
    place_needles(draws, row, places, text);
    ask(row, question, 0);
  });
}

std::vector<TaskRow> Task::questions_of(const TaskRow& trial, int64_t asks, int64_t reach, bool near) const {
  const int64_t C = std::ssize(trial.tokens) / S_, hops = two_hop_ ? 2 : 1, far = far_chunks(C, reach);
  std::vector<TaskRow> rows = {trial};
  if (asks == 1) return rows;
  Text text;  // its real tokens
  for (int64_t i = 0; i < C * S_; i++)
    if (i % S_ < S_ - 1) text.push_back(trial.tokens[i]);
  text.push_back(trial.targets[C * S_ - 2]);
  for (int64_t first = hops; first < std::ssize(trial.needles) && std::ssize(rows) < asks; first += hops) {
    const auto lies_there = [&](const Needle& needle) { return (needle.chunk >= far) == near; };
    if (!std::all_of(&trial.needles[first], &trial.needles[first] + hops, lies_there)) continue;
    TaskRow row{{}, {}, trial.needles, {}};
    ask(row, trial.questions[0].chunk, first);
    write_question(row, row.questions[0], text);
    if (!unique(row, text)) continue;  // by accident the new question or answer makes a value once more
    lay(row, text, C);
    rows.push_back(std::move(row));
  }
  return rows;
}

int64_t Task::far_chunks(int64_t C, int64_t reach) const {
  return std::clamp<int64_t>(((C - 1) * S_ - reach) / S_, 0, C - 2 - s_.gap);
}

UsageError Task::too_short() const {
  return UsageError(str("--value-tokens: found no values of ", s_.value_tokens,
                        " tokens that the text does not hold already; expected more tokens, or --values random"));
}

// Names and values for a needle in each of these chunks; for two hops, pairs of them.
void Task::place_needles(Draws& draws, TaskRow& row, std::span<const int64_t> chunks, const Text& text) const {
  std::vector<Text> names;  // so far: their first and last tokens are all different
  auto name = [&](const Text& before) {
    for (;;) {
      const Text found = different(draws, names_, name_tokens_);
      const bool known = std::any_of(names.begin(), names.end(), [&](const Text& other) {
        return other.front() == found.front() || other.back() == found.back();
      });
      if (known || share(found, before) || (two_hop_ && stands_in(found, text))) continue;
      names.push_back(found);
      return found;
    }
  };
  for (size_t i = 0; i < chunks.size(); i++) {
    Needle needle{chunks[i], 0, needle_length(), {}, {}};
    needle.name = two_hop_ && i % 2 ? row.needles.back().value : name({});
    if (two_hop_) {
      needle.value = name(needle.name);
    } else {
      int attempt = 0;
      do {
        if (attempt++ == attempts) throw too_short();
        needle.value = different(draws, values_, s_.value_tokens);
      } while (share(needle.value, needle.name) || stands_in(needle.value, text));
    }
    row.needles.push_back(std::move(needle));
  }
}

// A question in this chunk for what needle `first` holds, or, for two hops, what it leads to.
void Task::ask(TaskRow& row, int64_t chunk, int64_t first) const {
  Question question{chunk, (chunk + 1 + s_.gap) * S_, row.needles[first].value, {first}};
  if (two_hop_) {
    const Text& second = row.needles[first + 1].value;
    question.answer.insert(question.answer.end(), comma_.begin(), comma_.end());
    question.answer.insert(question.answer.end(), second.begin(), second.end());
    question.needles.push_back(first + 1);
  }
  row.questions.push_back(std::move(question));
}

void Task::put(Text& text, int64_t& at, const Text& tokens) {
  std::copy(tokens.begin(), tokens.end(), text.begin() + at);
  at += std::ssize(tokens);
}

// The question before its chunk's end, and its answer.
void Task::write_question(const TaskRow& row, const Question& question, Text& text) const {
  const Text& name = row.needles[question.needles[0]].name;
  int64_t at = (question.chunk + 1) * (S_ - 1) - question_length(), answer_at = question.first_slot / S_ * (S_ - 1);
  put(text, at, ask_);
  put(text, at, name);
  if (middle_.size() > 1) put(text, at, Text(middle_.begin(), middle_.end() - 1));
  put(text, answer_at, {middle_.empty() ? name.back() : middle_.back()});
  put(text, answer_at, question.answer);
}

// Questions and answers to their places; needles anywhere in what is free of their chunks.
void Task::write(Draws& draws, TaskRow& row, Text& text, int64_t C) const {
  std::vector<int64_t> head(C), tail(head.size());
  for (const Question& question : row.questions) {
    tail[question.chunk] = question_length();
    head[question.first_slot / S_] = 1 + answer_length();
    write_question(row, question, text);
  }
  for (Needle& needle : row.needles) {
    const size_t chunk = needle.chunk;
    needle.first = head[chunk] + draws.below(S_ - head[chunk] - tail[chunk] - needle.length);
    int64_t at = needle.chunk * (S_ - 1) + needle.first;
    put(text, at, open_);
    put(text, at, needle.name);
    put(text, at, middle_);
    put(text, at, needle.value);
    put(text, at, close_);
  }
}

// The text as the row's tokens and targets.
void Task::lay(TaskRow& row, const Text& text, int64_t C) const {
  row.tokens.resize(C * S_);
  row.targets.resize(row.tokens.size());
  std::copy(text.begin(), text.end(), row.tokens.begin());
  spread_chunks(row.tokens.data(), row.targets.data(), std::ssize(text), C, S_, tokenizer_.landmark);
}

// Whether every value stands where it was put and nowhere else. One token stands anywhere by chance: then nothing is
// asked.
bool Task::unique(const TaskRow& row, const Text& text) const {
  if (s_.value_tokens == 1) return true;
  for (size_t i = 0; i < row.needles.size(); i++) {
    const Text& value = row.needles[i].value;
    int64_t expected = 1 + (two_hop_ && i % 2 == 0), found = 0;
    for (const Question& question : row.questions)
      expected += std::count(question.needles.begin(), question.needles.end(), static_cast<int64_t>(i));
    for (auto at = text.begin(); (at = std::search(at, text.end(), value.begin(), value.end())) != text.end(); at++)
      found++;
    if (found != expected) return false;
  }
  return true;
}

Task::Text Task::different(Draws& draws, const Text& alphabet, int64_t count) const {
  Text found;
  while (std::ssize(found) < count) {
    const int32_t token = alphabet[draws.below(std::ssize(alphabet))];
    if (std::find(found.begin(), found.end(), token) == found.end()) found.push_back(token);
  }
  return found;
}

bool Task::share(const Text& a, const Text& b) {
  return std::find_first_of(a.begin(), a.end(), b.begin(), b.end()) != a.end();
}

bool Task::stands_in(const Text& value, const Text& text) const {
  return s_.value_tokens > 1 && std::search(text.begin(), text.end(), value.begin(), value.end()) != text.end();
}

}  // namespace gca
