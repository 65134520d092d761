// The CPU backend's attentions and retrieval: each forward against the paper by hand
// (dev/by_hand.h), each backward against finite differences, in double.
#include <algorithm>

#include "dev/by_hand.h"
#include "dev/test/cpu_ops.h"

using namespace gca;
using namespace gca::test;

namespace {

// Columns first .. first + D - 1 of n rows that are `width` wide, a vector a row.
by_hand::Slots slots(const double* rows, int64_t n, int64_t width, int64_t first, int64_t D) {
  by_hand::Slots all;
  for (int64_t i = 0; i < n; i++) all.emplace_back(rows + i * width + first, rows + i * width + first + D);
  return all;
}
struct AttentionResult {
  Vec out, lse;
};
// `rows` rows of n slots; attend(q, k, v, slot, lse) gives what a slot of one row sees. qkv (rows,n,3D)
template <class Attend>
AttentionResult self_attention_by_hand(const Vec& qkv, int64_t rows, int64_t n, int H, int64_t D, Attend attend) {
  AttentionResult r{{}, zeros(rows * H * n)};
  for (int64_t b = 0; b < rows; b++) {
    const double* row = qkv.data() + b * n * 3 * D;
    const by_hand::Slots q = slots(row, n, 3 * D, 0, D), k = slots(row, n, 3 * D, D, D),
                         v = slots(row, n, 3 * D, 2 * D, D);
    for (int64_t i = 0; i < n; i++) {
      Vec lse;
      const Vec out = attend(q, k, v, i, &lse);
      r.out.insert(r.out.end(), out.begin(), out.end());
      for (int h = 0; h < H; h++) r.lse[(b * H + h) * n + i] = lse[h];
    }
  }
  return r;
}
AttentionResult sliding_by_hand(const Vec& qkv, const SlidingShape& s) {
  return self_attention_by_hand(qkv, s.B, s.T, s.H, s.H * s.d, [&](auto& q, auto& k, auto& v, int64_t i, Vec* lse) {
    return by_hand::sliding_attention(q, k, v, i, s.H, s.W, lse);
  });
}
AttentionResult chunk_by_hand(const Vec& qkv, const ChunkShape& s) {
  return self_attention_by_hand(qkv, s.N, s.S, s.H, s.H * s.d, [&](auto& q, auto& k, auto& v, int64_t i, Vec* lse) {
    return by_hand::chunk_attention(q, k, v, i, s.H, lse);
  });
}

// Row b's memory, and the picks of row b that serve chunk c with their weights.
by_hand::Memory memory_of_row(const Vec& kv, int64_t b, const GcaShape& s) {
  const int64_t D = s.H * s.d;
  by_hand::Memory memory;
  for (int64_t m = 0; m < s.M; m++) {
    const double* chunk = kv.data() + (b * s.M + m) * s.S * 2 * D;
    memory.CK.push_back(slots(chunk, s.S, 2 * D, 0, D));
    memory.CV.push_back(slots(chunk, s.S, 2 * D, D, D));
  }
  return memory;
}
by_hand::Picks picks_that_serve(const Table& table, int64_t b, int64_t c, const GcaShape& s) {
  by_hand::Picks picks;
  for (int k = 0; k < s.K; k++)
    if (const int64_t at = s.table().serving(b, c, k); table.pick[at] >= 0) {
      picks.chunk.push_back(table.pick[at]);
      picks.w.push_back(table.w[at]);
    }
  return picks;
}
Vec gca_by_hand(const Vec& q, const Vec& kv, const Table& table, const GcaShape& s) {
  const int64_t D = s.H * s.d;
  Vec out;
  for (int64_t b = 0; b < s.B; b++) {
    const by_hand::Memory memory = memory_of_row(kv, b, s);
    for (int64_t t = 0; t < s.T; t++) {
      const double* row = &q[(b * s.T + t) * D];
      const Vec o = by_hand::gca({row, row + D}, s.H, memory, picks_that_serve(table, b, t / s.S, s), s.null_slot);
      out.insert(out.end(), o.begin(), o.end());
    }
  }
  return out;
}
// dw of every pick of the table, (B,C+1,K): summed over the slots that it serves.
Vec gca_dw_by_hand(const Vec& dout, const Vec& q, const Vec& kv, const Table& table, const GcaShape& s) {
  const int64_t D = s.H * s.d;
  Vec dw = zeros(std::ssize(table.w));
  for (int64_t b = 0; b < s.B; b++) {
    const by_hand::Memory memory = memory_of_row(kv, b, s);
    for (int64_t t = 0; t < s.T; t++)
      for (int k = 0; k < s.K; k++) {
        const int64_t at = s.table().serving(b, t / s.S, k), row = (b * s.T + t) * D;
        if (table.pick[at] >= 0)
          dw[at] += by_hand::gca_dw({&dout[row], &dout[row] + D}, {&q[row], &q[row] + D}, s.H, memory, table.pick[at],
                                    s.null_slot);
      }
  }
  return dw;
}

}  // namespace

