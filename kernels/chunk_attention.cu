// The encoder's attention: bidirectional inside a chunk, with rotary embedding on q and k (drt.md, chunk encoder): pair
// (t, t + d/2) of slot p turns by p * 10000^(-2t/d). q and k are turned as they are loaded; their gradients, made in
// the turned frame, are turned back.
#include "kernels/mma/mma.cuh"
#include "kernels/plain/attention.cuh"

namespace gca {
namespace {

template <class Act>
struct InChunk {
  int64_t B, T;  // chunks, and slots of one
  int H, d;
  const Act* qkv;         // (N,S,3D)
  const float* rotation;  // (S,d): cosines | sines
  static constexpr int64_t first_slot = 0;

  __device__ const Act* row(int64_t b, int64_t slot) const { return qkv + (b * T + slot) * 3 * H * d; }
  __device__ void load_turned(Tile& tile, int64_t b, int64_t slot, int t, int64_t column) const {
    const int columns = columns_of(d, t), half = d / 2;
    for (int i = static_cast<int>(threadIdx.x); i < tile_size * tile_size; i += tile_threads) {
      const int r = i / tile_size, c = i % tile_size, e = t * tile_size + c;
      float value = 0;
      if (slot + r < T && c < columns) {
        const Act* head = row(b, slot + r) + column;
        const float* angle = rotation + (slot + r) * d + e % half;
        const float u = to_float(head[e]), other = to_float(head[e < half ? e + half : e - half]);
        value = e < half ? u * angle[0] - other * angle[half] : u * angle[0] + other * angle[half];
      }
      tile[r][c] = value;
    }
  }
  __device__ void load_q(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load_turned(tile, b, slot, t, h * d);
  }
  __device__ void load_k(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load_turned(tile, b, slot, t, static_cast<int64_t>(H + h) * d);
  }
  __device__ void load_v(Tile& tile, int64_t b, int h, int64_t slot, int t) const {
    load_tile(tile, row(b, slot) + static_cast<int64_t>(2 * H + h) * d + t * tile_size, static_cast<int64_t>(3 * H) * d,
              static_cast<int>(min(int64_t{tile_size}, T - slot)), columns_of(d, t));
  }
  __device__ bool sees(int64_t, int64_t j) const { return j < T; }
  __device__ float slope(int) const { return 0; }
  __device__ int64_t first_key(int64_t) const { return 0; }
  __device__ int64_t end_key(int64_t) const { return T; }
  __device__ int64_t first_query(int64_t) const { return 0; }
  __device__ int64_t end_query(int64_t) const { return T; }
};

// q and k of dqkv (N,S,3D), turned by minus their slot's angles, in place
template <class Act>
__global__ void turn_back_kernel(Act* dqkv, const float* rotation, int64_t N, int S, int H, int d) {
  const int half = d / 2;
  const int64_t heads = 2 * H, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;  // q's heads, then k's
  if (i >= N * S * heads * half) return;
  const int64_t t = i % half, h = i / half % heads, slot = i / half / heads;
  Act* u = dqkv + (slot * 3 * H + h) * d + t;
  const float* angle = rotation + slot % S * d + t;
  const float first = to_float(u[0]), second = to_float(u[half]);
  u[0] = from_float<Act>(first * angle[0] + second * angle[half]);
  u[half] = from_float<Act>(second * angle[0] - first * angle[half]);
}

// ---- bf16 on tensor cores: chunks of 64 slots, heads of 32, 64 or 128 columns -------------------------------------
// A block of 4 warps takes one head of one chunk, each warp 16 of its slots; everything lies in shared memory, q and k
// turned. What bounds it is the memory's rate: every number is read once and written once.
constexpr int chunk_slots = 64, chunk_threads = 128;
template <int d>
constexpr int chunk_tile_bytes = row_bytes<chunk_slots * d>;  // rows lie without gaps
template <int d>
constexpr int chunk_forward_bytes = 3 * chunk_tile_bytes<d>;
template <int d>
constexpr int chunk_backward_bytes = 4 * chunk_tile_bytes<d> + 2 * chunk_tile_bytes<64>;

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
  constexpr int items = chunk_slots * pieces / chunk_threads;  // pairs of pieces (8 columns, and those d/2 further)
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
__global__ void __launch_bounds__(chunk_threads, d == 128 ? 3 : 4)
    chunk_forward_kernel(bf16* out, float* lse, InChunk<bf16> w) {
  char* const memory = shared<char>();
  const uint32_t q_tile = shared_address(memory), k_tile = q_tile + chunk_tile_bytes<d>,
                 v_tile = k_tile + chunk_tile_bytes<d>;
  const int64_t chunk = blockIdx.x / w.H, D = static_cast<int64_t>(w.H) * d;
  const int h = static_cast<int>(blockIdx.x % w.H), warp_row = static_cast<int>(threadIdx.x) / 32 * 16,
            lane = lane_id();
  const bf16* from = w.qkv + chunk * chunk_slots * 3 * D + h * d;
  copy_tile_async<d, chunk_slots, chunk_threads>(v_tile, from + 2 * D, 3 * D);
  commit_copies();
  load_turned_pair<d>(memory, memory + chunk_tile_bytes<d>, from, D, w.rotation);
  wait_for_copies<0>();
  __syncthreads();

  const float scale = log2_e / sqrtf(static_cast<float>(d));
  Sum p[1][8], o[1][d / 8];
  clear(p);
  clear(o);
  multiply_rows<d>(p, q_tile, warp_row, k_tile, 0);
  float top[2], sum[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = -INFINITY;
#pragma unroll
    for (int c = 0; c < 16; c++) largest = fmaxf(largest, p[0][c / 2][2 * half + c % 2]);
    top[half] = scale * warp_max<4>(largest);
    sum[half] = 0;
#pragma unroll
    for (int c = 0; c < 16; c++) {
      float& x = p[0][c / 2][2 * half + c % 2];
      x = fast_exp2(fmaf(x, scale, -top[half]));
      sum[half] += x;
    }
    sum[half] = warp_sum<4>(sum[half]);
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
    Operand left[1];
    as_left(left[0], p[0][2 * k], p[0][2 * k + 1]);
    multiply_columns<d>(o, left, v_tile, 16 * k);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float share = __fdividef(1.0f, sum[half]);
#pragma unroll
    for (int c = 0; c < d / 4; c++) o[0][c / 2][2 * half + c % 2] *= share;
    if (lane % 4 == 0)
      lse[(chunk * w.H + h) * chunk_slots + warp_row + 8 * half + lane / 4] = fmaf(top[half], ln_2, logf(sum[half]));
  }
  // The warp's own rows of q are used up.
  store_sums<d>(out + chunk * chunk_slots * D + h * d, D, reinterpret_cast<bf16*>(memory), warp_row, o, chunk_slots);
}

// Softmax rows are whole in a block, so delta = rowsum(P dP) and O need not be read. p and ds go through shared memory
// to be read transposed, by keys.
template <int d>
__global__ void __launch_bounds__(chunk_threads, d == 128 ? 2 : 4)
    chunk_backward_kernel(bf16* dqkv, const bf16* dout, const float* lse, InChunk<bf16> w) {
  char* const memory = shared<char>();
  const uint32_t q_tile = shared_address(memory), k_tile = q_tile + chunk_tile_bytes<d>,
                 v_tile = k_tile + chunk_tile_bytes<d>, dout_tile = v_tile + chunk_tile_bytes<d>,
                 p_tile = dout_tile + chunk_tile_bytes<d>, ds_tile = p_tile + chunk_tile_bytes<64>;
  const int64_t chunk = blockIdx.x / w.H, D = static_cast<int64_t>(w.H) * d;
  const int h = static_cast<int>(blockIdx.x % w.H), warp_row = static_cast<int>(threadIdx.x) / 32 * 16,
            lane = lane_id();
  const bf16* from = w.qkv + chunk * chunk_slots * 3 * D + h * d;
  copy_tile_async<d, chunk_slots, chunk_threads>(v_tile, from + 2 * D, 3 * D);
  copy_tile_async<d, chunk_slots, chunk_threads>(dout_tile, dout + chunk * chunk_slots * D + h * d, D);
  commit_copies();
  load_turned_pair<d>(memory, memory + chunk_tile_bytes<d>, from, D, w.rotation);
  wait_for_copies<0>();
  __syncthreads();

  const float root = 1 / sqrtf(static_cast<float>(d)), scale = log2_e * root;
  Sum p[1][8], ds[1][8], dq[1][d / 8];
  clear(p);
  clear(ds);
  clear(dq);
  multiply_rows<d>(p, q_tile, warp_row, k_tile, 0);
  multiply_rows<d>(ds, dout_tile, warp_row, v_tile, 0);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float row_lse = log2_e * lse[(chunk * w.H + h) * chunk_slots + warp_row + 8 * half + lane / 4];
    float delta = 0;
#pragma unroll
    for (int c = 0; c < 16; c++) {
      float& x = p[0][c / 2][2 * half + c % 2];
      x = fast_exp2(fmaf(x, scale, -row_lse));
      delta = fmaf(x, ds[0][c / 2][2 * half + c % 2], delta);
    }
    delta = warp_sum<4>(delta);
#pragma unroll
    for (int c = 0; c < 16; c++) {
      float& y = ds[0][c / 2][2 * half + c % 2];
      y = p[0][c / 2][2 * half + c % 2] * (y - delta);
    }
    const int row = warp_row + 8 * half + lane / 4;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      *reinterpret_cast<uint32_t*>(memory + (p_tile - q_tile) + piece_at<64>(row, j) + lane % 4 * 4) =
          pack_pair(p[0][j][2 * half], p[0][j][2 * half + 1]);
      *reinterpret_cast<uint32_t*>(memory + (ds_tile - q_tile) + piece_at<64>(row, j) + lane % 4 * 4) =
          pack_pair(ds[0][j][2 * half], ds[0][j][2 * half + 1]);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
    Operand left[1];
    as_left(left[0], ds[0][2 * k], ds[0][2 * k + 1]);
    multiply_columns<d>(dq, left, k_tile, 16 * k);
  }
  __syncthreads();  // p and ds are there, and nobody reads v any more: gradients leave through its rows
  // sum over queries of x[query][key] y[query][column], for the warp's keys
  auto by_keys = [&](Sum(&sum)[1][d / 8], uint32_t x, uint32_t y) {
    clear(sum);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      Operand left[1];
      ldmatrix_transposed(left[0], corner<64>(x, lane_by_columns<64>(), 16 * k, warp_row));
      multiply_columns<d>(sum, left, y, 16 * k);
    }
  };
  Sum by_key[1][d / 8];
  by_keys(by_key, ds_tile, q_tile);
  turn_back<d>(dq, by_key, w.rotation, warp_row, root);
  bf16* const to = dqkv + chunk * chunk_slots * 3 * D + h * d;
  bf16* const way_out = reinterpret_cast<bf16*>(memory + (v_tile - q_tile));
  store_sums<d>(to, 3 * D, way_out, warp_row, dq, chunk_slots);
  store_sums<d>(to + D, 3 * D, way_out, warp_row, by_key, chunk_slots);
  by_keys(by_key, p_tile, dout_tile);
  store_sums<d>(to + 2 * D, 3 * D, way_out, warp_row, by_key, chunk_slots);
}

