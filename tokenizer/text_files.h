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

#include "base/files.h"
#include "base/progress.h"
#include "base/threads.h"
#include "tokenizer/tokenizer.h"

namespace gca {

struct TextFile {
  std::string path;
  int64_t bytes;
  bool val;  // kept for validation
};

struct TextFiles {
  std::vector<TextFile> files;
  std::string left_out;  // what the user should be told: how many were, by reason; empty if none
};

// The files that a list of files and folders stands for, each once whatever links and names lead to it. A folder stands
// for all files in it, in sorted order, names that begin with a dot left out; those in its subfolder val/ come last and
// are for validation, and for nothing else. Left out are files that are no text: packed, UTF-16, with zero bytes at
// their beginning, pointers of Git LFS; and links that lead to nothing, or back.
TextFiles text_files(const std::vector<std::string>& paths);

// The content of a text file that was asked for by name; an Error that says what it is where it is no text.
std::string read_text(const std::string& path);

// Takes text files apart into pieces of about a megabyte, cut where that changes no word, for all threads to work on.
// Where that is nowhere in four megabytes (a genome, base64) the cut is between two characters, so that memory stays
// bounded.
class TextPieces {
 public:
  struct Piece {
    const TextFile* file;
    int64_t begin, end;  // bytes
    bool val, opens_document;
  };

  // The last val_bytes of all the text go to validation too (the cut may fall inside a file; in text without white
  // space for 4 KiB, inside a word).
  TextPieces(std::vector<TextFile> files, int64_t val_bytes);
  int64_t total_bytes() const { return total_bytes_; }

  // Calls work(text, result, worker) for the text of every piece, on the pool's threads, and collect(piece, result) for
  // every piece in order, one at a time. Result: what a piece is made into; it may point into the text. Returns the
  // seconds that it took.
  template <class Result, class Work, class Collect>
  double run(ThreadPool& pool, const char* doing, Work&& work, Collect&& collect) {
    struct Item {
      Piece piece;
      std::string text;
      Result result;
    };
    std::vector<Item> done, now, next;
    int64_t done_bytes = 0;
    Progress progress(doing, total_bytes_, "MB", 1e6);
    do {
      next.clear();
      // While the threads work on one batch, one of them first collects the batch before and looks for the next.
      pool.run(static_cast<int64_t>(now.size()) + 1, [&](int64_t task, int worker) {
        if (task == 0) {
          for (Item& item : done) {
            collect(item.piece, item.result);
            progress.at(done_bytes += item.piece.end - item.piece.begin);
          }
          for (Piece& piece : next_batch(pool.size() * 4 * piece_bytes)) next.push_back({std::move(piece), {}, {}});
          return;
        }
        Item& item = now[task - 1];
        item.text.resize(item.piece.end - item.piece.begin);
        File::open(item.piece.file->path).read(item.text.data(), item.text.size(), item.piece.begin);
        work(item.text, item.result, worker);
      });
      done = std::move(now);
      now = std::move(next);
    } while (!done.empty() || !now.empty());
    return progress.seconds();
  }

 private:
  std::vector<Piece> next_batch(int64_t bytes);

  static constexpr int64_t piece_bytes = 1 << 20;

  int64_t cut(const TextFile& info, int64_t from, int64_t reach) const;

  std::vector<TextFile> files_;
  int64_t total_bytes_ = 0, val_from_;
  WordScanner scanner_;
  size_t file_ = 0;
  int64_t file_from_ = 0, at_ = 0;  // where the file begins in the whole text; bytes of it already taken
  bool was_val_ = false;
};

// Everything that in holds, as ids in one line, spaces between them. Special ids come from no text.
void encode_stream(const Tokenizer& tokenizer, FILE* in, FILE* out);

// The bytes of the ids that in holds as decimal numbers with white space between them; special ids as their names.
void decode_stream(const Tokenizer& tokenizer, FILE* in, FILE* out);

}  // namespace gca
