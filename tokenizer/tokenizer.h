// The tokenizer: byte-level BPE with GPT-2's pre-tokenisation. Encodes and decodes any bytes; reads GPT-2's
// tokenizer.json and files of its own. `bytes`, 256 ids and nothing learned, is the BPE without merges. Learning one is
// in train.h.
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

#include "common.h"
#include "base/files.h"
#include "base/json.h"
#include "base/text.h"
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

  // The word "bytes", or the path of one of our files or of GPT-2's tokenizer.json.
  static Tokenizer load(const std::string& path_or_word) {
    if (path_or_word == "bytes") return Tokenizer(std::vector<Merge>());
    return parse(read_file(path_or_word, size_t{64} << 20), "'" + path_or_word + "'");
  }
  // The same from a file's content; what: its name in errors. gpt2_merges: how many a tokenizer.json must have; tests
  // take fewer.
  static Tokenizer parse(std::string_view content, const std::string& what, size_t gpt2_merges = 50000);
  // A vocabulary of our own, from its merges in order. Their ids must be smaller than 256 + the merge's place.
  explicit Tokenizer(std::vector<Merge> merges) : Tokenizer(Layout::own, std::move(merges), "the merges") {}

  // Writes our own format, which load() reads; the file appears whole or not at all.
  void save(const std::string& path) const { write_file(path, serialize()); }
  std::string serialize() const;

  // V: how many ids there are, special ones included (of GPT-2's 50,265 two have no use).
  int32_t vocab_size() const { return static_cast<int32_t>(names_at_ + names_.size()); }
  // Depends on the vocabulary and the layout of ids alone; never 0. Shards carry it.
  uint64_t hash() const { return hash_; }
  std::string description() const {
    return layout_ == Layout::gpt2 ? "GPT-2"
           : merges_.empty()       ? "bytes"
                                   : str("byte-level BPE of ", 256 + merges_.size());
  }

  bool is_special(int32_t id) const { return static_cast<size_t>(id) >= names_at_; }
  // The bytes that an id stands for; none for a special id. The id must be below vocab_size().
  std::string_view bytes_of(int32_t id) const {
    const size_t i = id;
    return is_special(id) ? std::string_view() : std::string_view(bytes_).substr(starts_[i], length_of(i));
  }
  // The id for a terminal: its bytes made printable, or a special id's name.
  std::string printable(int32_t id) const { return is_special(id) ? name_of(id) : gca::printable(bytes_of(id)); }

  // ids of any bytes; decode gives exactly these bytes back. Encoding much text in pieces: see Encoder.
  std::vector<int32_t> encode(std::string_view text) const;
  // Appends what the ids stand for; a special id as its name (<|endoftext|>). An id outside the vocabulary is an Error.
  void decode(std::span<const int32_t> ids, std::string& out) const {
    for (const int32_t id : ids) {
      if (id < 0 || id >= vocab_size())
        throw Error(str("token id ", id, ": expected 0 to ", vocab_size() - 1, ", the vocabulary of ", description(),
                        "; these ids were made with another tokenizer"));
      if (is_special(id)) out += name_of(id);
      else out += bytes_of(id);
    }
  }
  std::string decode(std::span<const int32_t> ids) const {
    std::string out;
    decode(ids, out);
    return out;
  }

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

  // GPT-2's ids of bytes: first those that print, in their order, then the others.
  static bool gpt2_prints(int byte) { return (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173); }

  size_t length_of(size_t id) const { return starts_[id + 1] - starts_[id]; }
  std::string name_of(int32_t id) const { return "<|" + names_[static_cast<size_t>(id) - names_at_] + "|>"; }

  // What the pair merges to, or none.
  uint32_t merged(uint32_t left, uint32_t right) const {
    const uint64_t key = uint64_t{left} << 21 | right, hash = hash_of(key);
    if (!(filter_[hash >> 51] >> (hash >> 45 & 63) & 1)) return none;
    size_t slot = hash >> pairs_shift_;
    while (pairs_[slot] >> 21 != key && pairs_[slot] != 0) slot = (slot + 1) & (pairs_.size() - 1);
    return static_cast<uint32_t>(pairs_[slot] & 0x1FFFFF) - 1;  // 0 - 1 is none
  }
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

