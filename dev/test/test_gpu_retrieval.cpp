// Retrieval on the GPU against the CPU's: picks and weights, ties, in segments, what is not a number; its backward.
#include "dev/test/gpu_test.h"

namespace gca::test {
namespace {

struct RetrievalSize {
  int64_t B, C;
  int D, K;
  int64_t first_chunk;
};

TEST_CASE("GPU: retrieval picks what the CPU picks") {
  if (no_gpu()) return;
  for (const RetrievalSize& size : {RetrievalSize{1, 1, 1, 1, 0},
                                    {2, 7, 6, 3, 0},
                                    {1, 113, 64, 8, 0},
                                    {1, 203, 100, 32, 0},
                                    {1, 3, 16, 8, 500},
                                    {1, 66, 7, 1, 130},
                                    {3, 113, 192, 8, 0},
                                    {1, 7, 768, 32, 0},
                                    {2, 20, 40, 1, 70}})
    for (int kind = 0; kind < 12; kind++) {
      if ((kind == 2 || kind == 11) && size.first_chunk) continue;  // given noise is of whole rows
      compare(str("retrieval of ", size.C, " chunks after ", size.first_chunk, ", kind ", kind),
              [&](auto& bench, bool in_bf16) {
                BENCH_TYPES(bench);
                const auto [B, C, D, K, first_chunk] = size;
                const int64_t M = first_chunk + C, table = B * (C + 1) * K, stride = 3 * D;
                const RetrievalShape s{B, C, D, K, first_chunk, stride, M * stride};
                const act *r = bench.template put<act>(whole_numbers(B * C * D, 1)),
                          *landmark = bench.template put<act>(whole_numbers(B * M * stride, 2));
                Ids picks(table, -1);
                Selection selection;
                selection.seed = 9;
                selection.step = 4;
                selection.group = 1;
                selection.first_row = 3;
                selection.noise = kind == 1 || kind == 2 || kind >= 10;
                if (kind >= 10) selection.noise_scale = 0.25F;
                Vec noise(B * C * C);
                for (size_t i = 0; i < noise.size(); i++)
                  noise[i] = gumbel(philox(5, Draw::sample, static_cast<uint32_t>(i)).word[0]);
                if (kind == 2 || kind == 11) selection.given_noise = bench.template put<float>(noise);
                if (kind == 3 || kind == 6) selection.picking = Picking::uniform;
                if (kind == 7 || kind == 8) selection.picking = Picking::newest;
                if (kind == 8) selection.newest_distance = 3;
                selection.equal_weights = kind == 6 || kind == 8 || kind == 9;
                if (kind == 4) selection.picking = Picking::none;
                if (kind == 5) {
                  selection.picking = Picking::given;
                  picks = random_picks(B, C, K, 7);
                }
                int32_t* pick = bench.put(picks);
                stat* w = bench.template make<stat>(table);
                bench.device.no_pick(pick, w, B, C, K);
                bench.device.chunk_retrieval_forward(pick, w, r, landmark, s, selection);
                bench.result("exact pick", pick, table);
                bench.result("w", w, table);
                (void)in_bf16;
              });
    }
}

// What a device picks, and with what weight.
struct Retrieved {
  Vec pick, w;  // (B,C+1,K)
};
template <class Device>
Retrieved retrieved(Device& device, const Vec& r, const Vec& landmark, const RetrievalShape& s,
                    const Selection& selection) {
  Bench<Device> bench(device);
  BENCH_TYPES(bench);
  const int64_t table = s.table().size(s.B);
  int32_t* pick = bench.template make<int32_t>(table);
  stat* w = bench.template make<stat>(table);
  device.no_pick(pick, w, s.B, s.C, s.K);
  device.chunk_retrieval_forward(pick, w, bench.template put<act>(r), bench.template put<act>(landmark), s, selection);
  bench.result("pick", pick, table);
  bench.result("w", w, table);
  return {bench.outputs["pick"].values, bench.outputs["w"].values};
}

TEST_CASE("GPU: retrieval over many landmarks picks what the CPU picks, ties and all") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  Cpu<double> cpu;
  // Of the last, D is no multiple of a slab of columns, and the last queries see more than the first.
  for (const RetrievalSize& size : {RetrievalSize{1, 1, 64, 8, 20000},
                                    {1, 17, 64, 32, 5000},
                                    {1, 130, 64, 8, 20000},
                                    {3, 70, 24, 5, 12000},
                                    {1, 300, 72, 12, 11000}}) {
    const auto [B, C, D, K, first_chunk] = size;
    const int64_t M = first_chunk + C;
    const RetrievalShape s{B, C, D, K, first_chunk, D, M * D};
    const Vec r = whole_numbers(B * C * D, 1), landmark = whole_numbers(B * M * D, 2);
    for (const bool uniform : {false, true}) {
      if (uniform && C > 17) continue;
      Selection selection;
      if (uniform) selection.picking = Picking::uniform;
      CAPTURE(C);
      CAPTURE(uniform);
      const Retrieved ours = retrieved(gpu, r, landmark, s, selection),
                      exact = retrieved(cpu, r, landmark, s, selection);
      CHECK(ours.pick == exact.pick);
      double error = 0;
      for (size_t i = 0; i < exact.w.size(); i++) error = std::fmax(error, std::fabs(ours.w[i] - exact.w[i]));
      CHECK(error < 1e-5);  // scores up to 50, each right to 2^-23 of itself
    }
  }
}

TEST_CASE("GPU: retrieval by segments, the bits of the whole") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  struct Size {
    int64_t C;
    int D, K;
    int64_t first_chunk;
  };
  // The last: all at once is many queries for tiles of 128 x 128, each segment few.
  for (const Size& size : {Size{113, 768, 8, 0}, {203, 192, 32, 0}, {66, 64, 1, 300}, {130, 192, 8, 20000}})
    for (const bool noise : {false, true}) {
      const auto [C, D, K, first_chunk] = size;
      const int64_t M = first_chunk + C;
      const Vec r = randoms(true, C * D, 1), landmark = randoms(true, M * D, 2);
      Bench bench(gpu);
      const bf16 *queries = bench.put<bf16>(r), *landmarks = bench.put<bf16>(landmark);
      int32_t* pick = bench.make<int32_t>((C + 1) * K);
      float* w = bench.make<float>((C + 1) * K);
      Selection selection;
      selection.noise = noise;
      selection.seed = 3;
      gpu.no_pick(pick, w, 1, C, K);
      gpu.chunk_retrieval_forward(pick, w, queries, landmarks, {1, C, D, K, first_chunk, D, M * D}, selection);
      const Ids whole = bench.get(pick, (C + 1) * K);
      const std::vector<float> whole_w = bench.get(w, (C + 1) * K);
      for (const int64_t at_once : {1, 3, 16, 40}) {
        if (at_once == 1 && first_chunk > 1000) continue;
        CAPTURE(C);
        CAPTURE(noise);
        CAPTURE(at_once);
        bool same = true, same_weights = true;
        for (int64_t done = 0; done < C; done += at_once) {
          const int64_t count = std::min(at_once, C - done);
          gpu.no_pick(pick, w, 1, count, K);
          gpu.chunk_retrieval_forward(pick, w, queries + done * D, landmarks,
                                      {1, count, D, K, first_chunk + done, D, M * D}, selection);
          const Ids part = bench.get(pick, (count + 1) * K);
          const std::vector<float> part_w = bench.get(w, (count + 1) * K);
          same = same && std::equal(part.begin() + K, part.end(), whole.begin() + (done + 1) * K);
          same_weights = same_weights && std::equal(part_w.begin() + K, part_w.end(), whole_w.begin() + (done + 1) * K);
        }
        CHECK(same);
        CHECK(same_weights);
      }
    }
}

