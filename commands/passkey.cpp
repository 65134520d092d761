// The command passkey: hides needles in a text, asks for them at its end, and counts the right answers.
#include <fcntl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>

#include "commands/commands.h"
#include "commands/shared.h"
#include "runtime/stream.h"

namespace gca {

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

int passkey_command(const std::vector<std::string>& arguments) {
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

}  // namespace gca
