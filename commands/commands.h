// The commands that read a checkpoint or need none: tokenizer-train, tokenize, encode, decode, eval, passkey, generate,
// inspect, export, verify, info.
#pragma once
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "dataloader.h"
#include "gca_cpu.h"
#ifdef GCA_CUDA
#include "gca_kernels.cuh"
#endif
#include "tokenizer/train.h"
#include "runtime/run.h"
#include "runtime/stream.h"
#include "commands/verify.h"

namespace gca {

// ---- what all commands need ---------------------------------------------------------------------------------------
inline std::string build_description() {
#ifdef GCA_CUDA
  return std::string("CPU and CUDA, ") + __VERSION__;
#else
  return std::string("CPU only, ") + __VERSION__;
#endif
}

// Prints the help where --help is among the arguments.
inline bool wants_help(const std::vector<std::string>& arguments, const Flags& flags) {
  const bool wanted = std::find(arguments.begin(), arguments.end(), "--help") != arguments.end();
  if (wanted) print(flags.help());
  return wanted;
}

// Calls body(device) with the backend that --device and --precision name.
template <class Body>
int with_device(const std::string& device, const std::string& precision, int64_t threads, Body body) {
#ifdef GCA_CUDA
  if (device == "cuda" || (device == "auto" && gpu_count() > 0)) {
    if (precision == "bf16") {
      Gpu<__nv_bfloat16> gpu;
      return body(gpu);
    }
    Gpu<float> gpu;
    return body(gpu);
  }
#else
  if (device == "cuda")
    throw UsageError(
        "--device cuda: this program was built without CUDA; put nvcc into PATH and run make, or use --device cpu");
#endif
  if (precision == "bf16")
    throw UsageError("--precision bf16 needs a GPU (--device cuda); on the CPU use --precision float");
  Cpu<float> cpu(static_cast<int>(threads));
  return body(cpu);
}

// Bytes to standard output: as they are, but on a terminal without what could steer it.
inline void print_bytes(const std::string& bytes) {
  const std::string shown = isatty(STDOUT_FILENO) ? printable(bytes, true) : bytes;
  if (fwrite(shown.data(), 1, shown.size(), stdout) != shown.size() || fflush(stdout) != 0)
    throw system_error("cannot write standard output", errno);
}

// ---- evaluation ---------------------------------------------------------------------------------------------------
struct Evaluation {
  static constexpr int places = 8;
  int64_t rows = 0, targets = 0;
  double sum = 0;                                           // of cross entropies, nats
  double bytes = 0;                                         // that the targets stand for
  double place_sum[places] = {}, place_count[places] = {};  // by eighths of the row
  double loss() const { return targets ? sum / static_cast<double>(targets) : 0; }
};

// Cross entropy over up to max_rows rows, evenly spread over the data, B rows of T slots at once, without noise. stop()
// ends it early.
template <class Device, class Stop>
Evaluation evaluate(DRT<Device>& model, const Rows& rows, int64_t max_rows, int64_t B, int64_t T,
                    const Selection& selection, Stop stop, const Tokenizer* tokenizer = nullptr) {
  const int64_t count = std::min(rows.count(), max_rows);
  std::vector<int32_t> tokens(B * T), targets(tokens.size());
  std::vector<typename DRT<Device>::stat> losses(tokens.size());
  Evaluation result;
  for (int64_t first = 0; first < count && !stop(); first += B) {
    const int64_t here = std::min(B, count - first);
    for (int64_t r = 0; r < here; r++)
      rows.fill_window((first + r) * rows.count() / count, &tokens[r * T], &targets[r * T]);
    model.upload(tokens.data(), targets.data(), nullptr, here * T);
    typename DRT<Device>::Input in{here, T, selection};
    in.selection.first_row = first;
    model.forward(in);
    model.head(0, false);
    model.device.download(losses.data(), model.loss, here * T * static_cast<int64_t>(sizeof(losses[0])));
    for (int64_t i = 0; i < here * T; i++) {
      const size_t at = i;
      if (targets[at] < 0) continue;
      const int64_t place = i % T * Evaluation::places / T;
      const double loss = static_cast<double>(losses[at]);
      result.sum += loss;
      result.targets++;
      result.place_sum[place] += loss;
      result.place_count[place]++;
      if (tokenizer) result.bytes += static_cast<double>(tokenizer->bytes_of(targets[at]).size());
    }
    result.rows += here;
  }
  return result;
}

struct ModelSource {
  std::string checkpoint, device = "auto", precision = "float";
  int64_t threads = 0;
  bool fallback = false;
  void add_to(Flags& flags) {
    flags.add("checkpoint", checkpoint, "STEP", "a checkpoint's folder, or a RUN: its newest");
    flags.add_switch("fallback", fallback, "take an older checkpoint of the RUN where the newest is damaged");
    flags.add_choice("device", device, "auto|cpu|cuda", "auto: cuda where a GPU answers");
    flags.add_choice("precision", precision, "float|bf16", "bf16 on a GPU only");
    flags.add("threads", threads, 0, 4096, "CPU threads; 0: one a processor");
  }
};

inline void add_ablations(Flags& flags, bool& no_retrieval, bool& random_retrieval) {
  flags.add_switch("no-retrieval", no_retrieval, "GCA gives zero");
  flags.add_switch("random-retrieval", random_retrieval, "K uniform past chunks, weights by their scores");
}
inline Selection ablation(bool no_retrieval, bool random_retrieval, int64_t seed) {
  if (no_retrieval && random_retrieval)
    throw UsageError("--no-retrieval and --random-retrieval exclude each other: choose one");
  Selection selection;
  selection.picking = no_retrieval ? Picking::none : random_retrieval ? Picking::uniform : Picking::learned;
  selection.seed = static_cast<uint64_t>(seed);
  return selection;
}

inline int eval_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  std::string data;
  int64_t chunks = 0, max_rows = int64_t{1} << 40, batch = 4, seed = 1;
  bool no_retrieval = false, random_retrieval = false, no_cross = false;
  Flags flags("eval",
              "Loss, perplexity and bits per byte of a checkpoint on token shards, also by position in the row.");
  source.add_to(flags);
  flags.add("data", data, "GLOB", "token shards");
  flags.add("chunks", chunks, 0, 1 << 20, "C, chunks a row; 0: as in training");
  flags.add("rows", max_rows, 1, int64_t{1} << 40, "rows at most, spread over the data");
  flags.add("batch", batch, 1, 1 << 20, "rows at once");
  flags.add_switch("no-cross", no_cross, "a row is one document's");
  add_ablations(flags, no_retrieval, random_retrieval);
  flags.add("seed", seed, 0, INT64_MAX, "of --random-retrieval");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("data");
  const Selection selection = ablation(no_retrieval, random_retrieval, seed);
  const SavedRun saved = SavedRun::open(source.checkpoint, source.fallback);
  const Config& config = saved.settings.config;
  if (!chunks) chunks = saved.settings.chunks;
  const TokenStream stream(data, saved.tokenizer);
  const Rows rows(stream, saved.tokenizer, chunks, config.chunk, 0, !no_cross);
  batch = std::min({batch, max_rows, rows.count()});
  for (const std::string& note : {stream.notes(), rows.notes()})
    if (!note.empty()) print(note, "\n");
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    allocate_or_explain(model, batch, chunks * config.chunk);
    load_weights(saved.checkpoint.file(SavedRun::model_file), model);
    const auto began = std::chrono::steady_clock::now();
    const Evaluation result = evaluate(
        model, rows, max_rows, batch, chunks * config.chunk, selection, [] { return false; }, &saved.tokenizer);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    print("checkpoint ", saved.checkpoint.folder, ", ", result.rows, " rows of ", chunks * config.chunk, " slots (",
          chunks * (config.chunk - 1), " tokens)",
          no_retrieval       ? ", without retrieval"
          : random_retrieval ? ", random retrieval"
                             : "",
          "\n");
    print("loss ", fixed(result.loss(), 4), "  perplexity ", fixed(std::exp(result.loss()), 3), "  bits per byte ",
          fixed(result.bytes > 0 ? result.sum / std::log(2.0) / result.bytes : NAN, 4), "  (", result.targets,
          " targets, ", fixed(static_cast<double>(result.rows * chunks * config.chunk) / seconds, 0), " slots/s)\n");
    for (int i = 0; i < Evaluation::places; i++)
      if (result.place_count[i] > 0)
        print("  slots ", right(i * chunks * config.chunk / Evaluation::places, 6), "..",
              left((i + 1) * chunks * config.chunk / Evaluation::places - 1, 6), " loss ",
              fixed(result.place_sum[i] / result.place_count[i], 4), "\n");
    return 0;
  });
}

