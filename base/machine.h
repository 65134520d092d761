// What of this machine the process may use: processors and memory, less what a control group (a container's --cpus and
// --memory, a batch system's) or ulimit holds back.
#pragma once
#include <cstdint>
#include <string>

namespace gca {

struct Machine {
  int processors;              // worth a thread each, 1 at least
  std::string processors_why;  // what gives that many, for a person
  int64_t free_bytes;          // of memory: what the machine could still give and the process still take
  std::string memory_why;
};

// As it is now. root: where /proc and /sys stand; tests have trees of their own. Where there is no /proc: the
// processors that the system tells of, and plenty of memory.
Machine machine(const std::string& root = "");

}  // namespace gca
