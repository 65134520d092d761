// What a run is, one of its checkpoints, or an exported file; part of the command info.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <string>
#include <vector>

#include "base/files.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "base/text.h"
#include "commands/commands.h"
#include "runtime/log.h"
#include "runtime/run.h"

namespace gca {
namespace {

void line(const char* name, const std::string& value) { print(left(name, 12), " ", value, "\n"); }

// "2026-11-27 10:04:38", in the time zone of the machine.
std::string when_written(const std::string& path) {
  struct stat found {};
  if (::stat(path.c_str(), &found) < 0) throw system_error("cannot look at '" + path + "'", errno);
  struct tm local {};
  localtime_r(&found.st_mtime, &local);
  char text[32];
  strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &local);
  return text;
}

std::string size_of(int64_t n_bytes) {
  return right(n_bytes < 1 << 20 ? str(n_bytes, " bytes") : mebibytes(n_bytes), 14);
}

// The last step, and the loss, that log.jsonl has; "" where there is none.
std::string last_logged(const std::string& path) {
  const File file = File::open(path);
  const int64_t size = file.size_bytes(), count = std::min<int64_t>(size, 1 << 16);
  std::string tail(static_cast<size_t>(count), '\0');
  file.read(tail.data(), tail.size(), size - count);
  for (size_t end = tail.rfind('\n'); end != tail.npos && end > 0;) {
    const size_t before = tail.rfind('\n', end - 1), begin = before == tail.npos ? 0 : before + 1;
    try {
      const Json json = parse_json(std::string_view(tail).substr(begin, end - begin), path);
      if (const JsonField step(json, path); step.has("loss"))
        return str("step ", step.at("step").integer(), ", loss ", fixed(step.at("loss").number(), 4));
    } catch (const Error&) {  // a line that was cut off, or a loss that is not finite
    }
    end = before;
  }
  return "";
}

struct Row {
  std::string name;
  int64_t n_bytes;
};

std::vector<Row> files_of(const std::string& folder) {
  std::vector<Row> rows = {{Manifest::file_name, File::open(folder + "/" + Manifest::file_name).size_bytes()}};
  for (const Manifest::Entry& entry : Manifest::read(folder).entries) rows.push_back({entry.name, entry.bytes});
  return rows;
}

// A line of each checkpoint of a run, damaged ones too, and of its log. How many are damaged.
int list_run(const std::string& run, const std::string& opened, int64_t best) {
  int damaged = 0;
  const std::vector<int64_t> steps = list_checkpoints(run);
  for (const int64_t step : steps) {
    const std::string folder = checkpoint_folder(run, step), name = std::filesystem::path(folder).filename().string();
    try {
      read_checkpoint(folder, Check::sizes);
      int64_t all = 0;
      for (const Row& file : files_of(folder)) all += file.n_bytes;
      print("  ", left(name, 28), " ", size_of(all), "   saved ", when_written(folder + "/" + Manifest::file_name),
            step == steps.back() ? ", newest" : "", step == best ? ", best" : "", "\n");
    } catch (const Error& error) {
      damaged++;
      print("  ", left(name, 28), " damaged: ", error.what(), "\n");
      continue;
    }
    if (folder != opened) continue;
    for (const Row& file : files_of(folder)) print("    ", left(file.name, 26), " ", size_of(file.n_bytes), "\n");
  }
  return damaged;
}

void show_progress(const SavedRun& saved) {
  const TrainSettings& s = saved.settings;
  const int64_t step = saved.checkpoint.step;
  line("steps", str(step, " of ", s.steps,
                    s.curriculum.empty() ? str(", ", step * s.batch * s.chunks * (s.config.chunk - 1), " tokens")
                                         : std::string(),
                    saved.state().has("skipped") && saved.state().at("skipped").integer() > 0
                        ? str(", ", saved.state().at("skipped").integer(), " of them skipped")
                        : ""));
  const int64_t best = saved.state().has(best_step_field) ? saved.state().at(best_step_field).integer(-1) : -1;
  if (best < 0) return line("best", "no validation");
  const double loss = saved.state().at(best_loss_field).number();
  line("best", str("step ", best, ", validation loss ", fixed(loss, 4), ", perplexity ", fixed(std::exp(loss), 2)));
}

void show_settings(const SavedRun& saved) {
  const Config& config = saved.settings.config;
  RunLog(saved.settings, false).model(TensorTable(config, 1, 1).parameters(), saved.tokenizer);
  TrainSettings settings;
  Flags flags = train_flags(settings);
  flags.restore(saved.state().at("settings"));
  if (settings.tokens > 0) settings.steps = 0;  // which follows
  line("settings", printable(flags.line()) + "; others as by default");
  for (const char* name : {"device", "build"})
    if (saved.state().has(name)) line(name, printable(saved.state().at(name).string()));
}

}  // namespace

int show_saved(const std::string& path) {
  std::error_code none;
  const std::string log = path + "/log.jsonl";
  const bool has_log = std::filesystem::exists(log, none);
  if (has_log && list_checkpoints(path).empty()) {
    line("run", printable(path) + ", nothing saved yet");
    line("log", last_logged(log));
    return 0;
  }
  const SavedRun saved = SavedRun::open(path, true, Check::sizes);
  const std::string &found = saved.checkpoint.folder, run = parent_folder(found);
  const bool of_run = std::filesystem::equivalent(run, path, none);  // RUN/best and STEP are of one checkpoint
  if (saved.exported()) {
    line("file", printable(path) + ", exported");
    line("written", when_written(path));
  } else {
    line(of_run ? "run" : "checkpoint", printable(of_run ? path : found));
    line("saved", when_written(found + "/" + Manifest::file_name));
  }
  show_progress(saved);
  if (has_log) line("log", last_logged(log));
  show_settings(saved);
  print("files\n");
  if (saved.exported()) {
    const SafetensorsFile file = SafetensorsFile::open(path);
    print("  ", left(std::filesystem::path(path).filename().string(), 28), " ", size_of(File::open(path).size_bytes()),
          "   ", file.tensors().size(), " tensors in ", file.tensors()[0].dtype.name(), "\n");
    return 0;
  }
  if (of_run) {
    const int64_t best = saved.state().at(best_step_field).integer(-1);
    const int damaged = list_run(path, found, best);
    if (has_log) print("  ", left("log.jsonl", 28), " ", size_of(File::open(log).size_bytes()), "\n");
    return damaged ? 1 : 0;
  }
  for (const Row& file : files_of(found)) print("  ", left(file.name, 28), " ", size_of(file.n_bytes), "\n");
  return 0;
}

}  // namespace gca
