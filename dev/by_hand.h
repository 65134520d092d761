// The paper's model by hand: slot by slot, in double, a vector a slot. Nothing is fast and nothing is shared with the
// ops (Config has the sizes, no more): read it to learn what a DRT computes, then gca_cpu.h for how the program does.
// The tests hold the CPU backend to it: test_cpu_attention.cpp op by op, test_model.cpp whole. Letters: doc/drt.md.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "model.h"

namespace gca::by_hand {

using Vec =
    std::vector<double>;  // the columns of one slot (D), a gain (D), or a matrix (out,in), rows one after another
using Slots = std::vector<Vec>;  // (slots,D)

inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}
inline Vec plus(Vec a, const Vec& b, double scale = 1) {  // a + scale * b. a, b (n)
  for (size_t j = 0; j < a.size(); j++) a[j] += scale * b[j];
  return a;
}
// Norm(x) = gain * x / sqrt(mean(x^2) + eps). x, gain (D)
inline Vec norm(Vec x, const Vec& gain, double eps) {
  const double rms = std::sqrt(dot(x.data(), x.data(), std::ssize(x)) / static_cast<double>(x.size()) + eps);
  for (size_t j = 0; j < x.size(); j++) x[j] = gain[j] * x[j] / rms;
  return x;
}
// y = W x. x (in), W (out,in)
inline Vec linear(const Vec& x, const Vec& W) {
  Vec y(W.size() / x.size());
  for (size_t o = 0; o < y.size(); o++) y[o] = dot(&W[o * x.size()], x.data(), std::ssize(x));
  return y;
}
// Rotary embedding: columns (t, t + d/2) of each head turn by position * 10000^(-2t/d). x (D)
inline Vec rotated(Vec x, int H, int64_t position) {
  const int d = static_cast<int>(x.size()) / H;
  for (int h = 0; h < H; h++)
    for (int t = 0; t < d / 2; t++) {
      double &u = x[h * d + t], &v = x[h * d + t + d / 2];
      const double angle = static_cast<double>(position) * std::pow(10000.0, -2.0 * t / d), u0 = u;
      u = u0 * std::cos(angle) - v * std::sin(angle);
      v = v * std::cos(angle) + u0 * std::sin(angle);
    }
  return x;
}
// sum over slots j of [begin, end) of softmax_j(q . k_j / sqrt(d) + bias(h, j)) v_j, head by head; null_slot: one logit
// 0 of value 0 more. q (D); k, v (slots,D); lse (H) or null: the log of each softmax's denominator
Vec attend(const Vec& q, int H, const Slots& k, const Slots& v, int64_t begin, int64_t end, bool null_slot, Vec* lse,
           auto bias) {
  const int d = static_cast<int>(q.size()) / H;
  Vec out(q.size(), 0.0);
  for (int h = 0; h < H; h++) {
    double denominator = null_slot ? 1 : 0;
    for (int64_t j = begin; j < end; j++) {
      const double p = std::exp(dot(&q[h * d], &k[j][h * d], d) / std::sqrt(d) + bias(h, j));
      denominator += p;
      for (int e = h * d; e < (h + 1) * d; e++) out[e] += p * v[j][e];
    }
    for (int e = h * d; e < (h + 1) * d; e++) out[e] /= denominator;
    if (lse) lse->push_back(std::log(denominator));
  }
  return out;
}
// Slot i sees slots i-W..i, less 2^(-8(h+1)/H) a slot of distance (ALiBi). q, k, v (T,D)
inline Vec sliding_attention(const Slots& q, const Slots& k, const Slots& v, int64_t i, int H, int64_t W,
                             Vec* lse = nullptr) {
  return attend(q[i], H, k, v, std::max<int64_t>(0, i - W), i + 1, false, lse,
                [&](int h, int64_t j) { return -std::exp2(-8.0 * (h + 1) / H) * static_cast<double>(i - j); });
}
// Slot i of a chunk sees the whole chunk; q and k are turned by their place in it. q, k, v (S,D)
inline Vec chunk_attention(const Slots& q, Slots k, const Slots& v, int64_t i, int H, Vec* lse = nullptr) {
  for (int64_t j = 0; j < std::ssize(k); j++) k[j] = rotated(k[j], H, j);
  return attend(rotated(q[i], H, i), H, k, v, 0, std::ssize(k), false, lse, [](int, int64_t) { return 0.0; });
}
struct Memory {
  std::vector<Slots> CK, CV;  // (C,S,D)
  Slots L;                    // (C,D)
};
struct Picks {  // of one chunk in one group: at most K chunks, the largest score first
  std::vector<int64_t> chunk;
  Vec w;  // as many
};
// O_k: what one slot finds in chunk m. The landmark, its last slot, is no key. q (D) -> (D)
inline Vec attend_chunk(const Vec& q, int H, const Memory& memory, int64_t m, bool null_slot) {
  const Slots &CK = memory.CK[m], &CV = memory.CV[m];
  return attend(q, H, CK, CV, 0, std::ssize(CK) - 1, null_slot, nullptr, [](int, int64_t) { return 0.0; });
}
// Grouped cross attention: o = sum_k w_k O_k, for one slot that these picks serve. q (D) -> (D)
inline Vec gca(const Vec& q, int H, const Memory& memory, const Picks& picks, bool null_slot) {
  Vec o(q.size(), 0.0);
  for (size_t k = 0; k < picks.w.size(); k++)
    o = plus(o, attend_chunk(q, H, memory, picks.chunk[k], null_slot), picks.w[k]);
  return o;
}
// What that slot adds to dw of pick m: do . O_k. All slots served and all layers of the group add theirs. dout, q (D)
inline double gca_dw(const Vec& dout, const Vec& q, int H, const Memory& memory, int64_t m, bool null_slot) {
  return dot(dout.data(), attend_chunk(q, H, memory, m, null_slot).data(), std::ssize(q));
}

