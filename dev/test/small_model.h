// A small model for the CPU's tests, with weights drawn so wide that every path carries signal, a batch for it, and one
// step.
#pragma once
#include "runtime/models.h"
#include "dev/test/test.h"

namespace gca::test {

inline Config small(std::vector<int64_t> groups, int64_t chunk = 5, int64_t topk = 2) {
  return {.vocab = 11,
          .width = 12,
          .heads = 3,
          .ffn = 7,
          .lower = 2,
          .groups = std::move(groups),
          .encoder = 1,
          .chunk = chunk,
          .reach = {.topk = topk, .window = 4},
          .eps = 1e-3};
}

template <class Device>
struct Model {
  using Net = DRT<Device>;
  Device device;
  Net net;
  Model(const Config& config, int64_t B, int64_t T, Use use = Use::training, int threads = 1,
        Recompute recompute = Recompute::none)
      : device(threads), net(device, config, use) {
    net.allocate();
    net.recompute = recompute;
    net.plan(B, T);
    net.commit_activations();
    for (const Tensor& t : net.table.tensors) {
      const auto values = random_values<typename Device::master>(
          t.size(), name_hash(t.name), t.columns ? 1 / std::sqrt(static_cast<double>(config.width)) : 0.3,
          t.columns ? 0 : 1);
      std::copy(values.begin(), values.end(), net.masters + t.offset);
    }
    net.weights_changed();
  }
};

template <class Net>
const Tensor& tensor_of(const Net& net, const std::string& name) {
  for (const Tensor& t : net.table.tensors)
    if (t.name == name) return t;
  throw Error("the model has no tensor " + name);
}

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
      if (i % S == S - 1) tokens[i] = static_cast<int32_t>(c.vocab - 1);
    for (int64_t i = 0; i < B * T; i++) {
      if (i % S == S - 1 || i % T == T - 2) continue;
      targets[i] = tokens[i % S == S - 2 ? i + 2 : i + 1];
      scale++;
    }
    scale = 1 / std::max(scale, 1.0);
  }
};

inline Selection with_noise(int64_t step = 3) {
  Selection selection;
  selection.noise = true;
  selection.seed = 5;
  selection.step = step;
  return selection;
}
inline Selection of_kind(Picking picking) {
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

// Steps of a batch, of which this rank of the model takes its part a row at a time. is_final(step, begin): as
// the gradient from begin on is told to be final, in each row's backward.
template <class Net, class Final>
void make_steps(Net& net, const Batch& batch, int steps, double clip, double stop, Final is_final) {
  const RowRange own = rows_of_rank(batch.B, net.shards.rank, net.shards.ranks);
  for (int step = 0; step < steps; step++) {
    net.begin_step();
    for (int64_t row = own.begin; row < own.end; row++) {
      const int64_t at = row * batch.T;
      net.upload(&batch.tokens[at], &batch.targets[at], nullptr, batch.T);
      Selection selection = with_noise(step);
      selection.first_row = row;
      net.grads_ready = [&](int64_t begin, int64_t) {
        is_final(step, begin);
        if (net.collectives && row + 1 == own.end) net.reduce_gradient(begin);
      };
      net.forward({1, batch.T, selection});
      net.head(batch.scale, true);
      net.backward();
    }
    if (net.collectives) net.reduce_gradient(0);
    net.update({.lr = 1e-2, .weight_decay = 0.1, .clip = clip}, stop);
  }
}

}  // namespace gca::test
