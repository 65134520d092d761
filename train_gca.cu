// train_gca: the one program. Here: the table of commands, and the training loop. Built with nvcc's libraries it runs
// on a GPU too (GCA_CUDA); without, it is plain C++.
#include <fcntl.h>

#include <algorithm>
#include <atomic>
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
#include <tuple>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/machine.h"
#include "base/progress.h"
#include "commands/commands.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "dataloader.h"
#include "ranks/ranks.h"
#include "ranks/world.h"
#include "runtime/evaluate.h"
#include "runtime/log.h"
#include "runtime/matmul_cache.h"
#include "runtime/parallel.h"
#include "runtime/pick_figures.h"
#include "runtime/rows.h"
#include "runtime/run.h"
#include "runtime/weights.h"

namespace gca {

// ---- training -----------------------------------------------------------------------------------------------------
std::atomic<int> stop_asked = 0;  // a signal came, to any of the threads: finish the step, save, end
static_assert(std::atomic<int>::is_always_lock_free);  // so that a handler may set it
void ask_to_stop(int) { stop_asked = 1; }

void stop_on_signals() {
  for (const int number : stop_signals) {
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
  Ranks& ranks;           // who trains it: this process, or several together
  std::string init;       // the file of weights that it starts from, or ""
};

template <class Device>
class Trainer {
 public:
  Trainer(Device& device, Run& run)
      : device_(device),
        run_(run),
        ranks_(run.ranks),
        s_(run.settings),
        log_(s_, ranks_.first()),
        model_(device, s_.config, Use::training, {ranks_.rank(), ranks_.size()}),
        rows_(row_maker(s_, run.tokenizer)) {
    if (!s_.val_data.empty()) {
      val_stream_ = std::make_unique<TokenStream>(s_.val_data, run.tokenizer);
      val_rows_ = std::make_unique<Rows>(*val_stream_, run.tokenizer, s_.chunks, s_.config.chunk, 0, !s_.no_cross);
    }
    if (run.saved) rows_->resume(run.saved->state());
    model_.recompute = recompute_named(s_.recompute);
    allocate_or_explain(model_, micro_rows(), row_slots());
    collectives_ = collectives_of(ranks_, device_);
    model_.collectives = collectives_.get();
    model_.grads_ready = [this](int64_t begin, int64_t) {
      ranks_.tick();
      if (collectives_ && last_rows_) model_.reduce_gradient(begin);
    };
  }

  // From the first step, or the saved one, to the last: the exit code.
  int train() {
    check_same_run(ranks_, what_it_is());
    start();
    print_table();
    choose_products(device_, saved_products());
    began_ = step_began_ = monotonic_seconds();
    first_step_ = reported_ = step_;
    ranks_.at(Doing::training);
    while (step_ < s_.steps && !stopping()) {
      try {
        one_step();
      } catch (const Error&) {  // a shard that can no longer be read must not cost the steps since the last save
        if (ranks_.size() == 1) save();
        throw;
      }
      device_.take(snapshots_[step_ % 2], model_.state);
      if (step_ == first_step_) keep_products(device_, ranks_);
      step_++;
      const bool last = step_ == s_.steps, saves = due(step_, s_.save_every), validates = s_.validates_after(step_),
                 waits = saves || validates || last;
      // A device that runs ahead is asked for a step's figures when the next step is already queued.
      const int64_t known = Device::runs_ahead && !waits && !stopping() ? step_ - 1 : step_;
      if (report_until(known) >= 10) return give_up();
      if (validates) validate();
      if (saves && !last && !stopping()) save();
      if (waits) step_began_ = monotonic_seconds();
    }
    const bool saved = step_ == saved_step_ || save();
    if (run_.saved && first_step_ >= s_.steps)
      print("all ", s_.steps, " steps were made already; for more, give a larger --steps\n");
    if (stopping())
      print("stopped after step ", step_, " of ", s_.steps, saved ? ", saved" : "",
            "; go on with: train_gca train --out ", s_.out, " --resume\n");
    const bool told = log_.whole();
    return saved && told ? 0 : 1;
  }

 private:
  using Whole = WholeBuffer<Device>;
  static constexpr int64_t figures_every = 20;  // steps: a device that runs ahead has to be waited for

  // One step: rows, then forward and backward for each micro-batch of this rank's, then the optimiser. Every rank makes
  // all rows, so that all know how many targets there are.
  void one_step() {
    rows_->make(batch_, step_);
    const RowRange own = rows_of_rank(batch_.rows, ranks_.rank(), ranks_.size());
    const int64_t T = batch_.slots, micro = micro_rows();
    const double scale = batch_.targets_in_all ? 1.0 / static_cast<double>(batch_.targets_in_all) : 0;
    if (rows_->wants_losses()) losses_.resize(batch_.tokens.size());
    StepFigures of_picks;
    model_.begin_step();
    model_.reach.window = s_.window_at(step_);
    if (s_.short_window >= 0) of_picks.fields["window"] = model_.reach.window;
    for (int64_t row = own.begin; row < own.end; row += micro) {
      const int64_t B = std::min(micro, own.end - row), first = row * T;
      last_rows_ = row + B == own.end;
      model_.upload(&batch_.tokens[first], &batch_.targets[first],
                    batch_.weights.empty() ? nullptr : &batch_.weights[first], B * T);
      typename DRT<Device>::Input in{B, T, {}};
      in.selection.noise = s_.noise;
      in.selection.noise_scale = static_cast<float>(s_.noise_scale_at(step_));
      in.selection.seed = static_cast<uint64_t>(s_.seed);
      in.selection.step = step_;
      in.selection.first_row = row;
      in.score_gradient = s_.score_gradient;
      model_.forward(in);
      if (row == 0 && step_ % figures_every == 0) add_pick_figures(of_picks.fields, model_, batch_.chunks);
      model_.head(scale, true);
      if (rows_->wants_losses())
        device_.download(&losses_[first], model_.loss, B * T * static_cast<int64_t>(sizeof(losses_[0])));
      model_.backward();
    }
    model_.reach = s_.config.reach;
    if (collectives_) model_.reduce_gradient(0);  // where a rank has no rows: nothing of its own to the others' sums
    model_.update({.lr = s_.learning_rate(step_),
                   .beta1 = s_.beta1,
                   .beta2 = s_.beta2,
                   .eps = 1e-8,
                   .weight_decay = s_.weight_decay,
                   .clip = s_.clip},
                  stop_asked);
    slots_[step_ % 2] = batch_.rows * T;
    figures_[step_ % 2] = std::move(of_picks);
    const auto add_up = [this](double* data, int64_t count) { ranks_.sum(data, count); };
    if (rows_->wants_losses() && rows_->learn_from(batch_, losses_, own, add_up, step_, figures_[step_ % 2])) {
      model_.plan(micro_rows(), row_slots());  // rows are longer from here on
      model_.commit_activations();
    }
  }

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
      best_step_ = state.at(best_step_field).integer(-1);
      if (best_step_ >= 0) best_loss_ = state.at(best_loss_field).number();
      forget_lost_best();
      log_.go_back_to(step_);
    } else if (!s_.init.empty()) {
      load_weights(run_.init, model_);
    } else {
      ThreadPool pool(static_cast<int>(s_.threads));
      model_.initialise(static_cast<uint64_t>(s_.seed), pool);
    }
  }

