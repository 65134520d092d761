// Causal chunk retrieval (drt.md): scores of every past chunk's landmark, noise, the K best, their weights; the
// gradient; and the pick table turned round. A block scores 64 queries against 64 landmarks at a time; a warp keeps a
// query's K best, one a lane. A score is summed in one order and candidates are ranked by a total order, so picks
// depend neither on how the work is shared out nor on how many chunks are asked for at once.
//
//                      landmarks m0 ..     m0 + 64 * splits ..
//   64 queries  warp 0 [ 8 rows x 64  ]    a lane takes landmarks lane and lane + 32 of each row; Best, one a row,
//   holds
//               ..     [   of 8 warps ]    the K best over all tiles, one a lane
//
// Shared memory of the selection: a (queries, then the scores) | b (landmarks), 17,408 bytes each, filled by all
// threads, 64 columns at a time; free at the barrier after their product.
#include <algorithm>

#include "gca_kernels.cuh"
#include "kernels/buckets.cuh"
#include "kernels/plain/tiles.cuh"

namespace gca {
namespace {

constexpr int warps_of_block = tile_threads / 32, rows_of_warp = tile_size / warps_of_block;

// What a candidate is ranked by: its value's bits, made to rise with it, then the lower chunk first. Above 0, which is
// no candidate.
__device__ inline uint64_t rank_of(float value, int64_t chunk) {
  if (!(value == value)) value = -INFINITY;
  const uint32_t bits = __float_as_uint(value);  // never -0: sums start from 0
  return static_cast<uint64_t>(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~static_cast<uint32_t>(chunk);
}
__device__ inline int32_t chunk_of(uint64_t rank) {
  return rank ? static_cast<int32_t>(~static_cast<uint32_t>(rank)) : -1;
}

// The best candidates of a query, the highest rank first, one a lane of a warp.
struct Best {
  uint64_t rank = 0;
  float score = 0;  // without noise
  // Each lane offers a candidate (rank 0: none); those among the K highest stay.
  __device__ void offer(uint64_t new_rank, float new_score, int K) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    constexpr uint32_t all = 0xffffffffu;
    uint32_t better = __ballot_sync(all, new_rank > __shfl_sync(all, rank, K - 1));
    while (better) {
      const int from = __ffs(better) - 1;
      const uint64_t entering = __shfl_sync(all, new_rank, from), above = __shfl_up_sync(all, rank, 1);
      const float score_entering = __shfl_sync(all, new_score, from), score_above = __shfl_up_sync(all, score, 1);
      const int place = __popc(__ballot_sync(all, rank > entering));
      if (lane == place) {
        rank = entering;
        score = score_entering;
      } else if (lane > place) {
        rank = above;
        score = score_above;
      }
      better &= better - 1;
      better &= __ballot_sync(all, new_rank > __shfl_sync(all, rank, K - 1));
    }
  }
};

// Lane k writes pick k and its weight: softmax over the raw scores of what was picked. No finite score: every weight is
// 0. A score that is not a number makes every weight so.
__device__ inline void write_row(int32_t* pick, float* w, int32_t chunk, float score, int K) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool picked = lane < K && chunk >= 0, broken = __any_sync(0xffffffffu, picked && !(score == score));
  const float top = warp_max(picked ? score : -INFINITY);
  const float e = !picked || (top == -INFINITY && !broken) ? 0 : expf(score - top), sum = warp_sum(e);
  if (lane < K) {
    pick[lane] = chunk;
    w[lane] = sum == 0 ? 0 : e / sum;
  }
}

// Each query's best of one split of the landmarks.
struct Shortlist {
  uint64_t* rank;  // (splits,B*C,K)
  float* score;    // (splits,B*C,K)
};
// Block: 64 queries of a row, and of the landmark tiles the split-th, the (split + splits)-th, .. With one split the
// row's picks are final; otherwise the best go to shortlist.
template <class Act>
__global__ void __launch_bounds__(tile_threads)
    chunk_retrieval_select_kernel(int32_t* pick,                      // (B,C+1,K)
                                  float* w,                           // (B,C+1,K)
                                  Shortlist shortlist, const Act* r,  // (B,C,D)
                                  const Act* landmark,                // see RetrievalShape
                                  RetrievalShape s, Selection selection, int splits) {
  Tile *tiles = shared<Tile>(), &a = tiles[0], &b = tiles[1];
  const int64_t query_tiles = ceil_div(s.C, tile_size), first = blockIdx.x % query_tiles * tile_size,
                row = blockIdx.x / query_tiles % s.B;
  const int split = static_cast<int>(blockIdx.x / query_tiles / s.B),
            queries = static_cast<int>(min(int64_t{tile_size}, s.C - first));
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const float root = sqrtf(static_cast<float>(s.D));
  // Landmarks that the last query may see.
  const int64_t most = selection.picking == Picking::none ? 0 : candidates(s.first_chunk + first + queries - 1);
  Best best[rows_of_warp];
  for (int64_t m0 = int64_t{split} * tile_size; m0 < most; m0 += int64_t{splits} * tile_size) {
    const int landmarks = static_cast<int>(min(int64_t{tile_size}, most - m0));
    Fragment score, slab;
    clear(score);
    for (int t = 0; t < tiles_of(s.D); t++) {  // sums of 64 products each, added in order
      load_tile(a, r + (row * s.C + first) * s.D + t * tile_size, s.D, queries, columns_of(s.D, t));
      load_tile(b, landmark + row * s.row_stride + m0 * s.stride + t * tile_size, s.stride, landmarks,
                columns_of(s.D, t));
      __syncthreads();
      clear(slab);
      multiply_nt(slab, a, b, columns_of(s.D, t));
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) score[i][j] += slab[i][j];
      __syncthreads();
    }
    store_tile(a, score);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < rows_of_warp; i++) {
      const int query = warp * rows_of_warp + i;
      const int64_t c = first + query, chunk = s.first_chunk + c, past = query < queries ? candidates(chunk) : 0;
      for (int half = 0; half < tile_size; half += 32) {
        const int64_t m = m0 + half + lane;
        const float raw = a[query][half + lane] / root;
        float value = raw;
        if (selection.picking == Picking::uniform || (selection.noise && !selection.given_noise)) {
          const uint32_t word = selection_draw(selection, row, chunk, m / 4).word[m % 4];
          value = selection.picking == Picking::uniform ? static_cast<float>(word) : raw + gumbel(word);
        } else if (selection.noise && m < past) {
          value = raw + selection.given_noise[(row * s.C + c) * s.C + m];
        }
        best[i].offer(m < past ? rank_of(value, m) : 0, raw, s.K);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < rows_of_warp; i++) {
    const int query = warp * rows_of_warp + i;
    if (query >= queries) continue;
    const int64_t c = first + query, out = s.table().picked_by(row, c),
                  candidate = ((split * s.B + row) * s.C + c) * s.K + lane;
    if (splits == 1) write_row(pick + out, w + out, chunk_of(best[i].rank), best[i].score, s.K);
    else if (lane < s.K) {
      shortlist.rank[candidate] = best[i].rank;
      shortlist.score[candidate] = best[i].score;
    }
  }
}

// A warp a query: the best of all splits'.
__global__ void chunk_retrieval_merge_kernel(int32_t* pick,  // (B,C+1,K)
                                             float* w,       // (B,C+1,K)
                                             Shortlist shortlist, RetrievalShape s, int splits) {
  const int64_t query = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32, out = (query + query / s.C + 1) * s.K;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (query >= s.B * s.C) return;
  Best best;
  for (int split = 0; split < splits; split++) {
    const int64_t candidate = (split * s.B * s.C + query) * s.K + lane;
    best.offer(lane < s.K ? shortlist.rank[candidate] : 0, lane < s.K ? shortlist.score[candidate] : 0, s.K);
  }
  write_row(pick + out, w + out, chunk_of(best.rank), best.score, s.K);
}

// A warp a query: weights for the picks that stand in the table.
template <class Act>
__global__ void chunk_retrieval_given_kernel(int32_t* pick,        // (B,C+1,K)
                                             float* w,             // (B,C+1,K)
                                             const Act* r,         // (B,C,D)
                                             const Act* landmark,  // see RetrievalShape
                                             RetrievalShape s) {
  const int64_t query = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32, b = query / s.C,
                out = (query + b + 1) * s.K;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (query >= s.B * s.C) return;
  int32_t mine = -1;
  float mine_score = 0;
  for (int k = 0; k < s.K; k++) {
    int32_t chunk = pick[out + k];
    if (chunk < 0) continue;
    const bool past = chunk < candidates(s.first_chunk + query % s.C);
    if (!past) chunk = 0;
    float sum = 0;
    for (int64_t j = lane; j < s.D; j += 32)
      sum = fmaf(to_float(r[query * s.D + j]), to_float(landmark[b * s.row_stride + chunk * s.stride + j]), sum);
    sum = warp_sum(sum) / sqrtf(static_cast<float>(s.D));
    if (lane == k) {
      mine = chunk;
      mine_score = past ? sum : NAN;
    }
  }
  write_row(pick + out, w + out, mine, mine_score, s.K);
}

// A block a query: dscore_k = w_k (dw_k - sum w dw) / sqrt(D), in place of dw, and dr = sum_k dscore_k L_pick.
template <class Act>
__global__ void chunk_retrieval_backward_query_kernel(Act* dr,              // (B,C,D)
                                                      float* dw,            // (B,C+1,K)
                                                      const float* w,       // (B,C+1,K)
                                                      const int32_t* pick,  // (B,C+1,K)
                                                      const Act* landmark,  // see RetrievalShape
                                                      RetrievalShape s) {
  __shared__ float dscore[max_topk];
  const int64_t query = blockIdx.x, b = query / s.C, at = (query + b + 1) * s.K;
  if (threadIdx.x < 32) {
    const int k = static_cast<int>(threadIdx.x);
    const float weight = k < s.K ? w[at + k] : 0, gradient = k < s.K ? dw[at + k] : 0,
                mean = warp_sum(weight * gradient);
    if (k < s.K) dw[at + k] = dscore[k] = weight * (gradient - mean) / sqrtf(static_cast<float>(s.D));
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < s.D; j += blockDim.x) {
    float sum = 0;
    for (int k = 0; k < s.K; k++)
      if (pick[at + k] >= 0)
        sum = fmaf(dscore[k], to_float(landmark[b * s.row_stride + pick[at + k] * s.stride + j]), sum);
    dr[query * s.D + j] = from_float<Act>(sum);
  }
}
// A block a landmark: dL_m += sum over the (c,k) that fetched m of dscore r_c
template <class Act>
__global__ void chunk_retrieval_backward_landmark_kernel(Act* dlandmark,          // see RetrievalShape
                                                         const float* dscore,     // (B,C+1,K)
                                                         const int32_t* start,    // (B,C+1)
                                                         const int32_t* fetches,  // (B,C*K)
                                                         const Act* r,            // (B,C,D)
                                                         RetrievalShape s) {
  const int64_t m = blockIdx.x % s.C, b = blockIdx.x / s.C;
  const int32_t *list = fetches + b * s.C * s.K, begin = start[b * (s.C + 1) + m], end = start[b * (s.C + 1) + m + 1];
  for (int64_t j = threadIdx.x; j < s.D; j += blockDim.x) {
    Act* to = dlandmark + b * s.row_stride + m * s.stride + j;
    float sum = to_float(*to);
    for (int32_t e = begin; e < end; e++)  // list[e] = table row * K + k; row c+1 was picked by chunk c
      sum = fmaf(dscore[s.table().serving(b, 0) + list[e]], to_float(r[(b * s.C + list[e] / s.K - 1) * s.D + j]), sum);
    *to = from_float<Act>(sum);
  }
}

}  // namespace

