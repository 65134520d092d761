// The threads of a pool: how they are made and ended, and how they wait for work.
#include "base/threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace gca {

class ThreadPool::Workers {
 public:
  explicit Workers(int threads) {
    try {
      for (int worker = 1; worker < threads; worker++) workers_.emplace_back([this, worker] { serve(worker); });
    } catch (const std::exception&) {  // std::system_error, or no memory for one more
      const size_t made = workers_.size() + 1;
      end();  // they wait for work that will not come
      throw Error(str("expected ", threads, " threads, found that the system gives ", made,
                      ": a limit on processes or memory (ulimit -u, ulimit -v, a container's) stands in the way; use "
                      "--threads ",
                      std::max<size_t>(1, made / 2), " or fewer, or raise the limit"));
    }
  }
  ~Workers() { end(); }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void run(int64_t count, Call call, void* context) {
    call_ = call;
    context_ = context;
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
  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

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
  Call call_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (threads > 1) workers_ = std::make_unique<Workers>(threads);
  size_ = threads;
}
ThreadPool::~ThreadPool() = default;

void ThreadPool::run_on_all(int64_t count, Call call, void* context) { workers_->run(count, call, context); }

}  // namespace gca
