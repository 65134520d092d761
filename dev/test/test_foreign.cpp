// Files of other programs where one of this program's is wanted: each is named for what it is, with the way out; those
// that hold the same in another form are read.
#include <doctest/doctest.h>

#include "base/foreign.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "dev/test/workshop.h"
#include "tokenizer/tokenizer.h"

using namespace gca;
using namespace gca::test;
using namespace std::string_literals;

namespace {

const std::string lfs_pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n";

// The tensors of a file in files of their own, `parts` of them, with an index in the folder.
void split(const SafetensorsFile& file, const std::string& folder, size_t parts) {
  make_folder(folder);
  Json index = Json::object();
  std::vector<std::vector<SafetensorsEntry>> of_part(parts);
  size_t number = 0;
  for (const SafetensorsTensor& t : file.tensors()) {
    const size_t part = number++ % parts;
    index["weight_map"][t.name] = str("model-0000", part + 1, "-of-0000", parts, ".safetensors");
    of_part[part].push_back({t.name, t.dtype, t.shape, [&file, &t](void* out, int64_t first, int64_t count) {
                               file.read(t, first, count, static_cast<float*>(out));
                             }});
  }
  for (size_t part = 0; part < parts; part++)
    write_safetensors(str(folder, "/model-0000", part + 1, "-of-0000", parts, ".safetensors"), {}, of_part[part]);
  write_file(folder + "/model.safetensors.index.json", index.dump());
}

}  // namespace

TEST_CASE("foreign: what files begin with") {
  const std::pair<std::string, const char*> cases[] = {
      {lfs_pointer, "a Git LFS pointer: fetch the file itself with git lfs pull"},
      {"\x1f\x8b\x08", "compressed with gzip: unpack it with gunzip"},
      {"PK\3\4...", "a zip archive, as PyTorch's checkpoints are: unzip it, or save it as safetensors"},
      {"\x80\x02}q\x00", "a Python pickle"},
      {"\x80\x04\x95\x10", "a Python pickle"},
      {"\n <!DocType HTML>", "a web page: fetch the file itself"},
      {"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "XML"},
      {"Entry not found", "a server's word that it has no such file"},
      {R"({"metadata":{"total_size":1},"weight_map":{}})", "the index of weights that are split"},
      {R"({ "architectures": ["X"] })", "a model's config.json"},
      {"\xEF\xBB\xBF{\"model_type\": \"gpt2\"}", "a model's config.json"},
      {R"({"tokenizer_class":"GPT2Tokenizer"})", "a tokenizer_config.json"},
      {R"({"!":0,"\"":1})", "GPT-2's vocab.json"},
      {"#version: 0.2\n\304\240 t\n", "GPT-2's merges.txt"},
      {"\xc8\xd7\x34\x01\1\0\0\0"s, "a tokenizer of llm.c"},
      {"\x88\xd8\x34\x01\1\0\0\0"s, "a token shard: give it to --data"},
      {Tokenizer::load("bytes").serialize(), "a tokenizer of this program"},
      {"\x30\0\0\0\0\0\0\0{\"a\":{}}"s, "a safetensors file"},
      {std::string(257, 'a') + "ustar", "a tar archive"},
      {"", "empty"},
  };
  for (const auto& [content, words] : cases)
    CHECK_MESSAGE(has(foreign_remark(content, "nothing"), "; it is "s + words), std::string(words));
  for (const char* content : {"To be, or not to be", "{\"step\": 5}", "[1, 2]", "# version", "\xEF\xBB\xBFtext"})
    CHECK_MESSAGE(foreign_remark(content, "nothing") == "nothing", content);
  CHECK(looks_like_text("caf\xC3\xA9\r\n\t"));
  CHECK(looks_like_text("cut \xF0\x9F\x99"));
  CHECK_FALSE(looks_like_text("caf\xE9 au lait"));
  CHECK_FALSE(looks_like_text("a\0b"s));
}

