// Backend Cpu: every layer as loops, forward beside backward. The specification in code: the GPU's kernels are
// checked against Cpu<double>, and Cpu<double> against an independent oracle and finite differences.
//
// Every op: outputs, what is saved for backward, inputs, weights, sizes. A backward has the same list with d prefixes.
// Written (=): everything, but these, which are added to (+=): gradients of weights (dgain, dW, dE), dw of the picks,
// dlandmark, the sums in StepState, and dx of matmul_backward_input when it says so. The same bits for any number of
// threads: a task owns what it writes, and sums over tasks are made in index order.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/backend.h"
#include "cpu/choose_token.h"
#include "cpu/matmul.h"

namespace gca {

// ---- embedding: x[r] = E[token[r]] ------------------------------------------------------------------------------
// x (rows,D), token (rows), E (V,D)
template <class real, bool bf16>
void Cpu<real, bf16>::embedding_forward(act* x, const int32_t* token, const weight* E, int64_t rows, int64_t D) {
  over(rows, D, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) memcpy(x + r * D, E + token[r] * D, static_cast<size_t>(D) * sizeof(act));
  });
}
// dE[token[r]] += dx[r], rows in order; tasks own columns
template <class real, bool bf16>
void Cpu<real, bf16>::embedding_backward(grad* dE, const act* dx, const int32_t* token, int64_t rows, int64_t D) {
  const int64_t columns = 16;
  pool_.run(ceil_div(D, columns), [=](int64_t i, int) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = i * columns; j < std::min(D, (i + 1) * columns); j++) dE[token[r] * D + j] += dx[r * D + j];
  });
}

// ---- RMSNorm: out = gain * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps) -------------------------------------------
// out (rows,D) packed, rstd (rows), gain (D); the rows of x are stride apart (D: packed)
template <class real, bool bf16>
void Cpu<real, bf16>::rmsnorm_forward(act* out, stat* rstd, const act* x, const weight* gain, int64_t rows, int64_t D,
                                      int64_t stride, double eps) {
  over(rows, D, [=](int64_t begin, int64_t end) {
    simd([=]() GCA_INLINE {
      for (int64_t r = begin; r < end; r++) {
        const real* row = x + r * stride;
        rstd[r] = real(1) / std::sqrt(dot(row, row, D) / static_cast<real>(D) + static_cast<real>(eps));
        Row::scale_row(out + r * D, row, gain, rstd[r], D);
      }
    });
  });
}
// With g = gain * dn and xhat = x * rstd:  dx = residual + residual2 + rstd * (g - xhat * mean(g * xhat)),  dgain +=
// sum of dn * xhat. dx may be dn, or a residual. n, where it is asked for, has the bits that forward gave it.
template <class real, bool bf16>
void Cpu<real, bf16>::rmsnorm_backward(const RmsnormBackward<act, weight, grad, stat>& a, int64_t rows, int64_t D,
                                       int64_t stride) {
  act* dx = a.dx;
  grad* dgain = a.dgain;
  const act *dn = a.dn, *x = a.x, *residual = a.residual, *residual2 = a.residual2;
  act* n = a.n;
  const stat* rstd = a.rstd;
  const weight* gain = a.gain;
  const int64_t block = 64, blocks = ceil_div(rows, block);
  grow(partial_, blocks * D);
  real* partial = partial_.data();  // (blocks,D): each block's share of dgain, so that the order of the sum is fixed
  pool_.run(blocks, [=](int64_t i, int) {
    simd([=]() GCA_INLINE {
      real* sum = partial + i * D;
      std::fill_n(sum, D, real(0));
      for (int64_t r = i * block; r < std::min(rows, (i + 1) * block); r++) {
        const real* row = x + r * stride;
        const real mean = Row::dot3(dn + r * D, gain, row, D) * rstd[r] / static_cast<real>(D);
        Row::accumulate_gain(sum, dn + r * D, row, rstd[r], D);
        if (n) Row::scale_row(n + r * D, row, gain, rstd[r], D);
        Row::norm_gradient_row(dx + r * stride, dn + r * D, gain, row, rstd[r], mean,
                               residual ? residual + r * stride : nullptr, residual2 ? residual2 + r * stride : nullptr,
                               D);
      }
    });
  });
  over(D, blocks, [=](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < blocks; i++)
      for (int64_t j = begin; j < end; j++) dgain[j] += partial[i * D + j];
  });
}

// ---- matrix products: y = x W^T (+ residual) --------------------------------------------------------------------
// y (rows,out), x (rows,in), W (out,in), residual (rows,out) or null
template <class real, bool bf16>
void Cpu<real, bf16>::matmul_forward(act* y, const act* x, const weight* W, const act* residual, int64_t rows,
                                     int64_t in, int64_t out) {
  matmul(pool_, y, out, View<real>{x, in, 1}, View<real>{W, 1, in}, rows, out, in, false, residual, out);
  round_all(y, rows * out);
}
// dx = dy W, or dx += dy W
template <class real, bool bf16>
void Cpu<real, bf16>::matmul_backward_input(act* dx, const act* dy, const weight* W, bool accumulate, int64_t rows,
                                            int64_t in, int64_t out) {
  matmul(pool_, dx, in, View<real>{dy, out, 1}, View<real>{W, in, 1}, rows, in, out, accumulate);
  round_all(dx, rows * in);
}
// dW += dy^T x
template <class real, bool bf16>
void Cpu<real, bf16>::matmul_backward_weight(grad* dW, const act* dy, const act* x, int64_t rows, int64_t in,
                                             int64_t out) {
  matmul(pool_, dW, in, View<real>{dy, 1, out}, View<real>{x, in, 1}, out, in, rows, true);
}

