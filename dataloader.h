// Tokens from disk to rows: shards in llm.c's format (written and read), the stream that they make together, and the
// rows of training and evaluation, in an order that is computed, never stored.
//
// A shard: 256 int32 words [magic, version, tokens, hash low, hash high, 0...], then the tokens. Magic 20240520,
// version 1: uint16 tokens. Magic 20240801, version 7: uint32, for vocabularies over 65,536. Words 3 and 4 are spare in
// llm.c's format: ours hold the hash of the tokenizer; 0 means unknown. A document begins with the end-of-text token.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/json.h"
#include "common.h"
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
  // Another one of the same prefix that is at work, here or in another process, is an Error.
  ShardWriter(std::string prefix, const Tokenizer& tokenizer, int64_t shard_tokens);
  ~ShardWriter();
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  void append(std::span<const int32_t> ids);

  int64_t tokens() const { return tokens_; }

  // Writes what is left of the sets and gives every shard its name; durable when this returns. Stopped halfway, it
  // leaves sets that TokenStream refuses and that the next ShardWriter of their names removes.
  static void commit(std::initializer_list<ShardWriter*> sets);

 private:
  void flush();

  std::string prefix_;
  uint64_t hash_;
  bool wide_;
  size_t shard_tokens_;
  std::optional<File> mark_;  // locked: the set is being written
  int64_t tokens_ = 0;
  std::vector<char> shard_;
  std::vector<std::unique_ptr<AtomicFile>> files_;  // whole and closed, but still under their temporary names
};

// All shards that patterns (one a line) match, each once, in sorted order, as one stream of tokens. Reading is for any
// number of threads at once.
class TokenStream {
 public:
  // Opens every shard and checks header and size. A shard of another tokenizer is an Error; of an unknown one, see
  // notes().
  TokenStream(const std::string& patterns, const Tokenizer& tokenizer);

  int64_t tokens() const { return tokens_; }
  const std::string& pattern() const { return pattern_; }  // for messages: several with commas between
  // What the user should be told once; empty if nothing.
  const std::string& notes() const { return notes_; }

  // out (count) = the tokens from place `first` on. first + count must be at most tokens(). A file that has shrunk, or
  // an id outside the vocabulary, is an Error; with any_id such an id is given as it is (negative if it is above
  // INT32_MAX).
  void read(int64_t first, int64_t count, int32_t* out, bool any_id = false) const;

  // What a checkpoint keeps of the data: for each shard its name, size, tokens, and checksums of the header and of
  // samples.
  Json state() const;

  // An Error if these are not the data whose state() was saved; where they lie does not matter.
  void check_same(const JsonField& saved) const;

 private:
  struct Shard {
    std::string path;
    std::optional<File> kept;  // open, of the first shards; the others are opened for each read
    FileId id;
    int64_t bytes, first, tokens;  // of the file; in the stream
    int width;                     // bytes a token
    uint32_t header_crc;
    std::string name() const;
  };

  Shard examine(const std::string& path, const Tokenizer& tokenizer, size_t& unknown) const;
  // Calls use(file) with the shard's file; an Error where another one has its name by now.
  template <class Use>
  static auto with_file(const Shard& shard, Use&& use);

  static uint32_t sample_crc(const File& file);

  int32_t vocab_size_;
  std::string pattern_, notes_;
  std::vector<Shard> shards_;
  int64_t tokens_ = 0;
};

// An Error where patterns of training and of validation data lead to the same file.
void check_apart(const std::string& data, const std::string& val_data);

// Place of `index` in a random order of [0, count), from (seed, epoch) alone: a Feistel network on the next even power
// of two, walked until it falls inside.
int64_t permuted(int64_t index, int64_t count, uint64_t seed, uint64_t epoch);

// tokens (C*S; it begins with C*(S-1)+1 tokens, packed) = the same in chunks of S slots, the last of
// them the landmark, without target; every other target is the next token, as far as the first `real` tokens go. From
// the back, so that nothing is overwritten before it has moved: token c*(S-1)+j goes to slot c*S+j.
void spread_chunks(int32_t* tokens, int32_t* targets, int64_t real, int64_t C, int64_t S, int32_t landmark);

// Rows of C chunks of S slots. A window is C (S-1) + 1 tokens: one more than a row shows, so that its last token has a
// target; neighbours share that one. Windows follow one another through the stream; with cross = false each is one
// document's.
class Rows {
 public:
  // stream must outlive this. Less than one window is an Error.
  Rows(const TokenStream& stream, const Tokenizer& tokenizer, int64_t chunks, int64_t slots, uint64_t seed,
       bool cross = true);

  int64_t count() const { return count_; }             // windows, and rows of an epoch
  const std::string& notes() const { return notes_; }  // what the user should be told once; empty if nothing

  // tokens, targets (C*S) = row r of the whole training: window p(r mod count) of epoch r / count.
  void fill_row(int64_t global_row, int32_t* tokens, int32_t* targets) const;

  // tokens, targets (C*S) = window w, in the order of the stream. Slot S-1 of every chunk is the landmark, without
  // target; every other target is the next real token. Slots past a document's end hold end-of-text without target.
  //
  // times: the same with more past, (times*C*S): the windows before it too, to the row's beginning. has_past: there are
  // that many; with cross = false in its document.
  void fill_window(int64_t window, int32_t* tokens, int32_t* targets, int64_t times = 1) const;
  bool has_past(int64_t window, int64_t times) const;

 private:
  void find_documents();

  // The document that a window is of; with cross = true the whole stream, 0.
  size_t document_of(int64_t window) const;
  std::pair<int64_t, int64_t> extent(int64_t window) const;

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
