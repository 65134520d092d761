// Grouped cross attention, the plain path, backward by query, compiled for bf16.
#include "kernels/plain/gca.cuh"

namespace gca {

template void gca_backward_query_plain(cudaStream_t, const GcaBackward<bf16, float>&, const GcaShape&);

}  // namespace gca
