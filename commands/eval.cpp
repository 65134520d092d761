// The command eval: loss, perplexity and bits per byte of a checkpoint on token shards; by how far back a bigram last
// stood, of every kind of picks; of the same tokens with more and less past.
#include <algorithm>
#include <cmath>
#include <span>

#include "base/files.h"
#include "base/json.h"
#include "base/progress.h"
#include "base/text.h"
#include "commands/commands.h"
#include "commands/device.h"
#include "commands/shared.h"
#include "runtime/by_reach.h"
#include "runtime/evaluate.h"
#include "runtime/overlap_picks.h"
#include "runtime/run.h"
#include "runtime/stream.h"

namespace gca {
namespace {

// ---- what the command line asks for -------------------------------------------------------------------------------
struct Options {
  ModelSource source;
  Ablation ablation;
  std::string data, out;
  int64_t chunks = 0, max_rows = int64_t{1} << 40, batch = 4, seed = 1, score_last = 0;
  std::vector<int64_t> reach_edges, past;
  std::string against = "random,newest,none";
  Reading reading;
  bool no_cross = false, by_reach = false;
  bool compares() const { return by_reach || !past.empty(); }
};

Flags eval_flags(Options& options) {
  Flags flags("eval",
              "Loss, perplexity and bits per byte of a checkpoint on token shards, also by position in the row.");
  options.source.add_to(flags);
  flags.add_patterns("data", options.data, "GLOB...", "token shards");
  flags.add("chunks", options.chunks, 0, int64_t{1} << 34, "C, chunks a row, as many as you like; 0: as in training");
  flags.add("rows", options.max_rows, 1, int64_t{1} << 40, "rows at most, spread over the data");
  flags.add("batch", options.batch, 1, 1 << 20, "rows at once");
  options.reading.add_to(flags);
  flags.add("score-last", options.score_last, 0, int64_t{1} << 34, "chunks at the row's end that are scored; 0: all");
  flags.add_switch("no-cross", options.no_cross, "a row is one document's");
  options.ablation.add_to(flags, true);
  flags.add("seed", options.seed, 0, INT64_MAX, "of --picks random and noisy");
  flags.heading("comparisons on the same tokens, with standard errors over rows");
  flags.add_switch("by-reach", options.by_reach,
                   "each kind of picks, by how far back in its row a token and its target last stood together");
  flags.add("against", options.against, "KIND,...",
            "the other picks of --by-reach: random, latest, newest, none, noisy, lexical, hindsight; equal: learned, "
            "of equal weights");
  flags.add("reach-edges", options.reach_edges, 1, int64_t{1} << 40,
            "slots back where a class ends; none: the model's window");
  flags.add("past", options.past, 1, 1 << 20,
            "the same C chunks at the end of rows of so many times C; all are compared with the first");
  flags.add("out", options.out, "FILE", "append the comparison's figures to it, lines of JSON");
  return flags;
}

const std::vector<std::string> kinds_of_others = {"random", "latest",  "newest",    "none",
                                                  "noisy",  "lexical", "hindsight", "equal"};

// What --by-reach runs beside learned picks.
std::vector<Ablation> others(const Options& options) {
  std::vector<Ablation> others;
  for (size_t at = 0, comma = 0; at <= options.against.size(); at = comma + 1) {
    comma = std::min(options.against.find(',', at), options.against.size());
    const std::string kind = options.against.substr(at, comma - at);
    if (std::find(kinds_of_others.begin(), kinds_of_others.end(), kind) == kinds_of_others.end()) {
      std::string list;
      for (const std::string& other : kinds_of_others) list += (list.empty() ? "" : ", ") + other;
      throw UsageError(str("--against: expected kinds of picks (", list, ") with commas between, found '", kind, "'",
                           did_you_mean(kind, kinds_of_others)));
    }
    others.push_back(options.ablation);
    (kind == "equal" ? others.back().weights : others.back().picks) = kind;
  }
  return others;
}

void check(Options& options, Flags& flags) {
  flags.need("checkpoint");
  flags.need("data");
  options.ablation.settle(flags);
  if (!options.by_reach && flags.given("against"))
    throw UsageError("--against: expected --by-reach, which compares with these picks; give it, or leave them out");
  others(options);
  if (options.by_reach && options.ablation.replaces())
    throw UsageError(str("--by-reach compares learned picks with all others, found",
                         options.ablation.remark().substr(1), "; leave --picks and --pick-weights out"));
  if (!options.by_reach && !options.reach_edges.empty())
    throw UsageError("--reach-edges: expected --by-reach, whose classes they part; give it, or leave them out");
  if (!options.compares() && !options.out.empty())
    throw UsageError("--out: expected --by-reach or --past, whose figures it gets; give one, or leave it out");
  if (options.by_reach && !options.reach_edges.empty()) ReachClasses{options.reach_edges};
  if (!options.out.empty()) check_can_append(options.out);
}

// ---- the figures of one run ---------------------------------------------------------------------------------------
// The figures, also by place in the row, and the hash of all losses: runs of the same bits have the same one.
void print_losses(const Evaluation& result, int64_t T, int64_t S, double seconds) {
  const double bits_per_byte = result.bytes > 0 ? result.sum / std::log(2.0) / result.bytes : NAN;
  print("loss ", fixed(result.loss(), 4), "  perplexity ", fixed(std::exp(result.loss()), 3), "  bits per byte ",
        fixed(bits_per_byte, 4), "  (", result.targets, " targets, ",
        fixed(static_cast<double>(result.rows * T) / seconds, 0), " slots/s)  hash ", hex(result.hash, 8), "\n");
  for (size_t i = 0; i < result.place_sum.size(); i++)
    if (result.place_count[i] > 0)
      print("  slots ", right(Evaluation::first_slot(S, i), 9), "..",
            left(std::min(T, Evaluation::first_slot(S, i + 1)) - 1, 9), " loss ",
            fixed(result.place_sum[i] / result.place_count[i], 4), "\n");
}

// What all runs read.
struct Source {
  const Options& options;
  const SavedRun& saved;
  const Rows& rows;
  int64_t S, C;  // of a row
  const Config& config() const { return saved.settings.config; }
  int64_t scored_chunks() const { return options.score_last ? std::min(options.score_last, C) : C; }
};

template <class Device>
void evaluate_once(Device& device, const Source& from) {
  const Options& options = from.options;
  const int64_t S = from.S, T = from.C * S, B = std::min({options.batch, options.max_rows, from.rows.count()});
  const Selection selection = options.ablation.selection(from.config(), options.seed);
  DRT model(device, from.config(), Use::inference);
  const auto reader =
      open_reader(from.saved, model, {.B = B, .chunks = from.C, .segment_slots = options.reading.batch_slots},
                  options.reading.memory, "fewer --chunks");
  OverlapPicks by_words(device, options.ablation.by_words() ? B : 0, from.C, from.config().reach.topk);
  const Stopwatch clock;
  std::vector<double> readings;
  const auto read = [&](const int32_t* tokens, const int32_t* targets, int64_t first_row, const auto& after) {
    Selection of_rows = options.ablation.by_words()
                            ? by_words.of(selection, tokens, B, T, S, options.ablation.picks == "hindsight")
                            : selection;
    of_rows.first_row = first_row;
    const Stopwatch of_reading;
    reader->rewind();
    reader->read(tokens, targets, T, T, of_rows, after);
    readings.push_back(of_reading.seconds());
  };
  const Evaluation result = evaluate(
      model, from.rows, options.max_rows, B, T, T - from.scored_chunks() * S, read, [] { return false; },
      &from.saved.tokenizer);
  const double seconds = clock.seconds();
  print("checkpoint ", from.saved.checkpoint.folder, ", ", result.rows, " rows of ", T, " slots (", from.C * (S - 1),
        " tokens)", options.ablation.remark(), "\n");
  print_losses(result, T, S, seconds);
  print_host_memory(*reader, readings);
}

// ---- runs over the same tokens ------------------------------------------------------------------------------------
// Each kind of picks, with each past.
struct Comparison {
  Source from;
  std::vector<int64_t> past;  // rows of so many times C chunks
  std::vector<Ablation> picks;
  std::vector<int64_t> windows;  // whose last chunks are scored
  ScoredRows rows;
  std::vector<RunLosses> runs;  // (past, picks)

