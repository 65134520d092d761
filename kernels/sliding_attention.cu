// Sliding-window attention with ALiBi (drt.md SWA): query slot i sees slots j with 0 <= i-j <= W, its logits lowered by
// 2^(-8(h+1)/H) (i-j). Earlier slots of a row that is read in segments come from a ring.
#include "kernels/mma/mma.cuh"
#include "kernels/plain/attention.cuh"

namespace gca {
namespace {

template <class Act>
struct Sliding {
  int64_t B, T, W, first_slot;
  int H, d;
  const Act *qkv, *ring;  // (B,T,3D); (B,W,2D) of k | v, slot j at place j mod W, or null

  __device__ int64_t D() const { return static_cast<int64_t>(H) * d; }
  __device__ void load(Tile& tile, int64_t b, int64_t slot, int t, int64_t column, int64_t ring_column) const {
    load_tile(
        tile,
        [&](int r) -> const Act* {
          const int64_t j = slot + r;
          if (j >= first_slot)
            return j < first_slot + T ? qkv + (b * T + j - first_slot) * 3 * D() + column + t * tile_size : nullptr;
          return ring && ring_column >= 0 && j >= first_slot - W
                     ? ring + (b * W + j % W) * 2 * D() + ring_column + t * tile_size
                     : nullptr;
        },
        columns_of(d, t));
  }
  __device__ void load_q(Tile& tile, int64_t b, int h, int64_t slot, int t) const { load(tile, b, slot, t, h * d, -1); }
  __device__ void load_k(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load(tile, b, slot, t, D() + h * d, h * d);
  }
  __device__ void load_v(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load(tile, b, slot, t, 2 * D() + h * d, D() + h * d);
  }
  __device__ bool sees(int64_t i, int64_t j) const { return j <= i && i - j <= W; }
  __device__ float slope(int h) const { return static_cast<float>(exp2(-8.0 * (h + 1) / H)); }
  __device__ int64_t first_key(int64_t i0) const { return i0 > W ? (i0 - W) / tile_size * tile_size : 0; }
  __device__ int64_t end_key(int64_t i0) const { return i0 + tile_size; }
  __device__ int64_t first_query(int64_t j0) const { return j0; }
  __device__ int64_t end_query(int64_t j0) const { return min(T, j0 + tile_size + W); }
};

// ---- bf16 on tensor cores: heads of 32, 64 or 128 columns ---------------------------------------------------------
// A block of 4 warps owns `rows` slots of one head, each warp 16 * blocks of them as the rows of its products, and
// streams the other side through a ring of `stages` pairs of tiles of 64 slots. Inside a tile a warp works on `step`
// slots at a time and leaves out steps that none of its rows sees. Slots are counted from the block's first, `base`.
// Logits are in units of log2.
constexpr int slots_a_tile = 64, window_warps = 4, window_threads = 32 * window_warps;

// residents: blocks of a multiprocessor at once, which sets the registers of a thread; kept: the rows' own operands
// stay in registers instead of being read from shared memory at each step. Chosen by measurement on an H100, heads
// of 64.
template <int d_, int blocks_, int step_, int stages_, int residents_, bool kept_>
struct WindowPlan {
  static constexpr int d = d_, blocks = blocks_, step = step_, stages = stages_, residents = residents_;
  static constexpr bool kept = kept_;
  static_assert(step >= 16 * blocks, "a row sees a key, itself, in the first step that its warp takes");
  static constexpr int rows = 16 * blocks * window_warps, rows_bytes = rows * row_bytes<d>,
                       tile_bytes = slots_a_tile * row_bytes<d>;
  static constexpr int ring_bytes = stages * 2 * tile_bytes;
};
// Of a tile's queries, see WindowGradient.
constexpr int statistics_bytes = slots_a_tile * static_cast<int>(sizeof(float2));
template <int d>
using ForwardPlan = std::conditional_t<
    d == 32, WindowPlan<d, 2, 64, 2, 2, true>,
    std::conditional_t<d == 64, WindowPlan<d, 2, 32, 3, 3, false>, WindowPlan<d, 1, 64, 2, 2, true>>>;
template <int d>
using QueryPlan =
    std::conditional_t<d == 32, WindowPlan<d, 2, 32, 2, 2, true>,
                       std::conditional_t<d == 64, WindowPlan<d, 1, 64, 2, 3, true>, WindowPlan<d, 1, 32, 2, 2, true>>>;
template <int d>
using KeyPlan = std::conditional_t<
    d == 32, WindowPlan<d, 2, 32, 2, 2, true>,
    std::conditional_t<d == 64, WindowPlan<d, 1, 64, 3, 2, true>, WindowPlan<d, 1, 32, 2, 2, false>>>;

// A block's head and first slot; heads go fastest, so that what lies side by side in memory is read at about the same
// time.
struct WindowPiece {
  int64_t b, base;
  int h;
  __device__ WindowPiece(const Sliding<bf16>& w, int rows) {
    const int64_t first = w.first_slot / rows, pieces = (w.first_slot + w.T + rows - 1) / rows - first;
    const int64_t i = blockIdx.x / w.H;
    h = static_cast<int>(blockIdx.x % w.H);
    base = (first + i % pieces) * rows;
    b = i / pieces;
  }
};
int64_t window_pieces(const Sliding<bf16>& w, int rows) {
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
__device__ inline void copy_from_ring(uint32_t tile, const Sliding<bf16>& w, int64_t b, int64_t slot, int64_t column,
                                      int64_t ring_column) {
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

// segment: the slots do not start a row, or earlier ones lie in the ring
template <class Plan, bool segment>
__global__ void __launch_bounds__(window_threads, Plan::residents)
    window_forward_kernel(bf16* out, float* lse, Sliding<bf16> w) {
  constexpr int d = Plan::d, blocks = Plan::blocks, step = Plan::step, stages = Plan::stages, rows = Plan::rows;
  bf16* const q_memory = shared<bf16>();
  const uint32_t q_tile = shared_address(q_memory), ring = q_tile + Plan::rows_bytes;
  const WindowPiece at(w, rows);
  const WindowRows<blocks> my;
  const int64_t end_slot = w.first_slot + w.T;
  const int W = static_cast<int>(min(w.W, int64_t{1} << 30));
  const int begin_row = static_cast<int>(max(w.first_slot - at.base, int64_t{0})),
            end_row = static_cast<int>(min(end_slot - at.base, int64_t{rows}));
  // Keys nearest first: a row's largest logits come early, so that its sums are hardly ever scaled again.
  const int first_key =
      static_cast<int>(max(at.base + begin_row - w.W, int64_t{0}) / slots_a_tile * slots_a_tile - at.base);
  const int tiles = (end_row - first_key + slots_a_tile - 1) / slots_a_tile;
  const int64_t D = w.D(), column = static_cast<int64_t>(at.h) * d;
  const bf16* const q_from = w.qkv + (at.b * w.T + at.base) * 3 * D + column;  // of whole rows
  auto copy = [&](int tile) {
    if (tile < tiles) {
      const uint32_t pair = ring + tile % stages * 2 * Plan::tile_bytes;
      const int key = first_key + (tiles - 1 - tile) * slots_a_tile;
      if constexpr (segment) {
        copy_from_ring<d, slots_a_tile>(pair, w, at.b, at.base + key, D + column, column);
        copy_from_ring<d, slots_a_tile>(pair + Plan::tile_bytes, w, at.b, at.base + key, 2 * D + column, D + column);
      } else {
        const bf16* from = q_from + key * 3 * D + D;
        copy_rows<d, slots_a_tile>(pair, from, 3 * w.H * d, end_row - key);
        copy_rows<d, slots_a_tile>(pair + Plan::tile_bytes, from + D, 3 * w.H * d, end_row - key);
      }
    }
    commit_copies();
  };
  if constexpr (segment) copy_from_ring<d, rows>(q_tile, w, at.b, at.base, column, -1);
  else copy_rows<d, rows>(q_tile, q_from, 3 * w.H * d, end_row);
#pragma unroll
  for (int tile = 0; tile < stages - 1; tile++) copy(tile);

  const float scale = log2_e / sqrtf(static_cast<float>(d)), slope = log2_e * w.slope(at.h);
  const bool mine = my.warp_row < end_row && my.end() > begin_row;
  bool first = true;
  Operand q[blocks][d / 16];
  Sum o[blocks][d / 8];
  float top[blocks][2], sum[blocks][2];
  clear(o);
#pragma unroll
  for (int i = 0; i < blocks; i++) top[i][0] = top[i][1] = sum[i][0] = sum[i][1] = 0;

  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    copy(tile + stages - 1);
    if (!mine) continue;
    if (Plan::kept && tile == 0) load_lefts<d, blocks>(q, q_tile, my.warp_row);
    const uint32_t k_tile = ring + tile % stages * 2 * Plan::tile_bytes, v_tile = k_tile + Plan::tile_bytes;
    const int tile_key = first_key + (tiles - 1 - tile) * slots_a_tile;
#pragma unroll 1
    for (int j = slots_a_tile - step; j >= 0; j -= step) {
      const int key = tile_key + j;  // of the step's first column
      if (key >= my.end() || key + step <= my.warp_row - W) continue;
      Sum p[blocks][step / 8];
      clear(p);
      if constexpr (Plan::kept) multiply_rows<d>(p, q, k_tile, j);
      else multiply_rows<d>(p, q_tile, my.warp_row, k_tile, j);
      // p = scale * p + slope * (key - row) - top
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float from =
              fmaf(slope, static_cast<float>(key + step / 2 + my.lane_column - my.row(i, half)), -top[i][half]);
#pragma unroll
          for (int c = 0; c < step / 4; c++) {
            float& x = p[i][c / 2][2 * half + c % 2];
            x = fmaf(x, scale, fmaf(slope, static_cast<float>(c / 2 * 8 + c % 2 - step / 2), from));
          }
        }
      if (key + step - 1 > my.warp_row || key < my.end() - 1 - W) hide<false>(p, my, key, W);
      float largest[blocks][2];
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          largest[i][half] = -INFINITY;
#pragma unroll
          for (int c = 0; c < step / 4; c++) largest[i][half] = fmaxf(largest[i][half], p[i][c / 2][2 * half + c % 2]);
          most = fmaxf(most, largest[i][half]);
        }
      // A row's top stays as it is until a logit lies 2^8 above it: sums in float and P in bf16 are as exact relative
      // to any top. Whether it moves is each row's own affair, so that a row does not depend on its neighbours.
      if (first || __any_sync(0xffffffffu, most > 8)) {
#pragma unroll
        for (int i = 0; i < blocks; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float row_most = warp_max<4>(largest[i][half]), more = first || row_most > 8 ? row_most : 0.0f,
                        shrink = first ? 1.0f : fast_exp2(-more);
            top[i][half] += more;
            sum[i][half] *= shrink;
#pragma unroll
            for (int c = 0; c < d / 4; c++) o[i][c / 2][2 * half + c % 2] *= shrink;
#pragma unroll
            for (int c = 0; c < step / 4; c++) p[i][c / 2][2 * half + c % 2] -= more;
          }
        first = false;
      }
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int c = 0; c < step / 4; c++) {
            float& x = p[i][c / 2][2 * half + c % 2];
            x = fast_exp2(x);
            sum[i][half] += x;
          }
#pragma unroll
      for (int k = 0; k < step / 16; k++) {
        Operand left[blocks];
#pragma unroll
        for (int i = 0; i < blocks; i++) as_left(left[i], p[i][2 * k], p[i][2 * k + 1]);
        multiply_columns<d>(o, left, v_tile, j + 16 * k);
      }
    }
  }
  if (!mine) return;
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float total = warp_sum<4>(sum[i][half]), share = __fdividef(1.0f, total);
      const int row = my.row(i, half);
#pragma unroll
      for (int c = 0; c < d / 4; c++) o[i][c / 2][2 * half + c % 2] *= share;
      if (my.lane_column == 0 && row >= begin_row && row < end_row)
        lse[(at.b * w.H + at.h) * w.T + at.base + row - w.first_slot] = fmaf(top[i][half], ln_2, logf(total));
    }
  store_sums<d>(out + ((at.b * w.T + at.base - w.first_slot) * w.H + at.h) * d, w.D(), q_memory, my.warp_row, o,
                end_row, begin_row);
}