// ---- passkey ------------------------------------------------------------------------------------------------------
// The likeliest tokens at the answer's slots of row b of the last forward pass, the landmark left out.
template <class Device>
std::vector<int32_t> likeliest(DRT<Device>& model, int64_t first_row, int64_t count, int32_t landmark) {
  const int64_t V = model.table.padded_vocab;
  std::vector<typename DRT<Device>::act> logits(count * V);
  model.piece_of_logits(first_row, count);
  model.device.download(logits.data(), model.logits, count * V * static_cast<int64_t>(sizeof(logits[0])));
  std::vector<int32_t> best;
  for (int64_t i = 0; i < count; i++) {
    std::vector<float> row;
    for (int64_t j = 0; j < model.config.vocab; j++) row.push_back(static_cast<float>(logits[i * V + j]));
    row[landmark] = -INFINITY;
    best.push_back(sample_token(row, 0, 1, 0, 0));
  }
  return best;
}

// Picks and weights of a group for B rows of C chunks, (B,C+1,K).
template <class Device>
struct FetchedChunks {
  std::vector<int32_t> pick;
  std::vector<typename DRT<Device>::stat> w;
  FetchedChunks(const DRT<Device>& model, size_t group, int64_t B, int64_t C)
      : pick(B * (C + 1) * model.config.topk), w(pick.size()) {
    model.device.download(pick.data(), model.groups[group].pick, static_cast<int64_t>(pick.size() * sizeof(pick[0])));
    model.device.download(w.data(), model.groups[group].w, static_cast<int64_t>(w.size() * sizeof(w[0])));
  }
};

