// A byte-level BPE learned from counted words.
#include "tokenizer/train.h"

#include <algorithm>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/threads.h"
#include "tokenizer/text_files.h"
#include "tokenizer/tokenizer.h"

namespace gca {

void WordCounts::add(const Piece& piece) {
  for (const auto& [word, count] : piece) {
    const auto [entry, is_new] = counts_.try_emplace(std::string(word), 0);
    entry->second += count;
    if (is_new) bytes_ += cost_of(entry->first);
  }
  for (int64_t rarest = 1; bytes_ > max_bytes_; rarest++)
    forgotten_ += static_cast<int64_t>(std::erase_if(counts_, [&](const auto& entry) {
      if (entry.second > rarest) return false;
      bytes_ -= cost_of(entry.first);
      return true;
    }));
}

std::vector<std::pair<std::string, int64_t>> WordCounts::sorted() {
  std::vector<std::pair<std::string, int64_t>> words(std::make_move_iterator(counts_.begin()),
                                                     std::make_move_iterator(counts_.end()));
  counts_.clear();
  bytes_ = 0;
  std::sort(words.begin(), words.end());
  return words;
}

MergeLearner::MergeLearner(const std::vector<std::pair<std::string, int64_t>>& words) {
  words_.reserve(words.size());
  for (const auto& [bytes, count] : words) {
    const uint32_t w = static_cast<uint32_t>(words_.size());
    words_.push_back({ids_.size(), static_cast<uint32_t>(bytes.size()), count});
    for (const char byte : bytes) ids_.push_back(static_cast<unsigned char>(byte));
    for (size_t i = 1; i < bytes.size(); i++) change(ids_[ids_.size() - i - 1], ids_[ids_.size() - i], count, w);
  }
  queue_fresh();
}

std::vector<Tokenizer::Merge> MergeLearner::learn(size_t wanted, Progress& progress) {
  std::vector<Tokenizer::Merge> merges;
  while (merges.size() < wanted && !queue_.empty()) {
    const Candidate best = queue_.top();
    queue_.pop();
    const auto place = pairs_.find(best.pair);
    // Counts only fall once a pair is known, so an entry that is out of date is too high: it goes back with its true
    // count.
    if (place == pairs_.end()) continue;
    if (place->second.count != best.count) {
      if (place->second.count >= 2) queue_.push({place->second.count, best.pair});
      continue;
    }
    if (best.count < 2) break;
    merges.push_back({static_cast<uint32_t>(best.pair >> 32), static_cast<uint32_t>(best.pair)});
    const std::vector<uint32_t> holders = std::move(place->second.words);
    for (const uint32_t w : holders) apply(w, merges.back(), static_cast<uint32_t>(255 + merges.size()));
    pairs_.erase(best.pair);
    queue_fresh();
    progress.at(static_cast<int64_t>(merges.size()));
  }
  return merges;
}

// The pair occurs `times` more (or less) often in words, because of word w.
void MergeLearner::change(uint32_t left, uint32_t right, int64_t times, uint32_t w) {
  const uint64_t key = uint64_t{left} << 32 | right;
  Pair& pair = pairs_[key];
  if (times > 0) {
    if (pair.count == 0) fresh_.push_back(key);
    if (pair.words.empty() || pair.words.back() != w) pair.words.push_back(w);
  }
  if ((pair.count += times) == 0) pairs_.erase(key);
}

void MergeLearner::queue_fresh() {
  for (const uint64_t key : fresh_)
    if (const auto pair = pairs_.find(key); pair != pairs_.end()) queue_.push({pair->second.count, key});
  fresh_.clear();
}

// Merges in one word. The counts of the merged pair itself are not kept: it goes.
void MergeLearner::apply(uint32_t w, Tokenizer::Merge merge, uint32_t made) {
  Word& word = words_[w];
  uint32_t* ids = ids_.data() + word.start;
  size_t kept = 0;
  for (size_t i = 0; i < word.length;) {
    if (i + 1 == word.length || ids[i] != merge.left || ids[i + 1] != merge.right) {
      ids[kept++] = ids[i++];
      continue;
    }
    if (kept > 0) {
      change(ids[kept - 1], merge.left, -word.count, w);
      change(ids[kept - 1], made, word.count, w);
    }
    if (i + 2 < word.length) {
      change(merge.right, ids[i + 2], -word.count, w);
      change(made, ids[i + 2], word.count, w);
    }
    ids[kept++] = made;
    i += 2;
  }
  word.length = static_cast<uint32_t>(kept);
}

Tokenizer train_tokenizer(const std::vector<std::string>& texts, int64_t vocabulary_size, bool marked, ThreadPool& pool,
                          TrainReport* report) {
  if (vocabulary_size < 256 || vocabulary_size > static_cast<int64_t>(Tokenizer::max_vocabulary))
    throw UsageError(
        str("--vocab-size: expected 256 (bytes alone) to ", Tokenizer::max_vocabulary, ", found ", vocabulary_size));
  auto [files, left_out] = text_files(texts);
  std::erase_if(files, [](const TextFile& file) { return file.val || file.bytes == 0; });
  TextPieces text(std::move(files), 0);
  if (text.total_bytes() == 0)
    throw Error("no text to learn from: " + (left_out.empty() ? "the files given are empty" : left_out) +
                "; check the paths");

  TrainReport result;
  result.left_out = left_out;
  WordCounts counts(size_t{200} << 20);
  const WordScanner scanner;
  struct Counted {
    WordCounts::Piece words;
    std::vector<bool> has_text;  // of each part between markers
  };
  bool opens_document = false;  // what comes next is the first of a document
  result.seconds = text.run<Counted>(
      pool, "counting words",
      [&](const std::string& piece, Counted& counted, int) {
        const auto count = [&](std::string_view part, bool) {
          counted.has_text.push_back(!part.empty());
          constexpr size_t max_word_bytes = 256;  // longer ones are taken in parts: no token should be a paragraph
          for (const char *p = part.data(), *end = p + part.size(); p < end;) {
            const size_t length = std::min(static_cast<size_t>(scanner.word_end(p, end) - p), max_word_bytes);
            counted.words[std::string_view(p, length)]++;
            p += length;
          }
        };
        marked ? for_each_document(piece, count) : count(piece, true);
      },
      [&](const TextPieces::Piece& piece, const Counted& counted) {
        counts.add(counted.words);
        opens_document |= piece.opens_document;
        for (size_t i = 0; i < counted.has_text.size(); i++) {
          opens_document |= i > 0;
          result.documents += opens_document && counted.has_text[i];
          opens_document &= !counted.has_text[i];
        }
      });
  result.bytes = text.total_bytes();
  const auto words = counts.sorted();
  result.distinct_words = static_cast<int64_t>(words.size());
  result.forgotten_words = counts.forgotten();
  const size_t wanted = static_cast<size_t>(vocabulary_size) - 256;
  Progress progress("learning merges", static_cast<int64_t>(wanted), "merges", 1);
  std::vector<Tokenizer::Merge> merges = MergeLearner(words).learn(wanted, progress);
  if (merges.size() < wanted)
    throw Error(str("--vocab-size: expected at most ", 256 + merges.size(),
                    " for this text, in which no more pairs occur twice, found ", vocabulary_size,
                    "; ask for less or give more text"));
  result.seconds += progress.seconds();
  if (report) *report = result;
  return Tokenizer(std::move(merges));
}

}  // namespace gca
