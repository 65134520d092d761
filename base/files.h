// Files: errors that carry the path and a hint, whole reads and writes, files that appear whole or not at all, CRC-32C,
// folders, patterns, and the lock of a run. Everything on disk is little-endian.
#pragma once
#include <fcntl.h>
#include <glob.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common.h"

namespace gca {

static_assert(std::endian::native == std::endian::little, "files are little-endian and are read straight into memory");

// The Error for a system call that has just failed. doing: "cannot open 'data/x.bin'". code: errno.
inline Error system_error(const std::string& doing, int code) {
  const char* hint = code == ENOENT                     ? "check the path"
                     : code == EACCES || code == EPERM  ? "check the permissions, or choose another place"
                     : code == ENOSPC || code == EDQUOT ? "free some space, or choose another disk"
                     : code == EFBIG ? "raise the limit on a file's size (ulimit -f), or choose another disk"
                     : code == EROFS ? "choose a place that can be written"
                     : code == EMFILE || code == ENFILE    ? "raise the limit on open files (ulimit -n)"
                     : code == EIO                         ? "check the disk"
                     : code == ELOOP                       ? "a link is not followed here: give the file itself"
                     : code == ENOTDIR || code == EISDIR   ? "check which part of the path is a file and which a folder"
                     : code == EEXIST || code == ENOTEMPTY ? "remove or rename what is there"
                                                           : "check the path and the disk";
  return Error(doing + ": " + strerror(code) + "; " + hint);
}

// call() until no signal interrupts it.
template <class Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// The folder that holds path.
inline std::string parent_folder(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

// An open regular file; closed when it goes. Never a pipe, a device or a folder.
class File {
 public:
  // An existing file, to be read.
  static File open(const std::string& path) {
    return File(path, O_RDONLY | O_NONBLOCK, "cannot open");
  }  // NONBLOCK: a pipe must not hang
  // A file that is not there yet, to be written; a link of that name is not followed.
  static File create(const std::string& path) { return File(path, O_WRONLY | O_CREAT | O_EXCL, "cannot create"); }

  File(File&& other) noexcept : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}
  File& operator=(File&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }

  const std::string& path() const { return path_; }
  int64_t size_bytes() const { return static_cast<int64_t>(status().st_size); }

  // Fills out with the bytes from offset_bytes on, all of them or an Error. Any number of threads at once.
  void read(void* out, size_t bytes, int64_t offset_bytes) const {
    for (size_t done = 0; done < bytes;) {
      const off_t at = static_cast<off_t>(offset_bytes) + static_cast<off_t>(done);
      const ssize_t n = uninterrupted([&] { return ::pread(fd_, static_cast<char*>(out) + done, bytes - done, at); });
      if (n < 0) throw system_error(str("cannot read '", path_, "' at byte ", at), errno);
      if (n == 0)
        throw Error(str("'", path_, "' ends at byte ", at, ": expected ", bytes - done,
                        " bytes more; it has been cut off: make it anew or fetch it again"));
      done += n;
    }
  }

  // Appends all of the bytes or throws an Error (a full disk).
  void write(const void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
      const ssize_t n =
          uninterrupted([&] { return ::write(fd_, static_cast<const char*>(data) + done, bytes - done); });
      if (n < 0) throw system_error("cannot write '" + path_ + "'", errno);
      done += n;
    }
  }

  // Returns when the content is on the disk.
  void sync() const {
    if (uninterrupted([&] { return ::fsync(fd_); }) < 0)
      throw system_error("cannot write '" + path_ + "' through to the disk", errno);
  }

 private:
  File(const std::string& path, int flags, const char* doing) : path_(path) {
    fd_ = uninterrupted([&] { return ::open(path.c_str(), flags | O_CLOEXEC, 0666); });
    if (fd_ < 0) throw system_error(str(doing, " '", path, "'"), errno);
    if (!S_ISREG(status().st_mode)) {
      ::close(fd_);
      throw Error("'" + path + "' is a folder, a pipe or a device: expected a regular file; check the path");
    }
  }
  struct stat status() const {
    struct stat result;
    if (::fstat(fd_, &result) < 0) throw system_error("cannot look at '" + path_ + "'", errno);
    return result;
  }

