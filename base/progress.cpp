// A line on a terminal: when it is drawn, and what it says.
#include "base/progress.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

namespace gca {

double monotonic_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Progress::Progress(std::string doing, int64_t total, std::string unit, double unit_size)
    : doing_(std::move(doing)),
      unit_(std::move(unit)),
      unit_size_(unit_size),
      total_(static_cast<double>(std::max<int64_t>(1, total))),
      shown_(::isatty(2)) {}

Progress::~Progress() {
  if (shown_) fputs("\r\x1b[K", stderr);
}

void Progress::at(int64_t done) {
  if (!shown_ || done <= 0 || seconds() - last_ < 0.2) return;
  last_ = seconds();
  const double part = static_cast<double>(done) / total_;
  const size_t filled = static_cast<size_t>(30 * std::min(1.0, part));
  const std::string bar = std::string(filled, '#') + std::string(30 - filled, '.');
  const int left = static_cast<int>(std::min(seconds() / part * std::max(0.0, 1 - part), 1e8));
  print_error("\r", doing_, " [", bar, "] ", right(fixed(100 * part, 0), 3), "%  ",
              fixed(static_cast<double>(done) / unit_size_ / seconds(), 1), " ", unit_, "/s  ETA ", left / 60, ":",
              right(left % 60, 2, '0'), " \x1b[K");
}

}  // namespace gca
