// The GPU backend against the CPU's: each op, forward and backward, then the whole model, on the same inputs. The
// measure is in dev/test/gpu_test.h; retrieval is in test_gpu_retrieval.cpp.
#include "model.h"
#include "dev/test/gpu_test.h"

using namespace gca;
using namespace gca::test;

// ---- rows ---------------------------------------------------------------------------------------------------------

TEST_CASE("GPU: embedding") {
  if (no_gpu()) return;
  struct Size {
    int64_t rows, V, D;
    int kind;  // 1: few tokens, so that their rows fill many stretches; 2: ids that differ in their highest bits alone
  };
  for (const Size& size : {Size{1, 1, 1, 0},
                           {7, 113, 3, 0},
                           {203, 113, 24, 0},
                           {1030, 70000, 8, 0},
                           {1030, 3, 40, 1},
                           {64, 1, 8, 1},
                           {96, 2, 5, 1},
                           {40, 131100, 2, 2}})
    compare(str("embedding of ", size.rows, " rows"), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const auto [rows, V, D, kind] = size;
      Ids ids = random_ids(rows, 1, V);
      if (kind == 1) std::sort(ids.begin(), ids.begin() + rows / 2);
      for (int32_t& id : ids) id = kind == 2 ? id % 3 << 16 | 5 : id;
      const int32_t* token = bench.put(ids);
      act* x = bench.template make<act>(rows * D);
      grad* dE = bench.template put<grad>(randoms(in_bf16, V * D, 4));
      bench.device.embedding_forward(x, token, bench.template put<weight>(randoms(in_bf16, V * D, 2)), rows, D);
      bench.device.embedding_backward(dE, bench.template put<act>(randoms(in_bf16, rows * D, 3)), token, rows, D);
      bench.result("exact x", x, rows * D);
      bench.result("dE", dE, V * D);
    });
}

TEST_CASE("GPU: RMSNorm") {
  if (no_gpu()) return;
  struct Size {
    int64_t rows, D, apart;
  };
  for (const Size& size :
       {Size{1, 1, 1}, {7, 113, 1}, {203, 64, 1}, {113, 24, 3}, {5, 203, 2}, {1025, 8, 1}, {3, 4096, 1}})
    for (int residuals = 0; residuals < 3; residuals++)
      compare(str("RMSNorm of ", size.rows, " rows of ", size.D, ", ", residuals, " residuals"), [&](auto& bench,
                                                                                                     bool in_bf16) {
        BENCH_TYPES(bench);
        const auto [rows, D, apart] = size;
        const int64_t stride = D * apart, n = (rows - 1) * stride + D;
        const Vec residual = randoms(in_bf16, n, 4);
        const act *x = bench.template put<act>(randoms(in_bf16, n, 1)),
                  *dn = bench.template put<act>(randoms(in_bf16, rows * D, 3));
        const weight* gain = bench.template put<weight>(randoms(in_bf16, D, 2, 0.3, 1));
        act *out = bench.template make<act>(rows * D), *dx = bench.template put<act>(residual),
            *in_place = bench.template put<act>(randoms(in_bf16, rows * D, 3)),
            *again = bench.template make<act>(rows * D);
        stat* rstd = bench.template make<stat>(rows);
        grad* dgain = bench.template put<grad>(randoms(in_bf16, D, 6));
        bench.device.rmsnorm_forward(out, rstd, x, gain, rows, D, stride, 1e-2);
        bench.device.rmsnorm_backward({dx, dgain, dn, x, rstd, gain, residuals > 0 ? dx : nullptr,
                                       residuals > 1 ? bench.template put<act>(randoms(in_bf16, n, 5)) : nullptr,
                                       residuals != 1 ? again : nullptr},
                                      rows, D, stride);
        bench.result("out", out, rows * D);
        bench.result("rstd", rstd, rows);
        if (residuals != 1) bench.result("out once more", again, rows * D);
        bench.result("dx", dx, n);
        bench.result("dgain", dgain, D);
        if (apart > 1) return;
        bench.device.rmsnorm_backward({in_place, dgain, in_place, x, rstd, gain}, rows, D, stride);
        bench.result("dx in place of dn", in_place, n);
      });
}

