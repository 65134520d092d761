// Sliding-window attention on tensor cores: bf16, heads of 32, 64 or 128 columns.
// A block of 4 warps owns `rows` slots of one head, each warp 16 * blocks of them as the rows of its products, and
// streams the other side through a ring of `stages` pairs of tiles of 64 slots. Inside a tile a warp works on `step`
// slots at a time and leaves out steps that none of its rows sees. Slots are counted from the block's first, `base`.
// Logits are in units of log2.
#pragma once
#include "kernels/mma/mma.cuh"
#include "kernels/sliding_attention.cuh"

namespace gca {

constexpr int window_warps = 4, window_threads = 32 * window_warps;

// residents: blocks of a multiprocessor at once, which sets the registers of a thread; kept: the rows' own operands
// stay in registers instead of being read from shared memory at each step. Chosen by measurement on an H100, heads
// of 64.
template <int d_, int blocks_, int step_, int stages_, int residents_, bool kept_>
struct WindowPlan {
  static constexpr int d = d_, blocks = blocks_, step = step_, stages = stages_, residents = residents_;
  static constexpr bool kept = kept_;
  static_assert(step >= 16 * blocks, "a row sees a key, itself, in the first step that its warp takes");
  static constexpr int rows = 16 * blocks * window_warps, rows_bytes = rows * row_bytes<d>,
                       tile_bytes = tile_size * row_bytes<d>;
  static constexpr int ring_bytes = stages * 2 * tile_bytes;
};
// A block's head and first slot; heads go fastest, so that what lies side by side in memory is read at about the same
// time.
struct WindowPiece {
  int64_t b, base;
  int h;
  __device__ WindowPiece(const SlidingRows<bf16>& w, int rows) {
    const int64_t first = w.first_slot / rows, pieces = (w.first_slot + w.T + rows - 1) / rows - first;
    const int64_t i = blockIdx.x / w.H;
    h = static_cast<int>(blockIdx.x % w.H);
    base = (first + i % pieces) * rows;
    b = i / pieces;
  }
};
inline int64_t window_pieces(const SlidingRows<bf16>& w, int rows) {
  return w.B * w.H * (ceil_div(w.first_slot + w.T, rows) - w.first_slot / rows);
}

// What a thread knows of its rows' and columns' places in a step.
template <int blocks>
struct WindowRows {
  int warp_row, lane_row, lane_column;
  __device__ WindowRows()
      : warp_row(static_cast<int>(threadIdx.x) / 32 * 16 * blocks),
        lane_row(lane_id() / 4),
        lane_column(lane_id() % 4 * 2) {}
  __device__ int row(int i, int half) const { return warp_row + 16 * i + 8 * half + lane_row; }
  __device__ int end() const { return warp_row + 16 * blocks; }
};

// Starts copying rows 0 .. rows - 1 of one head, `stride` elements apart from `from` on, into a tile; rows from `there`
// (1 or more) on become zero.
template <int d, int rows>
__device__ inline void copy_rows(uint32_t tile, const bf16* from, int stride, int there) {
  if (there >= rows) copy_tile_async<d, rows, window_threads>(tile, from, stride);
  else copy_tile_async<d, rows, window_threads>(tile, from, stride, there);
}
// The same of a segment's slots from `slot` on: columns `column`.. of q|k|v, before first_slot columns ring_column.. of
// the ring (-1: none).
template <int d, int rows>
__device__ inline void copy_from_ring(uint32_t tile, const SlidingRows<bf16>& w, int64_t b, int64_t slot,
                                      int64_t column, int64_t ring_column) {
  const int64_t D = w.D(), end = w.first_slot + w.T;
  for (int i = static_cast<int>(threadIdx.x); i < rows * d / 8; i += window_threads) {
    const int row = i / (d / 8), piece = i % (d / 8);
    const int64_t j = slot + row;
    const bf16* from = nullptr;
    if (j >= w.first_slot && j < end) from = w.qkv + (b * w.T + j - w.first_slot) * 3 * D + column;
    else if (j < w.first_slot && w.ring && ring_column >= 0 && j >= w.first_slot - w.W)
      from = w.ring + (b * w.W + j % w.W) * 2 * D + ring_column;
    copy_async(tile + piece_at<d>(row, piece), from ? from + piece * 8 : w.qkv, from);
  }
}

// Logits of pairs that do not see each other become minus infinity. The rows are queries and the columns keys, or the
// other way round; `first` is the first column's place.
template <bool rows_are_keys, int blocks, int columns>
__device__ inline void hide(Sum (&p)[blocks][columns], const WindowRows<blocks>& my, int first, int W) {
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int c = 0; c < columns; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int ahead = my.row(i, e / 2) - (first + my.lane_column + 8 * c + e % 2);
        if (static_cast<unsigned>(rows_are_keys ? -ahead : ahead) > static_cast<unsigned>(W)) p[i][c][e] = -INFINITY;
      }
}
template <int blocks, int columns>
__device__ inline void scale_sums(Sum (&sum)[blocks][columns], float factor) {
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int j = 0; j < columns; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[i][j][e] *= factor;
}

}  // namespace gca
