// One allocation from a list of wishes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common.h"

namespace gca {

// The largest n below too_many for which fits(n) holds, which it does up to some n and not beyond; 0 if there is none.
template <class Fits>
int64_t most_that_fit(int64_t too_many, Fits fits) {
  int64_t most = 0;
  while (too_many - most > 1) {
    const int64_t middle = most + (too_many - most) / 2;
    (fits(middle) ? most : too_many) = middle;
  }
  return most;
}

class Arena {
 public:
  struct Wish {
    std::string name;
    int64_t n_bytes;
    std::vector<void**> pointers;
  };
  // After commit(), pointer points at count elements; until then nothing is allocated.
  template <class T>
  void want(T*& pointer, const std::string& name, int64_t count) {
    wishes_.push_back(
        {name, round_up(count * static_cast<int64_t>(sizeof(T)), 256), {reinterpret_cast<void**>(&pointer)}});
    total_bytes_ += wishes_.back().n_bytes;
  }
  // All that want the same name here share the memory of the largest.
  template <class T>
  void want_shared(T*& pointer, const std::string& name, int64_t count) {
    const auto wish = std::find_if(wishes_.begin(), wishes_.end(), [&](const Wish& w) { return w.name == name; });
    if (wish == wishes_.end()) return want(pointer, name, count);
    const int64_t more_bytes =
        std::max<int64_t>(0, round_up(count * static_cast<int64_t>(sizeof(T)), 256) - wish->n_bytes);
    wish->n_bytes += more_bytes;
    total_bytes_ += more_bytes;
    wish->pointers.push_back(reinterpret_cast<void**>(&pointer));
  }
  const std::vector<Wish>& wishes() const { return wishes_; }
  int64_t total_bytes() const { return total_bytes_; }
  template <class Device>
  void commit(Device& device) {
    memory_ = static_cast<char*>(device.allocate(total_bytes_));
    char* at = memory_;
    for (const Wish& wish : wishes_) {
      for (void** pointer : wish.pointers) *pointer = at;
      at += wish.n_bytes;
    }
  }
  template <class Device>
  void release(Device& device) {
    if (memory_) device.release(memory_);
    memory_ = nullptr;
    total_bytes_ = 0;
    wishes_.clear();
  }

 private:
  std::vector<Wish> wishes_;
  int64_t total_bytes_ = 0;
  char* memory_ = nullptr;
};

}  // namespace gca