TEST_CASE("GPU: products") {
  if (no_gpu()) return;
  struct Size {
    int64_t rows, in, out;
  };
  for (const Size& size : {Size{1, 1, 1},
                           {7, 113, 3},
                           {203, 64, 128},
                           {113, 7, 203},
                           {64, 256, 8},
                           {1, 768, 96},
                           {5, 2048, 24},
                           {16, 776, 113},
                           {3, 264, 2120},
                           {13, 4096, 40},
                           {2, 4104, 16}})
    for (const bool more : {false, true})
      compare(str("product of ", size.rows, " x ", size.in, " x ", size.out), [&](auto& bench, bool in_bf16) {
        BENCH_TYPES(bench);
        const auto [rows, in, out] = size;
        const act *x = bench.template put<act>(randoms(in_bf16, rows * in, 1)),
                  *dy = bench.template put<act>(randoms(in_bf16, rows * out, 2));
        const weight* W = bench.template put<weight>(randoms(in_bf16, out * in, 3));
        act *y = bench.template make<act>(rows * out), *dx = bench.template put<act>(randoms(in_bf16, rows * in, 4));
        grad* dW = bench.template put<grad>(randoms(in_bf16, out * in, 5));
        bench.device.matmul_forward(y, x, W, more ? bench.template put<act>(randoms(in_bf16, rows * out, 6)) : nullptr,
                                    rows, in, out);
        bench.device.matmul_backward_input(dx, dy, W, more, rows, in, out);
        bench.device.matmul_backward_weight(dW, dy, x, rows, in, out);
        bench.result("y", y, rows * out);
        bench.result("dx", dx, rows * in);
        bench.result("dW", dW, out * in);
      });
}

TEST_CASE("GPU: products by measured algorithms: right, kept, and not taken from elsewhere") {
  if (no_gpu()) return;
  auto run_on = [](auto& device, int64_t rows, bool add) {
    Bench bench(device);
    BENCH_TYPES(bench);
    const act *x = bench.template put<act>(whole_numbers(rows * 64, 1)),
              *dy = bench.template put<act>(whole_numbers(rows * 128, 2));
    grad* dW = bench.template put<grad>(whole_numbers(128 * 64, 3));
    act* dx = bench.template put<act>(whole_numbers(rows * 64, 4));
    device.matmul_backward_weight(dW, dy, x, rows, 64, 128);
    device.matmul_backward_input(dx, dy, bench.template put<weight>(whole_numbers(128 * 64, 5)), add, rows, 64, 128);
    bench.result("exact dW", dW, 128 * 64);
    bench.result("dx", dx, rows * 64);
    return std::pair{bench.outputs["exact dW"].values, bench.outputs["dx"].values};
  };
  Cpu<float> cpu(1);
  Gpu<float> measuring, knowing;
  CHECK(measuring.measure_products("") == "");
  for (const bool add : {false, true})
    CHECK(run_on(measuring, 203, add) == run_on(cpu, 203, add));  // whole numbers: sums are exact in any order
  CHECK(measuring.products_measured() >= 2);
  const std::string text = measuring.products();
  CHECK(knowing.measure_products(text) == "");
  run_on(knowing, 203, false);
  run_on(knowing, 203, true);
  CHECK(knowing.products_measured() == 0);
  CHECK(knowing.products() == text);
  run_on(knowing, 96, false);
  CHECK(knowing.products_measured() >= 1);
  CHECK(knowing.products().size() > text.size());
  CHECK(knowing.measure_products("products of cuBLASLt 1 on another card" + text.substr(text.find('\n')))
            .find("another card") != std::string::npos);
  CHECK(knowing.measure_products(text.substr(0, text.size() - 20)).find("numbers a line, found") != std::string::npos);
  CHECK(knowing.measure_products(text + "1").find("numbers a line, found") != std::string::npos);
  CHECK(knowing.products().find('\n') == std::string::npos);
}

TEST_CASE("GPU: SwiGLU") {
  if (no_gpu()) return;
  struct Size {
    int64_t rows, F;
  };
  for (const Size& size : {Size{1, 1}, {7, 113}, {113, 176}, {203, 5}})
    compare(str("SwiGLU of ", size.rows, " x ", size.F), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const auto [rows, F] = size;
      const act* gate_up = bench.template put<act>(randoms(in_bf16, rows * 2 * F, 1, 3));
      act *h = bench.template make<act>(rows * F), *dgate_up = bench.template make<act>(rows * 2 * F);
      bench.device.swiglu_forward(h, gate_up, rows, F);
      act* again = bench.template make<act>(rows * F);
      const act* dh = bench.template put<act>(randoms(in_bf16, rows * F, 2));
      bench.device.swiglu_backward(dgate_up, again, dh, gate_up, rows, F);
      bench.result("h", h, rows * F);
      bench.result("h once more", again, rows * F);
      bench.result("dgate|dup", dgate_up, rows * 2 * F);
      act* in_place = bench.template put<act>(randoms(in_bf16, rows * 2 * F, 1, 3));
      bench.device.swiglu_backward(in_place, again, dh, in_place, rows, F);
      bench.result("dgate|dup in place", in_place, rows * 2 * F);
      bench.result("h once more, in place", again, rows * F);
    });
}

