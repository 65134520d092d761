// The ops of the CPU backend but attention and retrieval: each forward against its formula, each backward against
// finite differences, in double; then all ops together: the same bits for any number of threads, and the bf16 twin.
#include <algorithm>
#include <array>
#include <functional>

#include "cpu/choose_token.h"
#include "dev/test/cpu_ops.h"

using namespace gca;
using namespace gca::test;

// ---- numbers ------------------------------------------------------------------------------------------------------

TEST_CASE("philox: the published vectors") {
  // The stream is folded into the key, so a key of the vectors is reached by a seed that undoes it.
  const auto of_key = [](uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    return philox(static_cast<uint64_t>(k1 - static_cast<uint32_t>(Draw::init) * 0x632BE5ABu) << 32 | k0, Draw::init,
                  c0, c1, c2, c3);
  };
  const auto same = [](const Philox& p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return p.word[0] == a && p.word[1] == b && p.word[2] == c && p.word[3] == d;
  };
  CHECK(same(of_key(0, 0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  CHECK(same(of_key(~0u, ~0u, ~0u, ~0u, ~0u, ~0u), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  CHECK(same(of_key(0xa4093822, 0x299f31d0, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344), 0xd16cfe09, 0x94fdcceb,
             0x5001e420, 0x24126ea1));
}

TEST_CASE("exact_log and exponential: close to the library's") {
  double worst_log = 0, worst_exp = 0;
  for (uint32_t i = 0; i < 20000; i++) {
    const Philox draw = philox(5, Draw::sample, i);
    const float u = uniform_open(draw.word[0]),
                wide = std::ldexp(1 + uniform_open(draw.word[1]), static_cast<int>(draw.word[2] % 250) - 125);
    for (float x : {u, 1 - u / 1024, wide})
      worst_log = std::fmax(worst_log, std::fabs(exact_log(x) - std::log(static_cast<double>(x))) /
                                           std::fabs(std::log(static_cast<double>(x))));
    const float x = 174 * u - 87;
    worst_exp = std::fmax(worst_exp, std::fabs(exponential(x) / std::exp(static_cast<double>(x)) - 1));
  }
  CHECK(worst_log < 3e-7);
  CHECK(worst_exp < 3e-7);
  CHECK(exponential(0.0f) == 1.0f);
  CHECK(exponential(-1000.0f) == 0.0f);
  CHECK(exponential(-std::numeric_limits<float>::infinity()) == 0.0f);
  CHECK(std::isfinite(exponential(1000.0f)));
  CHECK(std::isnan(exponential(std::nanf(""))));
}

TEST_CASE("Gumbel noise: mean, variance, and independence of its coordinates") {
  const int64_t n = 200000;
  const auto moments = [&](auto&& draw_at) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n / 4; i++) {
      const Philox draw = draw_at(i);
      for (uint32_t word : draw.word) {
        sum += gumbel(word);
        squares += static_cast<double>(gumbel(word)) * gumbel(word);
      }
    }
    const double mean = sum / n, variance = squares / n - mean * mean, pi = std::acos(-1.0);
    // Five standard errors: the mean's is pi/sqrt(6n), the variance's sqrt(4.4/n) of itself (kurtosis 5.4).
    CHECK(std::fabs(mean - 0.5772156649) < 5 * pi / std::sqrt(6.0 * n));
    CHECK(std::fabs(variance - pi * pi / 6) < 5 * std::sqrt(4.4 / n) * pi * pi / 6);
  };
  Selection s;
  s.seed = 3;
  moments([&](int64_t i) { return selection_draw(s, 0, 1000, i); });
  moments([&](int64_t i) {
    s.step = i;
    return selection_draw(s, 1, 17, 2);
  });
  s.step = 0;
  moments([&](int64_t i) {
    s.first_row = i;
    return selection_draw(s, 0, i % 100, 0);
  });
  double worst = 0;
  for (uint32_t i = 0; i < 10000; i++) {
    const uint32_t word = i < 2 ? -i : philox(8, Draw::sample, i).word[0];  // both ends, and between
    const double exact = -std::log(-std::log(static_cast<double>(uniform_open(word))));
    worst = std::fmax(worst, std::fabs(gumbel(word) - exact) / std::fmax(1.0, std::fabs(exact)));
  }
  CHECK(worst < 1e-6);

  // The same coordinates give the same words; any other coordinate gives others, all four.
  const Selection base = [] {
    Selection b;
    b.seed = 11;
    b.step = 5;
    b.group = 1;
    b.first_row = 6;
    return b;
  }();
  const auto differ = [&](const Selection& other, int64_t b, int64_t chunk, int64_t quad) {
    const Philox x = selection_draw(base, 2, 9, 1), y = selection_draw(other, b, chunk, quad);
    bool all = true;
    for (int i = 0; i < 4; i++) all = all && x.word[i] != y.word[i];
    return all;
  };
  const auto with = [&](auto&& change) {
    Selection other = base;
    change(other);
    return other;
  };
  CHECK(!differ(base, 2, 9, 1));
  CHECK(differ(base, 3, 9, 1));
  CHECK(differ(base, 2, 10, 1));
  CHECK(differ(base, 2, 9, 2));
  CHECK(differ(with([](Selection& o) { o.seed = 12; }), 2, 9, 1));
  CHECK(differ(with([](Selection& o) { o.seed += int64_t{1} << 40; }), 2, 9, 1));
  CHECK(differ(with([](Selection& o) { o.step = 6; }), 2, 9, 1));
  CHECK(differ(with([](Selection& o) { o.group = 2; }), 2, 9, 1));
  CHECK(differ(with([](Selection& o) { o.picking = Picking::uniform; }), 2, 9, 1));
  CHECK(differ(with([](Selection& o) { o.first_row = 7; }), 2, 9, 1));
  CHECK(!differ(with([](Selection& o) { o.first_row = 8; }), 0, 9, 1));  // row 0 of a micro-batch that starts at row 8
}

// ---- simple ops ---------------------------------------------------------------------------------------------------

TEST_CASE("embedding: rows of E, and their gradients summed") {
  Double cpu(1);
  for (const auto& size : {std::array<int64_t, 3>{13, 5, 7}, {1, 1, 1}, {40, 7, 33}}) {
    const int64_t rows = size[0], V = size[1], D = size[2];
    const std::vector<int32_t> token = random_ids(rows, 1, V);
    const Vec E = randoms(V * D, 2), dx = randoms(rows * D, 3), before = randoms(V * D, 4);
    Vec x = zeros(rows * D), dE = before, want = before;
    cpu.embedding_forward(x.data(), token.data(), E.data(), rows, D);
    cpu.embedding_backward(dE.data(), dx.data(), token.data(), rows, D);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < D; j++) {
        CHECK(x[r * D + j] == E[token[r] * D + j]);
        want[token[r] * D + j] += dx[r * D + j];
      }
    CHECK(dE == want);
    // <dx, x> is linear in E, with slope dE: finite differences say the same.
    Vec moved = E, gradient = zeros(V * D);
    cpu.embedding_backward(gradient.data(), dx.data(), token.data(), rows, D);
    CHECK(slope_error(moved, gradient, [&] {
            cpu.embedding_forward(x.data(), token.data(), moved.data(), rows, D);
            return inner(dx, x);
          }) < slope_tolerance);
  }
}

TEST_CASE("rmsnorm: formula, gradients, strided rows, residuals, in place") {
  Double cpu(1);
  const double eps = 1e-2;  // large enough to be seen
  for (const auto& size : {std::array<int64_t, 3>{1, 1, 1}, {5, 7, 1}, {13, 64, 1}, {130, 5, 1}, {7, 13, 3}}) {
    const int64_t rows = size[0], D = size[1], apart = size[2];
    CAPTURE(rows);
    CAPTURE(D);
    const int64_t stride = D * apart, n = (rows - 1) * stride + D;
    Vec x = randoms(n, 1), gain = randoms(D, 2, 0.3, 1), out = zeros(rows * D), rstd = zeros(rows);
    const auto forward = [&] {
      cpu.rmsnorm_forward(out.data(), rstd.data(), x.data(), gain.data(), rows, D, stride, eps);
    };
    forward();
    Vec want = zeros(rows * D);
    for (int64_t r = 0; r < rows; r++) {
      double squares = 0;
      for (int64_t j = 0; j < D; j++) squares += x[r * stride + j] * x[r * stride + j];
      for (int64_t j = 0; j < D; j++)
        want[r * D + j] = gain[j] * x[r * stride + j] / std::sqrt(squares / static_cast<double>(D) + eps);
    }
    CHECK(relative_error(out, want) < 1e-14);

    // The loss <dn, Norm(x)> + <residual, x> + <residual2, x> over the rows; what lies between them is nobody's.
    const Vec dn = randoms(rows * D, 3), before = randoms(D, 6);
    Vec residual = direction_in(n, stride, 0, D), residual2 = direction_in(n, stride, 0, D);
    for (double& value : residual2) value *= 0.7;
    for (int residuals = 0; residuals < 3; residuals++) {
      const double *r1 = residuals > 0 ? residual.data() : nullptr, *r2 = residuals > 1 ? residual2.data() : nullptr;
      const auto loss = [&] {
        forward();
        return inner(dn, out) + (r1 ? inner(residual, x) : 0) + (r2 ? inner(residual2, x) : 0);
      };
      forward();
      Vec dx(n, 5.0), dgain = before, norm = zeros(rows * D);
      cpu.rmsnorm_backward(
          {dx.data(), dgain.data(), dn.data(), x.data(), rstd.data(), gain.data(), r1, r2, norm.data()}, rows, D,
          stride);
      CHECK(norm == out);
      CHECK(slope_error(x.data(), dx.data(), direction_in(n, stride, 0, D), loss) < slope_tolerance);
      for (int64_t i = 0; i < n; i++)
        if (i % stride >= D) CHECK(dx[i] == 5.0);
      Vec added = dgain;
      for (size_t j = 0; j < added.size(); j++) added[j] -= before[j];
      CHECK(slope_error(gain, added, loss) < slope_tolerance);

      // dx may be dn, or the first residual.
      if (apart == 1 && !residuals) {
        Vec in_place = dn, again = before;
        cpu.rmsnorm_backward(
            {in_place.data(), again.data(), in_place.data(), x.data(), rstd.data(), gain.data(), r1, r2}, rows, D,
            stride);
        CHECK(in_place == dx);
        CHECK(again == dgain);
      }
      if (residuals) {
        Vec in_place = residual, again = before;
        cpu.rmsnorm_backward(
            {in_place.data(), again.data(), dn.data(), x.data(), rstd.data(), gain.data(), in_place.data(), r2}, rows,
            D, stride);
        for (int64_t i = 0; i < n; i++)
          if (i % stride < D) CHECK(in_place[i] == dx[i]);
      }
    }
  }
}

TEST_CASE("matmul: y = x W^T + residual, and both gradients") {
  Double cpu(1);
  for (const auto& size :
       {std::array<int64_t, 3>{1, 1, 1}, {1, 5, 7}, {13, 7, 5}, {65, 13, 33}, {3, 300, 5}, {7, 64, 300}}) {
    const int64_t rows = size[0], in = size[1], out = size[2];
    CAPTURE(rows);
    CAPTURE(in);
    CAPTURE(out);
    Vec x = randoms(rows * in, 1), W = randoms(out * in, 2), residual = randoms(rows * out, 3), y = zeros(rows * out);
    for (bool with_residual : {false, true}) {
      const auto forward = [&] {
        cpu.matmul_forward(y.data(), x.data(), W.data(), with_residual ? residual.data() : nullptr, rows, in, out);
      };
      forward();
      Vec want = with_residual ? residual : zeros(rows * out);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < out; o++)
          for (int64_t i = 0; i < in; i++) want[r * out + o] += x[r * in + i] * W[o * in + i];
      CHECK(relative_error(y, want) < 1e-13);

      const Vec dy = randoms(rows * out, 4), before = randoms(rows * in, 5), before_W = randoms(out * in, 6);
      const auto loss = [&] {
        forward();
        return inner(dy, y);
      };
      Vec dx = before, dx_more = before, dW = before_W;
      cpu.matmul_backward_input(dx.data(), dy.data(), W.data(), false, rows, in, out);
      cpu.matmul_backward_input(dx_more.data(), dy.data(), W.data(), true, rows, in, out);
      cpu.matmul_backward_weight(dW.data(), dy.data(), x.data(), rows, in, out);
      CHECK(slope_error(x, dx, loss) < slope_tolerance);
      for (size_t i = 0; i < dx.size(); i++) dx_more[i] -= before[i];
      CHECK(relative_error(dx_more, dx) < 1e-13);
      for (size_t i = 0; i < dW.size(); i++) dW[i] -= before_W[i];
      CHECK(slope_error(W, dW, loss) < slope_tolerance);
      if (with_residual) CHECK(slope_error(residual, dy, loss) < slope_tolerance);
    }
  }
}

TEST_CASE("swiglu: formula and gradients") {
  Double cpu(1);
  for (const auto& size : {std::array<int64_t, 2>{1, 1}, {5, 7}, {13, 5}, {3, 64}}) {
    const int64_t rows = size[0], F = size[1];
    Vec gate_up = randoms(rows * 2 * F, 1, 2), h = zeros(rows * F), want = h, dgate_up = zeros(rows * 2 * F);
    const auto forward = [&] { cpu.swiglu_forward(h.data(), gate_up.data(), rows, F); };
    forward();
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < F; j++) {
        const double gate = gate_up[2 * r * F + j], up = gate_up[2 * r * F + F + j];
        want[r * F + j] = gate * (1 / (1 + std::exp(-gate))) * up;
      }
    CHECK(relative_error(h, want) < 1e-14);
    const Vec dh = randoms(rows * F, 2);
    Vec again = zeros(rows * F);
    cpu.swiglu_backward(dgate_up.data(), again.data(), dh.data(), gate_up.data(), rows, F);
    CHECK(again == h);
    Vec in_place = gate_up;
    cpu.swiglu_backward(in_place.data(), again.data(), dh.data(), in_place.data(), rows, F);
    CHECK(in_place == dgate_up);
    CHECK(again == h);
    for (int part = 0; part < 2; part++)
      CHECK(
          slope_error(gate_up.data(), dgate_up.data(), direction_in(rows * 2 * F, 2 * F, part * F, part * F + F), [&] {
            forward();
            return inner(dh, h);
          }) < slope_tolerance);
  }
  // A float's range is no limit: silu tends to 0 and to z.
  Cpu<float> single(1);
  const std::vector<float> extreme = {-1000, 1000, 2, 2};
  float h[2], dgate_up[4];
  const float dh[2] = {1, 1};
  single.swiglu_forward(h, extreme.data(), 1, 2);
  single.swiglu_backward(dgate_up, nullptr, dh, extreme.data(), 1, 2);
  CHECK(std::fabs(h[0]) < 1e-30f);
  CHECK(h[1] == 2000);
  CHECK(std::fabs(dgate_up[0]) < 1e-30f);
  CHECK(dgate_up[1] == 2);
}

