// train_gca: the one program. Here: the table of commands, and the training loop. Built with nvcc's libraries it runs
// on a GPU too (GCA_CUDA); without, it is plain C++.
#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "commands/commands.h"
#include "commands/shared.h"
#include "dataloader.h"
#include "runtime/matmul_cache.h"
#include "runtime/run.h"

namespace gca {

// ---- training -----------------------------------------------------------------------------------------------------
std::atomic<int> stop_asked = 0;  // a signal came, to any of the threads: finish the step, save, end
static_assert(std::atomic<int>::is_always_lock_free);  // so that a handler may set it
void ask_to_stop(int) { stop_asked = 1; }

void stop_on_signals() {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction action = {};
    sigaction(number, nullptr, &action);
    if (action.sa_handler == SIG_IGN) continue;  // nohup, or a shell's background job
    action = {};
    action.sa_handler = ask_to_stop;
    action.sa_flags = SA_RESTART;
    sigaction(number, &action, nullptr);
  }
  signal(SIGPIPE,
         SIG_IGN);  // whoever read the output is gone, with the terminal perhaps: no reason to die before the save
}

// Everything of a run but its numbers on the device: settings, data, where it writes.
struct Run {
  TrainSettings settings;
  Flags& flags;
  Tokenizer tokenizer;
  const SavedRun* saved;  // what it resumes from, or null
};

// One line of RUN/log.jsonl. A disk that is full must not end the training: said once.
void log_line(const std::string& run, const Json& line) {
  static bool told = false;
  try {
    append_line(run + "/log.jsonl", line.dump());
  } catch (const Error& error) {
    if (!told) print_error(error.what(), "; training goes on without it: free some space or mend the folder\n");
    told = true;
  }
}

template <class Device>
class Trainer {
 public:
  Trainer(Device& device, Run& run) : device_(device), run_(run), s_(run.settings), model_(device, s_.config) {
    if (!s_.task.any()) {
      stream_ = std::make_unique<TokenStream>(s_.data, run.tokenizer);
      rows_ = std::make_unique<Rows>(*stream_, run.tokenizer, s_.chunks, s_.config.chunk,
                                     static_cast<uint64_t>(s_.seed), !s_.no_cross);
      for (const std::string& note : {stream_->notes(), rows_->notes()})
        if (!note.empty()) print(note, "\n");
    } else {
      haystack_ = Haystack::load(s_.task.haystack, run.tokenizer);
      task_ = std::make_unique<Task>(s_.task, run.tokenizer, haystack_, s_.config.chunk);
      for (int64_t stage = 0; stage < s_.stages(); stage++) {
        task_->check_names(s_.of_stage(s_.needles, stage));
        if (s_.stage_chunks(stage) < task_->fewest_chunks())
          throw UsageError(str("--", s_.curriculum.empty() ? "chunks" : "curriculum", ": expected at least ",
                               task_->fewest_chunks(), " chunks, for needle, question and answer, found ",
                               s_.stage_chunks(stage)));
      }
    }
    if (!s_.val_data.empty()) {
      val_stream_ = std::make_unique<TokenStream>(s_.val_data, run.tokenizer);
      val_rows_ = std::make_unique<Rows>(*val_stream_, run.tokenizer, s_.chunks, s_.config.chunk, 0, !s_.no_cross);
    }
    if (run.saved) {
      const JsonField state = run.saved->state();
      if (task_) haystack_.check_same(state.at("data"));
      else stream_->check_same(state.at("data"));
      if (task_) {
        stage_ = state.at("stage").integer(0, s_.stages() - 1);
        for (const Json& rate : state.at("answer_rates").items())
          answer_rates_.push_back(JsonField(rate, "answer_rates").number());
      }
    }
    model_.recompute = recompute_named(s_.recompute);
    allocate_or_explain(model_, micro_rows(), row_slots());
  }