// ---- attention ----------------------------------------------------------------------------------------------------

TEST_CASE("GPU: sliding attention") {
  if (no_gpu()) return;
  auto attend = [](auto& bench, bool in_bf16, const SlidingShape& s, double deviation) {
    BENCH_TYPES(bench);
    const int64_t D = s.H * s.d, n = s.B * s.T;
    const act *qkv = bench.template put<act>(randoms(in_bf16, n * 3 * D, 1, deviation)),
              *dout = bench.template put<act>(randoms(in_bf16, n * D, 2));
    act *out = bench.template make<act>(n * D), *dqkv = bench.template make<act>(n * 3 * D);
    stat* lse = bench.template make<stat>(s.B * s.H * s.T);
    bench.device.sliding_attention_forward(out, lse, qkv, nullptr, s);
    bench.device.sliding_attention_backward(dqkv, dout, qkv, out, lse, s);
    bench.result("out", out, n * D);
    bench.result("lse", lse, s.B * s.H * s.T);
    bench.result("dq|dk|dv", dqkv, n * 3 * D);
  };
  struct Case {
    SlidingShape s;
    // Of q, k and v; 6: logits of a row lie hundreds apart, further than floats of a power of two reach.
    double deviation = 1;
  };
  for (const auto& [s, deviation] : {Case{{1, 1, 1, 2, 3}},
                                     {{2, 113, 3, 6, 7}},
                                     {{1, 203, 2, 64, 128}},
                                     {{1, 70, 1, 6, 0}},
                                     {{1, 130, 1, 96, 1000}},
                                     {{1, 129, 2, 256, 64}},
                                     {{2, 64, 5, 10, 63}},
                                     {{2, 300, 3, 32, 70}},
                                     {{1, 330, 12, 64, 200}},
                                     {{1, 65, 2, 64, 1}},
                                     {{1, 193, 1, 64, 1000}},
                                     {{1, 260, 2, 128, 64}},
                                     {{1, 260, 2, 64, 150}, 6}})
    compare(str("sliding attention, T ", s.T, ", d ", s.d, ", W ", s.W),
            [&](auto& bench, bool in_bf16) { attend(bench, in_bf16, s, deviation); });
  // More rows than one pass of the backward has working memory for.
  if (!reduced())
    compare_in<bf16>("sliding attention of many rows", [&](auto& bench) {
      attend(bench, true, SlidingShape{131100, 1, 1, 32, 3}, 1);
    });
}

TEST_CASE("GPU: sliding attention by segments, the bits of the whole") {
  if (no_gpu()) return;
  auto test = [](auto& gpu) {
    using act = typename std::remove_reference_t<decltype(gpu)>::act;
    Bench bench(gpu);
    for (const auto& [W, d] : std::vector<std::pair<int64_t, int>>{
             {0, 10}, {7, 10}, {70, 10}, {128, 10}, {0, 64}, {70, 32}, {128, 64}, {70, 128}}) {
      const SlidingShape s{1, 203, 2, d, W};
      const int64_t D = s.H * s.d;
      const act* qkv = bench.template put<act>(randoms(true, s.T * 3 * D, 1, 3));
      act *whole = bench.template make<act>(s.T * D), *pieces = bench.template make<act>(s.T * D),
          *ring = bench.template make<act>(std::max<int64_t>(1, W) * 2 * D);
      float* lse = bench.template make<float>(s.H * s.T);
      gpu.sliding_attention_forward(whole, lse, qkv, nullptr, s);
      int64_t done = 0;
      for (const int64_t count : {1, 1, 62, 7, 113, 19}) {
        const SlidingShape piece{1, count, s.H, s.d, W, done};
        gpu.sliding_attention_forward(pieces + done * D, lse, qkv + done * 3 * D, ring, piece);
        gpu.ring_append(ring, qkv + done * 3 * D, piece);
        done += count;
      }
      CAPTURE(W);
      CAPTURE(d);
      bench.result("whole", whole, done * D);
      bench.result("pieces", pieces, done * D);
      CHECK(done == s.T);
      CHECK(bench.outputs["pieces"].bits == bench.outputs["whole"].bits);
    }
  };
  test(*shared_device<Gpu<float>>());
  test(*shared_device<Gpu<bf16>>());
}

