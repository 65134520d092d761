// Products on tensor cores (mma.sync m16n8k16: bf16 operands, float sums; sm_80 and newer), by warps, of tiles in
// shared memory: what the three attentions share where they take bf16 and heads of 32, 64 or 128 columns.
//
// A tile has rows of `width` bf16 without gaps, its 16-byte pieces swizzled (piece_at): 8 rows of one column of pieces,
// as ldmatrix reads them, and 8 neighbours in a row, as copies write them, touch each of the 32 banks once. A tile is
// known by its address in shared memory, a multiple of 16.
//
//   width 64: place   0  1  2  3  4  5  6  7     places of 16 bytes in a row of 128: banks 0-3, 4-7, .. 28-31
//             row 0   0  1  2  3  4  5  6  7     which piece lies there: place = piece ^ row % 8
//             row 1   1  0  3  2  5  4  7  6     columns 0-7 of the tile (piece 0) stand at places 0, 1, 2, .. in
//             row 2   2  3  0  1  6  7  4  5     rows 0, 1, 2, ..; without the swizzle all would be in banks 0-3,
//             row 3   3  2  1  0  7  6  5  4     and reading them would take 8 turns for 1
//             ..
//
// A kernel's plan is a struct with named fields that one function chooses by the head's size, beside the reason. (As a
// template argument of a kernel it would show in a profile, but nvcc 13.0 makes host code of such that does not
// compile.)
//
// What a lane of a warp holds, with row = lane / 4 and column = 2 * (lane % 4):
//   Sum       16 x 8 floats:   [0], [1] at (row, column), (row, column + 1);  [2], [3] the same in row + 8
//   Operand   16 x 16 bf16, the left factor: pairs of neighbours at (row, column), (row + 8, column),
//             (row, column + 8), (row + 8, column + 8)
//   Operand   16 x 16 bf16, the right factor of two sums: [0], [1] for the first 8 columns of the product, [2], [3] for
//             the next 8
// Two neighbouring Sums, 16 x 16, are therefore a left factor as they stand (as_left).
//
//   a Sum        column  0 1   2 3   4 5   6 7            a left Operand      columns 0..7   8..15
//        [0][1]  row 0   l0    l1    l2    l3             four 8 x 8, lanes   row  0..7   [0]   [2]
//                row 1   l4    l5    l6    l7             as in a Sum's       row 8..15   [1]   [3]
//                ..                                       upper half
//                row 7   l28   l29   l30   l31            a quad, lanes 4 r .. 4 r + 3, has all of rows r and r + 8:
//        [2][3]  row 8   l0    l1    l2    l3             a row's largest or its sum is two shuffles (warp_sum<4>)
//                ..
#pragma once
#include "kernels/attention.cuh"

