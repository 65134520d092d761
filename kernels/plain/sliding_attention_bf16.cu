// Sliding-window attention, the plain path, compiled for bf16.
#include "kernels/plain/sliding_attention.cuh"

namespace gca {

template void sliding_attention_forward_plain(cudaStream_t, bf16*, float*, const SlidingRows<bf16>&);
template void sliding_attention_backward_plain(cudaStream_t, bf16*, const bf16*, const bf16*, const float*,
                                               const SlidingRows<bf16>&);

}  // namespace gca
