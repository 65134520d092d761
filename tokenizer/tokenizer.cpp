// A vocabulary read, checked and written; text to ids and back.
#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/foreign.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "base/text.h"
#include "common.h"
#include "tokenizer/pretokens.h"

namespace gca {

namespace {

// GPT-2's vocabulary in two files, as the ends of their names.
constexpr std::pair<const char*, const char*> pairs_of_files[] = {{"vocab.json", "merges.txt"},
                                                                  {"encoder.json", "vocab.bpe"}};

std::string quoted(const std::string& path) { return "'" + path + "'"; }
std::string read_vocabulary(const std::string& path) { return read_file(path, size_t{64} << 20); }
bool is_there(const std::string& path) { return look_at(path).kind != Found::none; }

// Of a folder the file that has its tokenizer.
std::string tokenizer_in(const std::string& folder) {
  for (const char* name : {"tokenizer.json", "vocab.json", "encoder.json", "tokenizer.bpe"})
    if (is_there(folder + "/" + name)) return folder + "/" + name;
  throw Error(quoted(folder) +
              ": expected a folder with a tokenizer.json, or with vocab.json and merges.txt, found neither; fetch "
              "tokenizer.json, or give a file that tokenizer-train wrote");
}

std::string_view without_mark(std::string_view content) {
  if (content.starts_with(byte_order_mark)) content.remove_prefix(byte_order_mark.size());
  return content;
}

}  // namespace

Tokenizer Tokenizer::load(const std::string& path_or_word) {
  if (path_or_word == "bytes") return Tokenizer(std::vector<Merge>());
  const std::string path = look_at(path_or_word).kind == Found::folder ? tokenizer_in(path_or_word) : path_or_word;
  const auto with_end = [&](const std::string& end, const std::string& other) {
    return path.substr(0, path.size() - end.size()) + other;
  };
  for (const auto& [vocab_end, merges_end] : pairs_of_files)
    for (const std::string end : {vocab_end, merges_end}) {
      if (!path.ends_with(end)) continue;
      const std::string vocab = with_end(end, vocab_end), merges = with_end(end, merges_end),
                        other = end == vocab_end ? merges : vocab;
      if (is_there(path) && !is_there(other))
        throw Error(quoted(path) + ": expected '" + other +
                    "' beside it, with which it makes GPT-2's tokenizer, found none; fetch that too, or take "
                    "tokenizer.json");
      return parse_pair(read_vocabulary(vocab), quoted(vocab), read_vocabulary(merges), quoted(merges));
    }
  if (SafetensorsFile::begins(File::open(path))) {
    const SafetensorsFile file = SafetensorsFile::open(path);
    const auto found = file.metadata().find(metadata_name);
    if (found == file.metadata().end())
      throw Error("'" + path + "': expected a tokenizer in the metadata, under \"" + metadata_name +
                  "\", found none; export the checkpoint anew, or give its tokenizer");
    const std::string what = "'" + path + "' (" + metadata_name + ")";
    return parse(from_base64(found->second, what), what);
  }
  return parse(read_vocabulary(path), quoted(path));
}

std::string Tokenizer::description() const {
  return layout_ == Layout::gpt2 ? "GPT-2"
         : merges_.empty()       ? "bytes"
                                 : str("byte-level BPE of ", 256 + merges_.size());
}

std::string_view Tokenizer::bytes_of(int32_t id) const {
  const size_t i = id;
  return is_special(id) ? std::string_view() : std::string_view(bytes_).substr(starts_[i], length_of(i));
}

void Tokenizer::decode(std::span<const int32_t> ids, std::string& out) const {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size())
      throw Error(str("token id ", id, ": expected 0 to ", vocab_size() - 1, ", the vocabulary of ", description(),
                      "; these ids were made with another tokenizer"));
    if (is_special(id)) out += name_of(id);
    else out += bytes_of(id);
  }
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string out;
  decode(ids, out);
  return out;
}

