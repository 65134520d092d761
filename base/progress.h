// A line on a terminal that says how far some work is; how long something takes.
#pragma once
#include <cstdint>
#include <string>

#include "common.h"

namespace gca {

// Seconds of a clock that only goes on.
double monotonic_seconds();

class Stopwatch {
 public:
  double seconds() const { return monotonic_seconds() - start_; }  // since it was made

 private:
  double start_ = monotonic_seconds();
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
