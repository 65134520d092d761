// libFuzzer: any bytes, with one of 64 vocabularies, come back from encode and decode as they were, in pieces and from
// the cache too. clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined dev/fuzz/encode.cpp
#include "tokenizer/tokenizer.h"

using namespace gca;

// Merges of random tokens of a few letters; overlong tokens and pairs that come again are left out.
static std::vector<Tokenizer::Merge> random_merges(uint32_t seed) {
  std::vector<Tokenizer::Merge> merges;
  std::vector<size_t> lengths(256, 1);
  for (uint32_t i = 0; i < 12 + 4 * seed; i++) {
    const Philox random = philox(seed, Draw::task, i);
    const auto id = [&](uint32_t kind, uint32_t which) {
      const uint32_t made = static_cast<uint32_t>(merges.size());
      return kind % 3 && made ? 256 + which % made : static_cast<uint32_t>("ab'st "[which % (1 + seed % 6)]);
    };
    const Tokenizer::Merge merge{id(random.word[0], random.word[1]), id(random.word[2], random.word[3])};
    bool leave_out = lengths[merge.left] + lengths[merge.right] > 64;
    for (const Tokenizer::Merge& other : merges) leave_out |= other.left == merge.left && other.right == merge.right;
    if (leave_out) continue;
    merges.push_back(merge);
    lengths.push_back(lengths[merge.left] + lengths[merge.right]);
  }
  return merges;
}

// Vocabularies keep their encoders, so that the caches fill.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  static std::vector<Encoder> encoders;
  for (uint32_t seed = 0; encoders.size() < 64; seed++)
    encoders.emplace_back(*tokenizers.emplace_back(std::make_unique<Tokenizer>(random_merges(seed))));
  if (!size) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  Encoder& encoder = encoders[data[0] % 64];
  std::vector<int32_t> ids, pieces;
  encoder.append(text, ids);
  if (tokenizers[data[0] % 64]->decode(ids) != text) __builtin_trap();
  const char *begin = text.data(), *end = begin + text.size(),
             *cut = WordScanner().next_cut(begin, begin + text.size() / 2, end);
  encoder.append(std::string_view(begin, cut - begin), pieces);
  encoder.append(std::string_view(cut, end - cut), pieces);
  if (pieces != ids) __builtin_trap();
  return 0;
}
