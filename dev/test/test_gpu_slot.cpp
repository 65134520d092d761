// One slot of each row on the GPU, as decoding reads it: the ops against the CPU's, what they leave in rings and
// chunks, and that a row has the same bits alone, among others, slot after slot, and however kernels overlap.
#include <functional>

#include "dev/test/gpu_test.h"

using namespace gca;
using namespace gca::test;

namespace {

// In the device's memory. host (rows)
template <class Device>
SlotRow<typename Device::act, typename Device::stat>* put_rows(
    Bench<Device>& bench, const std::vector<SlotRow<typename Device::act, typename Device::stat>>& host) {
  using Row = SlotRow<typename Device::act, typename Device::stat>;
  const int64_t n_bytes = static_cast<int64_t>(host.size() * sizeof(Row));
  Row* rows = reinterpret_cast<Row*>(bench.put(Ids(n_bytes / 4, 0)));
  bench.device.upload(rows, host.data(), n_bytes);
  return rows;
}
template <class T>
std::vector<char> bytes_of(const std::vector<T>& values, int64_t begin, int64_t end) {
  const char* bytes = reinterpret_cast<const char*>(values.data());
  return {bytes + begin * static_cast<int64_t>(sizeof(T)), bytes + end * static_cast<int64_t>(sizeof(T))};
}

// ---- sliding-window attention --------------------------------------------------------------------------------------
// Rows at these slots, each with the ring of two layers.
struct Windows {
  int H, d;
  int64_t W;
  std::vector<int64_t> slots;
  int64_t B() const { return std::ssize(slots); }
  int64_t D() const { return int64_t{H} * d; }
  int64_t ring_size() const { return 2 * W * 2 * D(); }  // of a row
  SlotShape shape() const { return {B(), H, d, 4, 1, W}; }

