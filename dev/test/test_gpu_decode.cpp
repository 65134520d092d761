// What decoding needs of the GPU: the next token as the CPU chooses it, products of few rows whose bits do not depend
// on how many rows there are, and captured work that gives the bits of direct calls.
#include <functional>

#include "dev/test/gpu_test.h"

using namespace gca;
using namespace gca::test;

namespace {

// ---- the next token ------------------------------------------------------------------------------------------------
// Logits of V tokens: 0: uniform; 1: like a language's, few large ones; 2: whole numbers, so that hundreds are equal;
// 3: all the same.
Vec logits_of(int kind, bool in_bf16, int64_t V, uint64_t seed) {
  if (kind == 0) return randoms(in_bf16, V, seed, 2);
  if (kind == 2) return whole_numbers(V, seed);
  Vec logits = randoms(in_bf16, V, seed, 0.5, 1);
  if (kind == 3) return Vec(V, logits[0]);
  for (size_t i = 0; i < logits.size(); i++) logits[i] += 8 - 1.3 * std::log(static_cast<double>(i * 7919 % V + 1));
  return exact_in(in_bf16, logits);
}

// Whether a draw could have given the token, sums being right to a millionth of all: then an edge between two tokens,
// and where the kept ones end, may lie to either side.
bool plausible(const std::vector<float>& logits, double temperature, double top_p, double random, int32_t excluded,
               int32_t token) {
  std::vector<std::pair<float, int32_t>> order;
  for (int32_t i = 0; i < std::ssize(logits); i++)
    if (i != excluded) order.push_back({-logits[i], i});
  std::sort(order.begin(), order.end());
  Vec upto{0};
  size_t place = order.size();
  for (const auto& [negative, id] : order) {
    if (id == token) place = upto.size() - 1;
    upto.push_back(upto.back() +
                   std::exp((static_cast<double>(order[0].first) - static_cast<double>(negative)) / temperature));
  }
  if (place == order.size()) return false;
  const double near = 1e-6 * upto.back(), target = top_p * upto.back();
  for (size_t count = place + 1; count < upto.size(); count++) {
    const bool ends_here = upto[count] >= target - near && (count == 1 || upto[count - 1] < target + near);
    const double at = random * upto[count];
    if (ends_here && upto[place] - near <= at && at < upto[place + 1] + near) return true;
    if (upto[count] > target + near) break;
  }
  return false;
}

template <class Act>
void test_choices() {
  constexpr bool in_bf16 = std::is_same_v<Act, bf16>;
  Gpu<Act>& gpu = *shared_device<Gpu<Act>>();
  Cpu<float> cpu(2);
  struct Size {
    int64_t rows, V, stride;
  };
  int draws = 0, others = 0;
  for (const Size& size : {Size{1, 2, 2}, {3, 263, 384}, {16, 263, 263}, {2, 5000, 5001}, {4, 50265, 50304}})
    for (int kind = 0; kind < 4; kind++) {
      const auto [rows, V, stride] = size;
      Bench<Gpu<Act>> bench(gpu);
      Vec all(rows * stride, 1e30);  // what lies behind a row is no logit
      for (int64_t r = 0; r < rows; r++) {
        const Vec row = logits_of(kind, in_bf16, V, static_cast<uint64_t>(10 * kind + r));
        std::copy(row.begin(), row.end(), all.begin() + r * stride);
      }
      const std::vector<float> host(all.begin(), all.end());
      const Act* logits = bench.template put<Act>(all);
      std::vector<int64_t> indices(rows);
      Ids sequences(rows);
      for (size_t r = 0; r < indices.size(); r++) {
        indices[r] = static_cast<int64_t>(r) * 1000003 + (r == 1 ? int64_t{1} << 33 : 0);
        sequences[r] = static_cast<int32_t>(r % 3);
      }
      int64_t* index = reinterpret_cast<int64_t*>(bench.put(Ids(2 * rows, 0)));
      gpu.upload(index, indices.data(), rows * 8);
      const int32_t* sequence = bench.put(sequences);
      int32_t* token = bench.template make<int32_t>(rows);
      const auto choose = [&](Choice choice) {
        gpu.choose_token(token, logits, rows, V, stride, choice);
        Ids chosen = bench.get(token, rows);
        gpu.choose_token(token, logits, rows, V, stride, choice);
        CHECK(bench.get(token, rows) == chosen);
        return chosen;
      };
      const int32_t excluded = static_cast<int32_t>(V > 2 ? V / 2 : -1);
      Ids greedy(rows);
      cpu.choose_token(greedy.data(), host.data(), rows, V, stride, {.excluded = excluded});
      CAPTURE(V);
      CAPTURE(kind);
      CHECK(choose({.excluded = excluded}) == greedy);
      for (const double temperature : {0.3, 1.0, 5.0})
        for (const double top_p : {0.0, 0.3, 0.95, 1.0}) {
          if (V > 5000 && (temperature == 0.3 || (reduced() && top_p < 0.9))) continue;
          Choice choice{temperature, top_p, 77, index, sequence, excluded};
          const Ids found = choose(choice);
          choice.index = indices.data();
          choice.sequence = sequences.data();
          Ids want(rows);
          cpu.choose_token(want.data(), host.data(), rows, V, stride, choice);
          CAPTURE(temperature);
          CAPTURE(top_p);
          for (int64_t r = 0; r < rows; r++) {
            CAPTURE(r);
            const float* row = host.data() + r * stride;
            draws++;
            if (found[r] == want[r]) continue;
            others++;
            CHECK(plausible({row, row + V}, temperature, top_p, uniform_open(choice_draw(choice, r)), excluded,
                            found[r]));
          }
        }
    }
  CAPTURE(draws);
  CHECK(others <= draws / 50 + 1);  // equal but for the luck of a few
}

}  // namespace

