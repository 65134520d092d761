// What every file shares: errors that name the mend, counter-based random numbers, bf16 rounding. The only macros.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define GCA_HD __host__ __device__  // callable on both sides: CPU and GPU must draw the same bits
#else
#define GCA_HD
#endif

namespace gca {

// ---- errors -------------------------------------------------------------------------------------------------------
// Error: what was asked failed (exit 1). UsageError: the command line is wrong (exit 2). Both carry a whole sentence
// for a person: which file or field, expected, found, what to do.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct UsageError : Error {
  using Error::Error;
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  va_list args, again;
  va_start(args, pattern);
  va_copy(again, args);
  std::string text(vsnprintf(nullptr, 0, pattern, args), '\0');
  vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  va_end(args);
  return text;
}

// A broken promise between functions of this program (never bad input): says where and what.
#define GCA_CHECK(condition, ...)                                                                     \
  do {                                                                                                \
    if (!(condition))                                                                                 \
      throw ::gca::Error(::gca::format("%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition) + \
                         ::gca::format(__VA_ARGS__));                                                 \
  } while (0)

// ---- sizes --------------------------------------------------------------------------------------------------------
GCA_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GCA_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- bf16 ---------------------------------------------------------------------------------------------------------
// x rounded to the nearest bfloat16 (ties to even), kept in a float: what a GPU stores, for the naive bf16 twin.
GCA_HD inline float round_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) <= 0x7f800000u) bits = (bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

// ---- random numbers -----------------------------------------------------------------------------------------------
// Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words from a 64-bit key and a 128-bit counter. No state to store
// or to hand on: a resumed run, a recomputed layer and any number of ranks draw the same numbers from the same (seed,
// stream, index).
struct Philox {
  uint32_t word[4];
};

enum class Stream : uint32_t {
  init = 1,
  rows,
  gumbel,
  uniform_pick,
  sample,
  task
};  // one a purpose: never the same numbers twice

GCA_HD inline Philox philox(uint64_t seed, Stream stream, uint32_t c0, uint32_t c1 = 0, uint32_t c2 = 0,
                            uint32_t c3 = 0) {
  uint32_t k0 = static_cast<uint32_t>(seed),
           k1 = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(stream) * 0x632BE5ABu;
  for (int round = 0; round < 10; round++) {
    uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 23 random bits as a float strictly between 0 and 1.
GCA_HD inline float uniform_open(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 1.1920929e-7f; }

// ln x for a positive normal float, the same bits wherever it runs: only correctly rounded operations, and every
// product that a compiler might contract with a sum is an explicit fma. x = 2^e m, m in [sqrt(1/2), sqrt 2); ln m = 2
// artanh((m-1)/(m+1)).
GCA_HD inline float exact_log(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  bits -= e * (1 << 23);
  float m;
  memcpy(&m, &bits, 4);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float series = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 2.0f / 9, 2.0f / 7), 2.0f / 5), 2.0f / 3), 2.0f);
  return fmaf(static_cast<float>(e), 0.69314718f, s * series);
}

// Gumbel noise, -ln of an Exp(1) draw, which is -ln u.
GCA_HD inline float gumbel(uint32_t word) { return -exact_log(-exact_log(uniform_open(word))); }

}  // namespace gca