  void print_table() {
    const auto [name, data] = rows_->description();
    const double S = static_cast<double>(s_.config.chunk);
    log_.model(model_.table.parameters(), run_.tokenizer);
    log_.line(name, data);
    log_.schedule(rows_->rows(s_.batch), micro_rows(), step_);
    if (run_.saved)
      for (const std::string& change : s_.changes(run_.saved->settings, step_)) log_.line("changed", change);
    if (collectives_) log_.line("ranks", str(ranks_.size(), ", over ", collectives_->description()));
    log_.line("memory", mebibytes(model_.model_memory().total_bytes()) + " of weights and optimiser, " +
                            mebibytes(model_.activation_memory().total_bytes()) + " of activations");
    log_.line("work", str(significant(3 * forward_flops_per_slot(s_.config, s_.config.reach) * S / (S - 1), 3),
                          " floating-point operations a token"));
    if (s_.short_window >= 0)
      log_.line("window", str("W=", s_.short_window, " in ", fixed(100 * s_.short_share, 0),
                              "% of the steps, drawn; in the last tenth W=", s_.config.reach.window));
    log_.line("seed", str(s_.seed));
    log_.line("device", device_.description());
    log_.line("build", build_description());
    if (!s_.config.groups.empty() && s_.config.reach.topk == 1)
      print(
          "note: with --topk 1 the one chunk that is fetched always weighs 1, so the retriever gets no gradient and "
          "stays as it began; with --topk 2 or more it learns\n");
    peak_flops_ = device_.peak_flops() * ranks_.size();
  }
  // What all ranks must agree on: settings, weights, data.
  std::string what_it_is() const {
    Json state = Json::object();
    state["settings"] = run_.flags.values();
    rows_->save(state);
    if (run_.saved) state["weights"] = run_.saved->weights_crc();
    return state.dump();
  }

