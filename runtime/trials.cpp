// Trials of needles: outcomes, scores, intervals, and their records in a file.
#include "runtime/trials.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/json.h"

namespace gca {

// ---- a question ---------------------------------------------------------------------------------------------------
double needle_margin(const TaskRow& row, const std::vector<std::vector<double>>& scores, int64_t K) {
  double least = INFINITY;
  for (const int64_t needle : row.questions[0].needles) {
    double best = -INFINITY;
    for (const std::vector<double>& of_group : scores) {
      std::vector<double> text = of_group;
      for (const Needle& other : row.needles)
        if (other.chunk < std::ssize(text)) text[other.chunk] = -INFINITY;
      if (std::ssize(text) - std::ssize(row.needles) < K || row.needles[needle].chunk >= std::ssize(text)) return NAN;
      std::nth_element(text.begin(), text.begin() + (K - 1), text.end(), std::greater<double>());
      best = std::max(best, of_group[row.needles[needle].chunk] - text[K - 1]);
    }
    least = std::min(least, best);
  }
  return least;
}

Outcome outcome_of(const TaskRow& row, const Answer& answer, const Place& place) {
  const Question& question = row.questions[0];
  bool hit = true;
  double weight = INFINITY;  // of several needles the least, of several groups the best
  for (const int64_t needle : question.needles) {
    double best = 0;
    bool is_fetched = false;
    for (const FetchedFor& fetched : answer.fetched)
      for (size_t k = 0; k < fetched.pick.size(); k++)
        if (fetched.pick[k] == row.needles[needle].chunk) {
          is_fetched = true;
          best = std::max(best, fetched.w[k]);
        }
    hit &= is_fetched;
    weight = std::min(weight, best);
  }
  const int64_t depth = place.depth_of(row.needles[question.needles[0]].chunk);
  return {answer.answer, question.answer, hit, depth, answer.margin, weight};
}

// ---- a haystack's record ------------------------------------------------------------------------------------------
Json TrialRecord::json() const {
  Json record = Json::object();
  record["trial"] = number;
  record["slots_read"] = slots;
  record["seconds"] = seconds;
  for (const Outcome& outcome : questions) {
    Json question = Json::object();
    question["right"] = outcome.right();
    question["given"] = outcome.given;
    question["answer"] = outcome.answer;
    question["hit"] = outcome.hit;
    question["depth"] = outcome.depth;
    question["margin"] = outcome.margin;
    question["weight"] = outcome.weight;
    record["questions"].push_back(question);
  }
  return record;
}

TrialRecord TrialRecord::parse(const JsonField& line) {
  const auto ids = [](const JsonField& field) {
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < field.items().size(); i++)
      tokens.push_back(static_cast<int32_t>(field.at(i).integer(0, INT32_MAX)));
    return tokens;
  };
  TrialRecord record{line.at("trial").integer(0), line.at("slots_read").integer(0), line.at("seconds").number(), {}};
  const JsonField questions = line.at("questions");
  for (size_t i = 0; i < questions.items().size(); i++) {
    const JsonField field = questions.at(i), margin = field.at("margin");
    Outcome outcome{ids(field.at("given")),
                    ids(field.at("answer")),
                    field.at("hit").boolean(),
                    field.at("depth").integer(0, Place::depths - 1),
                    margin.json().is_null() ? NAN : margin.number(),
                    field.at("weight").number()};
    if (outcome.answer.empty() || outcome.given.size() != outcome.answer.size())
      throw Error(field.where() + ": expected as many tokens given as in the answer");
    record.questions.push_back(std::move(outcome));
  }
  return record;
}

// ---- figures ------------------------------------------------------------------------------------------------------
void Score::add(const TrialRecord& record) {
  int64_t right = 0;
  for (const Outcome& outcome : record.questions) {
    right += outcome.right();
    first += outcome.given[0] == outcome.answer[0];
    hits += outcome.hit;
    for (size_t i = 0; i < outcome.given.size(); i++) tokens_right += outcome.given[i] == outcome.answer[i];
    tokens += std::ssize(outcome.given);
    depth_trials[outcome.depth]++;
    depth_exact[outcome.depth] += outcome.right();
    margins.push_back(outcome.margin);
    weight += outcome.weight;
  }
  haystacks++;
  trials += std::ssize(record.questions);
  exact += right;
  of_haystack.push_back({right, std::ssize(record.questions)});
  slots += record.slots;
  seconds += record.seconds;
}

