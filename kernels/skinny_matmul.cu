// Matrix products y = x W^T (+ residual) of at most 16 rows, as decoding makes them: every weight is read once, so the
// time is that of reading W, whatever the rows. On tensor cores (m16n8k16) with the rows as the 16 of one side, those
// that are not there being zeros: a row's sums are made in one order, so it has the same bits alone and among others.
//
//               columns `in` of x and W
//             warp 0   warp 1  ...  last warp     A warp owns a slice of `in`: `steps` times 32 columns. Its slice of x
//            +--------+--------+--+--------+      stays in registers; of W it reads 16 bytes a lane and step, lanes
//   16 rows  | x      | x      |  | x      |      4 i .. 4 i + 3 side by side in row i: two products' right factor as
//            +--------+--------+--+--------+      it lies in memory, since a sum over 32 columns may take them in any
//   outputs  | W      | W      |  | W      |      order that x and W agree on (8 neighbours of lane q are its columns
//   of a tile|        |        |  |        |      2q, 2q+1, 2q+8, 2q+9 of the first product, then of the second).
//            +--------+--------+--+--------+
//              = 16 x `columns` sums a warp; added over the warps in their order, then the residual, and rounded once
//
// What x is may be made on the way, by each block for itself, so that a norm or SwiGLU costs no kernel of its own: its
// prologue, between the loads of the first weights and their use. The kernel begins before the one ahead of it is done
// (launch_early): those loads wait for nothing.
//
// A block takes the tiles blockIdx.x, + gridDim.x, ..; the next tile's weights are on their way while this one is
// summed.
//
//   lane 4 i + q, step s        row i of x (and i + 8), output i of each 8: columns slice + 32 s + 8 q .. + 7
//   its registers               x 8 a step, W 4 a step and 8 outputs, sums 4 for 8 outputs
//
// Shared memory, static, in bytes; warps x steps x outputs of a tile:   8 x 4 x 16    16 x 4 x 16    16 x 8 x 8
//   sums of a tile by all warps, twice                                  16,384        32,768         16,384
//   SwiGLU: each warp's slice of its result                              8,192        16,384         32,768
//   a norm: sums of squares of a row by all warps                          512         1,024              -
// The sums are filled by all lanes at the end of a tile and read after its one barrier; a buffer is written again one
// barrier after it was read. A slice of SwiGLU is written and read by its warp alone, once; the squares are filled by a
// lane of each quad, once, and read after a barrier.
#include "gca_kernels.cuh"
#include "kernels/mma/mma.cuh"
#include "kernels/skinny_matmul.cuh"
#include "kernels/swiglu.cuh"

namespace gca {
namespace {

constexpr int most_rows = 16, step_columns = 32;
// SwiGLU is made by each block: of more rows that takes longer than a kernel of its own.
constexpr int most_swiglu_rows = 4;
// Of a norm x, gain and the weights are in registers together.
constexpr int64_t most_norm_columns = 16 * 4 * step_columns;

enum class Prologue { none, norm, swiglu };  // of x: as it is; gain * x * rstd; silu(gate) * up

// 16 bytes that this block alone reads, once: no place in the first cache.
__device__ inline uint4 load_once(const bf16* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// Two neighbours in bf16, the first in the lower half.
__device__ inline float2 unpack_pair(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
// body(a float2 of x, of y) for each pair of neighbours, into a word of the result
template <class Words, class Body>
__device__ inline Words by_pairs(const Words& x, const Words& y, Body body) {
  Words result;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof x / 4); i++)
    reinterpret_cast<uint32_t*>(&result)[i] = body(unpack_pair(reinterpret_cast<const uint32_t*>(&x)[i]),
                                                   unpack_pair(reinterpret_cast<const uint32_t*>(&y)[i]));
  return result;
}

// Keeps the compiler from holding on to what it has unpacked, which is twice the registers.
__device__ inline void unpack_anew(uint4& x) { asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)); }

