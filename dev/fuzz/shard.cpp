// libFuzzer: any bytes as a shard are refused with an Error, or give rows of ids inside the vocabulary.
// clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined dev/fuzz/shard.cpp
#include <sys/mman.h>

#include "dataloader.h"

// Most of a header is zeros: an input that begins with 'z' leaves out those after its first 20 bytes.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  static const Tokenizer tokenizer = Tokenizer::load("bytes");
  static const int fd = memfd_create("shard", 0);
  static const std::string path = str("/proc/self/fd/", fd);
  std::string file(reinterpret_cast<const char*>(data), size);
  if (size && data[0] == 'z') {
    file.erase(0, 1);
    if (file.size() > 20) file.insert(20, ShardHeader::bytes - 20, '\0');
  }
  if (::ftruncate(fd, static_cast<off_t>(file.size())) ||
      ::pwrite(fd, file.data(), file.size(), 0) != static_cast<ssize_t>(file.size()))
    abort();
  try {
    const TokenStream stream(path, tokenizer);
    for (const bool cross : {true, false}) {
      const Rows rows(stream, tokenizer, 2, 4, 1, cross);
      for (int64_t w = 0; w < rows.count(); w++) {
        int32_t tokens[8], targets[8];
        rows.fill_window(w, tokens, targets);
        for (int i = 0; i < 8; i++)
          if (tokens[i] < 0 || tokens[i] >= tokenizer.vocab_size() || targets[i] >= tokenizer.vocab_size() ||
              (targets[i] < 0 && targets[i] != no_target))
            __builtin_trap();
      }
    }
  } catch (const Error&) {}
  return 0;
}