TEST_CASE("foreign: every command that could be handed them names them") {
  const Workshop shop;
  const auto put = [&](const char* name, const std::string& content) {
    write_file(shop.path + "/" + name, content);
    return shop.path + "/" + name;
  };
  std::string ids;
  for (uint32_t i = 0; i < 5000; i++) ids += static_cast<char>(philox(1, Draw::task, i).word[0]);
  const std::string bare = put("train.bin", ids), pointer = put("pointer.safetensors", lfs_pointer),
                    page = put("page", "<!DOCTYPE html><html>"), zip = put("model.pt", "PK\3\4\0\0\10\10"s),
                    config = put("config.json", R"({"architectures":["A"]})"), notes = put("notes.txt", "some words\n");
  const auto named = [&](const std::string& arguments, const char* words) {
    CAPTURE(arguments);
    const Workshop::Result result = shop.run(arguments);
    CHECK(result.exit == 1);
    CHECK_MESSAGE(says(result, words), result.out);
  };
  named("info --data " + bare,
        "without a header it may be bare ids, as nanoGPT's prepare.py writes them: if these "
        "are 2500 of uint16, put 256 int32 before them, 20240520, 1, 2500 and zeros");
  named("info --data " + notes, "it is text: make shards of it with tokenize");
  named("info --data " + pointer, "a Git LFS pointer");
  named("tokenize --tokenizer " + pointer + " --out " + shop.path + "/x " + notes, "a Git LFS pointer");
  named("encode < /dev/null --tokenizer " + page, "a web page");
  named("encode < /dev/null --tokenizer " + config, "a model's config.json");
  named("verify " + zip, "a zip archive");
  const auto init = [&](const std::string& path, const char* words) {
    named(shop.tiny_training("from", {{"steps", "1"}, {"init", path}}), words);
    remove_tree(shop.path + "/from");
  };
  init(pointer, "fetch the file itself with git lfs pull");
  init(zip, "save it as safetensors");
  init(config, "a model's config.json");
  init(shop.path + "/shards/t_train_000000.bin", "a token shard");
  make_folder(shop.path + "/hf");
  put("hf/config.json", R"({"architectures":["A"]})");
  init(shop.path + "/hf", "expected weights, a model.safetensors or a model.safetensors.index.json");
  put("hf/pytorch_model.bin", "PK\3\4");
  init(shop.path + "/hf", "found none (but config.json, pytorch_model.bin)");
  named("generate --prompt a --checkpoint " + shop.path + "/hf", "a model of another program: start from its weights");
  named("eval --data x --checkpoint " + zip, "a zip archive");
  named("export --out x --checkpoint " + pointer, "a Git LFS pointer");
  REQUIRE(shop.run(shop.tiny_training("run", {{"steps", "1"}})).exit == 0);
  const std::string from = " --checkpoint " + shop.path + "/run";
  named("generate --prompt a --context " + zip + from, "model.pt': expected text; it is a zip archive");
  named("generate --prompts " + zip + from, "expected text; it is a zip archive");
  named("generate --prompt a --load-memory " + zip + from, "a zip archive");
  named("inspect --text " + pointer + from, "expected text; it is a Git LFS pointer");
  const std::string program = put("program", "\x7f\x45LF\2\1\1\0\0"s);
  named("generate --prompt a --context " + program + from, "expected text, found a zero byte at byte 7");
  named("generate --prompts " + program + from, "expected text, found a zero byte at byte 7");
  named("inspect --text " + put("late", std::string(9000, 'a') + "\0"s) + from, "found a zero byte at byte 9000");
}

TEST_CASE("foreign: weights that are split into several files are read by their index or folder, number for number") {
  const Workshop shop;
  REQUIRE(shop.run(shop.tiny_training("run", {{"steps", "3"}})).exit == 0);
  const std::string model = shop.path + "/run/step_00000003/model.safetensors", folder = shop.path + "/hf",
                    index = folder + "/model.safetensors.index.json";
  const SafetensorsFile whole = SafetensorsFile::open(model);
  split(whole, folder, 3);
  write_file(folder + "/config.json", R"({"architectures":["A"]})");
  for (const std::string& path : {index, folder}) {
    const SafetensorsFile file = SafetensorsFile::open_weights(path);
    REQUIRE(file.tensors().size() == whole.tensors().size());
    for (const SafetensorsTensor& t : whole.tensors()) {
      CHECK(file.at(t.name, t.shape).dtype == t.dtype);
      CHECK(file.values<float>(t.name) == whole.values<float>(t.name));
    }
  }
  // A run of no learning rate keeps the weights that it starts from.
  for (const auto& [name, path] : {std::pair{"by_index", index}, {"by_folder", folder}, {"by_file", model}}) {
    const Workshop::Result result =
        shop.run(shop.tiny_training(name, {{"steps", "1"}, {"lr", "0"}, {"lr-final", "0"}, {"init", path}}));
    CHECK_MESSAGE(result.exit == 0, result.out);
    CHECK(shop.weights(name, "00000001") == read_file(model, size_t{1} << 24));
  }

  const auto opened = [&] { return error_of([&] { SafetensorsFile::open_weights(folder); }); };
  const std::string first = folder + "/model-00001-of-00003.safetensors",
                    second = folder + "/model-00002-of-00003.safetensors", content = read_file(second, 1 << 24);
  shop.fails(shop.tiny_training("part", {{"steps", "1"}, {"init", first}}), 1, "this is one part");
  write_file(second, lfs_pointer);
  CHECK(has(opened(), "model-00002-of-00003.safetensors' is cut off or no safetensors file"));
  CHECK(has(opened(), "a Git LFS pointer"));
  write_file(second, read_file(first, 1 << 24));
  CHECK(has(opened(), "is in two of its files"));
  remove_tree(second);
  CHECK(has(opened(), "expected 3 files beside it, found no 'model-00002-of-00003.safetensors', in which it has '"));
  write_safetensors(second, {}, {});
  CHECK(has(opened(), "and is not: that file is of another model or release"));
  write_file(index, R"({"weight_map":{"a":"../model.safetensors"}})");
  CHECK(has(opened(), "weight_map.a: expected the name of a file beside the index"));
  remove_tree(index);
  CHECK(has(opened(), "found 3 files .safetensors and no index"));
  write_file(second, content);
  write_file(folder + "/model.safetensors", read_file(model, 1 << 24));
  CHECK(opened() == "");
}
