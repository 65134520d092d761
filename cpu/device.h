// The CPU as a device: its threads, and memory in the terms that a GPU's is spoken of.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "base/threads.h"
#include "ops.h"

namespace gca {

class CpuDevice {
 public:
  static constexpr int64_t alignment_bytes = 64;
  static constexpr int64_t vocab_multiple = 1;      // V is rounded up to it in memory
  static constexpr int64_t logits_bytes = 8 << 20;  // of a piece of logits: stays in the cache

  // An Error where this process flushes denormal numbers to zero: a flag of the linker or a library may have set that.
  explicit CpuDevice(int threads);
  ThreadPool& pool() { return pool_; }

  // ---- memory -----------------------------------------------------------------------------------------------------
  void* allocate(int64_t n_bytes);
  void release(void* memory);
  // What this process can still have: base/machine.h.
  static int64_t free_bytes();
  void zero_bytes(void* memory, int64_t n_bytes) { memset(memory, 0, n_bytes); }
  template <class T>
  void zero(T* data, int64_t count) {  // data (count)
    zero_bytes(data, count * static_cast<int64_t>(sizeof(T)));
  }
  void upload(void* device, const void* host, int64_t n_bytes) { memcpy(device, host, n_bytes); }
  void download(void* host, const void* device, int64_t n_bytes) { memcpy(host, device, n_bytes); }
  template <class T>
  void copy(T* to, const T* from, int64_t count) {  // inside the device. to, from (count)
    memcpy(to, from, count * sizeof(T));
  }

  void copy_bytes(void* to, const void* from, int64_t n_bytes) { memcpy(to, from, static_cast<size_t>(n_bytes)); }

  // ---- a side stream: copies that go on beside the device's other work, where there is one ------------------------
  void* allocate_host(int64_t n_bytes) { return allocate(n_bytes); }
  void release_host(void* memory, int64_t) { release(memory); }
  void side_waits() {}
  void wait_for_side() {}
  void side_synchronize() {}
  void side_download(void* host, const void* device, int64_t n_bytes) { copy_bytes(host, device, n_bytes); }
  void side_copies(const std::vector<std::pair<void*, const void*>>& to_from, int64_t n_bytes);
  double side_copy_seconds() const { return side_copy_seconds_; }  // that side_copies() has taken so far

  // The step's figures for the host, without a wait until they are read: a GPU runs ahead meanwhile.
  struct Snapshot {
    StepState value;
  };
  static constexpr bool runs_ahead = false;
  struct Graph {};
  void look_for_errors() {}
  void synchronize() {}
  static constexpr bool captures = false;  // no graphs of work: a call costs nothing here
  void take(Snapshot& snapshot, const StepState* state) { snapshot.value = *state; }
  StepState read(const Snapshot& snapshot) { return snapshot.value; }

 protected:
  ThreadPool pool_;

 private:
  double side_copy_seconds_ = 0;
};

}  // namespace gca
