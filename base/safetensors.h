// safetensors files: u64 size of the header, the header (JSON: name -> dtype, shape, data_offsets), then the tensors'
// bytes without a gap. Large models are split: several such files, and an index (JSON: weight_map, name -> file). A
// reader that trusts nothing and a writer that streams.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "base/files.h"

namespace gca {

class JsonField;

// The element types, with the names that files use.
struct Dtype {
  enum Kind { F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL } kind;
  constexpr Dtype(Kind k) : kind(k) {}
  constexpr operator Kind() const { return kind; }
  static constexpr Kind all[] = {F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL};

  constexpr const char* name() const {
    constexpr const char* names[] = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16",
                                     "I8",  "U64", "U32", "U16",  "U8",  "BOOL"};
    return names[kind];
  }
  constexpr int64_t bytes() const {
    constexpr int64_t sizes[] = {8, 4, 2, 2, 8, 4, 2, 1, 8, 4, 2, 1, 1};
    return sizes[kind];
  }
  // The type of a C++ array in a file.
  template <class T>
  static constexpr Dtype of() {
    if constexpr (std::is_same_v<T, double>) return F64;
    if constexpr (std::is_same_v<T, float>) return F32;
    if constexpr (std::is_same_v<T, int64_t>) return I64;
    if constexpr (std::is_same_v<T, int32_t>) return I32;
    if constexpr (std::is_same_v<T, uint8_t>) return U8;
  }
};

using Shape = std::vector<int64_t>;  // outermost first; {} is one number

std::string shape_text(const Shape& shape);

// The number of elements; an Error, beginning with where, if they or their bytes do not fit 63 bits.
int64_t element_count(const Shape& shape, Dtype dtype, const std::string& where);

// Names go into messages, tables and the authors' tools: refuses what could be a path or could steer a terminal.
void check_tensor_name(const std::string& name, const std::string& where);

struct SafetensorsTensor {
  std::string name;
  Dtype dtype;
  Shape shape;
  int64_t count;         // elements
  int64_t offset_bytes;  // from the start of the file
  size_t part = 0;       // which file, of several
};

// A file whose header has been read and found sound: the tensors lie in the file one after the other from the header to
// the end. Or several such files as if they were one.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::string& path);
  // path: a file, the index of one that is split (.index.json), or a folder of either.
  static SafetensorsFile open_weights(const std::string& path);
  // Whether a file begins as one of these does.
  static bool begins(const File& file);

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }  // in the order of their bytes

  // nullptr if there is none of that name.
  const SafetensorsTensor* find(const std::string& name) const;
  const SafetensorsTensor& at(const std::string& name) const;

  // The same, and it must have this shape.
  const SafetensorsTensor& at(const std::string& name, const Shape& shape) const;

  // out[0..count) = elements first.. of the tensor. To float or double from F64, F32, F16 and BF16 (rounded to nearest
  // where out is the narrower); to int64_t, int32_t and uint8_t from the same type only. Any number of threads at once.
  template <class T>
  void read(const SafetensorsTensor& tensor, int64_t first, int64_t count, T* out) const;

  // out = bytes first .. of the tensor as the file has them, whatever their type.
  void read_bytes(const SafetensorsTensor& tensor, int64_t first, int64_t n_bytes, void* out) const;

  // out = the whole tensor of that name, which must have this shape.
  template <class T>
  void read(const std::string& name, const Shape& shape, T* out) const {
    const SafetensorsTensor& tensor = at(name, shape);
    read(tensor, 0, tensor.count, out);
  }

  // The whole tensor of that name, whatever its shape.
  template <class T>
  std::vector<T> values(const std::string& name) const {
    const SafetensorsTensor& tensor = at(name);
    std::vector<T> out(tensor.count);
    read(tensor, 0, tensor.count, out.data());
    return out;
  }

 private:
  struct Part {
    std::string path;
    std::optional<File> kept;  // or opened for each reading: there may be more parts than open files
  };

  explicit SafetensorsFile(std::string path) : path_(std::move(path)) {}
  void add_part(File file);
  static SafetensorsFile open_index(const std::string& path);

  // use(file) of the tensor's part.
  template <class Use>
  auto with_file(const SafetensorsTensor& tensor, Use&& use) const {
    const Part& part = parts_[tensor.part];
    return part.kept ? use(*part.kept) : use(File::open(part.path));
  }

  std::string path_;
  std::vector<Part> parts_;
  std::map<std::string, std::string> metadata_;
  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, size_t> index_;
};

// A tensor to be written: fill(out, first, count) puts elements first..first+count, of the given type, at out. It is
// asked for consecutive pieces of at most 4 MiB, so no second copy of a model has to fit the memory.
struct SafetensorsEntry {
  std::string name;
  Dtype dtype;
  Shape shape;
  std::function<void(void* out, int64_t first, int64_t count)> fill;
};

// An entry that writes the elements at data, which must stay until it is written.
template <class T>
SafetensorsEntry safetensors_entry(const std::string& name, const Shape& shape, const T* data) {
  return {name, Dtype::of<T>(), shape, [data](void* out, int64_t first, int64_t count) {
            memcpy(out, data + first, static_cast<size_t>(count) * sizeof(T));
          }};
}

// Writes the tensors, packed, in the given order. The file appears whole or not at all, and is durable when this
// returns.
void write_safetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<SafetensorsEntry>& entries);

}  // namespace gca
