// Text files to token shards.
#pragma once
#include <cmath>
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
};

// Writes the shards PREFIX_train_000000.bin ... and PREFIX_val_000000.bin ... of the texts, files or folders as
// text_files takes them: one document a file (empty ones left out), end-of-text before each. On all of the pool's
// threads; memory does not grow with the text, only with its longest run without white space and with a shard. All
// shards appear at the end, or none.
inline TokenizeReport tokenize_files(const Tokenizer& tokenizer, const std::vector<std::string>& texts,
                                     const std::string& prefix, const TokenizeOptions& options, ThreadPool& pool) {
  std::vector<TextFile> files = text_files(texts);
  int64_t total = 0, val_bytes = 0;
  for (const TextFile& file : files) (file.val ? val_bytes : total) += file.bytes;
  const bool has_val = val_bytes > 0;
  if (total == 0)
    throw Error(str("no text to train on: the ", files.size(), " files given are empty; check the paths"));
  if (!(options.val_fraction >= 0 && options.val_fraction < 1))
    throw UsageError(
        str("the part kept for validation: expected at least 0 and below 1, found ", options.val_fraction));
  const int64_t cut_off =
      has_val ? 0 : static_cast<int64_t>(std::ceil(static_cast<double>(total) * options.val_fraction));
  TextPieces text(std::move(files), cut_off);

  ShardWriter train(prefix + "_train", tokenizer, options.shard_tokens),
      val(prefix + "_val", tokenizer, options.shard_tokens);
  TokenizeReport report;
  bool opens_document = false;  // an end-of-text token is due before the next token
  const auto write = [&](ShardWriter& shards, std::span<const int32_t> ids) {
    while (!ids.empty()) {
      const auto stop = std::find(ids.begin(), ids.end(), tokenizer.end_of_text);
      const auto before = ids.first(stop - ids.begin());
      if (!before.empty()) {
        if (opens_document) {
          shards.append(std::span(&tokenizer.end_of_text, 1));
          report.documents++;
        }
        shards.append(before);
        opens_document = false;
      }
      if (stop != ids.end()) opens_document = true;
      ids = ids.subspan(before.size() + (stop != ids.end()));
    }
  };

  std::vector<Encoder> encoders;
  for (int i = 0; i < pool.size(); i++) encoders.emplace_back(tokenizer);
  report.seconds = text.run<std::vector<int32_t>>(
      pool, "tokenizing",
      [&](const std::string& piece, std::vector<int32_t>& ids, int worker) {
        Encoder& encoder = encoders[worker];
        options.marked ? encoder.append_marked(piece, ids) : encoder.append(piece, ids);
      },
      [&](const TextPieces::Piece& piece, const std::vector<int32_t>& ids) {
        opens_document |= piece.opens_document;
        write(piece.val ? val : train, ids);
        report.bytes += piece.end - piece.begin;
      });
  report.train_tokens = train.tokens();
  report.val_tokens = val.tokens();
  if (report.train_tokens == 0 || (report.val_tokens == 0 && (has_val || options.val_fraction > 0)))
    throw Error(str(total, " bytes of text are too short to keep a part (", options.val_fraction,
                    ") for validation: ", report.train_tokens, " tokens would be left to train on, ", report.val_tokens,
                    " to validate; give more text, another part, or 0 for no validation"));
  train.commit();
  val.commit();
  return report;
}

}  // namespace gca
