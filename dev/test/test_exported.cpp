// A file that export made is a model by itself: read in place of a checkpoint, compared by --init, refused where its
// metadata are not as they were written.
#include <optional>

#include "base/safetensors.h"
#include "base/text.h"
#include "runtime/run.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

using Metadata = std::map<std::string, std::string>;

// A run of the tiny model on tokens of a vocabulary of its own, exported in float and in bf16.
struct ExportedShop : Workshop {
  const std::string exported = path + "/e.safetensors", half = path + "/half.safetensors", own = path + "/own.bpe";
  ExportedShop() {
    REQUIRE(run("tokenizer-train --vocab-size 270 --out " + own + " " + path + "/text.txt").exit == 0);
    REQUIRE(run("tokenize --tokenizer " + own + " --val 0.1 --out " + path + "/own/t " + path + "/text.txt").exit == 0);
    REQUIRE(run(training_own("run", {{"steps", "3"}, {"null-slot", "off"}, {"tokenizer", own}})).exit == 0);
    REQUIRE(run("export --checkpoint " + path + "/run --dtype float --out " + exported).exit == 0);
    REQUIRE(run("export --checkpoint " + path + "/run --out " + half).exit == 0);
  }
  std::string training_own(const std::string& out, const FlagMap& others) const {
    return tiny_training(out, with({{"data", path + "/own/t_train_*"}}, others));
  }
  // Its numbers under other metadata, and what eval says of that.
  Result with_metadata(const Metadata& metadata) const {
    const SafetensorsFile file = SafetensorsFile::open(exported);
    std::vector<SafetensorsEntry> entries;
    for (const SafetensorsTensor& t : file.tensors())
      entries.push_back({t.name, t.dtype, t.shape, [&file, &t](void* out, int64_t first, int64_t count) {
                           file.read(t, first, count, static_cast<float*>(out));
                         }});
    write_safetensors(path + "/changed.safetensors", metadata, entries);
    return run(eval_of(path + "/changed.safetensors"));
  }
  std::string eval_of(const std::string& checkpoint) const {
    return "eval --checkpoint " + checkpoint + " --chunks 2 --data '" + path + "/own/t_val_*'";
  }
  // From "hash " on: of the losses.
  std::string hash_of(const std::string& checkpoint) const {
    const Result result = run(eval_of(checkpoint));
    CHECK_MESSAGE(result.exit == 0, result.out);
    return has(result.out, "hash ") ? result.out.substr(result.out.find("hash "), 13) : result.out;
  }
  Result start_from(const std::string& init, const FlagMap& others) const {
    remove_tree(path + "/new");
    return run("train" + written(with({{"init", init},
                                       {"data", path + "/own/t_train_*"},
                                       {"chunks", "2"},
                                       {"batch", "2"},
                                       {"steps", "1"},
                                       {"out", path + "/new"}},
                                      others)));
  }
};

}  // namespace

TEST_CASE("exported: whatever reads a checkpoint reads the file, with the same results") {
  const ExportedShop shop;
  const std::string run = shop.path + "/run";
  CHECK(shop.hash_of(shop.exported) == shop.hash_of(run));
  CHECK(shop.hash_of(shop.half) != shop.hash_of(run));
  const auto same = [&](const std::string& command) {
    const Workshop::Result of_run = shop.run(command + " --checkpoint " + run),
                           of_file = shop.run(command + " --checkpoint " + shop.exported);
    CAPTURE(command);
    CHECK(of_run.exit == 0);
    std::string expected = of_run.out;
    const std::string folder = run + "/step_00000003";
    if (has(expected, folder)) expected.replace(expected.find(folder), folder.size(), shop.exported);
    CHECK(of_file.out == expected);
  };
  same("generate --temperature 0 --count 20 --prompt 'the sea'");
  same("inspect --text " + shop.path + "/text.txt");
  write_file(shop.path + "/prompts", "the sea\na ship\n");
  const std::string file = " --checkpoint " + shop.half;
  const Workshop::Result several =
      shop.run("generate --count 3 --prompts " + shop.path + "/prompts" + file + " 2> /dev/null");
  CHECK(several.exit == 0);
  CHECK(says(several, "{\"prompt\":2,\"tokens\":3"));
  CHECK(
      shop.run("passkey --trials 1 --value-tokens 1 --length 256 --haystack " + shop.path + "/text.txt" + file).exit ==
      0);
  // A memory is of the file that it was made with.
  const std::string memory = " " + shop.path + "/memory";
  CHECK(shop.run("generate --count 3 --prompt 'the sea' --save-memory" + memory + file).exit == 0);
  CHECK(shop.run("generate --count 3 --prompt ' 1' --load-memory" + memory + file).exit == 0);
  shop.fails("generate --count 3 --prompt ' 1' --load-memory" + memory + " --checkpoint " + run, 1,
             "weights: expected");

  // Exported again the file says the same, and so does one in another type of number.
  CHECK(shop.run("export --dtype float --out " + shop.path + "/again.safetensors --checkpoint " + shop.exported).exit ==
        0);
  CHECK(read_file(shop.path + "/again.safetensors", 1 << 24) == read_file(shop.exported, 1 << 24));
  CHECK(SafetensorsFile::open(shop.half).metadata() == SafetensorsFile::open(shop.exported).metadata());
  // Its tokenizer is one for shards, too; of the machine's paths it keeps none.
  CHECK(shop.run("tokenize --tokenizer " + shop.half + " --val 0.1 --out " + shop.path + "/again/t " + shop.path +
                 "/text.txt")
            .exit == 0);
  CHECK(read_file(shop.path + "/again/t_train_000000.bin", 1 << 24) ==
        read_file(shop.path + "/own/t_train_000000.bin", 1 << 24));
  CHECK_FALSE(has(read_file(shop.exported, 1 << 24), shop.path));
}

