// libFuzzer: any bytes as a tokenizer's file are refused with an Error, or are one that writes itself as it was read.
// clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined dev/fuzz/vocabulary.cpp
#include "../../tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  try {
    const Tokenizer tokenizer = Tokenizer::parse(std::string_view(reinterpret_cast<const char*>(data), size), "the input");
    if (Tokenizer::parse(tokenizer.serialize(), "its copy").hash() != tokenizer.hash()) __builtin_trap();
  } catch (const Error&) {
  }
  return 0;
}
