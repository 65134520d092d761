// libFuzzer: any bytes as a tokenizer's file, of ours or a small one of GPT-2's form, are refused with an Error, or are
// one that writes itself as it was read. clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined
// dev/fuzz/vocabulary.cpp
#include "tokenizer/tokenizer.h"

// The entries of the 256 bytes, as tokenizer.json writes them.
static std::string gpt2_bytes() {
  std::string entries;
  int id = 0, moved = 0x100;
  for (const bool prints : {true, false})
    for (int byte = 0; byte < 256; byte++)
      if (((byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173)) == prints) {
        entries += gca::str(id ? "," : "", "\"\\u", gca::hex(prints ? byte : moved++, 4), "\":", id);
        id++;
      }
  return entries;
}

// The bytes' entries are long: an input that begins with 'v' has '@' where they go.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  static const std::string bytes = gpt2_bytes();
  std::string file(reinterpret_cast<const char*>(data), size);
  if (size && data[0] == 'v') {
    file.erase(0, 1);
    if (const size_t at = file.find('@'); at != file.npos) file.replace(at, 1, bytes);
  }
  try {
    const Tokenizer tokenizer = Tokenizer::parse(file, "the input", 3);
    if (Tokenizer::parse(tokenizer.serialize(), "its copy").hash() != tokenizer.hash()) __builtin_trap();
  } catch (const Error&) {}
  return 0;
}
