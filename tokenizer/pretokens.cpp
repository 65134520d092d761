// Words, numbers and spaces as GPT-2 cuts them before merging: where a pre-token ends.
#include "tokenizer/pretokens.h"

#include <array>
#include <bit>
#include <cstring>
#include <string_view>
#include <vector>

#include "tokenizer/unicode_classes.h"

namespace gca {

namespace {

struct Char {
  unicode::Class kind;
  uint32_t length;
};

// What a first byte says: how long its character is, in [low, low + span] of what the second byte must be, and the
// class where it is not: of ASCII's characters, which are followed by none such, and of bytes that are no part of
// valid UTF-8.
struct Lead {
  uint16_t low;
  uint8_t span, length;
  unicode::Class alone;
};
const auto leads = [] {
  std::array<Lead, 256> table{};
  for (uint32_t byte = 0; byte < 256; byte++) {
    table[byte] = {0x100, 0, 1, unicode::other};
    for (const unicode::Range* range = unicode::ranges; range->first < 0x80; range++)
      if (byte >= range->first && byte <= range->last && byte < 0x80) table[byte].alone = range->kind;
    if (byte >= 0xC2 && byte < 0xF5)
      table[byte] = {0x80, 0x3F, static_cast<uint8_t>(byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4), unicode::other};
  }
  table[0xE0].low = 0xA0;
  table[0xE0].span = 0x1F;  // not overlong
  table[0xED].span = 0x1F;  // no surrogate
  table[0xF0].low = 0x90;
  table[0xF0].span = 0x2F;  // not overlong
  table[0xF4].span = 0x0F;  // not past U+10FFFF
  return table;
}();

// One byte a code point, so that a lookup is one load; pages of unassigned code points are never touched. Made at the
// first use: as a constant expression it cost every unit that saw it three seconds of compilation.
const uint8_t* class_table() {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> classes(0x110000, unicode::other);
    for (const unicode::Range& range : unicode::ranges)
      for (uint32_t code = range.first; code <= range.last; code++) classes[code] = range.kind;
    return classes;
  }();
  return table.data();
}

Char char_at(const uint8_t* classes, const char* p, const char* end) {
  const auto byte = [p](int i) { return static_cast<uint32_t>(static_cast<unsigned char>(p[i])); };
  const Lead lead = leads[byte(0)];
  if ((end - p > 1 ? byte(1) : 0) - lead.low > lead.span || end - p < lead.length) return {lead.alone, 1};
  uint32_t code = (byte(0) & (0x7Fu >> lead.length)) << 6 | (byte(1) & 0x3F);
  for (int i = 2; i < lead.length; i++) {
    if ((byte(i) & 0xC0) != 0x80) return {unicode::other, 1};
    code = code << 6 | (byte(i) & 0x3F);
  }
  return {static_cast<unicode::Class>(classes[code]), lead.length};
}

const char* run_end(const uint8_t* classes, const char* p, const char* end, unicode::Class kind) {
  while (p < end) {
    const Char c = char_at(classes, p, end);
    if (c.kind != kind) break;
    p += c.length;
  }
  return p;
}

// How many of the eight bytes at p, from the first on, are ASCII letters.
int leading_letters(const char* p) {
  constexpr uint64_t ones = 0x0101010101010101, high = 0x80 * ones;
  uint64_t word;
  memcpy(&word, p, 8);
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  const uint64_t lower = (word | 0x20 * ones) & ~high;
  const uint64_t from_a = lower + (0x80 - 'a') * ones,
                 past_z = lower + (0x80 - 'z' - 1) * ones;  // no sum leaves its byte
  return std::countr_zero(~(from_a & ~past_z & ~word) & high) / 8;
}

// run_end for letters, eight ASCII letters at a time.
const char* letters_end(const uint8_t* classes, const char* p, const char* end) {
  for (;;) {
    while (end - p >= 8) {
      const int ascii = leading_letters(p);
      p += ascii;
      if (ascii < 8) break;
    }
    if (p == end) return p;
    const Char c = char_at(classes, p, end);
    if (c.kind != unicode::letter) return p;
    p += c.length;
  }
}

size_t contraction(const char* p, const char* end) {
  if (end - p < 2) return 0;
  if (p[1] == 's' || p[1] == 't' || p[1] == 'm' || p[1] == 'd') return 2;
  if (end - p < 3) return 0;
  return (p[1] == 'r' && p[2] == 'e') || (p[1] == 'v' && p[2] == 'e') || (p[1] == 'l' && p[2] == 'l') ? 3 : 0;
}

}  // namespace

WordScanner::WordScanner() : classes_(class_table()) {}

const char* WordScanner::word_end(const char* p, const char* end) const {
  const char* run = p + (*p == ' ' && p + 1 < end);  // the one space that a run of a kind may open with
  const Char first = char_at(classes_, run, end);
  if (first.kind == unicode::letter) return letters_end(classes_, run + first.length, end);
  if (first.kind != unicode::space) {
    if (*p == '\'')
      if (const size_t length = contraction(p, end)) return p + length;
    return run_end(classes_, run + first.length, end, first.kind);
  }
  // White space up to the end of the text is one word. Before anything else its last character is left for what
  // follows, unless it is the only one.
  const char* last = p;
  for (const char* q = p;;) {
    const Char c = char_at(classes_, q, end);
    if (c.kind != unicode::space) return last == p ? q : last;
    if (q + c.length == end) return end;
    last = q;
    q += c.length;
  }
}

const char* WordScanner::next_cut(const char* begin, const char* p, const char* end) const {
  for (; p < end; p++) {
    if (p == begin || (static_cast<unsigned char>(*p) & 0xC0) == 0x80 ||
        char_at(classes_, p, end).kind != unicode::space)
      continue;
    const char* before = p - 1;
    for (int back = 0; back < 3 && before > begin && (static_cast<unsigned char>(*before) & 0xC0) == 0x80; back++)
      before--;
    const Char c = char_at(classes_, before, p);
    if (before + c.length != p || c.kind != unicode::space) return p;
  }
  return end;
}

}  // namespace gca