  int train() {
    start();
    print_table();
    choose_products(
        device_, run_.saved && run_.saved->state().has("products") ? run_.saved->state().at("products").string() : "");
    typename Device::Snapshot snapshots[2];
    const auto began = std::chrono::steady_clock::now();
    auto step_began = began;
    const int64_t first_step = step_;
    // A device that runs ahead is asked for a step's figures when the next step is already queued.
    auto report = [&](int64_t step) {
      const StepState state = device_.read(snapshots[step % 2]);
      const auto now = std::chrono::steady_clock::now();
      const double seconds = std::chrono::duration<double>(now - step_began).count(),
                   all = std::chrono::duration<double>(now - began).count();
      step_began = now;
      report_step(step, state, seconds, all / static_cast<double>(step - first_step + 1));
      return state;
    };
    int64_t reported = step_;
    for (; step_ < s_.steps && !stop_asked;) {
      try {
        one_step();
      } catch (const Error&) {  // a shard that can no longer be read must not cost the steps since the last save
        save();
        throw;
      }
      device_.take(snapshots[step_ % 2], model_.state);
      if (step_ == first_step) keep_products(device_);
      step_++;
      const bool due = step_ % s_.eval_every == 0 || step_ % s_.save_every == 0 || step_ == s_.steps;
      for (const int64_t until = Device::runs_ahead && !due && !stop_asked ? step_ - 1 : step_; reported < until;
           reported++)
        if (report(reported).skipped_in_a_row >= 10) return give_up();
      if (step_ % s_.eval_every == 0 || step_ == s_.steps) validate();
      if (step_ % s_.save_every == 0 && step_ < s_.steps && !stop_asked) save();
      if (due) step_began = std::chrono::steady_clock::now();
    }
    const bool saved = step_ == saved_step_ || save();
    if (stop_asked)
      print("stopped after step ", step_, " of ", s_.steps, saved ? ", saved" : "",
            "; go on with: train_gca train --out ", s_.out, " --resume\n");
    return saved ? 0 : 1;
  }

 private:
  // Fresh weights, given ones, or a checkpoint's whole state.
  void start() {
    if (run_.saved) {
      const Checkpoint& checkpoint = run_.saved->checkpoint;
      load_weights(checkpoint.file(SavedRun::model_file), model_);
      load_optimizer(checkpoint.file(SavedRun::optimizer_file), model_);
      const JsonField state = run_.saved->state();
      StepState counters{};
      counters.adam_steps = state.at("adam_steps").integer(0);
      counters.skipped = state.at("skipped").integer(0);
      counters.skipped_in_a_row = state.at("skipped_in_a_row").integer(0);
      device_.upload(model_.state, &counters, sizeof counters);
      step_ = saved_step_ = checkpoint.step;
      best_step_ = state.at("best_step").integer(-1);
      if (best_step_ >= 0) best_loss_ = state.at("best_val_loss").number();
    } else if (!s_.init.empty()) {
      std::error_code none;
      load_weights(std::filesystem::is_directory(s_.init, none)
                       ? open_checkpoint(s_.init, s_.fallback).file(SavedRun::model_file)
                       : s_.init,
                   model_);
    } else {
      ThreadPool pool(static_cast<int>(s_.threads));
      model_.initialise(static_cast<uint64_t>(s_.seed), pool);
    }
  }

  void print_table() {
    auto line = [](const char* name, const std::string& value) { print(left(name, 12), " ", value, "\n"); };
    auto number = [](int64_t n) { return str(n); };
    const Config& c = s_.config;
    line("model",
         str("D=", c.width, " H=", c.heads, " F=", c.ffn, ", ", c.lower, " lower + (", comma_list(c.groups),
             ") upper layers, encoder ", c.encoder, ", S=", c.chunk, " K=", c.topk, " W=", c.window, ", V=", c.vocab));
    line("parameters", number(model_.table.parameters()));
    line("tokenizer", run_.tokenizer.description());
    if (task_) {
      line("task", str(s_.task.task, ", in ", haystack_.tokens.size(), " tokens of ", haystack_.files, " files (",
                       haystack_.left_out, " left out); rows of ",
                       s_.curriculum.empty() ? number(s_.chunks).c_str() : comma_list(s_.curriculum), " chunks, ",
                       comma_list(s_.needles), " needles, ", comma_list(s_.questions), " questions at most"));
    } else {
      line("data", str(stream_->tokens(), " tokens, ", rows_->count(), " rows of ", row_slots(), " slots (",
                       row_tokens(), " tokens); this run reads ",
                       fixed(static_cast<double>(s_.steps * s_.batch) / static_cast<double>(rows_->count()), 2),
                       " times as many"));
    }
    line("steps", str(s_.steps, " of ", batch_rows(), " rows (", micro_rows(), " at once), from step ", step_));
    line("rate", str(s_.lr, " after ", s_.warmup_steps(), " steps, then a cosine to ", s_.lr_final));
    line("memory", mebibytes(model_.model_memory().total_bytes()) + " of weights and optimiser, " +
                       mebibytes(model_.activation_memory().total_bytes()) + " of activations");
    line("work",
         str(significant(
                 3 * forward_flops_per_slot(c) * static_cast<double>(c.chunk) / static_cast<double>(c.chunk - 1), 3),
             " floating-point operations a token"));
    line("seed", number(s_.seed));
    line("device", device_.description());
    line("build", build_description());
    peak_ = device_.peak_flops();
  }