// ---- SwiGLU: h = silu(gate) * up, silu(z) = z / (1 + e^-z) ------------------------------------------------------
// h (rows,F), gate_up (rows,2F): gate | up
template <class real, bool bf16>
void Cpu<real, bf16>::swiglu_forward(act* h, const act* gate_up, int64_t rows, int64_t F) {
  over(rows, F, [=](int64_t begin, int64_t end) {
    simd([=]() GCA_INLINE {
      for (int64_t r = begin; r < end; r++) {
        const real *gate = gate_up + 2 * r * F, *up = gate + F;
        real* out = h + r * F;
#pragma omp simd
        for (int64_t j = 0; j < F; j++) out[j] = Row::rounded(gate[j] / (1 + exponential(-gate[j])) * up[j]);
      }
    });
  });
}
template <class real, bool bf16>
void Cpu<real, bf16>::swiglu_backward(act* dgate_up, act* h, const act* dh, const act* gate_up, int64_t rows,
                                      int64_t F) {
  if (h) swiglu_forward(h, gate_up, rows, F);
  over(rows, F, [=](int64_t begin, int64_t end) {
    simd([=]() GCA_INLINE {
      for (int64_t r = begin; r < end; r++) {
        const real *gate = gate_up + 2 * r * F, *up = gate + F, *d = dh + r * F;
        real *dgate = dgate_up + 2 * r * F, *dup = dgate + F;
#pragma omp simd
        for (int64_t j = 0; j < F; j++) {
          const real sigmoid = 1 / (1 + exponential(-gate[j])), silu = gate[j] * sigmoid;
          dgate[j] = Row::rounded(d[j] * up[j] * (sigmoid + silu * (1 - sigmoid)));  // before up, which dup may replace
          dup[j] = Row::rounded(d[j] * silu);
        }
      }
    });
  });
}

// ---- sliding-window attention with ALiBi (drt.md SWA) -----------------------------------------------------------
// o[i] = sum_j p[i,j] v[j],  p = softmax over 0 <= i-j <= W of q[i].k[j]/sqrt(d) - 2^(-8(h+1)/H) (i-j)
// out (B,T,D), lse (B,H,T), qkv (B,T,3D), ring (B,W,2D) or null
template <class real, bool bf16>
void Cpu<real, bf16>::sliding_attention_forward(act* out, stat* lse, const act* qkv, const act* ring,
                                                const SlidingShape& s) {
  const int64_t D = s.H * s.d, first_block = s.first_slot / query_block, end_slot = s.first_slot + s.T;
  const int64_t blocks = ceil_div(end_slot, query_block) - first_block;
  pool_.run(s.B * blocks * s.H, [&, D](int64_t task, int worker) {
    const int64_t h = task % s.H, block = first_block + task / s.H % blocks, b = task / s.H / blocks;
    // Blocks and keys are cut at absolute slot numbers, so that a row and any segment of it are summed in the same
    // order.
    const int64_t i0 = std::max(block * query_block, s.first_slot), i1 = std::min((block + 1) * query_block, end_slot);
    const int64_t j0 = std::max<int64_t>(0, block * query_block - s.W), keys = i1 - j0, rows = i1 - i0;
    const bool from_ring = ring && j0 < s.first_slot;
    real* p = scratch(worker, rows * keys + (from_ring ? 2 * keys * s.d : 0));
    const real *q = qkv + (b * s.T + i0 - s.first_slot) * 3 * D + h * s.d,
               *k = qkv + (b * s.T + j0 - s.first_slot) * 3 * D + D + h * s.d, *v = k + D;
    int64_t stride = 3 * D;
    if (from_ring) {
      real* copy = p + rows * keys;
      for (int64_t j = j0; j < i1; j++) {
        const real* from = j >= s.first_slot         ? qkv + (b * s.T + j - s.first_slot) * 3 * D + D + h * s.d
                           : j >= s.first_slot - s.W ? ring + (b * s.W + j % s.W) * 2 * D + h * s.d
                                                     : nullptr;  // out of every window
        for (int64_t e = 0; e < s.d; e++) {
          copy[(j - j0) * s.d + e] = from ? from[e] : 0;
          copy[(keys + j - j0) * s.d + e] = from ? from[D + e] : 0;
        }
      }
      k = copy;
      v = copy + keys * s.d;
      stride = s.d;
    }
    matmul_tile(p, keys, View<real>{q, 3 * D, 1}, View<real>{k, 1, stride}, rows, keys, s.d, false);
    real* row_lse = lse + (b * s.H + h) * s.T - s.first_slot;
    simd([=]() GCA_INLINE {
      for (int64_t i = i0; i < i1; i++) {
        real* row = p + (i - i0) * keys;
        const int64_t begin = std::max<int64_t>(0, i - s.W - j0), end = i + 1 - j0;
        row_lse[i] = logits_row(row, begin, end, attention_scale(s.d), static_cast<real>(alibi_slope(h, s.H)), i - j0);
        Row::softmax_row(row, begin, end, keys, row_lse[i], real(1));
      }
    });
    real* o = out + (b * s.T + i0 - s.first_slot) * D + h * s.d;
    matmul_tile(o, D, View<real>{p, keys, 1}, View<real>{v, stride, 1}, rows, s.d, keys, false);
    round_tile(o, D, rows, s.d);
  });
}
// dP = dO V^T, dS = P (dP - delta), delta = rowsum(dO O);  dQ = dS K, dK = dS^T Q (both / sqrt(d)), dV = P^T dO.
// Whole rows only.
template <class real, bool bf16>
void Cpu<real, bf16>::sliding_attention_backward(act* dqkv, const act* dout, const act* qkv, const act* out,
                                                 const stat* lse, const SlidingShape& s) {
  const int64_t D = s.H * s.d;
  pool_.run(s.B * s.H, [&, D](int64_t task, int worker) {
    const int64_t h = task % s.H, b = task / s.H, first = b * s.T;
    const int64_t most_keys = std::min(s.T, s.W + query_block);
    real *p = scratch(worker, 2 * query_block * most_keys), *ds = p + query_block * most_keys;
    real *dq = dqkv + first * 3 * D + h * s.d, *dk = dq + D, *dv = dk + D;
    const real *q = qkv + first * 3 * D + h * s.d, *k = q + D, *v = k + D, *o = out + first * D + h * s.d,
               *d_o = dout + first * D + h * s.d;
    const real* row_lse = lse + task * s.T;
    for (int64_t i = 0; i < s.T; i++)
      for (int64_t e = 0; e < s.d; e++) dk[i * 3 * D + e] = dv[i * 3 * D + e] = 0;
    for (int64_t i0 = 0; i0 < s.T; i0 += query_block) {
      const int64_t i1 = std::min(i0 + query_block, s.T), j0 = std::max<int64_t>(0, i0 - s.W), keys = i1 - j0,
                    rows = i1 - i0;
      matmul_tile(p, keys, View<real>{q + i0 * 3 * D, 3 * D, 1}, View<real>{k + j0 * 3 * D, 1, 3 * D}, rows, keys, s.d,
                  false);
      matmul_tile(ds, keys, View<real>{d_o + i0 * D, D, 1}, View<real>{v + j0 * 3 * D, 1, 3 * D}, rows, keys, s.d,
                  false);
      simd([=]() GCA_INLINE {
        for (int64_t i = i0; i < i1; i++) {
          real *row = p + (i - i0) * keys, *ds_row = ds + (i - i0) * keys;
          const int64_t begin = std::max<int64_t>(0, i - s.W - j0), end = i + 1 - j0;
          Row::probabilities_row(row, begin, end, keys, attention_scale(s.d), static_cast<real>(alibi_slope(h, s.H)),
                                 i - j0, row_lse[i]);
          Row::ds_row_from_dp(ds_row, row, dot(d_o + i * D, o + i * D, s.d), attention_scale(s.d), keys);
        }
      });
      round_tile(p, keys, rows, keys);
      matmul_tile(dq + i0 * 3 * D, 3 * D, View<real>{ds, keys, 1}, View<real>{k + j0 * 3 * D, 3 * D, 1}, rows, s.d,
                  keys, false);
      matmul_tile(dk + j0 * 3 * D, 3 * D, View<real>{ds, 1, keys}, View<real>{q + i0 * 3 * D, 3 * D, 1}, keys, s.d,
                  rows, true);
      matmul_tile(dv + j0 * 3 * D, 3 * D, View<real>{p, 1, keys}, View<real>{d_o + i0 * D, D, 1}, keys, s.d, rows,
                  true);
    }
    for (real* tile : {dq, dk, dv}) round_tile(tile, 3 * D, s.T, s.d);
  });
}
// The keys and values of these slots into the ring: what later segments will see of them.
template <class real, bool bf16>
void Cpu<real, bf16>::ring_append(act* ring, const act* qkv, const SlidingShape& s) {
  const int64_t D = s.H * s.d;
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t t = std::max<int64_t>(0, s.T - s.W); t < s.T; t++)
      memcpy(ring + (b * s.W + (s.first_slot + t) % s.W) * 2 * D, qkv + (b * s.T + t) * 3 * D + D,
             static_cast<size_t>(2 * D) * sizeof(act));
}