// A pick may differ from double's only where both candidates' scores lie within rounding of each other: products of
// bf16 are exact in float, and each of D additions errs by 2^-23 of the sum of magnitudes at most.
TEST_CASE("GPU: retrieval in bf16 differs from double only where scores are within rounding") {
  if (no_gpu()) return;
  Gpu<bf16>& gpu = *shared_device<Gpu<bf16>>();
  Cpu<double> cpu;
  struct Size {
    int64_t B, C;
    int D, K;
  };
  for (const Size& size : {Size{1, 1, 64, 1}, {3, 7, 192, 8}, {1, 113, 768, 32}, {3, 203, 64, 8}, {1, 260, 768, 8}}) {
    const auto [B, C, D, K] = size;
    const RetrievalShape s{B, C, D, K, 0, D, C * D};
    const Vec r = randoms(true, B * C * D, 1), landmark = randoms(true, B * C * D, 2);
    const Retrieved ours = retrieved(gpu, r, landmark, s, {}), exact = retrieved(cpu, r, landmark, s, {});
    int64_t picks = 0, differing = 0;
    bool all_near = true;
    for (int64_t b = 0; b < B; b++)
      for (int64_t c = 0; c < C; c++)
        for (int64_t k = 0; k < K; k++) {
          const size_t place = s.table().picked_by(b, c, k);
          picks += exact.pick[place] >= 0;
          if (ours.pick[place] == exact.pick[place]) continue;
          differing++;
          double score[2] = {}, bound = 0;
          for (const int which : {0, 1}) {
            const int64_t m = static_cast<int64_t>((which ? exact : ours).pick[place]);
            if (m < 0 || m >= candidates(c)) {
              all_near = false;
              continue;
            }
            for (int64_t j = 0; j < D; j++) {
              const double product = r[(b * C + c) * D + j] * landmark[(b * C + m) * D + j];
              score[which] += product;
              bound += std::fabs(product) * static_cast<double>(D + 1) / (1 << 23);
            }
          }
          all_near = all_near && std::fabs(score[0] - score[1]) <= bound;
        }
    CAPTURE(C);
    CAPTURE(D);
    CAPTURE(differing);
    CHECK(all_near);
    CHECK(1000 * differing <= picks);
  }
}