void GpuDevice::no_pick(int32_t* pick, float* w, int64_t B, int64_t C, int K) {
  const size_t row_bytes = static_cast<size_t>(K) * 4, apart_bytes = static_cast<size_t>(C + 1) * row_bytes;
  if (B == 0) return;
  // Bytes of 0xff are picks of -1.
  check(cudaMemset2DAsync(pick, apart_bytes, 0xff, row_bytes, static_cast<size_t>(B), stream_),
        "clearing the first picks");
  check(cudaMemset2DAsync(w, apart_bytes, 0, row_bytes, static_cast<size_t>(B), stream_),
        "clearing the first picks' weights");
}

void GpuDevice::invert_picks(int32_t* start, int32_t* fetches, const int32_t* pick, int64_t B, int64_t C, int K) {
  launch("turning the pick table round", stream_, fill_buckets_kernel, B * (C + 1), bucket_threads, 0, start, fetches,
         BucketKeys{pick, nullptr, 0, ~0u, C * K}, C + 1, (C + 1) * K);
}

template <class Act>
void Gpu<Act>::chunk_retrieval_forward(int32_t* pick, float* w, const Act* r, const Act* landmark,
                                       const RetrievalShape& s, const Selection& selection) {
  GCA_CHECK(s.K >= 1 && s.K <= max_topk, "1 to ", max_topk, " chunks are picked, found ", s.K);
  const int64_t queries = s.B * s.C, query_blocks = s.B * ceil_div(s.C, tile_size);
  if (queries == 0) return;
  if (selection.picking == Picking::given) {
    launch("weights of given picks", stream_, chunk_retrieval_given_kernel<Act>, ceil_div(queries, 8), 256, 0, pick, w,
           r, landmark, s);
    return;
  }
  // Landmarks are split until the GPU is full, as far as the candidates find room in the working memory.
  const int64_t per_split = queries * s.K,
                room = scratch_bytes / (per_split * static_cast<int64_t>(sizeof(uint64_t) + sizeof(float)));
  const int64_t splits = std::max<int64_t>(
      1, std::min({ceil_div(2 * processors_, query_blocks), ceil_div(s.first_chunk + s.C, tile_size), room}));
  Shortlist shortlist{};
  if (splits > 1) {
    shortlist.rank = scratch<uint64_t>(splits * per_split);
    shortlist.score = scratch<float>(splits * per_split, splits * per_split * static_cast<int64_t>(sizeof(uint64_t)));
  }
  launch("chunk retrieval", stream_, chunk_retrieval_select_kernel<Act>, query_blocks * splits, tile_threads,
         2 * tile_bytes, pick, w, shortlist, r, landmark, s, selection, static_cast<int>(splits));
  if (splits > 1)
    launch("chunk retrieval, joining", stream_, chunk_retrieval_merge_kernel, ceil_div(queries, 8), 256, 0, pick, w,
           shortlist, s, static_cast<int>(splits));
}

template <class Act>
void Gpu<Act>::chunk_retrieval_backward(const RetrievalBackward<Act, float>& a, const RetrievalShape& s) {
  launch("chunk retrieval, backward by query", stream_, chunk_retrieval_backward_query_kernel<Act>, s.B * s.C, 256, 0,
         a.dr, a.dw, a.w, a.pick, a.landmark, s);
  launch("chunk retrieval, backward for landmarks", stream_, chunk_retrieval_backward_landmark_kernel<Act>, s.B * s.C,
         256, 0, a.dlandmark, a.dw, a.start, a.fetches, a.r, s);
}

GCA_BOTH_TYPES(chunk_retrieval_forward);
GCA_BOTH_TYPES(chunk_retrieval_backward);

}  // namespace gca