TEST_CASE("GPU: chunk attention") {
  if (no_gpu()) return;
  for (const ChunkShape& s : {ChunkShape{1, 2, 1, 2},
                              {3, 7, 3, 6},
                              {2, 64, 2, 64},
                              {1, 113, 1, 96},
                              {1, 203, 2, 10},
                              {1, 65, 1, 256},
                              {3, 64, 1, 32},
                              {2, 64, 3, 128}})
    compare(str("chunk attention, S ", s.S, ", d ", s.d), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const int64_t D = s.H * s.d, n = s.N * s.S;
      const act *qkv = bench.template put<act>(randoms(in_bf16, n * 3 * D, 1)),
                *dout = bench.template put<act>(randoms(in_bf16, n * D, 2));
      act *out = bench.template make<act>(n * D), *dqkv = bench.template make<act>(n * 3 * D);
      stat* lse = bench.template make<stat>(s.N * s.H * s.S);
      bench.device.chunk_attention_forward(out, lse, qkv, s);
      bench.device.chunk_attention_backward(dqkv, dout, qkv, out, lse, s);
      bench.result("out", out, n * D);
      bench.result("lse", lse, s.N * s.H * s.S);
      bench.result("dq|dk|dv", dqkv, n * 3 * D);
    });
}

// ---- grouped cross attention --------------------------------------------------------------------------------------

TEST_CASE("GPU: grouped cross attention") {
  if (no_gpu()) return;
  struct Size {
    int64_t B, C;
    int H, d, S, K, layers;
    bool null_slot;
    bool sink = false;  // every chunk fetches chunk 0 besides its own picks, so that this list is long enough to be cut
  };
  for (const Size& size : {Size{1, 1, 1, 2, 2, 1, 1, true},
                           {2, 7, 3, 6, 7, 3, 2, true},
                           {1, 5, 2, 64, 64, 8, 1, true},
                           {2, 5, 3, 64, 64, 3, 3, false},
                           {8, 6, 1, 32, 64, 4, 2, true},
                           {8, 4, 1, 128, 64, 5, 1, false},
                           {2, 70, 1, 32, 64, 1, 1, true, true},
                           {1, 36, 1, 64, 64, 1, 2, true, true},
                           {1, 40, 2, 128, 64, 2, 1, true, true},
                           {8, 5, 1, 96, 113, 2, 1, false},  // so many rows that dw, one number a pick, has dozens
                           {8, 5, 1, 256, 128, 2, 1, true},
                           {8, 5, 1, 10, 65, 2, 1, false},
                           {1, 40, 1, 8, 4, 32, 1, true},
                           {1, 4, 1, 4, 3, 2, 70, false}})
    compare(str("grouped cross attention, S ", size.S, ", d ", size.d, ", K ", size.K), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const auto [B_, C, H, d, S, K, n_layers, null_slot, sink] = size;
      const int64_t B = reduced() ? 1 : B_;
      const int64_t D = H * d, n = B * C * S, table = B * (C + 1) * K, stats = B * C * K * H * S;
      const GcaShape s{B, C * S, H, d, S, K, C, 0, null_slot};
      act *kv = bench.template put<act>(randoms(in_bf16, n * 2 * D, 1)), *dkv = bench.template make<act>(n * 2 * D);
      bench.device.zero_landmarks(kv, B * C, S, D);
      std::vector<FetchingLayer<act, stat>> layers;
      for (uint64_t l = 0; l < static_cast<uint64_t>(n_layers); l++) {
        Ids picks = random_picks(B, C, K, 10 + l);
        if (sink)
          for (int64_t b = 0; b < B; b++)
            for (int64_t c = 2; c <= C; c++)
              for (int64_t k = 0; k < K; k++) {
                int32_t& p = picks[(b * (C + 1) + c) * K + k];
                p = k == 0 ? 0 : p == 0 ? -1 : p;
              }
        const int32_t* pick = bench.put(picks);
        const stat* w = bench.template put<stat>(randoms(in_bf16, table, 20 + l, 0.1, 0.3));
        const act *q = bench.template put<act>(randoms(in_bf16, n * D, 30 + l)),
                  *dout = bench.template put<act>(randoms(in_bf16, n * D, 40 + l));
        act *out = bench.template make<act>(n * D), *dq = bench.template make<act>(n * D);
        stat *lse = bench.template put<stat>(Vec(stats, 0.0)), *delta = bench.template put<stat>(Vec(stats, 0.0)),
             *dw = bench.template put<stat>(randoms(in_bf16, table, 50 + l));
        int32_t *start = bench.template make<int32_t>(B * (C + 1)), *fetches = bench.template make<int32_t>(B * C * K);
        bench.device.gca_forward(out, lse, q, kv, pick, w, s);
        bench.device.gca_backward_query({dq, dw, delta, dout, q, kv, lse, pick, w}, s);
        bench.device.invert_picks(start, fetches, pick, B, C, K);
        layers.push_back({q, dout, lse, delta, w, start, fetches});
        if (l > 1) continue;
        const std::string of = str(" of layer ", static_cast<int>(l));
        bench.result("out" + of, out, n * D);
        bench.result("lse" + of, lse, stats);
        bench.result("dq" + of, dq, n * D);
        bench.result("delta" + of, delta, stats);
        bench.result("dw" + of, dw, table);
      }
      bench.device.gca_backward_memory(dkv, layers.data(), static_cast<int>(layers.size()), kv, s);
      bench.result("kv", kv, n * 2 * D);
      bench.result("dkv", dkv, n * 2 * D);
    });
}

