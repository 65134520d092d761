// A line on a terminal that says how far some work is; how long something takes.
#pragma once
#include <chrono>
#include <cstdint>
#include <string>

#include "common.h"

namespace gca {

class Stopwatch {
 public:
  double seconds() const {  // since it was made, of a clock that never goes back
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// A line on a terminal that says how far some work is; nothing where stderr is a file or a pipe.
class Progress {
 public:
  // total: of the work, in whatever at() counts; unit of its speed: unit_size of these.
  Progress(std::string doing, int64_t total, std::string unit, double unit_size);
  ~Progress();
  double seconds() const { return clock_.seconds(); }  // since it was made
  void at(int64_t done);

 private:
  std::string doing_, unit_;
  double unit_size_, total_;
  bool shown_;
  Stopwatch clock_;
  double last_ = 0;  // when the line was drawn
};

}  // namespace gca
