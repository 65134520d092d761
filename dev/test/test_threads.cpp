// The pool of threads: every task once, errors of tasks, and a system that gives fewer threads than asked for.
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>

#include "base/machine.h"
#include "base/progress.h"
#include "base/threads.h"
#include "dev/test/test.h"

using namespace gca;
using namespace gca::test;

TEST_CASE("threads: every task is done once, and the first error of one comes out") {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (const int64_t count : {0, 1, 3, 1000}) {
      std::vector<std::atomic<int>> done(static_cast<size_t>(count));
      std::atomic<bool> inside = true;
      pool.run(count, [&](int64_t i, int worker) {
        done[static_cast<size_t>(i)]++;
        if (worker < 0 || worker >= threads) inside = false;
      });
      CHECK(inside);
      for (const auto& times : done) CHECK(times == 1);
    }
    CHECK(error_of([&] {
            pool.run(1000, [](int64_t i, int) {
              if (i == 500) throw Error("the 500th");
            });
          }) == "the 500th");
    std::atomic<int> after = 0;
    pool.run(10, [&](int64_t, int) { after++; });
    CHECK(after == 10);
  }
}

TEST_CASE("threads: many more than processors make short loops little slower") {
  const int processors = machine().processors;
  const auto seconds_of = [&](int threads) {
    ThreadPool pool(threads);
    double best = 1e9;
    for (int attempt = 0; attempt < 5; attempt++) {
      const Stopwatch clock;
      for (int loop = 0; loop < 300; loop++)
        pool.run(8, [](int64_t i, int) {
          volatile int64_t sum = i;
          for (int k = 0; k < 2000; k++) sum = sum + k;
        });
      best = std::min(best, clock.seconds());
    }
    return best;
  };
  const double usual = seconds_of(processors), many = seconds_of(32 * processors);
  CAPTURE(usual);
  CAPTURE(many);
  CHECK(many < 2 * usual);
}

TEST_CASE("threads: where the system gives fewer than asked for, those that were made end and an error says so") {
#ifdef __SANITIZE_THREAD__
  return skip("ThreadSanitizer lets no forked process make threads");
#endif
  constexpr int cannot = 77, other = 78;
  for (const int given : {1, 5}) {
    CAPTURE(given);
    const bool root = getuid() == 0;
    if (given > 1 && !root) continue;  // how many threads a user has is not known
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      alarm(20);  // a pool that waits for ever is ended, and the test fails
      const rlimit limit = {static_cast<rlim_t>(given), static_cast<rlim_t>(given)};
      constexpr uid_t nobody_else = 54321;  // root has no limit; a user without a process has none but this
      if (setrlimit(RLIMIT_NPROC, &limit) < 0 || (root && setresuid(nobody_else, nobody_else, nobody_else) < 0))
        _exit(cannot);
      try {
        const std::string error = error_of([] { ThreadPool pool(64); });
        const std::string expected = str("expected 64 threads, found that the system gives ", given, ":");
        _exit(has(error, expected) && has(error, "--threads ") ? 0 : error.empty() ? cannot : other);
      } catch (...) {
        _exit(other);  // not an Error
      }
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == cannot) return skip("the number of threads cannot be limited here");
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
  }
}
