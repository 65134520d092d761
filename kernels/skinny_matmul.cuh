// Matrix products of few rows: which shapes kernels/skinny_matmul.cu takes, and its launches.
#pragma once
#include "kernels/device.cuh"

namespace gca {

// y (rows,out) = x (rows,in) W^T (+ residual), W (out,in), in bf16, where a product is bound by reading W: up to 16
// rows of a multiple of 8 columns, x and W at multiples of 16 bytes.
bool skinny_matmul_fits(const bf16* x, const bf16* W, int64_t rows, int64_t in, int64_t out);
// Of a shape that fits. residual (rows,out) or null; processors: of the GPU. A row's bits depend on that row alone.
void skinny_matmul(cudaStream_t stream, int processors, bf16* y, const bf16* x, const bf16* W, const bf16* residual,
                   int64_t rows, int64_t in, int64_t out);

// The same with Norm(x) in place of x, up to 2,048 columns: gain (in), at a multiple of 16 bytes too.
bool skinny_norm_matmul_fits(const bf16* x, const bf16* gain, const bf16* W, int64_t rows, int64_t in, int64_t out);
void skinny_norm_matmul(cudaStream_t stream, int processors, bf16* y, const bf16* x, const bf16* gain, double eps,
                        const bf16* W, int64_t rows, int64_t in, int64_t out);
// The same with SwiGLU(gate_up): up to 4 rows, of the bits that swiglu_forward and skinny_matmul give. gate_up
// (rows,2F)
bool skinny_swiglu_matmul_fits(const bf16* gate_up, const bf16* W, int64_t rows, int64_t F, int64_t out);
void skinny_swiglu_matmul(cudaStream_t stream, int processors, bf16* y, const bf16* gate_up, const bf16* W,
                          const bf16* residual, int64_t rows, int64_t F, int64_t out);

}  // namespace gca
