// Shards, rows and the making of shards from text: headers, damage, the exact rows, their order, documents, validation.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <random>
#include <set>

#include "commands/tokenize.h"
#include "dataloader.h"
#include "tokenizer/text_files.h"
#include "dev/test/test.h"

using namespace gca;
using namespace gca::test;

namespace {

std::string file_content(const std::string& path) { return read_file(path, size_t{1} << 30); }

// A shard as llm.c writes it: no hash.
template <class Word>
void write_foreign(const std::string& path, const std::vector<Word>& tokens) {
  ShardHeader header;
  std::copy_n(sizeof(Word) == 2 ? ShardHeader::narrow : ShardHeader::wide, 2, header.words);
  header.words[2] = static_cast<int32_t>(tokens.size());
  std::string content(reinterpret_cast<const char*>(&header), sizeof header);
  write_file(path, content.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(Word)));
}

std::vector<int32_t> all_of(const std::string& pattern, const Tokenizer& tokenizer) {
  const TokenStream stream(pattern, tokenizer);
  std::vector<int32_t> tokens(stream.tokens());
  stream.read(0, stream.tokens(), tokens.data());
  return tokens;
}

// A vocabulary too large for uint16 tokens.
Tokenizer large_tokenizer() {
  std::vector<Tokenizer::Merge> merges;
  for (uint32_t left = 0; left < 256; left++)
    for (uint32_t right = 0; right < 256; right++) merges.push_back({left, right});
  return Tokenizer(merges);
}

}  // namespace

TEST_CASE("data: shards are written and read back, whatever their size and width") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes"), large = large_tokenizer();
  for (const Tokenizer* tokenizer : {&bytes, &large}) {
    const std::string prefix = folder.path + (tokenizer == &large ? "/large" : "/small");
    const std::vector<int32_t> tokens = test::random_ids(1000, 1, tokenizer->vocab_size());
    {
      ShardWriter abandoned(prefix, *tokenizer, 300);
      abandoned.append(tokens);
    }
    CHECK(std::filesystem::is_empty(folder.path) == (tokenizer == &bytes));  // nothing was left of it
    ShardWriter writer(prefix, *tokenizer, 300);
    writer.append(std::span(tokens).first(7));
    writer.append(std::span(tokens).subspan(7, 593));  // ends with a shard
    writer.append(std::span(tokens).subspan(600));
    CHECK(writer.tokens() == 1000);
    ShardWriter::commit({&writer});
    CHECK(glob_files(prefix + "_*.bin").size() == 4);
    const TokenStream stream(prefix + "_*.bin", *tokenizer);
    CHECK(stream.tokens() == 1000);
    CHECK(stream.notes() == "");
    for (const auto& [first, count] :
         {std::pair<int64_t, int64_t>{0, 1000}, {299, 2}, {300, 300}, {900, 100}, {1000, 0}, {17, 0}, {450, 1}}) {
      std::vector<int32_t> got(count);
      stream.read(first, count, got.data());
      CHECK(std::equal(got.begin(), got.end(), tokens.begin() + first));
    }
    CHECK_THROWS_AS(stream.read(999, 2, std::vector<int32_t>(2).data()), Error);
    const std::string content = file_content(prefix + "_000003.bin");
    int32_t words[256];
    memcpy(words, content.data(), sizeof words);
    const int width = tokenizer == &large ? 4 : 2;
    CHECK(content.size() == static_cast<size_t>(1024 + 100 * width));
    CHECK(words[0] == (width == 4 ? 20240801 : 20240520));
    CHECK(words[1] == (width == 4 ? 7 : 1));
    CHECK(words[2] == 100);
    CHECK(memcmp(words + 3, std::vector<uint64_t>{tokenizer->hash()}.data(), 8) == 0);
    CHECK(std::all_of(words + 5, words + 256, [](int32_t word) { return word == 0; }));
    CHECK(has(error_of([&] { ShardWriter(prefix, *tokenizer, 300); }), "_000000.bin' is there already"));
  }
}

