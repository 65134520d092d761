// A run: its settings (the flags of `train`), and what a checkpoint of it holds: weights, optimiser, tokenizer, state.
#pragma once
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "model.h"
#include "tokenizer/tokenizer.h"
#include "runtime/checkpoint.h"
#include "base/flags.h"
#include "base/safetensors.h"
#include "runtime/needles.h"

namespace gca {

// ---- settings -----------------------------------------------------------------------------------------------------
inline const Preset& preset(const std::string& name) {
  std::vector<std::string> names;
  for (const Preset& p : presets()) {
    if (p.name == name) return p;
    names.push_back(p.name);
  }
  std::string all;
  for (const std::string& n : names) all += (all.empty() ? "" : ", ") + n;
  throw UsageError("--model: expected one of " + all + ", found '" + name + "'" + did_you_mean(name, names));
}

inline void add_model_flags(Flags& flags, std::string& model, Config& c) {
  flags.add("model", model, "PRESET", "drt, drt-x2, swa, swa-14, small or tiny; the flags below change it", Flags::run);
  flags.add("width", c.width, 1, 65536, "D, columns of the residual stream", Flags::run);
  flags.add("heads", c.heads, 1, 65536, "H, attention heads", Flags::run);
  flags.add("ffn", c.ffn, 1, 1 << 20, "F, feed-forward width", Flags::run);
  flags.add("lower", c.lower, 0, 1024, "layers below the retrieval", Flags::run);
  flags.add("groups", c.groups, 1, 1024, "upper layers of each retrieval group; \"\" is the sliding-window baseline",
            Flags::run);
  flags.add("encoder", c.encoder, 0, 1024, "layers of the chunk encoder", Flags::run);
  flags.add("chunk", c.chunk, 2, 4096, "S, slots a chunk, its landmark included", Flags::run);
  flags.add("topk", c.topk, 1, max_topk, "K, chunks that each chunk fetches", Flags::run);
  flags.add("window", c.window, 0, INT32_MAX, "W, slots back that a slot attends to", Flags::run);
  flags.add_on_off("null-slot", c.null_slot,
                   "a zero key and value in each fetched chunk, so that nothing need be taken", Flags::run);
}

inline void add_recompute_flag(Flags& flags, std::string& recompute) {
  flags.add_choice("recompute", recompute, "none|norms|layers",
                   "computed anew in backward, to save memory, with the same results: nothing, what norms and SwiGLU "
                   "give, or nearly all of each layer",
                   Flags::remembered);
}
inline Recompute recompute_named(const std::string& name) {
  return name == "layers" ? Recompute::layers : name == "norms" ? Recompute::norms : Recompute::none;
}

struct TrainSettings {
  std::string model = "small", data, val_data, tokenizer = "bytes", out, init, device = "auto", precision = "float",
              recompute = "none";
  Config config = preset("small").config;
  int64_t batch = 4, micro_batch = 0, chunks = 10, steps = 0, tokens = 0, warmup = -1, seed = 1, threads = 0;
  int64_t print_every = 1, eval_every = 100, eval_rows = 32, save_every = 500, keep = 2;
  double lr = 1.5e-3, lr_final = 1.5e-4, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, clip = 1;
  bool resume = false, fallback = false, noise = true, no_cross = false;
  TaskSettings task;
  std::vector<int64_t> curriculum, needles = {8}, questions = {8};
  double promote = 0.95, answer_weight = 2;

