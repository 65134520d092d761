// Which backend, GPU and ranks a command runs on, and a saved model there.
#include "commands/device.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "ranks/world.h"
#include "runtime/run.h"
#include "runtime/stream.h"
#include "runtime/weights.h"

namespace gca {

namespace {

#ifdef GCA_CUDA
constexpr bool has_cuda = true;
#else
constexpr bool has_cuda = false;
int gpu_count() noexcept { return 0; }
#endif

}  // namespace

int ranks_to_launch(const TrainSettings& settings, const World& world) {
  int gpus = 0;
  const std::string& asked = settings.gpus;
  const char* end = asked.data() + asked.size();
  if (asked != "all")
    if (const auto [stop, code] = std::from_chars(asked.data(), end, gpus);
        code != std::errc() || stop != end || gpus < 1)
      throw UsageError("--gpus: expected a number from 1, or all, found '" + asked + "'");
  const int ranks = static_cast<int>(settings.ranks);
  if (gpus == 1 && ranks == 1) return 1;
  if (world.size > 1)
    throw UsageError(str("a launcher has started ", world.size,
                         " ranks already, of which this is one: leave --gpus and --ranks out"));
  if (ranks > 1) {
    if (gpus != 1) throw UsageError("--gpus and --ranks exclude each other: GPUs have a rank each");
    if (settings.device != "cpu" && has_cuda)
      throw UsageError("--ranks counts processes on the CPU: give --device cpu too, or --gpus N for N GPUs");
    return ranks;
  }
  if (settings.device == "cpu") throw UsageError("--gpus counts GPUs: with --device cpu use --ranks N for N processes");
  if (!has_cuda)
    throw UsageError("--gpus: this program was built without CUDA; put nvcc into PATH and run make, or use --ranks N");
  const int found = count_apart(gpu_count);
  if (found == 0 || found < gpus)
    throw Error(str("--gpus ", asked, ": expected ", gpus ? str(gpus, " GPUs") : "one GPU at least", ", found ", found,
                    " that answer; look at what nvidia-smi and CUDA_VISIBLE_DEVICES say, or ask for fewer"));
  return gpus ? gpus : found;
}

int gpu_of(int local_rank) {
  const int found = gpu_count();
  if (found <= 1) return 0;
  if (local_rank >= found)
    throw Error(str("rank ", local_rank, " of this host: expected ", local_rank + 1, " GPUs here, found ", found,
                    "; start as many ranks on a host as it has GPUs"));
  return local_rank;
}

template <class Device>
void load_weights_of(const SavedRun& saved, DRT<Device>& model) {
  load_weights(saved.weights, model);
}

template <class Device>
void fit_memory(DRT<Device>& model, ReaderPlan& plan, const std::string& memory, const char* shorter) {
  const int64_t S = model.config.chunk, own = model.model_memory().total_bytes(), room = model.device.free_bytes(),
                host_room = CpuDevice::free_bytes();
  const auto fits = [&](const ReaderPlan& tried) {
    const ReaderBytes bytes = RowReader<Device>::memory_bytes(model, tried);
    if (!Device::runs_ahead) return own + bytes.device + bytes.host <= room;  // the same memory
    return own + bytes.device <= room && bytes.host <= host_room;
  };
  ReaderPlan on_host = plan;
  plan.on_host = false;
  on_host.on_host = true;
  if (memory == "host" || (memory == "auto" && !fits(plan) && fits(on_host))) plan = on_host;
  if (fits(plan)) return;
  const ReaderBytes bytes = RowReader<Device>::memory_bytes(model, plan);
  ReaderPlan small = plan;
  small.segment_slots = S;
  const int64_t longest = most_that_fit(plan.chunks, [&](int64_t chunks) {
    ReaderPlan tried = plan;
    tried.chunks = chunks;
    return fits(tried);
  });
  std::string ways;
  if (fits(small)) ways += "fewer --batch-slots, ";
  if (longest) ways += str(shorter, " (", longest * S, " slots fit), ");
  const int64_t rows = plan.B * plan.readers;
  if (rows > 1) ways += "fewer rows at once, ";
  if (!plan.on_host && Device::runs_ahead && fits(on_host)) ways += "--memory host, ";
  if (sizeof(typename Device::act) > 2) ways += "--precision bf16 on a GPU, ";
  throw Error(str(rows > 1 ? str(rows, " rows") : "a row", " of ", plan.chunks * S, " slots: the memory needs ",
                  mebibytes(own + bytes.device),
                  plan.on_host ? str(" and ", mebibytes(bytes.host), " of the host's") : "", ", ", mebibytes(room),
                  plan.on_host ? str(" and ", mebibytes(host_room)) : "", " are free; use ", ways,
                  "or a narrower model"));
}

template <class Device>
std::vector<std::unique_ptr<RowReader<Device>>> open_readers(const SavedRun& saved, DRT<Device>& model, ReaderPlan plan,
                                                             const std::string& memory, const char* shorter) {
  fit_memory(model, plan, memory, shorter);
  model.allocate();
  load_weights_of(saved, model);
  std::vector<std::unique_ptr<RowReader<Device>>> readers;
  for (int64_t i = 0; i < plan.readers; i++) readers.push_back(std::make_unique<RowReader<Device>>(model, plan, i > 0));
  return readers;
}

template <class Device>
void print_host_memory(RowReader<Device>& reader, const std::vector<double>& readings) {
  if (!reader.host_memory()) return;
  const MemoryFigures figures = reader.host_memory()->figures();
  const double bytes = static_cast<double>(figures.stored_bytes + figures.fetched_bytes);
  print("    memory on the host: ", mebibytes(figures.stored_bytes), " stored, ", mebibytes(figures.fetched_bytes),
        " fetched for ", figures.asked, " picks");
  if (figures.copy_seconds > 0)
    print(", ", fixed(bytes / 1e9 / figures.copy_seconds, 2), " GB/s (copies were under way for ",
          fixed(figures.copy_seconds, 3), " s)");
  print("\n    waited ", fixed(figures.wait_seconds, 3), " s for host memory to be made ready");
  if (!readings.empty()) print("; the first reading took ", fixed(readings[0], 3), " s");
  if (const size_t later = readings.size(); later > 1)
    print(", the later ones (", later - 1, ") ",
          fixed(std::accumulate(readings.begin() + 1, readings.end(), 0.0) / static_cast<double>(later - 1), 3),
          " s each");
  print("\n");
}

template <class Device>
std::vector<double> retrieval_scores(const DRT<Device>& model, const typename DRT<Device>::StreamState& stream,
                                     size_t g, int64_t b, int64_t c, int64_t first_chunk, int64_t chunks) {
  const int64_t D = model.config.width, count = candidates(c), at_once = 1 << 14;
  std::vector<typename Device::act> r(D), landmarks;
  const auto download = [&](auto& to, const auto* from) {
    model.device.download(to.data(), from, static_cast<int64_t>(to.size() * sizeof(to[0])));
  };
  download(r, model.groups[g].r + (b * chunks + c - first_chunk) * D);
  std::vector<double> query(r.begin(), r.end()), scores;
  for (int64_t first = 0; first < count; first += at_once) {
    const int64_t here = std::min(at_once, count - first);
    landmarks.resize(here * D);
    download(landmarks, stream.landmarks + (b * stream.capacity + first) * D);
    for (int64_t m = 0; m < here; m++) {
      double sum = 0;
      for (int64_t j = 0; j < D; j++) sum += query[j] * static_cast<double>(landmarks[m * D + j]);
      scores.push_back(sum / std::sqrt(static_cast<double>(D)));
    }
  }
  return scores;
}

template <class Device>
std::vector<std::vector<float>> logits_of_slots(DRT<Device>& model, int64_t first, int64_t count) {
  const int64_t V = model.config.vocab, stride = model.table.padded_vocab;
  std::vector<typename DRT<Device>::act> piece(count * stride);
  model.piece_of_logits(first, count);
  model.device.download(piece.data(), model.logits, static_cast<int64_t>(piece.size() * sizeof(piece[0])));
  std::vector<std::vector<float>> logits(count);
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < V; j++) logits[i].push_back(static_cast<float>(piece[i * stride + j]));
  return logits;
}

#define GCA_INSTANTIATE(Device)                                                                                       \
  template void load_weights_of(const SavedRun&, DRT<Device>&);                                                       \
  template std::vector<std::unique_ptr<RowReader<Device>>> open_readers(const SavedRun&, DRT<Device>&, ReaderPlan,    \
                                                                        const std::string&, const char*);             \
  template void print_host_memory(RowReader<Device>&, const std::vector<double>&);                                    \
  template std::vector<double> retrieval_scores(const DRT<Device>&, const typename DRT<Device>::StreamState&,         \
                                                size_t g, int64_t b, int64_t c, int64_t first_chunk, int64_t chunks); \
  template std::vector<std::vector<float>> logits_of_slots(DRT<Device>&, int64_t first, int64_t count)
GCA_INSTANTIATE(Cpu<float>);
#ifdef GCA_CUDA
GCA_INSTANTIATE(Gpu<float>);
GCA_INSTANTIATE(Gpu<__nv_bfloat16>);
#endif

}  // namespace gca
