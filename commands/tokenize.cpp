// The commands tokenizer-train, tokenize, encode, decode: text to tokens and back.
#include "commands/tokenize.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <span>
#include <utility>

#include "commands/commands.h"
#include "commands/shared.h"
#include "tokenizer/train.h"

namespace gca {

TokenizeReport tokenize_files(const Tokenizer& tokenizer, const std::vector<std::string>& texts,
                              const std::string& prefix, const TokenizeOptions& options, ThreadPool& pool) {
  auto [files, left_out] = text_files(texts);
  int64_t total = 0, val_bytes = 0;
  for (const TextFile& file : files) (file.val ? val_bytes : total) += file.bytes;
  const bool has_val = val_bytes > 0;
  if (total == 0)
    throw Error(str("no text to train on: the ", files.size(), " files given are empty",
                    left_out.empty() ? "" : "; " + left_out, "; check the paths"));
  if (!(options.val_fraction >= 0 && options.val_fraction < 1))
    throw UsageError(
        str("the part kept for validation: expected at least 0 and below 1, found ", options.val_fraction));
  const int64_t cut_off =
      has_val ? 0 : static_cast<int64_t>(std::ceil(static_cast<double>(total) * options.val_fraction));
  TextPieces text(std::move(files), cut_off);

  ShardWriter train(prefix + "_train", tokenizer, options.shard_tokens),
      val(prefix + "_val", tokenizer, options.shard_tokens);
  TokenizeReport report;
  report.left_out = left_out;
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
                    " to validate (the cut is at white space); give more text, another part, or 0 for no validation"));
  ShardWriter::commit({&train, &val});
  return report;
}

int tokenizer_train_command(const std::vector<std::string>& arguments) {
  std::vector<std::string> texts;
  std::string out;
  int64_t vocab_size = 0, threads = 0;
  bool marked = false;
  Flags flags(
      "tokenizer-train",
      "Learns a byte-level BPE from text files, or folders of them (less their val/). Text is read in pieces; what is "
      "held are the distinct words\n"
      "  and their counts, the rarest forgotten when there are too many: at most about 2 GiB for any amount of text.");
  flags.add_rest(texts, "TEXT...", true);
  flags.add("vocab-size", vocab_size, 0, INT32_MAX, "tokens, the 256 bytes among them; seven special ids come on top");
  flags.add("out", out, "FILE", "the tokenizer, a new file");
  flags.add_switch("marked", marked, "<|endoftext|> in a text parts documents: nothing of it gets into the vocabulary");
  flags.add("threads", threads, 0, 4096, "0: one a processor");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("out");
  if (!flags.given("vocab-size"))
    throw UsageError("tokenizer-train needs --vocab-size N: how many tokens to learn, the 256 bytes among them");
  if (std::error_code none; std::filesystem::exists(out, none))
    throw Error("'" + out +
                "' is there already: remove it or choose another name; shards and checkpoints may belong to it");
  if (const std::string folder = parent_folder(out); !folder.empty()) make_folder(folder);
  ThreadPool pool(static_cast<int>(threads));
  TrainReport report;
  const Tokenizer tokenizer = train_tokenizer(texts, vocab_size, marked, pool, &report);
  tokenizer.save(out);
  if (!report.left_out.empty()) print_error(report.left_out, "\n");
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  print(report.documents, " documents, ", report.bytes, " bytes, ", report.distinct_words, " distinct words (",
        report.forgotten_words, " rare ones forgotten): ", vocab_size - 256, " merges, V = ", tokenizer.vocab_size(),
        " with the special ids, ", fixed(report.seconds, 1), " s, ", usage.ru_maxrss / 1024, " MiB of memory\n");
  return 0;
}

int tokenize_command(const std::vector<std::string>& arguments) {
  std::vector<std::string> texts;
  std::string name = "bytes", out;
  int64_t threads = 0;
  TokenizeOptions options;
  Flags flags(
      "tokenize",
      "Text files, or folders of them, to shards OUT_train_000000.bin ..., OUT_val_000000.bin ...: one "
      "document a file,\n"
      "  each file once whatever links lead to it; what is not text (packed, UTF-16, zero bytes) is left out and "
      "counted.");
  flags.add_rest(texts, "TEXT...", true);
  flags.add("tokenizer", name, "FILE", Tokenizer::accepted);
  flags.add("out", out, "PREFIX", "of the shards' names");
  flags.add("val", options.val_fraction, 0, 0.999,
            "part of the text, from its end, for validation; a folder's val/ goes before it");
  flags.add("shard-tokens", options.shard_tokens, 1, ShardHeader::max_tokens, "tokens a shard");
  flags.add_switch("marked", options.marked, "<|endoftext|> in a text begins the next document");
  flags.add("threads", threads, 0, 4096, "0: one a processor");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("out");
  const Tokenizer tokenizer = Tokenizer::load(name);
  if (const std::string folder = parent_folder(out); !folder.empty()) make_folder(folder);
  ThreadPool pool(static_cast<int>(threads));
  const TokenizeReport report = tokenize_files(tokenizer, texts, out, options, pool);
  if (!report.left_out.empty()) print_error(report.left_out, "\n");
  const int64_t tokens = report.train_tokens + report.val_tokens;
  print(report.documents, " documents, ", report.bytes, " bytes: ", report.train_tokens, " tokens to train, ",
        report.val_tokens, " to validate, ",
        fixed(static_cast<double>(report.bytes) / static_cast<double>(std::max<int64_t>(1, tokens)), 3),
        " bytes a token, ", fixed(static_cast<double>(report.bytes) / 1e6 / std::max(report.seconds, 1e-9), 1),
        " MB/s\n");
  return 0;
}

// encode and decode: the one flag, then standard input to standard output.
int filter_command(const std::vector<std::string>& arguments, const char* name, const char* summary,
                   void (*filter)(const Tokenizer&, FILE*, FILE*)) {
  std::string tokenizer = "bytes";
  Flags flags(name, summary);
  flags.add("tokenizer", tokenizer, "FILE", Tokenizer::accepted);
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  filter(Tokenizer::load(tokenizer), stdin, stdout);
  return 0;
}
int encode_command(const std::vector<std::string>& arguments) {
  return filter_command(arguments, "encode", "Bytes on standard input to token ids: one line, spaces between.",
                        encode_stream);
}
int decode_command(const std::vector<std::string>& arguments) {
  return filter_command(arguments, "decode",
                        "Token ids on standard input to the bytes they stand for; special ids to their names.",
                        decode_stream);
}

}  // namespace gca
