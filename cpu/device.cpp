// The CPU's memory, and the refusal to compute where denormals are flushed.
#include "cpu/device.h"

#include <algorithm>
#include <cstdlib>

#include "base/machine.h"
#include "base/progress.h"

namespace gca {

CpuDevice::CpuDevice(int threads) : pool_(threads) {
  const volatile float denormal = 1e-40f;
  if (denormal * 0.5f == 0)
    throw Error(
        "this process flushes denormal numbers to zero, so its results would differ from everybody else's: build and "
        "link without -ffast-math and -Ofast (LDFLAGS too), and leave out preloaded libraries that were built so");
}

void* CpuDevice::allocate(int64_t n_bytes) {
  const int64_t rounded_bytes = round_up(std::max<int64_t>(n_bytes, 1), alignment_bytes);
  void* memory = std::aligned_alloc(alignment_bytes, rounded_bytes);
  if (!memory)
    throw Error(
        str("out of memory: ", fixed(static_cast<double>(n_bytes) / (1 << 20), 1), " MiB asked for; ", ask_for_less));
  return memory;
}

void CpuDevice::release(void* memory) { free(memory); }

void CpuDevice::side_copies(const std::vector<std::pair<void*, const void*>>& to_from, int64_t n_bytes) {
  const Stopwatch clock;
  for (const auto& [to, from] : to_from) copy_bytes(to, from, n_bytes);
  side_copy_seconds_ += clock.seconds();
}

int64_t CpuDevice::free_bytes() { return machine().free_bytes; }

}  // namespace gca