  // (B,2,W,2D): no number where nothing has been kept yet, in either layer.
  Vec rings(bool in_bf16, uint64_t seed) const {
    Vec ring = randoms(in_bf16, B() * ring_size(), seed);
    for (int64_t b = 0; b < B(); b++)
      for (int64_t layer = 0; layer < 2; layer++)
        for (int64_t place = slots[b]; place < W; place++)
          std::fill_n(ring.begin() + b * ring_size() + (layer * W + place) * 2 * D(), 2 * D(), std::nan(""));
    return ring;
  }
  // rings (B,2,W,2D)
  template <class Device>
  auto* put(Bench<Device>& bench, typename Device::act* rings) const {
    std::vector<SlotRow<typename Device::act, typename Device::stat>> rows(slots.size());
    for (int64_t b = 0; b < B(); b++) {
      rows[b].slot = slots[b];
      rows[b].ring = rings + b * ring_size();
      rows[b].ring_stride = W * 2 * D();
    }
    return put_rows(bench, rows);
  }
};
constexpr int64_t far = 3'000'000'000;
const Windows window_cases[] = {{12, 64, 512, {0, 1, 63, 511, 512, 513, 700, far}},
                                {1, 64, 512, {1'000'000}},
                                {3, 32, 7, {0, 1, 6, 7, 8, far}},
                                {2, 128, 100, {0, 99, 100, 101, 5000}},
                                {5, 20, 1, {0, 1, 2, far}},
                                {2, 256, 512, {600, 3}},
                                {2, 64, 0, {0, 5, far}},
                                {1, 254, 65, {64, 65, 66}},
                                {4, 64, 1100, {2000, 17, 1099, 1100}},  // more than the blocks of a cluster see at once
                                {7, 2, 40, {39, 41, far}},
                                {3, 40, 130, {129, 130, 131}}};

void test_windows(const Windows& c) {
  compare(str("attention of one slot, ", c.H, " heads of ", c.d, ", window ", c.W), [&](auto& bench, bool in_bf16) {
    BENCH_TYPES(bench);
    const int64_t B = c.B(), D = c.D();
    auto* rows = c.put(bench, bench.template put<act>(c.rings(in_bf16, 1)));
    act* out = bench.template make<act>(B * D);
    for (uint64_t step = 0; step < 3; step++) {
      const act* qkv = bench.template put<act>(randoms(in_bf16, B * 3 * D, 2 + step));
      bench.device.slot_attention_forward(out, qkv, rows, 1, c.shape());
      bench.result("out", out, B * D);
      bench.device.next_slot(rows, B);
    }
  });
}

// What stands in the ring after some slots, and each row alone.
template <class Act>
void test_rings(const Windows& c) {
  constexpr bool in_bf16 = std::is_same_v<Act, bf16>;
  Gpu<Act>& gpu = *shared_device<Gpu<Act>>();
  Bench<Gpu<Act>> bench(gpu);
  const int64_t B = c.B(), D = c.D(), size = c.ring_size(), steps = 3;
  const Vec before = c.rings(in_bf16, 5), slots_qkv = randoms(in_bf16, steps * B * 3 * D, 6);
  const auto read = [&](const Windows& some, int64_t first) {  // rows from that one on
    const int64_t n = some.B();
    Act* rings = bench.template put<Act>(Vec(before.begin() + first * size, before.begin() + (first + n) * size));
    auto* rows = some.put(bench, rings);
    Act* out = bench.template make<Act>(steps * n * D);
    for (int64_t step = 0; step < steps; step++) {
      const auto from = slots_qkv.begin() + (step * B + first) * 3 * D;
      const Act* qkv = bench.template put<Act>(Vec(from, from + n * 3 * D));
      gpu.slot_attention_forward(out + step * n * D, qkv, rows, 1, some.shape());
      gpu.next_slot(rows, n);
    }
    return std::pair{bench.get(out, steps * n * D), bench.get(rings, n * size)};
  };
  const auto [out, rings] = read(c, 0);
  CAPTURE(c.H);
  CAPTURE(c.d);
  CAPTURE(c.W);
  std::vector<Act> want(before.size());
  for (size_t i = 0; i < want.size(); i++) want[i] = from_number<Act>(before[i]);
  for (int64_t step = 0; step < steps && c.W > 0; step++)
    for (int64_t b = 0; b < B; b++)
      for (int64_t e = 0; e < 2 * D; e++)
        want[b * size + (c.W + (c.slots[b] + step) % c.W) * 2 * D + e] =
            from_number<Act>(slots_qkv[(step * B + b) * 3 * D + D + e]);
  CHECK(bytes_of(rings, 0, B * size) == bytes_of(want, 0, B * size));
  for (int64_t b = 0; b < B; b++) {
    Windows alone = c;
    alone.slots = {c.slots[b]};
    const auto [its_out, its_ring] = read(alone, b);
    CAPTURE(c.slots[b]);
    for (int64_t step = 0; step < steps; step++)
      CHECK(bytes_of(its_out, step * D, (step + 1) * D) == bytes_of(out, (step * B + b) * D, (step * B + b + 1) * D));
    CHECK(bytes_of(its_ring, 0, size) == bytes_of(rings, b * size, (b + 1) * size));
  }
}

// ---- grouped cross attention ---------------------------------------------------------------------------------------
// Rows with memories of M chunks each, and picks of two groups.
struct Fetches {
  int H, d, S, K;
  bool null_slot;
  int64_t B, M = 10;
  int64_t D() const { return int64_t{H} * d; }
  int64_t kv_size() const { return M * S * 2 * D(); }  // of a row
  SlotShape shape(int64_t rows) const { return {rows, H, d, S, K, 1, null_slot}; }

