// A row's memory in a file: what is read after it is loaded has the bits of one reading; a file of anything else, or
// damaged, is refused; and the commands that save and load one.
#include "runtime/memory_file.h"

#include <set>

#include "dev/test/small_model.h"
#include "dev/test/test.h"
#include "dev/test/workshop.h"

namespace gca::test {
namespace {

struct Reading {
  Model<Cpu<double>> model;
  RowReader<Cpu<double>> rows;
  Reading(const Config& config, bool on_host)
      : model(config, 1, config.chunk, Use::inference),
        rows(model.net, {.chunks = 12, .segment_slots = 2 * config.chunk, .on_host = on_host}) {
    rows.rewind();
  }
  // final_n of slots first .. last - 1, read on.
  Vec read(const Batch& batch, int64_t first, int64_t last) {
    const int64_t S = model.net.config.chunk, D = model.net.config.width;
    Vec out;
    for (int64_t end = 0; first < last; first = end) {  // whole chunks, or slots of one
      end = first % S || last - first < S ? std::min(last, round_up(first + 1, S)) : last / S * S;
      rows.read(batch.tokens.data() + first, nullptr, 0, end - first, {},
                [&](int64_t, int64_t T) { out.insert(out.end(), model.net.final_n, model.net.final_n + T * D); });
    }
    return out;
  }
  void save(const std::string& path, uint32_t weights = 7) {
    save_memory(path, memory_fields(model.net, weights), "text", model.net, rows);
  }
  void load(const std::string& path, uint32_t weights = 7) {
    load_memory(MemoryFile(path, memory_fields(model.net, weights)), model.net, rows);
  }
};

TEST_CASE("memory in a file: a row goes on with the bits of one reading, wherever either reader has its chunks") {
  const TempFolder folder;
  const std::string path = folder.path + "/memory.safetensors";
  for (const std::vector<int64_t>& groups : {std::vector<int64_t>{1, 1}, {2}, {}}) {
    const Config c = small(groups, 5, 3);
    const Batch batch(c, 1, 12);
    for (const int64_t slots : {0, 3, 5, 20, 38, 39})
      for (const bool from_host : {false, true})
        for (const bool to_host : {false, true}) {
          CAPTURE(groups.size());
          CAPTURE(slots);
          CAPTURE(from_host);
          CAPTURE(to_host);
          Reading first(c, from_host), second(c, to_host);
          first.read(batch, 0, slots);
          first.save(path);
          second.read(Batch(c, 1, 12, 50), 0, 43);  // of another row: nothing of it stays
          second.load(path);
          CHECK(second.rows.slots() == slots);
          CHECK(same_bits(second.read(batch, slots, batch.T), first.read(batch, slots, batch.T)));
        }
  }
}

TEST_CASE("memory in a file: another model's, other sizes', damaged or cut off: refused, with what to do") {
  const TempFolder folder;
  const std::string path = folder.path + "/memory.safetensors", broken = folder.path + "/broken";
  Config c = small({1, 1}, 5, 3);
  Reading reading(c, false);
  reading.read(Batch(c, 1, 12), 0, 18);
  reading.save(path);
  const auto told = [&](const std::string& error, std::initializer_list<const char*> words) {
    CAPTURE(error);
    for (const char* word : words) CHECK(has(error, word));
  };
  told(error_of([&] { reading.load(path, 8); }), {path.c_str(), "weights: expected 00000008, found 00000007; use the"});
  c.reach.topk = 2;
  told(error_of([&] { Reading(c, false).load(path); }), {"topk: expected 2, found 3; use the model and the settings"});
  c.reach = {.topk = 3, .window = 3};
  told(error_of([&] { Reading(c, false).load(path); }), {"window: expected 3, found 4"});
  c = small({2}, 5, 3);
  told(error_of([&] { Reading(c, false).load(path); }), {"groups: expected [2], found [1,1]"});
  MemoryFields in_float = memory_fields(reading.model.net, 7);
  in_float["precision"] = Dtype(Dtype::F32).name();
  told(error_of([&] { MemoryFile(path, in_float); }), {"precision: expected F32, found F64"});
  const MemoryFile file(path, memory_fields(reading.model.net, 7));
  told(error_of([&] { file.check_text(std::vector<int32_t>(17)); }), {"slots: expected 17, found 18"});
  told(error_of([&] { file.check_text(std::vector<int32_t>(18)); }), {"text: expected", "found text", "another text"});
  write_safetensors(broken, {{"format", "pt"}}, {});
  told(error_of([&] { reading.load(broken); }),
       {"format: expected 'train_gca memory', found \"pt\"; give a file that"});
  // Too long for the reader.
  CHECK_THROWS_AS(memory_parts(reading.model.net, reading.rows, 13 * 5), Error);
  // One bit anywhere, an end anywhere.
  const std::string whole = read_file(path, size_t{1} << 24);
  int64_t accepted = 0;
  const auto damaged = [&](const std::string& content) {
    write_file(broken, content);
    const std::string error = error_of([&] { reading.load(broken); });
    accepted += !has(error, broken);
  };
  for (size_t i = 0; i < whole.size(); i += i < 4000 ? 1 : 37) {
    std::string flipped = whole;
    flipped[i] = static_cast<char>(flipped[i] ^ (1 << i % 8));
    damaged(flipped);
  }
  for (size_t size = 0; size < whole.size(); size += 101) damaged(whole.substr(0, size));
  damaged(whole + "x");
  CHECK(accepted == 0);
  reading.load(path);
  // Made by someone, with the right checksums: picks that are not in the past, more slots than can be counted.
  std::vector<MemoryPart> made = memory_parts(reading.model.net, reading.rows, 18);
  MemoryPart& picks = *std::find_if(made.begin(), made.end(), [](const MemoryPart& p) { return p.name == "pick.1"; });
  for (const int32_t pick : {2, 1000000000, -2}) {
    picks.get = [&](void* out, int64_t, int64_t n_bytes) {
      std::fill_n(static_cast<int32_t*>(out), n_bytes / 4, pick);
    };
    write_memory(broken, memory_fields(reading.model.net, 7), 18, "", made);
    told(error_of([&] { reading.load(broken); }),
         {broken.c_str(), "tensor 'pick.1': expected chunks below 2, or -1, found "});
  }
  write_memory(broken, memory_fields(reading.model.net, 7), INT64_MAX, "", {});
  told(error_of([&] { MemoryFile(broken, {}); }),
       {"slots: expected a number up to 1099511627776, found 9223372036854"});
  // A save that fails leaves what was there, and nothing else.
  std::vector<MemoryPart> parts = memory_parts(reading.model.net, reading.rows, 18);
  parts.back().get = [](void*, int64_t, int64_t) { throw Error("no more"); };
  CHECK_THROWS_AS(write_memory(path, memory_fields(reading.model.net, 7), 18, "", parts), Error);
  CHECK(read_file(path, size_t{1} << 24) == whole);
  CHECK(list_folder(folder.path).size() == 2);
}

}  // namespace

TEST_CASE("generate and passkey go on after a memory that was saved as after the text itself") {
  const Workshop shop;
  const std::string run = shop.path + "/run", memory = shop.path + "/memory";
  REQUIRE(shop.run(shop.training("run", {{"steps", "60"}, {"lr", "1e-2"}})).exit == 0);
  const std::string generate = "generate --checkpoint " + run + " --temperature 1 --count 40 ";
  const std::string text = read_file(shop.path + "/text.txt", size_t{1} << 24);
  const auto ids = [&](size_t first, size_t count) {
    std::string all;
    for (size_t i = first; i < first + count; i++) all += str(i > first ? "," : "", static_cast<int>(text[i]));
    return " --prompt-ids " + all;
  };
  std::set<std::string> different;
  for (const size_t before : {1, 55, 56, 57, 300})
    for (const char* place : {" --memory gpu", " --memory host"}) {
      CAPTURE(before);
      CAPTURE(place);
      const char* other = has(place, "host") ? " --memory gpu" : " --memory host";
      const Workshop::Result anew = shop.run(generate + ids(0, before + 20)),
                             saved = shop.run(generate + ids(0, before) + place + " --save-memory " + memory),
                             loaded = shop.run(generate + ids(before, 20) + other + " --load-memory " + memory);
      CHECK(saved.exit == 0);
      CHECK(loaded.exit == 0);
      CHECK(loaded.out == anew.out);
      CHECK(loaded.out.size() > 10);
      different.insert(loaded.out);
    }
  CHECK(different.size() > 2);
  shop.fails(generate + "--load-memory " + memory, 2, "--load-memory goes on with a prompt");
  shop.fails(generate + "--prompt x --context " + shop.path + "/text.txt --load-memory " + memory, 2, "choose one");
  shop.fails(generate + "--prompt x --load-memory " + run + "/nowhere", 1, "cannot open");
  shop.fails(generate + "--prompt x --save-memory " + shop.path + "/nowhere/memory", 1, "cannot create");
  REQUIRE(shop.run(shop.training("other", {{"steps", "6"}})).exit == 0);
  shop.fails("generate --checkpoint " + shop.path + "/other --prompt x --load-memory " + memory, 1,
             "weights: expected ");

  const std::string passkey = "passkey --checkpoint " + run + " --haystack " + shop.path +
                              "/text.txt --value-tokens 2 --others 6 --asks 4 --trials 1 --far-only --length ";
  const auto figures = [](const Workshop::Result& result) {  // up to the columns of speed
    CHECK(result.exit == 0);
    const size_t row = result.out.rfind(" far ");
    return row == std::string::npos ? result.out : result.out.substr(row, 110);
  };
  const std::string anew = figures(shop.run(passkey + "400"));
  CHECK(figures(shop.run(passkey + "400 --save-memory " + memory)) == anew);
  CHECK(figures(shop.run(passkey + "400 --memory host --load-memory " + memory)) == anew);
  shop.fails(passkey + "800 --load-memory " + memory, 1, "slots: expected ");
  shop.fails(passkey + "400 --seed 2 --load-memory " + memory, 1, "it is of another text");
  shop.fails(passkey + "400 --no-retrieval --load-memory " + memory, 1, "retrieval: expected none, found learned");
  shop.fails(passkey + "400,800 --load-memory " + memory, 2, "expected one --length");
  shop.fails(passkey + "400 --save-memory " + memory + " --out " + shop.path + "/out", 2, "exclude each other");
}

}  // namespace gca::test
