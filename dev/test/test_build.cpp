// What a build must refuse: flags under which the same source computes other numbers.
#include <stdlib.h>
#include <sys/wait.h>

#include "cpu/backend.h"
#include "dev/test/test.h"
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

using namespace gca;
using namespace gca::test;

namespace {

int exit_of(const std::string& command) {
  const int status = system(command.c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

TEST_CASE("build: fast math is refused where the compiler tells of it, and taken back where it does not") {
  const std::string compiler = getenv("CXX") ? getenv("CXX") : "c++";
  if (exit_of("echo | " + compiler + " -std=c++20 -fsyntax-only -x c++ - > /dev/null 2>&1") != 0)
    return skip("no compiler '" + compiler + "'");
  const std::string compile = compiler + " -std=c++20 -I. -fsyntax-only -x c++ common.h > /dev/null 2>&1 ";
  CHECK(exit_of(compile + "-O3") == 0);
  CHECK(exit_of(compile + "-O3 -fno-math-errno -fno-trapping-math") == 0);
  for (const char* flag : {"-Ofast", "-ffast-math", "-ffinite-math-only"}) {
    CAPTURE(flag);
    CHECK(exit_of(compile + flag) != 0);
  }
  // The Makefile's own come after an exported CXXFLAGS.
  if (exit_of("make --version > /dev/null 2>&1") != 0) return;
  CHECK(exit_of("CXXFLAGS='-O3 -funsafe-math-optimizations' make -n -B cpu 2>/dev/null |"
                " grep -q -- '-funsafe-math-optimizations -fno-unsafe-math-optimizations'") == 0);
}

TEST_CASE("build: make install puts the program where it is told, and a new commit compiles one file") {
  if (exit_of("make --version > /dev/null 2>&1") != 0) return skip("no make");
  const auto does = [](const std::string& arguments, const std::string& words) {
    return exit_of("make -n NVCC= " + arguments + " 2>/dev/null | grep -qF -- \"" + words + "\"") == 0;
  };
  CHECK(does("install", "install -m 755 train_gca '/usr/local/bin/train_gca'"));
  CHECK(does("install PREFIX=/opt/x DESTDIR=/tmp/y", "install -m 755 train_gca '/tmp/y/opt/x/bin/train_gca'"));
  CHECK(does("uninstall PREFIX=/opt/x", "rm -f '/opt/x/bin/train_gca'"));
  if (exit_of("make -n cpu NVCC= 2>/dev/null | grep -q ' -c '") == 0) return;  // not built here
  CHECK(exit_of("test $(make -n cpu NVCC= -W build/cpu/version.h 2>/dev/null | grep -c ' -c ') = 1") == 0);
  CHECK(does("cpu -W build/cpu/version.h", "-c commands/version.cpp"));
}

TEST_CASE("build: a process that flushes denormal numbers to zero computes nothing") {
#ifdef __x86_64__
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8000);  // what -ffast-math does at the start of a program that it links
  const std::string error = error_of([] { Cpu<float> cpu(1); });
  _mm_setcsr(before);
  CHECK(has(error, "denormal"));
#endif
  CHECK(error_of([] { Cpu<float> cpu(1); }) == "");
}
