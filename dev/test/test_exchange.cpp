// Weights to and from other programs: Python's safetensors where it is installed, names of the released model, F32,
// BF16, F16.
#include "model.h"
#include "base/safetensors.h"
#include "runtime/run.h"
#include "dev/test/workshop.h"

using namespace gca;
using namespace gca::test;

namespace {

struct ExchangeShop : Workshop {
  std::string tiny(const std::string& out, const std::string& more) const {
    return tiny_training(out, {{"steps", "1"}}) + " " + more;
  }
  // The model that the run has.
  Config config(const std::string& run) const {
    const SavedRun saved = SavedRun::open(path + "/" + run);
    Config config = saved.settings.config;
    config.vocab = saved.tokenizer.vocab_size();
    return config;
  }
  std::string model_of(const std::string& run) const { return path + "/" + run + "/step_00000001/model.safetensors"; }
};

// A python3 with safetensors: PYTHON, or one that is found; "" if there is none.
std::string python() {
  for (const char* name : {static_cast<const char*>(getenv("PYTHON")), "python3", "/usr/bin/python3"})
    if (name && system((std::string(name) + " -c 'import numpy, safetensors.numpy' > /dev/null 2>&1").c_str()) == 0)
      return name;
  return "";
}
bool run_exchange(const std::string& python, const std::string& arguments) {
  return system((python + " dev/test/exchange.py " + arguments).c_str()) == 0;
}

// The file as Python's library sees it: a line "name dtype shape bytes" a tensor, by name, and its bytes.
std::string seen_by_python(const std::string& python, const std::string& file, const std::string& folder) {
  REQUIRE(run_exchange(python, "dump " + file + " " + folder + "/dump"));
  return read_file(folder + "/dump", size_t{1} << 24);
}
// The same from this program's reader.
std::string seen_here(const std::string& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  std::map<std::string, std::string> tensors;
  const std::string bytes = read_file(path, size_t{1} << 24);
  for (const SafetensorsTensor& t : file.tensors()) {
    const int64_t size = t.count * t.dtype.bytes();
    tensors[t.name] = t.name + " " + t.dtype.name() + " " + shape_text(t.shape) + str(" ", size, "\n") +
                      bytes.substr(t.offset_bytes, size);
  }
  std::string all;
  for (const auto& [name, text] : tensors) all += text;
  return all;
}

}  // namespace

TEST_CASE(
    "exchange: a checkpoint's weights have the released model's names; export writes them in bf16 and float, and both "
    "start a run") {
  const ExchangeShop shop;
  REQUIRE(shop.run(shop.tiny("run", "")).exit == 0);
  const SafetensorsFile file = SafetensorsFile::open(shop.model_of("run"));
  const TensorTable table(shop.config("run"), 1, 1);
  REQUIRE(file.tensors().size() == table.tensors.size());
  for (size_t i = 0; i < table.tensors.size(); i++) CHECK(file.tensors()[i].name == table.tensors[i].name);
  for (const char* dtype : {"bf16", "float"}) {
    const std::string out = shop.path + "/" + dtype + ".safetensors",
                      command = "export --checkpoint " + shop.path + "/run --out " + out + " --dtype " + dtype;
    const Workshop::Result result = shop.run(command);
    CHECK_MESSAGE(result.exit == 0, result.out);
    const SafetensorsFile exported = SafetensorsFile::open(out);
    CHECK(exported.metadata().at("format") == "pt");
    REQUIRE(exported.tensors().size() == file.tensors().size());
    for (size_t i = 0; i < file.tensors().size(); i++) {
      const std::string& name = file.tensors()[i].name;
      CHECK(exported.tensors()[i].name == name);
      CHECK(exported.tensors()[i].dtype == (dtype == std::string("bf16") ? Dtype::BF16 : Dtype::F32));
      std::vector<float> want = file.values<float>(name);
      if (dtype == std::string("bf16"))
        for (float& x : want) x = round_bf16(x);
      CHECK(exported.values<float>(name) == want);
    }
    const Workshop::Result again = shop.run(command);
    CHECK(again.exit == 1);
    CHECK(says(again, "is there already"));
    CHECK(shop.run(shop.tiny(std::string("from_") + dtype, "--init " + out)).exit == 0);
  }
}

TEST_CASE(
    "exchange: Python's safetensors opens a checkpoint, every tensor equal; what it writes is read, F32, F16 and "
    "BF16") {
  const std::string python = ::python();
  if (python.empty()) return skip("no python3 with numpy and safetensors (PYTHON=... names one)");
  const ExchangeShop shop;
  REQUIRE(shop.run(shop.tiny("run", "")).exit == 0);
  REQUIRE(shop.run("export --checkpoint " + shop.path + "/run --out " + shop.path + "/bf16.safetensors").exit == 0);
  const std::string model = shop.model_of("run"), out = shop.path + "/python.safetensors";
  CHECK(seen_by_python(python, model, shop.path) == seen_here(model));
  CHECK(seen_by_python(python, shop.path + "/bf16.safetensors", shop.path) ==
        seen_here(shop.path + "/bf16.safetensors"));
  // And back: a run of no learning rate keeps the weights that it starts from.
  for (const char* dtype : {"F32", "F16", "BF16"}) {
    CAPTURE(dtype);
    REQUIRE(run_exchange(python, "write " + model + " " + out + " " + dtype + " head rotary"));
    const Workshop::Result result = shop.run(shop.tiny(dtype, "--lr 0 --lr-final 0 --warmup 0 --init " + out));
    CHECK_MESSAGE(result.exit == 0, result.out);
    CHECK(says(result, "'lm_head.weight' is the embedding again and is left out"));
    CHECK(says(result, "1 tables of rotary embeddings are left out"));
    const SafetensorsFile given = SafetensorsFile::open(out), kept = SafetensorsFile::open(shop.model_of(dtype));
    for (const SafetensorsTensor& t : kept.tensors()) CHECK(kept.values<float>(t.name) == given.values<float>(t.name));
  }
  // bf16 as Python rounds it is bf16 as export rounds it.
  const SafetensorsFile theirs = SafetensorsFile::open(out),
                        ours = SafetensorsFile::open(shop.path + "/bf16.safetensors");
  for (const SafetensorsTensor& t : ours.tensors()) CHECK(theirs.values<float>(t.name) == ours.values<float>(t.name));
}

