// Token shards on disk: written as a set, found by a pattern, checked, read; rows by permutation.
#include "dataloader.h"

#include <fcntl.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/foreign.h"
#include "base/json.h"
#include "common.h"
#include "tokenizer/tokenizer.h"

namespace gca {

namespace {

// PREFIX of PREFIX_000123.bin; "" where a name is not of that kind.
std::string set_of(const std::string& path) {
  constexpr size_t tail = sizeof "_000000.bin" - 1;
  if (path.size() <= tail || !path.ends_with(".bin") || path[path.size() - tail] != '_') return "";
  const std::string number = path.substr(path.size() - tail + 1, 6);
  return number.find_first_not_of("0123456789") == number.npos ? path.substr(0, path.size() - tail) : "";
}

// The end of a message about a file that is no shard: what it is.
std::string other_kind(const File& file) {
  const int64_t size = file.size_bytes();
  const std::string head = file.beginning(foreign_head_bytes);
  return foreign_remark(
      head, looks_like_text(head) ? "; it is text: make shards of it with tokenize"
            : size % 2
                ? "; make shards with tokenize"
                : str("; without a header it may be bare ids, as nanoGPT's prepare.py writes them: if these are ",
                      size / 2, " of uint16, put 256 int32 before them, 20240520, 1, ", size / 2,
                      " and zeros; or make shards of the text with tokenize"));
}

// Is there, and locked, while a set is written: until the last shard has its name.
std::string unfinished_mark(const std::string& prefix) {
  return parent_folder(prefix) + "/." + std::filesystem::path(prefix).filename().string() + ".unfinished";
}

// The shards of a set that are there.
std::vector<std::string> shards_of(const std::string& prefix) {
  const std::string folder = parent_folder(prefix);
  std::vector<std::string> paths;
  if (std::error_code none; !std::filesystem::is_directory(folder, none)) return paths;
  for (const std::string& file : list_folder(folder))
    if (set_of(file) == std::filesystem::path(prefix).filename().string()) paths.push_back(folder + "/" + file);
  return paths;
}

}  // namespace

ShardWriter::ShardWriter(std::string prefix, const Tokenizer& tokenizer, int64_t shard_tokens)
    : prefix_(std::move(prefix)),
      hash_(tokenizer.hash()),
      wide_(tokenizer.vocab_size() > 65536),
      shard_tokens_(shard_tokens) {
  if (shard_tokens < 1 || shard_tokens > ShardHeader::max_tokens)
    throw Error(str("the size of a shard: expected 1 to ", ShardHeader::max_tokens, " tokens, found ", shard_tokens));
  const std::string mark = unfinished_mark(prefix_), name = std::filesystem::path(prefix_).filename().string();
  // What a run that was stopped left behind: named shards of a set that is not whole, and whole ones without a name.
  if (remove_if_unlocked(mark))
    for (const std::string& path : shards_of(prefix_)) remove_tree(path);
  if (std::error_code none; std::filesystem::exists(mark, none))
    throw Error(
        "'" + prefix_ + "' is being written by another tokenize ('" + mark +
        "' says so): wait for it, or choose another name; if none runs (where a file system has no locks nobody "
        "can tell), remove that file and the shards");
  if (const std::vector<std::string> there = shards_of(prefix_); !there.empty())
    throw Error("'" + there[0] +
                "' is there already: remove the old shards or choose another name, so that two sets are never mixed");
  mark_ = File::create(mark);
  mark_->lock();
  remove_leftovers(parent_folder(prefix_), [&](const std::string& shard) { return set_of(shard) == name; });
}

ShardWriter::~ShardWriter() {
  files_.clear();
  if (std::error_code none; mark_) std::filesystem::remove(mark_->path(), none);
}

void ShardWriter::append(std::span<const int32_t> ids) {
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

void ShardWriter::commit(std::initializer_list<ShardWriter*> sets) {
  for (ShardWriter* set : sets) {
    set->flush();
    sync_folder(parent_folder(set->prefix_));  // the mark, before the first name
  }
  for (ShardWriter* set : sets) {
    for (auto& file : set->files_) file->commit();
    set->files_.clear();
  }
  for (ShardWriter* set : sets) {
    remove_tree(set->mark_->path());
    set->mark_.reset();
  }
}

void ShardWriter::flush() {
  if (shard_.empty()) return;
  ShardHeader header;
  std::copy_n(wide_ ? ShardHeader::wide : ShardHeader::narrow, 2, header.words);
  header.words[2] = static_cast<int32_t>(shard_.size() / (wide_ ? 4 : 2));
  memcpy(header.words + 3, &hash_, 8);
  auto file = std::make_unique<AtomicFile>(str(prefix_, "_", right(files_.size(), 6, '0'), ".bin"));
  file->write(&header, sizeof header);
  file->write(shard_.data(), shard_.size());
  file->close();  // there may be more shards than open files
  files_.push_back(std::move(file));
  shard_.clear();
}

TokenStream::TokenStream(const std::string& patterns, const Tokenizer& tokenizer)
    : vocab_size_(tokenizer.vocab_size()), pattern_(patterns) {
  for (size_t at = 0; (at = pattern_.find('\n', at)) != pattern_.npos;) pattern_.replace(at, 1, "', '");
  size_t unknown = 0;
  for (const std::string& path : glob_files(patterns)) {
    Shard shard = examine(path, tokenizer, unknown);
    if (shards_.size() >= files_to_keep_open()) shard.kept.reset();
    shard.first = tokens_;
    tokens_ += shard.tokens;
    shards_.push_back(std::move(shard));
  }
  if (unknown)
    notes_ = str("'", pattern_, "': ", unknown, " of ", shards_.size(),
                 " shards do not say which tokenizer made them; taken to be ", tokenizer.description());
}

void check_apart(const std::string& data, const std::string& val_data) {
  std::set<FileId> there;
  for (const std::string& path : glob_files(data)) there.insert(look_at(path).id);
  for (const std::string& path : glob_files(val_data))
    if (there.contains(look_at(path).id))
      throw Error("'" + path +
                  "' is of --data and of --val-data: what was trained on validates nothing; leave it out of one");
}

TokenStream::Shard TokenStream::examine(const std::string& path, const Tokenizer& tokenizer, size_t& unknown) const {
  Shard shard{path, File::open(path), {}, 0, 0, 0, 2, 0};
  const int64_t size = shard.bytes = shard.kept->size_bytes();
  shard.id = shard.kept->id();
  ShardHeader header;
  if (size >= ShardHeader::bytes) shard.kept->read(&header, sizeof header, 0);
  const auto is = [&](const int32_t* kind) { return header.words[0] == kind[0] && header.words[1] == kind[1]; };
  if (!is(ShardHeader::narrow) && !is(ShardHeader::wide))
    throw Error(
        str("'", path, "': expected a token shard (magic 20240520 version 1, or 20240801 version 7), found magic ",
            header.words[0], " version ", header.words[1], " in a file of ", size, " bytes", other_kind(*shard.kept)));
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
  const std::string set = set_of(path);
  if (std::error_code none; !set.empty() && std::filesystem::exists(unfinished_mark(set), none))
    throw Error(str("'", path, "' is of an unfinished set, of a tokenize that was stopped or still runs ('",
                    unfinished_mark(set), "' says so): wait for it, or tokenize the text again"));
  shard.header_crc = crc32c(&header, sizeof header);
  return shard;
}

std::string TokenStream::Shard::name() const { return std::filesystem::path(path).filename().string(); }

template <class Use>
auto TokenStream::with_file(const Shard& shard, Use&& use) {
  if (shard.kept) return use(*shard.kept);
  const File file = File::open(shard.path);
  if (file.id() != shard.id || file.size_bytes() != shard.bytes)
    throw Error("'" + shard.path +
                "' is another file than when this began: leave shards as they are while they are read");
  return use(file);
}

void TokenStream::read(int64_t first, int64_t count, int32_t* out, bool any_id) const {
  GCA_CHECK(first >= 0 && count >= 0 && count <= tokens_ - first, "tokens ", first, " + ", count, " of ", tokens_);
  auto shard = std::upper_bound(shards_.begin(), shards_.end(), first,
                                [](int64_t place, const Shard& s) { return place < s.first; }) -
               1;
  for (; count > 0; shard++) {
    const int64_t at = first - shard->first, here = std::min(count, shard->tokens - at);
    const size_t bytes = static_cast<size_t>(here) * static_cast<size_t>(shard->width);
    // uint16 go to the upper half of their place and are widened from there upwards.
    char* raw = reinterpret_cast<char*>(out + here) - bytes;
    with_file(*shard, [&](const File& file) { file.read(raw, bytes, ShardHeader::bytes + at * shard->width); });
    uint32_t largest = 0;
    for (int64_t i = 0; i < here; i++) {
      uint32_t id = 0;
      memcpy(&id, raw + i * shard->width, shard->width);
      out[i] = static_cast<int32_t>(id);
      largest = std::max(largest, id);
    }
    if (!any_id && largest >= static_cast<uint32_t>(vocab_size_))
      throw Error(str("'", shard->path, "': expected token ids below ", vocab_size_,
                      ", the size of the vocabulary, found ", largest, " among tokens ", at, " to ", at + here - 1,
                      "; it was made with another tokenizer or is damaged"));
    first += here;
    count -= here;
    out += here;
  }
}

Json TokenStream::state() const {
  Json shards = Json::array();
  for (const Shard& shard : shards_) {
    Json entry;
    entry["name"] = shard.name();
    entry["bytes"] = shard.bytes;
    entry["tokens"] = shard.tokens;
    entry["header_crc32c"] = shard.header_crc;
    entry["sample_crc32c"] = with_file(shard, sample_crc);
    shards.push_back(std::move(entry));
  }
  Json state;
  state["tokens"] = tokens_;
  state["shards"] = std::move(shards);
  return state;
}

void TokenStream::check_same(const JsonField& saved) const {
  const Json now = state();
  if (now == saved.json()) return;
  const JsonField saved_shards = saved.at("shards"), shards = JsonField(now, "").at("shards");
  const std::span<const Json> before = saved_shards.items(), here = shards.items();
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

// CRC-32C of 16 pieces of 4 KiB, evenly spread, the last one at the end.
uint32_t TokenStream::sample_crc(const File& file) {
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

int64_t permuted(int64_t index, int64_t count, uint64_t seed, uint64_t epoch) {
  const int half = static_cast<int>((std::bit_width(static_cast<uint64_t>(count - 1)) + 1) / 2);
  const uint64_t mask = (uint64_t{1} << half) - 1;
  uint64_t place = static_cast<uint64_t>(index);
  do {
    uint64_t left = place >> half, right = place & mask;
    for (uint32_t round = 0; round < 8; round++) {
      const Philox random = philox(seed, Draw::rows, static_cast<uint32_t>(right), round, static_cast<uint32_t>(epoch),
                                   static_cast<uint32_t>(epoch >> 32));
      left = std::exchange(right, left ^ (random.word[0] & mask));
    }
    place = left << half | right;
  } while (place >= static_cast<uint64_t>(count));
  return static_cast<int64_t>(place);
}

void spread_chunks(int32_t* tokens, int32_t* targets, int64_t real, int64_t C, int64_t S, int32_t landmark) {
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

Rows::Rows(const TokenStream& stream, const Tokenizer& tokenizer, int64_t chunks, int64_t slots, uint64_t seed,
           bool cross)
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
    throw Error(str("'", stream.pattern(), "': expected at least the ", cross ? step + 1 : 2, " tokens of one row of ",
                    chunks, " chunks, found ", stream.tokens(), "; give more text or fewer chunks"));
}

void Rows::fill_row(int64_t global_row, int32_t* tokens, int32_t* targets) const {
  fill_window(permuted(global_row % count_, count_, seed_, static_cast<uint64_t>(global_row / count_)), tokens,
              targets);
}

void Rows::fill_window(int64_t window, int32_t* tokens, int32_t* targets, int64_t times) const {
  GCA_CHECK(has_past(window, times), times, " windows up to ", window);
  const auto [first, own] = extent(window);
  const int64_t chunks = times * chunks_, past = (times - 1) * chunks_ * (slots_ - 1), real = past + own;
  stream_.read(first - past, real, tokens);  // packed at first: C*S is room for C*(S-1)+1
  std::fill(tokens + real, tokens + chunks * (slots_ - 1) + 1, end_of_text_);
  spread_chunks(tokens, targets, real, chunks, slots_, landmark_);
}

bool Rows::has_past(int64_t window, int64_t times) const {
  return times >= 1 && window - (starts_.empty() ? 0 : first_windows_[document_of(window)]) >= times - 1;
}

// One pass over the stream. A document goes from its end-of-text token to the next one, which it still predicts.
void Rows::find_documents() {
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

size_t Rows::document_of(int64_t window) const {
  GCA_CHECK(window >= 0 && window < count_, "window ", window, " of ", count_);
  if (starts_.empty()) return 0;
  const auto after = std::upper_bound(first_windows_.begin(), first_windows_.end(), window);
  return static_cast<size_t>(after - first_windows_.begin()) - 1;
}

// Where the window begins in the stream, and how many tokens it has there.
std::pair<int64_t, int64_t> Rows::extent(int64_t window) const {
  const size_t document = document_of(window);
  const int64_t step = chunks_ * (slots_ - 1);
  if (starts_.empty()) return {window * step, step + 1};
  const int64_t first = starts_[document] + (window - first_windows_[document]) * step;
  const int64_t end = document + 1 < starts_.size() ? starts_[document + 1] + 1 : stream_.tokens();
  return {first, std::min(step + 1, end - first)};
}

}  // namespace gca
