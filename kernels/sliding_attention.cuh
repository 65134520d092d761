// Sliding-window attention: what both paths share, and their passes.
#pragma once
#include "kernels/attention.cuh"

namespace gca {

// The rows of a call.
template <class Act>
struct SlidingRows {
  int64_t B, T, W, first_slot;
  int H, d;
  const Act *qkv, *ring;  // (B,T,3D); (B,W,2D) of k | v, slot j at place j mod W, or null

  GCA_HD int64_t D() const { return static_cast<int64_t>(H) * d; }
  __device__ float slope(int h) const { return static_cast<float>(alibi_slope(h, H)); }
};

// ---- the paths: arguments and shapes as in gca_kernels.cuh --------------------------------------------------------
// plain/sliding_attention.cuh: every type and shape
template <class Act>
void sliding_attention_forward_plain(cudaStream_t stream, Act* out, float* lse, const SlidingRows<Act>& rows);
template <class Act>
void sliding_attention_backward_plain(cudaStream_t stream, Act* dqkv, const Act* dout, const Act* out, const float* lse,
                                      const SlidingRows<Act>& rows);
// mma/sliding_attention_*.cu: bf16, heads of 32, 64 or 128 columns. statistics (B,H,T rounded up to tiles): working
// memory
void sliding_attention_forward_mma(cudaStream_t stream, bf16* out, float* lse, const SlidingRows<bf16>& rows);
void sliding_attention_backward_mma(cudaStream_t stream, bf16* dqkv, const bf16* dout, const bf16* out,
                                    const float* lse, float2* statistics, const SlidingRows<bf16>& rows);

}  // namespace gca
