// The kernels of the matrix products and their blocking.
#include "cpu/matmul.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace gca {

namespace matmul_detail {

constexpr int64_t block_columns = 256;  // columns of B packed at once: with depth, they stay in the second-level cache
constexpr int64_t max_rows = 8, max_lanes = 16;

// ---- the kernel ---------------------------------------------------------------------------------------------------
// c (rows, vecs*lanes; rows ldc apart) = [base, ldbase apart, if not null] + a (rows, K) b (K, vecs*lanes), the sums
// held in registers. a[i*row + k*col], b[k*ldb + j]. c may be base.
template <class real>
using Kernel = void(int64_t K, const real* a, int64_t row, int64_t col, const real* b, int64_t ldb, real* c,
                    int64_t ldc, const real* base, int64_t ldbase);

// a b + c. By intrinsics, since compilers that tune for some processors will not contract a chain of sums by
// themselves.
template <class Vec>
GCA_INLINE inline Vec fma_portable(Vec a, Vec b, Vec c) {
  return a * b + c;
}
#ifdef __x86_64__
GCA_TARGET_AVX2 GCA_INLINE inline __m256 fma_avx2(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
GCA_TARGET_AVX2 GCA_INLINE inline __m256d fma_avx2(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
GCA_TARGET_AVX512 GCA_INLINE inline __m512 fma_avx512(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
GCA_TARGET_AVX512 GCA_INLINE inline __m512d fma_avx512(__m512d a, __m512d b, __m512d c) {
  return _mm512_fmadd_pd(a, b, c);
}
#endif

// A macro because a template cannot take its target as a parameter, and a wide vector in a function without the target
// is cut into narrow ones before that function is inlined. `x - Vec{}` is x in every lane (x + 0 would turn -0 into 0,
// which costs an addition). Without the pragmas GCC keeps the sums in memory.
#define GCA_MATMUL_KERNEL(isa, target, vec_bytes)                                                                   \
  template <class real, int rows, int vecs>                                                                         \
  target void kernel_##isa(int64_t K, const real* a, int64_t row, int64_t col, const real* b, int64_t ldb, real* c, \
                           int64_t ldc, const real* base, int64_t ldbase) {                                         \
    typedef real Vec __attribute__((vector_size(vec_bytes)));                                                       \
    constexpr int lanes = vec_bytes / sizeof(real);                                                                 \
    Vec sum[rows][vecs] = {}, right[vecs];                                                                          \
    for (int64_t k = 0; k < K; k++, a += col, b += ldb) {                                                           \
      for (int j = 0; j < vecs; j++) memcpy(&right[j], b + j * lanes, sizeof(Vec));                                 \
      for (int i = 0; i < rows; i++) {                                                                              \
        const Vec left = a[i * row] - Vec{};                                                                        \
        for (int j = 0; j < vecs; j++) sum[i][j] = fma_##isa(left, right[j], sum[i][j]);                            \
      }                                                                                                             \
    }                                                                                                               \
    _Pragma("GCC unroll 8") for (int i = 0; i < rows; i++) {                                                        \
      _Pragma("GCC unroll 2") for (int j = 0; j < vecs; j++) {                                                      \
        Vec start = {};                                                                                             \
        if (base) memcpy(&start, base + i * ldbase + j * lanes, sizeof(Vec));                                       \
        start += sum[i][j];                                                                                         \
        memcpy(c + i * ldc + j * lanes, &start, sizeof(Vec));                                                       \
      }                                                                                                             \
    }                                                                                                               \
  }                                                                                                                 \
  template <class real> /* 12 chains of multiply-adds; the result only keeps them alive */                          \
  target real fma_loop_##isa(int64_t count, real factor, real term) {                                               \
    typedef real Vec __attribute__((vector_size(vec_bytes)));                                                       \
    Vec sum[12], factors = factor - Vec{}, terms = term - Vec{};                                                    \
    for (int i = 0; i < 12; i++) sum[i] = real(i) - Vec{};                                                          \
    for (int64_t k = 0; k < count; k++)                                                                             \
      for (int i = 0; i < 12; i++) sum[i] = fma_##isa(sum[i], factors, terms);                                      \
    for (int i = 1; i < 12; i++) sum[0] += sum[i];                                                                  \
    return sum[0][0];                                                                                               \
  }

GCA_MATMUL_KERNEL(portable, , 16)
#ifdef __x86_64__
GCA_MATMUL_KERNEL(avx2, GCA_TARGET_AVX2, 32)
GCA_MATMUL_KERNEL(avx512, GCA_TARGET_AVX512, 64)
#endif

// One instruction set's kernels: for strips of strip[0] > ... > strip[3] = 1 rows of A, one and two vectors wide.
template <class real>
struct Kernels {
  int64_t lanes, strip[4];
  Kernel<real>* run[4][2];
  real (*fma_loop)(int64_t count, real factor, real term);
};

#define GCA_MATMUL_KERNELS(isa, vec_bytes, rows)                                                     \
  static constexpr Kernels<real> isa = {vec_bytes / sizeof(real),                                    \
                                        {rows, 4, 2, 1},                                             \
                                        {{kernel_##isa<real, rows, 1>, kernel_##isa<real, rows, 2>}, \
                                         {kernel_##isa<real, 4, 1>, kernel_##isa<real, 4, 2>},       \
                                         {kernel_##isa<real, 2, 1>, kernel_##isa<real, 2, 2>},       \
                                         {kernel_##isa<real, 1, 1>, kernel_##isa<real, 1, 2>}},      \
                                        fma_loop_##isa<real>}

// The most rows whose sums (two vectors each), with a row of B and an element of A, fit the 16 registers; AVX-512 has
// 32, and 8 rows already keep its multipliers busy.
template <class real>
const Kernels<real>& kernels([[maybe_unused]] Isa which) {
  GCA_MATMUL_KERNELS(portable, 16, 6);
#ifdef __x86_64__
  GCA_MATMUL_KERNELS(avx2, 32, 6);
  GCA_MATMUL_KERNELS(avx512, 64, 8);
  if (which == Isa::avx512) return avx512;
  if (which == Isa::avx2) return avx2;
#endif
  return portable;
}

// ---- blocking -----------------------------------------------------------------------------------------------------
// to (K, width) = B (K, columns), then zeros.
template <class real>
void pack(real* to, View<real> B, int64_t K, int64_t columns, int64_t width) {
  if (B.col == 1) {
    for (int64_t k = 0; k < K; k++, to += width)
      std::fill(std::copy_n(B.data + k * B.row, columns, to), to + width, real(0));
    return;
  }
  int64_t fours = 0, terms = 0;  // the columns and terms that were transposed four by four
#ifdef __x86_64__
  if (sizeof(real) == sizeof(float) && B.row == 1) {
    fours = columns / 4 * 4;
    terms = K / 4 * 4;
    for (int64_t j = 0; j < fours; j += 4)
      for (int64_t k = 0; k < terms; k += 4) {
        __m128 square[4];
        for (int i = 0; i < 4; i++) memcpy(&square[i], B.data + k + (j + i) * B.col, sizeof(__m128));
        _MM_TRANSPOSE4_PS(square[0], square[1], square[2], square[3]);
        for (int i = 0; i < 4; i++) memcpy(to + (k + i) * width + j, &square[i], sizeof(__m128));
      }
  }
#endif
  for (int64_t j = 0; j < width; j++)
    for (int64_t k = j < fours ? terms : 0; k < K; k++)
      to[k * width + j] = j < columns ? B.data[k * B.row + j * B.col] : real(0);
}

template <class real>
void multiply(Isa which, real* C, int64_t ldc, View<real> A, View<real> B, int64_t M, int64_t N, int64_t K,
              const real* base, int64_t ldbase) {
  const Kernels<real>& set = kernels<real>(which);
  alignas(64) static thread_local real packed[depth * block_columns];  // panels of (terms, width), one after the other
  alignas(64) real strip[depth * max_rows], edge[max_rows * 2 * max_lanes];
  const int64_t panel = 2 * set.lanes;
  for (int64_t n0 = 0; n0 < N; n0 += block_columns)
    for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += depth) {  // once for K = 0 too: C = [base]
      const int64_t n1 = std::min(N, n0 + block_columns), terms = std::min(depth, K - k0);
      const real* start = k0 ? C : base;
      const int64_t ldstart = k0 ? ldc : ldbase;
      // B is packed unless it lies row by row and serves few strips; a panel narrower than its vectors always is, and
      // made up with zeros.
      const bool in_place = B.col == 1 && M < 256;
      const auto panel_at = [&](int64_t n) {
        struct {
          int64_t columns, vecs, width;
          bool packed;
        } p;
        p.columns = std::min(panel, n1 - n);
        p.vecs = p.columns > set.lanes ? 2 : 1;
        p.width = p.vecs * set.lanes;
        p.packed = !in_place || p.columns < p.width;
        return p;
      };
      for (int64_t n = n0; n < n1; n += panel)
        if (const auto p = panel_at(n); p.packed)
          pack(packed + (n - n0) * depth, {B.data + k0 * B.row + n * B.col, B.row, B.col}, terms, p.columns, p.width);
      for (int64_t m = 0, s = 0; m < M; m += set.strip[s]) {
        while (set.strip[s] > M - m) s++;
        View<real> a = {A.data + m * A.row + k0 * A.col, A.row, A.col};
        if (A.row == 1 &&
            n1 - n0 > 4 * panel) {  // a transposed A: its rows, far apart, are gathered once for many panels
          const int64_t rows =
              std::min(max_rows, M - m);  // more than the strip has, that the size of most copies may be a constant
          for (int64_t k = 0; k < terms; k++)
            if (rows == max_rows) memcpy(strip + k * max_rows, a.data + k * A.col, max_rows * sizeof(real));
            else std::copy_n(a.data + k * A.col, rows, strip + k * max_rows);
          a = {strip, 1, max_rows};
        }
        for (int64_t n = n0; n < n1; n += panel) {
          const auto p = panel_at(n);
          const real* b = p.packed ? packed + (n - n0) * depth : B.data + k0 * B.row + n;
          const int64_t ldb = p.packed ? p.width : B.row;
          const real* c0 = start ? start + m * ldstart + n : nullptr;
          real* c = C + m * ldc + n;
          Kernel<real>* kernel = set.run[s][p.vecs - 1];
          if (p.columns == p.width) {
            kernel(terms, a.data, a.row, a.col, b, ldb, c, ldc, c0, ldstart);
            continue;
          }
          kernel(terms, a.data, a.row, a.col, b, ldb, edge, p.width, nullptr, 0);
          for (int64_t i = 0; i < set.strip[s]; i++)
            for (int64_t j = 0; j < p.columns; j++)
              c[i * ldc + j] = (c0 ? c0[i * ldstart + j] : real(0)) + edge[i * p.width + j];
        }
      }
    }
}

}  // namespace matmul_detail

template <class real>
void matmul_tile(real* C, int64_t ldc, View<real> A, View<real> B, int64_t M, int64_t N, int64_t K, bool accumulate) {
  matmul_detail::multiply(isa(), C, ldc, A, B, M, N, K, accumulate ? C : nullptr, ldc);
}

template <class real>
void matmul(ThreadPool& pool, real* C, int64_t ldc, View<real> A, View<real> B, int64_t M, int64_t N, int64_t K,
            bool accumulate, const real* residual, int64_t ldr) {
  using namespace matmul_detail;
  GCA_CHECK(M >= 0 && N >= 0 && K >= 0, "a product of (", M, ",", K, ") and (", K, ",", N, ")");
  if (M == 0 || N == 0) return;
  const Kernels<real>& set = kernels<real>(isa());
  // A few tiles a thread, so that none waits long for the last; fewer and taller ones where each has to transpose its
  // part of B.
  const int64_t tiles = pool.size() == 1 ? 1 : (B.col == 1 ? 8 : 4) * pool.size(),
                least = set.strip[0] * (B.col == 1 ? 2 : 12);
  const int64_t blocks = ceil_div(N, block_columns);
  const int64_t rows = round_up(std::clamp<int64_t>(ceil_div(M * blocks, tiles), least, 1024), set.strip[0]),
                down = ceil_div(M, rows);
  const int64_t columns = round_up(ceil_div(N, std::max(blocks, ceil_div(tiles, down))), 2 * set.lanes),
                across = ceil_div(N, columns);
  pool.run(down * across, [&](int64_t tile, int) {
    const int64_t m = tile / across * rows, n = tile % across * columns, height = std::min(rows, M - m),
                  width = std::min(columns, N - n);
    real* c = C + m * ldc + n;
    const real* added = residual ? residual + m * ldr + n : nullptr;
    if (accumulate && added)
      for (int64_t i = 0; i < height; i++)
        for (int64_t j = 0; j < width; j++) c[i * ldc + j] += added[i * ldr + j];
    multiply(isa(), c, ldc, {A.data + m * A.row, A.row, A.col}, {B.data + n * B.col, B.row, B.col}, height, width, K,
             accumulate ? c : added, accumulate ? ldc : ldr);
  });
}

template <class real>
double measured_peak_flops(ThreadPool& pool) {
  const auto& set = matmul_detail::kernels<real>(isa());
  std::vector<real> results(pool.size());
  // The best of short trials and long ones: a busy machine may interrupt any, and a short one is mostly its start.
  double best = 0;
  for (int64_t count = 10000; count < 10'000'000; count *= 2) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(pool.size(), [&](int64_t i, int) { results[i] = set.fma_loop(count, real(0.5), real(i)); });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(count * pool.size()) * 12 * 2 * static_cast<double>(set.lanes) / seconds);
  }
  return best;
}

#define GCA_MATMUL_INSTANCES(real)                                                                              \
  template void matmul_detail::multiply(Isa, real*, int64_t, View<real>, View<real>, int64_t, int64_t, int64_t, \
                                        const real*, int64_t);                                                  \
  template void matmul_tile(real*, int64_t, View<real>, View<real>, int64_t, int64_t, int64_t, bool);           \
  template void matmul(ThreadPool&, real*, int64_t, View<real>, View<real>, int64_t, int64_t, int64_t, bool,    \
                       const real*, int64_t);                                                                   \
  template double measured_peak_flops<real>(ThreadPool&);
GCA_MATMUL_INSTANCES(float)
GCA_MATMUL_INSTANCES(double)

}  // namespace gca
