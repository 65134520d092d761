// Grouped cross attention (drt.md): forward, backward by query, and backward for the chunk memory over all layers at once.
// A block answers 64 slots of one chunk for one head and walks over that chunk's picks (or, for the memory, owns 64 keys of one chunk
// and walks over all that fetched it). Keys and values are read where they lie, through the pick table.
// Twice: plain, for every type and shape; and on tensor cores for bf16, chunks of 64 and heads of 32, 64 or 128 columns.
#include "mma.cuh"
#include "tiles.cuh"

namespace gca {
namespace {

// Which piece of work a block does: chunks are innermost, so that blocks that run together share a head's memory in the cache.
struct Piece {
  int64_t b, c;
  int h, tile, column;  // tile: which 64 slots (or keys) of the chunk; column: the first output column
  __device__ Piece(int64_t chunks, const GcaShape& s, int fragments) {
    const int tiles = tiles_of(s.S), groups = tiles_of(s.d) / fragments + (tiles_of(s.d) % fragments != 0);
    int64_t i = blockIdx.x;
    c = i % chunks, i /= chunks;
    tile = static_cast<int>(i % tiles), i /= tiles;
    column = static_cast<int>(i % groups) * fragments * tile_size, i /= groups;
    h = static_cast<int>(i % s.H), b = i / s.H;
  }
};
int64_t pieces(int64_t chunks, const GcaShape& s, int fragments) { return s.B * s.H * ceil_div(tiles_of(s.d), fragments) * tiles_of(s.S) * chunks; }

// The 64 slots of a block: number of the first in q's row, and how many there are.
struct Slots {
  int64_t first;
  int count, in_chunk;  // in_chunk: number of the first among the chunk's slots that are here
  __device__ Slots(const GcaShape& s, int64_t c, int tile) {
    const int64_t chunk = s.first_chunk() + c, begin = max(chunk * s.S, s.first_slot) - s.first_slot, end = min((chunk + 1) * s.S - s.first_slot, s.T);
    in_chunk = tile * tile_size;
    first = begin + in_chunk;
    count = static_cast<int>(min(int64_t{tile_size}, max(int64_t{0}, end - first)));
  }
};
__device__ inline float attention_scale(int d) { return 1 / sqrtf(static_cast<float>(d)); }
// One head of one chunk of the memory, (S,2D) apart: keys; the values lie D further.
template <class Act>
__device__ const Act* memory_of(const Act* kv, const GcaShape& s, int64_t b, int64_t m, int h) {
  return kv + (b * s.M + m) * s.S * 2 * s.H * s.d + h * s.d;
}

// ---- plain ------------------------------------------------------------------------------------------------------------------------
// o = sum_k w_k softmax(q K_k^T / sqrt(d)) V_k
template <class Act, int key_tiles, int fragments>
__global__ void __launch_bounds__(tile_threads, key_tiles* fragments == 1 ? 2 : 1)
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
    auto load_q = [&](Tile& tile, int t) { load_tile(tile, query + t * tile_size, D, slots.count, columns_of(s.d, t)); };
#pragma unroll
    for (int n = 0; n < key_tiles; n++) {
      const Act* first = key + n * tile_size * 2 * D;
      product_nt(score[n], a, b, s.d, load_q,
                 [&](Tile& tile, int t) { load_tile(tile, first + t * tile_size, 2 * D, columns_of(s.keys(), n), columns_of(s.d, t)); });
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
        for (int j = 0; j < 4; j++) sum += score[n][i][j] = expf(score[n][i][j] - top);
      sum = warp_sum<16>(sum);
#pragma unroll
      for (int n = 0; n < key_tiles; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) score[n][i][j] *= w[entry] / sum;
      const int row = tile_y() + 16 * i;
      if (lse && at.column == 0 && tile_x() == 0 && row < slots.count) lse[gca_stat(s, at.b, at.c, k, at.h) + slots.in_chunk + row] = top + logf(sum);
    }
#pragma unroll
    for (int n = 0; n < key_tiles; n++) store_tile(p[n], score[n]);
#pragma unroll
    for (int n = 0; n < key_tiles; n++)
#pragma unroll
      for (int f = 0; f < fragments; f++) {
        const int column = at.column + f * tile_size;
        if (column >= s.d) break;
        load_tile(b, value + n * tile_size * 2 * D + column, 2 * D, columns_of(s.keys(), n), min(tile_size, s.d - column));
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
      if (row < slots.count) store_row(out + (at.b * s.T + slots.first + row) * D + at.h * s.d + column, o[f][i], s.d - column);
    }
}

// With P the softmax in one fetched chunk: dP = dO V^T, delta = rowsum(P dP), dS = w P (dP - delta), dQ = sum_k dS K / sqrt(d)
template <class Act, int key_tiles, int fragments>
__global__ void __launch_bounds__(tile_threads, key_tiles* fragments == 1 ? 2 : 1)
    backward_query_kernel(Act* dq, float* delta, const Act* dout, const Act* q, const Act* kv, const float* lse, const int32_t* pick, const float* w,
                          GcaShape s) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1], *ds = tiles + 2;
  const Piece at(s.chunks(), s, fragments);
  const Slots slots(s, at.c, at.tile);
  const int64_t D = static_cast<int64_t>(s.H) * s.d, first = (at.b * s.T + slots.first) * D + at.h * s.d;
  const float scale = attention_scale(s.d);
  Fragment sum[fragments], p[key_tiles], dp[key_tiles];
  for (Fragment& f : sum) clear(f);
  for (int k = 0; k < s.K; k++) {
    const int64_t entry = (at.b * (s.chunks() + 1) + at.c) * s.K + k, saved = gca_stat(s, at.b, at.c, k, at.h) + slots.in_chunk;
    if (pick[entry] < 0) continue;
    const Act *key = memory_of(kv, s, at.b, pick[entry], at.h), *value = key + D;
#pragma unroll
    for (int n = 0; n < key_tiles; n++) {
      auto load_q = [&](Tile& tile, int t) { load_tile(tile, q + first + t * tile_size, D, slots.count, columns_of(s.d, t)); };
      auto load_dout = [&](Tile& tile, int t) { load_tile(tile, dout + first + t * tile_size, D, slots.count, columns_of(s.d, t)); };
      auto load_k = [&](Tile& tile, int t) {
        load_tile(tile, key + n * tile_size * 2 * D + t * tile_size, 2 * D, columns_of(s.keys(), n), columns_of(s.d, t));
      };
      auto load_v = [&](Tile& tile, int t) {
        load_tile(tile, value + n * tile_size * 2 * D + t * tile_size, 2 * D, columns_of(s.keys(), n), columns_of(s.d, t));
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
        load_tile(b, key + n * tile_size * 2 * D + column, 2 * D, columns_of(s.keys(), n), min(tile_size, s.d - column));
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

// The list of layers, put into the GPU's memory as arguments of a kernel: copied from the host it could not be reused on return.
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
// dV += (w P)^T dO,  dK += dS^T Q,  dS = w P (dP - delta) / sqrt(d)
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
        auto load_q = [&](Tile& tile, int t) { load_tile(tile, layer.q + first + t * tile_size, D, rows, columns_of(s.d, t)); };
        auto load_dout = [&](Tile& tile, int t) { load_tile(tile, layer.dout + first + t * tile_size, D, rows, columns_of(s.d, t)); };
        auto load_k = [&](Tile& tile, int t) { load_tile(tile, key + t * tile_size, 2 * D, keys, columns_of(s.d, t)); };
        auto load_v = [&](Tile& tile, int t) { load_tile(tile, value + t * tile_size, 2 * D, keys, columns_of(s.d, t)); };
        product_nt(p, a, b, s.d, load_q, load_k);
        product_nt(dp, a, b, s.d, load_dout, load_v);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = tile_y() + 16 * i;
          const float row_lse = row < rows ? layer.lse[saved + row] : INFINITY, row_delta = row < rows ? layer.delta[saved + row] : 0.0f;
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

// ---- on tensor cores ----------------------------------------------------------------------------------------------------------------
// A block has one head of one chunk, a warp 16 * blocks of its 64 rows. What comes through the pick table (or its inverse) goes through a
// ring of stages in shared memory, copied in the background.
template <int d>
constexpr int mma_tile_bytes = tile_size * row_bytes<d>;
// What a block is made of, the same for the three kernels: of the forms tried on an H100 with heads of 64 the fastest, or within 2% of it.
template <int d>
struct Form {
  static constexpr int blocks = d <= 64 ? 2 : 1, stages = 2;
  static constexpr int threads = tile_size / (16 * blocks) * 32;
  static constexpr int per_processor = d <= 64 ? 4 : 2;  // blocks on a multiprocessor, at least
};
// Added to the last column that a lane holds of 64 keys: minus infinity where that is the landmark and takes no part.
__device__ inline float last_key_bias(const GcaShape& s) { return !s.null_slot && lane_id() % 4 == 3 ? -INFINITY : 0.0f; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// The picks of one chunk, pick k in lane k of every warp.
struct Picks {
  int32_t chunk;
  float w;
  uint32_t there;  // bit k: there is a pick
  __device__ Picks(const int32_t* pick, const float* weight, int K) : chunk(-1), w(0) {
    static_assert(max_topk <= 32, "a pick for each lane");
    if (lane_id() < K) chunk = pick[lane_id()], w = weight[lane_id()];
    there = __ballot_sync(0xffffffffu, chunk >= 0);
  }
};
// The keys and values of a block's picks, in order, `stages` of them at a time.
template <int d>
struct MemoryRing {
  static constexpr int stages = Form<d>::stages, threads = Form<d>::threads;
  const bf16* kv;  // the row's memory of this head
  int64_t D;
  const Picks& picks;
  uint32_t ring, to_load;
  int stage = 0;
  __device__ MemoryRing(uint32_t ring_, const bf16* kv_, int64_t D_, const Picks& picks_) : kv(kv_), D(D_), picks(picks_), ring(ring_), to_load(picks_.there) {
#pragma unroll
    for (int i = 0; i < stages - 1; i++) load(i);
  }
  __device__ void load(int into) {
    if (to_load) {
      const bf16* key = kv + __shfl_sync(0xffffffffu, picks.chunk, __ffs(static_cast<int>(to_load)) - 1) * (tile_size * 2 * D);
      to_load &= to_load - 1;
      const uint32_t to = ring + static_cast<uint32_t>(into * 2 * mma_tile_bytes<d>);
      copy_tile_async<d, tile_size, threads>(to, key, 2 * D);
      copy_tile_async<d, tile_size, threads>(to + mma_tile_bytes<d>, key + D, 2 * D);
    }
    commit_copies();
  }
  // The tile of the next pick's keys; its values lie behind. What the last call gave is gone.
  __device__ uint32_t next() {
    wait_for_copies<stages - 2>();
    __syncthreads();
    load(stage == 0 ? stages - 1 : stage - 1);
    const uint32_t keys = ring + static_cast<uint32_t>(stage * 2 * mma_tile_bytes<d>);
    stage = stage + 1 == stages ? 0 : stage + 1;
    return keys;
  }
};

// o = sum_k w_k softmax(q K_k^T / sqrt(d)) V_k
template <int d>
__global__ void __launch_bounds__(Form<d>::threads, Form<d>::per_processor)
    forward_mma_kernel(bf16* out, float* lse, const bf16* q, const bf16* kv, const int32_t* pick, const float* w, GcaShape s) {
  constexpr int blocks = Form<d>::blocks, stages = Form<d>::stages, threads = Form<d>::threads;
  bf16* memory = shared<bf16>();
  const uint32_t q_tile = shared_address(memory);
  const Piece at(s.chunks(), s, 2);
  const Slots slots(s, at.c, 0);
  const int64_t D = static_cast<int64_t>(s.H) * d, first = (at.b * s.T + slots.first) * D + at.h * d, entry = (at.b * (s.chunks() + 1) + at.c) * s.K;
  const float scale = attention_scale(d), scale2 = scale * log2_e;
  const float last_key = last_key_bias(s);
  const Picks picks(pick + entry, w + entry, s.K);
  const int row = warp_id() * 16 * blocks;

  copy_tile_async<d, tile_size, threads>(q_tile, q + first, D, slots.count);
  commit_copies();
  MemoryRing<d> ring(q_tile + mma_tile_bytes<d>, memory_of(kv, s, at.b, 0, at.h), D, picks);
  wait_for_copies<stages - 1>();
  __syncthreads();
  Operand query[blocks][d / 16];
  load_lefts<d>(query, q_tile, row);
  Sum o[blocks][d / 8];
  clear(o);
  for (uint32_t to_do = picks.there; to_do; to_do &= to_do - 1) {
    const int k = __ffs(static_cast<int>(to_do)) - 1;
    const float weight = __shfl_sync(0xffffffffu, picks.w, k);
    const uint32_t keys = ring.next();
    Sum p[blocks][8];
    clear(p);
    multiply_rows<d>(p, query, keys, 0);
    float row_lse[blocks][2];
    // softmax over the keys of this one chunk; a row lies in a quad of lanes
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        p[i][7][2 * half + 1] += last_key;
        float top = -INFINITY, sum = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) top = fmaxf(top, fmaxf(p[i][j][2 * half], p[i][j][2 * half + 1]));
        top = warp_max<4>(top) * scale2;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) sum += p[i][j][e] = fast_exp2(fmaf(p[i][j][e], scale2, -top));
        sum = warp_sum<4>(sum);
        const float factor = __fdividef(weight, sum);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) p[i][j][e] *= factor;
        row_lse[i][half] = (top + fast_log2(sum)) * ln_2;
      }
    if (lse && lane_id() % 4 == 0)
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int r = row + 16 * i + 8 * half + lane_id() / 4;
          if (r < slots.count) lse[gca_stat(s, at.b, at.c, k, at.h) + slots.in_chunk + r] = row_lse[i][half];
        }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      Operand left[blocks];
#pragma unroll
      for (int i = 0; i < blocks; i++) as_left(left[i], p[i][2 * j], p[i][2 * j + 1]);
      multiply_columns<d>(o, left, keys + mma_tile_bytes<d>, 16 * j);
    }
  }
  store_sums<d>(out + first, D, memory, row, o, slots.count);
}

