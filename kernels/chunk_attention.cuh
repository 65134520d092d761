// The encoder's attention inside a chunk: what both paths share, and their passes.
#pragma once
#include "kernels/attention.cuh"

namespace gca {

// The chunks of a call.
template <class Act>
struct ChunkRows {
  int64_t B, T;  // chunks, and slots of one
  int H, d;
  const Act* qkv;         // (N,S,3D)
  const float* rotation;  // (S,d): cosines | sines
};

// ---- the paths: arguments and shapes as in gca_kernels.cuh --------------------------------------------------------
// plain/chunk_attention.cuh: every type and shape
template <class Act>
void chunk_attention_forward_plain(cudaStream_t stream, Act* out, float* lse, const ChunkRows<Act>& chunks);
template <class Act>
void chunk_attention_backward_plain(cudaStream_t stream, Act* dqkv, const Act* dout, const Act* out, const float* lse,
                                    const ChunkRows<Act>& chunks);
// mma/chunk_attention.cu: bf16, chunks of 64 slots, heads of 32, 64 or 128 columns
void chunk_attention_forward_mma(cudaStream_t stream, bf16* out, float* lse, const ChunkRows<bf16>& chunks);
void chunk_attention_backward_mma(cudaStream_t stream, bf16* dqkv, const bf16* dout, const float* lse,
                                  const ChunkRows<bf16>& chunks);

}  // namespace gca