// ---- cross entropy and the optimiser ------------------------------------------------------------------------------

TEST_CASE("cross entropy: losses, sums and gradient, with weights, missing targets and padding") {
  Double cpu(1);
  for (const auto& size : {std::array<int64_t, 3>{1, 2, 2}, {5, 7, 7}, {13, 5, 8}, {7, 263, 264}})
    for (bool weighted : {false, true}) {
      const int64_t rows = size[0], V = size[1], stride = size[2];
      CAPTURE(rows);
      CAPTURE(V);
      CAPTURE(weighted);
      Vec logits = randoms(rows * stride, 1, 3), loss = zeros(rows);
      std::vector<int32_t> target = random_ids(rows, 2, V);
      if (rows > 4) {
        target[1] = -1;
        target[3] = -100;
      }
      const std::vector<float> slot_weight = random_values<float>(rows, 3, 0.5, 1);
      const float* weight = weighted ? slot_weight.data() : nullptr;
      const double scale = 0.37;
      const auto sums = [&](double scale_of_gradient, Vec& copy) {
        StepState state{};
        cpu.cross_entropy(loss.data(), copy.data(), target.data(), weight, scale_of_gradient, rows, V, stride);
        cpu.add_loss(&state, loss.data(), weight, scale, rows);
        return state;
      };
      Vec untouched = logits, gradient = logits;
      const StepState state = sums(0, untouched);
      CHECK(untouched == logits);
      double want = 0, want_plain = 0;
      for (int64_t r = 0; r < rows; r++) {
        double sum = 0, one = 0;
        for (int64_t j = 0; j < V; j++) sum += std::exp(logits[r * stride + j]);
        if (target[r] >= 0) one = std::log(sum) - logits[r * stride + target[r]];
        CHECK(loss[r] == doctest::Approx(one).epsilon(1e-13));
        want += scale * one * (weighted ? slot_weight[r] : 1.0f);
        want_plain += scale * one;
      }
      CHECK(state.loss == doctest::Approx(want).epsilon(1e-13));
      CHECK(state.plain_loss == doctest::Approx(want_plain).epsilon(1e-13));
      sums(scale, gradient);
      CHECK(slope_error(logits.data(), gradient.data(), direction_in(rows * stride, stride, 0, V), [&] {
              Vec copy = logits;
              return sums(0, copy).loss;
            }) < slope_tolerance);
      for (int64_t i = 0; i < rows * stride; i++)
        if (i % stride >= V || target[i / stride] < 0) CHECK(gradient[i] == 0);
    }
  // Logits far out of exp's range.
  Cpu<float> single(1);
  float logits[3] = {0, 5000, -5000}, loss[1];
  const int32_t target[1] = {1};
  single.cross_entropy(loss, logits, target, nullptr, 1.0, 1, 3, 3);
  CHECK(loss[0] == 0);
  for (float gradient : logits) CHECK(gradient == 0);
  // Where the target is nearly certain, bf16 stores p - 1, not the difference of a stored p.
  Cpu<float, true> twin(1);
  float sure[3] = {0, 7, 0};
  twin.cross_entropy(loss, sure, target, nullptr, 1.0, 1, 3, 3);
  const double want = -2 / (std::exp(7.0) + 2);
  CHECK(relative_error(&sure[1], &want, 1) < 1.0 / 256);
}

