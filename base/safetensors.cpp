// safetensors files: the checks of a header, numbers in the type that is asked for, and the writer.
#include "base/safetensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "base/foreign.h"
#include "base/json.h"

namespace gca {

std::string shape_text(const Shape& shape) { return Json(shape).dump(); }

int64_t element_count(const Shape& shape, Dtype dtype, const std::string& where) {
  int64_t count = 1, bytes = 0;
  bool fits = true;
  for (const int64_t size : shape) fits = fits && size >= 0 && !__builtin_mul_overflow(count, size, &count);
  if (!fits || __builtin_mul_overflow(count, dtype.bytes(), &bytes))
    throw Error(where + ": expected a shape of fewer than 2^63 bytes, found " + shape_text(shape) +
                "; the file is damaged: make it anew or fetch it again");
  return count;
}

void check_tensor_name(const std::string& name, const std::string& where) {
  const bool control =
      std::any_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; });
  if (name.empty() || name.size() > 256 || name == "__metadata__" || name.find('/') != name.npos ||
      name.find("..") != name.npos || control)
    throw Error(where + ": expected a tensor's name of 1 to 256 bytes without '/', '..' or control characters, found " +
                Json(name).dump() + "; rename it where the file is made");
}

namespace {

constexpr uint64_t max_header_bytes = uint64_t{16} << 20;

float float_from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

float float_from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31,
                 fraction = bits & 0x3FF;
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24f, std::bit_cast<float>(sign));
  return std::bit_cast<float>(sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | (fraction << 13));
}

// out = f of count numbers of type Stored, from byte `start` of a file, a piece at a time.
template <class Stored, class T, class Function>
void convert(const File& file, int64_t start, int64_t count, T* out, Function f) {
  std::vector<Stored> piece(std::min<int64_t>(count, 1 << 18));
  for (int64_t done = 0; done < count;) {
    const size_t n = std::min(count - done, static_cast<int64_t>(piece.size()));
    file.read(piece.data(), n * sizeof(Stored), start + done * static_cast<int64_t>(sizeof(Stored)));
    for (size_t i = 0; i < n; i++) out[done + static_cast<int64_t>(i)] = f(piece[i]);
    done += static_cast<int64_t>(n);
  }
}

}  // namespace

const SafetensorsTensor* SafetensorsFile::find(const std::string& name) const {
  const auto place = index_.find(name);
  return place == index_.end() ? nullptr : &tensors_[place->second];
}

const SafetensorsTensor& SafetensorsFile::at(const std::string& name) const {
  const SafetensorsTensor* tensor = find(name);
  if (!tensor) throw Error("'" + path() + "': the tensor '" + name + "' is missing; is this a file of the same model?");
  return *tensor;
}

const SafetensorsTensor& SafetensorsFile::at(const std::string& name, const Shape& shape) const {
  const SafetensorsTensor& tensor = at(name);
  if (tensor.shape != shape)
    throw Error("'" + path() + "': tensor '" + name + "': expected the shape " + shape_text(shape) + ", found " +
                shape_text(tensor.shape) + "; is this a file of the same model?");
  return tensor;
}

template <class T>
void SafetensorsFile::read(const SafetensorsTensor& tensor, int64_t first, int64_t count, T* out) const {
  GCA_CHECK(first >= 0 && count >= 0 && first <= tensor.count && count <= tensor.count - first, "elements of '",
            tensor.name, "'");
  const int64_t start = tensor.offset_bytes + first * tensor.dtype.bytes();
  with_file(tensor, [&](const File& file) {
    if (tensor.dtype == Dtype::of<T>()) return file.read(out, static_cast<size_t>(count) * sizeof(T), start);
    if constexpr (std::is_floating_point_v<T>) {
      if (tensor.dtype == Dtype::F64)
        return convert<double>(file, start, count, out, [](double x) { return static_cast<T>(x); });
      if (tensor.dtype == Dtype::F32)
        return convert<float>(file, start, count, out, [](float x) { return static_cast<T>(x); });
      if (tensor.dtype == Dtype::F16)
        return convert<uint16_t>(file, start, count, out, [](uint16_t x) { return static_cast<T>(float_from_f16(x)); });
      if (tensor.dtype == Dtype::BF16)
        return convert<uint16_t>(file, start, count, out,
                                 [](uint16_t x) { return static_cast<T>(float_from_bf16(x)); });
    }
    throw Error(str("'", path(), "': tensor '", tensor.name, "': expected ",
                    std::is_floating_point_v<T> ? "F64, F32, F16 or BF16" : Dtype::of<T>().name(), ", found ",
                    tensor.dtype.name(), "; is this a file of the same kind?"));
  });
}

template void SafetensorsFile::read(const SafetensorsTensor&, int64_t, int64_t, float*) const;
template void SafetensorsFile::read(const SafetensorsTensor&, int64_t, int64_t, double*) const;
template void SafetensorsFile::read(const SafetensorsTensor&, int64_t, int64_t, int64_t*) const;
template void SafetensorsFile::read(const SafetensorsTensor&, int64_t, int64_t, int32_t*) const;
template void SafetensorsFile::read(const SafetensorsTensor&, int64_t, int64_t, uint8_t*) const;

