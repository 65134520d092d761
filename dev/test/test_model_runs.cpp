// The model on the CPU backend at work: streams, inference, recomputation, steps that are not finite, the ablations,
// the bf16 twin, the initial weights.
#include <algorithm>
#include <set>

#include "dev/test/small_model.h"

using namespace gca;
using namespace gca::test;

// ---- streams ------------------------------------------------------------------------------------------------------

TEST_CASE("stream: a row read in segments has the same bits as in one pass") {
  const int64_t C = 9;
  for (const auto& groups : {std::vector<int64_t>{}, {2}, {1, 2}})
    for (int64_t window : {0, 3, 5, 12, 1000}) {
      Config c = small(groups);
      c.reach.window = window;
      const int64_t S = c.chunk, T = C * S, D = c.width, K = c.reach.topk;
      const Batch batch(c, 1, C);
      Model<Cpu<double>> whole(c, 1, T, Use::inference), segments(c, 1, 3 * S, Use::inference);
      auto& net = segments.net;
      typename DRT<Cpu<double>>::StreamState stream;
      net.open(stream, 1, C);
      typename DRT<Cpu<double>>::StreamState other;
      net.open(other, 1, 2);
      for (const Selection& selection : {Selection{}, with_noise()}) {
        forward(whole.net, batch, selection);
        const std::vector<std::vector<int64_t>> cuts = {{3 * S, 3 * S, 3 * S},
                                                        {S, 2 * S, 3 * S, S, 2 * S},
                                                        std::vector<int64_t>(static_cast<size_t>(T), 1),
                                                        {2 * S, 1, 2, 2, S, S - 1, 1, 3 * S, 3, 2}};
        for (const std::vector<int64_t>& cut : cuts) {
          CAPTURE(groups.size());
          CAPTURE(window);
          CAPTURE(cut.size());
          net.rewind(stream);
          Vec final_n;
          int64_t first = 0;
          bool picks_agree = true;
          for (int64_t count : cut) {
            net.upload(batch.tokens.data() + first, nullptr, nullptr, count);
            net.forward({1, count, selection, &stream});
            final_n.insert(final_n.end(), net.final_n, net.final_n + count * D);
            const int64_t done = (first + count) / S - first / S;
            first += count;
            CHECK(stream.slots == first);
            for (size_t g = 0; g < groups.size(); g++) {
              // Row 1.. hold what the completed chunks picked, and the stream then the last of them.
              const auto &mine = net.groups[g], &all = whole.net.groups[g];
              picks_agree = picks_agree && same_bits(copied(stream.pick[g], K), copied(all.pick + first / S * K, K)) &&
                            same_bits(copied(stream.w[g], K), copied(all.w + first / S * K, K));
              for (int64_t n = 0; n < done; n++)
                picks_agree = picks_agree && same_bits(copied(mine.pick + (n + 1) * K, K),
                                                       copied(all.pick + (first / S - done + n + 1) * K, K));
            }
            // Another stream of the same model in between changes nothing.
            net.rewind(other);
            net.upload(batch.tokens.data(), nullptr, nullptr, 2 * S);
            net.forward({1, 2 * S, selection, &other});
          }
          REQUIRE(first == T);
          CHECK(picks_agree);
          CHECK(same_bits(final_n, copied(whole.net.final_n, T * D)));
        }
      }
      net.close(other);
      net.close(stream);
    }
}

TEST_CASE("stream: segments that end inside a chunk they did not begin, and a full memory, are refused") {
  const Config c = small({1});
  const Batch batch(c, 1, 3);
  Model<Cpu<double>> model(c, 1, 2 * c.chunk, Use::inference);
  typename DRT<Cpu<double>>::StreamState stream;
  model.net.open(stream, 1, 2);
  model.net.upload(batch.tokens.data(), nullptr, nullptr, 2 * c.chunk);
  CHECK_THROWS_AS(model.net.forward({1, c.chunk + 1, {}, &stream}), Error);
  model.net.rewind(stream);
  model.net.forward({1, 2, {}, &stream});
  CHECK_THROWS_AS(model.net.forward({1, c.chunk, {}, &stream}), Error);
  model.net.rewind(stream);
  model.net.forward({1, 2 * c.chunk, {}, &stream});
  CHECK_THROWS_AS(model.net.forward({1, c.chunk, {}, &stream}), Error);
  CHECK_THROWS_AS(model.net.forward({1, 3 * c.chunk, {}, &stream}), Error);  // more than was planned for
  model.net.close(stream);
}

