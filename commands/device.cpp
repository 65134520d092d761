// A saved model on each backend that a command may run on.
#include "commands/device.h"

#include <algorithm>
#include <cmath>

#include "runtime/run.h"
#include "runtime/stream.h"
#include "runtime/weights.h"

namespace gca {

template <class Device>
void load_weights_of(const SavedRun& saved, DRT<Device>& model) {
  load_weights(saved.checkpoint.file(SavedRun::model_file), model);
}

template <class Device>
std::unique_ptr<RowReader<Device>> open_reader(const SavedRun& saved, DRT<Device>& model, int64_t B, int64_t chunks,
                                               int64_t batch_slots) {
  using Reader = RowReader<Device>;
  const int64_t S = model.config.chunk, room = model.device.free_bytes(), own = model.model_memory().total_bytes();
  const auto needed = [&](int64_t c) { return own + Reader::memory_bytes(model, B, c, batch_slots); };
  if (const int64_t n_bytes = needed(chunks); n_bytes > room) {
    int64_t fits = 0;  // by bisection: fits chunks do, too_many do not
    for (int64_t too_many = chunks; too_many - fits > 1;) {
      const int64_t middle = fits + (too_many - fits) / 2;
      (needed(middle) > room ? too_many : fits) = middle;
    }
    throw Error(str(B, " rows of ", chunks * S, " slots (", chunks, " chunks) need ", mebibytes(n_bytes), ", ",
                    mebibytes(room), " are free; ",
                    fits ? str(fits * S, " slots (", fits, " chunks) fit") : "fewer --batch-slots need less",
                    B > 1 ? ", and so may fewer rows at once" : "",
                    sizeof(typename Device::act) > 2 ? "; --precision bf16 on a GPU needs half" : ""));
  }
  model.allocate();
  load_weights_of(saved, model);
  return std::make_unique<Reader>(model, B, chunks, batch_slots);
}

template <class Device>
std::vector<FetchedChunks> fetched_chunks(const DRT<Device>& model, int64_t B, int64_t C) {
  std::vector<FetchedChunks> fetched;
  for (const auto& group : model.groups) {
    const PickTable table{C, model.reach.topk};
    std::vector<int32_t> pick(table.size(B));
    std::vector<typename DRT<Device>::stat> w(pick.size());
    model.device.download(pick.data(), group.pick, static_cast<int64_t>(pick.size() * sizeof(pick[0])));
    model.device.download(w.data(), group.w, static_cast<int64_t>(w.size() * sizeof(w[0])));
    fetched.push_back({table, std::move(pick), {w.begin(), w.end()}});
  }
  return fetched;
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
  template std::unique_ptr<RowReader<Device>> open_reader(const SavedRun&, DRT<Device>&, int64_t B, int64_t chunks,   \
                                                          int64_t batch_slots);                                       \
  template std::vector<FetchedChunks> fetched_chunks(const DRT<Device>&, int64_t B, int64_t C);                       \
  template std::vector<double> retrieval_scores(const DRT<Device>&, const typename DRT<Device>::StreamState&,         \
                                                size_t g, int64_t b, int64_t c, int64_t first_chunk, int64_t chunks); \
  template std::vector<std::vector<float>> logits_of_slots(DRT<Device>&, int64_t first, int64_t count)
GCA_INSTANTIATE(Cpu<float>);
#ifdef GCA_CUDA
GCA_INSTANTIATE(Gpu<float>);
GCA_INSTANTIATE(Gpu<__nv_bfloat16>);
#endif

}  // namespace gca