// What the backward passes hand on: for each query its log-sum-exp in log2 and delta = rowsum(dO O), as pairs; past the
// row infinity and 0, so that there p = 0.
struct WindowGradient {
  const bf16 *dout, *out;  // (B,T,D)
  const float* lse;        // (B,H,T)
  float2* statistics;      // (B,H,T rounded up to whole tiles)
  __device__ static int64_t padded(int64_t T) { return (T + slots_a_tile - 1) / slots_a_tile * slots_a_tile; }
};

// dQ = dS K: a block owns queries
template <class Plan>
__global__ void __launch_bounds__(window_threads, Plan::residents)
    window_backward_query_kernel(bf16* dqkv, WindowGradient g, Sliding<bf16> w) {
  constexpr int d = Plan::d, blocks = Plan::blocks, step = Plan::step, stages = Plan::stages, rows = Plan::rows;
  static_assert(rows <= 2 * slots_a_tile && stages > 1, "O waits in the ring's last place");
  static_assert(Plan::kept, "delta is made of the same operands");
  bf16* const q_memory = shared<bf16>();
  const uint32_t q_tile = shared_address(q_memory), dout_tile = q_tile + Plan::rows_bytes,
                 ring = dout_tile + Plan::rows_bytes;
  const uint32_t out_tile = ring + (stages - 1) * 2 * Plan::tile_bytes;
  const WindowPiece at(w, rows);
  const WindowRows<blocks> my;
  const int64_t D = w.D(), first_element = ((at.b * w.T + at.base) * w.H + at.h) * d,
                padded = WindowGradient::padded(w.T);
  const int W = static_cast<int>(min(w.W, int64_t{1} << 30)),
            end_row = static_cast<int>(min(w.T - at.base, int64_t{rows}));
  const int first_key = static_cast<int>(max(at.base - w.W, int64_t{0}) / slots_a_tile * slots_a_tile - at.base);
  const int tiles = (end_row - first_key + slots_a_tile - 1) / slots_a_tile;
  const bf16* const q_from = w.qkv + (at.b * w.T + at.base) * 3 * D + static_cast<int64_t>(at.h) * d;
  auto copy = [&](int tile) {
    if (tile < tiles) {
      const uint32_t pair = ring + tile % stages * 2 * Plan::tile_bytes;
      const int key = first_key + tile * slots_a_tile;
      const bf16* from = q_from + key * 3 * D + D;
      copy_rows<d, slots_a_tile>(pair, from, 3 * w.H * d, end_row - key);
      copy_rows<d, slots_a_tile>(pair + Plan::tile_bytes, from + D, 3 * w.H * d, end_row - key);
    }
    commit_copies();
  };
  copy_rows<d, rows>(q_tile, q_from, 3 * w.H * d, end_row);
  copy_rows<d, rows>(dout_tile, g.dout + first_element, w.H * d, end_row);
  copy_rows<d, rows>(out_tile, g.out + first_element, w.H * d, end_row);
  commit_copies();
#pragma unroll
  for (int tile = 0; tile < stages - 1; tile++) copy(tile);
  wait_for_copies<stages - 1>();
  __syncthreads();

  Operand q[blocks][d / 16], dout[blocks][d / 16];
  load_lefts<d, blocks>(q, q_tile, my.warp_row);
  load_lefts<d, blocks>(dout, dout_tile, my.warp_row);
  float lse[blocks][2], delta[blocks][2];
#pragma unroll
  for (int i = 0; i < blocks; i++) {
    delta[i][0] = delta[i][1] = 0;
#pragma unroll
    for (int k = 0; k < d / 16; k++) {
      Operand o;
      load_left<d>(o, out_tile, my.warp_row + 16 * i, 16 * k);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 left = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(dout[i][k][e])),
                     right = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(o[e]));
        delta[i][e % 2] = fmaf(left.x, right.x, fmaf(left.y, right.y, delta[i][e % 2]));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = my.row(i, half);
      delta[i][half] = warp_sum<4>(delta[i][half]);
      lse[i][half] = row < end_row ? log2_e * g.lse[(at.b * w.H + at.h) * w.T + at.base + row] : INFINITY;
      if (my.lane_column == 0 && at.base + row < padded)
        g.statistics[(at.b * w.H + at.h) * padded + at.base + row] = make_float2(lse[i][half], delta[i][half]);
    }
  }

  const float scale = log2_e / sqrtf(static_cast<float>(d)), slope = log2_e * w.slope(at.h);
  Sum dq[blocks][d / 8];
  clear(dq);
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    copy(tile + stages - 1);
    const uint32_t k_tile = ring + tile % stages * 2 * Plan::tile_bytes, v_tile = k_tile + Plan::tile_bytes;
    const int tile_key = first_key + tile * slots_a_tile;