TEST_CASE(
    "data: more shards than files that may be open, written and read; one that is replaced meanwhile is an error") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes");
  const std::vector<int32_t> tokens = test::random_ids(200, 1, bytes.vocab_size());
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  const rlimit few = {40, before.rlim_max};
  REQUIRE(setrlimit(RLIMIT_NOFILE, &few) == 0);
  const std::string error = error_of([&] {
    ShardWriter writer(folder.path + "/x", bytes, 2);
    CHECK(has(error_of([&] { ShardWriter(folder.path + "/x", bytes, 2); }), "is being written by another tokenize"));
    writer.append(tokens);
    ShardWriter near(folder.path + "/x_1", bytes, 2);  // takes none of the other's for leftovers
    ShardWriter::commit({&writer});
    const TokenStream stream(folder.path + "/x_*", bytes);
    std::vector<int32_t> got(200);
    stream.read(0, 200, got.data());
    CHECK(got == tokens);
    CHECK(stream.state() == TokenStream(folder.path + "/x_*", bytes).state());
    write_file(folder.path + "/x_000099.bin", file_content(folder.path + "/x_000098.bin"));
    CHECK(
        has(error_of([&] { stream.read(0, 200, got.data()); }), "x_000099.bin' is another file than when this began"));
  });
  CHECK(error == "");
  CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(list_folder(folder.path).size() == 100);  // nothing but shards is left
}

TEST_CASE("data: foreign, damaged and wrong shards") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes"), other({{'a', 'b'}});
  const std::string a = folder.path + "/a.bin", b = folder.path + "/b.bin";
  write_foreign<uint16_t>(a, {1, 2, 3});
  write_foreign<uint32_t>(b, {4, 262, 5});
  CHECK(all_of(folder.path + "/*.bin", bytes) == std::vector<int32_t>{1, 2, 3, 4, 262, 5});
  CHECK(has(TokenStream(folder.path + "/*.bin", bytes).notes(), "2 of 2 shards do not say which tokenizer made them"));

  write_foreign<uint32_t>(b, {4, 263, 5});  // V = 263
  std::vector<int32_t> out(6);
  const TokenStream stream(folder.path + "/*.bin", bytes);
  CHECK_NOTHROW(stream.read(0, 4, out.data()));
  CHECK(has(error_of([&] { stream.read(0, 6, out.data()); }),
            "b.bin': expected token ids below 263, the size of the vocabulary, found 263 among tokens 0 to 2"));
  write_foreign<uint32_t>(b, {0xFFFFFFFFu});
  CHECK(has(error_of([&] { all_of(b, bytes); }), "found 4294967295"));

  // A file that shrinks while it is open is an error, not a signal.
  REQUIRE(truncate(a.c_str(), 1024 + 3) == 0);
  CHECK(has(error_of([&] { stream.read(0, 3, out.data()); }), "a.bin' ends at byte 1027"));
  CHECK(
      has(error_of([&] { TokenStream(a, bytes); }), "the header says 3 tokens of 2 bytes, found a file of 1027 bytes"));
  write_file(a, file_content(b).substr(0, 900));
  CHECK(has(error_of([&] { TokenStream(a, bytes); }), "expected a token shard"));
  std::string content = file_content(b);
  content[0] = 'x';
  write_file(a, content);
  CHECK(has(error_of([&] { TokenStream(a, bytes); }), "expected a token shard"));
  content = file_content(b);
  content[11] = '\x80';  // a negative number of tokens
  write_file(a, content);
  CHECK(has(error_of([&] { TokenStream(a, bytes); }), "the header says -"));
  CHECK(has(error_of([&] { TokenStream(folder.path + "/c*.bin", bytes); }), "no file matches"));

  ShardWriter writer(folder.path + "/x", bytes, 10);
  writer.append(std::vector<int32_t>{1});
  ShardWriter::commit({&writer});
  CHECK(has(error_of([&] { TokenStream(folder.path + "/x_000000.bin", other); }),
            "was made with another tokenizer: expected the hash"));
}