// ---- attention ----------------------------------------------------------------------------------------------------

TEST_CASE("sliding attention: formula and gradients") {
  Double cpu(1);
  for (const SlidingShape s : {SlidingShape{1, 1, 1, 2, 3},
                               {2, 13, 3, 2, 5},
                               {1, 70, 1, 6, 0},
                               {1, 130, 3, 10, 17},
                               {2, 65, 3, 6, 1000},
                               {1, 129, 1, 2, 64},
                               {1, 64, 5, 6, 63}}) {
    CAPTURE(s.T);
    CAPTURE(s.H);
    CAPTURE(s.W);
    const int64_t D = s.H * s.d, n = s.B * s.T;
    Vec qkv = randoms(n * 3 * D, 1), out = zeros(n * D), lse = zeros(s.B * s.H * s.T), dqkv(n * 3 * D, 5.0);
    const auto forward = [&] { cpu.sliding_attention_forward(out.data(), lse.data(), qkv.data(), nullptr, s); };
    forward();
    const AttentionResult want = sliding_by_hand(qkv, s);
    CHECK(relative_error(out, want.out) < 1e-13);
    CHECK(relative_error(lse, want.lse) < 1e-13);
    const Vec dout = randoms(n * D, 2);
    cpu.sliding_attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), s);
    for (int part = 0; part < 3; part++) {
      CAPTURE(part);
      // A slot that sees only itself has a constant softmax: q and k have no gradient, but for rounding.
      if (part < 2 && (s.W == 0 || s.T == 1)) {
        for (int64_t i = 0; i < n * D; i++) CHECK(std::fabs(dqkv[i / D * 3 * D + part * D + i % D]) < 1e-12);
        continue;
      }
      CHECK(slope_error(qkv.data(), dqkv.data(), direction_in(n * 3 * D, 3 * D, part * D, part * D + D), [&] {
              forward();
              return inner(dout, out);
            }) < slope_tolerance);
    }
  }
}

TEST_CASE("sliding attention: a row read in segments through the ring has the same bits") {
  Double cpu(1);
  const int H = 3, d = 6;
  const int64_t D = H * d, T = 450;
  const Vec qkv = randoms(T * 3 * D, 1);
  const std::vector<std::vector<int64_t>> cuts = {{450},         {150, 150, 150}, {1, 1, 1, 7, 60, 300, 64, 16},
                                                  {64, 64, 322}, {5, 440, 5},     std::vector<int64_t>(450, 1)};
  for (int64_t W : {0, 1, 5, 63, 64, 100, 300, 1000}) {
    Vec whole = zeros(T * D), lse = zeros(H * T);
    cpu.sliding_attention_forward(whole.data(), lse.data(), qkv.data(), nullptr, {1, T, H, d, W});
    for (const std::vector<int64_t>& cut : cuts) {
      CAPTURE(W);
      CAPTURE(cut.size());
      Vec ring(std::max<int64_t>(W, 1) * 2 * D, infinity),
          out = zeros(T * D);  // infinity: what was not written must not be read
      int64_t first = 0;
      for (int64_t count : cut) {
        const SlidingShape s{1, count, H, d, W, first};
        Vec piece_lse = zeros(H * count);
        cpu.sliding_attention_forward(out.data() + first * D, piece_lse.data(), qkv.data() + first * 3 * D, ring.data(),
                                      s);
        cpu.ring_append(ring.data(), qkv.data() + first * 3 * D, s);
        first += count;
      }
      CHECK(out == whole);
    }
  }
}

TEST_CASE("chunk attention: formula and gradients") {
  Double cpu(1);
  for (const ChunkShape s :
       {ChunkShape{1, 2, 1, 2}, {2, 5, 3, 2}, {1, 64, 1, 10}, {3, 2, 3, 6}, {1, 8, 1, 6}, {1, 13, 3, 4}}) {
    CAPTURE(s.S);
    CAPTURE(s.H);
    CAPTURE(s.d);
    const int64_t D = s.H * s.d, n = s.N * s.S;
    Vec qkv = randoms(n * 3 * D, 1), out = zeros(n * D), lse = zeros(s.N * s.H * s.S), dqkv(n * 3 * D, 5.0);
    const auto forward = [&] { cpu.chunk_attention_forward(out.data(), lse.data(), qkv.data(), s); };
    forward();
    const AttentionResult want = chunk_by_hand(qkv, s);
    CHECK(relative_error(out, want.out) < 1e-13);
    CHECK(relative_error(lse, want.lse) < 1e-13);
    const Vec dout = randoms(n * D, 2);
    cpu.chunk_attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), s);
    for (int part = 0; part < 3; part++)
      CHECK(slope_error(qkv.data(), dqkv.data(), direction_in(n * 3 * D, 3 * D, part * D, part * D + D), [&] {
              forward();
              return inner(dout, out);
            }) < slope_tolerance);
  }
}