  // What the stage of the curriculum makes of a step.
  int64_t row_slots() const { return s_.stage_chunks(stage_) * s_.config.chunk; }
  int64_t row_tokens() const { return s_.stage_chunks(stage_) * (s_.config.chunk - 1); }
  int64_t batch_rows() const { return s_.stage_rows(s_.batch, stage_); }
  int64_t micro_rows() const { return s_.stage_rows(s_.micro(), stage_); }

  void one_step() {
    const int64_t T = row_slots(), rows = batch_rows(), micro = micro_rows();
    tokens_.resize(rows * T);
    targets_.resize(tokens_.size());
    answer_slots_.clear();
    for (int64_t row = 0; row < rows; row++) fill_row(step_ * s_.batch + row, row * T);
    const int64_t N = static_cast<int64_t>(
        std::count_if(targets_.begin(), targets_.end(), [](int32_t target) { return target >= 0; }));
    const double scale = N ? 1.0 / static_cast<double>(N) : 0;
    if (task_) {
      weights_.assign(tokens_.size(), 1);
      for (const int64_t slot : answer_slots_)
        weights_[slot] = static_cast<float>(1 + s_.answer_weight * static_cast<double>(N) /
                                                    static_cast<double>(answer_slots_.size()));
      losses_.resize(tokens_.size());
    }
    model_.begin_step();
    for (int64_t row = 0; row < rows; row += micro) {
      const int64_t B = std::min(micro, rows - row);
      const size_t first = row * T;
      model_.upload(&tokens_[first], &targets_[first], task_ ? &weights_[first] : nullptr, B * T);
      typename DRT<Device>::Input in{B, T, {}};
      in.selection.noise = s_.noise;
      in.selection.seed = static_cast<uint64_t>(s_.seed);
      in.selection.step = step_;
      in.selection.first_row = row;
      model_.forward(in);
      model_.head(scale, true);
      if (task_) device_.download(&losses_[first], model_.loss, B * T * static_cast<int64_t>(sizeof(losses_[0])));
      model_.backward();
    }
    model_.update({.lr = s_.learning_rate(step_),
                   .beta1 = s_.beta1,
                   .beta2 = s_.beta2,
                   .eps = 1e-8,
                   .weight_decay = s_.weight_decay,
                   .clip = s_.clip});
    done_[step_ % 2] = {rows * T, s_.stage_chunks(stage_), 0, 0};
    if (task_) end_of_task_step();
  }

  // Row r of the training to place `at` of the step's rows.
  void fill_row(int64_t r, int64_t at) {
    const size_t to = at;
    if (!task_) return rows_->fill_row(r, &tokens_[to], &targets_[to]);
    const TaskRow row =
        task_->training_row(static_cast<uint64_t>(s_.seed), r, s_.stage_chunks(stage_), s_.of_stage(s_.needles, stage_),
                            s_.task.task == "single" ? 1 : s_.of_stage(s_.questions, stage_));
    std::copy(row.tokens.begin(), row.tokens.end(), tokens_.begin() + at);
    std::copy(row.targets.begin(), row.targets.end(), targets_.begin() + at);
    for (const Question& question : row.questions)
      for (int64_t i = 0; i < std::ssize(question.answer); i++) answer_slots_.push_back(at + question.first_slot + i);
  }

