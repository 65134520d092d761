// Tokens from disk to rows: shards in llm.c's format (written and read), the stream that they make together, and the
// rows of training and evaluation, in an order that is computed, never stored.
//
// A shard: 256 int32 words [magic, version, tokens, hash low, hash high, 0...], then the tokens. Magic 20240520,
// version 1: uint16 tokens. Magic 20240801, version 7: uint32, for vocabularies over 65,536. Words 3 and 4 are spare in
// llm.c's format: ours hold the hash of the tokenizer; 0 means unknown. A document begins with the end-of-text token.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <span>
#include <utility>
#include <vector>

#include "common.h"
#include "base/files.h"
#include "base/json.h"
#include "tokenizer/tokenizer.h"

namespace gca {

constexpr int32_t no_target = -100;  // the target of a slot that the loss leaves out

struct ShardHeader {
  static constexpr int64_t bytes = 1024, max_tokens = INT32_MAX;
  static constexpr int32_t narrow[2] = {20240520, 1}, wide[2] = {20240801, 7};  // magic, version
  int32_t words[256] = {};
};

// Writes the stream of one split into shards PREFIX_000000.bin, PREFIX_000001.bin ... Each holds shard_tokens (the last
// one less) and is kept in memory until it is full. All get their names in commit(), or none if it is not reached.
class ShardWriter {
 public:
  ShardWriter(std::string prefix, const Tokenizer& tokenizer, int64_t shard_tokens)
      : prefix_(std::move(prefix)),
        hash_(tokenizer.hash()),
        wide_(tokenizer.vocab_size() > 65536),
        shard_tokens_(shard_tokens) {
    if (shard_tokens < 1 || shard_tokens > ShardHeader::max_tokens)
      throw Error(str("the size of a shard: expected 1 to ", ShardHeader::max_tokens, " tokens, found ", shard_tokens));
    const std::string first = name(0);
    if (std::error_code none; std::filesystem::exists(first, none))
      throw Error("'" + first +
                  "' is there already: remove the old shards or choose another name, so that two sets are never mixed");
  }

  void append(std::span<const int32_t> ids) {
    tokens_ += static_cast<int64_t>(ids.size());
    while (!ids.empty()) {
      const size_t width = wide_ ? 4 : 2, held = shard_.size() / width,
                   count = std::min(ids.size(), shard_tokens_ - held);
      shard_.resize((held + count) * width);
      if (wide_) {
        memcpy(shard_.data() + held * width, ids.data(), count * width);
      } else {
        for (size_t i = 0; i < count; i++) {
          const uint16_t id = static_cast<uint16_t>(ids[i]);
          memcpy(shard_.data() + (held + i) * width, &id, width);
        }
      }
      if (held + count == shard_tokens_) flush();
      ids = ids.subspan(count);
    }
  }

  int64_t tokens() const { return tokens_; }

  // Writes what is left and gives every shard its name; durable when this returns.
  void commit() {
    flush();
    for (auto& file : files_) file->commit();
    files_.clear();
  }

 private:
  std::string name(size_t i) const { return str(prefix_, "_", right(i, 6, '0'), ".bin"); }

  void flush() {
    if (shard_.empty()) return;
    ShardHeader header;
    std::copy_n(wide_ ? ShardHeader::wide : ShardHeader::narrow, 2, header.words);
    header.words[2] = static_cast<int32_t>(shard_.size() / (wide_ ? 4 : 2));
    memcpy(header.words + 3, &hash_, 8);
    auto file = std::make_unique<AtomicFile>(name(files_.size()));
    file->write(&header, sizeof header);
    file->write(shard_.data(), shard_.size());
    files_.push_back(std::move(file));
    shard_.clear();
  }