// With P the softmax in one fetched chunk: dP = dO V^T, delta = rowsum(P dP), dS = w P (dP - delta), dQ = sum_k dS K / sqrt(d)
template <int d>
__global__ void __launch_bounds__(Form<d>::threads, Form<d>::per_processor)
    backward_query_mma_kernel(bf16* dq, float* delta, const bf16* dout, const bf16* q, const bf16* kv, const float* lse, const int32_t* pick, const float* w,
                              GcaShape s) {
  constexpr int blocks = Form<d>::blocks, threads = Form<d>::threads;
  bf16* memory = shared<bf16>();
  const uint32_t q_tile = shared_address(memory), dout_tile = q_tile + mma_tile_bytes<d>;
  const Piece at(s.chunks(), s, 2);
  const int64_t D = static_cast<int64_t>(s.H) * d, first = (at.b * s.T + at.c * tile_size) * D + at.h * d, entry = (at.b * (s.chunks() + 1) + at.c) * s.K;
  const float scale = attention_scale(d), scale2 = scale * log2_e;
  const float last_key = last_key_bias(s);
  const Picks picks(pick + entry, w + entry, s.K);
  const int row = warp_id() * 16 * blocks;

  copy_tile_async<d, tile_size, threads>(q_tile, q + first, D);
  copy_tile_async<d, tile_size, threads>(dout_tile, dout + first, D);
  MemoryRing<d> ring(dout_tile + mma_tile_bytes<d>, memory_of(kv, s, at.b, 0, at.h), D, picks);  // with the first pick's
  Sum sum[blocks][d / 8];
  clear(sum);
  for (uint32_t to_do = picks.there; to_do; to_do &= to_do - 1) {
    const int k = __ffs(static_cast<int>(to_do)) - 1;
    const float weight = __shfl_sync(0xffffffffu, picks.w, k);
    const int64_t saved = gca_stat(s, at.b, at.c, k, at.h) + row + lane_id() / 4;
    float row_lse[blocks][2];
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) row_lse[i][half] = lse[saved + 16 * i + 8 * half];
    const uint32_t keys = ring.next();
    Sum p[blocks][8], ds[blocks][8];
    clear(p), clear(ds);
    multiply_rows<d>(p, q_tile, row, keys, 0);
    multiply_rows<d>(ds, dout_tile, row, keys + mma_tile_bytes<d>, 0);
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        p[i][7][2 * half + 1] += last_key;
        const float top = row_lse[i][half] * log2_e, factor = weight * scale;
        float row_delta = 0;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) row_delta += (p[i][j][e] = fast_exp2(fmaf(p[i][j][e], scale2, -top))) * ds[i][j][e];
        row_delta = warp_sum<4>(row_delta);
        if (lane_id() % 4 == 0) delta[saved + 16 * i + 8 * half] = row_delta;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) ds[i][j][e] = factor * p[i][j][e] * (ds[i][j][e] - row_delta);
      }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      Operand left[blocks];