double Score::margin() const {
  double sum = 0, count = 0;
  for (const double x : margins)
    if (!std::isnan(x)) {
      sum += x;
      count++;
    }
  return sum / count;
}

double Score::margin_quantile(double q) const {
  std::vector<double> known;
  std::copy_if(margins.begin(), margins.end(), std::back_inserter(known), [](double x) { return !std::isnan(x); });
  if (known.empty()) return NAN;
  std::sort(known.begin(), known.end());
  return known[static_cast<size_t>(q * static_cast<double>(known.size() - 1))];
}

std::pair<double, double> Score::interval(double right, double of) {
  const double z = 1.959964, n = of, p = right / n, middle = p + z * z / (2 * n),
               half = z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  return {(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)};
}

std::pair<double, double> Score::exact_interval() const {
  const double H = static_cast<double>(haystacks), n = static_cast<double>(trials), p = static_cast<double>(exact) / n;
  if (trials == haystacks) return interval(static_cast<double>(exact), n);
  double independent = H;
  if (exact > 0 && exact < trials && haystacks > 1) {
    // p = sum of right / sum of asked, a ratio: its variance is H / (H - 1) sum of (right - p asked)^2 / n^2.
    double squares = 0;
    for (const auto& [right, asked] : of_haystack) {
      const double rest = static_cast<double>(right) - p * static_cast<double>(asked);
      squares += rest * rest;
    }
    const double variance = H / (H - 1) * squares / (n * n);
    independent = variance > 0 ? std::clamp(p * (1 - p) / variance, 1.0, n) : n;
  }
  return interval(p * independent, independent);
}

// ---- records in a file --------------------------------------------------------------------------------------------
namespace {

std::string key(int64_t slots, const std::string& place) { return str(slots, " ", place); }

}  // namespace

TrialFile::TrialFile(std::string path, std::string run) : path_(std::move(path)), run_(std::move(run)) {
  if (path_.empty()) return;
  check_can_append(path_);
  const std::string text = read_file(path_, size_t{1} << 40);
  ended_ = text.empty() || text.back() == '\n';
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    if (end > at) take(text.substr(at, end - at));
    at = end + 1;
  }
}

void TrialFile::take(const std::string& line) {
  try {
    const Json json = parse_json(line, "'" + path_ + "'");
    const JsonField field(json, "'" + path_ + "'");
    const Json* run = json.find("run");
    if (!run || *run != Json(run_)) return;
    const std::string where = key(field.at("slots").integer(), field.at("place").string());
    if (field.has("exact")) {
      figures_[where] = field.at("haystacks").integer();
    } else {
      TrialRecord record = TrialRecord::parse(field);
      records_[where][record.number] = std::move(record);
    }
  } catch (const Error&) {
    damaged_++;
  }
}

std::vector<TrialRecord> TrialFile::found(int64_t slots, const Place& place, int64_t count) const {
  std::vector<TrialRecord> all;
  const auto there = records_.find(key(slots, place.name()));
  if (there == records_.end()) return all;
  for (const auto& [number, record] : there->second) {
    if (number != std::ssize(all) || number == count) break;
    all.push_back(record);
  }
  return all;
}

bool TrialFile::has_figures(int64_t slots, const Place& place, int64_t count) const {
  const auto there = figures_.find(key(slots, place.name()));
  return there != figures_.end() && there->second == count;
}

void TrialFile::append(const Json& line) {
  if (!ended_) append_line(path_, "");  // what was cut off stays a line of its own
  ended_ = true;
  append_line(path_, line.dump());
}

void TrialFile::add(int64_t slots, const Place& place, const TrialRecord& record) {
  if (path_.empty()) return;
  Json line = Json::object();
  line["run"] = run_;
  line["place"] = place.name();
  line["slots"] = slots;
  line.add(record.json());
  append(line);
}

void TrialFile::add_figures(const Json& figures) {
  if (path_.empty()) return;
  Json line = figures;
  line["run"] = run_;
  append(line);
}

}  // namespace gca