TEST_CASE("inference keeps one layer's activations and gives training's bits") {
  const Config c = small({2, 1});
  const Batch batch(c, 2, 6);
  Model<Cpu<double>> training(c, 2, batch.T), inference(c, 2, batch.T, Use::inference);
  forward(training.net, batch, {});
  forward(inference.net, batch, {});
  CHECK(same_bits(copied(training.net.final_n, 2 * batch.T * c.width),
                  copied(inference.net.final_n, 2 * batch.T * c.width)));
  CHECK(inference.net.activation_memory().total_bytes() < training.net.activation_memory().total_bytes());
  CHECK(inference.net.gradient == nullptr);
}

TEST_CASE("recompute: the same bits in less memory") {
  for (const Config& c : {small({2, 1}), small({})}) {
    const Batch batch(c, 2, 6);
    std::vector<float> gradient, weights;
    int64_t n_bytes = 0;
    for (const Recompute recompute : {Recompute::none, Recompute::norms, Recompute::layers}) {
      CAPTURE(static_cast<int>(recompute));
      Model<Cpu<float>> model(c, 2, batch.T, Use::training, 1, recompute);
      for (int64_t step = 0; step < 2; step++) {
        whole_step(model.net, batch, with_noise(step));
        model.net.update({.lr = 1e-2});
      }
      const std::vector<float> g = packed(model.net, model.net.gradient), w = packed(model.net, model.net.masters);
      const int64_t used = model.net.activation_memory().total_bytes();
      if (recompute != Recompute::none) {
        CHECK(same_bits(g, gradient));
        CHECK(same_bits(w, weights));
        CHECK(used < n_bytes);
      }
      gradient = g;
      weights = w;
      n_bytes = used;
    }
  }
}

// ---- steps --------------------------------------------------------------------------------------------------------

TEST_CASE("model: a few steps lower the loss") {
  const Config c = small({1, 1});
  const Batch batch(c, 2, 5);
  Model<Cpu<double>> model(c, 2, batch.T);
  double first = 0;
  for (int64_t step = 0; step < 20; step++) {
    whole_step(model.net, batch, with_noise(step));
    if (step == 0) first = model.net.step_state().loss;
    model.net.update({.lr = 1e-2, .weight_decay = 0.01});
  }
  CHECK(model.net.step_state().adam_steps == 20);
  CHECK(model.net.step_state().loss < 0.7 * first);
}

TEST_CASE("model: a step whose loss or gradient is not finite changes nothing, and the next one works") {
  const Config c = small({1});
  const Batch batch(c, 2, 4);
  Batch poisoned = batch;
  poisoned.weights[2] = std::nanf("");
  REQUIRE(poisoned.targets[2] >= 0);
  const AdamW hyper{.lr = 1e-2, .weight_decay = 0.1};
  Model<Cpu<double>> model(c, 2, batch.T), undisturbed(c, 2, batch.T);
  auto& net = model.net;
  for (Model<Cpu<double>>* each : {&model, &undisturbed}) {
    whole_step(each->net, batch, with_noise(0), true);
    each->net.update(hyper);
  }
  const Vec w = copied(net.masters, net.table.size), m = copied(net.adam_m, net.table.size),
            v = copied(net.adam_v, net.table.size);
  for (int64_t bad = 1; bad <= 3; bad++) {
    if (bad < 3) {
      whole_step(net, poisoned, with_noise(bad), true);
    } else {  // a gradient alone
      whole_step(net, batch, with_noise(bad), true);
      net.gradient[tensor_of(net, "model.norm.weight").offset + 3] = std::numeric_limits<double>::infinity();
    }
    net.update(hyper);
    const StepState state = net.step_state();
    CHECK(state.skip == 1);
    CHECK(state.skipped == bad);
    CHECK(state.skipped_in_a_row == bad);
    CHECK(state.adam_steps == 1);
    CHECK(same_bits(w, copied(net.masters, net.table.size)));
    CHECK(same_bits(m, copied(net.adam_m, net.table.size)));
    CHECK(same_bits(v, copied(net.adam_v, net.table.size)));
  }
  // As if the bad steps had not been.
  for (Model<Cpu<double>>* each : {&model, &undisturbed}) {
    whole_step(each->net, batch, with_noise(9), true);
    each->net.update(hyper);
  }
  CHECK(net.step_state().skip == 0);
  CHECK(net.step_state().skipped == 3);
  CHECK(net.step_state().skipped_in_a_row == 0);
  CHECK(net.step_state().adam_steps == 2);
  CHECK(!same_bits(w, copied(net.masters, net.table.size)));
  CHECK(same_bits(copied(net.masters, net.table.size), copied(undisturbed.net.masters, net.table.size)));
}

