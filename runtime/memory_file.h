// What a row leaves behind for its later slots, in a file: another process goes on from there. A safetensors file of
// one row, in the numbers that the model computes with:
//
//   ring.L      (min(slots,W),2D)  k | v of the window's slots, slot s at row s mod W; a layer, lower ones first
//   pick.G      (K)                what the last whole chunk picked; a group
//   weight.G    (K)                the weights of these
//   unfinished  (slots mod S,D)    lower layers' output for the slots of a chunk that is not whole
//   landmarks   (C,D)              C = slots / S
//   chunks      (C,S,2D)           CK | CV, wherever the reader has them: on the device or on the host
//   crc32c      (parts+1)          CRC-32C of the metadata, then of each tensor above, in order
//
// Its metadata say what it serves: format, version, weights, sizes, precision; how many slots; of which text.
#pragma once
#include <algorithm>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/safetensors.h"
#include "runtime/stream.h"

namespace gca {

using MemoryFields = std::map<std::string, std::string>;

// A tensor of such a file, and how its bytes leave a reader and come into it.
struct MemoryPart {
  std::string name;
  Dtype dtype;
  Shape shape;
  std::function<void(void* out, int64_t first, int64_t n_bytes)> get;
  std::function<void(const void* in, int64_t first, int64_t n_bytes)> put;
  int64_t pickable = -1;  // of picks: chunks 0 .. pickable - 1, or -1, none
};

// What a memory must have been made with to serve this model. weights: CRC-32C of their file.
MemoryFields memory_fields(const Config& config, const Reach& reach, uint32_t weights, Dtype precision);
// A text's name in the file: of its slots.
std::string text_name(std::span<const int32_t> slots);

// An Error where no file of that name could be made, or something else than a memory would be lost: before a long text
// is read in vain. "": nothing to save.
void check_can_save(const std::string& path);

void write_memory(const std::string& path, MemoryFields fields, int64_t slots, const std::string& text,
                  const std::vector<MemoryPart>& parts);

class MemoryFile {
 public:
  // An Error where this is no memory, or one that was made with something else than expected.
  MemoryFile(const std::string& path, const MemoryFields& expected);
  int64_t slots() const { return slots_; }
  // An Error where it is not of this text.
  void check_text(std::span<const int32_t> slots) const;
  // Every part from the file. An Error where a byte is not as it was written: then the parts are of no use.
  void read(const std::vector<MemoryPart>& parts) const;

 private:
  [[noreturn]] void refuse(const std::string& field, const std::string& expected, const std::string& found,
                           const std::string& what_to_do) const;
  const std::string& field(const std::string& name) const;

  SafetensorsFile file_;
  int64_t slots_ = 0;
};

template <class Device>
Dtype precision_of(const DRT<Device>&) {
  using act = typename DRT<Device>::act;
  if constexpr (sizeof(act) == 2) return Dtype::BF16;
  else return Dtype::of<act>();
}

// Those of a row of that many slots in this reader of one row.
template <class Device>
std::vector<MemoryPart> memory_parts(DRT<Device>& model, RowReader<Device>& reader, int64_t slots) {
  using stat = typename DRT<Device>::stat;
  Device& device = model.device;
  const auto& state = reader.state();
  GCA_CHECK(state.B == 1 && slots / model.config.chunk <= state.capacity, "a file holds one row, of ", slots, " slots");
  const int64_t D = model.config.width, S = model.config.chunk, K = state.reach.topk, C = slots / S;
  const Dtype act_type = precision_of(model);
  std::vector<MemoryPart> parts;
  const auto on_device = [&](const std::string& name, Dtype dtype, Shape shape, void* memory) {
    char* base = static_cast<char*>(memory);
    parts.push_back(
        {name, dtype, std::move(shape),
         [&device, base](void* out, int64_t first, int64_t n) { device.download(out, base + first, n); },
         [&device, base](const void* in, int64_t first, int64_t n) { device.upload(base + first, in, n); }});
  };
  for (size_t l = 0; l < state.rings.size(); l++)
    on_device(str("ring.", l), act_type, {std::min(slots, state.reach.window), 2 * D}, state.rings[l]);
  for (size_t g = 0; g < state.pick.size(); g++) {
    on_device(str("pick.", g), Dtype::I32, {K}, state.pick[g]);
    parts.back().pickable = candidates(C - 1);
    on_device(str("weight.", g), Dtype::of<stat>(), {K}, state.w[g]);
  }
  if (state.pick.empty()) return parts;
  on_device("unfinished", act_type, {slots % S, D}, state.unfinished_chunk);
  on_device("landmarks", act_type, {C, D}, state.landmarks);
  on_device("chunks", act_type, {C, S, 2 * D}, state.kv);
  if (ChunkMemory<Device>* memory = reader.host_memory()) {
    device.side_synchronize();
    parts.back().get = [memory](void* out, int64_t first, int64_t n) { memory->get(out, first, n); };
    parts.back().put = [memory](const void* in, int64_t first, int64_t n) { memory->put(in, first, n); };
  }
  return parts;
}

template <class Device>
MemoryFields memory_fields(const DRT<Device>& model, uint32_t weights, const std::string& retrieval = "learned") {
  MemoryFields fields = memory_fields(model.config, model.reach, weights, precision_of(model));
  fields["retrieval"] = retrieval;  // or what it was replaced by
  return fields;
}

// What the reader's row has left behind so far. The file appears whole or not at all.
template <class Device>
void save_memory(const std::string& path, const MemoryFields& fields, const std::string& text, DRT<Device>& model,
                 RowReader<Device>& reader) {
  write_memory(path, fields, reader.slots(), text, memory_parts(model, reader, reader.slots()));
}
// The reader's row is the one that the file was saved of.
template <class Device>
void load_memory(const MemoryFile& file, DRT<Device>& model, RowReader<Device>& reader) {
  file.read(memory_parts(model, reader, file.slots()));
  reader.go_on_after(file.slots());
}

}  // namespace gca
