// cpu/matmul.h: every element bit for bit against the order of summation that it documents, in every instruction set
// that this processor has, for odd sizes and all layouts; hence also the same bits for any number of threads, any M and
// any N.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/matmul.h"

namespace {

using namespace gca;

constexpr double inf = std::numeric_limits<double>::infinity();

template <class real>
bool same_bits(real a, real b) {
  return std::isnan(a) ? std::isnan(b) : memcmp(&a, &b, sizeof a) == 0;
}

// A matrix of numbers in (-1, 1), each (row, column) its own, in one of the layouts that a View can name.
enum class Layout { rows, transposed, spread };
template <class real>
struct Matrix {
  Matrix(int64_t rows, int64_t columns, Layout layout, uint32_t key) {
    const int64_t row = layout == Layout::rows ? columns + 3 : layout == Layout::transposed ? 1 : 2 * columns + 5;
    const int64_t col = layout == Layout::rows ? 1 : layout == Layout::transposed ? rows + 2 : 2;
    const int64_t last =
        (rows - 1) * row + (columns - 1) * col;  // nothing behind it, that a sanitizer may see what is read there
    data.assign(last + 1, std::numeric_limits<real>::quiet_NaN());
    view = {data.data(), row, col};
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++)
        at(i, j) =
            2 * static_cast<real>(uniform_open(philox(5, Draw::init, key, uint32_t(i), uint32_t(j)).word[0])) - 1;
  }
  real& at(int64_t i, int64_t j) { return data[i * view.row + j * view.col]; }
  std::vector<real> data;
  View<real> view;
};

// One element as cpu/matmul.h says: blocks of `depth` terms, each summed from zero, added in turn.
template <class real>
real expected(Matrix<real>& A, Matrix<real>& B, int64_t i, int64_t j, int64_t K, real start, bool fused) {
  for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += matmul_detail::depth) {
    real sum = 0;
    for (int64_t k = k0; k < std::min(K, k0 + matmul_detail::depth); k++)
      sum = fused ? std::fma(A.at(i, k), B.at(k, j), sum) : A.at(i, k) * B.at(k, j) + sum;
    start += sum;
  }
  return start;
}

struct Shape {
  int64_t M, N, K;
};

template <class real>
void check_multiply(Isa which, Shape s, Layout a, Layout b, bool with_base) {
  CAPTURE(s.M);
  CAPTURE(s.N);
  CAPTURE(s.K);
  CAPTURE(static_cast<int>(a));
  CAPTURE(static_cast<int>(b));
  CAPTURE(isa_name(which));
  Matrix<real> A(s.M, s.K, a, 1), B(s.K, s.N, b, 2), C(s.M, s.N, Layout::rows, 3), base(s.M, s.N, Layout::rows, 4);
  base.view.row = C.view.row;
  matmul_detail::multiply(which, C.data.data(), C.view.row, A.view, B.view, s.M, s.N, s.K,
                          with_base ? base.data.data() : nullptr, base.view.row);
  int64_t wrong = 0;
  for (int64_t i = 0; i < s.M; i++)
    for (int64_t j = 0; j < s.N; j++)
      wrong += !same_bits(C.at(i, j),
                          expected(A, B, i, j, s.K, with_base ? base.at(i, j) : real(0), which != Isa::portable));
  CHECK(wrong == 0);
  for (int64_t i = 0; i + 1 < s.M; i++)
    for (int64_t j = s.N; j < C.view.row; j++) wrong += !std::isnan(C.data[i * C.view.row + j]);
  CHECK_MESSAGE(wrong == 0, "written between the rows of C");
}

template <class real>
void check_all_kernels() {
  // One of each path: single elements, whole panels, edges of both kinds, many panels over a transposed A, B packed for
  // many rows, several blocks of terms and of columns.
  const Shape shapes[] = {{1, 1, 1},     {7, 113, 3},    {8, 32, 16},   {64, 64, 64}, {15, 203, 257},
                          {270, 37, 21}, {13, 300, 270}, {2, 260, 513}, {11, 3, 100}};
  for (Isa which : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (which > isa()) continue;
    for (Shape s : shapes)
      for (Layout a : {Layout::rows, Layout::transposed, Layout::spread})
        for (Layout b : {Layout::rows, Layout::transposed, Layout::spread})
          check_multiply<real>(which, s, a, b, (s.M + static_cast<int>(a)) % 2 == 0);
  }
}

