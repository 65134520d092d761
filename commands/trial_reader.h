// A model that reads the rows of trials: the haystack once, then its questions from there.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <span>
#include <vector>

#include "commands/device.h"
#include "runtime/needles.h"
#include "runtime/trials.h"

namespace gca {

// Haystacks of equal length, side by side, and the questions of each: rows that are the same up to the question's
// chunk.
using Haystacks = std::vector<std::vector<TaskRow>>;
using Answers = std::vector<std::vector<Answer>>;

template <class Device>
class TrialReader {
 public:
  // split: the rows are read up to the question's chunk, kept, and gone on with for each question; otherwise each is
  // read at once. With it, rows must have a place to keep.
  TrialReader(DRT<Device>& model, RowReader<Device>& rows, const Selection& selection, int32_t landmark, bool split)
      : model_(model), rows_(rows), selection_(selection), landmark_(landmark), split_(split) {}

  // In place of reading the slots before the question, and after it; where split.
  using Before = std::function<void(std::span<const int32_t> slots)>;
  Before load = nullptr, save = nullptr;

  // first_number: of the first haystack. at(slots): so many slots of each row are read.
  Answers read(const Haystacks& haystacks, int64_t first_number, const std::function<void(int64_t)>& at) {
    selection_.first_row = first_number;
    Answers answers;
    int64_t most = 0;
    for (const auto& questions : haystacks) {
      answers.emplace_back(questions.size());
      most = std::max<int64_t>(most, std::ssize(questions));
    }
    const int64_t first = split_ ? first_of_question(haystacks[0][0]) : 0, T = std::ssize(haystacks[0][0].tokens);
    rows_.rewind();
    if (split_) {
      const std::vector<int32_t> slots = side_by_side(haystacks, 0, 0, first);
      const auto read_on = [&](int64_t from, int64_t count) { at(from + count); };
      if (load) load(slots);
      else rows_.read(slots.data(), nullptr, first, first, selection_, read_on);
      if (save) save(slots);
      rows_.keep();
    }
    for (int64_t q = 0; q < most; q++) {
      if (q) rows_.back();
      ask(haystacks, q, first, answers, [&](int64_t read) { at(first + q * (T - first) + read); });
    }
    return answers;
  }

 private:
  int64_t first_of_question(const TaskRow& row) const { return row.questions[0].chunk * model_.config.chunk; }
  // Where a haystack has fewer questions, its last one again; where there are fewer haystacks than rows, the last one.
  static const TaskRow& row_of(const Haystacks& haystacks, int64_t b, int64_t q) {
    const auto& questions = haystacks[std::min(b, std::ssize(haystacks) - 1)];
    return questions[std::min(q, std::ssize(questions) - 1)];
  }
  std::vector<int32_t> side_by_side(const Haystacks& haystacks, int64_t q, int64_t first, int64_t last) const {
    std::vector<int32_t> slots;
    for (int64_t b = 0; b < rows_.state().B; b++) {
      const TaskRow& row = row_of(haystacks, b, q);
      slots.insert(slots.end(), row.tokens.begin() + first, row.tokens.begin() + last);
    }
    return slots;
  }
  // Question q of each haystack, from slot `from` of the rows on.
  template <class At>
  void ask(const Haystacks& haystacks, int64_t q, int64_t from, Answers& answers, At at) {
    const int64_t T = std::ssize(haystacks[0][0].tokens), S = model_.config.chunk, B = std::ssize(haystacks);
    const std::vector<int32_t> slots = side_by_side(haystacks, q, from, T);
    std::vector<std::vector<std::vector<double>>> scores(B);  // a row, a group
    const auto picked = [&](size_t g, int64_t first, int64_t count) {
      for (int64_t b = 0; b < B; b++)
        if (const int64_t c = row_of(haystacks, b, q).questions[0].first_slot / S - 1;
            c >= first / S && c < (first + count) / S && selection_.picking == Picking::learned)
          scores[b].push_back(retrieval_scores(model_, rows_.state(), g, b, c, first / S, count / S));
    };
    rows_.read(slots.data(), nullptr, T - from, T - from, selection_, picked, [&](int64_t first, int64_t count) {
      at(first + count - from);
      const std::vector<FetchedChunks> fetched = rows_.fetched();
      for (int64_t b = 0; b < B; b++) {
        if (q >= std::ssize(haystacks[b])) continue;
        const TaskRow& row = haystacks[b][q];
        const Question& question = row.questions[0];
        if (question.first_slot < first || question.first_slot >= first + count) continue;
        Answer& answer = answers[b][q];
        if (!scores[b].empty()) answer.margin = needle_margin(row, scores[b], model_.reach.topk);
        for (const FetchedChunks& of_group : fetched)
          answer.fetched.push_back(of_group.serving(b, (question.first_slot - first) / S));
        for (std::vector<float>& logits :
             logits_of_slots(model_, b * count + question.first_slot - first, std::ssize(question.answer))) {
          logits[landmark_] = -INFINITY;  // put in by the reader of a text, never an answer
          answer.answer.push_back(sample_token(logits, 0, 1, 0, 0));
        }
      }
    });
  }

  DRT<Device>& model_;
  RowReader<Device>& rows_;
  Selection selection_;
  int32_t landmark_;
  bool split_;
};

}  // namespace gca
