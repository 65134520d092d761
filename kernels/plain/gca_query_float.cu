// Grouped cross attention, the plain path, backward by query, compiled for float.
#include "kernels/plain/gca.cuh"

namespace gca {

template void gca_backward_query_plain(cudaStream_t, const GcaBackward<float, float>&, const GcaShape&);

}  // namespace gca