#pragma unroll 1
    for (int j = 0; j < slots_a_tile; j += step) {
      const int key = tile_key + j;
      if (key >= my.end() || key + step <= my.warp_row - W || my.warp_row >= end_row) continue;
      Sum p[blocks][step / 8], ds[blocks][step / 8];
      clear(p);
      clear(ds);
      multiply_rows<d>(p, q, k_tile, j);
      multiply_rows<d>(ds, dout, v_tile, j);
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float from = fmaf(slope, static_cast<float>(key + my.lane_column - my.row(i, half)), -lse[i][half]);
#pragma unroll
          for (int c = 0; c < step / 4; c++) {
            float& x = p[i][c / 2][2 * half + c % 2];
            x = fmaf(x, scale, fmaf(slope, static_cast<float>(c / 2 * 8 + c % 2), from));
          }
        }
      if (key + step - 1 > my.warp_row || key < my.end() - 1 - W) hide<false>(p, my, key, W);
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int c = 0; c < step / 8; c++)
#pragma unroll
          for (int e = 0; e < 4; e++) ds[i][c][e] = fast_exp2(p[i][c][e]) * (ds[i][c][e] - delta[i][e / 2]);
#pragma unroll
      for (int k = 0; k < step / 16; k++) {
        Operand left[blocks];
#pragma unroll
        for (int i = 0; i < blocks; i++) as_left(left[i], ds[i][2 * k], ds[i][2 * k + 1]);
        multiply_columns<d>(dq, left, k_tile, j + 16 * k);
      }
    }
  }
  scale_sums(dq, 1 / sqrtf(static_cast<float>(d)));
  store_sums<d>(dqkv + (at.b * w.T + at.base) * 3 * D + static_cast<int64_t>(at.h) * d, 3 * D, q_memory, my.warp_row,
                dq, end_row);
}