  // The stage of a curriculum fixes the chunks of a row. Longer rows are fewer, so that a step keeps its slots.
  int64_t stages() const { return std::max<int64_t>(1, std::ssize(curriculum)); }
  int64_t stage_chunks(int64_t stage) const { return curriculum.empty() ? chunks : curriculum[stage]; }
  int64_t stage_rows(int64_t rows, int64_t stage) const {
    return std::max<int64_t>(1, rows * stage_chunks(0) / stage_chunks(stage));
  }
  int64_t of_stage(const std::vector<int64_t>& list, int64_t stage) const {
    return list[std::min(stage, std::ssize(list) - 1)];
  }
  int64_t micro() const { return micro_batch ? micro_batch : batch; }
  int64_t warmup_steps() const { return warmup >= 0 ? warmup : steps / 50; }
  // Linear to lr over the warm-up, then a cosine to lr_final at the last step.
  double learning_rate(int64_t step) const {
    if (step < warmup_steps()) return lr * static_cast<double>(step + 1) / static_cast<double>(warmup_steps());
    const double past = static_cast<double>(step - warmup_steps()),
                 all = static_cast<double>(std::max<int64_t>(1, steps - warmup_steps()));
    return lr_final + 0.5 * (lr - lr_final) * (1 + std::cos(3.141592653589793 * std::min(1.0, past / all)));
  }
};

inline Flags train_flags(TrainSettings& s) {
  Flags flags("train", "Trains a model on token shards and writes checkpoints and log.jsonl into a folder.");
  flags.add("data", s.data, "GLOB", "training shards (tokenize makes them)", Flags::remembered);
  flags.add("val-data", s.val_data, "GLOB", "validation shards; without them nothing is evaluated", Flags::remembered);
  flags.add("tokenizer", s.tokenizer, "FILE", "of the shards: one of ours, GPT-2's tokenizer.json, or the word bytes");
  flags.add("out", s.out, "RUN", "the run's folder");
  flags.add_switch("resume", s.resume, "go on from the newest checkpoint in --out");
  flags.add_switch("fallback", s.fallback, "resume from an older checkpoint where the newest is damaged");
  flags.add("init", s.init, "CHECKPOINT", "start from these weights: a RUN, a STEP, or a .safetensors file",
            Flags::run);
  add_model_flags(flags, s.model, s.config);
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
  flags.add("batch", s.batch, 1, 1 << 20, "rows a step", Flags::run);
  flags.add("micro-batch", s.micro_batch, 0, 1 << 20, "rows at once; 0: the whole batch", Flags::run);
  flags.add("chunks", s.chunks, 1, 1 << 20, "C, chunks a row", Flags::run);
  flags.add("steps", s.steps, 0, int64_t{1} << 31, "updates in all; or give --tokens", Flags::run);
  flags.add("tokens", s.tokens, 0, int64_t{1} << 50, "real tokens in all, instead of --steps", Flags::run);
  flags.add("lr", s.lr, 0, 10, "learning rate after the warm-up", Flags::run);
  flags.add("lr-final", s.lr_final, 0, 10, "learning rate at the last step (cosine)", Flags::run);
  flags.add("warmup", s.warmup, -1, int64_t{1} << 31, "steps of linear warm-up; -1: 2% of the steps", Flags::run);
  flags.add("weight-decay", s.weight_decay, 0, 10, "AdamW, matrices only", Flags::run);
  flags.add("beta1", s.beta1, 0, 0.999999, "AdamW", Flags::run);  // 1 would divide 0 by 0
  flags.add("beta2", s.beta2, 0, 0.999999, "AdamW", Flags::run);
  flags.add("clip", s.clip, 0, 1e9, "largest gradient norm; 0: any", Flags::run);
  flags.add_on_off("noise", s.noise, "Gumbel noise on the retrieval's scores", Flags::run);
  flags.add_switch("no-cross", s.no_cross, "a row is one document's, not cut from the stream of all", Flags::run);
  flags.add("seed", s.seed, 0, INT64_MAX, "of weights, order of rows, and noise", Flags::run);
  flags.add("print-every", s.print_every, 1, int64_t{1} << 40,
            "steps between the lines on the terminal; log.jsonl has every step", Flags::remembered);
  flags.add("eval-every", s.eval_every, 1, int64_t{1} << 40, "steps between validations", Flags::remembered);
  flags.add("eval-rows", s.eval_rows, 1, int64_t{1} << 40, "validation rows at most, spread over the data",
            Flags::remembered);
  flags.add("save-every", s.save_every, 1, int64_t{1} << 40, "steps between checkpoints (one more at the end)",
            Flags::remembered);
  flags.add("keep", s.keep, 1, 1 << 20, "newest checkpoints to keep, beside the best one", Flags::remembered);
  flags.add_choice("device", s.device, "auto|cpu|cuda", "auto: cuda where a GPU answers");
  flags.add_choice("precision", s.precision, "float|bf16", "of activations and products; bf16 on a GPU only",
                   Flags::run);
  add_recompute_flag(flags, s.recompute);
  flags.add("threads", s.threads, 0, 4096, "CPU threads; 0: one a processor. Results do not depend on it");
  return flags;
}

// ---- checkpoints --------------------------------------------------------------------------------------------------
struct SavedRun {
  Checkpoint checkpoint;
  TrainSettings settings;
  Tokenizer tokenizer;
  static constexpr const char *model_file = "model.safetensors", *optimizer_file = "optimizer.safetensors",
                              *tokenizer_file = "tokenizer.bpe";