TEST_CASE("model: a weight that is no number stops the step, wherever it sits") {
  const Config c = small({1, 1});
  const Batch batch(c, 1, 5);
  Model<Cpu<double>> model(c, 1, batch.T);
  auto& net = model.net;
  for (const Tensor& t : net.table.tensors) {
    INFO(t.name);
    double& weight = net.masters[t.offset + t.size() - 1];  // the embedding's last row is the landmark's
    const double good = weight;
    weight = std::nan("");
    whole_step(net, batch, with_noise());
    net.update({.lr = 1e-2});
    CHECK(net.step_state().skip == 1);
    weight = good;
  }
  CHECK(net.step_state().adam_steps == 0);
}

TEST_CASE("model: the gradient is linear in what that of the scores is multiplied by, and at 0 no retriever learns") {
  const Config c = small({2});  // a second group's would pass through the first's: a square
  const Batch batch(c, 2, 6);
  const auto gradient = [&](double score_gradient) {
    Model<Cpu<double>> model(c, 2, batch.T);
    model.net.begin_step();
    model.net.upload(batch.tokens.data(), batch.targets.data(), nullptr, 2 * batch.T);
    model.net.forward({.B = 2, .T = batch.T, .selection = with_noise(), .score_gradient = score_gradient});
    model.net.head(batch.scale, true);
    model.net.backward();
    const std::vector<double> all = packed(model.net, model.net.gradient);
    for (const int64_t gain : model.net.table.lmk_norms)
      for (int64_t j = 0; j < c.width; j++) CHECK((model.net.gradient[gain + j] == 0) == (score_gradient == 0));
    return all;
  };
  const std::vector<double> none = gradient(0), once = gradient(1), thrice = gradient(3);
  double largest = 0;
  for (size_t i = 0; i < once.size(); i++) {
    CHECK(thrice[i] - once[i] == doctest::Approx(2 * (once[i] - none[i])).epsilon(1e-9).scale(1e-3));
    largest = std::max(largest, std::fabs(once[i] - none[i]));
  }
  CHECK(largest > 1e-4);
}

TEST_CASE("a step may fetch fewer chunks and look back less than its run's settings say") {
  Config most = small({1, 1}, 5, 3), less = most;
  most.reach.window = 20;
  less.reach = {.topk = 2, .window = 4};
  const int64_t B = 2, C = 6;
  const Batch batch(most, B, C);
  Model<Cpu<double>> varying(most, B, batch.T), fixed(less, B, batch.T);
  const auto gradients = [&](auto& net) {
    whole_step(net, batch, with_noise());
    return packed(net, net.gradient);
  };
  const Vec before = gradients(varying.net), want = gradients(fixed.net);
  varying.net.reach = less.reach;
  CHECK(same_bits(gradients(varying.net), want));
  varying.net.reach = most.reach;
  CHECK(same_bits(gradients(varying.net), before));
  CHECK(!same_bits(before, want));
  // More than buffers have room for is refused, and so is another reach in the middle of a stream.
  varying.net.reach.topk = 4;
  CHECK_THROWS(gradients(varying.net));
  Model<Cpu<double>> reader(most, 1, most.chunk, Use::inference);
  DRT<Cpu<double>>::StreamState stream;
  reader.net.open(stream, 1, C);
  reader.net.upload(batch.tokens.data(), nullptr, nullptr, most.chunk);
  reader.net.forward({1, most.chunk, {}, &stream});
  reader.net.reach = less.reach;
  CHECK_THROWS(reader.net.forward({1, most.chunk, {}, &stream}));
  reader.net.close(stream);
}

// ---- ablations, bf16 ----------------------------------------------------------------------------------------------