  int64_t row_slots() const { return rows_->chunks() * s_.config.chunk; }
  int64_t micro_rows() const {
    return std::min(rows_->rows(s_.micro()), rows_of_rank(rows_->rows(s_.batch), 0, ranks_.size()).count());
  }
  // Of several ranks all must stop after the same step: what the step's sums told each of them.
  bool stopping() const { return ranks_.size() == 1 ? stop_asked != 0 : stop_told_; }
  std::string saved_products() const {
    return run_.saved && run_.saved->state().has("products") ? run_.saved->state().at("products").string() : "";
  }

  // Tells of the steps before that one; how many of the last ones were skipped in a row. Two that are told at once, as
  // before a validation, have the same share of the time.
  int64_t report_until(int64_t step) {
    int64_t skipped_in_a_row = 0;
    if (reported_ < step) ranks_.waiting([&] { return device_.read(snapshots_[(step - 1) % 2]); });
    const double now = monotonic_seconds(), seconds = (now - step_began_) / static_cast<double>(step - reported_);
    for (; reported_ < step && skipped_in_a_row < 10; reported_++) {
      step_began_ += seconds;
      skipped_in_a_row = report(reported_, seconds).skipped_in_a_row;
    }
    return skipped_in_a_row;
  }

  StepState report(int64_t step, double seconds) {
    const StepState state = ranks_.waiting([&] { return device_.read(snapshots_[step % 2]); });
    ranks_.tick();
    stop_told_ |= state.stop > 0;
    const double all = step_began_ - began_;
    log_.step({step, slots_[step % 2], seconds, all / static_cast<double>(step - first_step_ + 1), peak_flops_}, state,
              figures_[step % 2]);
    return state;
  }

  void validate() {
    if (stopping()) return;
    ranks_.at(Doing::validating);
    const int64_t B = std::min({micro_rows(), s_.eval_rows, val_rows_->count()}), T = row_slots();
    const auto read = [&](const int32_t* tokens, const int32_t* targets, int64_t, const auto& after) {
      model_.upload(tokens, targets, nullptr, B * T);
      model_.forward({B, T, {}});
      after(0, T);
    };
    const Evaluation own = evaluate(model_, *val_rows_, s_.eval_rows, B, T, 0, read, [] { return stop_asked != 0; });
    double sums[] = {own.sum, static_cast<double>(own.targets), static_cast<double>(own.rows),
                     static_cast<double>(stop_asked)};
    ranks_.sum(sums, std::ssize(sums));
    ranks_.at(Doing::training);
    stop_told_ |= sums[3] > 0;
    if (sums[3] > 0 || sums[1] == 0) return;
    const double loss = sums[0] / sums[1];
    log_.validation(step_, loss, static_cast<int64_t>(sums[2]));
    if (!std::isfinite(loss) || (best_step_ >= 0 && loss >= best_loss_)) return;
    const auto before = std::pair(best_step_, best_loss_);
    best_loss_ = loss;
    best_step_ = step_;
    if (!save()) std::tie(best_step_, best_loss_) = before;  // the best one is one that is kept
  }

