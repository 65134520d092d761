// Text for people: UTF-8, what may go to a terminal, near misses of a name, lists, sizes, durations; bytes as text.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common.h"

namespace gca {

// The length in bytes (1 to 4) of the UTF-8 character that text starts with; 0 if there is none or it is malformed
// (overlong, a surrogate, past U+10FFFF, cut off).
size_t utf8_length(std::string_view text);

// Bytes as a person may see them on a terminal: control characters and whatever is not UTF-8 as \n, \t, \r or \xNN.
// keep_lines: newlines and tabs stay.
std::string printable(std::string_view text, bool keep_lines = false);

// Where the character begins that a cut at `at` would part; `at` itself where it parts none. So pieces of a text that
// are cut there each have whole characters, and one that lies over a seam is the later piece's.
size_t before_parted_character(std::string_view text, size_t at);

// How many columns printable text takes on a terminal: marks none, East Asian wide characters and emoji two.
size_t columns(std::string_view text);
// As much of printable text as has room in so many columns, in whole characters.
std::string first_columns(std::string_view text, size_t count);
// The text with spaces after it, in a table: `count` columns at least.
std::string padded(std::string_view text, size_t count);

// Text that comes in pieces, cut anywhere: given on in whole characters.
class WholeCharacters {
 public:
  // What there is to give on once `piece` has come: all but a character that may still be completed.
  std::string take(std::string_view piece);
  // What was held back to the end.
  std::string rest() { return std::exchange(held_, {}); }

 private:
  std::string held_;
};

// The number of single-character edits from a to b, at most.
size_t edit_distance(const std::string& a, const std::string& b);

// ", did you mean X?" for the nearest of the names, or nothing if none is near.
std::string did_you_mean(const std::string& found, const std::vector<std::string>& names);

// Bytes as printable characters (RFC 4648, with padding), and back; an Error that begins with `what` where the text is
// no such.
std::string base64(std::string_view bytes);
std::string from_base64(std::string_view text, const std::string& what);

std::string comma_list(const std::vector<int64_t>& numbers);

std::string mebibytes(int64_t n_bytes);

std::string duration(double seconds);

}  // namespace gca