// dK = dS^T Q, dV = P^T dO: a block owns keys; p and ds are made transposed, keys being their rows.
template <class Plan>
__global__ void __launch_bounds__(window_threads, Plan::residents)
    window_backward_key_kernel(bf16* dqkv, WindowGradient g, Sliding<bf16> w) {
  constexpr int d = Plan::d, blocks = Plan::blocks, step = Plan::step, stages = Plan::stages, rows = Plan::rows;
  bf16* const k_memory = shared<bf16>();
  const uint32_t k_tile = shared_address(k_memory), v_tile = k_tile + Plan::rows_bytes,
                 ring = v_tile + Plan::rows_bytes;
  const uint32_t statistics_ring = ring + stages * 2 * Plan::tile_bytes;
  const WindowPiece at(w, rows);
  const WindowRows<blocks> my;
  const int64_t D = w.D(), column = static_cast<int64_t>(at.h) * d, padded = WindowGradient::padded(w.T);
  const int W = static_cast<int>(min(w.W, int64_t{1} << 30)),
            end_row = static_cast<int>(min(w.T - at.base, int64_t{rows}));
  const int queries = static_cast<int>(min(w.T - at.base, rows + w.W)),
            tiles = (queries + slots_a_tile - 1) / slots_a_tile;
  const bf16* const q_from = w.qkv + (at.b * w.T + at.base) * 3 * D + column;
  const bf16* const dout_from = g.dout + (at.b * w.T + at.base) * D + column;
  const float2* const statistics_from = g.statistics + (at.b * w.H + at.h) * padded + at.base + threadIdx.x * 2;
  auto copy = [&](int tile) {
    if (tile < tiles) {
      const int query = tile * slots_a_tile, there = static_cast<int>(min(w.T - at.base, int64_t{1} << 30)) - query;
      const uint32_t pair = ring + tile % stages * 2 * Plan::tile_bytes;
      copy_rows<d, slots_a_tile>(pair, q_from + query * 3 * D, 3 * w.H * d, there);
      copy_rows<d, slots_a_tile>(pair + Plan::tile_bytes, dout_from + query * D, w.H * d, there);
      if (threadIdx.x < statistics_bytes / 16)
        copy_async(statistics_ring + tile % stages * statistics_bytes + threadIdx.x * 16, statistics_from + query);
    }
    commit_copies();
  };
  copy_rows<d, rows>(k_tile, q_from + D, 3 * w.H * d, end_row);
  copy_rows<d, rows>(v_tile, q_from + 2 * D, 3 * w.H * d, end_row);
#pragma unroll
  for (int tile = 0; tile < stages - 1; tile++) copy(tile);

  const float scale = log2_e / sqrtf(static_cast<float>(d)), slope = log2_e * w.slope(at.h);
  Operand k[blocks][d / 16], v[blocks][d / 16];
  Sum dk[blocks][d / 8], dv[blocks][d / 8];
  clear(dk);
  clear(dv);
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    copy(tile + stages - 1);
    if (Plan::kept && tile == 0) {
      load_lefts<d, blocks>(k, k_tile, my.warp_row);
      load_lefts<d, blocks>(v, v_tile, my.warp_row);
    }
    const uint32_t q_tile = ring + tile % stages * 2 * Plan::tile_bytes, dout_tile = q_tile + Plan::tile_bytes;
    const float4* statistics = reinterpret_cast<const float4*>(
        reinterpret_cast<const char*>(k_memory) + (statistics_ring - k_tile) + tile % stages * statistics_bytes);
#pragma unroll 1
    for (int i0 = 0; i0 < slots_a_tile; i0 += step) {
      const int query = tile * slots_a_tile + i0;  // of the step's first column
      if (query + step <= my.warp_row || query >= my.end() + W || my.warp_row >= end_row) continue;
      Sum p[blocks][step / 8], ds[blocks][step / 8];
      clear(p);
      clear(ds);
      if constexpr (Plan::kept) {
        multiply_rows<d>(p, k, q_tile, i0);
        multiply_rows<d>(ds, v, dout_tile, i0);
      } else {
        multiply_rows<d>(p, k_tile, my.warp_row, q_tile, i0);
        multiply_rows<d>(ds, v_tile, my.warp_row, dout_tile, i0);
      }
      float4 of_two[step / 8];  // (log-sum-exp, delta) of the lane's two columns
#pragma unroll
      for (int c = 0; c < step / 8; c++) of_two[c] = statistics[(i0 + 8 * c + my.lane_column) / 2];
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float from = slope * static_cast<float>(my.row(i, half) - query - my.lane_column);
#pragma unroll
          for (int c = 0; c < step / 8; c++) {
            p[i][c][2 * half] =
                fmaf(p[i][c][2 * half], scale, fmaf(slope, static_cast<float>(-8 * c), -of_two[c].x) + from);
            p[i][c][2 * half + 1] =
                fmaf(p[i][c][2 * half + 1], scale, fmaf(slope, static_cast<float>(-8 * c - 1), -of_two[c].z) + from);
          }
        }
      if (query < my.end() - 1 || query + step - 1 > my.warp_row + W) hide<true>(p, my, query, W);
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int c = 0; c < step / 8; c++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            p[i][c][e] = fast_exp2(p[i][c][e]);
            ds[i][c][e] = p[i][c][e] * (ds[i][c][e] - (e % 2 ? of_two[c].w : of_two[c].y));
          }