#pragma unroll
      for (int i = 0; i < blocks; i++) as_left(left[i], ds[i][2 * j], ds[i][2 * j + 1]);
      multiply_columns<d>(sum, left, keys, 16 * j);
    }
  }
  wait_for_copies<0>();  // of Q, where there is no pick
  __syncthreads();
  store_sums<d>(dq + first, D, memory, row, sum, tile_size);
}

// The memory's gradient is a list of items: a stretch of what fetched one chunk, over all layers. A list longer than the cut is cut into
// parts, whose sums add_parts_kernel adds up in order; the others are one item each, which writes its chunk's gradient. Each row of
// the batch has its items longest first, so that the last blocks to start are short.
struct MemoryItem {
  int32_t chunk, first, count, part;  // first: in the lists of all layers, one behind the other; part: its number in the row, -1: the only one
};
struct CutChunk {
  int32_t chunk, first_part, parts;
};
struct MemoryCounts {
  int32_t items, cut_chunks;
};
struct MemoryPlan {
  MemoryCounts* counts;  // (B)
  MemoryItem* items;     // (B,items_at_most)
  CutChunk* cut_chunks;  // (B,cut_chunks_at_most)
  float* parts;          // (B,parts_at_most,H,2,64,d) in the order of threads
  int parts_at_most, shortest_cut;
  GCA_HD int64_t items_at_most(const GcaShape& s) const { return s.M + parts_at_most; }
  GCA_HD int64_t cut_chunks_at_most() const { return parts_at_most / 2; }
};

