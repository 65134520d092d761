// Grouped cross attention on tensor cores (mma.sync): bf16, chunks of 64, heads of 32, 64 or 128 columns. The same
// three passes as the plain kernels in plain/gca.cuh, which are what to read first.
//
//   forward, backward by query             backward for the memory
//              pick 0  pick 1 ..                        fetch 0  fetch 1 ..  (chunks and layers that fetched this one)
//   warp 0   [ P       P ..      ]         warp 0     [ P^T      P^T ..  ]
//   warp 1   [ P       P ..      ]         warp 1     [ P^T      P^T ..  ]
//   rows: 64 slots of one chunk            rows: 64 keys of one chunk; 16 queries at a time
//
// What a warp of 32 rows and a lane hold in registers, heads of 64 (a Sum is 16 x 8 floats, 4 a lane; mma.cuh):
//   forward              Q 32 x 64 as 8 left Operands (32 registers)   P 2 x 8 Sums (64)     O 2 x 8 Sums (64)
//   backward by query    P and dS 2 x 8 Sums each (128)                dQ 2 x 8 Sums (64);   Q, dO read as needed
//   ... for the memory   K as 8 left Operands (32)                     P^T and dS^T 2 x 2 Sums each (32), dK and dV
//                                                                      2 x 8 Sums each (128); V read as needed
// P never leaves registers: two of its Sums are a left Operand of the product that follows.
//
// Shared memory, heads of 64 columns (64 rows of 128 bytes each, swizzled; two warps, 2 stages):
//   forward                   backward by query             backward for the memory
//        0  Q                      0  Q                           0  K
//    8,192  2 x (K | V)        8,192  dO                      8,192  V
//   40,960  end               16,384  2 x (K | V)            16,384  2 x (Q | dO | lse | delta)
//                             49,152  end                    50,176  end
//                                                      apart: the places of 32 fetches, 40 bytes each: 1,280
// What stands before the ring is filled once, by all threads; outputs leave through the first tile, each warp by its
// own rows. A stage is filled in the background, one ahead, and free when all warps have passed the next barrier:
//
//   ring of 2 stages             stage 0                 stage 1
//   before the loop              pick 0 is on its way
//   pick 0: wait, barrier        is read by all warps    pick 1 is on its way
//   pick 1: wait, barrier        pick 2 is on its way    is read by all warps
//
// The memory's lists (start and fetches of each layer, one behind the other), cut after `cut` fetches:
//   chunk 0, 70 fetches   | item: 32 | item: 32 | 6 |    3 parts, in float; gca_add_parts_mma_kernel adds them in order
//   chunk 1,  5 fetches   | item: 5 |                    one item: its block writes dkv
#include <algorithm>

#include "kernels/gca.cuh"
#include "kernels/mma/mma.cuh"

namespace gca {
namespace {

// A block has one head of one chunk, a warp 16 * blocks of its 64 rows. What comes through the pick table (or its
// inverse) goes through a ring of stages in shared memory, copied in the background.
struct GcaPlan {
  int d;             // columns of a head
  int rows_of_warp;  // of the chunk's 64, a multiple of 16
  int stages;        // of the ring
  int residents;     // blocks of a multiprocessor at once, at least, which sets the registers of a thread
  bool keys_kept;    // backward for the memory: the rows' own keys stay in registers

