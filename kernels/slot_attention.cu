// One slot of each row, as decoding reads it: sliding-window attention and grouped cross attention of a single query a
// head, whose place in the row stands in the device's memory. Bound by reading keys and values once, and, of one row,
// by how long the first of them takes to come: so all that a block reads is asked for at once, and a head's keys are
// shared among the blocks of a cluster.
//
//   attention of a head: places of the ring          grouped cross attention: picks
//   | 64 | 64 | 64 | .. | 64 |  + the slot itself    | pick 0 | pick 1 | .. | pick K-1 |
//     block 0  1   2  ..   7     0                     block 0   1   ..  7    then 0 again ..
//
//   64 keys of a block (heads of 64 in bf16)         a group of lanes: one key, 16 bytes of its head a lane
//   | group 0 | group 1 | .. | group 15 | again ..   four keys a group: eight loads of a lane under way
//
// Groups are joined by shuffles, and each warp leaves its sums in the shared memory of the cluster's first block, which
// adds them in the order of blocks and warps: a row has the same bits on every run, alone and among others. Against the
// other way, partial sums in the device's memory that the last block to arrive adds up: no counters to keep, and one
// barrier instead of a fence, an atomic and a read through the second cache, about a microsecond in all. Clusters came
// with compute capability 9.0; before it one block walks over all keys of a head.
//
// The ring: slot i is kept at place i mod W, where slot i - W is, which slot i still sees. The lanes that read that
// place are the ones that write it, afterwards: no other lane of any block uses what is there.
//
// Shared memory, static, in the first block of a cluster, heads of 64 in bf16 (a row for each of 8 blocks x 4 warps):
//        0  o     32 x 64 floats    row 4 split + warp: by that warp of any block of the cluster, through its barrier
//    8,192  top   32 floats         likewise, by lane 0
//    8,320  sum   32 floats         likewise
//    8,448  end                     read after the cluster's barrier, by the first block alone
// Grouped cross attention has 64 bytes more: top and sum of a pick by each warp, twice, so that one barrier does.
#include <cooperative_groups.h>

#include <algorithm>
#include <bit>

#include "gca_kernels.cuh"
#include "kernels/attention.cuh"

namespace gca {
namespace {

constexpr int threads = 128, warps = threads / 32, most_splits = 8, most_parts = most_splits * warps;
static_assert(most_parts == 32, "a lane for each part");

// How a head's columns lie in the lanes of a group: N neighbours a lane, `packs` times, lanes * N apart.
template <class Type, int N_, int lanes_, int packs_, int keys_ = 4>
struct Cut {
  using Act = Type;
  static constexpr int N = N_, lanes = lanes_, packs = packs_, columns = N * lanes * packs, groups = threads / lanes,
                       keys = keys_, keys_of_block = groups * keys;
};
// body(cut) for heads of d columns
template <class Act, class Body>
void with_cut(int d, Body&& body) {
  if (d % wide<Act>) return body(Cut<Act, 2, 32, 4, 2>{});
  if constexpr (std::is_same_v<Act, bf16>) {
    if (d <= 32) return body(Cut<Act, 8, 4, 1>{});
    if (d <= 64) return body(Cut<Act, 8, 8, 1>{});
    if (d <= 128) return body(Cut<Act, 8, 16, 1>{});
    body(Cut<Act, 8, 32, 1>{});
  } else {
    if (d <= 64) return body(Cut<Act, 4, 16, 1>{});
    body(Cut<Act, 4, 32, 2>{});
  }
}

// A lane's columns of one head's q, k or v, as they lie in memory.
template <class Cut>
struct Columns {
  using Act = typename Cut::Act;
  static constexpr int words_of_pack = Cut::N * static_cast<int>(sizeof(Act)) / 4, words = Cut::packs * words_of_pack;
  using Words = Pack<uint32_t, words_of_pack>;
  uint32_t word[words];