// ---- chunk attention: bidirectional inside a chunk, rotary embedding on q and k (drt.md, chunk encoder) ---------
// out (N,S,D), lse (N,H,S), qkv (N,S,3D)
template <class real, bool bf16>
void Cpu<real, bf16>::chunk_attention_forward(act* out, stat* lse, const act* qkv, const ChunkShape& s) {
  const int64_t D = s.H * s.d, S = s.S;
  prepare_rotation(s);
  pool_.run(s.N * s.H, [&, D, S](int64_t task, int worker) {
    const int64_t h = task % s.H, n = task / s.H;
    real *p = scratch(worker, S * S + 2 * S * s.d), *q = p + S * S, *k = q + S * s.d;
    const real* from = qkv + n * S * 3 * D + h * s.d;
    rotate(q, s.d, from, 3 * D, s, 1);
    rotate(k, s.d, from + D, 3 * D, s, 1);
    matmul_tile(p, S, View<real>{q, s.d, 1}, View<real>{k, 1, s.d}, S, S, s.d, false);
    real* row_lse = lse + task * S;
    simd([=]() GCA_INLINE {
      for (int64_t i = 0; i < S; i++) {
        row_lse[i] = logits_row(p + i * S, 0, S, attention_scale(s.d), real(0), 0);
        Row::softmax_row(p + i * S, 0, S, S, row_lse[i], real(1));
      }
    });
    real* o = out + n * S * D + h * s.d;
    matmul_tile(o, D, View<real>{p, S, 1}, View<real>{from + 2 * D, 3 * D, 1}, S, s.d, S, false);
    round_tile(o, D, S, s.d);
  });
}
// As in sliding_attention_backward; dq and dk are turned back by the transposed rotation.
template <class real, bool bf16>
void Cpu<real, bf16>::chunk_attention_backward(act* dqkv, const act* dout, const act* qkv, const act* out,
                                               const stat* lse, const ChunkShape& s) {
  const int64_t D = s.H * s.d, S = s.S;
  prepare_rotation(s);
  pool_.run(s.N * s.H, [&, D, S](int64_t task, int worker) {
    const int64_t h = task % s.H, n = task / s.H;
    real *p = scratch(worker, 2 * S * S + 3 * S * s.d), *ds = p + S * S, *q = ds + S * S, *k = q + S * s.d,
         *turned = k + S * s.d;
    const real *from = qkv + n * S * 3 * D + h * s.d, *o = out + n * S * D + h * s.d, *d_o = dout + n * S * D + h * s.d;
    real* to = dqkv + n * S * 3 * D + h * s.d;
    rotate(q, s.d, from, 3 * D, s, 1);
    rotate(k, s.d, from + D, 3 * D, s, 1);
    matmul_tile(p, S, View<real>{q, s.d, 1}, View<real>{k, 1, s.d}, S, S, s.d, false);
    matmul_tile(ds, S, View<real>{d_o, D, 1}, View<real>{from + 2 * D, 1, 3 * D}, S, S, s.d, false);
    const real* row_lse = lse + task * S;
    simd([=]() GCA_INLINE {
      for (int64_t i = 0; i < S; i++) {
        Row::probabilities_row(p + i * S, 0, S, S, attention_scale(s.d), real(0), 0, row_lse[i]);
        Row::ds_row_from_dp(ds + i * S, p + i * S, dot(d_o + i * D, o + i * D, s.d), attention_scale(s.d), S);
      }
    });
    round_tile(p, S, S, S);
    matmul_tile(turned, s.d, View<real>{ds, S, 1}, View<real>{k, s.d, 1}, S, s.d, S, false);
    rotate(to, 3 * D, turned, s.d, s, -1);
    matmul_tile(turned, s.d, View<real>{ds, 1, S}, View<real>{q, s.d, 1}, S, s.d, S, false);
    rotate(to + D, 3 * D, turned, s.d, s, -1);
    matmul_tile(to + 2 * D, 3 * D, View<real>{p, 1, S}, View<real>{d_o, D, 1}, S, s.d, S, false);
    round_tile(to + 2 * D, 3 * D, S, s.d);
  });
}