  GCA_HD constexpr int blocks() const { return rows_of_warp / 16; }
  GCA_HD constexpr int threads() const { return tile_size / rows_of_warp * 32; }
  GCA_HD constexpr int tile_bytes() const { return tile_size * d * static_cast<int>(sizeof(bf16)); }
  // A stage of the memory's ring: Q, dO, lse, delta of one fetch.
  GCA_HD constexpr int fetch_bytes() const { return 2 * (tile_bytes() + tile_size * static_cast<int>(sizeof(float))); }
};
// The same for the three kernels: of the forms tried on an H100 with heads of 64 the fastest, or within 2% of it.
GCA_HD constexpr GcaPlan gca_plan(int d) {
  if (d <= 64) return {.d = d, .rows_of_warp = 32, .stages = 2, .residents = 4, .keys_kept = true};
  return {.d = d, .rows_of_warp = 16, .stages = 2, .residents = 2, .keys_kept = false};
}
constexpr int forward_bytes(GcaPlan plan) { return (1 + 2 * plan.stages) * plan.tile_bytes(); }
constexpr int query_bytes(GcaPlan plan) { return (2 + 2 * plan.stages) * plan.tile_bytes(); }
constexpr int memory_bytes(GcaPlan plan) { return 2 * plan.tile_bytes() + plan.stages * plan.fetch_bytes(); }
static_assert(forward_bytes(gca_plan(64)) == 40960 && query_bytes(gca_plan(64)) == 49152, "the map above");
static_assert(memory_bytes(gca_plan(64)) == 50176 && gca_plan(64).fetch_bytes() == 2 * (8192 + 256), "the map above");
static_assert(gca_plan(64).blocks() == 2 && gca_plan(64).threads() == 64, "two warps of 32 rows");
// Added to the last column that a lane holds of 64 keys: minus infinity where that is the landmark and takes no part.
__device__ inline float last_key_bias(const GcaShape& s) {
  return !s.null_slot && lane_id() % 4 == 3 ? -INFINITY : 0.0f;
}

// The picks of one chunk, pick k in lane k of every warp.
struct Picks {
  int32_t chunk;
  float w;
  uint32_t there;  // bit k: there is a pick
  __device__ Picks(const int32_t* pick, const float* weight, int K) : chunk(-1), w(0) {
    static_assert(max_topk <= 32, "a pick for each lane");
    if (lane_id() < K) {
      chunk = pick[lane_id()];
      w = weight[lane_id()];
    }
    there = __ballot_sync(0xffffffffu, chunk >= 0);
  }
};
// The keys and values of a block's picks, in order, `stages` of them at a time.
template <int d>
struct MemoryRing {
  static constexpr GcaPlan plan = gca_plan(d);
  static constexpr int stages = plan.stages, threads = plan.threads(), tile_bytes = plan.tile_bytes();
  const bf16* kv;  // (M,S,2D), the row's memory from this head's first column on
  int64_t D;
  const Picks& picks;
  uint32_t ring, to_load;
  int stage = 0;
  __device__ MemoryRing(uint32_t ring_, const bf16* kv_, int64_t D_, const Picks& picks_)
      : kv(kv_), D(D_), picks(picks_), ring(ring_), to_load(picks_.there) {
#pragma unroll
    for (int i = 0; i < stages - 1; i++) load(i);
  }
  __device__ void load(int into) {
    if (to_load) {
      const bf16* key =
          kv + __shfl_sync(0xffffffffu, picks.chunk, __ffs(static_cast<int>(to_load)) - 1) * (tile_size * 2 * D);
      to_load &= to_load - 1;
      const uint32_t to = ring + static_cast<uint32_t>(into * 2 * tile_bytes);
      copy_tile_async<d, tile_size, threads>(to, key, 2 * D);
      copy_tile_async<d, tile_size, threads>(to + tile_bytes, key + D, 2 * D);
    }
    commit_copies();
  }
  // The tile of the next pick's keys; its values lie behind. What the last call gave is gone.
  __device__ uint32_t next() {
    wait_for_copies<stages - 2>();
    __syncthreads();
    load(stage == 0 ? stages - 1 : stage - 1);
    const uint32_t keys = ring + static_cast<uint32_t>(stage * 2 * tile_bytes);
    stage = stage + 1 == stages ? 0 : stage + 1;
    return keys;
  }
};

// o = sum_k w_k softmax(q K_k^T / sqrt(d)) V_k
template <int d>
__global__ void __launch_bounds__(gca_plan(d).threads(), gca_plan(d).residents)
    gca_forward_mma_kernel(bf16* out,            // (B,T,D)
                           float* lse,           // (B,C,K,H,S) or null
                           const bf16* q,        // (B,T,D)
                           const bf16* kv,       // (B,M,S,2D)
                           const int32_t* pick,  // (B,C+1,K)
                           const float* w,       // (B,C+1,K)
                           GcaShape s) {
  constexpr GcaPlan plan = gca_plan(d);
  constexpr int blocks = plan.blocks(), stages = plan.stages, threads = plan.threads(), tile_bytes = plan.tile_bytes();
  bf16* memory = shared<bf16>();
  const uint32_t q_tile = shared_address(memory);
  const Piece at(s.chunks(), s, 2);
  const Slots slots(s, at.c, 0);
  const int64_t D = static_cast<int64_t>(s.H) * d, first = (at.b * s.T + slots.first) * D + at.h * d,
                entry = s.table().serving(at.b, at.c);
  const float scale = attention_scale(d), scale2 = scale * log2_e;
  const float last_key = last_key_bias(s);
  const Picks picks(pick + entry, w + entry, s.K);
  const WarpRows<blocks> my;

  copy_tile_async<d, tile_size, threads>(q_tile, q + first, D, slots.count);
  commit_copies();
  MemoryRing<d> ring(q_tile + tile_bytes, memory_of(kv, s, at.b, 0, at.h), D, picks);
  wait_for_copies<stages - 1>();
  __syncthreads();
  Operand query[d / 16][blocks];
  load_lefts<d>(query, q_tile, my.warp_row);
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
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        p[i][7][2 * half + 1] += last_key;
        float top, sum;
        exponentials(p[i], half, scale2, top, sum);  // of this one chunk's keys
        scale_row(p[i], half, __fdividef(weight, sum));
        row_lse[i][half] = (top + fast_log2(sum)) * ln_2;
      }
    if (lse && lane_id() % 4 == 0)
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int r = my.row(i, half);
          if (r < slots.count) lse[gca_stat(s, at.b, at.c, k, at.h) + slots.in_chunk + r] = row_lse[i][half];
        }
    multiply_columns<d>(o, p, keys + tile_bytes, 0);
  }
  store_sums<d>(out + first, D, memory, my.warp_row, o, slots.count);
}

