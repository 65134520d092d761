// The rows of a training step, from shards or with needles, and what of them a checkpoint remembers.
#include "runtime/rows.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/threads.h"
#include "dataloader.h"

namespace gca {

namespace {

void lay_out(StepRows& out, int64_t rows, int64_t chunks, int64_t S) {
  out.rows = rows;
  out.chunks = chunks;
  out.slots = chunks * S;
  out.tokens.resize(rows * out.slots);
  out.targets.resize(rows * out.slots);
}

void count_targets(StepRows& out) {
  out.targets_in_all = std::count_if(out.targets.begin(), out.targets.end(), [](int32_t t) { return t >= 0; });
}

// ---- rows of token shards -----------------------------------------------------------------------------------------
class ShardRows : public RowMaker {
 public:
  ShardRows(const TrainSettings& s, const Tokenizer& tokenizer)
      : s_(s),
        stream_(s.data, tokenizer),
        rows_(stream_, tokenizer, s.chunks, s.config.chunk, static_cast<uint64_t>(s.seed), !s.no_cross) {
    for (const std::string& note : {stream_.notes(), rows_.notes()})
      if (!note.empty()) print(note, "\n");
  }
  int64_t chunks() const override { return s_.chunks; }
  int64_t rows(int64_t rows) const override { return rows; }
  void make(StepRows& out, int64_t step) override {
    lay_out(out, s_.batch, s_.chunks, s_.config.chunk);
    for (int64_t row = 0; row < out.rows; row++)
      rows_.fill_row(step * s_.batch + row, &out.tokens[row * out.slots], &out.targets[row * out.slots]);
    count_targets(out);
  }
  std::pair<const char*, std::string> description() const override {
    const int64_t S = s_.config.chunk;
    return {"data", str(stream_.tokens(), " tokens, ", rows_.count(), " rows of ", s_.chunks * S, " slots (",
                        s_.chunks * (S - 1), " tokens); this run reads ",
                        fixed(static_cast<double>(s_.steps * s_.batch) / static_cast<double>(rows_.count()), 2),
                        " times as many")};
  }
  void save(Json& state) const override { state["data"] = stream_.state(); }
  void resume(const JsonField& state) override { stream_.check_same(state.at("data")); }

 private:
  const TrainSettings& s_;
  TokenStream stream_;
  Rows rows_;
};

// ---- rows with needles, stage by stage of a curriculum ------------------------------------------------------------
class NeedleRows : public RowMaker {
 public:
  NeedleRows(const TrainSettings& s, const Tokenizer& tokenizer)
      : s_(s),
        haystack_(Haystack::load(s.task.haystack, tokenizer)),
        task_(s.task, tokenizer, haystack_, s.config.chunk),
        pool_(static_cast<int>(s.threads)) {
    if (!haystack_.notes.empty()) print(haystack_.notes, "\n");
    for (int64_t stage = 0; stage < s_.stages(); stage++) {
      task_.check_names(s_.of_stage(s_.needles, stage));
      if (s_.stage_chunks(stage) < task_.fewest_chunks())
        throw UsageError(str("--", s_.curriculum.empty() ? "chunks" : "curriculum", ": expected at least ",
                             task_.fewest_chunks(), " chunks, for needle, question and answer, found ",
                             s_.stage_chunks(stage)));
    }
  }
  int64_t chunks() const override { return s_.stage_chunks(stage_); }
  int64_t rows(int64_t rows) const override { return s_.stage_rows(rows, stage_); }
  void make(StepRows& out, int64_t step) override {
    lay_out(out, rows(s_.batch), chunks(), s_.config.chunk);
    slots_of_row_.resize(out.rows);
    // A row takes about a millisecond, so many threads make them: a GPU waits for its rows.
    pool_.run(out.rows, [&](int64_t row, int) { fill_row(out, step * s_.batch + row, row); });
    answer_slots_.clear();
    landmark_slots_.clear();
    for (const AskedSlots& of_row : slots_of_row_) {
      answer_slots_.insert(answer_slots_.end(), of_row.answers.begin(), of_row.answers.end());
      landmark_slots_.insert(landmark_slots_.end(), of_row.landmarks.begin(), of_row.landmarks.end());
    }
    count_targets(out);
    out.weights.assign(out.tokens.size(), 1);
    const double N = static_cast<double>(out.targets_in_all), answers = static_cast<double>(answer_slots_.size());
    const auto weight = static_cast<float>(1 + s_.answer_weight * N / answers);
    for (const auto* slots : {&answer_slots_, &landmark_slots_})
      for (const int64_t slot : *slots) out.weights[slot] = weight;
  }

