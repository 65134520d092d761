// Grouped cross attention (drt.md): forward, backward by query, and backward for the chunk memory over all layers at
// once. A block answers 64 slots of one chunk for one head and walks over that chunk's picks (or, for the memory, owns
// 64 keys of one chunk and walks over all that fetched it). Keys and values are read where they lie, through the pick
// table. These kernels are the plain ones, for every type and shape; mma/gca.cu has the fast ones.
#include "kernels/gca.cuh"

namespace gca {
namespace {

// o = sum_k w_k softmax(q K_k^T / sqrt(d)) V_k
template <class Act, int key_tiles, int fragments>
__global__ void __launch_bounds__(tile_threads, key_tiles == 1 && fragments == 1 ? 2 : 1)
    forward_kernel(Act* out, float* lse, const Act* q, const Act* kv, const int32_t* pick, const float* w, GcaShape s) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], *p = tiles + 2;
  const Piece at(s.chunks(), s, fragments);
  const Slots slots(s, at.c, at.tile);
  if (slots.count == 0) return;
  const int64_t D = static_cast<int64_t>(s.H) * s.d;
  const float scale = attention_scale(s.d);
  const Act* query = q + (at.b * s.T + slots.first) * D + at.h * s.d;
  Fragment o[fragments], score[key_tiles];
  for (Fragment& f : o) clear(f);
  for (int k = 0; k < s.K; k++) {
    const int64_t entry = (at.b * (s.chunks() + 1) + at.c) * s.K + k;
    if (pick[entry] < 0) continue;
    const Act *key = memory_of(kv, s, at.b, pick[entry], at.h), *value = key + D;
    auto load_q = [&](Tile& tile, int t) {
      load_tile(tile, query + t * tile_size, D, slots.count, columns_of(s.d, t));
    };
#pragma unroll
    for (int n = 0; n < key_tiles; n++) {
      const Act* first = key + n * tile_size * 2 * D;
      product_nt(score[n], a, b, s.d, load_q, [&](Tile& tile, int t) {
        load_tile(tile, first + t * tile_size, 2 * D, columns_of(s.keys(), n), columns_of(s.d, t));
      });
    }
    // softmax over the keys of this one chunk; a row lies in half a warp
#pragma unroll
    for (int i = 0; i < 4; i++) {
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
#pragma unroll
    for (int n = 0; n < key_tiles; n++) store_tile(p[n], score[n]);
#pragma unroll
    for (int n = 0; n < key_tiles; n++)
#pragma unroll
      for (int f = 0; f < fragments; f++) {
        const int column = at.column + f * tile_size;
        if (column >= s.d) break;
        load_tile(b, value + n * tile_size * 2 * D + column, 2 * D, columns_of(s.keys(), n),
                  min(tile_size, s.d - column));
        __syncthreads();
        clear(score[0]);  // each tile's sum by itself: one chain over all picks loses more
        multiply_nn(score[0], p[n], b, columns_of(s.keys(), n));
        add(o[f], score[0]);
        __syncthreads();
      }
  }
#pragma unroll
  for (int f = 0; f < fragments; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = tile_y() + 16 * i, column = at.column + f * tile_size;
      if (row < slots.count)
        store_row(out + (at.b * s.T + slots.first + row) * D + at.h * s.d + column, o[f][i], s.d - column);
    }
}

// With P the softmax in one fetched chunk: dP = dO V^T, delta = rowsum(P dP), dS = w P (dP - delta), and
// dQ = sum_k dS K / sqrt(d)
template <class Act, int key_tiles, int fragments>
__global__ void __launch_bounds__(tile_threads, key_tiles == 1 && fragments == 1 ? 2 : 1)
    backward_query_kernel(Act* dq, float* delta, const Act* dout, const Act* q, const Act* kv, const float* lse,
                          const int32_t* pick, const float* w, GcaShape s) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], *ds = tiles + 2;
  const Piece at(s.chunks(), s, fragments);
  const Slots slots(s, at.c, at.tile);
  const int64_t D = static_cast<int64_t>(s.H) * s.d, first = (at.b * s.T + slots.first) * D + at.h * s.d;
  const float scale = attention_scale(s.d);
  Fragment sum[fragments], p[key_tiles], dp[key_tiles];
  for (Fragment& f : sum) clear(f);
  for (int k = 0; k < s.K; k++) {
    const int64_t entry = (at.b * (s.chunks() + 1) + at.c) * s.K + k,
                  saved = gca_stat(s, at.b, at.c, k, at.h) + slots.in_chunk;
    if (pick[entry] < 0) continue;
    const Act *key = memory_of(kv, s, at.b, pick[entry], at.h), *value = key + D;
#pragma unroll
    for (int n = 0; n < key_tiles; n++) {
      auto load_q = [&](Tile& tile, int t) {
        load_tile(tile, q + first + t * tile_size, D, slots.count, columns_of(s.d, t));
      };
      auto load_dout = [&](Tile& tile, int t) {
        load_tile(tile, dout + first + t * tile_size, D, slots.count, columns_of(s.d, t));
      };
      auto load_k = [&](Tile& tile, int t) {
        load_tile(tile, key + n * tile_size * 2 * D + t * tile_size, 2 * D, columns_of(s.keys(), n),
                  columns_of(s.d, t));
      };
      auto load_v = [&](Tile& tile, int t) {
        load_tile(tile, value + n * tile_size * 2 * D + t * tile_size, 2 * D, columns_of(s.keys(), n),
                  columns_of(s.d, t));
      };
      product_nt(p[n], a, b, s.d, load_q, load_k);
      product_nt(dp[n], a, b, s.d, load_dout, load_v);
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
#pragma unroll
    for (int n = 0; n < key_tiles; n++) store_tile(ds[n], dp[n]);
#pragma unroll
    for (int n = 0; n < key_tiles; n++)
#pragma unroll
      for (int f = 0; f < fragments; f++) {
        const int column = at.column + f * tile_size;
        if (column >= s.d) break;
        load_tile(b, key + n * tile_size * 2 * D + column, 2 * D, columns_of(s.keys(), n),
                  min(tile_size, s.d - column));
        __syncthreads();
        clear(p[0]);
        multiply_nn(p[0], ds[n], b, columns_of(s.keys(), n));
        add(sum[f], p[0]);
        __syncthreads();
      }
  }
#pragma unroll
  for (int f = 0; f < fragments; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = tile_y() + 16 * i, column = at.column + f * tile_size;
      if (row < slots.count) store_row(dq + first + row * D + column, sum[f][i], s.d - column);
    }
}