  std::string path_;
  int fd_ = -1;
};

// The whole content of a file that has at most max_bytes.
inline std::string read_file(const std::string& path, size_t max_bytes) {
  const File file = File::open(path);
  const size_t bytes = file.size_bytes();
  if (bytes > max_bytes)
    throw Error(
        str("'", path, "': expected at most ", max_bytes, " bytes, found ", bytes, ": is this the right file?"));
  std::string content(bytes, '\0');
  file.read(content.data(), bytes, 0);
  return content;
}

// Returns when the names in the folder (files made, renamed, removed) are on the disk.
inline void sync_folder(const std::string& path) {
  const int fd = uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (fd < 0) throw system_error("cannot open the folder '" + path + "'", errno);
  const int code = uninterrupted([&] { return ::fsync(fd); }) < 0 ? errno : 0;
  ::close(fd);
  if (code && code != EINVAL)
    throw system_error("cannot write the folder '" + path + "' through to the disk", code);  // EINVAL: not needed there
}

inline void rename_path(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) < 0) throw system_error("cannot rename '" + from + "' to '" + to + "'", errno);
}

// A file that appears under its name only when it is whole and on the disk: written beside it under a temporary name,
// then renamed. Without commit() nothing is left, and a file that had the name stays as it was.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path) : path_(target(path)), file_(create(path_)) {}
  ~AtomicFile() {
    if (!committed_) ::unlink(file_.path().c_str());
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes) { file_.write(data, bytes); }
  // The file takes its name; durable when this returns.
  void commit() {
    file_.sync();
    rename_path(file_.path(), path_);
    committed_ = true;
    sync_folder(parent_folder(path_));
  }

 private:
  static std::string target(const std::string& path) {
    std::error_code none;
    const auto status = std::filesystem::status(path, none);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))
      throw Error("'" + path +
                  "' is a folder, a pipe or a device: expected a regular file or a new name; choose another");
    const bool through_link =
        std::filesystem::is_symlink(std::filesystem::symlink_status(path, none)) && std::filesystem::exists(status);
    return through_link ? std::filesystem::canonical(path).string()
                        : path;  // renaming onto a link would replace the link
  }
  static File create(const std::string& path) {
    const std::string temporary = str(path, ".", ::getpid(), ".partial");
    ::unlink(temporary.c_str());  // a killed process that had our number left it
    return File::create(temporary);
  }

  std::string path_;
  File file_;
  bool committed_ = false;
};

// path gets this content, whole and durable, or an Error is thrown and it stays as it was.
inline void write_file(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content.data(), content.size());
  file.commit();
}

// Appends a line to a file, which is made if it is not there; all of the line or an Error and none. Not durable.
inline void append_line(const std::string& path, const std::string& line) {
  const int fd =
      uninterrupted([&] { return ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0666); });
  if (fd < 0) throw system_error("cannot open '" + path + "'", errno);
  const std::string text = line + "\n";
  const off_t size = ::lseek(fd, 0, SEEK_END);
  int code = 0;
  for (size_t done = 0; done < text.size() && !code;) {
    const ssize_t n = uninterrupted([&] { return ::write(fd, text.data() + done, text.size() - done); });
    if (n < 0) code = errno;
    else done += n;
  }
  if (code && ::ftruncate(fd, size) < 0) code = errno;
  ::close(fd);
  if (code) throw system_error("cannot write '" + path + "'", code);
}

// ---- checksums ----------------------------------------------------------------------------------------------------
// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78) of bytes that follow bytes of the given CRC; 0 begins.
inline uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0) {
  // table[k][b]: what byte b does to the remainder when k more bytes follow it; so eight bytes take eight independent
  // look-ups.
  static constexpr auto table = [] {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t b = 0; b < 256; b++) {
      t[0][b] = b;
      for (int bit = 0; bit < 8; bit++) t[0][b] = (t[0][b] >> 1) ^ (t[0][b] & 1 ? 0x82f63b78u : 0);
    }
    for (size_t k = 1; k < 8; k++)
      for (size_t b = 0; b < 256; b++) t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 255];
    return t;
  }();
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t x;
    memcpy(&x, p, 8);
    x ^= crc;
    crc = 0;
    for (size_t k = 0; k < 8; k++) crc ^= table[7 - k][(x >> (8 * k)) & 255];
  }
  for (; bytes; bytes--, p++) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 255];
  return ~crc;
}