TEST_CASE("AdamW: decay before the update, bias correction, clipping, matrices only") {
  Double cpu(1);
  const int64_t n = 70000;  // more than one block of the norm's sum
  const std::vector<Segment> segments = {{0, 5, false}, {8, 60000, true}, {60008, 9000, false}};  // gaps: alignment's
  for (double clip : {0.0, 1.0, 1e9}) {
    CAPTURE(clip);
    const AdamW hyper{.lr = 3e-2, .beta1 = 0.8, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.3, .clip = clip};
    Vec w = randoms(n, 1), m = zeros(n), v = zeros(n), want = w, want_m = m, want_v = v;
    StepState state{};
    for (int t = 1; t <= 4; t++) {
      const Vec gradient = randoms(n, 10 + static_cast<uint64_t>(t), 0.1 * t);
      cpu.begin_step(&state);
      cpu.add_squares(&state, gradient.data(), n);
      cpu.end_gradient(&state, hyper.clip);
      cpu.adamw(w.data(), w.data(), m.data(), v.data(), gradient.data(), segments.data(), 3, &state, hyper);
      double norm = 0;
      for (double g : gradient) norm += g * g;
      norm = std::sqrt(norm);
      const double scale = clip == 0 ? 1 : std::min(1.0, clip / (norm + 1e-6));
      CHECK(state.grad_norm == doctest::Approx(norm).epsilon(1e-12));
      CHECK(state.grad_scale == doctest::Approx(scale).epsilon(1e-12));
      CHECK(state.adam_steps == t);
      for (const Segment& segment : segments)
        for (int64_t i = segment.offset; i < segment.offset + segment.size; i++) {
          const double g = scale * gradient[i];
          want_m[i] = hyper.beta1 * want_m[i] + (1 - hyper.beta1) * g;
          want_v[i] = hyper.beta2 * want_v[i] + (1 - hyper.beta2) * g * g;
          if (segment.decay) want[i] *= 1 - hyper.lr * hyper.weight_decay;
          const double mhat = want_m[i] / (1 - std::pow(hyper.beta1, t)),
                       vhat = want_v[i] / (1 - std::pow(hyper.beta2, t));
          want[i] -= hyper.lr * mhat / (std::sqrt(vhat) + hyper.eps);
        }
    }
    CHECK(relative_error(w, want) < 1e-13);
    CHECK(relative_error(m, want_m) < 1e-13);
    CHECK(relative_error(v, want_v) < 1e-13);
  }
}