// ---- retrieval ----------------------------------------------------------------------------------------------------
namespace {

struct Retrieved {
  std::vector<int32_t> pick;  // (B,C+1,K)
  Vec w;
};
template <class Device = Double>
Retrieved retrieved(Device& cpu, const Vec& r, const Vec& landmark, const RetrievalShape& s,
                    const Selection& selection) {
  Retrieved result{std::vector<int32_t>(s.B * (s.C + 1) * s.K, 77), Vec(s.B * (s.C + 1) * s.K, 77.0)};
  cpu.no_pick(result.pick.data(), result.w.data(), s.B, s.C, s.K);
  cpu.chunk_retrieval_forward(result.pick.data(), result.w.data(), r.data(), landmark.data(), s, selection);
  return result;
}

// One row of one query (chunk `past`) against the given scores: D = 1, the query 1 and the landmarks the scores.
Retrieved picks_of_scores(const Vec& scores, int K) {
  Double cpu(1);
  return retrieved(cpu, {1.0}, scores, {1, 1, 1, K, static_cast<int64_t>(scores.size()), 1, 0}, {});
}
std::vector<int32_t> second_row(const Retrieved& r, int K) { return {r.pick.begin() + K, r.pick.begin() + 2 * K}; }

}  // namespace

TEST_CASE("retrieval: mask, order, weights, noise drawn and given") {
  Double cpu(1);
  for (const auto& size : {std::array<int64_t, 4>{1, 1, 5, 2},
                           {2, 7, 5, 3},
                           {1, 13, 1, 1},
                           {3, 5, 13, 8},
                           {1, 64, 7, 8},
                           {1, 40, 6, 32}}) {
    const int64_t B = size[0], C = size[1], D = size[2], K = size[3];
    const int64_t apart = 2;  // landmarks lie apart, as in the encoder's output
    const RetrievalShape s{B, C, static_cast<int>(D), static_cast<int>(K), 0, apart * D, C * apart * D + 3};
    const Vec r = randoms(B * C * D, 1), landmark = randoms(B * s.row_stride, 2);
    const std::vector<float> given_noise = random_values<float>(B * C * C, 3);
    Selection drawn;
    drawn.noise = true;
    drawn.seed = 9;
    drawn.step = 4;
    drawn.first_row = 10;
    drawn.group = 1;
    Selection given = drawn, faint = drawn, strong = drawn;
    given.given_noise = given_noise.data();
    faint.noise_scale = 0.25F;
    strong.given_noise = given_noise.data();
    strong.noise_scale = 3;
    for (const Selection& selection : {Selection{}, drawn, given, faint, strong}) {
      CAPTURE(C);
      CAPTURE(K);
      CAPTURE(selection.noise);
      const Retrieved result = retrieved(cpu, r, landmark, s, selection);
      for (int64_t b = 0; b < B; b++) {
        for (int64_t k = 0; k < K; k++) {
          CHECK(result.pick[b * (C + 1) * K + k] == -1);
          CHECK(result.w[b * (C + 1) * K + k] == 0);
        }
        for (int64_t c = 0; c < C; c++) {
          struct Candidate {
            double key, score;
            int32_t chunk;
          };
          std::vector<Candidate> past;
          for (int64_t m = 0; m < c; m++) {
            double score = 0;
            for (int64_t j = 0; j < D; j++)
              score += r[(b * C + c) * D + j] * landmark[b * s.row_stride + m * s.stride + j];
            score /= std::sqrt(static_cast<double>(D));
            double noise = 0;
            if (selection.given_noise) noise = given_noise[(b * C + c) * C + m];
            else if (selection.noise) noise = gumbel(selection_draw(selection, b, c, m / 4).word[m % 4]);
            noise *= static_cast<double>(selection.noise_scale);
            past.push_back({score + noise, score, static_cast<int32_t>(m)});
          }
          std::stable_sort(past.begin(), past.end(),
                           [](const Candidate& x, const Candidate& y) { return x.key > y.key; });
          if (static_cast<int64_t>(past.size()) > K) past.resize(K);
          double sum = 0;
          for (const Candidate& p : past) sum += std::exp(p.score);
          for (int64_t k = 0; k < K; k++) {
            const int64_t place = PickTable{C, K}.picked_by(b, c, k);
            const bool there = k < static_cast<int64_t>(past.size());
            CHECK(result.pick[place] == (there ? past[k].chunk : -1));
            CHECK(result.w[place] == doctest::Approx(there ? std::exp(past[k].score) / sum : 0).epsilon(1e-12));
          }
        }
      }
    }
  }
}

