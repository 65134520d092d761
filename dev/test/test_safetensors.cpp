// safetensors: round trips, conversions, streaming, and files that lie about themselves. Reads build/oracle where
// it is there.
#include <doctest/doctest.h>
#include <stdlib.h>

#include <cmath>

#include "base/safetensors.h"
#include "dev/test/test.h"

using namespace gca;
using namespace gca::test;

namespace {

std::string file_of(const std::string& fields, size_t data_bytes, const char* pattern = "{%s}") {
  std::string header = pattern;
  header.replace(header.find("%s"), 2, fields);
  const uint64_t size = header.size();
  std::string file(reinterpret_cast<const char*>(&size), 8);
  return file + header + std::string(data_bytes, '\1');
}

}  // namespace

TEST_CASE("safetensors: what is written is read back, in the order given") {
  const TempFolder folder;
  const std::string path = folder.path + "/m.safetensors";
  const std::vector<float> a{1.5f, -2, 3e38f, 0x1p-149f, 5, 6};
  const std::vector<double> b{1e300, 0.1};
  const std::vector<int32_t> c{INT32_MIN, 7};
  const std::vector<int64_t> d{INT64_MAX};
  const std::vector<uint8_t> e{255, 0, 1};
  write_safetensors(path, {{"lower", "6"}, {"groups", ""}},
                    {safetensors_entry("z.weight", {2, 3}, a.data()), safetensors_entry("b", {2}, b.data()),
                     safetensors_entry("none", {0, 5}, a.data()), safetensors_entry("c", {2, 1}, c.data()),
                     safetensors_entry("d", {}, d.data()), safetensors_entry("e", {3}, e.data())});
  const SafetensorsFile file = SafetensorsFile::open(path);
  CHECK(file.metadata() == std::map<std::string, std::string>{{"groups", ""}, {"lower", "6"}});
  std::string names;
  for (const SafetensorsTensor& tensor : file.tensors()) names += tensor.name + " ";
  CHECK(names == "z.weight b none c d e ");
  CHECK(file.tensors()[0].offset_bytes % 8 == 0);  // the format asks for an aligned start of the data
  CHECK(file.values<float>("z.weight") == a);
  CHECK(file.values<double>("z.weight") == std::vector<double>(a.begin(), a.end()));
  CHECK(file.values<double>("b") == b);
  CHECK(file.values<float>("b") == std::vector<float>{INFINITY, 0.1f});
  CHECK(file.values<int32_t>("c") == c);
  CHECK(file.values<int64_t>("d") == d);
  CHECK(file.values<uint8_t>("e") == e);
  CHECK(file.values<float>("none").empty());
  CHECK(file.find("z") == nullptr);
  float some[2];
  file.read(file.at("z.weight"), 3, 2, some);
  CHECK((some[0] == a[3] && some[1] == a[4]));

  CHECK(has(error_of([&] { file.at("z"); }), "m.safetensors': the tensor 'z' is missing"));
  CHECK(has(error_of([&] {
              file.read("z.weight", {3, 2}, some);
            }),
            "tensor 'z.weight': expected the shape [3,2], found [2,3]"));
  CHECK(has(error_of([&] { file.values<int32_t>("d"); }), "tensor 'd': expected I32, found I64"));
  CHECK(has(error_of([&] { file.values<float>("c"); }), "tensor 'c': expected F64, F32, F16 or BF16, found I32"));
  CHECK(has(error_of([&] { file.read(file.at("z.weight"), 5, 2, some); }), "does not hold"));
}

