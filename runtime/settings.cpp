// The flags of `train`, their help and limits, and what follows from them.
#include "runtime/settings.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "base/flags.h"
#include "model.h"
#include "runtime/needles.h"
#include "tokenizer/tokenizer.h"

namespace gca {

const Preset& preset(const std::string& name) {
  std::vector<std::string> names;
  for (const Preset& p : presets()) {
    if (p.name == name) return p;
    names.push_back(p.name);
  }
  std::string all;
  for (const std::string& n : names) all += (all.empty() ? "" : ", ") + n;
  throw UsageError("--model: expected one of " + all + ", found '" + name + "'" + did_you_mean(name, names));
}

void add_model_flags(Flags& flags, std::string& model, Config& c) {
  flags.add("model", model, "PRESET", "drt, drt-x2, swa, swa-14, small or tiny: what the flags below are unless given",
            Flags::run);
  flags.add("width", c.width, 1, 65536, "D, columns of the residual stream", Flags::run);
  flags.add("heads", c.heads, 1, 65536, "H, attention heads", Flags::run);
  flags.add("ffn", c.ffn, 1, 1 << 20, "F, feed-forward width", Flags::run);
  flags.add("lower", c.lower, 0, 1024, "layers below the retrieval", Flags::run);
  flags.add("groups", c.groups, 1, 1024, "upper layers of each retrieval group; \"\" is the sliding-window baseline",
            Flags::run);
  flags.add("encoder", c.encoder, 0, 1024, "layers of the chunk encoder", Flags::run);
  flags.add("chunk", c.chunk, 2, 4096, "S, slots a chunk, its landmark included", Flags::run);
  flags.add("topk", c.reach.topk, 1, max_topk, "K, chunks that each chunk fetches", Flags::run);
  flags.add("window", c.reach.window, 0, INT32_MAX, "W, slots back that a slot attends to", Flags::run);
  flags.add_on_off("null-slot", c.null_slot,
                   "a zero key and value in each fetched chunk, so that nothing need be taken", Flags::run);
}

std::string check_same_model(const TrainSettings& trained, const TrainSettings& now, Flags& flags,
                             const std::string& path) {
  const auto values = [](Config config) {
    std::string none;
    Flags model("", "");
    add_model_flags(model, none, config);
    return model.values();
  };
  const Json before = values(trained.config), after = values(now.config);
  std::string remark;
  const JsonField fields(after, "settings");
  for (const auto& [name, value] : fields.members()) {
    const std::string was = JsonField(before, path).at(name).string(), is = JsonField(value, name).string();
    if (was == is) continue;
    const std::string differs = str("the weights in '", path, "' were trained with ", was.empty() ? "none" : was,
                                    ", found ", is.empty() ? "none" : is);
    // No tensor's shape depends on these: a model may go on with others.
    if (name == "null-slot" || (flags.given(name) && (name == "topk" || name == "window")))
      remark += "note: --" + name + ": " + differs + ", and is trained with that from here on\n";
    else if (flags.given(name)) throw UsageError(str("--", name, ": ", differs, "; leave it out"));
    else throw UsageError(str("--model ", now.model, ": its --", name, ": ", differs, "; leave --model out"));
  }
  return remark;
}

std::string model_on_trust(const Config& c, const std::string& path) {
  return str("note: '", path, "' says nothing of heads, chunk, topk, window and null slot: --heads ", c.heads,
             " --chunk ", c.chunk, " --topk ", c.reach.topk, " --window ", c.reach.window, " --null-slot ",
             c.null_slot ? "on" : "off", " are taken as right; others would give other results\n");
}

void add_recompute_flag(Flags& flags, std::string& recompute) {
  flags.add_choice("recompute", recompute, "none|norms|layers",
                   "computed anew in backward, to save memory, with the same results: nothing, what norms and SwiGLU "
                   "give, or nearly all of each layer",
                   Flags::remembered);
}

Recompute recompute_named(const std::string& name) {
  return name == "layers" ? Recompute::layers : name == "norms" ? Recompute::norms : Recompute::none;
}

void TrainSettings::finish(int64_t vocab) {
  config.vocab = vocab;
  config.validate();
  if (tokens > 0) steps = ceil_div(tokens, batch * stage_chunks(0) * (config.chunk - 1));
  if (lr_final < 0 && lr_final != -1)
    throw UsageError(str("--lr-final: expected a number from 0 to 10, or -1 for a tenth of --lr, found ", lr_final));
  if (noise_scale_final < 0 && noise_scale_final != -1)
    throw UsageError(
        str("--noise-scale-final: expected 0 or more, or -1 for that of --noise-scale, found ", noise_scale_final));
  if (short_window > config.reach.window)
    throw UsageError(str("--short-window: expected at most --window, ", config.reach.window, ", found ", short_window));
  if (short_window >= 0 && config.groups.empty())
    throw UsageError("--short-window: expected a model that fetches, found --groups ''; leave one of them out");
  if (score_gradient != 1 && config.groups.empty())
    throw UsageError("--score-gradient: expected a model that fetches, found --groups ''; leave one of them out");
  if (!noise && (noise_scale != 1 || noise_scale_final != -1))
    throw UsageError("--noise-scale: expected --noise on, whose noise it multiplies; leave one of them out");
  if (micro() > batch) throw UsageError(str("--micro-batch: expected at most --batch, ", batch, ", found ", micro()));
}

void TrainSettings::go_on(const TrainSettings& before, int64_t done) {
  if (steps < done)
    throw UsageError(str(tokens > 0 ? "--tokens" : "--steps", ": expected ", done,
                         " steps at least, which the run has made ", "already, found ", steps,
                         "; give more, or start a new run from its weights with --init"));
  if (steps != before.steps) warmup = before.warmup_steps();
}

std::vector<std::string> TrainSettings::changes(const TrainSettings& before, int64_t done) const {
  std::vector<std::string> all;
  if (steps != before.steps)
    all.push_back(str(steps, " steps instead of ", before.steps, ", after the same ", warmup_steps(), " of warm-up",
                      done < steps ? str(": the cosine ends there, and the rate of step ", done + 1, " is ",
                                         significant(learning_rate(done), 3), ", where that of the run as it was is ",
                                         significant(before.learning_rate(done), 3))
                                   : ""));
  if (micro() != before.micro())
    all.push_back(str(micro(), " rows at once instead of ", before.micro(), ": the batch stays ", batch,
                      " rows, but sums are made in another order, so results differ in their last bits from those of "
                      "the run as it was"));
  return all;
}

int64_t TrainSettings::stage_rows(int64_t rows, int64_t stage) const {
  return std::max<int64_t>(1, rows * stage_chunks(0) / stage_chunks(stage));
}

int64_t TrainSettings::of_stage(const std::vector<int64_t>& list, int64_t stage) const {
  return list[std::min(stage, std::ssize(list) - 1)];
}

double TrainSettings::noise_scale_at(int64_t step) const {
  if (noise_scale_final < 0) return noise_scale;
  return noise_scale + (noise_scale_final - noise_scale) * static_cast<double>(step) /
                           static_cast<double>(std::max<int64_t>(1, steps - 1));
}

int64_t TrainSettings::window_at(int64_t step) const {
  if (short_window < 0 || step >= steps - ceil_div(steps, 10)) return config.reach.window;
  const Philox drawn =
      philox(static_cast<uint64_t>(seed), Draw::window, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32));
  return static_cast<double>(uniform_open(drawn.word[0])) < short_share ? short_window : config.reach.window;
}

