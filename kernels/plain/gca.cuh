// Grouped cross attention on any type and shape: forward, backward by query, and backward for the chunk memory over all
// layers at once. A block answers 64 slots of one chunk for one head and walks over that chunk's picks (or, for the
// memory, owns 64 keys of one chunk and walks over all that fetched it). Keys and values are read where they lie,
// through the pick table. What to read before mma/gca.cu.
//
//                       pick 0   pick 1 ..   of the chunk, 64 keys each (or 2 tiles of 64)
//   64 slots  q       [ P        P       ]   each pick has a softmax of its own, P times the pick's weight
//                     [ o += P v         ]   64 or 128 columns: one or two fragments of a thread
//
// Shared memory, in tiles of 17,408 bytes, each filled by all threads and free at the barrier after its product:
//   forward              a: q           b: k, then v          1 or 2 of p: P
//   backward by query    a: q, then dO  b: k, v, then k       1 or 2 of ds: dS
//   backward for memory  a: q, dO, then dO  b: k, v, then q   p: P   ds: dS
#pragma once
#include "kernels/gca.cuh"
#include "kernels/plain/tiles.cuh"

namespace gca {

constexpr int64_t query_bytes(int key_tiles) { return (2 + key_tiles) * tile_bytes; }
constexpr int64_t memory_bytes = 4 * tile_bytes;
static_assert(query_bytes(2) == 69632 && memory_bytes == 69632, "a | b | two of p or ds");
// body(tiles of keys, fragments), both constants
template <class Body>
void with_key_tiles(const GcaShape& s, Body&& body) {
  with_fragments(s.d, [&](auto fragments) {
    if (s.S <= tile_size) body(std::integral_constant<int, 1>{}, fragments);
    else body(std::integral_constant<int, 2>{}, fragments);
  });
}

// Tile n of a fetched chunk's keys or values for one head, from `first` on.
template <class Act>
__device__ inline HeadRows<Act> memory_tile(const Act* first,  // (S,d), rows 2D apart
                                            const GcaShape& s, int n) {
  const int64_t stride = int64_t{2} * s.H * s.d;
  return {first + n * tile_size * stride, stride, columns_of(s.keys(), n), s.d};
}
// sum += p x, x being the keys or values of one fetched chunk, from `first` on; p goes through `tiles`, and is used up.
template <class Act, int key_tiles, int fragments>
__device__ inline void add_memory_products(Fragment (&sum)[fragments], Fragment (&p)[key_tiles], Tile* tiles, Tile& b,
                                           const Act* first,  // (S,d), rows 2D apart
                                           const GcaShape& s, int column) {
#pragma unroll
  for (int n = 0; n < key_tiles; n++) store_tile(tiles[n], p[n]);
#pragma unroll
  for (int n = 0; n < key_tiles; n++)
    add_products(sum, p[0], tiles[n], b, columns_of(s.keys(), n), column / tile_size, s.d, memory_tile(first, s, n));
}

// o = sum_k w_k softmax(q K_k^T / sqrt(d)) V_k
template <class Act, int key_tiles, int fragments>
__global__ void __launch_bounds__(tile_threads, key_tiles == 1 && fragments == 1 ? 2 : 1)
    gca_forward_plain_kernel(Act* out,             // (B,T,D)
                             float* lse,           // (B,C,K,H,S) or null
                             const Act* q,         // (B,T,D)
                             const Act* kv,        // (B,M,S,2D)
                             const int32_t* pick,  // (B,C+1,K)
                             const float* w,       // (B,C+1,K)
                             GcaShape s) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], *p = tiles + 2;
  const Piece at(s.chunks(), s, fragments);
  const Slots slots(s, at.c, at.tile);
  if (slots.count == 0) return;
  const int64_t D = static_cast<int64_t>(s.H) * s.d;
  const float scale = attention_scale(s.d);
  const int64_t first = (at.b * s.T + slots.first) * D + at.h * s.d;
  const HeadRows<Act> queries{q + first, D, slots.count, s.d};
  Fragment o[fragments], score[key_tiles];
  for (Fragment& f : o) clear(f);
  for (int k = 0; k < s.K; k++) {
    const int64_t entry = s.table().serving(at.b, at.c, k);
    if (pick[entry] < 0) continue;
    const Act *key = memory_of(kv, s, at.b, pick[entry], at.h), *value = key + D;
#pragma unroll
    for (int n = 0; n < key_tiles; n++) product_nt(score[n], a, b, s.d, queries, memory_tile(key, s, n));
#pragma unroll
    for (int i = 0; i < 4; i++) {  // softmax over the keys of this one chunk; a row lies in half a warp
      float top = -INFINITY, sum = 0;
#pragma unroll
      for (int n = 0; n < key_tiles; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          score[n][i][j] = tile_x() + 16 * j < columns_of(s.keys(), n) ? scale * score[n][i][j] : -INFINITY;
          top = fmaxf(top, score[n][i][j]);
        }
      top = warp_max<16>(top);
#pragma unroll
      for (int n = 0; n < key_tiles; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          score[n][i][j] = expf(score[n][i][j] - top);
          sum += score[n][i][j];
        }
      sum = warp_sum<16>(sum);
#pragma unroll
      for (int n = 0; n < key_tiles; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) score[n][i][j] *= w[entry] / sum;
      const int row = tile_y() + 16 * i;
      if (lse && at.column == 0 && tile_x() == 0 && row < slots.count)
        lse[gca_stat(s, at.b, at.c, k, at.h) + slots.in_chunk + row] = top + logf(sum);
    }
    add_memory_products(o, score, p, b, value, s, at.column);
  }
  store_rows(out + first, D, o, slots.count, at.column, s.d);
}

