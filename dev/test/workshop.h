// A temporary folder with text, shards and runs, and the program run in it as a user does.
#pragma once
#include <doctest/doctest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "base/files.h"
#include "dev/test/test.h"
#include "ranks/world.h"

namespace gca::test {

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

// The program in the background; killed with the object.
class Process {
 public:
  // output: an open file that gets what it prints; closed here. before_exec: called in the child.
  Process(const std::string& program, const std::string& arguments, int output,
          const std::function<void()>& before_exec = nullptr)
      : id(fork()) {
    if (id != 0) ::close(output);
    REQUIRE(id >= 0);
    if (id > 0) return;
    for (const int number : stop_signals) signal(number, SIG_DFL);  // whoever runs the tests may ignore some
    signal(SIGPIPE, SIG_DFL);
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    if (before_exec) before_exec();
    execl("/bin/sh", "sh", "-c", ("exec " + program + " " + arguments).c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  ~Process() {
    if (ended_) return;
    kill(id, SIGKILL);
    wait();
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  const pid_t id;
  // Until it ends. Its exit status, or minus the signal that ended it.
  int wait() {
    int status = 0;
    while (waitpid(id, &status, __WALL) == id && WIFSTOPPED(status)) {}
    ended_ = true;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  bool ends_within(int seconds) const {
    for (int i = 0; i < 100 * seconds; i++) {
      siginfo_t info{};
      waitid(P_PID, static_cast<id_t>(id), &info, WEXITED | WNOHANG | WNOWAIT);
      if (info.si_pid == id) return true;
      usleep(10000);
    }
    return false;
  }
  // Stops it where it is; the signals that it gets then wait for go_on().
  void freeze() {
    int status = 0;
    kill(id, SIGSTOP);
    REQUIRE(waitpid(id, &status, WUNTRACED) == id);
    REQUIRE(WIFSTOPPED(status));
  }
  void go_on() const { kill(id, SIGCONT); }

 private:
  bool ended_ = false;
};

// Flags by name. A test that wants another value than a default's puts it in the default's place: no flag is given
// twice, and no line of flags is copied.
using FlagMap = std::map<std::string, std::string>;
inline FlagMap with(FlagMap flags, const FlagMap& others) {
  for (const auto& [name, value] : others) flags[name] = value;
  return flags;
}
inline std::string written(const FlagMap& flags) {
  std::string all;
  for (const auto& [name, value] : flags) all += str(" --", name, " '", value, "'");
  return all;
}

// The smallest model that has every part: a step takes a fraction of a millisecond.
inline const FlagMap tiny_model = {{"width", "8"},  {"heads", "2"}, {"ffn", "8"},    {"lower", "1"}, {"encoder", "1"},
                                   {"groups", "1"}, {"chunk", "8"}, {"window", "8"}, {"topk", "2"}};

struct Workshop : TempFolder {
  std::string program;
  // program_: TRAIN_GCA, or the CPU's. parent: the folder to make this one in.
  explicit Workshop(const std::string& program_ = getenv("TRAIN_GCA") ? getenv("TRAIN_GCA") : "build/cpu/train_gca",
                    const std::string& parent = std::filesystem::temp_directory_path().string())
      : TempFolder(parent), program(program_) {
    std::string text;  // words in a pattern that a tiny model can learn something of
    for (uint32_t i = 0; i < 6000; i++)
      text += str(philox(3, Draw::task, i).word[0] % 3 ? "the sea" : "a ship", " ",
                  philox(3, Draw::task, i).word[1] % 10, "; ");
    write_file(path + "/text.txt", text);
    REQUIRE(run("tokenize --out " + path + "/shards/t --val 0.1 " + path + "/text.txt").exit == 0);
  }

  struct Result {
    int exit;
    std::string out;
  };
  // Runs the program; out: what it printed, errors too.
  Result run(const std::string& arguments) const {
    const std::string log = path + "/log";
    const int status = system((program + " " + arguments + " > " + log + " 2>&1").c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(log, size_t{1} << 24)};
  }
  // The program ends with that exit code and says these words.
  void fails(const std::string& arguments, int exit, const std::string& words) const {
    const Result result = run(arguments);
    CAPTURE(arguments);
    CAPTURE(words);
    CAPTURE(result.out);
    CHECK(result.exit == exit);
    CHECK(result.out.find(words) != std::string::npos);
  }
  // A command that trains a model of two groups on the shards; some flags with other values, or added.
  std::string training(const std::string& out, const FlagMap& others = {}) const {
    return "train" + written(with({{"width", "16"},
                                   {"heads", "2"},
                                   {"ffn", "24"},
                                   {"lower", "1"},
                                   {"groups", "1,1"},
                                   {"chunk", "8"},
                                   {"window", "12"},
                                   {"topk", "2"},
                                   {"chunks", "6"},
                                   {"batch", "3"},
                                   {"lr", "3e-3"},
                                   {"eval-every", "5"},
                                   {"data", path + "/shards/t_train_*"},
                                   {"val-data", path + "/shards/t_val_*"},
                                   {"out", path + "/" + out}},
                                  others));
  }
  // The same of the tiny model, without validation.
  std::string tiny_training(const std::string& out, const FlagMap& others = {}) const {
    const FlagMap run = {
        {"batch", "2"}, {"chunks", "2"}, {"data", path + "/shards/t_train_*"}, {"out", path + "/" + out}};
    return "train" + written(with(with(tiny_model, run), others));
  }
  std::string weights(const std::string& run, const char* step) const {
    return read_file(path + "/" + run + "/step_" + step + "/model.safetensors", size_t{1} << 24);
  }
  // Waits, a minute at most, until the run's log has that many lines.
  bool logged(const std::string& run, int lines) const {
    for (int i = 0; i < 6000; i++) {
      std::ifstream log(path + "/" + run + "/log.jsonl");
      int count = 0;
      for (std::string line; std::getline(log, line);) count++;
      if (count >= lines) return true;
      usleep(10000);
    }
    return false;
  }
};

inline bool says(const Workshop::Result& result, const std::string& words) {
  return result.out.find(words) != std::string::npos;
}

}  // namespace gca::test
