// The threads of a pool: how they are made and ended, and how they wait for work.
#include "base/threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/machine.h"

namespace gca {

class ThreadPool::Workers {
 public:
  explicit Workers(int threads) : most_awake_(std::min(machine().processors, threads) - 1), awake_(threads - 1) {
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
    failure_ = nullptr;
    const int wanted = static_cast<int>(std::min<int64_t>(count - 1, most_awake_));
    int woken = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_.store(((job_.load(std::memory_order_relaxed) & ~joined_mask) + one_job) | open, std::memory_order_release);
      const int awake = awake_.load(std::memory_order_relaxed);
      woken = std::clamp(wanted - awake, 0, asleep_);
      asleep_ -= woken;
      called_ += woken;
      awake_.store(awake + woken, std::memory_order_relaxed);
    }
    for (int i = 0; i < woken; i++) wake_.notify_one();
    work(0);
    // Nothing is left to take: whoever has not joined is not waited for.
    job_.fetch_and(~open, std::memory_order_relaxed);
    for (int spin = 0; job_.load(std::memory_order_acquire) & joined_mask; spin++)
      if (spin > 1000) std::this_thread::yield();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true, std::memory_order_relaxed);
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

  bool is_new(uint64_t seen) const { return job_.load(std::memory_order_acquire) / one_job != seen; }
  bool crowded() const { return awake_.load(std::memory_order_relaxed) > most_awake_; }

  void serve(int worker) {
    for (uint64_t seen = 0; !stop_.load(std::memory_order_relaxed);) {
      // A step is hundreds of short loops: look for the next one a while before sleeping, unless others do already.
      for (int spin = 0; spin < 4000 && !is_new(seen) && !crowded(); spin++)
        if (spin > 2000) std::this_thread::yield();
      if (!is_new(seen)) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (is_new(seen) || stop_.load(std::memory_order_relaxed)) continue;
        awake_.fetch_sub(1, std::memory_order_relaxed);
        asleep_++;
        wake_.wait(lock, [&] { return called_ > 0 || stop_.load(std::memory_order_relaxed); });
        if (called_ > 0) called_--;
      }
      uint64_t job = job_.load(std::memory_order_acquire);
      seen = job / one_job;
      while (job & open && job / one_job == seen)
        if (job_.compare_exchange_weak(job, job + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          work(worker);
          job_.fetch_sub(1, std::memory_order_release);
          break;
        }
    }
  }

  // job_: how many workers have joined, in its low bits; whether more may (there are tasks left); the job's number.
  // Only who has joined looks at what follows count_, so nobody is late: a job ends while others still wake up.
  static constexpr uint64_t joined_mask = (uint64_t{1} << 20) - 1, open = uint64_t{1} << 20, one_job = open << 1;

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> job_{0};
  std::atomic<int64_t> next_{0};
  const int most_awake_;    // workers that look for work at once, so that with the caller each has a processor
  std::atomic<int> awake_;  // written under the mutex, as asleep_ and called_ (woken, and not yet running)
  int asleep_ = 0, called_ = 0;
  std::exception_ptr failure_;
  std::atomic<bool> stop_ = false;
  Call call_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

ThreadPool::ThreadPool(int threads) {
  if (threads <= 0) threads = machine().processors;
  if (threads > 1) workers_ = std::make_unique<Workers>(threads);
  size_ = threads;
}
ThreadPool::~ThreadPool() = default;

void ThreadPool::run_on_all(int64_t count, Call call, void* context) { workers_->run(count, call, context); }

}  // namespace gca
