// safetensors files: u64 size of the header, the header (JSON: name -> dtype, shape, data_offsets), then the tensors'
// bytes without a gap. A reader that trusts nothing and a writer that streams.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "base/files.h"
#include "base/json.h"

namespace gca {

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

float float_from_bf16(uint16_t bits);

float float_from_f16(uint16_t bits);

struct SafetensorsTensor {
  std::string name;
  Dtype dtype;
  Shape shape;
  int64_t count;         // elements
  int64_t offset_bytes;  // from the start of the file
};

// A file whose header has been read and found sound: the tensors lie in the file one after the other from the header to
// the end.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::string& path) { return SafetensorsFile(File::open(path)); }

  const std::string& path() const { return file_.path(); }
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
  void read(const SafetensorsTensor& tensor, int64_t first, int64_t count, T* out) const {
    GCA_CHECK(first >= 0 && count >= 0 && first <= tensor.count && count <= tensor.count - first, "elements of '",
              tensor.name, "'");
    const int64_t start = tensor.offset_bytes + first * tensor.dtype.bytes();
    if (tensor.dtype == Dtype::of<T>()) return file_.read(out, static_cast<size_t>(count) * sizeof(T), start);
    if constexpr (std::is_floating_point_v<T>) {
      if (tensor.dtype == Dtype::F64)
        return convert<double>(start, count, out, [](double x) { return static_cast<T>(x); });
      if (tensor.dtype == Dtype::F32)
        return convert<float>(start, count, out, [](float x) { return static_cast<T>(x); });
      if (tensor.dtype == Dtype::F16)
        return convert<uint16_t>(start, count, out, [](uint16_t x) { return static_cast<T>(float_from_f16(x)); });
      if (tensor.dtype == Dtype::BF16)
        return convert<uint16_t>(start, count, out, [](uint16_t x) { return static_cast<T>(float_from_bf16(x)); });
    }
    throw Error(str("'", path(), "': tensor '", tensor.name, "': expected ",
                    std::is_floating_point_v<T> ? "F64, F32, F16 or BF16" : Dtype::of<T>().name(), ", found ",
                    tensor.dtype.name(), "; is this a file of the same kind?"));
  }

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
  explicit SafetensorsFile(File file);

  SafetensorsTensor tensor(const std::string& name, const JsonField& field, int64_t data_start,
                           int64_t data_bytes) const;

  [[noreturn]] void misplaced(const std::string& what, int64_t expected, int64_t found) const;

  // out = f of count numbers of type Stored, from byte `start` of the file, a piece at a time.
  template <class Stored, class T, class Function>
  void convert(int64_t start, int64_t count, T* out, Function f) const {
    std::vector<Stored> piece(std::min<int64_t>(count, 1 << 18));
    for (int64_t done = 0; done < count;) {
      const size_t n = std::min(count - done, static_cast<int64_t>(piece.size()));
      file_.read(piece.data(), n * sizeof(Stored), start + done * static_cast<int64_t>(sizeof(Stored)));
      for (size_t i = 0; i < n; i++) out[done + static_cast<int64_t>(i)] = f(piece[i]);
      done += static_cast<int64_t>(n);
    }
  }

  static constexpr uint64_t max_header_bytes = uint64_t{16} << 20;

  File file_;
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
