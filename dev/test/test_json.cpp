// JSON: what is accepted, what is refused and where, exact round trips, and errors that name the field.
#include <doctest/doctest.h>

#include <random>

#include "base/json.h"
#include "dev/test/test.h"

using namespace gca;
using namespace gca::test;

namespace {

// The message of the Error that call() throws; "" if it throws none.
std::string parse_error(std::string_view text, const JsonLimits& limits = {}) {
  return error_of([&] { parse_json(text, "x.json", limits); });
}

}  // namespace

TEST_CASE("json: values are read and written exactly") {
  const std::pair<const char*, const char*> cases[] = {
      {"null", "null"},
      {" [true , false]\r\n\t", "[true,false]"},
      {"9223372036854775807", "9223372036854775807"},
      {"-9223372036854775808", "-9223372036854775808"},
      {"-0", "-0.0"},
      {"1.0", "1.0"},
      {"1e3", "1000.0"},
      {"0.1", "0.1"},
      {"5e-324", "5e-324"},
      {"1.7976931348623157E+308", "1.7976931348623157e+308"},
      {"0.30000000000000004", "0.30000000000000004"},
      {R"({"b":1,"a":{"":[]},"c":{}})", R"({"b":1,"a":{"":[]},"c":{}})"},
      {R"("\u0041\/\b\f\n\r\t\"\\")", R"("A/\u0008\u000c\n\u000d\u0009\"\\")"},
      {R"("\u00e9\u20ac\ud83d\ude00\u0000\uFFFD")", "\"\u00e9\u20ac\U0001F600\\u0000\uFFFD\""},
      {"\"\u00e9\u20ac\U0001F600\x7f\"", "\"\u00e9\u20ac\U0001F600\\u007f\""},
  };
  for (const auto& c : cases) {
    const Json json = parse_json(c.first, "x.json");
    CHECK(json.dump() == c.second);
    CHECK(parse_json(json.dump(), "x.json") == json);
    CHECK(parse_json(json.dump(true), "x.json") == json);
  }
}

TEST_CASE("json: what is not JSON is refused, with the byte") {
  const std::pair<std::string_view, const char*> cases[] = {
      {"", "byte 0: expected a value, found the end"},
      {"[1,]", "byte 3: expected a value, found ']'"},
      {"[1 2]", "byte 3: expected ',' or ']'"},
      {"{\"a\":1,}", "byte 7: expected a field's name"},
      {"{\"a\" 1}", "byte 5: expected ':'"},
      {"{\"a\":1", "byte 6: expected ',' or '}', found the end"},
      {"{\"a\":1,\"b\":2,\"a\":3}", "byte 13: expected each field once, not \"a\" again"},
      {"{\"a\":1,\"\\u0061\":3}", "byte 7: expected each field once"},
      {"1 1", "byte 2: expected nothing after"},
      {"01", "byte 1: expected nothing after"},
      {"nul", "expected a value"},
      {"NaN", "expected a value"},
      {"+1", "expected a value"},
      {"-", "byte 1: expected a digit"},
      {"1.", "byte 2: expected a digit"},
      {"1e+", "byte 3: expected a digit"},
      {"9223372036854775808", "expected an integer that fits 64 bits"},
      {"1e999", "expected a number that fits a double"},
      {"\"abc", "closed by '\"', found the end"},
      {"\"a\nb\"", "byte 2: expected a string without control characters"},
      {"\"\\x\"", "byte 2: expected one of"},
      {"\"\\u12g4\"", "byte 5: expected four hexadecimal digits"},
      {"\"\\ud83d\"", "whole surrogate pair"},
      {"\"\\ude00\"", "whole surrogate pair"},
      {"\"\\ud83d\\u0041\"", "whole surrogate pair"},
      {"\"\xc0\xaf\"", "byte 1: expected valid UTF-8"},
      {"\"\xed\xa0\x80\"", "expected valid UTF-8"},
      {"\"\xf4\x90\x80\x80\"", "expected valid UTF-8"},
      {"\"\xe2\x82\"", "expected valid UTF-8"},
      {"\xef\xbb\xbf{}", "byte 0: expected a value, found byte 0xef; the file begins with a byte order mark (BOM)"},
      {std::string_view("1\0", 2), "byte 1: expected nothing after"},
  };
  for (const auto& c : cases) {
    const std::string error = parse_error(c.first);
    CHECK_MESSAGE(has(error, c.second), error);
    CHECK(error.starts_with("x.json is not valid JSON"));
  }
}