// One trial in words: the question, what was fetched for its answer, and the answer as the model gives it when nobody
// helps.
template <class Device>
void show_trial(DRT<Device>& model, TaskRow row, int64_t C, const Selection& selection, const Tokenizer& tokenizer) {
  const int64_t S = model.config.chunk, K = model.config.topk;
  const Question& question = row.questions[0];
  auto says = [&](int64_t first, int64_t last) {
    std::string text;
    for (int64_t i = first; i < last; i++)
      if (row.tokens[i] != tokenizer.landmark) text += tokenizer.printable(row.tokens[i]);
    return text;
  };
  print("\n", C, " chunks; the needle is in chunk ", row.needles[question.needles[0]].chunk,
        ". The question ends chunk ", question.chunk, ", the answer is in chunk ", question.first_slot / S, ":\n  ...",
        says(question.chunk * S, question.first_slot), "|", says(question.first_slot, question.first_slot + 1), "\n");
  std::vector<int32_t> given;
  for (size_t i = 0; i < question.answer.size(); i++) {
    model.upload(row.tokens.data(), nullptr, nullptr, C * S);
    model.forward({1, C * S, selection});
    given = likeliest(model, question.first_slot, std::ssize(question.answer), tokenizer.landmark);
    row.tokens[static_cast<size_t>(question.first_slot) + i + 1] = given[i];
  }
  for (size_t g = 0; g < model.groups.size(); g++) {
    const FetchedChunks<Device> fetched(model, g, 1, C);
    print("fetched for it", model.groups.size() > 1 ? str(" by group ", g).c_str() : "", ", with weight:\n");
    for (int64_t k = 0; k < K; k++) {
      const size_t at = question.first_slot / S * K + k;
      if (fetched.pick[at] >= 0)
        print("  chunk ", right(fetched.pick[at], 5), "  ", fixed(static_cast<double>(fetched.w[at]), 3), "  ",
              says(fetched.pick[at] * S, (fetched.pick[at] + 1) * S), "\n");
    }
  }
  std::string answer, expected;
  for (const int32_t token : given) answer += tokenizer.printable(token);
  for (const int32_t token : question.answer) expected += tokenizer.printable(token);
  print("answer: ", answer, " (", answer == expected ? "right" : ("expected " + expected), ")\n");
}

