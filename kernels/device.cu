// The GPU itself: finding it, its memory, copies, graphs of work, errors in words; and the table of rotary angles.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <thread>
#include <vector>

#include "gca_kernels.cuh"
#include "kernels/device.cuh"

namespace gca {
namespace {

__global__ void cast_weights_kernel(bf16* to,           // (n)
                                    const float* from,  // (n)
                                    int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += gridDim.x * int64_t{blockDim.x})
    to[i] = __float2bfloat16(from[i]);
}

constexpr int64_t most_angles = 4096 * 256;  // slots of a chunk x columns of a head

double mebibytes(size_t n_bytes) { return static_cast<double>(n_bytes) / (1 << 20); }
std::string cuda_version(int version) { return str(version / 1000, ".", version % 1000 / 10); }

}  // namespace

void check(cudaError_t result, const Doing& doing) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // an error that is not for good must not come out of the next call too
  std::string hint;
  if (result == cudaErrorMemoryAllocation) hint = str("; ", ask_for_less);
  if (result == cudaErrorIllegalAddress || result == cudaErrorLaunchFailure || result == cudaErrorMisalignedAddress)
    hint =
        "; this or an earlier kernel failed: with CUDA_LAUNCH_BLOCKING=1 in the environment the error comes from the "
        "one that did";
  throw Error(str(doing.where.file_name(), ":", static_cast<unsigned>(doing.where.line()), ": GPU, ", doing.what, ": ",
                  cudaGetErrorString(result), " (", cudaGetErrorName(result), ")", hint));
}

// The version of the kernels' code, not of the card: a newer card may run the code for 8.0, which waits for nothing.
// One GPU a process, or several of a kind.
bool compiled_for_hopper() {
  static const bool answer = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(cast_weights_kernel)),
          "asking what kernels were compiled for");
    return attributes.ptxVersion >= 90;
  }();
  return answer;
}
bool launches_early() {
  static const bool answer = [] {
    const char* asked = std::getenv("GCA_EARLY_LAUNCH");
    const int first_to_capture_them = 12030;
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "asking for the driver's version");
    return compiled_for_hopper() && std::min(driver, CUDART_VERSION) >= first_to_capture_them &&
           !(asked && *asked == '0');
  }();
  return answer;
}

int gpu_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

GpuDevice::GpuDevice(int ordinal) : ordinal_(ordinal) {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0 &&
      cudaRuntimeGetVersion(&runtime) == cudaSuccess)
    throw Error(str("the GPU's driver knows CUDA ", cuda_version(driver), ", this program needs CUDA ",
                    cuda_version(runtime),
                    ": update the driver, build with an older CUDA toolkit, or use --device cpu"));
  if (found == cudaErrorNoDevice || found == cudaErrorInsufficientDriver || (found == cudaSuccess && count == 0))
    throw Error("no GPU answers: look at what nvidia-smi and CUDA_VISIBLE_DEVICES say, or use --device cpu");
  check(found, "counting GPUs");
  if (ordinal < 0 || ordinal >= count) throw Error(str("GPU number: expected 0 to ", count - 1, ", found ", ordinal));

  cudaDeviceProp card{};
  check(cudaGetDeviceProperties(&card, ordinal), "asking for the GPU's properties");
  if (card.major < 8)
    throw Error(str(card.name, " has compute capability ", card.major, ".", card.minor,
                    ", the least that serves is 8.0 (A100, RTX 30 and newer): use --device cpu"));
  check(cudaSetDevice(ordinal), "taking the GPU");
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(cast_weights_kernel)) != cudaSuccess)
    throw Error(str("this program was not built for ", card.name, " (compute capability ", card.major, ".", card.minor,
                    "): build it again on a machine with that card, or use --device cpu"));
  processors_ = card.multiProcessorCount;
  shared_of_processor_ = static_cast<int64_t>(card.sharedMemPerMultiprocessor);
  try {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
    int least = 0, most = 0;  // what goes on beside the ops is small, and is waited for
    check(cudaDeviceGetStreamPriorityRange(&least, &most), "asking for priorities of streams");
    check(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, most), "making a stream");
    check(cudaEventCreateWithFlags(&passed_, cudaEventDisableTiming), "making an event");
    scratch_ = allocate(scratch_bytes);
    rotation_ = static_cast<float*>(allocate(most_angles * static_cast<int64_t>(sizeof(float))));
    check(cudaMallocHost(reinterpret_cast<void**>(&staging_), staging_pieces * staging_bytes), "pinning memory");
    for (cudaEvent_t& event : uploaded_)
      check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    products_ = make_products();
  } catch (...) {
    close();
    throw;
  }
}

