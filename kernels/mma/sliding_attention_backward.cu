// Sliding-window attention on tensor cores, backward: by query, which also leaves what the pass by key needs, then by
// key. A block owns 64 queries (heads of 64 columns) and keys stream, the furthest first; or 64 keys, and queries
// stream, the first that sees them first.
//
// Shared memory, heads of 64 columns (a row is 128 bytes):
//   by query                                             by key
//        0  Q        64 rows; dQ leaves through them          0  K           64 rows; dK and dV leave through them
//    8,192  dO       64 rows                              8,192  V           64 rows
//   16,384  K | V    2 stages of 2 x 64 rows             16,384  Q | dO      3 stages of 2 x 64 rows
//   49,152  end                                          65,536  statistics  3 stages of 64 pairs
//                                                        67,072  end
// All threads fill the rows before the loop; tile i goes to stage i % stages, filled stages - 1 tiles ahead and free
// when all warps have passed the barrier that opens tile i + 1. By query O lies in the last stage until delta is made.
//
// A warp has 16 rows, and all 64 of a tile's columns at once: 8 Sums each of P and dS (32 registers of a lane each). By
// query its Q and dO stay in registers (16 each), its sums are dQ (32); by key K and V stay, the sums are dK and dV.
// By key the rows are keys, so that P^T and dS^T are left Operands as they stand, and no lane needs another's numbers.
#include "kernels/mma/sliding_attention.cuh"