inline int passkey_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  TaskSettings task;
  std::unique_ptr<SavedRun> saved;
  if (const std::string checkpoint = Flags::peek(arguments, "checkpoint");
      !checkpoint.empty()) {  // its run's task is where the settings start from
    saved = std::make_unique<SavedRun>(
        SavedRun::open(checkpoint, std::find(arguments.begin(), arguments.end(), "--fallback") != arguments.end()));
    task = saved->settings.task;
  }
  if (!task.two_hop()) task.task = "single";
  std::vector<int64_t> lengths = {4096}, trials = {100};
  int64_t others = 4, chains = 2, show = 0, seed = 1, batch_slots = 16384;
  bool no_retrieval = false, random_retrieval = false, far_only = false;
  std::string out;
  Flags flags("passkey", "Hides needles in a text, asks for them at its end, and counts the right answers.");
  source.add_to(flags);
  flags.add_choice("task", task.task, "single|two-hop",
                   "the needle's name leads to its value; or to a name that leads to it");
  add_task_flags(flags, task, Flags::setup);
  flags.add("length", lengths, 1, int64_t{1} << 40, "slots of a row, whole chunks; several lengths are tried in turn");
  flags.add("trials", trials, 1, 1 << 30, "trials a length; the last number stays");
  flags.add("others", others, 0, 1 << 20, "single: needles with other names in each row");
  flags.add("chains", chains, 1, 1 << 20, "two-hop: chains in each row");
  add_ablations(flags, no_retrieval, random_retrieval);
  flags.add_switch("far-only", far_only, "leave out the trials whose needle the stacked windows may reach");
  flags.add("show", show, 0, 1 << 20, "trials of the first length to print in words");
  flags.add("out", out, "FILE", "append the figures to it, a line of JSON a row of the table");
  flags.add("batch-slots", batch_slots, 1, int64_t{1} << 40, "slots at once, in whole rows");
  flags.add("seed", seed, 0, INT64_MAX, "of text, needles and places, and of --random-retrieval");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("haystack");
  if (lengths.empty() || trials.empty())
    throw UsageError("--length and --trials: expected one number at least, found none");
  const Config& config = saved->settings.config;
  const Tokenizer& tokenizer = saved->tokenizer;
  const int64_t S = config.chunk, K = config.topk, reach = (config.lower + config.upper()) * config.window;
  for (const int64_t length : lengths)
    if (length % S || length < 3 * S)
      throw UsageError(str("--length: expected a multiple of ", S,
                           ", the slots of a chunk, and three chunks at least, found ", length));
  const Selection selection = ablation(no_retrieval, random_retrieval, seed);
  const Haystack haystack = Haystack::load(task.haystack, tokenizer);
  const Task maker(task, tokenizer, haystack, S);
  if (task.two_hop()) others = chains - 1;
  maker.check_names(others + 1);
  print(task.task,
        no_retrieval       ? ", without retrieval"
        : random_retrieval ? ", random retrieval"
                           : "",
        ": ", maker.answer_length(), " tokens in an answer, ", others, " other ", task.two_hop() ? "chains" : "needles",
        "; text of ", haystack.files, " files (", haystack.left_out, " left out); windows reach ", reach, " slots\n");
  print(right("slots", 9), " ", right("tokens", 9), " ", right("chunks", 7), " ", left("place", 5), " ",
        right("trials", 6), " ", right("exact", 7), " ", left("(95%)", 14), " ", right("forced", 7), " ",
        right("first", 7), " ", right("hit", 7), " ", right("chance", 8), "  ", left("exact by depth, oldest", 22), " ",
        right("slots/s", 8), " ", right("memory", 11), "\n");
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    using Model = DRT<std::remove_reference_t<decltype(device)>>;
    for (size_t l = 0; l < lengths.size(); l++) {
      const int64_t C = lengths[l] / S, T = lengths[l], B = std::max<int64_t>(1, batch_slots / T),
                    count = trials[std::min(l, trials.size() - 1)];
      Model model(device, config, Use::inference);
      allocate_or_explain(model, std::min(B, count), T);
      load_weights(saved->checkpoint.file(SavedRun::model_file), model);
      const int64_t far = maker.far_chunks(C, reach);
      for (const bool near : {false, true}) {
        if (near && far_only) continue;
        if ((near ? C - 2 - task.gap - far : far) < (task.two_hop() ? 2 : 1)) {
          print(right(T, 9), " ", right(C * (S - 1), 9), " ", right(C, 8), "  ", left(near ? "near" : "far", 5),
                " no chunk lies there\n");
          continue;
        }
        Score score;
        for (int64_t done = 0; done < count; done += B) {
          std::vector<TaskRow> rows;
          std::vector<int32_t> tokens;
          for (int64_t i = done; i < std::min(done + B, count); i++) {
            rows.push_back(maker.trial(static_cast<uint64_t>(seed), i, C, others, reach, near));
            tokens.insert(tokens.end(), rows.back().tokens.begin(), rows.back().tokens.end());
          }
          const int64_t here = std::ssize(rows);
          const auto began = std::chrono::steady_clock::now();
          Selection drawn = selection;
          drawn.first_row = done;
          model.upload(tokens.data(), nullptr, nullptr, here * T);
          model.forward({here, T, drawn});
          std::vector<FetchedChunks<std::remove_reference_t<decltype(device)>>> fetched;
          for (size_t g = 0; g < model.groups.size(); g++) fetched.emplace_back(model, g, here, C);
          for (int64_t b = 0; b < here; b++) {
            // Greedy and right so far, the model reads what stands in the row already: the row's own answer gives
            // free-running figures too.
            const Question& question = rows[b].questions[0];
            const std::vector<int32_t> given =
                likeliest(model, b * T + question.first_slot, std::ssize(question.answer), tokenizer.landmark);
            const bool exact = given == question.answer;
            auto is_fetched = [&](int64_t needle) {
              const int64_t row = (b * (C + 1) + question.first_slot / S) * K;
              return std::any_of(fetched.begin(), fetched.end(), [&](const auto& f) {
                return std::find(f.pick.begin() + row, f.pick.begin() + row + K, rows[b].needles[needle].chunk) !=
                       f.pick.begin() + row + K;
              });
            };
            score.trials++;
            score.exact += exact;
            score.first += given[0] == question.answer[0];
            score.hits += std::all_of(question.needles.begin(), question.needles.end(), is_fetched);
            for (size_t i = 0; i < given.size(); i++) {
              score.tokens++;
              score.tokens_right += given[i] == question.answer[i];
            }
            const int64_t chunk = rows[b].needles[0].chunk,
                          depth = (near ? chunk - far : chunk) * Score::depths / (near ? C - 2 - task.gap - far : far);
            score.depth_trials[depth]++;
            score.depth_exact[depth] += exact;
          }
          score.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        }
        const auto [low, high] = Score::interval(score.exact, score.trials);
        const double n = static_cast<double>(score.trials), speed = n * static_cast<double>(T) / score.seconds;
        std::string by_depth;
        Json depth_list = Json::array();
        for (int i = 0; i < Score::depths; i++) {
          const double share = static_cast<double>(score.depth_exact[i]) / static_cast<double>(score.depth_trials[i]);
          by_depth += score.depth_trials[i] ? str(right(fixed(100 * share, 0), 4), "% ") : "    - ";
          depth_list.push_back(share);
        }
        const int64_t memory = model.model_memory().total_bytes() + model.activation_memory().total_bytes();
        const double chance = maker.chance(C, random_retrieval ? K : 0, model.groups.size());
        print(right(T, 9), " ", right(C * (S - 1), 9), " ", right(C, 7), " ", left(near ? "near" : "far", 5), " ",
              right(score.trials, 6), " ", right(fixed(100 * static_cast<double>(score.exact) / n, 1), 6), "% ",
              left(str("(", fixed(100 * low, 1), "-", fixed(100 * high, 1), ")"), 14), " ",
              right(fixed(100 * static_cast<double>(score.tokens_right) / static_cast<double>(score.tokens), 1), 6),
              "% ", right(fixed(100 * static_cast<double>(score.first) / n, 1), 6), "% ",
              right(fixed(100 * static_cast<double>(score.hits) / n, 1), 6), "% ",
              right(significant(100 * chance, 2), 7), "%  ", left(by_depth, 22), " ", right(fixed(speed, 0), 8), " ",
              right(mebibytes(memory), 11), "\n");
        fflush(stdout);
        if (out.empty()) continue;
        Json line = Json::object();
        line["task"] = task.task;
        line["retrieval"] = no_retrieval ? "none" : random_retrieval ? "random" : "learned";
        line["place"] = near ? "near" : "far";
        line["slots"] = T;
        line["tokens"] = C * (S - 1);
        line["chunks"] = C;
        line["trials"] = score.trials;
        line["exact"] = static_cast<double>(score.exact) / n;
        line["exact_low"] = low;
        line["exact_high"] = high;
        line["teacher_forced"] = static_cast<double>(score.tokens_right) / static_cast<double>(score.tokens);
        line["first_right"] = static_cast<double>(score.first) / n;
        line["hit"] = static_cast<double>(score.hits) / n;
        line["exact_by_depth"] = depth_list;
        line["slots_per_second"] = speed;
        line["memory_bytes"] = memory;
        line["chance"] = chance;
        line["checkpoint"] = saved->checkpoint.folder;
        line["seed"] = seed;
        append_line(out, line.dump());
      }
    }
    if (show) {
      const int64_t C = lengths[0] / S;
      Model model(device, config, Use::inference);
      allocate_or_explain(model, 1, lengths[0]);
      load_weights(saved->checkpoint.file(SavedRun::model_file), model);
      const bool near = maker.far_chunks(C, reach) < (task.two_hop() ? 2 : 1);
      for (int64_t i = 0; i < show; i++)
        show_trial(model, maker.trial(static_cast<uint64_t>(seed), i, C, others, reach, near), C, selection, tokenizer);
    }
    return 0;
  });
}