TEST_CASE("retrieval: a later segment of a row picks the same, noise included") {
  Double cpu(1);
  const int64_t C = 13, done = 8;
  const int D = 5, K = 3;
  const Vec r = randoms(C * D, 1), landmark = randoms(C * D, 2);
  Selection selection;
  for (bool noise : {false, true}) {
    selection.noise = noise;
    const Retrieved whole = retrieved(cpu, r, landmark, {1, C, D, K, 0, D, C * D}, selection);
    const Retrieved later =
        retrieved(cpu, Vec(r.begin() + done * D, r.end()), landmark, {1, C - done, D, K, done, D, 0}, selection);
    CHECK(std::equal(later.pick.begin() + K, later.pick.end(), whole.pick.begin() + (done + 1) * K));
    CHECK(std::equal(later.w.begin() + K, later.w.end(), whole.w.begin() + (done + 1) * K));
  }
}

TEST_CASE("retrieval: ties go to the lower chunk, the largest score first") {
  CHECK(second_row(picks_of_scores({1, 1, 1, 1, 1}, 3), 3) == std::vector<int32_t>{0, 1, 2});
  CHECK(second_row(picks_of_scores({0, 2, 1, 2, 2}, 2), 2) == std::vector<int32_t>{1, 3});
  CHECK(second_row(picks_of_scores({1, 2, 1, 3, 1, 2}, 5), 5) == std::vector<int32_t>{3, 1, 5, 0, 2});
  CHECK(second_row(picks_of_scores({3, 2, 1}, 2), 2) == std::vector<int32_t>{0, 1});
  CHECK(second_row(picks_of_scores({0.0, -0.0, 0.0}, 2), 2) == std::vector<int32_t>{0, 1});
}

TEST_CASE("retrieval: fewer past chunks than picks") {
  const Retrieved r = picks_of_scores({1, 2}, 5);
  CHECK(second_row(r, 5) == std::vector<int32_t>{1, 0, -1, -1, -1});
  CHECK(r.w[5] == doctest::Approx(1 / (1 + std::exp(-1.0))).epsilon(1e-14));
  CHECK(r.w[6] == doctest::Approx(1 / (1 + std::exp(1.0))).epsilon(1e-14));
  for (size_t k = 7; k < 10; k++) CHECK(r.w[k] == 0);
}

TEST_CASE("retrieval: scores that are no numbers come last, and show in the weights when picked") {
  const double nan = std::nan("");
  const Retrieved dropped = picks_of_scores({1, nan, 3, nan, 2}, 3);  // there are better ones
  CHECK(second_row(dropped, 3) == std::vector<int32_t>{2, 4, 0});
  CHECK(dropped.w[3] + dropped.w[4] + dropped.w[5] == doctest::Approx(1).epsilon(1e-14));
  const Retrieved picked = picks_of_scores({nan, 1, nan}, 2);
  CHECK(second_row(picked, 2) == std::vector<int32_t>{1, 0});
  for (size_t k = 2; k < 4; k++) CHECK(std::isnan(picked.w[k]));
  const Retrieved all = picks_of_scores({nan, nan, nan}, 2);
  CHECK(second_row(all, 2) == std::vector<int32_t>{0, 1});
  for (size_t k = 2; k < 4; k++) CHECK(std::isnan(all.w[k]));
  const Retrieved hopeless = picks_of_scores({-infinity, -infinity}, 3);
  CHECK(second_row(hopeless, 3) == std::vector<int32_t>{0, 1, -1});
  for (size_t k = 3; k < 6; k++) CHECK(hopeless.w[k] == 0);
}

TEST_CASE("retrieval: picks out of the past are refused") {
  Double cpu(1);
  Selection given;
  given.picking = Picking::given;
  const RetrievalShape s{1, 2, 1, 1, 0, 1, 2};
  const Vec r = {1, 1}, landmark = {1, 1};
  Vec w = zeros(3);
  std::vector<int32_t> pick = {-1, -1, 0};
  cpu.chunk_retrieval_forward(pick.data(), w.data(), r.data(), landmark.data(), s, given);
  CHECK(w == Vec{0, 0, 1});
  pick[2] = 1;
  CHECK_THROWS_AS(cpu.chunk_retrieval_forward(pick.data(), w.data(), r.data(), landmark.data(), s, given), Error);
  CHECK(pick == std::vector<int32_t>{-1, -1, 1});
}