TEST_CASE("GPU: grouped cross attention by segments, the bits of the whole") {
  if (no_gpu()) return;
  Bench bench(*shared_device<Gpu<bf16>>());
  for (const int S : {7, 64, 96}) {
    const int64_t C = 5;
    const int H = 2, d = S == 64 ? 64 : 6, K = 3;
    const int64_t D = H * d, T = C * S;
    const GcaShape s{1, T, H, d, S, K, C};
    const int32_t* pick = bench.put(random_picks(1, C, K, 1));
    const float* w = bench.put<float>(randoms(true, (C + 1) * K, 2));
    const bf16 *q = bench.put<bf16>(randoms(true, T * D, 3)), *kv = bench.put<bf16>(randoms(true, T * 2 * D, 4));
    bf16 *whole = bench.make<bf16>(T * D), *pieces = bench.make<bf16>(T * D);
    bench.device.gca_forward(whole, nullptr, q, kv, pick, w, s);
    // Two whole chunks, then slots of the third, then the rest of it, then the others.
    for (const auto& [first, end] : {std::pair<int64_t, int64_t>{0, 2 * S},
                                     {2 * S, 2 * S + 2},
                                     {2 * S + 2, 3 * S - 1},
                                     {3 * S - 1, 3 * S},
                                     {3 * S, T}}) {
      GcaShape piece = s;
      piece.T = end - first;
      piece.first_slot = first;
      bf16* own = bench.make<bf16>((end - first) * D);  // nothing before and behind it
      bench.device.copy(own, q + first * D, (end - first) * D);
      bench.device.gca_forward(pieces + first * D, nullptr, own, kv, pick + first / S * K, w + first / S * K, piece);
    }
    CAPTURE(S);
    bench.result("whole", whole, T * D);
    bench.result("pieces", pieces, T * D);
    CHECK(bench.outputs["pieces"].bits == bench.outputs["whole"].bits);
  }
}

// ---- loss and optimiser -------------------------------------------------------------------------------------------

TEST_CASE("GPU: cross entropy") {
  if (no_gpu()) return;
  struct Size {
    int64_t rows, V, stride;
    double scale;
    bool weights;
  };
  for (const Size& size : {Size{1, 2, 2, 1, false},
                           {7, 113, 128, 0.25, true},
                           {203, 203, 203, 1, false},
                           {5, 5000, 5120, 0.1, true},
                           {4, 300, 384, 0, true},
                           {9, 7, 8, -2, false},
                           // A block a row: kept, looked at without a gradient, too long to be kept, of odd length.
                           {6, 8191, 8192, 0.5, true},
                           {3, 24576, 24576, 0.5, true},  // of just 48 KB: in bf16, in float
                           {3, 12288, 12288, 0.5, true},
                           {3, 6000, 6016, 0, false},
                           {3, 120000, 120000, 0.5, false},
                           {3, 4099, 4099, 0.5, true}})
    compare(str("cross entropy of ", size.rows, " x ", size.V), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const auto [rows, V, stride, scale, weights] = size;
      Ids targets = random_ids(rows, 1, V);
      for (int64_t r = 3; r < rows; r += 4) targets[r] = -100;
      const float* weight_of = weights ? bench.template put<float>(randoms(true, rows, 2, 0.3, 1)) : nullptr;
      act* logits = bench.template put<act>(randoms(in_bf16, rows * stride, 3, 4));
      stat* loss = bench.template make<stat>(rows);
      StepState* state = bench.template make<StepState>(1);
      bench.device.begin_step(state);
      bench.device.cross_entropy(loss, logits, bench.put(targets), weight_of, scale, rows, V, stride);
      for (int i = 0; i < 2; i++) bench.device.add_loss(state, loss, weight_of, 0.5, rows);
      const StepState figures = bench.get(state, 1)[0];
      bench.result("loss", loss, rows);
      bench.result("logits", logits, rows * stride);
      const stat sums[2] = {static_cast<stat>(figures.loss), static_cast<stat>(figures.plain_loss)};
      stat* figures_out = bench.template make<stat>(2);
      bench.device.upload(figures_out, sums, sizeof sums);
      bench.result("sums", figures_out, 2);
    });
}

