// Needles: tasks whose answer stands once, in one chunk of a long text. Here they are made: the text, the needles in
// it, the questions, from (seed, number of the row) alone.
//
// A chunk fetches with the landmark of the chunk before it. So a prompt's last token is slot 0 of a chunk and predicts
// the answer's first token; all before it ends at slot S-2 of the chunk before (or `gap` chunks further back), whose
// landmark has then seen the question.
//
//   single, recall   [KEY name v1..vn END] somewhere, prompt [ASK name | name], answer v1..vn      ( | is the chunk's
//   end) two-hop          [KEY A ARROW B END] and [KEY B ARROW C END], prompt [ASK A | ARROW], answer B COMMA C
//
// Single rows have one question, at their end; recall rows many. In the text style, words stand for KEY, END, ASK,
// ARROW and COMMA.
#pragma once
#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "base/flags.h"
#include "dataloader.h"

namespace gca {

// ---- settings -----------------------------------------------------------------------------------------------------
struct TaskSettings {
  std::string task = "none", haystack, style = "ids", values = "letters";
  int64_t value_tokens = 5, name_tokens = 1, gap = 0;
  bool any() const { return task != "none"; }
  bool two_hop() const { return task == "two-hop"; }
};

// What train and passkey share.
void add_task_flags(Flags& flags, TaskSettings& s, Flags::Role role);

// ---- random choices -----------------------------------------------------------------------------------------------
// The random numbers of one row, in the order they are asked for.
class Draws {
 public:
  enum Purpose : uint32_t { training, trial };
  Draws(uint64_t seed, Purpose purpose, int64_t number);
  // Uniform over [0, n), n < 2^32, to within n / 2^32.
  int64_t below(int64_t n);
  // count different ones of [first, last), in random order; all where there are no more.
  std::vector<int64_t> choose(int64_t first, int64_t last, int64_t count);

 private:
  uint64_t seed_;
  uint32_t purpose_;
  uint64_t number_;
  uint32_t drawn_ = 0;
  Philox words_{};
};

// ---- the haystack -------------------------------------------------------------------------------------------------
// Text files as tokens, end-of-text before each. A file that holds words of the text style is left out.
struct Haystack {
  std::vector<int32_t> tokens;
  int64_t files = 0, left_out = 0;
  std::string notes;  // what else was left out, as text_files says it

  static constexpr const char* words[] = {"|The passkey of", "|After "};
  static Haystack load(const std::string& patterns, const Tokenizer& tokenizer);

  // What a checkpoint keeps of it, and an Error if this is not the text whose state() was saved.
  Json state() const;
  void check_same(const JsonField& saved) const;
};

// ---- rows ---------------------------------------------------------------------------------------------------------
struct Question {
  int64_t chunk, first_slot;  // the question's chunk; slot 0 of the answer's: slots first_slot + i predict answer[i]
  std::vector<int32_t> answer;
  std::vector<int64_t> needles;  // which of the row's needles hold it: one, or two for two hops
};
struct Needle {
  int64_t chunk, first, length;  // first: its place in the chunk
  std::vector<int32_t> name, value;
};
struct TaskRow {
  std::vector<int32_t> tokens, targets;  // (C*S), as a row of text has them: landmarks at slots S-1
  std::vector<Needle> needles;           // one a chunk at most
  std::vector<Question> questions;       // in order
};

class Task {
 public:
  // haystack and tokenizer must outlive this. A UsageError where chunks of S slots are too small for the task.
  Task(const TaskSettings& settings, const Tokenizer& tokenizer, const Haystack& haystack, int64_t S);

  int64_t fewest_chunks() const { return (two_hop_ ? 4 : 3) + s_.gap; }  // needles, then a question, then its answer
  int64_t needle_length() const;
  int64_t question_length() const;  // less its last token
  int64_t answer_length() const { return two_hop_ ? 2 * s_.value_tokens + std::ssize(comma_) : s_.value_tokens; }
  // A UsageError where these needles (two-hop: chains) of a row cannot all have names with first and last tokens of
  // their own.
  void check_names(int64_t needles) const;
  // How often an answer is right by luck in rows of C chunks: by guessing, or because `random` chunks that each group
  // fetches hold the needles.
  double chance(int64_t C, int64_t random, size_t groups) const;

  // Row `number` of a training: C chunks, about as many needles (two-hop: chains) and questions, each needle asked for
  // once at most; less where there is no room. A question comes after its needle's chunk.
  TaskRow training_row(uint64_t seed, int64_t number, int64_t C, int64_t needles, int64_t questions) const;

  // A UsageError where C chunks are too few for such a trial.
  void check_trial(int64_t C, int64_t others, int64_t reach, bool near) const;
  // Trial `number`: one question at the row's end, whose needle lies further back than `reach` slots (near: not so far)
  // with `others` more needles (two-hop: chains) anywhere before the question.
  TaskRow trial(uint64_t seed, int64_t number, int64_t C, int64_t others, int64_t reach, bool near) const;
  // That row, and the same with others of its needles (two-hop: chains) asked in its question's place, `asks` rows at
  // most: those that lie as far as the trial's own, in their order. The rows differ from the question's chunk on.
  std::vector<TaskRow> questions_of(const TaskRow& trial, int64_t asks, int64_t reach, bool near) const;
  // How many chunks, from the row's first on, lie wholly further back than `reach` slots from the answer.
  int64_t far_chunks(int64_t C, int64_t reach) const;

 private:
  using Text = std::vector<int32_t>;  // a row's real tokens, C*(S-1)+1

  // Text first; then plan(draws, row, text) says which needles and questions, and they are written. Anew where an
  // answer turns out to stand in the row elsewhere.
  template <class Plan>
  TaskRow make(Draws draws, int64_t C, Plan plan) const {
    for (int attempt = 0; attempt < attempts; attempt++) {
      const int64_t real = C * (S_ - 1) + 1, size = std::ssize(haystack_.tokens), from = draws.below(size);
      Text text(real);
      for (int64_t i = 0; i < real; i++) text[i] = haystack_.tokens[(from + i) % size];
      TaskRow row;
      plan(draws, row, text);
      write(draws, row, text, C);
      if (!unique(row, text)) continue;
      lay(row, text, C);
      return row;
    }
    throw too_short();
  }
  static constexpr int attempts = 1000;
  UsageError too_short() const;

  void place_needles(Draws& draws, TaskRow& row, std::span<const int64_t> chunks, const Text& text) const;
  void ask(TaskRow& row, int64_t chunk, int64_t first) const;

  void write(Draws& draws, TaskRow& row, Text& text, int64_t C) const;
  static void put(Text& text, int64_t& at, const Text& tokens);
  void write_question(const TaskRow& row, const Question& question, Text& text) const;
  void lay(TaskRow& row, const Text& text, int64_t C) const;

  bool unique(const TaskRow& row, const Text& text) const;

  Text different(Draws& draws, const Text& alphabet, int64_t count) const;
  static bool share(const Text& a, const Text& b);
  bool stands_in(const Text& value, const Text& text) const;

  TaskSettings s_;
  bool two_hop_;
  const Tokenizer& tokenizer_;
  const Haystack& haystack_;
  int64_t S_, name_tokens_ = 1;
  Text open_, middle_, close_, ask_, comma_, names_, values_;
};

}  // namespace gca