// dw += sum over heads and slots of delta: a warp for each pick
__global__ void weight_gradient_kernel(float* dw, const float* delta, const int32_t* pick, GcaShape s) {
  const int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32, C = s.chunks();
  if (i >= s.B * C * s.K) return;
  const int64_t k = i % s.K, c = i / s.K % C, b = i / s.K / C, entry = (b * (C + 1) + c) * s.K + k;
  if (pick[entry] < 0) return;
  const float* from = delta + gca_stat(s, b, c, static_cast<int>(k), 0);
  float sum = 0;
  for (int64_t j = threadIdx.x % 32; j < static_cast<int64_t>(s.H) * s.S; j += 32) sum += from[j];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) dw[entry] += sum;
}

// The list of layers, put into the GPU's memory as arguments of a kernel: copied from the host it could not be reused
// on return.
constexpr int layers_at_once = 64;  // 3.5 KB of the 4 KB that arguments may take
template <class Act>
struct SomeLayers {
  FetchingLayer<Act, float> at[layers_at_once];
};
template <class Act>
__global__ void put_layers_kernel(FetchingLayer<Act, float>* to, SomeLayers<Act> layers, int n) {
  for (int i = 0; i < n; i++) to[i] = layers.at[i];
}

// A block owns 64 keys of chunk m. Over every (layer, chunk, pick) that fetched m, in order:
//   dV += (w P)^T dO
//   dK += dS^T Q,  dS = w P (dP - delta) / sqrt(d)
template <class Act, int fragments>
__global__ void __launch_bounds__(tile_threads, 3 - fragments)
    backward_memory_kernel(Act* dkv, const FetchingLayer<Act, float>* layers, int n_layers, const Act* kv, GcaShape s) {
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
      const int64_t entry = layer.entry[at.b * C * s.K + e], c = entry / s.K;
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

// ---- the ops ------------------------------------------------------------------------------------------------------
void check_shape(const GcaShape& s) {
  check_head(s.d);
  if (s.S < 2 || s.S > 2 * tile_size)
    throw Error(
        str("the GPU fetches chunks of 2 to 128 slots, found ", s.S, ": use a smaller --chunk, or --device cpu"));
  GCA_CHECK(s.K >= 1 && s.K <= max_topk, "1 to ", max_topk, " chunks are fetched, found ", s.K);
}
// body(tiles of keys, fragments), both constants
template <class Body>
void with_shape(const GcaShape& s, Body&& body) {
  with_fragments(s.d, [&](auto fragments) {
    if (s.S <= tile_size) body(std::integral_constant<int, 1>{}, fragments);
    else body(std::integral_constant<int, 2>{}, fragments);
  });
}

}  // namespace

template <class Act>
void Gpu<Act>::zero_landmarks(Act* kv, int64_t N, int64_t S, int64_t D) {
  if (N == 0) return;
  const size_t width_bytes = static_cast<size_t>(2 * D) * sizeof(Act);
  check(cudaMemset2DAsync(kv + (S - 1) * 2 * D, static_cast<size_t>(S) * width_bytes, 0, width_bytes,
                          static_cast<size_t>(N), stream_),
        "clearing landmarks' keys and values");
}

