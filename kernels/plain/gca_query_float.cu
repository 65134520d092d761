// Grouped cross attention, the plain path, backward by query, compiled for float.
#include "kernels/plain/gca.cuh"

namespace gca {

template void gca_backward_query_plain(cudaStream_t, float*, float*, const float*, const float*, const float*,
                                       const float*, const int32_t*, const float*, const GcaShape&);

}  // namespace gca
