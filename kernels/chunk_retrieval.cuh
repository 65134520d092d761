// Causal chunk retrieval: what both paths of the selection share, and their passes.
#pragma once
#include <algorithm>

#include "kernels/attention.cuh"

namespace gca {

// What a candidate is ranked by: its value's bits, made to rise with it, then the lower chunk first. Above 0, which is
// no candidate.
__device__ inline uint64_t rank_of(float value, int64_t chunk) {
  if (!(value == value)) value = -INFINITY;
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 is 0
  return static_cast<uint64_t>(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~static_cast<uint32_t>(chunk);
}
// Its value again, and its chunk.
__device__ inline float value_of(uint64_t rank) {
  const uint32_t bits = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}
__device__ inline int32_t chunk_of(uint64_t rank) {
  return rank ? static_cast<int32_t>(~static_cast<uint32_t>(rank)) : -1;
}

// What ranks a candidate of that score where Selection draws it, from its word of selection_draw().
__device__ inline float drawn_value(const Selection& selection, float score, uint32_t word) {
  return selection.picking == Picking::uniform ? static_cast<float>(word)
                                               : score + selection.noise_scale * gumbel(word);
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
// 0. A score that is not a number makes every weight so. equal: all others count as the same.
__device__ inline void write_row(int32_t* pick, float* w, int32_t chunk, float score, int K, bool equal) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (equal && score == score) score = 0;
  const bool picked = lane < K && chunk >= 0, broken = __any_sync(0xffffffffu, picked && !(score == score));
  const float top = warp_max(picked ? score : -INFINITY);
  const float e = !picked || (top == -INFINITY && !broken) ? 0 : expf(score - top), sum = warp_sum(e);
  if (lane < K) {
    pick[lane] = chunk;
    w[lane] = sum == 0 ? 0 : e / sum;
  }
}

// Each query's best of one split of the landmarks: the split-th of their tiles, the (split + splits)-th, ..
struct Shortlist {
  uint64_t* rank;  // (B*C,splits,K)
  float* score;    // (B*C,splits,K)
};
// Where a selection's results go: with one split the row's picks are final, otherwise the best go to the shortlist.
struct Selected {
  int32_t* pick;  // (B,C+1,K)
  float* w;       // (B,C+1,K)
  Shortlist shortlist;
  int splits;
  bool equal_weights;
  // A warp writes what it found for query c of row b, the best first, one a lane.
  __device__ void write(const RetrievalShape& s, int64_t b, int64_t c, int split, uint64_t rank, float score) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t out = s.table().picked_by(b, c), candidate = ((b * s.C + c) * splits + split) * s.K + lane;
    if (splits == 1) write_row(pick + out, w + out, chunk_of(rank), score, s.K, equal_weights);
    else if (lane < s.K) {
      shortlist.rank[candidate] = rank;
      shortlist.score[candidate] = score;
    }
  }
};
// How many splits make about `blocks` blocks of equal work, each split of a tile at least.
inline int64_t even_splits(int64_t blocks, int64_t query_blocks, int64_t landmark_tiles) {
  const int64_t splits = std::max<int64_t>(1, blocks / query_blocks), tiles = std::max<int64_t>(1, landmark_tiles);
  return ceil_div(tiles, ceil_div(tiles, splits));
}
// Landmarks that the last query of a row may see.
inline int64_t most_candidates(const RetrievalShape& s) { return candidates(s.first_chunk + s.C - 1); }

// ---- the paths: shapes as in gca_kernels.cuh; how many splits fill a GPU of so many multiprocessors; the selection --
// plain/chunk_retrieval.cu: every type and shape
int64_t chunk_retrieval_splits_plain(const RetrievalShape& s, int64_t processors);
template <class Act>
void chunk_retrieval_select_plain(cudaStream_t stream, const Selected& to, const Act* r, const Act* landmark,
                                  const RetrievalShape& s, const Selection& selection);
// mma/chunk_retrieval.cu: bf16, rows of r and landmarks in whole pieces of 16 bytes
int64_t chunk_retrieval_splits_mma(const RetrievalShape& s, const Selection& selection, int64_t processors);
void chunk_retrieval_select_mma(cudaStream_t stream, const Selected& to, const bf16* r, const bf16* landmark,
                                const RetrievalShape& s, const Selection& selection, int64_t processors);

}  // namespace gca