  // The best checkpoint may have been removed, or have gone before the one that replaced it was damaged.
  void forget_lost_best() {
    std::error_code none;
    double lost =
        ranks_.first() && best_step_ >= 0 && !std::filesystem::exists(checkpoint_folder(s_.out, best_step_), none);
    ranks_.sum(&lost, 1);
    if (lost == 0) return;
    print("the checkpoint of the best validation, step ", best_step_, ", is gone: the next one is the best\n");
    best_step_ = -1;
  }

  // Returns whether it was saved; a failure is told, and training goes on. What ranks share is brought together by all,
  // and written by the first one.
  bool save() {
    if (saved_step_ == step_) return true;
    report_until(step_);  // the log has all steps of a checkpoint
    ranks_.at(Doing::saving);
    const Whole masters(model_, model_.masters, ranks_), adam_m(model_, model_.adam_m, ranks_),
        adam_v(model_, model_.adam_v, ranks_);
    const std::string products = products_of(device_, ranks_);
    double saved = ranks_.first() && write(masters, adam_m, adam_v, products);
    ranks_.sum(&saved, 1);
    if (saved > 0) saved_step_ = step_;
    ranks_.at(Doing::training);
    return saved > 0;
  }
  bool write(const Whole& masters, const Whole& adam_m, const Whole& adam_v, const std::string& products) {
    const StepState counters = model_.step_state();
    Json state = Json::object();
    state["settings"] = run_.flags.values();
    state["adam_steps"] = counters.adam_steps;
    state["skipped"] = counters.skipped;
    state["skipped_in_a_row"] = counters.skipped_in_a_row;
    state[best_step_field] = best_step_;
    state[best_loss_field] = best_loss_;
    rows_->save(state);
    state["device"] = device_.description();
    state["build"] = build_description();
    if (!products.empty()) state["products"] = products;
    bool whole = false;
    try {
      const Manifest saved = write_checkpoint(
          s_.out, step_,
          {{SavedRun::model_file, [&](const std::string& path) { save_weights(path, masters); }},
           {SavedRun::optimizer_file, [&](const std::string& path) { save_optimizer(path, adam_m, adam_v); }},
           {SavedRun::tokenizer_file, [&](const std::string& path) { run_.tokenizer.save(path); }}},
          state);
      whole = true;
      print("saved step ", step_, ", weights ", hex(saved.entries[0].crc, 8), "\n");
      try_flush_output();
      for (const std::string& said : set_aside_damaged(s_.out, step_)) print_error(said, "\n");
      keep_checkpoints(s_.out, s_.keep, best_step_, step_);
    } catch (const Error& error) {
      print_error(error.what(), "\n");
    }
    return whole;
  }

  int give_up() {
    if (ranks_.first())
      print_error("ten steps in a row had a loss or a gradient that is not finite, and changed nothing; ",
                  saved_step_ < 0 ? "no checkpoint was saved: start anew with a lower --lr"
                                  : "the last good checkpoint is " + checkpoint_folder(s_.out, saved_step_) +
                                        ": start anew from it with --init and a lower --lr",
                  "\n");
    return 1;
  }