// ---- generate -----------------------------------------------------------------------------------------------------
inline int generate_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  std::string prompt, context;
  std::vector<int64_t> prompt_ids;
  int64_t count = 200, seed = 1;
  double temperature = 0.8, top_p = 0.95;
  Flags flags("generate", "Continues a prompt. Temperature 0 is greedy: exact and repeatable.");
  source.add_to(flags);
  flags.add("prompt", prompt, "TEXT", "what to continue");
  flags.add("prompt-ids", prompt_ids, 0, INT32_MAX, "the prompt as token ids, special ones too, instead of --prompt");
  flags.add("context", context, "FILE",
            "text that goes before the prompt; its front is cut so that the prompt's last token opens a chunk");
  flags.add("count", count, 1, 1 << 30, "tokens to generate at most (end-of-text ends it)");
  flags.add("temperature", temperature, 0, 100, "0: always the likeliest token");
  flags.add("top-p", top_p, 0, 1, "draw from the smallest set of tokens with this probability");
  flags.add("seed", seed, 0, INT64_MAX, "of the draws");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  if (!prompt.empty() && !prompt_ids.empty())
    throw UsageError("--prompt and --prompt-ids exclude each other: choose one");
  const SavedRun saved = SavedRun::open(source.checkpoint, source.fallback);
  const Tokenizer& tokenizer = saved.tokenizer;
  const Config& config = saved.settings.config;
  std::vector<int32_t> ids;
  for (const int64_t id : prompt_ids) {
    if (id >= config.vocab)
      throw UsageError(str("--prompt-ids: expected ids below ", config.vocab, ", the model's vocabulary, found ", id));
    ids.push_back(static_cast<int32_t>(id));
  }
  if (prompt_ids.empty()) ids = tokenizer.encode(prompt);
  if (ids.empty()) ids.push_back(tokenizer.end_of_text);  // a document's beginning
  if (!context.empty()) {
    std::vector<int32_t> before = tokenizer.encode(read_file(context, size_t{1} << 40));
    // A chunk fetches with the landmark of the chunk before it: all of the prompt but its last token must be seen by
    // one.
    const size_t tokens = before.size() + ids.size(), cut = (tokens - 1) % static_cast<size_t>(config.chunk - 1);
    if (cut <= before.size()) before.erase(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(cut));
    else
      print_error(
          "--context is too short to be cut: the row starts with it, and the prompt's last token lies inside a "
          "chunk\n");
    ids.insert(ids.begin(), before.begin(), before.end());
  }
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    if (const int64_t n_bytes =
            model.model_memory().total_bytes() + TokenReader<std::remove_reference_t<decltype(device)>>::memory_bytes(
                                                     model, static_cast<int64_t>(ids.size()) + count),
        room = device.free_bytes();
        n_bytes > room)
      throw Error(str(ids.size(), " tokens and ", count, " more need ", mebibytes(n_bytes), ", ", mebibytes(room),
                      " are free; use a shorter --context or a smaller --count"));
    model.allocate();
    load_weights(saved.checkpoint.file(SavedRun::model_file), model);
    TokenReader reader(model, tokenizer.landmark, static_cast<int64_t>(ids.size()) + count);
    print_bytes(prompt);
    reader.read(ids);
    for (int64_t i = 0; i < count; i++) {
      std::vector<float> logits = reader.logits();
      logits[tokenizer.landmark] = -INFINITY;  // never a target: put in by the reader, not by the model
      const int32_t next = sample_token(logits, temperature, top_p, static_cast<uint64_t>(seed), i);
      if (next == tokenizer.end_of_text) break;
      print_bytes(tokenizer.decode(std::span(&next, 1)));
      if (i + 1 < count) reader.read({&next, 1});
    }
    print("\n");
    return 0;
  });
}