inline Tokenizer::Tokenizer(Layout layout, std::vector<Merge> merges, const std::string& what)
    : layout_(layout), merges_(std::move(merges)) {
  const size_t ordinary = 256 + merges_.size();
  if (ordinary > max_vocabulary)
    throw Error(str(what, ": expected a vocabulary of at most ", max_vocabulary, ", found ", ordinary,
                    "; choose a smaller one"));
  names_at_ = ordinary;
  end_of_text = static_cast<int32_t>(ordinary);
  if (layout == Layout::gpt2) {
    names_ = {"endoftext", "KEY", "END", "ASK", "ARROW", "COMMA", "unused", "unused", "landmark"};
    KEY = end_of_text + 1;
    END = KEY + 1;
    ASK = KEY + 2;
    ARROW = KEY + 3;
    COMMA = KEY + 4;
    landmark = KEY + 7;
  } else {
    names_ = {"endoftext", "landmark", "KEY", "END", "ASK", "ARROW", "COMMA"};
    landmark = end_of_text + 1;
    KEY = landmark + 1;
    END = landmark + 2;
    ASK = landmark + 3;
    ARROW = landmark + 4;
    COMMA = landmark + 5;
  }

  uint32_t next = 0;
  for (const bool first : {true, false})
    for (int byte = 0; byte < 256; byte++)
      if ((layout == Layout::own || gpt2_prints(byte)) == first) {
        byte_ids_[byte] = next++;
        starts_.push_back(static_cast<uint32_t>(bytes_.size()));
        bytes_ += static_cast<char>(byte);
      }

  pairs_shift_ = 64 - static_cast<int>(std::bit_width(2 * merges_.size() + 1));
  pairs_.assign(size_t{1} << (64 - pairs_shift_), 0);
  filter_.assign(8192, 0);
  byte_pairs_.assign(65536, none);
  for (size_t r = 0; r < merges_.size(); r++) {
    const uint32_t left = merges_[r].left, right = merges_[r].right;
    const size_t id = 256 + r;
    const auto bad = [&](const char* expected) {
      return Error(str(what, ": merge ", r, ": expected ", expected, ", found ids ", left, " and ", right,
                       "; the file is damaged: make it anew"));
    };
    if (left >= id || right >= id) throw bad("two ids that bytes or earlier merges have");
    if (merged(left, right) != none) throw bad("a pair that no earlier merge has");
    const size_t left_at = starts_[left], right_at = starts_[right];
    starts_.push_back(static_cast<uint32_t>(bytes_.size()));
    const size_t left_bytes = length_of(left), right_bytes = length_of(right);
    if (left_bytes + right_bytes > max_token_bytes)
      throw bad(str("a token of at most ", max_token_bytes, " bytes").c_str());
    if (bytes_.size() + left_bytes + right_bytes > max_all_bytes)
      throw bad(str("at most ", max_all_bytes, " bytes in all tokens").c_str());
    bytes_.append(bytes_, left_at, left_bytes).append(bytes_, right_at, right_bytes);
    const uint64_t key = uint64_t{left} << 21 | right;
    const uint64_t key_hash = hash_of(key);
    filter_[key_hash >> 51] |= uint64_t{1} << (key_hash >> 45 & 63);
    size_t slot = key_hash >> pairs_shift_;
    while (pairs_[slot]) slot = (slot + 1) & (pairs_.size() - 1);
    pairs_[slot] = key << 21 | (id + 1);
    if (left < 256 && right < 256) {
      const auto byte = [&](size_t at) { return static_cast<unsigned char>(bytes_[at]); };
      byte_pairs_[256 * byte(left_at) + byte(right_at)] = static_cast<uint32_t>(id);
    }
  }
  starts_.push_back(static_cast<uint32_t>(bytes_.size()));

  hash_ = 0xCBF29CE484222325u;  // FNV-1a, 64 bits
  const auto mix = [&](uint32_t word) {
    for (int shift = 0; shift < 32; shift += 8) hash_ = (hash_ ^ ((word >> shift) & 255)) * 0x100000001B3u;
  };
  mix(static_cast<uint32_t>(layout));
  for (const Merge& merge : merges_) {
    mix(merge.left);
    mix(merge.right);
  }
  if (hash_ == 0) hash_ = 1;
}

inline std::string Tokenizer::serialize() const {
  std::string out(magic, 8);
  const uint32_t words[3] = {version, static_cast<uint32_t>(layout_), static_cast<uint32_t>(merges_.size())};
  out.append(reinterpret_cast<const char*>(words), sizeof words);
  out.append(reinterpret_cast<const char*>(merges_.data()), merges_.size() * sizeof(Merge));
  return out.append(reinterpret_cast<const char*>(&hash_), sizeof hash_);
}

