// One op, or several in a row, on any backend and on the same inputs: what comes out, and how far it lies from Cpu<double>'s.
#pragma once
#include <algorithm>
#include <map>
#include <memory>

#include "../../gca_cpu.h"
#include "../../gca_kernels.cuh"
#include "test.h"

namespace gca::test {

using bf16 = __nv_bfloat16;
using Vec = std::vector<double>;
using Ids = std::vector<int32_t>;
template <class T>
size_t at(T i) {
  return static_cast<size_t>(i);
}

inline double number(float x) { return x; }
inline double number(double x) { return x; }
inline double number(int32_t x) { return x; }
inline double number(bf16 x) { return __bfloat162float(x); }
template <class T>
T from_number(double x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16(static_cast<float>(x));
  else
    return static_cast<T>(x);
}
// Inputs that every type in question holds exactly.
inline Vec exact_in(bool in_bf16, Vec values) {
  for (double& x : values) x = in_bf16 ? round_bf16(static_cast<float>(x)) : static_cast<float>(x);
  return values;
}

// ---- one op, or several in a row, on any backend ----------------------------------------------------------------------------------
// What came out, by name: the numbers, the type's eps, and the bits.
struct Output {
  Vec values;
  double eps = 0;
  std::vector<char> bits;
  void append(const auto& host, double eps_) {
    eps = eps_;
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

  explicit Bench(Device& device_) : device(device_) {}
  ~Bench() {
    for (void* memory : memory_) device.release(memory);
  }
  template <class T>
  T* put(const Vec& values) {
    std::vector<T> host(values.size());
    for (size_t i = 0; i < host.size(); i++) host[i] = from_number<T>(values[i]);
    return put_as_is(host);
  }
  int32_t* put(const Ids& ids) { return put_as_is(ids); }
  // Every bit set: not a number, and -1.
  template <class T>
  T* make(int64_t n) {
    const std::vector<char> ones(at(n) * sizeof(T), '\xff');
    T* memory = static_cast<T*>(device.allocate(n * static_cast<int64_t>(sizeof(T))));
    memory_.push_back(memory);
    device.upload(memory, ones.data(), n * static_cast<int64_t>(sizeof(T)));
    return memory;
  }
  template <class T>
  std::vector<T> get(const T* from, int64_t n) {
    std::vector<T> host(at(n));
    device.download(host.data(), from, n * static_cast<int64_t>(sizeof(T)));
    return host;
  }
  // The first n numbers are a result, or more of the one of that name.
  template <class T>
  void result(const std::string& name, const T* from, int64_t n) {
    outputs[name].append(get(from, n), std::is_same_v<T, bf16> ? 1.0 / 256 : std::is_same_v<T, float> ? 1.0 / (1 << 23) : 0);
  }

 private:
  template <class T>
  T* put_as_is(const std::vector<T>& host) {
    T* memory = make<T>(static_cast<int64_t>(host.size()));
    device.upload(memory, host.data(), static_cast<int64_t>(host.size() * sizeof(T)));
    return memory;
  }
  std::vector<void*> memory_;
};

struct Errors {
  double largest, rms;
};
inline Errors errors(const Vec& got, const Vec& want) {
  double difference = 0, size = 0, squares = 0, reference = 0;
  for (size_t i = 0; i < got.size(); i++) {
    const double delta = got[i] == want[i] ? 0 : std::fabs(got[i] - want[i]);  // equal infinities are no error
    if (!(delta <= difference)) difference = delta;
    size = std::fmax(size, std::fabs(want[i]));
    squares += delta * delta, reference += want[i] * want[i];
  }
  if (difference == 0) return {0, 0};
  return {difference / size, std::sqrt(squares / reference)};
}

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
// Small whole numbers: their sums of products are exact in every type, so that scores are equal everywhere, ties and all.
inline Vec whole_numbers(int64_t n, uint64_t seed, int64_t limit = 3) {
  Vec values(at(n));
  const Ids ids = random_ids(n, seed, 2 * limit + 1);
  for (size_t i = 0; i < values.size(); i++) values[i] = ids[i] - static_cast<double>(limit);
  return values;
}

// A pick table (B,C+1,K): row c+1 has different chunks before c, some places -1.
inline Ids random_picks(int64_t B, int64_t C, int K, uint64_t seed) {
  Ids pick(at(B * (C + 1) * K), -1);
  for (int64_t b = 0; b < B; b++)
    for (int64_t c = 1; c < C; c++) {
      Ids past(at(c));
      for (size_t m = 0; m < past.size(); m++) past[m] = static_cast<int32_t>(m);
      const Ids draw = random_ids(2 * K, seed + static_cast<uint64_t>(b * C + c), 1 << 20);
      for (int64_t k = 0; k < std::min<int64_t>(K, c); k++) {
        std::swap(past[at(k)], past[at(k + draw[at(k)] % (c - k))]);
        if (draw[at(K + k)] % 8) pick[at((b * (C + 1) + c + 1) * K + k)] = past[at(k)];
      }
    }
  return pick;
}

}  // namespace gca::test
