// Trials of needles, once they are read: what each question came to, the score of many, and their records in a file,
// from which a run that was stopped goes on.
#pragma once
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "runtime/needles.h"
#include "runtime/stream.h"

namespace gca {

// The rows of C chunks whose needles lie in chunks first .. end - 1.
struct Place {
  int64_t C, first, end;
  bool near;
  const char* name() const { return near ? "near" : "far"; }
  static constexpr int depths = 4;  // quarters of these chunks, the oldest first
  int64_t depth_of(int64_t chunk) const { return (chunk - first) * depths / (end - first); }
};

// What reading a question came to. Greedy and right so far, the model reads what stands in the row already: the row's
// own answer gives free-running figures too.
struct Answer {
  std::vector<FetchedFor> fetched;  // a group: for the answer's chunk
  std::vector<int32_t> answer;      // the likeliest tokens at its slots
  double margin = NAN;              // of the needle, see needle_margin()
};

// The score of the needle less that of the K-th best chunk that holds none: what must be above 0 for a hit, whatever
// else the row holds. Of several needles the least, of several groups the best; not a number where the row is too short
// for one. scores: a group's, of all that chunk may fetch.
double needle_margin(const TaskRow& row, const std::vector<std::vector<double>>& scores, int64_t K);

// A question, scored. It counts as right if every token is.
struct Outcome {
  std::vector<int32_t> given, answer;  // tokens: the model's, and those expected
  bool hit = false;                    // all its needles' chunks were fetched
  int64_t depth = 0;                   // of its needle
  double margin = NAN, weight = 0;     // of its needles
  bool right() const { return given == answer; }
};
Outcome outcome_of(const TaskRow& row, const Answer& answer, const Place& place);

// A haystack and the questions asked of it.
struct TrialRecord {
  int64_t number = 0;
  int64_t slots = 0;  // that were read
  double seconds = 0;
  std::vector<Outcome> questions;
  Json json() const;
  static TrialRecord parse(const JsonField& line);  // an Error where a field is missing or not as json() makes it
};

// What the trials of one length and place came to.
struct Score {
  int64_t haystacks = 0, trials = 0, exact = 0, first = 0, hits = 0, tokens = 0, tokens_right = 0, slots = 0;
  int64_t depth_trials[Place::depths] = {}, depth_exact[Place::depths] = {};
  std::vector<std::pair<int64_t, int64_t>> of_haystack;  // questions right, questions asked
  std::vector<double> margins;                           // of the needles, a question
  double weight = 0;                                     // sum of the needles'
  double seconds = 0;

  void add(const TrialRecord& record);
  // Mean and quantile of the margins that are numbers; not a number where there is none.
  double margin() const;
  double margin_quantile(double q) const;
  // 95% Wilson interval of a share.
  static std::pair<double, double> interval(double right, double of);
  // Of the share of right answers. Several questions of a haystack are not independent of each other: their number is
  // replaced by that of the independent ones whose share would have the same standard error as this one's, which is
  // cluster-robust (clusters: haystacks). Where all answers are right, or none, nothing tells that number, and it is
  // that of the haystacks.
  std::pair<double, double> exact_interval() const;
};

// The records of trials in a file of JSON lines, which may hold other lines too. Those of a run are told by its name.
class TrialFile {
 public:
  // path "": no file. run: what all trials have in common, as a name.
  TrialFile(std::string path, std::string run);
  // Trials 0, 1, .. of that length and place that are there already, without a gap; at most `count`.
  std::vector<TrialRecord> found(int64_t slots, const Place& place, int64_t count) const;
  // Whether the figures of so many are there.
  bool has_figures(int64_t slots, const Place& place, int64_t count) const;
  void add(int64_t slots, const Place& place, const TrialRecord& record);
  void add_figures(const Json& figures);
  const std::string& path() const { return path_; }
  int64_t damaged() const { return damaged_; }  // lines that are no JSON, as of a process that was killed

 private:
  void take(const std::string& line);
  void append(const Json& line);

  std::string path_, run_;
  bool ended_ = true;  // the file's last line
  int64_t damaged_ = 0;
  std::map<std::string, std::map<int64_t, TrialRecord>> records_;  // by length and place, and number
  std::map<std::string, int64_t> figures_;                         // of how many trials, by length and place
};

}  // namespace gca
