// What the commands share: the choice of a device, where a model comes from, ablations.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "base/flags.h"
#include "base/text.h"
#include "dataloader.h"
#include "runtime/evaluate.h"
#include "runtime/models.h"
#include "runtime/run.h"
#include "runtime/weights.h"

namespace gca {

std::string build_description();

// Prints the help where --help is among the arguments.
bool wants_help(const std::vector<std::string>& arguments, const Flags& flags);

// Calls body(device) with the backend that --device and --precision name.
template <class Body>
int with_device(const std::string& device, const std::string& precision, int64_t threads, Body body) {
#ifdef GCA_CUDA
  if (device == "cuda" || (device == "auto" && gpu_count() > 0)) {
    if (precision == "bf16") {
      Gpu<__nv_bfloat16> gpu;
      return body(gpu);
    }
    Gpu<float> gpu;
    return body(gpu);
  }
#else
  if (device == "cuda")
    throw UsageError(
        "--device cuda: this program was built without CUDA; put nvcc into PATH and run make, or use --device cpu");
#endif
  if (precision == "bf16")
    throw UsageError("--precision bf16 needs a GPU (--device cuda); on the CPU use --precision float");
  Cpu<float> cpu(static_cast<int>(threads));
  return body(cpu);
}

// Bytes to standard output: as they are, but on a terminal without what could steer it.
void print_bytes(const std::string& bytes);

struct ModelSource {
  std::string checkpoint, device = "auto", precision = "float";
  int64_t threads = 0;
  bool fallback = false;
  void add_to(Flags& flags);
};

void add_ablations(Flags& flags, bool& no_retrieval, bool& random_retrieval);
Selection ablation(bool no_retrieval, bool random_retrieval, int64_t seed);

// Picks and weights of a group for B rows of C chunks, (B,C+1,K).
template <class Device>
struct FetchedChunks {
  std::vector<int32_t> pick;
  std::vector<typename DRT<Device>::stat> w;
  FetchedChunks(const DRT<Device>& model, size_t group, int64_t B, int64_t C)
      : pick(B * (C + 1) * model.config.topk), w(pick.size()) {
    model.device.download(pick.data(), model.groups[group].pick, static_cast<int64_t>(pick.size() * sizeof(pick[0])));
    model.device.download(w.data(), model.groups[group].w, static_cast<int64_t>(w.size() * sizeof(w[0])));
  }
};

}  // namespace gca
