// JSON: a value, a strict parser with caps, a writer, and JsonField, which reads a field and names it when it is not as
// expected.
#pragma once
#include <concepts>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "common.h"

namespace gca {

// A JSON value. Integers are int64 and exact; a number with a fraction or an exponent is a double. Members keep their
// order. Built like this: Json state; state["step"] = 5; state["losses"].push_back(2.5). Read through JsonField.
class Json {
 public:
  using Member = std::pair<std::string, Json>;

  Json() noexcept;  // null
  Json(const Json&);
  Json(Json&&) noexcept;
  Json& operator=(const Json&);
  Json& operator=(Json&&) noexcept;
  ~Json();
  Json(std::nullptr_t) {}
  template <std::integral T>
  Json(T value) {
    if constexpr (std::same_as<T, bool>) {
      value_ = value;
    } else {
      GCA_CHECK(std::in_range<int64_t>(value), "JSON integers are at most 2^63 - 1 here");
      value_ = static_cast<int64_t>(value);
    }
  }
  template <std::floating_point T>
  Json(T value) : value_(static_cast<double>(value)) {}
  Json(std::string value);
  Json(std::string_view value) : Json(std::string(value)) {}
  Json(const char* value) : Json(std::string(value)) {}
  template <class T>
  Json(const std::vector<T>& items) : Json(array()) {
    for (const auto& item : items) push_back(item);
  }
  static Json array();
  static Json object();

  // The member of that name, added as null if it is not there. On an object, or on null, which becomes one.
  Json& operator[](std::string_view name);
  // The member of that name; nullptr if there is none or this is no object.
  const Json* find(std::string_view name) const;
  // Adds the members of another object, each after those that are there.
  void add(const Json& members);
  // Appends to an array, or to null, which becomes one.
  void push_back(Json item);
  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  // The same value: the same types, and the same order of members.
  bool operator==(const Json& other) const;

  // The text of the value, in one line, or (lines) in indented lines that end in a newline. Parsing it gives the same
  // value: doubles take their shortest exact form and always have a point or an exponent. Two things JSON cannot say
  // are changed: NaN and infinities become null, and every byte of a string that is not UTF-8 becomes U+FFFD (a path
  // may hold any bytes; saving must not fail).
  std::string dump(bool lines = false) const;

 private:
  friend class JsonField;
  struct Object {
    std::vector<Member> members;
    std::map<std::string, size_t, std::less<>> index;  // a tree: no file can make it slow, as it could a hash table
    bool operator==(const Object& other) const;
  };
  using Value = std::variant<std::nullptr_t, bool, int64_t, double, std::string, std::vector<Json>, Object>;

  void write(std::string& out, int depth) const;  // depth < 0: one line

  Value value_ = nullptr;
};

// A place in a document, for reading it: JsonField state(json, "RUN/state.json");
// state.at("config").at("width").integer(1, 65536). Whatever is missing or of another type is an Error that names the
// file, the whole path of the field, expected and found. It points into the Json, which must outlive it; so do the
// spans that items() and members() return.
class JsonField {
 public:
  JsonField(const Json& value, std::string where) : value_(&value), where_(std::move(where)) {}

  bool has(std::string_view name) const { return value_->find(name) != nullptr; }
  JsonField at(std::string_view name) const;
  JsonField at(size_t i) const;

  bool boolean() const;
  int64_t integer(int64_t lowest = std::numeric_limits<int64_t>::min(),
                  int64_t highest = std::numeric_limits<int64_t>::max()) const;
  double number() const;  // an integer will do; null (a NaN when it was written) will not
  std::string string() const;
  std::span<const Json> items() const;
  std::span<const Json::Member> members() const;
  const Json& json() const { return *value_; }
  // "FILE: path.of.the.field", to begin an error of the caller's own.
  const std::string& where() const { return where_; }

 private:
  JsonField(const Json& value, std::string where, bool inside);

  template <class T>
  const T& get(const char* expected) const;
  Error mistyped(const std::string& expected) const;

  const Json* value_;
  std::string where_;
  bool inside_ = false;  // where_ already has the colon that follows the file's name
};

// What a document may cost: a value takes about 100 bytes of memory.
struct JsonLimits {
  size_t max_bytes = size_t{64} << 20;
  size_t max_values = size_t{4} << 20;
  int max_depth = 64;
};

// The value that text holds: RFC 8259 to the letter, and stricter: no name twice in an object, no lone surrogate, no
// number past its type. what: the file's name, for errors, which give the byte too.
Json parse_json(std::string_view text, const std::string& what, const JsonLimits& limits = {});

}  // namespace gca
