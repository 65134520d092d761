// The model on the CPU backend: its table of tensors, the real wiring against the paper's model written out slot by slot and against
// finite differences, threads, noise, streams, steps that are not finite, the ablations, the bf16 twin, the initial weights.
#include <algorithm>
#include <functional>
#include <map>

#include "../../gca_cpu.h"
#include "../../model.h"
#include "test.h"

using namespace gca;
using namespace gca::test;

namespace {

using Vec = std::vector<double>;

// ---- a model with weights drawn so wide that every path carries signal ------------------------------------------------------------
template <class Device>
struct Model {
  using Net = DRT<Device>;
  Device device;
  Net net;
  Model(const Config& config, int64_t B, int64_t T, Use use = Use::training, int threads = 1, Recompute recompute = Recompute::none)
      : device(threads), net(device, config, use) {
    net.allocate();
    net.recompute = recompute;
    net.plan(B, T);
    net.commit_activations();
    for (size_t i = 0; i < net.table.tensors.size(); i++) {
      const Tensor& t = net.table.tensors[i];
      const auto values =
          random_values<typename Device::master>(t.size(), 100 + i, t.columns ? 1 / std::sqrt(static_cast<double>(config.width)) : 0.3, t.columns ? 0 : 1);
      std::copy(values.begin(), values.end(), net.masters + t.offset);
    }
    net.weights_changed();
  }
};

// Random tokens, the landmark V-1 closing every chunk; targets the next real token; the last token of a row has none.
struct Batch {
  int64_t B, T;
  std::vector<int32_t> tokens, targets;
  std::vector<float> weights;
  double scale = 0;  // 1/N
  Batch(const Config& c, int64_t B_, int64_t C, uint64_t seed = 1)
      : B(B_),
        T(C * c.chunk),
        tokens(random_ids(B * T, seed, c.vocab - 1)),
        targets(tokens.size(), -1),
        weights(random_values<float>(B * T, seed + 1, 0.5, 1)) {
    const int64_t S = c.chunk;
    for (int64_t i = 0; i < B * T; i++)
      if (i % S == S - 1) tokens[static_cast<size_t>(i)] = static_cast<int32_t>(c.vocab - 1);
    for (int64_t i = 0; i < B * T; i++) {
      if (i % S == S - 1 || i % T == T - 2) continue;
      targets[static_cast<size_t>(i)] = tokens[static_cast<size_t>(i % S == S - 2 ? i + 2 : i + 1)];
      scale++;
    }
    scale = 1 / std::max(scale, 1.0);
  }
};

Selection with_noise(int64_t step = 3) {
  Selection selection;
  selection.noise = true, selection.seed = 5, selection.step = step;
  return selection;
}
Selection of_kind(Picking picking) {
  Selection selection;
  selection.picking = picking;
  return selection;
}

template <class Device>
void forward(DRT<Device>& net, const Batch& batch, const Selection& selection, bool weighted = false) {
  net.upload(batch.tokens.data(), batch.targets.data(), weighted ? batch.weights.data() : nullptr, batch.B * batch.T);
  net.forward({batch.B, batch.T, selection});
}
// The loss and the gradients of one batch in one piece.
template <class Device>
void whole_step(DRT<Device>& net, const Batch& batch, const Selection& selection, bool weighted = false) {
  net.begin_step();
  forward(net, batch, selection, weighted);
  net.head(batch.scale, true);
  net.backward();
}

template <class T>
std::vector<T> copied(const T* from, int64_t n) {
  return std::vector<T>(from, from + n);
}
// The table's tensors in order without the gaps, which depend on the size of an element.
template <class Net, class T>
std::vector<T> packed(const Net& net, const T* flat) {
  std::vector<T> all;
  for (const Tensor& t : net.table.tensors) all.insert(all.end(), flat + t.offset, flat + t.offset + t.size());
  return all;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

// ---- the model, written out -------------------------------------------------------------------------------------------------------
// One row, in double, a vector a slot, nothing shared with the ops.
struct ByHand {
  using Slots = std::vector<Vec>;
  const Config& c;
  std::map<std::string, Vec> weight;
  std::vector<std::vector<std::vector<int32_t>>> pick;  // [group][fetching chunk], as many as the past has, K at most
  std::vector<std::vector<Vec>> w;

  template <class Net>
  explicit ByHand(const Net& net) : c(net.config) {
    for (const Tensor& t : net.table.tensors) weight[t.name] = Vec(net.masters + t.offset, net.masters + t.offset + t.size());
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
  // sum_j softmax_j(q . k_j / sqrt(d) + bias(h, j)) v_j over j in [begin, end), head by head; null: 1 more in the denominator
  template <class Bias>
  Vec attend(const Vec& q, const Slots& k, const Slots& v, size_t begin, size_t end, Bias bias, bool null) const {
    const int64_t d = c.head_size();
    Vec out(q.size(), 0.0);
    for (int64_t h = 0; h < c.heads; h++) {
      double denominator = null ? 1 : 0;
      for (int pass = 0; pass < 2; pass++)
        for (size_t j = begin; j < end; j++) {
          const double p = std::exp(dot(&q[static_cast<size_t>(h * d)], &k[j][static_cast<size_t>(h * d)], d) / std::sqrt(static_cast<double>(d)) + bias(h, j));
          if (pass == 0) denominator += p;
          else
            for (int64_t e = h * d; e < (h + 1) * d; e++) out[static_cast<size_t>(e)] += p / denominator * v[j][static_cast<size_t>(e)];
        }
    }
    return out;
  }
  Vec rotated(Vec x, int64_t position) const {
    const int64_t d = c.head_size();
    for (int64_t h = 0; h < c.heads; h++)
      for (int64_t t = 0; t < d / 2; t++) {
        double &u = x[static_cast<size_t>(h * d + t)], &v = x[static_cast<size_t>(h * d + t + d / 2)];
        const double angle = static_cast<double>(position) * std::pow(10000.0, -2.0 * static_cast<double>(t) / static_cast<double>(d)), u0 = u;
        u = u0 * std::cos(angle) - v * std::sin(angle);
        v = v * std::cos(angle) + u0 * std::sin(angle);
      }
    return x;
  }
  // A layer over slots; inside: encoder kind, else the window. fetch(i, q) gives slot i what it fetched, null: not an upper layer.
  Slots layer(const Slots& x, const std::string& at, double eps, bool inside, const std::function<Vec(size_t, const Vec&)>& fetch) const {
    Slots q, k, v, out;
    for (size_t i = 0; i < x.size(); i++) {
      const Vec n = norm(x[i], at + "input_layernorm", eps);
      q.push_back(linear(n, at + "self_attn.q_proj")), k.push_back(linear(n, at + "self_attn.k_proj")), v.push_back(linear(n, at + "self_attn.v_proj"));
      if (inside) q[i] = rotated(q[i], static_cast<int64_t>(i)), k[i] = rotated(k[i], static_cast<int64_t>(i));
    }
    for (size_t i = 0; i < x.size(); i++) {
      const size_t begin = inside || static_cast<int64_t>(i) <= c.window ? 0 : i - static_cast<size_t>(c.window);
      const auto alibi = [&](int64_t h, size_t j) {
        return inside ? 0.0 : -std::pow(2.0, -8.0 * static_cast<double>(h + 1) / static_cast<double>(c.heads)) * static_cast<double>(i - j);
      };
      const Vec a = plus(x[i], linear(attend(q[i], k, v, begin, inside ? x.size() : i + 1, alibi, false), at + "self_attn.o_proj"));
      Vec m = a;
      if (fetch) m = plus(a, linear(fetch(i, linear(norm(a, at + "gca.pre_norm", eps), at + "gca.q_proj")), at + "gca.o_proj"));
      const Vec z = norm(m, at + "post_attention_layernorm", eps), gate = linear(z, at + "mlp.gate_proj"), up = linear(z, at + "mlp.up_proj");
      Vec h(gate.size());
      for (size_t j = 0; j < h.size(); j++) h[j] = gate[j] / (1 + std::exp(-gate[j])) * up[j];
      out.push_back(plus(a, linear(h, at + "mlp.down_proj")));
    }
    return out;
  }
  // Norm(x) after the last layer; noise(group, fetching chunk, fetched chunk)
  template <class Noise>
  Slots forward(const int32_t* tokens, size_t T, Noise noise, bool retrieval = true) {
    const size_t S = static_cast<size_t>(c.chunk), C = T / S, D = static_cast<size_t>(c.width);
    Slots x;
    const Vec& E = weight.at("model.embed_tokens.weight");
    for (size_t i = 0; i < T; i++)
      x.emplace_back(E.begin() + static_cast<int64_t>(static_cast<size_t>(tokens[i]) * D),
                     E.begin() + static_cast<int64_t>((static_cast<size_t>(tokens[i]) + 1) * D));
    for (int64_t l = 0; l < c.lower; l++) x = layer(x, "model.lower_layers." + std::to_string(l) + ".", c.eps, false, nullptr);

    std::vector<Slots> key, value;  // [chunk][slot]
    Slots landmark;
    for (size_t n = 0; n < C && !c.groups.empty(); n++) {
      Slots h;
      for (size_t i = 0; i < S; i++) h.push_back(norm(x[n * S + i], "model.enc_prenorm", c.eps));
      for (int64_t l = 0; l < c.encoder; l++) h = layer(h, "model.encoder.layers." + std::to_string(l) + ".", 1e-6, true, nullptr);
      key.emplace_back(), value.emplace_back();
      for (size_t i = 0; i < S; i++) {
        h[i] = norm(h[i], "model.encoder.norm", 1e-6);
        key[n].push_back(linear(h[i], "model.chunk_k_proj")), value[n].push_back(linear(h[i], "model.chunk_v_proj"));
      }
      landmark.push_back(h[S - 1]);
    }
    pick.assign(c.groups.size(), std::vector<std::vector<int32_t>>(C));
    w.assign(c.groups.size(), std::vector<Vec>(C));
    for (size_t g = 0; g < c.groups.size(); g++) {
      for (size_t n = 0; n < C; n++) {
        const Vec r = norm(x[n * S + S - 1], "model.lmk_norms." + std::to_string(g), c.eps);
        Vec score;
        for (size_t m = 0; m < n; m++) score.push_back(dot(r.data(), landmark[m].data(), c.width) / std::sqrt(static_cast<double>(c.width)));
        std::vector<int32_t>& mine = pick[g][n];
        for (size_t m = 0; m < n && retrieval; m++) mine.push_back(static_cast<int32_t>(m));
        std::stable_sort(mine.begin(), mine.end(),
                         [&](int32_t a, int32_t b) { return score[static_cast<size_t>(a)] + noise(g, n, a) > score[static_cast<size_t>(b)] + noise(g, n, b); });
        if (static_cast<int64_t>(mine.size()) > c.topk) mine.resize(static_cast<size_t>(c.topk));
        double sum = 0;
        for (int32_t m : mine) sum += std::exp(score[static_cast<size_t>(m)]);
        for (int32_t m : mine) w[g][n].push_back(std::exp(score[static_cast<size_t>(m)]) / sum);
      }
      const auto fetch = [&](size_t i, const Vec& q) {
        Vec o(D, 0.0);
        const size_t chunk = i / S;
        for (size_t k = 0; chunk > 0 && k < pick[g][chunk - 1].size(); k++) {
          const size_t m = static_cast<size_t>(pick[g][chunk - 1][k]);
          const Vec one = attend(
              q, key[m], value[m], 0, S - 1, [](int64_t, size_t) { return 0.0; }, c.null_slot);
          for (size_t j = 0; j < D; j++) o[j] += w[g][chunk - 1][k] * one[j];
        }
        return o;
      };
      for (int64_t l = 0; l < c.groups[g]; l++) x = layer(x, "model.upper_layers." + std::to_string(g) + "." + std::to_string(l) + ".", c.eps, false, fetch);
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
      sum += (weights ? static_cast<double>(weights[i]) : 1.0) * (std::log(exps) - logits[static_cast<size_t>(targets[i])]);
    }
    return sum;
  }
};

Config small(std::vector<int64_t> groups, int64_t chunk = 5, int64_t topk = 2) {
  return {.vocab = 11,
          .width = 12,
          .heads = 3,
          .ffn = 7,
          .lower = 2,
          .groups = std::move(groups),
          .encoder = 1,
          .chunk = chunk,
          .topk = topk,
          .window = 4,
          .eps = 1e-3};
}

// The same forward pass as by hand, picks and loss too; and for every tensor the slope that finite differences see.
void check_model(const char* what, const Config& c, int64_t B, int64_t C, bool weighted = false, Selection selection = with_noise()) {
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
      return selection.noise ? static_cast<double>(gumbel(selection_draw(of_group, b, static_cast<int64_t>(n), m / 4).word[m % 4])) : 0.0;
    };
    const auto final_n = hand.forward(batch.tokens.data() + b * T, static_cast<size_t>(T), noise, selection.picking != Picking::none);
    Vec want;
    for (const Vec& slot : final_n) want.insert(want.end(), slot.begin(), slot.end());
    CHECK(relative_error(net.final_n + b * T * D, want.data(), T * D) < 1e-12);
    want_loss += batch.scale * hand.loss(final_n, batch.targets.data() + b * T, weighted ? batch.weights.data() + b * T : nullptr);
    for (size_t g = 0; g < c.groups.size(); g++)
      for (int64_t n = 0; n < C; n++)
        for (int64_t k = 0; k < K; k++) {
          const size_t at = static_cast<size_t>((b * (C + 1) + n + 1) * K + k);
          const auto& mine = hand.pick[g][static_cast<size_t>(n)];
          const bool there = k < static_cast<int64_t>(mine.size());
          CHECK(net.groups[g].pick[at] == (there ? mine[static_cast<size_t>(k)] : -1));
          CHECK(net.groups[g].w[at] == doctest::Approx(there ? hand.w[g][static_cast<size_t>(n)][static_cast<size_t>(k)] : 0).epsilon(1e-10));
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
    CHECK(slope_error(net.masters + t.offset, gradient.data() + t.offset, random_values<double>(t.size(), 7), loss) < slope_tolerance);
    // No path is dead by mistake: what a row fetches reaches every tensor, once there is a past beyond the chunk before. A single
    // pick always weighs 1, which leaves the retriever's own norm without a gradient.
    const bool memory = t.name.find("enc") != std::string::npos || t.name.find("chunk_") != std::string::npos || t.name.find("gca") != std::string::npos;
    const bool retriever = t.name.find("lmk") != std::string::npos;
    const bool alive = selection.picking != Picking::none && (memory ? C > 2 : retriever ? C > 3 && K > 1 : true);
    const auto begin = gradient.begin() + t.offset, end = begin + t.size();
    CHECK(std::any_of(begin, end, [](double g) { return g != 0; }) == (alive || (!memory && !retriever)));
  }
}

}  // namespace

// ---- the table --------------------------------------------------------------------------------------------------------------------

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
  c.lower = 1, c.vocab = 10;
  std::vector<std::string> names = {"model.embed_tokens"};
  const auto layer = [&](const std::string& at, bool upper) {
    for (const char* name : {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}) names.push_back(at + name);
    if (upper)
      for (const char* name : {"gca.pre_norm", "gca.q_proj", "gca.o_proj"}) names.push_back(at + name);
    for (const char* name : {"post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}) names.push_back(at + name);
  };
  layer("model.lower_layers.0.", false);
  names.push_back("model.enc_prenorm");
  layer("model.encoder.layers.0.", false);
  for (const char* name : {"model.encoder.norm", "model.chunk_k_proj", "model.chunk_v_proj", "model.lmk_norms.0"}) names.push_back(name);
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
    const bool feed_forward = t.name.find("gate_proj") != std::string::npos || t.name.find("up_proj") != std::string::npos;
    CHECK(t.columns == (gain ? 0 : t.name.find("down_proj") != std::string::npos ? c.ffn : c.width));
    CHECK(t.rows == (i == 0 ? c.vocab : feed_forward ? c.ffn : c.width));
    CHECK(t.decay == !gain);
    // One product each: k follows q at once, v follows k, up follows gate, chunk_v follows chunk_k. All others are aligned.
    const bool follows = t.name.find("self_attn.k_") != std::string::npos || t.name.find("self_attn.v_") != std::string::npos ||
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
  const auto names = [](const std::string& text, const char* flag) { return text.rfind(std::string("--") + flag + ":", 0) == 0; };
  CHECK(names(complaint([](Config& c) { c.vocab = 1; }), "vocab"));
  CHECK(names(complaint([](Config& c) { c.width = 0; }), "width"));
  CHECK(names(complaint([](Config& c) { c.heads = 5; }), "heads"));
  CHECK(names(complaint([](Config& c) { c.heads = 0; }), "heads"));
  CHECK(names(complaint([](Config& c) { c.heads = 4; }), "heads"));  // three columns a head: no pairs to turn
  CHECK(names(complaint([](Config& c) { c.ffn = 0; }), "ffn"));
  CHECK(names(complaint([](Config& c) { c.lower = -1; }), "lower"));
  CHECK(names(complaint([](Config& c) { c.lower = 0, c.groups = {}; }), "lower"));
  CHECK(names(complaint([](Config& c) { c.groups = {1, 0}; }), "groups"));
  CHECK(names(complaint([](Config& c) { c.encoder = -1; }), "encoder"));
  CHECK(names(complaint([](Config& c) { c.chunk = 1; }), "chunk"));
  CHECK(names(complaint([](Config& c) { c.topk = 0; }), "topk"));
  CHECK(names(complaint([](Config& c) { c.topk = max_topk + 1; }), "topk"));
  CHECK(names(complaint([](Config& c) { c.window = -1; }), "window"));
}

// ---- the wiring ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("model: forward as written by hand, gradients as finite differences see them") {
  Config baseline = small({});
  baseline.encoder = 0, baseline.lower = 3;
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
  wide.window = 1000, wide.heads = 1, wide.width = 10, wide.encoder = 2;
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
    halves.net.upload(batch.tokens.data() + first * batch.T, batch.targets.data() + first * batch.T, batch.weights.data() + first * batch.T, 2 * batch.T);
    halves.net.forward({2, batch.T, selection});
    const int64_t entries = 2 * 6 * c.topk;
    for (size_t g = 0; g < 2; g++)
      CHECK(same_bits(copied(halves.net.groups[g].pick, entries), copied(whole.net.groups[g].pick + first / 2 * entries, entries)));
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
    rows.net.upload(batch.tokens.data() + b * batch.T, batch.targets.data() + b * batch.T, batch.weights.data() + b * batch.T, batch.T);
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
    Vec announced(static_cast<size_t>(last), std::nan(""));
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
  std::vector<float> noise(static_cast<size_t>(2 * B * C * C), std::nanf(""));
  for (int g = 0; g < 2; g++)
    for (int64_t b = 0; b < B; b++)
      for (int64_t n = 0; n < C; n++)
        for (int64_t m = 0; m < n; m++) {
          Selection selection = with_noise();
          selection.group = g;
          noise[static_cast<size_t>(((g * B + b) * C + n) * C + m)] = gumbel(selection_draw(selection, b, n, m / 4).word[m % 4]);
        }
  Selection selection;
  selection.noise = true, selection.given_noise = noise.data();
  forward(given.net, batch, selection);
  CHECK(same_bits(copied(drawn.net.final_n, B * batch.T * c.width), copied(given.net.final_n, B * batch.T * c.width)));
  // Another step draws other noise, and with it other picks.
  forward(other.net, batch, with_noise(4));
  CHECK(!same_bits(copied(drawn.net.groups[0].pick, B * (C + 1) * c.topk), copied(other.net.groups[0].pick, B * (C + 1) * c.topk)));
  // The two groups draw apart: with the same scores they would pick alike, so the draws themselves are compared.
  CHECK(noise[static_cast<size_t>(C)] != noise[static_cast<size_t>(B * C * C + C)]);
}

TEST_CASE("model: the same bits with 1, 2 and 3 threads, forward, gradients and two updates") {
  Config c = small({1, 1}, 16, 3);
  c.width = 48, c.ffn = 100, c.vocab = 300, c.window = 20;
  const Batch batch(c, 3, 8);
  using Bits = std::vector<float>;
  std::vector<Bits> one;
  for (int threads : {1, 2, 3}) {
    Model<Cpu<float>> model(c, 3, batch.T, Use::training, threads);
    auto& net = model.net;
    std::vector<Bits> all;
    for (int64_t step = 0; step < 2; step++) {
      whole_step(net, batch, with_noise(step), true);
      all.push_back(copied(net.final_n, 3 * batch.T * c.width)), all.push_back(copied(net.loss, 3 * batch.T)),
          all.push_back(copied(net.gradient, net.table.size));
      net.update({.lr = 1e-2, .weight_decay = 0.1});
      const StepState state = net.step_state();
      all.push_back({static_cast<float>(state.loss), static_cast<float>(state.grad_norm)});
      all.push_back(copied(net.masters, net.table.size)), all.push_back(copied(net.m, net.table.size)), all.push_back(copied(net.v, net.table.size));
    }
    if (threads == 1) one = all;
    CAPTURE(threads);
    for (size_t i = 0; i < all.size(); i++) {
      CAPTURE(i);
      CHECK(same_bits(all[i], one[i]));
    }
  }
}

// ---- streams ------------------------------------------------------------------------------------------------------------------------

TEST_CASE("stream: a row read in segments has the same bits as in one pass") {
  const int64_t C = 9;
  for (const auto& groups : {std::vector<int64_t>{}, {2}, {1, 2}})
    for (int64_t window : {0, 3, 5, 12, 1000}) {
      Config c = small(groups);
      c.window = window;
      const int64_t S = c.chunk, T = C * S, D = c.width, K = c.topk;
      const Batch batch(c, 1, C);
      Model<Cpu<double>> whole(c, 1, T, Use::inference), segments(c, 1, 3 * S, Use::inference);
      auto& net = segments.net;
      typename DRT<Cpu<double>>::StreamState stream;
      net.open(stream, C);
      typename DRT<Cpu<double>>::StreamState other;
      net.open(other, 2);
      for (const Selection& selection : {Selection{}, with_noise()}) {
        forward(whole.net, batch, selection);
        const std::vector<std::vector<int64_t>> cuts = {
            {3 * S, 3 * S, 3 * S}, {S, 2 * S, 3 * S, S, 2 * S}, std::vector<int64_t>(static_cast<size_t>(T), 1), {2 * S, 1, 2, 2, S, S - 1, 1, 3 * S, 3, 2}};
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
                picks_agree = picks_agree && same_bits(copied(mine.pick + (n + 1) * K, K), copied(all.pick + (first / S - done + n + 1) * K, K));
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
  model.net.open(stream, 2);
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
  CHECK(same_bits(copied(training.net.final_n, 2 * batch.T * c.width), copied(inference.net.final_n, 2 * batch.T * c.width)));
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
      gradient = g, weights = w, n_bytes = used;
    }
  }
}

// ---- steps ----------------------------------------------------------------------------------------------------------------------------

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
  for (Model<Cpu<double>>* each : {&model, &undisturbed}) whole_step(each->net, batch, with_noise(0), true), each->net.update(hyper);
  const Vec w = copied(net.masters, net.table.size), m = copied(net.m, net.table.size), v = copied(net.v, net.table.size);
  for (int64_t bad = 1; bad <= 3; bad++) {
    if (bad < 3) {
      whole_step(net, poisoned, with_noise(bad), true);
    } else {  // a gradient alone
      whole_step(net, batch, with_noise(bad), true);
      net.gradient[net.table.tensors[5].offset + 3] = std::numeric_limits<double>::infinity();
    }
    net.update(hyper);
    const StepState state = net.step_state();
    CHECK(state.skip == 1);
    CHECK(state.skipped == bad);
    CHECK(state.skipped_in_a_row == bad);
    CHECK(state.adam_steps == 1);
    CHECK(same_bits(w, copied(net.masters, net.table.size)));
    CHECK(same_bits(m, copied(net.m, net.table.size)));
    CHECK(same_bits(v, copied(net.v, net.table.size)));
  }
  // As if the bad steps had not been.
  for (Model<Cpu<double>>* each : {&model, &undisturbed}) whole_step(each->net, batch, with_noise(9), true), each->net.update(hyper);
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

// ---- ablations, bf16 --------------------------------------------------------------------------------------------------------------------

TEST_CASE("ablations: no retrieval fetches zero, random retrieval fetches other chunks of the past") {
  const Config c = small({1, 1});
  const int64_t B = 2, C = 7;
  const Batch batch(c, B, C);
  Model<Cpu<double>> model(c, B, batch.T);
  auto& net = model.net;
  const int64_t entries = B * (C + 1) * c.topk, n = B * batch.T * c.width;
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
    CHECK(!same_bits(copied(net.final_n + b * row + two_chunks, two_chunks), copied(learned.data() + b * row + two_chunks, two_chunks)));
  }
  forward(net, batch, of_kind(Picking::uniform));
  const auto random_picks = copied(net.groups[0].pick, entries);
  CHECK(random_picks != learned_picks);
  CHECK(random_picks != copied(net.groups[1].pick, entries));  // each group draws its own
  for (int64_t i = 0; i < entries; i++) CHECK(random_picks[static_cast<size_t>(i)] < std::max<int64_t>(0, i / c.topk % (C + 1) - 1));
  for (int64_t i = 0; i < entries; i++) CHECK((random_picks[static_cast<size_t>(i)] >= 0) == (learned_picks[static_cast<size_t>(i)] >= 0));
}

