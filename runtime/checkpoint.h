// Checkpoints of a run: RUN/step_00001000/ holds the files of one step, and manifest.json (sizes, checksums), written
// last. A step is made as RUN/step_00001000.partial/ and renamed when all of it is on the disk, so whatever bears the
// final name was whole, and a process killed at any instant leaves the newest whole one to go on from. Knows files,
// steps and JSON; nothing of models.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/files.h"
#include "base/json.h"

namespace gca {

// A file of a checkpoint: write(path) makes it there.
struct CheckpointFile {
  std::string name;
  std::function<void(const std::string& path)> write;
};

// A checkpoint whose every file has been found as the manifest says.
struct Checkpoint {
  std::string folder;
  int64_t step;
  Json state;                            // what write_checkpoint was given
  std::vector<std::string> files;        // names in the folder
  std::vector<std::string> passed_over;  // errors of newer checkpoints that the fallback passed over, to be shown

  // The path of one of its files; an Error if it has none of that name.
  std::string file(const std::string& name) const;
};

std::string checkpoint_folder(const std::string& run, int64_t step);

// The step that a folder's name says; -1: it is not named as a checkpoint.
int64_t step_of(const std::string& folder);

// In a checkpoint's state: the step of the best validation so far, which keeps its checkpoint, and its loss.
constexpr const char *best_step_field = "best_step", *best_loss_field = "best_val_loss";

// RUN of RUN/best, "" of any other path: of one that leads somewhere as it is written, too.
std::string run_of_best(const std::string& path);

// The steps that have a folder in RUN, damaged ones too, oldest first.
std::vector<int64_t> list_checkpoints(const std::string& run);

// What manifest.json says.
struct Manifest {
  struct Entry {
    std::string name;
    int64_t bytes;
    uint32_t crc;
  };
  static constexpr const char* file_name = "manifest.json";
  static constexpr const char* format_name = "train_gca checkpoint";
  static constexpr int64_t version = 1;

  int64_t step = 0;
  std::vector<Entry> entries;

  // Names stay inside the folder, whatever a manifest says.
  static bool is_good_name(const std::string& name);

  static Manifest read(const std::string& folder);
  // path: for errors.
  static Manifest parse(std::string_view text, const std::string& path);

  void write(const std::string& folder) const;
};

// What of a checkpoint is read before it is taken as whole: every byte; or sizes, and the bytes of its state alone.
enum class Check { bytes, sizes };

// The checkpoint in a STEP folder, its sizes and checksums checked, or an Error that says which file is missing, cut
// off or changed.
Checkpoint read_checkpoint(const std::string& folder, Check check = Check::bytes);

// Whether a folder is a STEP, or a RUN that has one.
bool holds_checkpoint(const std::string& folder);
// Of a folder without one: a file that shows it to be a model of another program, or "".
std::string other_program_file(const std::string& folder);

// path: a STEP folder; a RUN, which means its newest step; or RUN/best: that of the best validation, as the newest step
// remembers it. A damaged newest step is an Error; with fallback, the newest one that is whole is taken, and
// `passed_over` says what is wrong with those passed over.
Checkpoint open_checkpoint(const std::string& path, bool fallback = false, Check check = Check::bytes);

// Saves a step: the files, in order, then state.json. Returns what was written. When this returns, the checkpoint is
// whole and on the disk. Any failure is an Error, leaves no part of it, and the older ones as they were. Nothing whole
// is overwritten: saving a step that is there is an Error; a damaged one of that name (which the fallback passed over)
// is set aside as step_N.damaged, or .damaged.2 ..
Manifest write_checkpoint(const std::string& run, int64_t step, const std::vector<CheckpointFile>& files,
                          const Json& state);

// Sets damaged checkpoints aside that are newer than a step just saved, which the fallback passed over and which would
// be the newest still; a sentence for each. Only what is seen to be damaged: a file that is missing, cut off or
// changed.
std::vector<std::string> set_aside_damaged(const std::string& run, int64_t step);

// Deletes all but the newest `keep` (at least 1) checkpoints up to step `newest` and that of also_keep_step (the best
// one; -1: none). Call it after a save. Deletes only files that a manifest lists, in real folders of RUN, never through
// a link; a damaged checkpoint that is newer than those is neither counted nor touched, and neither is a folder without
// a manifest.
void keep_checkpoints(const std::string& run, int64_t keep, int64_t also_keep_step, int64_t newest = INT64_MAX);

}  // namespace gca
