// The optimiser (drt.md): the norm of all gradients, the flag that makes a step change nothing, and AdamW with
// decoupled decay. A block takes 4,096 neighbours of one segment, a thread every 256th of them; no order to keep, but
// for the norm: 1,024 blocks, whose sums of squares one block adds up (block_sum).
#include <algorithm>

#include "gca_kernels.cuh"
#include "kernels/device.cuh"

namespace gca {
namespace {

__global__ void begin_step_kernel(StepState* state) {  // (1)
  state->loss = state->plain_loss = state->squares = state->stop = state->broken = state->broken_rank = 0;
}
__global__ void tell_broken_kernel(StepState* state,  // (1)
                                   double rank) {
  if (isfinite(state->loss)) return;
  state->broken = 1;
  state->broken_rank = rank;
}

constexpr int64_t norm_blocks = 1024;  // fixed: on every card the sum is made in the same order

__global__ void gradient_squares_kernel(double* partial,        // (norm_blocks)
                                        const float* gradient,  // (n)
                                        int64_t n) {
  double sum = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += gridDim.x * int64_t{blockDim.x}) {
    const double g = gradient[i];
    sum += g * g;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void add_squares_kernel(StepState* state,         // (1)
                                   const double* partial) {  // (norm_blocks)
  const double total = block_sum(partial[threadIdx.x]);
  if (threadIdx.x == 0) state->squares += total;
}

__global__ void end_gradient_kernel(StepState* state,  // (1)
                                    double clip) {
  finish_gradient(*state, clip);
}

// Segments as arguments of a kernel, each cut into blocks of block_size elements.
constexpr int segments_at_once = 96, block_size = 4096, adamw_threads = 256;
struct SomeSegments {
  struct {
    int64_t offset, size;
    int32_t first_block;
    bool decay;
  } at[segments_at_once];
  int count;
};
struct Adam {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, eps, keep;
  double lr, log_beta1, log_beta2;
};

// m = b1 m + (1-b1) g
// v = b2 v + (1-b2) g^2
// w = w (1 - lr decay) - lr mhat / (sqrt(vhat) + eps)
template <class Act>
__global__ void __launch_bounds__(adamw_threads)
    adamw_kernel(float* masters,                                       // (n)
                 Act* weights,                                         // (n)
                 float* m,                                             // (n)
                 float* v,                                             // (n)
                 const float* gradient,                                // (n)
                 const SomeSegments segments, const StepState* state,  // (1)
                 const Adam adam) {
  __shared__ float rate, correction2;
  if (state->skip) return;
  if (threadIdx.x == 0) {
    const double t = static_cast<double>(state->adam_steps);
    rate = static_cast<float>(adam.lr / -expm1(t * adam.log_beta1));
    correction2 = static_cast<float>(1 / -expm1(t * adam.log_beta2));
  }
  __syncthreads();
  const float scale = static_cast<float>(state->grad_scale);
  int i = 0;
  while (i + 1 < segments.count && segments.at[i + 1].first_block <= static_cast<int>(blockIdx.x)) i++;
  const int64_t begin = segments.at[i].offset + int64_t{blockIdx.x - segments.at[i].first_block} * block_size;
  const int64_t end = min(begin + block_size, segments.at[i].offset + segments.at[i].size);
  const float keep = segments.at[i].decay ? adam.keep : 1.0f;
  for (int64_t j = begin + threadIdx.x; j < end; j += adamw_threads) {
    const float g = gradient[j] * scale;
    const float first = adam.beta1 * m[j] + adam.one_minus_beta1 * g,
                second = adam.beta2 * v[j] + adam.one_minus_beta2 * g * g;
    const float w = masters[j] * keep - rate * first / (sqrtf(second * correction2) + adam.eps);
    m[j] = first;
    v[j] = second;
    masters[j] = w;
    if constexpr (!std::is_same_v<Act, float>) weights[j] = from_float<Act>(w);
  }
}

}  // namespace

void GpuDevice::begin_step(StepState* state) { launch("begin of a step", stream_, begin_step_kernel, 1, 1, 0, state); }

void GpuDevice::tell_broken(StepState* state, int rank) {
  launch("whether the loss is finite", stream_, tell_broken_kernel, 1, 1, 0, state, static_cast<double>(rank));
}
void GpuDevice::add_squares(StepState* state, const float* gradient, int64_t n) {
  double* partial = scratch<double>(norm_blocks);  // sums of squares
  launch("norm of the gradient", stream_, gradient_squares_kernel, norm_blocks, 256, 0, partial, gradient, n);
  launch("norm of the gradient, total", stream_, add_squares_kernel, 1, static_cast<int>(norm_blocks), 0, state,
         partial);
}
void GpuDevice::end_gradient(StepState* state, double clip) {
  launch("end of the gradient", stream_, end_gradient_kernel, 1, 1, 0, state, clip);
}

template <class Act>
void Gpu<Act>::adamw(float* masters, Act* weights, float* m, float* v, const float* gradient, const Segment* segments,
                     int64_t n_segments, const StepState* state, const AdamW& hyper) {
  const Adam adam{static_cast<float>(hyper.beta1),
                  static_cast<float>(hyper.beta2),
                  static_cast<float>(1 - hyper.beta1),
                  static_cast<float>(1 - hyper.beta2),
                  static_cast<float>(hyper.eps),
                  static_cast<float>(1 - hyper.lr * hyper.weight_decay),
                  hyper.lr,
                  std::log(hyper.beta1),
                  std::log(hyper.beta2)};
  for (int64_t first = 0; first < n_segments; first += segments_at_once) {
    SomeSegments some{};
    int64_t blocks = 0;
    some.count = static_cast<int>(std::min<int64_t>(segments_at_once, n_segments - first));
    for (int i = 0; i < some.count; i++) {
      const Segment& segment = segments[first + i];
      some.at[i] = {segment.offset, segment.size, static_cast<int32_t>(blocks), segment.decay};
      blocks += ceil_div(segment.size, block_size);
    }
    launch("AdamW", stream_, adamw_kernel<Act>, blocks, adamw_threads, 0, masters, weights, m, v, gradient, some, state,
           adam);
  }
}

GCA_BOTH_TYPES(adamw);

}  // namespace gca