TEST_CASE("AdamW: a step that is not finite changes nothing and is counted") {
  Double cpu(1);
  const int64_t n = 13;
  const Segment segment{0, n, true};
  const AdamW hyper{.lr = 1e-2, .weight_decay = 0.1};
  Vec w = randoms(n, 1), m = zeros(n), v = zeros(n), gradient = randoms(n, 2);
  StepState state{};
  const auto step = [&](double loss) {
    cpu.begin_step(&state);
    state.loss = loss;
    cpu.add_squares(&state, gradient.data(), n);
    cpu.end_gradient(&state, hyper.clip);
    cpu.adamw(w.data(), w.data(), m.data(), v.data(), gradient.data(), &segment, 1, &state, hyper);
  };
  step(1);
  CHECK(!state.skip);
  const Vec w1 = w, m1 = m, v1 = v;
  const double good = gradient[3];
  int64_t skipped = 0;
  for (double bad : {infinity, -infinity, std::nan(""), 1e200}) {  // 1e200: its square is not finite
    gradient[3] = bad;
    step(1);
    CHECK(state.skip == 1);
    CHECK(state.skipped == ++skipped);
    CHECK(state.skipped_in_a_row == skipped);
  }
  gradient[3] = good;
  for (double bad : {infinity, std::nan("")}) {
    step(bad);
    CHECK(state.skip == 1);
    CHECK(state.skipped_in_a_row == ++skipped);
  }
  CHECK(state.adam_steps == 1);
  CHECK(w == w1);
  CHECK(m == m1);
  CHECK(v == v1);
  step(1);
  CHECK(!state.skip);
  CHECK(state.adam_steps == 2);
  CHECK(state.skipped == 6);
  CHECK(state.skipped_in_a_row == 0);
  CHECK(w != w1);
  CHECK(std::all_of(w.begin(), w.end(), [](double x) { return std::isfinite(x); }));
}

