// Weights and optimiser in and out of safetensors files, whatever the number of ranks that share them, and memory for a
// model or why there is none.
#pragma once
#include <set>
#include <string>
#include <vector>

#include "base/safetensors.h"
#include "base/text.h"
#include "model.h"
#include "ranks/ranks.h"

namespace gca {

Shape tensor_shape(const Tensor& t);

// A model's whole buffer (masters, adam_m or adam_v) for rank 0 to write: read from the device piece by piece, or,
// where ranks have a share each, brought together in the host's memory before. All ranks make it, in the same order.
template <class Device>
class WholeBuffer {
 public:
  using master = typename DRT<Device>::master;
  WholeBuffer(const DRT<Device>& model, const master* buffer, Ranks& ranks) : model_(model), buffer_(buffer) {
    const Shards& shards = model.shards;
    if (!model.is_shared_out(buffer)) return;
    const int64_t n_bytes = static_cast<int64_t>(sizeof(master));
    std::vector<master> share(static_cast<size_t>(shards.share()));
    model.device.download(share.data(), buffer, shards.share() * n_bytes);
    if (!ranks.first()) {
      ranks.send(0, share.data(), shards.share() * n_bytes);
      return;
    }
    whole_.resize(static_cast<size_t>(shards.size));
    for (int r = 0; r < ranks.size(); r++) {
      if (r) ranks.receive(r, share.data(), shards.share() * n_bytes);
      shards.of_rank(r).owned(0, shards.size, [&](int64_t flat, int64_t place, int64_t count) {
        std::copy_n(share.begin() + place, count, whole_.begin() + flat);
      });
    }
  }
  // out (count): elements from first on.
  void read(void* out, int64_t first, int64_t count) const {
    const int64_t n_bytes = count * static_cast<int64_t>(sizeof(master));
    if (whole_.empty()) model_.device.download(out, buffer_ + first, n_bytes);
    else memcpy(out, whole_.data() + first, static_cast<size_t>(n_bytes));
  }
  const DRT<Device>& model() const { return model_; }

