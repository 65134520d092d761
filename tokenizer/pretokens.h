// GPT-2's pre-tokenisation by hand: where a word ends, in any bytes. The pattern is
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// and a byte that is no part of valid UTF-8 counts as one character of the class other.
#pragma once
#include <cstdint>

namespace gca {

class WordScanner {
 public:
  WordScanner();

  // The end of the word that starts at p. Needs p < end. Reads nothing outside [p, end).
  const char* word_end(const char* p, const char* end) const;

  // The first place in [p, end) where the text may be cut without changing its words, p itself included if the text
  // goes on before it (`begin` is where it starts): before white space that follows anything else. `end` if there is
  // none.
  const char* next_cut(const char* begin, const char* p, const char* end) const;

 private:
  const uint8_t* classes_;  // of every code point, as unicode_classes.h numbers them
};

}  // namespace gca