// ---- inspect ------------------------------------------------------------------------------------------------------
inline int inspect_command(const std::vector<std::string>& arguments) {
  ModelSource source;
  std::string text;
  int64_t width = 60;
  Flags flags(
      "inspect",
      "For each chunk of a text: what it says, which chunks it fetches for the next one, and with what weight.");
  source.add_to(flags);
  flags.add("text", text, "FILE", "the text; its last tokens that fill no chunk are left out");
  flags.add("columns", width, 10, 10000, "characters of each chunk to print");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("text");
  const SavedRun saved = SavedRun::open(source.checkpoint, source.fallback);
  const Config& config = saved.settings.config;
  const int64_t S = config.chunk, K = config.topk;
  if (config.groups.empty())
    throw Error("'" + saved.checkpoint.folder +
                "' is a sliding-window baseline: it fetches nothing; inspect a model with --groups");
  const std::vector<int32_t> ids = saved.tokenizer.encode(read_file(text, size_t{1} << 40));
  const int64_t chunks = static_cast<int64_t>(ids.size()) / (S - 1);
  if (!chunks)
    throw Error(str("'", text, "': expected at least the ", S - 1, " tokens of one chunk, found ", ids.size(),
                    "; give a longer text"));
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < chunks * (S - 1); i++) {
    slots.push_back(ids[i]);
    if ((i + 1) % (S - 1) == 0) slots.push_back(saved.tokenizer.landmark);
  }
  auto says = [&](int64_t chunk) {
    const std::string all = printable(saved.tokenizer.decode(std::span(ids).subspan(chunk * (S - 1), S - 1)));
    return all.size() > static_cast<size_t>(width) ? all.substr(0, width) : all;
  };
  return with_device(source.device, source.precision, source.threads, [&](auto& device) {
    DRT model(device, config, Use::inference);
    allocate_or_explain(model, 1, chunks * S);
    load_weights(saved.checkpoint.file(SavedRun::model_file), model);
    model.upload(slots.data(), nullptr, nullptr, chunks * S);
    model.forward({1, chunks * S, {}});
    std::vector<FetchedChunks<std::remove_reference_t<decltype(device)>>> fetched;
    for (size_t g = 0; g < model.groups.size(); g++) fetched.emplace_back(model, g, 1, chunks);
    for (int64_t c = 0; c < chunks; c++) {
      print("chunk ", c, ": ", says(c), "\n");
      for (size_t g = 0; g < model.groups.size(); g++)
        for (int64_t k = 0; k < K; k++) {
          const size_t at = (c + 1) * K + k;
          if (fetched[g].pick[at] >= 0)
            print("  group ", g, " fetches ", right(fetched[g].pick[at], 5), "  ",
                  fixed(static_cast<double>(fetched[g].w[at]), 3), "  ", says(fetched[g].pick[at]), "\n");
        }
    }
    return 0;
  });
}

// ---- export -------------------------------------------------------------------------------------------------------
inline int export_command(const std::vector<std::string>& arguments) {
  std::string checkpoint, out, dtype = "bf16";
  bool fallback = false;
  Flags flags("export", "The weights of a checkpoint as one safetensors file for other programs.");
  flags.add("checkpoint", checkpoint, "STEP", "a checkpoint's folder, or a RUN: its newest");
  flags.add_switch("fallback", fallback, "take an older checkpoint of the RUN where the newest is damaged");
  flags.add("out", out, "FILE", "the file to write; must not be there yet");
  flags.add_choice("dtype", dtype, "float|bf16", "of the numbers; bf16 rounds to nearest");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("out");
  if (std::error_code none; std::filesystem::exists(out, none))
    throw Error("--out: '" + out + "' is there already: remove it or choose another name");
  const SafetensorsFile file = SafetensorsFile::open(open_checkpoint(checkpoint, fallback).file(SavedRun::model_file));
  std::vector<float> values;
  std::vector<SafetensorsEntry> entries;
  for (const SafetensorsTensor& tensor : file.tensors())
    entries.push_back({tensor.name, dtype == "bf16" ? Dtype::BF16 : Dtype::F32, tensor.shape,
                       [&, bf16 = dtype == "bf16"](void* piece, int64_t first, int64_t count) {
                         if (!bf16) return file.read(tensor, first, count, static_cast<float*>(piece));
                         values.resize(count);
                         file.read(tensor, first, count, values.data());
                         for (size_t i = 0; i < values.size(); i++)
                           static_cast<uint16_t*>(piece)[i] =
                               static_cast<uint16_t>(std::bit_cast<uint32_t>(round_bf16(values[i])) >> 16);
                       }});
  write_safetensors(out, {{"format", "pt"}}, entries);
  print("'", out, "': ", entries.size(), " tensors in ", dtype, "\n");
  return 0;
}

// ---- verify -------------------------------------------------------------------------------------------------------
inline int verify_command(const std::vector<std::string>& arguments) {
  std::vector<std::string> files;
  std::string precision = "double", device = "cpu";
  int64_t threads = 0;
  VerifyOptions options{.tolerance = 0};
  // What rounding may make of the oracle files; beyond it something is wrong.
  const std::map<std::string, double> tolerances = {{"double", 1e-10}, {"float", 1e-4}, {"bf16", 0.2}};
  std::string tolerance_help = "largest difference over a tensor's largest entry; 0: that of the precision";
  for (const auto& [name, tolerance] : tolerances) tolerance_help += str(", ", name, " ", tolerance);
  Flags flags("verify",
              "Runs oracle files (dev/make_oracle.py makes them) through the real forward, backward and optimiser.");
  flags.add_rest(files, "FIXTURE...", true);
  flags.add_choice("precision", precision, "double|float|bf16",
                   "double on the CPU only; bf16 on the CPU rounds as a GPU would");
  flags.add_choice("device", device, "auto|cpu|cuda", "where to run");
  flags.add("tolerance", options.tolerance, 0, 1e9, tolerance_help.c_str());
  flags.add_switch("use-picks", options.use_picks, "take the file's picks, so that rounding cannot change them");
  flags.add_switch("quiet", options.quiet, "a line a file");
  flags.add("threads", threads, 0, 4096, "CPU threads; 0: one a processor");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  if (options.tolerance == 0) options.tolerance = tolerances.at(precision);
  auto run = [&](auto& backend) {
    int failed = 0;
    for (const std::string& path : files) failed += !Verifier(path, options).run(backend);
    return failed ? 1 : 0;
  };
  if (device != "cuda" && precision != "float") {
    if (precision == "double") {
      Cpu<double> cpu(static_cast<int>(threads));
      return run(cpu);
    }
    if (device == "cpu") {
      Cpu<float, true> cpu(static_cast<int>(threads));
      return run(cpu);
    }
  }
  if (precision == "double") throw UsageError("--precision double runs on the CPU only: leave --device out");
  return with_device(device, precision, threads, run);
}