  __device__ static int column(int p) { return (p * Cut::lanes + static_cast<int>(threadIdx.x) % Cut::lanes) * Cut::N; }
  __device__ float operator[](int i) const {
    if constexpr (sizeof(Act) == 4) return __uint_as_float(word[i]);
    else return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
  }
  // Loads stand under no condition, so that all are on their way at once: what lies past the head is its first columns
  // once more, which meet zeros of q and go nowhere.
  __device__ void load(const Act* head,  // (d)
                       int d) {
#pragma unroll
    for (int p = 0; p < Cut::packs; p++) {
      const Words from = *reinterpret_cast<const Words*>(head + (column(p) < d ? column(p) : 0));
#pragma unroll
      for (int i = 0; i < words_of_pack; i++) word[p * words_of_pack + i] = from.at[i];
    }
  }
  __device__ void store(Act* head,  // (d)
                        int d) const {
#pragma unroll
    for (int p = 0; p < Cut::packs; p++) {
      Words to;
#pragma unroll
      for (int i = 0; i < words_of_pack; i++) to.at[i] = word[p * words_of_pack + i];
      if (column(p) < d) *reinterpret_cast<Words*>(head + column(p)) = to;
    }
  }
  __device__ static void prefetch(const Act* head,  // (d)
                                  int d) {
#pragma unroll
    for (int p = 0; p < Cut::packs; p++)
      if (column(p) < d) asm volatile("prefetch.global.L2 [%0];" ::"l"(head + column(p)));
  }
  __device__ void clear_past(int d) {
#pragma unroll
    for (int i = 0; i < words; i++)
      if (column(i / words_of_pack) >= d) word[i] = 0;
  }
  __device__ void clear_unless(bool kept) {
#pragma unroll
    for (uint32_t& x : word) x = kept ? x : 0;
  }
};

// sum of e^(score - top) v and of e^(score - top), over some keys: of a group of lanes, then of a warp.
template <class Cut>
struct Part {
  static constexpr int size = Cut::N * Cut::packs;
  float top = -INFINITY, sum = 0, o[size] = {};

