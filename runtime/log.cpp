// A training's lines on the terminal, and log.jsonl.
#include "runtime/log.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>

#include "base/files.h"
#include "base/text.h"

namespace gca {

void RunLog::line(const char* name, const std::string& value) const { print(left(name, 12), " ", value, "\n"); }

void RunLog::model(int64_t parameters, const Tokenizer& tokenizer) const {
  const Config& c = s_.config;
  line("model", str("D=", c.width, " H=", c.heads, " F=", c.ffn, ", ", c.lower, " lower + (", comma_list(c.groups),
                    ") upper layers, encoder ", c.encoder, ", S=", c.chunk, " K=", c.reach.topk, " W=", c.reach.window,
                    ", V=", c.vocab));
  line("parameters", str(parameters));
  line("tokenizer", tokenizer.description());
}

void RunLog::schedule(int64_t rows, int64_t rows_at_once, int64_t from_step) const {
  line("steps", str(s_.steps, " of ", rows, " rows (", rows_at_once, " at once), from step ", from_step));
  line("rate", str(s_.lr, " after ", s_.warmup_steps(), " steps, then a cosine to ", s_.final_rate()));
}

namespace {

// What of a log stays, line by line in the order of the file, where the run goes on after last_step.
class StayingLines {
 public:
  explicit StayingLines(int64_t last_step) : last_step_(last_step) {}
  bool stays(const std::string& line) {
    try {
      const Json json = parse_json(line, "log.jsonl");
      if (!json.find("step")) return true;  // somebody's own
      const JsonField field(json, "log.jsonl");
      const int64_t step = field.at("step").integer();
      int64_t& told = field.has("val_loss") ? validated_ : stepped_;
      if (step > last_step_ || step <= told) return false;
      told = step;
      return true;
    } catch (const Error&) {
      return false;  // cut off
    }
  }

 private:
  const int64_t last_step_;
  int64_t stepped_ = -1, validated_ = -1;
};

// Calls take(line, stays) for each line; the last one, where it has no end, is no line.
void read_log(const std::string& path, int64_t last_step,
              const std::function<void(const std::string& line, bool stays)>& take) {
  errno = 0;
  std::ifstream log(path);
  StayingLines lines(last_step);
  for (std::string line; std::getline(log, line);) take(line, !log.eof() && lines.stays(line));
  if (!log.eof()) throw system_error("cannot read '" + path + "'", errno);
}

}  // namespace

void RunLog::go_back_to(int64_t step) {
  if (!writes_) return;
  try {
    if (look_at(path()).kind != Found::file) return;
    int64_t left_out = 0;
    read_log(path(), step, [&](const std::string&, bool stays) { left_out += !stays; });
    if (left_out == 0) return;
    AtomicFile file(path());
    read_log(path(), step, [&](std::string line, bool stays) {
      line += '\n';
      if (stays) file.write(line.data(), line.size());
    });
    file.commit();
    this->line("log", str("goes back to step ", step, ": ", left_out, " lines after it, or cut off, are left out"));
  } catch (const Error& error) {
    print_error(error.what(), "; it keeps what it has of later steps, which will stand twice in it\n");
  }
}

void RunLog::step(const StepReport& report, const StepState& state, const StepFigures& more) {
  const int64_t number = report.step + 1;
  const double slots = static_cast<double>(report.slots), S = static_cast<double>(s_.config.chunk);
  const double tokens = slots / S * (S - 1), rate = s_.learning_rate(report.step);
  Reach reach = s_.config.reach;
  reach.window = s_.window_at(report.step);
  const double used = 3 * forward_flops_per_slot(s_.config, reach) * slots / report.seconds / report.peak_flops;
  const std::string of_ranks = state.broken == 0   ? ""
                               : state.broken == 1 ? str(", the loss of rank ", static_cast<int>(state.broken_rank))
                                                   : str(", the losses of ", static_cast<int>(state.broken), " ranks");
  if (due(number, s_.print_every) || (s_.print_every && number == s_.steps) || state.skip)
    print("step ", number, "/", s_.steps, "  loss ", fixed(state.loss, 4), "  norm ", fixed(state.grad_norm, 3),
          "  lr ", scientific(rate, 2), "  ", fixed(report.seconds * 1e3, 0), " ms  ",
          fixed(tokens / report.seconds, 0), " tokens/s  MFU ", fixed(used * 100, 0), "%  ETA ",
          duration(report.mean_seconds * static_cast<double>(s_.steps - number)), more.words,
          state.skip ? str("  SKIPPED: not finite", of_ranks, " (", state.skipped_in_a_row, " in a row)") : "", "\n");
  try_flush_output();  // that nobody reads must not end the training
  Json line = Json::object();
  line["step"] = number;
  line["loss"] = state.loss;
  line["plain_loss"] = state.plain_loss;
  line["grad_norm"] = state.grad_norm;
  line["lr"] = rate;
  line["ms"] = report.seconds * 1e3;
  line["tokens_per_second"] = tokens / report.seconds;
  line.add(more.fields);
  if (state.skip) line["skipped"] = true;
  append(std::move(line));
}

void RunLog::validation(int64_t step, double loss, int64_t rows) {
  print("validation after step ", step, ": loss ", fixed(loss, 4), ", perplexity ", fixed(std::exp(loss), 2), " (",
        rows, " rows)\n");
  try_flush_output();
  Json line = Json::object();
  line["step"] = step;
  line["val_loss"] = loss;
  append(std::move(line));
}

// Every line has its time: seconds since 1970, to the millisecond. A disk that is full must not end the training: what
// could not be written waits until it can be.
void RunLog::append(Json line) {
  if (!writes_) return;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  line["time"] = static_cast<double>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count()) / 1e3;
  waiting_ += (waiting_.empty() ? "" : "\n") + line.dump();
  try {
    append_line(path(), waiting_);
    waiting_.clear();
  } catch (const Error& error) {
    if (!told_)
      print_error(error.what(), "; training goes on, and its lines wait: free some space or mend the folder\n");
    told_ = true;  // once
  }
}

bool RunLog::whole() {
  if (!waiting_.empty())
    print_error("'", path(), "' lacks the last ", std::count(waiting_.begin(), waiting_.end(), '\n') + 1,
                " lines, which could not be written; checkpoints are not concerned\n");
  const bool printed = try_flush_output() || output_error == EPIPE || output_error == EIO || output_error == EBADF;
  if (!printed)
    print_error("cannot write standard output: ", strerror(output_error),
                "; some of what was printed is lost, log.jsonl has every step\n");
  return waiting_.empty() && printed;
}

}  // namespace gca
