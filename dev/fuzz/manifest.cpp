// libFuzzer: any bytes as a manifest are refused with an Error, or name files inside the folder, each once; the JSON is
// written as it was read.
#include <set>

#include "runtime/checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace gca;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const Json json = parse_json(text, "the input");
    for (const bool lines : {false, true})
      if (parse_json(json.dump(lines), "its copy") != json) __builtin_trap();
    const Manifest manifest = Manifest::parse(text, "the input");
    std::set<std::string> names;
    for (const Manifest::Entry& entry : manifest.entries)
      if (entry.name.find('/') != std::string::npos || entry.name == ".." || entry.name == "." || entry.name.empty() ||
          entry.bytes < 0 || !names.insert(entry.name).second)
        __builtin_trap();
    if (manifest.step < 0) __builtin_trap();
  } catch (const Error&) {}
  return 0;
}
