// Learns a byte-level BPE: counts the distinct words of a text, then again and again makes the pair of neighbours that
// is most frequent in them into a new token.
#pragma once
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

// Counts of distinct words, in bounded memory: when they take more than max_bytes, those that occurred once are
// forgotten, then twice, and so on. What is left depends on the order of the pieces alone.
class WordCounts {
 public:
  using Piece = std::unordered_map<std::string_view, int64_t>;

  explicit WordCounts(size_t max_bytes) : max_bytes_(max_bytes) {}

  void add(const Piece& piece);
  // In order of their bytes, so that nothing depends on the order of a hash table.
  std::vector<std::pair<std::string, int64_t>> sorted();
  int64_t forgotten() const { return forgotten_; }

 private:
  // About a tenth of the memory that a word takes in all of training.
  static size_t cost_of(const std::string& word) { return word.size() + 32; }

  size_t max_bytes_, bytes_ = 0;
  std::unordered_map<std::string, int64_t> counts_;
  int64_t forgotten_ = 0;
};

// The merges that BPE learns from words and their counts: of the pairs of neighbours the most frequent, of equals the
// one with the smaller ids, `wanted` times, or until no pair occurs twice.
class MergeLearner {
 public:
  explicit MergeLearner(const std::vector<std::pair<std::string, int64_t>>& words);

  std::vector<Tokenizer::Merge> learn(size_t wanted, Progress& progress);

 private:
  struct Word {
    size_t start;
    uint32_t length;
    int64_t count;
  };
  struct Pair {
    int64_t count = 0;
    std::vector<uint32_t> words;  // all that hold it, and some that did
  };
  struct Candidate {
    int64_t count;
    uint64_t pair;  // left << 32 | right
    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };

  void change(uint32_t left, uint32_t right, int64_t times, uint32_t w);

  void queue_fresh();

  void apply(uint32_t w, Tokenizer::Merge merge, uint32_t made);

  std::vector<uint32_t> ids_;  // of all words, one after the other
  std::vector<Word> words_;
  std::unordered_map<uint64_t, Pair> pairs_;
  std::vector<uint64_t> fresh_;  // pairs that are not in the queue yet
  std::priority_queue<Candidate> queue_;
};

struct TrainReport {  // documents: less empty ones
  int64_t documents = 0, bytes = 0, distinct_words = 0, forgotten_words = 0;
  double seconds = 0;
  std::string left_out;  // of the files, as text_files says it
};

// Learns vocabulary_size - 256 merges (the special ids come on top) from texts, files or folders as text_files takes
// them; what folders keep for validation is not read. Needs at most about 2 GiB for any amount of text. The result
// depends on the text and its order alone, not on the number of threads. marked: <|endoftext|> in a text parts
// documents and is no text, so that nothing of it gets into the vocabulary.
Tokenizer train_tokenizer(const std::vector<std::string>& texts, int64_t vocabulary_size, bool marked, ThreadPool& pool,
                          TrainReport* report = nullptr);

}  // namespace gca
