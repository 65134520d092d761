// libFuzzer: any bytes as the state of a checkpoint are refused with an Error, or give settings that say themselves
// again, a model that can be planned, and data that are compared.
#include "dataloader.h"
#include "runtime/models.h"
#include "runtime/run.h"
#include "runtime/weights.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  static const Tokenizer tokenizer = Tokenizer::load("bytes");
  static const TokenStream stream = [] {
    const std::string prefix = str("/tmp/gca_fuzz_", getpid());
    ShardWriter writer(prefix, tokenizer, 100);
    writer.append(std::vector<int32_t>{1, 2, 3});
    ShardWriter::commit({&writer});
    TokenStream made(prefix + "_000000.bin", tokenizer);
    remove_tree(prefix + "_000000.bin");
    return made;
  }();
  static Cpu<float> cpu(1);
  try {
    const Json json = parse_json(std::string_view(reinterpret_cast<const char*>(data), size), "the input");
    const JsonField state(json, "the input");
    TrainSettings settings, again;
    Flags flags = train_flags(settings), copy = train_flags(again);
    flags.restore(state.at("settings"));
    const Json values = flags.values();
    copy.restore(JsonField(values, "the copy"));
    if (copy.values() != values) __builtin_trap();
    settings.config.vocab = tokenizer.vocab_size();
    settings.config.validate();
    if (settings.config.lower + settings.config.upper() + settings.config.encoder <
        20) {  // of more layers only the names take long
      DRT<Cpu<float>> model(cpu, settings.config);
      model.plan(settings.micro(), settings.stage_chunks(0) * settings.config.chunk);
      if (model.model_memory().total_bytes() < 0 || model.activation_memory().total_bytes() < 0) __builtin_trap();
    }
    for (const int64_t step : {int64_t{0}, settings.steps / 2, settings.steps})
      if (const double lr = settings.learning_rate(step); !(lr >= 0 && lr <= 10)) __builtin_trap();
    stream.check_same(state.at("data"));
  } catch (const Error&) {}
  return 0;
}
