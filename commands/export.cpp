// The command export: the weights of a checkpoint as one file for other programs.
#include <fcntl.h>

#include <bit>
#include <cstdio>
#include <filesystem>

#include "commands/commands.h"
#include "commands/shared.h"

namespace gca {

int export_command(const std::vector<std::string>& arguments) {
  std::string checkpoint, out, dtype = "bf16";
  bool fallback = false;
  Flags flags("export", "The weights of a checkpoint as one safetensors file for other programs.");
  flags.add("checkpoint", checkpoint, "STEP", "a checkpoint's folder, or a RUN: its newest");
  flags.add_switch("fallback", fallback, "take an older checkpoint of the RUN where the newest is damaged");
  flags.add("out", out, "FILE", "the file to write; must not be there yet");
  flags.add_choice("dtype", dtype, "float|bf16", "of the numbers; bf16 rounds to nearest");
  if (wants_help(arguments, flags)) return 0;
  flags.parse(arguments);
  flags.need("checkpoint");
  flags.need("out");
  if (std::error_code none; std::filesystem::exists(out, none))
    throw Error("--out: '" + out + "' is there already: remove it or choose another name");
  const SafetensorsFile file = SafetensorsFile::open(open_checkpoint(checkpoint, fallback).file(SavedRun::model_file));
  std::vector<float> values;
  std::vector<SafetensorsEntry> entries;
  for (const SafetensorsTensor& tensor : file.tensors())
    entries.push_back({tensor.name, dtype == "bf16" ? Dtype::BF16 : Dtype::F32, tensor.shape,
                       [&, bf16 = dtype == "bf16"](void* piece, int64_t first, int64_t count) {
                         if (!bf16) return file.read(tensor, first, count, static_cast<float*>(piece));
                         values.resize(count);
                         file.read(tensor, first, count, values.data());
                         for (size_t i = 0; i < values.size(); i++)
                           static_cast<uint16_t*>(piece)[i] =
                               static_cast<uint16_t>(std::bit_cast<uint32_t>(round_bf16(values[i])) >> 16);
                       }});
  write_safetensors(out, {{"format", "pt"}}, entries);
  print("'", out, "': ", entries.size(), " tensors in ", dtype, "\n");
  return 0;
}

}  // namespace gca
