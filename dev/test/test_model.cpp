// What the model is, on the CPU backend: its table of tensors, and the real wiring against the paper's model written
// out slot by slot and against finite differences; micro-batches, the loss in pieces, noise, threads.
#include <algorithm>
#include <functional>
#include <map>

#include "dev/test/small_model.h"

using namespace gca;
using namespace gca::test;

namespace {

// ---- the model, written out ---------------------------------------------------------------------------------------
// One row, in double, a vector a slot, nothing shared with the ops.
struct ByHand {
  using Slots = std::vector<Vec>;
  const Config& c;
  std::map<std::string, Vec> weight;
  std::vector<std::vector<std::vector<int32_t>>> pick;  // [group][fetching chunk], as many as the past has, K at most
  std::vector<std::vector<Vec>> w;

  template <class Net>
  explicit ByHand(const Net& net) : c(net.config) {
    for (const Tensor& t : net.table.tensors)
      weight[t.name] = Vec(net.masters + t.offset, net.masters + t.offset + t.size());
  }

  static double dot(const double* a, const double* b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
  }
  Vec norm(const Vec& x, const std::string& gain, double eps) const {
    const Vec& g = weight.at(gain + ".weight");
    const double rms = std::sqrt(dot(x.data(), x.data(), c.width) / static_cast<double>(c.width) + eps);
    Vec y(x.size());
    for (size_t j = 0; j < x.size(); j++) y[j] = g[j] * x[j] / rms;
    return y;
  }
  Vec linear(const Vec& x, const std::string& matrix) const {
    const Vec& W = weight.at(matrix + ".weight");
    Vec y(W.size() / x.size());
    for (size_t o = 0; o < y.size(); o++) y[o] = dot(&W[o * x.size()], x.data(), static_cast<int64_t>(x.size()));
    return y;
  }
  static Vec plus(Vec a, const Vec& b) {
    for (size_t j = 0; j < a.size(); j++) a[j] += b[j];
    return a;
  }
  // sum_j softmax_j(q . k_j / sqrt(d) + bias(h, j)) v_j over j in [begin, end), head by head; null: 1 more in the
  // denominator
  template <class Bias>
  Vec attend(const Vec& q, const Slots& k, const Slots& v, size_t begin, size_t end, Bias bias, bool null) const {
    const int64_t d = c.head_size();
    Vec out(q.size(), 0.0);
    for (int64_t h = 0; h < c.heads; h++) {
      double denominator = null ? 1 : 0;
      for (int pass = 0; pass < 2; pass++)
        for (size_t j = begin; j < end; j++) {
          const double p = std::exp(dot(&q[h * d], &k[j][h * d], d) / std::sqrt(static_cast<double>(d)) + bias(h, j));
          if (pass == 0) denominator += p;
          else
            for (int64_t e = h * d; e < (h + 1) * d; e++) out[e] += p / denominator * v[j][e];
        }
    }
    return out;
  }
  Vec rotated(Vec x, int64_t position) const {
    const int64_t d = c.head_size();
    for (int64_t h = 0; h < c.heads; h++)
      for (int64_t t = 0; t < d / 2; t++) {
        double &u = x[h * d + t], &v = x[h * d + t + d / 2];
        const double angle = static_cast<double>(position) *
                             std::pow(10000.0, -2.0 * static_cast<double>(t) / static_cast<double>(d)),
                     u0 = u;
        u = u0 * std::cos(angle) - v * std::sin(angle);
        v = v * std::cos(angle) + u0 * std::sin(angle);
      }
    return x;
  }
  // A layer over slots; inside: encoder kind, else the window. fetch(i, q) gives slot i what it fetched, null: not an
  // upper layer.
  Slots layer(const Slots& x, const std::string& at, double eps, bool inside,
              const std::function<Vec(size_t, const Vec&)>& fetch) const {
    Slots q, k, v, out;
    for (size_t i = 0; i < x.size(); i++) {
      const Vec n = norm(x[i], at + "input_layernorm", eps);
      q.push_back(linear(n, at + "self_attn.q_proj"));
      k.push_back(linear(n, at + "self_attn.k_proj"));
      v.push_back(linear(n, at + "self_attn.v_proj"));
      if (inside) {
        q[i] = rotated(q[i], static_cast<int64_t>(i));
        k[i] = rotated(k[i], static_cast<int64_t>(i));
      }
    }
    for (size_t i = 0; i < x.size(); i++) {
      const size_t begin = inside || static_cast<int64_t>(i) <= c.window ? 0 : i - static_cast<size_t>(c.window);
      const auto alibi = [&](int64_t h, size_t j) {
        return inside ? 0.0
                      : -std::pow(2.0, -8.0 * static_cast<double>(h + 1) / static_cast<double>(c.heads)) *
                            static_cast<double>(i - j);
      };
      const Vec a = plus(
          x[i], linear(attend(q[i], k, v, begin, inside ? x.size() : i + 1, alibi, false), at + "self_attn.o_proj"));
      Vec m = a;
      if (fetch)
        m = plus(a, linear(fetch(i, linear(norm(a, at + "gca.pre_norm", eps), at + "gca.q_proj")), at + "gca.o_proj"));
      const Vec z = norm(m, at + "post_attention_layernorm", eps), gate = linear(z, at + "mlp.gate_proj"),
                up = linear(z, at + "mlp.up_proj");
      Vec h(gate.size());
      for (size_t j = 0; j < h.size(); j++) h[j] = gate[j] / (1 + std::exp(-gate[j])) * up[j];
      out.push_back(plus(a, linear(h, at + "mlp.down_proj")));
    }
    return out;
  }
  // Norm(x) after the last layer; noise(group, fetching chunk, fetched chunk)
  template <class Noise>
  Slots forward(const int32_t* tokens, size_t T, Noise noise, bool retrieval = true) {
    const size_t S = c.chunk, C = T / S, D = static_cast<size_t>(c.width);
    Slots x;
    const Vec& E = weight.at("model.embed_tokens.weight");
    for (size_t i = 0; i < T; i++)
      x.emplace_back(E.begin() + static_cast<int64_t>(static_cast<size_t>(tokens[i]) * D),
                     E.begin() + static_cast<int64_t>((static_cast<size_t>(tokens[i]) + 1) * D));
    for (int64_t l = 0; l < c.lower; l++)
      x = layer(x, "model.lower_layers." + std::to_string(l) + ".", c.eps, false, nullptr);

    std::vector<Slots> key, value;  // [chunk][slot]
    Slots landmark;
    for (size_t n = 0; n < C && !c.groups.empty(); n++) {
      Slots h;
      for (size_t i = 0; i < S; i++) h.push_back(norm(x[n * S + i], "model.enc_prenorm", c.eps));
      for (int64_t l = 0; l < c.encoder; l++)
        h = layer(h, "model.encoder.layers." + std::to_string(l) + ".", 1e-6, true, nullptr);
      key.emplace_back();
      value.emplace_back();
      for (size_t i = 0; i < S; i++) {
        h[i] = norm(h[i], "model.encoder.norm", 1e-6);
        key[n].push_back(linear(h[i], "model.chunk_k_proj"));
        value[n].push_back(linear(h[i], "model.chunk_v_proj"));
      }
      landmark.push_back(h[S - 1]);
    }
    pick.assign(c.groups.size(), std::vector<std::vector<int32_t>>(C));
    w.assign(c.groups.size(), std::vector<Vec>(C));
    for (size_t g = 0; g < c.groups.size(); g++) {
      for (size_t n = 0; n < C; n++) {
        const Vec r = norm(x[n * S + S - 1], "model.lmk_norms." + std::to_string(g), c.eps);
        Vec score;
        for (size_t m = 0; m < n; m++)
          score.push_back(dot(r.data(), landmark[m].data(), c.width) / std::sqrt(static_cast<double>(c.width)));
        std::vector<int32_t>& mine = pick[g][n];
        for (size_t m = 0; m < n && retrieval; m++) mine.push_back(static_cast<int32_t>(m));
        std::stable_sort(mine.begin(), mine.end(),
                         [&](int32_t a, int32_t b) { return score[a] + noise(g, n, a) > score[b] + noise(g, n, b); });
        if (static_cast<int64_t>(mine.size()) > c.topk) mine.resize(c.topk);
        double sum = 0;
        for (int32_t m : mine) sum += std::exp(score[m]);
        for (int32_t m : mine) w[g][n].push_back(std::exp(score[m]) / sum);
      }
      const auto fetch = [&](size_t i, const Vec& q) {
        Vec o(D, 0.0);
        const size_t chunk = i / S;
        for (size_t k = 0; chunk > 0 && k < pick[g][chunk - 1].size(); k++) {
          const size_t m = pick[g][chunk - 1][k];
          const Vec one = attend(
              q, key[m], value[m], 0, S - 1, [](int64_t, size_t) { return 0.0; }, c.null_slot);
          for (size_t j = 0; j < D; j++) o[j] += w[g][chunk - 1][k] * one[j];
        }
        return o;
      };
      for (int64_t l = 0; l < c.groups[g]; l++)
        x = layer(x, "model.upper_layers." + std::to_string(g) + "." + std::to_string(l) + ".", c.eps, false, fetch);
    }
    for (Vec& slot : x) slot = norm(slot, "model.norm", c.eps);
    return x;
  }
  double loss(const Slots& final_n, const int32_t* targets, const float* weights) const {
    double sum = 0;
    for (size_t i = 0; i < final_n.size(); i++) {
      if (targets[i] < 0) continue;
      const Vec logits = linear(final_n[i], "model.embed_tokens");
      double exps = 0;
      for (double l : logits) exps += std::exp(l);
      sum += (weights ? static_cast<double>(weights[i]) : 1.0) * (std::log(exps) - logits[targets[i]]);
    }
    return sum;
  }
};

// The same forward pass as by hand, picks and loss too; and for every tensor the slope that finite differences see.
void check_model(const char* what, const Config& c, int64_t B, int64_t C, bool weighted = false,
                 Selection selection = with_noise()) {
  INFO(std::string(what));
  Model<Cpu<double>> model(c, B, C * c.chunk);
  auto& net = model.net;
  const Batch batch(c, B, C);
  const int64_t T = batch.T, D = c.width, K = c.topk;
  selection.first_row = 7;
  whole_step(net, batch, selection, weighted);

  ByHand hand(net);
  double want_loss = 0;
  for (int64_t b = 0; b < B; b++) {
    const auto noise = [&](size_t g, size_t n, int32_t m) {
      Selection of_group = selection;
      of_group.group = static_cast<int>(g);
      return selection.noise
                 ? static_cast<double>(gumbel(selection_draw(of_group, b, static_cast<int64_t>(n), m / 4).word[m % 4]))
                 : 0.0;
    };
    const auto final_n =
        hand.forward(batch.tokens.data() + b * T, static_cast<size_t>(T), noise, selection.picking != Picking::none);
    Vec want;
    for (const Vec& slot : final_n) want.insert(want.end(), slot.begin(), slot.end());
    CHECK(relative_error(net.final_n + b * T * D, want.data(), T * D) < 1e-12);
    want_loss += batch.scale *
                 hand.loss(final_n, batch.targets.data() + b * T, weighted ? batch.weights.data() + b * T : nullptr);
    for (size_t g = 0; g < c.groups.size(); g++)
      for (int64_t n = 0; n < C; n++)
        for (int64_t k = 0; k < K; k++) {
          const size_t at = (b * (C + 1) + n + 1) * K + k;
          const auto& mine = hand.pick[g][n];
          const bool there = k < static_cast<int64_t>(mine.size());
          CHECK(net.groups[g].pick[at] == (there ? mine[k] : -1));
          CHECK(net.groups[g].w[at] == doctest::Approx(there ? hand.w[g][n][k] : 0).epsilon(1e-10));
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

TEST_CASE("tensor table: the parameters of the paper's models") {
  const auto parameters = [](const char* name, int64_t vocab) {
    for (const Preset& preset : presets())
      if (!strcmp(preset.name, name)) {
        Config config = preset.config;
        config.vocab = vocab;
        config.validate();
        return TensorTable(config, 1, 16).parameters();
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
  layer("model.lower_layers.0.", false);
  names.push_back("model.enc_prenorm");
  layer("model.encoder.layers.0.", false);
  for (const char* name : {"model.encoder.norm", "model.chunk_k_proj", "model.chunk_v_proj", "model.lmk_norms.0"})
    names.push_back(name);
  layer("model.upper_layers.0.0.", true);
  names.push_back("model.lmk_norms.1");
  layer("model.upper_layers.1.0.", true);
  layer("model.upper_layers.1.1.", true);
  names.push_back("model.norm");

  const int64_t alignment = 16;
  const TensorTable table(c, 16, alignment);
  CHECK(table.padded_vocab == 16);
  CHECK(table.size % alignment == 0);
  REQUIRE(table.tensors.size() == names.size());
  int64_t end = 0, segments_hold = 0;
  for (size_t i = 0; i < names.size(); i++) {
    const Tensor& t = table.tensors[i];
    INFO(names[i]);
    CHECK(t.name == names[i] + ".weight");
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
  CHECK(names(complaint([](Config& c) { c.topk = 0; }), "topk"));
  CHECK(names(complaint([](Config& c) { c.topk = max_topk + 1; }), "topk"));
  CHECK(names(complaint([](Config& c) { c.window = -1; }), "window"));
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
  wide.window = 1000;
  wide.heads = 1;
  wide.width = 10;
  wide.encoder = 2;
  check_model("a window longer than the row, one head", wide, 1, 4, true);
  Config blind = small({1});
  blind.window = 0;
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
    const int64_t entries = 2 * 6 * c.topk;
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
  CHECK(!same_bits(copied(drawn.net.groups[0].pick, B * (C + 1) * c.topk),
                   copied(other.net.groups[0].pick, B * (C + 1) * c.topk)));
  // The two groups draw apart: with the same scores they would pick alike, so the draws themselves are compared.
  CHECK(noise[C] != noise[B * C * C + C]);
}

TEST_CASE("model: the same bits with 1, 2 and 3 threads, forward, gradients and two updates") {
  Config c = small({1, 1}, 16, 3);
  c.width = 48;
  c.ffn = 100;
  c.vocab = 300;
  c.window = 20;
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
      all.push_back(copied(net.m, net.table.size));
      all.push_back(copied(net.v, net.table.size));
    }
    if (threads == 1) one = all;
    CAPTURE(threads);
    for (size_t i = 0; i < all.size(); i++) {
      CAPTURE(i);
      CHECK(same_bits(all[i], one[i]));
    }
  }
}