 private:
  const DRT<Device>& model_;
  const master* buffer_;
  std::vector<master> whole_;  // (shards.size) or nothing: what the device has is whole
};

// The tensors of one flat buffer as entries of a file, names begun with prefix; it must outlive the writing.
template <class Device>
void add_entries(std::vector<SafetensorsEntry>& entries, const WholeBuffer<Device>& buffer, const std::string& prefix) {
  for (const Tensor& t : buffer.model().table.tensors)
    entries.push_back(
        {prefix + t.name, Dtype::of<typename DRT<Device>::master>(), tensor_shape(t),
         [&buffer, &t](void* out, int64_t first, int64_t count) { buffer.read(out, t.offset + first, count); }});
}

template <class Device>
void save_weights(const std::string& path, const WholeBuffer<Device>& masters) {
  std::vector<SafetensorsEntry> entries;
  add_entries(entries, masters, "");
  write_safetensors(path, {{"format", "pt"}}, entries);
}
template <class Device>
void save_optimizer(const std::string& path, const WholeBuffer<Device>& adam_m, const WholeBuffer<Device>& adam_v) {
  std::vector<SafetensorsEntry> entries;
  add_entries(entries, adam_m, "m.");
  add_entries(entries, adam_v, "v.");
  write_safetensors(path, {}, entries);
}

// Whether an output head of its own is the embedding, number for number.
bool is_tied_head(const SafetensorsFile& file, const SafetensorsTensor& head);
// ", or ..." where a file is one of several that the weights are split into; else nothing.
std::string part_remark(const std::string& path);
// An Error that lists every name that the model needs and the file lacks, and every one that the model has no place
// for.
template <class Device>
void check_names(const SafetensorsFile& file, const DRT<Device>& model, const std::vector<std::string>& prefixes) {
  std::set<std::string> known;
  for (const std::string& prefix : prefixes)
    for (const Tensor& t : model.table.tensors) known.insert(prefix + t.name);
  std::string missing, surplus;
  for (const std::string& name : known)
    if (!file.find(name)) missing += "\n  " + name;
  int64_t buffers = 0;
  for (const SafetensorsTensor& tensor : file.tensors()) {
    if (known.contains(tensor.name)) continue;
    if (tensor.name == "lm_head.weight" && is_tied_head(file, tensor))
      print_error("'", file.path(), "': 'lm_head.weight' is the embedding again and is left out\n");
    else if (tensor.name.find(".rotary_emb.") != std::string::npos) buffers++;
    else surplus += "\n  " + tensor.name;
  }
  if (!missing.empty() || !surplus.empty())
    throw Error(
        "'" + file.path() + "' is not of this model; check --model and the sizes" + part_remark(file.path()) + "." +
        (missing.empty() ? "" : " Missing:" + missing) +
        (surplus.empty() ? "" : std::string(missing.empty() ? "" : "\n") + " Without a place in it:" + surplus));
  if (buffers)
    print_error("'", file.path(), "': ", buffers,
                " tables of rotary embeddings are left out: they are computed here\n");
}
// The embedding of a file whose vocabulary was rounded up, as the released model's: rows that no token has are left
// out.
bool is_padded(const SafetensorsTensor& found, const Tensor& t);
// One flat buffer from a file whose names have been checked.
template <class Device>
void load_buffer(const SafetensorsFile& file, DRT<Device>& model, typename DRT<Device>::master* buffer,
                 const std::string& prefix) {
  using master = typename DRT<Device>::master;
  std::vector<master> values;
  for (const Tensor& t : model.table.tensors) {
    const SafetensorsTensor& found = file.at(prefix + t.name);
    values.resize(t.size());
    if (is_padded(found, t)) file.read(found, 0, t.size(), values.data());
    else file.read(prefix + t.name, tensor_shape(t), values.data());
    if (!std::all_of(values.begin(), values.end(), [](master x) { return std::isfinite(x); }))
      throw Error("'" + file.path() + "': tensor '" + prefix + t.name +
                  "': expected finite numbers, found one that is not; take an older checkpoint or make the file anew");
    model.put(buffer, t.offset, values.data(), t.size());
  }
}
// Weights from a file, the index of a split one or a folder of either; F32, BF16 or F16, the names the released
// model's.
template <class Device>
void load_weights(const std::string& path, DRT<Device>& model) {
  const SafetensorsFile file = SafetensorsFile::open_weights(path);
  check_names(file, model, {""});
  load_buffer(file, model, model.masters, "");
  model.weights_changed();
}
template <class Device>
void load_optimizer(const std::string& path, DRT<Device>& model) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  check_names(file, model, {"m.", "v."});
  load_buffer(file, model, model.adam_m, "m.");
  load_buffer(file, model, model.adam_v, "v.");
}

// Plans and allocates activations for B rows of T slots. Where they and the model do not fit, an Error that says which
// B would.
template <class Device>
void allocate_or_explain(DRT<Device>& model, int64_t B, int64_t T) {
  const int64_t room = model.device.free_bytes();
  auto needed = [&](int64_t rows) {
    model.plan(rows, T);
    return model.model_memory().total_bytes() + model.activation_memory().total_bytes();
  };
  if (const int64_t n_bytes = needed(B); n_bytes > room) {
    const int64_t fits = most_that_fit(B, [&](int64_t rows) { return needed(rows) <= room; });
    throw Error(str("the model and ", B, " rows of ", T, " slots need ", mebibytes(n_bytes), ", ", mebibytes(room),
                    " are free; ") +
                (fits ? str("--micro-batch ", fits, " fits")
                      : std::string("not even one row fits: use fewer --chunks or a smaller model")) +
                (model.recompute == Recompute::layers ? "" : "; in training --recompute layers needs less"));
  }
  model.allocate();
  model.commit_activations();
}

}  // namespace gca
