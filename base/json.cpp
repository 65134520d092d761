// JSON: how a value is kept and written, what is said of a field that is not as expected, and the parser.
#include "base/json.h"

#include <charconv>
#include <cmath>

#include "base/foreign.h"
#include "base/text.h"

namespace gca {

// ---- a value ------------------------------------------------------------------------------------------------------
Json::Json() noexcept = default;
Json::Json(const Json&) = default;
Json::Json(Json&&) noexcept = default;
Json& Json::operator=(const Json&) = default;
Json& Json::operator=(Json&&) noexcept = default;
Json::~Json() = default;

Json::Json(std::string value) : value_(std::move(value)) {}
Json Json::array() {
  Json result;
  result.value_ = std::vector<Json>();
  return result;
}
Json Json::object() {
  Json result;
  result.value_ = Object();
  return result;
}

bool Json::Object::operator==(const Object& other) const { return members == other.members; }
bool Json::operator==(const Json& other) const { return value_ == other.value_; }

Json& Json::operator[](std::string_view name) {
  if (is_null()) value_ = Object();
  Object* object = std::get_if<Object>(&value_);
  GCA_CHECK(object, "only an object has members");
  const auto [place, is_new] = object->index.try_emplace(std::string(name), object->members.size());
  if (is_new) object->members.emplace_back(name, Json());
  return object->members[place->second].second;
}

const Json* Json::find(std::string_view name) const {
  const Object* object = std::get_if<Object>(&value_);
  if (!object) return nullptr;
  const auto place = object->index.find(name);
  return place == object->index.end() ? nullptr : &object->members[place->second].second;
}

void Json::add(const Json& members) {
  const Object* object = std::get_if<Object>(&members.value_);
  GCA_CHECK(object, "only an object has members");
  for (const auto& [name, value] : object->members) (*this)[name] = value;
}

void Json::push_back(Json item) {
  if (is_null()) value_ = std::vector<Json>();
  std::vector<Json>* items = std::get_if<std::vector<Json>>(&value_);
  GCA_CHECK(items, "only an array has items");
  items->push_back(std::move(item));
}

// ---- writing ------------------------------------------------------------------------------------------------------
namespace {

void write_string(std::string& out, std::string_view text) {
  out += '"';
  while (!text.empty()) {
    const unsigned char c = static_cast<unsigned char>(text[0]);
    const size_t length = utf8_length(text);
    if (length == 0) out += "\xEF\xBF\xBD";
    else if (c == '"' || c == '\\') (out += '\\') += text[0];
    else if (c == '\n') out += "\\n";
    else if (c < 0x20 || c == 0x7F) out += str("\\u", hex(c, 4));
    else out += text.substr(0, length);
    text.remove_prefix(length ? length : 1);
  }
  out += '"';
}

void write_double(std::string& out, double value) {
  if (!std::isfinite(value)) {
    out += "null";
    return;
  }
  char digits[40];
  const std::string_view text(digits,
                              static_cast<size_t>(std::to_chars(digits, digits + sizeof digits, value).ptr - digits));
  out += text;
  if (text.find_first_of(".e") == text.npos) out += ".0";
}

}  // namespace

void Json::write(std::string& out, int depth) const {
  const int inner = depth < 0 ? -1 : depth + 1;
  const auto new_line = [&](int level) {
    if (level >= 0) out.append(1, '\n').append(2 * level, ' ');
  };
  if (const bool* flag = std::get_if<bool>(&value_)) {
    out += *flag ? "true" : "false";
  } else if (const int64_t* integer = std::get_if<int64_t>(&value_)) {
    out += std::to_string(*integer);
  } else if (const double* number = std::get_if<double>(&value_)) {
    write_double(out, *number);
  } else if (const std::string* text = std::get_if<std::string>(&value_)) {
    write_string(out, *text);
  } else if (const auto* items = std::get_if<std::vector<Json>>(&value_)) {
    out += '[';
    for (size_t i = 0; i < items->size(); i++) {
      if (i) out += depth < 0 ? "," : ", ";
      (*items)[i].write(out, inner);
    }
    out += ']';
  } else if (const Object* object = std::get_if<Object>(&value_)) {
    out += '{';
    for (size_t i = 0; i < object->members.size(); i++) {
      if (i) out += ',';
      new_line(inner);
      write_string(out, object->members[i].first);
      out += depth < 0 ? ":" : ": ";
      object->members[i].second.write(out, inner);
    }
    if (!object->members.empty()) new_line(depth);
    out += '}';
  } else {
    out += "null";
  }
}

std::string Json::dump(bool lines) const {
  std::string out;
  write(out, lines ? 0 : -1);
  if (lines) out += '\n';
  return out;
}

// ---- a field ------------------------------------------------------------------------------------------------------
namespace {

const char* mend() { return "the file is damaged or made for something else: make it anew or fetch it again"; }

std::string shortened(std::string text) {
  if (text.size() <= 80) return text;
  size_t end = 80;
  while ((static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) end--;
  return text.substr(0, end) + "...";
}

std::string quoted_name(std::string_view name) {  // without its quotes
  const std::string quoted = Json(name).dump();
  return shortened(quoted.substr(1, quoted.size() - 2));
}

}  // namespace

template <class T>
const T& JsonField::get(const char* expected) const {
  const T* value = std::get_if<T>(&value_->value_);
  return value ? *value : throw mistyped(expected);
}

JsonField JsonField::at(std::string_view name) const {
  const Json* member = value_->find(name);
  if (!member) {
    members();  // says so if this is no object at all
    throw Error(where_ + ": the field " + Json(name).dump() + " is missing; " + mend());
  }
  return JsonField(*member, where_ + (inside_ ? "." : ": ") + quoted_name(name), true);
}

JsonField JsonField::at(size_t i) const {
  if (i >= items().size())
    throw Error(str(where_, ": expected more than ", i, " items, found ", items().size(), "; ", mend()));
  return JsonField(items()[i], where_ + (inside_ ? "" : ": ") + str("[", i, "]"), true);
}

int64_t JsonField::integer(int64_t lowest, int64_t highest) const {
  const int64_t* value = std::get_if<int64_t>(&value_->value_);
  if (value && *value >= lowest && *value <= highest) return *value;
  throw mistyped(str("an integer from ", lowest, " to ", highest));
}

double JsonField::number() const {
  const int64_t* integer = std::get_if<int64_t>(&value_->value_);
  return integer ? static_cast<double>(*integer) : get<double>("a number");
}

bool JsonField::boolean() const { return get<bool>("true or false"); }
std::string JsonField::string() const { return get<std::string>("a string"); }
std::span<const Json> JsonField::items() const { return get<std::vector<Json>>("an array"); }
std::span<const Json::Member> JsonField::members() const { return get<Json::Object>("an object").members; }

JsonField::JsonField(const Json& value, std::string where, bool inside)
    : value_(&value), where_(std::move(where)), inside_(inside) {}

Error JsonField::mistyped(const std::string& expected) const {
  std::string found;
  if (std::holds_alternative<std::vector<Json>>(value_->value_)) found = str("an array of ", items().size());
  else if (std::holds_alternative<Json::Object>(value_->value_)) found = str("an object of ", members().size());
  else found = shortened(value_->dump());
  return Error(where_ + ": expected " + expected + ", found " + found + "; " + mend());
}

// ---- the parser ---------------------------------------------------------------------------------------------------
class JsonParser {
 public:
  JsonParser(std::string_view text, std::string what, const JsonLimits& limits);