TEST_CASE("GPU: AdamW, clipping, and steps that are not finite") {
  if (no_gpu()) return;
  for (const int64_t n_segments : {1, 7, 203}) {
    compare(str("AdamW over ", n_segments, " segments"), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      std::vector<Segment> segments;
      int64_t n = 0;
      for (int64_t i = 0; i < n_segments; i++) {
        segments.push_back({n, i == 3 ? 9001 : 1 + i % 40, i % 2 == 0});
        n += round_up(segments.back().size, 64);
      }
      master *masters = bench.template put<master>(randoms(in_bf16, n, 1)),
             *m = bench.template put<master>(Vec(n, 0.0)), *v = bench.template put<master>(Vec(n, 0.0));
      weight* weights = bench.device.weights_are_masters ? reinterpret_cast<weight*>(masters)
                                                         : bench.template put<weight>(randoms(in_bf16, n, 1));
      StepState* state = bench.template make<StepState>(1);
      bench.device.zero(state, 1);
      auto step = [&](uint64_t seed, double broken, double clip, double loss = 1) {
        Vec values = randoms(in_bf16, n, seed, 0.1);
        for (int64_t j = 0, i = 0; j < n; j++) {  // gaps have no gradient
          while (i + 1 < n_segments && segments[i + 1].offset <= j) i++;
          if (j >= segments[i].offset + segments[i].size) values[j] = 0;
        }
        values[0] += broken;
        const grad* gradient = bench.template put<grad>(values);
        bench.device.begin_step(state);
        bench.device.add_loss(state, bench.template put<stat>({loss}), nullptr, 1, 1);
        bench.device.add_squares(state, gradient, n);
        bench.device.end_gradient(state, clip);
        bench.device.adamw(masters, weights, m, v, gradient, segments.data(), n_segments, state,
                           {.lr = 1e-2, .weight_decay = 0.1, .clip = clip});
      };
      for (uint64_t i = 0; i < 3; i++) step(10 + i, 0, i == 1 ? 0 : 0.5);
      for (const double broken : {std::nan(""), std::numeric_limits<double>::infinity()}) {
        step(20, broken, 1);
        step(21, 0, 1, broken);
      }
      const StepState figures = bench.get(state, 1)[0];
      CHECK(figures.adam_steps == 3);
      CHECK(figures.skipped == 4);
      CHECK(figures.skipped_in_a_row == 4);
      CHECK(figures.skip == 1);
      step(13, 0, 0.5);
      const StepState after = bench.get(state, 1)[0];
      CHECK(after.adam_steps == 4);
      CHECK(after.skipped == 4);
      CHECK(after.skipped_in_a_row == 0);
      CHECK(after.skip == 0);
      bench.result("masters", masters, n);
      bench.result("weights", weights, n);
      bench.result("m", m, n);
      bench.result("v", v, n);
      const stat norm[2] = {static_cast<stat>(after.grad_norm), static_cast<stat>(after.grad_scale)};
      stat* norm_out = bench.template make<stat>(2);
      bench.device.upload(norm_out, norm, sizeof norm);
      bench.result("norm and scale", norm_out, 2);
    });
  }
}

// ---- the whole model ----------------------------------------------------------------------------------------------

