// The command info: tensors, work and memory of a model; what token shards hold.
#include <algorithm>
#include <cstdio>
#include <span>

#include "commands/commands.h"
#include "commands/shared.h"

namespace gca {

// info --data: what shards hold. 1 if an id is outside the vocabulary.
int show_shards(const std::string& pattern, const Tokenizer& tokenizer, int64_t first) {
  const TokenStream stream(pattern, tokenizer);
  if (!stream.notes().empty()) print(stream.notes(), "\n");
  std::vector<int32_t> ids(size_t{1} << 20);
  const auto outside = [&](int32_t id) { return id < 0 || id >= tokenizer.vocab_size(); };
  const Json state = stream.state();
  const JsonField shards = JsonField(state, pattern).at("shards");
  int64_t place = 0, all_documents = 0, all_outside = 0;
  print(left("shard", 40), " ", right("bytes", 14), " ", right("tokens", 14), " ", right("documents", 12), " ",
        right("out of vocabulary", 18), "\n");
  for (size_t s = 0; s < shards.items().size(); s++) {
    const int64_t tokens = shards.at(s).at("tokens").integer();
    int64_t documents = 0, strays = 0;
    for (int64_t end = place + tokens; place < end;) {
      const int64_t count = std::min(end - place, static_cast<int64_t>(ids.size()));
      stream.read(place, count, ids.data(), true);
      documents += std::count(ids.begin(), ids.begin() + count, tokenizer.end_of_text);
      strays += std::count_if(ids.begin(), ids.begin() + count, outside);
      place += count;
    }
    print(left(printable(shards.at(s).at("name").string()), 40), " ", right(shards.at(s).at("bytes").integer(), 14),
          " ", right(tokens, 14), " ", right(documents, 12), " ", right(strays, 18), "\n");
    all_documents += documents;
    all_outside += strays;
  }
  print(shards.items().size(), " shards, ", stream.tokens(), " tokens, ", all_documents,
        " documents (end-of-text tokens), ", all_outside, " ids out of vocabulary\n");
  print("tokenizer ", tokenizer.description(), ", V = ", tokenizer.vocab_size(), ", hash ", hex(tokenizer.hash(), 16),
        "\n");
  ids.resize(std::min(first, stream.tokens()));
  stream.read(0, static_cast<int64_t>(ids.size()), ids.data(), true);
  std::string text;
  for (const int32_t id : ids) {
    if (outside(id)) text += str("<|", static_cast<uint32_t>(id), ", out of vocabulary|>");
    else tokenizer.decode(std::span(&id, 1), text);
  }
  print("the first ", ids.size(), " tokens: ", printable(text), "\n");
  return all_outside ? 1 : 0;
}

// A GPU's model in bf16, as far as its memory goes.
struct PlannedGpu : GpuLayout {
  using act = uint16_t;
  using weight = uint16_t;
  using master = float;
  static constexpr bool weights_are_masters = false;
  void release(void*) {}
};

template <class Device>
void print_model(Device& device, const Config& config, const char* where, int64_t batch, int64_t chunks,
                 Recompute recompute) {
  DRT plan(device, config);
  plan.recompute = recompute;
  plan.plan(batch, chunks * config.chunk);
  print(left("tensor", 60), " ", left("shape", 16), " ", right("parameters", 12), "\n");
  for (const Tensor& t : plan.table.tensors)
    print(left(t.name, 60), " ", left(shape_text(tensor_shape(t)), 16), " ", right(t.size(), 12), "\n");
  print(plan.table.tensors.size(), " tensors, ", plan.table.parameters(), " parameters\n");
  const double forward = forward_flops_per_slot(config);
  print("a slot: ", significant(forward, 4), " floating-point operations forward, ", significant(3 * forward, 4),
        " in training (6N = ", significant(6.0 * static_cast<double>(plan.table.parameters()), 4), ")\n");
  print("memory of training on ", where, ", ", batch, " rows of ", chunks * config.chunk, " slots:\n");
  for (const Arena* arena : {&plan.model_memory(), &plan.activation_memory()})
    for (const Arena::Wish& wish : arena->wishes())
      print("  ", left(wish.name, 40), " ", right(mebibytes(wish.n_bytes), 14), "\n");
  print("  ", left("all", 40), " ",
        right(mebibytes(plan.model_memory().total_bytes() + plan.activation_memory().total_bytes()), 14), "\n");
}

int info_command(const std::vector<std::string>& arguments) {
  std::string model = "drt", data, tokenizer = "bytes", recompute = "none", precision = "float";
  Config config;
  int64_t batch = 1, chunks = 260, first = 64;
  const std::string asked = Flags::peek(arguments, "model");
  config = preset(asked.empty() ? model : asked).config;
  config.vocab = 50265;
  Flags flags("info",
              "A model's tensors, parameters, work and memory, before anything is allocated; or, with --data, what "
              "token shards hold.");
  add_model_flags(flags, model, config);
  flags.add("vocab", config.vocab, 2, 1 << 24, "V, ids");
  flags.add("batch", batch, 1, 1 << 20, "rows at once, for the memory plan");
  flags.add("chunks", chunks, 1, 1 << 20, "C, chunks a row, for the memory plan");
  add_recompute_flag(flags, recompute);
  flags.add_choice("precision", precision, "float|bf16", "for the memory plan: float on the CPU, or bf16 on a GPU");
  flags.add("data", data, "GLOB", "token shards to look into instead; exit 1 if they hold an id out of vocabulary");
  flags.add("tokenizer", tokenizer, "FILE", "of the shards: one of ours, GPT-2's tokenizer.json, or the word bytes");
  flags.add("first", first, 0, 1 << 20, "tokens of the shards to print");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  if (!data.empty()) return show_shards(data, Tokenizer::load(tokenizer), first);
  config.validate();
  if (precision == "bf16") {
    PlannedGpu gpu;
    print_model(gpu, config, "a GPU in bf16", batch, chunks, recompute_named(recompute));
  } else {
    Cpu<float> cpu(1);
    print_model(cpu, config, "the CPU in float", batch, chunks, recompute_named(recompute));
  }
  return 0;
}

}  // namespace gca