TEST_CASE("exported: --init takes what is not given from the weights' own settings, and refuses what differs") {
  const ExportedShop shop;
  const std::string run = shop.path + "/run";
  for (const std::string& init : {run, shop.exported}) {
    CAPTURE(init);
    const Workshop::Result taken = shop.start_from(init, {{"lr", "0"}, {"lr-final", "0"}});
    CHECK_MESSAGE(taken.exit == 0, taken.out);
    CHECK(shop.hash_of(shop.path + "/new") == shop.hash_of(run));
    const SavedRun started = SavedRun::open(shop.path + "/new");
    CHECK(started.settings.config == SavedRun::open(run).settings.config);
    CHECK(started.tokenizer.hash() == Tokenizer::load(shop.own).hash());

    const auto refused = [&](const FlagMap& flags, const std::string& words) {
      const Workshop::Result result = shop.start_from(init, flags);
      CHECK(result.exit == 2);
      CHECK_MESSAGE(says(result, words), result.out);
      CHECK_FALSE(std::filesystem::exists(shop.path + "/new"));
    };
    const std::string weights = ": the weights in '" + init + "' were trained with ";
    refused({{"heads", "1"}}, "--heads" + weights + "2, found 1; leave it out");
    refused({{"chunk", "4"}}, "--chunk" + weights + "8, found 4");
    refused({{"groups", "1,1"}}, "--groups" + weights + "1, found 1,1");
    refused({{"groups", ""}}, "--groups" + weights + "1, found none");
    refused({{"ffn", "10"}}, "--ffn" + weights + "8, found 10");
    refused({{"model", "tiny"}}, "--model tiny: its --width" + weights + "8, found 64; leave --model out");
    refused({{"tokenizer", "bytes"}}, "--tokenizer" + weights + "byte-level BPE of 270 (hash ");
    CHECK(shop.start_from(init, {{"heads", "2"}, {"model", "small"}, {"tokenizer", shop.own}}).exit == 0);
    const Workshop::Result slot = shop.start_from(init, {{"null-slot", "on"}});
    CHECK(slot.exit == 0);
    CHECK(says(slot, "--null-slot" + weights + "off, found on"));
    CHECK(SavedRun::open(shop.path + "/new").settings.config.null_slot);
    // No tensor has another shape for these: they are said, and taken.
    const Workshop::Result reach = shop.start_from(init, {{"window", "3"}, {"topk", "1"}});
    CHECK(reach.exit == 0);
    CHECK(says(reach, "note: --window" + weights + "8, found 3, and is trained with that from here on"));
    CHECK(says(reach, "note: --topk" + weights + "2, found 1"));
    CHECK(SavedRun::open(shop.path + "/new").settings.config.reach == Reach{.topk = 1, .window = 3});
    refused({{"model", "tiny"}, {"window", "3"}}, "leave --model out");
  }
  // Weights alone: what they do not say is said to be taken on trust.
  const Workshop::Result alone = shop.run(shop.training_own(
      "alone", {{"steps", "1"}, {"tokenizer", shop.own}, {"init", run + "/step_00000003/model.safetensors"}}));
  CHECK_MESSAGE(alone.exit == 0, alone.out);
  CHECK(says(alone, "says nothing of heads, chunk, topk, window and null slot: --heads 2 --chunk 8"));
}