  // How many answer tokens had more than half of the probability, and were therefore the likeliest; and whether that
  // ends a stage.
  void end_of_task_step() {
    constexpr size_t steps = 20;
    int64_t right = 0;
    double sum = 0;
    for (const int64_t slot : answer_slots_) {
      const double loss = static_cast<double>(losses_[slot]);
      right += loss < std::log(2.0);
      sum += loss;
    }
    const double count = static_cast<double>(std::max<size_t>(1, answer_slots_.size()));
    done_[step_ % 2].answers_right = static_cast<double>(right) / count;
    done_[step_ % 2].answer_loss = sum / count;
    answer_rates_.push_back(static_cast<double>(right) / count);
    if (answer_rates_.size() > steps) answer_rates_.erase(answer_rates_.begin());
    if (answer_rates_.size() < steps || stage_ + 1 >= s_.stages()) return;
    if (std::accumulate(answer_rates_.begin(), answer_rates_.end(), 0.0) < s_.promote * static_cast<double>(steps))
      return;
    stage_++;
    answer_rates_.clear();
    print("step ", step_ + 1, ": ", fixed(s_.promote * 100, 0), "% of the answers are right; on to rows of ",
          s_.stage_chunks(stage_), " chunks\n");
    model_.plan(micro_rows(), row_slots());
    model_.commit_activations();
  }

  void report_step(int64_t step, const StepState& state, double seconds, double mean_seconds) {
    const Done& done = done_[step % 2];
    const double slots = static_cast<double>(done.slots),
                 tokens = slots / static_cast<double>(s_.config.chunk) * static_cast<double>(s_.config.chunk - 1);
    const double used = 3 * forward_flops_per_slot(s_.config) * slots / seconds / peak_;
    if ((step + 1) % s_.print_every == 0 || step + 1 == s_.steps || state.skip)
      print("step ", step + 1, "/", s_.steps, "  loss ", fixed(state.loss, 4), "  norm ", fixed(state.grad_norm, 3),
            "  lr ", s_.learning_rate(step), "  ", fixed(seconds * 1e3, 0), " ms  ", fixed(tokens / seconds, 0),
            " tokens/s  MFU ", fixed(used * 100, 0), "%  ETA ",
            duration(mean_seconds * static_cast<double>(s_.steps - step - 1)),
            task_ ? str("  ", done.chunks, " chunks, answers ", fixed(done.answers_right * 100, 0), "% (loss ",
                        fixed(done.answer_loss, 3), ")")
                        .c_str()
                  : "",
            state.skip ? str("  SKIPPED: not finite (", state.skipped_in_a_row, " in a row)").c_str() : "", "\n");
    fflush(stdout);
    Json line = Json::object();
    line["step"] = step + 1;
    line["loss"] = state.loss;
    line["plain_loss"] = state.plain_loss;
    line["grad_norm"] = state.grad_norm;
    line["lr"] = s_.learning_rate(step);
    line["ms"] = seconds * 1e3;
    line["tokens_per_second"] = tokens / seconds;
    if (task_) {
      line["chunks"] = done.chunks;
      line["answers_right"] = done.answers_right;
      line["answer_loss"] = done.answer_loss;
    }
    if (state.skip) line["skipped"] = true;
    log_line(s_.out, line);
  }

  void validate() {
    if (!val_rows_ || stop_asked) return;
    const Evaluation result =
        evaluate(model_, *val_rows_, s_.eval_rows, s_.micro(), row_slots(), {}, [] { return stop_asked != 0; });
    if (stop_asked || !result.targets) return;
    print("validation after step ", step_, ": loss ", fixed(result.loss(), 4), ", perplexity ",
          fixed(std::exp(result.loss()), 2), " (", result.rows, " rows)\n");
    fflush(stdout);
    Json line = Json::object();
    line["step"] = step_;
    line["val_loss"] = result.loss();
    log_line(s_.out, line);
    if (std::isfinite(result.loss()) && (best_step_ < 0 || result.loss() < best_loss_)) {
      best_loss_ = result.loss();
      best_step_ = step_;
      save();  // the best one is kept
    }
  }