  // Row 1 has none; of the others' an eighth.
  Ids picks() const {
    Ids pick = random_ids(B * 2 * K, 3, M);
    const Ids draw = random_ids(B * 2 * K, 4, 8);
    for (int64_t i = 0; i < std::ssize(pick); i++)
      if (i / (2 * K) == 1 || (draw[i] == 0 && i % K)) pick[i] = -1;
    return pick;
  }
  template <class Device>
  auto* put(Bench<Device>& bench, bool in_bf16, int64_t first, int64_t rows) const {
    using act = typename Device::act;
    using stat = typename Device::stat;
    const Vec all = randoms(in_bf16, B * kv_size(), 5), weights = randoms(in_bf16, B * 2 * K, 6, 0.05, 0.125);
    act* kv = bench.template put<act>(Vec(all.begin() + first * kv_size(), all.begin() + (first + rows) * kv_size()));
    bench.device.zero_landmarks(kv, rows * M, S, D());
    const int32_t* pick = bench.put(picks());
    const stat* w = bench.template put<stat>(weights);
    std::vector<SlotRow<act, stat>> host(rows);
    for (int64_t b = 0; b < rows; b++) {
      host[b].slot = b == 0 ? far + 5 : 40 * S + b;
      host[b].kv = kv + b * kv_size();
      host[b].pick = pick + (first + b) * 2 * K;
      host[b].pick_stride = host[b].w_stride = K;
      host[b].w = w + (first + b) * 2 * K;
    }
    return put_rows(bench, host);
  }
};
const Fetches fetch_cases[] = {{12, 64, 64, 8, true, 3},   {12, 64, 64, 8, false, 1}, {2, 64, 64, 1, true, 2},
                               {3, 32, 4, 3, true, 4},     {3, 32, 4, 3, false, 4},   {2, 128, 128, 32, true, 3},
                               {2, 128, 128, 5, false, 2}, {5, 20, 64, 8, false, 2},  {1, 256, 100, 9, true, 2},
                               {1, 254, 7, 32, true, 3},   {6, 2, 2, 2, false, 3},    {4, 64, 65, 8, true, 2}};

void test_fetches(const Fetches& c) {
  compare(
      str("GCA of one slot, ", c.H, " heads of ", c.d, ", ", c.K, " chunks of ", c.S), [&](auto& bench, bool in_bf16) {
        BENCH_TYPES(bench);
        auto* rows = c.put(bench, in_bf16, 0, c.B);
        act* out = bench.template make<act>(c.B * c.D());
        for (int64_t group = 0; group < 2; group++) {
          const act* q = bench.template put<act>(randoms(in_bf16, c.B * c.D(), 7 + static_cast<uint64_t>(group), 1.5));
          bench.device.slot_gca_forward(out, q, rows, group, c.shape(c.B));
          bench.result("out", out, c.B * c.D());
        }
      });
}
template <class Act>
void test_fetches_alone(const Fetches& c) {
  constexpr bool in_bf16 = std::is_same_v<Act, bf16>;
  Gpu<Act>& gpu = *shared_device<Gpu<Act>>();
  Bench<Gpu<Act>> bench(gpu);
  const Vec queries = randoms(in_bf16, c.B * c.D(), 8);
  const auto read = [&](int64_t first, int64_t rows) {
    const auto from = queries.begin() + first * c.D();
    const Act* q = bench.template put<Act>(Vec(from, from + rows * c.D()));
    Act* out = bench.template make<Act>(rows * c.D());
    gpu.slot_gca_forward(out, q, c.put(bench, in_bf16, first, rows), 1, c.shape(rows));
    return bench.get(out, rows * c.D());
  };
  const std::vector<Act> all = read(0, c.B);
  for (int64_t b = 0; b < c.B; b++) CHECK(bytes_of(read(b, 1), 0, c.D()) == bytes_of(all, b * c.D(), (b + 1) * c.D()));
}

}  // namespace