// A block plans a row. The cut is doubled until the parts find room. Numbers of items and parts come by integer atomics: they change
// where things lie, never what is summed in which order.
__global__ void plan_memory_kernel(MemoryPlan plan, const FetchingLayer<bf16, float>* layers, int n_layers, GcaShape s) {
  constexpr int bins = 64;
  __shared__ int next[bins], next_part, next_cut;
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  auto length = [&](int m) {
    int sum = 0;
    for (int l = 0; l < n_layers; l++) {
      const int32_t* start = layers[l].start + b * (s.M + 1) + m;
      sum += start[1] - start[0];
    }
    return sum;
  };
  int cut = plan.shortest_cut / 2, parts;
  do {
    cut *= 2, parts = 0;
    for (int m = thread; m < s.M; m += threads) {
      const int n = length(m);
      if (n > cut) parts += (n + cut - 1) / cut;
    }
    parts = block_sum(parts);
  } while (parts > plan.parts_at_most);

  // A counting sort by length: first the sizes of the bins, then their starts, then the items.
  auto bin = [&](int n) { return (cut - n) * (bins - 1) / cut; };
  for (int i = thread; i < bins; i += threads) next[i] = 0;
  if (thread == 0) next_part = next_cut = 0;
  __syncthreads();
  for (int m = thread; m < s.M; m += threads) {
    const int n = length(m), whole = n / cut, rest = n % cut;
    if (whole > 0) atomicAdd(&next[0], whole);
    if (rest > 0 || n == 0) atomicAdd(&next[bin(rest)], 1);
  }
  __syncthreads();
  if (thread == 0) {
    int sum = 0;
    for (int i = 0; i < bins; i++) {
      const int size = next[i];
      next[i] = sum, sum += size;
    }
    plan.counts[b].items = sum;
  }
  __syncthreads();
  MemoryItem* items = plan.items + b * plan.items_at_most(s);
  for (int m = thread; m < s.M; m += threads) {
    const int n = length(m);
    int part = -1;
    if (n > cut) {
      const int count = (n + cut - 1) / cut;
      part = atomicAdd(&next_part, count);
      plan.cut_chunks[b * plan.cut_chunks_at_most() + atomicAdd(&next_cut, 1)] = {m, part, count};
    }
    int first = 0;
    do {
      const int count = min(cut, n - first);
      items[atomicAdd(&next[bin(count)], 1)] = {m, first, count, part};
      if (part >= 0) part++;
      first += count;
    } while (first < n);
  }
  __syncthreads();
  if (thread == 0) plan.counts[b].cut_chunks = next_cut;
}

