// The tokenizer: words against the pattern tried literally, BPE against one merge at a time, GPT-2's own encodings, any
// bytes there and back, files and their damage, learning.
#include <cstdlib>
#include <filesystem>
#include <map>
#include <random>

#include "base/progress.h"
#include "tokenizer/train.h"
#include "tokenizer/unicode_classes.h"
#include "dev/test/gpt2_texts.h"
#include "dev/test/test.h"

using namespace gca;
using namespace gca::test;

namespace {

std::string random_bytes(std::mt19937& random, size_t length, const std::string& alphabet = "") {
  std::string text;
  while (text.size() < length)
    text += alphabet.empty() ? static_cast<char>(random()) : alphabet[random() % alphabet.size()];
  return text;
}

// Text that goes through every branch of the scanner: characters of every class and length, spaces, apostrophes, broken
// UTF-8.
std::string random_text(std::mt19937& random, size_t characters) {
  // clang-format off
  static const std::vector<std::string> pool = {
      "a", "b", "Z", "@", "[", "`", "{", "t", "s", "re", "ve", "ll", "d", "m", "1", "23", " ", " ", " ", "  ",
      "\n", "\t", "\r\n", "'", "'", "'s", ".", "!?", "_", "\xC3\xA9", "\xD0\x96", "\xE4\xBD\xA0",
      "\xF0\x9F\x98\x80", "\xC2\xA0", "\xE3\x80\x80", "\xE2\x80\xA8", "\xC2\x85", "\xC2\xBD", "\xE2\x85\xA7",
      "\xEF\xBB\xBF", "\xCC\x81", "\xF0\x9D\x90\x80", "\x80", "\xFF", "\xE3\x80", "\xC2", "\xED\xA0\x80",
      "\xF4\x90\x80\x80", "\xC0\xAF", std::string(1, '\0')};
  // clang-format on
  std::string text;
  for (size_t i = 0; i < characters; i++) text += pool[random() % pool.size()];
  return text;
}

// The classes of a text's characters, one letter each, from the generated table by plain search; and where each begins.
struct Classes {
  std::string kinds;
  std::vector<size_t> starts;
  explicit Classes(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
      starts.push_back(at);
      const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[at + i])); };
      const size_t length = utf8_length(text.substr(at));
      uint32_t code = length == 1 ? byte(0) : byte(0) & (0x7Fu >> length);
      for (size_t i = 1; i < length; i++) code = code << 6 | (byte(i) & 0x3F);
      char kind = 'o';
      if (length)
        for (const unicode::Range& range : unicode::ranges)
          if (code >= range.first && code <= range.last) kind = "olns"[range.kind];
      kinds += kind;
      at += length ? length : 1;
    }
    starts.push_back(text.size());
  }
};

// The words of a text by GPT-2's pattern, its alternatives tried one after the other.
std::vector<size_t> words_by_pattern(std::string_view text) {
  const Classes classes(text);
  const std::string& kinds = classes.kinds;
  std::vector<size_t> ends;
  for (size_t i = 0; i < kinds.size();) {
    const std::string_view rest = text.substr(classes.starts[i]);
    size_t end = i;
    for (const char* suffix : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
      if (end == i && rest.substr(0, strlen(suffix)) == suffix) end = i + strlen(suffix);
    for (const char kind : {'l', 'n', 'o'})
      if (end == i) {
        size_t j = i + (rest[0] == ' ');
        const size_t first = j;
        while (j < kinds.size() && kinds[j] == kind) j++;
        if (j > first) end = j;
      }
    if (end == i) {
      while (end < kinds.size() && kinds[end] == 's') end++;
      if (end < kinds.size() && end - i > 1) end--;  // \s+(?!\S) gives one back; a single one is left to \s+
    }
    ends.push_back(classes.starts[end]);
    i = end;
  }
  return ends;
}

std::vector<size_t> words_by_scanner(std::string_view text) {
  const WordScanner scanner;
  std::vector<size_t> ends;
  for (const char *p = text.data(), *end = p + text.size(); p < end;) {
    p = scanner.word_end(p, end);
    ends.push_back(p - text.data());
  }
  return ends;
}

// BPE as it is defined: the earliest merge that applies, at its leftmost place, one at a time.
std::vector<int32_t> bpe_by_definition(const std::vector<Tokenizer::Merge>& merges, std::string_view word) {
  std::vector<int32_t> ids;
  for (const char byte : word) ids.push_back(static_cast<unsigned char>(byte));
  std::map<std::pair<int32_t, int32_t>, int32_t> made;
  for (size_t r = 0; r < merges.size(); r++)
    made[{static_cast<int32_t>(merges[r].left), static_cast<int32_t>(merges[r].right)}] = static_cast<int32_t>(256 + r);
  for (;;) {
    int32_t best = INT32_MAX;
    size_t place = 0;
    for (size_t i = 0; i + 1 < ids.size(); i++)
      if (const auto found = made.find({ids[i], ids[i + 1]}); found != made.end() && found->second < best) {
        best = found->second;
        place = i;
      }
    if (best == INT32_MAX) return ids;
    ids[place] = best;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(place) + 1);
  }
}

