// Text in files to tokens in shards, and stdin to stdout: what the commands tokenize, encode and decode do.
#pragma once
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../dataloader.h"
#include "../runtime/files.h"
#include "../runtime/threads.h"
#include "tokenizer.h"

namespace gca {

// A line on a terminal that says how far some bytes of work are; nothing where stderr is a file or a pipe.
class Progress {
 public:
  Progress(std::string doing, int64_t total_bytes) : doing_(std::move(doing)), total_bytes_(total_bytes), shown_(::isatty(2)) {}
  ~Progress() {
    if (shown_) fputs("\r\x1b[K", stderr);
  }
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  void at(int64_t done_bytes) {
    if (!shown_ || Clock::now() - last_ < std::chrono::milliseconds(200) || done_bytes <= 0) return;
    last_ = Clock::now();
    const double part = static_cast<double>(done_bytes) / static_cast<double>(std::max<int64_t>(1, total_bytes_));
    const int filled = static_cast<int>(30 * std::min(1.0, part));
    const int64_t left = static_cast<int64_t>(seconds() / part * (1 - part) + 0.5);
    fprintf(stderr, "\r%s [%.*s%.*s] %3.0f%%  %.1f MB/s  ETA %lld:%02lld \x1b[K", doing_.c_str(), filled, "##############################", 30 - filled,
            "..............................", 100 * part, static_cast<double>(done_bytes) / 1e6 / seconds(), static_cast<long long>(left / 60), static_cast<long long>(left % 60));
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::string doing_;
  int64_t total_bytes_;
  bool shown_;
  Clock::time_point start_ = Clock::now(), last_ = start_;
};

struct TextFile {
  std::string path;
  int64_t bytes;
  bool val;  // kept for validation
};

// The files that a list of files and folders stands for. A folder stands for all files in it, in sorted order, names that begin
// with a dot left out; those in its subfolder val/ come last and are for validation.
inline std::vector<TextFile> text_files(const std::vector<std::string>& paths) {
  std::vector<TextFile> files;
  const auto add = [&](const std::string& path, bool val) { files.push_back({path, File::open(path).size_bytes(), val}); };
  const std::function<void(const std::string&, bool, int)> walk = [&](const std::string& folder, bool val, int depth) {
    if (depth > 64) throw Error("'" + folder + "' lies more than 64 folders deep: give a folder further down");
    for (const std::string& name : list_folder(folder)) {
      const std::string path = folder + "/" + name;
      if (name[0] == '.' || (depth == 0 && name == "val")) continue;
      if (std::filesystem::is_directory(path))
        walk(path, val, depth + 1);
      else
        add(path, val);
    }
    if (depth == 0 && std::filesystem::is_directory(folder + "/val")) walk(folder + "/val", true, 1);
  };
  for (const std::string& path : paths) {
    if (std::error_code none; std::filesystem::is_directory(path, none))
      walk(path, false, 0);
    else
      add(path, false);
  }
  std::stable_partition(files.begin(), files.end(), [](const TextFile& file) { return !file.val; });
  return files;
}

// Takes text files apart into pieces of about a megabyte, cut where that changes no word.
class TextPieces {
 public:
  struct Piece {
    std::shared_ptr<const File> file;
    int64_t begin, end;  // bytes
    bool val, opens_document;
  };

  // The last val_bytes of all the text go to validation too (the cut may fall inside a file).
  TextPieces(std::vector<TextFile> files, int64_t val_bytes) : files_(std::move(files)) {
    for (const TextFile& file : files_) total_bytes_ += file.bytes;
    val_from_ = total_bytes_ - val_bytes;
  }
  int64_t total_bytes() const { return total_bytes_; }

  // The next pieces, about `bytes` of text together; none at the end.
  std::vector<Piece> next(int64_t bytes) {
    std::vector<Piece> pieces;
    for (; bytes > 0 && file_ < files_.size();) {
      const TextFile& info = files_[file_];
      if (!open_) open_ = std::make_shared<const File>(File::open(info.path));
      const int64_t to_val = val_from_ - file_from_;  // where validation begins in this file
      const bool val = info.val || at_ >= to_val;
      int64_t target = std::min(info.bytes, at_ + piece_bytes);
      if (!val) target = std::min(target, to_val);
      const int64_t end = cut(*open_, target, info.bytes);
      if (end > at_) pieces.push_back({open_, at_, end, val, at_ == 0 || (val && !was_val_)});
      was_val_ = val;
      bytes -= end - at_;
      at_ = end;
      if (at_ == info.bytes) {
        file_from_ += info.bytes;
        file_++;
        at_ = 0;
        open_.reset();
      }
    }
    return pieces;
  }