// One fetch of a chunk by a layer: where the fetching chunk's rows lie, and what was saved of them.
struct Fetch {
  const bf16 *q, *dout;
  const float *lse, *delta;
  float w;
};
constexpr int fetches_at_once = 32;  // whose places are looked up together
// A stage of the ring: Q, dO, lse, delta of one fetch.
template <int d>
constexpr int fetch_bytes = 2 * mma_tile_bytes<d> + 2 * tile_size * static_cast<int>(sizeof(float));

// A warp's keys of the landmark's row become zero, and both sums go to memory; tile: of this block, free.
template <int d, int blocks>
__device__ void store_memory_gradient(bf16* dkv, bf16* tile, Sum (&dk)[blocks][d / 8], Sum (&dv)[blocks][d / 8], const GcaShape& s, int64_t b, int64_t m,
                                      int h) {
  const int row = warp_id() * 16 * blocks;
  if (row + 16 * blocks == tile_size && lane_id() / 4 == 7)  // the landmark: its key and value are the constant 0
#pragma unroll
    for (int j = 0; j < d / 8; j++) dk[blocks - 1][j][2] = dk[blocks - 1][j][3] = dv[blocks - 1][j][2] = dv[blocks - 1][j][3] = 0;
  const int64_t D = static_cast<int64_t>(s.H) * d;
  bf16* to = dkv + (b * s.M + m) * tile_size * 2 * D + h * d;
  store_sums<d>(to, 2 * D, tile, row, dk, tile_size);
  store_sums<d>(to + D, 2 * D, tile, row, dv, tile_size);
}

