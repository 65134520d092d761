// What the three attentions, and the retrieval, share on both their paths: tiles of 64 slots, which heads a path
// takes, and the choice. kernels/OP.cu checks, chooses and launches; kernels/plain/ has the kernels for every type and
// shape, to be read first; kernels/mma/ those on tensor cores.
#pragma once
#include <cstdlib>

#include "kernels/device.cuh"

namespace gca {

constexpr int tile_size = 64;  // slots, or columns, of a tile
GCA_HD constexpr int tiles_of(int64_t n) { return static_cast<int>((n + tile_size - 1) / tile_size); }
__device__ inline float attention_scale(int d) { return 1 / sqrtf(static_cast<float>(d)); }

// The switch between the two paths of all attentions and of the retrieval: GCA_PLAIN_ATTENTION=1 in the environment
// takes the plain kernels where tensor cores would be used too. Read at every call, so that tests run both in one
// process.
inline bool plain_attention() {
  const char* value = std::getenv("GCA_PLAIN_ATTENTION");
  return value && *value && *value != '0';
}
// Whether heads of d bf16 columns can take tensor cores.
constexpr bool mma_head(int d) { return d == 32 || d == 64 || d == 128; }
inline void check_head(int d) {
  if (d < 2 || d > 256 || d % 2)
    throw Error(str("the GPU's attention takes heads of 2 to 256 columns, an even number, found ", d,
                    ": change --heads or --width, or use --device cpu"));
}

}  // namespace gca