// With P the softmax in one fetched chunk: dP = dO V^T, delta = rowsum(P dP), dS = w P (dP - delta), and
// dQ = sum_k dS K / sqrt(d). From delta kernels/gca.cu makes dw, the gradient of the pick's weight, for both paths.
template <int d>
__global__ void __launch_bounds__(gca_plan(d).threads(), gca_plan(d).residents)
    gca_backward_query_mma_kernel(bf16* dq,             // (B,T,D)
                                  float* delta,         // (B,C,K,H,S)
                                  const bf16* dout,     // (B,T,D)
                                  const bf16* q,        // (B,T,D)
                                  const bf16* kv,       // (B,M,S,2D)
                                  const float* lse,     // (B,C,K,H,S)
                                  const int32_t* pick,  // (B,C+1,K)
                                  const float* w,       // (B,C+1,K)
                                  GcaShape s) {
  constexpr GcaPlan plan = gca_plan(d);
  constexpr int blocks = plan.blocks(), threads = plan.threads(), tile_bytes = plan.tile_bytes();
  bf16* memory = shared<bf16>();
  const uint32_t q_tile = shared_address(memory), dout_tile = q_tile + tile_bytes;
  const Piece at(s.chunks(), s, 2);
  const int64_t D = static_cast<int64_t>(s.H) * d, first = (at.b * s.T + at.c * tile_size) * D + at.h * d,
                entry = s.table().serving(at.b, at.c);
  const float scale = attention_scale(d), scale2 = scale * log2_e;
  const float last_key = last_key_bias(s);
  const Picks picks(pick + entry, w + entry, s.K);
  const WarpRows<blocks> my;

  copy_tile_async<d, tile_size, threads>(q_tile, q + first, D);
  copy_tile_async<d, tile_size, threads>(dout_tile, dout + first, D);
  // Q and dO come in one group with the first pick's keys and values.
  MemoryRing<d> ring(dout_tile + tile_bytes, memory_of(kv, s, at.b, 0, at.h), D, picks);
  Sum sum[blocks][d / 8];
  clear(sum);
  for (uint32_t to_do = picks.there; to_do; to_do &= to_do - 1) {
    const int k = __ffs(static_cast<int>(to_do)) - 1;
    const float weight = __shfl_sync(0xffffffffu, picks.w, k);
    const int64_t saved = gca_stat(s, at.b, at.c, k, at.h) + my.warp_row + my.lane_row;
    float row_lse[blocks][2];
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) row_lse[i][half] = lse[saved + 16 * i + 8 * half];
    const uint32_t keys = ring.next();
    Sum p[blocks][8], ds[blocks][8];
    clear(p);
    clear(ds);
    multiply_rows<d>(p, q_tile, my.warp_row, keys, 0);
    multiply_rows<d>(ds, dout_tile, my.warp_row, keys + tile_bytes, 0);
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        p[i][7][2 * half + 1] += last_key;
        const float factor = weight * scale,
                    row_delta = softmax_again(p[i], ds[i], half, scale2, row_lse[i][half] * log2_e);
        if (lane_id() % 4 == 0) delta[saved + 16 * i + 8 * half] = row_delta;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) ds[i][j][e] = factor * p[i][j][e] * (ds[i][j][e] - row_delta);
      }