  std::string prefix_;
  uint64_t hash_;
  bool wide_;
  size_t shard_tokens_;
  int64_t tokens_ = 0;
  std::vector<char> shard_;
  std::vector<std::unique_ptr<AtomicFile>> files_;  // whole, but still under their temporary names
};

// All shards that a pattern matches, in sorted order, as one stream of tokens. Reading is for any number of threads at
// once.
class TokenStream {
 public:
  // Opens every shard and checks header and size. A shard of another tokenizer is an Error; of an unknown one, see
  // notes().
  TokenStream(const std::string& pattern, const Tokenizer& tokenizer)
      : vocab_size_(tokenizer.vocab_size()), pattern_(pattern) {
    size_t unknown = 0;
    for (const std::string& path : glob_files(pattern)) {
      Shard shard{File::open(path), tokens_, 0, 2, 0};
      const int64_t size = shard.file.size_bytes();
      ShardHeader header;
      if (size >= ShardHeader::bytes) shard.file.read(&header, sizeof header, 0);
      const auto is = [&](const int32_t* kind) { return header.words[0] == kind[0] && header.words[1] == kind[1]; };
      if (!is(ShardHeader::narrow) && !is(ShardHeader::wide))
        throw Error(str("'", path,
                        "': expected a token shard (magic 20240520 version 1, or 20240801 version 7), found magic ",
                        header.words[0], " version ", header.words[1], " in a file of ", size,
                        " bytes; make shards with tokenize"));
      shard.width = is(ShardHeader::wide) ? 4 : 2;
      shard.tokens = header.words[2];
      if (shard.tokens < 0 || size != ShardHeader::bytes + shard.tokens * shard.width)
        throw Error(str("'", path, "': the header says ", shard.tokens, " tokens of ", shard.width,
                        " bytes, found a file of ", size,
                        " bytes; it is cut off or damaged: make it anew or fetch it again"));
      uint64_t hash;
      memcpy(&hash, header.words + 3, 8);
      if (hash == 0) unknown++;
      if (hash != 0 && hash != tokenizer.hash())
        throw Error(str("'", path, "' was made with another tokenizer: expected the hash ", hex(tokenizer.hash(), 16),
                        " of ", tokenizer.description(), ", found ", hex(hash, 16),
                        "; tokenize the text again with this one, or use the other"));
      shard.header_crc = crc32c(&header, sizeof header);
      tokens_ += shard.tokens;
      shards_.push_back(std::move(shard));
    }
    if (unknown)
      notes_ = str("'", pattern, "': ", unknown, " of ", shards_.size(),
                   " shards do not say which tokenizer made them; taken to be ", tokenizer.description());
  }

  int64_t tokens() const { return tokens_; }
  const std::string& pattern() const { return pattern_; }
  // What the user should be told once; empty if nothing.
  const std::string& notes() const { return notes_; }

  // out (count) = the tokens from place `first` on. first + count must be at most tokens(). A file that has shrunk, or
  // an id outside the vocabulary, is an Error; with any_id such an id is given as it is (negative if it is above
  // INT32_MAX).
  void read(int64_t first, int64_t count, int32_t* out, bool any_id = false) const {
    GCA_CHECK(first >= 0 && count >= 0 && count <= tokens_ - first, "tokens ", first, " + ", count, " of ", tokens_);
    auto shard = std::upper_bound(shards_.begin(), shards_.end(), first,
                                  [](int64_t place, const Shard& s) { return place < s.first; }) -
                 1;
    for (; count > 0; shard++) {
      const int64_t at = first - shard->first, here = std::min(count, shard->tokens - at);
      const size_t bytes = static_cast<size_t>(here) * static_cast<size_t>(shard->width);
      // uint16 go to the upper half of their place and are widened from there upwards.
      char* raw = reinterpret_cast<char*>(out + here) - bytes;
      shard->file.read(raw, bytes, ShardHeader::bytes + at * shard->width);
      uint32_t largest = 0;
      for (int64_t i = 0; i < here; i++) {
        uint32_t id = 0;
        memcpy(&id, raw + i * shard->width, shard->width);
        out[i] = static_cast<int32_t>(id);
        largest = std::max(largest, id);
      }
      if (!any_id && largest >= static_cast<uint32_t>(vocab_size_))
        throw Error(str("'", shard->file.path(), "': expected token ids below ", vocab_size_,
                        ", the size of the vocabulary, found ", largest, " among tokens ", at, " to ", at + here - 1,
                        "; it was made with another tokenizer or is damaged"));
      first += here;
      count -= here;
      out += here;
    }
  }

  // What a checkpoint keeps of the data: for each shard its name, size, tokens, and checksums of the header and of
  // samples.
  Json state() const {
    Json shards = Json::array();
    for (const Shard& shard : shards_) {
      Json entry;
      entry["name"] = name_of(shard);
      entry["bytes"] = shard.file.size_bytes();
      entry["tokens"] = shard.tokens;
      entry["header_crc32c"] = shard.header_crc;
      entry["sample_crc32c"] = sample_crc(shard.file);
      shards.push_back(std::move(entry));
    }
    Json state;
    state["tokens"] = tokens_;
    state["shards"] = std::move(shards);
    return state;
  }

