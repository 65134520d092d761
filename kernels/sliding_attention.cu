// Sliding-window attention with ALiBi (drt.md SWA): query slot i sees slots j with 0 <= i-j <= W, its logits lowered by
// 2^(-8(h+1)/H) (i-j). Earlier slots of a row that is read in segments come from a ring.
// The passes stand in plain/sliding_attention.cuh, for any type and shape, and mma/sliding_attention_*.cu, on tensor
// cores; here are the checks, the choice and the ring.
#include <algorithm>

#include "gca_kernels.cuh"
#include "kernels/sliding_attention.cuh"

namespace gca {
namespace {

template <class Act>
__global__ void ring_append_kernel(Act* ring,       // (B,W,2D)
                                   const Act* qkv,  // (B,T,3D)
                                   SlidingShape s) {
  const int64_t D = static_cast<int64_t>(s.H) * s.d, kept = min(s.T, s.W),
                i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= s.B * kept * 2 * D) return;
  const int64_t column = i % (2 * D), t = s.T - kept + i / (2 * D) % kept, b = i / (2 * D) / kept;
  ring[(b * s.W + (s.first_slot + t) % s.W) * 2 * D + column] = qkv[(b * s.T + t) * 3 * D + D + column];
}

// Whether a call in bf16 takes tensor cores.
bool takes_mma(const SlidingShape& s) { return mma_head(s.d) && !plain_attention(); }

}  // namespace

template <class Act>
void Gpu<Act>::sliding_attention_forward(Act* out, float* lse, const Act* qkv, const Act* ring, const SlidingShape& s) {
  const SlidingRows<Act> rows{s.B, s.T, s.W, s.first_slot, s.H, s.d, qkv, ring};
  if constexpr (std::is_same_v<Act, bf16>)
    if (takes_mma(s)) return sliding_attention_forward_mma(stream_, out, lse, rows);
  sliding_attention_forward_plain(stream_, out, lse, rows);
}
template <class Act>
void Gpu<Act>::sliding_attention_backward(Act* dqkv, const Act* dout, const Act* qkv, const Act* out, const float* lse,
                                          const SlidingShape& s) {
  GCA_CHECK(s.first_slot == 0, "backward takes whole rows");
  if constexpr (std::is_same_v<Act, bf16>) {
    // Rows by as many as there is room for the statistics of.
    const int64_t D = static_cast<int64_t>(s.H) * s.d, a_row = s.H * round_up(s.T, tile_size),
                  at_once = scratch_bytes / static_cast<int64_t>(sizeof(float2)) / a_row;
    if (takes_mma(s) && at_once > 0) {
      for (int64_t b = 0; b < s.B; b += at_once) {
        const int64_t rows = std::min(at_once, s.B - b), slot = b * s.T;
        sliding_attention_backward_mma(stream_, dqkv + slot * 3 * D, dout + slot * D, out + slot * D, lse + slot * s.H,
                                       scratch<float2>(rows * a_row),
                                       {rows, s.T, s.W, 0, s.H, s.d, qkv + slot * 3 * D, nullptr});
      }
      return;
    }
  }
  sliding_attention_backward_plain(stream_, dqkv, dout, out, lse,
                                   SlidingRows<Act>{s.B, s.T, s.W, 0, s.H, s.d, qkv, nullptr});
}
template <class Act>
void Gpu<Act>::ring_append(Act* ring, const Act* qkv, const SlidingShape& s) {
  launch("the window's ring", stream_, ring_append_kernel<Act>, ceil_div(s.B * std::min(s.T, s.W) * 2 * s.H * s.d, 256),
         256, 0, ring, qkv, s);
}

GCA_BOTH_TYPES(sliding_attention_forward);
GCA_BOTH_TYPES(sliding_attention_backward);
GCA_BOTH_TYPES(ring_append);

}  // namespace gca
