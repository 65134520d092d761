// The command info: tensors, work and memory of a model; what token shards hold. What a run is: info_saved.cpp.
#include <algorithm>
#include <span>

#include "base/machine.h"
#include "base/text.h"
#include "commands/commands.h"
#include "commands/shared.h"
#include "dataloader.h"
#include "runtime/models.h"
#include "runtime/settings.h"
#include "runtime/weights.h"

namespace gca {
namespace {

// ---- info --data --------------------------------------------------------------------------------------------------
struct Counts {
  int64_t documents = 0, strays = 0;  // end-of-text tokens; ids outside the vocabulary
};

bool is_stray(int32_t id, const Tokenizer& tokenizer) { return id < 0 || id >= tokenizer.vocab_size(); }

// Of the tokens first .. first + tokens - 1.
Counts count_ids(const TokenStream& stream, const Tokenizer& tokenizer, int64_t first, int64_t tokens) {
  std::vector<int32_t> ids(std::min(tokens, int64_t{1} << 20));
  Counts counts;
  for (int64_t at = first; at < first + tokens;) {
    const int64_t count = std::min(first + tokens - at, std::ssize(ids));
    stream.read(at, count, ids.data(), true);
    for (int64_t i = 0; i < count; i++) {
      counts.documents += ids[i] == tokenizer.end_of_text;
      counts.strays += is_stray(ids[i], tokenizer);
    }
    at += count;
  }
  return counts;
}

void print_first_tokens(const TokenStream& stream, const Tokenizer& tokenizer, int64_t count) {
  count = std::min(count, stream.tokens());
  std::vector<int32_t> ids(std::min(count + 3, stream.tokens()));  // with those that may end the last one's character
  stream.read(0, std::ssize(ids), ids.data(), true);
  std::string text;
  size_t end = 0;
  for (int64_t i = 0; i < std::ssize(ids); i++) {
    if (is_stray(ids[i], tokenizer)) text += str("<|", static_cast<uint32_t>(ids[i]), ", out of vocabulary|>");
    else tokenizer.decode(std::span(&ids[i], 1), text);
    if (i + 1 == count) end = text.size();
  }
  print("the first ", count, " tokens: ", printable(text.substr(0, before_parted_character(text, end))), "\n");
}

// 1 if an id is outside the vocabulary.
int show_shards(const std::string& pattern, const Tokenizer& tokenizer, int64_t first) {
  const TokenStream stream(pattern, tokenizer);
  if (!stream.notes().empty()) print(stream.notes(), "\n");
  const Json state = stream.state();
  const JsonField shards = JsonField(state, pattern).at("shards");
  int64_t at = 0;
  Counts all;
  print(left("shard", 40), " ", right("bytes", 14), " ", right("tokens", 14), " ", right("documents", 12), " ",
        right("out of vocabulary", 18), "\n");
  for (size_t s = 0; s < shards.items().size(); s++) {
    const JsonField shard = shards.at(s);
    const int64_t tokens = shard.at("tokens").integer();
    const Counts counts = count_ids(stream, tokenizer, at, tokens);
    print(padded(printable(shard.at("name").string()), 40), " ", right(shard.at("bytes").integer(), 14), " ",
          right(tokens, 14), " ", right(counts.documents, 12), " ", right(counts.strays, 18), "\n");
    at += tokens;
    all.documents += counts.documents;
    all.strays += counts.strays;
  }
  print(shards.items().size(), " shards, ", stream.tokens(), " tokens, ", all.documents,
        " documents (end-of-text tokens), ", all.strays, " ids out of vocabulary\n");
  print("tokenizer ", tokenizer.description(), ", V = ", tokenizer.vocab_size(), ", hash ", hex(tokenizer.hash(), 16),
        "\n");
  print_first_tokens(stream, tokenizer, first);
  return all.strays ? 1 : 0;
}

// ---- info of a model ----------------------------------------------------------------------------------------------
// A GPU's model in bf16, as far as its memory goes.
struct PlannedGpu : GpuLayout {
  using act = uint16_t;
  using weight = uint16_t;
  using master = float;
  static constexpr bool weights_are_masters = false;
  void release(void*) {}
};

void print_tensors(const TensorTable& table, const Config& config) {
  print(left("tensor", 60), " ", left("shape", 16), " ", right("parameters", 12), "\n");
  for (const Tensor& t : table.tensors)
    print(left(t.name, 60), " ", left(shape_text(tensor_shape(t)), 16), " ", right(t.size(), 12), "\n");
  print(table.tensors.size(), " tensors, ", table.parameters(), " parameters\n");
  const double forward = forward_flops_per_slot(config, config.reach);
  print("a slot: ", significant(forward, 4), " floating-point operations forward, ", significant(3 * forward, 4),
        " in training (6N = ", significant(6.0 * static_cast<double>(table.parameters()), 4), ")\n");
}

void print_memory(const Arena& model, const Arena& activations) {
  for (const Arena* arena : {&model, &activations})
    for (const Arena::Wish& wish : arena->wishes())
      print("  ", left(wish.name, 40), " ", right(mebibytes(wish.n_bytes), 14), "\n");
  print("  ", left("all", 40), " ", right(mebibytes(model.total_bytes() + activations.total_bytes()), 14), "\n");
}

// where: the backend in words; gpus: that train together, of which one is planned for.
template <class Device>
void print_model(Device& device, const char* where, const Config& config, int64_t B, int64_t T, Recompute recompute,
                 int64_t gpus) {
  DRT model(device, config, Use::training, {0, static_cast<int>(gpus)});
  model.recompute = recompute;
  model.plan(B, T);
  print_tensors(model.table, config);
  print("memory of training on ", where, gpus > 1 ? str(", one of ", gpus, " together") : "", ", ", B, " rows of ", T,
        " slots:\n");
  print_memory(model.model_memory(), model.activation_memory());
}

void print_machine() {
  const Machine m = machine();
  print("this machine: ", m.processors, " processors (", printable(m.processors_why), "), ", mebibytes(m.free_bytes),
        " of memory free (", printable(m.memory_why), ")\n");
}

}  // namespace

int info_command(const std::vector<std::string>& arguments) {
  std::string model = "drt", data, tokenizer = "bytes", recompute = "none", precision = "float";
  int64_t batch = 1, chunks = 260, first = 64, gpus = 1;
  const std::string asked = Flags::peek(arguments, "model");
  Config config = preset(asked.empty() ? model : asked).config;
  config.vocab = 50265;
  Flags flags("info",
              "What a RUN is, one of its checkpoints or an exported file: settings, steps, best validation, files. Or, "
              "without it, a model's tensors, parameters, work and memory, before anything is allocated; or, with "
              "--data, what token shards hold. After a model, what of this machine may be used.");
  std::vector<std::string> saved;
  flags.add_rest(saved, "[RUN|RUN/best|STEP|FILE]", false);
  add_model_flags(flags, model, config);
  flags.add("vocab", config.vocab, 2, 1 << 24, "V, ids");
  flags.add("batch", batch, 1, 1 << 20, "rows at once, for the memory plan");
  flags.add("chunks", chunks, 1, 1 << 20, "C, chunks a row, for the memory plan");
  flags.add("gpus", gpus, 1, 4096,
            "that train together: the memory plan is of each, --batch the rows that it takes at once");
  add_recompute_flag(flags, recompute);
  flags.add_choice("precision", precision, "float|bf16", "for the memory plan: float on the CPU, or bf16 on a GPU");
  flags.add_patterns("data", data, "GLOB...",
                     "token shards to look into instead; exit 1 if they hold an id out of vocabulary");
  flags.add("tokenizer", tokenizer, "FILE", Tokenizer::accepted);
  flags.add("first", first, 0, 1 << 20, "tokens of the shards to print");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  if (!saved.empty()) {
    if (saved.size() > 1)
      throw UsageError("info: expected one RUN, found '" + saved[1] + "' too; ask for one at a time");
    if (const std::string given = flags.all_given(); !given.empty())
      throw UsageError("info '" + saved[0] + "' takes no flags, found " + given + "; leave them out");
    return show_saved(saved[0]);
  }
  if (!data.empty()) return show_shards(data, Tokenizer::load(tokenizer), first);
  config.validate();
  if (precision == "bf16") {
    PlannedGpu gpu;
    print_model(gpu, "a GPU in bf16", config, batch, chunks * config.chunk, recompute_named(recompute), gpus);
  } else {
    Cpu<float> cpu(1);
    print_model(cpu, "the CPU in float", config, batch, chunks * config.chunk, recompute_named(recompute), gpus);
  }
  print_machine();
  return 0;
}

}  // namespace gca
