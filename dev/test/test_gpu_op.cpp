// test_gca --op NAME|all [--B --C ... --dtype float|bf16]: one op of the GPU backend, for whoever writes a kernel: its
// error against Cpu<double>, the naive twin's error, and its time.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "base/flags.h"
#include "dev/test/gpu_bench.h"

namespace gca::test {
namespace {

const char* const op_names[] = {"gca_forward",
                                "gca_backward_query",
                                "gca_backward_memory",
                                "sliding_attention_forward",
                                "sliding_attention_backward",
                                "chunk_attention_forward",
                                "chunk_attention_backward",
                                "chunk_retrieval_forward",
                                "rmsnorm_forward",
                                "rmsnorm_backward",
                                "swiglu_forward",
                                "swiglu_backward",
                                "matmul_forward",
                                "cross_entropy"};

struct OpShape {
  int64_t B = 1, C = 16, S = 64, K = 8, H = 4, d = 64, W = 512, F = 688, V = 50304, layers = 1;
};

// The op on a backend: call() runs it once on inputs that do not change; its results go into bench.outputs.
template <class Device>
struct Op {
  using act = typename Device::act;
  using weight = typename Device::weight;
  using stat = typename Device::stat;
  using grad = typename Device::grad;
  Bench<Device>& bench;
  const OpShape& s;
  const bool in_bf16;
  double work = 0,
         bytes = 0;  // floating-point operations; bytes that must move, or 0 where the op is bound by arithmetic
  std::function<void()> call{}, results{};

  // Large ones repeat after four million numbers, which are drawn in a moment.
  act* input(int64_t n, uint64_t seed) {
    return bench.template put<act>(randoms(in_bf16, std::min<int64_t>(n, 1 << 22), seed), n);
  }
  act* output(int64_t n) { return bench.template make<act>(n); }

