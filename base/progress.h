// How far some work is, and how long it took.
#pragma once
#include <cstdint>
#include <string>

#include "common.h"

namespace gca {

// Seconds of a clock that never goes back.
double now();

// A line on a terminal that says how far some work is; nothing where stderr is a file or a pipe.
class Progress {
 public:
  // total: of the work, in whatever at() counts; unit of its speed: unit_size of these.
  Progress(std::string doing, int64_t total, std::string unit, double unit_size);
  ~Progress();
  double seconds() const;  // since it was made
  void at(int64_t done);

 private:
  std::string doing_, unit_;
  double unit_size_, total_;
  bool shown_;
  double start_, last_;  // of now()
};

}  // namespace gca