template <class Act>
void gca_forward_plain(cudaStream_t stream, Act* out, float* lse, const Act* q, const Act* kv, const int32_t* pick,
                       const float* w, const GcaShape& s) {
  with_key_tiles(s, [&](auto key_tiles, auto fragments) {
    launch("grouped cross attention, forward", stream, gca_forward_plain_kernel<Act, key_tiles, fragments>,
           pieces(s.chunks(), s, fragments), tile_threads, query_bytes(key_tiles), out, lse, q, kv, pick, w, s);
  });
}

// With P the softmax in one fetched chunk: dP = dO V^T, delta = rowsum(P dP), dS = w P (dP - delta), and
// dQ = sum_k dS K / sqrt(d). From delta kernels/gca.cu makes dw, the gradient of the pick's weight, for both paths.
template <class Act, int key_tiles, int fragments>
__global__ void __launch_bounds__(tile_threads, key_tiles == 1 && fragments == 1 ? 2 : 1)
    gca_backward_query_plain_kernel(Act* dq,              // (B,T,D)
                                    float* delta,         // (B,C,K,H,S)
                                    const Act* dout,      // (B,T,D)
                                    const Act* q,         // (B,T,D)
                                    const Act* kv,        // (B,M,S,2D)
                                    const float* lse,     // (B,C,K,H,S)
                                    const int32_t* pick,  // (B,C+1,K)
                                    const float* w,       // (B,C+1,K)
                                    GcaShape s) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], *ds = tiles + 2;
  const Piece at(s.chunks(), s, fragments);
  const Slots slots(s, at.c, at.tile);
  const int64_t D = static_cast<int64_t>(s.H) * s.d, first = (at.b * s.T + slots.first) * D + at.h * s.d;
  const float scale = attention_scale(s.d);
  const HeadRows<Act> queries{q + first, D, slots.count, s.d}, gradients{dout + first, D, slots.count, s.d};
  Fragment sum[fragments], p[key_tiles], dp[key_tiles];
  for (Fragment& f : sum) clear(f);
  for (int k = 0; k < s.K; k++) {
    const int64_t entry = s.table().serving(at.b, at.c, k), saved = gca_stat(s, at.b, at.c, k, at.h) + slots.in_chunk;
    if (pick[entry] < 0) continue;
    const Act *key = memory_of(kv, s, at.b, pick[entry], at.h), *value = key + D;
#pragma unroll
    for (int n = 0; n < key_tiles; n++) {
      product_nt(p[n], a, b, s.d, queries, memory_tile(key, s, n));
      product_nt(dp[n], a, b, s.d, gradients, memory_tile(value, s, n));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = tile_y() + 16 * i;
      const float row_lse = row < slots.count ? lse[saved + row] : INFINITY;
      float row_delta = 0;
#pragma unroll
      for (int n = 0; n < key_tiles; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          p[n][i][j] = tile_x() + 16 * j < columns_of(s.keys(), n) ? expf(scale * p[n][i][j] - row_lse) : 0.0f;
          row_delta += p[n][i][j] * dp[n][i][j];
        }
      row_delta = warp_sum<16>(row_delta);
      if (at.column == 0 && tile_x() == 0 && row < slots.count) delta[saved + row] = row_delta;
#pragma unroll
      for (int n = 0; n < key_tiles; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) dp[n][i][j] = w[entry] * scale * p[n][i][j] * (dp[n][i][j] - row_delta);
    }
    add_memory_products(sum, dp, ds, b, key, s, at.column);
  }
  store_rows(dq + first, D, sum, slots.count, at.column, s.d);
}

template <class Act>
void gca_backward_query_plain(cudaStream_t stream, const GcaBackward<Act, float>& a, const GcaShape& s) {
  with_key_tiles(s, [&](auto key_tiles, auto fragments) {
    launch("grouped cross attention, backward by query", stream,
           gca_backward_query_plain_kernel<Act, key_tiles, fragments>, pieces(s.chunks(), s, fragments), tile_threads,
           query_bytes(key_tiles), a.dq, a.delta, a.dout, a.q, a.kv, a.lse, a.pick, a.w, s);
  });
}