TEST_CASE("ablations: no retrieval fetches zero, random retrieval fetches other chunks of the past") {
  const Config c = small({1, 1});
  const int64_t B = 2, C = 7;
  const Batch batch(c, B, C);
  Model<Cpu<double>> model(c, B, batch.T);
  auto& net = model.net;
  const int64_t entries = PickTable{C, c.reach.topk}.size(B), n = B * batch.T * c.width;
  forward(net, batch, {});
  const Vec learned = copied(net.final_n, n);
  const auto learned_picks = copied(net.groups[0].pick, entries);
  forward(net, batch, of_kind(Picking::none));
  for (auto& group : net.groups) {
    const Vec fetched = copied(group.layers[0].fetched, n);
    CHECK(std::all_of(fetched.begin(), fetched.end(), [](double x) { return x == 0; }));
    CHECK(std::all_of(group.pick, group.pick + entries, [](int32_t m) { return m == -1; }));
  }
  // Chunks 0 and 1 have nothing to fetch either way; later ones differ.
  const int64_t two_chunks = 2 * c.chunk * c.width, row = batch.T * c.width;
  for (int64_t b = 0; b < B; b++) {
    CHECK(same_bits(copied(net.final_n + b * row, two_chunks), copied(learned.data() + b * row, two_chunks)));
    CHECK(!same_bits(copied(net.final_n + b * row + two_chunks, two_chunks),
                     copied(learned.data() + b * row + two_chunks, two_chunks)));
  }
  forward(net, batch, of_kind(Picking::uniform));
  const auto random_picks = copied(net.groups[0].pick, entries);
  CHECK(random_picks != learned_picks);
  CHECK(random_picks != copied(net.groups[1].pick, entries));  // each group draws its own
  for (int64_t i = 0; i < entries; i++) CHECK(random_picks[i] < std::max<int64_t>(0, i / c.reach.topk % (C + 1) - 1));
  for (int64_t i = 0; i < entries; i++) CHECK((random_picks[i] >= 0) == (learned_picks[i] >= 0));
}

TEST_CASE("given picks: those of the newest chunks give what newest picks give") {
  Config c = small({1, 1}, 8, 2);
  const int64_t B = 2, C = 5, K = c.reach.topk;
  const Batch batch(c, B, C);
  Model<Cpu<double>> model(c, B, batch.T);
  auto& net = model.net;
  Selection selection;
  selection.picking = Picking::newest;
  whole_step(net, batch, selection);
  const std::vector<double> newest(net.final_n, net.final_n + B * batch.T * c.width);
  std::vector<int32_t> picks;
  for (int64_t b = 0; b < B; b++)
    for (int64_t chunk = 0; chunk < C; chunk++) {
      const int32_t* of_chunk = net.groups[0].pick + PickTable{C, K}.picked_by(b, chunk);
      picks.insert(picks.end(), of_chunk, of_chunk + K);
    }
  whole_step(net, batch, with_noise());
  CHECK(std::vector<double>(net.final_n, net.final_n + B * batch.T * c.width) != newest);
  selection.picking = Picking::given;
  selection.given_picks = picks.data();
  selection.given_chunks = C;
  whole_step(net, batch, selection);
  CHECK(std::vector<double>(net.final_n, net.final_n + B * batch.T * c.width) == newest);
}

TEST_CASE("bf16 twin of the model: stores bf16, and follows double with the same picks") {
  Config c = small({1, 1}, 8, 2);
  c.width = 24;
  c.ffn = 40;
  const int64_t B = 2, C = 5;
  const Batch batch(c, B, C);
  Model<Cpu<double>> exact(c, B, batch.T);
  Model<Cpu<float>> single(c, B, batch.T);
  Model<Cpu<float, true>> twin(c, B, batch.T);
  whole_step(exact.net, batch, with_noise());
  const auto errors = [&](auto& net) {
    for (size_t g = 0; g < 2; g++)
      std::copy_n(exact.net.groups[g].pick, PickTable{C, c.reach.topk}.size(B), net.groups[g].pick);
    Selection given = with_noise();
    given.picking = Picking::given;
    whole_step(net, batch, given);
    return std::array<double, 3>{relative_error(net.final_n, exact.net.final_n, B * batch.T * c.width),
                                 relative_error(packed(net, net.gradient), packed(exact.net, exact.net.gradient)),
                                 std::fabs(net.step_state().loss / exact.net.step_state().loss - 1)};
  };
  const auto single_errors = errors(single.net), twin_errors = errors(twin.net);
  for (size_t i = 0; i < 3; i++) {
    CAPTURE(i);
    CHECK(single_errors[i] < 1e-4);
    CHECK(twin_errors[i] > 4 * single_errors[i]);
    CHECK(twin_errors[i] < 5e-2);
  }
  const auto stored = [](const float* x, int64_t n) {
    return std::all_of(x, x + n, [](float value) { return value == round_bf16(value); });
  };
  auto& net = twin.net;
  CHECK(stored(net.weights, net.table.size));
  CHECK(!stored(net.masters, net.table.size));
  CHECK(stored(net.final_n, B * batch.T * c.width));
  CHECK(stored(net.enc_out, B * batch.T * c.width));
  CHECK(stored(net.kv, B * batch.T * 2 * c.width));
  CHECK(stored(net.groups[1].layers[0].out, B * batch.T * c.width));
  net.update({.lr = 1e-2});
  bool follows = true;
  for (int64_t i = 0; i < net.table.size; i++) follows = follows && net.weights[i] == round_bf16(net.masters[i]);
  CHECK(follows);
}