#pragma unroll
      for (int s = 0; s < step / 16; s++) {
        Operand left[blocks];
#pragma unroll
        for (int i = 0; i < blocks; i++) as_left(left[i], p[i][2 * s], p[i][2 * s + 1]);
        multiply_columns<d>(dv, left, dout_tile, i0 + 16 * s);
#pragma unroll
        for (int i = 0; i < blocks; i++) as_left(left[i], ds[i][2 * s], ds[i][2 * s + 1]);
        multiply_columns<d>(dk, left, q_tile, i0 + 16 * s);
      }
    }
  }
  scale_sums(dk, 1 / sqrtf(static_cast<float>(d)));
  bf16* to = dqkv + (at.b * w.T + at.base) * 3 * D + D + column;
  store_sums<d>(to, 3 * D, k_memory, my.warp_row, dk, end_row);
  store_sums<d>(to + D, 3 * D, k_memory, my.warp_row, dv, end_row);
}

template <class Act>
__global__ void append_kernel(Act* ring, const Act* qkv, SlidingShape s) {
  const int64_t D = static_cast<int64_t>(s.H) * s.d, kept = min(s.T, s.W),
                i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= s.B * kept * 2 * D) return;
  const int64_t column = i % (2 * D), t = s.T - kept + i / (2 * D) % kept, b = i / (2 * D) / kept;
  ring[(b * s.W + (s.first_slot + t) % s.W) * 2 * D + column] = qkv[(b * s.T + t) * 3 * D + D + column];
}