// Random merges over an alphabet of few letters, so that tokens overlap in every way.
std::vector<Tokenizer::Merge> random_merges(std::mt19937& random, size_t count, const std::string& alphabet) {
  std::vector<Tokenizer::Merge> merges;
  std::vector<size_t> lengths(256, 1);
  std::vector<uint32_t> known;
  for (const char letter : alphabet) known.push_back(static_cast<unsigned char>(letter));
  std::map<std::pair<uint32_t, uint32_t>, bool> seen;
  while (merges.size() < count) {
    const uint32_t left = known[random() % known.size()], right = known[random() % known.size()];
    if (lengths[left] + lengths[right] > 64 || std::exchange(seen[{left, right}], true)) continue;
    known.push_back(static_cast<uint32_t>(256 + merges.size()));
    lengths.push_back(lengths[left] + lengths[right]);
    merges.push_back({left, right});
  }
  return merges;
}

// The 256 bytes in the order of GPT-2's ids, those that print first, and how tokenizer.json writes each.
std::vector<std::pair<unsigned char, std::string>> gpt2_bytes() {
  std::vector<std::pair<unsigned char, std::string>> all;
  int moved = 0x100;
  for (const bool prints : {true, false})
    for (int byte = 0; byte < 256; byte++)
      if (((byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173)) == prints)
        all.push_back({static_cast<unsigned char>(byte), "\\u" + hex(prints ? byte : moved++, 4)});
  return all;
}

// A vocabulary of GPT-2's form of some merges: its tokenizer.json, the same as vocab.json and merges.txt, and the id of
// each token's bytes.
struct Gpt2File {
  std::string json, vocab_json, merges_txt = "#version: 0.2\n";
  std::map<std::string, int32_t> ids;
  explicit Gpt2File(const std::vector<std::pair<std::string, std::string>>& merges) {
    std::map<char, std::string> letters;
    std::string vocabulary, merge_list;
    const auto written = [&](const std::string& token) {
      std::string all;
      for (const char byte : token) all += letters.at(byte);
      return all;
    };
    const auto add = [&](const std::string& token) {
      const int32_t id = static_cast<int32_t>(ids.size());
      REQUIRE(ids.insert({token, id}).second);
      vocabulary += str("\"", written(token), "\":", id, ",");
    };
    for (const auto& [byte, letter] : gpt2_bytes()) {
      letters[static_cast<char>(byte)] = letter;
      add(std::string(1, static_cast<char>(byte)));
    }
    for (const auto& [left, right] : merges) {
      add(left + right);
      const std::string merge = str("\"", written(left), " ", written(right), "\"");
      merge_list += (merge_list.empty() ? "" : ",") + merge;
      const Json letters_of_merge = parse_json(merge, "merge");
      merges_txt += JsonField(letters_of_merge, "merge").string() + "\n";
    }
    vocab_json = str("{", vocabulary, "\"<|endoftext|>\":", ids.size(), "}");
    json = str("{\"model\":{\"vocab\":", vocab_json, ",\"merges\":[", merge_list, "]}}");
  }
};

std::vector<std::string> parts(const std::string& text, char separator) {
  std::vector<std::string> all(1);
  for (const char c : text)
    if (c == separator) all.emplace_back();
    else all.back() += c;
  return all;
}

// The special ids of GPT-2's layout, in the order of the vocabulary's names, with the size at the end: the end of text
// follows the tokens, the needles' follow it, the landmark is the eighth after it.
void check_gpt2_ids(const Tokenizer& tokenizer, int32_t tokens) {
  CHECK(
      std::vector<int32_t>{tokenizer.end_of_text, tokenizer.KEY, tokenizer.END, tokenizer.ASK, tokenizer.ARROW,
                           tokenizer.COMMA, tokenizer.landmark, tokenizer.vocab_size()} ==
      std::vector<int32_t>{tokens, tokens + 1, tokens + 2, tokens + 3, tokens + 4, tokens + 5, tokens + 8, tokens + 9});
}

}  // namespace

TEST_CASE("tokenizer: words are those of GPT-2's pattern, in any bytes") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 20000; trial++) {
    const std::string text = trial % 3 ? random_text(random, random() % 24) : random_bytes(random, random() % 24);
    CAPTURE(printable(text));
    REQUIRE(words_by_scanner(text) == words_by_pattern(text));
  }
}