// ---- causal chunk retrieval (drt.md, retrieval) -----------------------------------------------------------------
// Row 0 of each table: the chunk before a row's first has picked nothing. pick, w (B,C+1,K)
template <class real, bool bf16>
void Cpu<real, bf16>::no_pick(int32_t* pick, stat* w, int64_t B, int64_t C, int K) {
  for (int64_t b = 0; b < B; b++)
    for (int64_t k = 0; k < K; k++) {
      const int64_t at = PickTable{C, K}.serving(b, 0, k);
      pick[at] = -1;
      w[at] = 0;
    }
}
// score[c,m] = r_c . L_m / sqrt(D), m < candidates(c);  pick = K largest of score + noise, the lower chunk first among
// equals; w = softmax over the raw scores of the picks, or equal ones. pick, w (B,C+1,K): rows 1..C are written; r
// (B,C,D)
template <class real, bool bf16>
void Cpu<real, bf16>::chunk_retrieval_forward(int32_t* pick, stat* w, const act* r, const act* landmark,
                                              const RetrievalShape& s, const Selection& selection) {
  pool_.run(s.B * s.C, [&](int64_t task, int worker) {
    const int64_t c = task % s.C, b = task / s.C, chunk = s.first_chunk + c, past = candidates(chunk);
    int32_t* picks = pick + s.table().picked_by(b, c);
    real* weights = w + s.table().picked_by(b, c);
    real raw[max_topk], key[max_topk];
    const real *query = r + task * s.D, *landmarks = landmark + b * s.row_stride;
    if (selection.picking == Picking::given || selection.picking == Picking::newest) {
      for (int k = 0; k < s.K; k++) {
        if (selection.picking == Picking::newest) picks[k] = newest_pick(selection, chunk, k);
        if (picks[k] >= past)
          throw Error(str("given picks: chunk ", chunk, " fetches chunk ", picks[k], ", which is not in its past"));
        if (picks[k] >= 0) score_row(raw + k, query, landmarks + picks[k] * s.stride, 1, s);
      }
    } else {
      int found = 0;
      real* scores = scratch(worker, past);
      const auto scale = static_cast<real>(selection.noise_scale);
      if (selection.picking != Picking::none) score_row(scores, query, landmarks, past, s);
      Philox draw{};
      for (int64_t m = 0; m < past && selection.picking != Picking::none; m++) {
        if (m % 4 == 0 && ((selection.noise && !selection.given_noise) || selection.picking == Picking::uniform))
          draw = selection_draw(selection, b, chunk, m / 4);
        real value = scores[m];
        if (selection.picking == Picking::uniform) value = static_cast<real>(draw.word[m % 4]);
        else if (selection.given_noise)
          value += scale * static_cast<real>(selection.given_noise[(b * s.C + c) * s.C + m]);
        else if (selection.noise) value += scale * static_cast<real>(gumbel(draw.word[m % 4]));
        if (!(value == value)) value = -std::numeric_limits<real>::infinity();
        if (found == s.K && !(value > key[found - 1])) continue;
        int k = found < s.K ? found++ : found - 1;
        for (; k > 0 && value > key[k - 1]; k--) {
          key[k] = key[k - 1];
          raw[k] = raw[k - 1];
          picks[k] = picks[k - 1];
        }
        key[k] = value;
        raw[k] = scores[m];
        picks[k] = static_cast<int32_t>(m);
      }
      std::fill(picks + found, picks + s.K, -1);
    }
    real top = -std::numeric_limits<real>::infinity(), sum = 0;
    for (int k = 0; k < s.K; k++) {
      if (picks[k] < 0) continue;
      if (selection.equal_weights && raw[k] == raw[k]) raw[k] = 0;
      if (!(raw[k] <= top)) top = raw[k];
    }
    // No finite score: every weight is 0. A score that is not a number makes every weight so: the step will be
    // skipped.
    for (int k = 0; k < s.K; k++)
      sum += weights[k] = picks[k] >= 0 && top != -std::numeric_limits<real>::infinity() ? std::exp(raw[k] - top) : 0;
    for (int k = 0; k < s.K; k++) weights[k] = sum == 0 ? 0 : weights[k] / sum;
  });
}
// dscore_k = w_k (dw_k - sum w dw) / sqrt(D);  dr_c = sum_k dscore_k L_pick;  dL_m += sum over the (c,k) that fetched
// m of dscore r_c.
template <class real, bool bf16>
void Cpu<real, bf16>::chunk_retrieval_backward(const RetrievalBackward<act, stat>& a, const RetrievalShape& s) {
  act *dr = a.dr, *dlandmark = a.dlandmark;
  stat* dw = a.dw;
  const stat* w = a.w;
  const int32_t *pick = a.pick, *start = a.start, *fetches = a.fetches;
  const act *r = a.r, *landmark = a.landmark;
  const real scale_of_all = static_cast<real>(a.scale);
  over(s.B * s.C, s.D * s.K, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t c = i % s.C, b = i / s.C, row = s.table().picked_by(b, c);
      real mean = 0;
      for (int k = 0; k < s.K; k++) mean += w[row + k] * dw[row + k];
      std::fill_n(dr + i * s.D, s.D, real(0));
      for (int k = 0; k < s.K; k++) {
        dw[row + k] = scale_of_all * (w[row + k] * (dw[row + k] - mean) / std::sqrt(static_cast<real>(s.D)));
        if (pick[row + k] < 0) continue;
        const real *from = landmark + b * s.row_stride + pick[row + k] * s.stride, scale = dw[row + k];
        for (int64_t j = 0; j < s.D; j++) dr[i * s.D + j] += scale * from[j];
      }
    }
  });
  round_all(dr, s.B * s.C * s.D);
  over(s.B * s.C, s.D * s.K, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i % s.C, b = i / s.C;
      real* to = dlandmark + b * s.row_stride + m * s.stride;
      for (int32_t e = start[b * (s.C + 1) + m]; e < start[b * (s.C + 1) + m + 1]; e++) {
        const int64_t at = fetches[b * s.C * s.K + e];  // table row * K + k; row c+1 was picked by chunk c
        const real *from = r + (b * s.C + at / s.K - 1) * s.D, scale = dw[s.table().serving(b, 0) + at];
        for (int64_t j = 0; j < s.D; j++) to[j] += scale * from[j];
      }
      for (int64_t j = 0; j < s.D; j++) to[j] = Row::rounded(to[j]);
    }
  });
}
// The pick table turned round: fetches[start[m] .. start[m+1]) lists, in order, row * K + k of each pick of chunk m in
// the table's rows 0..C-1, those that serve a chunk. start (B,C+1), fetches (B,C*K), pick (B,C+1,K)
template <class real, bool bf16>
void Cpu<real, bf16>::invert_picks(int32_t* start, int32_t* fetches, const int32_t* pick, int64_t B, int64_t C, int K) {
  pool_.run(B, [=](int64_t b, int) {
    int32_t *at = start + b * (C + 1), *list = fetches + b * C * K;
    const int32_t* table = pick + PickTable{C, K}.serving(b, 0);
    std::fill_n(at, C + 1, 0);
    for (int64_t i = 0; i < C * K; i++)
      if (table[i] >= 0) at[table[i] + 1]++;
    for (int64_t m = 0; m < C; m++) at[m + 1] += at[m];
    for (int64_t i = 0; i < C * K; i++)
      if (table[i] >= 0) list[at[table[i]]++] = static_cast<int32_t>(i);
    for (int64_t m = C; m > 0; m--) at[m] = at[m - 1];  // filling moved each start to its end, the next one's start
    at[0] = 0;
  });
}