  // False where there is no op of that name.
  bool prepare(const std::string& name) {
    Device& device = bench.device;
    const int64_t B = s.B, C = s.C, S = s.S, K = s.K, H = s.H, D = s.H * s.d, T = C * S, R = B * T, F = s.F;
    const int h = static_cast<int>(H), d = static_cast<int>(s.d), k = static_cast<int>(K), slots = static_cast<int>(S);
    if (name.starts_with("gca_")) {
      const GcaShape shape{B, T, h, d, slots, k, C};
      const int64_t table = B * (C + 1) * K, stats = B * C * K * H * S;
      const Ids fetched = random_picks(B, C, k, 1, true);
      const int32_t* pick = bench.put(fetched);
      const stat* w = bench.template put<stat>(randoms(in_bf16, table, 2, 0.05, 0.125));
      act *q = input(R * D, 3), *kv = input(R * 2 * D, 4), *dout = input(R * D, 5), *out = output(R * D),
          *dq = output(R * D), *dkv = output(R * 2 * D);
      stat *lse = bench.template put<stat>(Vec{0.0}, stats), *delta = bench.template put<stat>(Vec{0.0}, stats),
           *dw = bench.template put<stat>(Vec{0.0}, table);
      int32_t *start = bench.template make<int32_t>(B * (C + 1)), *entry = bench.template make<int32_t>(B * C * K);
      device.zero_landmarks(kv, B * C, S, D);
      device.invert_picks(start, entry, pick, B, C, k);
      device.gca_forward(out, lse, q, kv, pick, w, shape);
      device.gca_backward_query(dq, dw, delta, dout, q, kv, lse, pick, w, shape);
      double picks = 0;
      for (const int32_t p : fetched) picks += p >= 0;
      const double product =
          picks * static_cast<double>(2 * S * S * D);  // one product of queries and keys, all picks and heads
      if (name == "gca_forward") {
        work = 2 * product;
        call = [=, &device] { device.gca_forward(out, lse, q, kv, pick, w, shape); };
        results = [=, this] { bench.result("out", out, R * D); };
      } else if (name == "gca_backward_query") {
        work = 3 * product;
        call = [=, &device] { device.gca_backward_query(dq, dw, delta, dout, q, kv, lse, pick, w, shape); };
        results = [=, this] {
          bench.result("dq", dq, R * D);
          bench.result("delta", delta, stats);
        };
      } else if (name == "gca_backward_memory") {
        const std::vector<FetchingLayer<act, stat>> layers(s.layers, {q, dout, lse, delta, w, start, entry});
        work = 4 * product * static_cast<double>(s.layers);
        call = [=, &device] {
          device.gca_backward_memory(dkv, layers.data(), static_cast<int>(layers.size()), kv, shape);
        };
        results = [=, this] { bench.result("dkv", dkv, R * 2 * D); };
      }
    } else if (name.starts_with("sliding_attention") || name.starts_with("chunk_attention")) {
      const bool sliding = name[0] == 's';
      const SlidingShape window{B, T, h, d, s.W};
      const ChunkShape chunks{B * C, slots, h, d};
      act *qkv = input(R * 3 * D, 1), *dout = input(R * D, 2), *out = output(R * D), *dqkv = output(R * 3 * D);
      stat* lse = bench.template make<stat>(R * H);
      const auto forward = [=, &device] {
        sliding ? device.sliding_attention_forward(out, lse, qkv, nullptr, window)
                : device.chunk_attention_forward(out, lse, qkv, chunks);
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
      } else if (name.ends_with("_backward")) {
        work = 10 * pairs * static_cast<double>(D);
        call = [=, &device] {
          sliding ? device.sliding_attention_backward(dqkv, dout, qkv, out, lse, window)
                  : device.chunk_attention_backward(dqkv, dout, qkv, out, lse, chunks);
        };
        results = [=, this] { bench.result("dqkv", dqkv, R * 3 * D); };
      }
    } else if (name == "chunk_retrieval_forward") {
      const RetrievalShape shape{B, C, static_cast<int>(D), k, 0, D, C * D};
      const act *r = input(B * C * D, 1), *landmark = input(B * C * D, 2);
      int32_t* pick = bench.template make<int32_t>(B * (C + 1) * K);
      stat* w = bench.template make<stat>(B * (C + 1) * K);
      device.no_pick(pick, w, B, C, k);
      work = static_cast<double>(B * C * C * D);
      call = [=, &device] { device.chunk_retrieval_forward(pick, w, r, landmark, shape, {}); };
      results = [=, this] { bench.result("w", w, B * (C + 1) * K); };
    } else if (name == "rmsnorm_forward" || name == "rmsnorm_backward") {
      act *x = input(R * D, 1), *dn = input(R * D, 2), *out = output(R * D);
      weight* gain = bench.template put<weight>(randoms(in_bf16, D, 3, 0.3, 1));
      stat* rstd = bench.template make<stat>(R);
      grad* dgain = bench.template put<grad>(Vec(D, 0.0));
      device.rmsnorm_forward(out, rstd, x, gain, R, D, D, 1e-5);
      const bool forward = name == "rmsnorm_forward";
      bytes = static_cast<double>((forward ? 2 : 3) * R * D) * sizeof(act);
      call = [=, &device] {
        forward ? device.rmsnorm_forward(out, rstd, x, gain, R, D, D, 1e-5)
                : device.rmsnorm_backward(out, dgain, dn, x, rstd, gain, nullptr, nullptr, R, D, D);
      };
      results = [=, this] { bench.result(forward ? "out" : "dx", out, R * D); };
    } else if (name == "swiglu_forward" || name == "swiglu_backward") {
      act *gate_up = input(R * 2 * F, 1), *dh = input(R * F, 2), *out = output(R * 2 * F);
      const bool forward = name == "swiglu_forward";
      bytes = static_cast<double>((forward ? 3 : 5) * R * F) * sizeof(act);
      call = [=, &device] {
        forward ? device.swiglu_forward(out, gate_up, R, F) : device.swiglu_backward(out, dh, gate_up, R, F);
      };
      results = [=, this] { bench.result("out", out, R * F * (forward ? 1 : 2)); };
    } else if (name == "matmul_forward") {
      const act *x = input(R * D, 1), *W = bench.template put<weight>(randoms(in_bf16, F * D, 2));
      act* y = output(R * F);
      work = 2 * static_cast<double>(R * D) * static_cast<double>(F);
      call = [=, &device] { device.matmul_forward(y, x, W, nullptr, R, D, F); };
      results = [=, this] { bench.result("y", y, R * F); };
    } else if (name == "cross_entropy") {
      const int64_t V = s.V,
                    R = std::min(B * T, GpuDevice::logits_bytes / (V * static_cast<int64_t>(sizeof(act))));  // a piece
      act *original = input(R * V, 1), *logits = output(R * V);
      const int32_t* target = bench.put(random_ids(R, 2, V));
      stat* loss = bench.template make<stat>(R);
      bytes = static_cast<double>(4 * R * V) * sizeof(act);  // with the copy that gives each call the same logits
      call = [=, &device] {
        device.copy(logits, original, R * V * static_cast<int64_t>(sizeof(act)));
        device.cross_entropy(loss, logits, target, nullptr, 1.0 / static_cast<double>(R), R, V, V);
      };
      results = [=, this] {
        bench.result("loss", loss, R);
        bench.result("dlogits", logits, R * V);
      };
    }
    return static_cast<bool>(call);
  }
};

template <class Device>
Outputs outputs_of(Device& device, const std::string& name, const OpShape& shape, bool in_bf16) {
  Bench<Device> bench(device);
  Op<Device> op{bench, shape, in_bf16};
  GCA_CHECK(op.prepare(name), "op ", name);
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
  const double ms = median_ms(gpu, [&] { gpu.copy(memory, memory + n_bytes, n_bytes); });
  gpu.release(memory);
  return 2e3 * static_cast<double>(n_bytes) / ms;
}

template <class Act>
void check_and_time(const std::string& name, const OpShape& shape, bool check) {
  constexpr bool in_bf16 = std::is_same_v<Act, bf16>;
  Gpu<Act> gpu;
  if (check) {
    Cpu<double> exact;
    Cpu<float, in_bf16> twin;
    const Outputs want = outputs_of(exact, name, shape, in_bf16), naive = outputs_of(twin, name, shape, in_bf16),
                  got = outputs_of(gpu, name, shape, in_bf16);
    for (const auto& [output, expected] : want) {
      const Errors ours = errors(got.at(output), expected), theirs = errors(naive.at(output), expected);
      print(left(output, 8), " error ", significant(ours.largest, 3), " largest, ", significant(ours.rms, 3),
            " rms; the naive twin's ", significant(theirs.largest, 3), ", ", significant(theirs.rms, 3), "\n");
    }
  }
  Bench<Gpu<Act>> bench(gpu);
  Op<Gpu<Act>> op{bench, shape, in_bf16};
  op.prepare(name);
  const double ms = median_ms(gpu, op.call), rate = (op.bytes > 0 ? op.bytes : op.work) / ms * 1e3;
  print(name, ": ", fixed(ms, 4), " ms, ", significant(rate * (op.bytes > 0 ? 1e-9 : 1e-12), 4), " ",
        op.bytes > 0 ? "GB/s" : "TFLOP/s", ", ",
        fixed(100 * rate / (op.bytes > 0 ? copy_rate(gpu) : gpu.peak_flops()), 0), "% of what a ",
        op.bytes > 0 ? "copy" : "large product", " reaches\n");
}

}  // namespace

// Exit code of the program.
int check_op(const std::vector<std::string>& arguments) {
  try {
    OpShape s;
    std::vector<std::string> name;
    std::string dtype = "float";
    bool check = true;
    Flags flags("--op", "Checks one op of the GPU backend against Cpu<double>, and times it.");
    flags.add_rest(name, "NAME|all", true);
    flags.add("B", s.B, 1, 1 << 20, "rows");
    flags.add("C", s.C, 1, 1 << 20, "chunks a row");
    flags.add("S", s.S, 2, 128, "slots a chunk");
    flags.add("K", s.K, 1, max_topk, "chunks fetched");
    flags.add("H", s.H, 1, 1024, "heads");
    flags.add("d", s.d, 2, 256, "columns of a head");
    flags.add("W", s.W, 0, INT32_MAX, "window");
    flags.add("F", s.F, 1, 1 << 20, "feed-forward width; of matmul_forward, columns out");
    flags.add("V", s.V, 2, 1 << 24, "vocabulary");
    flags.add("layers", s.layers, 1, 1024, "that fetch: of gca_backward_memory, which serves all at once");
    flags.add_choice("dtype", dtype, "float|bf16", "of activations and products");
    flags.add_on_off("check", check, "compare with the CPU too (slow for large shapes)");
    if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
      print(flags.help());
      return 0;
    }
    flags.parse(arguments);
    print(GpuDevice().description(), "\n");
    std::string all;
    bool known = false;
    for (const std::string op : op_names) {
      all += op + ", ";
      if (name[0] != op && name[0] != "all") continue;
      known = true;
      if (dtype == "bf16") check_and_time<bf16>(op, s, check);
      else check_and_time<float>(op, s, check);
    }
    if (!known) throw UsageError("--op: expected " + all + "or all, found '" + name[0] + "'");
    return 0;
  } catch (const std::exception& error) {
    print_error("test_gca: ", error.what(), "\n");
    return dynamic_cast<const UsageError*>(&error) ? 2 : 1;
  }
}

}  // namespace gca::test