  // What top - .. is taken of: a number, also where no key has been seen.
  __device__ float base() const { return top == -INFINITY ? 0 : top; }
  __device__ void rescale(float new_top) {
    const float old_top = top;
    top = new_top;
    const float shrink = expf(old_top - base());
    sum *= shrink;
#pragma unroll
    for (float& x : o) x *= shrink;
  }
  // bias: added to a logit; seen: whether the key takes part. What k and v hold where not is nothing, and v is cleared.
  template <int n>
  __device__ void add(const Columns<Cut>& q, const Columns<Cut> (&k)[n], Columns<Cut> (&v)[n], const float (&bias)[n],
                      const bool (&seen)[n], float scale) {
    float score[n], new_top = top;
#pragma unroll
    for (int i = 0; i < n; i++) {
      score[i] = 0;
#pragma unroll
      for (int e = 0; e < size; e++) score[i] = fmaf(q[e], k[i][e], score[i]);
      score[i] = scale * warp_sum<Cut::lanes>(score[i]) + bias[i];
      if (!seen[i]) score[i] = -INFINITY;
      new_top = fmaxf(new_top, score[i]);
    }
    rescale(new_top);
#pragma unroll
    for (int i = 0; i < n; i++) {
      const float p = expf(score[i] - base());
      sum += p;
      v[i].clear_unless(seen[i]);
#pragma unroll
      for (int e = 0; e < size; e++) o[e] = fmaf(p, v[i][e], o[e]);
    }
  }
  // Over the groups of the warp; all get the result.
  __device__ void join() {
    float new_top = top;
    for (int step = Cut::lanes; step < 32; step *= 2) new_top = fmaxf(new_top, __shfl_xor_sync(~0u, new_top, step));
    rescale(new_top);
    for (int step = Cut::lanes; step < 32; step *= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
#pragma unroll
      for (float& x : o) x += __shfl_xor_sync(~0u, x, step);
    }
  }
};

// What the warps of a cluster leave in the shared memory of its first block.
template <class Cut>
struct alignas(16) Parts {
  float o[most_parts][Cut::columns];
  float top[most_parts], sum[most_parts];
};

using PartsOf64 = Parts<Cut<bf16, 8, 8, 1>>;
static_assert(offsetof(PartsOf64, top) == 8192 && offsetof(PartsOf64, sum) == 8320, "the map above");
static_assert(sizeof(PartsOf64) == 8448, "the map above");

// The blocks that share a head's keys: a cluster, or one alone.
struct Team {
  int splits, split;
  int64_t b;
  int h;
  __device__ Team(int H, int splits_) : splits(splits_) {
    split = static_cast<int>(blockIdx.x % static_cast<unsigned>(splits));
    const unsigned head = blockIdx.x / static_cast<unsigned>(splits);
    h = static_cast<int>(head % static_cast<unsigned>(H));
    b = head / static_cast<unsigned>(H);
#if __CUDA_ARCH__ >= 900
    if (splits > 1) cooperative_groups::this_cluster().barrier_arrive();  // for first_block(): this one has begun
#endif
  }
  // Of an object in this block's shared memory: the first block's.
  template <class T>
  __device__ T& first_block(T& mine) const {
#if __CUDA_ARCH__ >= 900
    if (splits > 1) {
      cooperative_groups::this_cluster().barrier_wait();
      return *cooperative_groups::this_cluster().map_shared_rank(&mine, 0);
    }
#endif
    return mine;
  }
  __device__ void barrier() const {
#if __CUDA_ARCH__ >= 900
    if (splits > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
};

// out = the sum of the parts, each times `factor` of the lane of its number; by the first block.
template <class Cut>
__device__ void add_parts(typename Cut::Act* out,  // (d)
                          const Parts<Cut>& parts, float factor, int splits, int d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / 32 * 32; first < d; first += threads) {
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < splits * warps; part += warps)
#pragma unroll
      for (int i = part; i < part + warps; i++) sum = fmaf(parts.o[i][first + lane], __shfl_sync(~0u, factor, i), sum);
    if (first + lane < d) out[first + lane] = from_float<typename Cut::Act>(sum);
  }
}
template <class Cut>
__device__ void leave_part(const Team& team, Parts<Cut>& mine, const Part<Cut>& part) {
  Parts<Cut>& parts = team.first_block(mine);
  const int warp = static_cast<int>(threadIdx.x) / 32, at = team.split * warps + warp;
  constexpr int width = Cut::N < 4 ? Cut::N : 4;
  if (threadIdx.x % 32 < Cut::lanes) {
#pragma unroll
    for (int e = 0; e < Part<Cut>::size; e += width) {
      Pack<float, width> some;
#pragma unroll
      for (int i = 0; i < width; i++) some.at[i] = part.o[e + i];
      store_pack(parts.o[at] + Columns<Cut>::column(e / Cut::N) + e % Cut::N, some);
    }
  }
  if (threadIdx.x % 32 == 0) {
    parts.top[at] = part.top;
    parts.sum[at] = part.sum;
  }
  team.barrier();
}

__device__ inline int modulo(int64_t x, int64_t by) {
  return static_cast<int>(x >> 32 ? x % by : static_cast<uint32_t>(x) % static_cast<uint32_t>(by));
}

// o = softmax(q k^T / sqrt(d) - slope (i - j)) v over slots 0 <= i - j <= W; then the slot's k | v into the ring
template <class Cut>
__global__ void __launch_bounds__(threads)
    slot_attention_forward_kernel(typename Cut::Act* out,                         // (B,D)
                                  const typename Cut::Act* qkv,                   // (B,3D)
                                  const SlotRow<typename Cut::Act, float>* rows,  // (B)
                                  int64_t layer, SlotShape s, int splits) {
  using Act = typename Cut::Act;
  __shared__ Parts<Cut> parts;
  const Team team(s.H, splits);
  const int group = static_cast<int>(threadIdx.x) / Cut::lanes, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t D = static_cast<int64_t>(s.H) * s.d;
  const SlotRow<Act, float>& row = rows[team.b];
  Act* ring = row.ring + layer * row.ring_stride + team.h * s.d;
  const Act* own = qkv + team.b * 3 * D + team.h * s.d;
  __builtin_assume(__isGlobal(ring));
  const int64_t begin = team.split * int64_t{Cut::keys_of_block}, step = splits * int64_t{Cut::keys_of_block};
  // The ring on its way to the second cache, which is where kernels agree on what it holds: no load before the wait.
#pragma unroll
  for (int i = 0; i < Cut::keys; i++) {
    const int64_t place = begin + i * Cut::groups + group;
    if (place < s.W) {
      Columns<Cut>::prefetch(ring + place * 2 * D, s.d);
      Columns<Cut>::prefetch(ring + place * 2 * D + D, s.d);
    }
  }
  let_next_begin();
  const float scale = attention_scale(s.d), slope = static_cast<float>(alibi_slope(team.h, s.H));
  wait_for_earlier();
  const int64_t slot = slot_of(row);
  Columns<Cut> q, own_k[1], own_v[1];
  q.load(own, s.d);
  q.clear_past(s.d);
  own_k[0].load(own + D, s.d);
  own_v[0].load(own + 2 * D, s.d);
  Part<Cut> part;
  int here = 0;  // the slot's place in the ring
  for (int64_t first = begin; first < s.W; first += step) {
    Columns<Cut> k[Cut::keys], v[Cut::keys];
    float bias[Cut::keys];
    bool seen[Cut::keys];
#pragma unroll
    for (int i = 0; i < Cut::keys; i++) {
      const int64_t place = min(first + i * Cut::groups + group, s.W - 1);
      k[i].load(ring + place * 2 * D, s.d);
      v[i].load(ring + place * 2 * D + D, s.d);
    }
    if (first == begin) here = modulo(slot, s.W);  // no load waits for the slot's number
#pragma unroll
    for (int i = 0; i < Cut::keys; i++) {
      const int64_t place = first + i * Cut::groups + group, distance = here - place + (here > place ? 0 : s.W);
      seen[i] = place < s.W && distance <= slot;
      bias[i] = -slope * static_cast<float>(distance);
      if (place == here) {
        own_k[0].store(ring + place * 2 * D, s.d);
        own_v[0].store(ring + place * 2 * D + D, s.d);
      }
    }
    part.add(q, k, v, bias, seen, scale);
  }
  part.add(q, own_k, own_v, {0.0f}, {team.split == 0 && group == 0}, scale);
  part.join();
  leave_part(team, parts, part);
  if (team.split > 0) return;
  const bool there = lane < splits * warps;
  const float part_top = there ? parts.top[lane] : -INFINITY, factor = expf(part_top - warp_max(part_top)),
              sum = warp_sum(there ? factor * parts.sum[lane] : 0);
  add_parts<Cut>(out + team.b * D + team.h * s.d, parts, factor / sum, splits, s.d);
}

// o = sum_k w_k softmax(q K_k^T / sqrt(d)) V_k
template <class Cut>
__global__ void __launch_bounds__(threads)
    slot_gca_forward_kernel(typename Cut::Act* out,                         // (B,D)
                            const typename Cut::Act* query,                 // (B,D)
                            const SlotRow<typename Cut::Act, float>* rows,  // (B)
                            int64_t group_of_layers, SlotShape s, int splits) {
  using Act = typename Cut::Act;
  __shared__ Parts<Cut> parts;
  __shared__ float2 of_warp[2][warps];  // top, sum: of a pick; a buffer is written again one barrier after it was read
  static_assert(sizeof of_warp == 64, "the map above");
  const Team team(s.H, splits);
  const int group = static_cast<int>(threadIdx.x) / Cut::lanes, lane = static_cast<int>(threadIdx.x) % 32,
            warp = static_cast<int>(threadIdx.x) / 32, keys = s.null_slot ? s.S : s.S - 1;
  const int64_t D = static_cast<int64_t>(s.H) * s.d;
  const SlotRow<Act, float>& row = rows[team.b];
  const int32_t* pick = row.pick + group_of_layers * row.pick_stride;
  const float* w = row.w + group_of_layers * row.w_stride;
  const Act* kv = row.kv + team.h * s.d;
  const float scale = attention_scale(s.d);
  __builtin_assume(__isGlobal(kv));
  __builtin_assume(__isGlobal(pick));
  __builtin_assume(__isGlobal(w));
  let_next_begin();
  wait_for_earlier();
  Columns<Cut> q;
  q.load(query + team.b * D + team.h * s.d, s.d);
  q.clear_past(s.d);
  Part<Cut> sum;  // of the picks so far, weighted
  int buffer = 0;
  for (int i = team.split; i < s.K; i += splits) {
    const int64_t chunk = pick[i];
    const float weight = w[i];
    if (chunk < 0) continue;
    const Act* key = kv + chunk * s.S * 2 * D;
    Part<Cut> part;
    for (int first = 0; first < keys; first += Cut::keys_of_block) {
      Columns<Cut> k[Cut::keys], v[Cut::keys];
      float bias[Cut::keys] = {};
      bool seen[Cut::keys];
#pragma unroll
      for (int j = 0; j < Cut::keys; j++) {
        const int at = first + j * Cut::groups + group;
        seen[j] = at < keys;
        k[j].load(key + min(at, keys - 1) * 2 * D, s.d);
        v[j].load(key + min(at, keys - 1) * 2 * D + D, s.d);
      }
      part.add(q, k, v, bias, seen, scale);
    }
    part.join();
    if (lane == 0) of_warp[buffer][warp] = {part.top, part.sum};
    __syncthreads();
    float top = -INFINITY, all = 0;
#pragma unroll
    for (int j = 0; j < warps; j++) top = fmaxf(top, of_warp[buffer][j].x);
#pragma unroll
    for (int j = 0; j < warps; j++) all = fmaf(expf(of_warp[buffer][j].x - top), of_warp[buffer][j].y, all);
    const float factor = weight * expf(part.top - top) / all;
#pragma unroll
    for (int e = 0; e < Part<Cut>::size; e++) sum.o[e] = fmaf(factor, part.o[e], sum.o[e]);
    buffer ^= 1;
  }
  leave_part(team, parts, sum);
  if (team.split == 0) add_parts<Cut>(out + team.b * D + team.h * s.d, parts, 1, splits, s.d);
}

template <class Act>
__global__ void keep_slot_kernel(const Act* x,                     // (B,D)
                                 const SlotRow<Act, float>* rows,  // (B)
                                 int64_t B, int64_t D, int S) {
  let_next_begin();
  wait_for_earlier();
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < B * D) rows[i / D].unfinished_chunk[modulo(slot_of(rows[i / D]), S) * D + i % D] = x[i];
}

template <class Act>
__global__ void next_slot_kernel(SlotRow<Act, float>* rows,  // (B)
                                 int64_t B) {
  let_next_begin();
  wait_for_earlier();
  const int64_t b = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (b < B) rows[b].slot = slot_of(rows[b]) + 1;
}

// Blocks of a head, for so many pieces of its keys: a power of two, as many as every card of that kind lets be a
// cluster. Of the shape alone, as the order of the sums.
int splits_of(int64_t pieces) {
  if (!compiled_for_hopper()) return 1;
  return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(pieces, 1, most_splits))));
}

}  // namespace

