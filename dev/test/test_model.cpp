// What the model is, on the CPU backend: its table of tensors, and the real wiring against the paper's model by
// hand (dev/by_hand.h) and against finite differences; micro-batches, the loss in pieces, noise, threads.
#include <algorithm>
#include <map>

#include "dev/by_hand.h"
#include "dev/test/small_model.h"

using namespace gca;
using namespace gca::test;

namespace {

// The same forward pass as by hand, picks and loss too; and for every tensor the slope that finite differences see.
void check_model(const char* what, const Config& c, int64_t B, int64_t C, bool weighted = false,
                 Selection selection = with_noise()) {
  INFO(std::string(what));
  Model<Cpu<double>> model(c, B, C * c.chunk);
  auto& net = model.net;
  const Batch batch(c, B, C);
  const int64_t T = batch.T, D = c.width, K = c.reach.topk;
  selection.first_row = 7;
  whole_step(net, batch, selection, weighted);

  by_hand::Model hand{net.config};
  for (const Tensor& t : net.table.tensors)
    hand.weights[t.name] = Vec(net.masters + t.offset, net.masters + t.offset + t.size());
  double want_loss = 0;
  for (int64_t b = 0; b < B; b++) {
    const auto noise = [&](size_t g, int64_t n, int64_t m) {
      Selection of_group = selection;
      of_group.group = static_cast<int>(g);
      return selection.noise ? static_cast<double>(gumbel(selection_draw(of_group, b, n, m / 4).word[m % 4])) : 0.0;
    };
    const auto final_n = hand.forward(batch.tokens.data() + b * T, T, noise, selection.picking != Picking::none);
    Vec want;
    for (const Vec& slot : final_n) want.insert(want.end(), slot.begin(), slot.end());
    CHECK(relative_error(net.final_n + b * T * D, want.data(), T * D) < 1e-12);
    for (int64_t i = 0; i < T; i++)
      if (const int32_t target = batch.targets[b * T + i]; target >= 0)
        want_loss += batch.scale * hand.loss(final_n[i], target) *
                     (weighted ? static_cast<double>(batch.weights[b * T + i]) : 1.0);
    for (size_t g = 0; g < c.groups.size(); g++)
      for (int64_t n = 0; n < C; n++)
        for (int64_t k = 0; k < K; k++) {
          const int64_t at = PickTable{C, K}.picked_by(b, n, k);
          const by_hand::Picks& mine = hand.picked[g][n];
          const bool there = k < std::ssize(mine.w);
          CHECK(net.groups[g].pick[at] == (there ? mine.chunk[k] : -1));
          CHECK(net.groups[g].w[at] == doctest::Approx(there ? mine.w[k] : 0).epsilon(1e-10));
        }
  }
  CHECK(net.step_state().loss == doctest::Approx(want_loss).epsilon(1e-12));

  // The picks are held from here on: a pick is a constant.
  const Vec gradient = copied(net.gradient, net.table.size);
  if (selection.picking == Picking::learned) selection.picking = Picking::given;
  const auto loss = [&] {
    model.device.begin_step(net.state);
    net.forward({B, T, selection});
    net.head(batch.scale, false);
    return net.step_state().loss;
  };
  for (const Tensor& t : net.table.tensors) {
    INFO(t.name);
    CHECK(slope_error(net.masters + t.offset, gradient.data() + t.offset, random_values<double>(t.size(), 7), loss) <
          slope_tolerance);
    // No path is dead by mistake: what a row fetches reaches every tensor, once there is a past beyond the chunk
    // before. A single pick always weighs 1, which leaves the retriever's own norm without a gradient.
    const bool memory = t.name.find("enc") != std::string::npos || t.name.find("chunk_") != std::string::npos ||
                        t.name.find("gca") != std::string::npos;
    const bool retriever = t.name.find("lmk") != std::string::npos;
    const bool alive = selection.picking != Picking::none && (memory ? C > 2 : retriever ? C > 3 && K > 1 : true);
    const auto begin = gradient.begin() + t.offset, end = begin + t.size();
    CHECK(std::any_of(begin, end, [](double g) { return g != 0; }) == (alive || (!memory && !retriever)));
  }
}

}  // namespace

