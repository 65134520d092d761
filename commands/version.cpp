// What this build is. The Makefile writes a header of it into the build's folder and has it included here: a new commit
// compiles this file, and nothing else.
#include <string>

#include "commands/shared.h"
#ifdef GCA_CUDA
#include <cuda_runtime_api.h>
#endif
#ifndef GCA_VERSION  // compiled by hand
#define GCA_VERSION "unknown"
#define GCA_COMMIT "unknown"
#define GCA_FLAGS "unknown"
#endif

namespace gca {

namespace {

const std::string version = str(GCA_VERSION, ", commit ", GCA_COMMIT), compiler = __VERSION__;
#ifdef GCA_CUDA
const std::string backends = "CPU and CUDA",
                  cuda = str("CUDA ", CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10);
#else
const std::string backends = "CPU only", cuda = "without CUDA";
#endif

}  // namespace

std::string build_description() { return str(version, ", ", backends, ", ", compiler); }

std::string version_description() {
  return str("train_gca ", version, "\n", cuda, "\ncompiler ", compiler, "\nflags ", GCA_FLAGS, "\n");
}

}  // namespace gca