TEST_CASE("tokenizer: cutting where next_cut says changes no word") {
  std::mt19937 random(2);
  const WordScanner scanner;
  size_t cuts = 0;
  for (int trial = 0; trial < 20000; trial++) {
    const std::string text = random_text(random, 30);
    const char *begin = text.data(), *end = begin + text.size(),
               *cut = scanner.next_cut(begin, begin + random() % text.size(), end);
    cuts += cut < end;
    std::vector<size_t> words = words_by_scanner(text.substr(0, cut - begin));
    for (const size_t word_end : words_by_scanner(std::string_view(text).substr(cut - begin)))
      words.push_back(static_cast<size_t>(cut - begin) + word_end);
    CAPTURE(printable(text));
    REQUIRE(words == words_by_scanner(text));
  }
  CHECK(cuts > 15000);
}

TEST_CASE("tokenizer: BPE is one merge at a time, for words of any length") {
  std::mt19937 random(3);
  for (int trial = 0; trial < 50; trial++) {
    const std::string alphabet = std::string("abcdefgh").substr(0, 1 + random() % 4);
    const auto merges = random_merges(random, alphabet.size() == 1 ? 20 : 5 + random() % 150, alphabet);
    const Tokenizer tokenizer(merges);
    Encoder encoder(tokenizer);
    for (int word = 0; word < 40; word++) {
      const std::string text = random_bytes(random, 1 + (word % 4 ? random() % 30 : random() % 400), alphabet);
      std::vector<int32_t> ids;
      encoder.append(text, ids);
      CAPTURE(text);
      REQUIRE(ids == bpe_by_definition(merges, text));
      ids.clear();
      encoder.append(text, ids);  // from the cache
      REQUIRE(ids == bpe_by_definition(merges, text));
    }
  }
}

TEST_CASE("tokenizer: what is cut out of a long word to be encoded is taken back where the cut shows") {
  // x...x a bccccccccy z: up to the y the tokens are a, bccccccccy; but z takes the y, the c stay alone, and a takes
  // the b.
  std::vector<Tokenizer::Merge> merges{{'y', 'z'}, {'c', 'y'}};
  for (uint32_t id = 257; merges.size() < 9; id++) merges.push_back({'c', id});
  merges.push_back({'b', static_cast<uint32_t>(255 + merges.size())});
  merges.push_back({'a', 'b'});
  const Tokenizer tokenizer(merges);
  REQUIRE(tokenizer.encode("abccccccccy").size() == 2);
  for (size_t before = 0; before < 200; before++) {
    const std::string text = std::string(before, 'x') + "abccccccccyz" + std::string(300, 'x');
    REQUIRE(tokenizer.encode(text) == bpe_by_definition(merges, text));
  }
}

TEST_CASE("tokenizer: tokens that are longer than the windows of a long word") {
  std::mt19937 random(11);
  std::vector<Tokenizer::Merge> merges{{'-', '-'}};
  for (uint32_t id = 256; id < 262; id++) merges.push_back({id, id});  // up to 128
  for (const uint32_t id : {262u, 258u, uint32_t{'='}}) merges.push_back({id, '='});
  const Tokenizer tokenizer(merges);
  for (int trial = 0; trial < 100; trial++) {
    std::string text;
    while (text.size() < 1000) text += std::string(random() % 300, '-') + std::string(random() % 4, "=+"[random() % 2]);
    REQUIRE(tokenizer.encode(text) == bpe_by_definition(merges, text));
  }
}

TEST_CASE("tokenizer: a long word takes about the time of short ones") {
  std::mt19937 random(4);
  Progress progress("", 0, "", 1);
  const std::string letters = "abcdefghijklmnop";
  const std::vector<Tokenizer::Merge> learned =
      MergeLearner({{random_bytes(random, 40000, letters), 1}}).learn(2000, progress);
  const Tokenizer tokenizer(learned);
  const auto seconds = [&](const std::string& text) {
    double best = 1e9;
    for (int trial = 0; trial < 3; trial++) {
      const Stopwatch clock;
      const auto ids = tokenizer.encode(text);
      best = std::min(best, clock.seconds());
      CHECK(tokenizer.decode(ids) == text);
    }
    return best;
  };
  std::string text = random_bytes(random, 500000, letters), words = text;
  for (size_t i = 0; i < words.size(); i += 32) words[i] = ' ';
  const double usual = seconds(words);
  CHECK(seconds(text) < 10 * usual);
  CHECK(seconds(std::string(500000, 'a')) < 10 * usual);
  CHECK(seconds(std::string(500000, ' ')) < 10 * usual);
}

