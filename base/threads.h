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
  // threads: how many work at once, the caller included; 0 takes one for each processor that this process may use.
  explicit ThreadPool(int threads = 0) {
    if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    for (int worker = 1; worker < threads; worker++) workers_.emplace_back([this, worker] { serve(worker); });
  }
  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
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
    call_ = [](void* context, int64_t i, int worker) {
      (*static_cast<std::remove_reference_t<Task>*>(context))(i, worker);
    };
    context_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    failure_ = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load() > 0) wake_.notify_all();
    work(0);
    for (int spin = 0; busy_.load(std::memory_order_acquire) > 0; spin++)
      if (spin > 1000) std::this_thread::yield();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void work(int worker) {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(context_, i, worker);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_.store(count_);
    }
  }

  void serve(int worker) {
    for (uint64_t seen = 0;;) {
      // A step is hundreds of short loops: look for the next one a while before sleeping.
      for (int spin = 0; spin < 4000 && generation_.load(std::memory_order_acquire) == seen; spin++)
        if (spin > 2000) std::this_thread::yield();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      work(worker);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

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