// ---- info ---------------------------------------------------------------------------------------------------------
// info --data: what shards hold. 1 if an id is outside the vocabulary.
inline int show_shards(const std::string& pattern, const Tokenizer& tokenizer, int64_t first) {
  const TokenStream stream(pattern, tokenizer);
  if (!stream.notes().empty()) print(stream.notes(), "\n");
  std::vector<int32_t> ids(size_t{1} << 20);
  const auto outside = [&](int32_t id) { return id < 0 || id >= tokenizer.vocab_size(); };
  const Json state = stream.state();
  const JsonField shards = JsonField(state, pattern).at("shards");
  int64_t place = 0, all_documents = 0, all_outside = 0;
  print(left("shard", 40), " ", right("bytes", 14), " ", right("tokens", 14), " ", right("documents", 12), " ",
        right("out of vocabulary", 18), "\n");
  for (size_t s = 0; s < shards.items().size(); s++) {
    const int64_t tokens = shards.at(s).at("tokens").integer();
    int64_t documents = 0, strays = 0;
    for (int64_t end = place + tokens; place < end;) {
      const int64_t count = std::min(end - place, static_cast<int64_t>(ids.size()));
      stream.read(place, count, ids.data(), true);
      documents += std::count(ids.begin(), ids.begin() + count, tokenizer.end_of_text);
      strays += std::count_if(ids.begin(), ids.begin() + count, outside);
      place += count;
    }
    print(left(printable(shards.at(s).at("name").string()), 40), " ", right(shards.at(s).at("bytes").integer(), 14),
          " ", right(tokens, 14), " ", right(documents, 12), " ", right(strays, 18), "\n");
    all_documents += documents;
    all_outside += strays;
  }
  print(shards.items().size(), " shards, ", stream.tokens(), " tokens, ", all_documents,
        " documents (end-of-text tokens), ", all_outside, " ids out of vocabulary\n");
  print("tokenizer ", tokenizer.description(), ", V = ", tokenizer.vocab_size(), ", hash ", hex(tokenizer.hash(), 16),
        "\n");
  ids.resize(std::min(first, stream.tokens()));
  stream.read(0, static_cast<int64_t>(ids.size()), ids.data(), true);
  std::string text;
  for (const int32_t id : ids) {
    if (outside(id)) text += str("<|", static_cast<uint32_t>(id), ", out of vocabulary|>");
    else tokenizer.decode(std::span(&id, 1), text);
  }
  print("the first ", ids.size(), " tokens: ", printable(text), "\n");
  return all_outside ? 1 : 0;
}

// A GPU's model in bf16, as far as its memory goes.
struct PlannedGpu : GpuLayout {
  using act = uint16_t;
  using weight = uint16_t;
  using master = float;
  static constexpr bool weights_are_masters = false;
  void release(void*) {}
};

template <class Device>
void print_model(Device& device, const Config& config, const char* where, int64_t batch, int64_t chunks,
                 Recompute recompute) {
  DRT plan(device, config);
  plan.recompute = recompute;
  plan.plan(batch, chunks * config.chunk);
  print(left("tensor", 60), " ", left("shape", 16), " ", right("parameters", 12), "\n");
  for (const Tensor& t : plan.table.tensors)
    print(left(t.name, 60), " ", left(shape_text(tensor_shape(t)), 16), " ", right(t.size(), 12), "\n");
  print(plan.table.tensors.size(), " tensors, ", plan.table.parameters(), " parameters\n");
  const double forward = forward_flops_per_slot(config);
  print("a slot: ", significant(forward, 4), " floating-point operations forward, ", significant(3 * forward, 4),
        " in training (6N = ", significant(6.0 * static_cast<double>(plan.table.parameters()), 4), ")\n");
  print("memory of training on ", where, ", ", batch, " rows of ", chunks * config.chunk, " slots:\n");
  for (const Arena* arena : {&plan.model_memory(), &plan.activation_memory()})
    for (const Arena::Wish& wish : arena->wishes())
      print("  ", left(wish.name, 40), " ", right(mebibytes(wish.n_bytes), 14), "\n");
  print("  ", left("all", 40), " ",
        right(mebibytes(plan.model_memory().total_bytes() + plan.activation_memory().total_bytes()), 14), "\n");
}

inline int info_command(const std::vector<std::string>& arguments) {
  std::string model = "drt", data, tokenizer = "bytes", recompute = "none", precision = "float";
  Config config;
  int64_t batch = 1, chunks = 260, first = 64;
  const std::string asked = Flags::peek(arguments, "model");
  config = preset(asked.empty() ? model : asked).config;
  config.vocab = 50265;
  Flags flags("info",
              "A model's tensors, parameters, work and memory, before anything is allocated; or, with --data, what "
              "token shards hold.");
  add_model_flags(flags, model, config);
  flags.add("vocab", config.vocab, 2, 1 << 24, "V, ids");
  flags.add("batch", batch, 1, 1 << 20, "rows at once, for the memory plan");
  flags.add("chunks", chunks, 1, 1 << 20, "C, chunks a row, for the memory plan");
  add_recompute_flag(flags, recompute);
  flags.add_choice("precision", precision, "float|bf16", "for the memory plan: float on the CPU, or bf16 on a GPU");
  flags.add("data", data, "GLOB", "token shards to look into instead; exit 1 if they hold an id out of vocabulary");
  flags.add("tokenizer", tokenizer, "FILE", "of the shards: one of ours, GPT-2's tokenizer.json, or the word bytes");
  flags.add("first", first, 0, 1 << 20, "tokens of the shards to print");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  if (!data.empty()) return show_shards(data, Tokenizer::load(tokenizer), first);
  config.validate();
  if (precision == "bf16") {
    PlannedGpu gpu;
    print_model(gpu, config, "a GPU in bf16", batch, chunks, recompute_named(recompute));
  } else {
    Cpu<float> cpu(1);
    print_model(cpu, config, "the CPU in float", batch, chunks, recompute_named(recompute));
  }
  return 0;
}