TEST_CASE("tokenizer: special ids") {
  const Tokenizer bytes = Tokenizer::load("bytes");
  CHECK(std::vector<int32_t>{bytes.end_of_text, bytes.landmark, bytes.KEY, bytes.END, bytes.ASK, bytes.ARROW,
                             bytes.COMMA,
                             bytes.vocab_size()} == std::vector<int32_t>{256, 257, 258, 259, 260, 261, 262, 263});
  const Tokenizer learned({{'a', 'b'}, {256, 'c'}});
  CHECK(std::vector<int32_t>{learned.end_of_text, learned.landmark, learned.COMMA, learned.vocab_size()} ==
        std::vector<int32_t>{258, 259, 264, 265});
  CHECK(learned.encode("abcab") == std::vector<int32_t>{257, 256});
  CHECK(learned.bytes_of(257) == "abc");
  CHECK(learned.bytes_of(258) == "");
  CHECK(learned.is_special(258));
  CHECK(!learned.is_special(257));
  // By number only: the name in a text is text. A corpus may use it to part documents.
  CHECK(bytes.decode(std::vector<int32_t>{'x', 256, 257}) == "x<|endoftext|><|landmark|>");
  CHECK(bytes.encode("<|endoftext|>").size() == 13);
  std::vector<int32_t> ids;
  Encoder(bytes).append_marked("a<|endoftext|>b<|endoftext|>", ids);
  CHECK(ids == std::vector<int32_t>{'a', 256, 'b', 256});
  CHECK(has(error_of([&] { bytes.decode(std::vector<int32_t>{263}); }), "token id 263: expected 0 to 262"));
  CHECK(has(error_of([&] { bytes.decode(std::vector<int32_t>{-1}); }), "token id -1"));
}

TEST_CASE("tokenizer: text in pieces comes out in whole characters, and every byte of it") {
  const std::string text = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x99\x82z\xFF\xE2\x82q\xC3\xC3\xA9\x82\xF0\x9F\x99";
  std::vector<size_t> ends{0};  // of characters, and of bytes that are none
  while (ends.back() < text.size()) {
    const size_t length = utf8_length(std::string_view(text).substr(ends.back()));
    ends.push_back(ends.back() + std::max<size_t>(1, length));
  }
  for (size_t size = 1; size <= text.size(); size++) {
    CAPTURE(size);
    WholeCharacters characters;
    std::string found;
    for (size_t at = 0; at < text.size(); at += size) {
      found += characters.take(text.substr(at, size));
      CHECK(std::find(ends.begin(), ends.end(), found.size()) != ends.end());
      CHECK(found.size() + 3 >= std::min(text.size(), at + size));
    }
    CHECK(found + characters.rest() == text);
    CHECK(characters.rest().empty());
  }
}

TEST_CASE("tokenizer: for a terminal, control characters are escaped") {
  CHECK(printable("a\n\t\r\x1b[2J\x7f\xC3\xA9\xFF\xC2\x9B") == "a\\n\\t\\r\\x1b[2J\\x7f\xC3\xA9\\xff\\xc2\\x9b");
  // Columns: marks take none, wide characters two, and none is cut.
  CHECK(columns("e\xCC\x81\xE6\x9D\xB1\xF0\x9F\x99\x82\xD7\xA9") == 6);
  CHECK(first_columns("e\xCC\x81\xE6\x9D\xB1", 2) == "e\xCC\x81");
  CHECK(first_columns("e\xCC\x81\xE6\x9D\xB1", 3) == "e\xCC\x81\xE6\x9D\xB1");
  CHECK(padded("\xE6\x9D\xB1", 4) == "\xE6\x9D\xB1  ");
  CHECK(padded("abc", 2) == "abc");
  CHECK(printable("a\n\tb\x07", true) == "a\n\tb\\x07");
  const Tokenizer bytes = Tokenizer::load("bytes");
  // Characters whose bytes come in several ids are whole, where they end; special ids are names, landmarks nothing.
  std::vector<int32_t> ids = bytes.encode("\n\xE6\x9D\xB1\xF0\x9F\x99\x82");
  ids.insert(ids.begin() + 2, bytes.landmark);
  ids.push_back(bytes.KEY);
  ids.push_back(0xE4);
  std::string in_pieces;
  for (size_t i = 0; i < ids.size(); i++) in_pieces += bytes.words(ids, i, i + 1) + "|";
  CHECK(in_pieces == "\\n||||\xE6\x9D\xB1||||\xF0\x9F\x99\x82|<|KEY|>|\\xe4|");
  CHECK(bytes.words(ids, 0, 3) == "\\n");
  CHECK(bytes.words(ids, 0, ids.size()) == "\\n\xE6\x9D\xB1\xF0\x9F\x99\x82<|KEY|>\\xe4");
  CHECK(bytes.words({}, 0, 0) == "");
}

