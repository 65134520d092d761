#include "commands/verifier.h"

#include <fcntl.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "base/safetensors.h"
#include "base/text.h"
#include "model.h"

namespace gca {

Verifier::Verifier(const std::string& path, const VerifyOptions& options)
    : file_(SafetensorsFile::open(path)), options_(options) {
  config_.vocab = field("vocab");
  config_.width = field("width");
  config_.heads = field("heads");
  config_.ffn = field("ffn");
  config_.lower = field("lower");
  config_.encoder = field("encoder");
  config_.chunk = field("chunk");
  config_.topk = field("topk");
  config_.window = field("window");
  config_.null_slot = field("null_slot") != 0;
  const std::string& groups = text("groups");
  for (size_t at = 0; at < groups.size();) {
    const size_t comma = std::min(groups.find(',', at), groups.size());
    config_.groups.push_back(integer(groups.substr(at, comma - at), "groups"));
    at = comma + 1;
  }
  const std::string& eps = text("eps");
  char* end = nullptr;
  config_.eps = strtod(eps.c_str(), &end);
  if (eps.empty() || *end || !(config_.eps >= 0 && config_.eps < 1))
    throw Error(where("eps") + "expected a number from 0 to 1, found '" + eps + "'");
  B_ = field("batch");
  C_ = field("chunks");
  if (B_ < 1 || C_ < 1 || B_ > (1 << 20) || C_ > (1 << 20))
    throw Error(where("batch, chunks") + "expected at least 1 each");
  try {
    config_.validate();
  } catch (const UsageError& error) {
    throw Error("'" + path + "': metadata: " + error.what());
  }
}

int64_t Verifier::count_targets(const std::vector<int32_t>& tokens, const std::vector<int32_t>& targets) const {
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

bool Verifier::verdict(bool held) const {
  const bool good = worst_ <= options_.tolerance && !picks_differ_;
  print(good ? "ok  " : "FAIL", " ", file_.path(), ": ", compared_, " tensors, worst ", worst_name_, " ",
        significant(worst_, 3), " (tolerance ", significant(options_.tolerance, 3), "), bits ", hex(bits_, 8),
        picks_differ_ ? ", picks differ" : "", held ? ", picks of the file held: only the first loss" : "", "\n");
  return good;
}

const std::string& Verifier::text(const char* name) const {
  const auto place = file_.metadata().find(name);
  if (place == file_.metadata().end())
    throw Error(where(name) + "expected, but missing; is this an oracle's file? dev/make_oracle.py makes one");
  return place->second;
}

int64_t Verifier::integer(const std::string& value, const char* name) const {
  char* end = nullptr;
  const long long number = strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end || number < 0 || number > (1 << 30))
    throw Error(where(name) + "expected a number of at most 2^30, found '" + value + "'");
  return number;
}

void Verifier::compare(const std::string& name, const std::vector<double>& found) {
  compare(name, found, file_.values<double>(name));
}

void Verifier::compare(const std::string& name, const std::vector<double>& found, const std::vector<double>& expected) {
  if (found.size() != expected.size())
    throw Error(
        str("'", file_.path(), "': tensor '", name, "': expected ", found.size(), " numbers, found ", expected.size()));
  bits_ = crc32c(found.data(), found.size() * sizeof(double), bits_);
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
    print("  ", left(name, 60), " ", right(significant(error, 3), 10), " largest  ",
          right(significant(reference > 0 ? std::sqrt(squares / reference) : std::sqrt(squares), 3), 10), " rms",
          good ? "" : "   PAST THE TOLERANCE", "\n");
  if (!(error <= worst_)) {
    worst_ = std::isnan(error) ? HUGE_VAL : error;
    worst_name_ = name;
  }
  compared_++;
}

// The file's table of group g, (B,C,columns), columns the lesser of K and C.
std::vector<int32_t> Verifier::file_picks(int64_t g) const {
  std::vector<int32_t> picks(B_ * C_ * columns());
  file_.read(str("group", g, ".topk_index"), {B_, C_, columns()}, picks.data());
  return picks;
}

std::vector<double> Verifier::file_weights(int64_t g) const {
  std::vector<double> weights(B_ * C_ * columns());
  file_.read(str("group", g, ".topk_weight"), {B_, C_, columns()}, weights.data());
  return weights;
}

}  // namespace gca
