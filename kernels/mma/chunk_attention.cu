// The encoder's attention inside a chunk on tensor cores: bf16, chunks of 64 slots, heads of 32, 64 or 128 columns.
// A block of 4 warps takes one head of one chunk, each warp 16 of its slots; everything lies in shared memory, q and k
// turned. What bounds it is the memory's rate: every number is read once and written once.
//
//             keys 0 .. 63
//   warp 0  [ S S S S S S S S ]   16 queries x 64 keys: rows are whole in a warp, their softmax needs no loop
//   ..        of 4                S = q k^T, P in registers, o = P v
//
// Shared memory, heads of 64 columns (64 rows of 128 bytes each), filled once by all threads:
//        0  Q   turned by the threads that read it; forward: O leaves through it, each warp by its own rows
//    8,192  K   turned likewise
//   16,384  V   backward: free when P and dS are there; all three gradients leave through it
//   24,576  dO  backward alone, as what follows
//   32,768  P   each warp writes its 16 rows; read transposed, by keys, after a barrier
//   40,960  dS  likewise
//   49,152  end; forward 24,576
//
// A lane (mma.cuh): of its warp's 16 rows it holds rows r and r + 8, r = lane / 4, columns 2 (lane % 4) and the next in
// each 8: 8 Sums of S, 32 registers, and as many of dS. A row's maximum and sum are shuffles in a quad of lanes.
#include "kernels/chunk_attention.cuh"
#include "kernels/mma/mma.cuh"

namespace gca {
namespace {

struct ChunkPlan {
  int d;          // columns of a head
  int residents;  // blocks of a multiprocessor at once, which sets the registers of a thread
  GCA_HD constexpr int tile_bytes() const { return tile_size * d * static_cast<int>(sizeof(bf16)); }
};
constexpr int chunk_threads = 128;
// As many residents as leave a thread the registers that it needs.
GCA_HD constexpr ChunkPlan forward_plan(int d) { return {.d = d, .residents = d == 128 ? 3 : 4}; }
GCA_HD constexpr ChunkPlan backward_plan(int d) { return {.d = d, .residents = d == 128 ? 2 : 4}; }
constexpr int forward_bytes(ChunkPlan plan) { return 3 * plan.tile_bytes(); }
constexpr int p_bytes = tile_size * tile_size * static_cast<int>(sizeof(bf16));
constexpr int backward_bytes(ChunkPlan plan) { return 4 * plan.tile_bytes() + 2 * p_bytes; }
static_assert(forward_bytes(forward_plan(64)) == 24576 && backward_bytes(backward_plan(64)) == 49152, "the map above");

// A block's chunk and head.
struct ChunkPiece {
  int64_t chunk;
  int h;
  __device__ explicit ChunkPiece(const ChunkRows<bf16>& w)
      : chunk(blockIdx.x / w.H), h(static_cast<int>(blockIdx.x % w.H)) {}
};
// i with the bit of value 4 and a lower one exchanged: 8 neighbouring threads then write pieces in rows whose swizzles
// differ, to all banks.
template <int d>
__device__ inline int spread(int i) {
  if (d == 128) return i;  // they write one row
  constexpr int low = d == 64 ? 1 : 2;
  return (i & ~(4 | low)) | (i & 4 ? low : 0) | (i & low ? 4 : 0);
}
// q and k of a head, turned, into tiles: q at from, k at from + D, slots 3 D apart. rotation (S,d)
template <int d>
__device__ inline void load_turned_pair(char* q_tile, char* k_tile, const bf16* from, int64_t D,
                                        const float* rotation) {
  constexpr int pieces = d / 16;
  constexpr int items = tile_size * pieces / chunk_threads;  // pairs of pieces (8 columns, and those d/2 further)
#pragma unroll
  for (int i = 0; i < items; i++) {
    const int item = static_cast<int>(threadIdx.x) + i * chunk_threads, row = spread<d>(item / pieces),
              piece = item % pieces;
    Pack<bf16, 8> pair[2][2];
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
      for (int side = 0; side < 2; side++)
        pair[which][side] = load_pack<8>(from + row * 3 * D + which * D + side * (d / 2) + piece * 8);
    const float* angle = rotation + row * d + piece * 8;
    const Pack<float, 4> cosine[2] = {load_pack<4>(angle), load_pack<4>(angle + 4)},
                         sine[2] = {load_pack<4>(angle + d / 2), load_pack<4>(angle + d / 2 + 4)};
#pragma unroll
    for (int which = 0; which < 2; which++) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float u = to_float(pair[which][0].at[e]), v = to_float(pair[which][1].at[e]), c = cosine[e / 4].at[e % 4],
                    s = sine[e / 4].at[e % 4];
        pair[which][0].at[e] = from_float<bf16>(u * c - v * s);
        pair[which][1].at[e] = from_float<bf16>(v * c + u * s);
      }
      char* tile = which == 0 ? q_tile : k_tile;
#pragma unroll
      for (int side = 0; side < 2; side++)
        store_pack(reinterpret_cast<bf16*>(tile + piece_at<d>(row, piece + side * pieces)), pair[which][side]);
    }
  }
}
// Gradients of a warp's turned rows of q and of k, scaled and turned back. rotation (S,d)
template <int d>
__device__ inline void turn_back(Sum (&dq)[1][d / 8], Sum (&dk)[1][d / 8], const float* rotation, int warp_row,
                                 float scale) {
  const int lane = lane_id();
#pragma unroll
  for (int j = 0; j < d / 16; j++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* angle = rotation + (warp_row + 8 * half + lane / 4) * d + 8 * j + lane % 4 * 2;
      const Pack<float, 2> cosine = load_pack<2>(angle), sine = load_pack<2>(angle + d / 2);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float c = scale * cosine.at[e], s = scale * sine.at[e];
        auto turn = [&](float& first, float& second) {
          const float u = first, v = second;
          first = u * c + v * s;
          second = v * c - u * s;
        };
        turn(dq[0][j][2 * half + e], dq[0][j + d / 16][2 * half + e]);
        turn(dk[0][j][2 * half + e], dk[0][j + d / 16][2 * half + e]);
      }
    }
}