GpuDevice::~GpuDevice() { close(); }

// Errors are past mending here.
void GpuDevice::close() noexcept {
  release(scratch_);
  release(rotation_);
  for (cudaEvent_t event : uploaded_)
    if (event) cudaEventDestroy(event);
  if (staging_) cudaFreeHost(staging_);
  if (passed_) cudaEventDestroy(passed_);
  unused_.insert(unused_.end(), under_way_.begin(), under_way_.end());
  for (const TimedCopies& timed : unused_) {
    if (timed.begun) cudaEventDestroy(timed.begun);
    if (timed.done) cudaEventDestroy(timed.done);
  }
  if (side_) cudaStreamDestroy(side_);
  if (stream_) cudaStreamDestroy(stream_);
}

std::string GpuDevice::description() const {
  cudaDeviceProp card{};
  int driver = 0;
  check(cudaGetDeviceProperties(&card, ordinal_), "asking for the GPU's properties");
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  return str(card.name, ", ", fixed(mebibytes(card.totalGlobalMem) / 1024, 1), " GiB, ", card.multiProcessorCount,
             " multiprocessors, compute capability ", card.major, ".", card.minor, ", driver for CUDA ",
             cuda_version(driver));
}

std::string GpuDevice::card() const {
  cudaDeviceProp card{};
  check(cudaGetDeviceProperties(&card, ordinal_), "asking for the GPU's properties");
  std::string uuid;
  for (const char byte : card.uuid.bytes) uuid += hex(static_cast<unsigned char>(byte), 2);
  return uuid;
}

int64_t GpuDevice::free_bytes() const {
  size_t unused = 0, total = 0;
  check(cudaMemGetInfo(&unused, &total), "asking for free memory");
  return static_cast<int64_t>(unused);
}

void GpuDevice::look_for_errors() {
  if (const cudaError_t state = cudaStreamQuery(stream_); state != cudaErrorNotReady)
    check(state, "looking at its work");
}
void GpuDevice::synchronize() {
  not_while_capturing("waiting for the GPU");
  check(cudaStreamSynchronize(stream_), "waiting for the GPU");
}

// ---- memory -------------------------------------------------------------------------------------------------------
void* GpuDevice::allocate(int64_t n_bytes) {
  not_while_capturing("allocating");
  void* memory = nullptr;
  const size_t size = std::max<int64_t>(n_bytes, 1);
  if (cudaMalloc(&memory, size) == cudaSuccess) return memory;
  cudaGetLastError();
  size_t unused = 0, total = 0;
  cudaMemGetInfo(&unused, &total);
  throw Error(str("out of GPU memory: ", fixed(mebibytes(size), 1), " MiB asked for, ", fixed(mebibytes(unused), 1),
                  " of ", fixed(mebibytes(total), 1), " MiB free; ", ask_for_less,
                  ", or see with nvidia-smi who holds the rest"));
}
void GpuDevice::release(void* memory) {
  if (!memory) return;
  cudaStreamSynchronize(stream_);  // work that still uses it
  cudaStreamSynchronize(side_);
  cudaFree(memory);
}
void GpuDevice::zero_bytes(void* memory, int64_t n_bytes) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(n_bytes), stream_), "clearing memory");
}
// Straight from pageable memory a copy would wait for all work queued before it.
void GpuDevice::upload(void* device, const void* host, int64_t n_bytes) {
  not_while_capturing("a copy to the GPU");
  for (int64_t done = 0; done < n_bytes; done += staging_bytes) {
    const size_t size = std::min(staging_bytes, n_bytes - done);
    char* piece = staging_ + next_piece_ * staging_bytes;
    check(cudaEventSynchronize(uploaded_[next_piece_]), "waiting for an earlier copy to the GPU");
    memcpy(piece, static_cast<const char*>(host) + done, size);
    check(cudaMemcpyAsync(static_cast<char*>(device) + done, piece, size, cudaMemcpyHostToDevice, stream_),
          "copying to the GPU");
    check(cudaEventRecord(uploaded_[next_piece_], stream_), "copying to the GPU");
    next_piece_ = (next_piece_ + 1) % staging_pieces;
  }
}
void GpuDevice::download(void* host, const void* device, int64_t n_bytes) {
  not_while_capturing("a copy from the GPU");
  check(cudaMemcpyAsync(host, device, static_cast<size_t>(n_bytes), cudaMemcpyDeviceToHost, stream_),
        "copying from the GPU");
  synchronize();
}
void GpuDevice::copy_bytes(void* to, const void* from, int64_t n_bytes) {
  if (to != from)
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(n_bytes), cudaMemcpyDeviceToDevice, stream_),
          "copying inside the GPU");
}