TEST_CASE("GPU: retrieval of scores that are not numbers, or not finite") {
  if (no_gpu()) return;
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  // One number a landmark: the scores of chunk 8's query, 1, are these eight.
  for (const Vec& scores : {Vec{1, nan, 3, 2, nan, 0, -0.0, 5},
                            {nan, nan, nan, nan, nan, nan, nan, nan},
                            {-infinity, 1, -infinity, 2, -infinity, -infinity, -infinity, -infinity},
                            {-infinity, -infinity, -infinity, -infinity, -infinity, -infinity, -infinity, -infinity},
                            {0, -0.0, 0, -0.0, 0, -0.0, 0, -0.0},
                            {infinity, 1, 2, 3, 4, 5, 6, 7}})
    for (const int K : {2, 8, 10}) {
      auto test = [&](auto& device) {
        Bench bench(device);
        BENCH_TYPES(bench);
        const int D = 8;  // for tensor cores; the query is 1, 0, ..
        const RetrievalShape s{1, 1, D, K, 8, D, 0};
        int32_t* pick = bench.template make<int32_t>(2 * K);
        stat* w = bench.template make<stat>(2 * K);
        Vec query(D, 0.0), all(9 * D, 0.0);
        query[0] = 1;
        for (size_t i = 0; i < scores.size(); i++) all[i * D] = scores[i];
        device.no_pick(pick, w, 1, 1, K);
        device.chunk_retrieval_forward(pick, w, bench.template put<act>(query), bench.template put<act>(all), s, {});
        bench.result("pick", pick, 2 * K);
        bench.result("w", w, 2 * K);
        return std::pair{bench.outputs["pick"].values, bench.outputs["w"].values};
      };
      auto check = [&](auto& cpu, auto& gpu) {
        const auto [picks, weights] = test(cpu);
        const auto [gpu_picks, gpu_weights] = test(gpu);
        CHECK(gpu_picks == picks);
        for (size_t i = 0; i < weights.size(); i++) {
          CAPTURE(i);
          CHECK(std::isnan(weights[i]) == std::isnan(gpu_weights[i]));
          if (!std::isnan(weights[i])) CHECK(gpu_weights[i] == doctest::Approx(weights[i]).epsilon(1e-6));
        }
      };
      Cpu<float> cpu(1);
      Cpu<float, true> cpu_bf16(1);
      check(cpu, *shared_device<Gpu<float>>());
      check(cpu_bf16, *shared_device<Gpu<bf16>>());
    }
}