TEST_CASE("retrieval: gradients of queries and landmarks with picks held") {
  Double cpu(1);
  for (const auto& size : {std::array<int64_t, 4>{2, 7, 5, 3}, {1, 5, 13, 8}, {3, 13, 1, 2}}) {
    const int64_t B = size[0], C = size[1], D = size[2], K = size[3];
    CAPTURE(C);
    CAPTURE(K);
    const int64_t apart = 3, rows = (C + 1) * K;
    const RetrievalShape s{B, C, static_cast<int>(D), static_cast<int>(K), 0, apart * D, C * apart * D};
    Vec r = randoms(B * C * D, 1), landmark = randoms(B * s.row_stride, 2), w = zeros(B * rows);
    Selection selection;
    selection.noise = true;
    const Retrieved held = retrieved(cpu, r, landmark, s, selection);
    selection.picking = Picking::given;
    std::vector<int32_t> pick = held.pick;
    pick[rows - 2 * K] = -1;  // a hole
    const auto forward = [&] {
      cpu.chunk_retrieval_forward(pick.data(), w.data(), r.data(), landmark.data(), s, selection);
    };
    forward();
    Vec weights_gradient = randoms(B * rows, 3);
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < K; k++)
        weights_gradient[b * rows + C * K + k] = 0;  // nobody is served by what the last chunk picked
    const auto loss = [&] {
      forward();
      return inner(weights_gradient, w);
    };
    const Inverse inverse = inverted(cpu, pick, B, C, static_cast<int>(K));
    const Vec before = randoms(B * s.row_stride, 4);
    Vec dw = weights_gradient, dr(B * C * D, 5.0), dlandmark = before;
    cpu.chunk_retrieval_backward({dr.data(), dlandmark.data(), dw.data(), w.data(), pick.data(), inverse.start.data(),
                                  inverse.fetches.data(), r.data(), landmark.data()},
                                 s);
    CHECK(slope_error(r, dr, loss) < slope_tolerance);
    for (size_t i = 0; i < dlandmark.size(); i++) dlandmark[i] -= before[i];
    CHECK(slope_error(landmark, dlandmark, loss) < slope_tolerance);
  }
}

TEST_CASE("retrieval: the newest chunks, by hand, and equal weights") {
  Double cpu(1);
  const RetrievalShape s{1, 6, 1, 3, 0, 1, 6};
  const Vec r(6, 1.0), landmark = {0, std::log(2.0), std::log(3.0), 0, std::log(5.0), 7};  // scores: the landmarks
  Selection selection;
  selection.picking = Picking::newest;
  const Retrieved next = retrieved(cpu, r, landmark, s, selection);
  // Row c + 1: what chunk c fetches for chunk c + 1.
  CHECK(next.pick == std::vector<int32_t>{-1, -1, -1, -1, -1, -1, 0, -1, -1, 1, 0, -1, 2, 1, 0, 3, 2, 1, 4, 3, 2});
  const Vec by_score = {0, 0,       0,       0,       0,       0,       1,       0,       0,       2.0 / 3, 1.0 / 3,
                        0, 3.0 / 6, 2.0 / 6, 1.0 / 6, 1.0 / 6, 3.0 / 6, 2.0 / 6, 5.0 / 9, 1.0 / 9, 3.0 / 9};
  for (size_t i = 0; i < by_score.size(); i++) CHECK(next.w[i] == doctest::Approx(by_score[i]).epsilon(1e-14));

  selection.newest_distance = 3;
  selection.equal_weights = true;
  const Retrieved far = retrieved(cpu, r, landmark, s, selection);
  CHECK(far.pick == std::vector<int32_t>{-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, -1, -1, 1, 0, -1, 2, 1, 0});
  CHECK(far.w == Vec{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0.5, 0.5, 0, 1.0 / 3, 1.0 / 3, 1.0 / 3});

  // No distance reaches past what candidates() allows; a later segment fetches the same.
  selection.newest_distance = 0;
  CHECK(retrieved(cpu, r, landmark, s, selection).pick == next.pick);
  selection.newest_distance = 3;
  const Retrieved later = retrieved(cpu, {1, 1}, landmark, {1, 2, 1, 3, 4, 1, 6}, selection);
  CHECK(std::equal(later.pick.begin() + 3, later.pick.end(), far.pick.begin() + 15));
  CHECK(std::equal(later.w.begin() + 3, later.w.end(), far.w.begin() + 15));

  // Of learned picks too, their order unchanged; infinity counts as any score, and what is no number shows.
  selection.picking = Picking::learned;
  const Retrieved learned = retrieved(cpu, {1}, {1, 4, 2, -infinity}, {1, 1, 1, 3, 4, 1, 4}, selection);
  CHECK(second_row(learned, 3) == std::vector<int32_t>{1, 2, 0});
  CHECK(learned.w == Vec{0, 0, 0, 1.0 / 3, 1.0 / 3, 1.0 / 3});
  const Retrieved hopeless = retrieved(cpu, {1}, {1, -infinity}, {1, 1, 1, 3, 2, 1, 2}, selection);
  CHECK(hopeless.w == Vec{0, 0, 0, 0.5, 0.5, 0});
  const Retrieved broken = retrieved(cpu, {1}, {1, std::nan("")}, {1, 1, 1, 3, 2, 1, 2}, selection);
  CHECK((std::isnan(broken.w[3]) && std::isnan(broken.w[4])));
  selection.picking = Picking::none;
  CHECK(retrieved(cpu, r, landmark, s, selection).w == zeros(21));
}