#pragma unroll
    for (int k = 0; k < tile_size / 16; k++) {  // by multiply_columns(sum, ds, ..) there are 76 bytes more of spills
      Operand left[blocks];
      as_lefts(left, ds, k);
      multiply_columns<d>(sum, left, keys, 16 * k);
    }
  }
  wait_for_copies<0>();  // of Q, where there is no pick
  __syncthreads();
  store_sums<d>(dq + first, D, memory, my.warp_row, sum, tile_size);
}

// The memory's gradient is a list of items: a stretch of what fetched one chunk, over all layers. A list longer than
// the cut is cut into parts, whose sums gca_add_parts_mma_kernel adds up in order; the others are one item each, which
// writes its chunk's gradient. Each row of the batch has its items longest first, so that the last blocks to start are
// short.
struct MemoryItem {
  int32_t chunk;
  int32_t first, count;  // in the lists of all layers, one behind the other
  int32_t part;          // its number in the row; -1: the only one
};
struct CutChunk {
  int32_t chunk, first_part, parts;
};
struct MemoryCounts {
  int32_t items, cut_chunks;
};
struct MemoryWork {
  MemoryCounts* counts;  // (B)
  MemoryItem* items;     // (B,items_at_most)
  CutChunk* cut_chunks;  // (B,cut_chunks_at_most)
  float* parts;          // (B,parts_at_most,H,2,64,d) in the order of threads
  int parts_at_most, shortest_cut;
  GCA_HD int64_t items_at_most(const GcaShape& s) const { return s.M + parts_at_most; }
  GCA_HD int64_t cut_chunks_at_most() const { return parts_at_most / 2; }
};

// Which item, or cut chunk, of which head and row a block does.
struct WorkPiece {
  int64_t number;
  int h;
  int64_t b;
  __device__ WorkPiece(int64_t numbers, int H) {
    int64_t i = blockIdx.x;
    number = i % numbers;
    i /= numbers;
    h = static_cast<int>(i % H);
    b = i / H;
  }
};

