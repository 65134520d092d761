// What every kernel file shares: checked calls and launches, the types of activations, vector access, sums over warps
// and blocks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <source_location>
#include <utility>

#include "ops.h"

namespace gca {

using bf16 = __nv_bfloat16;

// An op of Gpu that is defined here, compiled for both types of activations.
#define GCA_BOTH_TYPES(op) \
  [[gnu::used]] static const auto op##_of_both_types = std::pair(&Gpu<float>::op, &Gpu<bf16>::op)

// ---- calls and launches -------------------------------------------------------------------------------------------
// What is being done, and where in the source: made from the words at the place of the call.
struct Doing {
  const char* what;
  std::source_location where;
  Doing(const char* what_, std::source_location where_ = std::source_location::current())
      : what(what_), where(where_) {}
};
// Throws an Error with place, deed, CUDA's words and a hint.
void check(cudaError_t result, const Doing& doing);

// How a kernel is launched where it differs from kernel after kernel.
struct LaunchKind {
  bool early = false;  // see launch_early
  int cluster = 1;     // blocks that run together and see each other's shared memory
};
// Whether the kernels that run here were compiled for compute capability 9.0, which has early launches and clusters.
bool compiled_for_hopper();
// The same and GCA_EARLY_LAUNCH in the environment is not 0, so that both ways can be timed.
bool launches_early();

// Puts kernel(arguments) on the stream: `blocks` blocks (nothing for 0) of `threads`, with shared_bytes of dynamic
// shared memory.
template <class... Parameters, class... Arguments>
void launch_as(const LaunchKind& kind, const Doing& doing, cudaStream_t stream, void (*kernel)(Parameters...),
               int64_t blocks, int threads, int64_t shared_bytes, Arguments&&... arguments) {
  if (blocks == 0) return;
  GCA_CHECK(blocks > 0 && blocks <= INT32_MAX, doing.what, ": a grid of ", blocks,
            " blocks; use a smaller --micro-batch or --chunks");
  // More than 48 KB has to be asked for, counting what a kernel declares by itself beside it (these: less than 1 KB).
  if (shared_bytes > 47 << 10)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          doing);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (kind.early && launches_early()) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (kind.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(kind.cluster), 1, 1};
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), doing);
}
template <class... Parameters, class... Arguments>
void launch(const Doing& doing, cudaStream_t stream, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int64_t shared_bytes, Arguments&&... arguments) {
  launch_as({}, doing, stream, kernel, blocks, threads, shared_bytes, std::forward<Arguments>(arguments)...);
}

// ---- early launches -----------------------------------------------------------------------------------------------
// A kernel of launch_early() may begin before the one ahead of it on the stream is done, as soon as all blocks of that
// one have begun and called let_next_begin() (or are done). Till wait_for_earlier() returns it may therefore read only
// what was there before the last ordinary launch or copy (weights, uploaded addresses), and write nothing. All its
// threads call that, so that whoever waits for this kernel waits for all before it. Elsewhere both do nothing.
constexpr int64_t few_rows = 16;  // up to so many, as decoding has them, an op takes no longer than its launch
template <class... Parameters, class... Arguments>
void launch_early(const Doing& doing, cudaStream_t stream, void (*kernel)(Parameters...), int64_t blocks, int threads,
                  Arguments&&... arguments) {
  launch_as({.early = true}, doing, stream, kernel, blocks, threads, 0, std::forward<Arguments>(arguments)...);
}
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The slot that a row stands at, not from the first cache: addresses beside it are read before the kernel that counts
// slots is done.
template <class Act>
__device__ int64_t slot_of(const SlotRow<Act, float>& row) {
  return __ldcg(&row.slot);
}

// ---- numbers ------------------------------------------------------------------------------------------------------
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class Act>
__device__ inline Act from_float(float x) {
  if constexpr (std::is_same_v<Act, bf16>) return __float2bfloat16(x);
  else return x;
}

// N neighbours, read and written as one piece of memory; wide<Act> of them are 16 bytes.
template <class Act, int N>
struct alignas(N * sizeof(Act)) Pack {
  Act at[N];
};
template <class Act>
inline constexpr int wide = 16 / sizeof(Act);
template <int N, class Act>
__device__ inline Pack<Act, N> load_pack(const Act* from) {
  return *reinterpret_cast<const Pack<Act, N>*>(from);
}
template <int N, class Act>
__device__ inline void store_pack(Act* to, const Pack<Act, N>& pack) {
  *reinterpret_cast<Pack<Act, N>*>(to) = pack;
}

// Calls body with the number of neighbours to take at once, a constant: wide<Act> where every size (a row's length or
// stride, in elements) is a multiple of it, otherwise 1. Arrays start at multiples of 16 bytes or are shifted by such
// sizes.
template <class Act, class Body>
void with_width(std::initializer_list<int64_t> sizes, Body&& body) {
  for (int64_t size : sizes)
    if (size % wide<Act>) return body(std::integral_constant<int, 1>{});
  body(std::integral_constant<int, wide<Act>>{});
}

// A block's dynamic shared memory.
template <class T>
__device__ inline T* shared() {
  extern __shared__ float4 shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

// ---- sums, in a fixed order ---------------------------------------------------------------------------------------
// Over the lanes of a warp, or of each aligned part of `lanes` of it; all lanes get the result.
template <int lanes = 32, class T>
__device__ inline T warp_sum(T x) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
template <int lanes = 32>
__device__ inline float warp_max(float x) {
  for (int step = lanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
// Over a block of whole warps; all threads get the result. Every thread must call it.
template <class T>
__device__ inline T block_sum(T x) {
  __shared__ T of_warp[32];
  const int warps = static_cast<int>(blockDim.x) / 32;
  x = warp_sum(x);
  __syncthreads();  // the last call's numbers have been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < warps; i++) x += of_warp[i];
  return x;
}

}  // namespace gca