template <int d>
__global__ void __launch_bounds__(chunk_threads, forward_plan(d).residents)
    chunk_attention_forward_mma_kernel(bf16* out,   // (N,S,D)
                                       float* lse,  // (N,H,S)
                                       ChunkRows<bf16> w) {
  constexpr int tile_bytes = forward_plan(d).tile_bytes();
  char* const memory = shared<char>();
  const uint32_t q_tile = shared_address(memory), k_tile = q_tile + tile_bytes, v_tile = k_tile + tile_bytes;
  const auto [chunk, h] = ChunkPiece(w);
  const int64_t D = static_cast<int64_t>(w.H) * d;
  const WarpRows<1> my;
  const bf16* from = w.qkv + chunk * tile_size * 3 * D + h * d;
  copy_tile_async<d, tile_size, chunk_threads>(v_tile, from + 2 * D, 3 * D);
  commit_copies();
  load_turned_pair<d>(memory, memory + tile_bytes, from, D, w.rotation);
  wait_for_copies<0>();
  __syncthreads();

  const float scale = attention_scale(d) * log2_e;
  Sum p[1][8], o[1][d / 8];
  clear(p);
  clear(o);
  multiply_rows<d>(p, q_tile, my.warp_row, k_tile, 0);
  float top[2], sum[2];
#pragma unroll
  for (int half = 0; half < 2; half++) exponentials(p[0], half, scale, top[half], sum[half]);
  multiply_columns<d>(o, p, v_tile, 0);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    scale_row(o[0], half, __fdividef(1.0f, sum[half]));
    if (my.lane_column == 0)
      lse[(chunk * w.H + h) * tile_size + my.row(0, half)] = fmaf(top[half], ln_2, logf(sum[half]));
  }
  // The warp's own rows of q are used up.
  store_sums<d>(out + chunk * tile_size * D + h * d, D, reinterpret_cast<bf16*>(memory), my.warp_row, o, tile_size);
}

