// What an oracle's file is compared with, and how: all of the Verifier that knows no backend.
#include "commands/verifier.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/flags.h"
#include "base/json.h"
#include "base/text.h"
#include "runtime/settings.h"

namespace gca {

Verifier::Verifier(const std::string& path, const VerifyOptions& options)
    : file_(SafetensorsFile::open(path)), options_(options) {
  read_config();
  T_ = C_ * config_.chunk;
  R_ = B_ * T_;
  G_ = std::ssize(config_.groups);
  K_ = std::min(config_.reach.topk, C_);
}

void Verifier::say_text(const std::string& text) const {
  if (options_.report) *options_.report += text;
  else print(text);
}

// ---- the file -----------------------------------------------------------------------------------------------------
// The metadata are the settings of the flags' table, `-` in their names written `_`, and what a run has elsewhere. A
// file older than a flag was made as by the flag's default.
void Verifier::read_config() {
  std::string model;
  Flags flags("verify", "");
  add_model_flags(flags, model, config_);
  flags.add("vocab", config_.vocab, 2, 1 << 24, "V", Flags::run);
  flags.add("eps", config_.eps, 0, 1, "of every norm but the encoder's", Flags::run);
  flags.add("batch", B_, 1, 1 << 20, "rows", Flags::run);
  flags.add("chunks", C_, 1, 1 << 20, "C, chunks a row", Flags::run);
  const Json known = flags.values();
  Json settings = Json::object();
  for (const auto& [key, value] : file_.metadata()) {
    std::string name = key;
    std::replace(name.begin(), name.end(), '_', '-');
    if (known.find(name))
      settings[name] = name != "null-slot" ? value : value == "1" ? "on" : value == "0" ? "off" : value;
  }
  const JsonField saved(settings, "'" + file_.path() + "': metadata");
  for (const char* name : {"vocab", "width", "groups", "batch", "chunks"})
    if (!saved.has(name))
      throw Error(saved.where() + ": " + name +
                  ": expected, but missing; is this an oracle's file? dev/make_oracle.py makes one");
  flags.restore(saved);
  try {
    config_.validate();
  } catch (const UsageError& error) {
    throw Error(saved.where() + ": " + error.what());
  }
}

void Verifier::check_shapes(const TensorTable& table) const {
  for (const Tensor& t : table.tensors) file_.at("param." + t.name, shape_of(t));
  for (const char* name : {"tokens", "targets"}) file_.at(name, {B_, T_});
  for (int64_t g = 0; g < G_; g++) file_.at(str("group", g, ".gumbel_noise"), {B_, C_, C_});
}

void Verifier::check_room(int64_t n_bytes, int64_t room) const {
  if (n_bytes > room)
    throw Error(str("'", file_.path(), "' needs ", mebibytes(n_bytes), ", ", mebibytes(room),
                    " are free; run it on a larger machine"));
}

int64_t Verifier::read_rows(std::vector<int32_t>& tokens, std::vector<int32_t>& targets) const {
  tokens.resize(R_);
  targets.resize(R_);
  file_.read("tokens", {B_, T_}, tokens.data());
  file_.read("targets", {B_, T_}, targets.data());
  int64_t N = 0;
  for (size_t i = 0; i < tokens.size(); i++) {
    if (tokens[i] < 0 || tokens[i] >= config_.vocab || targets[i] >= config_.vocab)
      throw Error(str("'", file_.path(), "': tokens, targets: expected ids below vocab ", config_.vocab, ", found ",
                      tokens[i], " and ", targets[i], " at slot ", i));
    N += targets[i] >= 0;
  }
  if (!N) throw Error("'" + file_.path() + "': targets: expected at least one slot with a target");
  return N;
}

void Verifier::read_noise() {
  noise_.resize(G_ * B_ * C_ * C_);
  for (int64_t g = 0; g < G_; g++)
    file_.read(str("group", g, ".gumbel_noise"), {B_, C_, C_}, noise_.data() + g * B_ * C_ * C_);
}

std::vector<int32_t> Verifier::file_picks(int64_t g) const {
  std::vector<int32_t> picks(B_ * C_ * K_);
  file_.read(str("group", g, ".topk_index"), {B_, C_, K_}, picks.data());
  return picks;
}

std::vector<double> Verifier::file_weights(int64_t g) const {
  std::vector<double> weights(B_ * C_ * K_);
  file_.read(str("group", g, ".topk_weight"), {B_, C_, K_}, weights.data());
  return weights;
}

// ---- numbers ------------------------------------------------------------------------------------------------------
void Verifier::compare(const std::string& name, const std::vector<double>& found) {
  compare(name, found, file_.values<double>(name));
}

void Verifier::compare(const std::string& name, const std::vector<double>& found, const std::vector<double>& expected) {
  if (found.size() != expected.size())
    throw Error(
        str("'", file_.path(), "': tensor '", name, "': expected ", found.size(), " numbers, found ", expected.size()));
  hash_ = crc32c(found.data(), found.size() * sizeof(double), hash_);
  double largest = 0, difference = 0, squares = 0, reference = 0;
  for (size_t i = 0; i < found.size(); i++) {
    const double delta = std::fabs(found[i] - expected[i]);
    largest = std::max(largest, std::fabs(expected[i]));
    if (!(delta <= difference)) difference = delta;  // a NaN stays
    squares += delta * delta;
    reference += expected[i] * expected[i];
  }
  const double error = largest > 0 ? difference / largest : difference;
  const bool good = error <= options_.tolerance;
  if (!options_.quiet || !good)
    say("  ", left(name, 60), " ", right(significant(error, 3), 10), " largest  ",
        right(significant(reference > 0 ? std::sqrt(squares / reference) : std::sqrt(squares), 3), 10), " rms",
        good ? "" : "   PAST THE TOLERANCE", "\n");
  if (!(error <= worst_)) {
    worst_ = std::isnan(error) ? HUGE_VAL : error;
    worst_name_ = name;
  }
  compared_++;
}

// The file has ten losses; with its picks held there is only the first.
void Verifier::compare_losses(const std::vector<double>& losses) {
  std::vector<double> expected = file_.values<double>("train.losses");
  expected.resize(std::min(expected.size(), losses.size()));
  compare("train.losses", losses, expected);
}

bool Verifier::verdict(bool held) const {
  const bool good = worst_ <= options_.tolerance && !picks_differ_;
  say(good ? "ok  " : "FAIL", " ", file_.path(), ": ", compared_, " tensors, worst ", worst_name_, " ",
      significant(worst_, 3), " (tolerance ", significant(options_.tolerance, 3), ")",
      picks_differ_ ? ", picks differ" : "", held ? ", picks of the file held: only the first loss" : "", ", hash ",
      hex(hash_, 8), "\n");
  return good;
}

// ---- picks --------------------------------------------------------------------------------------------------------
constexpr double near_tie = 1e-3;  // scores nearer than this may change places by rounding

int64_t Verifier::count_differing(int64_t g, const std::vector<int32_t>& found) const {
  const std::vector<int32_t> expected = file_picks(g);
  const std::vector<double> weights = file_weights(g);
  int64_t differ = 0;
  for (int64_t b = 0; b < B_; b++)
    for (int64_t c = 0; c < C_; c++)
      for (int64_t k = 0; k < K_; k++) {
        const size_t at = in_file(b, c, k);
        const int32_t pick = found[in_model(b, c, k)];
        differ += weights[at] == 0 ? pick >= 0 : pick != expected[at];
      }
  return differ;
}

// score[m] = r . L_m / sqrt(D) + noise of the chunks m < c, L the encoder's output at the landmark; the largest first.
std::vector<double> Verifier::sorted_scores(int64_t g, int64_t b, int64_t c, const std::vector<double>& r,
                                            const std::vector<double>& h) const {
  const int64_t D = config_.width, S = config_.chunk;
  std::vector<double> scores;
  for (int64_t m = 0; m < c; m++) {
    double sum = 0;
    for (int64_t j = 0; j < D; j++) sum += r[(b * C_ + c) * D + j] * h[((b * C_ + m) * S + S - 1) * D + j];
    sum = sum / std::sqrt(static_cast<double>(D)) + static_cast<double>(noise_[((g * B_ + b) * C_ + c) * C_ + m]);
    scores.push_back(std::isnan(sum) ? -HUGE_VAL : sum);  // NaN cannot be sorted
  }
  std::sort(scores.rbegin(), scores.rend());
  return scores;
}

void Verifier::check_picks(int64_t g, const std::vector<int32_t>& found, const std::vector<double>& r,
                           const std::vector<double>& h) {
  const size_t K = config_.reach.topk;
  int64_t near = 0;
  double nearest = HUGE_VAL;
  for (int64_t b = 0; b < B_; b++)
    for (int64_t c = 0; c < C_; c++) {
      const std::vector<double> scores = sorted_scores(g, b, c, r, h);
      // Neighbours within the first K + 1: a swap inside the K changes the order that the file fixes, one at the edge
      // the set.
      for (size_t k = 1; k < scores.size() && k <= K; k++) {
        nearest = std::min(nearest, scores[k - 1] - scores[k]);
        near += k == K && scores[k - 1] - scores[k] < near_tie;
      }
    }
  if (near)
    say("  group ", g, ": near tie: the K-th and the next score are closer than ", near_tie, " in ", near, " chunks\n");
  const int64_t differ = count_differing(g, found);
  near_tie_ |= near > 0 || nearest < near_tie;
  picks_differ_ |= differ > 0;
  if (!options_.quiet || differ)
    say("  group", g, ".topk_index ", left("", 42), " ", differ ? "DIFFER" : "equal", " (", differ, " of ",
        B_ * C_ * K_, " differ; nearest scores ", significant(nearest, 3), " apart)\n");
}

bool Verifier::take_files_picks() {
  if (!picks_differ_ || !near_tie_ || options_.use_picks) return false;
  say(file_.path(), ": a near tie decided otherwise: the rest is checked with the file's picks\n");
  picks_differ_ = false;
  return true;
}

std::vector<int32_t> Verifier::given_picks(int64_t g) const {
  const std::vector<int32_t> picks = file_picks(g);
  const std::vector<double> weights = file_weights(g);
  std::vector<int32_t> result(table().size(B_), -1);
  for (int64_t b = 0; b < B_; b++)
    for (int64_t c = 0; c < C_; c++)
      for (int64_t k = 0; k < K_; k++) {
        const size_t from = in_file(b, c, k);
        if (weights[from] == 0) continue;
        if (picks[from] < 0 || picks[from] >= c)
          throw Error(str("'", file_.path(), "': group", g, ".topk_index: chunk ", c,
                          " expected to fetch an earlier chunk, found ", picks[from]));
        result[in_model(b, c, k)] = picks[from];
      }
  return result;
}

void Verifier::compare_weights(int64_t g, const std::vector<double>& table) {
  std::vector<double> found;
  for (int64_t b = 0; b < B_; b++)
    for (int64_t c = 0; c < C_; c++)
      for (int64_t k = 0; k < K_; k++) found.push_back(table[in_model(b, c, k)]);
  compare(str("group", g, ".topk_weight"), found, file_weights(g));
}

}  // namespace gca