  Json document();

 private:
  static constexpr int end = -1;

  int peek() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : end; }
  int skip_space();
  bool take(char c);

  bool take_after_space(char c);

  [[noreturn]] void fail(const std::string& expected) const;

  Json value(int depth);

  bool word(std::string_view name);

  Json object(int depth);

  Json array(int depth);

  static bool is_digit(int c) { return c >= '0' && c <= '9'; }
  void digits();

  Json number();

  unsigned hex4();

  std::string string();

  void escape(std::string& out);

  std::string_view text_;
  std::string what_;
  JsonLimits limits_;
  size_t at_ = 0, values_ = 0;
};

JsonParser::JsonParser(std::string_view text, std::string what, const JsonLimits& limits)
    : text_(text), what_(std::move(what)), limits_(limits) {}

Json JsonParser::document() {
  if (text_.size() > limits_.max_bytes)
    throw Error(str(what_, ": expected at most ", limits_.max_bytes, " bytes of JSON, found ", text_.size(),
                    ": is this the right file?"));
  Json result = value(0);
  if (skip_space() != end) fail("nothing after the end of the value");
  return result;
}

int JsonParser::skip_space() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
    at_++;
  return peek();
}

bool JsonParser::take(char c) {
  if (peek() != static_cast<unsigned char>(c)) return false;
  at_++;
  return true;
}

bool JsonParser::take_after_space(char c) {
  skip_space();
  return take(c);
}

void JsonParser::fail(const std::string& expected) const {
  const int c = peek();
  const std::string found = c == end               ? "the end of the text"
                            : c > 0x20 && c < 0x7F ? str("'", static_cast<char>(c), "'")
                                                   : str("byte 0x", hex(c, 2));
  throw Error(str(what_, " is not valid JSON at byte ", at_, ": expected ", expected, ", found ", found,
                  at_ == 0 && text_.starts_with(byte_order_mark)
                      ? "; the file begins with a byte order mark (BOM): save it as UTF-8 without one"
                      : "; the file is damaged or of another kind: make it anew or fetch it again"));
}

