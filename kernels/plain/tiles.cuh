// Tiles of 64 x 64 floats in shared memory and their products, by blocks of 256 threads: what the attentions and the
// retrieval are made of. Thread (ty,tx), 16 x 16 of them, holds 4 x 4 numbers of a product:
//   multiply_nt    rows ty + 16 i, columns tx + 16 j
//   multiply_nn    rows ty + 16 i, columns 4 tx + j
//   multiply_tn    rows 4 ty + i,  columns 4 tx + j
// so that every read of shared memory is 16 bytes wide and free of bank conflicts, and a row of the first two lies in
// half a warp.
#pragma once
#include "kernels/attention.cuh"

namespace gca {

constexpr int tile_threads = 256;
constexpr int tile_pitch = tile_size + 4;  // rows start 4 banks apart, at multiples of 16 bytes
using Tile = float[tile_size][tile_pitch];
constexpr int64_t tile_bytes = sizeof(Tile);
static_assert(tile_bytes == 17408, "64 rows of 68 floats");
using Fragment = float[4][4];  // a thread's part of a product

__device__ inline int tile_y() { return static_cast<int>(threadIdx.x) / 16; }
__device__ inline int tile_x() { return static_cast<int>(threadIdx.x) % 16; }
// Columns of the t-th tile of n.
__device__ inline int columns_of(int n, int t) { return min(tile_size, n - t * tile_size); }

__device__ inline void clear(Fragment& f) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) f[i][j] = 0;
}

__device__ inline void add(Fragment& sum, const Fragment& f) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) sum[i][j] += f[i][j];
}

// tile = columns 0.. of the rows that row_of(0..63) points at; zero past `columns`, and where row_of gives null.
template <class RowOf>
__device__ inline void load_tile(Tile& tile, RowOf row_of, int columns) {
  for (int i = static_cast<int>(threadIdx.x); i < tile_size * tile_size / 4; i += tile_threads) {
    const int r = i / 16, c = i % 16 * 4;
    const auto* row = row_of(r);
    float value[4] = {0, 0, 0, 0};
    if (row && c < columns) {
      if (columns % 4 == 0 && reinterpret_cast<uintptr_t>(row) % (4 * sizeof *row) == 0) {
        const auto four = load_pack<4>(row + c);
#pragma unroll
        for (int e = 0; e < 4; e++) value[e] = to_float(four.at[e]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++) value[e] = c + e < columns ? to_float(row[c + e]) : 0.0f;
      }
    }
    *reinterpret_cast<float4*>(&tile[r][c]) = make_float4(value[0], value[1], value[2], value[3]);
  }
}
// The same of rows that lie `stride` apart; zero past `rows`.
template <class Act>
__device__ inline void load_tile(Tile& tile, const Act* from, int64_t stride, int rows, int columns) {
  load_tile(
      tile, [=](int r) { return r < rows ? from + r * stride : nullptr; }, columns);
}

// What the products below load tiles with: `rows` rows of a head of d columns, zero past either.
template <class Act>
struct HeadRows {
  const Act* first;  // (rows,d), rows `stride` elements apart
  int64_t stride;
  int rows, d;
  // Columns 64 t and on.
  __device__ void operator()(Tile& tile, int t) const {
    load_tile(tile, first + t * tile_size, stride, rows, columns_of(d, t));
  }
};

__device__ inline float4 quad(const float* at) { return *reinterpret_cast<const float4*>(at); }
__device__ inline void add_products(float (&sum)[4], float left, const float4& right) {
  sum[0] = fmaf(left, right.x, sum[0]);
  sum[1] = fmaf(left, right.y, sum[1]);
  sum[2] = fmaf(left, right.z, sum[2]);
  sum[3] = fmaf(left, right.w, sum[3]);
}