// Rows are keys: S^T = K Q^T, dP^T = V dO^T, P^T = e^(S^T / sqrt(d) - lse); then, over all that fetched the chunk,
// dV += (w P^T) dO,  dK += dS^T Q,  dS^T = w P^T (dP^T - delta), and dK / sqrt(d) at the end
template <int d>
__global__ void __launch_bounds__(Form<d>::threads, Form<d>::per_processor)
    backward_memory_mma_kernel(bf16* dkv, MemoryPlan plan, const FetchingLayer<bf16, float>* layers, int n_layers, const bf16* kv, GcaShape s) {
  constexpr int blocks = Form<d>::blocks, threads = Form<d>::threads, stages = Form<d>::stages;
  constexpr bool keys_kept = d <= 64;  // in registers
  __shared__ Fetch fetches[fetches_at_once];
  int64_t index = blockIdx.x;
  const int64_t number = index % plan.items_at_most(s);
  index /= plan.items_at_most(s);
  const int h = static_cast<int>(index % s.H);
  const int64_t b = index / s.H, C = s.chunks(), D = static_cast<int64_t>(s.H) * d;
  if (number >= plan.counts[b].items) return;
  const MemoryItem item = plan.items[b * plan.items_at_most(s) + number];
  bf16* memory = shared<bf16>();
  const uint32_t key_tile = shared_address(memory), value_tile = key_tile + mma_tile_bytes<d>, ring = value_tile + mma_tile_bytes<d>;
  const float* ring_floats = reinterpret_cast<const float*>(reinterpret_cast<const char*>(memory) + 2 * mma_tile_bytes<d>);
  const int thread = static_cast<int>(threadIdx.x), row = warp_id() * 16 * blocks;
  const float scale = attention_scale(d), scale2 = scale * log2_e;

  const bf16* key = memory_of(kv, s, b, item.chunk, h);
  copy_tile_async<d, tile_size, threads>(key_tile, key, 2 * D);
  copy_tile_async<d, tile_size, threads>(value_tile, key + D, 2 * D);
  commit_copies();
  auto find = [&](int at) {
    for (int l = 0;; l++) {
      const FetchingLayer<bf16, float>& layer = layers[l];
      const int32_t* start = layer.start + b * (s.M + 1) + item.chunk;
      const int n = start[1] - start[0];
      if (at >= n) {
        at -= n;
        continue;
      }
      const int64_t entry = layer.entry[b * C * s.K + start[0] + at], c = entry / s.K;
      const int64_t first = (b * s.T + c * tile_size) * D + h * d, saved = gca_stat(s, b, c, static_cast<int>(entry % s.K), h);
      return Fetch{layer.q + first, layer.dout + first, layer.lse + saved, layer.delta + saved, layer.w[b * (C + 1) * s.K + entry]};
    }
  };
  auto load = [&](int i, int n) {
    if (i < n) {
      const Fetch& fetch = fetches[i];
      const uint32_t to = ring + static_cast<uint32_t>(i % stages * fetch_bytes<d>);
      copy_tile_async<d, tile_size, threads>(to, fetch.q, D);
      copy_tile_async<d, tile_size, threads>(to + mma_tile_bytes<d>, fetch.dout, D);
      if (thread < 32) copy_async(to + static_cast<uint32_t>(2 * mma_tile_bytes<d> + thread * 16), (thread < 16 ? fetch.lse : fetch.delta) + thread % 16 * 4);
    }
    commit_copies();
  };

  [[maybe_unused]] Operand keys[blocks][d / 16];
  Sum dk[blocks][d / 8], dv[blocks][d / 8];
  clear(dk), clear(dv);
  for (int done = 0; done < item.count; done += fetches_at_once) {
    const int n = min(fetches_at_once, item.count - done);
    if (thread < n) fetches[thread] = find(item.first + done + thread);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < stages - 1; i++) load(i, n);
    if (keys_kept && done == 0) {
      wait_for_copies<stages - 1>();
      __syncthreads();
      load_lefts<d>(keys, key_tile, row);
    }
    for (int f = 0; f < n; f++) {
      wait_for_copies<stages - 2>();
      __syncthreads();
      load(f + stages - 1, n);
      const uint32_t q_tile = ring + static_cast<uint32_t>(f % stages * fetch_bytes<d>), dout_tile = q_tile + mma_tile_bytes<d>;
      const float* lse = ring_floats + (f % stages * fetch_bytes<d> + 2 * mma_tile_bytes<d>) / static_cast<int>(sizeof(float)) + 2 * (lane_id() % 4);
      const float weight = fetches[f].w;
#pragma unroll 1
      for (int query = 0; query < tile_size; query += 16) {
        Sum p[blocks][2], ds[blocks][2];
        clear(p), clear(ds);
        if constexpr (keys_kept)
          multiply_rows<d>(p, keys, q_tile, query);
        else
          multiply_rows<d>(p, key_tile, row, q_tile, query);
        multiply_rows<d>(ds, value_tile, row, dout_tile, query);
        Operand p_left[blocks], ds_left[blocks];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float2 column_lse = *reinterpret_cast<const float2*>(lse + query + 8 * j);
          const float2 delta = *reinterpret_cast<const float2*>(lse + tile_size + query + 8 * j);
#pragma unroll
          for (int i = 0; i < blocks; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const float x = fast_exp2(fmaf(p[i][j][e], scale2, -log2_e * (e % 2 ? column_lse.y : column_lse.x)));
              p[i][j][e] = weight * x;
              ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - (e % 2 ? delta.y : delta.x));
            }
        }
#pragma unroll
        for (int i = 0; i < blocks; i++) as_left(p_left[i], p[i][0], p[i][1]), as_left(ds_left[i], ds[i][0], ds[i][1]);
        multiply_columns<d>(dv, p_left, dout_tile, query);
        multiply_columns<d>(dk, ds_left, q_tile, query);
      }
    }
    __syncthreads();  // the ring and the fetches are free
  }
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int j = 0; j < d / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) dk[i][j][e] *= scale;
  wait_for_copies<0>();
  if (item.part < 0) {
    __syncthreads();
    store_memory_gradient<d, blocks>(dkv, memory, dk, dv, s, b, item.chunk, h);
  } else {
    float4* to = reinterpret_cast<float4*>(plan.parts + ((b * plan.parts_at_most + item.part) * s.H + h) * (2 * tile_size * d)) + thread;
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int j = 0; j < d / 8; j++) {
        to[(i * d / 8 + j) * threads] = make_float4(dk[i][j][0], dk[i][j][1], dk[i][j][2], dk[i][j][3]);
        to[((blocks + i) * d / 8 + j) * threads] = make_float4(dv[i][j][0], dv[i][j][1], dv[i][j][2], dv[i][j][3]);
      }
  }
}