double TrainSettings::learning_rate(int64_t step) const {
  if (step < warmup_steps()) return lr * static_cast<double>(step + 1) / static_cast<double>(warmup_steps());
  const double past = static_cast<double>(step - warmup_steps()),
               all = static_cast<double>(std::max<int64_t>(1, steps - warmup_steps()));
  return final_rate() + 0.5 * (lr - final_rate()) * (1 + std::cos(3.141592653589793 * std::min(1.0, past / all)));
}

Flags train_flags(TrainSettings& s) {
  Flags flags("train", "Trains a model on token shards and writes checkpoints and log.jsonl into a folder.");
  flags.heading("data");
  flags.add_patterns("data", s.data, "GLOB...", "training shards (tokenize makes them)", Flags::remembered);
  flags.add_patterns("val-data", s.val_data, "GLOB...", "validation shards; without them nothing is evaluated",
                     Flags::remembered);
  flags.add("tokenizer", s.tokenizer, "FILE", Tokenizer::accepted);
  flags.add("chunks", s.chunks, 1, 1 << 20, "C, chunks a row", Flags::run);
  flags.add("batch", s.batch, 1, 1 << 20, "rows a step, of all ranks together", Flags::run);
  flags.add("micro-batch", s.micro_batch, 0, 1 << 20, "rows that a rank takes at once; 0: all of its own",
            Flags::remembered);
  flags.add_switch("no-cross", s.no_cross, "a row is one document's, not cut from the stream of all", Flags::run);
  flags.heading("model");
  flags.add("init", s.init, "CHECKPOINT",
            "start from these weights: a RUN, a STEP, a .safetensors file, the index of a split one, or a folder of "
            "either; what they say of the model and the tokenizer is taken, and what is given must agree",
            Flags::run);
  add_model_flags(flags, s.model, s.config);
  flags.add_on_off("noise", s.noise, "Gumbel noise on the retrieval's scores", Flags::run);
  flags.add("noise-scale", s.noise_scale, 0, 1e3, "what it is multiplied by, at the first step", Flags::run);
  flags.add("noise-scale-final", s.noise_scale_final, -1, 1e3, "and at the last one, on a straight line; -1: the same",
            Flags::run);
  flags.add("score-gradient", s.score_gradient, 0, 1e6,
            "what backward multiplies the gradient of the retrieval's scores by: over 1 the retriever learns faster "
            "than what reads for it, which is for a training that goes on from one that reads (of several groups the "
            "earlier also by what comes through the later one's scores); 1: the slope of the loss",
            Flags::run);
  flags.add("short-window", s.short_window, -1, INT32_MAX,
            "a smaller W that some steps have in place of --window, so that a slot needs what is fetched; -1: none",
            Flags::run);
  flags.add("short-share", s.short_share, 0, 1,
            "the share of steps that have it, drawn at random; all of the last tenth have --window", Flags::run);
  flags.add("seed", s.seed, 0, INT64_MAX, "of weights, order of rows, noise and short windows", Flags::run);
  flags.heading("task");
  flags.add_choice(
      "task", s.task.task, "none|recall|single|two-hop",
      "learn to find needles in a haystack instead of shards: many questions a row, one, or many that take two steps",
      Flags::run);
  add_task_flags(flags, s.task, Flags::run);
  flags.add("curriculum", s.curriculum, 1, 1 << 20,
            "chunks a row, stage by stage, instead of --chunks; --batch is of the first stage, longer rows are fewer",
            Flags::run);
  flags.add("promote", s.promote, 0, 1,
            "share of answer tokens, over 20 steps, that ends a stage: those given more than half of the probability",
            Flags::run);
  flags.add("needles", s.needles, 1, 1 << 20,
            "needles (two-hop: chains) a row at most, stage by stage; the last number stays", Flags::run);
  flags.add("questions", s.questions, 1, 1 << 20, "questions a row at most, stage by stage (single: 1)", Flags::run);
  flags.add("answer-weight", s.answer_weight, 0, 1e6,
            "a: the loss is the mean over tokens plus a times the mean over answer tokens", Flags::run);
  flags.add_switch("landmark-answers", s.landmark_answers,
                   "with a gap: the landmark before an answer's chunk is asked for the answer's first token as well, "
                   "which what its chunk fetched tells; what it fetches next can build on it",
                   Flags::run);
  flags.heading("optimiser");
  flags.add("steps", s.steps, 0, int64_t{1} << 31, "updates in all; or give --tokens. With --resume: another end",
            Flags::remembered);
  flags.add("tokens", s.tokens, 0, int64_t{1} << 50, "real tokens in all, instead of --steps", Flags::remembered);
  flags.add("lr", s.lr, 0, 10, "learning rate after the warm-up", Flags::run);
  flags.add("lr-final", s.lr_final, -1, 10,
            "learning rate at the last step (cosine), at most --lr; -1: a tenth of --lr", Flags::run);
  flags.add("warmup", s.warmup, -1, int64_t{1} << 31, "steps of linear warm-up; -1: 2% of the steps", Flags::run);
  flags.add("weight-decay", s.weight_decay, 0, 10, "AdamW, matrices only", Flags::run);
  flags.add("beta1", s.beta1, 0, 0.999999, "AdamW", Flags::run);  // 1 would divide 0 by 0
  flags.add("beta2", s.beta2, 0, 0.999999, "AdamW", Flags::run);
  flags.add("clip", s.clip, 0, 1e9, "largest gradient norm; 0: any", Flags::run);
  flags.heading("saving");
  flags.add("out", s.out, "RUN", "the run's folder");
  flags.add_switch("resume", s.resume, "go on from the newest checkpoint in --out");
  flags.add_switch("fallback", s.fallback, "resume from an older checkpoint where the newest is damaged");
  flags.add("save-every", s.save_every, 0, int64_t{1} << 40,
            "steps between checkpoints, beside the best one and the last; 0: these alone", Flags::remembered);
  flags.add("keep", s.keep, 1, 1 << 20, "newest checkpoints to keep, beside the best one", Flags::remembered);
  flags.add("eval-every", s.eval_every, 0, int64_t{1} << 40, "steps between validations, and one at the end; 0: none",
            Flags::remembered);
  flags.add("eval-rows", s.eval_rows, 0, int64_t{1} << 40,
            "validation rows at most, spread over the data; 0: no validations", Flags::remembered);
  flags.add("print-every", s.print_every, 0, int64_t{1} << 40,
            "steps between the lines on the terminal, 0: none; log.jsonl has every step", Flags::remembered);
  flags.heading("machine");
  flags.add_choice("device", s.device, "auto|cpu|cuda", "auto: cuda where a GPU answers");
  flags.add("gpus", s.gpus, "N|all", "GPUs of this host to train on together; the run does not depend on how many");
  flags.add("ranks", s.ranks, 1, 1024, "with --device cpu: processes to train on together");
  flags.add_choice("precision", s.precision, "float|bf16", "of activations and products; bf16 on a GPU only",
                   Flags::run);
  add_recompute_flag(flags, s.recompute);
  flags.add("threads", s.threads, 0, 4096,
            "CPU threads; 0: one a processor, shared out among the ranks of a host. Results do not depend on it");
  return flags;
}

}  // namespace gca