TEST_CASE("data: places past four gigabytes") {
  const TempFolder folder;
  const std::string path = folder.path + "/huge.bin";
  const Tokenizer bytes = Tokenizer::load("bytes");
  write_foreign<uint16_t>(path, {});
  const int64_t tokens = INT32_MAX, size = 1024 + 2 * tokens;  // a hole but for the end
  const int fd = ::open(path.c_str(), O_WRONLY);
  const int32_t count = INT32_MAX;
  const uint16_t last[2] = {41, 42};
  const bool made =
      ::ftruncate(fd, size) == 0 && ::pwrite(fd, &count, 4, 8) == 4 && ::pwrite(fd, last, 4, size - 4) == 4;
  ::close(fd);
  if (!made) return test::skip("no file of 4 GiB can be made here, not even an empty one");
  write_foreign<uint16_t>(folder.path + "/next.bin", {43, 44});
  const TokenStream stream(folder.path + "/*.bin", bytes);
  CHECK(stream.tokens() == tokens + 2);
  std::vector<int32_t> got(5);
  stream.read(tokens - 3, 5, got.data());
  CHECK(got == std::vector<int32_t>{0, 41, 42, 43, 44});
  const Rows rows(stream, bytes, 1, 2, 1);
  CHECK(rows.count() == tokens + 1);
  int32_t slots[2], targets[2];
  rows.fill_window(tokens, slots, targets);
  CHECK(slots[0] == 43);
  CHECK(targets[0] == 44);
}

TEST_CASE("data: rows") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes");
  std::vector<uint16_t> stream_tokens;
  for (int i = 0; i < 100; i++) stream_tokens.push_back(static_cast<uint16_t>(i));
  write_foreign<uint16_t>(folder.path + "/a.bin", stream_tokens);
  const TokenStream stream(folder.path + "/a.bin", bytes);
  const int64_t C = 2, S = 4, T = C * S;
  const Rows rows(stream, bytes, C, S, 7);
  CHECK(rows.count() == 16);  // 16 * 6 + 1 of 100 tokens
  CHECK(has(rows.notes(), "the last 3 of 100 tokens fill no row"));
  std::vector<int32_t> tokens(T), targets(T);
  rows.fill_window(2, tokens.data(), targets.data());
  CHECK(tokens == std::vector<int32_t>{12, 13, 14, 257, 15, 16, 17, 257});
  CHECK(targets == std::vector<int32_t>{13, 14, 15, -100, 16, 17, 18, -100});
  CHECK_THROWS_AS(rows.fill_window(16, tokens.data(), targets.data()), Error);
  // With the window before it, to the same end.
  std::vector<int32_t> longer(2 * T), longer_targets(2 * T);
  rows.fill_window(2, longer.data(), longer_targets.data(), 2);
  CHECK(longer == std::vector<int32_t>{6, 7, 8, 257, 9, 10, 11, 257, 12, 13, 14, 257, 15, 16, 17, 257});
  CHECK(longer_targets == std::vector<int32_t>{7, 8, 9, -100, 10, 11, 12, -100, 13, 14, 15, -100, 16, 17, 18, -100});
  CHECK(rows.has_past(15, 16));
  CHECK_FALSE(rows.has_past(14, 16));
  CHECK_THROWS_AS(rows.fill_window(0, longer.data(), longer_targets.data(), 2), Error);

  // Every window once an epoch, in an order of its own; the same again from the same seed.
  std::vector<std::vector<int32_t>> orders;
  for (int epoch = 0; epoch < 3; epoch++) {
    std::vector<int32_t> order;
    for (int64_t r = 0; r < rows.count(); r++) {
      rows.fill_row(epoch * rows.count() + r, tokens.data(), targets.data());
      CHECK(targets[T - 2] == tokens[T - 2] + 1);
      order.push_back(tokens[0] / 6);
    }
    CHECK(std::set<int32_t>(order.begin(), order.end()).size() == 16);
    CHECK(!std::is_sorted(order.begin(), order.end()));
    orders.push_back(order);
  }
  CHECK(orders[0] != orders[1]);
  CHECK(orders[1] != orders[2]);
  Rows(stream, bytes, C, S, 7).fill_row(16 + 5, tokens.data(), targets.data());
  CHECK(tokens[0] / 6 == orders[1][5]);
  std::vector<int32_t> other_seed;
  for (int64_t r = 0; r < 16; r++) {
    Rows(stream, bytes, C, S, 8).fill_row(r, tokens.data(), targets.data());
    other_seed.push_back(tokens[0] / 6);
  }
  CHECK(other_seed != orders[0]);

  CHECK(Rows(stream, bytes, 33, 4, 7).count() == 1);  // all 100 tokens
  CHECK(has(error_of([&] { Rows(stream, bytes, 34, 4, 7); }),
            "expected at least the 103 tokens of one row of 34 chunks, found 100"));
}

