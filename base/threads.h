// One pool of std::threads for all CPU work. Tasks are handed out by a counter, so which thread takes which task
// varies; a task writes only what belongs to its index, and sums over tasks are made afterwards in index order. Hence
// the same bits for any number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "common.h"

namespace gca {

class ThreadPool {
 public:
  // threads: how many work at once, the caller included; 0 takes one for each processor that this process may use. An
  // Error that names --threads where the system gives fewer.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(index, worker) for every index in [0, count); returns when all are done. worker < size() names the
  // thread, for scratch memory only. The first exception that a task throws is thrown again here. Not to be called from
  // inside a task.
  template <class Task>
  void run(int64_t count, Task&& task) {
    if (count <= 0) return;
    if (workers_.empty() || count == 1) {
      for (int64_t i = 0; i < count; i++) task(i, 0);
      return;
    }
    run_tasks(
        count,
        [](void* context, int64_t i, int worker) {
          (*static_cast<std::remove_reference_t<Task>*>(context))(i, worker);
        },
        &task);
  }

 private:
  void end_workers();
  void run_tasks(int64_t count, void (*call)(void*, int64_t, int), void* context);
  void work(int worker);

  void serve(int worker);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0}, sleepers_{0};
  std::exception_ptr failure_;
  bool stop_ = false;
  void (*call_)(void*, int64_t, int) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace gca
