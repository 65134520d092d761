// Grouped cross attention, the plain path, forward and backward for the memory, compiled for float.
#include "kernels/plain/gca.cuh"

namespace gca {

template void gca_forward_plain(cudaStream_t, float*, float*, const float*, const float*, const int32_t*, const float*,
                                const GcaShape&);
template void gca_backward_memory_plain(cudaStream_t, float*, const FetchingLayer<float, float>*, int, const float*,
                                        const GcaShape&);

}  // namespace gca
