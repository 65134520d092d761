// A training's lines on the terminal, and log.jsonl.
#include "runtime/log.h"

#include <cmath>
#include <cstdio>

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

void RunLog::step(const StepReport& report, const StepState& state, const StepFigures& more) {
  const int64_t number = report.step + 1;
  const double slots = static_cast<double>(report.slots), S = static_cast<double>(s_.config.chunk);
  const double tokens = slots / S * (S - 1), rate = s_.learning_rate(report.step);
  const double used =
      3 * forward_flops_per_slot(s_.config, s_.config.reach) * slots / report.seconds / report.peak_flops;
  const std::string of_ranks = state.broken == 0   ? ""
                               : state.broken == 1 ? str(", the loss of rank ", static_cast<int>(state.broken_rank))
                                                   : str(", the losses of ", static_cast<int>(state.broken), " ranks");
  if (number % s_.print_every == 0 || number == s_.steps || state.skip)
    print("step ", number, "/", s_.steps, "  loss ", fixed(state.loss, 4), "  norm ", fixed(state.grad_norm, 3),
          "  lr ", scientific(rate, 2), "  ", fixed(report.seconds * 1e3, 0), " ms  ",
          fixed(tokens / report.seconds, 0), " tokens/s  MFU ", fixed(used * 100, 0), "%  ETA ",
          duration(report.mean_seconds * static_cast<double>(s_.steps - number)), more.words,
          state.skip ? str("  SKIPPED: not finite", of_ranks, " (", state.skipped_in_a_row, " in a row)") : "", "\n");
  fflush(stdout);
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
  append(line);
}

void RunLog::validation(int64_t step, double loss, int64_t rows) {
  print("validation after step ", step, ": loss ", fixed(loss, 4), ", perplexity ", fixed(std::exp(loss), 2), " (",
        rows, " rows)\n");
  fflush(stdout);
  Json line = Json::object();
  line["step"] = step;
  line["val_loss"] = loss;
  append(line);
}

// A disk that is full must not end the training: said once.
void RunLog::append(const Json& line) {
  if (!writes_) return;
  try {
    append_line(s_.out + "/log.jsonl", line.dump());
  } catch (const Error& error) {
    if (!told_) print_error(error.what(), "; training goes on without it: free some space or mend the folder\n");
    told_ = true;
  }
}

}  // namespace gca