// Softmax rows are whole in a block, so delta = rowsum(P dP) and O need not be read. p and ds go through shared memory
// to be read transposed, by keys.
template <int d>
__global__ void __launch_bounds__(chunk_threads, backward_plan(d).residents)
    chunk_attention_backward_mma_kernel(bf16* dqkv,        // (N,S,3D)
                                        const bf16* dout,  // (N,S,D)
                                        const float* lse,  // (N,H,S)
                                        ChunkRows<bf16> w) {
  constexpr int tile_bytes = backward_plan(d).tile_bytes();
  char* const memory = shared<char>();
  const uint32_t q_tile = shared_address(memory), k_tile = q_tile + tile_bytes, v_tile = k_tile + tile_bytes,
                 dout_tile = v_tile + tile_bytes, p_tile = dout_tile + tile_bytes, ds_tile = p_tile + p_bytes;
  const auto [chunk, h] = ChunkPiece(w);
  const int64_t D = static_cast<int64_t>(w.H) * d;
  const WarpRows<1> my;
  const bf16* from = w.qkv + chunk * tile_size * 3 * D + h * d;
  copy_tile_async<d, tile_size, chunk_threads>(v_tile, from + 2 * D, 3 * D);
  copy_tile_async<d, tile_size, chunk_threads>(dout_tile, dout + chunk * tile_size * D + h * d, D);
  commit_copies();
  load_turned_pair<d>(memory, memory + tile_bytes, from, D, w.rotation);
  wait_for_copies<0>();
  __syncthreads();

  const float root = attention_scale(d), scale = root * log2_e;
  Sum p[1][8], ds[1][8], dq[1][d / 8];
  clear(p);
  clear(ds);
  clear(dq);
  multiply_rows<d>(p, q_tile, my.warp_row, k_tile, 0);
  multiply_rows<d>(ds, dout_tile, my.warp_row, v_tile, 0);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float row_lse = log2_e * lse[(chunk * w.H + h) * tile_size + my.row(0, half)];
    const float delta = softmax_again(p[0], ds[0], half, scale, row_lse);
#pragma unroll
    for (int c = 0; c < 16; c++) {
      float& y = ds[0][c / 2][2 * half + c % 2];
      y = p[0][c / 2][2 * half + c % 2] * (y - delta);
    }
  }
  put_sums<tile_size>(memory + (p_tile - q_tile), my.warp_row, p);
  put_sums<tile_size>(memory + (ds_tile - q_tile), my.warp_row, ds);
  multiply_columns<d>(dq, ds, k_tile, 0);
  __syncthreads();  // p and ds are there, and nobody reads v any more: gradients leave through its rows
  // sum over queries of x[query][key] y[query][column], for the warp's keys
  auto by_keys = [&](Sum(&sum)[1][d / 8], uint32_t x, uint32_t y) {
    clear(sum);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      Operand left[1];
      ldmatrix_transposed(left[0], corner<64>(x, lane_by_columns<64>(), 16 * k, my.warp_row));
      multiply_columns<d>(sum, left, y, 16 * k);
    }
  };
  Sum by_key[1][d / 8];
  by_keys(by_key, ds_tile, q_tile);
  turn_back<d>(dq, by_key, w.rotation, my.warp_row, root);
  bf16* const to = dqkv + chunk * tile_size * 3 * D + h * d;
  bf16* const way_out = reinterpret_cast<bf16*>(memory + (v_tile - q_tile));
  store_sums<d>(to, 3 * D, way_out, my.warp_row, dq, tile_size);
  store_sums<d>(to + D, 3 * D, way_out, my.warp_row, by_key, tile_size);
  by_keys(by_key, p_tile, dout_tile);
  store_sums<d>(to + 2 * D, 3 * D, way_out, my.warp_row, by_key, tile_size);
}

}  // namespace

void chunk_attention_forward_mma(cudaStream_t stream, bf16* out, float* lse, const ChunkRows<bf16>& w) {
  with_mma_head(w.d, [&](auto d) {
    constexpr ChunkPlan plan = forward_plan(d);
    launch("chunk attention", stream, chunk_attention_forward_mma_kernel<d>, w.B * w.H, chunk_threads,
           forward_bytes(plan), out, lse, w);
  });
}
void chunk_attention_backward_mma(cudaStream_t stream, bf16* dqkv, const bf16* dout, const float* lse,
                                  const ChunkRows<bf16>& w) {
  with_mma_head(w.d, [&](auto d) {
    constexpr ChunkPlan plan = backward_plan(d);
    launch("chunk attention, backward", stream, chunk_attention_backward_mma_kernel<d>, w.B * w.H, chunk_threads,
           backward_bytes(plan), dqkv, dout, lse, w);
  });
}

}  // namespace gca
