// Sliding-window attention on tensor cores: bf16, heads of 32, 64 or 128 columns.
// A block of 4 warps owns the slots of 4 * rows_of_warp rows of one head and streams the other side through a ring of
// `stages` pairs of tiles of 64 slots. Inside a tile a warp works on slots_at_once at a time and leaves out steps that
// none of its rows sees. Slots are counted from the block's first, `base`. Logits are in units of log2.
//
//   keys             base - W         base                 `#`: what a warp works on (heads of 64: 128 queries)
//                  |  #### | ## | #### | ##   |      |     warp 0
//                  |   ### | ## | #### | #### |      |     warp 1
//                  |    ## | ## | #### | #### | ##   |     warp 2
//                  |     # | ## | #### | #### | #### |     warp 3
#pragma once
#include "kernels/mma/mma.cuh"
#include "kernels/sliding_attention.cuh"

namespace gca {

constexpr int window_warps = 4, window_threads = 32 * window_warps;

// What the block of a pass is made of. Each pass has a function that chooses, beside its kernel.
struct WindowPlan {
  int d;               // columns of a head
  int rows_of_warp;    // slots that a warp owns, a multiple of 16
  int slots_at_once;   // of the other side, in one step
  int stages;          // pairs of tiles in the ring
  int residents;       // blocks of a multiprocessor at once, which sets the registers of a thread
  bool operands_kept;  // the rows' own operands stay in registers; otherwise shared memory is read at each step

  GCA_HD constexpr int blocks() const { return rows_of_warp / 16; }
  GCA_HD constexpr int rows() const { return rows_of_warp * window_warps; }
  GCA_HD constexpr int row_bytes() const { return d * static_cast<int>(sizeof(bf16)); }
  GCA_HD constexpr int rows_bytes() const { return rows() * row_bytes(); }
  GCA_HD constexpr int tile_bytes() const { return tile_size * row_bytes(); }
  GCA_HD constexpr int ring_bytes() const { return stages * 2 * tile_bytes(); }
  // A row sees a key, itself, in the first step that its warp takes.
  GCA_HD constexpr bool holds() const { return rows_of_warp % 16 == 0 && slots_at_once >= rows_of_warp && stages > 1; }
};

// A block's head and first slot; heads go fastest, so that what lies side by side in memory is read at about the same
// time.
struct WindowPiece {
  int64_t b, base;
  int h;
  int W;  // the window, 2^30 at most: distances are ints
  __device__ WindowPiece(const SlidingRows<bf16>& w, int rows) : W(static_cast<int>(min(w.W, int64_t{1} << 30))) {
    const int64_t first = w.first_slot / rows, pieces = (w.first_slot + w.T + rows - 1) / rows - first;
    const int64_t i = blockIdx.x / w.H;
    h = static_cast<int>(blockIdx.x % w.H);
    base = (first + i % pieces) * rows;
    b = i / pieces;
  }
  // The first slot, counted from base, of the first tile with a key that a query in `row` or after it sees.
  __device__ int first_key(const SlidingRows<bf16>& w, int row) const {
    return static_cast<int>(max(base + row - w.W, int64_t{0}) / tile_size * tile_size - base);
  }
};
inline int64_t window_pieces(const SlidingRows<bf16>& w, int rows) {
  return w.B * w.H * (ceil_div(w.first_slot + w.T, rows) - w.first_slot / rows);
}

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

// p = scale * p + slope * (key - query) - top[query], `key` being the first column's place; the distance is made of
// that to column `middle` of the step and the rest, a constant.
template <int middle, int blocks, int columns>
__device__ inline void add_alibi(Sum (&p)[blocks][columns], const WarpRows<blocks>& my, int key, float scale,
                                 float slope, const float (&top)[blocks][2]) {
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float from =
          fmaf(slope, static_cast<float>(key + middle + my.lane_column - my.row(i, half)), -top[i][half]);
#pragma unroll
      for (int c = 0; c < 2 * columns; c++) {
        float& x = p[i][c / 2][2 * half + c % 2];
        x = fmaf(x, scale, fmaf(slope, static_cast<float>(c / 2 * 8 + c % 2 - middle), from));
      }
    }
}
// Logits of pairs that do not see each other become minus infinity. The rows are queries and the columns keys, or the
// other way round; `first` is the first column's place.
template <bool rows_are_keys, int blocks, int columns>
__device__ inline void hide(Sum (&p)[blocks][columns], const WarpRows<blocks>& my, int first, int W) {
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

}  // namespace gca