namespace {

// A model with weights drawn so wide that every path carries signal, and a batch for it.
struct ModelCase {
  const char* name;
  Config config;
  int64_t B, C;
  int64_t slots() const { return C * config.chunk; }
  Ids tokens(uint64_t draw) const {
    Ids ids = random_ids(B * slots(), 1 + 1000 * draw, config.vocab - 1);
    for (size_t i = 0; i < ids.size(); i++)
      if (static_cast<int64_t>(i) % config.chunk == config.chunk - 1) ids[i] = static_cast<int32_t>(config.vocab - 1);
    return ids;
  }
  Ids targets(uint64_t draw) const {
    Ids ids = random_ids(B * slots(), 2 + 1000 * draw, config.vocab);
    for (size_t i = 0; i < ids.size(); i++)
      if (static_cast<int64_t>(i) % config.chunk == config.chunk - 1) ids[i] = -100;
    return ids;
  }
};
const ModelCase model_cases[] = {
    {"two groups",
     {.vocab = 59,
      .width = 24,
      .heads = 2,
      .ffn = 40,
      .lower = 1,
      .groups = {2, 1},
      .encoder = 1,
      .chunk = 8,
      .reach = {.topk = 3, .window = 20}},
     2,
     7},
    {"one group, no null slot, no lower layer",
     {.vocab = 130,
      .width = 30,
      .heads = 3,
      .ffn = 17,
      .lower = 0,
      .groups = {1},
      .encoder = 2,
      .chunk = 5,
      .reach = {.topk = 8, .window = 3},
      .null_slot = false},
     1,
     11},
    {"chunks of 64 and heads of 32",
     {.vocab = 40,
      .width = 64,
      .heads = 2,
      .ffn = 48,
      .lower = 1,
      .groups = {1},
      .encoder = 1,
      .chunk = 64,
      .reach = {.topk = 2, .window = 100}},
     1,
     6},
    {"sliding window alone",
     {.vocab = 31,
      .width = 16,
      .heads = 2,
      .ffn = 24,
      .lower = 2,
      .groups = {},
      .encoder = 0,
      .chunk = 16,
      .reach = {.window = 70}},
     2,
     7},
};

template <class Device>
void draw_weights(DRT<Device>& net, bool in_bf16, uint64_t draw) {
  for (size_t i = 0; i < net.table.tensors.size(); i++) {
    const Tensor& t = net.table.tensors[i];
    const Vec values =
        randoms(in_bf16, t.size(), 100 + i + 1000 * draw,
                t.columns ? 1 / std::sqrt(static_cast<double>(net.config.width)) : 0.3, t.columns ? 0 : 1);
    const std::vector<typename Device::master> masters(values.begin(), values.end());
    net.device.upload(net.masters + t.offset, masters.data(),
                      t.size() * static_cast<int64_t>(sizeof(typename Device::master)));
  }
  net.weights_changed();
}

// One step, then four more on the same batch (none where it is reduced). picks: of each group, (B,C+1,K); empty: picked
// here, and put there.
template <class Bench>
void train(Bench& bench, const ModelCase& c, bool in_bf16, std::vector<Ids>& picks, uint64_t draw = 0) {
  using Device = std::remove_reference_t<decltype(bench.device)>;
  DRT<Device> net(bench.device, c.config);
  net.allocate();
  net.plan(c.B, c.slots());
  net.commit_activations();
  draw_weights(net, in_bf16, draw);
  const Ids tokens = c.tokens(draw), targets = c.targets(draw);
  const std::vector<float> weights = random_values<float>(c.B * c.slots(), 3, 0.5, 1);
  const int64_t rows = c.B * c.slots(), D = c.config.width, table = c.B * (c.C + 1) * c.config.reach.topk;
  const double scale =
      1 / (static_cast<double>(rows) * static_cast<double>(c.config.chunk - 1) / static_cast<double>(c.config.chunk));
  Vec losses;
  for (int step = 0; step < (reduced() ? 1 : 5); step++) {
    typename DRT<Device>::Input in{c.B, c.slots(), {}};
    in.selection.noise = true;
    in.selection.seed = 5;
    in.selection.step = 3;
    if (!picks.empty()) in.selection.picking = Picking::given;
    for (size_t g = 0; g < picks.size(); g++) bench.device.upload(net.groups[g].pick, picks[g].data(), table * 4);
    net.begin_step();
    net.upload(tokens.data(), targets.data(), weights.data(), rows);
    net.forward(in);
    net.head(scale, true);
    net.backward();
    losses.push_back(net.step_state().loss);
    if (step == 0) {
      bench.result("final norm", net.final_n, rows * D);
      bench.result("losses of slots", net.loss, rows);
      for (auto& group : net.groups)
        bench.result(str("w ", static_cast<int>(&group - net.groups.data())), group.w, table);
      for (const Tensor& t : net.table.tensors) bench.result("d " + t.name, net.gradient + t.offset, t.size());
      if (picks.empty())
        for (auto& group : net.groups) picks.push_back(bench.get(group.pick, table));
    }
    net.update({.lr = 1e-3, .weight_decay = 0.1, .clip = 1});
  }
  bench.outputs["training losses"].append(losses, in_bf16 ? 1.0 / 256 : 1.0 / (1 << 23));
}

}  // namespace

TEST_CASE("GPU: the whole model, each tensor's gradient and five steps, with the picks of Cpu<double>") {
  if (no_gpu()) return;
  const size_t draws = reduced() ? 1 : 24;
  for (const ModelCase& c : model_cases) {
    auto test = [&](auto act) {
      using Act = decltype(act);
      std::vector<std::vector<Ids>> picks(draws);
      compare_in<Act>(c.name, [&](auto& bench) {
        for (size_t draw = 0; draw < draws; draw++) train(bench, c, std::is_same_v<Act, bf16>, picks[draw], draw);
      });
    };
    test(float());
    test(bf16());
  }
}