TEST_CASE("tokenizer: 100,000 random byte strings survive encode and decode") {
  std::mt19937 random(5);
  const Tokenizer bytes = Tokenizer::load("bytes"), learned(random_merges(random, 500, random_bytes(random, 20)));
  for (const Tokenizer* tokenizer : {&bytes, &learned}) {
    Encoder encoder(*tokenizer);
    std::vector<int32_t> ids;
    int wrong = 0;
    for (int trial = 0; trial < 50000; trial++) {
      const std::string text = trial % 2 ? random_bytes(random, random() % 50) : random_text(random, random() % 20);
      ids.clear();
      encoder.append(text, ids);
      wrong += tokenizer->decode(ids) != text;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("tokenizer: words that share all but their last letters are not taken for one another") {
  std::mt19937 random(10);
  const std::string front = " sharedfront";
  std::vector<Tokenizer::Merge> merges{{' ', 's'}};  // one token: a word of few ids is cached
  for (size_t i = 2; i < front.size(); i++)
    merges.push_back({static_cast<uint32_t>(255 + merges.size()), static_cast<uint32_t>(front[i])});
  const Tokenizer tokenizer(merges);
  REQUIRE(tokenizer.encode(front).size() == 1);
  std::string text;
  for (int word = 0; word < 100000; word++)
    text += front + random_bytes(random, 3, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ");
  CHECK(tokenizer.decode(tokenizer.encode(text)) == text);
}

TEST_CASE("tokenizer: files, and what is said of damaged ones") {
  const TempFolder folder;
  std::mt19937 random(6);
  for (const Tokenizer& tokenizer : {Tokenizer::load("bytes"), Tokenizer(random_merges(random, 300, "abc"))}) {
    const std::string path = folder.path + "/t.bpe";
    tokenizer.save(path);
    const Tokenizer loaded = Tokenizer::load(path);
    CHECK(loaded.hash() == tokenizer.hash());
    CHECK(loaded.vocab_size() == tokenizer.vocab_size());
    CHECK(loaded.encode("aabcabcabb cab") == tokenizer.encode("aabcabcabb cab"));
    const std::string content = tokenizer.serialize();
    for (size_t size = 0; size < content.size(); size += 1 + size / 10)
      CHECK_THROWS_AS(Tokenizer::parse(content.substr(0, size), "x"), Error);
    for (size_t at = 0; at < content.size(); at += 1 + at / 20) {
      std::string flipped = content;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << at % 8));
      CHECK_THROWS_AS(Tokenizer::parse(flipped, "x"), Error);
    }
  }
  CHECK(Tokenizer({{'a', 'b'}}).hash() != Tokenizer({{'a', 'c'}}).hash());
  CHECK(has(error_of([&] { Tokenizer::load(folder.path + "/none"); }), "/none': No such file or directory"));
  CHECK(has(error_of([&] { Tokenizer::parse("", "'x'"); }), "'x': expected a tokenizer"));
  std::string newer = Tokenizer({{'a', 'b'}}).serialize();
  newer[8] = 2;
  CHECK(has(error_of([&] { Tokenizer::parse(newer, "'x'"); }), "expected version 1 of the format, found 2"));
  CHECK(has(error_of([&] {
              Tokenizer({{'a', 256}});
            }),
            "merge 0: expected two ids that bytes or earlier merges have, found ids 97 and 256"));
  CHECK(has(error_of([&] {
              Tokenizer({{'a', 'b'}, {'a', 'b'}});
            }),
            "merge 1: expected a pair that no earlier merge has"));
  std::vector<Tokenizer::Merge> doubling{{'a', 'a'}};
  for (uint32_t id = 256; id < 266; id++) doubling.push_back({id, id});
  CHECK(has(error_of([&] { Tokenizer{doubling}; }), "a token of at most 1024 bytes"));
  CHECK(has(error_of([&] { Tokenizer::parse("{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": []}}", "'x'"); }),
            "'x': model.vocab: expected 50257 entries"));
  // A small vocabulary of GPT-2's form.
  std::string entries;
  int id = 0;
  for (const auto& [byte, letter] : gpt2_bytes()) entries += str("\"", letter, "\":", id++, ",");
  const auto gpt2 = [&](const std::string& more, const std::string& merge_list) {
    return Tokenizer::parse(
        "{\"model\":{\"vocab\":{" + entries + more + ",\"<|endoftext|>\":258},\"merges\":[" + merge_list + "]}}", "'x'",
        2);
  };
  const std::string tokens = "\"ab\":256,\"\\u0120ab\":257";
  for (const char* merge_list : {R"("a b","\u0120 ab")", R"(["a","b"],["\u0120","ab"])"}) {
    CHECK(gpt2(tokens, merge_list).encode(" abab") == std::vector<int32_t>{257, 256});
    CHECK(gpt2(tokens, merge_list).landmark == 266);
  }
  CHECK(has(error_of([&] { gpt2(tokens, R"("a b")"); }), "'x': model.merges: expected 2 merges"));
  CHECK(has(error_of([&] { gpt2(tokens, R"("a b","a b")"); }),
            "model.merges[1]: expected two tokens of the vocabulary that make token 257"));
  CHECK(has(error_of([&] { gpt2("\"ab\":257,\"abc\":256", R"("a b","ab c")"); }),
            "model.merges[0]: expected two tokens of the vocabulary that make token 256"));
  CHECK(has(error_of([&] { Tokenizer::parse("{\"model\": {\"vocab\": [", "'x'"); }), "'x' is not valid JSON at byte"));
  CHECK(has(error_of([&] { Tokenizer::parse("{\"model\": {}}", "'x'"); }), "\"vocab\" is missing"));
}

TEST_CASE("tokenizer: GPT-2's encodings") {
  std::vector<std::pair<std::string, std::string>> merges;
  for (const std::string& merge : parts(gpt2_merges, '|')) {
    const std::vector<std::string> pair = parts(merge, '~');
    REQUIRE(pair.size() == 2);
    merges.push_back({pair[0], pair[1]});
  }
  const Gpt2File file(merges);
  const Tokenizer gpt2 = Tokenizer::parse(file.json, "x", merges.size()),
                  again = Tokenizer::parse(gpt2.serialize(), "x");
  CHECK(again.hash() == gpt2.hash());
  check_gpt2_ids(gpt2, static_cast<int32_t>(file.ids.size()));
  check_gpt2_ids(again, static_cast<int32_t>(file.ids.size()));
  for (const std::string& row : all_gpt2_texts()) {
    CAPTURE(printable(row));
    std::string text;
    std::vector<size_t> ends;
    std::vector<int32_t> want, got;
    for (const std::string& word : row.empty() ? std::vector<std::string>() : parts(row, '|')) {
      for (const std::string& token : parts(word, '~')) {
        text += token;
        want.push_back(file.ids.at(token));
      }
      ends.push_back(text.size());
    }
    CHECK(words_by_scanner(text) == ends);
    CHECK(words_by_pattern(text) == ends);
    Encoder(again).append(text, got);
    CHECK(got == want);
    CHECK(gpt2.decode(gpt2.encode(text)) == text);
  }
  // No text encodes to a special id but by the mark that parts documents.
  std::vector<int32_t> marked;
  Encoder(again).append_marked("<|endoftext|>", marked);
  CHECK(marked == std::vector<int32_t>{again.end_of_text});
}

TEST_CASE("tokenizer: a tokenizer.json of GPT-2's size") {
  std::vector<std::pair<std::string, std::string>> merges;
  for (int pair = 0; pair < 50000; pair++)
    merges.push_back({std::string(1, static_cast<char>(pair / 256)), std::string(1, static_cast<char>(pair % 256))});
  const TempFolder folder;
  const std::string path = folder.path + "/tokenizer.json", own = folder.path + "/own.bpe";
  write_file(path, Gpt2File(merges).json);
  const Tokenizer gpt2 = Tokenizer::load(path);
  check_gpt2_ids(gpt2, 50256);
  gpt2.save(own);
  const Tokenizer again = Tokenizer::load(own);
  CHECK(again.hash() == gpt2.hash());
  check_gpt2_ids(again, 50256);
  // The first byte that prints is '!', id 0; merge r makes id 256 + r.
  CHECK(again.encode("!") == std::vector<int32_t>{0});
  CHECK(again.encode("ab") == std::vector<int32_t>{256 + 'a' * 256 + 'b'});

  // The same as two files, by the name of either or of their folder, with marks and ends of lines of other editors.
  const Gpt2File file(merges);
  for (const auto& [vocab_name, merges_name] :
       {std::pair{"vocab.json", "merges.txt"}, {"encoder.json", "vocab.bpe"}, {"gpt2-vocab.json", "gpt2-merges.txt"}}) {
    CAPTURE(vocab_name);
    const TempFolder pair;
    const std::string vocab_path = pair.path + "/" + vocab_name, merges_path = pair.path + "/" + merges_name;
    write_file(vocab_path, file.vocab_json);
    CHECK(has(error_of([&] { Tokenizer::load(vocab_path); }), str("expected '", merges_path, "' beside it")));
    write_file(merges_path, file.merges_txt);
    CHECK(Tokenizer::load(vocab_path).serialize() == gpt2.serialize());
    CHECK(Tokenizer::load(merges_path).serialize() == gpt2.serialize());
    if (vocab_name[0] != 'g') CHECK(Tokenizer::load(pair.path).serialize() == gpt2.serialize());
    std::string windows = "\xEF\xBB\xBF";
    for (const char c : file.merges_txt) windows += c == '\n' ? "\r\n" : std::string(1, c);
    write_file(merges_path, windows);
    write_file(vocab_path, "\xEF\xBB\xBF" + file.vocab_json);
    CHECK(Tokenizer::load(vocab_path).serialize() == gpt2.serialize());
    write_file(merges_path, file.merges_txt.substr(0, file.merges_txt.size() / 2));
    CHECK(has(error_of([&] { Tokenizer::load(vocab_path); }), str(merges_name, "': expected 50000 merges")));
    remove_tree(vocab_path);
    CHECK(has(error_of([&] { Tokenizer::load(merges_path); }), str("expected '", vocab_path, "' beside it")));
  }
  write_file(path, "\xEF\xBB\xBF" + file.json);
  CHECK(Tokenizer::load(path).hash() == gpt2.hash());
  CHECK(Tokenizer::load(folder.path).hash() == gpt2.hash());
  write_file(path, file.vocab_json);
  CHECK(has(error_of([&] { Tokenizer::load(path); }), "expected GPT-2's tokenizer.json, found no field \"model\""));
  remove_tree(path);
  CHECK(has(error_of([&] { Tokenizer::load(folder.path); }), "expected a folder with a tokenizer.json, or with"));
  std::string swapped = file.merges_txt;
  const size_t line = swapped.find('\n', 100);
  swapped[line - 1] = swapped[line - 1] == 'a' ? 'b' : 'a';
  CHECK(has(error_of([&] { Tokenizer::parse_pair(file.vocab_json, "v", swapped, "m"); }),
            "expected two tokens of the vocabulary that make token"));
  merges.pop_back();
  write_file(path, Gpt2File(merges).json);
  CHECK(has(error_of([&] { Tokenizer::load(path); }), "model.vocab: expected 50257 entries"));
}

TEST_CASE("tokenizer: streams are encoded and decoded whole, however they are cut") {
  const auto through = [](const Tokenizer& tokenizer, const std::string& input, auto&& filter) {
    FILE *in = tmpfile(), *out = tmpfile();
    REQUIRE((in && out));
    fwrite(input.data(), 1, input.size(), in);
    rewind(in);
    std::string result;
    const std::string error = error_of([&] { filter(tokenizer, in, out); });
    rewind(out);
    for (int c; (c = fgetc(out)) != EOF;) result += static_cast<char>(c);
    fclose(in);
    fclose(out);
    return error.empty() ? result : error;
  };
  std::mt19937 random(7);
  const Tokenizer tokenizer({{'a', 'a'}, {256, 'a'}, {' ', 256}, {' ', 257}, {'\n', '\n'}, {0xC3, 0xA9}});
  CHECK(through(tokenizer, "", encode_stream) == "\n");
  CHECK(through(Tokenizer::load("bytes"), "a b", encode_stream) == "97 32 98\n");
  std::string sevens;  // none of the sizes that are read is a multiple of seven
  while (sevens.size() < 2500000) sevens += "aaaaaa ";
  for (const std::string& text : {random_text(random, 1500000), std::string(2500000, 'a'), sevens}) {
    const std::string numbers = through(tokenizer, text, encode_stream);
    std::string want;
    for (const int32_t id : tokenizer.encode(text)) want += std::to_string(id) + " ";
    want.back() = '\n';
    CHECK(numbers == want);
    CHECK(through(tokenizer, numbers, decode_stream) == text);
  }
  CHECK(through(tokenizer, " 97\n\t98  ", decode_stream) == "ab");
  CHECK(has(through(tokenizer, "97 9x8", decode_stream), "number 2: expected a token id, found '9x8'"));
  CHECK(has(through(tokenizer, "97 99999999999", decode_stream), "number 2: expected a token id"));
  CHECK(has(through(tokenizer, "97 99999", decode_stream), "token id 99999: expected 0 to"));
}

TEST_CASE("tokenizer: learning takes the most frequent pair again and again") {
  // The definition, counted anew for every merge.
  std::mt19937 random(8);
  for (int trial = 0; trial < 20; trial++) {
    std::map<std::string, int64_t> counts;
    for (int i = 0; i < 60; i++)
      counts[random_bytes(random, 1 + random() % 12, "aabc")] += 1 + static_cast<int64_t>(random() % 5);
    const std::vector<std::pair<std::string, int64_t>> words(counts.begin(), counts.end());
    std::vector<std::vector<uint32_t>> ids;
    for (const auto& [word, count] : words) ids.emplace_back(word.begin(), word.end());
    std::vector<std::pair<uint32_t, uint32_t>> want;
    while (want.size() < 40) {
      std::map<std::pair<uint32_t, uint32_t>, int64_t> pairs;
      for (size_t w = 0; w < words.size(); w++)
        for (size_t i = 0; i + 1 < ids[w].size(); i++) pairs[{ids[w][i], ids[w][i + 1]}] += words[w].second;
      const auto best = std::max_element(pairs.begin(), pairs.end(),
                                         [](const auto& a, const auto& b) { return a.second < b.second; });
      if (best == pairs.end() || best->second < 2) break;
      want.push_back(best->first);
      for (auto& word : ids)
        for (size_t i = 0; i + 1 < word.size(); i++)
          if (word[i] == best->first.first && word[i + 1] == best->first.second) {
            word[i] = static_cast<uint32_t>(255 + want.size());
            word.erase(word.begin() + static_cast<ptrdiff_t>(i) + 1);
          }
    }
    Progress progress("", 0, "", 1);
    std::vector<std::pair<uint32_t, uint32_t>> got;
    for (const Tokenizer::Merge& merge : MergeLearner(words).learn(40, progress))
      got.push_back({merge.left, merge.right});
    REQUIRE(got == want);
  }
}

TEST_CASE(
    "tokenizer: learning from files gives the same for any number of threads, and says when there is too little text") {
  const TempFolder folder;
  std::mt19937 random(9);
  std::string text;
  while (text.size() < 3000000)
    text += random_bytes(random, 1 + random() % 6, "eeetaoinsh") + (random() % 9 ? " " : "\n");
  write_file(folder.path + "/a.txt", text);
  ThreadPool one(1), three(3);
  TrainReport report;
  const Tokenizer tokenizer = train_tokenizer({folder.path}, 700, false, one, &report);
  CHECK(tokenizer.vocab_size() == 707);
  CHECK(report.bytes == static_cast<int64_t>(text.size()));
  CHECK(train_tokenizer({folder.path + "/a.txt"}, 700, false, three).hash() == tokenizer.hash());
  CHECK(tokenizer.decode(tokenizer.encode(text)) == text);
  write_file(folder.path + "/b.txt", "banana banana");
  CHECK(has(error_of([&] { train_tokenizer({folder.path + "/b.txt"}, 300, false, one); }),
            "--vocab-size: expected at most 260 for this text"));
  CHECK(has(error_of([&] { train_tokenizer({folder.path}, 255, false, one); }), "--vocab-size: expected 256"));
  write_file(folder.path + "/b.txt", "");
  CHECK(has(error_of([&] { train_tokenizer({folder.path + "/b.txt"}, 300, false, one); }), "no text to learn from"));
  CHECK(has(error_of([&] { train_tokenizer({folder.path + "/c.txt"}, 300, false, one); }), "c.txt"));
}

TEST_CASE("tokenizer: where documents are marked nothing of the marker is learned, and each of them is counted") {
  const TempFolder folder;
  std::string text;  // two megabytes: several pieces, and markers without white space about them
  int documents = 0;
  for (int i = 0; text.size() < 2200000; i++) {
    const std::string story = str("story ", i % 7, " about a cat that sat.", i % 3 ? "\n" : "");
    text += story + "<|endoftext|>";
    if (i % 5 == 0) text += "<|endoftext|>";  // an empty one is none
    documents++;
  }
  write_file(folder.path + "/marked.txt", text);
  write_file(folder.path + "/plain.txt", "no marker here\n");
  ThreadPool one(1), three(3);
  TrainReport report;
  const auto has_marker = [](const Tokenizer& tokenizer) {
    for (int32_t id = 256; id < tokenizer.vocab_size() - 7; id++) {
      const std::string bytes = tokenizer.decode(std::vector{id});
      for (const char* part : {"<|", "|>", "endo", "text", "|"})
        if (has(bytes, part)) return true;
    }
    return false;
  };
  const Tokenizer marked = train_tokenizer({folder.path}, 270, true, one, &report);
  CHECK_FALSE(has_marker(marked));
  CHECK(report.documents == documents + 1);
  CHECK(train_tokenizer({folder.path}, 270, true, three).hash() == marked.hash());
  const Tokenizer unmarked = train_tokenizer({folder.path}, 270, false, one, &report);
  CHECK(has_marker(unmarked));
  CHECK(report.documents == 2);
}

TEST_CASE("tokenizer: counting words forgets the rarest when there are too many") {
  WordCounts counts(3 * (1 + 32));
  counts.add({{"a", 5}, {"b", 1}, {"c", 2}});
  CHECK(counts.forgotten() == 0);
  counts.add({{"d", 1}, {"a", 1}});
  CHECK(counts.forgotten() == 2);
  CHECK(counts.sorted() == std::vector<std::pair<std::string, int64_t>>{{"a", 6}, {"c", 2}});
}