Json JsonParser::value(int depth) {
  if (depth > limits_.max_depth) fail(str("at most ", limits_.max_depth, " levels of nesting"));
  if (values_++ >= limits_.max_values) fail(str("at most ", limits_.max_values, " values"));
  const int c = skip_space();
  if (c == '{') return object(depth);
  if (c == '[') return array(depth);
  if (c == '"') return Json(string());
  if (c == '-' || is_digit(c)) return number();
  if (word("true")) return Json(true);
  if (word("false")) return Json(false);
  if (word("null")) return Json();
  fail("a value");
}

bool JsonParser::word(std::string_view name) {
  if (text_.substr(at_, name.size()) != name) return false;
  at_ += name.size();
  return true;
}

Json JsonParser::object(int depth) {
  Json result = Json::object();
  at_++;
  if (take_after_space('}')) return result;
  do {
    if (skip_space() != '"') fail("a field's name in quotes");
    const size_t start = at_;
    const std::string name = string();
    if (result.find(name)) {
      at_ = start;
      fail("each field once, not " + Json(name).dump() + " again");
    }
    skip_space();
    if (!take(':')) fail("':'");
    Json member = value(depth + 1);
    result[name] = std::move(member);
    skip_space();
  } while (take(','));
  if (!take('}')) fail("',' or '}'");
  return result;
}

Json JsonParser::array(int depth) {
  Json result = Json::array();
  at_++;
  if (take_after_space(']')) return result;
  do {
    result.push_back(value(depth + 1));
    skip_space();
  } while (take(','));
  if (!take(']')) fail("',' or ']'");
  return result;
}

void JsonParser::digits() {
  if (!is_digit(peek())) fail("a digit");
  while (is_digit(peek())) at_++;
}

Json JsonParser::number() {
  const size_t start = at_;
  const bool negative = take('-');
  if (!take('0')) digits();
  bool whole = true;
  if (take('.')) {
    whole = false;
    digits();
  }
  if (take('e') || take('E')) {
    whole = false;
    if (!take('+')) take('-');
    digits();
  }
  const char *first = text_.data() + start, *last = text_.data() + at_;
  std::errc error;
  if (whole && !(negative && last - first == 2 && first[1] == '0')) {  // -0 is a double, or its sign were lost
    int64_t integer = 0;
    error = std::from_chars(first, last, integer).ec;
    if (error == std::errc()) return Json(integer);
  } else {
    // std::from_chars would do, where every library had it for doubles; no command sets another locale.
    const double real = strtod(std::string(first, last).c_str(), nullptr);
    if (std::isfinite(real)) return Json(real);
  }
  at_ = start;
  fail(whole ? "an integer that fits 64 bits" : "a number that fits a double");
}

unsigned JsonParser::hex4() {
  unsigned code = 0;
  for (int i = 0; i < 4; i++, at_++) {
    const int c = peek();
    const int digit = is_digit(c)            ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) fail("four hexadecimal digits after \\u");
    code = code * 16 + static_cast<unsigned>(digit);
  }
  return code;
}

std::string JsonParser::string() {
  std::string out;
  at_++;
  for (;;) {
    const size_t start = at_;
    while (peek() >= 0x20 && peek() < 0x80 && peek() != '"' && peek() != '\\') at_++;
    out += text_.substr(start, at_ - start);
    if (take('"')) return out;
    if (take('\\')) {
      escape(out);
    } else {
      const size_t length = peek() >= 0x80 ? utf8_length(text_.substr(at_)) : 0;
      if (length == 0) fail(peek() >= 0x80 ? "valid UTF-8" : "a string without control characters, closed by '\"'");
      out += text_.substr(at_, length);
      at_ += length;
    }
  }
}

void JsonParser::escape(std::string& out) {
  static constexpr std::string_view names = "\"\\/bfnrt", bytes = "\"\\/\b\f\n\r\t";
  const int c = peek();
  if (c != 'u') {
    const size_t which = c == end ? names.npos : names.find(static_cast<char>(c));
    if (which == names.npos) fail("one of \" \\ / b f n r t u after a backslash");
    out += bytes[which];
    at_++;
    return;
  }
  const size_t start = at_++;
  unsigned code = hex4();
  if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
    at_ += 2;
    const unsigned low = hex4();
    code = low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) : 0xD800;
  }
  if (code >= 0xD800 && code < 0xE000) {
    at_ = start;
    fail("a character or a whole surrogate pair");
  }
  const auto tail = [&](unsigned shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | (code >> 6));
    tail(0);
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | (code >> 12));
    tail(6);
    tail(0);
  } else {
    out += static_cast<char>(0xF0 | (code >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

Json parse_json(std::string_view text, const std::string& what, const JsonLimits& limits) {
  return JsonParser(text, what, limits).document();
}

}  // namespace gca