// A block plans a row. The cut is doubled until the parts find room. Numbers of items and parts come by integer
// atomics: they change where things lie, never what is summed in which order.
__global__ void gca_plan_memory_mma_kernel(MemoryWork work, const FetchingLayer<bf16, float>* layers,  // (n_layers)
                                           int n_layers, GcaShape s) {
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
  int cut = work.shortest_cut / 2, parts;
  do {
    cut *= 2;
    parts = 0;
    for (int m = thread; m < s.M; m += threads) {
      const int n = length(m);
      if (n > cut) parts += (n + cut - 1) / cut;
    }
    parts = block_sum(parts);
  } while (parts > work.parts_at_most);

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
      next[i] = sum;
      sum += size;
    }
    work.counts[b].items = sum;
  }
  __syncthreads();
  MemoryItem* items = work.items + b * work.items_at_most(s);
  for (int m = thread; m < s.M; m += threads) {
    const int n = length(m);
    int part = -1;
    if (n > cut) {
      const int count = (n + cut - 1) / cut;
      part = atomicAdd(&next_part, count);
      work.cut_chunks[b * work.cut_chunks_at_most() + atomicAdd(&next_cut, 1)] = {m, part, count};
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
  if (thread == 0) work.counts[b].cut_chunks = next_cut;
}

// One fetch of a chunk by a layer: where the fetching chunk's rows lie, and what was saved of them.
struct Fetch {
  const bf16 *q, *dout;      // 64 rows, D apart
  const float *lse, *delta;  // (64)
  float w;
};
constexpr int fetches_at_once = 32;  // whose places are looked up together
static_assert(sizeof(Fetch) == 40 && fetches_at_once * sizeof(Fetch) == 1280, "the map above");

// A warp's keys of the landmark's row become zero, and both sums go to memory, dkv (B,M,64,2D); tile: of this block,
// free.
template <int d, int blocks>
__device__ void store_memory_gradient(bf16* dkv, bf16* tile, Sum (&dk)[blocks][d / 8], Sum (&dv)[blocks][d / 8],
                                      const GcaShape& s, int64_t b, int64_t m, int h) {
  const WarpRows<blocks> my;
  if (my.end() == tile_size && my.lane_row == 7)  // the landmark: its key and value are the constant 0
#pragma unroll
    for (int j = 0; j < d / 8; j++)
      dk[blocks - 1][j][2] = dk[blocks - 1][j][3] = dv[blocks - 1][j][2] = dv[blocks - 1][j][3] = 0;
  const int64_t D = static_cast<int64_t>(s.H) * d;
  bf16* to = dkv + (b * s.M + m) * tile_size * 2 * D + h * d;
  store_sums<d>(to, 2 * D, tile, my.warp_row, dk, tile_size);
  store_sums<d>(to + D, 2 * D, tile, my.warp_row, dv, tile_size);
}

// Rows are keys: S^T = K Q^T, dP^T = V dO^T, P^T = e^(S^T / sqrt(d) - lse); then, over all that fetched the chunk,
//   dV += (w P^T) dO
//   dK += dS^T Q,  dS^T = w P^T (dP^T - delta), and dK / sqrt(d) at the end
template <int d>
__global__ void __launch_bounds__(gca_plan(d).threads(), gca_plan(d).residents)
    gca_backward_memory_mma_kernel(bf16* dkv,                                                  // (B,M,S,2D)
                                   MemoryWork work, const FetchingLayer<bf16, float>* layers,  // (n_layers)
                                   int n_layers, const bf16* kv,                               // (B,M,S,2D)
                                   GcaShape s) {
  constexpr GcaPlan plan = gca_plan(d);
  constexpr int blocks = plan.blocks(), stages = plan.stages, threads = plan.threads(), tile_bytes = plan.tile_bytes();
  __shared__ Fetch fetches[fetches_at_once];
  const auto [number, h, b] = WorkPiece(work.items_at_most(s), s.H);
  const int64_t C = s.chunks(), D = static_cast<int64_t>(s.H) * d;
  if (number >= work.counts[b].items) return;
  const MemoryItem item = work.items[b * work.items_at_most(s) + number];
  bf16* memory = shared<bf16>();
  const uint32_t key_tile = shared_address(memory), value_tile = key_tile + tile_bytes, ring = value_tile + tile_bytes;
  const float* ring_floats = reinterpret_cast<const float*>(reinterpret_cast<const char*>(memory) + 2 * tile_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const WarpRows<blocks> my;
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
      const int64_t entry = layer.fetches[b * C * s.K + start[0] + at], c = entry / s.K;
      const int64_t first = (b * s.T + c * tile_size) * D + h * d,
                    saved = gca_stat(s, b, c, static_cast<int>(entry % s.K), h);
      return Fetch{layer.q + first, layer.dout + first, layer.lse + saved, layer.delta + saved,
                   layer.w[s.table().serving(b, 0) + entry]};
    }
  };
  auto load = [&](int i, int n) {
    if (i < n) {
      const Fetch& fetch = fetches[i];
      const uint32_t to = ring + static_cast<uint32_t>(i % stages * plan.fetch_bytes());
      copy_tile_async<d, tile_size, threads>(to, fetch.q, D);
      copy_tile_async<d, tile_size, threads>(to + tile_bytes, fetch.dout, D);
      if (thread < 32)
        copy_async(to + static_cast<uint32_t>(2 * tile_bytes + thread * 16),
                   (thread < 16 ? fetch.lse : fetch.delta) + thread % 16 * 4);
    }
    commit_copies();
  };

  [[maybe_unused]] Operand keys[d / 16][blocks];
  Sum dk[blocks][d / 8], dv[blocks][d / 8];
  clear(dk);
  clear(dv);
  for (int done = 0; done < item.count; done += fetches_at_once) {
    const int n = min(fetches_at_once, item.count - done);
    if (thread < n) fetches[thread] = find(item.first + done + thread);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < stages - 1; i++) load(i, n);
    if (plan.keys_kept && done == 0) {
      wait_for_copies<stages - 1>();
      __syncthreads();
      load_lefts<d>(keys, key_tile, my.warp_row);
    }
    for (int f = 0; f < n; f++) {
      wait_for_copies<stages - 2>();
      __syncthreads();
      load(f + stages - 1, n);
      const uint32_t q_tile = ring + static_cast<uint32_t>(f % stages * plan.fetch_bytes()),
                     dout_tile = q_tile + tile_bytes;
      const float* lse = ring_floats +
                         (f % stages * plan.fetch_bytes() + 2 * tile_bytes) / static_cast<int>(sizeof(float)) +
                         2 * (lane_id() % 4);
      const float weight = fetches[f].w;
#pragma unroll 1
      for (int query = 0; query < tile_size; query += 16) {
        Sum p[blocks][2], ds[blocks][2];
        clear(p);
        clear(ds);
        if constexpr (plan.keys_kept) multiply_rows<d>(p, keys, q_tile, query);
        else multiply_rows<d>(p, key_tile, my.warp_row, q_tile, query);
        multiply_rows<d>(ds, value_tile, my.warp_row, dout_tile, query);
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
        as_lefts(p_left, p, 0);
        as_lefts(ds_left, ds, 0);
        multiply_columns<d>(dv, p_left, dout_tile, query);
        multiply_columns<d>(dk, ds_left, q_tile, query);
      }
    }
    __syncthreads();  // the ring and the fetches are free
  }
  scale_sums(dk, scale);
  wait_for_copies<0>();
  if (item.part < 0) {
    __syncthreads();
    store_memory_gradient<d, blocks>(dkv, memory, dk, dv, s, b, item.chunk, h);
  } else {
    float4* to =
        reinterpret_cast<float4*>(work.parts + ((b * work.parts_at_most + item.part) * s.H + h) * (2 * tile_size * d)) +
        thread;
#pragma unroll
    for (int i = 0; i < blocks; i++)
#pragma unroll
      for (int j = 0; j < d / 8; j++) {
        to[(i * d / 8 + j) * threads] = make_float4(dk[i][j][0], dk[i][j][1], dk[i][j][2], dk[i][j][3]);
        to[((blocks + i) * d / 8 + j) * threads] = make_float4(dv[i][j][0], dv[i][j][1], dv[i][j][2], dv[i][j][3]);
      }
  }
}

