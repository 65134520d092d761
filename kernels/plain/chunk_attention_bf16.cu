// The encoder's attention inside a chunk, the plain path, compiled for bf16.
#include "kernels/plain/chunk_attention.cuh"

namespace gca {

template void chunk_attention_forward_plain(cudaStream_t, bf16*, float*, const ChunkRows<bf16>&);
template void chunk_attention_backward_plain(cudaStream_t, bf16*, const bf16*, const bf16*, const float*,
                                             const ChunkRows<bf16>&);

}  // namespace gca