TEST_CASE("retrieval ablations: none, and uniform over the past") {
  Double cpu(1);
  const int64_t B = 500, C = 14;
  const int D = 3, K = 3;
  const RetrievalShape s{B, C, D, K, 0, D, C * D};
  const Vec r = randoms(B * C * D, 1), landmark = randoms(B * C * D, 2);
  Selection selection;
  selection.picking = Picking::none;
  const Retrieved none = retrieved(cpu, r, landmark, s, selection);
  CHECK(std::all_of(none.pick.begin(), none.pick.end(), [](int32_t m) { return m == -1; }));
  CHECK(none.w == zeros(B * (C + 1) * K));

  selection.picking = Picking::uniform;
  const Retrieved uniform = retrieved(cpu, r, landmark, s, selection);
  double score_order = 0;
  for (int64_t c = 0; c < C; c++) {
    std::vector<int64_t> picked(C, 0);
    for (int64_t b = 0; b < B; b++) {
      const int64_t place = PickTable{C, K}.picked_by(b, c);
      std::vector<int32_t> mine(uniform.pick.begin() + place, uniform.pick.begin() + place + K);
      double sum = 0;
      for (int k = 0; k < K; k++) {
        CHECK((mine[k] >= 0) == (k < c));
        CHECK(mine[k] < c);
        if (mine[k] < 0) continue;
        picked[mine[k]]++;
        sum += uniform.w[place + k];
      }
      if (c > 0) CHECK(sum == doctest::Approx(1).epsilon(1e-12));
      if (c > K) score_order += uniform.w[place] > uniform.w[place + 1] ? 1 : -1;
      std::sort(mine.begin(), mine.end());
      CHECK(std::unique(mine.begin(), mine.begin() + std::min<int64_t>(c, K)) ==
            mine.begin() + std::min<int64_t>(c, K));
    }
    // Each of c chunks is picked with probability K/c: five standard errors of that many rows.
    if (c <= K) continue;
    const double p = static_cast<double>(K) / static_cast<double>(c), n = static_cast<double>(B);
    for (int64_t m = 0; m < C; m++)
      CHECK(std::fabs(static_cast<double>(picked[m]) - (m < c ? n * p : 0)) <= 5 * std::sqrt(n * p * (1 - p)));
  }
  CHECK(std::fabs(score_order) < 5 * std::sqrt(static_cast<double>(B * (C - K - 1))));  // no order of scores among them
  selection.step = 1;
  CHECK(retrieved(cpu, r, landmark, s, selection).pick != uniform.pick);
}

TEST_CASE("inverted pick table: every fetch once, in order") {
  Double cpu(1);
  for (const auto& size : {std::array<int64_t, 3>{1, 1, 1}, {2, 5, 3}, {3, 13, 8}}) {
    const int64_t B = size[0], C = size[1], K = size[2];
    const Table table = random_table(B, C, static_cast<int>(K), 5);
    const Inverse inverse = inverted(cpu, table.pick, B, C, static_cast<int>(K));
    for (int64_t b = 0; b < B; b++)
      for (int64_t m = 0; m < C; m++) {
        std::vector<int32_t> want;
        for (int64_t i = 0; i < C * K; i++)
          if (table.pick[b * (C + 1) * K + i] == m) want.push_back(static_cast<int32_t>(i));
        const int32_t *start = &inverse.start[b * (C + 1)], *fetches = inverse.fetches.data() + b * C * K;
        CHECK(start[0] == 0);
        CHECK(std::vector<int32_t>(fetches + start[m], fetches + start[m + 1]) == want);
      }
  }
}

// ---- grouped cross attention --------------------------------------------------------------------------------------

TEST_CASE("zero_landmarks: the last slot of every chunk, nothing else") {
  Double cpu(1);
  const int64_t N = 3, S = 5, D = 7;
  const Vec before = randoms(N * S * 2 * D, 1);
  Vec kv = before;
  cpu.zero_landmarks(kv.data(), N, S, D);
  for (int64_t i = 0; i < N * S * 2 * D; i++) CHECK(kv[i] == (i / (2 * D) % S == S - 1 ? 0.0 : before[i]));
}

