// Grouped cross attention, the plain path, backward by query, compiled for bf16.
#include "kernels/plain/gca.cuh"

namespace gca {

template void gca_backward_query_plain(cudaStream_t, bf16*, float*, const bf16*, const bf16*, const bf16*, const float*,
                                       const int32_t*, const float*, const GcaShape&);

}  // namespace gca