TEST_CASE("GPU: attention of one slot is the CPU's, wherever the rows stand") {
  if (no_gpu()) return;
  for (const Windows& c : window_cases) test_windows(c);
}
TEST_CASE("GPU: attention of one slot keeps it in the ring, and a row has the same bits alone") {
  if (no_gpu()) return;
  for (const Windows& c : window_cases) {
    test_rings<float>(c);
    test_rings<bf16>(c);
  }
}
TEST_CASE("GPU: grouped cross attention of one slot is the CPU's, and a row has the same bits alone") {
  if (no_gpu()) return;
  for (const Fetches& c : fetch_cases) {
    test_fetches(c);
    test_fetches_alone<float>(c);
    test_fetches_alone<bf16>(c);
  }
}

TEST_CASE("GPU: a slot is kept in its place of the unfinished chunk, and rows go on") {
  if (no_gpu()) return;
  for (const int S : {2, 64, 100})
    compare(str("keeping slots, chunks of ", S), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const int64_t B = 5, D = 24, slots[B] = {0, S - 1, S, 3 * S + 1, far};
      act* chunks = bench.template put<act>(randoms(in_bf16, B * S * D, 1));
      std::vector<SlotRow<act, stat>> host(B);
      for (int64_t b = 0; b < B; b++) {
        host[b].slot = slots[b];
        host[b].unfinished_chunk = chunks + b * S * D;
      }
      auto* rows = put_rows(bench, host);
      for (uint64_t step = 0; step < 3; step++) {
        bench.device.keep_slot(bench.template put<act>(randoms(in_bf16, B * D, 2 + step)), rows, {B, 3, 8, S, 1, 1});
        bench.device.next_slot(rows, B);
      }
      bench.result("exact chunks", chunks, B * S * D);
      bench.device.download(host.data(), rows, B * static_cast<int64_t>(sizeof host[0]));
      for (int64_t b = 0; b < B; b++) CHECK(host[b].slot == slots[b] + 3);
    });
}

// ---- products with a norm or SwiGLU on the way ---------------------------------------------------------------------

TEST_CASE("GPU: products of normed rows, and of SwiGLU") {
  if (no_gpu()) return;
  struct Size {
    int64_t rows, in, out;
  };
  for (const Size& size : {Size{1, 768, 2304},
                           {16, 768, 96},
                           {9, 64, 2120},
                           {3, 8, 5},
                           {5, 1032, 40},
                           {2, 2048, 768},
                           {4, 2040, 2113},
                           {17, 768, 40},
                           {2, 2056, 24},
                           {3, 4096, 24},
                           {2, 4104, 16},
                           {7, 113, 40}})
    compare(str("product of ", size.rows, " x ", size.in, " x ", size.out), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const auto [rows, in, out] = size;
      const act *x = bench.template put<act>(randoms(in_bf16, rows * in, 1, 2)),
                *gate_up = bench.template put<act>(randoms(in_bf16, rows * 2 * in, 2, 2)),
                *residual = bench.template put<act>(randoms(in_bf16, rows * out, 3));
      const weight *W = bench.template put<weight>(randoms(in_bf16, out * in, 4)),
                   *gain = bench.template put<weight>(randoms(in_bf16, in, 5, 0.3, 1));
      act *y = bench.template make<act>(rows * out), *h = bench.template make<act>(rows * in);
      stat* rstd = bench.template make<stat>(rows);
      bench.device.norm_matmul_forward(y, h, rstd, x, gain, W, rows, in, out, 1e-2);
      bench.result("of normed rows", y, rows * out);
      bench.device.swiglu_matmul_forward(y, h, gate_up, W, residual, rows, in, out);
      bench.result("of SwiGLU", y, rows * out);
    });
}

