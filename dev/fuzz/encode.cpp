// libFuzzer: any bytes, with merges that the first of them choose, come back from encode and decode as they were, in pieces too.
// clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined dev/fuzz/encode.cpp
#include "../../tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  std::string_view text(reinterpret_cast<const char*>(data), size);
  std::vector<Tokenizer::Merge> merges;
  for (size_t count = size ? data[0] : 0; count > 0 && text.size() > 2; count--, text.remove_prefix(2))
    merges.push_back({static_cast<unsigned char>(text[0]) % static_cast<uint32_t>(256 + merges.size()), static_cast<unsigned char>(text[1])});
  try {
    const Tokenizer tokenizer(merges);
    const std::vector<int32_t> ids = tokenizer.encode(text);
    if (tokenizer.decode(ids) != text) __builtin_trap();
    const char *begin = text.data(), *end = begin + text.size(), *cut = WordScanner().next_cut(begin, begin + text.size() / 2, end);
    std::vector<int32_t> pieces;
    Encoder encoder(tokenizer);
    encoder.append(std::string_view(begin, static_cast<size_t>(cut - begin)), pieces);
    encoder.append(std::string_view(cut, static_cast<size_t>(end - cut)), pieces);
    if (pieces != ids) __builtin_trap();
  } catch (const Error&) {  // a pair twice
  }
  return 0;
}