TEST_CASE("data: the order of rows is a permutation for any number of them") {
  for (const int64_t count : {1, 2, 3, 5, 16, 17, 1000, 65537}) {
    std::vector<bool> taken(count);
    int64_t fixed = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t place = permuted(i, count, 3, 4);
      REQUIRE((place >= 0 && place < count));
      REQUIRE(!taken[place]);
      taken[place] = true;
      fixed += place == i;
    }
    if (count >= 1000) CHECK(fixed < 10);
  }
  const int64_t many = int64_t{1} << 40;
  CHECK(permuted(0, many, 3, 4) != permuted(1, many, 3, 4));
  CHECK(permuted(many - 1, many, 3, 4) < many);
}

TEST_CASE("data: rows of one document each") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes");
  const uint16_t eot = 256;
  // A document of 8 tokens, one of 3 over the edge of two shards, an empty one, and a last one of 2.
  write_foreign<uint16_t>(folder.path + "/a.bin", {eot, 1, 2, 3, 4, 5, 6, 7, eot, 8});
  write_foreign<uint16_t>(folder.path + "/b.bin", {9, eot, eot, 10});
  const TokenStream stream(folder.path + "/*.bin", bytes);
  const Rows rows(stream, bytes, 2, 3, 0, false);  // windows of 5 tokens
  const int32_t E = 256, L = 257, N = no_target;
  const std::vector<std::pair<std::vector<int32_t>, std::vector<int32_t>>> want = {
      {{E, 1, L, 2, 3, L}, {1, 2, N, 3, 4, N}},   {{4, 5, L, 6, 7, L}, {5, 6, N, 7, E, N}},
      {{E, 8, L, 9, E, L}, {8, 9, N, E, N, N}},   {{E, E, L, E, E, L}, {E, N, N, N, N, N}},
      {{E, 10, L, E, E, L}, {10, N, N, N, N, N}},
  };
  REQUIRE(rows.count() == static_cast<int64_t>(want.size()));
  for (size_t w = 0; w < want.size(); w++) {
    std::vector<int32_t> tokens(6), targets(6);
    rows.fill_window(static_cast<int64_t>(w), tokens.data(), targets.data());
    CHECK(tokens == want[w].first);
    CHECK(targets == want[w].second);
  }
  // With more past, of its own document.
  for (int64_t w = 0; w < rows.count(); w++) CHECK(rows.has_past(w, 2) == (w == 1));
  std::vector<int32_t> tokens(12), targets(12);
  rows.fill_window(1, tokens.data(), targets.data(), 2);
  CHECK(tokens == std::vector<int32_t>{E, 1, L, 2, 3, L, 4, 5, L, 6, 7, L});
  CHECK(targets == std::vector<int32_t>{1, 2, N, 3, 4, N, 5, 6, N, 7, E, N});
}

