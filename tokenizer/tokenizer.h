// The tokenizer: byte-level BPE with GPT-2's pre-tokenisation. Encodes and decodes any bytes; reads GPT-2's
// tokenizer.json (or vocab.json and merges.txt) and files of its own. `bytes`, 256 ids and nothing learned, is the BPE
// without merges. Learning one is in train.h.
//
// Ids 0-255 are the bytes, id 256 + r is what merge r makes of two smaller ids, then come the special ids. So of two
// merges the one with the smaller id comes first, and an id says both what a merge makes and how soon.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/files.h"
#include "base/json.h"
#include "base/text.h"
#include "common.h"
#include "tokenizer/pretokens.h"

namespace gca {

class Tokenizer {
 public:
  struct Merge {
    uint32_t left, right;  // ids
  };

  // Limits on every vocabulary, whether learned or read.
  static constexpr size_t max_vocabulary = size_t{1} << 20;  // without the special ids; a packed pair has 21 bits an id
  static constexpr size_t max_token_bytes = 1024;
  static constexpr size_t max_all_bytes = size_t{256} << 20;  // all tokens' bytes together

  // The special ids. They come from nowhere but their numbers: no text encodes to them.
  int32_t end_of_text, landmark, KEY, END, ASK, ARROW, COMMA;

  // What load() takes, for the help of flags.
  static constexpr const char* accepted =
      "one of ours, GPT-2's tokenizer.json, its vocab.json or merges.txt (beside each other), a folder that has these, "
      "an exported model, or the word bytes";
  // A model's safetensors file that has a tokenizer has it in its metadata: under this name, serialize() in base64.
  static constexpr const char* metadata_name = "train_gca.tokenizer";
  static Tokenizer load(const std::string& path_or_word);
  // The same from a file's content; what: its name in errors. gpt2_merges: how many a tokenizer.json must have; tests
  // take fewer.
  static Tokenizer parse(std::string_view content, const std::string& what, size_t gpt2_merges = 50000);
  // GPT-2's as two files, vocab.json and merges.txt.
  static Tokenizer parse_pair(std::string_view vocab, const std::string& vocab_name, std::string_view merges,
                              const std::string& merges_name, size_t gpt2_merges = 50000);
  // A vocabulary of our own, from its merges in order. Their ids must be smaller than 256 + the merge's place.
  explicit Tokenizer(std::vector<Merge> merges) : Tokenizer(Layout::own, std::move(merges), "the merges") {}

  // Writes our own format, which load() reads; the file appears whole or not at all.
  void save(const std::string& path) const { write_file(path, serialize()); }
  std::string serialize() const;

  // V: how many ids there are, special ones included (of GPT-2's 50,265 two have no use).
  int32_t vocab_size() const { return static_cast<int32_t>(names_at_ + names_.size()); }
  // Depends on the vocabulary and the layout of ids alone; never 0. Shards carry it.
  uint64_t hash() const { return hash_; }
  std::string description() const;

  bool is_special(int32_t id) const { return static_cast<size_t>(id) >= names_at_; }
  // The bytes that an id stands for; none for a special id. The id must be below vocab_size().
  std::string_view bytes_of(int32_t id) const;
  // What ids[first .. last) say, for a terminal, in whole characters: one whose bytes come in several ids is where it
  // ends. Special ids are their names, landmarks nothing.
  std::string words(std::span<const int32_t> ids, size_t first, size_t last) const;

  // ids of any bytes; decode gives exactly these bytes back. Encoding much text in pieces: see Encoder.
  std::vector<int32_t> encode(std::string_view text) const;
  // Appends what the ids stand for; a special id as its name (<|endoftext|>). An id outside the vocabulary is an Error.
  void decode(std::span<const int32_t> ids, std::string& out) const;
  std::string decode(std::span<const int32_t> ids) const;

