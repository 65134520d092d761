// The first words between two ranks, byte by byte: fixed sizes, so that nothing that comes from outside decides how
// much is read.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

namespace gca {

enum class Line : uint32_t { control, data };

struct Hello {
  static constexpr char expected[9] = "GCARANK1";
  char magic[8] = {};
  Line line = Line::control;
  int32_t rank = 0, size = 0, process = 0;
  uint64_t job = 0;     // hash of World::job
  char host[104] = {};  // ends in a zero
  bool is_ours() const { return memcmp(magic, expected, sizeof magic) == 0; }
};
static_assert(sizeof(Hello) == 136);

struct Answer {
  static constexpr char expected[9] = "GCAANSW1";
  char magic[8] = {};
  uint32_t accepted = 0;
  char reason[500] = {};  // where it is not; ends in a zero
  bool is_ours() const { return memcmp(magic, expected, sizeof magic) == 0; }
};
static_assert(sizeof(Answer) == 512);

// text into a field of that many bytes, cut where it is longer, a zero at the end.
template <size_t n>
void put_text(char (&field)[n], const std::string& text) {
  memset(field, 0, n);
  memcpy(field, text.data(), text.size() < n ? text.size() : n - 1);
}
template <size_t n>
std::string text_of(const char (&field)[n]) {
  return std::string(field, strnlen(field, n));
}

// What follows on the control line: a head and so many bytes.
struct ControlHead {
  enum Kind : uint32_t { beat, failure };
  static constexpr uint32_t expected = 0x47434142, most_bytes = 4096;
  uint32_t magic = expected, kind = beat, bytes = 0;
};
struct Beat {
  uint64_t progress;
  uint32_t doing, waits;
};
// ... and on the data line, before each transfer.
struct TransferHead {
  static constexpr uint32_t expected = 0x47434144;
  uint32_t magic = expected;
  int32_t number = 0;  // of the transfers of this pair
  int64_t bytes = 0;
};

}  // namespace gca
