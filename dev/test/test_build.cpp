// What a build must refuse: flags under which the same source computes other numbers.
#include <stdlib.h>
#include <sys/wait.h>

#include <filesystem>

#include "base/files.h"
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

TEST_CASE(
    "build: CUDA is found where nvcc lies, whatever leads to it; an old one, and one that is not in PATH, are told "
    "of") {
  if (exit_of("make --version > /dev/null 2>&1") != 0) return skip("no make");
  const TempFolder folder;
  const std::string toolkit = folder.path + "/a toolkit's (new) $one", nvcc = toolkit + "/bin/nvcc",
                    link = folder.path + "/link/nvcc", wrapper = folder.path + "/wrapper/nvcc";
  const auto quoted = [](std::string text) {
    for (size_t at = 0; (at = text.find('\'', at)) != text.npos; at += 4) text.replace(at, 1, "'\\''");
    return "'" + text + "'";
  };
  const auto script = [](const std::string& path, const std::string& content) {
    make_folder(parent_folder(path));
    write_file(path, "#!/bin/sh\n" + content);
    std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  };
  const auto is_of = [&](const char* version) {
    script(nvcc, str("echo 'Cuda compilation tools, release ", version, ", V", version, ".1'\n"));
  };
  // What make says; variables of make before it, in the shell's words.
  const auto made = [&](const std::string& environment, const std::string& arguments) {
    const std::string log = folder.path + "/log";
    const int exit = exit_of("env -u MAKEFLAGS -u MAKELEVEL -u NVCC -u CUDA_HOME -u CUDA_PATH " + environment +
                             " make -n -B " + arguments + " > " + quoted(log) + " 2>&1");
    return str("exit ", exit, "\n") + read_file(log, size_t{1} << 24);
  };
  for (const char* file : {"/include/cuda_runtime.h", "/lib64/libcudart.so"}) {
    make_folder(parent_folder(toolkit + file));
    write_file(toolkit + file, "");
  }
  is_of("12.0");
  make_folder(parent_folder(link));
  std::filesystem::create_symlink(nvcc, link);
  script(wrapper, "test \"$1\" = --dryrun && echo '#$ TOP='" + quoted(toolkit + "/bin/..") + " >&2\nexit 0\n");
  std::string in_make = quoted(nvcc);  // where a $ is written twice
  for (size_t at = 0; (at = in_make.find('$', at)) != in_make.npos; at += 2) in_make.insert(at, "$");
  for (const std::string& way : {in_make, quoted(link), quoted(wrapper), quoted(link + " -ccbin g++")}) {
    CAPTURE(way);
    const std::string said = made("", "train_gca ARCH=80 NVCC=" + way);
    CHECK(has(said, "exit 0\n"));
    CHECK(has(said, "-isystem " + quoted(toolkit + "/include") + " "));
    CHECK(has(said, "-L" + quoted(toolkit + "/lib64") + " -Xlinker -rpath -Xlinker " + quoted(toolkit + "/lib64")));
  }
  CHECK(has(made("PATH=" + quoted(folder.path + "/link:/usr/bin:/bin"), "train_gca ARCH=80"),
            "-isystem " + quoted(toolkit + "/include")));
  const std::string of_distribution = made("", "train_gca ARCH=80 NVCC=/usr/bin/nvcc");
  CHECK(has(of_distribution, "-DGCA_CUDA "));
  CHECK_FALSE(has(of_distribution, "-isystem"));
  CHECK_FALSE(has(of_distribution, "/usr/include"));
  CHECK_FALSE(has(of_distribution, "rpath"));
  for (const char* version : {"9.2", "11.8"}) {
    is_of(version);
    CHECK(has(made("", "train_gca ARCH=80 NVCC=" + quoted(link)),
              str("CUDA 12.0 or newer is needed, ", link, " is of ", version, ": install a newer one")));
    CHECK(has(made("", "cpu NVCC=" + quoted(link)), "exit 0\n"));
  }
  is_of("13.1");
  CHECK(has(made("", "train_gca ARCH=80 NVCC=" + quoted(link)), "exit 0\n"));
  if (exit_of("PATH=/usr/bin:/bin command -v nvcc > /dev/null") == 0) return;
  const std::string bare = "PATH=/usr/bin:/bin CUDA_HOME=" + quoted(toolkit);
  CHECK(has(made(bare, ""), "CUDA is installed (" + nvcc + ") but nvcc is not in PATH: this builds for the CPU alone"));
  for (const char* asked : {"cpu", "NVCC=", "clean"}) CHECK_FALSE(has(made(bare, asked), "CUDA is installed"));
}

TEST_CASE("build: clang with its own C++ library compiles what that lacks most of") {
  const char* headers = getenv("LIBCXX");  // where they are not beside clang++: its folder c++/v1
  const std::string compile = std::string("clang++ -std=c++20 -fopenmp-simd -I. -x c++ -fsyntax-only ") +
                              (headers ? "-nostdinc++ -isystem '" + std::string(headers) + "' " : "-stdlib=libc++ ");
  if (exit_of("echo '#include <ios>' | " + compile + "- > /dev/null 2>&1") != 0)
    return skip("no clang++ with libc++ (LIBCXX=... names its headers)");
  // Numbers from text, waiting for tokens, bindings in lambdas, calls that Linux alone has.
  for (const char* file :
       {"base/json.cpp", "ranks/world.cpp", "ranks/sockets.cpp", "cpu/double.cpp", "runtime/decode.h"}) {
    CAPTURE(file);
    CHECK(exit_of(compile + file) == 0);
  }
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
