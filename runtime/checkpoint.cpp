// Checkpoints on disk: written with a manifest, found, verified, deleted. What their tensors mean is in weights.h.
#include "runtime/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <new>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/json.h"

namespace gca {

std::string Checkpoint::file(const std::string& name) const {
  if (std::find(files.begin(), files.end(), name) == files.end())
    throw Error("'" + folder + "' has no file '" + name +
                "': it was made by another program or for another purpose; choose another checkpoint");
  return folder + "/" + name;
}

std::string checkpoint_folder(const std::string& run, int64_t step) { return run + str("/step_", right(step, 8, '0')); }

int64_t step_of(const std::string& folder) {
  const std::string name =
      (std::filesystem::path(folder) / "").parent_path().filename().string();  // with or without a '/' at its end
  int64_t step = -1;
  if (name.starts_with("step_")) std::from_chars(name.data() + 5, name.data() + name.size(), step);
  return step >= 0 && "/" + name == checkpoint_folder("", step) ? step : -1;
}

std::vector<int64_t> list_checkpoints(const std::string& run) {
  std::vector<int64_t> steps;
  for (const std::string& name : list_folder(run)) {
    std::error_code none;
    if (const int64_t step = step_of(name); step >= 0 && std::filesystem::is_directory(run + "/" + name, none))
      steps.push_back(step);
  }
  std::sort(steps.begin(), steps.end());  // by name, a ninth digit would come too early
  return steps;
}

bool Manifest::is_good_name(const std::string& name) { return is_file_name(name) && name != file_name; }

Manifest Manifest::read(const std::string& folder) {
  const std::string path = folder + "/" + file_name;
  std::error_code none;
  if (!std::filesystem::exists(path, none))
    throw Error("'" + path + "' is missing: the folder is no whole checkpoint; choose another");
  return parse(read_file(path, size_t{1} << 20), path);
}

Manifest Manifest::parse(std::string_view text, const std::string& path) {
  const Json json = parse_json(text, path);
  const JsonField root(json, path);
  if (const std::string name = root.at("format").string(); name != format_name)
    throw Error(path + ": expected the format \"" + format_name + "\", found " + Json(name).dump() +
                ": this is no checkpoint of train_gca; choose another");
  if (const int64_t found = root.at("version").integer(1); found > version)
    throw Error(str(path, ": expected version ", version, " or older, found ", found,
                    ": a newer train_gca made it; use that one, or another checkpoint"));
  Manifest manifest{root.at("step").integer(0), {}};
  const JsonField files = root.at("files");
  for (size_t i = 0; i < files.items().size(); i++) {
    const JsonField file = files.at(i);
    const std::string name = file.at("name").string();
    const bool again =
        std::any_of(manifest.entries.begin(), manifest.entries.end(), [&](const Entry& e) { return e.name == name; });
    if (!is_good_name(name) || again)
      throw Error(file.where() + ".name: expected the name of a file in the folder, once, found " + Json(name).dump() +
                  "; choose another checkpoint");
    const int64_t crc = file.at("crc32c").integer(0, UINT32_MAX);
    manifest.entries.push_back({name, file.at("bytes").integer(0), static_cast<uint32_t>(crc)});
  }
  return manifest;
}

void Manifest::write(const std::string& folder) const {
  Json json;
  json["format"] = format_name;
  json["version"] = version;
  json["step"] = step;
  Json& files = json["files"] = Json::array();
  for (const Entry& entry : entries) {
    Json file;
    file["name"] = entry.name;
    file["bytes"] = entry.bytes;
    file["crc32c"] = entry.crc;
    files.push_back(std::move(file));
  }
  write_file(folder + "/" + file_name, json.dump(true));
}

namespace {
// A file of a checkpoint is missing, cut off or changed.
struct Damaged : Error {
  using Error::Error;
};
}  // namespace

Checkpoint read_checkpoint(const std::string& folder, Check check) {
  const Manifest manifest = Manifest::read(folder);
  if (const int64_t step = step_of(folder); step >= 0 && step != manifest.step)
    throw Error(str("'", folder, "' holds step ", manifest.step,
                    ": it was renamed, or its manifest has changed; use another checkpoint"));
  Checkpoint checkpoint{folder, manifest.step, {}, {}, {}};
  for (const Manifest::Entry& entry : manifest.entries) {
    const std::string path = folder + "/" + entry.name;
    std::error_code none;
    if (!std::filesystem::exists(path, none))
      throw Damaged("'" + path + "' is missing: it was removed or not copied; use another checkpoint");
    const File file = File::open(path);
    if (const int64_t bytes = file.size_bytes(); bytes != entry.bytes)
      throw Damaged(str("'", path, "' is ", bytes < entry.bytes ? "cut off" : "too long", ": expected ", entry.bytes,
                        " bytes, found ", bytes, "; use another checkpoint"));
    const bool read = check == Check::bytes || entry.name == "state.json";
    if (const uint32_t crc = read ? crc32c(file) : entry.crc; crc != entry.crc)
      throw Damaged(str("'", path, "' has changed since it was saved: expected CRC-32C ", hex(entry.crc, 8), ", found ",
                        hex(crc, 8), "; check the disk, and use another checkpoint"));
    checkpoint.files.push_back(entry.name);
  }
  const std::string path = checkpoint.file("state.json");
  checkpoint.state = parse_json(read_file(path, JsonLimits().max_bytes), path);
  return checkpoint;
}

bool holds_checkpoint(const std::string& folder) {
  return look_at(folder + "/" + Manifest::file_name).kind == Found::file || !list_checkpoints(folder).empty();
}

std::string other_program_file(const std::string& folder) {
  for (const std::string& name : list_folder(folder))
    if (name == "config.json" || name == "pytorch_model.bin" || name.ends_with(".safetensors") ||
        name.ends_with(".safetensors.index.json"))
      return name;
  return "";
}

std::string run_of_best(const std::string& path) {
  const std::filesystem::path whole =
      (std::filesystem::path(path) / "").parent_path();  // with or without a '/' at its end
  std::error_code none;
  if (whole.filename() != "best" || std::filesystem::exists(std::filesystem::symlink_status(whole, none))) return "";
  return whole.has_parent_path() ? whole.parent_path().string() : ".";
}

namespace {

// The end of a message about a path without a checkpoint.
std::string what_lies_there(const std::string& path) {
  if (const std::string name = other_program_file(path); !name.empty())
    return "; with '" + name +
           "' it is a model of another program: start from its weights (safetensors) with train "
           "--init";
  return "; check the path (a run stopped before its first save has none: start it anew)";
}

enum class Condition { whole, damaged, unknown };  // unknown: cannot be read, or is of a newer program
Condition condition_of(const std::string& folder) {
  std::error_code none;
  if (!std::filesystem::exists(folder + "/" + Manifest::file_name, none)) return Condition::damaged;
  try {
    read_checkpoint(folder);
    return Condition::whole;
  } catch (const Damaged&) {
    return Condition::damaged;
  } catch (const Error&) {
    return Condition::unknown;
  }
}

// Renames a checkpoint to the first of step_N.damaged, step_N.damaged.2, .. 9 that is free, and says to which. An Error
// where none is: a disk that damages a step ten times is not to be filled.
std::string set_aside(const std::string& folder) {
  std::string to = folder + ".damaged";
  std::error_code none;
  for (int number = 2; number <= 9 && std::filesystem::exists(to, none); number++)
    to = str(folder, ".damaged.", number);
  rename_path(folder, to);
  return to;
}

Checkpoint open_best(const std::string& run, bool fallback, Check check) {
  Checkpoint newest = open_checkpoint(run, fallback, Check::sizes);
  const JsonField state(newest.state, newest.folder + "/state.json");
  const int64_t best = state.has(best_step_field) ? state.at(best_step_field).integer(-1) : -1;
  if (best < 0)
    throw Error(str("'", run, "' has no best checkpoint: expected a validation before step ", newest.step,
                    ", found none; train with --val-data, or take '", run, "' for its newest"));
  if (std::error_code none; !std::filesystem::exists(checkpoint_folder(run, best), none))
    throw Error(str("'", checkpoint_folder(run, best), "', which step ", newest.step,
                    " remembers as the best, is missing: it was removed or not copied; take '", run,
                    "' for the newest"));
  Checkpoint checkpoint = read_checkpoint(checkpoint_folder(run, best), check);
  checkpoint.passed_over = std::move(newest.passed_over);
  return checkpoint;
}

}  // namespace

Checkpoint open_checkpoint(const std::string& path, bool fallback, Check check) {
  if (const std::string run = run_of_best(path); !run.empty()) return open_best(run, fallback, check);
  const std::vector<int64_t> steps = list_checkpoints(path);
  if (steps.empty()) {
    if (!holds_checkpoint(path))
      throw Error("'" + path + "' has no checkpoint: expected folders named step_00000000 or the like in it, or a " +
                  Manifest::file_name + what_lies_there(path));
    return read_checkpoint(path, check);
  }
  std::vector<std::string> errors;
  for (size_t i = steps.size(); i-- > 0;) {
    const std::string folder = checkpoint_folder(path, steps[i]);
    try {
      Checkpoint checkpoint = read_checkpoint(folder, check);
      checkpoint.passed_over = std::move(errors);
      return checkpoint;
    } catch (const Error& error) {
      if (!fallback)
        throw Error(error.what() +
                    (i > 0 ? str(" (--fallback takes an older one: step ", steps[i - 1], " or before)") : ""));
      errors.push_back(error.what());
    }
  }
  std::string all = "'" + path + "' has no whole checkpoint; start the run anew, or from a copy";
  for (const std::string& error : errors) all += "\n  " + error;
  throw Error(all);
}

Manifest write_checkpoint(const std::string& run, int64_t step, const std::vector<CheckpointFile>& files,
                          const Json& state) {
  const std::string folder = checkpoint_folder(run, step), partial = folder + ".partial";
  try {
    for (const std::string& name : list_folder(run))  // what killed runs left
      if (name.starts_with("step_") && name.ends_with(".partial")) remove_tree(run + "/" + name);
    std::error_code none;
    if (std::filesystem::exists(folder, none)) {
      if (condition_of(folder) == Condition::whole)
        throw Error("'" + folder + "' is there and whole; remove it first if it should be made anew");
      set_aside(folder);
    }

    make_folder(partial);
    Manifest manifest{step, {}};
    const auto add = [&](const std::string& name, const std::function<void(const std::string&)>& write) {
      GCA_CHECK(Manifest::is_good_name(name), "'", name, "' as a file's name");
      const std::string path = partial + "/" + name;
      write(path);
      const File file = File::open(path);
      file.sync();
      manifest.entries.push_back({name, file.size_bytes(), crc32c(file)});
    };
    for (const CheckpointFile& file : files) add(file.name, file.write);
    add("state.json", [&](const std::string& path) { write_file(path, state.dump(true)); });
    manifest.write(partial);  // durable with its folder, so the names of all the files are
    rename_path(partial, folder);
    sync_folder(run);
    return manifest;
  } catch (const std::exception& error) {
    std::error_code none;
    std::filesystem::remove_all(partial, none);
    const bool no_memory = dynamic_cast<const std::bad_alloc*>(&error);
    throw Error(str("the checkpoint of step ", step,
                    " was not saved: ", no_memory ? "out of memory; fewer --threads need less" : error.what(),
                    " (older checkpoints are as they were)"));
  }
}

std::vector<std::string> set_aside_damaged(const std::string& run, int64_t step) {
  std::vector<std::string> said;
  for (const int64_t newer : list_checkpoints(run)) {
    const std::string folder = checkpoint_folder(run, newer);
    if (newer <= step || condition_of(folder) != Condition::damaged) continue;
    said.push_back("'" + folder + "' is damaged: set aside as '" + set_aside(folder) + "'");
  }
  if (!said.empty()) sync_folder(run);
  return said;
}

void keep_checkpoints(const std::string& run, int64_t keep, int64_t also_keep_step, int64_t newest) {
  GCA_CHECK(keep >= 1, "found ", keep);
  sync_folder(run);  // the newer ones' names are durable before an older one goes
  std::vector<int64_t> steps = list_checkpoints(run);
  std::erase_if(steps, [&](int64_t step) { return step > newest; });
  int64_t kept = 0;
  for (size_t i = steps.size(); i-- > 0;) {
    const std::string folder = checkpoint_folder(run, steps[i]);
    Manifest manifest;
    try {
      manifest = Manifest::read(folder);
    } catch (const Error&) {
      if (kept == keep) ::rmdir(folder.c_str());  // succeeds where nothing is in it: a deletion that was cut short
      continue;
    }
    if (kept < keep) {
      std::error_code none;
      kept += std::all_of(manifest.entries.begin(), manifest.entries.end(), [&](const Manifest::Entry& entry) {
        return std::filesystem::file_size(folder + "/" + entry.name, none) == static_cast<uintmax_t>(entry.bytes);
      });
      continue;
    }
    if (steps[i] == also_keep_step) continue;
    const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) continue;  // a link: what it points to is not ours
    int code = 0;
    manifest.entries.push_back(
        {Manifest::file_name, 0, 0});  // last: a deletion that is cut short is finished the next time
    for (const Manifest::Entry& entry : manifest.entries)
      if (!code && ::unlinkat(fd, entry.name.c_str(), 0) < 0 && errno != ENOENT) code = errno;
    ::close(fd);
    if (code) throw system_error("cannot delete the old checkpoint '" + folder + "'", code);
    ::rmdir(folder.c_str());  // stays if somebody put more into it
  }
}

}  // namespace gca