  // An Error if these are not the data whose state() was saved; where they lie does not matter.
  void check_same(const JsonField& saved) const {
    const Json now = state();
    if (now == saved.json()) return;
    const JsonField saved_shards = saved.at("shards"), shards = JsonField(now, "").at("shards");
    const std::vector<Json>&before = saved_shards.items(), &here = shards.items();
    std::string difference = str("expected ", before.size(), " shards, found ", shards_.size());
    for (size_t i = 0; i < std::min(before.size(), shards_.size()); i++) {
      if (before[i] != here[i]) {
        difference = "expected the shard " + before[i].dump() + ", found " + here[i].dump();
        break;
      }
    }
    throw Error("'" + pattern_ + "' is not what " + saved.where() + " was written with: " + difference +
                "; resume with the same data, or start a new run from the weights with --init");
  }

 private:
  struct Shard {
    File file;
    int64_t first, tokens;  // in the stream
    int width;              // bytes a token
    uint32_t header_crc;
  };

  static std::string name_of(const Shard& shard) {
    return std::filesystem::path(shard.file.path()).filename().string();
  }

  // CRC-32C of 16 pieces of 4 KiB, evenly spread, the last one at the end.
  static uint32_t sample_crc(const File& file) {
    constexpr int64_t piece = 4096, pieces = 16;
    char buffer[piece];
    const int64_t bytes = std::min(piece, file.size_bytes()), last = file.size_bytes() - bytes;
    uint32_t crc = 0;
    for (int64_t i = 1; i <= pieces; i++) {
      file.read(buffer, static_cast<size_t>(bytes), last / pieces * i + last % pieces * i / pieces);
      crc = crc32c(buffer, static_cast<size_t>(bytes), crc);
    }
    return crc;
  }

  int32_t vocab_size_;
  std::string pattern_, notes_;
  std::vector<Shard> shards_;
  int64_t tokens_ = 0;
};

// Place of `index` in a random order of [0, count), from (seed, epoch) alone: a Feistel network on the next even power
// of two, walked until it falls inside.
inline int64_t permuted(int64_t index, int64_t count, uint64_t seed, uint64_t epoch) {
  const int half = static_cast<int>((std::bit_width(static_cast<uint64_t>(count - 1)) + 1) / 2);
  const uint64_t mask = (uint64_t{1} << half) - 1;
  uint64_t place = static_cast<uint64_t>(index);
  do {
    uint64_t left = place >> half, right = place & mask;
    for (uint32_t round = 0; round < 8; round++) {
      const Philox random = philox(seed, Stream::rows, static_cast<uint32_t>(right), round,
                                   static_cast<uint32_t>(epoch), static_cast<uint32_t>(epoch >> 32));
      left = std::exchange(right, left ^ (random.word[0] & mask));
    }
    place = left << half | right;
  } while (place >= static_cast<uint64_t>(count));
  return static_cast<int64_t>(place);
}

// tokens (C*S; it begins with C*(S-1)+1 tokens, packed) = the same in chunks of S slots, the last of
// them the landmark, without target; every other target is the next token, as far as the first `real` tokens go. From
// the back, so that nothing is overwritten before it has moved: token c*(S-1)+j goes to slot c*S+j.
inline void spread_chunks(int32_t* tokens, int32_t* targets, int64_t real, int64_t C, int64_t S, int32_t landmark) {
  for (int64_t c = C - 1; c >= 0; c--) {
    for (int64_t j = S - 2; j >= 0; j--) {
      const int64_t from = c * (S - 1) + j, to = c * S + j;
      targets[to] = from + 1 < real ? tokens[from + 1] : no_target;
      tokens[to] = tokens[from];
    }
    tokens[c * S + S - 1] = landmark;
    targets[c * S + S - 1] = no_target;
  }
}

// Rows of C chunks of S slots. A window is C (S-1) + 1 tokens: one more than a row shows, so that its last token has a
// target; neighbours share that one. Windows follow one another through the stream; with cross = false each is one
// document's.
class Rows {
 public:
  // stream must outlive this. Less than one window is an Error.
  Rows(const TokenStream& stream, const Tokenizer& tokenizer, int64_t chunks, int64_t slots, uint64_t seed,
       bool cross = true)
      : stream_(stream),
        end_of_text_(tokenizer.end_of_text),
        landmark_(tokenizer.landmark),
        chunks_(chunks),
        slots_(slots),
        seed_(seed) {
    GCA_CHECK(chunks >= 1 && slots >= 2 && chunks <= INT64_MAX / 8 / slots, chunks, " chunks of ", slots, " slots");
    const int64_t step = chunks * (slots - 1);
    if (cross) {
      count_ = std::max<int64_t>(0, (stream.tokens() - 1) / step);
      const int64_t tail = stream.tokens() - 1 - count_ * step;
      if (count_ > 0 && tail > 0)
        notes_ = str("'", stream.pattern(), "': the last ", tail, " of ", stream.tokens(),
                     " tokens fill no row and are left out");
    } else {
      find_documents();
    }
    if (count_ == 0)
      throw Error(str("'", stream.pattern(), "': expected at least the ", cross ? step + 1 : 2,
                      " tokens of one row of ", chunks, " chunks, found ", stream.tokens(),
                      "; give more text or fewer chunks"));
  }

