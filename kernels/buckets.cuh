// Integers laid into buckets in their order, the same on every run: what turns pick tables round and sorts tokens.
//
//   keys       0 - 0 1 0 1 0 1     a block a bucket, here bucket 0: none lies below, four are its own
//   order      0 2 4 6 | 3 5 7     start  0 4
//   256 places at a time: each warp votes (ballot) and leaves its count, 8 ints of shared memory, between two barriers;
//   a place goes behind those of earlier stretches, of earlier warps, of lower lanes
#pragma once
#include "kernels/device.cuh"

namespace gca {

// Place i of n has the key (key[from[i]] >> shift) & mask; keys past the buckets (-1) belong to none.
struct BucketKeys {
  const int32_t *key, *from;  // key: see key_stride below; from (n) or null: the identity
  int shift;
  uint32_t mask;
  int64_t n;
  __device__ int32_t source(int64_t i) const { return from ? from[i] : static_cast<int32_t>(i); }
  __device__ uint32_t operator()(int64_t i) const { return static_cast<uint32_t>(key[source(i)]) >> shift & mask; }
};

// For each row of keys, `buckets` blocks: block d writes start[d] = number of keys below d, and order[start[d] ..] =
// source(i) of the places i with key d, in order. start (rows,buckets) or null, order (rows,n), the rows of keys
// key_stride apart.
constexpr int bucket_threads = 256;
static __global__ void fill_buckets_kernel(int32_t* start,  // (rows,buckets) or null
                                           int32_t* order,  // (rows,n)
                                           BucketKeys keys, int64_t buckets, int64_t key_stride) {
  __shared__ int found_by_warp[bucket_threads / 32];
  const int64_t row = blockIdx.x / buckets;
  const uint32_t bucket = static_cast<uint32_t>(blockIdx.x % buckets);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  keys.key += row * key_stride;
  int32_t below = 0, equal = 0;
  for (int64_t i = threadIdx.x; i < keys.n; i += bucket_threads) {
    below += keys(i) < bucket;
    equal += keys(i) == bucket;
  }
  below = block_sum(below);
  equal = block_sum(equal);
  if (start && threadIdx.x == 0) start[row * buckets + bucket] = below;
  int32_t* next = order + row * keys.n + below;
  for (int64_t first = 0; equal > 0; first += bucket_threads) {
    const int64_t i = first + threadIdx.x;
    const bool mine = i < keys.n && keys(i) == bucket;
    const uint32_t votes = __ballot_sync(0xffffffffu, mine);
    if (threadIdx.x % 32 == 0) found_by_warp[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << threadIdx.x % 32) - 1)), found = 0;
    for (int w = 0; w < bucket_threads / 32; w++) {
      if (w < warp) before += found_by_warp[w];
      found += found_by_warp[w];
    }
    if (mine) next[before] = keys.source(i);
    next += found;
    equal -= found;
    __syncthreads();
  }
}

}  // namespace gca