// ---- grouped cross attention (drt.md, upper layer) --------------------------------------------------------------
// The landmark slot's keys and values become zero. kv (N,S,2D), N chunks
template <class real, bool bf16>
void Cpu<real, bf16>::zero_landmarks(act* kv, int64_t N, int64_t S, int64_t D) {
  for (int64_t n = 0; n < N; n++) std::fill_n(kv + (n * S + S - 1) * 2 * D, 2 * D, real(0));
}
// o[slots of chunk c] = sum_k w[c,k] Attend(q, CK[pick[c,k]], CV[pick[c,k]]),  Attend: softmax over the slots of that
// one chunk out (B,T,D), lse (B,C,K,H,S) or null, q (B,T,D), kv (B,M,S,2D), pick, w (B,C+1,K)
template <class real, bool bf16>
void Cpu<real, bf16>::gca_forward(act* out, stat* lse, const act* q, const act* kv, const int32_t* pick, const stat* w,
                                  const GcaShape& s) {
  const int64_t D = s.H * s.d, C = s.chunks();
  pool_.run(s.B * C * s.H, [&, D, C](int64_t task, int worker) {
    const int64_t h = task % s.H, c = task / s.H % C, b = task / s.H / C;
    const Slots t = slots_of(c, s);
    real *p = scratch(worker, s.S * s.S + s.S * s.d), *sum = p + s.S * s.S;
    const real* query = q + (b * s.T + t.first) * D + h * s.d;
    std::fill_n(sum, t.count * s.d, real(0));
    for (int k = 0; k < s.K; k++) {
      const int64_t at = s.table().serving(b, c, k);
      if (pick[at] < 0) continue;
      const real *key = kv + (b * s.M + pick[at]) * s.S * 2 * D + h * s.d, *value = key + D;
      real* row_lse = lse ? lse + gca_stat(s, b, c, k, static_cast<int>(h)) : nullptr;
      matmul_tile(p, s.S, View<real>{query, D, 1}, View<real>{key, 1, 2 * D}, t.count, s.keys(), s.d, false);
      fetched_softmax(p, row_lse, w[at], t.count, s);
      matmul_tile(sum, s.d, View<real>{p, s.S, 1}, View<real>{value, 2 * D, 1}, t.count, s.d, s.keys(), true);
    }
    for (int64_t i = 0; i < t.count; i++)
      for (int64_t e = 0; e < s.d; e++) out[(b * s.T + t.first + i) * D + h * s.d + e] = Row::rounded(sum[i * s.d + e]);
  });
}
// By query, a layer at a time, whole rows: with P the softmax in one fetched chunk, dP = dO V^T, delta = rowsum(P
// dP), dS = w P (dP - delta), dQ = sum_k dS K / sqrt(d), dw += sum over heads and slots of delta.
template <class real, bool bf16>
void Cpu<real, bf16>::gca_backward_query(const GcaBackward<act, stat>& a, const GcaShape& s) {
  act* dq = a.dq;
  stat *dw = a.dw, *delta = a.delta;
  const act *dout = a.dout, *q = a.q, *kv = a.kv;
  const stat *lse = a.lse, *w = a.w;
  const int32_t* pick = a.pick;
  const int64_t D = s.H * s.d, C = s.chunks();
  pool_.run(s.B * C * s.H, [&, D, C](int64_t task, int worker) {
    const int64_t h = task % s.H, c = task / s.H % C, b = task / s.H / C, first = (b * s.T + c * s.S) * D + h * s.d,
                  S = s.S;
    real *p = scratch(worker, 2 * S * S + S * s.d), *ds = p + S * S, *sum = ds + S * S;
    std::fill_n(sum, S * s.d, real(0));
    for (int k = 0; k < s.K; k++) {
      const int64_t at = s.table().serving(b, c, k), saved = gca_stat(s, b, c, k, static_cast<int>(h));
      if (pick[at] < 0) continue;
      const real *key = kv + (b * s.M + pick[at]) * S * 2 * D + h * s.d, *value = key + D;
      matmul_tile(p, S, View<real>{q + first, D, 1}, View<real>{key, 1, 2 * D}, S, s.keys(), s.d, false);
      matmul_tile(ds, S, View<real>{dout + first, D, 1}, View<real>{value, 1, 2 * D}, S, s.keys(), s.d, false);
      const real* row_lse = lse + saved;
      real *row_delta = delta + saved, weight_k = w[at];
      simd([=]() GCA_INLINE {
        for (int64_t i = 0; i < S; i++) {
          Row::probabilities_row(p + i * S, 0, s.keys(), s.keys(), attention_scale(s.d), real(0), 0, row_lse[i]);
          row_delta[i] = dot(p + i * S, ds + i * S, s.keys());
          Row::ds_row_from_dp(ds + i * S, p + i * S, row_delta[i], weight_k * attention_scale(s.d), s.keys());
        }
      });
      matmul_tile(sum, s.d, View<real>{ds, S, 1}, View<real>{key, 2 * D, 1}, S, s.d, s.keys(), true);
    }
    for (int64_t i = 0; i < S; i++)
      for (int64_t e = 0; e < s.d; e++) dq[first + i * D + e] = Row::rounded(sum[i * s.d + e]);
  });
  over(s.B * C * s.K, s.H * s.S, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t k = i % s.K, c = i / s.K % C, b = i / s.K / C, at = s.table().serving(b, c, k);
      if (pick[at] < 0) continue;
      const stat* from = delta + gca_stat(s, b, c, static_cast<int>(k), 0);
      for (int64_t j = 0; j < static_cast<int64_t>(s.H) * s.S; j++) dw[at] += from[j];
    }
  });
}
// For the memory, once, over all layers of all groups: dK = sum of dS^T Q / sqrt(d), dV = sum of (w P)^T dO, over
// every (layer, chunk, pick) that fetched the chunk, layers in the given order. dkv (B,M,S,2D), its landmark rows
// zero; layers: a host array of n
template <class real, bool bf16>
void Cpu<real, bf16>::gca_backward_memory(act* dkv, const FetchingLayer<act, stat>* layers, int n_layers, const act* kv,
                                          const GcaShape& s) {
  const int64_t D = s.H * s.d, C = s.chunks();
  pool_.run(s.B * s.M * s.H, [&, D, C](int64_t task, int worker) {
    const int64_t h = task % s.H, m = task / s.H % s.M, b = task / s.H / s.M, S = s.S;
    const real *key = kv + (b * s.M + m) * S * 2 * D + h * s.d, *value = key + D;
    real *p = scratch(worker, 2 * S * S + 2 * S * s.d), *ds = p + S * S, *dk = ds + S * S, *dv = dk + S * s.d;
    std::fill_n(dk, 2 * S * s.d, real(0));
    for (int l = 0; l < n_layers; l++) {
      const FetchingLayer<act, stat>& layer = layers[l];
      for (int32_t e = layer.start[b * (s.M + 1) + m]; e < layer.start[b * (s.M + 1) + m + 1]; e++) {
        const int64_t at = layer.fetches[b * C * s.K + e], c = at / s.K;
        const int64_t first = (b * s.T + c * S) * D + h * s.d,
                      saved = gca_stat(s, b, c, static_cast<int>(at % s.K), static_cast<int>(h));
        const real *q = layer.q + first, *d_o = layer.dout + first, *row_lse = layer.lse + saved,
                   *row_delta = layer.delta + saved;
        const real weight_k = layer.w[s.table().serving(b, 0) + at];
        matmul_tile(p, S, View<real>{q, D, 1}, View<real>{key, 1, 2 * D}, S, s.keys(), s.d, false);
        matmul_tile(ds, S, View<real>{d_o, D, 1}, View<real>{value, 1, 2 * D}, S, s.keys(), s.d, false);
        simd([=]() GCA_INLINE {
          for (int64_t i = 0; i < S; i++) {
            Row::probabilities_row(p + i * S, 0, s.keys(), s.keys(), attention_scale(s.d), real(0), 0, row_lse[i]);
            Row::ds_row_from_dp(ds + i * S, p + i * S, row_delta[i], weight_k * attention_scale(s.d), s.keys());
            Row::scale_in_place(p + i * S, weight_k, s.keys());
          }
        });
        matmul_tile(dk, s.d, View<real>{ds, 1, S}, View<real>{q, D, 1}, s.keys(), s.d, S, true);
        matmul_tile(dv, s.d, View<real>{p, 1, S}, View<real>{d_o, D, 1}, s.keys(), s.d, S, true);
      }
    }
    for (int64_t j = 0; j < S; j++)
      for (int64_t e = 0; e < s.d; e++) {
        real* to = dkv + ((b * s.M + m) * S + j) * 2 * D + h * s.d + e;
        to[0] = j < S - 1 ? Row::rounded(dk[j * s.d + e]) : 0;
        to[D] = j < S - 1 ? Row::rounded(dv[j * s.d + e]) : 0;
      }
  });
}

