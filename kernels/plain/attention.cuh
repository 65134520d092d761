// Softmax attention over the slots of a row, by tiles of 64 x 64, never the whole matrix: what the sliding window and
// the encoder's attention inside a chunk share. The kernels take a Kind that says where queries, keys and values come
// from, which pairs see each other, and which tiles need looking at:
//   B, T, H, d             rows, slots of a row, heads, columns of a head
//   first_slot             number of the row's first slot here; slots below are counted from the row's true start
//   load_q, load_k, load_v (tile, b, h, slot, t): 64 slots from `slot` on, columns 64 t and on of the head; zero where
//                          there is none
//   sees(i, j)             whether key j takes part in query i's softmax
//   slope(h)               of ALiBi: slope * (j - i) is added to the logit
//   first_key(i0) .. end_key(i0)      first slots of the tiles of keys that the 64 queries from i0 on look at, by 64
//   first_query(j0) .. end_query(j0)  the same of queries that look at the 64 keys from j0 on
// qkv is (B,T,3D): q | k | v; out and dout (B,T,D), lse (B,H,T).
//
// A block of 256 threads owns 64 queries (by key: 64 keys) of one head, and 64 or 128 output columns of it: one or two
// fragments of a thread. It walks over the tiles of the other side:
//
//                     k0   k1   k2 ..  tiles of 64 keys
//   64 queries  q   [ S    S    S ]    S = q k^T in a | b, 64 columns of the head at a time; P goes to p,
//                   [ o += P v    ]    v comes to b, 64 columns at a time
//
// Shared memory, in tiles of 17,408 bytes, each filled by all threads and free at the barrier after its product:
//   forward            a: q            b: k, then v           p: P
//   backward by query  a: q, then dO   b: k, v, then k        ds: dS
//   backward by key    a: q, dO, then dO  b: k, v, then q     p: P     ds: dS
#pragma once
#include "kernels/plain/tiles.cuh"

namespace gca {

// A block's 64 slots (absolute numbers, from a multiple of 64 on), head and output columns.
struct AttentionPiece {
  int64_t b, slot;
  int h, column;
  template <class Kind>
  __device__ AttentionPiece(const Kind& kind, int fragments) {
    const int64_t first = kind.first_slot / tile_size,
                  tiles = (kind.first_slot + kind.T + tile_size - 1) / tile_size - first;
    const int groups = (tiles_of(kind.d) + fragments - 1) / fragments;
    int64_t i = blockIdx.x;
    slot = (first + i % tiles) * tile_size;
    i /= tiles;
    column = static_cast<int>(i % groups) * fragments * tile_size;
    i /= groups;
    h = static_cast<int>(i % kind.H);
    b = i / kind.H;
  }
};
template <class Kind>
int64_t attention_pieces(const Kind& kind, int fragments) {
  const int64_t tiles = ceil_div(kind.first_slot + kind.T, tile_size) - kind.first_slot / tile_size;
  return kind.B * kind.H * ceil_div(tiles_of(kind.d), fragments) * tiles;
}

// Whether slot i is one of this call's, and where it lies in a row of its arrays.
template <class Kind>
__device__ inline bool is_here(const Kind& kind, int64_t i) {
  return i >= kind.first_slot && i < kind.first_slot + kind.T;
}

// o = softmax(q k^T / sqrt(d) + bias) v, the softmax made tile by tile. Tiles lie at multiples of 64 of the row, so
// that a row and any segment of it are summed in the same order.
template <class Act, class Kind, int fragments>
__global__ void __launch_bounds__(tile_threads, 3 - fragments) attention_forward_plain_kernel(Act* out,    // (B,T,D)
                                                                                              float* lse,  // (B,H,T)
                                                                                              Kind kind) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], &p = tiles[2];
  const AttentionPiece at(kind, fragments);
  const float scale = attention_scale(kind.d), slope = kind.slope(at.h);
  Fragment o[fragments], score;
  float top[4], sum[4];
  for (Fragment& f : o) clear(f);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    top[i] = -INFINITY;
    sum[i] = 0;
  }
  for (int64_t j0 = kind.first_key(at.slot); j0 < kind.end_key(at.slot); j0 += tile_size) {
    product_nt(
        score, a, b, kind.d, [&](Tile& tile, int t) { kind.load_q(tile, at.b, at.h, at.slot, t); },
        [&](Tile& tile, int t) { kind.load_k(tile, at.b, at.h, j0, t); });
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t query = at.slot + tile_y() + 16 * i;
      float tile_top = -INFINITY, tile_sum = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int64_t key = j0 + tile_x() + 16 * j;
        score[i][j] = kind.sees(query, key) ? scale * score[i][j] + slope * static_cast<float>(key - query) : -INFINITY;
        tile_top = fmaxf(tile_top, score[i][j]);
      }
      const float new_top = fmaxf(top[i], warp_max<16>(tile_top)), base = new_top == -INFINITY ? 0 : new_top,
                  shrink = expf(top[i] - base);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        score[i][j] = expf(score[i][j] - base);
        tile_sum += score[i][j];
      }
      sum[i] = sum[i] * shrink + warp_sum<16>(tile_sum);
      top[i] = new_top;
