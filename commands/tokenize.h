// Text files to token shards.
#pragma once
#include <string>
#include <vector>

#include "dataloader.h"
#include "tokenizer/text_files.h"

namespace gca {

struct TokenizeOptions {
  double val_fraction = 0.01;  // of the text's bytes, from its end; unless a folder has its own val/
  int64_t shard_tokens = 100'000'000;
  bool marked = false;  // <|endoftext|> in a text begins the next document; else it is text like any other
};
struct TokenizeReport {
  int64_t bytes = 0, documents = 0, train_tokens = 0, val_tokens = 0;
  double seconds = 0;
  std::string left_out;  // of the files, as text_files says it
};

// Writes the shards PREFIX_train_000000.bin ... and PREFIX_val_000000.bin ... of the texts, files or folders as
// text_files takes them: one document a file (empty ones left out), end-of-text before each. On all of the pool's
// threads; memory does not grow with the text, only with a shard. All
// shards appear at the end, or none.
TokenizeReport tokenize_files(const Tokenizer& tokenizer, const std::vector<std::string>& texts,
                              const std::string& prefix, const TokenizeOptions& options, ThreadPool& pool);

}  // namespace gca
