// What the tests of the GPU share beside the bench.
#pragma once
#include "dev/test/gpu_bench.h"
#include "dev/test/test.h"

namespace gca::test {

// Whether there is no GPU to run a test on, which it then says.
inline bool no_gpu() {
  if (gpu_count() > 0) return false;
  skip("no GPU answers");
  return true;
}

}  // namespace gca::test