#pragma unroll
      for (int f = 0; f < fragments; f++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[f][i][j] *= shrink;
    }
    store_tile(p, score);
    add_products(o, score, p, b, tile_size, at.column / tile_size, kind.d,
                 [&](Tile& tile, int t) { kind.load_v(tile, at.b, at.h, j0, t); });
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t query = at.slot + tile_y() + 16 * i, row = query - kind.first_slot;
    if (!is_here(kind, query)) continue;
    if (at.column == 0 && tile_x() == 0) lse[(at.b * kind.H + at.h) * kind.T + row] = top[i] + logf(sum[i]);
#pragma unroll
    for (int f = 0; f < fragments; f++) {
#pragma unroll
      for (int j = 0; j < 4; j++) o[f][i][j] /= sum[i];
      const int column = at.column + f * tile_size;
      store_row(out + ((at.b * kind.T + row) * kind.H + at.h) * kind.d + column, o[f][i], kind.d - column);
    }
  }
}

// What the backward passes read besides q, k and v. Whole rows only: first_slot is 0.
template <class Act>
struct AttentionOutputs {
  const Act *dout, *out;  // (B,T,D)
  const float* lse;       // (B,H,T)
};

// For the queries of a thread's rows: log-sum-exp, and delta = rowsum(dO O). Those past the row give probabilities 0.
template <class Act, class Kind>
__device__ inline void query_statistics(float (&lse)[4], float (&delta)[4], const AttentionOutputs<Act>& outputs,
                                        const Kind& kind, int64_t b, int h, int64_t slot) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t query = slot + tile_y() + 16 * i, first = ((b * kind.T + query) * kind.H + h) * kind.d;
    const bool here = query < kind.T;
    float sum = 0;
    for (int e = tile_x(); here && e < kind.d; e += 16)
      sum = fmaf(to_float(outputs.dout[first + e]), to_float(outputs.out[first + e]), sum);
    delta[i] = warp_sum<16>(sum);
    lse[i] = here ? outputs.lse[(b * kind.H + h) * kind.T + query] : INFINITY;
  }
}
template <class Act, class Kind>
__device__ inline void load_dout(Tile& tile, const AttentionOutputs<Act>& outputs, const Kind& kind, int64_t b, int h,
                                 int64_t slot, int t) {
  load_tile(tile, outputs.dout + ((b * kind.T + slot) * kind.H + h) * kind.d + t * tile_size,
            static_cast<int64_t>(kind.H) * kind.d, static_cast<int>(min(int64_t{tile_size}, kind.T - slot)),
            columns_of(kind.d, t));
}
// p = softmax, ds = p (dP - delta) / sqrt(d), dP = dO V^T, of the 64 queries from i0 on and the 64 keys from j0 on
template <class Act, class Kind>
__device__ inline void tile_gradient(Fragment& p, Fragment& ds, Tile& a, Tile& b, const float (&lse)[4],
                                     const float (&delta)[4], const AttentionOutputs<Act>& outputs, const Kind& kind,
                                     int64_t row, int h, int64_t i0, int64_t j0) {
  const float scale = attention_scale(kind.d), slope = kind.slope(h);
  product_nt(
      p, a, b, kind.d, [&](Tile& tile, int t) { kind.load_q(tile, row, h, i0, t); },
      [&](Tile& tile, int t) { kind.load_k(tile, row, h, j0, t); });
  product_nt(
      ds, a, b, kind.d, [&](Tile& tile, int t) { load_dout(tile, outputs, kind, row, h, i0, t); },
      [&](Tile& tile, int t) { kind.load_v(tile, row, h, j0, t); });
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t query = i0 + tile_y() + 16 * i, key = j0 + tile_x() + 16 * j;
      p[i][j] = kind.sees(query, key) ? expf(scale * p[i][j] + slope * static_cast<float>(key - query) - lse[i]) : 0.0f;
      ds[i][j] = scale * p[i][j] * (ds[i][j] - delta[i]);
    }
}