template <Prologue prologue, int warps, int steps, int columns>
__global__ void __launch_bounds__(32 * warps)
    skinny_matmul_kernel(bf16* y,               // (rows,out)
                         const bf16* x,         // (rows,in); of SwiGLU (rows,2 in): gate | up
                         const bf16* gain,      // (in): of a norm
                         float eps,             // the same
                         const bf16* W,         // (out,in)
                         const bf16* residual,  // (rows,out) or null
                         int rows, int64_t in, int64_t out) {
  constexpr int tile = most_rows * columns, eights = columns / 8;
  __shared__ float of_warp[2][warps][tile];
  static_assert(sizeof of_warp == 128 * warps * columns && sizeof of_warp <= 48 << 10, "the map above");
  static_assert(tile <= 32 * warps, "a thread adds up one output");
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / 32, lane_row = lane / 4;
  const int64_t slice = warp * steps * step_columns, begin = slice + lane % 4 * 8;  // the lane's first column of `in`

  uint4 w[steps][eights];
  // The lane's weights of the outputs first ..: zeros behind `in`; behind `out` anything, which is not stored.
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int j = 0; j < eights; j++) {
      const bf16* row = W + min(first + 8 * j + lane_row, out - 1) * in + begin;
#pragma unroll
      for (int s = 0; s < steps; s++)
        w[s][j] = begin + s * step_columns < in ? load_once(row + s * step_columns) : uint4{};
    }
  };
  int64_t first = blockIdx.x * int64_t{columns};
  load(first);  // before x: weights come from afar, x from the second cache
  let_next_begin();
  uint4 upper[steps], lower[steps];  // of x, the lane's columns of rows lane_row and lane_row + 8
  if constexpr (prologue == Prologue::swiglu) {
    // The slice's columns, four at a time, are shared among the lanes whatever the rows.
    __shared__ __align__(16) uint2 made[warps][most_swiglu_rows][steps * 8];
    static_assert(sizeof made == 256 * warps * steps && sizeof made + sizeof of_warp <= 48 << 10, "the map above");
    wait_for_earlier();
    for (int i = lane; i < rows * steps * 8; i += 32) {
      const int r = i / (steps * 8), four = i % (steps * 8);
      const int64_t at = slice + 4 * four;
      const bf16* gate = x + 2 * r * in + at;
      if (at < in)
        made[warp][r][four] =
            by_pairs(*reinterpret_cast<const uint2*>(gate), *reinterpret_cast<const uint2*>(gate + in),
                     [](float2 z, float2 up) { return pack_pair(swiglu(z.x, up.x), swiglu(z.y, up.y)); });
      else made[warp][r][four] = {};
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < steps; s++) {
      upper[s] =
          lane_row < rows
              ? *reinterpret_cast<const uint4*>(&made[warp][min(lane_row, most_swiglu_rows - 1)][8 * s + lane % 4 * 2])
              : uint4{};
      lower[s] = {};
    }
  } else {
    uint4 by[steps];  // gain, which nothing writes
    if constexpr (prologue == Prologue::norm) {
#pragma unroll
      for (int s = 0; s < steps; s++) {
        const int64_t at = begin + s * step_columns;
        by[s] = at < in ? *reinterpret_cast<const uint4*>(gain + at) : uint4{};
      }
    }
    wait_for_earlier();
#pragma unroll
    for (int s = 0; s < steps; s++) {
      const int64_t at = begin + s * step_columns;
      const auto part = [&](int row) {
        return row < rows && at < in ? *reinterpret_cast<const uint4*>(x + row * in + at) : uint4{};
      };
      upper[s] = part(lane_row);
      lower[s] = part(lane_row + 8);
    }
    if constexpr (prologue == Prologue::norm) {
      __shared__ float squares[warps][most_rows];
      static_assert(sizeof squares == 64 * warps, "the map above");
      const auto sum_squares = [&](const uint4(&of)[steps], int row) {
        float sum = 0;
#pragma unroll
        for (int s = 0; s < steps; s++)
#pragma unroll
          for (const uint32_t pair : {of[s].x, of[s].y, of[s].z, of[s].w}) {
            const float2 at = unpack_pair(pair);
            sum = fmaf(at.y, at.y, fmaf(at.x, at.x, sum));
          }
        sum = warp_sum<4>(sum);
        if (lane % 4 == 0) squares[warp][row] = sum;
      };
      const auto scale = [&](uint4(&of)[steps], int row) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < warps; i++) sum += squares[i][row];
        const float rstd = 1 / sqrtf(sum / static_cast<float>(in) + eps);
#pragma unroll
        for (int s = 0; s < steps; s++) {
          unpack_anew(of[s]);
          unpack_anew(by[s]);
          of[s] = by_pairs(of[s], by[s],
                           [rstd](float2 a, float2 g) { return pack_pair(g.x * a.x * rstd, g.y * a.y * rstd); });
        }
      };
      sum_squares(upper, lane_row);
      if (rows > 8) sum_squares(lower, lane_row + 8);
      __syncthreads();
      scale(upper, lane_row);
      if (rows > 8) scale(lower, lane_row + 8);
    }
  }

  const int row = static_cast<int>(threadIdx.x) / columns, column = static_cast<int>(threadIdx.x) % columns;
  for (int buffer = 0; first < out; buffer ^= 1) {
    const int64_t place = row * out + first + column;
    const bool stores = row < rows && first + column < out;
    const float added = stores && residual ? to_float(residual[place]) : 0.0f;
    Sum sum[eights] = {};
#pragma unroll
    for (int s = 0; s < steps; s++) {
      const Operand left[2] = {{upper[s].x, lower[s].x, upper[s].y, lower[s].y},
                               {upper[s].z, lower[s].z, upper[s].w, lower[s].w}};
#pragma unroll
      for (int j = 0; j < eights; j++) {
        mma(sum[j], left[0], w[s][j].x, w[s][j].y);
        mma(sum[j], left[1], w[s][j].z, w[s][j].w);
      }
    }
    first += gridDim.x * int64_t{columns};
    if (first < out) load(first);
#pragma unroll
    for (int j = 0; j < eights; j++) {
      float* to = of_warp[buffer][warp] + lane_row * columns + 8 * j + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = {sum[j][0], sum[j][1]};
      *reinterpret_cast<float2*>(to + 8 * columns) = {sum[j][2], sum[j][3]};
    }
    __syncthreads();
    if (stores) {
      float total = of_warp[buffer][0][threadIdx.x];
#pragma unroll
      for (int i = 1; i < warps; i++) total += of_warp[buffer][i][threadIdx.x];
      y[place] = __float2bfloat16(total + added);
    }
  }
}