  Device& device_;
  Run& run_;
  Ranks& ranks_;
  const TrainSettings& s_;
  RunLog log_;
  DRT<Device> model_;
  std::unique_ptr<RowMaker> rows_;
  std::unique_ptr<TokenStream> val_stream_;
  std::unique_ptr<Rows> val_rows_;
  std::unique_ptr<Collectives> collectives_;    // null: one rank
  bool last_rows_ = false, stop_told_ = false;  // backward is of this rank's last rows; a rank was asked to stop
  StepRows batch_;
  std::vector<typename DRT<Device>::stat> losses_;  // (B,T)
  int64_t step_ = 0, first_step_ = 0, reported_ = 0, saved_step_ = -1, best_step_ = -1;
  double best_loss_ = 0, peak_flops_ = 1;
  double began_ = 0, step_began_ = 0;  // of monotonic_seconds()
  // Of the last two steps: what the device will tell of them, how many slots they read, what the rows' maker says.
  typename Device::Snapshot snapshots_[2];
  int64_t slots_[2] = {};
  StepFigures figures_[2];
};

// ---- the command train --------------------------------------------------------------------------------------------
bool is_among(const std::vector<std::string>& arguments, const char* flag) {
  return std::find(arguments.begin(), arguments.end(), flag) != arguments.end();
}

// What a training goes on from, or null: a run's last step, or the model that --init gives the weights of.
struct Beginning {
  std::unique_ptr<SavedRun> resumed, model;
};

// Before the flags are read: what they start from. A preset's sizes, the settings of the weights' model, or those of
// the run that goes on.
Beginning starting_point(const std::vector<std::string>& arguments, TrainSettings& settings, Flags& flags,
                         std::optional<RunLock>& lock, bool first) {
  const std::string out = Flags::peek(arguments, "out"), init = Flags::peek(arguments, "init"),
                    name = Flags::peek(arguments, "model");
  const bool fallback = is_among(arguments, "--fallback");
  Beginning from;
  std::error_code none;
  const std::string run = run_of_best(out);
  if (std::filesystem::exists(out + "/" + Manifest::file_name, none) ||
      (!run.empty() && !list_checkpoints(run).empty()))
    throw UsageError("--out: expected a run's folder, found one of its checkpoints, '" + out +
                     "'; give the folder that it lies in");
  if (is_among(arguments, "--resume")) {
    if (out.empty()) throw UsageError("--resume needs --out RUN: the folder of the run that goes on");
    if (first && std::filesystem::is_directory(out, none))
      lock.emplace(out);  // before its newest checkpoint is looked for
    from.resumed = std::make_unique<SavedRun>(SavedRun::open(out, fallback));
    flags.restore(from.resumed->state().at("settings"));
    return from;
  }
  if (!init.empty() && has_settings(init)) {
    from.model = std::make_unique<SavedRun>(SavedRun::open(init, fallback));
    settings.config = from.model->settings.config;
    settings.model = from.model->settings.model;
    settings.tokenizer = from.model->tokenizer_path();
  }
  if (!name.empty() && !(from.model && name == settings.model)) settings.config = preset(name).config;
  return from;
}

// What was given beside the weights of --init agrees with what they were trained with.
void check_init(const SavedRun* model, const TrainSettings& settings, Flags& flags, const Tokenizer& tokenizer,
                bool first) {
  if (settings.init.empty()) return;
  if (model && model->tokenizer.hash() != tokenizer.hash())
    throw UsageError(str("--tokenizer: the weights in '", settings.init, "' were trained with ",
                         model->tokenizer.description(), " (hash ", hex(model->tokenizer.hash(), 16), "), found ",
                         tokenizer.description(), " (hash ", hex(tokenizer.hash(), 16), "); leave it out"));
  const std::string remark = model ? check_same_model(model->settings, settings, flags, settings.init)
                                   : model_on_trust(settings.config, settings.init);
  if (first) print_error(remark);
}

// A run that goes on looks for its data where its checkpoint says: an Error that says so where nothing is there.
void check_remembered_patterns(const TrainSettings& settings, Flags& flags) {
  for (const auto& [name, pattern] : {std::pair{"data", settings.data}, std::pair{"val-data", settings.val_data}}) {
    if (pattern.empty() || flags.given(name)) continue;
    try {
      glob_files(pattern);
    } catch (const Error& error) {
      throw Error(str(error.what(), "; the checkpoint in '", settings.out, "' remembers this pattern: go on from the ",
                      "folder where the run was started, or say with --", name, " where the shards are now"));
    }
  }
}

