// Grouped cross attention (drt.md): forward, backward by query, and backward for the chunk memory over all layers at
// once. What the passes do stands in plain/gca.cuh, for any type and shape, and how fast in mma/gca.cu, on tensor
// cores; here are the checks, the choice and what serves both.
#include <algorithm>

#include "gca_kernels.cuh"
#include "kernels/gca.cuh"

namespace gca {
namespace {

// dw += sum over heads and slots of delta: a warp for each pick
__global__ void gca_weight_gradient_kernel(float* dw,            // (B,C+1,K)
                                           const float* delta,   // (B,C,K,H,S)
                                           const int32_t* pick,  // (B,C+1,K)
                                           GcaShape s) {
  const int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32, C = s.chunks();
  if (i >= s.B * C * s.K) return;
  const int64_t k = i % s.K, c = i / s.K % C, b = i / s.K / C, place = s.table().serving(b, c, k);
  if (pick[place] < 0) return;
  const float* from = delta + gca_stat(s, b, c, static_cast<int>(k), 0);
  float sum = 0;
  for (int64_t j = threadIdx.x % 32; j < static_cast<int64_t>(s.H) * s.S; j += 32) sum += from[j];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) dw[place] += sum;
}

// The list of layers, put into the GPU's memory as arguments of a kernel: copied from the host it could not be reused
// on return.
constexpr int layers_at_once = 64;  // 3.5 KB of the 4 KB that arguments may take
template <class Act>
struct SomeLayers {
  FetchingLayer<Act, float> at[layers_at_once];
};
template <class Act>
__global__ void gca_put_layers_kernel(FetchingLayer<Act, float>* to,  // (n)
                                      SomeLayers<Act> layers, int n) {
  for (int i = 0; i < n; i++) to[i] = layers.at[i];
}

void check_shape(const GcaShape& s) {
  check_head(s.d);
  if (s.S < 2 || s.S > 2 * tile_size)
    throw Error(
        str("the GPU fetches chunks of 2 to 128 slots, found ", s.S, ": use a smaller --chunk, or --device cpu"));
  GCA_CHECK(s.K >= 1 && s.K <= max_topk, "1 to ", max_topk, " chunks are fetched, found ", s.K);
}
// Whether a call in bf16 takes tensor cores.
bool takes_mma(const GcaShape& s) { return s.S == tile_size && mma_head(s.d) && !plain_attention(); }

}  // namespace

template <class Act>
void Gpu<Act>::zero_landmarks(Act* kv, int64_t N, int64_t S, int64_t D) {
  if (N == 0) return;
  const size_t width_bytes = static_cast<size_t>(2 * D) * sizeof(Act);
  check(cudaMemset2DAsync(kv + (S - 1) * 2 * D, static_cast<size_t>(S) * width_bytes, 0, width_bytes,
                          static_cast<size_t>(N), stream_),
        "clearing landmarks' keys and values");
}

template <class Act>
void Gpu<Act>::gca_forward(Act* out, float* lse, const Act* q, const Act* kv, const int32_t* pick, const float* w,
                           const GcaShape& s) {
  check_shape(s);
  if constexpr (std::is_same_v<Act, bf16>)
    if (takes_mma(s)) return gca_forward_mma(stream_, out, lse, q, kv, pick, w, s);
  gca_forward_plain(stream_, out, lse, q, kv, pick, w, s);
}

template <class Act>
void Gpu<Act>::gca_backward_query(const GcaBackward<Act, float>& a, const GcaShape& s) {
  GCA_CHECK(s.first_slot == 0 && s.T % s.S == 0, "backward takes whole rows");
  check_shape(s);
  bool done = false;
  if constexpr (std::is_same_v<Act, bf16>)
    if (takes_mma(s)) {
      gca_backward_query_mma(stream_, a, s);
      done = true;
    }
  if (!done) gca_backward_query_plain(stream_, a, s);
  launch("gradient of the picks' weights", stream_, gca_weight_gradient_kernel, ceil_div(s.B * s.chunks() * s.K, 8),
         256, 0, a.dw, a.delta, a.pick, s);
}

template <class Act>
void Gpu<Act>::gca_backward_memory(Act* dkv, const FetchingLayer<Act, float>* layers, int n_layers, const Act* kv,
                                   const GcaShape& s) {
  GCA_CHECK(s.first_slot == 0 && s.T % s.S == 0 && s.M == s.chunks(), "backward takes whole rows");
  check_shape(s);
  FetchingLayer<Act, float>* table = scratch<FetchingLayer<Act, float>>(n_layers);
  for (int first = 0; first < n_layers; first += layers_at_once) {
    const int count = std::min(layers_at_once, n_layers - first);
    SomeLayers<Act> some{};
    std::copy_n(layers + first, count, some.at);
    launch("the list of fetching layers", stream_, gca_put_layers_kernel<Act>, 1, 1, 0, table + first, some, count);
  }
  if constexpr (std::is_same_v<Act, bf16>)
    if (takes_mma(s)) {
      const int64_t used = round_up(n_layers * static_cast<int64_t>(sizeof *table), 16);
      return gca_backward_memory_mma(stream_, dkv, table, n_layers, kv, s, scratch<char>(0, used),
                                     scratch_bytes - used);
    }
  gca_backward_memory_plain(stream_, dkv, table, n_layers, kv, s);
}

GCA_BOTH_TYPES(zero_landmarks);
GCA_BOTH_TYPES(gca_forward);
GCA_BOTH_TYPES(gca_backward_query);
GCA_BOTH_TYPES(gca_backward_memory);

}  // namespace gca