namespace gca {
namespace {

// Chosen by measurement on an H100, heads of 64: by query three blocks of 168 registers share a multiprocessor; by key,
// where a thread has twice the sums, two.
GCA_HD constexpr WindowPlan query_plan(int d) {
  if (d == 32)
    return {.d = 32, .rows_of_warp = 32, .slots_at_once = 32, .stages = 2, .residents = 2, .operands_kept = true};
  if (d == 64)
    return {.d = 64, .rows_of_warp = 16, .slots_at_once = 64, .stages = 2, .residents = 3, .operands_kept = true};
  return {.d = 128, .rows_of_warp = 16, .slots_at_once = 32, .stages = 2, .residents = 2, .operands_kept = true};
}
GCA_HD constexpr WindowPlan key_plan(int d) {
  if (d == 32)
    return {.d = 32, .rows_of_warp = 32, .slots_at_once = 32, .stages = 2, .residents = 2, .operands_kept = true};
  if (d == 64)
    return {.d = 64, .rows_of_warp = 16, .slots_at_once = 64, .stages = 3, .residents = 2, .operands_kept = true};
  return {.d = 128, .rows_of_warp = 16, .slots_at_once = 32, .stages = 2, .residents = 2, .operands_kept = false};
}

// Of a tile's queries, see WindowGradient.
constexpr int statistics_bytes = tile_size * static_cast<int>(sizeof(float2));
constexpr int query_bytes(WindowPlan plan) { return 2 * plan.rows_bytes() + plan.ring_bytes(); }
constexpr int key_bytes(WindowPlan plan) {
  return 2 * plan.rows_bytes() + plan.ring_bytes() + plan.stages * statistics_bytes;
}
static_assert(query_bytes(query_plan(64)) == 49152, "the map above: Q | dO | 2 x (K | V)");
static_assert(key_bytes(key_plan(64)) == 67072, "the map above: K | V | 3 x (Q | dO) | 3 x statistics");

// What the backward passes hand on: for each query its log-sum-exp in log2 and delta = rowsum(dO O), as pairs; past the
// row infinity and 0, so that there p = 0.
struct WindowGradient {
  const bf16 *dout, *out;  // (B,T,D)
  const float* lse;        // (B,H,T)
  float2* statistics;      // (B,H,T rounded up to whole tiles)
  __device__ static int64_t padded(int64_t T) { return (T + tile_size - 1) / tile_size * tile_size; }
};

// dQ = dS K: a block owns queries
template <int d>
__global__ void __launch_bounds__(window_threads, query_plan(d).residents)
    sliding_attention_backward_query_mma_kernel(bf16* dqkv,  // (B,T,3D)
                                                WindowGradient g, SlidingRows<bf16> w) {
  constexpr WindowPlan plan = query_plan(d);
  constexpr int blocks = plan.blocks(), step = plan.slots_at_once, stages = plan.stages, rows = plan.rows();
  constexpr int rows_bytes = plan.rows_bytes(), tile_bytes = plan.tile_bytes();
  static_assert(plan.holds());
  static_assert(rows <= 2 * tile_size && stages > 1, "O waits in the ring's last place");
  static_assert(plan.operands_kept, "delta is made of the same operands");
  bf16* const q_memory = shared<bf16>();
  const uint32_t q_tile = shared_address(q_memory), dout_tile = q_tile + rows_bytes, ring = dout_tile + rows_bytes;
  const uint32_t out_tile = ring + (stages - 1) * 2 * tile_bytes;
  const WindowPiece at(w, rows);
  const WarpRows<blocks> my;
  const int64_t D = w.D(), first_element = ((at.b * w.T + at.base) * w.H + at.h) * d,
                padded = WindowGradient::padded(w.T);
  const int W = at.W, end_row = static_cast<int>(min(w.T - at.base, int64_t{rows}));
  const int first_key = at.first_key(w, 0), tiles = (end_row - first_key + tile_size - 1) / tile_size;
  const bf16* const q_from = w.qkv + (at.b * w.T + at.base) * 3 * D + static_cast<int64_t>(at.h) * d;
  auto copy = [&](int tile) {
    if (tile < tiles) {
      const uint32_t pair = ring + tile % stages * 2 * tile_bytes;
      const int key = first_key + tile * tile_size;
      const bf16* from = q_from + key * 3 * D + D;
      copy_rows<d, tile_size>(pair, from, 3 * w.H * d, end_row - key);
      copy_rows<d, tile_size>(pair + tile_bytes, from + D, 3 * w.H * d, end_row - key);
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

  Operand q[d / 16][blocks], dout[d / 16][blocks];
  load_lefts<d>(q, q_tile, my.warp_row);
  load_lefts<d>(dout, dout_tile, my.warp_row);
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
        const float2 left = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(dout[k][i][e])),
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

  const float scale = attention_scale(d) * log2_e, slope = log2_e * w.slope(at.h);
  Sum dq[blocks][d / 8];
  clear(dq);
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    copy(tile + stages - 1);
    const uint32_t k_tile = ring + tile % stages * 2 * tile_bytes, v_tile = k_tile + tile_bytes;
    const int tile_key = first_key + tile * tile_size;
#pragma unroll 1
    for (int j = 0; j < tile_size; j += step) {
      const int key = tile_key + j;
      if (key >= my.end() || key + step <= my.warp_row - W || my.warp_row >= end_row) continue;
      Sum p[blocks][step / 8], ds[blocks][step / 8];
      clear(p);
      clear(ds);
      multiply_rows<d>(p, q, k_tile, j);
      multiply_rows<d>(ds, dout, v_tile, j);
      add_alibi<0>(p, my, key, scale, slope, lse);
      if (key + step - 1 > my.warp_row || key < my.end() - 1 - W) hide<false>(p, my, key, W);
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int c = 0; c < step / 8; c++)
#pragma unroll
          for (int e = 0; e < 4; e++) ds[i][c][e] = fast_exp2(p[i][c][e]) * (ds[i][c][e] - delta[i][e / 2]);
      multiply_columns<d>(dq, ds, k_tile, j);
    }
  }
  scale_sums(dq, attention_scale(d));
  store_sums<d>(dqkv + (at.b * w.T + at.base) * 3 * D + static_cast<int64_t>(at.h) * d, 3 * D, q_memory, my.warp_row,
                dq, end_row);
}

// dK = dS^T Q, dV = P^T dO: a block owns keys; p and ds are made transposed, keys being their rows.
template <int d>
__global__ void __launch_bounds__(window_threads, key_plan(d).residents)
    sliding_attention_backward_key_mma_kernel(bf16* dqkv,  // (B,T,3D)
                                              WindowGradient g, SlidingRows<bf16> w) {
  constexpr WindowPlan plan = key_plan(d);
  constexpr int blocks = plan.blocks(), step = plan.slots_at_once, stages = plan.stages, rows = plan.rows();
  constexpr int rows_bytes = plan.rows_bytes(), tile_bytes = plan.tile_bytes();
  static_assert(plan.holds());
  bf16* const k_memory = shared<bf16>();
  const uint32_t k_tile = shared_address(k_memory), v_tile = k_tile + rows_bytes, ring = v_tile + rows_bytes;
  const uint32_t statistics_ring = ring + stages * 2 * tile_bytes;
  const WindowPiece at(w, rows);
  const WarpRows<blocks> my;
  const int64_t D = w.D(), column = static_cast<int64_t>(at.h) * d, padded = WindowGradient::padded(w.T);
  const int W = at.W, end_row = static_cast<int>(min(w.T - at.base, int64_t{rows}));
  const int queries = static_cast<int>(min(w.T - at.base, rows + w.W)), tiles = (queries + tile_size - 1) / tile_size;
  const bf16* const q_from = w.qkv + (at.b * w.T + at.base) * 3 * D + column;
  const bf16* const dout_from = g.dout + (at.b * w.T + at.base) * D + column;
  const float2* const statistics_from = g.statistics + (at.b * w.H + at.h) * padded + at.base + threadIdx.x * 2;
  auto copy = [&](int tile) {
    if (tile < tiles) {
      const int query = tile * tile_size, there = static_cast<int>(min(w.T - at.base, int64_t{1} << 30)) - query;
      const uint32_t pair = ring + tile % stages * 2 * tile_bytes;
      copy_rows<d, tile_size>(pair, q_from + query * 3 * D, 3 * w.H * d, there);
      copy_rows<d, tile_size>(pair + tile_bytes, dout_from + query * D, w.H * d, there);
      if (threadIdx.x < statistics_bytes / 16)
        copy_async(statistics_ring + tile % stages * statistics_bytes + threadIdx.x * 16, statistics_from + query);
    }
    commit_copies();
  };
  copy_rows<d, rows>(k_tile, q_from + D, 3 * w.H * d, end_row);
  copy_rows<d, rows>(v_tile, q_from + 2 * D, 3 * w.H * d, end_row);
#pragma unroll
  for (int tile = 0; tile < stages - 1; tile++) copy(tile);

  const float scale = attention_scale(d) * log2_e, slope = log2_e * w.slope(at.h);
  Operand k[d / 16][blocks], v[d / 16][blocks];
  Sum dk[blocks][d / 8], dv[blocks][d / 8];
  clear(dk);
  clear(dv);
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<stages - 2>();
    __syncthreads();
    copy(tile + stages - 1);
    if (plan.operands_kept && tile == 0) {
      load_lefts<d>(k, k_tile, my.warp_row);
      load_lefts<d>(v, v_tile, my.warp_row);
    }
    const uint32_t q_tile = ring + tile % stages * 2 * tile_bytes, dout_tile = q_tile + tile_bytes;
    const float4* statistics = reinterpret_cast<const float4*>(
        reinterpret_cast<const char*>(k_memory) + (statistics_ring - k_tile) + tile % stages * statistics_bytes);
#pragma unroll 1
    for (int i0 = 0; i0 < tile_size; i0 += step) {
      const int query = tile * tile_size + i0;  // of the step's first column
      if (query + step <= my.warp_row || query >= my.end() + W || my.warp_row >= end_row) continue;
      Sum p[blocks][step / 8], ds[blocks][step / 8];
      clear(p);
      clear(ds);
      if constexpr (plan.operands_kept) {
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
        as_lefts(left, p, s);
        multiply_columns<d>(dv, left, dout_tile, i0 + 16 * s);
        as_lefts(left, ds, s);
        multiply_columns<d>(dk, left, q_tile, i0 + 16 * s);
      }
    }
  }
  scale_sums(dk, attention_scale(d));
  bf16* to = dqkv + (at.b * w.T + at.base) * 3 * D + D + column;
  store_sums<d>(to, 3 * D, k_memory, my.warp_row, dk, end_row);
  store_sums<d>(to + D, 3 * D, k_memory, my.warp_row, dv, end_row);
}

}  // namespace

void sliding_attention_backward_mma(cudaStream_t stream, bf16* dqkv, const bf16* dout, const bf16* out,
                                    const float* lse, float2* statistics, const SlidingRows<bf16>& w) {
  const WindowGradient g{dout, out, lse, statistics};
  with_mma_head(w.d, [&](auto d) {
    constexpr WindowPlan query = query_plan(d), key = key_plan(d);
    launch("sliding attention, backward by query", stream, sliding_attention_backward_query_mma_kernel<d>,
           window_pieces(w, query.rows()), window_threads, query_bytes(query), dqkv, g, w);
    launch("sliding attention, backward by key", stream, sliding_attention_backward_key_mma_kernel<d>,
           window_pieces(w, key.rows()), window_threads, key_bytes(key), dqkv, g, w);
  });
}

}  // namespace gca
