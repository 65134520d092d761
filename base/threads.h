// One pool of std::threads for all CPU work. Tasks are handed out by a counter, so which thread takes which task
// varies; a task writes only what belongs to its index, and sums over tasks are made afterwards in index order. Hence
// the same bits for any number of threads.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

#include "common.h"

namespace gca {

class ThreadPool {
 public:
  // threads: how many work at once, the caller included; 0 takes one for each processor that this process may keep
  // busy (base/machine.h). More threads than these are there, but sleep. An
  // Error that names --threads where the system gives fewer.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Calls task(index, worker) for every index in [0, count); returns when all are done. worker < size() names the
  // thread, for scratch memory only. The first exception that a task throws is thrown again here. Not to be called from
  // inside a task.
  template <class Task>
  void run(int64_t count, Task&& task) {
    if (size_ == 1 || count <= 1) {
      for (int64_t i = 0; i < count; i++) task(i, 0);
      return;
    }
    run_on_all(
        count,
        [](void* context, int64_t i, int worker) {
          (*static_cast<std::remove_reference_t<Task>*>(context))(i, worker);
        },
        &task);
  }

 private:
  using Call = void (*)(void* context, int64_t i, int worker);
  void run_on_all(int64_t count, Call call, void* context);

  class Workers;  // the other threads and what they share
  std::unique_ptr<Workers> workers_;
  int size_ = 1;
};

}  // namespace gca