#ifdef __x86_64__  // elsewhere a compiler is free to contract the portable kernel's products and sums, and ours above
                   // differently
TEST_CASE_TEMPLATE("matmul: each element is summed in the documented order", real, float, double) {
  check_all_kernels<real>();
}
#endif

TEST_CASE_TEMPLATE("matmul: within rounding of a sum in long double", real, float, double) {
  ThreadPool pool(2);
  const int64_t M = 61, N = 70, K = 1000;
  Matrix<real> A(M, K, Layout::rows, 1), B(K, N, Layout::transposed, 2), C(M, N, Layout::rows, 3);
  matmul(pool, C.data.data(), C.view.row, A.view, B.view, M, N, K, false);
  double worst = 0;  // in units of eps times the sum of magnitudes, of which `depth` terms and K / depth blocks may
                     // each lose half a unit
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j++) {
      long double sum = 0, size = 0;
      for (int64_t k = 0; k < K; k++) {
        sum += static_cast<long double>(A.at(i, k)) * B.at(k, j);
        size += std::fabs(static_cast<long double>(A.at(i, k)) * B.at(k, j));
      }
      worst = std::max(worst,
                       static_cast<double>(std::fabs(sum - C.at(i, j)) / size) / std::numeric_limits<real>::epsilon());
    }
  CHECK(worst <= (matmul_detail::depth + 4) / 2.0);
}

TEST_CASE_TEMPLATE("matmul: the same bits for any number of threads, any part of the rows and columns, any layout",
                   real, float, double) {
  const int64_t M = 310, N = 333, K = 300;
  Matrix<real> A(M, K, Layout::rows, 1), B(K, N, Layout::rows, 2), At(M, K, Layout::transposed, 1),
      Bt(K, N, Layout::transposed, 2);
  Matrix<real> whole(M, N, Layout::rows, 3), other(M, N, Layout::rows, 4);
  ThreadPool one(1);
  matmul(one, whole.data.data(), whole.view.row, A.view, B.view, M, N, K, false);
  const auto differing = [&](int64_t m0, int64_t n0, int64_t rows, int64_t columns) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) count += !same_bits(whole.at(m0 + i, n0 + j), other.at(i, j));
    return count;
  };
  for (int threads : {2, 3, 7}) {
    ThreadPool pool(threads);
    for (bool a : {false, true})
      for (bool b : {false, true}) {
        matmul(pool, other.data.data(), other.view.row, a ? At.view : A.view, b ? Bt.view : B.view, M, N, K, false);
        CHECK(differing(0, 0, M, N) == 0);
      }
    for (int64_t rows : {1, 2, 63, 257}) {
      const int64_t m0 = M - rows, n0 = rows == 63 ? 100 : 0, columns = rows == 63 ? 19 : N;
      const View<real> a = {&A.at(m0, 0), A.view.row, A.view.col}, at = {&At.at(m0, 0), At.view.row, At.view.col};
      const View<real> b = {&B.at(0, n0), B.view.row, B.view.col}, bt = {&Bt.at(0, n0), Bt.view.row, Bt.view.col};
      matmul(pool, other.data.data(), other.view.row, a, b, rows, columns, K, false);
      CHECK(differing(m0, n0, rows, columns) == 0);
      matmul_tile(other.data.data(), other.view.row, at, bt, rows, columns, K, false);
      CHECK(differing(m0, n0, rows, columns) == 0);
    }
  }
}