template <class Act>
void Gpu<Act>::slot_attention_forward(Act* out, const Act* qkv, const SlotRow<Act, float>* rows, int64_t layer,
                                      const SlotShape& s) {
  check_head(s.d);
  GCA_CHECK(s.W >= 0 && s.W <= INT32_MAX, "a window of ", s.W, " slots");
  with_cut<Act>(s.d, [&](auto cut) {
    const int splits = splits_of(ceil_div(s.W, cut.keys_of_block));
    launch_as({.early = true, .cluster = splits}, "attention of one slot", stream_,
              slot_attention_forward_kernel<decltype(cut)>, s.B * s.H * splits, threads, 0, out, qkv, rows, layer, s,
              splits);
  });
}

template <class Act>
void Gpu<Act>::slot_gca_forward(Act* out, const Act* q, const SlotRow<Act, float>* rows, int64_t group,
                                const SlotShape& s) {
  check_head(s.d);
  GCA_CHECK(s.S >= 2 && s.S <= 128 && s.K >= 1 && s.K <= max_topk, s.K, " chunks of ", s.S, " slots");
  with_cut<Act>(s.d, [&](auto cut) {
    const int splits = splits_of(s.K);
    launch_as({.early = true, .cluster = splits}, "grouped cross attention of one slot", stream_,
              slot_gca_forward_kernel<decltype(cut)>, s.B * s.H * splits, threads, 0, out, q, rows, group, s, splits);
  });
}

template <class Act>
void Gpu<Act>::keep_slot(const Act* x, const SlotRow<Act, float>* rows, const SlotShape& s) {
  const int64_t D = static_cast<int64_t>(s.H) * s.d;
  launch_early("keeping a slot", stream_, keep_slot_kernel<Act>, ceil_div(s.B * D, 256), 256, x, rows, s.B, D, s.S);
}

template <class Act>
void Gpu<Act>::next_slot(SlotRow<Act, float>* rows, int64_t B) {
  launch_early("the next slot", stream_, next_slot_kernel<Act>, ceil_div(B, 32), 32, rows, B);
}

GCA_BOTH_TYPES(slot_attention_forward);
GCA_BOTH_TYPES(slot_gca_forward);
GCA_BOTH_TYPES(keep_slot);
GCA_BOTH_TYPES(next_slot);

}  // namespace gca