// ---- one slot of each row (ops.h, SlotRow) ----------------------------------------------------------------------
// y = Norm(x) W^T, for passes that keep nothing: n (rows,in), rstd (rows) are working memory, which may stay as it was.
// y (rows,out), x (rows,in), gain (in), W (out,in)
template <class real, bool bf16>
void Cpu<real, bf16>::norm_matmul_forward(act* y, act* n, stat* rstd, const act* x, const weight* gain, const weight* W,
                                          int64_t rows, int64_t in, int64_t out, double eps) {
  rmsnorm_forward(n, rstd, x, gain, rows, in, in, eps);
  matmul_forward(y, n, W, nullptr, rows, in, out);
}
// y = SwiGLU(gate_up) W^T + residual, likewise: h (rows,F) is working memory.
// y, residual (rows,out), gate_up (rows,2F): gate | up, W (out,F)
template <class real, bool bf16>
void Cpu<real, bf16>::swiglu_matmul_forward(act* y, act* h, const act* gate_up, const weight* W, const act* residual,
                                            int64_t rows, int64_t F, int64_t out) {
  swiglu_forward(h, gate_up, rows, F);
  matmul_forward(y, h, W, residual, rows, F, out);
}
// Sliding-window attention; the slot's k | v go into the ring. out (B,D), qkv (B,3D)
template <class real, bool bf16>
void Cpu<real, bf16>::slot_attention_forward(act* out, const act* qkv, const SlotRow<act, stat>* rows, int64_t layer,
                                             const SlotShape& s) {
  const int64_t D = s.H * s.d;
  grow(partial_, s.H);
  for (int64_t b = 0; b < s.B; b++) {
    const SlidingShape one{1, 1, s.H, s.d, s.W, rows[b].slot};
    act* ring = rows[b].ring + layer * rows[b].ring_stride;
    sliding_attention_forward(out + b * D, partial_.data(), qkv + b * 3 * D, ring, one);
    ring_append(ring, qkv + b * 3 * D, one);
  }
}
// Grouped cross attention to the picks that serve the slot. out, q (B,D)
template <class real, bool bf16>
void Cpu<real, bf16>::slot_gca_forward(act* out, const act* q, const SlotRow<act, stat>* rows, int64_t group,
                                       const SlotShape& s) {
  const int64_t D = s.H * s.d;
  for (int64_t b = 0; b < s.B; b++)
    gca_forward(out + b * D, nullptr, q + b * D, rows[b].kv, rows[b].pick + group * rows[b].pick_stride,
                rows[b].w + group * rows[b].w_stride, {1, 1, s.H, s.d, s.S, s.K, 0, rows[b].slot, s.null_slot});
}
// The slot's place in the row's unfinished chunk. x (B,D)
template <class real, bool bf16>
void Cpu<real, bf16>::keep_slot(const act* x, const SlotRow<act, stat>* rows, const SlotShape& s) {
  const int64_t D = s.H * s.d;
  for (int64_t b = 0; b < s.B; b++) std::copy_n(x + b * D, D, rows[b].unfinished_chunk + rows[b].slot % s.S * D);
}
// The rows stand one slot further. rows (B)
template <class real, bool bf16>
void Cpu<real, bf16>::next_slot(SlotRow<act, stat>* rows, int64_t B) {
  for (int64_t b = 0; b < B; b++) rows[b].slot++;
}