bool on_tensor_cores(const ChunkShape& s) { return s.S == chunk_slots && mma_head(s.d) && !plain_attention(); }
void forward_on_tensor_cores(cudaStream_t stream, bf16* out, float* lse, const InChunk<bf16>& w) {
  with_mma_head(w.d, [&](auto d) {
    launch("chunk attention", stream, chunk_forward_kernel<d>, w.B * w.H, chunk_threads, chunk_forward_bytes<d>, out,
           lse, w);
  });
}
void backward_on_tensor_cores(cudaStream_t stream, bf16* dqkv, const bf16* dout, const float* lse,
                              const InChunk<bf16>& w) {
  with_mma_head(w.d, [&](auto d) {
    launch("chunk attention, backward", stream, chunk_backward_kernel<d>, w.B * w.H, chunk_threads,
           chunk_backward_bytes<d>, dqkv, dout, lse, w);
  });
}

}  // namespace

template <class Act>
void Gpu<Act>::chunk_attention_forward(Act* out, float* lse, const Act* qkv, const ChunkShape& s) {
  const InChunk<Act> chunks{s.N, s.S, s.H, s.d, qkv, rotation(s.S, s.d)};
  if constexpr (std::is_same_v<Act, bf16>)
    if (on_tensor_cores(s)) return forward_on_tensor_cores(stream_, out, lse, chunks);
  launch_attention_forward("chunk attention", stream_, out, lse, chunks);
}
template <class Act>
void Gpu<Act>::chunk_attention_backward(Act* dqkv, const Act* dout, const Act* qkv, const Act* out, const float* lse,
                                        const ChunkShape& s) {
  const float* angles = rotation(s.S, s.d);
  const InChunk<Act> chunks{s.N, s.S, s.H, s.d, qkv, angles};
  if constexpr (std::is_same_v<Act, bf16>)
    if (on_tensor_cores(s)) return backward_on_tensor_cores(stream_, dqkv, dout, lse, chunks);
  launch_attention_backward("chunk attention, backward", stream_, dqkv, AttentionOutputs<Act>{dout, out, lse}, chunks);
  launch("chunk attention, turning back", stream_, turn_back_kernel<Act>, ceil_div(s.N * s.S * s.H * s.d, 256), 256, 0,
         dqkv, angles, s.N, s.S, s.H, s.d);
}

template void Gpu<float>::chunk_attention_forward(float*, float*, const float*, const ChunkShape&);
template void Gpu<bf16>::chunk_attention_forward(bf16*, float*, const bf16*, const ChunkShape&);
template void Gpu<float>::chunk_attention_backward(float*, const float*, const float*, const float*, const float*,
                                                   const ChunkShape&);
template void Gpu<bf16>::chunk_attention_backward(bf16*, const bf16*, const bf16*, const bf16*, const float*,
                                                  const ChunkShape&);

}  // namespace gca