TEST_CASE("GPU: the whole model picks by itself what Cpu<double> picks") {
  if (no_gpu()) return;
  for (const ModelCase& c : model_cases) {
    std::vector<Ids> picks, gpu_picks;
    Cpu<double> cpu(1);
    run(cpu, [&](auto& bench) { train(bench, c, false, picks); });
    run(*shared_device<Gpu<float>>(), [&](auto& bench) { train(bench, c, false, gpu_picks); });
    CHECK(gpu_picks == picks);
  }
}

TEST_CASE("GPU: a row read by segments is the row read whole") {
  if (no_gpu()) return;
  for (const ModelCase& c : model_cases)
    compare_in<float>(c.name, [&](auto& bench) {
      using Device = std::remove_reference_t<decltype(bench.device)>;
      DRT<Device> net(bench.device, c.config, Use::inference);
      net.allocate();
      net.plan(1, c.slots());
      net.commit_activations();
      draw_weights(net, false, 0);
      const Ids tokens = c.tokens(0);
      const int64_t D = c.config.width, S = c.config.chunk;
      net.upload(tokens.data(), nullptr, nullptr, c.slots());
      net.forward({1, c.slots(), {}});
      bench.result("whole", net.final_n, c.slots() * D);
      typename DRT<Device>::StreamState stream;
      net.open(stream, 1, c.C);
      int64_t done = 0;
      for (const int64_t count : {3 * S, int64_t{1}, S - 2, int64_t{1}, (c.C - 4) * S}) {
        net.upload(tokens.data() + done, nullptr, nullptr, count);
        net.forward({1, count, {}, &stream});
        bench.result(str("slots from ", done, " on"), net.final_n, count * D);
        done += count;
      }
      net.close(stream);
    });
}

// ---- the device ---------------------------------------------------------------------------------------------------

TEST_CASE("GPU: copies, snapshots of a step, rows, and errors in words") {
  if (no_gpu()) return;
  Gpu<float>& gpu = *shared_device<Gpu<float>>();
  Bench bench(gpu);
  CHECK(gpu.free_bytes() > 0);
  CHECK(gpu.description().size() > 20);
  CHECK(gpu.peak_flops() > 0);
  // More than the ring of pieces holds, not a whole number of them; the source changes at once.
  const int64_t n = (20 << 18) + 7;
  std::vector<int32_t> source(n), back(n);
  for (size_t i = 0; i < source.size(); i++) source[i] = static_cast<int32_t>(i * 2654435761u);
  int32_t *there = bench.make<int32_t>(n), *copy = bench.make<int32_t>(n);
  const std::vector<int32_t> kept = source;
  gpu.upload(there, source.data(), n * 4);
  std::fill(source.begin(), source.end(), 0);
  gpu.copy(copy, there, n);
  gpu.zero(there, n);
  gpu.download(back.data(), copy, n * 4);
  CHECK(back == kept);
  gpu.download(back.data(), there, n * 4);
  CHECK(std::count(back.begin(), back.end(), 0) == n);

  GpuDevice::Snapshot snapshot;
  StepState* state = bench.make<StepState>(1);
  StepState figures{};
  for (int64_t i = 1; i < 4; i++) {
    figures.adam_steps = i;
    figures.loss = 0.5;
    gpu.upload(state, &figures, sizeof figures);
    gpu.take(snapshot, state);
    gpu.begin_step(state);
    const StepState taken = gpu.read(snapshot);
    CHECK(taken.adam_steps == i);
    CHECK(taken.loss == 0.5);
  }

  const float* rows = bench.put<float>({1, 2, 3, 4, 5, 6, 7, 8, 9});
  float* to = bench.put<float>(Vec(8, 0.0));
  gpu.copy_rows(to, 4, rows, 5, 2, 3);
  CHECK(bench.get(to, 8) == std::vector<float>{1, 2, 3, 0, 6, 7, 8, 0});
  gpu.copy_rows(to, 4, rows, 5, 0, 3);

  CHECK(error_of([&] { gpu.allocate(int64_t{1} << 50); }).find("out of GPU memory") == 0);
  CHECK(error_of([&] { GpuDevice none(gpu_count()); }).find("GPU number: expected 0 to") == 0);
  CHECK(error_of([&] {
          gpu.chunk_attention_forward(to, to, rows, {1, 2, 1, 258});
        }).find("heads of 2 to 256 columns") != std::string::npos);
  CHECK(error_of([&] {
          gpu.gca_forward(to, to, rows, rows, nullptr, rows, {1, 129, 1, 2, 129, 1, 1});
        }).find("chunks of 2 to 128 slots") != std::string::npos);
  CHECK(gpu.allocate(0));  // still of use after errors
}