std::string Tokenizer::words(std::span<const int32_t> ids, size_t first, size_t last) const {
  constexpr size_t around = 4;  // ids that may have the other bytes of a character: three, and a landmark between
  std::string text;
  size_t from = 0, to = 0;
  for (size_t i = first - std::min(first, around); i < std::min(ids.size(), last + around); i++) {
    if (i == first) from = text.size();
    if (ids[i] != landmark) decode(ids.subspan(i, 1), text);
    if (i + 1 == last) to = text.size();
  }
  from = before_parted_character(text, from);
  return printable(std::string_view(text).substr(from, std::max(from, before_parted_character(text, to)) - from));
}

// What the pair merges to, or none.
uint32_t Tokenizer::merged(uint32_t left, uint32_t right) const {
  const uint64_t key = uint64_t{left} << 21 | right, hash = hash_of(key);
  if (!(filter_[hash >> 51] >> (hash >> 45 & 63) & 1)) return none;
  size_t slot = hash >> pairs_shift_;
  while (pairs_[slot] >> 21 != key && pairs_[slot] != 0) slot = (slot + 1) & (pairs_.size() - 1);
  return static_cast<uint32_t>(pairs_[slot] & 0x1FFFFF) - 1;  // 0 - 1 is none
}

// ---- the vocabulary -----------------------------------------------------------------------------------------------
Tokenizer::Tokenizer(Layout layout, std::vector<Merge> merges, const std::string& what)
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

std::string Tokenizer::serialize() const {
  std::string out(magic, 8);
  const uint32_t words[3] = {version, static_cast<uint32_t>(layout_), static_cast<uint32_t>(merges_.size())};
  out.append(reinterpret_cast<const char*>(words), sizeof words);
  out.append(reinterpret_cast<const char*>(merges_.data()), merges_.size() * sizeof(Merge));
  return out.append(reinterpret_cast<const char*>(&hash_), sizeof hash_);
}

Tokenizer Tokenizer::parse(std::string_view content, const std::string& what, size_t gpt2_merges) {
  if (content.substr(0, 8) == std::string_view(magic, 8)) return parse_own(content, what);
  const std::string_view text = without_mark(content);
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first != text.npos && text[first] == '{') return parse_gpt2(text, what, gpt2_merges);
  throw Error(what + ": expected a tokenizer (" + accepted + "), found something else" +
              foreign_remark(content, "; check the path"));
}

Tokenizer Tokenizer::parse_own(std::string_view content, const std::string& what) {
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

namespace {

void expect_gpt2(bool holds, const std::string& where, const std::string& expected) {
  if (!holds)
    throw Error(where + ": expected " + expected +
                ", as GPT-2's vocabulary has, found something else; no other tokenizer.json is "
                "read here: learn one with tokenizer-train");
}

}  // namespace

Tokenizer Tokenizer::parse_gpt2(std::string_view content, const std::string& what, size_t merge_count) {
  const Json json = parse_json(content, what);
  const JsonField root(json, what);
  if (!root.has("model"))
    throw Error(what + ": expected GPT-2's tokenizer.json, found no field \"model\"" +
                foreign_remark(content, "; check the path"));
  const JsonField model = root.at("model"), vocab = model.at("vocab"), list = model.at("merges");
  std::vector<std::pair<std::string, std::string>> merges;
  for (size_t r = 0; r < list.items().size(); r++) {
    const JsonField item = list.at(r);
    if (item.json().dump()[0] == '[') {  // newer files: ["left", "right"], not "left right"
      merges.push_back({item.at(size_t{0}).string(), item.at(1).string()});
    } else {
      const std::string both = item.string(), left = both.substr(0, both.find(' '));
      merges.push_back({left, both.substr(std::min(left.size() + 1, both.size()))});
    }
  }
  return of_gpt2(
      vocab, merges, list.where(), [&](size_t r) { return list.at(r).where(); }, what, merge_count);
}

Tokenizer Tokenizer::parse_pair(std::string_view vocab, const std::string& vocab_name, std::string_view merges,
                                const std::string& merges_name, size_t gpt2_merges) {
  const Json json = parse_json(without_mark(vocab), vocab_name);
  std::vector<std::pair<std::string, std::string>> pairs;
  std::istringstream lines{std::string(without_mark(merges))};
  for (std::string line; std::getline(lines, line);) {
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty() || (pairs.empty() && line.starts_with("#version"))) continue;
    const size_t space = line.find(' ');
    pairs.push_back({line.substr(0, space), space == line.npos ? "" : line.substr(space + 1)});
  }
  return of_gpt2(
      JsonField(json, vocab_name), pairs, merges_name, [&](size_t r) { return str(merges_name, ": merge ", r); },
      vocab_name, gpt2_merges);
}