void check_task_flags(const TrainSettings& settings, Flags& flags) {
  const bool task = settings.task.any();
  flags.need(task ? "haystack" : "data");
  if (task && flags.given("data")) throw UsageError("--task learns from --haystack: leave --data out");
  if (task && flags.given("val-data"))
    throw UsageError("--task has no validation text: leave --val-data out, and measure with passkey");
  if (!task)
    for (const char* name : {"haystack", "curriculum", "promote", "needles", "questions", "answer-weight", "style",
                             "values", "value-tokens", "name-tokens", "gap", "landmark-answers"})
      if (flags.given(name))
        throw UsageError(str("--", name, " is of a task: give --task recall, single or two-hop too"));
  if (settings.landmark_answers && settings.task.gap == 0)
    throw UsageError(
        "--landmark-answers: expected --gap 1 or more, found 0: the landmark of a question's own chunk "
        "stands before anything is fetched for it; give a gap, or leave it out");
  for (const std::vector<int64_t>* list : {&settings.needles, &settings.questions})
    if (list->empty()) throw UsageError("--needles and --questions: expected one number at least, found none");
}

// train(ranks) as one of the world's ranks, of which the first alone prints. Where one of them fails all end.
template <class Train>
int train_as(const World& world, Train train) {
  if (world.rank > 0 && !freopen("/dev/null", "w", stdout)) throw system_error("cannot open /dev/null", errno);
  Ranks ranks(world);
  try {
    const int exit_code = train(ranks);
    ranks.leave();
    return exit_code;
  } catch (const std::exception& error) {
    if (ranks.fail(error.what())) return 1;
    ranks.tick();  // throws what ended the run, of which this error may be but the consequence
    throw;
  }
}

int train_command(const std::vector<std::string>& arguments) {
  TrainSettings settings;
  Flags flags = train_flags(settings);
  if (wants_help(arguments, flags)) return 0;
  World world = world_of();
  std::optional<RunLock> lock;  // of the first rank; one that is launched here has it from this process
  const Beginning from = starting_point(arguments, settings, flags, lock, world.rank == 0);
  const SavedRun* saved = from.resumed.get();
  flags.parse(arguments);
  if (saved) {
    flags.check_unchanged(saved->state().at("settings"));
    check_remembered_patterns(settings, flags);
    if (flags.given("steps") && !flags.given("tokens")) settings.tokens = 0;
  }
  flags.need("out");
  check_task_flags(settings, flags);
  if (!settings.val_data.empty()) check_apart(settings.data, settings.val_data);
  Tokenizer tokenizer = saved ? saved->tokenizer : Tokenizer::load(settings.tokenizer);
  if (saved ? flags.given("steps") && flags.given("tokens") : (settings.steps > 0) == (settings.tokens > 0))
    throw UsageError(
        str("train needs either --steps or --tokens: how long to train; found ", settings.steps ? "both" : "neither"));
  if (!saved && settings.final_rate() > settings.lr)
    throw UsageError(str("--lr-final: expected at most --lr, ", settings.lr, ", found ", settings.lr_final,
                         ": the rate falls; leave it out for a tenth of --lr"));
  settings.finish(tokenizer.vocab_size());
  if (saved) settings.go_on(saved->settings, saved->checkpoint.step);
  else check_init(from.model.get(), settings, flags, tokenizer, world.rank == 0);
  if (!saved && world.rank == 0) {
    make_folder(settings.out);
    lock.emplace(settings.out);
    if (std::error_code none;
        std::filesystem::exists(settings.out + "/log.jsonl", none) || !list_checkpoints(settings.out).empty())
      throw Error("'" + settings.out + "' holds a run already: go on with --resume, or choose another folder");
  }
  if (const int count = ranks_to_launch(settings, world); count > 1) {
    int exit_code = 0;
    const std::optional<World> launched = launch(count, exit_code);
    if (!launched) return exit_code;
    world = *launched;
    if (settings.threads == 0) settings.threads = std::max(1, machine().processors / count);
  }
  return train_as(world, [&](Ranks& ranks) {
    stop_on_signals();  // until all ranks have met a signal ends this one at once
    Run run{settings, flags, std::move(tokenizer), saved, ranks, from.model ? from.model->weights : settings.init};
    return with_device(
        settings.device, settings.precision, settings.threads,
        [&](auto& device) { return Trainer(device, run).train(); }, world.local_rank);
  });
}