// ---- cross entropy, a piece of logits at a time -----------------------------------------------------------------
// loss[r] = logsumexp(logits[r]) - logits[r,target[r]], 0 where target[r] is -1 or less.
// scale != 0: logits become their gradient, scale * weight[r] * (softmax - onehot).
// loss, target, weight (rows; null: 1), logits (rows,V) rows stride apart
template <class real, bool bf16>
void Cpu<real, bf16>::cross_entropy(stat* loss, act* logits, const int32_t* target, const float* weight, double scale,
                                    int64_t rows, int64_t V, int64_t stride) {
  over(rows, V, [=](int64_t begin, int64_t end) {
    simd([=]() GCA_INLINE {
      for (int64_t r = begin; r < end; r++) {
        real* row = logits + r * stride;
        loss[r] = 0;
        if (target[r] >= 0) {
          const real lse = logits_row(row, 0, V, real(1), real(0), 0);
          loss[r] = lse - row[target[r]];
          if (scale != 0) {
            const real factor = static_cast<real>(scale) * (weight ? static_cast<real>(weight[r]) : real(1));
            const real probability = exponential(row[target[r]] - lse);
            Row::softmax_row(row, 0, V, stride, lse, factor);
            row[target[r]] = Row::rounded(factor * (probability - 1));
          }
        } else if (scale != 0) {
          std::fill_n(row, stride, real(0));
        }
      }
    });
  });
}
// The sums of the step: loss += scale * sum of weight * loss[r], plain_loss += scale * sum of loss[r], in row order.
template <class real, bool bf16>
void Cpu<real, bf16>::add_loss(StepState* state, const stat* loss, const float* weight, double scale, int64_t rows) {
  for (int64_t r = 0; r < rows; r++) {
    state->loss += scale * static_cast<double>(loss[r]) * (weight ? static_cast<double>(weight[r]) : 1.0);
    state->plain_loss += scale * static_cast<double>(loss[r]);
  }
}

// token[r] = the landmark where that is row r's slot, else chosen[r]. token, chosen, rows (B)
template <class real, bool bf16>
void Cpu<real, bf16>::feed_tokens(int32_t* token, const int32_t* chosen, const SlotRow<act, stat>* rows,
                                  int32_t landmark, int64_t B, int64_t S) {
  for (int64_t b = 0; b < B; b++) token[b] = rows[b].slot % S == S - 1 ? landmark : chosen[b];
}
// noted[r, index[r] % places] = token[r] = fresh[r], and index[r] is one more; of all rows, or of those (rows) whose
// slot before this one was no landmark's. noted (B,places), token, fresh, index, rows (B)
template <class real, bool bf16>
void Cpu<real, bf16>::note_tokens(int32_t* noted, int64_t* index, int32_t* token, const int32_t* fresh,
                                  const SlotRow<act, stat>* rows, int64_t B, int64_t S, int64_t places) {
  for (int64_t b = 0; b < B; b++) {
    if (rows && rows[b].slot % S == 0) continue;
    noted[b * places + index[b]++ % places] = token[b] = fresh[b];
  }
}
// ---- the next token of each row (cpu/choose_token.h) --------------------------------------------------------------
// token (rows), logits (rows,V) rows stride apart, taken as floats: what a text is continued with is the same in double
template <class real, bool bf16>
void Cpu<real, bf16>::choose_token(int32_t* token, const act* logits, int64_t rows, int64_t V, int64_t stride,
                                   const Choice& c) {
  GCA_CHECK(c.temperature <= 0 || c.index, "a draw needs the number of each row's token");
  pool_.run(rows, [=](int64_t r, int) {
    const std::vector<float> row(logits + r * stride, logits + r * stride + V);
    token[r] = gca::choose_token(row, c.temperature, c.top_p, c.temperature > 0 ? uniform_open(choice_draw(c, r)) : 0,
                                 c.excluded);
  });
}