void forward_on_tensor_cores(cudaStream_t stream, bf16* out, float* lse, const Sliding<bf16>& w) {
  with_mma_head(w.d, [&](auto d) {
    using Plan = ForwardPlan<d>;
    launch("sliding attention", stream,
           w.first_slot > 0 || w.ring ? window_forward_kernel<Plan, true> : window_forward_kernel<Plan, false>,
           window_pieces(w, Plan::rows), window_threads, Plan::rows_bytes + Plan::ring_bytes, out, lse, w);
  });
}
void backward_on_tensor_cores(cudaStream_t stream, bf16* dqkv, const WindowGradient& g, const Sliding<bf16>& w) {
  with_mma_head(w.d, [&](auto d) {
    using Query = QueryPlan<d>;
    using Key = KeyPlan<d>;
    launch("sliding attention, backward by query", stream, window_backward_query_kernel<Query>,
           window_pieces(w, Query::rows), window_threads, 2 * Query::rows_bytes + Query::ring_bytes, dqkv, g, w);
    launch("sliding attention, backward by key", stream, window_backward_key_kernel<Key>, window_pieces(w, Key::rows),
           window_threads, 2 * Key::rows_bytes + Key::ring_bytes + Key::stages * statistics_bytes, dqkv, g, w);
  });
}

}  // namespace

