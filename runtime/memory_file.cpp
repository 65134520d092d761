// A row's memory in a file: its fields, its checksums, and its bytes a piece at a time.
#include "runtime/memory_file.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/json.h"

namespace gca {

namespace {

constexpr const char *format = "train_gca memory", *version = "1", *checksums = "crc32c",
                     *mend =
                         "; use the model and the settings that it was saved with, or read the text anew and save "
                         "its memory with --save-memory",
                     *damaged =
                         "; the file is damaged: take another copy, or read the text anew and save its memory "
                         "with --save-memory";

constexpr int64_t most_slots = int64_t{1} << 40;

uint32_t crc_of(const MemoryFields& fields) {
  uint32_t crc = 0;
  for (const auto& [name, value] : fields)
    for (const std::string& word : {name, value}) crc = crc32c(word.c_str(), word.size() + 1, crc);
  return crc;
}

}  // namespace

MemoryFields memory_fields(const Config& config, const Reach& reach, uint32_t weights, Dtype precision) {
  return {{"weights", hex(weights, 8)}, {"precision", precision.name()},
          {"width", str(config.width)}, {"heads", str(config.heads)},
          {"lower", str(config.lower)}, {"groups", Json(config.groups).dump()},
          {"chunk", str(config.chunk)}, {"window", str(reach.window)},
          {"topk", str(reach.topk)},    {"null-slot", config.null_slot ? "on" : "off"}};
}

std::string text_name(std::span<const int32_t> slots) { return hex(crc32c(slots.data(), slots.size_bytes()), 8); }

void check_can_save(const std::string& path) {
  if (!path.empty()) check_can_replace(path, format, "a memory");
}

void write_memory(const std::string& path, MemoryFields fields, int64_t slots, const std::string& text,
                  const std::vector<MemoryPart>& parts) {
  fields["format"] = format;
  fields["version"] = version;
  fields["slots"] = str(slots);
  fields["text"] = text;
  std::vector<int64_t> crcs = {crc_of(fields)};
  crcs.resize(parts.size() + 1);
  std::vector<SafetensorsEntry> entries;
  for (const MemoryPart& part : parts)
    entries.push_back(
        {part.name, part.dtype, part.shape, [&, i = entries.size() + 1](void* out, int64_t first, int64_t n) {
           const int64_t size = part.dtype.bytes();
           part.get(out, first * size, n * size);
           crcs[i] = crc32c(out, n * size, static_cast<uint32_t>(crcs[i]));
         }});
  entries.push_back(safetensors_entry(checksums, {std::ssize(crcs)}, crcs.data()));  // last: the others are known then
  write_safetensors(path, fields, entries);
}

MemoryFile::MemoryFile(const std::string& path, const MemoryFields& expected) : file_(SafetensorsFile::open(path)) {
  if (const auto found = file_.metadata().find("format"); found == file_.metadata().end() || found->second != format)
    throw Error("'" + path + "': format: expected '" + format + "', found " +
                (found == file_.metadata().end() ? "none" : Json(found->second).dump()) +
                "; give a file that --save-memory wrote");
  if (field("version") != version)
    refuse("version", version, field("version"),
           "; it was made by another version of this program: use that one, or "
           "read the text anew and save its memory");
  const std::vector<int64_t> crcs = file_.values<int64_t>(checksums);
  if (crcs.empty() || crcs[0] != crc_of(file_.metadata()))
    refuse("checksum of the metadata", hex(crcs.empty() ? 0 : static_cast<uint64_t>(crcs[0]), 8),
           hex(crc_of(file_.metadata()), 8), damaged);
  for (const auto& [name, value] : expected)
    if (field(name) != value) refuse(name, value, field(name), mend);
  const std::string& slots = field("slots");
  const auto [end, error] = std::from_chars(slots.data(), slots.data() + slots.size(), slots_);
  if (error != std::errc() || end != slots.data() + slots.size() || slots_ < 0 || slots_ > most_slots)
    refuse("slots", str("a number up to ", most_slots), slots, damaged);
}

void MemoryFile::refuse(const std::string& field, const std::string& expected, const std::string& found,
                        const std::string& what_to_do) const {
  throw Error("'" + file_.path() + "': " + field + ": expected " + expected + ", found " + found + what_to_do);
}

const std::string& MemoryFile::field(const std::string& name) const {
  const auto found = file_.metadata().find(name);
  if (found == file_.metadata().end()) refuse(name, "a value", "none", damaged);
  return found->second;
}

void MemoryFile::check_text(std::span<const int32_t> slots) const {
  if (slots_ != std::ssize(slots))
    refuse("slots", str(slots.size()), str(slots_),
           "; it is of a text of another length: give the --length and --gap "
           "that it was saved with");
  if (const std::string name = text_name(slots); field("text") != name)
    refuse("text", name, field("text"),
           "; it is of another text: give the --haystack, --seed and task that it was "
           "saved with");
}

void MemoryFile::read(const std::vector<MemoryPart>& parts) const {
  const std::vector<int64_t> crcs = file_.values<int64_t>(checksums);
  if (crcs.size() != parts.size() + 1 || file_.tensors().size() != parts.size() + 1)
    refuse("tensors", str(parts.size() + 1), str(file_.tensors().size()), damaged);
  constexpr int64_t piece_bytes = 4 << 20;
  std::vector<char> piece(piece_bytes);
  for (size_t i = 0; i < parts.size(); i++) {
    const MemoryPart& part = parts[i];
    const SafetensorsTensor& tensor = file_.at(part.name, part.shape);
    if (tensor.dtype != part.dtype)
      refuse("tensor '" + part.name + "'", part.dtype.name(), tensor.dtype.name(), damaged);
    const int64_t all = tensor.count * tensor.dtype.bytes();
    uint32_t crc = 0;
    for (int64_t first = 0; first < all; first += piece_bytes) {
      const int64_t n = std::min(piece_bytes, all - first);
      file_.read_bytes(tensor, first, n, piece.data());
      crc = crc32c(piece.data(), n, crc);
      for (int64_t at = 0; part.pickable >= 0 && at < n; at += static_cast<int64_t>(sizeof(int32_t))) {
        int32_t pick = 0;
        memcpy(&pick, &piece[at], sizeof pick);
        if (pick < -1 || pick >= part.pickable)  // what would be read beyond the chunks, whoever made the file
          refuse("tensor '" + part.name + "'", str("chunks below ", part.pickable, ", or -1"), str(pick), damaged);
      }
      part.put(piece.data(), first, n);
    }
    if (crc != crcs[i + 1])
      refuse("checksum of tensor '" + part.name + "'", hex(static_cast<uint64_t>(crcs[i + 1]), 8), hex(crc, 8),
             damaged);
  }
}

}  // namespace gca