// ---- all ops at once: threads, float, bf16 ------------------------------------------------------------------------
namespace {

struct Output {
  std::string name;
  Vec values;
  bool stored_as_bf16;
};

// Every op once, on inputs that bf16 holds exactly, large enough that the pool has several tasks of each.
template <class Device>
std::vector<Output> all_ops(int threads) {
  using real = typename Device::act;
  using Buffer = std::vector<real>;
  Device cpu(threads);
  std::vector<Output> outputs;
  const auto input = [](int64_t n, uint64_t seed, double deviation = 1, double mean = 0) {
    Buffer x = random_values<real>(n, seed, deviation, mean);
    for (real& value : x) value = round_bf16(static_cast<float>(value));
    return x;
  };
  const auto buffer = [](int64_t n) { return Buffer(n, real(0)); };
  const auto keep = [&](const char* name, const Buffer& x, bool stored_as_bf16) {
    outputs.push_back({name, Vec(x.begin(), x.end()), stored_as_bf16});
  };

  const int B = 2, C = 6, S = 16, H = 3, d = 10, K = 3;
  const int64_t D = H * d, T = static_cast<int64_t>(C) * S, R = B * T, F = 70, V = 41;
  const Buffer x = input(R * D, 1), gain = input(D, 2, 0.3, 1), dout = input(R * D, 3), qkv = input(R * 3 * D, 4);
  {
    const std::vector<int32_t> token = random_ids(R, 1, V);
    Buffer dE = buffer(V * D), embedded = buffer(R * D);
    cpu.embedding_forward(embedded.data(), token.data(), input(V * D, 5).data(), R, D);
    cpu.embedding_backward(dE.data(), dout.data(), token.data(), R, D);
    keep("embedding", embedded, true);
    keep("dE", dE, false);
  }
  {
    Buffer out = buffer(R * D), rstd = buffer(R), dx = buffer(R * D), dgain = buffer(D);
    cpu.rmsnorm_forward(out.data(), rstd.data(), x.data(), gain.data(), R, D, D, 1e-5);
    cpu.rmsnorm_backward(
        {dx.data(), dgain.data(), dout.data(), x.data(), rstd.data(), gain.data(), x.data(), dout.data()}, R, D, D);
    keep("rmsnorm", out, true);
    keep("rmsnorm dx", dx, true);
    keep("rmsnorm dgain", dgain, false);
  }
  {
    const Buffer W = input(F * D, 6), dy = input(R * F, 7), residual = input(R * F, 8);
    Buffer y = buffer(R * F), dx = x, dW = buffer(F * D);
    cpu.matmul_forward(y.data(), x.data(), W.data(), residual.data(), R, D, F);
    cpu.matmul_backward_input(dx.data(), dy.data(), W.data(), true, R, D, F);
    cpu.matmul_backward_weight(dW.data(), dy.data(), x.data(), R, D, F);
    keep("matmul", y, true);
    keep("matmul dx", dx, true);
    keep("matmul dW", dW, false);
  }
  {
    const Buffer gate_up = input(R * 2 * F, 9), dh = input(R * F, 10);
    Buffer h = buffer(R * F), dgate_up = buffer(R * 2 * F);
    cpu.swiglu_forward(h.data(), gate_up.data(), R, F);
    cpu.swiglu_backward(dgate_up.data(), nullptr, dh.data(), gate_up.data(), R, F);
    keep("swiglu", h, true);
    keep("swiglu dgate|dup", dgate_up, true);
  }
  {
    const SlidingShape s{B, T, H, d, 37};
    Buffer out = buffer(R * D), lse = buffer(B * H * T), dqkv = buffer(R * 3 * D);
    cpu.sliding_attention_forward(out.data(), lse.data(), qkv.data(), nullptr, s);
    cpu.sliding_attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), s);
    keep("sliding attention", out, true);
    keep("sliding attention dqkv", dqkv, true);
  }
  {
    const ChunkShape s{B * C, S, H, d};
    Buffer out = buffer(R * D), lse = buffer(B * C * H * S), dqkv = buffer(R * 3 * D);
    cpu.chunk_attention_forward(out.data(), lse.data(), qkv.data(), s);
    cpu.chunk_attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), lse.data(), s);
    keep("chunk attention", out, true);
    keep("chunk attention dqkv", dqkv, true);
  }
  {
    const Table table = random_table(B, C, K, 3);
    const Inverse inverse = inverted(cpu, table.pick, B, C, K);
    const RetrievalShape s{B, C, static_cast<int>(D), K, 0, D, C * D};
    Selection selection;
    selection.picking = Picking::given;
    std::vector<int32_t> pick = table.pick;
    const Buffer r = input(B * C * D, 11), landmark = input(B * C * D, 12);
    Buffer w = buffer(B * (C + 1) * K), dw = input(B * (C + 1) * K, 13), dr = buffer(B * C * D),
           dlandmark = input(B * C * D, 14);
    cpu.chunk_retrieval_forward(pick.data(), w.data(), r.data(), landmark.data(), s, selection);
    cpu.chunk_retrieval_backward({dr.data(), dlandmark.data(), dw.data(), w.data(), pick.data(), inverse.start.data(),
                                  inverse.fetches.data(), r.data(), landmark.data()},
                                 s);
    keep("retrieval w", w, false);
    keep("retrieval dr", dr, true);
    keep("retrieval dlandmark", dlandmark, true);
  }
  {
    const Table table = random_table(B, C, K, 4);
    const Inverse inverse = inverted(cpu, table.pick, B, C, K);
    const GcaShape s{B, T, H, d, S, K, C};
    const Buffer w(table.w.begin(), table.w.end());
    Buffer kv = input(R * 2 * D, 15), out = buffer(R * D), lse = buffer(R * K * H), delta = lse, dq = out,
           dw = buffer(B * (C + 1) * K), dkv = kv;
    cpu.zero_landmarks(kv.data(), B * C, S, D);
    cpu.gca_forward(out.data(), lse.data(), x.data(), kv.data(), table.pick.data(), w.data(), s);
    cpu.gca_backward_query(
        {dq.data(), dw.data(), delta.data(), dout.data(), x.data(), kv.data(), lse.data(), table.pick.data(), w.data()},
        s);
    const FetchingLayer<real, real> layer{
        x.data(), dout.data(), lse.data(), delta.data(), w.data(), inverse.start.data(), inverse.fetches.data()};
    cpu.gca_backward_memory(dkv.data(), &layer, 1, kv.data(), s);
    keep("gca", out, true);
    keep("gca dq", dq, true);
    keep("gca dw", dw, false);
    keep("gca dkv", dkv, true);
  }
  {
    const int64_t rows = 500;
    Buffer logits = input(rows * V, 16), loss = buffer(rows);
    cpu.cross_entropy(loss.data(), logits.data(), random_ids(rows, 17, V).data(), nullptr, 0.01, rows, V, V);
    keep("cross entropy", loss, false);
    keep("cross entropy dlogits", logits, true);
  }
  {
    const int64_t n = 200000;
    const Segment segments[2] = {{0, 150000, true}, {150000, n - 150000, false}};
    Buffer masters = random_values<real>(n, 18), weights = masters, m = buffer(n), v = buffer(n);
    real* working = Device::weights_are_masters ? masters.data() : weights.data();
    StepState state{};
    for (uint64_t t = 0; t < 2; t++) {
      cpu.begin_step(&state);
      const Buffer gradient = random_values<real>(n, 19 + t);
      cpu.add_squares(&state, gradient.data(), n);
      cpu.end_gradient(&state, 1);
      cpu.adamw(masters.data(), working, m.data(), v.data(), gradient.data(), segments, 2, &state,
                {.lr = 1e-2, .weight_decay = 0.1});
    }
    outputs.push_back({"gradient norm", {state.grad_norm}, false});
    keep("adamw weights", Buffer(working, working + n), true);
    keep("adamw masters", masters, false);
    if (!Device::weights_are_masters)
      for (size_t i = 0; i < masters.size(); i++) CHECK(weights[i] == round_bf16(static_cast<float>(masters[i])));
  }
  return outputs;
}

}  // namespace

