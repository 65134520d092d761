// Timings of the CPU backend: the machine's peak, the products of a training step alone, and the step.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "gca_cpu.h"
#include "model.h"

using namespace gca;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Median seconds of a call, over about a third of a second.
template <class Call>
double median_seconds(Call call) {
  call();
  std::vector<double> times;
  for (const double end = now() + 0.35; now() < end || times.size() < 5;) {
    const double start = now();
    call();
    times.push_back(now() - start);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// The three products of y = x W^T at `rows` rows, in floating-point operations a second and as a share of the peak.
void bench_products(Cpu<float>& cpu, double peak, int64_t rows, int64_t in, int64_t out) {
  std::vector<float> x(static_cast<size_t>(rows * in)), W(static_cast<size_t>(out * in)), y(static_cast<size_t>(rows * out));
  for (auto* values : {&x, &W, &y})
    for (size_t i = 0; i < values->size(); i++) (*values)[i] = uniform_open(philox(1, Stream::task, static_cast<uint32_t>(i)).word[0]) - 0.5f;
  const double work = 2.0 * static_cast<double>(rows) * static_cast<double>(in) * static_cast<double>(out);
  const double rates[3] = {work / median_seconds([&] { cpu.matmul_forward(y.data(), x.data(), W.data(), nullptr, rows, in, out); }),
                           work / median_seconds([&] { cpu.matmul_backward_input(x.data(), y.data(), W.data(), false, rows, in, out); }),
                           work / median_seconds([&] { cpu.matmul_backward_weight(W.data(), y.data(), x.data(), rows, in, out); })};
  printf("%5lld x %4lld -> %4lld", static_cast<long long>(rows), static_cast<long long>(in), static_cast<long long>(out));
  for (const double rate : rates) printf("   %6.1f GFLOP/s %3.0f%%", rate * 1e-9, 100 * rate / peak);
  printf("\n");
}

// Training steps of B rows of T slots on random tokens: the median.
void bench_step(Cpu<float>& cpu, double peak, Config config, int64_t B, int64_t T) {
  DRT model(cpu, config);
  model.allocate();
  model.plan(B, T);
  model.commit_activations();
  model.initialise(1, cpu.pool());
  std::vector<int32_t> tokens(static_cast<size_t>(B * T)), targets(tokens.size());
  for (size_t i = 0; i < tokens.size(); i++) {
    const Philox random = philox(1, Stream::task, static_cast<uint32_t>(i));
    tokens[i] = static_cast<int32_t>(random.word[0] % static_cast<uint32_t>(config.vocab)), targets[i] = static_cast<int32_t>(random.word[1] % static_cast<uint32_t>(config.vocab));
  }
  std::vector<double> times;
  for (int step = 0; step < 3 || (step < 30 && times.size() < 12); step++) {
    const double start = now();
    model.upload(tokens.data(), targets.data(), nullptr, B * T);
    DRT<Cpu<float>>::Input in{B, T, {}};
    in.selection.noise = true, in.selection.seed = 1, in.selection.step = step;
    model.begin_step();
    model.forward(in);
    model.head(1.0 / static_cast<double>(B * T), true);
    model.backward();
    model.update({.lr = 1e-4});
    times.push_back(now() - start);
  }
  std::sort(times.begin(), times.end());
  const double seconds = times[times.size() / 2], slots = static_cast<double>(B * T);
  printf("width %4lld, %.1fM parameters, B=%lld T=%lld: %7.1f ms a step (%.1f to %.1f), %7.0f slots/s, %3.0f%% of the peak\n", static_cast<long long>(config.width),
         static_cast<double>(model.table.parameters()) * 1e-6, static_cast<long long>(B), static_cast<long long>(T), seconds * 1e3, times.front() * 1e3, times.back() * 1e3, slots / seconds,
         100 * 3 * forward_flops_per_slot(config) * slots / seconds / peak);
}

}  // namespace

int main() {
  Cpu<float> cpu;
  const double peak = measured_peak_flops<float>(cpu.pool());
  printf("%s: multiply-adds in registers reach %.1f GFLOP/s\n", cpu.description().c_str(), peak * 1e-9);
  printf("%-20s   %-20s   %-20s   %-20s\n", "rows x in -> out", "y = x W^T", "dx = dy W", "dW += dy^T x");
  for (const int64_t width : {int64_t{64}, int64_t{256}}) {
    const int64_t ffn = width == 64 ? 176 : 688;
    bench_products(cpu, peak, 2560, width, width);
    bench_products(cpu, peak, 2560, width, 3 * width);
    bench_products(cpu, peak, 2560, width, 2 * ffn);
    bench_products(cpu, peak, 2560, ffn, width);
  }
  for (const char* name : {"tiny", "small"})
    for (const Preset& p : presets())
      if (p.name == std::string(name)) {
        Config config = p.config;
        config.vocab = 263;
        bench_step(cpu, peak, config, 4, 640);
      }
}