// ---- initial weights ----------------------------------------------------------------------------------------------

TEST_CASE("initial weights: a tensor starts from its name's numbers, whatever other tensors there are") {
  const Config few = small({1}), more = [] {
    Config c = small({1, 1});
    c.lower = 3;
    return c;
  }();
  Model<Cpu<double>> a(few, 1, few.chunk), b(more, 1, more.chunk);
  a.net.initialise(42, a.device.pool());
  b.net.initialise(42, b.device.pool());
  size_t shared = 0;
  for (const Tensor& t : a.net.table.tensors)
    for (const Tensor& u : b.net.table.tensors)
      if (t.name == u.name) {
        shared++;
        CHECK(same_bits(copied(a.net.masters + t.offset, t.size()), copied(b.net.masters + u.offset, u.size())));
      }
  CHECK(shared == a.net.table.tensors.size());
  // No two names of the largest model have the same numbers.
  Config largest{.vocab = 2, .width = 2, .heads = 1, .ffn = 1, .lower = 512, .groups = {256, 256}, .encoder = 1024};
  std::set<uint32_t> hashes;
  const TensorTable table(largest, 1, 1);
  for (const Tensor& t : table.tensors) hashes.insert(name_hash(t.name));
  CHECK(hashes.size() == table.tensors.size());
}

TEST_CASE("initial weights: normal(0, 0.02) and ones, the same for any precision and number of threads") {
  Config c = small({1});
  c.vocab = 3001;
  c.width = 60;
  Model<Cpu<double>> exact(c, 1, c.chunk);
  Model<Cpu<float>> single(c, 1, c.chunk, Use::training, 3);
  Model<Cpu<float, true>> twin(c, 1, c.chunk);
  exact.net.initialise(42, exact.device.pool());
  single.net.initialise(42, single.device.pool());
  twin.net.initialise(42, twin.device.pool());
  const Vec all = packed(exact.net, exact.net.masters);
  const std::vector<float> floats = packed(single.net, single.net.masters), stored = packed(twin.net, twin.net.weights);
  CHECK(all == Vec(floats.begin(), floats.end()));
  CHECK(same_bits(floats, packed(twin.net, twin.net.masters)));
  CHECK(std::equal(stored.begin(), stored.end(), floats.begin(),
                   [](float weight, float master) { return weight == round_bf16(master); }));
  const auto& table = exact.net.table;
  for (const Tensor& t : table.tensors) {
    INFO(t.name);
    bool ones = true;
    double sum = 0, squares = 0, within = 0;
    for (int64_t i = 0; i < t.size(); i++) {
      const double x = exact.net.masters[t.offset + i];
      ones = ones && x == 1;
      sum += x;
      squares += x * x;
      within += std::fabs(x) < 0.02;
    }
    CHECK(ones == (t.columns == 0));
    if (!t.columns) continue;
    // Five standard errors of n normal draws.
    const double n = static_cast<double>(t.size()), deviation = 0.02;
    CHECK(std::fabs(sum / n) < 5 * deviation / std::sqrt(n));
    CHECK(std::fabs(std::sqrt(squares / n) - deviation) < 5 * deviation / std::sqrt(2 * n));
    CHECK(std::fabs(within / n - 0.682689) < 5 * std::sqrt(0.682689 * 0.317311 / n));
  }
  // Tensors, seeds and neighbours draw different numbers.
  const Tensor q = tensor_of(exact.net, "model.lower_layers.0.self_attn.q_proj.weight"),
               k = tensor_of(exact.net, "model.lower_layers.0.self_attn.k_proj.weight");
  CHECK(!same_bits(copied(exact.net.masters + q.offset, q.size()), copied(exact.net.masters + k.offset, k.size())));
  const Vec before = copied(exact.net.masters, table.size);
  double product = 0, next = 0;
  for (int64_t i = 0; i + 2 < c.vocab * c.width; i++) {
    product += before[i] * before[i + 1];
    next += before[i] * before[i + 2];
  }
  const double bound = 5 * 0.02 * 0.02 * std::sqrt(static_cast<double>(c.vocab * c.width));
  CHECK(std::fabs(product) < bound);
  CHECK(std::fabs(next) < bound);
  exact.net.initialise(43, exact.device.pool());
  CHECK(!same_bits(before, copied(exact.net.masters, table.size)));
}
