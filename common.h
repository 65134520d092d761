// What every file shares: messages, errors, sizes, bf16 rounding, counter-based random numbers. Host and device.
#pragma once
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#ifdef __CUDACC__
#define GCA_HD __host__ __device__  // callable on both sides: CPU and GPU must draw the same bits
#else
#define GCA_HD
#endif

// The order of sums, NaN and infinity, and e^x near its ends mean something here: a build that may change them trains
// other weights, or none, without a word.
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || __FINITE_MATH_ONLY__ + 0
#error "wrong numbers under -Ofast, -ffast-math and their parts: take them out of CXXFLAGS (-O3 is fine)"
#endif

namespace gca {

// ---- messages -----------------------------------------------------------------------------------------------------
// The one way of saying something: str("chunk ", c, " of ", C) puts the parts one after the other, integers in decimal,
// doubles as printf's %g; print and print_error write the same to standard output and to standard error.
inline std::string significant(double x, int digits) {
  char out[64];
  snprintf(out, sizeof out, "%.*g", digits, x);
  return out;
}
inline std::string fixed(double x, int digits) {  // digits after the point
  std::string out(static_cast<size_t>(snprintf(nullptr, 0, "%.*f", digits, x)), '\0');
  snprintf(out.data(), out.size() + 1, "%.*f", digits, x);
  return out;
}
inline std::string scientific(double x, int digits) {  // digits after the point
  char out[64];
  snprintf(out, sizeof out, "%.*e", digits, x);
  return out;
}
inline std::string hex(uint64_t x, int digits = 1) {  // at least so many digits
  char out[24];
  snprintf(out, sizeof out, "%0*llx", digits, static_cast<unsigned long long>(x));
  return out;
}
template <class Part>
void append_part(std::string& out, const Part& part) {
  if constexpr (std::is_convertible_v<const Part&, std::string_view>) out += std::string_view(part);
  else if constexpr (std::is_same_v<Part, char>) out += part;
  else if constexpr (std::is_integral_v<Part>) out += std::to_string(part);
  else out += significant(static_cast<double>(part), 6);
}
template <class... Parts>
std::string str(const Parts&... parts) {
  std::string out;
  (append_part(out, parts), ...);
  return out;
}
// A column of a table: the part with spaces after it (left) or before it (right), `width` bytes at least.
template <class Part>
std::string left(const Part& part, size_t width) {
  std::string out = str(part);
  out.resize(out.size() < width ? width : out.size(), ' ');
  return out;
}
template <class Part>
std::string right(const Part& part, size_t width, char fill = ' ') {
  const std::string out = str(part);
  return std::string(out.size() < width ? width - out.size() : 0, fill) + out;
}
inline int output_error = 0;  // errno of the first write to standard output that failed; 0: none
template <class... Parts>
void print(const Parts&... parts) {
  const std::string out = str(parts...);
  if (fwrite(out.data(), 1, out.size(), stdout) != out.size() && !output_error) output_error = errno;
}
// Hands on what was printed. Whether all of it got through so far; flush_output() in base/files.h throws where not.
inline bool try_flush_output() {
  if (fflush(stdout) != 0 && !output_error) output_error = errno;
  return !output_error;
}
template <class... Parts>
void print_error(const Parts&... parts) {
  const std::string out = str(parts...);
  try_flush_output();  // in the order of saying, also where both go to one file
  fwrite(out.data(), 1, out.size(), stderr);
}

// FNV-1a, 32 bits: a number that stays with a name.
inline uint32_t name_hash(std::string_view name) {
  uint32_t hash = 2166136261u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
  return hash;
}

// ---- errors -------------------------------------------------------------------------------------------------------
// Error: what was asked failed (exit 1). UsageError: the command line is wrong (exit 2). Both carry a whole sentence
// for a person: which file or field, expected, found, what to do.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct UsageError : Error {
  using Error::Error;
};

// A broken promise between functions of this program (never bad input): says where and what.
#define GCA_CHECK(condition, ...)                                                                                 \
  do {                                                                                                            \
    if (!(condition))                                                                                             \
      throw ::gca::Error(::gca::str(__FILE__, ":", __LINE__, ": ", #condition, " does not hold: ", __VA_ARGS__)); \
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

enum class Draw : uint32_t {
  init = 1,
  rows,
  gumbel,
  uniform_pick,
  sample,
  task,
  window
};  // one a purpose: never the same numbers twice

GCA_HD inline Philox philox(uint64_t seed, Draw stream, uint32_t c0, uint32_t c1 = 0, uint32_t c2 = 0,
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