template <class Act>
void Gpu<Act>::sliding_attention_forward(Act* out, float* lse, const Act* qkv, const Act* ring, const SlidingShape& s) {
  const Sliding<Act> window{s.B, s.T, s.W, s.first_slot, s.H, s.d, qkv, ring};
  if constexpr (std::is_same_v<Act, bf16>)
    if (mma_head(s.d) && !plain_attention()) return forward_on_tensor_cores(stream_, out, lse, window);
  launch_attention_forward("sliding attention", stream_, out, lse, window);
}
template <class Act>
void Gpu<Act>::sliding_attention_backward(Act* dqkv, const Act* dout, const Act* qkv, const Act* out, const float* lse,
                                          const SlidingShape& s) {
  GCA_CHECK(s.first_slot == 0, "backward takes whole rows");
  if constexpr (std::is_same_v<Act, bf16>) {
    // Rows by as many as there is room for the statistics of.
    const int64_t D = static_cast<int64_t>(s.H) * s.d, a_row = s.H * round_up(s.T, slots_a_tile),
                  at_once = scratch_bytes / static_cast<int64_t>(sizeof(float2)) / a_row;
    if (mma_head(s.d) && !plain_attention() && at_once > 0) {
      for (int64_t b = 0; b < s.B; b += at_once) {
        const int64_t rows = std::min(at_once, s.B - b), slot = b * s.T;
        backward_on_tensor_cores(stream_, dqkv + slot * 3 * D,
                                 {dout + slot * D, out + slot * D, lse + slot * s.H, scratch<float2>(rows * a_row)},
                                 {rows, s.T, s.W, 0, s.H, s.d, qkv + slot * 3 * D, nullptr});
      }
      return;
    }
  }
  const Sliding<Act> window{s.B, s.T, s.W, 0, s.H, s.d, qkv, nullptr};
  launch_attention_backward("sliding attention, backward", stream_, dqkv, AttentionOutputs<Act>{dout, out, lse},
                            window);
}
template <class Act>
void Gpu<Act>::ring_append(Act* ring, const Act* qkv, const SlidingShape& s) {
  launch("the window's ring", stream_, append_kernel<Act>, ceil_div(s.B * std::min(s.T, s.W) * 2 * s.H * s.d, 256), 256,
         0, ring, qkv, s);
}

template void Gpu<float>::sliding_attention_forward(float*, float*, const float*, const float*, const SlidingShape&);
template void Gpu<bf16>::sliding_attention_forward(bf16*, float*, const bf16*, const bf16*, const SlidingShape&);
template void Gpu<float>::sliding_attention_backward(float*, const float*, const float*, const float*, const float*,
                                                     const SlidingShape&);
template void Gpu<bf16>::sliding_attention_backward(bf16*, const bf16*, const bf16*, const bf16*, const float*,
                                                    const SlidingShape&);
template void Gpu<float>::ring_append(float*, const float*, const SlidingShape&);
template void Gpu<bf16>::ring_append(bf16*, const bf16*, const SlidingShape&);

}  // namespace gca