// Each adds its products in order of k. depth: how far k runs; a tile's columns past it up to a multiple of 4 are zero.
// sum += a b^T
__device__ inline void multiply_nt(Fragment& sum, const Tile& a, const Tile& b, int depth) {
  const int ty = tile_y(), tx = tile_x();
#pragma unroll 2
  for (int k = 0; k < depth; k += 4) {
    float4 left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      left[i] = quad(&a[ty + 16 * i][k]);
      right[i] = quad(&b[tx + 16 * i][k]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sum[i][j] =
            fmaf(left[i].w, right[j].w,
                 fmaf(left[i].z, right[j].z, fmaf(left[i].y, right[j].y, fmaf(left[i].x, right[j].x, sum[i][j]))));
  }
}
// sum += a b
__device__ inline void multiply_nn(Fragment& sum, const Tile& a, const Tile& b, int depth) {
  const int ty = tile_y(), tx = tile_x();
#pragma unroll 2
  for (int k = 0; k < depth; k += 4) {
    float4 left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      left[i] = quad(&a[ty + 16 * i][k]);
      right[i] = quad(&b[k + i][4 * tx]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      add_products(sum[i], left[i].x, right[0]);
      add_products(sum[i], left[i].y, right[1]);
      add_products(sum[i], left[i].z, right[2]);
      add_products(sum[i], left[i].w, right[3]);
    }
  }
}
// sum += a^T b; k runs over rows
__device__ inline void multiply_tn(Fragment& sum, const Tile& a, const Tile& b, int depth) {
  const int ty = tile_y(), tx = tile_x();
#pragma unroll 2
  for (int k = 0; k < depth; k++) {
    const float4 left = quad(&a[k][4 * ty]), right = quad(&b[k][4 * tx]);
    add_products(sum[0], left.x, right);
    add_products(sum[1], left.y, right);
    add_products(sum[2], left.z, right);
    add_products(sum[3], left.w, right);
  }
}

// product = a b^T over n columns, 64 at a time: load_a(tile, t) and load_b(tile, t) fill a tile with columns 64 t and
// on. The two tiles are free again on return.
template <class LoadA, class LoadB>
__device__ inline void product_nt(Fragment& product, Tile& a, Tile& b, int n, LoadA load_a, LoadB load_b) {
  clear(product);
  for (int t = 0; t < tiles_of(n); t++) {
    load_a(a, t);
    load_b(b, t);
    __syncthreads();
    multiply_nt(product, a, b, columns_of(n, t));
    __syncthreads();
  }
}

// sum[f] += p b, b being columns 64 t and on of a head of d columns, t = first + f: load_b(tile, t) fills a tile with
// them. depth: rows of b. Each tile's product is summed by itself, in `room`: one chain over all tiles would lose more.
// The tile b is free again on return.
template <int fragments, class LoadB>
__device__ inline void add_products(Fragment (&sum)[fragments], Fragment& room, const Tile& p, Tile& b, int depth,
                                    int first, int d, LoadB load_b) {
#pragma unroll
  for (int f = 0; f < fragments; f++) {
    const int t = first + f;
    if (t * tile_size >= d) break;
    load_b(b, t);
    __syncthreads();
    clear(room);
    multiply_nn(room, p, b, depth);
    add(sum[f], room);
    __syncthreads();
  }
}

// A product as multiply_nt leaves it, into a tile.
__device__ inline void store_tile(Tile& tile, const Fragment& f) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) tile[tile_y() + 16 * i][tile_x() + 16 * j] = f[i][j];
}
// Four neighbours of an output row, those of them that lie before `columns`.
template <class Act>
__device__ inline void store_row(Act* row, const float (&value)[4], int columns) {
#pragma unroll
  for (int j = 0; j < 4; j++)
    if (4 * tile_x() + j < columns) row[4 * tile_x() + j] = from_float<Act>(value[j]);
}

// Sums as multiply_nn leaves them, into rows `stride` apart of a head of d columns: those rows that lie before `rows`,
// from column `column` on.
template <int fragments, class Act>
__device__ inline void store_rows(Act* to, int64_t stride, const Fragment (&sum)[fragments], int rows, int column,
                                  int d) {
#pragma unroll
  for (int f = 0; f < fragments; f++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = tile_y() + 16 * i, from = column + f * tile_size;
      if (row < rows) store_row(to + row * stride + from, sum[f][i], d - from);
    }
}

// Output columns of a head that one block makes: 64 in one fragment, or 128 in two; a wider head takes two blocks.
template <class Body>
void with_fragments(int d, Body&& body) {
  if (d <= tile_size) body(std::integral_constant<int, 1>{});
  else body(std::integral_constant<int, 2>{});
}

}  // namespace gca