TEST_CASE("GPU: a row of a product of normed rows, or of SwiGLU, has the same bits alone and among others") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  struct Size {
    int64_t in, out;
  };
  for (const Size& size : {Size{8, 1},
                           {512, 2112},
                           {768, 768},
                           {768, 2309},
                           {1024, 2120},
                           {1032, 40},
                           {2048, 768},
                           {2040, 2113},
                           {4096, 24}}) {
    const auto [in, out] = size;
    Bench<Gpu<bf16>> bench(gpu);
    const bf16 *x = bench.put<bf16>(randoms(true, 16 * in, 1)), *gate_up = bench.put<bf16>(randoms(true, 32 * in, 2)),
               *W = bench.put<bf16>(randoms(true, out * in, 3)), *gain = bench.put<bf16>(randoms(true, in, 4, 0.3, 1)),
               *residual = bench.put<bf16>(randoms(true, 16 * out, 5));
    bf16 *y = bench.make<bf16>(16 * out), *h = bench.make<bf16>(16 * in);
    float* rstd = bench.make<float>(16);
    CAPTURE(in);
    CAPTURE(out);
    gpu.swiglu_forward(h, gate_up, 16, in);
    gpu.matmul_forward(y, h, W, residual, 16, in, out);
    const std::vector<bf16> apart = bench.get(y, 16 * out);
    std::vector<bf16> of_16_normed;
    for (const int64_t rows : {16, 9, 8, 5, 4, 3, 1})
      for (int64_t first = 0; first + rows <= 16; first += 5) {
        CAPTURE(rows);
        CAPTURE(first);
        gpu.swiglu_matmul_forward(y, h, gate_up + first * 2 * in, W, residual + first * out, rows, in, out);
        CHECK(bytes_of(bench.get(y, rows * out), 0, rows * out) == bytes_of(apart, first * out, (first + rows) * out));
        gpu.norm_matmul_forward(y, h, rstd, x + first * in, gain, W, rows, in, out, 1e-5);
        const std::vector<bf16> normed = bench.get(y, rows * out);
        if (rows == 16) of_16_normed = normed;
        CHECK(bytes_of(normed, 0, rows * out) == bytes_of(of_16_normed, first * out, (first + rows) * out));
      }
  }
}

// ---- slot after slot -----------------------------------------------------------------------------------------------
namespace {

// A small model of two layers that reads its own tokens: every op of decoding waits for the one before it.
struct SmallDecoder {
  static constexpr int64_t D = 768, F = 2048, V = 1000, stride = 1024, W = 512, steps = 24;
  static constexpr int H = 12, d = 64, S = 64, K = 8, M = 10;
  const int64_t B;
  Gpu<bf16>& gpu;
  Bench<Gpu<bf16>> bench{gpu};
  const SlotShape shape{B, H, d, S, K, W};
  const int64_t ring_size = 2 * W * 2 * D;

  const bf16* weights(int64_t n, uint64_t seed) { return bench.put<bf16>(randoms(true, n, seed, 0.05)); }
  const bf16 *E = bench.put<bf16>(randoms(true, stride*D, 1)), *qkv_W = weights(3 * D * D, 2), *o_W = weights(D * D, 3),
             *gate_up_W = weights(2 * F * D, 4), *down_W = weights(D * F, 5), *q_W = weights(D * D, 6),
             *gain = bench.put<bf16>(randoms(true, D, 7, 0.3, 1));
  const Vec ring_before = randoms(true, B* ring_size, 8);
  bf16 *ring = bench.put<bf16>(ring_before), *old_ring = bench.put<bf16>(ring_before), *x = bench.make<bf16>(B * D),
       *x2 = bench.make<bf16>(B * D), *qkv = bench.make<bf16>(B * 3 * D), *o = bench.make<bf16>(B * D),
       *gate_up = bench.make<bf16>(B * 2 * F), *h = bench.make<bf16>(B * F), *logits = bench.make<bf16>(B * stride),
       *chunk = bench.put<bf16>(Vec(B * S * D, 0)), *kv = bench.put<bf16>(randoms(true, M*S * 2 * D, 9));
  float* rstd = bench.make<float>(B);
  int32_t* token = bench.make<int32_t>(B);
  const int32_t* pick = bench.put(random_ids(K, 10, M));
  const float* w = bench.put<float>(randoms(true, K, 11, 0.05, 0.125));
  std::vector<SlotRow<bf16, float>> start{static_cast<size_t>(B)};
  SlotRow<bf16, float>* rows = nullptr;