inline Tokenizer Tokenizer::parse(std::string_view content, const std::string& what, size_t gpt2_merges) {
  if (content.substr(0, 8) == std::string_view(magic, 8)) return parse_own(content, what);
  const size_t first = content.find_first_not_of(" \t\r\n");
  if (first != content.npos && content[first] == '{') return parse_gpt2(content, what, gpt2_merges);
  throw Error(what +
              ": expected a tokenizer (a file that tokenizer-train wrote, GPT-2's tokenizer.json, or the word bytes), "
              "found something "
              "else; check the path");
}

inline Tokenizer Tokenizer::parse_own(std::string_view content, const std::string& what) {
  uint32_t words[3] = {};
  if (content.size() >= header_bytes) memcpy(words, content.data() + 8, sizeof words);
  const auto [file_version, layout, count] = words;
  if (content.size() >= header_bytes && file_version != version)
    throw Error(str(what, ": expected version ", version, " of the format, found ", file_version,
                    "; another release wrote it: use that one, or make the file anew"));
  const uint64_t expected_bytes = header_bytes + uint64_t{count} * sizeof(Merge) + 8;
  if (content.size() != expected_bytes)
    throw Error(str(what, ": expected ", expected_bytes, " bytes for ", count, " merges, found ", content.size(),
                    "; the file is cut off or damaged: make it anew"));
  if (layout > 1)
    throw Error(str(what, ": layout of ids: expected 0 (own) or 1 (GPT-2), found ", layout,
                    "; the file is damaged: make it anew"));
  std::vector<Merge> merges(count);
  if (count) memcpy(merges.data(), content.data() + header_bytes, count * sizeof(Merge));
  Tokenizer tokenizer(static_cast<Layout>(layout), std::move(merges), what);
  uint64_t hash;
  memcpy(&hash, content.data() + content.size() - 8, 8);
  if (hash != tokenizer.hash_)
    throw Error(str(what, ": expected the hash ", hex(tokenizer.hash_, 16), " at the end, found ", hex(hash, 16),
                    "; the file is damaged: make it anew"));
  return tokenizer;
}