TEST_CASE("data: a checkpoint knows its data again") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes");
  std::vector<uint16_t> tokens;
  for (const int32_t id : test::random_ids(300000, 1, 263)) tokens.push_back(static_cast<uint16_t>(id));
  write_foreign<uint16_t>(folder.path + "/a.bin", tokens);
  write_foreign<uint16_t>(folder.path + "/b.bin", {1, 2});
  const Json saved = parse_json(TokenStream(folder.path + "/*.bin", bytes).state().dump(), "x");
  const auto check = [&](const std::string& pattern) {
    return error_of([&] { TokenStream(pattern, bytes).check_same(JsonField(saved, "state.json")); });
  };
  CHECK(check(folder.path + "/*.bin") == "");
  CHECK(has(check(folder.path + "/a.bin"), "expected 2 shards, found 1"));
  tokens.back()++;
  write_foreign<uint16_t>(folder.path + "/a.bin", tokens);
  CHECK(has(check(folder.path + "/*.bin"), "expected the shard {\"name\":\"a.bin\""));
  tokens.back()--;
  write_foreign<uint16_t>(folder.path + "/a.bin", tokens);
  std::filesystem::create_directory(folder.path + "/moved");
  for (const char* name : {"a.bin", "b.bin"})
    std::filesystem::rename(folder.path + "/" + name, folder.path + "/moved/" + name);
  CHECK(check(folder.path + "/moved/*.bin") == "");
}

TEST_CASE("data: text files to shards") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes");
  const std::string texts = folder.path + "/texts";
  make_folder(texts + "/sub");
  make_folder(texts + "/val");
  write_file(texts + "/b.txt", "second one");
  write_file(texts + "/a.txt", "first");
  write_file(texts + "/empty.txt", "");
  write_file(texts + "/sub/c.txt", "third<|endoftext|>fourth<|endoftext|>");
  write_file(texts + "/.hidden", "hidden");
  write_file(texts + "/val/v.txt", "kept");
  const auto text_of = [&](const std::string& prefix, const std::string& split) {
    return bytes.decode(all_of(folder.path + "/" + prefix + "_" + split + "_*.bin", bytes));
  };
  ThreadPool pool(2);
  TokenizeReport report = tokenize_files(bytes, {texts}, folder.path + "/x", {}, pool);
  const std::string E = "<|endoftext|>";
  CHECK(text_of("x", "train") == E + "first" + E + "second one" + E + "third" + E + "fourth" + E);
  CHECK(text_of("x", "val") == E + "kept");
  CHECK(report.documents == 4);
  CHECK(report.bytes == 5 + 10 + 37 + 4);
  CHECK(report.train_tokens == 3 + 5 + 10 + 37);  // the names in c.txt are text here
  CHECK(report.val_tokens == 5);
  TokenizeOptions marked;
  marked.marked = true;
  report = tokenize_files(bytes, {texts}, folder.path + "/m", marked, pool);
  CHECK(text_of("m", "train") == E + "first" + E + "second one" + E + "third" + E + "fourth");
  CHECK(report.documents == 5);
  CHECK(report.train_tokens == 4 + 5 + 10 + 5 + 6);

  // A part of the bytes, from the end, cut where a word ends.
  TokenizeOptions half;
  half.val_fraction = 0.5;
  tokenize_files(bytes, {texts + "/a.txt", texts + "/b.txt"}, folder.path + "/h", half, pool);
  CHECK(text_of("h", "train") == E + "first" + E + "second");
  CHECK(text_of("h", "val") == E + " one");
  half.val_fraction = 0;
  tokenize_files(bytes, {texts + "/b.txt"}, folder.path + "/z", half, pool);
  CHECK(text_of("z", "train") == E + "second one");
  CHECK(has(error_of([&] { glob_files(folder.path + "/z_val_*.bin"); }), "no file matches"));

  const auto failure = [&](const std::vector<std::string>& paths, double fraction) {
    TokenizeOptions options;
    options.val_fraction = fraction;
    return error_of([&] { tokenize_files(bytes, paths, folder.path + "/f", options, pool); });
  };
  CHECK(has(failure({texts + "/a.txt"}, 0.1), "5 bytes of text are too short to keep a part (0.1) for validation"));
  CHECK(has(failure({texts + "/empty.txt"}, 0.1), "no text to train on"));
  CHECK(has(failure({texts + "/none.txt"}, 0.1), "none.txt': No such file"));
  CHECK(has(failure({texts + "/a.txt"}, 1), "expected at least 0 and below 1"));
  for (const std::string& name : list_folder(folder.path)) CHECK(name[0] != 'f');  // nothing half-written
}

