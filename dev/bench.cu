// Timings of a backend: the peak, the products of a training step alone, and the step. For the CPU, or, built with
// GCA_CUDA, for the GPU in bf16; and then, for whoever writes a kernel, `bench --op NAME`: one op of the GPU, its error
// against Cpu<double>, the naive twin's error, and its time. Beside a time stands a hash (CRC-32C) of what came out, so
// that "the same bits" is one word to compare.
#include <algorithm>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/files.h"
#include "base/flags.h"
#include "base/progress.h"
#include "cpu/matmul.h"
#include "dev/bench_ranks.h"
#include "dev/bench_stream.h"
#include "runtime/matmul_cache.h"
#include "runtime/models.h"
#include "runtime/settings.h"
#ifdef GCA_CUDA
#include "dev/test/gpu_bench.h"
#endif

using namespace gca;

namespace {

// Median seconds of a call, over about a third of a second.
template <class Device, class Call>
double median_seconds(Device& device, Call call) {
  const int at_once = Device::runs_ahead ? 10 : 1;  // so that the waits for a GPU do not count
  call();
  std::vector<double> times;
  for (const double end = monotonic_seconds() + 0.35; monotonic_seconds() < end || times.size() < 5;) {
    device.synchronize();
    const double start = monotonic_seconds();
    for (int i = 0; i < at_once; i++) call();
    device.synchronize();
    times.push_back((monotonic_seconds() - start) / at_once);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// n random numbers on the device, the same ones again and again.
template <class T, class Device>
T* random_numbers(Device& device, int64_t n) {
  std::vector<T> some(std::min<int64_t>(n, 1 << 20));
  for (size_t i = 0; i < some.size(); i++)
    some[i] = static_cast<T>(uniform_open(philox(1, Draw::task, static_cast<uint32_t>(i)).word[0]) - 0.5f);
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

struct StepCost {
  double seconds, gib;  // of a step, the median; of weights, optimiser and activations
};
// Training steps of B rows of T slots on random tokens, always as many: the hash is of the weights that come out.
template <class Device>
StepCost bench_step(Device& device, double peak, const Config& config, int64_t B, int64_t T,
                    Recompute recompute = Recompute::none) {
  DRT model(device, config);
  model.recompute = recompute;
  model.allocate();
  model.plan(B, T);
  model.commit_activations();
  ThreadPool pool;
  model.initialise(1, pool);
  std::vector<int32_t> tokens(B * T), targets(tokens.size());
  for (size_t i = 0; i < tokens.size(); i++) {
    const Philox random = philox(1, Draw::task, static_cast<uint32_t>(i));
    tokens[i] = static_cast<int32_t>(random.word[0] % static_cast<uint32_t>(config.vocab));
    targets[i] = static_cast<int32_t>(random.word[1] % static_cast<uint32_t>(config.vocab));
  }
  std::vector<double> times;
  const int at_once = Device::runs_ahead && B * T < 100'000 ? 5 : 1;  // a longer step hides the wait for a GPU itself
  const int warm = Device::runs_ahead ? 2 : 0, timed = 12;
  for (int step = -warm; step < timed; step++) {
    const double start = monotonic_seconds();
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
    device.synchronize();
    if (step >= 0) times.push_back((monotonic_seconds() - start) / at_once);
  }
  std::sort(times.begin(), times.end());
  std::vector<typename Device::master> weights(model.table.size);
  const int64_t weights_bytes = model.table.size * static_cast<int64_t>(sizeof weights[0]);
  device.download(weights.data(), model.masters, weights_bytes);
  const double seconds = times[times.size() / 2], slots = static_cast<double>(B * T),
               gib = static_cast<double>(model.model_memory().total_bytes() + model.activation_memory().total_bytes()) /
                     (1 << 30);
  print("width ", right(config.width, 4), ", ", fixed(static_cast<double>(model.table.parameters()) * 1e-6, 1),
        "M parameters, B=", B, " T=", T, ": ", right(fixed(seconds * 1e3, 1), 7), " ms a step (",
        fixed(times.front() * 1e3, 1), " to ", fixed(times.back() * 1e3, 1), "), ", right(fixed(slots / seconds, 0), 7),
        " slots/s, ",
        right(fixed(100 * 3 * forward_flops_per_slot(config, config.reach) * slots / seconds / peak, 0), 3),
        "% of the peak, ", fixed(gib, 2), " GiB, weights ", hex(crc32c(weights.data(), weights_bytes), 8), "\n");
  return {seconds, gib};
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

// ---- one op of the GPU --------------------------------------------------------------------------------------------
// Sizes of the op, as the flags name them.
struct OpShape {
  int64_t B = 1, C = 16, S = 64, K = 8, H = 4, d = 64, W = 512, F = 688, V = 50304, layers = 1, first_chunk = 0;
};
constexpr int64_t long_row = 262144;  // chunks of 64 slots: 16M slots
const char* const op_names[] = {"gca_forward",
                                "gca_backward_query",
                                "gca_backward_memory",
                                "sliding_attention_forward",
                                "sliding_attention_backward",
                                "chunk_attention_forward",
                                "chunk_attention_backward",
                                "chunk_retrieval_forward",
                                "retrieval_long",
                                "retrieval_long_1",
                                "rmsnorm_forward",
                                "rmsnorm_backward",
                                "swiglu_forward",
                                "swiglu_backward",
                                "matmul_forward",
                                "cross_entropy",
                                "skinny_matmul",
                                "norm_matmul",
                                "swiglu_matmul",
                                "slot_attention",
                                "slot_gca",
                                "choose_token"};

#ifdef GCA_CUDA
using test::Bench;
using test::bf16;
using test::Ids;
using test::Outputs;
using test::randoms;
using test::Vec;

// An op on a backend: after prepare(), call() runs it once on inputs that do not change, and results() hands what it
// wrote to the bench. Of ops that add to something, results are those of one call().
template <class Device>
struct Op {
  using act = typename Device::act;
  using weight = typename Device::weight;
  using stat = typename Device::stat;
  using grad = typename Device::grad;
  Bench<Device>& bench;
  const OpShape& s;
  const bool in_bf16;
  double work = 0;   // floating-point operations
  double bytes = 0;  // that must move, or 0 where the op is bound by arithmetic
  std::function<void()> call{}, results{};

  Device& device = bench.device;
  const int64_t B = s.B, C = s.C, S = s.S, K = s.K, H = s.H, F = s.F, D = s.H * s.d, T = s.C * s.S, R = B * T;
  const int h = static_cast<int>(s.H), d = static_cast<int>(s.d), k = static_cast<int>(s.K);
  const int slots = static_cast<int>(s.S);

  // Large ones repeat after four million numbers, which are drawn in a moment.
  act* input(int64_t n, uint64_t seed) {
    return bench.template put<act>(randoms(in_bf16, std::min<int64_t>(n, 1 << 22), seed), n);
  }
  act* output(int64_t n) { return bench.template make<act>(n); }

  void prepare(const std::string& name) {
    if (name.starts_with("gca_")) prepare_gca(name);
    else if (name.starts_with("sliding_attention") || name.starts_with("chunk_attention")) prepare_attention(name);
    else if (name == "chunk_retrieval_forward") prepare_retrieval(B, C, s.first_chunk);
    else if (name == "retrieval_long") prepare_retrieval(1, 256, long_row - 256);
    else if (name == "retrieval_long_1") prepare_retrieval(1, 1, long_row - 1);
    else if (name.starts_with("rmsnorm")) prepare_rmsnorm(name == "rmsnorm_forward");
    else if (name.starts_with("swiglu")) prepare_swiglu(name == "swiglu_forward");
    else if (name == "matmul_forward") prepare_matmul();
    else if (name == "cross_entropy") prepare_cross_entropy();
    GCA_CHECK(call, "op ", name);
  }

  void prepare_gca(const std::string& name) {
    const GcaShape shape{B, T, h, d, slots, k, C};
    const int64_t table = B * (C + 1) * K, stats = B * C * K * H * S;
    const Ids fetched = test::random_picks(B, C, k, 1, true);
    const int32_t* pick = bench.put(fetched);
    const stat* w = bench.template put<stat>(randoms(in_bf16, table, 2, 0.05, 0.125));
    act *q = input(R * D, 3), *kv = input(R * 2 * D, 4), *dout = input(R * D, 5);
    act *out = output(R * D), *dq = output(R * D), *dkv = output(R * 2 * D);
    stat* lse = bench.template put<stat>(Vec{0.0}, stats);
    stat* delta = bench.template put<stat>(Vec{0.0}, stats);
    stat* dw = bench.template put<stat>(Vec{0.0}, table);
    int32_t *start = bench.template make<int32_t>(B * (C + 1)), *fetches = bench.template make<int32_t>(B * C * K);
    device.zero_landmarks(kv, B * C, S, D);
    device.invert_picks(start, fetches, pick, B, C, k);
    device.gca_forward(out, lse, q, kv, pick, w, shape);
    device.gca_backward_query({dq, dw, delta, dout, q, kv, lse, pick, w}, shape);
    double picks = 0;
    for (int64_t i = 0; i < table; i++)
      if (i / K % (C + 1) < C && fetched[i] >= 0) picks++;  // the last row serves nobody
    // One product of queries and keys, all picks and heads.
    const double product = picks * static_cast<double>(2 * S * S * D);
    if (name == "gca_forward") {
      work = 2 * product;
      call = [=, this] { device.gca_forward(out, lse, q, kv, pick, w, shape); };
      results = [=, this] {
        bench.result("out", out, R * D);
        bench.result("lse", lse, stats);
      };
    } else if (name == "gca_backward_query") {
      work = 3 * product;
      call = [=, this] { device.gca_backward_query({dq, dw, delta, dout, q, kv, lse, pick, w}, shape); };
      results = [=, this] {
        bench.result("dq", dq, R * D);
        bench.result("delta", delta, stats);
        bench.result("dw", dw, table);
      };
    } else if (name == "gca_backward_memory") {
      const std::vector<FetchingLayer<act, stat>> layers(s.layers, {q, dout, lse, delta, w, start, fetches});
      work = 4 * product * static_cast<double>(s.layers);
      call = [=, this] { device.gca_backward_memory(dkv, layers.data(), static_cast<int>(layers.size()), kv, shape); };
      results = [=, this] { bench.result("dkv", dkv, R * 2 * D); };
    }
  }

  void prepare_attention(const std::string& name) {
    const bool sliding = name.starts_with("sliding");
    const SlidingShape window{B, T, h, d, s.W};
    const ChunkShape chunks{B * C, slots, h, d};
    act *qkv = input(R * 3 * D, 1), *dout = input(R * D, 2), *out = output(R * D), *dqkv = output(R * 3 * D);
    stat* lse = bench.template make<stat>(R * H);
    const auto forward = [=, this] {
      if (sliding) device.sliding_attention_forward(out, lse, qkv, nullptr, window);
      else device.chunk_attention_forward(out, lse, qkv, chunks);
    };
    forward();
    const double pairs =
        sliding ? static_cast<double>(R) * static_cast<double>(std::min(s.W + 1, T)) : static_cast<double>(R * S);
    if (name.ends_with("_forward")) {
      work = 4 * pairs * static_cast<double>(D);
      call = forward;
      results = [=, this] {
        bench.result("out", out, R * D);
        bench.result("lse", lse, R * H);
      };
    } else {
      work = 10 * pairs * static_cast<double>(D);
      call = [=, this] {
        if (sliding) device.sliding_attention_backward(dqkv, dout, qkv, out, lse, window);
        else device.chunk_attention_backward(dqkv, dout, qkv, out, lse, chunks);
      };
      results = [=, this] { bench.result("dqkv", dqkv, R * 3 * D); };
    }
  }

  // B rows of C queries, after first_chunk others. Few over many landmarks are bound by reading those.
  void prepare_retrieval(int64_t B, int64_t C, int64_t first_chunk) {
    const int64_t M = first_chunk + C, table = B * (C + 1) * K;
    const RetrievalShape shape{B, C, static_cast<int>(D), k, first_chunk, D, M * D};
    const act *r = input(B * C * D, 1), *landmark = input(B * M * D, 2);
    int32_t* pick = bench.template make<int32_t>(table);
    stat* w = bench.template make<stat>(table);
    device.no_pick(pick, w, B, C, k);
    double scores = 0;
    for (int64_t c = 0; c < C; c++) scores += static_cast<double>(B * candidates(first_chunk + c));
    work = scores * static_cast<double>(2 * D);
    if (C <= 64 && first_chunk > C) bytes = static_cast<double>(B * M * D) * sizeof(act);
    call = [=, this] { device.chunk_retrieval_forward(pick, w, r, landmark, shape, {}); };
    results = [=, this] {
      bench.result("pick", pick, table);
      bench.result("w", w, table);
    };
  }

  void prepare_rmsnorm(bool forward) {
    act *x = input(R * D, 1), *dn = input(R * D, 2), *out = output(R * D);
    weight* gain = bench.template put<weight>(randoms(in_bf16, D, 3, 0.3, 1));
    stat* rstd = bench.template make<stat>(R);
    grad* dgain = bench.template put<grad>(Vec(D, 0.0));
    device.rmsnorm_forward(out, rstd, x, gain, R, D, D, 1e-5);
    bytes = static_cast<double>((forward ? 2 : 3) * R * D) * sizeof(act);
    call = [=, this] {
      if (forward) device.rmsnorm_forward(out, rstd, x, gain, R, D, D, 1e-5);
      else device.rmsnorm_backward({out, dgain, dn, x, rstd, gain}, R, D, D);
    };
    results = [=, this] {
      bench.result(forward ? "out" : "dx", out, R * D);
      if (forward) bench.result("rstd", rstd, R);
      else bench.result("dgain", dgain, D);
    };
  }

  void prepare_swiglu(bool forward) {
    act *gate_up = input(R * 2 * F, 1), *dh = input(R * F, 2), *out = output(R * 2 * F);
    bytes = static_cast<double>((forward ? 3 : 5) * R * F) * sizeof(act);
    call = [=, this] {
      if (forward) device.swiglu_forward(out, gate_up, R, F);
      else device.swiglu_backward(out, nullptr, dh, gate_up, R, F);
    };
    results = [=, this] { bench.result("out", out, R * F * (forward ? 1 : 2)); };
  }

  void prepare_matmul() {
    const act *x = input(R * D, 1), *W = bench.template put<weight>(randoms(in_bf16, F * D, 2));
    act* y = output(R * F);
    work = 2 * static_cast<double>(R * D) * static_cast<double>(F);
    call = [=, this] { device.matmul_forward(y, x, W, nullptr, R, D, F); };
    results = [=, this] { bench.result("y", y, R * F); };
  }

  // A piece of logits.
  void prepare_cross_entropy() {
    const int64_t V = s.V, rows = std::min(R, GpuDevice::logits_bytes / (V * static_cast<int64_t>(sizeof(act))));
    act *original = input(rows * V, 1), *logits = output(rows * V);
    const int32_t* target = bench.put(test::random_ids(rows, 2, V));
    stat* loss = bench.template make<stat>(rows);
    bytes = static_cast<double>(4 * rows * V) * sizeof(act);  // with the copy that gives each call the same logits
    call = [=, this] {
      device.copy(logits, original, rows * V);
      device.cross_entropy(loss, logits, target, nullptr, 1.0 / static_cast<double>(rows), rows, V, V);
    };
    results = [=, this] {
      bench.result("loss", loss, rows);
      bench.result("dlogits", logits, rows * V);
    };
  }
};

template <class Device>
Outputs outputs_of(Device& device, const std::string& name, const OpShape& shape, bool in_bf16) {
  Bench<Device> bench(device);
  Op<Device> op{bench, shape, in_bf16};
  op.prepare(name);
  op.call();
  op.results();
  return std::move(bench.outputs);
}

double median_ms(GpuDevice& gpu, const std::function<void()>& call) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> ms(30);
  for (float& of_call : ms) {
    cudaEventRecord(begin, gpu.stream());
    call();
    cudaEventRecord(end, gpu.stream());
    gpu.synchronize();
    cudaEventElapsedTime(&of_call, begin, end);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(ms.begin(), ms.end());
  return static_cast<double>(ms[ms.size() / 2]);
}

// Bytes a second, read and written both counted.
double copy_rate(GpuDevice& gpu) {
  constexpr int64_t n_bytes = int64_t{1} << 30;
  char* memory = static_cast<char*>(gpu.allocate(2 * n_bytes));
  const double ms = median_ms(gpu, [&] { gpu.copy_bytes(memory, memory + n_bytes, n_bytes); });
  gpu.release(memory);
  return 2e3 * static_cast<double>(n_bytes) / ms;
}

template <class Act>
void check_op(Gpu<Act>& gpu, const std::string& name, const OpShape& shape) {
  constexpr bool in_bf16 = std::is_same_v<Act, bf16>;
  Cpu<double> exact;
  Cpu<float, in_bf16> twin;
  const Outputs want = outputs_of(exact, name, shape, in_bf16), naive = outputs_of(twin, name, shape, in_bf16),
                got = outputs_of(gpu, name, shape, in_bf16);
  for (const auto& [output, expected] : want) {
    const test::Errors ours = errors(got.at(output), expected), theirs = errors(naive.at(output), expected);
    print(left(output, 8), " error ", significant(ours.largest, 3), " largest, ", significant(ours.rms, 3),
          " rms; the naive twin's ", significant(theirs.largest, 3), ", ", significant(theirs.rms, 3), "\n");
  }
}

struct OpCost {
  double ms, share;  // share: of what a large product or, of an op that moves bytes, a copy reaches
};
// peak: floating-point operations a second of a large product; copied: bytes a second of a copy.
template <class Act>
OpCost time_op(Gpu<Act>& gpu, const std::string& name, const OpShape& shape, double peak, double copied) {
  Bench<Gpu<Act>> bench(gpu);
  bench.keep = false;
  Op<Gpu<Act>> op{bench, shape, std::is_same_v<Act, bf16>};
  op.prepare(name);
  op.call();
  op.results();
  const bool by_memory = op.bytes > 0;
  const double ms = median_ms(gpu, op.call), rate = (by_memory ? op.bytes : op.work) / ms * 1e3;
  print(name, ": ", fixed(ms, 4), " ms, ", significant(rate * (by_memory ? 1e-9 : 1e-12), 4), " ",
        by_memory ? "GB/s" : "TFLOP/s", ", ", fixed(100 * rate / (by_memory ? copied : peak), 0), "% of what a ",
        by_memory ? "copy" : "large product", " reaches, results ", hex(bench.hash, 8), "\n");
  return {ms, rate / (by_memory ? copied : peak)};
}

// ---- ops of decoding: a few microseconds each, so many calls a timing, in a graph, as a token's are ----
// Microseconds of one of call(0) .. call(count - 1), which follow each other.
template <class Act, class Call>
double microseconds_in_graph(Gpu<Act>& gpu, int64_t count, Call call) {
  call(0);
  const GpuDevice::Graph graph = gpu.capture([&] {
    for (int64_t i = 0; i < count; i++) call(i);
  });
  return 1e3 * median_ms(gpu, [&] { gpu.replay(graph); }) / static_cast<double>(count);
}

constexpr int64_t cold_bytes = int64_t{256} << 20;  // five times the second cache: nothing of it is left there

void print_token_op(const std::string& what, double us, double bytes, double copied, uint32_t hash) {
  const double rate = bytes / us * 1e6;
  print(what, ": ", right(fixed(us, 2), 6), " us, ", right(fixed(rate * 1e-9, 0), 4), " GB/s, ",
        right(fixed(100 * rate / copied, 0), 3), "% of what a copy reaches, results ", hex(hash, 8), "\n");
}

// The products of a token of the 146M preset, for 1, 4 and 16 rows: plain, after a norm, or of SwiGLU. Each call has
// weights of its own: from token to token nothing of them is left in the cache.
template <class Act>
void time_few_rows(Gpu<Act>& gpu, const std::string& name, double copied) {
  struct Shape {
    int64_t in, out;
  };
  const bool norm = name == "norm_matmul", swiglu = name == "swiglu_matmul";
  const std::vector<Shape> shapes =
      swiglu ? std::vector<Shape>{{2048, 768}}
      : norm ? std::vector<Shape>{{768, 2304}, {768, 768}, {768, 4096}, {768, 50304}}
             : std::vector<Shape>{{768, 2304}, {768, 768}, {768, 4096}, {2048, 768}, {768, 50304}};
  for (const auto& [in, out] : shapes) {
    const int64_t size = in * out, count = ceil_div(cold_bytes, size * static_cast<int64_t>(sizeof(Act)));
    Act* W = random_numbers<Act>(gpu, count * size);
    for (const int64_t rows : {1, 4, 16}) {
      Bench<Gpu<Act>> bench(gpu);
      bench.keep = false;
      const int64_t columns = swiglu ? 2 * in : in;
      const Act *x = bench.template put<Act>(randoms(true, rows * columns, 1)),
                *gain = bench.template put<Act>(randoms(true, in, 2, 0.3, 1)),
                *residual = bench.template put<Act>(randoms(true, rows * out, 3));
      Act *y = bench.template make<Act>(rows * out), *made = bench.template make<Act>(rows * in);
      float* rstd = bench.template make<float>(rows);
      const auto call = [&](int64_t i) {
        const Act* weights = W + i * size;
        if (norm) gpu.norm_matmul_forward(y, made, rstd, x, gain, weights, rows, in, out, 1e-5);
        else if (swiglu) gpu.swiglu_matmul_forward(y, made, x, weights, residual, rows, in, out);
        else gpu.matmul_forward(y, x, weights, nullptr, rows, in, out);
      };
      const double us = microseconds_in_graph(gpu, count, call);
      call(0);
      bench.result("y", y, rows * out);
      print_token_op(name + ", " + right(rows, 2) + " x " + right(in, 4) + " -> " + right(out, 5), us,
                     static_cast<double>(size + rows * (columns + out)) * sizeof(Act), copied, bench.hash);
    }
    gpu.release(W);
  }
}

// One slot of 1 and of 16 rows: each call has a ring, or chunks, of its own.
template <class Act>
void time_slot(Gpu<Act>& gpu, const std::string& name, const OpShape& shape, double copied) {
  const bool window = name == "slot_attention";
  const int64_t D = shape.H * shape.d, K = shape.K, past = window ? shape.W : K * shape.S;
  for (const int64_t rows : {1, 16}) {
    const int64_t size = past * 2 * D, at_once = rows * size * static_cast<int64_t>(sizeof(Act)),
                  count = ceil_div(cold_bytes, std::max<int64_t>(at_once, 1 << 20));
    Bench<Gpu<Act>> bench(gpu);
    bench.keep = false;
    Act* kv = random_numbers<Act>(gpu, rows * count * size);
    Ids pick(count * K);
    for (size_t i = 0; i < pick.size(); i++) pick[i] = static_cast<int32_t>(i);
    const int32_t* picks = bench.put(pick);
    const float* w = bench.template put<float>(randoms(true, K, 2, 0.05, 0.125));
    std::vector<SlotRow<Act, float>> host(rows);
    for (int64_t b = 0; b < rows; b++) {
      Act* its = kv + b * count * size;
      host[b] = {100'000 + 77 * b, its, size, nullptr, its, picks, K, w, 0};
    }
    const int64_t n_bytes = static_cast<int64_t>(host.size() * sizeof host[0]);
    auto* there = static_cast<SlotRow<Act, float>*>(gpu.allocate(n_bytes));
    gpu.upload(there, host.data(), n_bytes);
    const SlotShape slot{
        rows,   static_cast<int>(shape.H), static_cast<int>(shape.d), static_cast<int>(shape.S), static_cast<int>(K),
        shape.W};
    const Act* qkv = bench.template put<Act>(randoms(true, rows * 3 * D, 1));
    Act* out = bench.template make<Act>(rows * D);
    const auto call = [&](int64_t i) {
      if (window) gpu.slot_attention_forward(out, qkv, there, i, slot);
      else gpu.slot_gca_forward(out, qkv, there, i, slot);
    };
    const double us = microseconds_in_graph(gpu, count, call);
    call(0);
    bench.result("out", out, rows * D);
    print_token_op(name + ", " + right(rows, 2) + " x " + str(shape.H) + " heads of " + str(shape.d) + ", " +
                       (window ? "window " + str(shape.W) : str(K) + " chunks of " + str(shape.S)),
                   us, static_cast<double>(rows * (size + 4 * D)) * sizeof(Act), copied, bench.hash);
    gpu.release(there);
    gpu.release(kv);
  }
}

// Of logits as a language has them: few large ones. They come from the second cache, where a product has just put them.
template <class Act>
void time_choose_token(Gpu<Act>& gpu, int64_t V) {
  const int64_t stride = round_up(V, GpuDevice::vocab_multiple), most_rows = 16;
  Vec logits = randoms(true, most_rows * stride, 1, 0.5, 8);
  for (size_t i = 0; i < logits.size(); i++)
    logits[i] -= 1.3 * std::log(static_cast<double>(static_cast<int64_t>(i) * 7919 % stride + 1));
  Bench<Gpu<Act>> bench(gpu);
  bench.keep = false;
  const Act* x = bench.template put<Act>(logits);
  int32_t* token = bench.template make<int32_t>(most_rows);
  int64_t* index = static_cast<int64_t*>(gpu.allocate(most_rows * 8));
  std::vector<int64_t> numbers(most_rows);
  for (size_t r = 0; r < numbers.size(); r++) numbers[r] = static_cast<int64_t>(r);
  gpu.upload(index, numbers.data(), most_rows * 8);
  for (const double temperature : {0.0, 1.0})
    for (const int64_t rows : {int64_t{1}, most_rows}) {
      const Choice choice{.temperature = temperature, .top_p = 0.95, .seed = 1, .index = index};
      const double us =
          microseconds_in_graph(gpu, 20, [&](int64_t) { gpu.choose_token(token, x, rows, V, stride, choice); });
      bench.hash = 0;
      bench.result("token", token, rows);
      print("choose_token, ", right(rows, 2), " x ", V, temperature > 0 ? ", drawn from 95%" : ", the largest", ": ",
            fixed(us, 2), " us, results ", hex(bench.hash, 8), "\n");
    }
  gpu.release(index);
}

template <class Act>
void bench_ops(const std::vector<std::string>& names, const OpShape& shape, bool check) {
  Gpu<Act> gpu;
  print(gpu.description(), "\n");
  const double peak = gpu.peak_flops(), copied = copy_rate(gpu);
  for (const std::string& name : names) {
    if (name == "skinny_matmul" || name == "norm_matmul" || name == "swiglu_matmul") {
      time_few_rows(gpu, name, copied);
      continue;
    }
    if (name.starts_with("slot_")) {
      time_slot(gpu, name, shape, copied);
      continue;
    }
    if (name == "choose_token") {
      time_choose_token(gpu, shape.V);
      continue;
    }
    if (check && !name.starts_with("retrieval_long")) check_op(gpu, name, shape);
    time_op(gpu, name, shape, peak, copied);
  }
}
#endif

// ---- the program --------------------------------------------------------------------------------------------------
struct Settings {
  std::string op, dtype = "float", ranks;
  OpShape shape;
  bool check = true;
};

std::string comma_list_of_ops() {
  std::string all;
  for (const std::string name : op_names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

Flags bench_flags(Settings& settings) {
  OpShape& s = settings.shape;
  Flags flags(
      "bench",
      "Without flags: this backend's peak, the products of a training step, and the step. With --op, built with "
      "nvcc:\n  one op of the GPU's, against Cpu<double>, and its time (of skinny_matmul, norm_matmul and "
      "swiglu_matmul, whose shapes\n  "
      "are a token's, and of slot_attention, slot_gca and choose_token: times alone). Ops: " +
          comma_list_of_ops());
  flags.add("op", settings.op, "NAME|all", "what to time; the flags below are its");
  flags.add("B", s.B, 1, 1 << 20, "rows");
  flags.add("C", s.C, 1, 1 << 20, "chunks a row");
  flags.add("S", s.S, 2, 128, "slots a chunk");
  flags.add("K", s.K, 1, max_topk, "chunks fetched");
  flags.add("H", s.H, 1, 1024, "heads");
  flags.add("d", s.d, 2, 256, "columns of a head");
  flags.add("W", s.W, 0, INT32_MAX, "window");
  flags.add("F", s.F, 1, 1 << 20, "feed-forward width; of matmul_forward, columns out");
  flags.add("V", s.V, 2, 1 << 24, "vocabulary");
  flags.add("first-chunk", s.first_chunk, 0, 1 << 24, "chunks before them: of chunk_retrieval_forward");
  flags.add("layers", s.layers, 1, 1024, "that fetch: of gca_backward_memory, which serves all at once");
  flags.add_choice("dtype", settings.dtype, "float|bf16", "of activations and products");
  flags.add_on_off("check", settings.check, "compare with the CPU too (slow for large shapes; not of retrieval_long)");
  flags.add("ranks", settings.ranks, "N|all",
            "instead: training steps on 1, 2, 4 .. N GPUs of this host, or without CUDA processes");
  return flags;
}
// Flags speak for train_gca's commands; this is a program of its own.
std::string of_this_program(std::string text) {
  for (size_t at; (at = text.find("train_gca bench")) != std::string::npos;) text.erase(at, strlen("train_gca "));
  return text;
}

void bench_op(const Settings& settings) {
  std::vector<std::string> names;
  for (const std::string name : op_names)
    if (settings.op == "all" || settings.op == name) names.push_back(name);
  if (names.empty()) throw UsageError("--op: expected " + comma_list_of_ops() + " or all, found '" + settings.op + "'");
#ifdef GCA_CUDA
  if (settings.dtype == "bf16") bench_ops<bf16>(names, settings.shape, settings.check);
  else bench_ops<float>(names, settings.shape, settings.check);
#else
  throw UsageError("--op times what the GPU does: put nvcc into PATH, then make build/gpu/bench, and run that");
#endif
}

#ifdef GCA_CUDA
// What a step of the 146M preset is made of, B=2 of 260 chunks, beside what is around it.
void print_step_table(Gpu<bf16>& gpu, double peak, double copied, const StepCost& step, double products_ms) {
  const Config drt = preset_with("drt", 50265);
  const OpShape shape{.B = 4, .C = 260, .H = 12, .F = 2048, .layers = 6};
  const auto percent = [](double share) { return fixed(100 * share, 0) + "%"; };
  const auto op = [&](const char* name) { return time_op(gpu, name, shape, peak, copied); };
  const OpCost norm = op("rmsnorm_forward"), norm_back = op("rmsnorm_backward"), entropy = op("cross_entropy"),
               window_back = op("sliding_attention_backward");
  const StepCost norms = bench_step(gpu, peak, drt, 2, 16640, Recompute::norms),
                 layers = bench_step(gpu, peak, drt, 2, 16640, Recompute::layers),
                 swa = bench_step(gpu, peak, preset_with("swa", 50265), 2, 16640),
                 swa_14 = bench_step(gpu, peak, preset_with("swa-14", 50265), 2, 16640);
  std::vector<double> rates;  // slots/s of rows of 16K, 64K, 256K
  for (const int64_t rows : {16, 4, 1})
    rates.push_back(262144 / bench_step(gpu, peak, drt, rows, 262144 / rows, Recompute::layers).seconds);
  const auto line = [](const std::string& work, const std::string& measured) {
    print("  ", left(work, 66), measured, "\n");
  };
  print("\nthe step of 146M parameters, bf16, B=2 of 260 chunks\n");
  line("step", fixed(step.seconds * 1e3, 1) + " ms");
  line("its products alone", fixed(products_ms, 1) + " ms");
  line("the step less these", fixed(step.seconds * 1e3 - products_ms, 1) + " ms");
  line("RMSNorm, forward; backward, of a copy's rate", percent(norm.share) + "; " + percent(norm_back.share));
  line("cross entropy over 50,304, of a copy's rate", percent(entropy.share));
  line("window attention, backward, B=4",
       fixed(window_back.ms, 3) + " ms, " + percent(window_back.share) + " of a large product");
  line("memory; norms recomputed; layers recomputed",
       fixed(step.gib, 2) + "; " + fixed(norms.gib, 2) + " at +" + fixed((norms.seconds - step.seconds) * 1e3, 1) +
           " ms; " + fixed(layers.gib, 2) + " GiB at +" + fixed((layers.seconds - step.seconds) * 1e3, 1) + " ms");
  line("rows of 16K; 64K; 256K, 262,144 slots a step, layers recomputed",
       fixed(rates[0], 0) + " slots/s; " + percent(rates[1] / rates[0]) + "; " + percent(rates[2] / rates[0]));
  line("the step over that of a sliding window of 12; of 14 layers",
       fixed(step.seconds / swa.seconds, 3) + "; " + fixed(step.seconds / swa_14.seconds, 3));
}

void bench_backend() {
  Gpu<bf16> gpu;
  const double peak = gpu.peak_flops(), copied = copy_rate(gpu);  // both of a cool card: all shares are of these
  print(gpu.description(), ": a product of 8192 x 8192 x 8192 reaches ", fixed(peak * 1e-12, 0), " TFLOP/s, a copy ",
        fixed(copied * 1e-12, 2), " TB/s (read and written)\n");
  choose_products(gpu, "");
  print_head();
  const int64_t rows = 33280, D = 768, F = 2048, V = 50304, piece = gpu.logits_bytes / (2 * V);
  // A step of the 146M preset: 12 layers of q|k|v, o, gate|up and down, two more in the encoder, CK|CV, six of GCA's q
  // and o, the head in pieces.
  double ms = 14 * (bench_products(gpu, peak, rows, D, 3 * D) + bench_products(gpu, peak, rows, D, 2 * F) +
                    bench_products(gpu, peak, rows, F, D));
  ms += 26 * bench_products(gpu, peak, rows, D, D) + bench_products(gpu, peak, rows, D, 2 * D);
  ms += static_cast<double>(rows) / static_cast<double>(piece) * bench_products(gpu, peak, piece, D, V);
  print("all products of a step of B=2, T=16640: ", fixed(ms, 1), " ms\n");
  const StepCost step = bench_step(gpu, peak, preset_with("drt", 50265), 2, 16640);
  print_step_table(gpu, peak, copied, step, ms);
  for (const bool on_host : {false, true})
    for (const int64_t slots : {int64_t{16} << 10, int64_t{1} << 20})
      bench_stream(gpu, peak, copied, preset_with("drt", 50265), slots, 2048, on_host);
  Ranks alone{World{}};
  keep_products(gpu, alone);
}
#else
double copy_rate(CpuDevice& cpu) {
  std::vector<char> from(256 << 20, 1), to(from.size());
  return 2.0 * static_cast<double>(from.size()) /
         median_seconds(cpu, [&] { cpu.copy_bytes(to.data(), from.data(), std::ssize(from)); });
}
void bench_backend() {
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
  bench_stream(cpu, peak, copy_rate(cpu), preset_with("tiny", 263), 16 << 10, 256, false);
}
#endif

// Before this process touches a GPU.
int bench_ranks(const std::string& asked) {
#ifdef GCA_CUDA
  const int found = count_apart(gpu_count);
#else
  const int found = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#endif
  const int most = asked == "all" ? found : atoi(asked.c_str());
  if (most < 1) throw UsageError("--ranks: expected a number from 1, or all, found '" + asked + "'");
#ifdef GCA_CUDA
  if (most > found) throw Error(str("--ranks: expected at most ", found, " GPUs that answer, found ", most));
  print_rank_head("146M, bf16, 2 rows of 16,640 slots a GPU");
  return bench_worlds(most, [](Ranks& ranks, int gpu_number) {
    Gpu<bf16> gpu(gpu_number);
    bench_rank(ranks, gpu, preset_with("drt", 50265), 2, 16640);
  });
#else
  print_rank_head("width 64, float, 2 rows of 640 slots a process of one thread");
  return bench_worlds(most, [](Ranks& ranks, int) {
    Cpu<float> cpu(1);
    bench_rank(ranks, cpu, preset_with("tiny", 263), 2, 640);
  });
#endif
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  Settings settings;
  Flags flags = bench_flags(settings);
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    print(of_this_program(flags.help()));
    return 0;
  }
  flags.parse(arguments);
  if (!settings.ranks.empty()) return bench_ranks(settings.ranks);
  if (!settings.op.empty()) bench_op(settings);
  else if (arguments.empty()) bench_backend();
  else throw UsageError("'" + arguments[0] + "' is for one op: say which with --op; see bench --help");
} catch (const UsageError& error) {
  print_error("bench: ", of_this_program(error.what()), "\n");
  return 2;
} catch (const std::exception& error) {
  print_error("bench: ", error.what(), "\n");
  return 1;
}
