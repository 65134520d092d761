// The CPU's loops over a row, which simd() (cpu/simd.h) compiles for each instruction set: sums, e^x, softmax and
// the like.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common.h"
#include "cpu/simd.h"

namespace gca {

template <class real>
GCA_INLINE inline real dot(const real* a, const real* b, int64_t n) {
  real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// e^x. float: 2^n e^r with |r| <= ln2/2 and a Taylor polynomial, relative error 2e-7; 0 below -87, where float loses
// precision.
GCA_INLINE inline double exponential(double x) { return std::exp(x); }
GCA_INLINE inline float exponential(float x) {
  const float y = x > 88 ? 88 : x;
  const float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float r = (y - n * 0.693145752f) - n * 1.42860677e-6f;    // ln 2 in two pieces
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r + 1.0f) * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n < -126 ? -126 : n) + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return x < -87 ? 0 : p * power;
}

// p[j] = scale * p[j] + slope * (j - position), for j in [begin, end); its log-sum-exp is returned.
template <class real>
GCA_INLINE inline real logits_row(real* p, int64_t begin, int64_t end, real scale, real slope, int64_t position) {
  real top = -std::numeric_limits<real>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t j = begin; j < end; j++) {
    p[j] = scale * p[j] + slope * static_cast<real>(j - position);
    top = p[j] > top ? p[j] : top;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t j = begin; j < end; j++) sum += exponential(p[j] - top);
  return top + std::log(sum);
}

// Loops whose results are stored: rounded to bf16 where the backend is the bf16 twin.
template <class real, bool bf16>
struct CpuRows {
  GCA_INLINE static real rounded(real x) {
    if constexpr (bf16) return round_bf16(x);
    else return x;
  }
  GCA_INLINE static void scale_row(real* out, const real* x, const real* gain, real rstd, int64_t D) {
#pragma omp simd
    for (int64_t j = 0; j < D; j++) out[j] = rounded(gain[j] * x[j] * rstd);
  }
  GCA_INLINE static real dot3(const real* a, const real* b, const real* c, int64_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j] * c[j];
    return sum;
  }
  GCA_INLINE static void accumulate_gain(real* sum, const real* dn, const real* x, real rstd, int64_t D) {
#pragma omp simd
    for (int64_t j = 0; j < D; j++) sum[j] += dn[j] * x[j] * rstd;
  }
  GCA_INLINE static void norm_gradient_row(real* dx, const real* dn, const real* gain, const real* x, real rstd,
                                           real mean, const real* residual, const real* residual2, int64_t D) {
#pragma omp simd
    for (int64_t j = 0; j < D; j++)
      dx[j] = rounded((residual ? residual[j] : 0) + (residual2 ? residual2[j] : 0) +
                      rstd * (dn[j] * gain[j] - x[j] * rstd * mean));
  }
  // p = factor * e^(p - lse) on [begin, end), 0 on the rest of its n
  GCA_INLINE static void softmax_row(real* p, int64_t begin, int64_t end, int64_t n, real lse, real factor) {
    for (int64_t j = 0; j < begin; j++) p[j] = 0;
    for (int64_t j = end; j < n; j++) p[j] = 0;
#pragma omp simd
    for (int64_t j = begin; j < end; j++) p[j] = rounded(factor * exponential(p[j] - lse));
  }
  // P from raw products and a saved log-sum-exp, unrounded: e^(scale * p + slope * (j - position) - lse) on [begin,
  // end), 0 on the rest
  GCA_INLINE static void probabilities_row(real* p, int64_t begin, int64_t end, int64_t n, real scale, real slope,
                                           int64_t position, real lse) {
    for (int64_t j = 0; j < begin; j++) p[j] = 0;
    for (int64_t j = end; j < n; j++) p[j] = 0;
#pragma omp simd
    for (int64_t j = begin; j < end; j++)
      p[j] = exponential(scale * p[j] + slope * static_cast<real>(j - position) - lse);
  }
  // ds holds dP: dS = factor * P (dP - delta)
  GCA_INLINE static void ds_row_from_dp(real* ds, const real* p, real delta, real factor, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) ds[j] = rounded(factor * p[j] * (ds[j] - delta));
  }
  GCA_INLINE static void scale_in_place(real* p, real factor, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) p[j] = rounded(factor * p[j]);
  }
  GCA_INLINE static double sum_of_squares(const real* x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    return sum;
  }
};

}  // namespace gca