  int64_t longest() const { return *std::max_element(past.begin(), past.end()); }
  size_t number(size_t p, size_t a) const { return p * picks.size() + a; }
  std::string name(size_t a) const { return from.config().groups.empty() ? "baseline" : picks[a].name(); }
};

Comparison plan_comparison(const Source& from) {
  const Options& options = from.options;
  Comparison plan{from, options.past, {options.ablation}, {}, {}, {}};
  if (plan.past.empty()) plan.past = {1};
  if (options.by_reach) {
    plan.rows.classes =
        ReachClasses(options.reach_edges.empty() ? std::vector{from.config().reach.window} : options.reach_edges);
    if (!from.config().groups.empty())
      for (const Ablation& picks : others(options)) plan.picks.push_back(picks);
  }
  plan.runs.resize(plan.past.size() * plan.picks.size());
  std::vector<int64_t> windows;
  for (int64_t w = 0; w < from.rows.count(); w++)
    if (from.rows.has_past(w, plan.longest())) windows.push_back(w);
  if (windows.empty())
    throw Error(str("--past ", plan.longest(), ": expected a text of ", plan.longest(), " x ", from.C * (from.S - 1),
                    " tokens at least, found none; give more text, fewer --chunks or a smaller --past"));
  if (const int64_t left_out = from.rows.count() - std::ssize(windows))
    print(left_out, " of ", from.rows.count(), " rows have too little past for ", plan.longest(), " times ", from.C,
          " chunks and are left out\n");
  const int64_t found = std::ssize(windows), count = std::min(options.max_rows, found);
  for (int64_t i = 0; i < count; i++) plan.windows.push_back(windows[i * found / count]);
  return plan;
}

// All runs over B windows from number `first` on; the last one again where there are fewer. The classes are those of
// the longest rows, so that every run has the same targets in each.
template <class Device>
void compare_rows(DRT<Device>& model, RowReader<Device>& reader, OverlapPicks<Device>& by_words, Comparison& plan,
                  int64_t first, int64_t B) {
  const Source& from = plan.from;
  const int64_t scored = from.scored_chunks() * from.S, count = std::ssize(plan.windows),
                here = std::min(B, count - first);
  std::vector<int32_t> tokens(B * plan.longest() * from.C * from.S), targets(tokens.size());
  std::vector<typename DRT<Device>::stat> losses(tokens.size());
  const auto fill = [&](int64_t times) {
    const int64_t T = times * from.C * from.S;
    for (int64_t r = 0; r < B; r++)
      from.rows.fill_window(plan.windows[std::min(first + r, count - 1)], &tokens[r * T], &targets[r * T], times);
    return T;
  };
  std::vector<std::vector<int32_t>> classes;
  const int64_t longest = fill(plan.longest());
  for (int64_t r = 0; r < here; r++)
    classes.push_back(plan.rows.add(std::span(tokens).subspan(r * longest, longest),
                                    std::span(targets).subspan(r * longest, longest), scored));
  for (size_t p = 0; p < plan.past.size(); p++) {
    const int64_t T = fill(plan.past[p]);
    for (size_t a = 0; a < plan.picks.size(); a++) {
      Selection selection = plan.picks[a].selection(from.config(), from.options.seed);
      if (plan.picks[a].by_words())
        selection = by_words.of(selection, tokens.data(), B, T, from.S, plan.picks[a].picks == "hindsight");
      selection.first_row = first;
      losses_of_rows(model, losses.data(), B, T, T - scored, [&](const auto& after) {
        reader.rewind();
        reader.read(tokens.data(), targets.data(), T, T, selection, after);
      });
      for (int64_t r = 0; r < here; r++)
        plan.runs[plan.number(p, a)].add(plan.rows.classes, classes[r], &losses[(r + 1) * T - scored]);
    }
  }
}

// ---- their tables -------------------------------------------------------------------------------------------------
std::string with_error(const MeanOverRows& x) {
  return str(x.mean < 0 ? "" : "+", fixed(x.mean, 4), " (", std::isnan(x.error) ? "-" : fixed(x.error, 4), ")");
}

// A column a run; a column a pair of them, of what the first loses more than the second.
struct Table {
  std::vector<std::pair<std::string, const RunLosses*>> runs;
  std::vector<std::pair<size_t, size_t>> pairs;
};

void print_table(const std::string& title, const ScoredRows& rows, const Table& table) {
  const auto in_column = [](const std::string& heading, size_t width, const std::string& words) {
    return right(words, std::max(width, heading.size() + 2));
  };
  const auto of_pair = [&](size_t a, size_t b) { return table.runs[a].first + " - " + table.runs[b].first; };
  std::string line = left(title, 20) + right("targets", 11), hashes = left("hash", 31);
  for (const auto& [name, run] : table.runs) {
    line += in_column(name, 10, name);
    hashes += in_column(name, 10, hex(run->hash, 8));
  }
  for (const auto& [a, b] : table.pairs) line += in_column(of_pair(a, b), 20, of_pair(a, b));
  print(line, "\n");
  for (size_t i = 0; i < rows.classes.count(); i++) {
    const int64_t targets = mean_loss(rows, *table.runs[0].second, i).targets;
    line = left(rows.classes.name(i), 20) + right(targets, 11);
    for (const auto& [name, run] : table.runs)
      line += in_column(name, 10, targets ? fixed(mean_loss(rows, *run, i).mean, 4) : "-");
    for (const auto& [a, b] : table.pairs)
      line +=
          in_column(of_pair(a, b), 20,
                    targets ? with_error(mean_difference(rows, *table.runs[a].second, *table.runs[b].second, i)) : "-");
    print(line, "\n");
  }
  print(hashes, "\n");
}

void print_tables(const Comparison& plan) {
  const Source& from = plan.from;
  print("checkpoint ", from.saved.checkpoint.folder, ", ", plan.windows.size(), " rows, the last ",
        from.scored_chunks() * from.S, " slots (", from.scored_chunks() * (from.S - 1), " tokens) scored",
        from.options.ablation.remark(), "; differences with standard errors over rows",
        from.options.by_reach ? str("; classes by rows of ", plan.longest() * from.C * from.S, " slots") : "", "\n");
  if (from.options.by_reach)
    for (size_t p = 0; p < plan.past.size(); p++) {
      Table table;
      for (size_t a = 0; a < plan.picks.size(); a++) {
        table.runs.emplace_back(plan.name(a), &plan.runs[plan.number(p, a)]);
        if (a) table.pairs.emplace_back(0, a);
      }
      print("\nrows of ", plan.past[p] * from.C * from.S, " slots\n");
      print_table("last seen, slots ago", plan.rows, table);
    }
  if (from.options.past.empty()) return;
  for (size_t a = 0; a < plan.picks.size(); a++) {
    Table table;
    for (size_t p = 0; p < plan.past.size(); p++) {
      table.runs.emplace_back(str(plan.past[p]), &plan.runs[plan.number(p, a)]);
      if (p) table.pairs.emplace_back(p, 0);
    }
    print("\n", plan.name(a), ": rows of so many times ", from.C * from.S, " slots\n");
    print_table(from.options.by_reach ? "last seen, slots ago" : "", plan.rows, table);
  }
}

Json json_of(const MeanOverRows& x) {
  Json figure = Json::object();
  figure["mean"] = x.mean;
  figure["error"] = x.error;
  return figure;
}

// For each row its number, its targets of class i and the sum of their losses: of two models they are paired by row
// (dev/compare_rows.py).
Json row_losses(const Comparison& plan, size_t run, size_t i) {
  Json rows = Json::array();
  for (size_t r = 0; r < plan.windows.size(); r++) {
    Json row = Json::array();
    row.push_back(plan.windows[r]);
    row.push_back(plan.rows.targets[r][i]);
    row.push_back(plan.runs[run].sum[r][i]);
    rows.push_back(std::move(row));
  }
  return rows;
}

// A line for each past, kind of picks and class.
void append_figures(const Comparison& plan) {
  const Source& from = plan.from;
  for (size_t run = 0; run < plan.runs.size(); run++)
    for (size_t i = 0; i < plan.rows.classes.count(); i++) {
      const size_t p = run / plan.picks.size(), a = run % plan.picks.size();
      const MeanOverRows loss = mean_loss(plan.rows, plan.runs[run], i);
      Json line = Json::object();
      line["checkpoint"] = from.saved.checkpoint.folder;
      line["retrieval"] = plan.name(a);
      line["past"] = plan.past[p];
      line["slots"] = plan.past[p] * from.C * from.S;
      line["scored_slots"] = from.scored_chunks() * from.S;
      line["class"] = plan.rows.classes.name(i);
      line["slots_back_from"] = plan.rows.classes.from(i);
      line["slots_back_to"] = plan.rows.classes.to(i);
      line["rows"] = loss.rows;
      line["targets"] = loss.targets;
      line["loss"] = json_of(loss);
      line["row_losses"] = row_losses(plan, run, i);
      if (a)
        line["learned_minus_this"] =
            json_of(mean_difference(plan.rows, plan.runs[plan.number(p, 0)], plan.runs[run], i));
      if (p)
        line["minus_first_past"] = json_of(mean_difference(plan.rows, plan.runs[run], plan.runs[plan.number(0, a)], i));
      line["hash"] = hex(plan.runs[run].hash, 8);
      line["seed"] = from.options.seed;
      append_line(from.options.out, line.dump());
    }
}

template <class Device>
void compare(Device& device, const Source& from) {
  Comparison plan = plan_comparison(from);
  const int64_t B = std::min(from.options.batch, std::ssize(plan.windows));
  DRT model(device, from.config(), Use::inference);
  const auto reader = open_reader(
      from.saved, model, {.B = B, .chunks = plan.longest() * from.C, .segment_slots = from.options.reading.batch_slots},
      from.options.reading.memory, from.options.past.empty() ? "fewer --chunks" : "fewer --chunks, a smaller --past");
  const bool words = std::any_of(plan.picks.begin(), plan.picks.end(), [](const Ablation& a) { return a.by_words(); });
  OverlapPicks by_words(device, words ? B : 0, plan.longest() * from.C, from.config().reach.topk);
  for (int64_t first = 0; first < std::ssize(plan.windows); first += B)
    compare_rows(model, *reader, by_words, plan, first, B);
  print_tables(plan);
  print_host_memory(*reader, {});
  if (!from.options.out.empty()) append_figures(plan);
}

}  // namespace

int eval_command(const std::vector<std::string>& arguments) {
  Options options;
  Flags flags = eval_flags(options);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  check(options, flags);
  const SavedRun saved = SavedRun::open(options.source.checkpoint, options.source.fallback);
  options.ablation.check(saved.settings.config);
  const int64_t S = saved.settings.config.chunk, C = options.chunks ? options.chunks : saved.settings.chunks;
  const TokenStream stream(options.data, saved.tokenizer);
  const Rows rows(stream, saved.tokenizer, C, S, 0, !options.no_cross);
  for (const std::string& note : {stream.notes(), rows.notes()})
    if (!note.empty()) print(note, "\n");
  const Source from{options, saved, rows, S, C};
  return with_device(options.source.device, options.source.precision, options.source.threads, [&](auto& device) {
    if (options.compares()) compare(device, from);
    else evaluate_once(device, from);
    return 0;
  });
}

}  // namespace gca