TEST_CASE("bf16 twin of the model: stores bf16, and follows double with the same picks") {
  Config c = small({1, 1}, 8, 2);
  c.width = 24, c.ffn = 40;
  const int64_t B = 2, C = 5;
  const Batch batch(c, B, C);
  Model<Cpu<double>> exact(c, B, batch.T);
  Model<Cpu<float>> single(c, B, batch.T);
  Model<Cpu<float, true>> twin(c, B, batch.T);
  whole_step(exact.net, batch, with_noise());
  const auto errors = [&](auto& net) {
    for (size_t g = 0; g < 2; g++) std::copy_n(exact.net.groups[g].pick, B * (C + 1) * c.topk, net.groups[g].pick);
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
  const auto stored = [](const float* x, int64_t n) { return std::all_of(x, x + n, [](float value) { return value == round_bf16(value); }); };
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

// ---- initial weights --------------------------------------------------------------------------------------------------------------------

TEST_CASE("initial weights: normal(0, 0.02) and ones, the same for any precision and number of threads") {
  Config c = small({1});
  c.vocab = 3001, c.width = 60;
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
  CHECK(std::equal(stored.begin(), stored.end(), floats.begin(), [](float weight, float master) { return weight == round_bf16(master); }));
  const auto& table = exact.net.table;
  for (const Tensor& t : table.tensors) {
    INFO(t.name);
    bool ones = true;
    double sum = 0, squares = 0, within = 0;
    for (int64_t i = 0; i < t.size(); i++) {
      const double x = exact.net.masters[t.offset + i];
      ones = ones && x == 1;
      sum += x, squares += x * x, within += std::fabs(x) < 0.02;
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
  const Tensor &q = table.tensors[2], &k = table.tensors[3];
  CHECK(!same_bits(copied(exact.net.masters + q.offset, q.size()), copied(exact.net.masters + k.offset, k.size())));
  const Vec before = copied(exact.net.masters, table.size);
  double product = 0, next = 0;
  for (int64_t i = 0; i + 2 < c.vocab * c.width; i++)
    product += before[static_cast<size_t>(i)] * before[static_cast<size_t>(i + 1)], next += before[static_cast<size_t>(i)] * before[static_cast<size_t>(i + 2)];
  const double bound = 5 * 0.02 * 0.02 * std::sqrt(static_cast<double>(c.vocab * c.width));
  CHECK(std::fabs(product) < bound);
  CHECK(std::fabs(next) < bound);
  exact.net.initialise(43, exact.device.pool());
  CHECK(!same_bits(before, copied(exact.net.masters, table.size)));
}
