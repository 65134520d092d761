// Text files of a folder or pattern, in order, as documents.
#include "tokenizer/text_files.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/foreign.h"
#include "base/text.h"
#include "tokenizer/tokenizer.h"

namespace gca {

namespace {

constexpr int64_t longest_run = 4 << 20;  // of text without a place to cut; a longer one is cut between two characters

// The first place at or after `at` that parts neither a character nor a marker.
size_t forced_cut(std::string_view text, size_t at) {
  if (const size_t begin = before_parted_character(text, at); begin < at) at = begin + utf8_length(text.substr(begin));
  const size_t found = text.find(document_marker, at - std::min(at, document_marker.size() - 1));
  return found < at ? found + document_marker.size() : at;
}

// Looks for text files and remembers what it left out.
class TextFinder {
 public:
  // A folder's val/ first, so that a file which lies in it, by whatever name, is for validation alone.
  TextFiles find(const std::vector<std::string>& paths) {
    for (const std::string& path : paths)
      if (const Found found = look_at(path); found.kind == Found::folder) roots_.insert(found.id);
    for (const std::string& path : paths)
      if (const Found val = look_at(path + "/val"); val.kind == Found::folder && folders_.insert(val.id).second)
        walk(path + "/val", true, 1);
    std::vector<TextFile> val = std::exchange(files_, {});
    for (const std::string& path : paths) {
      const Found found = look_at(path);
      if (found.kind != Found::folder) add(path, found.kind == Found::file ? found : look_for(path), false);
      else if (folders_.insert(found.id).second) walk(path, false, 0);
    }
    files_.insert(files_.end(), val.begin(), val.end());
    return {std::move(files_), words()};
  }

 private:
  struct Reason {
    int64_t count = 0;
    std::string first, mend;
  };

  // Of a file that was asked for by name and is not one: the Error that opening it is.
  static Found look_for(const std::string& path) {
    const File file = File::open(path);
    return {Found::file, file.id(), file.size_bytes()};
  }

  void leave_out(const std::string& reason, const std::string& path, const std::string& mend = "") {
    Reason& r = reasons_[reason];
    if (r.count++ == 0) r = {1, path, mend};
  }

  void add(const std::string& path, const Found& found, bool val) {
    if (!taken_.insert(found.id).second) return leave_out("met a second time", path);
    const std::string head = File::open(path).beginning(foreign_head_bytes);
    const ForeignKind* kind = foreign_kind(head);
    if (kind && !kind->may_be_text) return leave_out(kind->what, path, kind->mend);
    if (head.find('\0') != head.npos) return leave_out("with zero bytes, so no text", path);
    files_.push_back({path, found.bytes, val});
  }

  void walk(const std::string& folder, bool val, int depth) {
    if (depth > 64) throw Error("'" + folder + "' lies more than 64 folders deep: give a folder further down");
    for (const std::string& name : list_folder(folder)) {
      const std::string path = folder + "/" + name;
      if (name[0] == '.' || (depth == 0 && name == "val" && look_at(path).kind == Found::folder)) continue;
      const Found found = look_at(path);
      if (found.kind == Found::file) add(path, found, val);
      else if (found.kind == Found::none) leave_out("leading to nothing", path);
      else if (found.kind == Found::other) leave_out("neither file nor folder", path);
      else if (roots_.count(found.id) || !folders_.insert(found.id).second) leave_out("met a second time", path);
      else walk(path, val, depth + 1);
    }
  }

  std::string words() const {
    std::string all;
    for (const auto& [reason, r] : reasons_)
      all += str(all.empty() ? "left out: " : "; ", r.count, " ", reason, " ('", printable(r.first),
                 r.count > 1 ? "' and others" : "'", r.mend.empty() ? "" : ": ", r.mend, ")");
    return all;
  }

  std::vector<TextFile> files_;
  std::set<FileId> taken_, folders_, roots_;
  std::map<std::string, Reason> reasons_;
};

}  // namespace

std::string read_text(const std::string& path) {
  std::string text = read_file(path, size_t{1} << 40);
  if (const ForeignKind* kind = foreign_kind(text); kind && !kind->may_be_text)
    throw Error("'" + path + "': expected text" + foreign_remark(text, ""));
  if (const size_t zero = text.find('\0'); zero != text.npos)
    throw Error(
        str("'", path, "': expected text, found a zero byte at byte ", zero, ": text has none; give another file"));
  return text;
}

TextFiles text_files(const std::vector<std::string>& paths) { return TextFinder().find(paths); }

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
    int64_t end = cut(file, std::min({file.bytes, at_ + piece_bytes, val ? file.bytes : to_val}), longest_run);
    if (!val && end > to_val) end = cut(file, to_val, 4096);
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

// The first exact cut of the file at or after `from`; the first that parts no character where there is none in `reach`
// bytes.
int64_t TextPieces::cut(const TextFile& info, int64_t from, int64_t reach) const {
  if (from == info.bytes) return from;
  const int64_t wanted = from;
  constexpr int64_t context = 8;  // enough for the character before the cut, and for one that straddles two blocks
  char block[4096];
  const File file = File::open(info.path);
  for (int64_t at = std::max<int64_t>(0, from - context);; at = from - context) {
    const int64_t bytes = std::min(info.bytes - at, static_cast<int64_t>(sizeof block));
    file.read(block, static_cast<size_t>(bytes), at);
    const char* found = scanner_.next_cut(block, block + (from - at), block + bytes);
    if (found < block + bytes) return at + (found - block);
    if (at + bytes == info.bytes && at + bytes <= wanted + reach) return info.bytes;
    from = at + bytes - context;
    if (from >= wanted + reach) break;
  }
  const int64_t around = 2 * static_cast<int64_t>(document_marker.size()), at = std::max<int64_t>(0, wanted - around);
  const size_t bytes = static_cast<size_t>(std::min(info.bytes, wanted + around) - at);
  file.read(block, bytes, at);
  return at + static_cast<int64_t>(forced_cut(std::string_view(block, bytes), static_cast<size_t>(wanted - at)));
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
    size_t ready =
        more ? static_cast<size_t>(scanner.next_cut(begin, begin + text.size() / 2, end) - begin) : text.size();
    if (more && ready == text.size()) {
      if (text.size() < 2 * longest_run) continue;
      ready = forced_cut(text, text.size() / 2);
    }
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
