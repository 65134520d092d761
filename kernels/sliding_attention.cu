// Sliding-window attention with ALiBi (drt.md SWA): query slot i sees slots j with 0 <= i-j <= W, its logits lowered by
// 2^(-8(h+1)/H) (i-j). Earlier slots of a row that is read in segments come from a ring.
#include "self_attention.cuh"

namespace gca {
namespace {

template <class Act>
struct Sliding {
  int64_t B, T, W, first_slot;
  int H, d;
  const Act *qkv, *ring;  // (B,T,3D); (B,W,2D) of k | v, slot j at place j mod W, or null

  __device__ int64_t D() const { return static_cast<int64_t>(H) * d; }
  __device__ void load(Tile& tile, int64_t b, int64_t slot, int t, int64_t column, int64_t ring_column) const {
    load_tile(
        tile,
        [&](int r) -> const Act* {
          const int64_t j = slot + r;
          if (j >= first_slot) return j < first_slot + T ? qkv + (b * T + j - first_slot) * 3 * D() + column + t * tile_size : nullptr;
          return ring && ring_column >= 0 && j >= first_slot - W ? ring + (b * W + j % W) * 2 * D() + ring_column + t * tile_size : nullptr;
        },
        columns_of(d, t));
  }
  __device__ void load_q(Tile& tile, int64_t b, int h, int64_t slot, int t) const { load(tile, b, slot, t, h * d, -1); }
  __device__ void load_k(Tile& tile, int64_t b, int h, int64_t slot, int t) const { load(tile, b, slot, t, D() + h * d, h * d); }
  __device__ void load_v(Tile& tile, int64_t b, int h, int64_t slot, int t) const { load(tile, b, slot, t, 2 * D() + h * d, D() + h * d); }
  __device__ bool sees(int64_t i, int64_t j) const { return j <= i && i - j <= W; }
  __device__ float slope(int h) const { return static_cast<float>(exp2(-8.0 * (h + 1) / H)); }
  __device__ int64_t first_key(int64_t i0) const { return i0 > W ? (i0 - W) / tile_size * tile_size : 0; }
  __device__ int64_t end_key(int64_t i0) const { return i0 + tile_size; }
  __device__ int64_t first_query(int64_t j0) const { return j0; }
  __device__ int64_t end_query(int64_t j0) const { return min(T, j0 + tile_size + W); }
};

template <class Act>
__global__ void append_kernel(Act* ring, const Act* qkv, SlidingShape s) {
  const int64_t D = static_cast<int64_t>(s.H) * s.d, kept = min(s.T, s.W), i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= s.B * kept * 2 * D) return;
  const int64_t column = i % (2 * D), t = s.T - kept + i / (2 * D) % kept, b = i / (2 * D) / kept;
  ring[(b * s.W + (s.first_slot + t) % s.W) * 2 * D + column] = qkv[(b * s.T + t) * 3 * D + D + column];
}

}  // namespace

template <class Act>
void Gpu<Act>::sliding_attention_forward(Act* out, float* lse, const Act* qkv, const Act* ring, const SlidingShape& s) {
  launch_attention_forward("sliding attention", stream_, out, lse, Sliding<Act>{s.B, s.T, s.W, s.first_slot, s.H, s.d, qkv, ring});
}
template <class Act>
void Gpu<Act>::sliding_attention_backward(Act* dqkv, const Act* dout, const Act* qkv, const Act* out, const float* lse, const SlidingShape& s) {
  GCA_CHECK(s.first_slot == 0, "backward takes whole rows");
  launch_attention_backward("sliding attention, backward", stream_, dqkv, AttentionOutputs<Act>{dout, out, lse},
                            Sliding<Act>{s.B, s.T, s.W, 0, s.H, s.d, qkv, nullptr});
}
template <class Act>
void Gpu<Act>::ring_append(Act* ring, const Act* qkv, const SlidingShape& s) {
  launch("the window's ring", stream_, append_kernel<Act>, ceil_div(s.B * std::min(s.T, s.W) * 2 * s.H * s.d, 256), 256, 0, ring, qkv, s);
}

template void Gpu<float>::sliding_attention_forward(float*, float*, const float*, const float*, const SlidingShape&);
template void Gpu<bf16>::sliding_attention_forward(bf16*, float*, const bf16*, const bf16*, const SlidingShape&);
template void Gpu<float>::sliding_attention_backward(float*, const float*, const float*, const float*, const float*, const SlidingShape&);
template void Gpu<bf16>::sliding_attention_backward(bf16*, const bf16*, const bf16*, const bf16*, const float*, const SlidingShape&);
template void Gpu<float>::ring_append(float*, const float*, const SlidingShape&);
template void Gpu<bf16>::ring_append(bf16*, const bf16*, const SlidingShape&);

}  // namespace gca