// CRC-32C of a whole file, read in pieces.
inline uint32_t crc32c(const File& file) {
  std::vector<char> piece(size_t{1} << 20);
  uint32_t crc = 0;
  for (int64_t at = 0, size = file.size_bytes(); at < size;) {
    const size_t bytes = std::min(size - at, static_cast<int64_t>(piece.size()));
    file.read(piece.data(), bytes, at);
    crc = crc32c(piece.data(), bytes, crc);
    at += static_cast<int64_t>(bytes);
  }
  return crc;
}

// ---- folders ------------------------------------------------------------------------------------------------------
// Makes the folder and those above it; nothing to do if it is there.
inline void make_folder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (!error && !std::filesystem::is_directory(path, error)) error = std::make_error_code(std::errc::not_a_directory);
  if (error) throw system_error("cannot make the folder '" + path + "'", error.value());
}

// The names in a folder, sorted by their bytes, without "." and "..".
inline std::vector<std::string> list_folder(const std::string& path) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(path, error), last; !error && entry != last; entry.increment(error))
    names.push_back(entry->path().filename().string());
  if (error) throw system_error("cannot list the folder '" + path + "'", error.value());
  std::sort(names.begin(), names.end());
  return names;
}

// Removes a folder and all in it, or a file; links are removed, not followed. Nothing to do if it is not there.
inline void remove_tree(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) throw system_error("cannot remove '" + path + "'", error.value());
}

// The paths that a shell pattern (* ? [...]) matches, sorted by their bytes; a path that exists as it is written is
// itself. None is an Error.
inline std::vector<std::string> glob_files(const std::string& pattern) {
  std::error_code none;
  if (std::filesystem::exists(pattern, none)) return {pattern};
  glob_t found;
  const int result = ::glob(pattern.c_str(), GLOB_ERR | GLOB_NOSORT, nullptr, &found);
  std::vector<std::string> paths;
  if (result == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  ::globfree(&found);
  if (paths.empty())
    throw Error(
        "no file matches '" + pattern + "'" +
        (result == GLOB_ABORTED ? ": a folder on the way cannot be read; check its permissions" : "; check the path"));
  std::sort(paths.begin(), paths.end());
  return paths;
}

// ---- the lock of a run --------------------------------------------------------------------------------------------
// Held while a run writes its folder: a second one gets an Error that names the first one's process. Goes with the
// process, however it ends; the file FOLDER/lock stays and means nothing by itself.
class RunLock {
 public:
  explicit RunLock(const std::string& folder) {
    const std::string path = folder + "/lock";
    fd_ = uninterrupted(
        [&] { return ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666); });
    if (fd_ < 0) throw system_error("cannot open '" + path + "'", errno);
    if (::flock(fd_, LOCK_EX | LOCK_NB) < 0) {
      const int code = errno;
      char text[20] = {};
      const ssize_t length = ::pread(fd_, text, sizeof text, 0);
      ::close(fd_);
      if (code != EWOULDBLOCK) throw system_error("cannot lock '" + path + "'", code);
      long process = 0;
      std::from_chars(text, text + std::max<ssize_t>(length, 0), process);
      throw Error(str("'", folder, "' is being written by another run, process ", process,
                      ": wait for it or stop it, or choose another folder"));
    }
    const std::string process = std::to_string(::getpid()) + "\n";  // for that message only
    if (::ftruncate(fd_, 0) < 0 || ::pwrite(fd_, process.data(), process.size(), 0) < 0) {
      const int code = errno;
      ::close(fd_);
      throw system_error("cannot write '" + path + "'", code);
    }
  }
  ~RunLock() { ::close(fd_); }
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace gca