inline Tokenizer Tokenizer::parse_gpt2(std::string_view content, const std::string& what, size_t merge_count) {
  const Json json = parse_json(content, what);
  const JsonField model = JsonField(json, what).at("model");
  const auto expect = [](const JsonField& field, bool holds, const std::string& expected) {
    if (!holds)
      throw Error(field.where() + ": expected " + expected +
                  ", as GPT-2's vocabulary has, found something else; no other tokenizer.json is "
                  "read here: learn one with tokenizer-train");
  };
  const JsonField vocab = model.at("vocab"), merge_list = model.at("merges");
  expect(vocab, vocab.members().size() >= 256 + merge_count + 1,
         str(256 + merge_count + 1, " entries or more"));  // what follows is special, and ours to name
  expect(merge_list, merge_list.items().size() == merge_count, str(merge_count, " merges"));
  const auto id_is = [&](const std::string& token, size_t id) {
    const Json* entry = vocab.json().find(token);
    return entry && *entry == Json(id);
  };
  // A byte is written as the character of its number if that prints, the others as U+0100 and on.
  size_t next = 0, moved = 0x100;
  for (const bool first : {true, false})
    for (int byte = 0; byte < 256; byte++)
      if (gpt2_prints(byte) == first) {
        const size_t code = first ? static_cast<size_t>(byte) : moved++;
        const std::string token =
            code < 0x80 ? std::string(1, static_cast<char>(code))
                        : std::string{static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
        expect(vocab, id_is(token, next), str("id ", next, " for byte ", byte));
        next++;
      }
  expect(vocab, id_is("<|endoftext|>", 256 + merge_count), str("id ", 256 + merge_count, " for <|endoftext|>"));
  std::vector<Merge> merges;
  const bool in_pairs = merge_count && merge_list.at(size_t{0}).json().dump()[0] ==
                                           '[';  // newer files: ["left", "right"], not "left right"
  for (size_t r = 0; r < merge_count; r++) {
    const JsonField item = merge_list.at(r);
    const std::string first = in_pairs ? item.at(size_t{0}).string() : item.string();
    const std::string left = first.substr(0, in_pairs ? first.npos : first.find(' '));
    const std::string right = in_pairs ? item.at(1).string() : first.substr(std::min(left.size() + 1, first.size()));
    const Json *left_id = vocab.json().find(left), *right_id = vocab.json().find(right);
    expect(item, left_id && right_id && id_is(left + right, 256 + r),
           str("two tokens of the vocabulary that make token ", 256 + r));
    const auto id = [&](const Json* entry) {
      return static_cast<uint32_t>(JsonField(*entry, vocab.where()).integer(0, UINT32_MAX));
    };
    merges.push_back({id(left_id), id(right_id)});
  }
  return Tokenizer(Layout::gpt2, std::move(merges), what);
}

// ---- encoding -----------------------------------------------------------------------------------------------------

// Encodes text after text, with a cache of words that it keeps between calls: one for each thread. The cache is a table
// of fixed size in which a word replaces whatever had its place, so it is bounded, and exact: a word is found by all of
// its bytes. The tokenizer must outlive it.
class Encoder {
 public:
  explicit Encoder(const Tokenizer& tokenizer)
      : tokenizer_(tokenizer),
        cache_(static_cast<Entry*>(calloc(cache_size, sizeof(Entry))), &free) {  // pages come as they are touched
    if (!cache_)
      throw Error(str("out of memory: the tokenizer needs ", cache_size * sizeof(Entry) / 1024, " KiB a thread"));
  }

  // Appends the ids of text, which is one whole text or the next piece of one that WordScanner::next_cut cut.
  void append(std::string_view text, std::vector<int32_t>& out) {
    struct Word {
      const char* begin;
      size_t length;
      Entry* entry;
      uint64_t low, high;
    } words[32];
    int32_t block[4096];  // ids on their way to out
    size_t filled = 0;
    for (const char *p = text.data(), *end = p + text.size(); p < end;) {
      size_t count = 0;
      for (; count < std::size(words) && p < end;
           count++) {  // all are found before the first is looked up: their entries are on their way
        const char* word_end = scanner_.word_end(p, end);
        Word& word = words[count] = {p, static_cast<size_t>(word_end - p), nullptr, 0, 0};
        if (word.length <= max_cached_bytes) {
          key_of(p, word.length, end, word.low, word.high);
          word.entry =
              &cache_
                   .get()[((word.low * 0x9E3779B97F4A7C15u) ^ (word.high * 0xC2B2AE3D27D4EB4Fu)) >> (64 - cache_bits)];
          __builtin_prefetch(word.entry, 1);
        }
        p = word_end;
      }
      for (const Word& word : std::span(words, count)) {
        if (filled + max_cached_bytes > std::size(block) || !word.entry) {
          out.insert(out.end(), block, block + filled);
          filled = 0;
        }
        if (!word.entry) {
          append_long(word.begin, word.length, out);
        } else if (word.entry->low == word.low && word.entry->high == word.high) {
          filled += unpack(*word.entry, block + filled);
        } else {
          const size_t ids = merge(word.begin, word.length);
          std::copy_n(ids_.data(), ids, block + filled);
          if (ids <= max_cached_ids) *word.entry = packed({word.low, word.high, {}}, ids);
          filled += ids;
        }
      }
    }
    out.insert(out.end(), block, block + filled);
  }

  // The same, but end_of_text for every <|endoftext|> in the text: how corpora in one file part their documents.
  void append_marked(std::string_view text, std::vector<int32_t>& out) {
    constexpr std::string_view marker = "<|endoftext|>";
    for (size_t at; (at = text.find(marker)) != text.npos; text.remove_prefix(at + marker.size())) {
      append(text.substr(0, at), out);
      out.push_back(tokenizer_.end_of_text);
    }
    append(text, out);
  }

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

  static void key_of(const char* p, size_t length, const char* end, uint64_t& low, uint64_t& high) {
    uint64_t word[2] = {};
    if (end - p >= 16) {
      memcpy(word, p, 16);  // of constant size: one load
      if (length <= 8) {
        word[0] = word[0] << (64 - 8 * length) >> (64 - 8 * length);
        word[1] = 0;
      } else word[1] = word[1] << (128 - 8 * length) >> (128 - 8 * length);
    } else {
      memcpy(word, p, length);
    }
    low = word[0];
    high = word[1] | uint64_t{length} << 56;
  }
  Entry packed(Entry key, size_t count) const {
    for (size_t i = 0; i < count; i++) key.ids[i / 3] |= uint64_t{ids_[i]} << (20 * (i % 3));
    key.ids[0] |= uint64_t{count} << 60;
    return key;
  }
  static size_t unpack(const Entry& entry, int32_t* out) {
    const auto id = [&](int i) { return static_cast<int32_t>(entry.ids[i / 3] >> (20 * (i % 3)) & 0xFFFFF); };
    const size_t count = entry.ids[0] >> 60;
    out[0] = id(0);
    out[1] = id(1);
    out[2] = id(2);  // more than needed: cheaper than a branch for each
    if (count > 3) {
      out[3] = id(3);
      out[4] = id(4);
      out[5] = id(5);
    }
    return count;
  }

  // BPE of n bytes: their ids are ids_[0 .. result). The earliest merge that is possible, the leftmost of equals, again
  // and again.
  size_t merge(const char* p, size_t n) {
    return n <= 8                 ? merge_short<8>(p, n)
           : n <= 16              ? merge_short<16>(p, n)
           : n <= shortest_window ? merge_short<shortest_window>(p, n)
                                  : merge_long(p, n);
  }

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

  // For many bytes, in time n log n.
  size_t merge_long(const char* p, size_t n) {
    ids_.resize(std::max(n, ids_.size()));
    links_.resize(n);
    queue_.clear();
    const auto byte = [p](size_t i) { return static_cast<unsigned char>(p[i]); };
    const auto set = [&](size_t i, uint32_t made) {
      links_[i].made = made;
      if (made == Tokenizer::none) return;
      queue_.push_back(uint64_t{made} << 32 | i);
      std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
    };
    for (size_t i = 0; i < n; i++) {
      ids_[i] = tokenizer_.byte_ids_[byte(i)];
      links_[i] = {Tokenizer::none, static_cast<uint32_t>(i - 1), static_cast<uint32_t>(i + 1)};
      if (i + 1 < n) set(i, tokenizer_.byte_pairs_[256 * byte(i) + byte(i + 1)]);
    }
    while (!queue_.empty()) {
      const uint32_t made = static_cast<uint32_t>(queue_.front() >> 32), i = static_cast<uint32_t>(queue_.front());
      std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
      queue_.pop_back();
      if (links_[i].made != made) continue;  // one of the two has merged since
      const uint32_t before = links_[i].before, j = links_[i].after, after = links_[j].after;
      ids_[i] = made;
      links_[j].made = Tokenizer::none;
      links_[i].after = after;
      if (after < n) links_[after].before = i;
      set(i, after < n ? tokenizer_.merged(made, ids_[after]) : Tokenizer::none);
      if (before < n) set(before, tokenizer_.merged(ids_[before], made));
    }
    size_t count = 0;
    for (size_t i = 0; i < n; i = links_[i].after) ids_[count++] = ids_[i];
    return count;
  }

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

inline void Encoder::append_long(const char* p, size_t length, std::vector<int32_t>& out) {
  const size_t start = out.size();
  size_t window = shortest_window, before = length, bytes = 0, count = 0,
         failed = 0;                // failed: the furthest place where no seam held
  uint32_t seam = Tokenizer::none;  // the token after those in out, as a window found it
  for (size_t at = 0; at < length;) {
    // Text that repeats itself has the same window again.
    const bool same =
        bytes == shortest_window && window == bytes && length - at >= bytes && !memcmp(p + at, p + before, bytes);
    bytes = std::min(window, length - at);
    if (!same) count = merge(p + at, bytes);
    before = at;
    if (seam != Tokenizer::none && ids_[0] != seam) {
      failed = std::max(failed, at);
      for (const size_t back_to = at - std::min(at, window); at > back_to; out.pop_back())
        at -= tokenizer_.length_of(seam = static_cast<uint32_t>(out.back()));
      if (out.size() == start) seam = Tokenizer::none;
      window *= 4;
      continue;
    }
    const size_t sure = at + bytes == length ? bytes : bytes - bytes / 4;
    size_t kept = 0, kept_bytes = 0;
    while (kept < count && kept_bytes + tokenizer_.length_of(ids_[kept]) <= sure)
      kept_bytes += tokenizer_.length_of(ids_[kept++]);
    out.insert(out.end(), ids_.begin(), ids_.begin() + static_cast<ptrdiff_t>(kept));
    at += kept_bytes;
    seam = kept < count ? ids_[kept] : Tokenizer::none;
    window = kept == 0     ? 4 * window
             : at > failed ? shortest_window
                           : window;  // a place is never failed at twice with one window
  }
}

inline std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  Encoder(*this).append(text, ids);
  return ids;
}

}  // namespace gca
