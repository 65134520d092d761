// One loop, compiled for the instruction sets below, chosen at run time. The program itself is built for any x86-64 (or
// any other processor, where only `portable` exists), so a binary moves between machines.
#pragma once
#include <cstdlib>
#include <cstring>

#include "common.h"

#define GCA_INLINE \
  __attribute__((always_inline))  // a body that must be compiled anew inside each of simd()'s three versions

namespace gca {

enum class Isa { portable, avx2, avx512 };
inline const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "AVX-512" : isa == Isa::avx2 ? "AVX2" : "portable"; }

// The best set that this processor has; GCA_ISA=portable|avx2|avx512 in the environment asks for a lesser one.
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::portable;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
      best = Isa::avx512;
#endif
    if (const char* asked = getenv("GCA_ISA")) {
      if (!strcmp(asked, "portable")) return Isa::portable;
      if (!strcmp(asked, "avx2") && best >= Isa::avx2) return Isa::avx2;
      if (strcmp(asked, "avx512") || best < Isa::avx512)
        throw UsageError(str("GCA_ISA: expected portable, avx2 or avx512, and one that this processor has (its best: ",
                             isa_name(best), "), found '", asked, "'"));
    }
    return best;
  }();
  return chosen;
}

#ifdef __x86_64__
#define GCA_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define GCA_TARGET_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
template <class Body>
GCA_TARGET_AVX2 void run_avx2(Body& body) {
  body();
}
template <class Body>
GCA_TARGET_AVX512 void run_avx512(Body& body) {
  body();
}
#endif

// Runs body(), compiled for the chosen instruction set. body: a lambda marked GCA_INLINE, so that it is inlined into
// (and vectorised by) each version, and capturing by value, since a reference would be read again in every iteration:
// simd([=]() GCA_INLINE { for (...) ... });
template <class Body>
inline void simd(Body body) {
#ifdef __x86_64__
  if (isa() == Isa::avx512) return run_avx512(body);
  if (isa() == Isa::avx2) return run_avx2(body);
#endif
  body();
}

}  // namespace gca