  int64_t count() const { return count_; }             // windows, and rows of an epoch
  const std::string& notes() const { return notes_; }  // what the user should be told once; empty if nothing

  // tokens, targets (C*S) = row r of the whole training: window p(r mod count) of epoch r / count.
  void fill_row(int64_t global_row, int32_t* tokens, int32_t* targets) const {
    fill_window(permuted(global_row % count_, count_, seed_, static_cast<uint64_t>(global_row / count_)), tokens,
                targets);
  }

  // tokens, targets (C*S) = window w, in the order of the stream. Slot S-1 of every chunk is the landmark, without
  // target; every other target is the next real token. Slots past a document's end hold end-of-text without target.
  void fill_window(int64_t window, int32_t* tokens, int32_t* targets) const {
    const auto [first, real] = extent(window);
    stream_.read(first, real, tokens);  // packed at first: C*S is room for C*(S-1)+1
    std::fill(tokens + real, tokens + chunks_ * (slots_ - 1) + 1, end_of_text_);
    spread_chunks(tokens, targets, real, chunks_, slots_, landmark_);
  }

 private:
  // One pass over the stream. A document goes from its end-of-text token to the next one, which it still predicts.
  void find_documents() {
    const int64_t step = chunks_ * (slots_ - 1), block = std::clamp<int64_t>(stream_.tokens(), 1, 1 << 20);
    std::vector<int32_t> ids(block);
    const auto close = [&](int64_t end) {  // one past the last token that is a target
      if (!starts_.empty()) count_ += ceil_div(end - starts_.back() - 1, step);
    };
    for (int64_t at = 0; at < stream_.tokens(); at += block) {
      const int64_t here = std::min(block, stream_.tokens() - at);
      stream_.read(at, here, ids.data());
      for (int64_t i = 0; i < here; i++)
        if (at + i == 0 || ids[i] == end_of_text_) {
          close(at + i + 1);
          starts_.push_back(at + i);
          first_windows_.push_back(count_);
        }
    }
    close(stream_.tokens());
  }

  // Where the window begins in the stream, and how many tokens it has there.
  std::pair<int64_t, int64_t> extent(int64_t window) const {
    GCA_CHECK(window >= 0 && window < count_, "window ", window, " of ", count_);
    const int64_t step = chunks_ * (slots_ - 1);
    if (starts_.empty()) return {window * step, step + 1};
    const auto after = std::upper_bound(first_windows_.begin(), first_windows_.end(), window);
    const size_t document = static_cast<size_t>(after - first_windows_.begin()) - 1;
    const int64_t first = starts_[document] + (window - first_windows_[document]) * step;
    const int64_t end = document + 1 < starts_.size() ? starts_[document + 1] + 1 : stream_.tokens();
    return {first, std::min(step + 1, end - first)};
  }

  const TokenStream& stream_;
  int32_t end_of_text_, landmark_;
  int64_t chunks_, slots_;
  uint64_t seed_;
  int64_t count_ = 0;
  std::string notes_;
  std::vector<int64_t> starts_,
      first_windows_;  // of each document, in the stream and among the windows; empty when rows cross
};

}  // namespace gca
