// Training steps on several ranks of this host, each with as many rows whatever their number, beside the same steps of
// each rank for itself, all at once: what training together costs, and what of the ranks' talk is not hidden.
#pragma once
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "runtime/matmul_cache.h"
#include "runtime/models.h"
#include "runtime/parallel.h"

namespace gca {

// In place of collectives: what a step takes when the ranks' talk costs nothing.
class NoCollectives : public Collectives {
 public:
  std::string description() const override { return "nothing"; }
  void all_reduce(double*, int64_t) override {}
  void reduce_scatter(float*, int64_t) override {}
  void reduce_scatter(double*, int64_t) override {}
  void all_gather(void*, int64_t) override {}
};

// The sum of a few numbers a step, before which no rank can update: then all wait for the slowest, step by step.
class SumsAlone : public NoCollectives {
 public:
  explicit SumsAlone(Collectives& all) : all_(all) {}
  void all_reduce(double* sums, int64_t n) override { all_.all_reduce(sums, n); }

 protected:
  Collectives& all_;
};

// A little of each bucket is summed too: links between cards then do not fall asleep, and what power they take is not
// there for clocks (dev/LOG.md, "two GPUs: it is power"). What so many small sums cost, over TCP all of it, is in it.
class SomeOfEach : public SumsAlone {
 public:
  using SumsAlone::SumsAlone;
  void reduce_scatter(float* data, int64_t slice) override { all_.reduce_scatter(data, std::min(slice, few)); }

 private:
  static constexpr int64_t few = 16384;
};

// Gradients are summed, and weights are not gathered: each rank goes on with its own.
class NoGather : public SumsAlone {
 public:
  using SumsAlone::SumsAlone;
  void reduce_scatter(float* data, int64_t slice) override { all_.reduce_scatter(data, slice); }
};

struct RankSteps {
  std::vector<double> ms;  // the slowest rank's median milliseconds a step
  double gibibytes = 0;
};
// Steps of B rows of T slots, in each of the ways to talk. start: what the ranks say with at the beginning, when all
// get their weights.
template <class Device>
RankSteps time_steps(Ranks& ranks, Device& device, const Config& config, const Share& share, Collectives* start,
                     const std::vector<Collectives*>& ways, int64_t B, int64_t T) {
  DRT model(device, config, Use::training, share);
  model.collectives = start;
  model.allocate();
  model.plan(B, T);
  model.commit_activations();
  ThreadPool pool(1);
  model.initialise(1, pool);
  std::vector<int32_t> tokens(static_cast<size_t>(B * T));
  for (size_t i = 0; i < tokens.size(); i++)
    tokens[i] = static_cast<int32_t>(philox(1, Draw::task, static_cast<uint32_t>(i)).word[0] %
                                     static_cast<uint32_t>(config.vocab));
  const auto wait = [&] { ranks.waiting([&] { device.synchronize(); }); };
  RankSteps steps;
  for (Collectives* collectives : ways) {
    model.collectives = collectives;
    model.grads_ready = [&](int64_t begin, int64_t) {
      ranks.tick();
      if (collectives) model.reduce_gradient(begin);
    };
    std::vector<double> times;
    const int at_once = Device::runs_ahead ? 10 : 1, warm = 2, timed = 5;
    for (int round = -warm; round < timed; round++) {
      wait();
      double together = 0;
      ranks.sum(&together, 1);  // all begin at once
      const Stopwatch clock;
      for (int i = 0; i < at_once; i++) {
        model.upload(tokens.data(), tokens.data(), nullptr, B * T);
        typename DRT<Device>::Input in{B, T, {}};
        in.selection.noise = true;
        in.selection.first_row = ranks.rank() * B;
        model.begin_step();
        model.forward(in);
        model.head(1.0 / static_cast<double>(B * T * ranks.size()), true);
        model.backward();
        model.update({.lr = 1e-4});
      }
      wait();
      if (round >= 0) times.push_back(clock.seconds() / at_once);
    }
    std::sort(times.begin(), times.end());
    std::vector<double> slowest(static_cast<size_t>(ranks.size()));
    slowest[static_cast<size_t>(ranks.rank())] = times[times.size() / 2] * 1e3;
    ranks.sum(slowest.data(), ranks.size());
    steps.ms.push_back(*std::max_element(slowest.begin(), slowest.end()));
  }
  steps.gibibytes =
      static_cast<double>(model.model_memory().total_bytes() + model.activation_memory().total_bytes()) / (1 << 30);
  return steps;
}

// One rank of n; the first prints a row.
template <class Device>
void bench_rank(Ranks& ranks, Device& device, const Config& config, int64_t B, int64_t T) {
  choose_products(device, "");
  const std::unique_ptr<Collectives> all = collectives_of(ranks, device);
  const Share share{ranks.rank(), ranks.size()};
  ranks.at(Doing::training);
  const RankSteps alone = time_steps(ranks, device, config, {}, nullptr, {nullptr}, B, T);
  RankSteps together = alone;
  if (all) {
    NoCollectives nothing;
    SumsAlone sums(*all);
    SomeOfEach some(*all);
    NoGather no_gather(*all);
    together =
        time_steps(ranks, device, config, share, all.get(), {&nothing, &sums, &some, &no_gather, all.get()}, B, T);
  }
  keep_products(device, ranks);
  if (!ranks.first()) return;
  const double tokens = static_cast<double>(B * T) * static_cast<double>(config.chunk - 1) /
                        static_cast<double>(config.chunk) * ranks.size();
  const double ms = together.ms.back();
  print(right(ranks.size(), 5), "  ", right(fixed(tokens / ms * 1e3, 0), 10), "  ", right(fixed(ms, 2), 8), "  ",
        right(fixed(alone.ms[0], 2), 8), "  ", right(fixed(100 * alone.ms[0] / ms, 1), 6), "%");
  constexpr size_t parts = 4;  // waiting, awake, reduce, gather: each way does what the one before it does, and more
  for (size_t i = 1; i <= parts; i++) print("  ", right(all ? fixed(together.ms[i] - together.ms[i - 1], 2) : "-", 8));
  print("  ", right(fixed(together.gibibytes, 2), 6), " (", fixed(alone.gibibytes, 2), ")   ",
        all ? all->description() : "", "\n");
  fflush(stdout);
}

inline void print_rank_head(const std::string& what) {
  print(what,
        ": tokens a second of all ranks, ms a step together and of the slowest when each steps for itself, the "
        "one's share of the other; ms more by waiting for each other at one sum a step, by links that are awake, by "
        "adding up gradients and by gathering weights, over steps without talk; GiB a rank (and of one for itself)\n"
        "ranks    tokens/s  together     alone   share   waiting     awake    reduce    gather  GiB\n");
  fflush(stdout);
}

// step(ranks) on 1, 2, 4 .. `most` processes of this host.
template <class Step>
int bench_worlds(int most, Step step) {
  for (int n = 1; n <= most; n = n < most ? std::min(2 * n, most) : n + 1) {
    int exit_code = 0;
    const std::optional<World> world = launch(n, exit_code);
    if (!world) {
      if (exit_code) return exit_code;
      continue;
    }
    if (world->rank > 0 && !freopen("/dev/null", "w", stdout)) _exit(1);
    Ranks ranks(*world);
    try {
      step(ranks, world->local_rank);
      ranks.leave();
    } catch (const std::exception& error) {
      if (!ranks.fail(error.what())) print_error("bench: rank ", world->rank, ": ", error.what(), "\n");
      _exit(1);
    }
    fflush(stdout);
    _exit(0);
  }
  return 0;
}

}  // namespace gca
