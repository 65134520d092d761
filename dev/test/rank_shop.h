// Trainings of several ranks in a workshop: what they logged, and their processes.
#pragma once
#include <fcntl.h>
#include <signal.h>

#include <cmath>
#include <map>
#include <vector>

#include "base/json.h"
#include "dev/test/workshop.h"
#include "ranks/sockets.h"

namespace gca::test {

struct RankShop : Workshop {
  using Workshop::Workshop;
  std::string folder(const std::string& run) const { return path + "/" + run; }
  int output(const std::string& name) const {
    return ::open((path + "/" + name).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
  }
  std::string printed(const std::string& name = "output") const {
    return read_file(path + "/" + name, size_t{1} << 24);
  }
  // What log.jsonl says of each step, which it must tell once.
  std::map<int64_t, double> logged_values(const std::string& run, const char* name) const {
    std::map<int64_t, double> all;
    std::ifstream log(folder(run) + "/log.jsonl");
    for (std::string line; std::getline(log, line);) {
      const Json json = parse_json(line, "log.jsonl");
      const JsonField field(json, "log.jsonl");
      if (!field.has(name)) continue;
      CHECK(!all.contains(field.at("step").integer()));
      all[field.at("step").integer()] = field.at(name).number();
    }
    return all;
  }
  // Two runs tell of the same steps, and their figures differ by rounding.
  void check_follows(const std::string& run, const std::string& other, const char* name, double tolerance) const {
    const auto a = logged_values(run, name), b = logged_values(other, name);
    CAPTURE(run);
    CAPTURE(name);
    CHECK(!a.empty());
    CHECK(a.size() == b.size());
    for (const auto& [step, value] : a) {
      CAPTURE(step);
      REQUIRE(b.contains(step));
      CHECK(std::fabs(value - b.at(step)) <= tolerance * std::fabs(value));
    }
  }
  std::string command(const std::string& variables, const char* binary = nullptr) const {
    return "env " + variables + " " + (binary ? binary : program);
  }
  // A training of tiny steps that does not end by itself.
  std::string endless(const std::string& out, int ranks) const {
    return tiny_training(out, {{"steps", "1000000"},
                               {"save-every", "1000000"},
                               {"batch", "4"},
                               {"threads", "1"},
                               {"ranks", std::to_string(ranks)}});
  }
};

// The ranks that a launcher has started, once there are so many: oldest first.
inline std::vector<pid_t> children_of(pid_t id, size_t count) {
  std::vector<pid_t> children;
  for (int i = 0; i < 1000 && children.size() != count; i++) {
    if (i) usleep(10000);
    children.clear();
    std::ifstream list(str("/proc/", id, "/task/", id, "/children"));
    for (pid_t child; list >> child;) children.push_back(child);
  }
  REQUIRE(children.size() == count);
  return children;
}
inline bool is_gone(pid_t id, int seconds) {
  for (int i = 0; i < 100 * seconds; i++) {
    std::ifstream stat(str("/proc/", id, "/stat"));
    std::string text;
    if (!std::getline(stat, text) || text.find(") Z") != std::string::npos) return true;
    usleep(10000);
  }
  return false;
}
inline int free_port() { return Socket::listen("127.0.0.1", 0).port(); }
inline int times(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) count++;
  return count;
}

}  // namespace gca::test