// The gradient of a chunk whose list was cut: its parts, in order. Threads as in backward_memory_mma_kernel.
template <int d>
__global__ void __launch_bounds__(Form<d>::threads) add_parts_kernel(bf16* dkv, MemoryPlan plan, GcaShape s) {
  constexpr int blocks = Form<d>::blocks, threads = Form<d>::threads;
  int64_t index = blockIdx.x;
  const int64_t number = index % plan.cut_chunks_at_most();
  index /= plan.cut_chunks_at_most();
  const int h = static_cast<int>(index % s.H);
  const int64_t b = index / s.H;
  if (number >= plan.counts[b].cut_chunks) return;
  const CutChunk chunk = plan.cut_chunks[b * plan.cut_chunks_at_most() + number];
  Sum sum[2][blocks][d / 8];
  clear(sum[0]), clear(sum[1]);
  for (int part = 0; part < chunk.parts; part++) {
    const float4* from =
        reinterpret_cast<const float4*>(plan.parts + ((b * plan.parts_at_most + chunk.first_part + part) * s.H + h) * (2 * tile_size * d)) + threadIdx.x;
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int j = 0; j < d / 8; j++) {
          const float4 four = from[((which * blocks + i) * d / 8 + j) * threads];
          sum[which][i][j][0] += four.x, sum[which][i][j][1] += four.y, sum[which][i][j][2] += four.z, sum[which][i][j][3] += four.w;
        }
  }
  store_memory_gradient<d, blocks>(dkv, shared<bf16>(), sum[0], sum[1], s, b, chunk.chunk, h);
}

// ---- choosing ---------------------------------------------------------------------------------------------------------------------
void check_shape(const GcaShape& s) {
  check_head(s.d);
  if (s.S < 2 || s.S > 2 * tile_size) throw Error(format("the GPU fetches chunks of 2 to 128 slots, found %d: use a smaller --chunk, or --device cpu", s.S));
  GCA_CHECK(s.K >= 1 && s.K <= max_topk, "1 to %d chunks are fetched, found %d", max_topk, s.K);
}
// body(tiles of keys, fragments), both constants
template <class Body>
void with_shape(const GcaShape& s, Body&& body) {
  check_shape(s);
  with_fragments(s.d, [&](auto fragments) {
    if (s.S <= tile_size)
      body(std::integral_constant<int, 1>{}, fragments);
    else
      body(std::integral_constant<int, 2>{}, fragments);
  });
}

// fast(d) on tensor cores where the type and the shape are theirs, d a constant; otherwise plain().
template <class Act, class Fast, class Plain>
void choose(const GcaShape& s, Fast&& fast, Plain&& plain) {
  check_shape(s);
  if constexpr (std::is_same_v<Act, bf16>)
    if (s.S == tile_size && mma_head(s.d) && !plain_attention()) return with_mma_head(s.d, fast);
  plain();
}

}  // namespace

template <class Act>
void Gpu<Act>::zero_landmarks(Act* kv, int64_t N, int64_t S, int64_t D) {
  if (N == 0) return;
  const size_t width_bytes = static_cast<size_t>(2 * D) * sizeof(Act);
  check(cudaMemset2DAsync(kv + (S - 1) * 2 * D, static_cast<size_t>(S) * width_bytes, 0, width_bytes, static_cast<size_t>(N), stream_),
        "clearing landmarks' keys and values");
}

template <class Act>
void Gpu<Act>::gca_forward(Act* out, float* lse, const Act* q, const Act* kv, const int32_t* pick, const float* w, const GcaShape& s) {
  const Doing doing = "grouped cross attention, forward";
  choose<Act>(
      s,
      [&](auto d) {
        launch(doing, stream_, forward_mma_kernel<d>, s.B * s.H * s.chunks(), Form<d>::threads, (1 + 2 * Form<d>::stages) * mma_tile_bytes<d>, out, lse, q, kv,
               pick, w, s);
      },
      [&] {
        with_shape(s, [&](auto key_tiles, auto fragments) {
          launch(doing, stream_, forward_kernel<Act, key_tiles, fragments>, pieces(s.chunks(), s, fragments), tile_threads, (2 + key_tiles) * tile_bytes, out,
                 lse, q, kv, pick, w, s);
        });
      });
}

