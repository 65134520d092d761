// Embedding: rows of E by token, and the gradient as sums over each token's rows. The rows are sorted by token,
// integers only, and cut into stretches of one length, so that a token that is everywhere costs no more than others and
// the order of every sum is fixed.
//
//   sorted rows   | a a a b b | b b b b b | b c c d e |   stretches, a block each; a thread takes columns
//   partial               b: out   b: in       b: in      sums of tokens that reach over an end, joined in order
#include <algorithm>

#include "gca_kernels.cuh"
#include "kernels/buckets.cuh"

namespace gca {
namespace {

template <class Act, int N>
__global__ void embedding_forward_kernel(Act* x,                // (rows,D)
                                         const int32_t* token,  // (rows)
                                         const Act* E,          // (V,D)
                                         int64_t rows, int64_t D) {
  let_next_begin();
  const int64_t packs = D / N;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * packs;
       i += gridDim.x * int64_t{blockDim.x}) {
    const int64_t r = i / packs, j = i % packs * N;
    store_pack(x + r * D + j, load_pack<N>(E + token[r] * D + j));
  }
}

// A stretch of `length` sorted rows. Tokens whose rows all lie inside are added to dE. A token that reaches in from the
// stretch before leaves its sum in partial[stretch][0]; one that begins here and reaches out, in partial[stretch][1].
struct SortedRows {
  const int32_t *token, *order;  // (rows)
  int64_t rows, length;
  __device__ int32_t operator()(int64_t i) const { return token[order[i]]; }
  // One token on both sides of i.
  __device__ bool cut(int64_t i) const { return i > 0 && i < rows && (*this)(i - 1) == (*this)(i); }
};
// dE (V,D), partial (stretches,2,D), dx (rows,D)
template <class Act>
__global__ void embedding_backward_stretch_kernel(float* dE,       // (V,D)
                                                  float* partial,  // (stretches,2,D)
                                                  const Act* dx,   // (rows,D)
                                                  SortedRows sorted, int64_t D) {
  const int64_t begin = blockIdx.x * sorted.length, end = min(begin + sorted.length, sorted.rows);
  const bool reaches_in = sorted.cut(begin), reaches_out = sorted.cut(end);
  for (int64_t j = threadIdx.x; j < D; j += blockDim.x) {
    float sum = 0;
    bool first = true;  // still in the stretch's first token
    for (int64_t i = begin; i < end; i++) {
      sum += to_float(dx[sorted.order[i] * D + j]);
      if (i + 1 < end && sorted.cut(i + 1)) continue;
      if (first && reaches_in) partial[2 * blockIdx.x * D + j] = sum;
      else if (i + 1 == end && reaches_out) partial[(2 * blockIdx.x + 1) * D + j] = sum;
      else dE[sorted(i) * D + j] += sum;
      sum = 0;
      first = false;
    }
  }
}
// The tokens that begin in a stretch and reach out of it: their sums in order of stretches.
__global__ void embedding_backward_join_kernel(float* dE,             // (V,D)
                                               const float* partial,  // (stretches,2,D)
                                               SortedRows sorted, int64_t D) {
  const int64_t begin = blockIdx.x * sorted.length, end = min(begin + sorted.length, sorted.rows);
  if (!sorted.cut(end)) return;
  const int32_t id = sorted(end);
  if (sorted(begin) == id && sorted.cut(begin)) return;  // it began earlier
  for (int64_t j = threadIdx.x; j < D; j += blockDim.x) {
    float sum = partial[(2 * blockIdx.x + 1) * D + j];
    for (int64_t stretch = blockIdx.x + 1, at = end; at < sorted.rows && sorted.cut(at) && sorted(at) == id;
         stretch++, at += sorted.length)
      sum += partial[2 * stretch * D + j];
    dE[id * D + j] += sum;
  }
}

}  // namespace

// Not launched early itself: whatever came before is done when it begins, new weights too, so that the kernels behind
// it may read them before they wait.
template <class Act>
void Gpu<Act>::embedding_forward(Act* x, const int32_t* token, const Act* E, int64_t rows, int64_t D) {
  with_width<Act>({D}, [&](auto N) {
    launch("embedding", stream_, embedding_forward_kernel<Act, N>,
           std::min(ceil_div(rows * (D / N), 256), int64_t{16} * processors_), 256, 0, x, token, E, rows, D);
  });
}

template <class Act>
void Gpu<Act>::embedding_backward(float* dE, const Act* dx, const int32_t* token, int64_t rows, int64_t D) {
  if (rows == 0) return;
  // Working memory: the rows' order, twice, and two partial sums a stretch.
  int32_t *order = scratch<int32_t>(2 * rows), *other = order + rows;
  const int64_t order_bytes = round_up(2 * rows * static_cast<int64_t>(sizeof(int32_t)), alignment_bytes);
  const int64_t stretches_at_most = (scratch_bytes - order_bytes) / (2 * D * static_cast<int64_t>(sizeof(float)));
  const int64_t length = std::max<int64_t>(32, ceil_div(rows, std::max<int64_t>(1, stretches_at_most))),
                stretches = ceil_div(rows, length);
  float* partial = scratch<float>(2 * stretches * D, order_bytes);
  // Sorted by eight bits at a time, the lowest first; ids have 24 bits at most.
  for (int shift = 0; shift < 24; shift += 8) {
    launch("sorting tokens", stream_, fill_buckets_kernel, 256, bucket_threads, 0, nullptr, order,
           BucketKeys{token, shift ? other : nullptr, shift, 255, rows}, 256, 0);
    std::swap(order, other);
  }
  const SortedRows sorted{token, other, rows, length};
  launch("gradient of the embedding", stream_, embedding_backward_stretch_kernel<Act>, stretches, 256, 0, dE, partial,
         dx, sorted, D);
  launch("gradient of the embedding, tokens of many rows", stream_, embedding_backward_join_kernel, stretches, 256, 0,
         dE, partial, sorted, D);
}

GCA_BOTH_TYPES(embedding_forward);
GCA_BOTH_TYPES(embedding_backward);

}  // namespace gca
