// The command export: a checkpoint as one file.
#include <bit>
#include <filesystem>
#include <map>
#include <string>
#include <system_error>

#include "base/safetensors.h"
#include "commands/commands.h"
#include "commands/shared.h"
#include "runtime/run.h"

namespace gca {
namespace {

// The file's tensors, with numbers in that type; the file must outlive the writing.
std::vector<SafetensorsEntry> entries_of(const SafetensorsFile& file, bool bf16) {
  std::vector<SafetensorsEntry> entries;
  for (const SafetensorsTensor& tensor : file.tensors())
    entries.push_back({tensor.name, bf16 ? Dtype::BF16 : Dtype::F32, tensor.shape,
                       [&file, &tensor, bf16](void* piece, int64_t first, int64_t count) {
                         if (!bf16) return file.read(tensor, first, count, static_cast<float*>(piece));
                         std::vector<float> values(count);
                         file.read(tensor, first, count, values.data());
                         for (size_t i = 0; i < values.size(); i++)
                           static_cast<uint16_t*>(piece)[i] =
                               static_cast<uint16_t>(std::bit_cast<uint32_t>(round_bf16(values[i])) >> 16);
                       }});
  return entries;
}

}  // namespace

int export_command(const std::vector<std::string>& arguments) {
  std::string checkpoint, out, dtype = "bf16";
  bool fallback = false;
  Flags flags("export",
              "A checkpoint as one safetensors file, for other programs and this one: weights, settings, tokenizer.");
  flags.add("checkpoint", checkpoint, "STEP",
            "a RUN: its newest checkpoint, RUN/best: that of its best validation, a checkpoint's folder, or an "
            "exported file");
  flags.add_switch("fallback", fallback, "take an older checkpoint of the RUN where the newest is damaged");
  flags.add("out", out, "FILE", "the file to write; must not be there yet");
  flags.add_choice("dtype", dtype, "float|bf16", "of the numbers; bf16 rounds to nearest");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("out");
  if (std::error_code none; std::filesystem::exists(out, none))
    throw Error("--out: '" + out + "' is there already: remove it or choose another name");
  const SavedRun saved = SavedRun::open(checkpoint, fallback);
  const SafetensorsFile file = SafetensorsFile::open(saved.weights);
  const std::vector<SafetensorsEntry> entries = entries_of(file, dtype == "bf16");
  std::map<std::string, std::string> metadata = exported_metadata(saved);
  metadata["format"] = "pt";
  write_safetensors(out, metadata, entries);
  print("'", out, "': ", entries.size(), " tensors in ", dtype, ", with settings and tokenizer of step ",
        saved.checkpoint.step, "\n");
  return 0;
}

}  // namespace gca