 private:
  friend class Encoder;
  enum class Layout : uint32_t { own, gpt2 };  // where bytes and special ids lie
  static constexpr uint32_t none = UINT32_MAX;
  static constexpr char magic[9] = "gca-bpe\n";
  static constexpr uint32_t version = 1;
  static constexpr size_t header_bytes =
      8 + 3 * 4;  // magic, version, layout, number of merges; then the merges and the hash

  Tokenizer(Layout layout, std::vector<Merge> merges, const std::string& what);
  static Tokenizer parse_own(std::string_view content, const std::string& what);
  static Tokenizer parse_gpt2(std::string_view content, const std::string& what, size_t merge_count);
  // merges: pairs of tokens in the order of ids, letters for bytes as in vocab; where(r) names merge r in errors.
  static Tokenizer of_gpt2(const JsonField& vocab, const std::vector<std::pair<std::string, std::string>>& merges,
                           const std::string& merges_name, const std::function<std::string(size_t)>& where,
                           const std::string& what, size_t merge_count);

  // GPT-2's ids of bytes: first those that print, in their order, then the others.
  static bool gpt2_prints(int byte) { return (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173); }

  size_t length_of(size_t id) const { return starts_[id + 1] - starts_[id]; }
  std::string name_of(int32_t id) const { return "<|" + names_[static_cast<size_t>(id) - names_at_] + "|>"; }

  uint32_t merged(uint32_t left, uint32_t right) const;
  static uint64_t hash_of(uint64_t key) { return key * 0x9E3779B97F4A7C15u; }

  Layout layout_;
  std::vector<Merge> merges_;
  std::vector<std::string> names_;  // of the special ids, from names_at_ on
  size_t names_at_;
  std::string bytes_;             // all tokens' bytes in the order of ids
  std::vector<uint32_t> starts_;  // where each begins, and the end
  uint32_t byte_ids_[256];
  std::vector<uint64_t> pairs_;  // hash table, open addressing: left << 42 | right << 21 | merged + 1; 0 is free
  int pairs_shift_;
  std::vector<uint64_t> filter_;  // 2^19 bits, of each pair's hash one: most pairs that are asked for merge to nothing
  std::vector<uint32_t>
      byte_pairs_;  // [256 first + second] what two bytes merge to: the pairs that every new word asks for
  uint64_t hash_;
};

// ---- the vocabulary -----------------------------------------------------------------------------------------------

// ---- encoding -----------------------------------------------------------------------------------------------------

// What parts the documents of a corpus that is one file.
constexpr std::string_view document_marker = "<|endoftext|>";
// Calls take(document, first) for what lies before, between and after the markers, empty ones too.
template <class Take>
void for_each_document(std::string_view text, Take take) {
  bool first = true;
  for (size_t at; (at = text.find(document_marker)) != text.npos; first = false) {
    take(text.substr(0, at), first);
    text.remove_prefix(at + document_marker.size());
  }
  take(text, first);
}

// Encodes text after text, with a cache of words that it keeps between calls: one for each thread. The cache is a table
// of fixed size in which a word replaces whatever had its place, so it is bounded, and exact: a word is found by all of
// its bytes. The tokenizer must outlive it.
class Encoder {
 public:
  explicit Encoder(const Tokenizer& tokenizer);

  // Appends the ids of text, which is one whole text or the next piece of one that WordScanner::next_cut cut.
  void append(std::string_view text, std::vector<int32_t>& out);

  // The same, but end_of_text for every <|endoftext|> in the text: how corpora in one file part their documents.
  void append_marked(std::string_view text, std::vector<int32_t>& out);

 private:
  // A word and its ids. low, high: its bytes, and its length in the highest byte, so that a free entry (0) is no word.
  // ids: three of 20 bits in each, their number on top of the first.
  struct Entry {
    uint64_t low, high, ids[2];
  };
  static constexpr size_t max_cached_bytes = 15, max_cached_ids = 6;
  static_assert(Tokenizer::max_vocabulary <= size_t{1} << 20, "ids of the cache have 20 bits");
  static constexpr int cache_bits = 16;
  static constexpr size_t cache_size = size_t{1} << cache_bits;

