// SwiGLU: h = silu(gate) * up, silu(z) = z / (1 + e^-z), and its gradient.
// A thread takes N neighbours of a row; no shared memory.
#include "gca_kernels.cuh"
#include "kernels/swiglu.cuh"

namespace gca {
namespace {

template <class Act, int N>
__global__ void swiglu_forward_kernel(Act* h,              // (rows,F)
                                      const Act* gate_up,  // (rows,2F)
                                      int64_t rows, int64_t F) {
  let_next_begin();
  wait_for_earlier();
  const int64_t packs = F / N, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= rows * packs) return;
  const int64_t r = i / packs, j = i % packs * N;
  const auto gate = load_pack<N>(gate_up + 2 * r * F + j), up = load_pack<N>(gate_up + (2 * r + 1) * F + j);
  Pack<Act, N> out;
#pragma unroll
  for (int e = 0; e < N; e++) out.at[e] = from_float<Act>(swiglu(to_float(gate.at[e]), to_float(up.at[e])));
  store_pack(h + r * F + j, out);
}

// dup = dh silu(gate)
// dgate = dh up silu'(gate),  silu' = sigmoid + silu (1 - sigmoid)
template <class Act, int N>
__global__ void swiglu_backward_kernel(Act* dgate_up,       // (rows,2F)
                                       Act* h,              // (rows,F) or null
                                       const Act* dh,       // (rows,F)
                                       const Act* gate_up,  // (rows,2F)
                                       int64_t rows, int64_t F) {
  const int64_t packs = F / N, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= rows * packs) return;
  const int64_t r = i / packs, j = i % packs * N;
  const auto gate = load_pack<N>(gate_up + 2 * r * F + j), up = load_pack<N>(gate_up + (2 * r + 1) * F + j),
             d = load_pack<N>(dh + r * F + j);
  Pack<Act, N> dgate, dup;
#pragma unroll
  for (int e = 0; e < N; e++) {
    const float z = to_float(gate.at[e]), sigmoid = 1 / (1 + expf(-z)), silu = z * sigmoid;
    dup.at[e] = from_float<Act>(to_float(d.at[e]) * silu);
    dgate.at[e] = from_float<Act>(to_float(d.at[e]) * to_float(up.at[e]) * (sigmoid + silu * (1 - sigmoid)));
  }
  store_pack(dgate_up + 2 * r * F + j, dgate);
  store_pack(dgate_up + (2 * r + 1) * F + j, dup);
  if (!h) return;
  Pack<Act, N> again;
#pragma unroll
  for (int e = 0; e < N; e++) again.at[e] = from_float<Act>(swiglu(to_float(gate.at[e]), to_float(up.at[e])));
  store_pack(h + r * F + j, again);
}

}  // namespace

template <class Act>
void Gpu<Act>::swiglu_forward(Act* h, const Act* gate_up, int64_t rows, int64_t F) {
  with_width<Act>({F}, [&](auto N) {
    launch_as({.early = rows <= few_rows}, "SwiGLU", stream_, swiglu_forward_kernel<Act, N>,
              ceil_div(rows * (F / N), 256), 256, 0, h, gate_up, rows, F);
  });
}
template <class Act>
void Gpu<Act>::swiglu_backward(Act* dgate_up, Act* h, const Act* dh, const Act* gate_up, int64_t rows, int64_t F) {
  with_width<Act>({F}, [&](auto N) {
    launch("SwiGLU, backward", stream_, swiglu_backward_kernel<Act, N>, ceil_div(rows * (F / N), 256), 256, 0, dgate_up,
           h, dh, gate_up, rows, F);
  });
}

GCA_BOTH_TYPES(swiglu_forward);
GCA_BOTH_TYPES(swiglu_backward);

}  // namespace gca