namespace gca {

// body(d) with the head's size a constant, one of those that mma_head() allows.
template <class Body>
void with_mma_head(int d, Body&& body) {
  if (d == 32) body(std::integral_constant<int, 32>{});
  else if (d == 64) body(std::integral_constant<int, 64>{});
  else body(std::integral_constant<int, 128>{});
}

using Sum = float[4];
using Operand = uint32_t[4];

// ---- instructions -------------------------------------------------------------------------------------------------
__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
// sum += left * right, right being half of an Operand
__device__ inline void mma(Sum& sum, const Operand& left, uint32_t right0, uint32_t right1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}
// Four 8 x 8 matrices, lane l giving the address of row l % 8 of matrix l / 8; transposed: each of them.
__device__ inline void ldmatrix(Operand& to, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ inline void ldmatrix_transposed(Operand& to, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
// 16 bytes from global to shared memory, in the background; zeros where they are not `there` (from must be a valid
// address all the same).
__device__ inline void copy_async(uint32_t to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Closes a group of copies of this thread; wait_for_copies: until all but the last n groups of this thread are there. A
// barrier then makes them visible to the other threads.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
// 2^x, relative error 2^-22; 0 for minus infinity. log2 of a normal number, absolute error 2^-22 near 1, relative
// elsewhere.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_log2(float x) { return __log2f(x); }
constexpr float log2_e = 1.44269504f, ln_2 = 0.69314718f;

__device__ inline uint32_t pack_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
// Two neighbouring sums as a left factor in bf16.
__device__ inline void as_left(Operand& left, const Sum& first, const Sum& second) {
  left[0] = pack_pair(first[0], first[1]);
  left[1] = pack_pair(first[2], first[3]);
  left[2] = pack_pair(second[0], second[1]);
  left[3] = pack_pair(second[2], second[3]);
}

// ---- tiles --------------------------------------------------------------------------------------------------------
template <int width>
constexpr int row_bytes = static_cast<int>(sizeof(bf16)) * width;
// Byte of the 16-byte piece `piece` of a row.
template <int width>
GCA_HD constexpr uint32_t piece_at(int row, int piece) {
  static_assert(width == 32 || width == 64 || width == 128, "the swizzle is made for rows of 64, 128 or 256 bytes");
  const int turn = width == 32 ? row / 2 % 4 : row % 8;
  return static_cast<uint32_t>(row * row_bytes<width> + ((piece ^ turn) * 16));
}
// Whether any 8 rows that ldmatrix reads together, from a multiple of 8 on, lie in 8 different places of 4 banks.
template <int width>
constexpr bool reads_every_bank_once() {
  for (int piece = 0; piece < width / 8; piece++) {
    uint32_t places = 0;
    for (int row = 0; row < 8; row++) places |= 1u << piece_at<width>(row, piece) / 16 % 8;
    if (places != 0xff || piece_at<width>(8, piece) != piece_at<width>(0, piece) + 8 * row_bytes<width>) return false;
  }
  return true;
}
static_assert(reads_every_bank_once<32>() && reads_every_bank_once<64>() && reads_every_bank_once<128>());
static_assert(piece_at<64>(2, 0) == 2 * 128 + 2 * 16 && piece_at<64>(3, 4) == 3 * 128 + 7 * 16, "the drawing above");
// A lane's part of the addresses that it gives to ldmatrix. `row` (a multiple of 8) and `column` (of 16) of the corner
// come by plain arithmetic, which costs nothing where they are constants: the swizzle of row + r is that of r, and
// column only turns bits.
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
template <int width>
__device__ inline uint32_t lane_by_rows() {  // of load_left and load_right_columns: 16 rows, then the next 8 columns
  return piece_at<width>(lane_id() % 16, lane_id() / 16);
}
template <int width>
__device__ inline uint32_t lane_by_columns() {  // of load_right_rows: 8 rows, the next 8 columns, then the next 8 rows
  return piece_at<width>(lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2);
}
template <int width>
__device__ inline uint32_t corner(uint32_t tile, uint32_t lane, int row, int column) {
  return tile + static_cast<uint32_t>(row * row_bytes<width>) + (lane ^ static_cast<uint32_t>(column * 2));
}
// Left factor: the tile's rows row.. and columns column.. as they stand, columns being what is summed over.
template <int width>
__device__ inline void load_left(Operand& left, uint32_t tile, int row, int column) {
  ldmatrix(left, corner<width>(tile, lane_by_rows<width>(), row, column));
}
// Right factor of a b^T, b in the tile: its rows row.. are columns of the product, it is summed over columns column..
template <int width>
__device__ inline void load_right_rows(Operand& right, uint32_t tile, int row, int column) {
  ldmatrix(right, corner<width>(tile, lane_by_columns<width>(), row, column));
}
// Right factor of a b, b in the tile: its rows row.. are summed over, its columns column.. are columns of the product.
template <int width>
__device__ inline void load_right_columns(Operand& right, uint32_t tile, int row, int column) {
  ldmatrix_transposed(right, corner<width>(tile, lane_by_rows<width>(), row, column));
}

// Starts copying `rows` rows, `stride` elements apart, into a tile, by `threads` threads (a multiple of width / 8) that
// all call it. The second form: rows from `there` on become zero.
template <int width, int rows, int threads, class CopyRow>
__device__ inline void copy_rows_async(uint32_t tile, const bf16* from, int64_t stride, CopyRow copy_row) {
  constexpr int pieces = width / 8, at_once = threads / pieces;
  static_assert(threads % pieces == 0 && rows % at_once == 0, "every thread copies the same number of pieces");
  const int piece = static_cast<int>(threadIdx.x) % pieces, first = static_cast<int>(threadIdx.x) / pieces;
  from += first * stride + piece * 8;
#pragma unroll
  for (int i = 0; i < rows / at_once; i++) {
    const int row = first + i * at_once;
    copy_row(tile + piece_at<width>(row, piece), from, row);
    from += at_once * stride;  // step by step: the products of i and the stride would all be kept in registers
  }
}
template <int width, int rows, int threads>
__device__ inline void copy_tile_async(uint32_t tile, const bf16* from, int64_t stride) {
  copy_rows_async<width, rows, threads>(tile, from, stride,
                                        [](uint32_t to, const bf16* at, int) { copy_async(to, at); });
}
template <int width, int rows, int threads>
__device__ inline void copy_tile_async(uint32_t tile, const bf16* from, int64_t stride, int there) {
  copy_rows_async<width, rows, threads>(tile, from, stride, [=](uint32_t to, const bf16* at, int row) {
    copy_async(to, row < there ? at : from, row < there);
  });
}

// ---- products of a warp: 16 * blocks rows -------------------------------------------------------------------------
template <int blocks, int columns>
__device__ inline void clear(Sum (&sum)[blocks][columns]) {
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int j = 0; j < columns; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
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
// One row of a block's sums: that of `half`.
template <int columns>
__device__ inline void scale_row(Sum (&sum)[columns], int half, float factor) {
#pragma unroll
  for (int c = 0; c < 2 * columns; c++) sum[c / 2][2 * half + c % 2] *= factor;
}
// Where a lane's numbers of its warp's sums lie: rows of the block, and the first of two columns in each 8. Half 0 of a
// Sum is [0], [1], half 1 is [2], [3]; a row lies in a quad of lanes.
template <int blocks>
struct WarpRows {
  int warp_row, lane_row, lane_column;
  __device__ WarpRows()
      : warp_row(static_cast<int>(threadIdx.x) / 32 * 16 * blocks),
        lane_row(lane_id() / 4),
        lane_column(lane_id() % 4 * 2) {}
  __device__ int row(int i, int half) const { return warp_row + 16 * i + 8 * half + lane_row; }
  __device__ int end() const { return warp_row + 16 * blocks; }
};
// A warp's rows of a tile as left factors, to be kept: left[k][i] are columns 16 k.., rows row + 16 i..
template <int width, int blocks>
__device__ inline void load_lefts(Operand (&left)[width / 16][blocks], uint32_t tile, int row) {
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int k = 0; k < width / 16; k++) load_left<width>(left[k][i], tile, row + 16 * i, 16 * k);
}
// sum += a b^T over 16 of the columns that are summed over, from `column` on. a: one left factor a block; b: the tile's
// rows row.., as many as the product has columns
template <int width, int blocks, int columns>
__device__ inline void multiply_rows(Sum (&sum)[blocks][columns], const Operand (&a)[blocks], uint32_t b, int row,
                                     int column) {
  static_assert(columns % 2 == 0, "a right factor is of two sums");
#pragma unroll
  for (int j = 0; j < columns; j += 2) {
    Operand right;
    load_right_rows<width>(right, b, row + 8 * j, column);
#pragma unroll
    for (int i = 0; i < blocks; i++) {
      mma(sum[i][j], a[i], right[0], right[1]);
      mma(sum[i][j + 1], a[i], right[2], right[3]);
    }
  }
}
// Over all columns, a being kept (load_lefts) ...
template <int width, int blocks, int columns>
__device__ inline void multiply_rows(Sum (&sum)[blocks][columns], const Operand (&a)[width / 16][blocks], uint32_t b,
                                     int row) {
#pragma unroll
  for (int k = 0; k < width / 16; k++) multiply_rows<width>(sum, a[k], b, row, 16 * k);
}
// ... or in a tile too, its rows a_row.., read as they are needed.
template <int width, int blocks, int columns>
__device__ inline void multiply_rows(Sum (&sum)[blocks][columns], uint32_t a, int a_row, uint32_t b, int row) {
#pragma unroll
  for (int k = 0; k < width / 16; k++) {
    Operand left[blocks];
#pragma unroll
    for (int i = 0; i < blocks; i++) load_left<width>(left[i], a, a_row + 16 * i, 16 * k);
    multiply_rows<width>(sum, left, b, row, 16 * k);
  }
}
// sum += a b over 16 of the rows that are summed over. a: one left factor a block; b: the tile's rows row.., all its
// columns
template <int width, int blocks>
__device__ inline void multiply_columns(Sum (&sum)[blocks][width / 8], const Operand (&a)[blocks], uint32_t b,
                                        int row) {
#pragma unroll
  for (int j = 0; j < width / 8; j += 2) {
    Operand right;
    load_right_columns<width>(right, b, row, 8 * j);
#pragma unroll
    for (int i = 0; i < blocks; i++) {
      mma(sum[i][j], a[i], right[0], right[1]);
      mma(sum[i][j + 1], a[i], right[2], right[3]);
    }
  }
}

// Columns 16 k.. of a warp's sums, rounded, as left factors.
template <int blocks, int columns>
__device__ inline void as_lefts(Operand (&left)[blocks], const Sum (&p)[blocks][columns], int k) {
#pragma unroll
  for (int i = 0; i < blocks; i++) as_left(left[i], p[i][2 * k], p[i][2 * k + 1]);
}
// sum += p b, p being the warp's own sums, rounded: over as many of b's rows, from `row` on, as p has columns.
template <int width, int blocks, int columns>
__device__ inline void multiply_columns(Sum (&sum)[blocks][width / 8], const Sum (&p)[blocks][columns], uint32_t b,
                                        int row) {
#pragma unroll
  for (int k = 0; k < columns / 2; k++) {
    Operand left[blocks];
    as_lefts(left, p, k);
    multiply_columns<width>(sum, left, b, row + 16 * k);
  }
}

// ---- softmax of rows that are whole in a warp's sums, logits in units of log2 -------------------------------------
// A row of logits p / scale becomes e^(logit - top); top and the sum of what it became, over the quad's lanes.
template <int columns>
__device__ inline void exponentials(Sum (&p)[columns], int half, float scale, float& top, float& sum) {
  top = -INFINITY;
#pragma unroll
  for (int c = 0; c < 2 * columns; c++) top = fmaxf(top, p[c / 2][2 * half + c % 2]);
  top = warp_max<4>(top) * scale;
  sum = 0;
#pragma unroll
  for (int c = 0; c < 2 * columns; c++) {
    float& x = p[c / 2][2 * half + c % 2];
    x = fast_exp2(fmaf(x, scale, -top));
    sum += x;
  }
  sum = warp_sum<4>(sum);
}
// The softmax again from its log-sum-exp; returns delta = rowsum(P dP), over the quad's lanes.
template <int columns>
__device__ inline float softmax_again(Sum (&p)[columns], const Sum (&dp)[columns], int half, float scale, float lse) {
  float delta = 0;
#pragma unroll
  for (int c = 0; c < 2 * columns; c++) {
    float& x = p[c / 2][2 * half + c % 2];
    x = fast_exp2(fmaf(x, scale, -lse));
    delta = fmaf(x, dp[c / 2][2 * half + c % 2], delta);
  }
  return warp_sum<4>(delta);
}

// A warp's sums, rounded, as rows row.. of the tile at `tile`.
template <int width, int blocks>
__device__ inline void put_sums(char* tile, int row, const Sum (&sum)[blocks][width / 8]) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < blocks; i++)
#pragma unroll
    for (int j = 0; j < width / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<uint32_t*>(tile + piece_at<width>(row + 16 * i + 8 * half + lane / 4, j) + lane % 4 * 4) =
            pack_pair(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
}
// The same, and from there to global memory in pieces of 16 bytes: rows `stride` apart, `to` being where the tile's row
// 0 goes; only rows from `begin` to before `end`. No other warp may use these rows of the tile meanwhile.
template <int width, int blocks>
__device__ inline void store_sums(bf16* to, int64_t stride, bf16* tile, int row, const Sum (&sum)[blocks][width / 8],
                                  int end, int begin = 0) {
  char* bytes = reinterpret_cast<char*>(tile);
  const int lane = lane_id();
  __syncwarp();
  put_sums<width>(bytes, row, sum);
  __syncwarp();
  constexpr int pieces = width / 8, at_once = 32 / pieces;
#pragma unroll
  for (int i = 0; i < 16 * blocks / at_once; i++) {
    const int r = row + i * at_once + lane / pieces, piece = lane % pieces;
    if (r >= begin && r < end)
      *reinterpret_cast<uint4*>(to + r * stride + piece * 8) =
          *reinterpret_cast<const uint4*>(bytes + piece_at<width>(r, piece));
  }
}

}  // namespace gca
