// Causal chunk retrieval, the selection, on any type and shape: a block scores 64 queries against 64 landmarks at a
// time; a warp keeps a query's K best, one a lane. What to read before mma/chunk_retrieval.cu.
//
//                      landmarks m0 ..     m0 + 64 * splits ..
//   64 queries  warp 0 [ 8 rows x 64  ]    a lane takes landmarks lane and lane + 32 of each row; Best, one a row,
//   holds
//               ..     [   of 8 warps ]    the K best over all tiles, one a lane
//
// Shared memory: a (queries, then the scores) | b (landmarks), 17,408 bytes each, filled by all threads, 64 columns at
// a time; free at the barrier after their product.
#include "kernels/chunk_retrieval.cuh"
#include "kernels/plain/tiles.cuh"

namespace gca {
namespace {

constexpr int warps_of_block = tile_threads / 32, rows_of_warp = tile_size / warps_of_block;

// Block: 64 queries of a row against one split of the landmarks.
template <class Act>
__global__ void __launch_bounds__(tile_threads)
    chunk_retrieval_select_plain_kernel(Selected to,
                                        const Act* r,         // (B,C,D)
                                        const Act* landmark,  // see RetrievalShape
                                        RetrievalShape s, Selection selection) {
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
  for (int64_t m0 = int64_t{split} * tile_size; m0 < most; m0 += int64_t{to.splits} * tile_size) {
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
          value = drawn_value(selection, raw, word);
        } else if (selection.noise && m < past) {
          value = raw + selection.noise_scale * selection.given_noise[(row * s.C + c) * s.C + m];
        }
        best[i].offer(m < past ? rank_of(value, m) : 0, raw, s.K);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < rows_of_warp; i++) {
    const int query = warp * rows_of_warp + i;
    if (query < queries) to.write(s, row, first + query, split, best[i].rank, best[i].score);
  }
}

}  // namespace

int64_t chunk_retrieval_splits_plain(const RetrievalShape& s, int64_t processors) {
  return even_splits(2 * processors, s.B * ceil_div(s.C, tile_size), ceil_div(most_candidates(s), tile_size));
}

template <class Act>
void chunk_retrieval_select_plain(cudaStream_t stream, const Selected& to, const Act* r, const Act* landmark,
                                  const RetrievalShape& s, const Selection& selection) {
  launch("chunk retrieval", stream, chunk_retrieval_select_plain_kernel<Act>,
         s.B * ceil_div(s.C, tile_size) * to.splits, tile_threads, 2 * tile_bytes, to, r, landmark, s, selection);
}
template void chunk_retrieval_select_plain(cudaStream_t, const Selected&, const float*, const float*,
                                           const RetrievalShape&, const Selection&);
template void chunk_retrieval_select_plain(cudaStream_t, const Selected&, const bf16*, const bf16*,
                                           const RetrievalShape&, const Selection&);

}  // namespace gca
