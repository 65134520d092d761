// Sliding-window attention on any type and shape: a Kind for the kernels of plain/attention.cuh.
#pragma once
#include "kernels/plain/attention.cuh"
#include "kernels/sliding_attention.cuh"

namespace gca {

template <class Act>
struct Sliding : SlidingRows<Act> {
  using SlidingRows<Act>::T, SlidingRows<Act>::W, SlidingRows<Act>::first_slot, SlidingRows<Act>::d,
      SlidingRows<Act>::qkv, SlidingRows<Act>::ring, SlidingRows<Act>::D;

  __device__ void load(Tile& tile, int64_t b, int64_t slot, int t, int64_t column, int64_t ring_column) const {
    load_tile(
        tile,
        [&](int r) -> const Act* {
          const int64_t j = slot + r;
          if (j >= first_slot)
            return j < first_slot + T ? qkv + (b * T + j - first_slot) * 3 * D() + column + t * tile_size : nullptr;
          return ring && ring_column >= 0 && j >= first_slot - W
                     ? ring + (b * W + j % W) * 2 * D() + ring_column + t * tile_size
                     : nullptr;
        },
        columns_of(d, t));
  }
  __device__ void load_q(Tile& tile, int64_t b, int h, int64_t slot, int t) const { load(tile, b, slot, t, h * d, -1); }
  __device__ void load_k(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load(tile, b, slot, t, D() + h * d, h * d);
  }
  __device__ void load_v(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load(tile, b, slot, t, 2 * D() + h * d, D() + h * d);
  }
  __device__ bool sees(int64_t i, int64_t j) const { return j <= i && i - j <= W; }
  __device__ int64_t first_key(int64_t i0) const { return i0 > W ? (i0 - W) / tile_size * tile_size : 0; }
  __device__ int64_t end_key(int64_t i0) const { return i0 + tile_size; }
  __device__ int64_t first_query(int64_t j0) const { return j0; }
  __device__ int64_t end_query(int64_t j0) const { return min(T, j0 + tile_size + W); }
};

template <class Act>
void sliding_attention_forward_plain(cudaStream_t stream, Act* out, float* lse, const SlidingRows<Act>& rows) {
  launch_attention_forward("sliding attention", stream, out, lse, Sliding<Act>{rows});
}
template <class Act>
void sliding_attention_backward_plain(cudaStream_t stream, Act* dqkv, const Act* dout, const Act* out, const float* lse,
                                      const SlidingRows<Act>& rows) {
  launch_attention_backward("sliding attention, backward", stream, dqkv, AttentionOutputs<Act>{dout, out, lse},
                            Sliding<Act>{rows});
}

}  // namespace gca
