// libFuzzer: any bytes as a safetensors file are refused with an Error, or every tensor of it can be read.
#include <sys/mman.h>
#include <unistd.h>

#include "base/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  const int fd = memfd_create("model", 0);
  if (fd < 0 || ::write(fd, data, size) != static_cast<ssize_t>(size)) __builtin_trap();
  try {
    const SafetensorsFile file = SafetensorsFile::open(str("/proc/self/fd/", fd));
    int64_t bytes = 0;
    for (const SafetensorsTensor& t : file.tensors()) {
      bytes += t.count * t.dtype.bytes();
      const bool number =
          t.dtype == Dtype::F64 || t.dtype == Dtype::F32 || t.dtype == Dtype::F16 || t.dtype == Dtype::BF16;
      if (number) static_cast<void>(file.values<float>(t.name));
      if (t.dtype == Dtype::I64) static_cast<void>(file.values<int64_t>(t.name));
      if (file.find(t.name) != &t) __builtin_trap();
    }
    if (bytes > static_cast<int64_t>(size)) __builtin_trap();
  } catch (const Error&) {}
  ::close(fd);
  return 0;
}