  JsonField state() const { return {checkpoint.state, checkpoint.folder + "/state.json"}; }

  // path: a RUN (its newest step) or a STEP.
  static SavedRun open(const std::string& path, bool fallback = false) {
    Checkpoint checkpoint = open_checkpoint(path, fallback);
    for (const std::string& error : checkpoint.passed_over) print_error("passed over: ", error, "\n");
    Tokenizer tokenizer = Tokenizer::load(checkpoint.file(tokenizer_file));
    SavedRun saved{std::move(checkpoint), {}, std::move(tokenizer)};
    train_flags(saved.settings).restore(saved.state().at("settings"));
    saved.settings.config.vocab = saved.tokenizer.vocab_size();
    try {
      saved.settings.config.validate();
    } catch (const UsageError& error) {  // not of this command's line
      throw Error(saved.state().where() + ": settings: " + error.what());
    }
    return saved;
  }
};

inline Shape tensor_shape(const Tensor& t) { return t.columns ? Shape{t.rows, t.columns} : Shape{t.rows}; }

// The tensors of one flat buffer as entries of a file, names begun with prefix; they must outlive the writing.
template <class Device>
void add_entries(std::vector<SafetensorsEntry>& entries, const DRT<Device>& model,
                 const typename DRT<Device>::master* buffer, const std::string& prefix) {
  using master = typename DRT<Device>::master;
  for (const Tensor& t : model.table.tensors)
    entries.push_back({prefix + t.name, Dtype::of<master>(), tensor_shape(t),
                       [&model, buffer, &t](void* out, int64_t first, int64_t count) {
                         model.device.download(out, buffer + t.offset + first,
                                               count * static_cast<int64_t>(sizeof(master)));
                       }});
}

template <class Device>
void save_weights(const std::string& path, const DRT<Device>& model) {
  std::vector<SafetensorsEntry> entries;
  add_entries(entries, model, model.masters, "");
  write_safetensors(path, {{"format", "pt"}}, entries);
}
template <class Device>
void save_optimizer(const std::string& path, const DRT<Device>& model) {
  std::vector<SafetensorsEntry> entries;
  add_entries(entries, model, model.m, "m.");
  add_entries(entries, model, model.v, "v.");
  write_safetensors(path, {}, entries);
}

// Whether an output head of its own is the embedding, number for number.
inline bool is_tied_head(const SafetensorsFile& file, const SafetensorsTensor& head) {
  const SafetensorsTensor* embedding = file.find("model.embed_tokens.weight");
  if (!embedding || embedding->shape != head.shape) return false;
  std::vector<float> a, b;
  for (int64_t first = 0; first < head.count; first += static_cast<int64_t>(a.size())) {
    a.resize(std::min<int64_t>(head.count - first, 1 << 20));
    b.resize(a.size());
    file.read(head, first, static_cast<int64_t>(a.size()), a.data());
    file.read(*embedding, first, static_cast<int64_t>(b.size()), b.data());
    if (a != b) return false;
  }
  return true;
}
// An Error that lists every name that the model needs and the file lacks, and every one that the model has no place
// for.
template <class Device>
void check_names(const SafetensorsFile& file, const DRT<Device>& model, const std::vector<std::string>& prefixes) {
  std::set<std::string> known;
  for (const std::string& prefix : prefixes)
    for (const Tensor& t : model.table.tensors) known.insert(prefix + t.name);
  std::string missing, surplus;
  for (const std::string& name : known)
    if (!file.find(name)) missing += "\n  " + name;
  int64_t buffers = 0;
  for (const SafetensorsTensor& tensor : file.tensors()) {
    if (known.contains(tensor.name)) continue;
    if (tensor.name == "lm_head.weight" && is_tied_head(file, tensor))
      print_error("'", file.path(), "': 'lm_head.weight' is the embedding again and is left out\n");
    else if (tensor.name.find(".rotary_emb.") != std::string::npos) buffers++;
    else surplus += "\n  " + tensor.name;
  }
  if (!missing.empty() || !surplus.empty())
    throw Error(
        "'" + file.path() + "' is not of this model; check --model and the sizes." +
        (missing.empty() ? "" : " Missing:" + missing) +
        (surplus.empty() ? "" : std::string(missing.empty() ? "" : "\n") + " Without a place in it:" + surplus));
  if (buffers)
    print_error("'", file.path(), "': ", buffers,
                " tables of rotary embeddings are left out: they are computed here\n");
}
// The embedding of a file whose vocabulary was rounded up, as the released model's: rows that no token has are left
// out.
inline bool is_padded(const SafetensorsTensor& found, const Tensor& t) {
  return t.offset == 0 && found.shape.size() == 2 && found.shape[1] == t.columns && found.shape[0] > t.rows &&
         found.shape[0] <= round_up(t.rows, 128);
}
// One flat buffer from a file whose names have been checked.
template <class Device>
void load_buffer(const SafetensorsFile& file, DRT<Device>& model, typename DRT<Device>::master* buffer,
                 const std::string& prefix) {
  using master = typename DRT<Device>::master;
  std::vector<master> values;
  for (const Tensor& t : model.table.tensors) {
    const SafetensorsTensor& found = file.at(prefix + t.name);
    values.resize(t.size());
    if (is_padded(found, t)) file.read(found, 0, t.size(), values.data());
    else file.read(prefix + t.name, tensor_shape(t), values.data());
    if (!std::all_of(values.begin(), values.end(), [](master x) { return std::isfinite(x); }))
      throw Error("'" + file.path() + "': tensor '" + prefix + t.name +
                  "': expected finite numbers, found one that is not; take an older checkpoint or make the file anew");
    model.device.upload(buffer + t.offset, values.data(), t.size() * static_cast<int64_t>(sizeof(master)));
  }
}
// Weights from a file, F32, BF16 or F16, the names the released model's.
template <class Device>
void load_weights(const std::string& path, DRT<Device>& model) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  check_names(file, model, {""});
  load_buffer(file, model, model.masters, "");
  model.weights_changed();
}
template <class Device>
void load_optimizer(const std::string& path, DRT<Device>& model) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  check_names(file, model, {"m.", "v."});
  load_buffer(file, model, model.m, "m.");
  load_buffer(file, model, model.v, "v.");
}