// ---- optimiser (drt.md) -----------------------------------------------------------------------------------------
template <class real, bool bf16>
void Cpu<real, bf16>::begin_step(StepState* state) {
  state->loss = state->plain_loss = state->squares = state->stop = state->broken = state->broken_rank = 0;
}
// Before ranks add up their figures: which one's loss is not finite.
template <class real, bool bf16>
void Cpu<real, bf16>::tell_broken(StepState* state, int rank) {
  if (std::isfinite(state->loss)) return;
  state->broken = 1;
  state->broken_rank = rank;
}
template <class real, bool bf16>
void Cpu<real, bf16>::add_squares(StepState* state, const grad* gradient, int64_t n) {
  const int64_t block = 1 << 16, blocks = ceil_div(n, block);
  std::vector<double> sums(blocks);
  pool_.run(blocks, [&](int64_t i, int) {
    double* sum = &sums[i];
    simd([=]() GCA_INLINE { *sum = Row::sum_of_squares(gradient + i * block, std::min(block, n - i * block)); });
  });
  double total = 0;
  for (double sum : sums) total += sum;
  state->squares += total;
}
// The norm of all gradients, the factor that clips it, and whether the step may change anything.
template <class real, bool bf16>
void Cpu<real, bf16>::end_gradient(StepState* state, double clip) {
  finish_gradient(*state, clip);
}
// w *= 1 - lr decay (matrices), m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, w -= lr mhat / (sqrt(vhat) + eps). A
// skipped step: nothing. masters, gradient, m, v: flat buffers; weights: the working copy (the masters themselves, or
// rounded from them)
template <class real, bool bf16>
void Cpu<real, bf16>::adamw(master* masters, weight* weights, master* m, master* v, const grad* gradient,
                            const Segment* segments, int64_t n_segments, const StepState* state, const AdamW& hyper) {
  if (state->skip) return;
  const double t = static_cast<double>(state->adam_steps);
  const real b1 = static_cast<real>(hyper.beta1), b2 = static_cast<real>(hyper.beta2),
             eps = static_cast<real>(hyper.eps), scale = static_cast<real>(state->grad_scale);
  const real rate = static_cast<real>(hyper.lr / (1 - std::pow(hyper.beta1, t))),
             correction2 = static_cast<real>(1 / (1 - std::pow(hyper.beta2, t)));
  const real a1 = static_cast<real>(1 - hyper.beta1), a2 = static_cast<real>(1 - hyper.beta2);
  for (int64_t i = 0; i < n_segments; i++) {
    const Segment segment = segments[i];
    const real keep = segment.decay ? static_cast<real>(1 - hyper.lr * hyper.weight_decay) : real(1);
    over(segment.size, 8, [=](int64_t begin, int64_t end) {
      simd([=]() GCA_INLINE {
#pragma omp simd
        for (int64_t j = segment.offset + begin; j < segment.offset + end; j++) {
          const real g = gradient[j] * scale;
          m[j] = b1 * m[j] + a1 * g;
          v[j] = b2 * v[j] + a2 * g * g;
          masters[j] = masters[j] * keep - rate * m[j] / (std::sqrt(v[j] * correction2) + eps);
        }
      });
    });
    if (!weights_are_masters) cast_weights(weights + segment.offset, masters + segment.offset, segment.size);
  }
}

// ---- what several ops use
// Scores of one query against n landmarks: each by itself, so that they do not depend on what else is computed.
template <class real, bool bf16>
void Cpu<real, bf16>::score_row(real* scores, const real* query, const real* landmark, int64_t n,
                                const RetrievalShape& s) {
  simd([=]() GCA_INLINE {
    for (int64_t m = 0; m < n; m++)
      scores[m] = dot(query, landmark + m * s.stride, s.D) / std::sqrt(static_cast<real>(s.D));
  });
}
// p (rows,S) of raw products becomes w * softmax over the keys of one fetched chunk
template <class real, bool bf16>
void Cpu<real, bf16>::fetched_softmax(real* p, real* lse, real w, int64_t rows, const GcaShape& s) {
  simd([=]() GCA_INLINE {
    for (int64_t i = 0; i < rows; i++) {
      const real row_lse = logits_row(p + i * s.S, 0, s.keys(), attention_scale(s.d), real(0), 0);
      if (lse) lse[i] = row_lse;
      Row::softmax_row(p + i * s.S, 0, s.keys(), s.S, row_lse, w);
    }
  });
}
// The slots of this call that lie in the c-th chunk that it touches.
template <class real, bool bf16>
typename Cpu<real, bf16>::Slots Cpu<real, bf16>::slots_of(int64_t c, const GcaShape& s) {
  const int64_t chunk = s.first_chunk() + c, first = std::max(chunk * s.S, s.first_slot),
                end = std::min((chunk + 1) * s.S, s.first_slot + s.T);
  return {first - s.first_slot, end - first};
}
template <class real, bool bf16>
void Cpu<real, bf16>::prepare_rotation(const ChunkShape& s) {
  if (rotation_S_ == s.S && rotation_d_ == s.d) return;
  rotation_.resize(static_cast<size_t>(s.S) * static_cast<size_t>(s.d));
  for (int p = 0; p < s.S; p++)
    for (int t = 0; t < s.d / 2; t++) {
      const double angle = rotary_angle(p, t, s.d);
      rotation_[p * s.d + t] = static_cast<real>(std::cos(angle));
      rotation_[p * s.d + s.d / 2 + t] = static_cast<real>(std::sin(angle));
    }
  rotation_S_ = s.S;
  rotation_d_ = s.d;
}
template <class real, bool bf16>
void Cpu<real, bf16>::rotate(real* to, int64_t to_stride, const real* from, int64_t from_stride, const ChunkShape& s,
                             real sign) const {
  const int half = s.d / 2;
  for (int p = 0; p < s.S; p++) {
    const real *u = from + p * from_stride, *v = u + half, *cosine = rotation_.data() + static_cast<int64_t>(p) * s.d,
               *sine = cosine + half;
    for (int t = 0; t < half; t++) {
      to[p * to_stride + t] = Row::rounded(u[t] * cosine[t] - sign * v[t] * sine[t]);
      to[p * to_stride + half + t] = Row::rounded(v[t] * cosine[t] + sign * u[t] * sine[t]);
    }
  }
}
template <class real, bool bf16>
void Cpu<real, bf16>::round_all(real* x, int64_t n) {
  if constexpr (bf16) cast_weights(x, x, n);
  else {
    (void)x;
    (void)n;
  }
}
template <class real, bool bf16>
void Cpu<real, bf16>::round_tile(real* x, int64_t stride, int64_t rows, int64_t columns) {
  if constexpr (bf16)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) x[i * stride + j] = Row::rounded(x[i * stride + j]);
  else {
    (void)x;
    (void)stride;
    (void)rows;
    (void)columns;
  }
}

// ---- the device -------------------------------------------------------------------------------------------------
template <class real, bool bf16>
std::string Cpu<real, bf16>::description() const {
  return str("CPU, ", pool_.size(), " threads, ", isa_name(isa()), ", ",
             bf16                ? "bf16 by rounding"
             : sizeof(real) == 4 ? "float"
                                 : "double");
}
template <class real, bool bf16>
double Cpu<real, bf16>::peak_flops() {
  return measured_peak_flops<real>(pool_);
}
template <class real, bool bf16>
void Cpu<real, bf16>::copy_rows(act* dst, int64_t dst_stride, const act* src, int64_t src_stride, int64_t rows,
                                int64_t D) {
  for (int64_t r = 0; r < rows; r++)
    memcpy(dst + r * dst_stride, src + r * src_stride, static_cast<size_t>(D) * sizeof(act));
}
template <class real, bool bf16>
void Cpu<real, bf16>::cast_weights(weight* weights, const master* masters, int64_t n) {
  over(n, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) weights[i] = Row::rounded(masters[i]);
  });
}

}  // namespace gca