TEST_CASE("grouped cross attention: formula, null slot on and off") {
  Double cpu(1);
  for (const auto& size : {std::array<int, 6>{2, 5, 5, 3, 2, 3},
                           {1, 3, 64, 1, 10, 2},
                           {1, 7, 2, 3, 6, 8},
                           {2, 4, 8, 1, 6, 1},
                           {1, 1, 5, 1, 2, 2}})
    for (bool null_slot : {true, false}) {
      const int B = size[0], C = size[1], S = size[2], H = size[3], d = size[4], K = size[5];
      CAPTURE(S);
      CAPTURE(H);
      CAPTURE(null_slot);
      const int64_t D = H * d, T = static_cast<int64_t>(C) * S, M = C + 2;  // the memory may be longer than the row
      const GcaShape s{B, T, H, d, S, K, M, 0, null_slot};
      const Table table = random_table(B, C, K, 3);
      const Vec q = randoms(B * T * D, 1), kv = random_memory(cpu, B * M, S, D, 2), want = gca_by_hand(q, kv, table, s);
      Vec out(B * T * D, 5.0), again = out, lse(static_cast<int64_t>(B) * C * K * H * S, 5.0);
      cpu.gca_forward(out.data(), lse.data(), q.data(), kv.data(), table.pick.data(), table.w.data(), s);
      CHECK(relative_error(out, want) < 1e-13);
      cpu.gca_forward(again.data(), nullptr, q.data(), kv.data(), table.pick.data(), table.w.data(), s);
      CHECK(again == out);
    }
}

TEST_CASE("grouped cross attention: slots of a later segment, and single ones, have the same bits") {
  Double cpu(1);
  const int H = 3, d = 6, S = 5, K = 3;
  const int64_t D = H * d, C = 6, T = C * S;
  const Table table = random_table(1, C, K, 3);
  const Vec q = randoms(T * D, 1), kv = random_memory(cpu, C, S, D, 2);
  Vec whole = zeros(T * D);
  cpu.gca_forward(whole.data(), nullptr, q.data(), kv.data(), table.pick.data(), table.w.data(), {1, T, H, d, S, K, C});
  for (const auto& size : {std::array<int64_t, 2>{10, 5}, {10, 20}, {15, 1}, {17, 2}, {19, 1}, {21, 4}}) {
    const int64_t first = size[0], count = size[1];
    Vec piece = zeros(count * D);
    const GcaShape s{1, count, H, d, S, K, C, first};
    cpu.gca_forward(piece.data(), nullptr, q.data() + first * D, kv.data(), table.pick.data() + first / S * K,
                    table.w.data() + first / S * K, s);
    CHECK(piece == Vec(whole.begin() + first * D, whole.begin() + (first + count) * D));
  }
}