TEST_CASE(
    "exchange: weights of another model are refused, every missing and surplus name listed; padding rows and tied "
    "heads are not") {
  const ExchangeShop shop;
  REQUIRE(shop.run(shop.tiny("run", "")).exit == 0);
  const SafetensorsFile model = SafetensorsFile::open(shop.model_of("run"));
  std::map<std::string, std::vector<float>> values;
  for (const SafetensorsTensor& t : model.tensors()) values[t.name] = model.values<float>(t.name);
  // The model's file with some tensors changed; a name that it has not is of shape (n).
  const auto started_from = [&](const std::function<void(std::map<std::string, std::vector<float>>&)>& change) {
    std::map<std::string, std::vector<float>> changed = values;
    change(changed);
    std::vector<SafetensorsEntry> entries;
    for (const auto& [name, numbers] : changed) {
      const std::string like = name == "lm_head.weight" ? "model.embed_tokens.weight" : name;
      const SafetensorsTensor* t = model.find(like);
      const int64_t count = std::ssize(numbers);
      entries.push_back(safetensors_entry(
          name, t && t->shape.size() == 2 ? Shape{count / t->shape[1], t->shape[1]} : Shape{count}, numbers.data()));
    }
    const std::string path = shop.path + "/changed.safetensors";
    write_safetensors(path, {}, entries);
    remove_tree(shop.path + "/new");
    const Workshop::Result result = shop.run(shop.tiny("new", "--lr 0 --lr-final 0 --warmup 0 --init " + path));
    if (result.exit != 0) CHECK(has(result.out, "changed.safetensors"));
    return result;
  };
  const std::string embedding = "model.embed_tokens.weight", up = "model.lower_layers.0.mlp.up_proj.weight",
                    norm = "model.norm.weight";
  CHECK(started_from([](auto&) {}).exit == 0);
  const Workshop::Result wrong = started_from([&](auto& v) {
    v.erase(up);
    v.erase(norm);
    v["model.surplus.weight"] = {1};
    v["extra"] = {2};
  });
  CHECK(wrong.exit == 1);
  CHECK_MESSAGE(
      says(wrong, "Missing:\n  " + up + "\n  " + norm + "\n Without a place in it:\n  extra\n  model.surplus.weight"),
      wrong.out);
  const Workshop::Result surplus = started_from([&](auto& v) { v["extra"] = {2}; });
  CHECK(surplus.exit == 1);
  CHECK(says(surplus, "Without a place in it:\n  extra"));

  const Workshop::Result head = started_from([&](auto& v) {
    v["lm_head.weight"] = v[embedding];
    v["model.a.rotary_emb.inv_freq"] = {1, 2};
  });
  CHECK(head.exit == 0);
  CHECK(says(head, "'lm_head.weight' is the embedding again"));
  CHECK(says(head, "tables of rotary embeddings are left out"));
  const Workshop::Result other_head = started_from([&](auto& v) {
    v["lm_head.weight"] = v[embedding];
    v["lm_head.weight"][77] += 1;
  });
  CHECK(other_head.exit == 1);
  CHECK(says(other_head, "Without a place in it:\n  lm_head.weight"));

  // A vocabulary rounded up to a multiple of 64 rows is taken; one of more or of fewer would be another.
  const Config c = shop.config("run");
  const int64_t V = c.vocab, D = c.width;
  CHECK(started_from([&](auto& v) { v[embedding].resize(round_up(V, 64) * D, 5.0f); }).exit == 0);
  CHECK(SafetensorsFile::open(shop.model_of("new")).values<float>(embedding) == values[embedding]);
  for (const int64_t rows : {round_up(V, 64) + 80, V - 1}) {
    const Workshop::Result result = started_from([&](auto& v) { v[embedding].resize(rows * D, 5.0f); });
    CHECK(result.exit == 1);
    CHECK_MESSAGE(
        says(result, str("tensor '", embedding, "': expected the shape [", V, ",", D, "], found [", rows, ",", D, "]")),
        result.out);
  }
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const Workshop::Result result = started_from([&](auto& v) { v[norm][3] = bad; });
    CHECK(result.exit == 1);
    CHECK_MESSAGE(says(result, "tensor 'model.norm.weight': expected finite numbers"), result.out);
  }
  // Sizes that are not the run's.
  const Workshop::Result from_run = shop.run("train --steps 1 --ffn 10 --init " + shop.path + "/run --data '" +
                                             shop.path + "/shards/t_train_*' --out " + shop.path + "/wider");
  CHECK(from_run.exit == 2);
  CHECK_MESSAGE(says(from_run, "--ffn: the weights in '" + shop.path + "/run' were trained with 8, found 10"),
                from_run.out);
}
