// Causal chunk retrieval (drt.md): scores of every past chunk's landmark, noise, the K best, their weights; the
// gradient; and the pick table turned round. A score is summed in one order and candidates are ranked by a total order,
// so picks depend neither on how the work is shared out nor on how many chunks are asked for at once. How the best are
// found stands in plain/chunk_retrieval.cu, for any type and shape, and how fast in mma/chunk_retrieval.cu, on tensor
// cores; here are the checks, the choice and what serves both.
//
//   merge, a block a query: its shortlist, splits x K       | 32 | 32 | .. | 32 | 32 | ..
//     a warp looks at every 8th stretch of 32; lane k keeps   w0   w1   ..   w7   w0
//     its k-th best (Best). Then warp 0 looks at what the others kept, and writes picks and weights.
//   Shared memory, static:
//        0  found        8 x 32 ranks of 8 bytes   by each warp at its end
//    2,048  found_score  8 x 32 floats             likewise
//    3,072  end                                    read once, by warp 0, after the barrier
//   backward by query, a block a query: dscore, 32 floats, 128 bytes: by warp 0, read by all after the barrier
//   backward for landmarks, a block a landmark: none; a thread takes columns and walks fetches[start[m] .. start[m+1])
#include "kernels/chunk_retrieval.cuh"

#include "gca_kernels.cuh"
#include "kernels/buckets.cuh"

