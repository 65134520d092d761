// A saved model on each backend that a command may run on.
#include "commands/device.h"

#include "runtime/run.h"
#include "runtime/weights.h"

namespace gca {

template <class Device>
void load_weights_of(const SavedRun& saved, DRT<Device>& model) {
  load_weights(saved.checkpoint.file(SavedRun::model_file), model);
}

template <class Device>
void load_model(const SavedRun& saved, DRT<Device>& model, int64_t B, int64_t T) {
  allocate_or_explain(model, B, T);
  load_weights_of(saved, model);
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

#define GCA_INSTANTIATE(Device)                                                                 \
  template void load_weights_of(const SavedRun&, DRT<Device>&);                                 \
  template void load_model(const SavedRun&, DRT<Device>&, int64_t B, int64_t T);                \
  template std::vector<FetchedChunks> fetched_chunks(const DRT<Device>&, int64_t B, int64_t C); \
  template std::vector<std::vector<float>> logits_of_slots(DRT<Device>&, int64_t first, int64_t count)
GCA_INSTANTIATE(Cpu<float>);
#ifdef GCA_CUDA
GCA_INSTANTIATE(Gpu<float>);
GCA_INSTANTIATE(Gpu<__nv_bfloat16>);
#endif

}  // namespace gca