  static void key_of(const char* p, size_t length, const char* end, uint64_t& low, uint64_t& high);
  Entry packed(Entry key, size_t count) const;
  static size_t unpack(const Entry& entry, int32_t* out);

  size_t merge(const char* p, size_t n);

  // All places are looked at in every round, whatever n: new words come as no processor can guess, and a wrong guess
  // costs more. The halves of `made` keep compilers from vectors of four, which would wait for each place that was just
  // written.
  template <uint32_t places>
  size_t merge_short(const char* p, size_t n) {
    unsigned char bytes[places + 1] = {};
    memcpy(bytes, p, n);
    // Places 1 to n, and no id at either end. made: what the id in a place and the next one merge to; the place in the
    // low half.
    uint32_t ids[places + 2];
    uint64_t made[places + 1];
    const auto set = [&](uint32_t i, uint32_t id) { made[i] = uint64_t{id} << 32 | i; };
    for (uint32_t i = 1; i <= places; i++) {
      ids[i] = tokenizer_.byte_ids_[bytes[i - 1]];
      set(i, i < n ? tokenizer_.byte_pairs_[256 * bytes[i - 1] + bytes[i]] : Tokenizer::none);
    }
    constexpr uint32_t no_id = Tokenizer::max_vocabulary;
    ids[0] = ids[n + 1] = no_id;
    uint32_t live = (uint32_t{2} << (n + 1)) - 1;  // the places that still hold an id, the ends too
    for (;;) {
      uint64_t best[4] = {made[1], made[2], made[3], made[4]};
      for (uint32_t i = 5; i <= places; i += 4)
        for (uint32_t lane = 0; lane < 4; lane++) best[lane] = std::min(best[lane], made[i + lane]);
      const uint64_t first = std::min(std::min(best[0], best[1]), std::min(best[2], best[3]));
      const uint32_t id = static_cast<uint32_t>(first >> 32), i = static_cast<uint32_t>(first);
      if (id == Tokenizer::none) break;
      const auto after = [live](uint32_t place) {
        return place + 1 + static_cast<uint32_t>(std::countr_zero(live >> place >> 1));
      };
      const uint32_t j = after(i), k = after(j),
                     before = static_cast<uint32_t>(31 - std::countl_zero(live & ((1u << i) - 1)));
      live ^= 1u << j;
      ids[i] = id;
      set(j, Tokenizer::none);
      set(i, tokenizer_.merged(id, ids[k]));
      if (before > 0) set(before, tokenizer_.merged(ids[before], id));
    }
    size_t count = 0;
    for (uint32_t i = 1; i <= places; i++) {
      ids_[count] = ids[i];
      count += live >> i & (i <= n);
    }
    return count;
  }

  size_t merge_long(const char* p, size_t n);

  // Appends the ids of one long word. Tokens of which every two neighbours are what BPE makes of their bytes are what
  // BPE makes of all the bytes. So a window is encoded, all but its last part kept, and the next window begins with
  // that part: if it finds the same first token again, the seam holds; else the window was too short, and a larger one
  // begins further back, at a seam that held.
  void append_long(const char* p, size_t length, std::vector<int32_t>& out);

  const Tokenizer& tokenizer_;
  WordScanner scanner_;
  std::unique_ptr<Entry, void (*)(void*)> cache_;
  // Of an id: what it and the next one merge to, and where its neighbours are.
  struct Link {
    uint32_t made, before, after;
  };
  static constexpr uint32_t shortest_window = 24;
  std::vector<uint32_t> ids_ = std::vector<uint32_t>(shortest_window + 1);  // what merge made
  std::vector<Link> links_;  // of merge_long, with the merges that are possible
  std::vector<uint64_t> queue_;
};

}  // namespace gca