Tokenizer Tokenizer::of_gpt2(const JsonField& vocab, const std::vector<std::pair<std::string, std::string>>& merges,
                             const std::string& merges_name, const std::function<std::string(size_t)>& where,
                             const std::string& what, size_t merge_count) {
  expect_gpt2(vocab.members().size() >= 256 + merge_count + 1, vocab.where(),
              str(256 + merge_count + 1, " entries or more"));  // what follows is special, and ours to name
  expect_gpt2(merges.size() == merge_count, merges_name, str(merge_count, " merges"));
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
        expect_gpt2(id_is(token, next), vocab.where(), str("id ", next, " for byte ", byte));
        next++;
      }
  expect_gpt2(id_is("<|endoftext|>", 256 + merge_count), vocab.where(),
              str("id ", 256 + merge_count, " for <|endoftext|>"));
  std::vector<Merge> in_ids;
  for (size_t r = 0; r < merge_count; r++) {
    const auto& [left, right] = merges[r];
    const Json *left_id = vocab.json().find(left), *right_id = vocab.json().find(right);
    if (!left_id || !right_id || !id_is(left + right, 256 + r))
      expect_gpt2(false, where(r), str("two tokens of the vocabulary that make token ", 256 + r));
    const auto id = [&](const Json* entry) {
      return static_cast<uint32_t>(JsonField(*entry, vocab.where()).integer(0, UINT32_MAX));
    };
    in_ids.push_back({id(left_id), id(right_id)});
  }
  return Tokenizer(Layout::gpt2, std::move(in_ids), what);
}

// ---- encoding -----------------------------------------------------------------------------------------------------
Encoder::Encoder(const Tokenizer& tokenizer)
    : tokenizer_(tokenizer),
      cache_(static_cast<Entry*>(calloc(cache_size, sizeof(Entry))), &free) {  // pages come as they are touched
  if (!cache_)
    throw Error(str("out of memory: the tokenizer needs ", cache_size * sizeof(Entry) / 1024,
                    " KiB a thread; use fewer --threads"));
}

void Encoder::append(std::string_view text, std::vector<int32_t>& out) {
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
            &cache_.get()[((word.low * 0x9E3779B97F4A7C15u) ^ (word.high * 0xC2B2AE3D27D4EB4Fu)) >> (64 - cache_bits)];
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

void Encoder::append_marked(std::string_view text, std::vector<int32_t>& out) {
  for_each_document(text, [&](std::string_view document, bool first) {
    if (!first) out.push_back(tokenizer_.end_of_text);
    append(document, out);
  });
}

void Encoder::key_of(const char* p, size_t length, const char* end, uint64_t& low, uint64_t& high) {
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

Encoder::Entry Encoder::packed(Entry key, size_t count) const {
  for (size_t i = 0; i < count; i++) key.ids[i / 3] |= uint64_t{ids_[i]} << (20 * (i % 3));
  key.ids[0] |= uint64_t{count} << 60;
  return key;
}

size_t Encoder::unpack(const Entry& entry, int32_t* out) {
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
size_t Encoder::merge(const char* p, size_t n) {
  return n <= 8                 ? merge_short<8>(p, n)
         : n <= 16              ? merge_short<16>(p, n)
         : n <= shortest_window ? merge_short<shortest_window>(p, n)
                                : merge_long(p, n);
}

// For many bytes, in time n log n.
size_t Encoder::merge_long(const char* p, size_t n) {
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

void Encoder::append_long(const char* p, size_t length, std::vector<int32_t>& out) {
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

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  Encoder(*this).append(text, ids);
  return ids;
}

}  // namespace gca
