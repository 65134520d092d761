// Cross entropy of a row of logits and, in place, its gradient; and the sums of a step's losses.
// A block of 512 threads takes a row, N neighbours a thread, twice. Shared memory: a maximum and a sum of each of the
// 16 warps (128 bytes), read by all after the barrier; the sums of losses: see block_sum.
#include "gca_kernels.cuh"
#include "kernels/device.cuh"

namespace gca {
namespace {

constexpr int row_threads = 512;

// A maximum and the sum of e^(x - maximum), of what was seen.
struct Exponentials {
  float top, sum;
  __device__ void add(float x) {
    if (x > top) {
      sum = sum * expf(top - x) + 1;
      top = x;
    } else if (x != -INFINITY) sum += expf(x - top);  // also where x is not a number
  }
  __device__ void add(Exponentials other) {
    const float both = fmaxf(top, other.top);
    if (both != -INFINITY) {
      sum = sum * expf(top - both) + other.sum * expf(other.top - both);
      top = both;
    } else sum += other.sum;
  }
};

// A block takes a row: one pass for the log-sum-exp, and one that writes the gradient where it is asked for.
template <class Act, int N>
__global__ void __launch_bounds__(row_threads) cross_entropy_kernel(float* loss,            // (rows)
                                                                    Act* logits,            // (rows,V), stride apart
                                                                    const int32_t* target,  // (rows)
                                                                    const float* weight,    // (rows) or null
                                                                    float scale, int64_t V, int64_t stride) {
  __shared__ float tops[row_threads / 32], sums[row_threads / 32];
  static_assert(sizeof tops + sizeof sums == 128);
  const int64_t r = blockIdx.x;
  const int32_t wanted = target[r];
  Act* row = logits + r * stride;
  if (wanted < 0) {
    if (threadIdx.x == 0) loss[r] = 0;
    if (scale != 0)
      for (int64_t j = threadIdx.x * N; j < stride; j += row_threads * N) store_pack(row + j, Pack<Act, N>{});
    return;
  }
  Exponentials all{-INFINITY, 0};
  for (int64_t j = threadIdx.x * N; j < V; j += row_threads * N) {
    const auto pack = load_pack<N>(row + j);
#pragma unroll
    for (int e = 0; e < N; e++)
      if (j + e < V) all.add(to_float(pack.at[e]));
  }
  for (int step = 16; step > 0; step /= 2)
    all.add({__shfl_xor_sync(0xffffffffu, all.top, step), __shfl_xor_sync(0xffffffffu, all.sum, step)});
  if (threadIdx.x % 32 == 0) {
    tops[threadIdx.x / 32] = all.top;
    sums[threadIdx.x / 32] = all.sum;
  }
  __syncthreads();
  all = {tops[0], sums[0]};
  for (int w = 1; w < row_threads / 32; w++) all.add({tops[w], sums[w]});
  const float lse = all.top + logf(all.sum);
  if (threadIdx.x == 0) loss[r] = lse - to_float(row[wanted]);
  if (scale == 0) return;
  __syncthreads();  // the target's logit has been read
  const float factor = scale * (weight ? weight[r] : 1.0f);
  for (int64_t j = threadIdx.x * N; j < stride; j += row_threads * N) {
    auto pack = load_pack<N>(row + j);
#pragma unroll
    for (int e = 0; e < N; e++) {
      const float probability = j + e < V ? expf(to_float(pack.at[e]) - lse) : 0.0f;
      pack.at[e] = from_float<Act>(factor * (j + e == wanted ? probability - 1 : probability));
    }
    store_pack(row + j, pack);
  }
}

__global__ void add_loss_kernel(StepState* state,     // (1)
                                const float* loss,    // (rows)
                                const float* weight,  // (rows) or null
                                double scale, int64_t rows) {
  double sum = 0, plain = 0;
  for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) {
    sum += static_cast<double>(loss[r]) * (weight ? static_cast<double>(weight[r]) : 1.0);
    plain += static_cast<double>(loss[r]);
  }
  sum = block_sum(sum);
  plain = block_sum(plain);
  if (threadIdx.x == 0) {
    state->loss += scale * sum;
    state->plain_loss += scale * plain;
  }
}

}  // namespace

template <class Act>
void Gpu<Act>::cross_entropy(float* loss, Act* logits, const int32_t* target, const float* weight, double scale,
                             int64_t rows, int64_t V, int64_t stride) {
  with_width<Act>({stride}, [&](auto N) {
    launch("cross entropy", stream_, cross_entropy_kernel<Act, N>, rows, row_threads, 0, loss, logits, target, weight,
           static_cast<float>(scale), V, stride);
  });
}

void GpuDevice::add_loss(StepState* state, const float* loss, const float* weight, double scale, int64_t rows) {
  launch("the sum of losses", stream_, add_loss_kernel, 1, 1024, 0, state, loss, weight, scale, rows);
}

GCA_BOTH_TYPES(cross_entropy);

}  // namespace gca
