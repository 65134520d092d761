// The encoder's attention: bidirectional inside a chunk, with rotary embedding on q and k (drt.md, chunk encoder): pair
// (t, t + d/2) of slot p turns by p * 10000^(-2t/d). q and k are turned as they are loaded; their gradients, made in
// the turned frame, are turned back.
// The passes stand in plain/chunk_attention.cuh, for any type and shape, and mma/chunk_attention.cu, on tensor
// cores.
#include "gca_kernels.cuh"
#include "kernels/chunk_attention.cuh"

namespace gca {
namespace {

// Whether a call in bf16 takes tensor cores.
bool takes_mma(const ChunkShape& s) { return s.S == tile_size && mma_head(s.d) && !plain_attention(); }

}  // namespace

template <class Act>
void Gpu<Act>::chunk_attention_forward(Act* out, float* lse, const Act* qkv, const ChunkShape& s) {
  const ChunkRows<Act> chunks{s.N, s.S, s.H, s.d, qkv, rotation(s.S, s.d)};
  if constexpr (std::is_same_v<Act, bf16>)
    if (takes_mma(s)) return chunk_attention_forward_mma(stream_, out, lse, chunks);
  chunk_attention_forward_plain(stream_, out, lse, chunks);
}
template <class Act>
void Gpu<Act>::chunk_attention_backward(Act* dqkv, const Act* dout, const Act* qkv, const Act* out, const float* lse,
                                        const ChunkShape& s) {
  const ChunkRows<Act> chunks{s.N, s.S, s.H, s.d, qkv, rotation(s.S, s.d)};
  if constexpr (std::is_same_v<Act, bf16>)
    if (takes_mma(s)) return chunk_attention_backward_mma(stream_, dqkv, dout, lse, chunks);
  chunk_attention_backward_plain(stream_, dqkv, dout, out, lse, chunks);
}

GCA_BOTH_TYPES(chunk_attention_forward);
GCA_BOTH_TYPES(chunk_attention_backward);

}  // namespace gca
