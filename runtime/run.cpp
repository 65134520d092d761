// A saved model opened: checkpoint or exported file, tokenizer, settings.
#include "runtime/run.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "base/safetensors.h"
#include "runtime/checkpoint.h"
#include "runtime/settings.h"
#include "tokenizer/tokenizer.h"

namespace gca {
namespace {

// Names in an exported file's metadata, and what the first of them says.
constexpr const char *about_name = "train_gca", *crc_name = "train_gca.crc32c", *format_name = "train_gca model";
constexpr int64_t format_version = 1;

uint32_t crc_of(const std::string& about, const std::string& tokenizer) {
  return crc32c(tokenizer.data(), tokenizer.size(), crc32c(about.data(), about.size()));
}

Checkpoint read_exported(const SafetensorsFile& file) {
  const std::map<std::string, std::string>& metadata = file.metadata();
  const std::string& path = file.path();
  const auto field = [&](const char* name) {
    const auto found = metadata.find(name);
    if (found != metadata.end()) return found->second;
    const std::string folder = parent_folder(path);
    if (std::error_code none; std::filesystem::exists(folder + "/" + Manifest::file_name, none))
      throw Error("'" + path + "' is a part of the checkpoint '" + folder + "': give that folder");
    throw Error("'" + path + "': expected settings and tokenizer in the metadata, found no \"" + name +
                "\": an older train_gca exported it, or another program made it; export the checkpoint anew, or start "
                "a run from these weights with train --init, --tokenizer and the flags of the model");
  };
  const std::string about = field(about_name), what = "'" + path + "' (" + about_name + ")";
  Checkpoint exported{path, 0, parse_json(about, what), {}, {}};
  const JsonField root(exported.state, what);
  if (const std::string name = root.at("format").string(); name != format_name)
    throw Error(str(what, ": expected the format \"", format_name, "\", found ", Json(name).dump(),
                    "; another program made it: export a checkpoint of train_gca"));
  if (const int64_t found = root.at("version").integer(1); found > format_version)
    throw Error(str(what, ": expected version ", format_version, ", found ", found,
                    ": a newer train_gca exported it; use that one, or export the checkpoint with this one"));
  if (const std::string crc = hex(crc_of(about, field(Tokenizer::metadata_name)), 8), found = field(crc_name);
      found != crc)
    throw Error(str("'", path,
                    "': settings or tokenizer in the metadata have changed since they were exported: "
                    "expected CRC-32C ",
                    Json(found).dump(), ", found ", crc, "; export the checkpoint anew"));
  exported.step = root.at("step").integer(0);
  return exported;
}

// Another tokenizer's ids would be rows of nothing, or of something else.
void check_vocabulary(const SafetensorsFile& file, const Tokenizer& tokenizer) {
  const SafetensorsTensor& embedding = file.at("model.embed_tokens.weight");
  const int64_t V = tokenizer.vocab_size(), rows = embedding.shape.empty() ? 0 : embedding.shape[0];
  if (rows != V)
    throw Error(str("'", file.path(), "': its tokenizer (", tokenizer.description(), ") has ", V, " ids: expected as ",
                    "many rows in '", embedding.name, "', found the shape ", shape_text(embedding.shape),
                    "; the two are not of one model: export the checkpoint anew"));
}

}  // namespace

JsonField SavedRun::state() const {
  return {checkpoint.state,
          exported() ? "'" + checkpoint.folder + "' (" + about_name + ")" : checkpoint.folder + "/state.json"};
}

uint32_t SavedRun::weights_crc() const {
  if (exported()) return crc32c(File::open(weights));
  const Manifest manifest = Manifest::read(checkpoint.folder);
  const auto entry = std::find_if(manifest.entries.begin(), manifest.entries.end(),
                                  [](const Manifest::Entry& file) { return file.name == model_file; });
  GCA_CHECK(entry != manifest.entries.end(), "'", checkpoint.folder, "' lists its weights");
  return entry->crc;
}

SavedRun SavedRun::open(const std::string& path, bool fallback, Check check) {
  std::error_code none;
  const bool is_file = std::filesystem::is_regular_file(path, none);
  std::optional<SafetensorsFile> file;
  if (is_file) file = SafetensorsFile::open(path);
  Checkpoint checkpoint = is_file ? read_exported(*file) : open_checkpoint(path, fallback, check);
  for (const std::string& error : checkpoint.passed_over) print_error("passed over: ", error, "\n");
  Tokenizer tokenizer = Tokenizer::load(is_file ? path : checkpoint.file(tokenizer_file));
  if (is_file) check_vocabulary(*file, tokenizer);
  std::string weights = is_file ? path : checkpoint.file(model_file);
  SavedRun saved{std::move(checkpoint), {}, std::move(tokenizer), std::move(weights)};
  train_flags(saved.settings).restore(saved.state().at("settings"));
  try {
    saved.settings.finish(saved.tokenizer.vocab_size());
  } catch (const UsageError& error) {  // not of this command's line
    throw Error(saved.state().where() + ": settings: " + error.what());
  }
  return saved;
}

std::map<std::string, std::string> exported_metadata(const SavedRun& saved) {
  TrainSettings settings = saved.settings;
  for (std::string* path :
       {&settings.data, &settings.val_data, &settings.tokenizer, &settings.init, &settings.task.haystack})
    path->clear();
  Json about;
  about["format"] = format_name;
  about["version"] = format_version;
  about["step"] = saved.checkpoint.step;
  for (const char* name : {best_step_field, best_loss_field})
    if (saved.state().has(name)) about[name] = saved.state().at(name).json();
  about["settings"] = train_flags(settings).values();
  const std::string text = about.dump(), tokenizer = base64(saved.tokenizer.serialize());
  return {{about_name, text}, {Tokenizer::metadata_name, tokenizer}, {crc_name, hex(crc_of(text, tokenizer), 8)}};
}

bool has_settings(const std::string& path) {
  const Found::Kind kind = look_at(path).kind;
  const bool other =
      kind == Found::file || (kind == Found::folder && !holds_checkpoint(path) && !other_program_file(path).empty());
  return !other || SafetensorsFile::open_weights(path).metadata().contains(about_name);
}

}  // namespace gca
