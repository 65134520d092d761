// Files and checkpoints: killed or out of space at every write, damaged in every way, deleted with care. This file
// stands in for the system's write, fsync, rename and unlink, so that the n-th of them can fail or end the process.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <atomic>

#include "runtime/checkpoint.h"
#include "dev/test/test.h"

namespace {

std::atomic<int> calls_left{-1};  // the call after that many fails; -1: none does
bool failing_ends_process = false;
std::string* calls = nullptr;  // where set: fsync, rename and deletions note themselves

// True when this call is the one to fail, with errno set.
bool fails_now() {
  if (calls_left < 0 || calls_left-- > 0) return false;
  if (failing_ends_process) _exit(9);
  errno = ENOSPC;
  return true;
}

}  // namespace

extern "C" {
ssize_t write(int fd, const void* data, size_t bytes) { return fails_now() ? -1 : syscall(SYS_write, fd, data, bytes); }
int fsync(int fd) {  // notes the call only: its place is what is tested, and waiting for the disk takes seconds
  if (calls)
    *calls +=
        "fsync " + std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd)).filename().string() + "\n";
  return fails_now() ? -1 : 0;
}
int rename(const char* from, const char* to) noexcept {
  if (calls) *calls += "rename to " + std::filesystem::path(to).filename().string() + "\n";
  return fails_now() ? -1 : static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
int unlinkat(int fd, const char* path, int flags) noexcept {
  if (calls) *calls += std::string("delete ") + path + "\n";
  return fails_now() ? -1 : static_cast<int>(syscall(SYS_unlinkat, fd, path, flags));
}
int rmdir(const char* path) noexcept {
  return fails_now() ? -1 : static_cast<int>(syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
}
}

using namespace gca;
using namespace gca::test;

namespace {

std::string weights_of(int64_t step) { return str("weights of step ", step, " ") + std::string(100000, 'w'); }

void save(const std::string& run, int64_t step) {
  Json state;
  state["step"] = step;
  write_checkpoint(run, step,
                   {{"model.safetensors", [&](const std::string& path) { write_file(path, weights_of(step)); }},
                    {"tokenizer.json", [&](const std::string& path) { File::create(path).write("tokens", 6); }}},
                   state);
}

// The step that a run would go on from; everything in it is as it was saved.
int64_t resumed_step(const std::string& run, bool fallback = false) {
  const Checkpoint checkpoint = open_checkpoint(run, fallback);
  CHECK(read_file(checkpoint.file("model.safetensors"), 1 << 20) == weights_of(checkpoint.step));
  CHECK(read_file(checkpoint.file("tokenizer.json"), 100) == "tokens");
  CHECK(JsonField(checkpoint.state, "state").at("step").integer() == checkpoint.step);
  return checkpoint.step;
}

void flip(const std::string& path, size_t at) {
  std::string content = read_file(path, 1 << 20);
  content[at] = static_cast<char>(content[at] ^ 4);
  write_file(path, content);
}

}  // namespace

TEST_CASE("checkpoint: killed at any write, fsync, rename or deletion, the run goes on from the newest whole one") {
  int64_t before = 1;
  int n = 0;
  for (bool finished = false; !finished; n++) {
    REQUIRE(n < 200);
    const TempFolder run;
    save(run.path, 1);
    const pid_t child = fork();
    if (child == 0) {
      failing_ends_process = true;
      calls_left = n;
      save(run.path, 2);
      keep_checkpoints(run.path, 1, -1);
      _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    REQUIRE((WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 9));
    finished = WEXITSTATUS(status) == 0;
    CAPTURE(n);
    const int64_t step = resumed_step(run.path);
    CHECK(step >= before);  // the later the kill, the newer the step
    before = step;
    save(run.path, 3);
    keep_checkpoints(run.path, 1, -1);
    CHECK(list_folder(run.path) == std::vector<std::string>{"step_00000003"});
  }
  CHECK(before == 2);
  CHECK(n > 20);
}

TEST_CASE("checkpoint: all is on the disk before it is named, so a power cut is no worse than a kill") {
  const TempFolder run;
  std::string made;
  calls = &made;
  save(run.path, 1);
  calls = nullptr;
  const std::string folder = "fsync step_00000001.partial\n";
  const auto written = [&](const std::string& name) {
    return "fsync ." + name + str(".", getpid(), ".partial\nrename to ") + name + "\n" + folder;
  };
  const std::string expected = written("model.safetensors") + "fsync model.safetensors\nfsync tokenizer.json\n" +
                               written("state.json") + "fsync state.json\n" + written("manifest.json") +
                               "rename to step_00000001\nfsync " + std::filesystem::path(run.path).filename().string() +
                               "\n";
  CHECK(made == expected);
}

TEST_CASE("checkpoint: an old one is deleted when the newer one's name is on the disk, its manifest last") {
  const TempFolder run;
  save(run.path, 1);
  save(run.path, 2);
  std::string made;
  calls = &made;
  keep_checkpoints(run.path, 1, -1);
  calls = nullptr;
  CHECK(made == "fsync " + std::filesystem::path(run.path).filename().string() +
                    "\ndelete model.safetensors\ndelete tokenizer.json\ndelete state.json\ndelete manifest.json\n");
  CHECK(list_folder(run.path) == std::vector<std::string>{"step_00000002"});
}

TEST_CASE("checkpoint: a full disk at any write is an Error, and the older one stays") {
  int n = 0;
  for (bool finished = false; !finished; n++) {
    REQUIRE(n < 200);
    const TempFolder run;
    save(run.path, 1);
    calls_left = n;
    const std::string error = error_of([&] { save(run.path, 2); });
    finished = calls_left >= 0;
    calls_left = -1;
    CAPTURE(n);
    if (!finished) {
      CHECK_MESSAGE(has(error, "the checkpoint of step 2 was not saved: "), error);
      CHECK_MESSAGE(has(error, "No space left on device; free some space"), error);
    }
    for (const std::string& name : list_folder(run.path)) CHECK_FALSE(has(name, "partial"));
    resumed_step(run.path);
    resumed_step(checkpoint_folder(run.path, 1));
  }
  CHECK(n > 12);
}

TEST_CASE("checkpoint: every kind of damage is named, and the fallback takes the older one") {
  const TempFolder run;
  save(run.path, 7);
  const std::string folder = checkpoint_folder(run.path, 12), manifest = folder + "/manifest.json";
  const auto replace = [&](const std::string& from, const std::string& to) {
    std::string text = read_file(manifest, 10000);
    REQUIRE(has(text, from));
    write_file(manifest, text.replace(text.find(from), from.size(), to));
  };
  struct Case {
    std::function<void()> damage;
    std::string message;
  };
  const Case cases[] = {
      {[&] { std::filesystem::resize_file(folder + "/model.safetensors", 99999); },
       str("model.safetensors' is cut off: expected ", weights_of(12).size(), " bytes, found 99999")},
      {[&] { std::filesystem::resize_file(folder + "/state.json", 1000); }, "state.json' is too long"},
      {[&] { flip(folder + "/model.safetensors", 70000); }, "model.safetensors' has changed since it was saved"},
      {[&] { flip(folder + "/tokenizer.json", 0); }, "tokenizer.json' has changed since it was saved"},
      {[&] { remove_tree(folder + "/tokenizer.json"); }, "tokenizer.json' is missing"},
      {[&] { remove_tree(manifest); }, "manifest.json' is missing"},
      {[&] { std::filesystem::resize_file(manifest, 50); }, "manifest.json is not valid JSON at byte 50"},
      {[&] { replace("\"version\": 1", "\"version\": 2"); }, "a newer train_gca made it"},
      {[&] { replace("train_gca checkpoint", "something else"); }, "found \"something else\""},
      {[&] { replace("\"step\": 12", "\"step\": 13"); }, "holds step 13"},
      {[&] { replace("\"model.safetensors\"", "\"../step_00000007/model.safetensors\""); },
       "files[0].name: expected the name of a file in the folder"},
      {[&] { replace("\"tokenizer.json\"", "\"model.safetensors\""); },
       "files[1].name: expected the name of a file in the folder, once"},
      {[&] { replace("\"state.json\"", "\"manifest.json\""); }, "files[2].name"},
      {[&] { replace("\"bytes\": 6", "\"bytes\": -6"); }, "files[1].bytes: expected an integer from 0"},
  };
  for (const Case& c : cases) {
    save(run.path, 12);
    CHECK(resumed_step(run.path) == 12);
    c.damage();
    const std::string error = error_of([&] { open_checkpoint(run.path); });
    CHECK_MESSAGE(has(error, c.message), error);
    CHECK_MESSAGE(has(error, "--fallback takes an older one: step 7"), error);
    CHECK(resumed_step(run.path, true) == 7);
    CHECK(open_checkpoint(run.path, true).passed_over.size() == 1);
    remove_tree(folder);
  }
  flip(checkpoint_folder(run.path, 7) + "/model.safetensors", 0);
  CHECK(has(error_of([&] { open_checkpoint(run.path, true); }), "has no whole checkpoint"));
  CHECK(has(error_of([&] { open_checkpoint(checkpoint_folder(run.path, 7)); }), "has changed since it was saved"));
  CHECK(has(error_of([&] { open_checkpoint(run.path + "/no"); }), "No such file"));
  const TempFolder empty;
  make_folder(empty.path + "/step_00000001.partial");
  CHECK(has(error_of([&] { open_checkpoint(empty.path); }), "has no checkpoint"));
}

TEST_CASE("checkpoint: nothing whole is overwritten, and a writer that fails leaves nothing") {
  const TempFolder run;
  save(run.path, 5);
  CHECK(has(error_of([&] { save(run.path, 5); }), "is there and whole"));
  CHECK(resumed_step(run.path) == 5);
  flip(checkpoint_folder(run.path, 5) + "/model.safetensors", 1);
  save(run.path, 5);
  CHECK(resumed_step(run.path) == 5);
  CHECK(list_folder(run.path) == std::vector<std::string>{"step_00000005", "step_00000005.damaged"});
  flip(checkpoint_folder(run.path, 5) + "/model.safetensors", 1);
  save(run.path, 5);
  CHECK(list_folder(run.path).back() == "step_00000005.damaged.2");
  remove_tree(run.path + "/step_00000005.damaged.2");
  // Damaged ones that are newer, as after a fallback, would be the newest still. What may be whole stays.
  for (const int64_t step : {6, 8, 9, 10}) save(run.path, step);
  flip(checkpoint_folder(run.path, 9) + "/model.safetensors", 1);
  std::filesystem::remove(checkpoint_folder(run.path, 10) + "/model.safetensors");
  std::string manifest = read_file(checkpoint_folder(run.path, 8) + "/manifest.json", 1 << 20);
  manifest.replace(manifest.find("\"version\": 1"), 12, "\"version\": 9");
  write_file(checkpoint_folder(run.path, 8) + "/manifest.json", manifest);
  make_folder(run.path + "/step_00000009.damaged");
  CHECK(set_aside_damaged(run.path, 7).size() == 2);
  CHECK(list_folder(run.path) == std::vector<std::string>{"step_00000005", "step_00000005.damaged", "step_00000006",
                                                          "step_00000008", "step_00000009.damaged",
                                                          "step_00000009.damaged.2", "step_00000010.damaged"});
  // Newer ones are not counted among those that are kept.
  keep_checkpoints(run.path, 1, -1, 6);
  CHECK(list_checkpoints(run.path) == std::vector<int64_t>{6, 8});
  save(run.path, 5);
  for (const std::string& name : list_folder(run.path))
    if (name != "step_00000005" && name != "step_00000005.damaged") remove_tree(run.path + "/" + name);
  const auto write = [&](const std::string& name, const std::function<void(const std::string&)>& f) {
    return error_of([&] { write_checkpoint(run.path, 6, {{name, f}}, Json::object()); });
  };
  CHECK(
      has(write("a", [](const std::string&) { throw std::runtime_error("broken"); }), "step 6 was not saved: broken"));
  CHECK(has(write("a", [](const std::string&) {}), "No such file"));
  CHECK(has(write("../a", [](const std::string& path) { write_file(path, "x"); }), "as a file's name"));
  CHECK(list_folder(run.path).size() == 2);
  CHECK(has(error_of([&] { open_checkpoint(run.path).file("optimizer.safetensors"); }),
            "has no file 'optimizer.safetensors'"));
}

TEST_CASE("checkpoint: only what a manifest lists is deleted, inside the run, the best one kept") {
  const TempFolder run, other;
  for (const int64_t step : {1, 2, 3, 4, 5, 99999999, 100000000, 200000000}) save(run.path, step);
  save(other.path, 0);
  write_file(other.path + "/precious", "x");
  const auto at = [&](int64_t step) { return checkpoint_folder(run.path, step); };
  std::filesystem::create_directory_symlink(checkpoint_folder(other.path, 0), at(0));
  write_file(at(3) + "/notes", "mine");
  remove_tree(at(4) + "/tokenizer.json");
  std::filesystem::create_symlink(other.path + "/precious", at(4) + "/tokenizer.json");
  remove_tree(at(5) + "/manifest.json");
  make_folder(at(7));                                                     // a deletion that was cut short
  std::filesystem::resize_file(at(200000000) + "/model.safetensors", 3);  // damaged: does not count
  CHECK(list_checkpoints(run.path) == std::vector<int64_t>{0, 1, 2, 3, 4, 5, 7, 99999999, 100000000, 200000000});
  keep_checkpoints(run.path, 1, 2);
  CHECK(list_checkpoints(run.path) == std::vector<int64_t>{0, 2, 3, 5, 100000000, 200000000});
  CHECK(list_folder(at(3)) == std::vector<std::string>{"notes"});
  CHECK(list_folder(at(5)).size() == 3);
  CHECK(resumed_step(at(2)) == 2);
  CHECK(resumed_step(at(100000000)) == 100000000);
  CHECK(resumed_step(other.path) == 0);
  CHECK(read_file(other.path + "/precious", 10) == "x");
}

TEST_CASE("files: read, written, refused") {
  const TempFolder folder;
  const std::string path = folder.path + "/a";
  write_file(path, "hello");
  CHECK(read_file(path, 5) == "hello");
  CHECK(has(error_of([&] { read_file(path, 4); }), "expected at most 4 bytes, found 5"));
  CHECK(has(error_of([&] { read_file(path + "x", 4); }), "cannot open '" + path + "x': No such file or directory; '" +
                                                             folder.path + "' is there, but in it is no '"));
  CHECK(has(error_of([&] { read_file(folder.path, 4); }), "expected a regular file"));
  CHECK(has(error_of([&] { write_file("/dev/null", "x"); }), "expected a regular file"));
  CHECK(has(error_of([&] { write_file(path + "/b", "x"); }), "Not a directory"));
  char buffer[8];
  CHECK(has(error_of([&] { File::open(path).read(buffer, 4, 2); }), "ends at byte 5: expected 1 bytes more"));
  REQUIRE(mkfifo((folder.path + "/pipe").c_str(), 0600) == 0);
  CHECK(has(error_of([&] { read_file(folder.path + "/pipe", 4); }),
            "expected a regular file"));  // and does not wait for a writer

  std::filesystem::create_symlink("a", folder.path + "/link");
  write_file(folder.path + "/link", "through");
  CHECK(read_file(path, 10) == "through");
  CHECK(std::filesystem::is_symlink(folder.path + "/link"));
  CHECK(has(error_of([&] { File::create(folder.path + "/link"); }), "File exists"));
  {
    AtomicFile file(path);
    file.write("half", 4);
  }
  CHECK(read_file(path, 10) == "through");
  CHECK(list_folder(folder.path) == std::vector<std::string>{"a", "link", "pipe"});

  std::vector<std::string> sorted;
  for (int i = 10; i < 40; i++) write_file(sorted.emplace_back(folder.path + str("/b", i)), "");
  write_file(folder.path + "/[x]", "");
  CHECK(glob_files(folder.path + "/b*") == sorted);  // a folder's own order is another
  CHECK(glob_files(folder.path + "/[x]") == std::vector<std::string>{folder.path + "/[x]"});
  CHECK(
      has(error_of([&] { glob_files(folder.path + "/c*"); }),
          "no file matches '" + folder.path + "/c*': '" + folder.path + "' is there, but in it nothing matches 'c*'"));
  make_folder(folder.path + "/shards");
  CHECK(has(error_of([&] { glob_files(folder.path + "/shrads/x_*"); }),
            ": '" + folder.path + "' is there, but in it is no 'shrads', did you mean shards?"));
  CHECK(has(error_of([&] { File::open(folder.path + "/shards/none/x"); }), "shards' is there, but in it is no 'none'"));
  CHECK(has(error_of([&] { glob_files(folder.path + "/sh*/none/x*"); }), "/sh*' is there, but in it is no 'none'"));
  CHECK(has(error_of([&] { glob_files(folder.path + "/a/x*"); }), "/a' is a file, no folder"));
  CHECK(has(error_of([&] { glob_files("no_such_folder/x*"); }),
            "here, in '" + std::filesystem::current_path().string() + "', is no 'no_such_folder'"));
  std::filesystem::create_symlink("gone", folder.path + "/dead");
  CHECK(
      has(error_of([&] { glob_files(folder.path + "/dead/x*"); }), "/dead' is a link to something that is not there"));
  CHECK(has(error_of([&] { make_folder(path); }), "cannot make the folder"));
}

TEST_CASE("files: what a killed process left under a temporary name is removed, what somebody writes is not") {
  const TempFolder folder;
  const std::string path = folder.path + "/set_1";
  const auto left = [&](const std::string& name) { write_file(folder.path + "/" + name, "left"); };
  left(".set_1.1.partial");        // of the file itself
  left(".set_2.1.partial");        // of another of the same prefix
  left(".other_1.1.partial");      // of another prefix
  left(".set_1.1.partial.notes");  // a user's own
  left("set_1.1.partial");
  left(str(".set_1.", getpid(), ".partial"));  // of a dead process that had our number
  {
    AtomicFile file(path);
    file.write("new", 3);
    CHECK(glob_files(folder.path + "/set*") == std::vector<std::string>{folder.path + "/set_1.1.partial"});
    const auto of_set = [](const std::string& name) { return name.starts_with("set"); };
    remove_leftovers(folder.path, of_set);
    const std::vector<std::string> there = {".other_1.1.partial", str(".set_1.", getpid(), ".partial"),
                                            ".set_1.1.partial.notes", "set_1.1.partial"};
    std::vector<std::string> sorted = there;
    std::sort(sorted.begin(), sorted.end());
    CHECK(list_folder(folder.path) == sorted);
    file.commit();
  }
  CHECK(read_file(path, 10) == "new");
  const auto any = [](const std::string&) { return true; };
  remove_leftovers(folder.path + "/none", any);  // no such folder: nothing to remove
  remove_leftovers(folder.path, any);
  CHECK(list_folder(folder.path) == std::vector<std::string>{".set_1.1.partial.notes", "set_1", "set_1.1.partial"});
  {
    const File held = File::create(folder.path + "/.set_1.2.partial");
    CHECK(held.lock());
    CHECK_FALSE(remove_if_unlocked(held.path()));
    remove_leftovers(folder.path, any);
    CHECK(std::filesystem::exists(held.path()));
  }
  CHECK(remove_if_unlocked(folder.path + "/.set_1.2.partial"));
}

TEST_CASE("files: CRC-32C") {
  CHECK(crc32c("123456789", 9) == 0xe3069283u);
  CHECK(crc32c("", 0) == 0);
  const std::string zeros(32, '\0'), ones(32, '\xff');
  CHECK(crc32c(zeros.data(), 32) == 0x8a9136aau);  // the iSCSI standard's examples
  CHECK(crc32c(ones.data(), 32) == 0x62a8ab43u);
  std::string text;
  for (int i = 0; i < 1000; i++) text += static_cast<char>(i * 7);
  for (size_t cut = 0; cut <= 40; cut++)
    CHECK(crc32c(text.data() + cut, text.size() - cut, crc32c(text.data(), cut)) == crc32c(text.data(), text.size()));
}

TEST_CASE("files: one run a folder") {
  const TempFolder folder;
  {
    const RunLock lock(folder.path);
    const std::string error = error_of([&] { RunLock again(folder.path); });
    CHECK_MESSAGE(has(error, str("is being written by another run, process ", getpid())), error);
  }
  const RunLock lock(folder.path);
  CHECK(has(error_of([&] { RunLock none(folder.path + "/no"); }), "No such file"));
}
