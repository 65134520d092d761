// Sliding-window attention on tensor cores, forward: a block owns queries, keys stream, the nearest tile first.
//
// Shared memory, heads of 64 columns (a row is 128 bytes):
//        0  Q        128 rows: all threads fill it before the loop; then each warp reads its own rows, and at the end
//                    O leaves through them
//   16,384  K | V    3 stages of 2 x 64 rows: tile i in stage i % 3, filled two tiles ahead; free when all warps have
//                    passed the barrier that opens tile i + 1
//   65,536  end
//
//   barrier of tile      stage 0     stage 1     stage 2       read: by the warps that see some of it
//        0               read 0      coming 1    coming 2      coming: copied in the background, by all threads
//        1               coming 3    read 1      coming 2
//        2               coming 3    coming 4    read 2
//
// A warp has 32 rows: of 32 keys at once 2 x 4 Sums of P (32 registers of a lane), and 2 x 8 of O (64); a row's top
// and sum lie in each of the four lanes of its quad. Q is read from shared memory at each step: kept, it would take 32
// registers more.
#include "kernels/mma/sliding_attention.cuh"

namespace gca {
namespace {

// Chosen by measurement on an H100, heads of 64: three blocks of 168 registers share a multiprocessor, which a warp's
// 32 rows fit into if it reads their queries from shared memory and takes 32 keys at once.
GCA_HD constexpr WindowPlan forward_plan(int d) {
  if (d == 32)
    return {.d = 32, .rows_of_warp = 32, .slots_at_once = 64, .stages = 2, .residents = 2, .operands_kept = true};
  if (d == 64)
    return {.d = 64, .rows_of_warp = 32, .slots_at_once = 32, .stages = 3, .residents = 3, .operands_kept = false};
  return {.d = 128, .rows_of_warp = 16, .slots_at_once = 64, .stages = 2, .residents = 2, .operands_kept = true};
}

constexpr int forward_bytes(WindowPlan plan) { return plan.rows_bytes() + plan.ring_bytes(); }
static_assert(forward_bytes(forward_plan(64)) == 65536, "the map above: Q | 3 x (K | V)");
static_assert(forward_plan(64).rows() == 128 && forward_plan(64).stages == 3, "the drawing above");

// segment: the slots do not start a row, or earlier ones lie in the ring
template <int d, bool segment>
__global__ void __launch_bounds__(window_threads, forward_plan(d).residents)
    sliding_attention_forward_mma_kernel(bf16* out,   // (B,T,D)
                                         float* lse,  // (B,H,T)
                                         SlidingRows<bf16> w) {
  constexpr WindowPlan plan = forward_plan(d);
  constexpr int blocks = plan.blocks(), step = plan.slots_at_once, stages = plan.stages, rows = plan.rows();
  constexpr int rows_bytes = plan.rows_bytes(), tile_bytes = plan.tile_bytes();
  static_assert(plan.holds());
  bf16* const q_memory = shared<bf16>();
  const uint32_t q_tile = shared_address(q_memory), ring = q_tile + rows_bytes;
  const WindowPiece at(w, rows);
  const WarpRows<blocks> my;
  const int W = at.W, begin_row = static_cast<int>(max(w.first_slot - at.base, int64_t{0})),
            end_row = static_cast<int>(min(w.first_slot + w.T - at.base, int64_t{rows}));
  // Keys nearest first: a row's largest logits come early, so that its sums are hardly ever scaled again.
  const int first_key = at.first_key(w, begin_row), tiles = (end_row - first_key + tile_size - 1) / tile_size;
  const int64_t D = w.D(), column = static_cast<int64_t>(at.h) * d;
  const bf16* const q_from = w.qkv + (at.b * w.T + at.base) * 3 * D + column;  // of whole rows
  auto copy = [&](int tile) {
    if (tile < tiles) {
      const uint32_t pair = ring + tile % stages * 2 * tile_bytes;
      const int key = first_key + (tiles - 1 - tile) * tile_size;
      if constexpr (segment) {
        copy_from_ring<d, tile_size>(pair, w, at.b, at.base + key, D + column, column);
        copy_from_ring<d, tile_size>(pair + tile_bytes, w, at.b, at.base + key, 2 * D + column, D + column);
      } else {
        const bf16* from = q_from + key * 3 * D + D;
        copy_rows<d, tile_size>(pair, from, 3 * w.H * d, end_row - key);
        copy_rows<d, tile_size>(pair + tile_bytes, from + D, 3 * w.H * d, end_row - key);
      }
    }
    commit_copies();
  };
  if constexpr (segment) copy_from_ring<d, rows>(q_tile, w, at.b, at.base, column, -1);
  else copy_rows<d, rows>(q_tile, q_from, 3 * w.H * d, end_row);
#pragma unroll
  for (int tile = 0; tile < stages - 1; tile++) copy(tile);

  const float scale = attention_scale(d) * log2_e, slope = log2_e * w.slope(at.h);
  const bool mine = my.warp_row < end_row && my.end() > begin_row;
  bool first = true;
  Operand q[d / 16][blocks];
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
    if (plan.operands_kept && tile == 0) load_lefts<d>(q, q_tile, my.warp_row);
    const uint32_t k_tile = ring + tile % stages * 2 * tile_bytes, v_tile = k_tile + tile_bytes;
    const int tile_key = first_key + (tiles - 1 - tile) * tile_size;
#pragma unroll 1
    for (int j = tile_size - step; j >= 0; j -= step) {
      const int key = tile_key + j;  // of the step's first column
      if (key >= my.end() || key + step <= my.warp_row - W) continue;
      Sum p[blocks][step / 8];
      clear(p);
      if constexpr (plan.operands_kept) multiply_rows<d>(p, q, k_tile, j);
      else multiply_rows<d>(p, q_tile, my.warp_row, k_tile, j);
      add_alibi<step / 2>(p, my, key, scale, slope, top);
      if (key + step - 1 > my.warp_row || key < my.end() - 1 - W) hide<false>(p, my, key, W);
      float most = -INFINITY, largest[blocks][2];
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
            scale_row(o[i], half, shrink);
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
      multiply_columns<d>(o, p, v_tile, j);
    }
  }
  if (!mine) return;
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float total = warp_sum<4>(sum[i][half]);
      const int row = my.row(i, half);
      scale_row(o[i], half, __fdividef(1.0f, total));
      if (my.lane_column == 0 && row >= begin_row && row < end_row)
        lse[(at.b * w.H + at.h) * w.T + at.base + row - w.first_slot] = fmaf(top[i][half], ln_2, logf(total));
    }
  store_sums<d>(out + ((at.b * w.T + at.base - w.first_slot) * w.H + at.h) * d, w.D(), q_memory, my.warp_row, o,
                end_row, begin_row);
}

}  // namespace

void sliding_attention_forward_mma(cudaStream_t stream, bf16* out, float* lse, const SlidingRows<bf16>& w) {
  with_mma_head(w.d, [&](auto d) {
    constexpr WindowPlan plan = forward_plan(d);
    launch("sliding attention", stream,
           w.first_slot > 0 || w.ring ? sliding_attention_forward_mma_kernel<d, true>
                                      : sliding_attention_forward_mma_kernel<d, false>,
           window_pieces(w, plan.rows()), window_threads, forward_bytes(plan), out, lse, w);
  });
}

}  // namespace gca