TEST_CASE("exported: metadata that are missing, damaged, newer, or of another vocabulary are refused") {
  const ExportedShop shop;
  const Metadata good = SafetensorsFile::open(shop.exported).metadata();
  CHECK(shop.with_metadata(good).exit == 0);
  const auto refused = [&](const std::string& name, std::optional<std::string> value, const std::string& words) {
    Metadata metadata = good;
    if (value) metadata[name] = *value;
    else metadata.erase(name);
    const Workshop::Result result = shop.with_metadata(metadata);
    CHECK(result.exit == 1);
    CHECK_MESSAGE(says(result, "changed.safetensors'"), result.out);
    CHECK_MESSAGE(says(result, words), result.out);
  };
  const auto about = [&](const std::string& from, const std::string& to) {
    std::string text = good.at("train_gca");
    REQUIRE(has(text, from));
    return text.replace(text.find(from), from.size(), to);
  };
  const std::string missing = "expected settings and tokenizer in the metadata, found no \"";
  refused("train_gca", {}, missing + "train_gca\": an older train_gca exported it, or another program made it");
  refused("train_gca.tokenizer", {}, missing + "train_gca.tokenizer\"");
  refused("train_gca.crc32c", {}, missing + "train_gca.crc32c\"");
  refused("train_gca", "", "is not valid JSON at byte 0");
  refused("train_gca", "{}", "the field \"format\" is missing");
  refused("train_gca", "[1]", "expected an object");
  refused("train_gca", about("train_gca model", "other"), "expected the format \"train_gca model\", found \"other\"");
  refused("train_gca", about("\"version\":1", "\"version\":2"), "expected version 1, found 2: a newer train_gca");
  refused("train_gca", about("\"heads\":\"2\"", "\"heads\":\"1\""), "have changed since they were exported");
  std::string tokenizer = good.at("train_gca.tokenizer");
  tokenizer[100] = tokenizer[100] == 'A' ? 'B' : 'A';
  refused("train_gca.tokenizer", tokenizer, "have changed since they were exported");
  shop.fails(shop.eval_of(shop.path + "/run/step_00000003/model.safetensors"), 1,
             "is a part of the checkpoint '" + shop.path + "/run/step_00000003': give that folder");
  shop.fails("tokenize --out " + shop.path + "/x --tokenizer " + shop.path + "/run/step_00000003/model.safetensors " +
                 shop.path + "/text.txt",
             1, "expected a tokenizer in the metadata");

  // Whole by their checksum, but not of these weights.
  const auto exported_as = [&](const std::function<void(SavedRun&)>& change) {
    SavedRun saved = SavedRun::open(shop.exported);
    change(saved);
    return shop.with_metadata(exported_metadata(saved));
  };
  CHECK(exported_as([](SavedRun&) {}).exit == 0);
  const Workshop::Result vocabulary = exported_as([](SavedRun&saved) { saved.tokenizer = Tokenizer::load("bytes"); }),
                         sizes = exported_as([](SavedRun&saved) { saved.settings.config.ffn = 9; }),
                         heads = exported_as([](SavedRun&saved) { saved.settings.config.heads = 3; });
  CHECK(vocabulary.exit == 1);
  CHECK_MESSAGE(says(vocabulary,
                     "its tokenizer (bytes) has 263 ids: expected as many rows in "
                     "'model.embed_tokens.weight', found the shape [277,8]"),
                vocabulary.out);
  CHECK(sizes.exit == 1);
  CHECK(says(sizes, "gate_proj.weight': expected the shape [9,8], found [8,8]"));
  CHECK(heads.exit == 1);
  CHECK_MESSAGE(says(heads, "changed.safetensors' (train_gca): settings: --heads: expected a divisor of --width"),
                heads.out);
}

TEST_CASE("base64: bytes and back; what is no such is refused") {
  for (const auto& [bytes, text] : std::map<std::string, std::string>{
           {"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foo", "Zm9v"}, {"foob", "Zm9vYg=="}, {"\xff\xfe\xfd", "//79"}})
    CHECK(base64(bytes) == text);
  std::string all;
  for (int i = 0; i < 1000; i++) {
    CHECK(from_base64(base64(all), "it") == all);
    all += static_cast<char>(i * 7);
  }
  for (const char* bad : {"Z", "Zg", "Zg=", "Zg==Zg==", "Z===", "====", "Zm9 ", "Zm\n=", "Zm9v="})
    CHECK(has(error_of([&] { from_base64(bad, "it"); }), "it: expected bytes in base64"));
}