  // Returns whether it was saved; a failure is told, and training goes on.
  bool save() {
    if (saved_step_ == step_) return true;
    const StepState counters = model_.step_state();
    Json state = Json::object();
    state["settings"] = run_.flags.values();
    state["adam_steps"] = counters.adam_steps;
    state["skipped"] = counters.skipped;
    state["skipped_in_a_row"] = counters.skipped_in_a_row;
    state["best_step"] = best_step_;
    state["best_val_loss"] = best_loss_;
    state["data"] = task_ ? haystack_.state() : stream_->state();
    if (task_) {
      state["stage"] = stage_;
      state["answer_rates"] = answer_rates_;
    }
    state["device"] = device_.description();
    state["build"] = build_description();
    if constexpr (requires { device_.products(); }) state["products"] = device_.products();
    try {
      write_checkpoint(s_.out, step_,
                       {{SavedRun::model_file, [&](const std::string& path) { save_weights(path, model_); }},
                        {SavedRun::optimizer_file, [&](const std::string& path) { save_optimizer(path, model_); }},
                        {SavedRun::tokenizer_file, [&](const std::string& path) { run_.tokenizer.save(path); }}},
                       state);
      saved_step_ = step_;
      keep_checkpoints(s_.out, s_.keep, best_step_);
      return true;
    } catch (const Error& error) {
      print_error(error.what(), "\n");
      return saved_step_ == step_;
    }
  }

  int give_up() {
    print_error("ten steps in a row had a loss or a gradient that is not finite, and changed nothing; ",
                saved_step_ >= 0 ? ("the last good checkpoint is " + checkpoint_folder(s_.out, saved_step_) +
                                    ": start anew from it with --init and a lower --lr")
                                       .c_str()
                                 : "no checkpoint was saved: start anew with a lower --lr",
                "\n");
    return 1;
  }

  Device& device_;
  Run& run_;
  const TrainSettings& s_;
  DRT<Device> model_;
  std::unique_ptr<TokenStream> stream_, val_stream_;  // of shards; or else a task
  std::unique_ptr<Rows> rows_, val_rows_;
  Haystack haystack_;
  std::unique_ptr<Task> task_;
  int64_t stage_ = 0;                 // of the curriculum
  std::vector<double> answer_rates_;  // the share of right answers in this stage's last steps
  struct Done {
    int64_t slots, chunks;
    double answers_right, answer_loss;
  } done_[2] = {};                         // of the last two steps
  std::vector<int32_t> tokens_, targets_;  // a step's rows
  std::vector<int64_t> answer_slots_;      // in them
  std::vector<float> weights_;
  std::vector<typename DRT<Device>::stat> losses_;
  int64_t step_ = 0, saved_step_ = -1, best_step_ = -1;
  double best_loss_ = 0, peak_ = 1;
};

