// Files: errors that carry the path and a hint, whole reads and writes, files that appear whole or not at all, CRC-32C,
// folders, patterns, and the lock of a run. Everything on disk is little-endian.
#pragma once
#include <bit>
#include <cerrno>
#include <cstdint>
#include <compare>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common.h"

namespace gca {

static_assert(std::endian::native == std::endian::little, "files are little-endian and are read straight into memory");

// The Error for a system call that has just failed. doing: "cannot open 'data/x.bin'". code: errno.
Error system_error(const std::string& doing, int code);

// Hands on what was printed; an Error where standard output took not all of it, now or before. Called where a command
// ends, and where it would go on for long.
void flush_output();

// Where standard input, output or errors are closed, a file that is opened would take their place, and get what is
// printed: keeps the places, so that reading and writing there fails. Before any file is opened.
void keep_standard_places();

// call() until no signal interrupts it.
template <class Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// The folder that holds path.
std::string parent_folder(const std::string& path);

// Whether a name that a file tells is one of a file in a folder, and leads nowhere else.
bool is_file_name(const std::string& name);

// Which file it is, whatever names and links lead to it.
struct FileId {
  uint64_t device = 0, number = 0;
  auto operator<=>(const FileId&) const = default;
};

// What a path leads to, links followed. An Error where that cannot be told; a link to nothing, or to itself, is none.
struct Found {
  enum Kind { none, file, folder, other } kind;
  FileId id;
  int64_t bytes;
};
Found look_at(const std::string& path);

// How many files one holder may keep open: a quarter of what the process may.
size_t files_to_keep_open();

// An open regular file; closed when it goes. Never a pipe, a device or a folder.
class File {
 public:
  // An existing file, to be read. One that is not there: an Error that says what of the path is.
  static File open(const std::string& path);
  // A file that is not there yet, to be written; a link of that name is not followed.
  static File create(const std::string& path);

  File(File&& other) noexcept : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}
  File& operator=(File&& other) noexcept;
  ~File();

  const std::string& path() const { return path_; }
  int64_t size_bytes() const;
  FileId id() const;

  // Fills out with the bytes from offset_bytes on, all of them or an Error. Any number of threads at once.
  void read(void* out, size_t bytes, int64_t offset_bytes) const;

  // The first bytes, at most so many.
  std::string beginning(size_t bytes) const;

  // Appends all of the bytes or throws an Error (a full disk).
  void write(const void* data, size_t bytes);

  // Marks the file as being written, until it is closed, where the file system has locks. False: somebody took it for
  // a leftover between create() and this, and removed it.
  bool lock() const;

  // Returns when the content is on the disk; where the file system has no such thing, with a warning.
  void sync() const;

 private:
  File(const std::string& path, int flags, const char* doing);
  std::string path_;
  int fd_ = -1;
};

// The whole content of a file that has at most max_bytes.
std::string read_file(const std::string& path, size_t max_bytes);

// Returns when the names in the folder (files made, renamed, removed) are on the disk; where the file system refuses
// that, with a warning.
void sync_folder(const std::string& path);

void rename_path(const std::string& from, const std::string& to);

// A file that appears under its name only when it is whole and on the disk: written beside it as .NAME.PROCESS.partial,
// which no pattern of names matches, then renamed. Without commit() nothing is left, and a file that had the name stays
// as it was; what a killed process left of the same file is removed.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes) { file_->write(data, bytes); }
  // All is written, and on the disk: the file is closed, and only waits for its name. Nothing marks it as being written
  // any more.
  void close();
  // The file takes its name; durable when this returns.
  void commit();

 private:
  std::string path_;
  std::optional<File> file_;
  std::string temporary_;
  bool committed_ = false;
};

// Removes a file that no living process has lock()ed; whether it did. Where a file system has no locks nobody can tell,
// and it stays.
bool remove_if_unlocked(const std::string& path);
// Removes the temporary files in the folder which nobody is writing any more, of the names (without folder) that are
// `ours`. A folder that cannot be listed keeps them.
void remove_leftovers(const std::string& folder, const std::function<bool(const std::string& name)>& ours);

// path gets this content, whole and durable, or an Error is thrown and it stays as it was.
void write_file(const std::string& path, std::string_view content);

// An Error where append_line could not open that file, or it holds something else than lines of JSON. Makes it, empty,
// if it is not there.
void check_can_append(const std::string& path);
// An Error where no file of that name could be made, or the one that is there has no `mark` in its first 64 KiB: it is
// no `what`, and would be lost. Before long work is done in vain.
void check_can_replace(const std::string& path, std::string_view mark, const std::string& what);

// Appends a line to a file, which is made if it is not there; all of the line or an Error and none. Not durable.
void append_line(const std::string& path, const std::string& line);

// ---- checksums ----------------------------------------------------------------------------------------------------
// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78) of bytes that follow bytes of the given CRC; 0 begins.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// CRC-32C of a whole file, read in pieces.
uint32_t crc32c(const File& file);

// ---- folders ------------------------------------------------------------------------------------------------------
// Makes the folder and those above it; nothing to do if it is there.
void make_folder(const std::string& path);

// The names in a folder, sorted by their bytes, without "." and "..".
std::vector<std::string> list_folder(const std::string& path);

// Removes a folder and all in it, or a file; links are removed, not followed. Nothing to do if it is not there.
void remove_tree(const std::string& path);

// The paths that shell patterns (* ? [...]) match, one pattern a line: of each sorted by their bytes; a path that
// exists as it is written is itself; each file once. A pattern without any is an Error that says what of the path is
// there.
std::vector<std::string> glob_files(const std::string& patterns);

// ---- the lock of a run --------------------------------------------------------------------------------------------
// Held while a run writes its folder: a second one gets an Error that names the first one's process. Goes with the
// process, however it ends; the file FOLDER/lock stays and means nothing by itself. Where the file system has no locks,
// a warning.
class RunLock {
 public:
  explicit RunLock(const std::string& folder);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace gca
