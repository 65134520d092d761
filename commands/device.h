// The choice of a backend, and a saved model on it. What depends on the backend is compiled once, in device.cpp: the
// commands that use it stay quick to compile.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/models.h"
#include "runtime/stream.h"

namespace gca {

struct SavedRun;

struct World;
struct TrainSettings;
// How many ranks --gpus and --ranks ask this process to launch; 1: none. A UsageError where that does not fit --device,
// the build or the world that this process is in already, an Error where there are fewer GPUs.
int ranks_to_launch(const TrainSettings& settings, const World& world);
// The GPU of the rank of that number on this host: where it sees one alone, that one. An Error where it sees too few.
int gpu_of(int local_rank);

// Calls body(device) with the backend that --device and --precision name. local_rank: see gpu_of.
template <class Body>
int with_device(const std::string& device, const std::string& precision, int64_t threads, Body body,
                [[maybe_unused]] int local_rank = 0) {
#ifdef GCA_CUDA
  if (device == "cuda" || (device == "auto" && gpu_count() > 0)) {
    if (precision == "bf16") {
      Gpu<__nv_bfloat16> gpu(gpu_of(local_rank));
      return body(gpu);
    }
    Gpu<float> gpu(gpu_of(local_rank));
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

// The run's weights into a model that is allocated.
template <class Device>
void load_weights_of(const SavedRun& saved, DRT<Device>& model);
// The same, and the readers of that plan. memory: gpu, host, or auto, which is the GPU where it fits. Where there is no
// room for it, an Error that says for what there is; shorter: how its user asks for less.
template <class Device>
std::vector<std::unique_ptr<RowReader<Device>>> open_readers(const SavedRun& saved, DRT<Device>& model, ReaderPlan plan,
                                                             const std::string& memory, const char* shorter);
template <class Device>
std::unique_ptr<RowReader<Device>> open_reader(const SavedRun& saved, DRT<Device>& model, const ReaderPlan& plan,
                                               const std::string& memory, const char* shorter) {
  return std::move(open_readers(saved, model, plan, memory, shorter)[0]);
}

// How much went to the host's memory and came back, how fast, and what was waited for; nothing where the device has it
// all. readings: seconds of each reading of rows, the first of which is while host memory is made ready.
template <class Device>
void print_host_memory(RowReader<Device>& reader, const std::vector<double>& readings);

// Scores r_c . L_m / sqrt(D) of all chunks m that chunk c of row b may fetch, summed in double. c is among the last
// pass's chunks first_chunk .. first_chunk + chunks - 1, of which the stream has gone no further.
template <class Device>
std::vector<double> retrieval_scores(const DRT<Device>& model, const typename DRT<Device>::StreamState& stream,
                                     size_t g, int64_t b, int64_t c, int64_t first_chunk, int64_t chunks);

// Logits of slots first .. first + count - 1 of the last forward pass, (count,V).
template <class Device>
std::vector<std::vector<float>> logits_of_slots(DRT<Device>& model, int64_t first, int64_t count);

}  // namespace gca