// dQ = dS K, as q itself lies after load_q; into dqkv
template <class Act, class Kind, int fragments>
__global__ void __launch_bounds__(tile_threads, 3 - fragments)
    attention_backward_query_plain_kernel(Act* dqkv,  // (B,T,3D)
                                          AttentionOutputs<Act> outputs, Kind kind) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], &ds_tile = tiles[2];
  const AttentionPiece at(kind, fragments);
  Fragment sum[fragments], p, ds;
  float lse[4], delta[4];
  for (Fragment& f : sum) clear(f);
  query_statistics(lse, delta, outputs, kind, at.b, at.h, at.slot);
  for (int64_t j0 = kind.first_key(at.slot); j0 < kind.end_key(at.slot); j0 += tile_size) {
    tile_gradient(p, ds, a, b, lse, delta, outputs, kind, at.b, at.h, at.slot, j0);
    store_tile(ds_tile, ds);
    add_products(sum, p, ds_tile, b, tile_size, at.column / tile_size, kind.d,
                 [&](Tile& tile, int t) { kind.load_k(tile, at.b, at.h, j0, t); });
  }
  const int64_t D = static_cast<int64_t>(kind.H) * kind.d;
#pragma unroll
  for (int f = 0; f < fragments; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t query = at.slot + tile_y() + 16 * i;
      const int column = at.column + f * tile_size;
      if (query < kind.T)
        store_row(dqkv + (at.b * kind.T + query) * 3 * D + at.h * kind.d + column, sum[f][i], kind.d - column);
    }
}

// dK = dS^T Q, dV = P^T dO: a block owns 64 keys
template <class Act, class Kind, int fragments>
__global__ void __launch_bounds__(tile_threads, 3 - fragments)
    attention_backward_key_plain_kernel(Act* dqkv,  // (B,T,3D)
                                        AttentionOutputs<Act> outputs, Kind kind) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], &p_tile = tiles[2], &ds_tile = tiles[3];
  const AttentionPiece at(kind, fragments);
  Fragment dk[fragments], dv[fragments], p, ds;
  float lse[4], delta[4];
  for (Fragment& f : dk) clear(f);
  for (Fragment& f : dv) clear(f);
  for (int64_t i0 = kind.first_query(at.slot); i0 < kind.end_query(at.slot); i0 += tile_size) {
    query_statistics(lse, delta, outputs, kind, at.b, at.h, i0);
    tile_gradient(p, ds, a, b, lse, delta, outputs, kind, at.b, at.h, i0, at.slot);
    store_tile(p_tile, p);
    store_tile(ds_tile, ds);
#pragma unroll
    for (int f = 0; f < fragments; f++) {
      const int t = at.column / tile_size + f;
      if (t * tile_size >= kind.d) break;
      load_dout(a, outputs, kind, at.b, at.h, i0, t);
      kind.load_q(b, at.b, at.h, i0, t);
      __syncthreads();
      clear(p);
      multiply_tn(p, p_tile, a, tile_size);
      add(dv[f], p);
      clear(p);
      multiply_tn(p, ds_tile, b, tile_size);
      add(dk[f], p);
      __syncthreads();
    }
  }
  const int64_t D = static_cast<int64_t>(kind.H) * kind.d;
#pragma unroll
  for (int f = 0; f < fragments; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t key = at.slot + 4 * tile_y() + i;
      const int column = at.column + f * tile_size;
      if (key >= kind.T) continue;
      Act* to = dqkv + (at.b * kind.T + key) * 3 * D + D + at.h * kind.d + column;
      store_row(to, dk[f][i], kind.d - column);
      store_row(to + D, dv[f][i], kind.d - column);
    }
}

constexpr int64_t forward_shared_bytes = 3 * tile_bytes, query_shared_bytes = 3 * tile_bytes,
                  key_shared_bytes = 4 * tile_bytes;
static_assert(key_shared_bytes == 69632, "a | b | p | ds");
template <class Act, class Kind>
void launch_attention_forward(const Doing& doing, cudaStream_t stream, Act* out, float* lse, const Kind& kind) {
  check_head(kind.d);
  with_fragments(kind.d, [&](auto fragments) {
    launch(doing, stream, attention_forward_plain_kernel<Act, Kind, fragments>, attention_pieces(kind, fragments),
           tile_threads, forward_shared_bytes, out, lse, kind);
  });
}
template <class Act, class Kind>
void launch_attention_backward(const Doing& doing, cudaStream_t stream, Act* dqkv, const AttentionOutputs<Act>& outputs,
                               const Kind& kind) {
  check_head(kind.d);
  with_fragments(kind.d, [&](auto fragments) {
    const int64_t pieces = attention_pieces(kind, fragments);
    launch(doing, stream, attention_backward_query_plain_kernel<Act, Kind, fragments>, pieces, tile_threads,
           query_shared_bytes, dqkv, outputs, kind);
    launch(doing, stream, attention_backward_key_plain_kernel<Act, Kind, fragments>, pieces, tile_threads,
           key_shared_bytes, dqkv, outputs, kind);
  });
}

}  // namespace gca
