// Timings of a backend: the peak, the products of a training step alone, and the step. For the CPU, or, built with
// GCA_CUDA, for the GPU in bf16 (the GPU's other ops: test_gca --op all).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "runtime/run.h"
#include "cpu/matmul.h"
#include "runtime/models.h"

using namespace gca;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
template <class Device>
void wait_for(Device& device) {
  if constexpr (Device::runs_ahead) device.synchronize();
}

// Median seconds of a call, over about a third of a second.
template <class Device, class Call>
double median_seconds(Device& device, Call call) {
  const int at_once = Device::runs_ahead ? 10 : 1;  // so that the waits for a GPU do not count
  call();
  std::vector<double> times;
  for (const double end = now() + 0.35; now() < end || times.size() < 5;) {
    wait_for(device);
    const double start = now();
    for (int i = 0; i < at_once; i++) call();
    wait_for(device);
    times.push_back((now() - start) / at_once);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// n random numbers on the device, the same ones again and again.
template <class T, class Device>
T* random_numbers(Device& device, int64_t n) {
  std::vector<T> some(std::min<int64_t>(n, 1 << 20));
  for (size_t i = 0; i < some.size(); i++)
    some[i] = static_cast<T>(uniform_open(philox(1, Stream::task, static_cast<uint32_t>(i)).word[0]) - 0.5f);
  T* numbers = static_cast<T*>(device.allocate(n * static_cast<int64_t>(sizeof(T))));
  for (int64_t done = 0; done < n; done += static_cast<int64_t>(some.size()))
    device.upload(numbers + done, some.data(),
                  std::min<int64_t>(n - done, static_cast<int64_t>(some.size())) * static_cast<int64_t>(sizeof(T)));
  return numbers;
}

// The three products of y = x W^T at `rows` rows, in floating-point operations a second and as a share of the peak.
// Returns their milliseconds.
template <class Device>
double bench_products(Device& device, double peak, int64_t rows, int64_t in, int64_t out) {
  auto* x = random_numbers<typename Device::act>(device, rows * in);
  auto* y = random_numbers<typename Device::act>(device, rows * out);
  auto* W = random_numbers<typename Device::weight>(device, out * in);
  auto* dW = random_numbers<typename Device::grad>(device, out * in);
  const double work = 2.0 * static_cast<double>(rows) * static_cast<double>(in) * static_cast<double>(out);
  const double seconds[3] = {
      median_seconds(device, [&] { device.matmul_forward(y, x, W, nullptr, rows, in, out); }),
      median_seconds(device, [&] { device.matmul_backward_input(x, y, W, false, rows, in, out); }),
      median_seconds(device, [&] { device.matmul_backward_weight(dW, y, x, rows, in, out); })};
  print(right(rows, 6), " x ", right(in, 4), " -> ", right(out, 5));
  for (const double s : seconds)
    print("   ", right(fixed(s * 1e3, 3), 8), " ms ", right(fixed(work / s * 1e-9, 1), 8), " GFLOP/s ",
          right(fixed(100 * work / s / peak, 0), 3), "%");
  print("\n");
  for (void* memory : {static_cast<void*>(x), static_cast<void*>(y), static_cast<void*>(W), static_cast<void*>(dW)})
    device.release(memory);
  return 1e3 * (seconds[0] + seconds[1] + seconds[2]);
}

// Training steps of B rows of T slots on random tokens.
template <class Device>
void bench_step(Device& device, double peak, const Config& config, int64_t B, int64_t T) {
  DRT model(device, config);
  model.allocate();
  model.plan(B, T);
  model.commit_activations();
  ThreadPool pool;
  model.initialise(1, pool);
  std::vector<int32_t> tokens(B * T), targets(tokens.size());
  for (size_t i = 0; i < tokens.size(); i++) {
    const Philox random = philox(1, Stream::task, static_cast<uint32_t>(i));
    tokens[i] = static_cast<int32_t>(random.word[0] % static_cast<uint32_t>(config.vocab));
    targets[i] = static_cast<int32_t>(random.word[1] % static_cast<uint32_t>(config.vocab));
  }
  std::vector<double> times;
  const int at_once = Device::runs_ahead ? 5 : 1, warm = Device::runs_ahead ? 2 : 0;
  for (int step = -warm; step < 3 || (step < 30 && times.size() < 12); step++) {
    const double start = now();
    for (int i = 0; i < at_once; i++) {
      model.upload(tokens.data(), targets.data(), nullptr, B * T);
      typename DRT<Device>::Input in{B, T, {}};
      in.selection.noise = true;
      in.selection.seed = 1;
      in.selection.step = step + warm;
      model.begin_step();
      model.forward(in);
      model.head(1.0 / static_cast<double>(B * T), true);
      model.backward();
      model.update({.lr = 1e-4});
    }
    wait_for(device);
    if (step >= 0) times.push_back((now() - start) / at_once);
  }
  std::sort(times.begin(), times.end());
  const double seconds = times[times.size() / 2], slots = static_cast<double>(B * T);
  print("width ", right(config.width, 4), ", ", fixed(static_cast<double>(model.table.parameters()) * 1e-6, 1),
        "M parameters, B=", B, " T=", T, ": ", right(fixed(seconds * 1e3, 1), 7), " ms a step (",
        fixed(times.front() * 1e3, 1), " to ", fixed(times.back() * 1e3, 1), "), ", right(fixed(slots / seconds, 0), 7),
        " slots/s, ", right(fixed(100 * 3 * forward_flops_per_slot(config) * slots / seconds / peak, 0), 3),
        "% of the peak, ",
        fixed(static_cast<double>(model.model_memory().total_bytes() + model.activation_memory().total_bytes()) /
                  (1 << 30),
              2),
        " GiB\n");
}

Config preset_with(const std::string& name, int64_t vocab) {
  Config config = preset(name).config;
  config.vocab = vocab;
  return config;
}

void print_head() {
  print(left("rows x in -> out", 23), "   ", left("y = x W^T", 34), "   ", left("dx = dy W", 34), "   ",
        left("dW += dy^T x", 34), "\n");
}

}  // namespace

int main() try {
#ifdef GCA_CUDA
  Gpu<__nv_bfloat16> gpu;
  const double peak = gpu.peak_flops();
  char* copied = static_cast<char*>(gpu.allocate(int64_t{2} << 30));
  const double seconds = median_seconds(gpu, [&] { gpu.copy(copied, copied + (int64_t{1} << 30), int64_t{1} << 30); });
  gpu.release(copied);
  print(gpu.description(), ": a product of 8192 x 8192 x 8192 reaches ", fixed(peak * 1e-12, 0), " TFLOP/s, a copy ",
        fixed(2e-12 * (1 << 30) / seconds, 2), " TB/s (read and written)\n");
  gpu.measure_products("");
  print_head();
  const int64_t rows = 33280, D = 768, F = 2048, V = 50304, piece = gpu.logits_bytes / (2 * V);
  // A step of the 146M preset: 12 layers of q|k|v, o, gate|up and down, two more in the encoder, CK|CV, six of GCA's q
  // and o, the head in pieces.
  double ms = 14 * (bench_products(gpu, peak, rows, D, 3 * D) + bench_products(gpu, peak, rows, D, 2 * F) +
                    bench_products(gpu, peak, rows, F, D));
  ms += 26 * bench_products(gpu, peak, rows, D, D) + bench_products(gpu, peak, rows, D, 2 * D);
  ms += static_cast<double>(rows) / static_cast<double>(piece) * bench_products(gpu, peak, piece, D, V);
  print("all products of a step of B=2, T=16640: ", fixed(ms, 1), " ms\n");
  bench_step(gpu, peak, preset_with("drt", 50265), 2, 16640);
#else
  Cpu<float> cpu;
  const double peak = measured_peak_flops<float>(cpu.pool());
  print(cpu.description(), ": multiply-adds in registers reach ", fixed(peak * 1e-9, 1), " GFLOP/s\n");
  print_head();
  for (const int64_t width : {int64_t{64}, int64_t{256}}) {
    const int64_t ffn = width == 64 ? 176 : 688;
    bench_products(cpu, peak, 2560, width, width);
    bench_products(cpu, peak, 2560, width, 3 * width);
    bench_products(cpu, peak, 2560, width, 2 * ffn);
    bench_products(cpu, peak, 2560, ffn, width);
  }
  for (const char* name : {"tiny", "small"}) bench_step(cpu, peak, preset_with(name, 263), 4, 640);
#endif
} catch (const std::exception& error) {
  print_error("bench: ", error.what(), "\n");
  return 1;
}
