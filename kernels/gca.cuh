// Grouped cross attention: what both paths share, and their passes.
#pragma once
#include "kernels/attention.cuh"

namespace gca {

// Which piece of work a block does: chunks are innermost, so that blocks that run together share a head's memory in the
// cache.
struct Piece {
  int64_t b, c;
  int h;
  int tile;    // which 64 slots (or keys) of the chunk
  int column;  // the first output column
  __device__ Piece(int64_t chunks, const GcaShape& s, int fragments) {
    const int tiles = tiles_of(s.S), groups = tiles_of(s.d) / fragments + (tiles_of(s.d) % fragments != 0);
    int64_t i = blockIdx.x;
    c = i % chunks;
    i /= chunks;
    tile = static_cast<int>(i % tiles);
    i /= tiles;
    column = static_cast<int>(i % groups) * fragments * tile_size;
    i /= groups;
    h = static_cast<int>(i % s.H);
    b = i / s.H;
  }
};
inline int64_t pieces(int64_t chunks, const GcaShape& s, int fragments) {
  return s.B * s.H * ceil_div(tiles_of(s.d), fragments) * tiles_of(s.S) * chunks;
}

// The 64 slots of a block: number of the first in q's row, and how many there are.
struct Slots {
  int64_t first;
  int count;
  int in_chunk;  // number of the first among the chunk's slots that are here
  __device__ Slots(const GcaShape& s, int64_t c, int tile) {
    const int64_t chunk = s.first_chunk() + c, begin = max(chunk * s.S, s.first_slot) - s.first_slot,
                  end = min((chunk + 1) * s.S - s.first_slot, s.T);
    in_chunk = tile * tile_size;
    first = begin + in_chunk;
    count = static_cast<int>(min(int64_t{tile_size}, max(int64_t{0}, end - first)));
  }
};
// One head of one chunk of the memory, kv (B,M,S,2D): keys, rows 2D apart; the values lie D further.
template <class Act>
__device__ const Act* memory_of(const Act* kv, const GcaShape& s, int64_t b, int64_t m, int h) {
  return kv + (b * s.M + m) * s.S * 2 * s.H * s.d + h * s.d;
}

// ---- the paths: arguments and shapes as in gca_kernels.cuh, of shapes that the op has checked ---------------------
// plain/gca.cuh: every type and shape. layers (n_layers): in the GPU's memory
template <class Act>
void gca_forward_plain(cudaStream_t stream, Act* out, float* lse, const Act* q, const Act* kv, const int32_t* pick,
                       const float* w, const GcaShape& s);
template <class Act>
void gca_backward_query_plain(cudaStream_t stream, const GcaBackward<Act, float>& a, const GcaShape& s);
template <class Act>
void gca_backward_memory_plain(cudaStream_t stream, Act* dkv, const FetchingLayer<Act, float>* layers, int n_layers,
                               const Act* kv, const GcaShape& s);
// mma/gca.cu: bf16, chunks of 64, heads of 32, 64 or 128 columns. room (room_bytes): working memory, from a multiple of
// 16 on
void gca_forward_mma(cudaStream_t stream, bf16* out, float* lse, const bf16* q, const bf16* kv, const int32_t* pick,
                     const float* w, const GcaShape& s);
void gca_backward_query_mma(cudaStream_t stream, const GcaBackward<bf16, float>& a, const GcaShape& s);
void gca_backward_memory_mma(cudaStream_t stream, bf16* dkv, const FetchingLayer<bf16, float>* layers, int n_layers,
                             const bf16* kv, const GcaShape& s, char* room, int64_t room_bytes);

}  // namespace gca
