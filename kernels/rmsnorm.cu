// RMSNorm: out = gain * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps). A warp takes a row.
//
//   lane 0   1  ..  31   0 ..      columns of a row, N neighbours a lane: a pack
//
// Rows of up to 3 packs a lane (768 columns in bf16, 384 in float) are read once and stay in registers; so do a lane's
// sums of dgain over its warp's rows. Longer ones are read again, and sum dgain in shared memory. Shared memory,
// backward alone: (warps,D) floats, a warp's sums of dgain over its rows; up to 96 KiB. A warp fills its own row, which
// is read by all after the barrier.
#include <algorithm>

#include "gca_kernels.cuh"
#include "kernels/device.cuh"

namespace gca {
namespace {

constexpr int forward_threads = 256, backward_warps = 8;
constexpr int64_t backward_blocks = 264;  // at most: two a multiprocessor of a Hopper card, on any card the same sums

// Calls body with the packs of N that a lane has of a row of D, a constant, 0 where they are more than 3.
template <int N, class Body>
void with_packs(int64_t D, Body&& body) {
  switch (ceil_div(D, 32 * N)) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 0>{});
  }
}
// Calls body(i, j) for a lane's packs: number i at column j.
template <int N, int P, class Body>
__device__ inline void for_packs(int64_t D, Body&& body) {
  const int first = static_cast<int>(threadIdx.x) % 32 * N;
  if constexpr (P > 0) {
#pragma unroll
    for (int i = 0; i < P; i++)
      if (first + i * 32 * N < D) body(i, first + i * 32 * N);
  } else {
    for (int64_t j = first; j < D; j += 32 * N) body(0, j);
  }
}
// A row's packs of a lane, in registers where P says how many; otherwise where they lie.
template <class Act, int N, int P>
struct RowPacks {
  const Act* row;
  Pack<Act, N> packs[P > 0 ? P : 1];
  __device__ RowPacks(const Act* from, int64_t D) : row(from) {
    if constexpr (P > 0) for_packs<N, P>(D, [&](int i, int64_t j) { packs[i] = load_pack<N>(from + j); });
  }
  __device__ Pack<Act, N> at(int i, int64_t j) const {
    if constexpr (P > 0) return packs[i];
    else return load_pack<N>(row + j);
  }
};

template <class Act, int N, int P>
__global__ void rmsnorm_forward_kernel(Act* out,         // (rows,D)
                                       float* rstd,      // (rows)
                                       const Act* x,     // (rows,D), stride apart
                                       const Act* gain,  // (D)
                                       int64_t rows, int64_t D, int64_t stride, float eps) {
  let_next_begin();
  wait_for_earlier();
  const int64_t r = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  if (r >= rows) return;
  const RowPacks<Act, N, P> row(x + r * stride, D);
  float sum = 0;
  for_packs<N, P>(D, [&](int i, int64_t j) {
    const auto pack = row.at(i, j);
#pragma unroll
    for (int e = 0; e < N; e++) sum = fmaf(to_float(pack.at[e]), to_float(pack.at[e]), sum);
  });
  const float scale = 1 / sqrtf(warp_sum(sum) / static_cast<float>(D) + eps);
  if (threadIdx.x % 32 == 0) rstd[r] = scale;
  for_packs<N, P>(D, [&](int i, int64_t j) {
    auto pack = row.at(i, j);
    const auto by = load_pack<N>(gain + j);
#pragma unroll
    for (int e = 0; e < N; e++) pack.at[e] = from_float<Act>(to_float(by.at[e]) * to_float(pack.at[e]) * scale);
    store_pack(out + r * D + j, pack);
  });
}

