// The encoder's attention inside a chunk, on any type and shape: a Kind for the kernels of plain/attention.cuh, which
// turns q and k as they are loaded.
#pragma once
#include "kernels/chunk_attention.cuh"
#include "kernels/plain/attention.cuh"

namespace gca {

template <class Act>
struct InChunk : ChunkRows<Act> {
  using ChunkRows<Act>::T, ChunkRows<Act>::H, ChunkRows<Act>::d, ChunkRows<Act>::qkv, ChunkRows<Act>::rotation;
  static constexpr int64_t first_slot = 0;

  __device__ const Act* row(int64_t b, int64_t slot) const { return qkv + (b * T + slot) * 3 * H * d; }
  __device__ void load_turned(Tile& tile, int64_t b, int64_t slot, int t, int64_t column) const {
    const int columns = columns_of(d, t), half = d / 2;
    for (int i = static_cast<int>(threadIdx.x); i < tile_size * tile_size; i += tile_threads) {
      const int r = i / tile_size, c = i % tile_size, e = t * tile_size + c;
      float value = 0;
      if (slot + r < T && c < columns) {
        const Act* head = row(b, slot + r) + column;
        const float* angle = rotation + (slot + r) * d + e % half;
        const float u = to_float(head[e]), other = to_float(head[e < half ? e + half : e - half]);
        value = e < half ? u * angle[0] - other * angle[half] : u * angle[0] + other * angle[half];
      }
      tile[r][c] = value;
    }
  }
  __device__ void load_q(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load_turned(tile, b, slot, t, h * d);
  }
  __device__ void load_k(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load_turned(tile, b, slot, t, static_cast<int64_t>(H + h) * d);
  }
  __device__ void load_v(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load_tile(tile, row(b, slot) + static_cast<int64_t>(2 * H + h) * d + t * tile_size, static_cast<int64_t>(3 * H) * d,
              static_cast<int>(min(int64_t{tile_size}, T - slot)), columns_of(d, t));
  }
  __device__ bool sees(int64_t, int64_t j) const { return j < T; }
  __device__ float slope(int) const { return 0; }
  __device__ int64_t first_key(int64_t) const { return 0; }
  __device__ int64_t end_key(int64_t) const { return T; }
  __device__ int64_t first_query(int64_t) const { return 0; }
  __device__ int64_t end_query(int64_t) const { return T; }
};

// q and k of dqkv (N,S,3D), turned by minus their slot's angles, in place
template <class Act>
__global__ void chunk_attention_turn_back_kernel(Act* dqkv,              // (N,S,3D)
                                                 const float* rotation,  // (S,d)
                                                 int64_t N, int S, int H, int d) {
  const int half = d / 2;
  const int64_t heads = 2 * H, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;  // q's heads, then k's
  if (i >= N * S * heads * half) return;
  const int64_t t = i % half, h = i / half % heads, slot = i / half / heads;
  Act* u = dqkv + (slot * 3 * H + h) * d + t;
  const float* angle = rotation + slot % S * d + t;
  const float first = to_float(u[0]), second = to_float(u[half]);
  u[0] = from_float<Act>(first * angle[0] + second * angle[half]);
  u[half] = from_float<Act>(second * angle[0] - first * angle[half]);
}

template <class Act>
void chunk_attention_forward_plain(cudaStream_t stream, Act* out, float* lse, const ChunkRows<Act>& chunks) {
  launch_attention_forward("chunk attention", stream, out, lse, InChunk<Act>{chunks});
}
template <class Act>
void chunk_attention_backward_plain(cudaStream_t stream, Act* dqkv, const Act* dout, const Act* out, const float* lse,
                                    const ChunkRows<Act>& c) {
  launch_attention_backward("chunk attention, backward", stream, dqkv, AttentionOutputs<Act>{dout, out, lse},
                            InChunk<Act>{c});
  launch("chunk attention, turning back", stream, chunk_attention_turn_back_kernel<Act>,
         ceil_div(c.B * c.T * c.H * c.d, 256), 256, 0, dqkv, c.rotation, c.B, static_cast<int>(c.T), c.H, c.d);
}

}  // namespace gca
