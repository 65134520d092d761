// What the tests of the GPU share beside the bench: how its ops are compared with the CPU's.
// The measure: the error against Cpu<double> is at most twice that of the naive twin in the same precision (Cpu<float>,
// Cpu<float,true>), or a few eps of the output's own type for what the twin does not round. Largest over largest entry,
// and RMS over RMS. Both errors are sums of many roundings, draws of one size: a result of a few numbers, or of numbers
// whose errors have one source, is compared over several draws of the inputs together. Everything runs twice and must
// give the same bits; results start as NaN, so that nothing is left unwritten. In bf16 attention runs on tensor cores
// and plainly, each measured so.
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

// body(bench), on four backends; results named "exact ..." must agree with Cpu<double>'s in every number.
template <class Act>
void compare_in(const std::string& name, auto&& body) {
  Gpu<Act>& gpu = *shared_device<Gpu<Act>>();
  Cpu<double> exact(1);
  Cpu<float, std::is_same_v<Act, bf16>> twin(1);
  const Outputs want = run(exact, body), naive = run(twin, body);
  CHECK(!want.empty());
  for (const char* plain : {"0", "1"}) {
    if (*plain == '1' && !std::is_same_v<Act, bf16>) continue;
    setenv("GCA_PLAIN_ATTENTION", plain, 1);
    const Outputs got = run(gpu, body), again = reduced() ? got : run(gpu, body);
    unsetenv("GCA_PLAIN_ATTENTION");
    for (const auto& [output, expected] : want) {
      const std::string which = name +
                                (!std::is_same_v<Act, bf16> ? ", float: "
                                 : *plain == '1'            ? ", bf16, plain: "
                                                            : ", bf16: ") +
                                output;
      CAPTURE(which);
      const Output& found = got.at(output);
      CHECK(found.bits == again.at(output).bits);
      const Errors ours = errors(found, expected), theirs = errors(naive.at(output), expected);
      const bool must_be_exact = output.rfind("exact", 0) == 0;
      auto limit = [&](double naive_error) {
        return must_be_exact ? 0 : reduced() ? DBL_MAX : std::fmax(2 * naive_error, 4 * found.eps);
      };
      CHECK(ours.largest <= limit(theirs.largest));
      CHECK(ours.rms <= limit(theirs.rms));
    }
  }
}
// In both precisions: body(bench, whether inputs must be exact in bf16)
void compare(const std::string& name, auto&& body) {
  compare_in<float>(name, [&](auto& bench) { body(bench, false); });
  compare_in<bf16>(name, [&](auto& bench) { body(bench, true); });
}

}  // namespace gca::test