// With g = gain * dn, xhat = x * rstd:
//   dx = residuals + rstd * (g - xhat * mean(g * xhat))
//   dgain += sum of dn * xhat
//   n = gain * xhat, with forward's bits, where it is asked for
// Warp w of a block takes rows begin + w, begin + w + warps, .. of the block's; each sums dgain by itself, and the
// block leaves the sum over its warps in partial[block]. dx may be dn or a residual: a lane reads what it writes before
// it does.
template <class Act, int N, int P>
__global__ void __launch_bounds__(32 * backward_warps, P > 0 ? 2 : 1)
    rmsnorm_backward_kernel(Act* dx,               // (rows,D), stride apart
                            float* partial,        // (blocks,D)
                            Act* n,                // (rows,D), or null
                            const Act* dn,         // (rows,D)
                            const Act* x,          // (rows,D), stride apart
                            const float* rstd,     // (rows)
                            const Act* gain,       // (D)
                            const Act* residual,   // (rows,D), stride apart, or null
                            const Act* residual2,  // the same
                            int64_t rows, int64_t D, int64_t stride, int64_t rows_of_block) {
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  float *sums = shared<float>(), *mine = sums + warp * D;
  float own[P > 0 ? P : 1][N] = {};  // sums of dgain
  if constexpr (P == 0)
    for_packs<N, P>(D, [&](int, int64_t j) {
      for (int e = 0; e < N; e++) mine[j + e] = 0;
    });
  const RowPacks<Act, N, P> by(gain, D);
  const int64_t begin = blockIdx.x * rows_of_block, end = min(rows, begin + rows_of_block);
  for (int64_t r = begin + warp; r < end; r += warps) {
    const float scale = rstd[r];
    const RowPacks<Act, N, P> d(dn + r * D, D), at(x + r * stride, D);
    float sum = 0;
    for_packs<N, P>(D, [&](int i, int64_t j) {
      const auto d_j = d.at(i, j), by_j = by.at(i, j), x_j = at.at(i, j);
#pragma unroll
      for (int e = 0; e < N; e++) sum += to_float(d_j.at[e]) * to_float(by_j.at[e]) * to_float(x_j.at[e]);
    });
    const float mean = warp_sum(sum) * scale / static_cast<float>(D);
    for_packs<N, P>(D, [&](int i, int64_t j) {
      const auto d_j = d.at(i, j), by_j = by.at(i, j), x_j = at.at(i, j);
      Pack<Act, N> one{}, two{}, out, again;
      if (residual) one = load_pack<N>(residual + r * stride + j);
      if (residual2) two = load_pack<N>(residual2 + r * stride + j);
#pragma unroll
      for (int e = 0; e < N; e++) {
        const float xhat = to_float(x_j.at[e]) * scale, slope = to_float(d_j.at[e]) * xhat;
        if constexpr (P > 0) own[i][e] += slope;
        else mine[j + e] += slope;
        out.at[e] = from_float<Act>((residual ? to_float(one.at[e]) : 0.0f) + (residual2 ? to_float(two.at[e]) : 0.0f) +
                                    scale * (to_float(d_j.at[e]) * to_float(by_j.at[e]) - xhat * mean));
        again.at[e] = from_float<Act>(to_float(by_j.at[e]) * to_float(x_j.at[e]) * scale);
      }
      store_pack(dx + r * stride + j, out);
      if (n) store_pack(n + r * D + j, again);
    });
  }
  if constexpr (P > 0)
    for_packs<N, P>(D, [&](int i, int64_t j) {
#pragma unroll
      for (int e = 0; e < N; e++) mine[j + e] = own[i][e];
    });
  __syncthreads();
  for (int64_t j = threadIdx.x; j < D; j += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += sums[w * D + j];
    partial[blockIdx.x * D + j] = sum;
  }
}

// dgain += sum over blocks of partial (blocks,D): a warp for each column
__global__ void rmsnorm_backward_gain_kernel(float* dgain,          // (D)
                                             const float* partial,  // (blocks,D)
                                             int64_t blocks, int64_t D) {
  const int64_t j = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  if (j >= D) return;
  float sum = 0;
  for (int64_t i = threadIdx.x % 32; i < blocks; i += 32) sum += partial[i * D + j];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) dgain[j] += sum;
}

}  // namespace

template <class Act>
void Gpu<Act>::rmsnorm_forward(Act* out, float* rstd, const Act* x, const Act* gain, int64_t rows, int64_t D,
                               int64_t stride, double eps) {
  with_width<Act>({D, stride}, [&](auto N) {
    with_packs<N>(D, [&](auto P) {
      launch_as({.early = rows <= few_rows}, "RMSNorm", stream_, rmsnorm_forward_kernel<Act, N, P>,
                ceil_div(rows * 32, forward_threads), forward_threads, 0, out, rstd, x, gain, rows, D, stride,
                static_cast<float>(eps));
    });
  });
}

template <class Act>
void Gpu<Act>::rmsnorm_backward(const RmsnormBackward<Act, Act, float, float>& a, int64_t rows, int64_t D,
                                int64_t stride) {
  if (rows == 0) return;
  const int64_t row_bytes = D * static_cast<int64_t>(sizeof(float));
  const int64_t most_shared_bytes = 96 << 10;  // what every card has
  if (row_bytes > most_shared_bytes)
    throw Error(str("the GPU's norms take rows of up to ", most_shared_bytes / 4, " columns, found ", D,
                    ": use a smaller --width, or --device cpu"));
  const int64_t warps = std::min<int64_t>(backward_warps, most_shared_bytes / row_bytes),
                rows_of_block = std::max(warps, ceil_div(rows, backward_blocks)),
                blocks = ceil_div(rows, rows_of_block);
  float* partial = scratch<float>(blocks * D);  // (blocks,D)
  with_width<Act>({D, stride}, [&](auto N) {
    with_packs<N>(D, [&](auto P) {
      launch("RMSNorm, backward", stream_, rmsnorm_backward_kernel<Act, N, P>, blocks, static_cast<int>(32 * warps),
             warps * row_bytes, a.dx, partial, a.n, a.dn, a.x, a.rstd, a.gain, a.residual, a.residual2, rows, D, stride,
             rows_of_block);
    });
  });
  launch("RMSNorm, gradient of the gain", stream_, rmsnorm_backward_gain_kernel, ceil_div(D, 8), 256, 0, a.dgain,
         partial, blocks, D);
}

GCA_BOTH_TYPES(rmsnorm_forward);
GCA_BOTH_TYPES(rmsnorm_backward);

}  // namespace gca