TEST_CASE("safetensors: half precision is exact") {
  const TempFolder folder;
  const std::string path = folder.path + "/h.safetensors";
  std::vector<uint16_t> bits(65536);
  for (size_t i = 0; i < bits.size(); i++) bits[i] = static_cast<uint16_t>(i);
  const auto fill = [&](void* out, int64_t first, int64_t count) {
    memcpy(out, bits.data() + first, static_cast<size_t>(count) * 2);
  };
  write_safetensors(path, {}, {{"f16", Dtype::F16, {65536}, fill}, {"bf16", Dtype::BF16, {256, 256}, fill}});
  const SafetensorsFile file = SafetensorsFile::open(path);
  // The value from its definition, sign, exponent of e bits, fraction of f bits.
  const auto value = [](unsigned x, int e, int f) {
    const int exponent = static_cast<int>(x >> f) & ((1 << e) - 1), bias = (1 << (e - 1)) - 1,
              fraction = static_cast<int>(x) & ((1 << f) - 1);
    const double size = exponent == (1 << e) - 1 ? (fraction ? NAN : INFINITY)
                        : exponent == 0          ? std::ldexp(fraction, 1 - bias - f)
                                                 : std::ldexp(fraction + (1 << f), exponent - bias - f);
    return x & 0x8000 ? -size : size;
  };
  const std::vector<float> f16 = file.values<float>("f16"), bf16 = file.values<float>("bf16");
  const std::vector<double> f16_wide = file.values<double>("f16"), bf16_wide = file.values<double>("bf16");
  const auto same = [](double x, double y) {
    return std::isnan(x) ? std::isnan(y) : x == y && std::signbit(x) == std::signbit(y);
  };
  int wrong = 0;
  for (unsigned x = 0; x < 65536; x++)
    wrong += !same(value(x, 5, 10), f16[x]) + !same(value(x, 5, 10), f16_wide[x]) + !same(value(x, 8, 7), bf16[x]) +
             !same(value(x, 8, 7), bf16_wide[x]);
  CHECK(wrong == 0);
}

TEST_CASE("safetensors: a large tensor is asked for in pieces, and a failure leaves the old file") {
  const TempFolder folder;
  const std::string path = folder.path + "/large.safetensors";
  constexpr int64_t count = 3'000'001;  // 12 MB
  int64_t next = 0, largest = 0;
  const auto fill = [&](void* out, int64_t first, int64_t n) {
    CHECK(first == next);
    next += n;
    largest = std::max(largest, n);
    for (int64_t i = 0; i < n; i++) static_cast<float*>(out)[i] = static_cast<float>(first + i);
  };
  write_safetensors(path, {}, {{"x", Dtype::F32, {count}, fill}});
  CHECK(next == count);
  CHECK(largest * 4 <= 4 << 20);
  const auto check = [&] {
    const std::vector<double> x = SafetensorsFile::open(path).values<double>("x");
    int wrong = 0;
    for (int64_t i = 0; i < count; i++) wrong += x[i] != static_cast<double>(i);
    CHECK(wrong == 0);
  };
  check();
  const auto fail = [&](void*, int64_t first, int64_t) {
    if (first > 0) throw Error("the device is gone");
  };
  CHECK(error_of([&] { write_safetensors(path, {}, {{"x", Dtype::F32, {count}, fail}}); }) == "the device is gone");
  check();
  CHECK(list_folder(folder.path) == std::vector<std::string>{"large.safetensors"});
  CHECK(has(error_of([&] { write_safetensors(path, {}, {{"a/b", Dtype::F32, {1}, fill}}); }), "'/'"));
  CHECK(has(error_of([&] {
              write_safetensors(path, {}, {{"a", Dtype::F32, {0}, fill}, {"a", Dtype::F32, {0}, fill}});
            }),
            "given twice"));
  CHECK(has(error_of([&] { write_safetensors(path, {}, {{"a", Dtype::F32, {INT64_MAX, 2}, fill}}); }), "2^63"));
}