template <class Act>
void Gpu<Act>::gca_backward_query(Act* dq, float* dw, float* delta, const Act* dout, const Act* q, const Act* kv, const float* lse, const int32_t* pick,
                                  const float* w, const GcaShape& s) {
  GCA_CHECK(s.first_slot == 0 && s.T % s.S == 0, "backward takes whole rows");
  const Doing doing = "grouped cross attention, backward by query";
  choose<Act>(
      s,
      [&](auto d) {
        launch(doing, stream_, backward_query_mma_kernel<d>, s.B * s.H * s.chunks(), Form<d>::threads, (2 + 2 * Form<d>::stages) * mma_tile_bytes<d>, dq, delta,
               dout, q, kv, lse, pick, w, s);
      },
      [&] {
        with_shape(s, [&](auto key_tiles, auto fragments) {
          launch(doing, stream_, backward_query_kernel<Act, key_tiles, fragments>, pieces(s.chunks(), s, fragments), tile_threads,
                 (2 + key_tiles) * tile_bytes, dq, delta, dout, q, kv, lse, pick, w, s);
        });
      });
  launch("gradient of the picks' weights", stream_, weight_gradient_kernel, ceil_div(s.B * s.chunks() * s.K, 8), 256, 0, dw, delta, pick, s);
}

template <class Act>
void Gpu<Act>::gca_backward_memory(Act* dkv, const FetchingLayer<Act, float>* layers, int n_layers, const Act* kv, const GcaShape& s) {
  GCA_CHECK(s.first_slot == 0 && s.T % s.S == 0 && s.M == s.chunks(), "backward takes whole rows");
  int64_t used = 0;  // bytes of working memory
  auto take = [&]<class T>(T*& array, int64_t count) {
    array = scratch<T>(count, used);
    used = round_up(used + count * static_cast<int64_t>(sizeof(T)), 16);
  };
  FetchingLayer<Act, float>* table;
  take(table, n_layers);
  for (int first = 0; first < n_layers; first += layers_at_once) {
    const int count = std::min(layers_at_once, n_layers - first);
    SomeLayers<Act> some{};
    std::copy_n(layers + first, count, some.at);
    launch("the list of fetching layers", stream_, put_layers_kernel<Act>, 1, 1, 0, table + first, some, count);
  }
  const Doing doing = "grouped cross attention, backward for the memory";
  choose<Act>(
      s,
      [&](auto d) {
        MemoryPlan plan{};
        plan.shortest_cut = std::max(32, 4 * s.K * n_layers);  // four times the mean
        const int64_t part = int64_t{2} * tile_size * s.H * d;
        const int64_t of_a_part = part * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(MemoryItem) + sizeof(CutChunk));
        const int64_t room = scratch_bytes - used - s.B * (s.M + 4) * static_cast<int64_t>(sizeof(MemoryItem));  // 4: the counts, and rounding up
        plan.parts_at_most = static_cast<int>(std::clamp<int64_t>(room / (s.B * of_a_part), 0, s.M / 2));  // M / 2 suffice for the shortest cut
        take(plan.counts, s.B), take(plan.items, s.B * plan.items_at_most(s)), take(plan.cut_chunks, s.B * plan.cut_chunks_at_most());
        take(plan.parts, s.B * plan.parts_at_most * part);
        launch("plan of the memory's gradient", stream_, plan_memory_kernel, s.B, 256, 0, plan, table, n_layers, s);
        launch(doing, stream_, backward_memory_mma_kernel<d>, s.B * s.H * plan.items_at_most(s), Form<d>::threads,
               2 * mma_tile_bytes<d> + Form<d>::stages * fetch_bytes<d>, dkv, plan, table, n_layers, kv, s);
        launch("sums of the memory's gradient", stream_, add_parts_kernel<d>, s.B * s.H * plan.cut_chunks_at_most(), Form<d>::threads, mma_tile_bytes<d>, dkv,
               plan, s);
      },
      [&] {
        with_fragments(s.d, [&](auto fragments) {
          launch(doing, stream_, backward_memory_kernel<Act, fragments>, pieces(s.M, s, fragments), tile_threads, 4 * tile_bytes, dkv, table, n_layers, kv, s);
        });
      });
}

template void Gpu<float>::zero_landmarks(float*, int64_t, int64_t, int64_t);
template void Gpu<bf16>::zero_landmarks(bf16*, int64_t, int64_t, int64_t);
template void Gpu<float>::gca_forward(float*, float*, const float*, const float*, const int32_t*, const float*, const GcaShape&);
template void Gpu<bf16>::gca_forward(bf16*, float*, const bf16*, const bf16*, const int32_t*, const float*, const GcaShape&);
template void Gpu<float>::gca_backward_query(float*, float*, float*, const float*, const float*, const float*, const float*, const int32_t*, const float*,
                                             const GcaShape&);
template void Gpu<bf16>::gca_backward_query(bf16*, float*, float*, const bf16*, const bf16*, const bf16*, const float*, const int32_t*, const float*,
                                            const GcaShape&);
template void Gpu<float>::gca_backward_memory(float*, const FetchingLayer<float, float>*, int, const float*, const GcaShape&);
template void Gpu<bf16>::gca_backward_memory(bf16*, const FetchingLayer<bf16, float>*, int, const bf16*, const GcaShape&);

}  // namespace gca