TEST_CASE("data: long files give the same shards for any number of threads and any cut") {
  const TempFolder folder;
  std::mt19937 random(1);
  std::string text(1500000, 'x');  // no place to cut for more than a piece
  while (text.size() < 6000000)
    text +=
        std::string(1 + random() % 12, static_cast<char>('a' + random() % 3)) + (random() % 5 ? " " : "\xE3\x80\x80\n");
  write_file(folder.path + "/a.txt", text);
  const Tokenizer tokenizer({{'a', 'a'}, {256, 256}, {' ', 'b'}, {'x', 'x'}, {259, 259}, {'c', 'c'}, {0xE3, 0x80}});
  std::vector<int32_t> want = tokenizer.encode(text);
  want.insert(want.begin(), tokenizer.end_of_text);
  TokenizeOptions options;
  options.val_fraction = 0;
  options.shard_tokens = 1000000;
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    const std::string prefix = folder.path + str("/t", threads);
    tokenize_files(tokenizer, {folder.path + "/a.txt"}, prefix, options, pool);
    CHECK(all_of(prefix + "_train_*.bin", tokenizer) == want);
    CHECK(glob_files(prefix + "_train_*.bin").size() == want.size() / 1000000 + 1);
  }
}

TEST_CASE("data: of a folder each text once, whatever links lead to it; what is no text is left out and counted") {
  const TempFolder folder;
  const std::string texts = folder.path + "/texts";
  for (const char* sub : {"", "/sub", "/val"}) make_folder(texts + sub);
  const std::string a = "the first\n", b = "a second one\n", v = "kept apart\n";
  write_file(texts + "/b.txt", b);
  write_file(texts + "/sub/a.txt", a);
  write_file(texts + "/val/v.txt", v);
  const auto link = [&](const std::string& to, const std::string& name) {
    std::filesystem::create_symlink(to, texts + "/" + name);
  };
  link("b.txt", "c.txt");   // a file once more
  link("nothing", "dead");  // links to nothing
  link("itself", "itself");
  link(".", "loop");  // and back
  link("..", "sub/up");
  link("val", "aval");  // to what is for validation
  link("val/v.txt", "a_v.txt");
  std::filesystem::create_hard_link(texts + "/val/v.txt", texts + "/hard.txt");
  write_file(texts + "/x.dat", std::string("\0\0\0\2", 4));
  write_file(texts + "/x.gz", "\x1f\x8b and more");
  write_file(texts + "/x.utf16", "\xff\xfe*");
  write_file(texts + "/x.lfs", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n");
  REQUIRE(mkfifo((texts + "/pipe").c_str(), 0600) == 0);
  const auto said_of = [&](const std::vector<std::string>& paths) {
    const TextFiles found = text_files(paths);
    std::string said;
    for (const TextFile& file : found.files) said += file.path.substr(texts.size()) + (file.val ? " val; " : "; ");
    return said + found.left_out;
  };
  const std::string said = said_of({texts});
  CAPTURE(said);
  CHECK(said.starts_with("/b.txt; /sub/a.txt; /val/v.txt val; left out: "));
  for (const char* words : {"6 met a second time ('", "2 leading to nothing ('", "1 neither file nor folder ('",
                            "1 UTF-16 ('", "1 compressed with gzip ('", "unpack it with gunzip)",
                            "1 a Git LFS pointer ('", "1 with zero bytes, so no text ('"})
    CHECK_MESSAGE(has(said, words), words);
  // In any order, and twice.
  CHECK(said_of({texts + "/val", texts, texts}).starts_with("/b.txt; /sub/a.txt; /val/v.txt val; left out: "));
  CHECK(said_of({texts + "/sub", texts + "/b.txt"}).starts_with("/sub/a.txt; "));
  ThreadPool pool(2);
  const Tokenizer bytes = Tokenizer::load("bytes");
  CHECK(tokenize_files(bytes, {texts}, folder.path + "/t", {}, pool).bytes == std::ssize(a + b + v));
  CHECK(has(error_of([&] { tokenize_files(bytes, {texts + "/x.gz"}, folder.path + "/z", {}, pool); }),
            "compressed with gzip"));
  CHECK(has(error_of([&] { text_files({texts + "/dead"}); }), "dead' is a link to something that is not there"));
}

TEST_CASE("data: text without white space has a validation part, and pieces of bounded size, of whole characters") {
  const TempFolder folder;
  const Tokenizer bytes = Tokenizer::load("bytes");
  ThreadPool pool(2);
  const std::string E = "<|endoftext|>", path = folder.path + "/a.txt";
  const auto text_of = [&](const std::string& name, const std::string& split) {
    return bytes.decode(all_of(folder.path + "/" + name + "_" + split + "_*.bin", bytes));
  };
  std::string text;
  while (text.size() < 3000000) text += "\xE6\x9D\xB1";
  write_file(path, text);
  tokenize_files(bytes, {path}, folder.path + "/x", {}, pool);
  const std::string val = text_of("x", "val").substr(E.size());
  CHECK(val.size() % 3 == 0);
  CHECK(std::abs(std::ssize(val) - 30000) <= 3);
  CHECK(text_of("x", "train") == E + text.substr(0, text.size() - val.size()));
  // A marker over the place of the cut stays whole.
  text.replace(text.size() - 30006, 15, E + "xy");
  write_file(path, text);
  TokenizeOptions marked;
  marked.marked = true;
  CHECK(tokenize_files(bytes, {path}, folder.path + "/m", marked, pool).documents == 2);
  // Many pieces, the largest of which is bounded.
  while (text.size() < 12000000) text += text;
  write_file(path, text);
  size_t largest = 0, all = 0;
  TextPieces({{path, std::ssize(text), false}}, 0)
      .run<int>(
          pool, "reading", [](const std::string&, int&, int) {},
          [&](const TextPieces::Piece& piece, int) {
            largest = std::max(largest, static_cast<size_t>(piece.end - piece.begin));
            all += static_cast<size_t>(piece.end - piece.begin);
          });
  CHECK(all == text.size());
  CHECK(largest < (size_t{5} << 20));
}

TEST_CASE("data: a piece is not cut inside white space of several bytes") {
  const TempFolder folder;
  const Tokenizer tokenizer({{0x80, '\n'}});  // joins what lies beside the only cut that is near, and is none
  ThreadPool pool(1);
  TokenizeOptions options;
  options.val_fraction = 0;
  for (size_t before = 0; before < 5; before++) {
    const std::string text = std::string((1 << 20) - before, 'x') + "\xE3\x80\x80\n\nxx xx",
                      prefix = folder.path + str("/t", before);
    write_file(folder.path + "/a.txt", text);
    tokenize_files(tokenizer, {folder.path + "/a.txt"}, prefix, options, pool);
    std::vector<int32_t> want = tokenizer.encode(text);
    want.insert(want.begin(), tokenizer.end_of_text);
    CHECK(all_of(prefix + "_train_*.bin", tokenizer) == want);
  }
}