TEST_CASE("ops: the same bits with 1, 2 and 3 threads") {
  const std::vector<Output> one = all_ops<Cpu<float>>(1);
  for (int threads : {2, 3}) {
    const std::vector<Output> many = all_ops<Cpu<float>>(threads);
    for (size_t i = 0; i < one.size(); i++) {
      INFO(one[i].name << ", " << threads << " threads");
      CHECK(many[i].values == one[i].values);
    }
  }
}

TEST_CASE("ops: float is close to double; the bf16 twin stores bf16, and is off by its rounding only") {
  const std::vector<Output> exact = all_ops<Double>(1), single = all_ops<Cpu<float>>(1),
                            twin = all_ops<Cpu<float, true>>(1);
  for (size_t i = 0; i < exact.size(); i++) {
    INFO(exact[i].name);
    const double error = relative_error(single[i].values, exact[i].values),
                 twin_error = relative_error(twin[i].values, exact[i].values);
    CHECK(error < 1e-5);
    CHECK(twin_error < 5e-2);
    if (!exact[i].stored_as_bf16) continue;
    CHECK(std::all_of(twin[i].values.begin(), twin[i].values.end(),
                      [](double x) { return x == round_bf16(static_cast<float>(x)); }));
    if (exact[i].name != "embedding") CHECK(twin_error > 4 * error);  // an embedding is a copy: no rounding anywhere
  }
}

