// Cross entropy of a row of logits and, in place, its gradient; and the sums of a step's losses.
//
//   a warp takes a row    short rows (to 4,096 columns with their padding): 8 rows a block
//   a block takes a row   512 threads; a row is looked at twice, and between the looks
//                         kept        it waits in shared memory, where two such blocks fit a multiprocessor: one's row
//                                     comes while the other's is written
//                         not kept    it is read again
// N neighbours a thread, the same ones at both looks, so of a kept row nobody reads another's. Where no gradient is
// asked for (scale 0) there is one look, and nothing is kept. Shared memory: a maximum and a sum of each of a block's
// 16 warps (128 bytes), read by all after the barrier; the row (stride elements), where it is kept.
#include "gca_kernels.cuh"
#include "kernels/device.cuh"

namespace gca {
namespace {

constexpr int block_threads = 512, warp_rows = 8, short_row = 4096;
// Bytes of shared memory beside a kept row: the card's own, and what a block says to itself.
constexpr int kept_beside = 2048;

// 2^x. A number of 8 bits needs no more than the card's own instruction, which is right to 22.
template <class Act>
__device__ inline float power_of_2(float x) {
  if constexpr (std::is_same_v<Act, bf16>) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
  } else {
    return exp2f(x);
  }
}
constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

// The largest x that was seen, and the sum of e^x as 2^top2 times `sum`, top2 = x log2(e): in powers of 2 an
// exponential is one multiply-add and one instruction, and this op was bound by how many there are. For that x log2(e)
// has to be a float: a finite logit beyond 2.3e38 makes the loss no number, at which the step changes nothing.
template <class Act>
struct Exponentials {
  float top2 = -INFINITY, sum = 0;
  template <int N>
  __device__ void add(const Pack<Act, N>& x) {
    float highest = to_float(x.at[0]);
#pragma unroll
    for (int e = 1; e < N; e++) highest = fmaxf(highest, to_float(x.at[e]));
    const float highest2 = fmaxf(highest * log2_e, top2);
    if (highest2 == -INFINITY) {  // all are -inf, which add nothing, or no numbers, which make the sum none
#pragma unroll
      for (int e = 0; e < N; e++) sum += to_float(x.at[e]) == -INFINITY ? 0 : to_float(x.at[e]);
      return;
    }
    if (highest2 > top2) {
      sum *= power_of_2<Act>(top2 - highest2);
      top2 = highest2;
    }
#pragma unroll
    for (int e = 0; e < N; e++) sum += power_of_2<Act>(fmaf(to_float(x.at[e]), log2_e, -top2));
  }
  __device__ void add(Exponentials other) {
    const float both = fmaxf(top2, other.top2);
    if (both != -INFINITY) {
      sum = sum * power_of_2<Act>(top2 - both) + other.sum * power_of_2<Act>(other.top2 - both);
      top2 = both;
    } else sum += other.sum;
  }
};

// `threads` threads take a row: one look for the log-sum-exp, and one that writes the gradient where it is asked for.
template <class Act, int N, int threads, bool kept>
__global__ void __launch_bounds__(threads == 32 ? 32 * warp_rows : threads, kept ? 2 : 1)
    cross_entropy_kernel(float* loss,            // (rows)
                         Act* logits,            // (rows,V), stride apart
                         const int32_t* target,  // (rows)
                         const float* weight,    // (rows) or null
                         float scale, int64_t rows, int64_t V, int64_t stride) {
  constexpr int warps = threads / 32;
  const int64_t r = threads == 32 ? blockIdx.x * int64_t{warp_rows} + threadIdx.x / 32 : blockIdx.x;
  if (r >= rows) return;
  const int first = static_cast<int>(threadIdx.x) % threads * N, V_whole = static_cast<int>(V / N * N);
  const int32_t wanted = target[r];
  Act *row = logits + r * stride, *keep = kept ? shared<Act>() : row;
  if (wanted < 0) {
    if (first == 0) loss[r] = 0;
    if (scale != 0)
      for (int64_t j = first; j < stride; j += threads * N) store_pack(row + j, Pack<Act, N>{});
    return;
  }
  const float of_wanted = to_float(row[wanted]);  // before anybody writes: a barrier follows
  Exponentials<Act> all;
#pragma unroll 4
  for (int j = first; j < V_whole; j += threads * N) {
    const auto pack = load_pack<N>(row + j);
    if constexpr (kept) store_pack(keep + j, pack);
    all.add(pack);
  }
  // The last pack may hold what is not of the vocabulary.
  if (V_whole < V && V_whole % (threads * N) == first) {
    auto pack = load_pack<N>(row + V_whole);
    if constexpr (kept) store_pack(keep + V_whole, pack);
    for (int e = 0; e < N; e++)
      if (V_whole + e >= V) pack.at[e] = from_float<Act>(-INFINITY);
    all.add(pack);
  }
  for (int step = 16; step > 0; step /= 2)
    all.add({__shfl_xor_sync(0xffffffffu, all.top2, step), __shfl_xor_sync(0xffffffffu, all.sum, step)});
  if constexpr (warps > 1) {
    __shared__ float tops[warps], sums[warps];
    if (threadIdx.x % 32 == 0) {
      tops[threadIdx.x / 32] = all.top2;
      sums[threadIdx.x / 32] = all.sum;
    }
    __syncthreads();
    all = {tops[0], sums[0]};
    for (int w = 1; w < warps; w++) all.add({tops[w], sums[w]});
  } else {
    __syncwarp();
  }
  const float lse2 = all.top2 + log2f(all.sum);  // of the log-sum-exp, in powers of 2 as well
  if (first == 0) loss[r] = fmaf(lse2, ln_2, -of_wanted);
  if (scale == 0) return;
  const float factor = scale * (weight ? weight[r] : 1.0f);
#pragma unroll 2
  for (int j = first; j < stride; j += threads * N) {
    Pack<Act, N> pack{};
    if (j < V) pack = load_pack<N>(keep + j);
    float of[N];
#pragma unroll
    for (int e = 0; e < N; e++) of[e] = power_of_2<Act>(fmaf(to_float(pack.at[e]), log2_e, -lse2));  // probability
    if (j + N > V || (wanted >= j && wanted < j + N)) {  // of the target, of the end
#pragma unroll
      for (int e = 0; e < N; e++) of[e] = j + e < V ? (j + e == wanted ? of[e] - 1 : of[e]) : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < N; e++) pack.at[e] = from_float<Act>(factor * of[e]);
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
  const int64_t row_bytes = round_up(stride * static_cast<int64_t>(sizeof(Act)), 16);
  with_width<Act>({stride}, [&](auto N) {
    const auto run = [&](auto kernel, int64_t blocks, int threads, int64_t shared_bytes) {
      launch("cross entropy", stream_, kernel, blocks, threads, shared_bytes, loss, logits, target, weight,
             static_cast<float>(scale), rows, V, stride);
    };
    if (stride <= short_row) run(cross_entropy_kernel<Act, N, 32, false>, ceil_div(rows, warp_rows), 32 * warp_rows, 0);
    else if (scale != 0 && 2 * (row_bytes + kept_beside) <= shared_of_processor_)
      run(cross_entropy_kernel<Act, N, block_threads, true>, rows, block_threads, row_bytes);
    else run(cross_entropy_kernel<Act, N, block_threads, false>, rows, block_threads, 0);
  });
}

void GpuDevice::add_loss(StepState* state, const float* loss, const float* weight, double scale, int64_t rows) {
  launch("the sum of losses", stream_, add_loss_kernel, 1, 1024, 0, state, loss, weight, scale, rows);
}

GCA_BOTH_TYPES(cross_entropy);

}  // namespace gca