TEST_CASE("json: depth, size and number of values are capped") {
  const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  CHECK(parse_error(nested(65)) == "");
  CHECK(has(parse_error(nested(66)), "at most 64 levels"));
  CHECK(has(parse_error(std::string(1000000, '[')), "at most 64 levels"));
  CHECK(parse_error("[1,2]", {.max_bytes = 5, .max_values = 3}) == "");
  CHECK(has(parse_error("[1,2]", {.max_bytes = 4}), "expected at most 4 bytes of JSON, found 5"));
  CHECK(has(parse_error("[1,2]", {.max_values = 2}), "at most 2 values"));
}

TEST_CASE("json: a field that is missing, mistyped or out of range is named") {
  const Json json =
      parse_json(R"({"config":{"width":768,"lr":0.002,"names":["a",{"b":null}],"on":true}})", "state.json");
  const JsonField config = JsonField(json, "RUN/state.json").at("config");
  CHECK(config.at("width").integer(1, 768) == 768);
  CHECK(config.at("width").number() == 768.0);
  CHECK(config.at("lr").number() == 0.002);
  CHECK(config.at("names").at(0).string() == "a");
  CHECK(config.at("on").boolean());
  CHECK(config.has("lr"));
  CHECK_FALSE(config.has("rl"));
  const auto begins = [](const std::string& error, const std::string& start) {
    CHECK_MESSAGE(error.starts_with(start), error);
  };
  begins(error_of([&] { config.at("heads"); }), "RUN/state.json: config: the field \"heads\" is missing; ");
  begins(error_of([&] { config.at("width").integer(1, 767); }),
         "RUN/state.json: config.width: expected an integer from 1 to 767, found 768; ");
  begins(error_of([&] { config.at("lr").integer(0, 1); }),
         "RUN/state.json: config.lr: expected an integer from 0 to 1, found 0.002; ");
  begins(error_of([&] { config.at("width").string(); }),
         "RUN/state.json: config.width: expected a string, found 768; ");
  begins(error_of([&] { config.at("names").at(1).at("b").number(); }),
         "RUN/state.json: config.names[1].b: expected a number, found null; ");
  begins(error_of([&] { config.at("names").at(2); }),
         "RUN/state.json: config.names: expected more than 2 items, found 2; ");
  begins(error_of([&] { config.at("names").at("b"); }),
         "RUN/state.json: config.names: expected an object, found an array of 2; ");
  begins(error_of([&] { config.items(); }), "RUN/state.json: config: expected an array, found an object of 4; ");
  begins(error_of([&] { JsonField(json, "f").boolean(); }), "f: expected true or false, found an object of 1; ");
}

TEST_CASE("json: built values, and what JSON cannot say") {
  Json json;
  json["step"] = size_t{5};
  json["on"] = true;
  json["text"] = "t";
  json["shape"] = std::vector<int64_t>{2, 3};
  json["deep"]["x"] = 0.5f;
  json["list"].push_back(json["step"]);
  json["step"] = 6;
  CHECK(json.dump() == R"({"step":6,"on":true,"text":"t","shape":[2,3],"deep":{"x":0.5},"list":[5]})");
  CHECK(json.find("deep")->find("x"));
  CHECK_FALSE(json.find("x"));
  CHECK(has(error_of([&] { json["on"]["x"]; }), "only an object has members"));
  CHECK(has(error_of([] { Json big(~uint64_t{0}); }), "at most 2^63 - 1"));
  CHECK(Json(std::vector<double>{NAN, INFINITY, 1e100}).dump() == "[null,null,1e+100]");
  CHECK(Json("a\xff\xc3").dump() == "\"a\xEF\xBF\xBD\xEF\xBF\xBD\"");
}

TEST_CASE("json: an object of many fields is not slow, and damaged text never gets through changed") {
  Json large = Json::object();
  for (int i = 0; i < 100000; i++) large[str("key ", i)] = i;
  const std::string text = large.dump();
  CHECK(parse_json(text, "x.json") == large);  // minutes, were look-ups linear

  std::mt19937 random(1);
  const std::string whole = R"({"a":[1,-2.5e-3,"x\u00e9\n",{"b":null,"c":true}],"d":"\ud83d\ude00é€"})";
  int refused = 0;
  for (int trial = 0; trial < 20000; trial++) {
    std::string damaged = whole;
    for (uint64_t edits = 1 + random() % 3; edits > 0 && !damaged.empty(); edits--) {
      const size_t at = random() % damaged.size();
      if (random() % 3 == 0) damaged.erase(at, 1 + random() % 4);
      else damaged[at] = static_cast<char>(random());
    }
    try {
      const Json json = parse_json(damaged, "x.json");
      CHECK(parse_json(json.dump(), "x.json") == json);
    } catch (const Error&) {
      refused++;
    }
  }
  CHECK(refused > 10000);
}