int train_command(const std::vector<std::string>& arguments) {
  TrainSettings settings;
  Flags flags = train_flags(settings);
  if (wants_help(arguments, flags)) return 0;
  // Before the flags: what they start from. A preset's sizes, the settings of the weights' run, or of the run that goes
  // on.
  const std::string out = Flags::peek(arguments, "out"), init = Flags::peek(arguments, "init"),
                    name = Flags::peek(arguments, "model");
  const bool resume = std::find(arguments.begin(), arguments.end(), "--resume") != arguments.end();
  const bool fallback = std::find(arguments.begin(), arguments.end(), "--fallback") != arguments.end();
  std::unique_ptr<SavedRun> saved;
  std::optional<RunLock> lock;
  std::error_code none;
  if (std::filesystem::exists(out + "/" + Manifest::file_name, none))
    throw UsageError("--out: expected a run's folder, found one of its checkpoints, '" + out +
                     "'; give the folder that it lies in");
  if (resume) {
    if (out.empty()) throw UsageError("--resume needs --out RUN: the folder of the run that goes on");
    if (std::filesystem::is_directory(out, none)) lock.emplace(out);  // before its newest checkpoint is looked for
    saved = std::make_unique<SavedRun>(SavedRun::open(out, fallback));
    flags.restore(saved->state().at("settings"));
  } else if (!init.empty() && std::filesystem::is_directory(init, none)) {
    const SavedRun from = SavedRun::open(init, fallback);
    settings.config = from.settings.config;
    settings.model = from.settings.model;
    settings.tokenizer = from.checkpoint.file(SavedRun::tokenizer_file);
  }
  if (!name.empty() && !resume) settings.config = preset(name).config;
  flags.parse(arguments);
  if (saved) flags.check_unchanged(saved->state().at("settings"));
  flags.need("out");
  const bool task = settings.task.any();
  flags.need(task ? "haystack" : "data");
  if (task && flags.given("data")) throw UsageError("--task learns from --haystack: leave --data out");
  if (task && flags.given("val-data"))
    throw UsageError("--task has no validation text: leave --val-data out, and measure with passkey");
  if (!task)
    for (const char* name : {"haystack", "curriculum", "promote", "needles", "questions", "answer-weight", "style",
                             "values", "value-tokens", "name-tokens", "gap"})
      if (flags.given(name))
        throw UsageError(str("--", name, " is of a task: give --task recall, single or two-hop too"));
  for (const std::vector<int64_t>* list : {&settings.needles, &settings.questions})
    if (list->empty()) throw UsageError("--needles and --questions: expected one number at least, found none");
  Tokenizer tokenizer = saved ? saved->tokenizer : Tokenizer::load(settings.tokenizer);
  settings.config.vocab = tokenizer.vocab_size();
  settings.config.validate();
  if (!saved && (settings.steps > 0) == (settings.tokens > 0))
    throw UsageError("train needs either --steps or --tokens: how long to train");
  if (settings.tokens > 0)
    settings.steps = ceil_div(settings.tokens, settings.batch * settings.stage_chunks(0) * (settings.config.chunk - 1));
  if (settings.micro() > settings.batch)
    throw UsageError(str("--micro-batch: expected at most --batch, ", settings.batch, ", found ", settings.micro()));

  if (!saved) {
    make_folder(settings.out);
    lock.emplace(settings.out);
    if (std::filesystem::exists(settings.out + "/log.jsonl", none) || !list_checkpoints(settings.out).empty())
      throw Error("'" + settings.out + "' holds a run already: go on with --resume, or choose another folder");
  }
  stop_on_signals();
  Run run{settings, flags, std::move(tokenizer), saved.get()};
  return with_device(settings.device, settings.precision, settings.threads,
                     [&](auto& device) { return Trainer(device, run).train(); });
}

// ---- commands -----------------------------------------------------------------------------------------------------
struct Command {
  const char *name, *does;
  int (*run)(const std::vector<std::string>& arguments);
};
const Command commands[] = {
    {"tokenizer-train", "learns a byte-level BPE from text files", tokenizer_train_command},
    {"tokenize", "text files to token shards", tokenize_command},
    {"encode", "text on standard input to token ids", encode_command},
    {"decode", "token ids on standard input to text", decode_command},
    {"train", "trains a model on token shards", train_command},
    {"eval", "loss of a checkpoint on token shards, ablations too", eval_command},
    {"passkey", "finds needles in a long text", passkey_command},
    {"generate", "continues a text", generate_command},
    {"inspect", "what each chunk of a text fetches", inspect_command},
    {"export", "a checkpoint's weights as one file for other programs", export_command},
    {"verify", "an oracle's file through forward, backward and optimiser", verify_command},
    {"info", "tensors, work and memory of a model; what token shards hold", info_command},
};

int run_program(const std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments[0] == "help" || arguments[0] == "--help" || arguments[0] == "-h") {
    print("train_gca COMMAND [flags]; train_gca COMMAND --help tells the flags\n");
    for (const Command& command : commands) print("  ", left(command.name, 16), " ", command.does, "\n");
    return 0;
  }
  std::vector<std::string> names;
  for (const Command& command : commands) {
    if (arguments[0] == command.name) return command.run({arguments.begin() + 1, arguments.end()});
    names.push_back(command.name);
  }
  throw UsageError("train_gca has no command '" + arguments[0] + "'" + did_you_mean(arguments[0], names) +
                   "; train_gca help lists them");
}

}  // namespace gca

int main(int count, char** values) {
  signal(SIGXFSZ, SIG_IGN);  // a file over the user's limit is an error of write(), told like a full disk
  try {
    return gca::run_program({values + 1, values + count});
  } catch (const gca::UsageError& error) {
    gca::print_error("train_gca: ", error.what(), "\n");
    return 2;
  } catch (const std::bad_alloc&) {
    gca::print_error("train_gca: out of memory; use a smaller --batch, fewer --chunks or a smaller model\n");
    return 1;
  } catch (const std::exception& error) {
    gca::print_error("train_gca: ", error.what(), "\n");
    return 1;
  }
}