// ---- the next token -----------------------------------------------------------------------------------------------

TEST_CASE("the next token: the largest, the lowest id among equals, never one that is excluded or not a number") {
  const float nan = std::nanf("");
  const auto greedy = [](const std::vector<float>& logits, int32_t excluded) {
    return choose_token(logits, 0, 1, 0.5f, excluded);
  };
  CHECK(greedy({1, 3, 3, 2}, -1) == 1);
  CHECK(greedy({1, 3, 3, 2}, 1) == 2);
  CHECK(greedy({-0.0f, 0, -1}, -1) == 0);
  CHECK(greedy({nan, -5, nan, -4}, -1) == 3);
  CHECK(greedy({nan, nan}, -1) == 0);
  CHECK(greedy({nan, nan}, 0) == 1);
  const float below_all = -std::numeric_limits<float>::infinity();
  CHECK(greedy({nan, below_all, below_all}, 1) == 2);
  for (const float random : {1e-7f, 0.5f, 1 - 1e-7f}) {
    CHECK(choose_token(std::vector<float>{nan, below_all, 7, below_all}, 1, 1, random, -1) == 2);
    CHECK(choose_token(std::vector<float>{1, -below_all, 9, 8}, 1, 1, random, -1) == 1);
    CHECK(choose_token(std::vector<float>{1, 2, 2, 0}, 1, 0, random, -1) == 1);
    CHECK(choose_token(std::vector<float>{nan, nan, nan}, 1, 1, random, 0) == 1);
  }
  // Half of four equals are the first two of those that are not excluded.
  CHECK(choose_token(std::vector<float>{5, 5, 5, 5, 5}, 2, 0.5, 0.49f, 0) == 1);
  CHECK(choose_token(std::vector<float>{5, 5, 5, 5, 5}, 2, 0.5, 0.51f, 0) == 2);
}