  bool wants_losses() const override { return true; }
  // How many answer tokens had more than half of the probability, and were therefore the likeliest; and whether that
  // ends a stage.
  bool learn_from(const StepRows& rows, const std::vector<float>& losses, RowRange own, const AddUp& add_up,
                  int64_t step, StepFigures& out) override {
    double sums[3] = {};  // answer tokens that were right; losses of all; landmarks that were right
    const auto is_right = [](double loss) { return loss < std::log(2.0); };
    const auto for_own = [&](const std::vector<int64_t>& slots, auto&& body) {
      for (const int64_t slot : slots)
        if (slot >= own.begin * rows.slots && slot < own.end * rows.slots) body(static_cast<double>(losses[slot]));
    };
    for_own(answer_slots_, [&](double loss) {
      sums[0] += is_right(loss);
      sums[1] += loss;
    });
    for_own(landmark_slots_, [&](double loss) { sums[2] += is_right(loss); });
    add_up(sums, 3);
    const double count = static_cast<double>(std::max<size_t>(1, answer_slots_.size()));
    const double rate = sums[0] / count, sum = sums[1];
    out.words =
        str("  ", rows.chunks, " chunks, answers ", fixed(rate * 100, 0), "% (loss ", fixed(sum / count, 3), ")");
    out.fields["chunks"] = rows.chunks;
    out.fields["answers_right"] = rate;
    out.fields["answer_loss"] = sum / count;
    if (s_.landmark_answers) {
      const double share = sums[2] / static_cast<double>(std::max<size_t>(1, landmark_slots_.size()));
      out.words += str(", landmarks ", fixed(share * 100, 0), "%");
      out.fields["landmarks_right"] = share;
    }
    return promoted(rate, step);
  }

  std::pair<const char*, std::string> description() const override {
    return {"task", str(s_.task.task, ", in ", haystack_.tokens.size(), " tokens of ", haystack_.files, " files (",
                        haystack_.left_out, " left out); rows of ",
                        s_.curriculum.empty() ? str(s_.chunks) : comma_list(s_.curriculum), " chunks, ",
                        comma_list(s_.needles), " needles, ", comma_list(s_.questions), " questions at most")};
  }
  void save(Json& state) const override {
    state["data"] = haystack_.state();
    state["stage"] = stage_;
    state["answer_rates"] = answer_rates_;
  }
  void resume(const JsonField& state) override {
    haystack_.check_same(state.at("data"));
    stage_ = state.at("stage").integer(0, s_.stages() - 1);
    const JsonField rates = state.at("answer_rates");
    for (const Json& rate : rates.items()) answer_rates_.push_back(JsonField(rate, "answer_rates").number());
  }

 private:
  // A row's slots whose targets are (of) answers, counted from the step's first slot.
  struct AskedSlots {
    std::vector<int64_t> answers, landmarks;  // landmarks: see --landmark-answers
  };
  // Row `number` of the training, to the step's row `place`.
  void fill_row(StepRows& out, int64_t number, int64_t place) {
    const TaskRow row =
        task_.training_row(static_cast<uint64_t>(s_.seed), number, out.chunks, s_.of_stage(s_.needles, stage_),
                           s_.task.task == "single" ? 1 : s_.of_stage(s_.questions, stage_));
    const int64_t at = place * out.slots;
    std::copy(row.tokens.begin(), row.tokens.end(), out.tokens.begin() + at);
    std::copy(row.targets.begin(), row.targets.end(), out.targets.begin() + at);
    AskedSlots& asked = slots_of_row_[place];
    asked = {};
    for (const Question& question : row.questions) {
      for (int64_t i = 0; i < std::ssize(question.answer); i++) asked.answers.push_back(at + question.first_slot + i);
      if (!s_.landmark_answers) continue;
      asked.landmarks.push_back(at + question.first_slot - 1);
      out.targets[asked.landmarks.back()] = question.answer[0];
    }
  }
  // Whether the last 20 steps of this stage were right often enough for the next one.
  bool promoted(double rate, int64_t step) {
    constexpr size_t steps = 20;
    answer_rates_.push_back(rate);
    if (answer_rates_.size() > steps) answer_rates_.erase(answer_rates_.begin());
    if (answer_rates_.size() < steps || stage_ + 1 >= s_.stages()) return false;
    if (std::accumulate(answer_rates_.begin(), answer_rates_.end(), 0.0) < s_.promote * static_cast<double>(steps))
      return false;
    stage_++;
    answer_rates_.clear();
    print("step ", step + 1, ": ", fixed(s_.promote * 100, 0), "% of the answers are right; on to rows of ", chunks(),
          " chunks\n");
    return true;
  }

  const TrainSettings& s_;
  Haystack haystack_;
  Task task_;
  ThreadPool pool_;
  int64_t stage_ = 0;                                   // of the curriculum
  std::vector<double> answer_rates_;                    // the share of right answers in this stage's last steps
  std::vector<int64_t> answer_slots_, landmark_slots_;  // in the step's rows
  std::vector<AskedSlots> slots_of_row_;
};

}  // namespace

std::unique_ptr<RowMaker> row_maker(const TrainSettings& settings, const Tokenizer& tokenizer) {
  if (settings.task.any()) return std::make_unique<NeedleRows>(settings, tokenizer);
  return std::make_unique<ShardRows>(settings, tokenizer);
}

}  // namespace gca