template <class Act>
void Gpu<Act>::gca_forward(Act* out, float* lse, const Act* q, const Act* kv, const int32_t* pick, const float* w,
                           const GcaShape& s) {
  check_shape(s);
  if constexpr (std::is_same_v<Act, bf16>)
    if (gca_on_tensor_cores(s)) return gca_forward_on_tensor_cores(stream_, out, lse, q, kv, pick, w, s);
  with_shape(s, [&](auto key_tiles, auto fragments) {
    launch("grouped cross attention, forward", stream_, forward_kernel<Act, key_tiles, fragments>,
           pieces(s.chunks(), s, fragments), tile_threads, (2 + key_tiles) * tile_bytes, out, lse, q, kv, pick, w, s);
  });
}

template <class Act>
void Gpu<Act>::gca_backward_query(Act* dq, float* dw, float* delta, const Act* dout, const Act* q, const Act* kv,
                                  const float* lse, const int32_t* pick, const float* w, const GcaShape& s) {
  GCA_CHECK(s.first_slot == 0 && s.T % s.S == 0, "backward takes whole rows");
  check_shape(s);
  bool done = false;
  if constexpr (std::is_same_v<Act, bf16>)
    if (gca_on_tensor_cores(s)) {
      gca_backward_query_on_tensor_cores(stream_, dq, delta, dout, q, kv, lse, pick, w, s);
      done = true;
    }
  if (!done)
    with_shape(s, [&](auto key_tiles, auto fragments) {
      launch("grouped cross attention, backward by query", stream_, backward_query_kernel<Act, key_tiles, fragments>,
             pieces(s.chunks(), s, fragments), tile_threads, (2 + key_tiles) * tile_bytes, dq, delta, dout, q, kv, lse,
             pick, w, s);
    });
  launch("gradient of the picks' weights", stream_, weight_gradient_kernel, ceil_div(s.B * s.chunks() * s.K, 8), 256, 0,
         dw, delta, pick, s);
}

template <class Act>
void Gpu<Act>::gca_backward_memory(Act* dkv, const FetchingLayer<Act, float>* layers, int n_layers, const Act* kv,
                                   const GcaShape& s) {
  GCA_CHECK(s.first_slot == 0 && s.T % s.S == 0 && s.M == s.chunks(), "backward takes whole rows");
  check_shape(s);
  FetchingLayer<Act, float>* table = scratch<FetchingLayer<Act, float>>(n_layers);
  for (int first = 0; first < n_layers; first += layers_at_once) {
    const int count = std::min(layers_at_once, n_layers - first);
    SomeLayers<Act> some{};
    std::copy_n(layers + first, count, some.at);
    launch("the list of fetching layers", stream_, put_layers_kernel<Act>, 1, 1, 0, table + first, some, count);
  }
  if constexpr (std::is_same_v<Act, bf16>)
    if (gca_on_tensor_cores(s)) {
      const int64_t used = round_up(n_layers * static_cast<int64_t>(sizeof *table), 16);
      return gca_backward_memory_on_tensor_cores(stream_, dkv, table, n_layers, kv, s, scratch<char>(0, used),
                                                 scratch_bytes - used);
    }
  with_fragments(s.d, [&](auto fragments) {
    launch("grouped cross attention, backward for the memory", stream_, backward_memory_kernel<Act, fragments>,
           pieces(s.M, s, fragments), tile_threads, 4 * tile_bytes, dkv, table, n_layers, kv, s);
  });
}

template void Gpu<float>::zero_landmarks(float*, int64_t, int64_t, int64_t);
template void Gpu<bf16>::zero_landmarks(bf16*, int64_t, int64_t, int64_t);
template void Gpu<float>::gca_forward(float*, float*, const float*, const float*, const int32_t*, const float*,
                                      const GcaShape&);
template void Gpu<bf16>::gca_forward(bf16*, float*, const bf16*, const bf16*, const int32_t*, const float*,
                                     const GcaShape&);
template void Gpu<float>::gca_backward_query(float*, float*, float*, const float*, const float*, const float*,
                                             const float*, const int32_t*, const float*, const GcaShape&);
template void Gpu<bf16>::gca_backward_query(bf16*, float*, float*, const bf16*, const bf16*, const bf16*, const float*,
                                            const int32_t*, const float*, const GcaShape&);
template void Gpu<float>::gca_backward_memory(float*, const FetchingLayer<float, float>*, int, const float*,
                                              const GcaShape&);
template void Gpu<bf16>::gca_backward_memory(bf16*, const FetchingLayer<bf16, float>*, int, const bf16*,
                                             const GcaShape&);

}  // namespace gca
