// The CPU's matrix products: one register-blocked kernel, compiled for each instruction set and chosen at run time, and
// the blocking around it. matmul() shares a product among the pool's threads; matmul_tile() makes a small one on the
// calling thread. Every element of C is summed in one order, which depends on K alone: blocks of `depth` terms, each
// summed from zero by ascending k, are added in turn to what C starts from. So its bits depend neither on the number of
// threads, nor on M and N, nor on how A and B are laid out (AVX2 and AVX-512 agree too); a row computed alone equals
// the same row computed among thousands. NaN and Inf go the plain loop's way.
#pragma once
#include <cstdint>

#include "base/threads.h"
#include "cpu/simd.h"

namespace gca {

// A matrix whose element (i, j) is data[i*row + j*col]; transposing it swaps row and col. One of the two is 1 in
// practice (others are slow).
template <class real>
struct View {
  const real* data;
  int64_t row, col;
};

namespace matmul_detail {

constexpr int64_t depth = 256;  // terms of a sum that are taken at once

// C = [base] + A B on the calling thread, with that instruction set.
template <class real>
void multiply(Isa which, real* C, int64_t ldc, View<real> A, View<real> B, int64_t M, int64_t N, int64_t K,
              const real* base, int64_t ldbase);

}  // namespace matmul_detail

// ---- the products -------------------------------------------------------------------------------------------------
// C (M,N), rows ldc apart, = [C if accumulate] + A (M,K) B (K,N), on the calling thread, nothing allocated: the small
// products of attention, also inside a pool's task. C must not overlap A or B.
template <class real>
void matmul_tile(real* C, int64_t ldc, View<real> A, View<real> B, int64_t M, int64_t N, int64_t K, bool accumulate);

// C (M,N), rows ldc apart, = [C if accumulate] + [residual (M,N), rows ldr apart, if not null] + A (M,K) B (K,N); the
// pool's threads share tiles of C. residual may be C; A and B must not overlap C. Not to be called from inside a pool's
// task.
template <class real>
void matmul(ThreadPool& pool, real* C, int64_t ldc, View<real> A, View<real> B, int64_t M, int64_t N, int64_t K,
            bool accumulate, const real* residual = nullptr, int64_t ldr = 0);

// Floating-point operations a second that all the pool's threads reach together in multiply-adds that touch no memory:
// the ceiling of matmul(). Takes about 50 ms.
template <class real>
double measured_peak_flops(ThreadPool& pool);

}  // namespace gca