// ---- memory -------------------------------------------------------------------------------------------------------
inline std::string mebibytes(int64_t n_bytes) {
  return str(fixed(static_cast<double>(n_bytes) / (1 << 20), 1), " MiB");
}

// Plans and allocates activations for B rows of T slots. Where they and the model do not fit, an Error that says which
// B would.
template <class Device>
void allocate_or_explain(DRT<Device>& model, int64_t B, int64_t T) {
  const int64_t room = model.device.free_bytes();
  auto needed = [&](int64_t rows) {
    model.plan(rows, T);
    return model.model_memory().total_bytes() + model.activation_memory().total_bytes();
  };
  if (const int64_t n_bytes = needed(B); n_bytes > room) {
    int64_t fits = 0;  // by bisection: fits rows do, too_many do not
    for (int64_t too_many = B; too_many - fits > 1;) {
      const int64_t middle = fits + (too_many - fits) / 2;
      (needed(middle) > room ? too_many : fits) = middle;
    }
    throw Error(str("the model and ", B, " rows of ", T, " slots need ", mebibytes(n_bytes), ", ", mebibytes(room),
                    " are free; ") +
                (fits ? str("--micro-batch ", fits, " fits")
                      : std::string("not even one row fits: use fewer --chunks or a smaller model")) +
                (model.recompute == Recompute::layers ? "" : "; in training --recompute layers needs less"));
  }
  model.allocate();
  model.commit_activations();
}

}  // namespace gca