// The gradient of a chunk whose list was cut: its parts, in order. Threads as in gca_backward_memory_mma_kernel.
template <int d>
__global__ void __launch_bounds__(gca_plan(d).threads()) gca_add_parts_mma_kernel(bf16* dkv,  // (B,M,S,2D)
                                                                                  MemoryWork work, GcaShape s) {
  constexpr GcaPlan plan = gca_plan(d);
  constexpr int blocks = plan.blocks(), threads = plan.threads(), tile_bytes = plan.tile_bytes();
  const auto [number, h, b] = WorkPiece(work.cut_chunks_at_most(), s.H);
  if (number >= work.counts[b].cut_chunks) return;
  const CutChunk chunk = work.cut_chunks[b * work.cut_chunks_at_most() + number];
  Sum sum[2][blocks][d / 8];
  clear(sum[0]);
  clear(sum[1]);
  for (int part = 0; part < chunk.parts; part++) {
    const float4* from =
        reinterpret_cast<const float4*>(work.parts + ((b * work.parts_at_most + chunk.first_part + part) * s.H + h) *
                                                         (2 * tile_size * d)) +
        threadIdx.x;
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int j = 0; j < d / 8; j++) {
          const float4 four = from[((which * blocks + i) * d / 8 + j) * threads];
          sum[which][i][j][0] += four.x;
          sum[which][i][j][1] += four.y;
          sum[which][i][j][2] += four.z;
          sum[which][i][j][3] += four.w;
        }
  }
  store_memory_gradient<d, blocks>(dkv, shared<bf16>(), sum[0], sum[1], s, b, chunk.chunk, h);
}

}  // namespace