TEST_CASE("safetensors: files that lie are refused") {
  const TempFolder folder;
  const std::string path = folder.path + "/x.safetensors";
  const auto error = [&](const std::string& content) {
    write_file(path, content);
    return error_of([&] { SafetensorsFile::open(path); });
  };
  const auto tensor = [](const std::string& name, const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
  };
  CHECK(error(file_of(tensor("a", "F32", "[2]", "[0,8]"), 8, "{%s}  ")) == "");
  CHECK(error(file_of(tensor("b", "F32", "[1]", "[8,12]") + "," + tensor("a", "I64", "[]", "[0,8]"), 12)) ==
        "");  // any order of names
  CHECK(error(file_of("", 0)) == "");
  struct Case {
    std::string fields;
    size_t data_bytes;
    const char* message;
  };
  const Case cases[] = {
      {tensor("a", "F32", "[2]", "[0,8]"), 7, "expected an integer from 0 to 7, found 8"},
      {tensor("a", "F32", "[2]", "[0,8]"), 9, "expected the end of the file at byte"},
      {tensor("a", "F32", "[2]", "[1,9]"), 9, "expected the tensor 'a' at byte"},
      {tensor("a", "F32", "[3]", "[0,8]"), 8, "expected 12 bytes for F32 [3], found data_offsets [0,8]"},
      {tensor("a", "F32", "[2]", "[0,8,8]"), 8, "found data_offsets [0,8,8]"},
      {tensor("a", "F32", "[2]", "[8,0]"), 8, "expected an integer from 8 to 8, found 0"},
      {tensor("a", "F32", "[2]", "[0]"), 8, "expected more than 1 items, found 1"},
      {tensor("a", "F32", "[-2,-1]", "[0,8]"), 8, "expected an integer from 0"},
      {tensor("a", "F32", "[2.0]", "[0,8]"), 8, "found 2.0"},
      {tensor("a", "F32", "[4294967296,4294967296]", "[0,0]"), 0, "fewer than 2^63 bytes"},
      {tensor("a", "F32", "[4611686018427387904]", "[0,0]"), 0, "fewer than 2^63 bytes"},
      {tensor("a", "F8_E4M3", "[2]", "[0,2]"), 2, "the dtype \"F8_E4M3\" is not known"},
      {tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[2]", "[4,12]"), 12,
       "expected the tensor 'b' at byte"},
      {tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[2]", "[12,20]"), 20,
       "expected the tensor 'b' at byte"},
      {tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[2]", "[0,8]"), 8,
       "expected the tensor 'b' at byte"},
      {tensor("a", "F32", "[1]", "[0,4]") + "," + tensor("a", "F32", "[1]", "[4,8]"), 8,
       "each field once, not \"a\" again"},
      {tensor("../a", "F32", "[1]", "[0,4]"), 4, "without '/', '..'"},
      {tensor("a..b", "F32", "[1]", "[0,4]"), 4, "without '/', '..'"},
      {tensor("a\\u001b[2J", "F32", "[1]", "[0,4]"), 4, "control characters"},
      {tensor("", "F32", "[1]", "[0,4]"), 4, "tensor's name"},
      {"\"a\":{\"dtype\":\"F32\",\"shape\":[1]}", 4, "a: the field \"data_offsets\" is missing"},
      {"\"__metadata__\":{\"k\":1}", 0, "__metadata__.k: expected a string, found 1"},
      {"\"a\":[]", 0, "a: expected an object"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.fields);
    const std::string message = error(file_of(c.fields, c.data_bytes));
    CHECK_MESSAGE(has(message, c.message), message);
    CHECK(has(message, "x.safetensors"));
  }
  CHECK(has(error(file_of("", 0, "[%s]")), "expected an object, found an array"));
  const uint64_t huge = ~uint64_t{0}, over = (uint64_t{16} << 20) + 1;
  CHECK(has(error(std::string(reinterpret_cast<const char*>(&huge), 8) + "{}"), "expected a header of at most"));
  CHECK(has(error(std::string(reinterpret_cast<const char*>(&over), 8) + std::string(over, ' ')),
            "expected a header of at most"));

  // Cut anywhere, it is refused; with any byte of the header changed, it is refused or still sound.
  const std::string whole =
      file_of(tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "BF16", "[2,1]", "[8,12]"), 12);
  for (size_t size = 0; size < whole.size(); size++) CHECK(error(whole.substr(0, size)) != "");
  for (size_t at = 0; at < whole.size() - 12; at++) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 1);
    if (error(damaged) != "") continue;
    const SafetensorsFile file = SafetensorsFile::open(path);
    for (const SafetensorsTensor& t : file.tensors())
      CHECK(t.offset_bytes + t.count * t.dtype.bytes() <= static_cast<int64_t>(whole.size()));
  }
}

TEST_CASE("safetensors: the fixtures are read") {
  const std::string path = "build/oracle/drt_baseline.safetensors";
  if (!std::filesystem::exists(path)) {
    MESSAGE("skipped: no " << path);
    return;
  }
  const SafetensorsFile file = SafetensorsFile::open(path);
  CHECK(file.metadata().contains("landmark_id"));
  const std::vector<double> losses = file.values<double>("train.losses");
  CHECK(losses.size() == 10);
  CHECK(losses[0] == file.values<double>("loss")[0]);
  CHECK(file.values<int32_t>("targets").size() == file.values<int32_t>("tokens").size());
}