// ---- the side stream ----------------------------------------------------------------------------------------------
// Large pages where the system gives them, each touched by one of several threads: pinning is then a walk over a few
// thousand pages that are there, instead of a quarter of a million a GiB that are not.
void* GpuDevice::allocate_host(int64_t n_bytes) {
  constexpr size_t page_bytes = 2 << 20;
  constexpr int threads = 4;
  const size_t size = round_up(n_bytes, static_cast<int64_t>(page_bytes));
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    throw Error(
        str("out of host memory: ", fixed(mebibytes(size), 1), " MiB asked for; use --memory gpu or a shorter row"));
  madvise(memory, size, MADV_HUGEPAGE);  // as well without
  std::vector<std::thread> touching;
  for (int t = 0; t < threads; t++)
    touching.emplace_back([=] {
      for (size_t at = size / threads * static_cast<size_t>(t); at < size / threads * static_cast<size_t>(t + 1);
           at += 4096)
        static_cast<volatile char*>(memory)[at] = 0;
    });
  for (std::thread& thread : touching) thread.join();
  if (cudaSetDevice(ordinal_) != cudaSuccess ||
      cudaHostRegister(memory, size, cudaHostRegisterPortable) != cudaSuccess) {
    cudaGetLastError();
    munmap(memory, size);
    throw Error(str("the system pins no ", fixed(mebibytes(size), 1),
                    " MiB more of host memory (ulimit -l, or memory that is free): use --memory gpu or a shorter row"));
  }
  return memory;
}
void GpuDevice::release_host(void* memory, int64_t n_bytes) {
  cudaStreamSynchronize(side_);  // copies that still use it
  cudaHostUnregister(memory);
  munmap(memory, static_cast<size_t>(round_up(n_bytes, int64_t{2} << 20)));
}
void GpuDevice::side_waits() {
  check(cudaEventRecord(passed_, stream_), "copying beside other work");
  check(cudaStreamWaitEvent(side_, passed_), "copying beside other work");
}
void GpuDevice::wait_for_side() {
  check(cudaEventRecord(passed_, side_), "copying beside other work");
  check(cudaStreamWaitEvent(stream_, passed_), "copying beside other work");
}
void GpuDevice::side_synchronize() { check(cudaStreamSynchronize(side_), "waiting for copies"); }
void GpuDevice::side_download(void* host, const void* device, int64_t n_bytes) {
  check(cudaMemcpyAsync(host, device, static_cast<size_t>(n_bytes), cudaMemcpyDeviceToHost, side_),
        "copying from the GPU");
}
void GpuDevice::side_copies(const std::vector<std::pair<void*, const void*>>& to_from, int64_t n_bytes) {
  if (to_from.empty()) return;
  count_copies(false);
  if (unused_.empty()) {
    unused_.emplace_back();
    check(cudaEventCreate(&unused_.back().begun), "making an event");
    check(cudaEventCreate(&unused_.back().done), "making an event");
  }
  const TimedCopies timed = unused_.back();
  check(cudaEventRecord(timed.begun, side_), "copying chunks");
  for (const auto& [to, from] : to_from)
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(n_bytes), cudaMemcpyDefault, side_), "copying a chunk");
  check(cudaEventRecord(timed.done, side_), "copying chunks");
  unused_.pop_back();
  under_way_.push_back(timed);
}
void GpuDevice::count_copies(bool wait) {
  while (!under_way_.empty()) {
    const TimedCopies timed = under_way_.front();
    const cudaError_t state = wait ? cudaEventSynchronize(timed.done) : cudaEventQuery(timed.done);
    if (state == cudaErrorNotReady) return;
    float milliseconds = 0;
    check(state, "waiting for copies");
    check(cudaEventElapsedTime(&milliseconds, timed.begun, timed.done), "timing copies");
    side_copy_seconds_ += milliseconds / 1e3;
    under_way_.pop_front();
    unused_.push_back(timed);
  }
}
double GpuDevice::side_copy_seconds() {
  count_copies(true);
  return side_copy_seconds_;
}