// How a product is cut. warps and steps depend on `in` alone: they are the order of the sums.
struct SkinnyPlan {
  int warps;      // of a block: each owns a slice of `in`
  int steps;      // of 32 columns, of a slice: its x and W are in registers
  int columns;    // outputs of a tile
  int64_t tiles;  // of all outputs
  int64_t blocks;
};
constexpr int64_t most_columns = 16 * 8 * step_columns;  // of `in`: 16 warps of 8 steps

// 8 warps up to 1,024 columns, 16 from there on: a step more of a warp is 12 to 16 registers more of a lane. Tiles of
// 16 outputs halve the barriers, and the reads of x beside those of W; of 8 where tiles of 16 would leave
// multiprocessors without one (768 outputs are 96 tiles of 8). Two blocks of 8 warps a multiprocessor, or one of 16,
// have 48 to 64 KiB on their way (768 or 2,048 columns): 3 TB/s on 132 multiprocessors are 13 bytes a clock each, and
// with 1,000 clocks until a weight is there 13 KiB would do.
SkinnyPlan skinny_plan(int64_t in, int64_t out, int processors) {
  SkinnyPlan plan{};
  plan.warps = in <= 8 * 4 * step_columns ? 8 : 16;
  const int64_t steps = ceil_div(in, int64_t{plan.warps} * step_columns);
  plan.steps = static_cast<int>(steps > 4 ? 8 : plan.warps == 16 ? 4 : std::max<int64_t>(2, steps));
  plan.columns = plan.steps <= 4 && ceil_div(out, 16) >= processors ? 16 : 8;
  plan.tiles = ceil_div(out, plan.columns);
  plan.blocks = std::min<int64_t>(plan.tiles, int64_t{processors} * (plan.warps == 8 ? 2 : 1));
  return plan;
}