struct Model {
  const Config& c;
  const int H = static_cast<int>(c.heads);
  std::map<std::string, Vec> weights = {};      // by the tensor's name
  std::vector<std::vector<Picks>> picked = {};  // (groups,C), by forward(): what chunk c picked, serving chunk c+1
  const Vec& weight(const std::string& name) const { return weights.at(name + ".weight"); }
  // x (slots,D) -> (slots,D). in_chunk: the encoder's attention, else the window's. fetched(i, q): what slot i fetches
  // with q; null: this is no upper layer.
  Slots layer(const Slots& x, const std::string& name, double eps, bool in_chunk,
              const std::function<Vec(int64_t, const Vec&)>& fetched) const {
    Slots q, k, v, out;
    for (const Vec& slot : x) {
      const Vec n = norm(slot, weight(name + "input_layernorm"), eps);
      q.push_back(linear(n, weight(name + "self_attn.q_proj")));
      k.push_back(linear(n, weight(name + "self_attn.k_proj")));
      v.push_back(linear(n, weight(name + "self_attn.v_proj")));
    }
    for (int64_t i = 0; i < std::ssize(x); i++) {
      const Vec seen = in_chunk ? chunk_attention(q, k, v, i, H) : sliding_attention(q, k, v, i, H, c.reach.window);
      const Vec a = plus(x[i], linear(seen, weight(name + "self_attn.o_proj")));
      Vec mlp_in = a;
      if (fetched) {
        const Vec gca_q = linear(norm(a, weight(name + "gca.pre_norm"), eps), weight(name + "gca.q_proj"));
        mlp_in = plus(a, linear(fetched(i, gca_q), weight(name + "gca.o_proj")));
      }
      const Vec n = norm(mlp_in, weight(name + "post_attention_layernorm"), eps);
      Vec h = linear(n, weight(name + "mlp.gate_proj")), up = linear(n, weight(name + "mlp.up_proj"));
      for (int64_t j = 0; j < c.ffn; j++) h[j] = h[j] / (1 + std::exp(-h[j])) * up[j];  // SwiGLU: silu(gate) * up
      out.push_back(plus(a, linear(h, weight(name + "mlp.down_proj"))));  // the fetched reaches the MLP, not the stream
    }
    return out;
  }
  // The memory of one chunk more. x (S,D): its slots after the lower layers
  void encode(Memory& memory, Slots x) const {
    for (Vec& slot : x) slot = norm(slot, weight("model.enc_prenorm"), c.eps);
    for (int64_t l = 0; l < c.encoder; l++)
      x = layer(x, str("model.encoder.layers.", l, "."), Config::encoder_eps, true, nullptr);
    for (Vec& slot : x) slot = norm(slot, weight("model.encoder.norm"), Config::encoder_eps);
    memory.L.push_back(x.back());
    Slots &CK = memory.CK.emplace_back(), &CV = memory.CV.emplace_back();
    for (const Vec& slot : x) CK.push_back(linear(slot, weight("model.chunk_k_proj")));
    for (const Vec& slot : x) CV.push_back(linear(slot, weight("model.chunk_v_proj")));
  }
  // What chunk n picks in group g: of the candidates m <= n - 1 the K largest of score + noise, ties to the lower m; w
  // is the softmax of their scores. x (D): its landmark as it enters the group
  Picks retrieve(const Vec& x, const Memory& memory, size_t g, int64_t n, auto noise) const {
    const Vec r = norm(x, weight(str("model.lmk_norms.", g)), c.eps);
    Picks picks;
    Vec score;
    for (int64_t m = 0; m <= n - 1; m++) {
      score.push_back(dot(r.data(), memory.L[m].data(), c.width) / std::sqrt(static_cast<double>(c.width)));
      picks.chunk.push_back(m);
    }
    std::stable_sort(picks.chunk.begin(), picks.chunk.end(),
                     [&](int64_t a, int64_t b) { return score[a] + noise(g, n, a) > score[b] + noise(g, n, b); });
    picks.chunk.resize(std::min(std::ssize(picks.chunk), static_cast<std::ptrdiff_t>(c.reach.topk)));
    double sum = 0;
    for (int64_t m : picks.chunk) sum += std::exp(score[m]);
    for (int64_t m : picks.chunk) picks.w.push_back(std::exp(score[m]) / sum);
    return picks;
  }
  // One row, token (T) -> Norm(x) after the last layer (T,D). noise(group, fetching chunk, fetched chunk)
  Slots forward(const int32_t* token, int64_t T, auto noise, bool retrieval = true) {
    const Vec& E = weight("model.embed_tokens");
    Slots x;
    for (int64_t i = 0; i < T; i++) x.emplace_back(&E[token[i] * c.width], &E[token[i] * c.width] + c.width);
    for (int64_t l = 0; l < c.lower; l++) x = layer(x, str("model.lower_layers.", l, "."), c.eps, false, nullptr);
    Memory memory;
    for (auto chunk = x.begin(); chunk < x.end() && !c.groups.empty(); chunk += c.chunk)
      encode(memory, {chunk, chunk + c.chunk});
    picked.assign(c.groups.size(), std::vector<Picks>(T / c.chunk));
    for (size_t g = 0; g < c.groups.size(); g++) {
      for (int64_t n = 0; n < T / c.chunk && retrieval; n++)
        picked[g][n] = retrieve(x[(n + 1) * c.chunk - 1], memory, g, n, noise);
      const auto fetched = [&](int64_t i, const Vec& q) {
        return gca(q, H, memory, i < c.chunk ? Picks{} : picked[g][i / c.chunk - 1], c.null_slot);
      };
      for (int64_t l = 0; l < c.groups[g]; l++)
        x = layer(x, str("model.upper_layers.", g, ".", l, "."), c.eps, false, fetched);
    }
    for (Vec& slot : x) slot = norm(slot, weight("model.norm"), c.eps);
    return x;
  }
  // Cross entropy of a slot that has a target: log sum_v e^logit_v - logit_target, logits = E Norm(x). final_n (D)
  double loss(const Vec& final_n, int32_t target) const {
    const Vec logits = linear(final_n, weight("model.embed_tokens"));
    double sum = 0;
    for (double logit : logits) sum += std::exp(logit);
    return std::log(sum) - logits[target];
  }
};

}  // namespace gca::by_hand