TEST_CASE("GPU: the next token is the CPU's") {
  if (no_gpu()) return;
  test_choices<float>();
  test_choices<bf16>();
}

TEST_CASE("GPU: the next token of logits that are not numbers, or not finite") {
  if (no_gpu()) return;
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  const auto compare_on = [&](auto act) {
    using Act = decltype(act);
    Gpu<Act>& gpu = *shared_device<Gpu<Act>>();
    Cpu<float> cpu(1);
    for (const Vec& logits : {Vec{nan, 1, nan, 3, 3, nan, 2, 0},
                              {nan, nan, nan, nan, nan, nan, nan, nan},
                              {-infinity, -infinity, nan, -infinity, -infinity, -infinity, -infinity, -infinity},
                              {-infinity, 4, -infinity, 4, 4, nan, -infinity, -infinity},
                              {infinity, 1, infinity, 2, -infinity, nan, infinity, 0},
                              {0, -0.0, 0, -0.0, 0, -0.0, 0, -0.0},
                              {-3e38, 3e38, 3e38, -3e38, 0, 1, 2, 3}})
      for (const int32_t excluded : {-1, 0, 3})
        for (const double temperature : {0.0, 1e-20, 1.0, 100.0})
          for (const double top_p : {0.0, 0.5, 1.0}) {
            Bench<Gpu<Act>> bench(gpu);
            const Vec exact = exact_in(std::is_same_v<Act, bf16>, logits);
            const std::vector<float> host(exact.begin(), exact.end());
            for (const int64_t V : {8, 7}) {
              const int64_t index = 12345;
              int64_t* there = reinterpret_cast<int64_t*>(bench.put(Ids(2, 0)));
              gpu.upload(there, &index, 8);
              int32_t* token = bench.template make<int32_t>(1);
              Choice choice{temperature, top_p, 5, there, nullptr, excluded};
              gpu.choose_token(token, bench.template put<Act>(exact), 1, V, 8, choice);
              choice.index = &index;
              int32_t want = -7;
              cpu.choose_token(&want, host.data(), 1, V, 8, choice);
              CAPTURE(logits[0]);
              CAPTURE(logits[1]);
              CAPTURE(logits[2]);
              CAPTURE(excluded);
              CAPTURE(temperature);
              CAPTURE(top_p);
              CHECK(bench.get(token, 1)[0] == want);
            }
          }
  };
  compare_on(float());
  compare_on(bf16());
}

// ---- products of few rows ------------------------------------------------------------------------------------------

TEST_CASE("GPU: a row of a product has the same bits alone and among others") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  Cpu<float, true> cpu(2);
  struct Size {
    int64_t in, out;
  };
  // Each way of cutting a product, sizes that fill it and sizes that do not.
  for (const Size& size : {Size{8, 1},
                           {24, 9},
                           {512, 2112},
                           {768, 768},
                           {768, 2309},
                           {776, 16},
                           {1024, 2120},
                           {1032, 40},
                           {2048, 768},
                           {2040, 2113},
                           {2056, 17},
                           {4096, 24}})
    for (const bool add : {false, true}) {
      const auto [in, out] = size;
      Bench<Gpu<bf16>> bench(gpu);
      const bf16 *x = bench.put<bf16>(randoms(true, 16 * in, 1)), *W = bench.put<bf16>(randoms(true, out * in, 2)),
                 *residual = add ? bench.put<bf16>(randoms(true, 16 * out, 3)) : nullptr;
      bf16 *all = bench.make<bf16>(16 * out), *few = bench.make<bf16>(17 * out);
      gpu.matmul_forward(all, x, W, residual, 16, in, out);
      const std::vector<bf16> whole = bench.get(all, 16 * out);
      CAPTURE(in);
      CAPTURE(out);
      for (int64_t rows = 1; rows < 16; rows += rows < 3 ? 1 : 3) {
        const int64_t first = rows % 3;
        gpu.matmul_forward(few, x + first * in, W, add ? residual + first * out : nullptr, rows, in, out);
        const std::vector<bf16> part = bench.get(few, (rows + 1) * out);
        CAPTURE(rows);
        CHECK(memcmp(part.data(), whole.data() + first * out, static_cast<size_t>(rows * out) * 2) == 0);
        uint16_t behind;
        memcpy(&behind, part.data() + rows * out, 2);
        CHECK((rows > 1 || behind == 0xffff));  // the first call wrote no row that is not there
      }
      // Whole numbers: their sums are exact, and rounded once.
      const Vec whole_x = whole_numbers(16 * in, 4), whole_W = whole_numbers(out * in, 5),
                whole_residual = whole_numbers(16 * out, 6);
      const auto exact = [&](auto& device) {
        Bench exact_bench(device);
        BENCH_TYPES(exact_bench);
        act* y = exact_bench.template make<act>(16 * out);
        device.matmul_forward(y, exact_bench.template put<act>(whole_x), exact_bench.template put<weight>(whole_W),
                              add ? exact_bench.template put<act>(whole_residual) : nullptr, 16, in, out);
        exact_bench.result("y", y, 16 * out);
        return exact_bench.outputs["y"].values;
      };
      CHECK(exact(gpu) == exact(cpu));
    }
}

