// The encoder's attention inside a chunk, the plain path, compiled for float.
#include "kernels/plain/chunk_attention.cuh"

namespace gca {

template void chunk_attention_forward_plain(cudaStream_t, float*, float*, const ChunkRows<float>&);
template void chunk_attention_backward_plain(cudaStream_t, float*, const float*, const float*, const float*,
                                             const ChunkRows<float>&);

}  // namespace gca
