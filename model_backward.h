// A DRT's backward pass and its step: the bodies of what model.h declares, which includes this at its end.
#pragma once
#include <algorithm>
#include <vector>

#include "model.h"

namespace gca {

// ---- backward ---------------------------------------------------------------------------------------------------
template <class Device>
void DRT<Device>::backward() {
  const Config& c = config;
  const int64_t B = pass_.in.B, D = c.width, S = c.chunk, R = B * pass_.in.T, C = pass_.in.T / S;
  int64_t end = table.size;
  auto ready = [&](int64_t begin) {
    grads_ready(begin, end);
    end = begin;
  };
  norm_backward(table.norm, {.dx = dx_, .dn = dn_, .x = top, .rstd = final_rstd}, R);
  ready(table.norm);

  if (!groups.empty()) {
    const act* lower_out = lower.empty() ? embedded : lower.back().out;
    const RetrievalShape retrieval = retrieval_shape();
    std::vector<FetchingLayer<act, stat>> fetching;
    device.zero(denc_, R * D);
    for (size_t g = groups.size(); g-- > 0;) {
      Group& group = groups[g];
      const act* group_in = g ? groups[g - 1].layers.back().out : lower_out;
      device.invert_picks(group.start, group.fetches, group.pick, B, C, static_cast<int>(reach.topk));
      device.zero(group.dw, PickTable{C, reach.topk}.size(B));
      for (size_t i = group.layers.size(); i-- > 0;) {
        layer_backward(group.layers[i], Kind::upper, i ? group.layers[i - 1].out : group_in, dx_, R, &group);
        const Layer& l = group.layers[i];
        fetching.push_back({.q = l.q,
                            .dout = l.fetched,
                            .lse = l.gca_lse,
                            .delta = l.delta,
                            .w = group.w,
                            .start = group.start,
                            .fetches = group.fetches});
        if (i) ready(group.layers[i].tensors.begin);
      }
      // r = Norm_g(x at the landmarks), score = r . L: both ends of the retrieval
      device.chunk_retrieval_backward({.dr = dr_,
                                       .dlandmark = denc_ + (S - 1) * D,
                                       .dw = group.dw,
                                       .w = group.w,
                                       .pick = group.pick,
                                       .start = group.start,
                                       .fetches = group.fetches,
                                       .r = group.r,
                                       .landmark = enc_out + (S - 1) * D,
                                       .scale = pass_.in.score_gradient},
                                      retrieval);
      device.rmsnorm_backward({.dx = dx_ + (S - 1) * D,
                               .dgain = gradient + group.lmk_norm,
                               .dn = dr_,
                               .x = group_in + (S - 1) * D,
                               .rstd = group.r_rstd,
                               .gain = weights + group.lmk_norm,
                               .residual = dx_ + (S - 1) * D},
                              B * C, D, S * D);
      ready(group.lmk_norm);
    }
    // CK | CV = Wkv h, L = h at the landmark: their gradients meet in the encoder's output
    device.gca_backward_memory(dkv_, fetching.data(), static_cast<int>(fetching.size()), kv, gca_shape());
    device.matmul_backward_weight(gradient + table.chunk_kv, dkv_, enc_out, R, D, 2 * D);
    device.matmul_backward_input(denc_, dkv_, weights + table.chunk_kv, true, R, D, 2 * D);
    const act* enc_top = encoder.empty() ? enc_in : encoder.back().out;
    norm_backward(table.enc_norm, {.dx = denc_, .dn = denc_, .x = enc_top, .rstd = enc_out_rstd}, R);
    for (size_t i = encoder.size(); i-- > 0;)
      layer_backward(encoder[i], Kind::encoder, i ? encoder[i - 1].out : enc_in, denc_, R, nullptr);
    norm_backward(table.enc_prenorm, {.dx = dx_, .dn = denc_, .x = lower_out, .rstd = enc_in_rstd, .residual = dx_}, R);
    ready(table.enc_prenorm);
  }
  for (size_t i = lower.size(); i-- > 0;) {
    layer_backward(lower[i], Kind::lower, i ? lower[i - 1].out : embedded, dx_, R, nullptr);
    ready(lower[i].tensors.begin);
  }
  device.embedding_backward(gradient + table.embedding, dx_, token, R, D);
  ready(0);
}

// ---- a step: begin_step, then (upload, forward, head, backward) for each micro-batch, then update ---------------
template <class Device>
void DRT<Device>::begin_step() {
  device.zero(gradient, shards.size);
  device.begin_step(state);
  reduced_ = 0;
}
// What ranks do together goes on beside the device's other work, behind what is queued before it.
template <class Device>
void DRT<Device>::reduce_gradient(int64_t begin) {
  for (; reduced_ < shards.buckets.size() && shards.buckets[reduced_].begin >= begin; reduced_++) {
    const Shards::Bucket& b = shards.buckets[reduced_];
    device.side_waits();
    collectives->reduce_scatter(gradient + b.begin, b.size);
  }
}
template <class Device>
void DRT<Device>::gather_weights() {
  if (!collectives) return;
  device.side_waits();
  collectives->begin_group();
  for (const Shards::Bucket& b : shards.buckets)
    collectives->all_gather(weights + b.begin, b.size * static_cast<int64_t>(sizeof(weight)));
  collectives->end_group();
  device.wait_for_side();
}
// A rank sees to its slices: of the sum of squares, which with the losses is then added up over ranks, and of the
// weights, which all then have.
template <class Device>
void DRT<Device>::update(const AdamW& hyper, double stop) {
  if (collectives) {
    GCA_CHECK(reduced_ == shards.buckets.size(), "of ", shards.buckets.size(), " buckets ", reduced_, " are reduced");
    device.wait_for_side();
    if (stop != 0) device.upload(&state->stop, &stop, sizeof stop);
  }
  for (const Shards::Bucket& b : shards.buckets) device.add_squares(state, gradient + b.flat, b.size);
  if (collectives) {
    device.tell_broken(state, shards.rank);
    device.side_waits();
    collectives->all_reduce(reinterpret_cast<double*>(state), StepState::sums);
    device.wait_for_side();
  }
  device.end_gradient(state, hyper.clip);
  for (const Shards::Bucket& b : shards.buckets) {
    std::vector<Segment> segments;  // of the slice, from its beginning
    for (const Segment& s : table.segments)
      if (const int64_t from = std::max(s.offset, b.flat), to = std::min(s.offset + s.size, b.flat + b.size); from < to)
        segments.push_back({from - b.flat, to - from, s.decay});
    const int64_t master_at = is_shared_out(masters) ? b.place : b.flat;
    device.adamw(masters + master_at, weights + b.flat, adam_m + b.place, adam_v + b.place, gradient + b.flat,
                 segments.data(), std::ssize(segments), state, hyper);
  }
  gather_weights();
}
template <class Device>
StepState DRT<Device>::step_state() const {
  StepState copy;
  device.download(&copy, state, sizeof copy);
  return copy;
}

// dx: in, the gradient of the layer's output; out, of its input x. Weights' gradients are +=.
template <class Device>
void DRT<Device>::layer_backward(Layer& l, Kind kind, const act* x, act* dx, int64_t rows, Group* group) {
  const int64_t D = config.width, F = config.ffn;
  // What recompute did not keep: the layer's inside here; h, and norms where they alone were not kept, by the ops of
  // their gradients on their way.
  if (recompute == Recompute::layers) layer_inside(l, kind, x, rows, nullptr, group);
  const auto anew = [this](act* made) { return recompute == Recompute::norms ? made : nullptr; };
  // Gradients that take the place of what they were the last to need.
  act *dgate_up = l.gate_up, *dqkv = l.gate_up, *dmlp_in = dh_, *dfetched = l.fetched;
  // out = a + Wdown swiglu(Wgate_up Norm(mlp_in)); a weight's gradient last, for its input may be made before it
  device.matmul_backward_input(dh_, dx, weights + l.tensors.down, false, rows, F, D);
  device.swiglu_backward(dgate_up, recompute == Recompute::none ? nullptr : l.h, dh_, l.gate_up, rows, F);
  device.matmul_backward_weight(gradient + l.tensors.down, dx, l.h, rows, F, D);
  device.matmul_backward_input(dn_, dgate_up, weights + l.tensors.gate_up, false, rows, D, 2 * F);
  if (kind == Kind::upper) {
    // mlp_in = a + Wo' fetched; fetched = GCA(q); q = Wq' Norm(a). The residual stream carries a: dx goes round mlp_in,
    // not through it.
    act* dq = dattended_;  // its place is free until the attention's turn comes
    norm_backward(l.tensors.norm2, {.dx = dmlp_in, .dn = dn_, .x = mlp_in(l, kind), .rstd = l.rstd2, .n = anew(l.n2)},
                  rows);
    device.matmul_backward_weight(gradient + l.tensors.gate_up, dgate_up, l.n2, rows, D, 2 * F);
    device.matmul_backward_weight(gradient + l.tensors.gca_o, dmlp_in, l.fetched, rows, D, D);
    device.matmul_backward_input(dfetched, dmlp_in, weights + l.tensors.gca_o, false, rows, D, D);
    device.gca_backward_query({.dq = dq,
                               .dw = group->dw,
                               .delta = l.delta,
                               .dout = dfetched,
                               .q = l.q,
                               .kv = kv,
                               .lse = l.gca_lse,
                               .pick = group->pick,
                               .w = group->w},
                              gca_shape());
    device.matmul_backward_input(dn_, dq, weights + l.tensors.gca_q, false, rows, D, D);
    norm_backward(
        l.tensors.gca_norm,
        {.dx = dx, .dn = dn_, .x = l.a, .rstd = l.gca_rstd, .residual = dx, .residual2 = dmlp_in, .n = anew(l.gca_n)},
        rows);
    device.matmul_backward_weight(gradient + l.tensors.gca_q, dq, l.gca_n, rows, D, D);
  } else {
    norm_backward(l.tensors.norm2,
                  {.dx = dx, .dn = dn_, .x = mlp_in(l, kind), .rstd = l.rstd2, .residual = dx, .n = anew(l.n2)}, rows);
    device.matmul_backward_weight(gradient + l.tensors.gate_up, dgate_up, l.n2, rows, D, 2 * F);
  }
  // a = x + Wo Attention(Wqkv Norm(x))
  device.matmul_backward_weight(gradient + l.tensors.o, dx, l.attended, rows, D, D);
  device.matmul_backward_input(dattended_, dx, weights + l.tensors.o, false, rows, D, D);
  if (kind == Kind::encoder)
    device.chunk_attention_backward(dqkv, dattended_, l.qkv, l.attended, l.lse, chunk_shape(rows));
  else device.sliding_attention_backward(dqkv, dattended_, l.qkv, l.attended, l.lse, sliding_shape());
  device.matmul_backward_input(dn_, dqkv, weights + l.tensors.qkv, false, rows, D, 3 * D);
  norm_backward(l.tensors.norm1, {.dx = dx, .dn = dn_, .x = x, .rstd = l.rstd1, .residual = dx, .n = anew(l.n1)}, rows);
  device.matmul_backward_weight(gradient + l.tensors.qkv, dqkv, l.n1, rows, D, 3 * D);
}

}  // namespace gca