// A block owns 64 keys of chunk m. Over every (layer, chunk, pick) that fetched m, in order:
//   dV += (w P)^T dO
//   dK += dS^T Q,  dS = w P (dP - delta) / sqrt(d)
template <class Act, int fragments>
__global__ void __launch_bounds__(tile_threads, 3 - fragments)
    gca_backward_memory_plain_kernel(Act* dkv,                                 // (B,M,S,2D)
                                     const FetchingLayer<Act, float>* layers,  // (n_layers)
                                     int n_layers, const Act* kv,              // (B,M,S,2D)
                                     GcaShape s) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], &p_tile = tiles[2], &ds_tile = tiles[3];
  const Piece at(s.M, s, fragments);
  const int64_t D = static_cast<int64_t>(s.H) * s.d, m = at.c, C = s.chunks();
  const int keys = columns_of(s.keys(), at.tile);  // may be 0 or less: the last tile holds the landmark alone
  const float scale = attention_scale(s.d);
  const Act *key = memory_of(kv, s, at.b, m, at.h) + at.tile * tile_size * 2 * D, *value = key + D;
  Fragment dk[fragments], dv[fragments], p, dp;
  for (Fragment& f : dk) clear(f);
  for (Fragment& f : dv) clear(f);
  for (int l = 0; l < n_layers; l++) {
    const FetchingLayer<Act, float> layer = layers[l];
    const int32_t end = layer.start[at.b * (s.M + 1) + m + 1];
    for (int32_t e = layer.start[at.b * (s.M + 1) + m]; e < end; e++) {
      const int64_t entry = layer.fetches[at.b * C * s.K + e], c = entry / s.K;
      const float weight = layer.w[at.b * (C + 1) * s.K + entry];
      for (int r = 0; r < tiles_of(s.S); r++) {
        const int rows = columns_of(s.S, r);
        const int64_t first = (at.b * s.T + c * s.S + r * tile_size) * D + at.h * s.d;
        const int64_t saved = gca_stat(s, at.b, c, static_cast<int>(entry % s.K), at.h) + r * tile_size;
        auto load_q = [&](Tile& tile, int t) {
          load_tile(tile, layer.q + first + t * tile_size, D, rows, columns_of(s.d, t));
        };
        auto load_dout = [&](Tile& tile, int t) {
          load_tile(tile, layer.dout + first + t * tile_size, D, rows, columns_of(s.d, t));
        };
        auto load_k = [&](Tile& tile, int t) { load_tile(tile, key + t * tile_size, 2 * D, keys, columns_of(s.d, t)); };
        auto load_v = [&](Tile& tile, int t) {
          load_tile(tile, value + t * tile_size, 2 * D, keys, columns_of(s.d, t));
        };
        product_nt(p, a, b, s.d, load_q, load_k);
        product_nt(dp, a, b, s.d, load_dout, load_v);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = tile_y() + 16 * i;
          const float row_lse = row < rows ? layer.lse[saved + row] : INFINITY,
                      row_delta = row < rows ? layer.delta[saved + row] : 0.0f;
#pragma unroll
          for (int j = 0; j < 4; j++) {
            p[i][j] = tile_x() + 16 * j < keys ? weight * expf(scale * p[i][j] - row_lse) : 0.0f;
            dp[i][j] = scale * p[i][j] * (dp[i][j] - row_delta);
          }
        }
        store_tile(p_tile, p);
        store_tile(ds_tile, dp);
#pragma unroll
        for (int f = 0; f < fragments; f++) {
          const int t = at.column / tile_size + f;
          if (t * tile_size >= s.d) break;
          load_dout(a, t);
          load_q(b, t);
          __syncthreads();
          clear(p);
          multiply_tn(p, p_tile, a, rows);
          add(dv[f], p);
          clear(p);
          multiply_tn(p, ds_tile, b, rows);
          add(dk[f], p);
          __syncthreads();
        }
      }
    }
  }
#pragma unroll
  for (int f = 0; f < fragments; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = at.tile * tile_size + 4 * tile_y() + i, column = at.column + f * tile_size;
      if (row >= s.S) continue;
      if (row == s.S - 1)  // the landmark: its key and value are the constant 0
        for (int j = 0; j < 4; j++) dk[f][i][j] = dv[f][i][j] = 0;
      Act* to = dkv + ((at.b * s.M + m) * s.S + row) * 2 * D + at.h * s.d + column;
      store_row(to, dk[f][i], s.d - column);
      store_row(to + D, dv[f][i], s.d - column);
    }
}

template <class Act>
void gca_backward_memory_plain(cudaStream_t stream, Act* dkv, const FetchingLayer<Act, float>* layers, int n_layers,
                               const Act* kv, const GcaShape& s) {
  with_fragments(s.d, [&](auto fragments) {
    launch("grouped cross attention, backward for the memory", stream, gca_backward_memory_plain_kernel<Act, fragments>,
           pieces(s.M, s, fragments), tile_threads, memory_bytes, dkv, layers, n_layers, kv, s);
  });
}

}  // namespace gca
