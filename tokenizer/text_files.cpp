// Text files of a folder or pattern, in order, as documents.
#include "tokenizer/text_files.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/progress.h"
#include "base/threads.h"
#include "tokenizer/tokenizer.h"

namespace gca {

std::vector<TextFile> text_files(const std::vector<std::string>& paths) {
  std::vector<TextFile> files;
  const auto add = [&](const std::string& path, bool val) {
    files.push_back({path, File::open(path).size_bytes(), val});
  };
  const std::function<void(const std::string&, bool, int)> walk = [&](const std::string& folder, bool val, int depth) {
    if (depth > 64) throw Error("'" + folder + "' lies more than 64 folders deep: give a folder further down");
    for (const std::string& name : list_folder(folder)) {
      const std::string path = folder + "/" + name;
      if (name[0] == '.' || (depth == 0 && name == "val")) continue;
      if (std::filesystem::is_directory(path)) walk(path, val, depth + 1);
      else add(path, val);
    }
    if (depth == 0 && std::filesystem::is_directory(folder + "/val")) walk(folder + "/val", true, 1);
  };
  for (const std::string& path : paths) {
    if (std::error_code none; std::filesystem::is_directory(path, none)) walk(path, false, 0);
    else add(path, false);
  }
  std::stable_partition(files.begin(), files.end(), [](const TextFile& file) { return !file.val; });
  return files;
}

TextPieces::TextPieces(std::vector<TextFile> files, int64_t val_bytes) : files_(std::move(files)) {
  for (const TextFile& file : files_) total_bytes_ += file.bytes;
  val_from_ = total_bytes_ - val_bytes;
}

// The next pieces, about `bytes` of text together; none at the end.
std::vector<TextPieces::Piece> TextPieces::next_batch(int64_t bytes) {
  std::vector<Piece> pieces;
  while (bytes > 0 && file_ < files_.size()) {
    const TextFile& file = files_[file_];
    const int64_t to_val = val_from_ - file_from_;  // where validation begins in this file
    const bool val = file.val || at_ >= to_val;
    const int64_t end = cut(file, std::min({file.bytes, at_ + piece_bytes, val ? file.bytes : to_val}));
    if (end > at_) pieces.push_back({&file, at_, end, val, at_ == 0 || (val && !was_val_)});
    was_val_ = val;
    bytes -= end - at_;
    at_ = end;
    if (at_ == file.bytes) {
      file_from_ += file.bytes;
      file_++;
      at_ = 0;
    }
  }
  return pieces;
}

// The first exact cut of the file at or after `from`.
int64_t TextPieces::cut(const TextFile& info, int64_t from) const {
  if (from == info.bytes) return from;
  constexpr int64_t context = 8;  // enough for the character before the cut, and for one that straddles two blocks
  char block[4096];
  const File file = File::open(info.path);
  for (int64_t at = std::max<int64_t>(0, from - context);; at = from - context) {
    const int64_t bytes = std::min(info.bytes - at, static_cast<int64_t>(sizeof block));
    file.read(block, static_cast<size_t>(bytes), at);
    const char* found = scanner_.next_cut(block, block + (from - at), block + bytes);
    if (found < block + bytes) return at + (found - block);
    if (at + bytes == info.bytes) return info.bytes;
    from = at + bytes - context;
  }
}

void encode_stream(const Tokenizer& tokenizer, FILE* in, FILE* out) {
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
    const size_t ready =
        more ? static_cast<size_t>(scanner.next_cut(begin, begin + text.size() / 2, end) - begin) : text.size();
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

void decode_stream(const Tokenizer& tokenizer, FILE* in, FILE* out) {
  char word[24];
  std::string text;
  for (int64_t count = 1;; count++) {
    const bool more = fscanf(in, "%23s", word) == 1;
    if (ferror(in)) throw system_error("cannot read the input", errno);
    if (!more || text.size() > 65536) {
      if (fwrite(text.data(), 1, text.size(), out) != text.size()) throw system_error("cannot write the output", errno);
      text.clear();
    }
    if (!more) break;
    int32_t id = 0;
    const char* end = word + strlen(word);
    if (const auto [stop, error] = std::from_chars(word, end, id); error != std::errc() || stop != end)
      throw Error(str("input, number ", count, ": expected a token id, found '", printable(word),
                      "'; ids are decimal numbers with spaces between them"));
    tokenizer.decode(std::span(&id, 1), text);
  }
  if (fflush(out)) throw system_error("cannot write the output", errno);
}

}  // namespace gca