void SafetensorsFile::read_bytes(const SafetensorsTensor& tensor, int64_t first, int64_t n_bytes, void* out) const {
  const int64_t all = tensor.count * tensor.dtype.bytes();
  GCA_CHECK(first >= 0 && n_bytes >= 0 && first <= all && n_bytes <= all - first, "bytes of '", tensor.name, "'");
  with_file(tensor, [&](const File& file) { file.read(out, n_bytes, tensor.offset_bytes + first); });
}

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  SafetensorsFile file(path);
  file.add_part(File::open(path));
  return file;
}

bool SafetensorsFile::begins(const File& file) {
  struct {
    uint64_t header_bytes;
    char brace;
  } head{};
  if (file.size_bytes() < 10) return false;
  file.read(&head.header_bytes, 8, 0);
  file.read(&head.brace, 1, 8);
  return head.header_bytes <= max_header_bytes && head.brace == '{';
}

namespace {

// A tensor as a header has it; data_start, data_bytes: where the file has its tensors' bytes.
SafetensorsTensor tensor_of(const std::string& name, const JsonField& field, int64_t data_start, int64_t data_bytes) {
  const std::string type = field.at("dtype").string();
  const auto kind =
      std::find_if(std::begin(Dtype::all), std::end(Dtype::all), [&](Dtype d) { return type == d.name(); });
  if (kind == std::end(Dtype::all))
    throw Error(field.where() + ": the dtype " + Json(type).dump() +
                " is not known here; convert the file to F32 or BF16");
  SafetensorsTensor t{name, *kind, {}, 0, 0};
  const JsonField sizes = field.at("shape"), offsets = field.at("data_offsets");
  for (size_t i = 0; i < sizes.items().size(); i++) t.shape.push_back(sizes.at(i).integer(0, INT64_MAX));
  t.count = element_count(t.shape, t.dtype, field.where());
  const int64_t begin = offsets.at(0).integer(0, data_bytes), end = offsets.at(1).integer(begin, data_bytes);
  if (offsets.items().size() != 2 || end - begin != t.count * t.dtype.bytes())
    throw Error(str(field.where(), ": expected ", t.count * t.dtype.bytes(), " bytes for ", t.dtype.name(), " ",
                    shape_text(t.shape), ", found data_offsets ", offsets.json().dump(),
                    "; the file is damaged: make it anew or fetch it again"));
  t.offset_bytes = data_start + begin;
  return t;
}

[[noreturn]] void misplaced(const std::string& path, const std::string& what, int64_t expected, int64_t found) {
  throw Error(str("'", path, "': expected ", what, " at byte ", expected, ", found it at ", found,
                  "; the file is damaged or cut off: make it anew or fetch it again"));
}

}  // namespace

void SafetensorsFile::add_part(File file) {
  const int64_t file_bytes = file.size_bytes();
  uint64_t header_bytes = 0;
  if (file_bytes >= 8) file.read(&header_bytes, 8, 0);
  if (file_bytes < 8 || header_bytes > static_cast<uint64_t>(file_bytes - 8) || header_bytes > max_header_bytes)
    throw Error(str("'", file.path(), "' is cut off or no safetensors file: expected a header of at most ",
                    max_header_bytes, " bytes in a file of ", file_bytes, ", found ", header_bytes,
                    foreign_remark(file.beginning(foreign_head_bytes), "; make it anew")));
  std::string header(header_bytes, '\0');
  file.read(header.data(), header.size(), 8);
  const std::string what = "'" + file.path() + "' (header)";
  const Json json = parse_json(header, what);
  const int64_t data_start = 8 + static_cast<int64_t>(header_bytes), data_bytes = file_bytes - data_start;

  const JsonField root(json, what);
  std::vector<SafetensorsTensor> tensors;
  for (const auto& [name, member] : root.members()) {
    const JsonField field = root.at(name);
    if (name == "__metadata__") {
      for (const auto& [key, value] : field.members())
        metadata_[key] = JsonField(value, field.where() + "." + key).string();
    } else {
      check_tensor_name(name, what);
      tensors.push_back(tensor_of(name, field, data_start, data_bytes));
    }
  }

  const auto end = [](const SafetensorsTensor& t) { return t.offset_bytes + t.count * t.dtype.bytes(); };
  std::sort(tensors.begin(), tensors.end(), [&](const SafetensorsTensor& a, const SafetensorsTensor& b) {
    return std::pair(a.offset_bytes, end(a)) < std::pair(b.offset_bytes, end(b));
  });
  int64_t next = data_start;
  for (SafetensorsTensor& t : tensors) {
    if (t.offset_bytes != next) misplaced(file.path(), "the tensor '" + t.name + "'", next, t.offset_bytes);
    next = end(t);
    t.part = parts_.size();
    if (!index_.emplace(t.name, tensors_.size()).second)
      throw Error("'" + path_ + "': the tensor '" + t.name + "' is in two of its files, '" +
                  parts_[at(t.name).part].path + "' and '" + file.path() + "'; fetch them again");
    tensors_.push_back(std::move(t));
  }
  if (next != file_bytes) misplaced(file.path(), "the end of the file", next, file_bytes);
  parts_.push_back({file.path(), {}});
  if (parts_.size() <= files_to_keep_open()) parts_.back().kept = std::move(file);
}