// body(warps, steps, columns), constants
template <class Body>
void with_plan(const SkinnyPlan& plan, Body&& body) {
  const auto with_columns = [&](auto warps, auto steps) {
    if constexpr (steps <= 4) {
      if (plan.columns == 16) return body(warps, steps, std::integral_constant<int, 16>{});
    }
    body(warps, steps, std::integral_constant<int, 8>{});
  };
  if (plan.warps == 16 && plan.steps == 8)
    with_columns(std::integral_constant<int, 16>{}, std::integral_constant<int, 8>{});
  else if (plan.warps == 16) with_columns(std::integral_constant<int, 16>{}, std::integral_constant<int, 4>{});
  else if (plan.steps == 4) with_columns(std::integral_constant<int, 8>{}, std::integral_constant<int, 4>{});
  else if (plan.steps == 3) with_columns(std::integral_constant<int, 8>{}, std::integral_constant<int, 3>{});
  else with_columns(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{});
}

template <Prologue prologue>
void skinny_product(const Doing& doing, cudaStream_t stream, int processors, bf16* y, const bf16* x, const bf16* gain,
                    double eps, const bf16* W, const bf16* residual, int64_t rows, int64_t in, int64_t out) {
  const SkinnyPlan plan = skinny_plan(in, out, processors);
  with_plan(plan, [&](auto warps, auto steps, auto columns) {
    if constexpr (prologue != Prologue::norm || warps * steps * step_columns <= most_norm_columns)
      launch_early(doing, stream, skinny_matmul_kernel<prologue, warps, steps, columns>, plan.blocks, 32 * warps, y, x,
                   gain, static_cast<float>(eps), W, residual, static_cast<int>(rows), in, out);
  });
}
bool aligned(const bf16* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

}  // namespace

bool skinny_matmul_fits(const bf16* x, const bf16* W, int64_t rows, int64_t in, int64_t out) {
  return rows >= 1 && rows <= most_rows && in >= 8 && in <= most_columns && in % 8 == 0 && out >= 1 && aligned(x) &&
         aligned(W);
}
bool skinny_norm_matmul_fits(const bf16* x, const bf16* gain, const bf16* W, int64_t rows, int64_t in, int64_t out) {
  return skinny_matmul_fits(x, W, rows, in, out) && in <= most_norm_columns && aligned(gain);
}
bool skinny_swiglu_matmul_fits(const bf16* gate_up, const bf16* W, int64_t rows, int64_t F, int64_t out) {
  return skinny_matmul_fits(gate_up, W, rows, F, out) && rows <= most_swiglu_rows;
}

void skinny_matmul(cudaStream_t stream, int processors, bf16* y, const bf16* x, const bf16* W, const bf16* residual,
                   int64_t rows, int64_t in, int64_t out) {
  skinny_product<Prologue::none>("product of few rows", stream, processors, y, x, nullptr, 0, W, residual, rows, in,
                                 out);
}
void skinny_norm_matmul(cudaStream_t stream, int processors, bf16* y, const bf16* x, const bf16* gain, double eps,
                        const bf16* W, int64_t rows, int64_t in, int64_t out) {
  skinny_product<Prologue::norm>("product of few normed rows", stream, processors, y, x, gain, eps, W, nullptr, rows,
                                 in, out);
}
void skinny_swiglu_matmul(cudaStream_t stream, int processors, bf16* y, const bf16* gate_up, const bf16* W,
                          const bf16* residual, int64_t rows, int64_t F, int64_t out) {
  skinny_product<Prologue::swiglu>("product of few rows of SwiGLU", stream, processors, y, gate_up, nullptr, 0, W,
                                   residual, rows, F, out);
}

}  // namespace gca