  SmallDecoder(Gpu<bf16>& gpu_, int64_t B_) : B(B_), gpu(gpu_) {
    for (int64_t b = 0; b < B; b++)
      start[b] = {W - 10 + 1000 * b, ring + b * ring_size, W * 2 * D, chunk + b * S * D, kv, pick, 0, w, 0};
    rows = put_rows(bench, start);
  }
  // after(): between ops
  void step(const std::function<void()>& after) {
    const auto product = [&](bf16* y, const bf16* from, const bf16* matrix, int64_t out) {
      gpu.norm_matmul_forward(y, h, rstd, from, gain, matrix, B, D, out, 1e-5);
      after();
    };
    gpu.embedding_forward(x, token, E, B, D);
    after();
    for (int64_t layer = 0; layer < 2; layer++) {
      product(qkv, x, qkv_W, 3 * D);
      gpu.slot_attention_forward(o, qkv, rows, layer, shape);
      after();
      gpu.matmul_forward(x2, o, o_W, x, B, D, D);
      after();
      product(qkv, x2, q_W, D);
      gpu.slot_gca_forward(o, qkv, rows, 0, shape);
      after();
      gpu.matmul_forward(x, o, o_W, x2, B, D, D);
      after();
      product(gate_up, x, gate_up_W, 2 * F);
      gpu.swiglu_matmul_forward(x2, h, gate_up, down_W, x, B, F, D);
      after();
      std::swap(x, x2);
    }
    gpu.keep_slot(x, rows, shape);
    after();
    product(logits, x, E, stride);
    gpu.choose_token(token, logits, B, V, stride, {});
    after();
    gpu.next_slot(rows, B);
    after();
  }
  // Bits of what each slot and all of them leave; only of the last, so that nothing waits between them, unless `each`.
  std::vector<char> read(bool each, const std::function<void()>& of_step) {
    gpu.copy(ring, old_ring, B * ring_size);
    gpu.zero(token, B);
    gpu.upload(rows, start.data(), B * static_cast<int64_t>(sizeof start[0]));
    bench.outputs.clear();
    for (int64_t i = 0; i < steps; i++) {
      of_step();
      if (!each && i + 1 < steps) continue;
      bench.result("all", token, B);
      bench.result("all", x, B * D);
    }
    bench.result("all", ring, B * ring_size);
    bench.result("all", chunk, B * S * D);
    return bench.outputs["all"].bits;
  }
};

}  // namespace

TEST_CASE("GPU: slots read one after another have the same bits waited for, in a row and as captured work") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  for (const int64_t B : {1, 3, 7}) {
    if (reduced() && B != 3) continue;
    SmallDecoder decoder(gpu, B);
    const auto waiting = [&] { decoder.step([&] { gpu.synchronize(); }); };
    const std::vector<char> each = decoder.read(true, waiting), last = decoder.read(false, waiting);
    CAPTURE(B);
    CHECK(decoder.read(true, [&] { decoder.step([] {}); }) == each);
    CHECK(decoder.read(false, [&] { decoder.step([] {}); }) == last);
    const GpuDevice::Graph graph = gpu.capture([&] { decoder.step([] {}); });
    CHECK(decoder.read(true, [&] { gpu.replay(graph); }) == each);
    for (int i = 0; i < 10; i++) CHECK(decoder.read(false, [&] { gpu.replay(graph); }) == last);
    // The rows went on: the last slot leaves what the first one does not.
    const int64_t of_slot = B * (4 + 2 * decoder.D);
    CHECK(std::vector<char>(each.begin(), each.begin() + of_slot) !=
          std::vector<char>(last.begin(), last.begin() + of_slot));
  }
}
