// libFuzzer: any bytes as a shard are refused with an Error, or give rows of ids inside the vocabulary.
// clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined dev/fuzz/shard.cpp
#include <sys/mman.h>

#include "../../dataloader.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  static const Tokenizer tokenizer = Tokenizer::load("bytes");
  const int fd = memfd_create("shard", 0);
  if (fd < 0 || ::write(fd, data, size) != static_cast<ssize_t>(size)) return 0;
  try {
    const TokenStream stream(format("/proc/self/fd/%d", fd), tokenizer);
    for (const bool cross : {true, false}) {
      const Rows rows(stream, tokenizer, 2, 4, 1, cross);
      for (int64_t w = 0; w < rows.count(); w++) {
        int32_t tokens[8], targets[8];
        rows.fill_window(w, tokens, targets);
        for (int i = 0; i < 8; i++)
          if (tokens[i] < 0 || tokens[i] >= tokenizer.vocab_size() || targets[i] >= tokenizer.vocab_size() || (targets[i] < 0 && targets[i] != no_target)) __builtin_trap();
      }
    }
  } catch (const Error&) {
  }
  ::close(fd);
  return 0;
}