 private:
  static constexpr int64_t piece_bytes = 1 << 20;

  // The first exact cut at or after `from`.
  int64_t cut(const File& file, int64_t from, int64_t size) const {
    constexpr int64_t context = 8;  // enough for the character before the cut, and for one that straddles two blocks
    char block[4096];
    for (int64_t at = std::max<int64_t>(0, from - context); from < size; at += static_cast<int64_t>(sizeof block) - 2 * context) {
      const int64_t bytes = std::min(size - at, static_cast<int64_t>(sizeof block));
      file.read(block, static_cast<size_t>(bytes), at);
      const char* found = scanner_.next_cut(block, block + std::min(context, from - at), block + bytes);
      if (found < block + bytes) return at + (found - block);
      if (at + bytes == size) break;
      from = at + static_cast<int64_t>(sizeof block) - context;
    }
    return size;
  }

  std::vector<TextFile> files_;
  int64_t total_bytes_ = 0, val_from_;
  WordScanner scanner_;
  size_t file_ = 0;
  std::shared_ptr<const File> open_;
  int64_t file_from_ = 0, at_ = 0;  // where the file begins in the whole text; bytes of it already taken
  bool was_val_ = false;
};

struct TokenizeOptions {
  double val_fraction = 0.01;            // of the text's bytes, from its end; unless a folder has its own val/
  int64_t shard_tokens = 100'000'000;
  bool marked = false;                   // <|endoftext|> in a text begins the next document; else it is text like any other
};
struct TokenizeReport {
  int64_t bytes = 0, documents = 0, train_tokens = 0, val_tokens = 0;
  double seconds = 0;
};

// Writes the shards PREFIX_train_000000.bin ... and PREFIX_val_000000.bin ... of the texts, files or folders as text_files takes
// them: one document a file (empty ones left out), end-of-text before each. On all of the pool's threads; memory does not grow
// with the text, only with its longest run without white space and with a shard. All shards appear at the end, or none.
inline TokenizeReport tokenize_files(const Tokenizer& tokenizer, const std::vector<std::string>& texts, const std::string& prefix,
                                     const TokenizeOptions& options, ThreadPool& pool) {
  std::vector<TextFile> files = text_files(texts);
  int64_t total = 0, val_bytes = 0;
  for (const TextFile& file : files) (file.val ? val_bytes : total) += file.bytes;
  const bool has_val = val_bytes > 0;
  if (total == 0) throw Error(format("no text to train on: the %zu files given are empty; check the paths", files.size()));
  if (!(options.val_fraction >= 0 && options.val_fraction < 1))
    throw UsageError(format("the part kept for validation: expected at least 0 and below 1, found %g", options.val_fraction));
  const int64_t cut_off = has_val ? 0 : static_cast<int64_t>(std::ceil(static_cast<double>(total) * options.val_fraction));
  TextPieces text(std::move(files), cut_off);

  ShardWriter train(prefix + "_train", tokenizer, options.shard_tokens), val(prefix + "_val", tokenizer, options.shard_tokens);
  TokenizeReport report;
  bool opens_document = false;  // an end-of-text token is due before the next token
  const auto write = [&](bool to_val, std::span<const int32_t> ids) {
    ShardWriter& shards = to_val ? val : train;
    while (!ids.empty()) {
      const auto stop = std::find(ids.begin(), ids.end(), tokenizer.end_of_text);
      const auto before = ids.first(static_cast<size_t>(stop - ids.begin()));
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

  // While the threads encode one batch, one of them first writes the batch before and looks for the next.
  std::vector<Encoder> encoders;
  for (int i = 0; i < pool.size(); i++) encoders.emplace_back(tokenizer);
  const int64_t batch_bytes = int64_t{4 << 20} * pool.size();
  using Pieces = std::vector<TextPieces::Piece>;
  Pieces done, now = text.next(batch_bytes), next;
  std::vector<std::vector<int32_t>> done_ids, now_ids;
  Progress progress("tokenizing", text.total_bytes());
  const auto write_done = [&] {
    for (size_t i = 0; i < done.size(); i++) {
      opens_document |= done[i].opens_document;
      write(done[i].val, done_ids[i]);
      report.bytes += done[i].end - done[i].begin;
    }
    progress.at(report.bytes);
  };
  while (!now.empty()) {
    now_ids.assign(now.size(), {});
    pool.run(static_cast<int64_t>(now.size()) + 1, [&](int64_t task, int worker) {
      if (task == 0) {
        write_done();
        next = text.next(batch_bytes);
        return;
      }
      const size_t i = static_cast<size_t>(task - 1);
      std::string piece(static_cast<size_t>(now[i].end - now[i].begin), '\0');
      now[i].file->read(piece.data(), piece.size(), now[i].begin);
      Encoder& encoder = encoders[static_cast<size_t>(worker)];
      options.marked ? encoder.append_marked(piece, now_ids[i]) : encoder.append(piece, now_ids[i]);
    });
    done = std::move(now);
    done_ids = std::move(now_ids);
    now = std::move(next);
  }
  write_done();
  report.train_tokens = train.tokens();
  report.val_tokens = val.tokens();
  if (report.train_tokens == 0 || (report.val_tokens == 0 && (has_val || options.val_fraction > 0)))
    throw Error(format("%lld bytes of text are too short to keep a part (%g) for validation: %lld tokens would be left to train on, %lld to validate; "
                       "give more text, another part, or 0 for no validation",
                       static_cast<long long>(total), options.val_fraction, static_cast<long long>(report.train_tokens), static_cast<long long>(report.val_tokens)));
  train.commit();
  val.commit();
  report.seconds = progress.seconds();
  return report;
}

// Everything that in holds, as ids in one line, spaces between them. Special ids come from no text.
inline void encode_stream(const Tokenizer& tokenizer, FILE* in, FILE* out) {
  Encoder encoder(tokenizer);
  const WordScanner scanner;
  std::vector<int32_t> ids;
  std::string text, line;
  for (bool more = true, first = true; more;) {
    const size_t held = text.size(), wanted = std::max<size_t>(size_t{1} << 20, held);  // a run without a cut doubles
    text.resize(held + wanted);
    const size_t got = fread(text.data() + held, 1, wanted, in);
    if (ferror(in)) throw system_error("cannot read the input", errno);
    text.resize(held + got);
    more = got == wanted;
    const char *begin = text.data(), *end = begin + text.size();
    const size_t ready = more ? static_cast<size_t>(scanner.next_cut(begin, begin + text.size() / 2, end) - begin) : text.size();
    if (more && ready == text.size()) continue;
    ids.clear();
    encoder.append(std::string_view(text).substr(0, ready), ids);
    text.erase(0, ready);
    line.clear();
    for (const int32_t id : ids) {
      if (!first) line += ' ';
      first = false;
      char digits[16];
      line.append(digits, std::to_chars(digits, digits + sizeof digits, id).ptr);
    }
    if (!more) line += '\n';
    if (fwrite(line.data(), 1, line.size(), out) != line.size()) throw system_error("cannot write the output", errno);
  }
  if (fflush(out)) throw system_error("cannot write the output", errno);
}

// The bytes of the ids that in holds as decimal numbers with white space between them; special ids as their names.
inline void decode_stream(const Tokenizer& tokenizer, FILE* in, FILE* out) {
  std::string block(size_t{1} << 16, '\0'), word, text;
  std::vector<int32_t> ids;
  int64_t count = 0;
  const auto take_word = [&] {
    if (word.empty()) return;
    int32_t id = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (error != std::errc() || end != word.data() + word.size())
      throw Error(format("input, number %lld: expected a token id, found '%s'; ids are decimal numbers with spaces between them", static_cast<long long>(count + 1),
                         printable(std::string_view(word).substr(0, 40)).c_str()));
    ids.push_back(id);
    count++;
    word.clear();
  };
  for (size_t got = block.size(); got == block.size();) {
    got = fread(block.data(), 1, block.size(), in);
    if (ferror(in)) throw system_error("cannot read the input", errno);
    for (size_t i = 0; i < got; i++) {
      const char c = block[i];
      if (c == ' ' || (c >= '\t' && c <= '\r'))
        take_word();
      else if (word.size() < 64)
        word += c;
    }
    if (got < block.size()) take_word();
    text.clear();
    tokenizer.decode(ids, text);
    ids.clear();
    if (fwrite(text.data(), 1, text.size(), out) != text.size()) throw system_error("cannot write the output", errno);
  }
  if (fflush(out)) throw system_error("cannot write the output", errno);
}

}  // namespace gca
