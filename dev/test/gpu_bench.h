// One op, or several in a row, on any backend and on the same inputs: what comes out, its hash, and how far it lies
// from Cpu<double>'s. For the GPU's tests and for dev/bench.cu.
#pragma once
#include <algorithm>
#include <cfloat>
#include <map>
#include <memory>

#include "base/files.h"
#include "dev/test/numbers.h"
#include "runtime/models.h"

namespace gca::test {

using bf16 = __nv_bfloat16;
using Ids = std::vector<int32_t>;

inline double number(float x) { return x; }
inline double number(double x) { return x; }
inline double number(int32_t x) { return x; }
inline double number(bf16 x) { return __bfloat162float(x); }
template <class T>
T from_number(double x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16(static_cast<float>(x));
  else return static_cast<T>(x);
}
// Inputs that every type in question holds exactly.
inline Vec exact_in(bool in_bf16, Vec values) {
  for (double& x : values) x = in_bf16 ? round_bf16(static_cast<float>(x)) : static_cast<float>(x);
  return values;
}

// ---- one op, or several in a row, on any backend ------------------------------------------------------------------
// What came out, by name: the numbers, where each draw of the inputs ends, the type's eps, and the bits.
struct Output {
  Vec values;
  std::vector<size_t> ends;
  double eps = 0;
  std::vector<char> bits;
  void append(const auto& host, double eps_) {
    eps = eps_;
    ends.push_back(values.size() + host.size());
    for (const auto& x : host) values.push_back(number(x));
    const char* bytes = reinterpret_cast<const char*>(host.data());
    bits.insert(bits.end(), bytes, bytes + host.size() * sizeof host[0]);
  }
};
using Outputs = std::map<std::string, Output>;

template <class Device>
class Bench {
 public:
  using act = typename Device::act;
  using weight = typename Device::weight;
  using stat = typename Device::stat;
  using grad = typename Device::grad;
  using master = typename Device::master;
  Device& device;
  Outputs outputs;
  bool keep = true;   // results in outputs; else only their hash
  uint32_t hash = 0;  // CRC-32C of all results so far, as they came

  explicit Bench(Device& device_) : device(device_) {}
  ~Bench() {
    for (void* memory : memory_) device.release(memory);
  }
  template <class T>
  T* put(const Vec& values) {
    return put<T>(values, static_cast<int64_t>(values.size()));
  }
  // n numbers: the values, again and again.
  template <class T>
  T* put(const Vec& values, int64_t n) {
    const size_t period = std::max<size_t>(1, values.size());
    const size_t at_once = values.size() * std::max<size_t>(1, (1 << 20) / period);  // some MiB
    std::vector<T> host(std::min(static_cast<size_t>(n), at_once));
    for (size_t i = 0; i < host.size(); i++) host[i] = from_number<T>(values[i % values.size()]);
    return put_as_is(host, n);
  }
  int32_t* put(const Ids& ids) { return put_as_is(ids, static_cast<int64_t>(ids.size())); }
  // Every bit set: not a number, and -1.
  template <class T>
  T* make(int64_t n) {
    return put_as_is(std::vector<T>(std::min<int64_t>(n, 1 << 20), all_ones<T>()), n);
  }
  template <class T>
  std::vector<T> get(const T* from, int64_t n) {
    std::vector<T> host(n);
    device.download(host.data(), from, n * static_cast<int64_t>(sizeof(T)));
    return host;
  }
  // The first n numbers are a result, or more of the one of that name.
  template <class T>
  void result(const std::string& name, const T* from, int64_t n) {
    constexpr double eps = std::is_same_v<T, bf16> ? 1.0 / 256 : std::is_same_v<T, float> ? 1.0 / (1 << 23) : 0;
    const std::vector<T> host = get(from, n);
    hash = crc32c(host.data(), host.size() * sizeof(T), hash);
    if (keep) outputs[name].append(host, eps);
  }

