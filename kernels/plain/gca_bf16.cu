// Grouped cross attention, the plain path, forward and backward for the memory, compiled for bf16.
#include "kernels/plain/gca.cuh"

namespace gca {

template void gca_forward_plain(cudaStream_t, bf16*, float*, const bf16*, const bf16*, const int32_t*, const float*,
                                const GcaShape&);
template void gca_backward_memory_plain(cudaStream_t, bf16*, const FetchingLayer<bf16, float>*, int, const bf16*,
                                        const GcaShape&);

}  // namespace gca