// ---- captured work -------------------------------------------------------------------------------------------------

TEST_CASE("GPU: captured work gives the bits of direct calls, on whatever its inputs hold") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  Bench<Gpu<bf16>> bench(gpu);
  const int64_t rows = 3, many = 48, D = 64, V = 300, stride = 384;
  bf16* x = bench.put<bf16>(randoms(true, many * D, 1));
  const bf16 *W = bench.put<bf16>(randoms(true, V * D, 2)), *gain = bench.put<bf16>(randoms(true, D, 3, 0.3, 1));
  bf16 *n = bench.make<bf16>(many * D), *y = bench.make<bf16>(many * V), *logits = bench.make<bf16>(rows * stride);
  float* rstd = bench.make<float>(many);
  int32_t* token = bench.make<int32_t>(rows);
  int64_t* index = reinterpret_cast<int64_t*>(bench.put(Ids(2 * rows, 0)));
  const auto work = [&] {
    gpu.rmsnorm_forward(n, rstd, x, gain, many, D, D, 1e-5);
    gpu.matmul_forward(y, n, W, nullptr, many, D, V);  // cuBLASLt's
    gpu.matmul_forward(y, n, W, nullptr, rows, D, V);  // of few rows
    gpu.copy_rows(logits, stride, y, V, rows, V);
    gpu.choose_token(token, logits, rows, V, stride, {1.0, 0.95, 9, index});
  };
  const auto results = [&] {
    bench.outputs.clear();
    bench.result("y", y, many * V);
    bench.result("token", token, rows);
    return std::pair{bench.outputs["y"].bits, bench.outputs["token"].bits};
  };
  work();
  const GpuDevice::Graph graph = gpu.capture(work);
  CHECK(graph);
  for (int64_t step = 0; step < 4; step++) {
    const std::vector<int64_t> indices(rows, step);
    gpu.upload(index, indices.data(), rows * 8);
    gpu.copy(x, bench.put<bf16>(randoms(true, many * D, 10 + static_cast<uint64_t>(step))), many * D);
    work();
    const auto direct = results();
    gpu.zero(y, many * V);
    gpu.zero(token, rows);
    gpu.replay(graph);
    CHECK(results() == direct);
  }
}

TEST_CASE("GPU: what cannot be captured is an error in words, and the GPU goes on") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  Bench<Gpu<bf16>> bench(gpu);
  bf16* x = bench.put<bf16>(randoms(true, 64 * 64, 1));
  char host[8] = {};
  CHECK(error_of([&] { gpu.end_capture(); }).find("without begin_capture") != std::string::npos);
  CHECK(error_of([&] { gpu.replay({}); }).find("holds no work") != std::string::npos);
  for (const auto& forbidden : std::vector<std::function<void()>>{
           [&] { gpu.upload(x, host, 8); }, [&] { gpu.download(host, x, 8); }, [&] { gpu.synchronize(); },
           [&] { gpu.allocate(8); }, [&] { gpu.begin_capture(); }}) {
    CHECK(error_of([&] { gpu.capture(forbidden); }).find("no part of a graph of work") != std::string::npos);
    gpu.zero(x, 8);
    gpu.synchronize();
  }
  Gpu<bf16> measuring;
  Bench<Gpu<bf16>> other(measuring);
  CHECK(measuring.measure_products("") == "");
  const bf16* a = other.put<bf16>(randoms(true, 40 * 64, 1));
  bf16* y = other.make<bf16>(40 * 40);
  const auto product = [&] { measuring.matmul_forward(y, a, a, nullptr, 40, 64, 40); };
  CHECK(error_of([&] { measuring.capture(product); }).find("measuring is not possible") != std::string::npos);
  product();
  measuring.replay(measuring.capture(product));
  measuring.synchronize();
}