namespace gca {
namespace {

// A block a query: the best of all splits'. Each warp looks through a part of the shortlist, the first through what
// they found.
constexpr int merge_warps = 8;
__global__ void __launch_bounds__(32 * merge_warps) chunk_retrieval_merge_kernel(Selected to, RetrievalShape s) {
  __shared__ uint64_t found[merge_warps][32];
  __shared__ float found_score[merge_warps][32];
  static_assert(sizeof found == 2048 && sizeof found + sizeof found_score == 3072, "the map above");
  const int64_t query = blockIdx.x, out = s.table().picked_by(query / s.C, query % s.C);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32,
            listed = to.splits * s.K;
  const uint64_t* ranks = to.shortlist.rank + query * listed;
  const float* scores = to.shortlist.score + query * listed;
  auto rank_at = [&](int i) { return i < listed ? ranks[i] : 0; };
  auto score_at = [&](int i) { return i < listed ? scores[i] : 0.0f; };
  Best best;
  int i = static_cast<int>(threadIdx.x);
  uint64_t rank = rank_at(i);
  float score = score_at(i);
  for (; i - lane < listed; i += 32 * merge_warps) {
    const uint64_t next_rank = rank_at(i + 32 * merge_warps);  // on its way while this one is looked at
    const float next_score = score_at(i + 32 * merge_warps);
    best.offer(rank, score, s.K);
    rank = next_rank;
    score = next_score;
  }
  found[warp][lane] = lane < s.K ? best.rank : 0;
  found_score[warp][lane] = best.score;
  __syncthreads();
  if (warp > 0) return;
  for (int other = 1; other < merge_warps; other++) best.offer(found[other][lane], found_score[other][lane], s.K);
  write_row(to.pick + out, to.w + out, chunk_of(best.rank), best.score, s.K, to.equal_weights);
}

// A warp a query: weights for the picks that stand in the table, or for the newest.
template <class Act>
__global__ void chunk_retrieval_given_kernel(int32_t* pick,        // (B,C+1,K)
                                             float* w,             // (B,C+1,K)
                                             const Act* r,         // (B,C,D)
                                             const Act* landmark,  // see RetrievalShape
                                             RetrievalShape s, Selection selection) {
  const int64_t query = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32, b = query / s.C,
                out = (query + b + 1) * s.K;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (query >= s.B * s.C) return;
  int32_t mine = -1;
  float mine_score = 0;
  for (int k = 0; k < s.K; k++) {
    const int64_t fetching = s.first_chunk + query % s.C;
    int32_t chunk = selection.picking == Picking::newest ? newest_pick(selection, fetching, k) : pick[out + k];
    if (chunk < 0) continue;
    const bool past = chunk < candidates(fetching);
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
  write_row(pick + out, w + out, mine, mine_score, s.K, selection.equal_weights);
}

// A block a query: dscore_k = scale w_k (dw_k - sum w dw) / sqrt(D), in place of dw, and dr = sum_k dscore_k L_pick.
template <class Act>
__global__ void chunk_retrieval_backward_query_kernel(Act* dr,              // (B,C,D)
                                                      float* dw,            // (B,C+1,K)
                                                      const float* w,       // (B,C+1,K)
                                                      const int32_t* pick,  // (B,C+1,K)
                                                      const Act* landmark,  // see RetrievalShape
                                                      float scale, RetrievalShape s) {
  __shared__ float dscore[max_topk];
  static_assert(sizeof dscore == 128, "the map above");
  const int64_t query = blockIdx.x, b = query / s.C, at = (query + b + 1) * s.K;
  if (threadIdx.x < 32) {
    const int k = static_cast<int>(threadIdx.x);
    const float weight = k < s.K ? w[at + k] : 0, gradient = k < s.K ? dw[at + k] : 0,
                mean = warp_sum(weight * gradient);
    if (k < s.K) dw[at + k] = dscore[k] = scale * (weight * (gradient - mean) / sqrtf(static_cast<float>(s.D)));
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

// Whether a call in bf16 takes tensor cores: rows in whole pieces of 16 bytes, 128 of them in 32 bits of columns.
bool takes_mma(const bf16* r, const bf16* landmark, const RetrievalShape& s) {
  auto in_pieces = [](const bf16* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return s.D % 8 == 0 && s.stride % 8 == 0 && s.row_stride % 8 == 0 && s.stride < 1 << 24 && s.D < 1 << 24 &&
         in_pieces(r) && in_pieces(landmark) && !plain_attention();
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
  const int64_t queries = s.B * s.C;
  if (queries == 0) return;
  if (selection.picking == Picking::given || selection.picking == Picking::newest) {
    launch("weights of given picks", stream_, chunk_retrieval_given_kernel<Act>, ceil_div(queries, 8), 256, 0, pick, w,
           r, landmark, s, selection);
    return;
  }
  bool mma = false;
  if constexpr (std::is_same_v<Act, bf16>) mma = takes_mma(r, landmark, s);
  // Landmarks are split until the GPU is full, as far as the candidates find room in the working memory.
  const int64_t per_split = queries * s.K, rank_bytes = sizeof(uint64_t), score_bytes = sizeof(float),
                room = std::max<int64_t>(1, scratch_bytes / (per_split * (rank_bytes + score_bytes))),
                splits = std::min(room, mma ? chunk_retrieval_splits_mma(s, selection, processors_)
                                            : chunk_retrieval_splits_plain(s, processors_));
  Selected to{pick, w, {}, static_cast<int>(splits), selection.equal_weights};
  if (splits > 1)
    to.shortlist = {scratch<uint64_t>(splits * per_split),
                    scratch<float>(splits * per_split, splits * per_split * rank_bytes)};
  if constexpr (std::is_same_v<Act, bf16>)
    if (mma) chunk_retrieval_select_mma(stream_, to, r, landmark, s, selection, processors_);
  if (!mma) chunk_retrieval_select_plain(stream_, to, r, landmark, s, selection);
  if (splits > 1)
    launch("chunk retrieval, joining", stream_, chunk_retrieval_merge_kernel, queries, 32 * merge_warps, 0, to, s);
}

template <class Act>
void Gpu<Act>::chunk_retrieval_backward(const RetrievalBackward<Act, float>& a, const RetrievalShape& s) {
  launch("chunk retrieval, backward by query", stream_, chunk_retrieval_backward_query_kernel<Act>, s.B * s.C, 256, 0,
         a.dr, a.dw, a.w, a.pick, a.landmark, static_cast<float>(a.scale), s);
  launch("chunk retrieval, backward for landmarks", stream_, chunk_retrieval_backward_landmark_kernel<Act>, s.B * s.C,
         256, 0, a.dlandmark, a.dw, a.start, a.fetches, a.r, s);
}

GCA_BOTH_TYPES(chunk_retrieval_forward);
GCA_BOTH_TYPES(chunk_retrieval_backward);

}  // namespace gca