TEST_CASE("GPU: given picks that are not in the past break the weights, not the memory") {
  if (no_gpu()) return;
  Bench bench(*shared_device<Gpu<float>>());
  const RetrievalShape s{1, 3, 2, 2, 0, 2, 6};
  int32_t* pick = bench.put(Ids{-1, -1, -1, -1, 0, 1, 0, 1000000});
  float* w = bench.make<float>(8);
  Selection selection;
  selection.picking = Picking::given;
  bench.device.no_pick(pick, w, 1, 3, 2);
  bench.device.chunk_retrieval_forward(pick, w, bench.put<float>({1, 2, 3, 4, 5, 6}),
                                       bench.put<float>({1, 2, 3, 4, 5, 6}), s, selection);
  CHECK(bench.get(pick, 8) == Ids{-1, -1, -1, -1, 0, 0, 0, 0});
  const std::vector<float> weights = bench.get(w, 8);
  CHECK(weights[3] == 0);
  for (size_t i = 4; i < 8; i++) CHECK(std::isnan(weights[i]));
}

TEST_CASE("GPU: retrieval, backward") {
  if (no_gpu()) return;
  struct Size {
    int64_t B, C;
    int D, K;
  };
  for (const Size& size : {Size{1, 1, 1, 1}, {2, 7, 6, 3}, {1, 113, 64, 8}, {1, 40, 203, 32}})
    compare(str("retrieval, backward, ", size.C, " chunks"), [&](auto& bench, bool in_bf16) {
      BENCH_TYPES(bench);
      const auto [B, C, D, K] = size;
      const int64_t table = B * (C + 1) * K, stride = 2 * D;
      const RetrievalShape s{B, C, D, K, 0, stride, C * stride};
      const int32_t* pick = bench.put(random_picks(B, C, K, 3));
      const act *r = bench.template put<act>(randoms(in_bf16, B * C * D, 1)),
                *landmark = bench.template put<act>(randoms(in_bf16, B * C * stride, 2));
      const stat* w = bench.template put<stat>(randoms(in_bf16, table, 4, 0.1, 0.3));
      stat* dw = bench.template put<stat>(randoms(in_bf16, table, 5));
      act *dr = bench.template make<act>(B * C * D),
          *dlandmark = bench.template put<act>(randoms(in_bf16, B * C * stride, 6));
      int32_t *start = bench.template make<int32_t>(B * (C + 1)), *fetches = bench.template make<int32_t>(B * C * K);
      bench.device.invert_picks(start, fetches, pick, B, C, K);
      bench.device.chunk_retrieval_backward({dr, dlandmark, dw, w, pick, start, fetches, r, landmark, K == 3 ? 1 : 2.5},
                                            s);
      bench.result("exact start", start, B * (C + 1));
      const auto starts = bench.get(start, B * (C + 1));
      for (int64_t b = 0; b < B; b++)
        bench.result(str("exact fetches ", b), fetches + b * C * K, starts[b * (C + 1) + C]);
      bench.result("dr", dr, B * C * D);
      bench.result("dlandmark", dlandmark, B * C * stride);
      bench.result("dscore", dw, table);
    });
}

}  // namespace
}  // namespace gca::test