TEST_CASE("the next token: rows are drawn by their numbers, as often as they are likely") {
  Cpu<float> cpu(2);
  const int64_t rows = 4000, V = 3, stride = 4;
  const std::vector<float> one = {std::log(0.25f), std::log(0.5f), std::log(0.25f), 100};
  std::vector<float> logits;
  std::vector<int64_t> index(rows);
  std::vector<int32_t> sequence(rows), token(rows, -1), again(rows, -1);
  for (int64_t r = 0; r < rows; r++) {
    logits.insert(logits.end(), one.begin(), one.end());
    index[r] = r / 2 + (int64_t{1} << 40);
    sequence[r] = static_cast<int32_t>(r % 2);
  }
  Choice choice{1, 1, 3, index.data(), sequence.data()};
  cpu.choose_token(token.data(), logits.data(), rows, V, stride, choice);
  for (int32_t id = 0; id < 3; id++) {
    const double share = id == 1 ? 0.5 : 0.25, n = static_cast<double>(rows);
    CHECK(std::fabs(static_cast<double>(std::count(token.begin(), token.end(), id)) - share * n) <
          4 * std::sqrt(n * share * (1 - share)));
  }
  for (int64_t r = 0; r < 20; r++) {  // alone
    choice.index = &index[r];
    choice.sequence = &sequence[r];
    cpu.choose_token(&again[r], logits.data() + r * stride, 1, V, stride, choice);
    CHECK(again[r] == token[r]);
  }
  CHECK(error_of([&] {
          cpu.choose_token(token.data(), logits.data(), 1, V, stride, {.temperature = 1});
        }).find("number of each row's token") != std::string::npos);
}