namespace {

constexpr std::string_view index_ending = ".safetensors.index.json";

// What of a folder has its weights: the one file, or the index of several.
std::string weights_in(const std::string& folder) {
  std::vector<std::string> files, indices;
  std::string others;
  for (const std::string& name : list_folder(folder)) {
    if (name == "model.safetensors") return folder + "/" + name;
    if (name.ends_with(index_ending)) indices.push_back(name);
    else if (name.ends_with(".safetensors")) files.push_back(name);
    else if (others.size() < 200 && (name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth") ||
                                     name.ends_with(".ckpt") || name.ends_with(".gguf") || name.ends_with(".json")))
      others += (others.empty() ? "" : ", ") + name;
  }
  if (indices.size() == 1) return folder + "/" + indices[0];
  if (indices.empty() && files.size() == 1) return folder + "/" + files[0];
  throw Error("'" + folder + "': expected weights, a model.safetensors or a model" + std::string(index_ending) +
              " and the files that it names (a run has none before its first save), found " +
              (indices.size() > 1 ? str(indices.size(), " such indices: give one of them")
               : !files.empty()   ? str(files.size(), " files .safetensors and no index: fetch it too, or give a file")
                                  : "none" + (others.empty() ? "" : " (but " + others + ")") +
                                      ": fetch them, or save the weights as safetensors"));
}

}  // namespace

SafetensorsFile SafetensorsFile::open_weights(const std::string& path) {
  const std::string found = look_at(path).kind == Found::folder ? weights_in(path) : path;
  return found.ends_with("index.json") ? open_index(found) : open(found);
}

SafetensorsFile SafetensorsFile::open_index(const std::string& path) {
  const Json json = parse_json(read_file(path, JsonLimits().max_bytes), "'" + path + "'");
  const JsonField map = JsonField(json, "'" + path + "'").at("weight_map");
  SafetensorsFile all(path);
  std::map<std::string, std::string> parts;  // by name: a tensor that should be in it
  for (const auto& [tensor, part] : map.members()) {
    const std::string name = JsonField(part, map.where() + "." + tensor).string();
    if (!is_file_name(name))
      throw Error(map.where() + "." + tensor + ": expected the name of a file beside the index, found " +
                  Json(name).dump() + "; fetch the index again");
    parts.emplace(name, tensor);
  }
  size_t number = 0;
  for (const auto& [name, tensor] : parts) {
    const std::string file = parent_folder(path) + "/" + name;
    if (look_at(file).kind == Found::none)
      throw Error(str("'", path, "': expected ", parts.size(), " files beside it, found no '", name,
                      "', in which it has '", tensor, "'; fetch that too (", number, " of them come before it)"));
    all.add_part(File::open(file));
    number++;
  }
  for (const auto& [tensor, part] : map.members())
    if (const SafetensorsTensor* found = all.find(tensor);
        !found || all.parts_[found->part].path != parent_folder(path) + "/" + JsonField(part, path).string())
      throw Error("'" + path + "': the tensor '" + tensor + "' should be in '" + JsonField(part, path).string() +
                  "' and is not: that file is of another model or release; fetch it again");
  return all;
}

void write_safetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<SafetensorsEntry>& entries) {
  Json header = Json::object();
  for (const auto& [key, value] : metadata) header["__metadata__"][key] = value;
  int64_t end = 0;
  for (const SafetensorsEntry& entry : entries) {
    check_tensor_name(entry.name, "'" + path + "'");
    GCA_CHECK(!header.find(entry.name), "'", path, "': tensor '", entry.name, "' is given twice");
    const int64_t begin = end;
    end += element_count(entry.shape, entry.dtype, "'" + path + "': tensor '" + entry.name + "'") * entry.dtype.bytes();
    Json& field = header[entry.name];
    field["dtype"] = entry.dtype.name();
    field["shape"] = entry.shape;
    field["data_offsets"] = std::vector<int64_t>{begin, end};
  }
  std::string text = header.dump();
  text.resize(round_up(static_cast<int64_t>(text.size()), 8), ' ');

  AtomicFile file(path);
  const uint64_t header_bytes = text.size();
  file.write(&header_bytes, 8);
  file.write(text.data(), text.size());
  constexpr int64_t piece_bytes = 4 << 20;
  std::vector<char> piece(piece_bytes);
  for (const SafetensorsEntry& entry : entries) {
    const int64_t size = entry.dtype.bytes(), total = element_count(entry.shape, entry.dtype, entry.name);
    for (int64_t first = 0; first < total;) {
      const int64_t count = std::min(total - first, piece_bytes / size);
      entry.fill(piece.data(), first, count);
      file.write(piece.data(), count * size);
      first += count;
    }
  }
  file.commit();
}

}  // namespace gca