 private:
  template <class T>
  static T all_ones() {
    T value;
    memset(static_cast<void*>(&value), 0xff, sizeof value);
    return value;
  }
  template <class T>
  T* put_as_is(const std::vector<T>& host, int64_t n) {
    const int64_t period = static_cast<int64_t>(host.size()), size = static_cast<int64_t>(sizeof(T));
    T* memory = static_cast<T*>(device.allocate(n * size));
    memory_.push_back(memory);
    for (int64_t done = 0; done < n; done += period)
      device.upload(memory + done, host.data(), std::min(period, n - done) * size);
    return memory;
  }
  std::vector<void*> memory_;
};

// The largest difference over the largest entry, and root mean squares one over the other. Of several draws: the mean
// of their largest differences, since the one largest of all is the luck of a single number (dev/LOG.md).
struct Errors {
  double largest, rms;
};
inline Errors errors(const Output& got, const Output& want) {
  double differences = 0, size = 0, squares = 0, reference = 0;
  size_t i = 0;
  for (const size_t end : want.ends) {
    double difference = 0;
    for (; i < end; i++) {
      // Equal infinities are no error.
      const double delta = got.values[i] == want.values[i] ? 0 : std::fabs(got.values[i] - want.values[i]);
      if (delta > difference || std::isnan(delta)) difference = delta;
      size = std::fmax(size, std::fabs(want.values[i]));
      squares += delta * delta;
      reference += want.values[i] * want.values[i];
    }
    differences += difference;
  }
  if (differences == 0) return {0, 0};
  return {differences / static_cast<double>(want.ends.size()) / size, std::sqrt(squares / reference)};
}

// GCA_REDUCED=1 in the environment, for compute-sanitizer, which takes minutes for what takes a second: one run of each
// shape, one draw and one step of a model, few rows. The size of errors is not looked at then (one draw says little of
// it), only that results are numbers, and exact where they must be.
inline bool reduced() { return getenv("GCA_REDUCED") != nullptr; }

// The devices, made once: a GPU's memory is asked for only once. Null where no GPU answers.
template <class Device>
Device* shared_device() {
  static const auto device = gpu_count() > 0 ? std::make_unique<Device>() : nullptr;
  return device.get();
}
template <class Device>
Outputs run(Device& device, auto&& body) {
  Bench<Device> bench(device);
  body(bench);
  return std::move(bench.outputs);
}

// The types of a bench, for bodies that take `auto& bench`.
#define BENCH_TYPES(bench)                                     \
  using bench_type = std::remove_reference_t<decltype(bench)>; \
  using act [[maybe_unused]] = typename bench_type::act;       \
  using weight [[maybe_unused]] = typename bench_type::weight; \
  using stat [[maybe_unused]] = typename bench_type::stat;     \
  using grad [[maybe_unused]] = typename bench_type::grad;     \
  using master [[maybe_unused]] = typename bench_type::master

inline Vec randoms(bool in_bf16, int64_t n, uint64_t seed, double deviation = 1, double mean = 0) {
  return exact_in(in_bf16, random_values<double>(n, seed, deviation, mean));
}
// Small whole numbers: their sums of products are exact in every type, so that scores are equal everywhere, ties and
// all.
inline Vec whole_numbers(int64_t n, uint64_t seed, int64_t limit = 3) {
  Vec values(n);
  const Ids ids = random_ids(n, seed, 2 * limit + 1);
  for (size_t i = 0; i < values.size(); i++) values[i] = ids[i] - static_cast<double>(limit);
  return values;
}

// A pick table (B,C+1,K): row c+1 has different chunks before c, as many as there are, K at most; an eighth of them -1
// instead, unless `all`.
inline Ids random_picks(int64_t B, int64_t C, int K, uint64_t seed, bool all = false) {
  Ids pick(B * (C + 1) * K, -1);
  for (int64_t b = 0; b < B; b++)
    for (int64_t c = 1; c < C; c++) {
      Ids past(c);
      for (size_t m = 0; m < past.size(); m++) past[m] = static_cast<int32_t>(m);
      const Ids draw = random_ids(2 * K, seed + static_cast<uint64_t>(b * C + c), 1 << 20);
      for (int64_t k = 0; k < std::min<int64_t>(K, c); k++) {
        std::swap(past[k], past[k + draw[k] % (c - k)]);
        if (all || draw[K + k] % 8) pick[(b * (C + 1) + c + 1) * K + k] = past[k];
      }
    }
  return pick;
}

}  // namespace gca::test