// ---- text and tokens ----------------------------------------------------------------------------------------------
inline int tokenizer_train_command(const std::vector<std::string>& arguments) {
  std::vector<std::string> texts;
  std::string out;
  int64_t vocab_size = 0, threads = 0;
  Flags flags(
      "tokenizer-train",
      "Learns a byte-level BPE from text files, or folders of them (less their val/). Text is read in pieces; what is "
      "held are the distinct words\n"
      "  and their counts, the rarest forgotten when there are too many: at most about 2 GiB for any amount of text.");
  flags.add_rest(texts, "TEXT...", true);
  flags.add("vocab-size", vocab_size, 0, INT32_MAX, "tokens, the 256 bytes among them; seven special ids come on top");
  flags.add("out", out, "FILE", "the tokenizer, a new file");
  flags.add("threads", threads, 0, 4096, "0: one a processor");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("out");
  if (!flags.given("vocab-size"))
    throw UsageError("tokenizer-train needs --vocab-size N: how many tokens to learn, the 256 bytes among them");
  if (std::error_code none; std::filesystem::exists(out, none))
    throw Error("'" + out +
                "' is there already: remove it or choose another name; shards and checkpoints may belong to it");
  if (const std::string folder = parent_folder(out); !folder.empty()) make_folder(folder);
  ThreadPool pool(static_cast<int>(threads));
  TrainReport report;
  const Tokenizer tokenizer = train_tokenizer(texts, vocab_size, pool, &report);
  tokenizer.save(out);
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  print(report.documents, " documents, ", report.bytes, " bytes, ", report.distinct_words, " distinct words (",
        report.forgotten_words, " rare ones forgotten): ", vocab_size - 256, " merges, V = ", tokenizer.vocab_size(),
        " with the special ids, ", fixed(report.seconds, 1), " s, ", usage.ru_maxrss / 1024, " MiB of memory\n");
  return 0;
}

inline int tokenize_command(const std::vector<std::string>& arguments) {
  std::vector<std::string> texts;
  std::string name = "bytes", out;
  int64_t threads = 0;
  TokenizeOptions options;
  Flags flags("tokenize",
              "Text files, or folders of them, to shards OUT_train_000000.bin ..., OUT_val_000000.bin ...: one "
              "document a file.");
  flags.add_rest(texts, "TEXT...", true);
  flags.add("tokenizer", name, "FILE", "one of ours, GPT-2's tokenizer.json, or the word bytes");
  flags.add("out", out, "PREFIX", "of the shards' names");
  flags.add("val", options.val_fraction, 0, 0.999,
            "part of the text, from its end, for validation; a folder's val/ goes before it");
  flags.add("shard-tokens", options.shard_tokens, 1, ShardHeader::max_tokens, "tokens a shard");
  flags.add_switch("marked", options.marked, "<|endoftext|> in a text begins the next document");
  flags.add("threads", threads, 0, 4096, "0: one a processor");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("out");
  const Tokenizer tokenizer = Tokenizer::load(name);
  if (const std::string folder = parent_folder(out); !folder.empty()) make_folder(folder);
  ThreadPool pool(static_cast<int>(threads));
  const TokenizeReport report = tokenize_files(tokenizer, texts, out, options, pool);
  const int64_t tokens = report.train_tokens + report.val_tokens;
  print(report.documents, " documents, ", report.bytes, " bytes: ", report.train_tokens, " tokens to train, ",
        report.val_tokens, " to validate, ",
        fixed(static_cast<double>(report.bytes) / static_cast<double>(std::max<int64_t>(1, tokens)), 3),
        " bytes a token, ", fixed(static_cast<double>(report.bytes) / 1e6 / std::max(report.seconds, 1e-9), 1),
        " MB/s\n");
  return 0;
}

// encode and decode: the one flag, then standard input to standard output.
inline int filter_command(const std::vector<std::string>& arguments, const char* name, const char* summary,
                          void (*filter)(const Tokenizer&, FILE*, FILE*)) {
  std::string tokenizer = "bytes";
  Flags flags(name, summary);
  flags.add("tokenizer", tokenizer, "FILE", "one of ours, GPT-2's tokenizer.json, or the word bytes");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  filter(Tokenizer::load(tokenizer), stdin, stdout);
  return 0;
}
inline int encode_command(const std::vector<std::string>& arguments) {
  return filter_command(arguments, "encode", "Bytes on standard input to token ids: one line, spaces between.",
                        encode_stream);
}
inline int decode_command(const std::vector<std::string>& arguments) {
  return filter_command(arguments, "decode",
                        "Token ids on standard input to the bytes they stand for; special ids to their names.",
                        decode_stream);
}

}  // namespace gca