TEST_CASE("grouped cross attention: gradients of queries, weights and memory, two layers and two tables") {
  Double cpu(1);
  for (const auto& size :
       {std::array<int, 6>{2, 5, 5, 3, 2, 3}, {1, 4, 64, 1, 10, 2}, {1, 7, 2, 3, 6, 8}, {2, 5, 8, 1, 6, 1}})
    for (bool null_slot : {true, false}) {
      const int B = size[0], C = size[1], S = size[2], H = size[3], d = size[4], K = size[5];
      CAPTURE(S);
      CAPTURE(H);
      CAPTURE(null_slot);
      const int64_t D = H * d, T = static_cast<int64_t>(C) * S, saved = static_cast<int64_t>(B) * C * K * H * S,
                    entries = static_cast<int64_t>(B) * (C + 1) * K;
      const GcaShape s{B, T, H, d, S, K, C, 0, null_slot};
      Vec kv = random_memory(cpu, B * C, S, D, 2);
      struct Layer {
        Table table;
        Inverse inverse;
        Vec q, dout, out, lse, delta, dq, dw;
      };
      std::vector<Layer> layers;
      for (uint64_t l = 0; l < 2; l++) {
        Table table = random_table(B, C, K, 3 + l);
        Inverse inverse = inverted(cpu, table.pick, B, C, K);
        layers.push_back({table, inverse, randoms(B * T * D, 20 + l), randoms(B * T * D, 30 + l), zeros(B * T * D),
                          zeros(saved), zeros(saved), Vec(B * T * D, 5.0), zeros(entries)});
      }
      const auto loss = [&] {
        double sum = 0;
        for (Layer& l : layers) {
          cpu.gca_forward(l.out.data(), l.lse.data(), l.q.data(), kv.data(), l.table.pick.data(), l.table.w.data(), s);
          sum += inner(l.dout, l.out);
        }
        return sum;
      };
      loss();
      std::vector<FetchingLayer<double, double>> fetching;
      for (Layer& l : layers) {
        const Vec before = randoms(entries, 9);
        l.dw = before;
        cpu.gca_backward_query({l.dq.data(), l.dw.data(), l.delta.data(), l.dout.data(), l.q.data(), kv.data(),
                                l.lse.data(), l.table.pick.data(), l.table.w.data()},
                               s);
        for (size_t i = 0; i < before.size(); i++) l.dw[i] -= before[i];
        fetching.push_back({l.q.data(), l.dout.data(), l.lse.data(), l.delta.data(), l.table.w.data(),
                            l.inverse.start.data(), l.inverse.fetches.data()});
      }
      Vec dkv(kv.size(), 5.0);
      cpu.gca_backward_memory(dkv.data(), fetching.data(), 2, kv.data(), s);
      for (Layer& l : layers) {
        CHECK(relative_error(l.dw, gca_dw_by_hand(l.dout, l.q, kv, l.table, s)) < 1e-12);
        // One real key and no null slot: the softmax is constant, q and k have no gradient.
        if (S == 2 && !null_slot)
          CHECK(std::all_of(l.dq.begin(), l.dq.end(), [](double x) { return std::fabs(x) < 1e-12; }));
        else CHECK(slope_error(l.q, l.dq, loss) < slope_tolerance);
        CHECK(slope_error(
                  l.table.w.data(), l.dw.data(),
                  [&] {
                    Vec direction = randoms(entries, 8);  // a weight without a pick is no weight
                    for (int64_t i = 0; i < entries; i++)
                      if (l.table.pick[i] < 0) direction[i] = 0;
                    return direction;
                  }(),
                  loss) < slope_tolerance);
      }
      for (int part = 0; part < 2; part++) {
        Vec direction = direction_in(static_cast<int64_t>(kv.size()), 2 * D, part * D, part * D + D);
        cpu.zero_landmarks(direction.data(), B * C, S, D);  // the null slot is what it is
        if (part == 0 && S == 2 && !null_slot) continue;
        CHECK(slope_error(kv.data(), dkv.data(), direction, loss) < slope_tolerance);
      }
      for (size_t i = 0; i < dkv.size(); i++)
        if (static_cast<int64_t>(i) / (2 * D) % S == S - 1) CHECK(dkv[i] == 0);
    }
}

TEST_CASE("attention in float bears logits far out of exp's range") {
  Cpu<float> cpu(1);
  const int H = 1, d = 2, S = 5, K = 1;
  const int64_t C = 3, T = C * S;
  const auto all_finite = [](const std::vector<float>& x) {
    return std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); });
  };
  const std::vector<float> qkv = random_values<float>(T * 6, 1, 1000), dout = random_values<float>(T * 2, 2);
  std::vector<float> out(T * 2), lse(T), dqkv(T * 6);
  cpu.sliding_attention_forward(out.data(), lse.data(), qkv.data(), nullptr, {1, T, H, d, 7});
  cpu.sliding_attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), {1, T, H, d, 7});
  CHECK(all_finite(out));
  CHECK(all_finite(dqkv));
  cpu.chunk_attention_forward(out.data(), lse.data(), qkv.data(), {C, S, H, d});
  cpu.chunk_attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), {C, S, H, d});
  CHECK(all_finite(out));
  CHECK(all_finite(dqkv));
  const std::vector<int32_t> pick = {-1, -1, 0, 1};
  const std::vector<float> w = {0, 0, 1, 1}, q = random_values<float>(T * 2, 3, 1000);
  std::vector<float> kv = random_values<float>(T * 4, 4, 1000), delta(T), dq(T * 2), dw(4), dkv(kv.size());
  cpu.zero_landmarks(kv.data(), C, S, 2);
  const GcaShape s{1, T, H, d, S, K, C};
  const Inverse inverse = inverted(cpu, pick, 1, C, K);
  cpu.gca_forward(out.data(), lse.data(), q.data(), kv.data(), pick.data(), w.data(), s);
  cpu.gca_backward_query(
      {dq.data(), dw.data(), delta.data(), dout.data(), q.data(), kv.data(), lse.data(), pick.data(), w.data()}, s);
  const FetchingLayer<float, float> layer{
      q.data(), dout.data(), lse.data(), delta.data(), w.data(), inverse.start.data(), inverse.fetches.data()};
  cpu.gca_backward_memory(dkv.data(), &layer, 1, kv.data(), s);
  CHECK(all_finite(out));
  CHECK(all_finite(dq));
  CHECK(all_finite(dkv));
}