void gca_forward_mma(cudaStream_t stream, bf16* out, float* lse, const bf16* q, const bf16* kv, const int32_t* pick,
                     const float* w, const GcaShape& s) {
  with_mma_head(s.d, [&](auto d) {
    constexpr GcaPlan plan = gca_plan(d);
    launch("grouped cross attention, forward", stream, gca_forward_mma_kernel<d>, s.B * s.H * s.chunks(),
           plan.threads(), forward_bytes(plan), out, lse, q, kv, pick, w, s);
  });
}
void gca_backward_query_mma(cudaStream_t stream, const GcaBackward<bf16, float>& a, const GcaShape& s) {
  with_mma_head(s.d, [&](auto d) {
    constexpr GcaPlan plan = gca_plan(d);
    launch("grouped cross attention, backward by query", stream, gca_backward_query_mma_kernel<d>,
           s.B * s.H * s.chunks(), plan.threads(), query_bytes(plan), a.dq, a.delta, a.dout, a.q, a.kv, a.lse, a.pick,
           a.w, s);
  });
}
void gca_backward_memory_mma(cudaStream_t stream, bf16* dkv, const FetchingLayer<bf16, float>* layers, int n_layers,
                             const bf16* kv, const GcaShape& s, char* room, int64_t room_bytes) {
  MemoryWork work{};
  work.shortest_cut = std::max(32, 4 * s.K * n_layers);  // four times the mean
  const int64_t part = int64_t{2} * tile_size * s.H * s.d;
  const int64_t of_a_part =
      part * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(MemoryItem) + sizeof(CutChunk));
  // 4: the counts, and rounding up; M / 2 parts suffice for the shortest cut
  const int64_t for_parts = room_bytes - s.B * (s.M + 4) * static_cast<int64_t>(sizeof(MemoryItem));
  work.parts_at_most = static_cast<int>(std::clamp<int64_t>(for_parts / (s.B * of_a_part), 0, s.M / 2));
  int64_t used = 0;
  auto take = [&]<class T>(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(room + used);
    used = round_up(used + count * static_cast<int64_t>(sizeof(T)), 16);
  };
  take(work.counts, s.B);
  take(work.items, s.B * work.items_at_most(s));
  take(work.cut_chunks, s.B * work.cut_chunks_at_most());
  take(work.parts, s.B * work.parts_at_most * part);
  GCA_CHECK(used <= room_bytes, "the plan of the memory's gradient needs ", used, " bytes, there are ", room_bytes,
            "; use a smaller --micro-batch or --chunks");
  launch("plan of the memory's gradient", stream, gca_plan_memory_mma_kernel, s.B, 256, 0, work, layers, n_layers, s);
  with_mma_head(s.d, [&](auto d) {
    constexpr GcaPlan plan = gca_plan(d);
    launch("grouped cross attention, backward for the memory", stream, gca_backward_memory_mma_kernel<d>,
           s.B * s.H * work.items_at_most(s), plan.threads(), memory_bytes(plan), dkv, work, layers, n_layers, kv, s);
    launch("sums of the memory's gradient", stream, gca_add_parts_mma_kernel<d>, s.B * s.H * work.cut_chunks_at_most(),
           plan.threads(), plan.tile_bytes(), dkv, work, s);
  });
}

}  // namespace gca