// ---- commands -----------------------------------------------------------------------------------------------------
struct Command {
  const char *name, *does;
  int (*run)(const std::vector<std::string>& arguments);
  const char* needs_less = "use a smaller --batch, fewer --chunks, fewer --threads or a smaller model";  // memory
};
constexpr char text_needs_less[] = "use fewer --threads, or smaller --shard-tokens where shards are made";
const Command commands[] = {
    {"tokenizer-train", "learns a byte-level BPE from text files", tokenizer_train_command, text_needs_less},
    {"tokenize", "text files to token shards", tokenize_command, text_needs_less},
    {"encode", "text on standard input to token ids", encode_command},
    {"decode", "token ids on standard input to text", decode_command},
    {"train", "trains a model on token shards", train_command},
    {"eval", "loss of a checkpoint on token shards, ablations too", eval_command},
    {"passkey", "finds needles in a long text", passkey_command},
    {"generate", "continues a text", generate_command},
    {"inspect", "what each chunk of a text fetches", inspect_command},
    {"explain", "one small row from tokens to gradients, every array printed", explain_command},
    {"export", "a checkpoint's weights as one file for other programs", export_command},
    {"verify", "an oracle's file through forward, backward and optimiser", verify_command},
    {"info", "what a run is; tensors, work and memory of a model; what token shards hold", info_command},
};

int run_program(const std::vector<std::string>& arguments) {
  if (arguments.size() > 1 && arguments[0] == "help") return run_program({arguments[1], "--help"});
  if (!arguments.empty() && (arguments[0] == "--version" || arguments[0] == "version")) {
    print(version_description());
    flush_output();
    return 0;
  }
  if (arguments.empty() || arguments[0] == "help" || arguments[0] == "--help" || arguments[0] == "-h") {
    print(
        "train_gca COMMAND [flags]; train_gca COMMAND --help, or help COMMAND, tells the flags; --version what this "
        "is\n");
    for (const Command& command : commands) print("  ", left(command.name, 16), " ", command.does, "\n");
    flush_output();
    return 0;
  }
  std::vector<std::string> names;
  for (const Command& command : commands) {
    names.push_back(command.name);
    if (arguments[0] != command.name) continue;
    int status;
    try {
      status = command.run({arguments.begin() + 1, arguments.end()});
    } catch (const std::bad_alloc&) {
      throw Error(str("out of memory; ", command.needs_less));
    }
    if (command.run != train_command) flush_output();  // which goes on, has its log.jsonl, and says so itself
    return status;
  }
  throw UsageError("train_gca has no command '" + arguments[0] + "'" + did_you_mean(arguments[0], names) +
                   "; train_gca help lists them");
}

}  // namespace gca

int main(int count, char** values) {
  gca::keep_standard_places();
  signal(SIGXFSZ, SIG_IGN);  // a file over the user's limit is an error of write(), told like a full disk
  try {
    return gca::run_program({values + 1, values + count});
  } catch (const gca::UsageError& error) {
    gca::print_error("train_gca: ", error.what(), "\n");
    return 2;
  } catch (const std::exception& error) {
    gca::print_error("train_gca: ", error.what(), "\n");
    return 1;
  }
}
