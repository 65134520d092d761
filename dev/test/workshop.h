// A temporary folder with text, shards and runs, and the program run in it as a user does.
#pragma once
#include <doctest/doctest.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "../../runtime/files.h"
#include "test.h"

namespace gca::test {

struct Workshop : TempFolder {
  std::string program;
  explicit Workshop(const std::string& program_ = "build/cpu/train_gca") : program(program_) {
    std::string text;  // words in a pattern that a tiny model can learn something of
    for (uint32_t i = 0; i < 6000; i++) text += format("%s %u; ", philox(3, Stream::task, i).word[0] % 3 ? "the sea" : "a ship", philox(3, Stream::task, i).word[1] % 10);
    write_file(path + "/text.txt", text);
    REQUIRE(run("tokenize --out " + path + "/shards/t --val 0.1 " + path + "/text.txt").exit == 0);
  }

  struct Result { int exit; std::string out; };
  // Runs the program; out: what it printed, errors too.
  Result run(const std::string& arguments) const {
    const std::string log = path + "/log";
    const int status = system((program + " " + arguments + " > " + log + " 2>&1").c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(log, size_t{1} << 24)};
  }
  std::string training(const std::string& out, const std::string& chunks = "6") const {
    return "train --width 16 --heads 2 --ffn 24 --lower 1 --groups 1,1 --chunk 8 --window 12 --topk 2 --chunks " + chunks + " --batch 3 --lr 3e-3 --eval-every 5 --data '" + path +
           "/shards/t_train_*' --val-data '" + path + "/shards/t_val_*' --out " + path + "/" + out;
  }
  std::string weights(const std::string& run, const char* step) const { return read_file(path + "/" + run + "/step_" + step + "/model.safetensors", size_t{1} << 24); }
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

inline bool says(const Workshop::Result& result, const std::string& words) { return result.out.find(words) != std::string::npos; }

}  // namespace gca::test
