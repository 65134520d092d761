// A line on a terminal that says how far some work is.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>

#include "common.h"

namespace gca {

// A line on a terminal that says how far some work is; nothing where stderr is a file or a pipe.
class Progress {
 public:
  // total: of the work, in whatever at() counts; unit of its speed: unit_size of these.
  Progress(std::string doing, int64_t total, std::string unit, double unit_size);
  ~Progress();
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  void at(int64_t done);

 private:
  using Clock = std::chrono::steady_clock;
  std::string doing_, unit_;
  double unit_size_, total_;
  bool shown_;
  Clock::time_point start_ = Clock::now(), last_ = start_;
};

}  // namespace gca