// ---- the table ----------------------------------------------------------------------------------------------------

namespace {

// The released model's tensors, in its order.
std::vector<std::string> released_names(const Config& c) {
  std::vector<std::string> names = {"model.embed_tokens"};
  const auto layer = [&](const std::string& at, bool upper) {
    for (const char* name :
         {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"})
      names.push_back(at + name);
    if (upper)
      for (const char* name : {"gca.pre_norm", "gca.q_proj", "gca.o_proj"}) names.push_back(at + name);
    for (const char* name : {"post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
      names.push_back(at + name);
  };
  for (int64_t i = 0; i < c.lower; i++) layer(str("model.lower_layers.", i, "."), false);
  if (!c.groups.empty()) {
    names.push_back("model.enc_prenorm");
    for (int64_t i = 0; i < c.encoder; i++) layer(str("model.encoder.layers.", i, "."), false);
    for (const char* name : {"model.encoder.norm", "model.chunk_k_proj", "model.chunk_v_proj"}) names.push_back(name);
  }
  for (size_t g = 0; g < c.groups.size(); g++) {
    names.push_back(str("model.lmk_norms.", g));
    for (int64_t i = 0; i < c.groups[g]; i++) layer(str("model.upper_layers.", g, ".", i, "."), true);
  }
  names.push_back("model.norm");
  for (std::string& name : names) name += ".weight";
  return names;
}

}  // namespace

TEST_CASE("tensor table: the parameters of the paper's models") {
  // Of the tensors that the released models have; parameters() counts all that there are.
  const auto parameters = [](const char* name, int64_t vocab) {
    for (const Preset& preset : presets())
      if (!strcmp(preset.name, name)) {
        Config config = preset.config;
        config.vocab = vocab;
        config.validate();
        const TensorTable table(config, 1, 16);
        std::map<std::string, int64_t> sizes;
        int64_t released = 0, all = 0;
        for (const Tensor& t : table.tensors) all += sizes[t.name] = t.size();
        for (const std::string& tensor : released_names(config)) released += sizes.at(tensor);
        CHECK(table.parameters() == all);
        return released;
      }
    return int64_t{0};
  };
  CHECK(parameters("drt", 50304) == 146010624);
  CHECK(parameters("drt", 50265) == 146010624 - 29952);
  CHECK(parameters("drt-x2", 50304) == 146011392);
  CHECK(parameters("swa", 50304) == 123587328);
  CHECK(parameters("swa-14", 50304) == 137746176);
  CHECK(parameters("small", 263) > 0);
  CHECK(parameters("tiny", 263) > 0);
}

TEST_CASE("tensor table: names in the released model's order, shapes, neighbours, segments") {
  Config c = small({1, 2});
  c.lower = 1;
  c.vocab = 10;
  const std::vector<std::string> names = released_names(c);

  const int64_t alignment = 16;
  const TensorTable table(c, 16, alignment);
  CHECK(table.padded_vocab == 16);
  CHECK(table.size % alignment == 0);
  REQUIRE(table.tensors.size() == names.size());
  int64_t end = 0, segments_hold = 0;
  for (size_t i = 0; i < names.size(); i++) {
    const Tensor& t = table.tensors[i];
    INFO(names[i]);
    CHECK(t.name == names[i]);
    const bool gain = t.name.find("norm") != std::string::npos;
    const bool feed_forward =
        t.name.find("gate_proj") != std::string::npos || t.name.find("up_proj") != std::string::npos;
    CHECK(t.columns == (gain ? 0 : t.name.find("down_proj") != std::string::npos ? c.ffn : c.width));
    CHECK(t.rows == (i == 0 ? c.vocab : feed_forward ? c.ffn : c.width));
    CHECK(t.decay == !gain);
    // One product each: k follows q at once, v follows k, up follows gate, chunk_v follows chunk_k. All others are
    // aligned.
    const bool follows = t.name.find("self_attn.k_") != std::string::npos ||
                         t.name.find("self_attn.v_") != std::string::npos ||
                         t.name.find("mlp.up") != std::string::npos || t.name.find("chunk_v") != std::string::npos;
    CHECK(t.offset == (follows ? end : round_up(end, alignment)));
    end = t.offset + (i == 0 ? table.padded_vocab * c.width : t.size());
    int holders = 0;
    for (const Segment& s : table.segments)
      if (s.offset <= t.offset && end <= s.offset + s.size) holders += s.decay == t.decay ? 1 : 100;
    CHECK(holders == 1);
  }
  CHECK(end <= table.size);
  for (size_t i = 0; i < table.segments.size(); i++) {
    segments_hold += table.segments[i].size;
    if (i) CHECK(table.segments[i].offset >= table.segments[i - 1].offset + table.segments[i - 1].size);
  }
  CHECK(segments_hold <= table.size);
}

TEST_CASE("config: every wrong size is refused by the name of its flag") {
  const auto complaint = [](auto&& change) {
    Config c = small({1, 1});
    change(c);
    try {
      c.validate();
    } catch (const UsageError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  CHECK(complaint([](Config&) {}) == "accepted");
  const auto names = [](const std::string& text, const char* flag) {
    return text.rfind(std::string("--") + flag + ":", 0) == 0;
  };
  CHECK(names(complaint([](Config& c) { c.vocab = 1; }), "vocab"));
  CHECK(names(complaint([](Config& c) { c.width = 0; }), "width"));
  CHECK(names(complaint([](Config& c) { c.heads = 5; }), "heads"));
  CHECK(names(complaint([](Config& c) { c.heads = 0; }), "heads"));
  CHECK(names(complaint([](Config& c) { c.heads = 4; }), "heads"));  // three columns a head: no pairs to turn
  CHECK(names(complaint([](Config& c) { c.ffn = 0; }), "ffn"));
  CHECK(names(complaint([](Config& c) { c.lower = -1; }), "lower"));
  CHECK(names(complaint([](Config& c) {
                c.lower = 0;
                c.groups = {};
              }),
              "lower"));
  CHECK(names(complaint([](Config& c) { c.groups = {1, 0}; }), "groups"));
  CHECK(names(complaint([](Config& c) { c.encoder = -1; }), "encoder"));
  CHECK(names(complaint([](Config& c) { c.chunk = 1; }), "chunk"));
  CHECK(names(complaint([](Config& c) { c.reach.topk = 0; }), "topk"));
  CHECK(names(complaint([](Config& c) { c.reach.topk = max_topk + 1; }), "topk"));
  CHECK(names(complaint([](Config& c) { c.reach.window = -1; }), "window"));
}

// ---- the wiring ---------------------------------------------------------------------------------------------------

TEST_CASE("model: forward as written by hand, gradients as finite differences see them") {
  Config baseline = small({});
  baseline.encoder = 0;
  baseline.lower = 3;
  check_model("baseline", baseline, 2, 3, true);
  check_model("one group", small({2}), 2, 5, true);
  check_model("two groups", small({1, 2}), 2, 5);
  check_model("without noise", small({1, 1}), 1, 5, false, Selection{});
  Config plain_softmax = small({1, 1});
  plain_softmax.null_slot = false;
  check_model("null slot off", plain_softmax, 2, 4, true);
  check_model("more picks than past chunks", small({1}, 5, 8), 1, 5);
  check_model("one pick", small({1}, 5, 1), 1, 5);
  check_model("two slots a chunk", small({1}, 2, 3), 1, 7);
  check_model("one chunk: no past", small({1}), 2, 1);
  check_model("two chunks: nothing fetched yet", small({1}), 1, 2);
  check_model("three chunks: one fetch", small({1}), 1, 3);
  Config no_lower = small({1, 1});
  no_lower.lower = 0;
  check_model("no lower layers", no_lower, 1, 5);
  Config no_encoder = small({2});
  no_encoder.encoder = 0;
  check_model("no encoder layers", no_encoder, 1, 5);
  Config wide = small({1}, 8, 2);
  wide.reach.window = 1000;
  wide.heads = 1;
  wide.width = 10;
  wide.encoder = 2;
  check_model("a window longer than the row, one head", wide, 1, 4, true);
  Config blind = small({1});
  blind.reach.window = 0;
  Model<Cpu<double>> model(blind, 1, 20);  // a window of one slot leaves the lower layers' q and k without a gradient
  whole_step(model.net, Batch(blind, 1, 4), with_noise());
  CHECK(std::isfinite(model.net.step_state().loss));
  check_model("retrieval turned off", small({1}), 1, 5, false, of_kind(Picking::none));
}

TEST_CASE("model: two micro-batches are one batch, noise and loss weights included") {
  const Config c = small({1, 1});
  const Batch batch(c, 4, 5);
  Model<Cpu<double>> whole(c, 4, batch.T), halves(c, 2, batch.T);
  whole_step(whole.net, batch, with_noise(), true);
  halves.net.begin_step();
  for (int64_t first : {0, 2}) {
    Selection selection = with_noise();
    selection.first_row = first;
    halves.net.upload(batch.tokens.data() + first * batch.T, batch.targets.data() + first * batch.T,
                      batch.weights.data() + first * batch.T, 2 * batch.T);
    halves.net.forward({2, batch.T, selection});
    const int64_t entries = 2 * 6 * c.reach.topk;
    for (size_t g = 0; g < 2; g++)
      CHECK(same_bits(copied(halves.net.groups[g].pick, entries),
                      copied(whole.net.groups[g].pick + first / 2 * entries, entries)));
    halves.net.head(batch.scale, true);
    halves.net.backward();
  }
  CHECK(relative_error(halves.net.gradient, whole.net.gradient, whole.net.table.size) < 1e-12);
  CHECK(halves.net.step_state().loss == doctest::Approx(whole.net.step_state().loss).epsilon(1e-13));
  CHECK(halves.net.step_state().plain_loss == doctest::Approx(whole.net.step_state().plain_loss).epsilon(1e-13));
}

TEST_CASE("model: the vocabulary's loss in pieces is the loss in one") {
  Config c = small({1});
  c.vocab = 20000;  // logits of 140 slots do not fit one piece
  const Batch batch(c, 4, 7);
  Model<Cpu<double>> model(c, 4, batch.T);
  REQUIRE(model.net.logits_rows() < batch.B * batch.T);
  whole_step(model.net, batch, with_noise(), true);
  const Vec gradient = copied(model.net.gradient, model.net.table.size);
  const double loss = model.net.step_state().loss;
  // The same rows one at a time: every piece then begins elsewhere.
  Model<Cpu<double>> rows(c, 1, batch.T);
  rows.net.begin_step();
  for (int64_t b = 0; b < batch.B; b++) {
    Selection selection = with_noise();
    selection.first_row = b;
    rows.net.upload(batch.tokens.data() + b * batch.T, batch.targets.data() + b * batch.T,
                    batch.weights.data() + b * batch.T, batch.T);
    rows.net.forward({1, batch.T, selection});
    rows.net.head(batch.scale, true);
    rows.net.backward();
  }
  CHECK(rows.net.step_state().loss == doctest::Approx(loss).epsilon(1e-13));
  CHECK(relative_error(rows.net.gradient, gradient.data(), model.net.table.size) < 1e-12);
}

TEST_CASE("model: stretches of the gradient are announced once, last first, when they are final") {
  for (const auto& groups : {std::vector<int64_t>{}, {2}, {1, 2}}) {
    const Config c = small(groups);
    const Batch batch(c, 2, 4);
    Model<Cpu<double>> model(c, 2, batch.T);
    int64_t last = model.net.table.size;
    Vec announced(last, std::nan(""));
    model.net.grads_ready = [&](int64_t begin, int64_t end) {
      CHECK(end == last);
      CHECK(begin < end);
      std::copy(model.net.gradient + begin, model.net.gradient + end, announced.begin() + begin);
      last = begin;
    };
    whole_step(model.net, batch, with_noise());
    CHECK(last == 0);
    CHECK(announced == copied(model.net.gradient, model.net.table.size));
  }
}

TEST_CASE("model: noise drawn, and the same noise given, are one") {
  const Config c = small({1, 1});
  const int64_t B = 2, C = 6;
  const Batch batch(c, B, C);
  Model<Cpu<double>> drawn(c, B, batch.T), given(c, B, batch.T), other(c, B, batch.T);
  forward(drawn.net, batch, with_noise());
  std::vector<float> noise(2 * B * C * C, std::nanf(""));
  for (int g = 0; g < 2; g++)
    for (int64_t b = 0; b < B; b++)
      for (int64_t n = 0; n < C; n++)
        for (int64_t m = 0; m < n; m++) {
          Selection selection = with_noise();
          selection.group = g;
          noise[((g * B + b) * C + n) * C + m] = gumbel(selection_draw(selection, b, n, m / 4).word[m % 4]);
        }
  Selection selection;
  selection.noise = true;
  selection.given_noise = noise.data();
  forward(given.net, batch, selection);
  CHECK(same_bits(copied(drawn.net.final_n, B * batch.T * c.width), copied(given.net.final_n, B * batch.T * c.width)));
  // Another step draws other noise, and with it other picks.
  forward(other.net, batch, with_noise(4));
  CHECK(!same_bits(copied(drawn.net.groups[0].pick, PickTable{C, c.reach.topk}.size(B)),
                   copied(other.net.groups[0].pick, PickTable{C, c.reach.topk}.size(B))));
  // The two groups draw apart: with the same scores they would pick alike, so the draws themselves are compared.
  CHECK(noise[C] != noise[B * C * C + C]);
}

TEST_CASE("model: the same bits with 1, 2 and 3 threads, forward, gradients and two updates") {
  Config c = small({1, 1}, 16, 3);
  c.width = 48;
  c.ffn = 100;
  c.vocab = 300;
  c.reach.window = 20;
  const Batch batch(c, 3, 8);
  using Bits = std::vector<float>;
  std::vector<Bits> one;
  for (int threads : {1, 2, 3}) {
    Model<Cpu<float>> model(c, 3, batch.T, Use::training, threads);
    auto& net = model.net;
    std::vector<Bits> all;
    for (int64_t step = 0; step < 2; step++) {
      whole_step(net, batch, with_noise(step), true);
      all.push_back(copied(net.final_n, 3 * batch.T * c.width));
      all.push_back(copied(net.loss, 3 * batch.T));
      all.push_back(copied(net.gradient, net.table.size));
      net.update({.lr = 1e-2, .weight_decay = 0.1});
      const StepState state = net.step_state();
      all.push_back({static_cast<float>(state.loss), static_cast<float>(state.grad_norm)});
      all.push_back(copied(net.masters, net.table.size));
      all.push_back(copied(net.adam_m, net.table.size));
      all.push_back(copied(net.adam_v, net.table.size));
    }
    if (threads == 1) one = all;
    CAPTURE(threads);
    for (size_t i = 0; i < all.size(); i++) {
      CAPTURE(i);
      CHECK(same_bits(all[i], one[i]));
    }
  }
}