GpuDevice::Snapshot::~Snapshot() {
  if (taken_) cudaEventDestroy(taken_);
  if (value_) cudaFreeHost(value_);
}
void GpuDevice::take(Snapshot& snapshot, const StepState* state) {
  not_while_capturing("a copy of a step's figures");
  if (!snapshot.value_)
    check(cudaMallocHost(reinterpret_cast<void**>(&snapshot.value_), sizeof(StepState)), "pinning memory");
  if (!snapshot.taken_) check(cudaEventCreateWithFlags(&snapshot.taken_, cudaEventDisableTiming), "making an event");
  check(cudaMemcpyAsync(snapshot.value_, state, sizeof(StepState), cudaMemcpyDeviceToHost, stream_),
        "copying a step's figures");
  check(cudaEventRecord(snapshot.taken_, stream_), "copying a step's figures");
}
StepState GpuDevice::read(const Snapshot& snapshot) {
  check(cudaEventSynchronize(snapshot.taken_), "waiting for a step's figures");
  return *snapshot.value_;
}

template <class Act>
void Gpu<Act>::copy_rows(Act* dst, int64_t dst_stride, const Act* src, int64_t src_stride, int64_t rows, int64_t D) {
  auto n_bytes = [](int64_t count) { return static_cast<size_t>(count) * sizeof(Act); };
  if (rows == 0) return;
  check(cudaMemcpy2DAsync(dst, n_bytes(dst_stride), src, n_bytes(src_stride), n_bytes(D), static_cast<size_t>(rows),
                          cudaMemcpyDeviceToDevice, stream_),
        "copying rows");
}

template <class Act>
void Gpu<Act>::cast_weights(Act* weights, const float* masters, int64_t n) {
  if constexpr (weights_are_masters) copy(weights, masters, n * static_cast<int64_t>(sizeof(float)));
  else
    launch("rounding weights", stream_, cast_weights_kernel, std::min(ceil_div(n, 256), int64_t{16} * processors_), 256,
           0, weights, masters, n);
}

// ---- graphs of work -----------------------------------------------------------------------------------------------
void GpuDevice::not_while_capturing(const char* what) const {
  GCA_CHECK(!capturing_, what, " is no part of a graph of work: do it before begin_capture() or after end_capture()");
}
void GpuDevice::begin_capture() {
  not_while_capturing("another capture");
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "beginning to capture work");
  capturing_ = true;
}
GpuDevice::Graph GpuDevice::end_capture() {
  GCA_CHECK(capturing_, "end_capture() without begin_capture()");
  capturing_ = false;
  cudaGraph_t noted = nullptr;
  check(cudaStreamEndCapture(stream_, &noted), "capturing work");
  Graph graph;
  const cudaError_t made = cudaGraphInstantiateWithFlags(&graph.work_, noted, 0);
  cudaGraphDestroy(noted);
  check(made, "making a graph of captured work");
  return graph;
}
// An op that failed may have broken the capture, which is then an error to end: there is nothing to keep.
void GpuDevice::abandon_capture() noexcept {
  if (!capturing_) return;
  capturing_ = false;
  cudaGraph_t noted = nullptr;
  cudaStreamEndCapture(stream_, &noted);
  if (noted) cudaGraphDestroy(noted);
  cudaGetLastError();
}
GpuDevice::Graph::~Graph() {
  if (work_) cudaGraphExecDestroy(work_);
}
void GpuDevice::replay(const Graph& graph) {
  not_while_capturing("the replay of a graph");
  GCA_CHECK(graph, "replay() of a graph that holds no work");
  check(cudaGraphLaunch(graph.work_, stream_), "replaying captured work");
}

// ---- rotary angles ------------------------------------------------------------------------------------------------
const float* GpuDevice::rotation(int S, int d) {
  if (S == rotation_S_ && d == rotation_d_) return rotation_;
  const int64_t count = static_cast<int64_t>(S) * d;
  GCA_CHECK(count <= most_angles, "chunks of ", S, " slots, heads of ", d, " columns");
  std::vector<float> table(count);
  for (int p = 0; p < S; p++)
    for (int t = 0; t < d / 2; t++) {
      const double angle = rotary_angle(p, t, d);
      float* at = table.data() + static_cast<int64_t>(p) * d + t;
      at[0] = static_cast<float>(std::cos(angle));
      at[d / 2] = static_cast<float>(std::sin(angle));
    }
  upload(rotation_, table.data(), count * static_cast<int64_t>(sizeof(float)));
  rotation_S_ = S;
  rotation_d_ = d;
  return rotation_;
}

GCA_BOTH_TYPES(copy_rows);
GCA_BOTH_TYPES(cast_weights);

}  // namespace gca
