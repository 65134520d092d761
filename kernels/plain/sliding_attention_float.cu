// Sliding-window attention, the plain path, compiled for float.
#include "kernels/plain/sliding_attention.cuh"

namespace gca {

template void sliding_attention_forward_plain(cudaStream_t, float*, float*, const SlidingRows<float>&);
template void sliding_attention_backward_plain(cudaStream_t, float*, const float*, const float*, const float*,
                                               const SlidingRows<float>&);

}  // namespace gca