TEST_CASE_TEMPLATE("matmul: what C starts from", real, float, double) {
  ThreadPool pool(2);
  const int64_t M = 37, N = 45, K = 20;
  Matrix<real> A(M, K, Layout::rows, 1), B(K, N, Layout::transposed, 2), product(M, N, Layout::rows, 5);
  Matrix<real> before(M, N, Layout::rows, 3), residual(M, N, Layout::rows, 4), C = before;
  matmul(pool, product.data.data(), product.view.row, A.view, B.view, M, N, K, false);
  const auto run = [&](bool accumulate, const real* added, auto start) {
    C.data = before.data;
    matmul(pool, C.data.data(), C.view.row, A.view, B.view, M, N, K, accumulate, added, residual.view.row);
    int64_t wrong = 0;
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < N; j++)
        wrong += !same_bits(C.at(i, j), static_cast<real>(start(i, j) + product.at(i, j)));
    return wrong;
  };
  CHECK(run(false, nullptr, [&](int64_t, int64_t) { return real(0); }) == 0);
  CHECK(run(true, nullptr, [&](int64_t i, int64_t j) { return before.at(i, j); }) == 0);
  CHECK(run(false, residual.data.data(), [&](int64_t i, int64_t j) { return residual.at(i, j); }) == 0);
  CHECK(run(true, residual.data.data(),
            [&](int64_t i, int64_t j) { return static_cast<real>(before.at(i, j) + residual.at(i, j)); }) == 0);
  CHECK(run(false, C.data.data(), [&](int64_t i, int64_t j) { return before.at(i, j); }) == 0);
  C.data = before.data;
  matmul_tile(C.data.data(), C.view.row, A.view, B.view, M, N, K, true);
  CHECK(same_bits(C.at(36, 44), static_cast<real>(before.at(36, 44) + product.at(36, 44))));
}

TEST_CASE_TEMPLATE("matmul: empty products", real, float, double) {
  ThreadPool pool(2);
  Matrix<real> A(5, 7, Layout::rows, 1), B(7, 9, Layout::rows, 2), C(5, 9, Layout::rows, 3), before = C;
  real* c = C.data.data();
  const int64_t ldc = C.view.row;
  matmul<real>(pool, c, ldc, A.view, B.view, 0, 9, 7, false);
  matmul<real>(pool, c, ldc, A.view, B.view, 5, 0, 7, false);
  matmul<real>(pool, c, ldc, A.view, B.view, 5, 9, 0, true);
  matmul_tile<real>(c, ldc, A.view, B.view, 0, 9, 7, false);
  CHECK(memcmp(C.data.data(), before.data.data(), C.data.size() * sizeof(real)) == 0);
  matmul<real>(pool, c, ldc, A.view, B.view, 5, 9, 0, false, before.data.data(), ldc);
  CHECK(memcmp(C.data.data(), before.data.data(), C.data.size() * sizeof(real)) == 0);
  matmul<real>(pool, c, ldc, A.view, B.view, 5, 9, 0, false);
  CHECK(C.at(0, 0) == 0);
  CHECK(C.at(4, 8) == 0);
  CHECK_THROWS_AS(matmul<real>(pool, c, ldc, A.view, B.view, 5, 9, -1, false), Error);
}

TEST_CASE_TEMPLATE("matmul: NaN and Inf reach their row and column, zeros do not hide them, nothing else is touched",
                   real, float, double) {
  ThreadPool pool(2);
  for (Layout layout : {Layout::rows, Layout::transposed}) {
    const int64_t M = 21, N = 51, K = 9;
    Matrix<real> A(M, K, layout, 1), B(K, N, layout, 2), C(M, N, Layout::rows, 3);
    A.at(20, 4) = std::numeric_limits<real>::quiet_NaN();
    B.at(3, 50) = static_cast<real>(inf);
    A.at(2, 3) = 0;
    matmul(pool, C.data.data(), C.view.row, A.view, B.view, M, N, K, false);
    int64_t wrong = 0;
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < N; j++)
        wrong += i == 20 || (i == 2 && j == 50) ? !std::isnan(C.at(i, j))
                 : j == 50                      ? !std::isinf(C.at(i, j))
                                                : !std::isfinite(C.at(i, j));
    CHECK(wrong == 0);
  }
}

TEST_CASE("matmul: the measured ceiling is a number of operations a second") {
  ThreadPool pool(1);
  CHECK(measured_peak_flops<float>(pool) > 1e7);
  CHECK(measured_peak_flops<double>(pool) < 1e13);
}

}  // namespace
